"""Read signals out of attention modules while they run, without changing how attention is computed.

A tap listens to a block's query and key projections and reduces them to the asked statistic the moment the block is
done, so nothing of size N x N, and no query or key, outlives the block.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from foveate.cuda import class_attention, given_attention, received_attention, rows_to_columns_attention
from foveate.errors import InputError, MissingSignalError
from foveate.pruners.base import (
    ClassAttention,
    ClassFeatures,
    CrossModalAttention,
    EncoderFeatures,
    EncoderKeys,
    GivenAttention,
    LastTokenAttention,
    ReceivedAttention,
    Signal,
)

FEATURES = (EncoderFeatures, ClassFeatures)
CLASS_TOKEN = (ClassAttention, ClassFeatures)
DECODER = (LastTokenAttention, CrossModalAttention)


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

    def close(self) -> dict[Signal, Tensor]:
        """Stop listening and hand out what was collected."""
        values, self.values, self.open = self.values, {}, False
        return values

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _exact(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Statistics only choose: no gradient is kept for them, and autocast must not coarsen them."""

    @wraps(reduce)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return reduce(*args, **kwargs)

    return run


@_exact
def statistic(signal: Signal, q: Tensor, k: Tensor, scale: float, prefix: int) -> Tensor:
    """One encoder statistic from ``q, k (V, H, L, d)`` with ``prefix`` class and register tokens in front: ``(V, n[, d])``."""
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


