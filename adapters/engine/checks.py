"""Compare what the decoder's hooks cut with what the model really works on and holds.

Each check raises :class:`~foveate.errors.NotUnderstoodError`: a model that is cut in one place and not in another
answers with wrong tokens. Those that cost time run where this transformers was not tested
(:func:`~foveate.adapters.compat.untested`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.adapters import compat

if TYPE_CHECKING:
    pass


def check_own(layer: str, kwargs: dict[str, Any], mask: Any, rotary: tuple[Tensor, Tensor]) -> None:
    """Are the mask and the rotary tables that the model passes to a layer those that foveate would pass in their place?

    Whoever cuts them later on has to know how they were made.
    """
    own_mask, own_rotary = compat.own_arguments(kwargs)
    if own_rotary is None or not all(map(_same, own_rotary, rotary)):
        raise compat.not_understood(f"{layer} works at other positions than its model was given")
    if not _same_mask(own_mask, mask):
        raise compat.not_understood(f"{layer} works with another mask than its model was given")


def _same(given: Tensor, asked: Tensor) -> bool:
    """Are two rotary tables ``(1 or B, K, d)`` and ``(B, K, d)`` alike?"""
    return given.shape[1:] == asked.shape[1:] and bool((given.to(asked.device) == asked).all())


def _same_mask(given: Any, asked: Any) -> bool:
    if isinstance(given, Tensor) and isinstance(asked, Tensor):
        return given.shape == asked.shape and bool((given.to(asked.device) == asked).all())
    return type(given) is type(asked)  # no mask, or one that an attention implementation keeps to itself


def check_nothing_hidden(
    model: nn.Module, cache: Any, mask: Any, positions: Tensor | None, length: int, mrope: bool
) -> None:
    """Does a call go on after cached places that it does not bring, or that another cache brings?

    Asked where nothing is known to be pruned, on a model that was pruned before.
    """
    if cache is not None and compat.one_length_for_all(cache):
        return  # counts for itself
    lengths = {0} if cache is None else {compat.cached_length(cache, layer) for layer in range(len(model.layers))}
    if len(lengths) > 1:
        raise compat.not_understood(
            f"layers of a {type(cache).__name__} that is not known as pruned hold {sorted(lengths)} places"
        )
    (held,) = lengths
    covered = mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else held + length
    if positions is not None and not mrope:  # no place of an unpruned sequence is further on than places are there
        covered = max(covered, int(positions.max()) + 1)
    if covered > held + length:
        raise compat.not_understood(
            f"the call is the last {length} of {covered} places, and brings {held} of them in a cache that is known "
            "as one"
        )


def check_signal_keys(cache: Any, layer: int, keys: Tensor) -> None:
    """Are the keys ``(B, H, K, d)`` that a statistic is about those that the layer has put into its cache?"""
    stored = None if cache is None else compat.layer_states(cache, layer)[0]
    if not (isinstance(stored, Tensor) and stored.ndim == 4 and stored.device == keys.device):
        return
    new = stored[:, :, -keys.shape[2] :]
    if new.shape != keys.shape or not torch.allclose(new.float(), keys.float(), rtol=1e-2, atol=1e-2):
        raise compat.not_understood(f"attention of decoder layer {layer} makes other keys than were read from it")
