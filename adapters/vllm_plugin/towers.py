"""Read signals out of vLLM's vision towers, whose attention heads may be spread over several processes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapters.attachment import Replaced
from foveate.adapters.towers.taps import EncoderTap, by_segment, mean_of_units, statistic
from foveate.pruners.core import ClassFeatures, Signal


class TowerTap(EncoderTap):
    """Collects signals of one call of a tower whose blocks are ``blocks``.

    Every attention statistic is a mean over heads, so the mean over processes of what their heads say is the whole.

    Args:
        prefix: class tokens in front of the patches of each view.
        bounds: None for towers that see batches of views ``(V, L, C)``; else where the pictures of a packed sequence
            ``(S, 1, C)`` begin and end, and values are means over units of ``unit`` patches.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        signals: Iterable[Signal],
        *,
        prefix: int = 0,
        unit: int = 1,
        bounds: list[int] | None = None,
    ) -> None:
        self.prefix, self.unit, self.bounds = prefix, unit, bounds
        super().__init__(blocks, signals)

    def _tap_features(self, block: nn.Module, signals: list[Signal]) -> None:
        forward = block.forward

        @functools.wraps(forward)
        def listening(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
            for signal in signals if self.open else ():
                if self.bounds is not None:
                    self.values[signal] = mean_of_units(hidden.flatten(0, 1), self.unit)
                else:
                    self.values[signal] = (
                        hidden[:, 0] if isinstance(signal, ClassFeatures) else hidden[:, self.prefix :]
                    )
            return output

        # blocks that vLLM may compile call their `forward` past torch's hooks
        self._handles.append(Replaced(block, "forward", listening))

    def _tap_attention(self, block: nn.Module, signals: list[Signal]) -> None:
        def reduce(module: nn.Module, args: Any, kwargs: Any) -> None:
            named = dict(zip(("query", "key"), args)) | kwargs
            q, k = named["query"], named["key"]  # behind the rotary embedding, this process's heads
            if q.ndim == 3:
                q, k = (x.unflatten(-1, (module.num_heads, -1)) for x in (q, k))
            for signal in signals:
                if self.bounds is None:
                    value = statistic(signal, q.transpose(1, 2), k.transpose(1, 2), module.scale, self.prefix)
                else:
                    value = mean_of_units(by_segment(signal, q[0], k[0], self.bounds, module.scale), self.unit)
                self.values[signal] = mean_over_processes(value)

        self.hook(attention_of(block), reduce, before=True)


def attention_of(block: nn.Module) -> nn.Module:
    """The module of a tower's block that is called with queries and keys."""
    from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention

    return next(module for module in block.modules() if isinstance(module, MMEncoderAttention))


def mean_over_processes(values: Tensor) -> Tensor:
    """Mean over the tensor-parallel processes, the same on all of them."""
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

    size = get_tensor_model_parallel_world_size()
    if size == 1:
        return values
    with torch.no_grad():
        return tensor_model_parallel_all_reduce(values.contiguous()) / size
