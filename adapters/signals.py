"""Read signals out of attention modules while they run, without changing how attention is computed.

A tap listens to a block's query and key projections and reduces them to the asked statistic the moment the block is
done, so nothing of size N x N, and no query or key, outlives the block.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foveate.cuda import (
    class_attention,
    core_neurons,
    given_attention,
    match_counts,
    neuron_counts,
    received_attention,
    rows_to_columns_attention,
    transition_score,
)
from foveate.errors import InputError, MissingSignalError
from foveate.pruners.base import (
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
        signals = set(signals)
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
            q, k = (seen.pop(name).unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for name in ("q", "k"))
            for signal in signals:
                self.values[signal] = statistic(signal, q, k, module.scale, self.prefix)

        _remember(self, attention.q_proj, seen, "q")
        _remember(self, attention.k_proj, seen, "k")
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
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision

        def reduce(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            q, k, _ = seen.pop("qkv").unflatten(-1, (3, module.num_heads, -1)).unbind(1)  # (S, H, d)
            q, k = rotate(q, k, *kwargs["position_embeddings"])
            bounds = kwargs["cu_seqlens"].tolist()
            for signal in signals:
                self.values[signal] = mean_of_units(by_segment(signal, q, k, bounds, module.scaling), self.unit)

        _remember(self, attention.qkv, seen, "qkv")
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


@dataclass(frozen=True)
class Present:
    """What the running decoder layers work on, as far as statistics need to know.

    Attributes:
        mask: ``(B, P + K)`` bool, what may be attended; past: P.
        index: ``(B, K)`` new places in order of entry, ``length`` where a row is padded; length: L.
    """

    mask: Tensor
    past: int
    index: Tensor
    length: int

    @property
    def valid(self) -> Tensor:
        """``(B, K)`` bool: present and attended."""
        return self.mask[:, self.past :]

    def only(self, places: Tensor) -> Tensor:
        """Which valid columns belong to ``places (B, L)`` bool: ``(B, K)`` bool."""
        return places.gather(1, self.index.clamp(max=self.length - 1)) & self.valid

    def by_place(self, values: Tensor) -> Tensor:
        """``(B, K)`` values of columns as ``(B, L)`` values of places, 0 for places that are not there."""
        spread = values.new_zeros(len(values), self.length + 1)
        return spread.scatter(1, self.index.to(values.device), values)[:, : self.length]


class Places(Protocol):
    """What a :class:`DecoderTap` asks about the running call (the session answers). Masks are ``(B, L)`` bool over new places."""

    visual: Tensor
    instruction: Tensor
    """Text behind the last picture."""

    def text(self, system_tokens: int | None) -> Tensor:
        """Text without a system prompt of so many tokens (None: behind the first picture)."""

    cache: Any
    """The running call's KV cache, None without one or where it is new."""

    def present(self, device: torch.device) -> Present:
        """What the layers work on now."""

    def rotary(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``(B, K, d)`` of what the layers work on now, for states like ``hidden``."""

    def timed(self, name: str, device: torch.device) -> AbstractContextManager[None]:
        """Count the body's time under ``name``."""


class DecoderTap(Tap):
    """Statistics of decoder layers in prefill; ``asked()`` gives the running call's facts.

    Values: ``(B, L)`` by place, so that a later stage finds them whatever was dropped in between; ``(B, 2)`` for
    :class:`CrossModalAttention`, ``(B, F)`` for :class:`CoreNeurons`.
    """

    def __init__(self, layers: nn.ModuleList, signals: Iterable[Signal], asked: Callable[[], Places]) -> None:
        super().__init__()
        self.layers, self.asked = layers, asked
        self._lent: dict[nn.Module, Tensor] = {}  # computed in front of a layer, for that layer's own modules
        signals = set(signals)
        for i in {s.layer for s in signals if isinstance(s, InstructionAttention)}:
            self._lend(i)
        for i in {s.layer for s in signals}:
            mine = [s for s in signals if s.layer == i]
            attention = [s for s in mine if isinstance(s, (LastTokenAttention, CrossModalAttention))]
            if attention:
                self._tap_attention(layers[i].self_attn, attention)
            transitions = [s for s in mine if isinstance(s, TransitionVariation)]
            if transitions:
                self._tap_transitions(layers[i], transitions)
            neurons = [s for s in mine if isinstance(s, NEURONS)]
            if neurons:
                self._tap_neurons(layers[i].mlp.down_proj, neurons)

    def close(self) -> dict[Signal, Tensor]:
        self._lent.clear()
        return super().close()

    # --------------------------------------------------------------------------------------- attention of a layer

    def _tap_attention(self, attention: nn.Module, signals: list[Signal]) -> None:
        seen: dict[str, Tensor] = {}
        rotate = _rotation(attention)

        @torch.no_grad()  # nothing is saved for backward here, where a checkpointed layer would miss it when run again
        def reduce(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            q, k = (_heads(seen.pop(name), module).transpose(1, 2) for name in ("q", "k"))
            q, k = rotate(q, k, *self.asked().rotary(k))
            k = _with_past(k, self.asked().cache, module.layer_idx, stored=True)
            for signal in signals:
                self.values[signal] = self._statistic(signal, q, k, _scale(module))

        # Qwen3 normalises queries and keys behind the projection
        _remember(self, getattr(attention, "q_norm", attention.q_proj), seen, "q")
        _remember(self, getattr(attention, "k_norm", attention.k_proj), seen, "k")
        self.hook(attention, reduce)

    @_exact
    def _statistic(self, signal: Signal, q: Tensor, k: Tensor, scale: float) -> Tensor:
        present = self.asked().present(q.device)
        mask, past = present.mask, present.past
        if isinstance(signal, LastTokenAttention):
            places = torch.arange(q.shape[2], device=q.device)
            last = torch.where(mask[:, past:], places, -1).amax(dim=1, keepdim=True)  # (B, 1)
            return present.by_place(_rows(q, k, last, None, mask, past, scale)[:, past:])
        text = present.only(self.asked().text(signal.system_tokens).to(q.device))
        visual = present.only(self.asked().visual.to(q.device))
        to_visual = _rows(q, k, *_few(text), mask, past, scale)[:, past:]
        to_text = _rows(q, k, *_few(visual), mask, past, scale)[:, past:]
        return torch.stack([(to_visual * visual).sum(-1), (to_text * text).sum(-1)], dim=-1)

    # ----------------------------------------------------------------------------------- transitions inside a layer

    def _tap_transitions(self, layer: nn.Module, signals: list[TransitionVariation]) -> None:
        def add(before: Tensor, after: Any, first: bool) -> None:
            after = after[0] if isinstance(after, tuple) else after
            with self.asked().timed("transitions", before.device):
                for signal in signals:
                    share = self._transition(signal, before, after)
                    self.values[signal] = share if first else self.values[signal] + share

        def attended(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            add(args[0] if args else kwargs["hidden_states"], output, True)

        def transformed(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            add(args[0] if args else next(iter(kwargs.values())), output, False)

        self.hook(layer.self_attn, attended)
        self.hook(layer.mlp, transformed)

    def _transition(self, signal: TransitionVariation, before: Tensor, after: Tensor) -> Tensor:
        present = self.asked().present(before.device)
        counted = present.valid
        if signal.softmax_scope == "image":
            counted = present.only(self.asked().visual.to(before.device))
        return present.by_place(transition_variation(before, after, counted, direction=signal.direction))

    # --------------------------------------------------------------------------------------- neurons inside a layer

    def _tap_neurons(self, down: nn.Module, signals: list[Signal]) -> None:
        def reduce(module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0]
            with self.asked().timed("neurons", hidden.device):
                self._neurons(signals, hidden)

        self.hook(down, reduce, before=True)

    @_exact
    def _neurons(self, signals: list[Signal], hidden: Tensor) -> None:
        present = self.asked().present(hidden.device)
        counts: dict[tuple[float, str], Tensor] = {}  # alike for all signals with these parameters
        for signal in signals:
            if isinstance(signal, RowMatches):
                self.values[signal] = present.by_place(row_matches(hidden, present.valid, signal.row))
                continue
            key = signal.rho, signal.topk
            if key not in counts:
                counts[key] = neuron_counts(hidden, signal.rho, valid=present.valid, topk=signal.topk)
            if isinstance(signal, CoreMatches):
                core = core_neurons(counts[key], signal.beta)
                self.values[signal] = present.by_place(match_counts(hidden, core))
            elif signal.shared:
                self.values[signal] = core_neurons(counts[key].sum(0, True), signal.beta).expand(len(hidden), -1)
            else:
                self.values[signal] = core_neurons(counts[key], signal.beta)

    # ------------------------------------------------------------------------------------- attention ahead of a layer

    @torch.no_grad()
    def ahead(self, signal: InstructionAttention, hidden: Tensor, rotary: tuple[Tensor, Tensor], cache: Any) -> Tensor:
        """What the layer's attention would be on ``hidden (B, K, D)``, the hidden states in front of it: ``(B, L)``."""
        layer = self.layers[signal.layer]
        attention = layer.self_attn
        device = next(layer.parameters()).device
        if device.type != "meta":  # offloaded layers move their inputs themselves
            hidden, rotary = hidden.to(device), tuple(x.to(device) for x in rotary)
        normed = layer.input_layernorm(hidden)
        present = self.asked().present(normed.device)
        rows, counted = _few(present.only(self.asked().instruction.to(normed.device)))
        queries = attention.q_proj(normed.gather(1, rows[..., None].expand(-1, -1, normed.shape[-1])))
        keys = attention.k_proj(normed)
        self._lent |= zip(self._lenders(signal.layer), (normed, keys))
        q, k = (_heads(x, attention) for x in (queries, keys))
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        rotate = _rotation(attention)
        here = (x.gather(-2, rows[..., None].expand(*x.shape[:-2], -1, x.shape[-1])) for x in rotary)
        q = rotate(q, q[:, :0], *here)[0]  # models rotate both at once; here the other has no heads
        k = rotate(k[:, :0], k, *rotary)[1]
        k = _with_past(k, cache, signal.layer, stored=False)
        return self._ahead(q, k, rows, counted, present, _scale(attention))

    @_exact
    def _ahead(self, q: Tensor, k: Tensor, rows: Tensor, counted: Tensor, present: Present, scale: float) -> Tensor:
        past = present.past
        paid = rows_to_columns_attention(
            q, k, row_positions=rows + past, row_valid=counted, key_valid=present.mask, scale=scale
        )
        return present.by_place(paid[:, past:])

    def follow(self, layer: int, columns: Tensor) -> None:
        """Of what :meth:`ahead` saw, ``columns (B, K')`` go on into ``layer``."""
        for module in self._lenders(layer):
            if module in self._lent:
                lent = self._lent[module]
                self._lent[module] = lent.gather(1, columns.to(lent.device)[..., None].expand(-1, -1, lent.shape[-1]))

    def forsake(self, layer: int) -> None:
        """What :meth:`ahead` saw is not what enters ``layer``."""
        for module in self._lenders(layer):
            self._lent.pop(module, None)

    def _lenders(self, i: int) -> tuple[nn.Module, ...]:
        norm, project = self.layers[i].input_layernorm, self.layers[i].self_attn.k_proj
        if type(project) is not nn.Linear:
            return ()  # quantised or wrapped: it may need its whole input
        return norm, project

    def _lend(self, i: int) -> None:
        """Let layer ``i`` use what :meth:`ahead` has normalised and projected: its own norm and projection get nothing to do."""

        def nothing(module: nn.Module, args: Any) -> Any:
            return (args[0][:, :0],) if self._lends(module) else None

        def lent(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            return self._lent.pop(module) if self._lends(module) else None

        for module in self._lenders(i):
            self._handles += [module.register_forward_pre_hook(nothing), module.register_forward_hook(lent)]

    def _lends(self, module: nn.Module) -> bool:
        # while ahead() itself runs there is nothing to lend yet; gradients need the layer's own results
        return module in self._lent and not torch.is_grad_enabled()


@_exact
def transition_variation(before: Tensor, after: Tensor, counted: Tensor, *, direction: str = "signed") -> Tensor:
    """Transition scores ``(B, K)`` of one sub-block from ``(B, K, D)``, over the turns of the columns ``counted (B, K)``."""
    score, turn = transition_score(before, after, direction=direction)
    total = (turn * counted).sum(dim=1, keepdim=True)
    return score / total.clamp(min=torch.finfo(torch.float32).tiny)


def row_matches(hidden: Tensor, valid: Tensor, row: int) -> Tensor:
    """Neurons of ``hidden (B, K, F)`` active on each column and on the ``-row``-th last valid one, or the first: ``(B, K)``."""
    behind = valid.flip(1).long().cumsum(1).flip(1)  # valid columns from here to the end
    wanted = behind.amax(dim=1).clamp(max=-row)
    place = ((behind == wanted[:, None]) & valid).long().argmax(dim=1)
    return match_counts(hidden, hidden[torch.arange(len(hidden), device=hidden.device), place] > 0)


def _heads(x: Tensor, attention: nn.Module) -> Tensor:
    """``(B, K, H d)`` -> ``(B, K, H, d)``, if it is not that already."""
    return x if x.ndim == 4 else x.unflatten(-1, (-1, attention.head_dim))


def _few(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Columns where ``valid (B, K)`` holds, as ``(B, R)`` columns and which of these count; R: those of the fullest row."""
    width = int(valid.sum(dim=1).amax())
    order = valid.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    return order, valid.gather(1, order)


def _with_past(k: Tensor, cache: Any, layer: int, *, stored: bool) -> Tensor:
    """New keys ``(B, H, K, d)`` behind the cached ones of earlier calls; ``stored``: the cache has the new ones already."""
    past = 0 if cache is None else cache.get_seq_length(layer) - stored * k.shape[2]
    if past <= 0:
        return k
    keys = getattr(cache.layers[layer], "keys", None)
    if not isinstance(keys, Tensor) or keys.device != k.device or keys.shape[2] != past + stored * k.shape[2]:
        raise InputError(
            f"the keys of decoder layer {layer} are offloaded or quantised in the cache; methods that read attention inside "
            "the decoder cannot continue such a cache"
        )
    return keys if stored else torch.cat([keys, k], dim=2)


def _rotation(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """``rotate(q, k, cos, sin)`` as the attention module itself does it."""
    home = sys.modules[type(attention).__module__]
    if hasattr(home, "apply_rotary_pos_emb"):
        rotate = home.apply_rotary_pos_emb
        place = inspect.signature(rotate).parameters.get("position_ids")
        by_table = place is not None and place.default is place.empty
        return partial(_rotated_by_table, rotate) if by_table else rotate
    # Qwen2-VL and Qwen2.5-VL before transformers 5.20
    return partial(
        home.apply_multimodal_rotary_pos_emb, mrope_section=attention.config.rope_parameters["mrope_section"]
    )


def _rotated_by_table(rotate: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """``rotate`` of transformers 4.37, which looks cosines and sines up in a table of positions."""
    places = torch.arange(cos.shape[:2].numel(), device=cos.device).view(cos.shape[:2])
    return rotate(q, k, cos.flatten(0, 1), sin.flatten(0, 1), places)


def _scale(attention: nn.Module) -> float:
    return getattr(attention, "scaling", attention.head_dim**-0.5)  # transformers 4.37 has no name for it


def _rows(q: Tensor, k: Tensor, rows: Tensor, counted: Tensor | None, mask: Tensor, past: int, scale: float) -> Tensor:
    """Attention that the query columns ``rows (B, R)`` of ``q (B, H, K, d)`` pay, mean over those ``counted``."""
    picked = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    return rows_to_columns_attention(
        picked, k, row_positions=rows + past, row_valid=counted, key_valid=mask, scale=scale
    )


def _remember(tap: Tap, module: nn.Module, seen: dict[str, Any], name: str) -> None:
    def listen(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        seen[name] = output

    tap.hook(module, listen)
