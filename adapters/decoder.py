"""Apply selections to a ``transformers`` decoder that is called with ``inputs_embeds``, through forward hooks only.

Vocabulary. A call brings *new* sequence places 0 .. L-1 behind *past* ones that the cache has seen. A :class:`Span` says
what a run of consecutive decoder layers works on: which new places (``index``), which past places their cache really
holds (``held``), and at which positions. A stage in front of layer i starts a new span there. Between calls the spans
live on with the cache (:class:`CacheState`), so that caches of different length per layer are all right.

Everything a user sees stays in unpruned units: attention masks, position ids, hidden states, ``cache.get_seq_length()``.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foveate.errors import AttachError, InputError, UnsupportedModelError

# Decoders that hooks sit on; decides whether a pruned cache may be continued.
_LIVE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass
class Held:
    """What the cache of the layers from ``first_layer`` on holds.

    Attributes:
        places: ``(B, P)`` int64 places of the unpruned sequence in cache order, -1 where a row is padded.
        shift: ``(B,)`` how far positions of later tokens move back.
    """

    first_layer: int
    places: Tensor
    shift: Tensor


@dataclass
class CacheState:
    """Travels with a cache that was filled under pruning. ``length`` counts unpruned places."""

    decoder: weakref.ref[nn.Module]
    length: int
    held: list[Held]
    inside: bool = False  # a forward pass is under way and needs the cache's real lengths


def _unpruned_length(cache: Any, layer_idx: int = 0) -> int:
    """``Cache.get_seq_length`` of a pruned cache: unpruned outside of a forward pass, real inside."""
    state = cache.foveate
    if state.inside:
        return type(cache).get_seq_length(cache, layer_idx)
    if state.decoder() not in _LIVE:
        raise AttachError(
            "this KV cache was filled while a pruner was attached and the model has since been detached; "
            "attach a pruner again to continue it, or start from an empty cache"
        )
    return state.length


@dataclass
class Span:
    """What a run of decoder layers works on; see the module's docstring.

    Attributes:
        index: ``(B, K)`` new places in the order in which they enter, L where a row is padded (on the left).
        alive: ``(B, L)`` bool, the same as a set; rank: ``(B, L)`` order of entry where it is not ascending, else None.
        place_positions: ``(…, B, L)`` rotary position of every living place; shift: ``(B,)`` as in :class:`Held`.
        held: ``(B, P)`` past places, -1 where padded.
        mask: ``(B, P + K)`` bool, what may be attended.
    """

    first_layer: int
    index: Tensor
    alive: Tensor
    rank: Tensor | None
    place_positions: Tensor
    shift: Tensor
    held: Tensor
    mask: Tensor
    layer_kwargs: dict[str, Any] | None = field(default=None, repr=False)
    _column: Tensor | None = field(default=None, repr=False)

    @property
    def past(self) -> int:
        """Past places held, P."""
        return self.held.shape[1]

    @property
    def positions(self) -> Tensor:
        """Rotary positions in order of entry, ``(…, B, K)``; 0 where padded."""
        places = self.index.clamp(max=self.alive.shape[1] - 1)
        return self.place_positions.gather(-1, places.expand(*self.place_positions.shape[:-1], -1))

    @property
    def column(self) -> Tensor:
        """``(B, L + 1)`` where every new place stands in this span; anything for places that are not alive."""
        if self._column is None:
            batch, width = self.index.shape
            places = torch.arange(width, device=self.index.device).expand(batch, -1)
            self._column = self.index.new_zeros(batch, self.alive.shape[1] + 1).scatter(1, self.index, places)
        return self._column

    def restore(self, hidden: Tensor) -> Tensor:
        """``(B, K, D)`` back to the unpruned length ``(B, L, D)``.

        A place that was dropped shows the state of the nearest survivor that entered before it, so that the token behind
        it is still predicted from what the decoder has seen.
        """
        batch, length = self.alive.shape
        places = torch.arange(length, device=self.index.device).expand(batch, -1)
        before = torch.where(self.alive, places, -1).cummax(dim=1).values.clamp(min=0)
        by_entry = self.column
        if self.rank is not None:  # survivors stand in the order of their ranks, a permutation of the living places
            by_entry = by_entry.new_zeros(by_entry.shape).scatter(1, self.rank, self.column[:, :length])
        source = torch.where(self.alive, self.column[:, :length], by_entry.gather(1, before))
        return _take(hidden, source)


@dataclass
class Choice:
    """The outcome of a stage for the whole batch.

    Attributes:
        alive: ``(B, L)`` bool over new places; width: the largest number of survivors in a row, known on the host.
        positions: ``"keep"`` or ``"compact"``.
        rank: ``(B, L)`` order of entry: a permutation of the living places among themselves; None = unchanged.
        values: ``(rows, places, embeddings)``, ``(M,), (M,), (M, D)``: places that carry something new; None where all keep
            their own.
        follow: told which columns of the old span, ``(B, width)``, go on.
        mixtures: ``(row, places (N,), survivors (K,), resample)`` per picture whose survivors are mixtures: what the places
            carry beside their embeddings goes to the survivors by ``resample``.
    """

    alive: Tensor
    width: int
    positions: str
    rank: Tensor | None = None
    values: tuple[Tensor, Tensor, Tensor] | None = None
    follow: Callable[[Tensor], None] | None = None
    mixtures: list[tuple[int, Tensor, Tensor, Callable[[Tensor], Tensor]]] = field(default_factory=list)


class Selector(Protocol):
    """What the decoder asks while a prompt with visual tokens runs through it (the session answers)."""

    layers: frozenset[int]

    def begin(self, embeds: Tensor, mask: Tensor | None, past: int) -> bool:
        """A call starts: does it bring visual tokens?"""

    def at_input(self, embeds: Tensor) -> Choice | None:
        """Which new places enter the decoder; None keeps all."""

    def at_layer(self, layer: int, hidden: Tensor, span: Span, cache: Any) -> Choice | None:
        """Which of the span's places enter decoder layer ``layer``; None keeps all."""

    def finish(self) -> None:
        """The call ended without error."""

    def forget(self) -> None:
        """The call is over, well or not: let go of its tensors."""