class SplitProjectionTap(Tap):
    """CLIP and SigLIP towers: ``(V, L, C)`` batches, separate ``q_proj`` and ``k_proj``.

    Values are per view: ``(V, n)``, ``(V, n, C)``, and ``(V, C)`` for class features.
    """

    def __init__(self, layers: nn.ModuleList, prefix: int, signals: Iterable[Signal]) -> None:
        super().__init__()
        self.prefix = prefix
        signals = set(signals)
        for i in {s.layer for s in signals if isinstance(s, FEATURES)}:
            self._tap_features(layers[i], [s for s in signals if s.layer == i and isinstance(s, FEATURES)])
        for i in {s.layer for s in signals if not isinstance(s, FEATURES)}:
            self._tap_attention(
                layers[i].self_attn, [s for s in signals if s.layer == i and not isinstance(s, FEATURES)]
            )

    def _tap_features(self, layer: nn.Module, signals: list[Signal]) -> None:
        def listen(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            for signal in signals:
                self.values[signal] = hidden[:, 0] if isinstance(signal, ClassFeatures) else hidden[:, self.prefix :]

        self.hook(layer, listen)

    def _tap_attention(self, attention: nn.Module, signals: list[Signal]) -> None:
        seen: dict[str, Tensor] = {}

        def reduce(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            q, k = (seen.pop(name).unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for name in ("q", "k"))
            for signal in signals:
                self.values[signal] = statistic(signal, q, k, module.scale, self.prefix)

        _remember(self, attention.q_proj, seen, "q")
        _remember(self, attention.k_proj, seen, "k")
        self.hook(attention, reduce)


class PackedTap(Tap):
    """Qwen towers: all images packed into one ``(S, C)`` sequence cut by ``cu_seqlens``, one fused ``qkv``.

    Patches come in merge units of ``unit`` consecutive ones; values are means over units, in tower order: ``(S / unit[, C])``.
    """

    def __init__(self, blocks: nn.ModuleList, unit: int, signals: Iterable[Signal]) -> None:
        super().__init__()
        self.unit = unit
        signals = set(signals)
        for i in {s.layer for s in signals}:
            mine = [s for s in signals if s.layer == i]
            features = [s for s in mine if isinstance(s, FEATURES)]
            if features:
                self._tap_features(blocks[i], features)
            if len(features) < len(mine):
                self._tap_attention(blocks[i].attn, [s for s in mine if s not in features])

    def _tap_features(self, block: nn.Module, signals: list[Signal]) -> None:
        def listen(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for signal in signals:
                self.values[signal] = self._units(output)

        self.hook(block, listen)

    def _tap_attention(self, attention: nn.Module, signals: list[Signal]) -> None:
        seen: dict[str, Any] = {}
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision

        def reduce(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            q, k, _ = seen.pop("qkv").unflatten(-1, (3, module.num_heads, -1)).unbind(1)  # (S, H, d)
            q, k = rotate(q, k, *kwargs["position_embeddings"])
            bounds = kwargs["cu_seqlens"].tolist()
            for signal in signals:
                self.values[signal] = self._units(_by_segment(signal, q, k, bounds, module.scaling))

        _remember(self, attention.qkv, seen, "qkv")
        self.hook(attention, reduce)

    def _units(self, patches: Tensor) -> Tensor:
        return patches.float().unflatten(0, (-1, self.unit)).mean(dim=1)


def _by_segment(signal: Signal, q: Tensor, k: Tensor, bounds: list[int], scale: float) -> Tensor:
    """The statistic inside every segment of a packed sequence; segments of equal length go as one batch."""
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


class DecoderTap(Tap):
    """Attention statistics of decoder layers in prefill. ``describe()`` gives the call's facts when a layer is done.

    ``describe() -> (mask (B, P + K), past, present, text, visual)``: what may be attended, the length of the past, and
    ``(B, K)`` bool masks of present visual tokens, of text and of visual query rows.
    Values: ``(B, K)`` for :class:`LastTokenAttention`, ``(B, 2)`` for :class:`CrossModalAttention`.
    """

    def __init__(self, layers: nn.ModuleList, signals: Iterable[Signal], describe: Callable[[Signal], Any]) -> None:
        super().__init__()
        self.describe = describe
        signals = set(signals)
        for i in {s.layer for s in signals}:
            self._tap_attention(layers[i].self_attn, [s for s in signals if s.layer == i])

    def _tap_attention(self, attention: nn.Module, signals: list[Signal]) -> None:
        seen: dict[str, Tensor] = {}
        rotate = _rotation(attention)

        def reduce(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            q, k = (seen.pop(name) for name in ("q", "k"))
            q, k = (x if x.ndim == 4 else x.unflatten(-1, (-1, module.head_dim)) for x in (q, k))
            q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), *kwargs["position_embeddings"])
            k = _with_past(k, kwargs.get("past_key_values"), module.layer_idx)
            for signal in signals:
                self.values[signal] = self._statistic(signal, q, k, module.scaling)

        # Qwen3 normalises queries and keys behind the projection
        _remember(self, getattr(attention, "q_norm", attention.q_proj), seen, "q")
        _remember(self, getattr(attention, "k_norm", attention.k_proj), seen, "k")
        self.hook(attention, reduce)

    @_exact
    def _statistic(self, signal: Signal, q: Tensor, k: Tensor, scale: float) -> Tensor:
        mask, text, visual = (x if x is None else x.to(q.device) for x in self.describe(signal))
        past = mask.shape[1] - q.shape[2]
        if isinstance(signal, LastTokenAttention):
            places = torch.arange(q.shape[2], device=q.device)
            last = torch.where(mask[:, past:], places, -1).amax(dim=1, keepdim=True)  # (B, 1)
            return _rows(q, k, last, None, mask, past, scale)[:, past:]
        to_visual = _rows(q, k, None, text, mask, past, scale)[:, past:]
        to_text = _rows(q, k, None, visual, mask, past, scale)[:, past:]
        return torch.stack([(to_visual * visual).sum(-1), (to_text * text).sum(-1)], dim=-1)


def _with_past(k: Tensor, cache: Any, layer: int) -> Tensor:
    """New keys ``(B, H, K, d)`` behind the cached ones of earlier calls, if there are any."""
    past = 0 if cache is None else cache.get_seq_length(layer) - k.shape[2]  # the layer has stored the new ones already
    if past <= 0:
        return k
    keys = getattr(cache.layers[layer], "keys", None)
    if not isinstance(keys, Tensor) or keys.device != k.device or keys.shape[2] != past + k.shape[2]:
        raise InputError(
            f"the keys of decoder layer {layer} are offloaded or quantised in the cache; methods that read attention inside "
            "the decoder cannot continue such a cache"
        )
    return keys


def _rotation(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """``rotate(q, k, cos, sin)`` as the attention module itself does it."""
    home = sys.modules[type(attention).__module__]
    if hasattr(home, "apply_rotary_pos_emb"):
        return home.apply_rotary_pos_emb
    # Qwen2-VL and Qwen2.5-VL before transformers 5.20
    return partial(
        home.apply_multimodal_rotary_pos_emb, mrope_section=attention.config.rope_parameters["mrope_section"]
    )


def _rows(
    q: Tensor, k: Tensor, rows: Tensor | None, valid: Tensor | None, mask: Tensor, past: int, scale: float
) -> Tensor:
    """Attention of a few rows; given as places ``rows (B, R)`` or as a mask ``valid (B, K)`` of rows to average."""
    if rows is None:
        # gather the valid rows only: at most as many as the fullest sample has
        width = int(valid.sum(dim=1).amax())
        order = valid.long().argsort(dim=1, descending=True, stable=True)[:, :width]
        rows, valid = order, valid.gather(1, order)
    picked = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    return rows_to_columns_attention(picked, k, row_positions=rows + past, row_valid=valid, key_valid=mask, scale=scale)


def _remember(tap: Tap, module: nn.Module, seen: dict[str, Any], name: str) -> None:
    def listen(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        seen[name] = output

    tap.hook(module, listen)
