"""Listen to modules of a model while they run, without changing what they do: queries, keys, outputs, activations.

A tap brings tensors to the signals that are about them, which reduce them the moment the module is done. So nothing of
size N x N, and no query or key, outlives the module, and the model keeps its own attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapters import compat
from foveate.adapters.engine import checks
from foveate.cuda import rows_to_columns_attention
from foveate.errors import InputError
from foveate.pruners.core.signals import (
    Columns,
    LayerAttention,
    LayerNeurons,
    LayerUpdate,
    Signal,
    TowerAttention,
    TowerOutput,
)

Values = dict[Signal, Tensor]


class Replaced:
    """A method of one object, replaced by another until :meth:`remove`."""

    def __init__(self, owner: object, name: str, method: Callable[..., Any]) -> None:
        self._owner, self._name, self._own = owner, name, vars(owner).get(name)
        self._removed = False
        setattr(owner, name, method)

    def remove(self) -> None:
        """Give the object back what it had under that name. Calling it again does nothing."""
        if not self._removed and vars(self._owner).pop(self._name, None) is not None and self._own is not None:
            setattr(self._owner, self._name, self._own)
        self._removed = True


def exactly(reduce: Callable[..., Any], *args: Any) -> Any:
    """``reduce(*args)`` of statistics and choices: no gradient is kept for them, and autocast must not coarsen them."""
    device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
    if torch.is_autocast_enabled(device):
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return reduce(*args)
    if not torch.is_grad_enabled():  # switching takes longer than many a statistic
        return reduce(*args)
    with torch.no_grad():
        return reduce(*args)


class Tap:
    """Hooks that listen whenever there is somewhere to put what they hear.

    Args:
        values: says where the running call keeps its signals; None where nothing is asked for.
    """

    def __init__(self, values: Callable[[], Values | None]) -> None:
        self.values = values
        self._handles: list[Any] = []

    def hook(self, module: nn.Module, listener: Callable[..., None], *, before: bool = False) -> None:
        """Call ``listener(values, module, args, kwargs[, output])`` whenever ``module`` runs and is listened to."""

        def listen(module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
            values = self.values()
            if values is not None:
                listener(values, module, args, kwargs, *output)

        register = module.register_forward_pre_hook if before else module.register_forward_hook
        self._handles.append(register(listen, with_kwargs=True))

    def remember(self, module: nn.Module, seen: dict[str, Any], name: str) -> None:
        """Put what ``module`` returns into ``seen[name]`` whenever it is listened to."""
        self.hook(module, lambda values, module, args, kwargs, output: seen.__setitem__(name, output))

    def keep_output(self, module: nn.Module, signal: Signal) -> None:
        """``signal`` is what ``module`` returns."""
        self.hook(module, lambda values, module, args, kwargs, output: values.__setitem__(signal, output))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


# ---------------------------------------------------------------------------------------------------- vision towers


class TowerTap(Tap):
    """Signals of a vision tower's blocks; subclasses know where a block keeps them.

    Args:
        blocks: of the tower.
        signals: that are wanted; in one order, for tensor-parallel processes must reduce alike.
        values: as for :class:`Tap`.
        prefix: class and register tokens before the patches of each view.
        unit: consecutive patches that become one token.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        signals: Iterable[Signal],
        values: Callable[[], Values | None],
        *,
        prefix: int = 0,
        unit: int = 1,
    ) -> None:
        super().__init__(values)
        self.prefix, self.unit = prefix, unit
        wanted: dict[tuple[int, type], list[Any]] = {}
        for signal in dict.fromkeys(signals):
            kind = TowerOutput if isinstance(signal, TowerOutput) else TowerAttention
            wanted.setdefault((signal.layer, kind), []).append(signal)
        try:
            for (layer, kind), alike in wanted.items():
                (self.tap_output if kind is TowerOutput else self.tap_attention)(blocks[layer], alike)
        except BaseException:
            self.remove()
            raise

    def tap_output(self, block: nn.Module, signals: list[TowerOutput]) -> None:
        """Collect what the block gives out."""
        raise NotImplementedError

    def tap_attention(self, block: nn.Module, signals: list[TowerAttention]) -> None:
        """Collect statistics of the block's queries and keys."""
        raise NotImplementedError


