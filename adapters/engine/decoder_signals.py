"""Read signals out of decoder layers in prefill: attention paid in a layer or in front of it, transitions, neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foveate.adapters import compat
from foveate.adapters.attachment import undone_on_failure
from foveate.adapters.engine import checks
from foveate.adapters.towers.taps import NEURONS, Tap, exact
from foveate.cuda import (
    core_neurons,
    match_counts,
    neuron_counts,
    rows_to_columns_attention,
    transition_score,
)
from foveate.errors import InputError
from foveate.pruners.core.method import (
    CoreMatches,
    CrossModalAttention,
    InstructionAttention,
    LastTokenAttention,
    RowMatches,
    Signal,
    TransitionVariation,
)


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
        with undone_on_failure(self.remove):
            self._install(set(signals))

    def _install(self, signals: set[Signal]) -> None:
        layers = self.layers
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
        rotate = compat.rotation(attention)

        @torch.no_grad()  # nothing is saved for backward here, where a checkpointed layer would miss it when run again
        def reduce(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            q, k = (_heads(seen.pop(name), module).transpose(1, 2) for name in ("q", "k"))
            q, k = rotate(q, k, *self.asked().rotary(k))
            if compat.untested():
                checks.check_signal_keys(compat.passed_cache(kwargs), module.layer_idx, k)
            k = _with_past(k, self.asked().cache, module.layer_idx, stored=True)
            for signal in signals:
                self.values[signal] = self._statistic(signal, q, k, compat.scale(module))

        self.remember(compat.query_source(attention), seen, "q")
        self.remember(compat.key_source(attention), seen, "k")
        self.hook(attention, reduce)

    @exact
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

    @exact
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
        q, k = compat.normalised(attention, *(_heads(x, attention) for x in (queries, keys)))
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        rotate = compat.rotation(attention)
        here = (x.gather(-2, rows[..., None].expand(*x.shape[:-2], -1, x.shape[-1])) for x in rotary)
        q = rotate(q, q[:, :1], *here)[0]  # models rotate both at once; of the other one head will do
        k = rotate(k[:, :1], k, *rotary)[1]
        k = _with_past(k, cache, signal.layer, stored=False)
        return self._ahead(q, k, rows, counted, present, compat.scale(attention))

    @exact
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
            self._handles.append(module.register_forward_pre_hook(nothing))
            self._handles.append(module.register_forward_hook(lent))

    def _lends(self, module: nn.Module) -> bool:
        # while ahead() itself runs there is nothing to lend yet; gradients need the layer's own results
        return module in self._lent and not torch.is_grad_enabled()


@exact
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
    past = 0 if cache is None else compat.cached_length(cache, layer) - stored * k.shape[2]
    if past <= 0:
        return k
    keys, _ = compat.layer_states(cache, layer)
    if not isinstance(keys, Tensor) or keys.device != k.device or keys.shape[2] != past + stored * k.shape[2]:
        raise InputError(
            f"the keys of decoder layer {layer} are offloaded or quantised in the cache; methods that read attention inside "
            "the decoder cannot continue such a cache"
        )
    return keys if stored else torch.cat([keys, k], dim=2)


def _rows(q: Tensor, k: Tensor, rows: Tensor, counted: Tensor | None, mask: Tensor, past: int, scale: float) -> Tensor:
    """Attention that the query columns ``rows (B, R)`` of ``q (B, H, K, d)`` pay, mean over those ``counted``."""
    picked = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    return rows_to_columns_attention(
        picked, k, row_positions=rows + past, row_valid=counted, key_valid=mask, scale=scale
    )
