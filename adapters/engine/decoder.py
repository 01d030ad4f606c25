"""Apply what stages keep to a ``transformers`` decoder that is called with ``inputs_embeds``, through forward hooks
only.

A call brings *new* sequence places 0 .. L-1 after *past* ones that the cache has seen. A :class:`Span` says what a
run of consecutive decoder layers works on; what a stage keeps before a layer (:class:`Kept`) starts a new one.
Between calls the cache remembers what each layer holds (``cache.py``), so that caches of different length per layer
are all right.

Everything a user sees stays in unpruned units: attention masks, position ids, hidden states,
``cache.get_seq_length()``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.adapters import compat
from foveate.adapters.engine import cache as books
from foveate.adapters.engine import checks
from foveate.adapters.engine.cache import CachedPlaces, CacheState
from foveate.adapters.engine.mlp import SparseMLP
from foveate.adapters.taps import Replaced
from foveate.errors import UnsupportedModelError

if TYPE_CHECKING:
    from foveate.adapters.engine.prefill import Prefill
    from foveate.adapters.session import Session


@dataclass
class Kept:
    """What goes on: the one form in which a selection reaches a decoder.

    Attributes:
        index: places in order of entry, of a picture (vLLM) or of the call's new places; the number of places where
            a row is padded, on the left, ``(B, K)`` int64.
        embeds: what they carry, ``(B, K, D)``.
        None: what they had.
        levels: brings DeepStack levels ``[(places, D)]`` to what the survivors carry.
        None: as they are.
        positions: ``"keep"`` or ``"compact"``.
        evict: what is not here leaves the caches of earlier layers too, in the end.
    """

    index: Tensor
    embeds: Tensor | None = None
    levels: Callable[[Tensor, Sequence[Tensor]], list[Tensor]] | None = None
    positions: str = "keep"
    evict: bool = False


@dataclass
class Span:
    """What a run of decoder layers works on.

    Attributes:
        first_layer: where the run begins.
        length: new places of the call, L.
        index: new places in the order in which they enter, L where a row is padded (on the left), ``(B, K)``.
        positions: their rotary positions, ``(…, B, K)``; anything where padded.
        shift: how far positions of later tokens move back, ``(B,)``.
        end: position of the last attended place, from which ``generate`` counts on, ``(B,)``.
        held: past places in the layers' caches, -1 where padded, ``(B, P)``.
        mask: what may be attended, ``(B, P + K)`` bool.
        evict: what is not here leaves the caches of the layers above too.
    """

    first_layer: int
    length: int
    index: Tensor
    positions: Tensor
    shift: Tensor
    end: Tensor
    held: Tensor
    mask: Tensor
    evict: bool = False
    layer_kwargs: dict[str, Any] | None = field(default=None, repr=False)
    _column: Tensor | None = field(default=None, repr=False)

    @property
    def past(self) -> int:
        """Past places held, P."""
        return self.held.shape[1]

    @property
    def valid(self) -> Tensor:
        """Columns that are not padding, of this span or of the caller's, ``(B, K)`` bool."""
        return self.mask[:, self.past :]

    @property
    def column(self) -> Tensor:
        """Where every new place stands in this span, ``(B, L + 1)``; -1 for places that are gone."""
        if self._column is None:
            number = torch.arange(self.index.shape[1], device=self.index.device).expand_as(self.index)
            nowhere = self.index.new_full((len(self.index), self.length + 1), -1)
            self._column = nowhere.scatter(1, self.index, number)
            self._column[:, self.length] = -1
        return self._column

    @property
    def last(self) -> tuple[Tensor, Tensor]:
        """``(B,)`` the largest rotary position of a row, and whether the row's last place is there and attended."""
        largest = self.positions.reshape(-1, *self.index.shape).amax(0)
        here = (self.index == self.length - 1) & self.valid
        return torch.where(self.valid, largest, -1).amax(1), here.any(1)

    def restore(self, hidden: Tensor) -> Tensor:
        """``(B, K, D)`` back to the unpruned length ``(B, L, D)``.

        A place that was dropped shows the state of the nearest survivor that entered before it, so that the token after
        it is still predicted from what the decoder has seen.
        """
        column = self.column[:, : self.length]
        padding = (self.index == self.length).sum(1, keepdim=True)
        before = padding + ((column >= 0).long().cumsum(1) - 1).clamp(min=0)
        return take(hidden, torch.where(column >= 0, column, before))


