"""What pruning leaves with a KV cache, so that the call that continues it knows what each layer holds."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.adapters import compat
from foveate.errors import AttachError, InputError

if TYPE_CHECKING:
    from foveate.adapters.engine.decoder import Decoder, Span

LIVE: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Decoder]] = weakref.WeakKeyDictionary()
"""Text models that a pruner is attached to, which decides whether a pruned cache may be continued."""


@dataclass
class CachedPlaces:
    """What the caches of a run of layers hold.

    Attributes:
        first_layer: where the run begins.
        places: of the unpruned sequence in cache order, -1 where a row is padded, ``(B, P)`` int64.
        shift: how far positions of later tokens move back, ``(B,)``.
        last: after a prompt, what :attr:`Span.last` says, where the next call is to be compared with it.
    """

    first_layer: int
    places: Tensor
    shift: Tensor
    last: tuple[Tensor, Tensor] | None = None


@dataclass
class CacheState:
    """Travels with a cache that was filled under pruning.

    Attributes:
        decoder: that filled the cache.
        length: unpruned places.
        held: run by run of layers.
        neurons: by layer, what its MLP runs when the prompt is continued, ``(B, F)`` bool.
        inside: a forward pass is under way and needs the cache's real lengths.
    """

    decoder: weakref.ref[Decoder]
    length: int
    held: list[CachedPlaces]
    neurons: dict[int, Tensor] = field(default_factory=dict)
    inside: bool = False


def unpruned_length(cache: Any, layer_idx: int = 0) -> int:
    """``Cache.get_seq_length`` of a pruned cache: unpruned outside of a forward pass, real inside."""
    state = cache.foveate
    if state.inside:
        return compat.cached_length(cache, layer_idx)
    filled_by = state.decoder()
    known = None if filled_by is None else LIVE.get(filled_by.text_model)
    decoder = None if known is None else known()
    if decoder is not None and decoder.running.active:
        raise compat.not_understood(f"{type(decoder.text_model).__name__} uses a cache that its call did not bring")
    if decoder is None:
        raise AttachError(
            "this KV cache was filled while a pruner was attached and the model has since been detached; "
            "attach a pruner again to continue it, or start from an empty cache"
        )
    return state.length


def refuse(cache: Any, state: CacheState | None, mask: Any, batch: int, total: int) -> None:
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
    if state is None:
        return
    real = [compat.cached_length(cache, held.first_layer) for held in state.held]
    known = [held.places.shape[1] for held in state.held]
    if real != known:
        raise InputError(
            f"the KV cache holds {real} entries where pruning left {known}: it was cropped or reset in between; "
            "start from an empty cache"
        )
    if len(state.held[0].places) != batch:
        raise InputError(
            f"the KV cache was filled with {len(state.held[0].places)} sequences, this call brings {batch}; "
            "a pruned cache cannot be re-batched"
        )


def evict(cache: Any, spans: list[Span], past: int, depth: int, watched: bool) -> list[CachedPlaces]:
    """What the caches of all layers hold after a call; earlier layers lose what an evicting span has not.

    ``past``: unpruned places before the call; ``depth``: number of layers; ``watched``: note the last positions.
    """
    after: list[CachedPlaces] = []
    target: Tensor | None = None
    stop = depth
    for span in reversed(spans):
        new = torch.where(span.index < span.length, span.index + past, -1)
        here = CachedPlaces(
            span.first_layer, torch.cat([span.held, new], dim=1), span.shift, span.last if watched else None
        )
        if target is not None:
            columns = _columns(here.places, target, past + span.length)
            for layer in range(here.first_layer, stop):
                states = (
                    x.gather(2, columns.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
                    for x in _states(cache, layer, here.places.shape[1])
                )
                compat.set_layer_states(cache, layer, *states)
            here.places = target
        if span.evict:
            target = here.places
        stop = here.first_layer
        if after and after[-1].places is here.places and after[-1].shift is here.shift:
            after.pop()  # layers that hold the same at the same positions are one run
        after.append(here)
    return after[::-1]


def _columns(held: Tensor, wanted: Tensor, total: int) -> Tensor:
    """Where the places ``wanted (B, M)`` of ``total`` stand among ``held (B, P)``; anything for -1."""
    at = torch.arange(held.shape[1], device=held.device).expand_as(held)
    where = held.new_zeros(len(held), total + 1).scatter(1, held.masked_fill(held < 0, total), at)
    return where.gather(1, wanted.masked_fill(wanted < 0, total))


def erase(cache: Any, layer: int, gone: Tensor, span: Span) -> None:
    """Zero keys and values of the new places ``gone (B, L)`` bool in a layer that worked on ``span``."""
    new = gone.gather(1, span.index.clamp(max=span.length - 1)) & (span.index < span.length)
    gone = torch.cat([torch.zeros_like(span.held, dtype=torch.bool), new], dim=1)
    states = (zero_rows(x, gone) for x in _states(cache, layer, gone.shape[1]))
    compat.set_layer_states(cache, layer, *states)


def zero_rows(cached: Tensor, gone: Tensor) -> Tensor:
    """Keys or values ``(B, H, P, d)`` with zeros at ``gone (B, P)`` bool. They still take part in attention."""
    return cached.masked_fill(gone.to(cached.device)[:, None, :, None], 0)


def _states(cache: Any, layer: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, ``(B, H, length, d)``.

    Raises:
        InputError: the cache keeps them in another form.
    """
    found = compat.layer_states(cache, layer)
    if not all(isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] == length for x in found):
        raise InputError(
            f"{type(cache.layers[layer]).__name__} of decoder layer {layer} does not keep plain keys and values; "
            "methods "
            "that take tokens out of filled caches need the default dynamic cache"
        )
    return found


def check_held(model: nn.Module, passed: Any, cache: Any, filled: bool, spans: list[Span]) -> None:
    """Does the cache of every layer hold just what the layer saw? ``filled``: there must be one."""
    if cache is not passed and passed is not None:
        raise compat.not_understood(
            f"{type(model).__name__} was given a {type(passed).__name__} and returned another {type(cache).__name__}"
        )
    if cache is None:
        if filled:
            raise compat.not_understood(f"{type(model).__name__} was to fill a cache and returned none")
        return
    stops = [span.first_layer for span in spans[1:]] + [len(model.layers)]
    for span, stop in zip(spans, stops):
        saw = span.mask.shape[1]
        for layer in range(span.first_layer, stop):
            holds = compat.cached_length(cache, layer)
            if holds != saw:
                raise compat.not_understood(f"decoder layer {layer} saw {saw} places and its cache holds {holds}")


def check_follows(held: CachedPlaces, span: Span) -> None:
    """Is the first place of ``span`` at the position after the last one ``held``?"""
    if held.last is None:
        return
    position, known = held.last
    first = span.positions[..., 0].reshape(-1, len(position)).amax(0)
    wrong = known & (span.index[:, 0] == 0) & (first != position + 1)
    if bool(wrong.any()):
        row = int(wrong.long().argmax())
        raise compat.not_understood(
            f"decoding goes on at position {int(first[row])} after a prompt that ended at {int(position[row])} (or the "
            "position_ids of these two calls do not belong to one sequence)"
        )
