"""Read signals out of vision towers while they run, without changing how attention is computed.

A tap listens to a block's query and key projections and reduces them to the asked statistic the moment the block is
done, so nothing of size N x N, and no query or key, outlives the block.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapters import compat
from foveate.adapters.attachment import undone_on_failure
from foveate.cuda import (
    class_attention,
    given_attention,
    received_attention,
)
from foveate.errors import MissingSignalError
from foveate.pruners.core.method import (
    ClassAttention,
    ClassFeatures,
    CoreMatches,
    CoreNeurons,
    CrossModalAttention,
    EncoderFeatures,
    EncoderKeys,
    GivenAttention,
    InstructionAttention,
    LastTokenAttention,
    ReceivedAttention,
    RowMatches,
    Signal,
    TransitionVariation,
)

FEATURES = (EncoderFeatures, ClassFeatures)
CLASS_TOKEN = (ClassAttention, ClassFeatures)
NEURONS = (CoreNeurons, CoreMatches, RowMatches)
DECODER = (LastTokenAttention, CrossModalAttention, InstructionAttention, TransitionVariation, *NEURONS)


class Tap:
    """Collects signals of one call. ``values[signal]`` holds what :meth:`close` hands out."""

    def __init__(self) -> None:
        self.values: dict[Signal, Tensor] = {}
        self.open = False
        self._handles: list[Any] = []

    def hook(self, module: nn.Module, listener: Callable[..., None], *, before: bool = False) -> None:
        """Call ``listener(module, args, kwargs[, output])`` whenever ``module`` runs while the tap is open."""

        def listen(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
            if self.open and before:
                listener(module, args, kwargs)
            elif self.open:
                listener(module, args, kwargs, output)

        register = module.register_forward_pre_hook if before else module.register_forward_hook
        self._handles.append(register(listen, with_kwargs=True))

    def remember(self, module: nn.Module, seen: dict[str, Any], name: str) -> None:
        """Put what ``module`` returns into ``seen[name]`` whenever it runs while the tap is open."""

        def listen(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            seen[name] = output

        self.hook(module, listen)

    def close(self) -> dict[Signal, Tensor]:
        """Stop listening and hand out what was collected."""
        values, self.values, self.open = self.values, {}, False
        return values

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def exact(reduce: Callable[..., Any]) -> Callable[..., Any]:
    """Statistics and choices: no gradient is kept for them, and autocast must not coarsen them."""

    @wraps(reduce)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        if torch.is_autocast_enabled(device):
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return reduce(*args, **kwargs)
        if not torch.is_grad_enabled():  # switching takes longer than many a statistic
            return reduce(*args, **kwargs)
        with torch.no_grad():
            return reduce(*args, **kwargs)

    return run


@exact
def statistic(signal: Signal, q: Tensor, k: Tensor, scale: float, prefix: int) -> Tensor:
    """One encoder statistic from ``q, k (V, H, L, d)`` with ``prefix`` class and register tokens in front: ``(V, n[, d])``.

    Raises:
        MissingSignalError: the signal is no statistic of a vision tower.
    """
    if isinstance(signal, ReceivedAttention):
        first = prefix if signal.queries == "patches" else 0
        return received_attention(q, k, scale=scale, first_query=first, logits=signal.logits)[:, prefix:]
    if isinstance(signal, GivenAttention):
        return given_attention(q, k, scale=scale, first=prefix, logits=signal.logits)
    if isinstance(signal, ClassAttention) and signal.logits:
        return received_attention(q[:, :, :1], k, scale=scale, logits=True)[:, prefix:]
    if isinstance(signal, ClassAttention):
        return class_attention(q, k, scale=scale)[:, prefix:]
    if isinstance(signal, EncoderKeys):
        return k.float().mean(dim=1)[:, prefix:]
    raise MissingSignalError(f"no vision tower provides {signal}")


class EncoderTap(Tap, ABC):
    """Signals of a vision tower's blocks; subclasses know where a block keeps them."""

    def __init__(self, blocks: Sequence[nn.Module], signals: Iterable[Signal]) -> None:
        super().__init__()
        signals = dict.fromkeys(signals)  # not a set: tensor-parallel processes must reduce in one order
        with undone_on_failure(self.remove):
            self._install(blocks, signals)

    def _install(self, blocks: Sequence[nn.Module], signals: Iterable[Signal]) -> None:
        for i in {s.layer for s in signals}:
            mine = [s for s in signals if s.layer == i]
            features = [s for s in mine if isinstance(s, FEATURES)]
            if features:
                self._tap_features(blocks[i], features)
            if len(features) < len(mine):
                self._tap_attention(blocks[i], [s for s in mine if s not in features])

    @abstractmethod
    def _tap_features(self, block: nn.Module, signals: list[Signal]) -> None:
        """Collect what the block gives out."""

    @abstractmethod
    def _tap_attention(self, block: nn.Module, signals: list[Signal]) -> None:
        """Collect statistics of the block's queries and keys."""