def take(hidden: Tensor, columns: Tensor) -> Tensor:
    """``hidden (B, K, D)`` at ``columns (B, M)`` -> ``(B, M, D)``."""
    return hidden.gather(1, columns.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))


@dataclass
class _Frame:
    """One forward pass of the decoder.

    Attributes:
        length: new places, L.
        past: unpruned past places.
        mask: the caller's, ``(B, past + L)`` bool.
        held: what the layers' caches hold, run by run.
        current: which of ``held`` the running layers have.
        prefill: of a prompt; None where an answer goes on.
        pruned: a stage has taken something away, or put something else in its place.
        reached: layers whose hooks have run.
        levels: of DeepStack that have joined.
        span: what the running layers work on, the last of ``spans``.
    """

    length: int
    past: int
    mask: Tensor
    held: list[CachedPlaces]
    current: CachedPlaces
    prefill: Prefill | None
    pruned: bool = False
    spans: list[Span] = field(default_factory=list)
    reached: set[int] = field(default_factory=set)
    levels: int = 0
    span: Span | None = None


class _Running(threading.local):
    """What runs in this thread.

    Attributes:
        active: a forward pass is under way.
        frame: it, where there is something to prune or to continue.
        cache: the KV cache that it was given, from its first moment on.
    """

    active: bool = False
    frame: _Frame | None = None
    cache: Any = None