class SplitProjectionTap(TowerTap):
    """CLIP and SigLIP towers: ``(V, L, C)`` batches, separate ``q_proj`` and ``k_proj``.

    Values are per view: ``(V, n)``, ``(V, n, C)``, and ``(V, C)`` for class features.
    """

    def tap_output(self, block: nn.Module, signals: list[TowerOutput]) -> None:
        def listen(values: Values, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            values.update((signal, signal.reduce(hidden, self.prefix)) for signal in signals)

        self.hook(block, listen)

    def tap_attention(self, block: nn.Module, signals: list[TowerAttention]) -> None:
        attention, seen = block.self_attn, {}

        def reduce(values: Values, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            shape = (getattr(module, compat.HEADS), -1)
            q, k = (seen.pop(name).unflatten(-1, shape).transpose(1, 2) for name in ("q", "k"))
            scale = compat.scale(module)
            values.update((signal, exactly(signal.reduce, q, k, scale, self.prefix)) for signal in signals)

        self.remember(attention.q_proj, seen, "q")
        self.remember(attention.k_proj, seen, "k")
        self.hook(attention, reduce)


class PackedTap(TowerTap):
    """Qwen towers: all images packed into one ``(S, C)`` sequence cut by ``cu_seqlens``, one fused ``qkv``.

    Patches come in merge units of ``unit`` consecutive ones; values are means over units, in tower order: ``(S /
    unit[, C])``.
    """

    def tap_output(self, block: nn.Module, signals: list[TowerOutput]) -> None:
        def listen(values: Values, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            values.update((signal, mean_of_units(output, self.unit)) for signal in signals)

        self.hook(block, listen)

    def tap_attention(self, block: nn.Module, signals: list[TowerAttention]) -> None:
        attention, seen = block.attn, {}
        rotate = compat.tower_rotation(attention)

        def reduce(values: Values, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            q, k, _ = seen.pop("qkv").unflatten(-1, (3, getattr(module, compat.HEADS), -1)).unbind(1)  # (S, H, d)
            q, k = rotate(q, k, *compat.tower_rotary(kwargs))
            bounds, scale = compat.segments(kwargs), compat.scale(module)
            for signal in signals:
                values[signal] = mean_of_units(by_segment(signal, q, k, bounds, scale), self.unit)

        self.remember(attention.qkv, seen, "qkv")
        self.hook(attention, reduce)


def mean_of_units(patches: Tensor, unit: int) -> Tensor:
    """Means of ``unit`` consecutive patches in float32: ``(S[, C]) -> (S / unit[, C])``."""
    return patches.float().unflatten(0, (-1, unit)).mean(dim=1)


def by_segment(signal: TowerAttention, q: Tensor, k: Tensor, bounds: list[int], scale: float) -> Tensor:
    """The statistic inside every segment of a packed sequence, ``q, k (S, H, d)``: ``(S[, d])``.

    Segment i goes from ``bounds[i]`` to ``bounds[i + 1]``; those of equal length go as one batch.
    """
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    result: Any = None
    for length in sorted(set(lengths)):
        starts = torch.tensor([s for s, n in zip(bounds, lengths) if n == length], device=q.device)
        where = starts[:, None] + torch.arange(length, device=q.device)  # (segments, length)
        part = exactly(signal.reduce, q[where].transpose(1, 2), k[where].transpose(1, 2), scale, 0)
        if result is None:
            result = part.new_zeros(len(q), *part.shape[2:])
        result[where] = part
    return result


# --------------------------------------------------------------------------------------------------- decoder layers


class DecoderTap(Tap):
    """Signals of decoder layers in prefill.

    Args:
        layers: of the decoder.
        signals: that are wanted.
        values: as for :class:`Tap`; what is heard per column of the sequence is kept per place, ``(B, L)``, so that
            a later stage finds it whatever was dropped in between.
        call: the running :class:`~foveate.adapters.engine.prefill.Prefill`.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        signals: Iterable[Signal],
        values: Callable[[], Values | None],
        call: Callable[[], Any],
    ) -> None:
        super().__init__(values)
        self.layers, self.call = layers, call
        signals = dict.fromkeys(signals)
        try:
            for i in {signal.layer for signal in signals}:
                self._install(layers[i], [signal for signal in signals if signal.layer == i])
        except BaseException:
            self.remove()
            raise

    def _install(self, layer: nn.Module, signals: list[Signal]) -> None:
        attention = [s for s in signals if isinstance(s, LayerAttention) and not s.ahead]
        if attention:
            self._tap_attention(layer.self_attn, attention)
        updates = [s for s in signals if isinstance(s, LayerUpdate)]
        if updates:
            self._tap_updates(layer, updates)
        neurons = [s for s in signals if isinstance(s, LayerNeurons)]
        if neurons:
            self._tap_neurons(layer.mlp.down_proj, neurons)

    def _tap_attention(self, attention: nn.Module, signals: list[LayerAttention]) -> None:
        seen: dict[str, Tensor] = {}
        rotate = compat.rotation(attention)

        @torch.no_grad()  # nothing is saved for backward here, where a checkpointed layer would miss it when run again
        def reduce(values: Values, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = self.call()
            q, k = (_heads(seen.pop(name), module).transpose(1, 2) for name in ("q", "k"))
            q, k = rotate(q, k, *call.rotary(k))
            if compat.untested():
                checks.check_signal_keys(compat.cache_among(kwargs), module.layer_idx, k)
            k = _with_past(k, call.cache, module.layer_idx, stored=True)
            columns, scale = call.columns(q.device), compat.scale(module)

            def pay(rows: Tensor, counted: Tensor | None) -> Tensor:
                picked = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
                return _paid(picked, k, rows, counted, columns, scale)

            for signal in signals:
                values[signal] = call.by_place(signal, signal.reduce(pay, columns))

        self.remember(compat.query_source(attention), seen, "q")
        self.remember(compat.key_source(attention), seen, "k")
        self.hook(attention, reduce)

    def _tap_updates(self, layer: nn.Module, signals: list[LayerUpdate]) -> None:
        def add(values: Values, before: Tensor, after: Any, *, first: bool) -> None:
            call, after = self.call(), after[0] if isinstance(after, tuple) else after
            with call.timed("transitions", before.device):
                for signal in signals:
                    share = exactly(signal.reduce, before, after, call.columns(before.device))
                    share = call.by_place(signal, share)
                    values[signal] = share if first else values[signal] + share

        def attended(values: Values, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            add(values, args[0] if args else kwargs["hidden_states"], output, first=True)

        def transformed(values: Values, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            add(values, args[0] if args else next(iter(kwargs.values())), output, first=False)

        self.hook(layer.self_attn, attended)
        self.hook(layer.mlp, transformed)

    def _tap_neurons(self, down: nn.Module, signals: list[LayerNeurons]) -> None:
        def reduce(values: Values, module: nn.Module, args: Any, kwargs: Any) -> None:
            call, hidden = self.call(), args[0]
            columns = call.columns(hidden.device)
            with call.timed("neurons", hidden.device):
                for signal in signals:
                    values[signal] = call.by_place(signal, exactly(signal.reduce, hidden, columns))

        self.hook(down, reduce, before=True)

    @torch.no_grad()
    def ahead(self, signal: LayerAttention, hidden: Tensor) -> Tensor:
        """What the layer's attention would be on ``hidden (B, K, D)``, the states that enter it: the signal, per
        place.
        """
        layer, call = self.layers[signal.layer], self.call()
        attention, rotary = layer.self_attn, call.rotary(hidden)
        device = next(layer.parameters()).device
        if device.type != "meta":  # offloaded layers move their inputs themselves
            hidden, rotary = hidden.to(device), tuple(x.to(device) for x in rotary)
        normed = layer.input_layernorm(hidden)
        columns, scale = call.columns(normed.device), compat.scale(attention)
        rotate = compat.rotation(attention)
        k = compat.normalised(attention, "k", _heads(attention.k_proj(normed), attention)).transpose(1, 2)
        k = rotate(k[:, :1], k, *rotary)[1]  # models rotate queries and keys at once; of the other one head will do
        k = _with_past(k, call.cache, signal.layer, stored=False)

        def pay(rows: Tensor, counted: Tensor | None) -> Tensor:
            queries = attention.q_proj(normed.gather(1, rows[..., None].expand(-1, -1, normed.shape[-1])))
            q = compat.normalised(attention, "q", _heads(queries, attention)).transpose(1, 2)
            here = (x.gather(-2, rows[..., None].expand(*x.shape[:-2], -1, x.shape[-1])) for x in rotary)
            return _paid(rotate(q, q[:, :1], *here)[0], k, rows, counted, columns, scale)

        return call.by_place(signal, signal.reduce(pay, columns))


def _paid(q: Tensor, k: Tensor, rows: Tensor, counted: Tensor | None, columns: Columns, scale: float) -> Tensor:
    """Attention that the query columns ``rows (B, R)``, whose queries are ``q``, pay to the new columns: ``(B, K)``."""
    past = columns.mask.shape[1] - columns.visual.shape[1]

    def reduce(q: Tensor, k: Tensor) -> Tensor:
        return rows_to_columns_attention(
            q, k, row_positions=rows + past, row_valid=counted, key_valid=columns.mask, scale=scale
        )

    return exactly(reduce, q, k)[:, past:]


def _heads(x: Tensor, attention: nn.Module) -> Tensor:
    """``(B, K, H d)`` -> ``(B, K, H, d)``, if it is not that already."""
    return x if x.ndim == 4 else x.unflatten(-1, (-1, attention.head_dim))


def _with_past(k: Tensor, cache: Any, layer: int, *, stored: bool) -> Tensor:
    """New keys ``(B, H, K, d)`` after the cached ones of earlier calls; ``stored``: the cache has the new ones
    already.
    """
    past = 0 if cache is None else compat.cached_length(cache, layer) - stored * k.shape[2]
    if past <= 0:
        return k
    keys, _ = compat.layer_states(cache, layer)
    if not isinstance(keys, Tensor) or keys.device != k.device or keys.shape[2] != past + stored * k.shape[2]:
        raise InputError(
            f"the keys of decoder layer {layer} are offloaded or quantised in the cache; methods that read attention "
            "inside "
            "the decoder cannot continue such a cache"
        )
    return keys if stored else torch.cat([keys, k], dim=2)