class SplitProjectionTap(EncoderTap):
    """CLIP and SigLIP towers: ``(V, L, C)`` batches, separate ``q_proj`` and ``k_proj``.

    Values are per view: ``(V, n)``, ``(V, n, C)``, and ``(V, C)`` for class features.
    """

    def __init__(self, layers: nn.ModuleList, prefix: int, signals: Iterable[Signal]) -> None:
        self.prefix = prefix
        super().__init__(layers, signals)

    def _tap_features(self, layer: nn.Module, signals: list[Signal]) -> None:
        def listen(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            for signal in signals:
                self.values[signal] = hidden[:, 0] if isinstance(signal, ClassFeatures) else hidden[:, self.prefix :]

        self.hook(layer, listen)

    def _tap_attention(self, layer: nn.Module, signals: list[Signal]) -> None:
        attention, seen = layer.self_attn, {}

        def reduce(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            shape = (compat.heads(module), -1)
            q, k = (seen.pop(name).unflatten(-1, shape).transpose(1, 2) for name in ("q", "k"))
            for signal in signals:
                self.values[signal] = statistic(signal, q, k, compat.scale(module), self.prefix)

        self.remember(attention.q_proj, seen, "q")
        self.remember(attention.k_proj, seen, "k")
        self.hook(attention, reduce)


class PackedTap(EncoderTap):
    """Qwen towers: all images packed into one ``(S, C)`` sequence cut by ``cu_seqlens``, one fused ``qkv``.

    Patches come in merge units of ``unit`` consecutive ones; values are means over units, in tower order: ``(S / unit[, C])``.
    """

    def __init__(self, blocks: nn.ModuleList, unit: int, signals: Iterable[Signal]) -> None:
        self.unit = unit
        super().__init__(blocks, signals)

    def _tap_features(self, block: nn.Module, signals: list[Signal]) -> None:
        def listen(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for signal in signals:
                self.values[signal] = mean_of_units(output, self.unit)

        self.hook(block, listen)

    def _tap_attention(self, block: nn.Module, signals: list[Signal]) -> None:
        attention, seen = block.attn, {}
        rotate = compat.tower_rotation(attention)

        def reduce(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            q, k, _ = seen.pop("qkv").unflatten(-1, (3, compat.heads(module), -1)).unbind(1)  # (S, H, d)
            q, k = rotate(q, k, *compat.tower_rotary(kwargs))
            bounds, scale = compat.segments(kwargs), compat.scale(module)
            for signal in signals:
                self.values[signal] = mean_of_units(by_segment(signal, q, k, bounds, scale), self.unit)

        self.remember(attention.qkv, seen, "qkv")
        self.hook(attention, reduce)


def mean_of_units(patches: Tensor, unit: int) -> Tensor:
    """Means of ``unit`` consecutive patches in float32: ``(S[, C]) -> (S / unit[, C])``."""
    return patches.float().unflatten(0, (-1, unit)).mean(dim=1)


def by_segment(signal: Signal, q: Tensor, k: Tensor, bounds: list[int], scale: float) -> Tensor:
    """The statistic inside every segment of a packed sequence, ``q, k (S, H, d)``: ``(S[, d])``.

    Segment i goes from ``bounds[i]`` to ``bounds[i + 1]``; those of equal length go as one batch.
    """
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    result = None
    for length in sorted(set(lengths)):
        starts = torch.tensor([s for s, n in zip(bounds, lengths) if n == length], device=q.device)
        where = starts[:, None] + torch.arange(length, device=q.device)  # (segments, length)
        part = statistic(signal, q[where].transpose(1, 2), k[where].transpose(1, 2), scale, 0)
        if result is None:
            result = part.new_zeros(len(q), *part.shape[2:])
        result[where] = part
    return result