class Decoder:
    """Hooks on one text model. The session decides, this class applies.

    Raises:
        UnsupportedModelError: some layers do not attend to everything.
        NotUnderstoodError: the model is called otherwise than by any transformers that is known.
    """

    def __init__(self, text_model: Any, session: Session, *, mrope: bool) -> None:
        kinds = set(getattr(text_model.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise UnsupportedModelError(
                f"{type(text_model).__name__} has layers of type {sorted(kinds)}; pruning needs full attention "
                "throughout "
                "(a sliding-window cache drops places by itself)"
            )
        self.text_model, self.session, self.mrope = text_model, session, mrope
        compat.check_text_model(text_model)
        self.running = _Running()
        self._has_pruned = False
        self.mlps: dict[int, SparseMLP] = {}
        with ExitStack() as undo:
            self._install(undo)
            self.remove = undo.pop_all().close
        books.LIVE[text_model] = weakref.ref(self)

    def _install(self, undo: ExitStack) -> None:
        model = self.text_model
        undo.callback(books.LIVE.pop, model, None)
        for i in sorted(self.session.mlp_stages):
            self.mlps[i] = SparseMLP(model.layers[i].mlp)
            undo.callback(self.mlps[i].remove)
        undo.callback(model.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
        undo.callback(model.register_forward_hook(self._exit, with_kwargs=True).remove)
        undo.callback(model.register_forward_hook(self._close, always_call=True).remove)
        for i, layer in enumerate(model.layers):

            def before(module: nn.Module, args: Any, kwargs: Any, i: int = i) -> Any:
                return None if self.running.frame is None else self._before_layer(i, args, kwargs)

            undo.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        deepstack = compat.deepstack_method(model)
        if deepstack is not None:  # a plain method between layers, out of any hook's reach
            name, add = deepstack
            undo.callback(Replaced(model, name, self._following(add)).remove)

    def rotary(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the running span's positions, for ``hidden (B, K, D)``."""
        return self.text_model.rotary_emb(hidden, self.running.frame.span.positions.to(hidden.device))

    # ------------------------------------------------------------------------------------------------------- entry

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        running = self.running
        running.active, running.frame = True, None
        kwargs = compat.by_name(module, args, kwargs) if args else kwargs
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            if kwargs.get("input_ids") is None:
                raise compat.not_understood(
                    f"{type(module).__name__} is called without inputs_embeds: {', '.join(kwargs)}"
                )
            return None
        cache = running.cache = compat.cache_among(kwargs)
        state: CacheState | None = compat.marked(cache)
        if state is not None:
            state.inside = True
        batch, length = embeds.shape[:2]
        past = state.length if state else compat.told_length(cache) if cache is not None else 0
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        prefill = self.session.begin(embeds, mask if isinstance(mask, Tensor) else None, past, cache)
        if prefill is None and state is None:
            if self._has_pruned:
                checks.check_nothing_hidden(module, cache, mask, positions, length, self.mrope)
            return None
        books.refuse(cache, state, mask, batch, past + length)
        mask = torch.ones(batch, past + length, device=embeds.device) if mask is None else mask.to(embeds.device)
        whole = torch.arange(past, device=embeds.device).expand(batch, past)
        held = state.held if state else [CachedPlaces(0, whole, whole.new_zeros(batch))]
        if prefill is None:
            for i, mlp in self.mlps.items():
                mlp.serve(state.neurons.get(i))
        frame = _Frame(length, past, mask.bool(), held, held[0], prefill)
        text_row = self._first_span(frame, positions, embeds.device)
        kept = prefill.at_entry(embeds) if prefill is not None and prefill.items else None
        running.frame = frame
        self._check_entry(module, kwargs, state, kept)
        if kept is None and state is None:
            return None  # nothing pruned here: the caller's own arguments go on
        kwargs = dict(kwargs)
        if kept is not None:
            kwargs["inputs_embeds"] = self._narrow(0, kept, embeds)
            joined = compat.deepstack(kwargs)
            if joined is not None and kept.levels is not None:
                kwargs |= compat.deepstack_argument(kept.levels(*joined))
        kwargs["attention_mask"] = frame.span.mask.long()
        kwargs["position_ids"] = frame.span.positions
        if text_row:
            kwargs["position_ids"] = torch.cat([_text_positions(frame.span)[None], frame.span.positions])
        return (), kwargs

    def _first_span(self, frame: _Frame, given: Tensor | None, device: torch.device) -> bool:
        """The span of all new places; returns whether a row of text positions led the caller's ``position_ids``."""
        batch, length, past = len(frame.mask), frame.length, frame.past
        if given is None:
            given = torch.arange(past, past + length, device=device)[None]
        given = given[..., -length:].expand(*given.shape[:-2], batch, length)  # Qwen may count the cached ones in
        text_row = given.ndim == 3 and len(given) == 4
        if text_row:
            given = given[1:]
        elif self.mrope and given.ndim == 2:
            given = given.expand(3, batch, length)
        index = torch.arange(length, device=device).expand(batch, length)
        held, positions = frame.held[0], given - frame.held[0].shift[:, None]
        last = torch.where(frame.mask[:, past:], index, 0).amax(-1, keepdim=True)
        end = positions.gather(-1, last.expand(*positions.shape[:-1], 1)).reshape(-1, batch).amax(0)
        self._begin_span(frame, held, index, positions, held.shift, end)
        return text_row

    def _check_entry(
        self, module: nn.Module, kwargs: dict[str, Any], state: CacheState | None, kept: Kept | None
    ) -> None:
        """Raise where the call cannot be cut, or does not follow what the cache holds."""
        frame = self.running.frame
        if frame.prefill is None:
            books.check_follows(frame.current, frame.span)
            if frame.current.last is not None:
                self._check_cut(module, kwargs, strict=True)
        elif kept is not None or (frame.prefill.items and self.session.layer_stages):
            self._check_cut(module, kwargs, strict=compat.untested())
            if compat.deepstack(kwargs) is not None and compat.deepstack_method(module) is None:
                raise compat.not_understood(f"{type(module).__name__} has no method that adds DeepStack features")

    # ------------------------------------------------------------------------------------------------------ layers

    def _before_layer(self, i: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        frame = self.running.frame
        hidden = compat.entering_states(args, kwargs)
        if hidden.shape[1] != frame.span.index.shape[1]:
            raise compat.not_understood(
                f"{hidden.shape[1]} places reach {type(self.text_model.layers[i]).__name__} {i}, where "
                f"{frame.span.index.shape[1]} should be left"
            )
        frame.reached.add(i)
        if frame.prefill is not None and compat.untested() and (i == 0 or i in self.session.layer_stages):
            self._check_own(i, hidden, kwargs)
        held = next((h for h in frame.held[1:] if h.first_layer == i), None)
        if held is not None:  # from here on the cache holds less of the past
            span, nearer = frame.span, frame.current.shift - held.shift
            here = CachedPlaces(i, held.places, span.shift - nearer)
            positions = span.positions + nearer[:, None]
            self._begin_span(frame, here, span.index, positions, here.shift, span.end + nearer)
            frame.current = held
            if frame.prefill is None:
                books.check_follows(held, frame.span)
        if frame.prefill is not None and frame.prefill.items and i in self.session.layer_stages:
            kept = frame.prefill.before_layer(i, hidden, frame.span)
            if kept is not None:
                hidden = self._narrow(i, kept, hidden)
        if len(frame.spans) == 1:
            return None
        return compat.with_states(args, {**kwargs, **self._layer_kwargs(i, hidden, kwargs)}, hidden)

    def _check_cut(self, module: nn.Module, kwargs: dict[str, Any], *, strict: bool = False) -> None:
        frame = self.running.frame
        lengths = {frame.length, frame.past + frame.length, *(span.index.shape[1] for span in frame.spans)}
        compat.check_cut(module, kwargs, len(frame.mask), lengths, strict=strict)

    def _check_own(self, i: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Under an untested transformers: is what this layer gets of the model what foveate makes of the entry?"""
        entry = self.running.frame.spans[0]
        states = hidden.new_empty(*entry.index.shape, 1)
        mask = entry.mask.to(hidden.device, torch.long)
        mask = compat.causal_mask(self.text_model.config, states, mask, compat.cache_among(kwargs), i)
        layer = f"{type(self.text_model.layers[i]).__name__} {i}"
        checks.check_own(layer, kwargs, mask, self.text_model.rotary_emb(states, entry.positions.to(hidden.device)))

    def _layer_kwargs(self, i: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Substitutes that every layer of a later span needs, for the model's loop keeps passing its own locals."""
        span = self.running.frame.span
        if span.layer_kwargs is None:
            self._check_cut(self.text_model.layers[i], kwargs)
            mask = span.mask.to(hidden.device, torch.long)
            mask = compat.causal_mask(self.text_model.config, hidden, mask, compat.cache_among(kwargs), i)
            span.layer_kwargs = compat.layer_arguments(kwargs, mask, self.rotary(hidden), _text_positions(span))
        return span.layer_kwargs

    # ------------------------------------------------------------------------------------------------------- spans

    def _begin_span(
        self, frame: _Frame, held: CachedPlaces, index: Tensor, positions: Tensor, shift: Tensor, end: Tensor
    ) -> None:
        past, new = frame.mask.split([frame.past, frame.length], dim=1)
        seen = past.gather(1, held.places.clamp(min=0)) & (held.places >= 0)
        entering = new.gather(1, index.clamp(max=frame.length - 1)) & (index < frame.length)
        mask = torch.cat([seen, entering], dim=1)
        frame.span = Span(held.first_layer, frame.length, index, positions, shift, end, held.places, mask)
        frame.spans.append(frame.span)
        if frame.prefill is not None:
            frame.prefill.span = frame.span

    def _narrow(self, layer: int, kept: Kept, hidden: Tensor) -> Tensor:
        """Start the span of what is kept; returns what it carries, ``(B, K, D)``."""
        frame = self.running.frame
        frame.pruned = True
        before, index = frame.span, kept.index
        columns = before.column.gather(1, index)  # -1 where padded
        if before.first_layer == layer:
            frame.spans.pop()
        moved = before.positions.gather(-1, columns.clamp(min=0).expand(*before.positions.shape[:-1], -1))
        self._begin_span(frame, CachedPlaces(layer, before.held, before.shift), index, moved, before.shift, before.end)
        if kept.positions == "compact":
            self._close_up(before, frame.span, columns)
        frame.span.evict = kept.evict or (before.evict and before.first_layer == layer)
        return take(hidden, columns.clamp(min=0)) if kept.embeds is None else kept.embeds.to(hidden)

    def _close_up(self, before: Span, after: Span, columns: Tensor) -> None:
        """Positions without gaps in order of entry, and the shift of what follows."""
        there = before.index < before.length
        nowhere = there.shape[1]
        gone = there.new_ones(len(there), nowhere + 1).scatter(1, columns.where(columns >= 0, nowhere), False)
        gone = gone[:, :nowhere] & there
        if self.mrope:
            start = torch.where(there, before.positions, torch.iinfo(torch.long).max).amin(dim=(0, -1))
            compact = (start[:, None] + (after.valid.long().cumsum(-1) - 1).clamp(min=0)).expand_as(after.positions)
            end = torch.where(after.valid, compact, -1).amax(dim=(0, -1))
            shorter = gone.any(dim=1)  # a row that loses nothing keeps its grid
            after.positions = torch.where(shorter[:, None], compact, after.positions)
            after.shift = before.shift + torch.where(shorter, before.end - end, 0)
            after.end = torch.where(shorter, end, before.end)
            return
        # the k-th of the old columns that stay lends its position to whatever enters as k-th
        order = columns.sort(dim=1).values.clamp(min=0)
        after.positions = (before.positions - gone.long().cumsum(-1)).gather(-1, order)
        after.shift = before.shift + gone.sum(-1)

    # --------------------------------------------------------------------------------------------------- deepstack

    def _following(self, add: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Qwen3-VL's method that adds visual features after early layers, on what is left of the prompt."""

        def process(hidden: Tensor, visual: Tensor, level: Tensor) -> Tensor:
            frame = self.running.frame
            if frame is None:
                return add(hidden, visual, level)
            frame.levels += 1
            if not frame.pruned:
                return add(hidden, visual, level)
            index = frame.span.index.to(visual.device)
            rows = visual_rows(visual)
            rows = rows.gather(1, index.clamp(max=frame.length - 1)).masked_fill(index >= frame.length, -1)
            return add(hidden, rows >= 0, level[rows[rows >= 0].to(level.device)])

        return process

    # -------------------------------------------------------------------------------------------------------- exit

    def _exit(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        frame = self.running.frame
        if frame is None:
            return None
        cache = compat.returned_cache(output)
        self._check_left(cache, kwargs)
        if cache is not None:
            self._keep_books(cache, output.last_hidden_state)
        if frame.pruned:
            output.last_hidden_state = frame.span.restore(output.last_hidden_state)
            if getattr(output, "hidden_states", None) is not None:
                output.hidden_states = tuple(
                    self._span_of(i).restore(hidden) for i, hidden in enumerate(output.hidden_states)
                )
        if frame.prefill is not None and frame.prefill.items:
            depth = len(self.text_model.layers)
            lengths = None if cache is None else [compat.cached_length(cache, i) for i in range(depth)]
            self.session.trace = frame.prefill.trace
            self.session.trace.cache_lengths = lengths
        return output

    def _close(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Also runs when the forward pass failed."""
        running = self.running
        if hasattr(running.cache, "foveate"):
            running.cache.foveate.inside = False
        for mlp in self.mlps.values():
            mlp.serve(None)
        running.active, running.frame, running.cache = False, None, None
        self.session.forget()

    def _keep_books(self, cache: Any, hidden: Tensor) -> None:
        """Leave with the cache what continuing it needs; evict and erase what the prompt's stages asked for."""
        frame, prefill = self.running.frame, self.running.frame.prefill
        state: CacheState | None = getattr(cache, "foveate", None)
        neurons = state.neurons if state else {}
        if prefill is not None:
            neurons = prefill.neurons() if self.session.mlp_stages else {}
        if prefill is not None and prefill.items and self.session.cache_stages:
            for layer, gone in prefill.erased(hidden, frame.span).items():
                books.erase(cache, layer, gone, self._span_of(layer + 1))
        if not (frame.pruned or state or neurons):
            return
        watched = prefill is not None and compat.untested()
        held = books.evict(cache, frame.spans, frame.past, len(self.text_model.layers), watched)
        compat.mark(
            cache, CacheState(weakref.ref(self), frame.past + frame.length, held, neurons), books.unpruned_length
        )
        self._has_pruned = True

    def _check_left(self, cache: Any, kwargs: dict[str, Any]) -> None:
        """What a forward pass leaves must be what its stages asked for."""
        frame, model = self.running.frame, self.text_model
        wanted = [h.first_layer for h in frame.held[1:]] if frame.prefill is None else self.session.layer_stages
        missed = sorted(set(wanted) - frame.reached) if frame.prefill is None or frame.prefill.items else []
        if missed:
            raise compat.not_understood(f"{type(model).__name__} ran past the hooks of its layers {missed}")
        joined = compat.deepstack(kwargs) if frame.prefill is not None and frame.pruned else None
        if joined is not None and frame.levels != min(len(joined[1]), len(model.layers)):
            raise compat.not_understood(f"{frame.levels} of {len(joined[1])} DeepStack levels have joined")
        asked = kwargs.get("use_cache")
        filled = (getattr(model.config, "use_cache", True) if asked is None else asked) and not model.training
        books.check_held(model, self.running.cache, cache, bool(filled), frame.spans)

    def _span_of(self, state: int) -> Span:
        """The span of hidden state number ``state``: what layer ``state - 1`` left, before layer ``state`` narrows
        it.
        """
        return [span for span in self.running.frame.spans if span.first_layer < max(state, 1)][-1]


def visual_rows(visual: Tensor) -> Tensor:
    """``(B, L)`` number of every place among the visual ones of ``visual (B, L)``, -1 for text."""
    rows = (visual.flatten().long().cumsum(0) - 1).view_as(visual)
    return rows.masked_fill(~visual, -1)


def _text_positions(span: Span) -> Tensor:
    """Consecutive positions ``(B, K)``: they only tell packed sequences apart, so they must not show gaps."""
    return (span.mask.long().cumsum(-1) - 1).clamp(min=0)[:, span.past :]
