"""Apply selections to a ``transformers`` decoder that is called with ``inputs_embeds``, through forward hooks only.

In terms of ``spans.py``: a stage in front of layer i starts a new span there. Between calls the spans live on with the cache
(:class:`CacheState`), so that caches of different length per layer are all right.

Everything a user sees stays in unpruned units: attention masks, position ids, hidden states, ``cache.get_seq_length()``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapters import compat
from foveate.adapters.attachment import Replaced, undone_on_failure
from foveate.adapters.engine import checks
from foveate.adapters.engine.mlp import SparseMLP
from foveate.adapters.engine.spans import Call, Choice, Held, Selector, Span, take
from foveate.errors import AttachError, InputError, UnsupportedModelError

# Decoders that hooks sit on, which decides whether a pruned cache may be continued; and those of a running forward pass.
_LIVE: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_RUNNING: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass
class CacheState:
    """Travels with a cache that was filled under pruning.

    ``length`` counts unpruned places; ``neurons``: ``(B, F)`` bool by layer, what its MLP runs when the prompt is continued.
    """

    decoder: weakref.ref[nn.Module]
    length: int
    held: list[Held]
    neurons: dict[int, Tensor] = field(default_factory=dict)
    inside: bool = False  # a forward pass is under way and needs the cache's real lengths


def _unpruned_length(cache: Any, layer_idx: int = 0) -> int:
    """``Cache.get_seq_length`` of a pruned cache: unpruned outside of a forward pass, real inside."""
    state = cache.foveate
    if state.inside:
        return compat.cached_length(cache, layer_idx)
    decoder = state.decoder()
    if decoder in _RUNNING:
        raise compat.not_understood(f"{type(decoder).__name__} uses a cache that its call did not bring")
    if decoder not in _LIVE:
        raise AttachError(
            "this KV cache was filled while a pruner was attached and the model has since been detached; "
            "attach a pruner again to continue it, or start from an empty cache"
        )
    return state.length


@dataclass
class _Frame:
    """One forward pass of the decoder."""

    length: int  # new places L
    past: int  # unpruned past places
    mask: Tensor  # (B, past + L) bool, the caller's
    held: list[Held]
    call: Call
    current: Held  # which of ``held`` the running layers have
    pruned: bool = False  # a stage has taken something away, or put something else in its place
    spans: list[Span] = field(default_factory=list)
    reached: set[int] = field(default_factory=set)  # layers whose hooks have run
    levels: int = 0  # of DeepStack that have joined

    @property
    def span(self) -> Span:
        return self.spans[-1]


class Decoder:
    """Hooks on one text model. ``selector`` decides, this class applies.

    Args:
        text_model: a module with ``layers``, ``rotary_emb`` and ``config``, called with ``inputs_embeds``.
        mrope: the model has three-axis positions.

    Raises:
        UnsupportedModelError: some layers do not attend to everything.
        NotUnderstoodError: the model is called otherwise than by any transformers that is known.
    """

    def __init__(self, text_model: nn.Module, selector: Selector, *, mrope: bool) -> None:
        kinds = set(getattr(text_model.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise UnsupportedModelError(
                f"{type(text_model).__name__} has layers of type {sorted(kinds)}; pruning needs full attention throughout "
                "(a sliding-window cache drops places by itself)"
            )
        self.text_model = text_model
        self.selector = selector
        self.mrope = mrope
        self.frame: _Frame | None = None
        self.cache: Any = None  # of the running call, from its first moment on
        self._has_pruned = False
        self.check_names()
        self.mlps: dict[int, SparseMLP] = {}
        self._handles: list[Any] = []
        with undone_on_failure(self.remove):
            self._install()
        _LIVE.add(text_model)

    def check_names(self) -> None:
        """Raise :class:`NotUnderstoodError` where the hooks would not find what they cut."""
        compat.check_text_model(self.text_model)

    def _install(self) -> None:
        model = self.text_model
        for i in sorted(self.selector.neuron_layers):
            self.mlps[i] = SparseMLP(model.layers[i].mlp)
        self._handles.append(model.register_forward_pre_hook(self._enter, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._exit, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._close, always_call=True))
        for i, layer in enumerate(model.layers):

            def before(module: nn.Module, args: Any, kwargs: Any, i: int = i) -> Any:
                return self._before_layer(i, args, kwargs)

            self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        deepstack = compat.deepstack_method(model)
        if deepstack is not None:  # a plain method between layers, out of any hook's reach
            name, add = deepstack
            self._handles.append(Replaced(model, name, self._following(add)))

    def rotary(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the running span's positions, for ``hidden (B, K, D)``."""
        return self.text_model.rotary_emb(hidden, self.frame.span.positions.to(hidden.device))

    def remove(self) -> None:
        """Take the hooks away."""
        for part in (*self._handles, *self.mlps.values()):
            part.remove()
        _LIVE.discard(self.text_model)
        _RUNNING.discard(self.text_model)
        self.frame = None

    # ------------------------------------------------------------------------------------------------------- entry

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        self.frame = None
        _RUNNING.add(module)
        kwargs = compat.by_name(module, args, kwargs)
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            if kwargs.get("input_ids") is None:
                raise compat.not_understood(
                    f"{type(module).__name__} is called without inputs_embeds: {', '.join(kwargs)}"
                )
            return None
        cache = self.cache = compat.passed_cache(kwargs)
        state: CacheState | None = compat.marked(cache)
        if state is not None:
            state.inside = True
        batch, length = embeds.shape[:2]
        past = state.length if state else compat.told_length(cache) if cache is not None else 0
        mask = kwargs.get("attention_mask")
        call = self.selector.begin(embeds, mask if isinstance(mask, Tensor) else None, past)
        if call is Call.CONTINUATION and state is None:
            if self._has_pruned:
                positions = kwargs.get("position_ids")
                checks.check_nothing_hidden(module, cache, mask, positions, length, self.mrope)
            return None
        _refuse(cache, state, mask, batch, past + length)
        mask = torch.ones(batch, past + length, device=embeds.device) if mask is None else mask.to(embeds.device)
        positions, text_row = self._positions(kwargs.get("position_ids"), batch, past, length, embeds.device)
        nothing = torch.zeros(batch, dtype=torch.long, device=embeds.device)
        held = state.held if state else [Held(0, torch.arange(past, device=embeds.device).expand(batch, past), nothing)]
        frame = _Frame(length, past, mask.bool(), held, call, held[0])
        frame.spans.append(
            self._span(
                frame,
                held[0],
                index=torch.arange(length, device=embeds.device).expand(batch, length),
                alive=torch.ones(batch, length, dtype=torch.bool, device=embeds.device),
                rank=None,
                place_positions=positions - held[0].shift[:, None],
                shift=held[0].shift,
            )
        )
        choice = self.selector.at_input(embeds) if call is Call.PROMPT else None
        self.frame = frame
        if call is Call.CONTINUATION:
            for i, mlp in self.mlps.items():
                mlp.serve(state.neurons.get(i))
            checks.check_follows(held[0], frame.span)
            if held[0].last is not None:
                self._check_cut(module, kwargs, strict=True)
        if call is Call.PROMPT and (choice is not None or self.selector.layers):
            self._check_cut(module, kwargs, strict=compat.untested())
            if compat.deepstack(kwargs) is not None and compat.deepstack_method(module) is None:
                raise compat.not_understood(f"{type(module).__name__} has no method that adds DeepStack features")
        if choice is None and state is None:
            return None  # nothing pruned here: the caller's own arguments go on
        kwargs = dict(kwargs)
        if choice is not None:
            kwargs["inputs_embeds"] = self._narrow(0, choice, embeds)
            joined = compat.deepstack(kwargs)
            if joined is not None:
                mask, levels = joined[0], deepstack_levels(joined[1], choice.deepstack)
                mixed = [_mixed(choice.mixtures, mask, level) for level in levels] if choice.mixtures else levels
                kwargs |= compat.deepstack_argument(mixed)
        kwargs["attention_mask"] = frame.span.mask.long()
        kwargs["position_ids"] = frame.span.positions
        if text_row:
            kwargs["position_ids"] = torch.cat([_text_positions(frame.span)[None], frame.span.positions])
        return (), kwargs

    def _positions(
        self, given: Tensor | None, batch: int, past: int, length: int, device: torch.device
    ) -> tuple[Tensor, bool]:
        """The caller's rotary positions as ``(B, L)`` or ``(3, B, L)``, and whether a row of text positions led them."""
        if given is None:
            given = torch.arange(past, past + length, device=device)[None]
        given = given[..., -length:].expand(*given.shape[:-2], batch, length)  # Qwen may count the cached ones in
        text_row = given.ndim == 3 and len(given) == 4
        if text_row:
            given = given[1:]
        elif self.mrope and given.ndim == 2:
            given = given.expand(3, batch, length)
        return given, text_row

    # ------------------------------------------------------------------------------------------------------ layers

    def _before_layer(self, i: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        frame = self.frame
        if frame is None:
            return None
        hidden = compat.entering_states(args, kwargs)
        checks.check_width(self.text_model, i, hidden, frame.span)
        frame.reached.add(i)
        self._check_own(i, hidden, kwargs)
        held = next((h for h in frame.held[1:] if h.first_layer == i), None)
        if held is not None:  # from here on the cache holds less of the past
            span, nearer = frame.span, frame.current.shift - held.shift
            here = Held(i, held.places, span.shift - nearer)
            positions = span.place_positions + nearer[:, None]
            frame.spans.append(self._span(frame, here, span.index, span.alive, span.rank, positions, here.shift))
            frame.current = held
            if frame.call is Call.CONTINUATION:
                checks.check_follows(held, frame.span)
        if frame.call is Call.PROMPT and i in self.selector.layers:
            choice = self.selector.at_layer(i, hidden, frame.span, self.cache)
            if choice is not None:
                hidden = self._narrow(i, choice, hidden)
        if len(frame.spans) == 1:
            return None
        return compat.with_states(args, {**kwargs, **self._layer_kwargs(i, hidden, kwargs)}, hidden)

    def _check_cut(self, module: nn.Module, kwargs: dict[str, Any], *, strict: bool = False) -> None:
        frame = self.frame
        lengths = {frame.length, frame.past + frame.length, *(span.index.shape[1] for span in frame.spans)}
        compat.check_cut(module, kwargs, len(frame.mask), lengths, strict=strict)

    def _check_own(self, i: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Under an untested transformers: is what this layer gets of the model itself what foveate makes of the entry?"""
        frame = self.frame
        if frame.call is not Call.PROMPT or not (i == 0 or i in self.selector.layers) or not compat.untested():
            return
        entry = frame.spans[0]
        states = hidden.new_empty(*entry.index.shape, 1)
        mask = entry.mask.to(hidden.device, torch.long)
        mask = compat.causal_mask(self.text_model.config, states, mask, compat.passed_cache(kwargs), i)
        layer = f"{type(self.text_model.layers[i]).__name__} {i}"
        checks.check_own(layer, kwargs, mask, self.text_model.rotary_emb(states, entry.positions.to(hidden.device)))

    def _layer_kwargs(self, i: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Substitutes that every layer of a later span needs, for the model's loop keeps passing its own locals."""
        span = self.frame.span
        if span.layer_kwargs is None:
            self._check_cut(self.text_model.layers[i], kwargs)
            mask = span.mask.to(hidden.device, torch.long)
            mask = compat.causal_mask(self.text_model.config, hidden, mask, compat.passed_cache(kwargs), i)
            span.layer_kwargs = compat.layer_arguments(kwargs, mask, self.rotary(hidden), _text_positions(span))
        return span.layer_kwargs

    # ------------------------------------------------------------------------------------------------------- spans

    def _span(
        self,
        frame: _Frame,
        held: Held,
        index: Tensor,
        alive: Tensor,
        rank: Tensor | None,
        place_positions: Tensor,
        shift: Tensor,
    ) -> Span:
        past, new = frame.mask.split([frame.past, frame.length], dim=1)
        seen = past.gather(1, held.places.clamp(min=0)) & (held.places >= 0)
        entering = new.gather(1, index.clamp(max=frame.length - 1)) & (index < frame.length)
        mask = torch.cat([seen, entering], dim=1)
        return Span(held.first_layer, index, alive, rank, place_positions, shift, held.places, mask)

    def _narrow(self, layer: int, choice: Choice, hidden: Tensor) -> Tensor:
        """Start the span of the places that ``choice`` leaves; returns what they carry, ``(B, width, D)``."""
        frame = self.frame
        frame.pruned = True
        before = frame.span
        rank = before.rank if choice.rank is None else choice.rank
        places = torch.arange(frame.length, device=choice.alive.device).expand_as(choice.alive)
        key = torch.where(choice.alive, places if rank is None else rank, -1)
        # places that go sort to the front, so rows with fewer survivors are padded on the left
        key, index = key.sort(dim=1)
        index = torch.where(key >= 0, index, frame.length)[:, frame.length - choice.width :]
        positions, shift = before.place_positions, before.shift
        if choice.positions == "compact":
            positions, shift = self._compact(before, choice.alive, rank)
        after = self._span(frame, Held(layer, before.held, shift), index, choice.alive, rank, positions, shift)
        after.evict = choice.evict or (before.evict and before.first_layer == layer)
        if choice.values is not None:
            rows, where, values = (x.to(hidden.device) for x in choice.values)
            columns = before.column.to(hidden.device)[rows, where]
            hidden = hidden.index_put((rows, columns), values.to(hidden.dtype))
        if before.first_layer == layer:
            frame.spans.pop()
        frame.spans.append(after)
        columns = before.column.gather(1, index)
        if choice.follow is not None:
            choice.follow(columns)
        return take(hidden, columns)

    def _compact(self, before: Span, alive: Tensor, rank: Tensor | None) -> tuple[Tensor, Tensor]:
        """Positions without gaps in order of entry, and the shift of what follows."""
        frame = self.frame
        positions, gone, attended = before.place_positions, before.alive & ~alive, alive & frame.mask[:, frame.past :]
        if before.rank is not None:  # count in order of entry
            gone, attended = (torch.zeros_like(x).scatter(1, before.rank, x) for x in (gone, attended))
            positions = positions.scatter(-1, before.rank.expand_as(positions), positions)
        if self.mrope:
            largest = torch.iinfo(torch.long).max
            start = torch.where(before.alive, before.place_positions, largest).amin(dim=(0, -1))
            compact = (start[:, None] + (attended.long().cumsum(-1) - 1).clamp(min=0)).expand_as(positions)
            # generate() counts on from the last attended token
            last = torch.where(frame.mask[:, frame.past :], torch.arange(frame.length, device=alive.device), 0).amax(-1)
            end = before.place_positions[:, torch.arange(len(last), device=last.device), last].amax(0)
            moved = end - torch.where(attended, compact, -1).amax(dim=(0, -1))
            shorter = gone.any(dim=1)  # a row that loses nothing keeps its grid
            compact = torch.where(shorter[:, None], compact, positions)
            shift = before.shift + torch.where(shorter, moved, 0)
        else:
            compact = positions - gone.long().cumsum(-1)
            shift = before.shift + gone.sum(-1)
        if rank is not None:
            compact = compact.gather(-1, rank.expand_as(compact))
        return compact, shift

    # --------------------------------------------------------------------------------------------------- deepstack

    def _following(self, add: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Qwen3-VL's method that adds visual features after early layers, on what is left of the prompt."""

        def process(hidden: Tensor, visual: Tensor, level: Tensor) -> Tensor:
            frame = self.frame
            if frame is None:
                return add(hidden, visual, level)
            frame.levels += 1
            if not frame.pruned:
                return add(hidden, visual, level)
            index = frame.span.index.to(visual.device)
            rows = _visual_rows(visual)
            rows = rows.gather(1, index.clamp(max=frame.length - 1)).masked_fill(index >= frame.length, -1)
            return add(hidden, rows >= 0, level[rows[rows >= 0].to(level.device)])

        return process

    # -------------------------------------------------------------------------------------------------------- exit

    def _exit(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        frame = self.frame
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
        if frame.call is Call.PROMPT:
            depth = len(self.text_model.layers)
            lengths = None if cache is None else [compat.cached_length(cache, i) for i in range(depth)]
            self.selector.finish(lengths)
        return output

    def _close(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Also runs when the forward pass failed."""
        if hasattr(self.cache, "foveate"):
            self.cache.foveate.inside = False
        for mlp in self.mlps.values():
            mlp.serve(None)
        self.frame = self.cache = None
        _RUNNING.discard(module)
        self.selector.forget()

    # ------------------------------------------------------------------------------------------------------- cache

    def _keep_books(self, cache: Any, hidden: Tensor) -> None:
        """Leave with the cache what continuing it needs; evict and erase what the prompt's stages asked for."""
        frame = self.frame
        state: CacheState | None = getattr(cache, "foveate", None)
        if frame.call is Call.CONTINUATION:
            neurons = state.neurons if state else {}
        else:
            neurons = self.selector.neurons()
        if frame.call is Call.PROMPT:
            for layer, gone in self.selector.erased(hidden, frame.span).items():
                self._erase(cache, layer, gone)
        if not (frame.pruned or state or neurons):
            return
        held = []
        for span in frame.spans:
            new = torch.where(span.index < frame.length, span.index + frame.past, -1)
            last = span.last if frame.call is Call.PROMPT and compat.untested() else None
            held.append(Held(span.first_layer, torch.cat([span.held, new], dim=1), span.shift, last))
        held = self._evict(cache, held)
        compat.mark(cache, CacheState(weakref.ref(self.text_model), frame.past + frame.length, held, neurons))
        compat.answer_length(cache, _unpruned_length)
        self._has_pruned = True

    def _check_left(self, cache: Any, kwargs: dict[str, Any]) -> None:
        """What a forward pass has left behind must be what its stages asked for."""
        frame, model = self.frame, self.text_model
        if frame.call is Call.PROMPT:
            checks.check_reached(model, self.selector.layers, frame.reached)
            joined = compat.deepstack(kwargs)
            if frame.pruned and joined is not None and frame.levels != min(len(joined[1]), len(model.layers)):
                raise compat.not_understood(f"{frame.levels} of {len(joined[1])} DeepStack levels have joined")
        elif frame.call is Call.CONTINUATION:
            checks.check_reached(model, (held.first_layer for held in frame.held[1:]), frame.reached)
        asked = kwargs.get("use_cache")
        filled = (getattr(model.config, "use_cache", True) if asked is None else asked) and not model.training
        checks.check_held(model, self.cache, cache, bool(filled), frame.spans)

    def _evict(self, cache: Any, held: list[Held]) -> list[Held]:
        """Take out of earlier layers' caches what an evicting span does not hold; returns what is held then."""
        after: list[Held] = []
        target: Tensor | None = None
        stop = len(self.text_model.layers)
        for span, here in zip(reversed(self.frame.spans), reversed(held)):
            if target is not None:
                columns = self._columns(here.places, target)
                for layer in range(here.first_layer, stop):
                    states = (
                        x.gather(2, columns.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
                        for x in _entry(cache, layer, here.places.shape[1])
                    )
                    compat.set_layer_states(cache, layer, *states)
                here = Held(here.first_layer, target, here.shift, here.last)
            if span.evict:
                target = here.places
            stop = here.first_layer
            if after and after[-1].places is here.places and after[-1].shift is here.shift:
                after.pop()  # layers that hold the same at the same positions are one run
            after.append(here)
        return after[::-1]

    def _columns(self, held: Tensor, wanted: Tensor) -> Tensor:
        """Where the places ``wanted (B, M)`` stand among ``held (B, P)``; anything for -1."""
        total = self.frame.past + self.frame.length
        at = torch.arange(held.shape[1], device=held.device).expand_as(held)
        where = held.new_zeros(len(held), total + 1).scatter(1, held.masked_fill(held < 0, total), at)
        return where.gather(1, wanted.masked_fill(wanted < 0, total))

    def _erase(self, cache: Any, layer: int, gone: Tensor) -> None:
        span = self._span_of(layer + 1)
        new = gone.gather(1, span.index.clamp(max=self.frame.length - 1)) & (span.index < self.frame.length)
        gone = torch.cat([torch.zeros_like(span.held, dtype=torch.bool), new], dim=1)
        states = (zero_rows(x, gone) for x in _entry(cache, layer, gone.shape[1]))
        compat.set_layer_states(cache, layer, *states)

    def _span_of(self, state: int) -> Span:
        """The span of hidden state number ``state``: what layer ``state - 1`` left, before layer ``state`` narrows it."""
        return [span for span in self.frame.spans if span.first_layer < max(state, 1)][-1]


def deepstack_levels(levels: list[Tensor], which: str) -> list[Tensor]:
    """The DeepStack levels that join behind early layers: ``"all"`` or the ``"first"``."""
    return levels[:1] if which == "first" else levels


def _visual_rows(visual: Tensor) -> Tensor:
    """``(B, L)`` number of every place among the visual ones of ``visual (B, L)``, -1 for text."""
    rows = (visual.flatten().long().cumsum(0) - 1).view_as(visual)
    return rows.masked_fill(~visual, -1)


def _mixed(mixtures: list, visual: Tensor, level: Tensor) -> Tensor:
    """A DeepStack level ``(number of visual places, D)`` whose surviving rows are mixed as the embeddings were."""
    rows, mixed = _visual_rows(visual).to(level.device), level.clone()
    for sample, places, survivors, resample in mixtures:
        mine = level[rows[sample, places.to(level.device)]]
        mixed[rows[sample, survivors.to(level.device)]] = resample(mine).to(level.dtype)
    return mixed


def zero_rows(cached: Tensor, gone: Tensor) -> Tensor:
    """Keys or values ``(B, H, P, d)`` with zeros at ``gone (B, P)`` bool. They still take part in attention."""
    return cached.masked_fill(gone.to(cached.device)[:, None, :, None], 0)


def _entry(cache: Any, layer: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, ``(B, H, length, d)``.

    Raises:
        InputError: the cache keeps them in another form.
    """
    found = compat.layer_states(cache, layer)
    if not all(isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] == length for x in found):
        raise InputError(
            f"{type(cache.layers[layer]).__name__} of decoder layer {layer} does not keep plain keys and values; methods that take "
            "tokens out of filled caches need the default dynamic cache"
        )
    return found


def _refuse(cache: Any, state: CacheState | None, mask: Any, batch: int, total: int) -> None:
    """Raise :class:`InputError` for calls that cannot be pruned."""
    if compat.one_length_for_all(cache):
        raise InputError("a static KV cache has one length for all layers; use the default dynamic cache while pruning")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise InputError(
            "pass a 2-D (batch, length) attention mask while a pruner is attached; custom masks cannot be cut"
        )
    if mask is not None and mask.shape != (batch, total):
        raise InputError(
            f"the attention mask has shape {tuple(mask.shape)}, expected {(batch, total)}: "
            "it covers the whole unpruned sequence, cached places included"
        )
    if state is not None:
        real = [compat.cached_length(cache, held.first_layer) for held in state.held]
        known = [held.places.shape[1] for held in state.held]
        if real != known:
            raise InputError(
                f"the KV cache holds {real} entries where pruning left {known}: it was cropped or reset in between; "
                "start from an empty cache"
            )
    if state is not None and len(state.held[0].places) != batch:
        raise InputError(
            f"the KV cache was filled with {len(state.held[0].places)} sequences, this call brings {batch}; "
            "a pruned cache cannot be re-batched"
        )


def _text_positions(span: Span) -> Tensor:
    """Consecutive positions ``(B, K)``: they only tell packed sequences apart, so they must not show gaps."""
    return (span.mask.long().cumsum(-1) - 1).clamp(min=0)[:, span.past :]
