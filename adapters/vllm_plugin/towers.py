"""Read signals out of vLLM's vision towers, whose attention heads may be spread over several processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from foveate.adapters.taps import Replaced, TowerTap, Values, by_segment, exactly, mean_of_units
from foveate.pruners.core import Signal
from foveate.pruners.core.signals import TowerAttention, TowerOutput


class VllmTowerTap(TowerTap):
    """Signals of a vLLM tower's blocks.

    Every attention statistic is a mean over heads, so the mean over processes of what their heads say is the whole.

    Args:
        blocks, signals, values: as for :class:`TowerTap`.
        prefix: class tokens before the patches of each view.
        unit: patches that become one token, of which values are means, in packed sequences.
        bounds: where the pictures of a packed sequence ``(S, 1, C)`` begin and end; None for towers that see batches of
            views ``(V, L, C)``.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        signals: Iterable[Signal],
        values: Callable[[], Values | None],
        *,
        prefix: int = 0,
        unit: int = 1,
        bounds: list[int] | None = None,
    ) -> None:
        self.bounds = bounds
        super().__init__(blocks, signals, values, prefix=prefix, unit=unit)

    def tap_output(self, block: nn.Module, signals: list[TowerOutput]) -> None:
        forward = block.forward

        @functools.wraps(forward)
        def listening(*args: Any, **kwargs: Any) -> Any:
            output, values = forward(*args, **kwargs), self.values()
            hidden = output[0] if isinstance(output, tuple) else output
            for signal in signals if values is not None else ():
                if self.bounds is None:
                    values[signal] = signal.reduce(hidden, self.prefix)
                else:
                    values[signal] = mean_of_units(hidden.flatten(0, 1), self.unit)
            return output

        # blocks that vLLM may compile call their `forward` past torch's hooks
        self._handles.append(Replaced(block, "forward", listening))

    def tap_attention(self, block: nn.Module, signals: list[TowerAttention]) -> None:
        def reduce(values: Values, module: nn.Module, args: Any, kwargs: Any) -> None:
            named = dict(zip(("query", "key"), args)) | kwargs
            q, k = named["query"], named["key"]  # after the rotary embedding, this process's heads
            if q.ndim == 3:
                q, k = (x.unflatten(-1, (module.num_heads, -1)) for x in (q, k))
            for signal in signals:
                if self.bounds is None:
                    value = exactly(signal.reduce, q.transpose(1, 2), k.transpose(1, 2), module.scale, self.prefix)
                else:
                    value = mean_of_units(by_segment(signal, q[0], k[0], self.bounds, module.scale), self.unit)
                values[signal] = mean_over_processes(value)

        self.hook(attention_of(block), reduce, before=True)


def attention_of(block: nn.Module) -> nn.Module:
    """The module of a tower's block that is called with queries and keys."""
    from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention

    return next(module for module in block.modules() if isinstance(module, MMEncoderAttention))


def mean_over_processes(values: Tensor) -> Tensor:
    """Mean over the tensor-parallel processes, the same on all of them."""
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(values.contiguous()) / get_tensor_model_parallel_world_size()