@dataclass
class _Frame:
    """One forward pass of the decoder."""

    length: int  # new places L
    past: int  # unpruned past places
    mask: Tensor  # (B, past + L) bool, the caller's
    held: list[Held]
    prompt: bool
    current: Held  # which of ``held`` the running layers have
    pruned: bool = False  # a stage has taken something away, or put something else in its place
    spans: list[Span] = field(default_factory=list)

    @property
    def span(self) -> Span:
        return self.spans[-1]


class Decoder:
    """Hooks on one text model. ``selector`` decides, this class applies.

    Args:
        text_model: a module with ``layers``, ``rotary_emb`` and ``config``, called with ``inputs_embeds``.
        mrope: the model has three-axis positions.
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
        self._cache: Any = None  # of the running call, from its first moment on
        self._handles = [
            text_model.register_forward_pre_hook(self._enter, with_kwargs=True),
            text_model.register_forward_hook(self._exit, with_kwargs=True),
            text_model.register_forward_hook(self._close, always_call=True),
        ]
        for i, layer in enumerate(text_model.layers):

            def before(module: nn.Module, args: Any, kwargs: Any, i: int = i) -> Any:
                return self._before_layer(i, args, kwargs)

            self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        if hasattr(text_model, "_deepstack_process"):  # a plain method between layers, out of any hook's reach
            self._own = vars(text_model).get("_deepstack_process")
            text_model._deepstack_process = self._following(text_model._deepstack_process)
        _LIVE.add(text_model)

    def rotary(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the running span's positions, for ``hidden (B, K, D)``."""
        return self.text_model.rotary_emb(hidden, self.frame.span.positions.to(hidden.device))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        if vars(self.text_model).pop("_deepstack_process", None) is not None and self._own is not None:
            self.text_model._deepstack_process = self._own
        _LIVE.discard(self.text_model)
        self.frame = None

    # ------------------------------------------------------------------------------------------------------- entry

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        self.frame = None
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            return None
        cache = self._cache = kwargs.get("past_key_values")
        state: CacheState | None = getattr(cache, "foveate", None)
        if state is not None:
            state.inside = True
        batch, length = embeds.shape[:2]
        past = state.length if state else int(cache.get_seq_length()) if cache is not None else 0
        mask = kwargs.get("attention_mask")
        prompt = self.selector.begin(embeds, mask, past)
        if not prompt and state is None:
            return None
        _refuse(cache, state, mask, batch, past + length)
        mask = torch.ones(batch, past + length, device=embeds.device) if mask is None else mask.to(embeds.device)
        positions, text_row = self._positions(kwargs.get("position_ids"), batch, past, length, embeds.device)
        nothing = torch.zeros(batch, dtype=torch.long, device=embeds.device)
        held = state.held if state else [Held(0, torch.arange(past, device=embeds.device).expand(batch, past), nothing)]
        frame = _Frame(length, past, mask.bool(), held, prompt, held[0])
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
        choice = self.selector.at_input(embeds) if prompt else None
        self.frame = frame
        if choice is None and state is None:
            return None  # nothing pruned here: the caller's own arguments go on
        kwargs = dict(kwargs)
        if choice is not None:
            kwargs["inputs_embeds"] = self._narrow(0, choice, embeds)
            if choice.mixtures and kwargs.get("deepstack_visual_embeds") is not None:
                mask, levels = kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"]
                kwargs["deepstack_visual_embeds"] = [_mixed(choice.mixtures, mask, level) for level in levels]
        kwargs["attention_mask"] = frame.span.mask.long()
        kwargs["position_ids"] = frame.span.positions
        if text_row:
            kwargs["position_ids"] = torch.cat([_text_positions(frame.span)[None], frame.span.positions])
        return args, kwargs

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
        hidden = args[0] if args else kwargs["hidden_states"]
        held = next((h for h in frame.held[1:] if h.first_layer == i), None)
        if held is not None:  # from here on the cache holds less of the past
            span, nearer = frame.span, frame.current.shift - held.shift
            here = Held(i, held.places, span.shift - nearer)
            positions = span.place_positions + nearer[:, None]
            frame.spans.append(self._span(frame, here, span.index, span.alive, span.rank, positions, here.shift))
            frame.current = held
        if frame.prompt and i in self.selector.layers:
            choice = self.selector.at_layer(i, hidden, frame.span, kwargs.get("past_key_values"))
            if choice is not None:
                hidden = self._narrow(i, choice, hidden)
        if len(frame.spans) == 1:
            return None
        kwargs = {**kwargs, **self._layer_kwargs(i, hidden, kwargs)}
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _layer_kwargs(self, i: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Substitutes that every layer of a later span needs, for the model's loop keeps passing its own locals."""
        from transformers.masking_utils import create_causal_mask

        span = self.frame.span
        if span.layer_kwargs is None:
            span.layer_kwargs = {
                "attention_mask": create_causal_mask(
                    config=self.text_model.config,
                    inputs_embeds=hidden,
                    attention_mask=span.mask.to(hidden.device, torch.long),
                    past_key_values=kwargs.get("past_key_values"),
                    position_ids=None,
                    layer_idx=i,
                ),
                "position_embeddings": self.rotary(hidden),
            }
            if kwargs.get("position_ids") is not None:
                span.layer_kwargs["position_ids"] = _text_positions(span)
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
        return _take(hidden, columns)

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
        """Qwen3-VL's ``_deepstack_process``, which adds visual features behind early layers, on what is left of the prompt."""

        def process(hidden: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
            frame = self.frame
            if frame is None or not frame.pruned:
                return add(hidden, visual_pos_masks, visual_embeds)
            index = frame.span.index.to(visual_pos_masks.device)
            rows = _visual_rows(visual_pos_masks)
            rows = rows.gather(1, index.clamp(max=frame.length - 1)).masked_fill(index >= frame.length, -1)
            return add(hidden, rows >= 0, visual_embeds[rows[rows >= 0].to(visual_embeds.device)])

        return process

    # -------------------------------------------------------------------------------------------------------- exit

    def _exit(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        frame = self.frame
        if frame is None:
            return None
        cache = getattr(output, "past_key_values", None)
        if cache is not None and (frame.pruned or hasattr(cache, "foveate")):
            self._remember(cache)
        if frame.pruned:
            output.last_hidden_state = frame.span.restore(output.last_hidden_state)
            if getattr(output, "hidden_states", None) is not None:
                output.hidden_states = tuple(
                    self._span_of(i).restore(hidden) for i, hidden in enumerate(output.hidden_states)
                )
        if frame.prompt:
            self.selector.finish()
        return output

    def _close(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Also runs when the forward pass failed."""
        for filled in (self._cache, getattr(output, "past_key_values", None)):
            if hasattr(filled, "foveate"):
                filled.foveate.inside = False
        self.frame = self._cache = None
        self.selector.forget()

    def _remember(self, cache: Any) -> None:
        frame = self.frame
        held = []
        for span in frame.spans:
            new = torch.where(span.index < frame.length, span.index + frame.past, -1)
            held.append(Held(span.first_layer, torch.cat([span.held, new], dim=1), span.shift))
        cache.foveate = CacheState(weakref.ref(self.text_model), frame.past + frame.length, held)
        cache.get_seq_length = types.MethodType(_unpruned_length, cache)

    def _span_of(self, state: int) -> Span:
        """The span of hidden state number ``state``: what layer ``state - 1`` left, before layer ``state`` narrows it."""
        return [span for span in self.frame.spans if span.first_layer < max(state, 1)][-1]


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


def _refuse(cache: Any, state: CacheState | None, mask: Any, batch: int, total: int) -> None:
    """Raise :class:`InputError` for calls that cannot be pruned."""
    if getattr(cache, "is_compileable", False):
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
        real = [int(type(cache).get_seq_length(cache, held.first_layer)) for held in state.held]
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


def _take(hidden: Tensor, columns: Tensor) -> Tensor:
    """``hidden (B, K, D)`` at ``columns (B, M)`` -> ``(B, M, D)``."""
    return hidden.gather(1, columns.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))


def _text_positions(span: Span) -> Tensor:
    """Consecutive positions ``(B, K)``: they only tell packed sequences apart, so they must not show gaps."""
    return (span.mask.long().cumsum(-1) - 1).clamp(min=0)[:, span.past :]
