"""Merging inside the vision tower of a vision-language model.

Blocks merge as in any vision model. Behind the projector every group's features return to all places of its members, so
that the model lays out crops, padding and separators as always; then only one place of each group enters the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapters.families.base import Adapter
from foveate.adapters.towers.base import BlockMerger, MergeTrace
from foveate.errors import InputError, UnsupportedModelError
from foveate.pruners.core import InTower, Layout, Pruner, Selection, Signal
from foveate.pruners.core.signals import TowerOutput


class TowerMerging:
    """A merger on the tower of an attached vision-language model."""

    def __init__(self, adapter: Adapter, pruner: Pruner, stages: Sequence[InTower]) -> None:
        self.adapter, self.pruner = adapter, pruner
        if adapter.projector is None:
            raise UnsupportedModelError(
                f"the projector of {type(adapter.model).__name__} is not known to map row by row"
            )
        self._merger = BlockMerger(adapter.block_tower(), pruner, stages)
        try:
            self._merger.hook(adapter.projector.register_forward_hook(self._spread))
        except BaseException:
            self._merger.remove()
            raise

    def remove(self) -> None:
        """Take the merger off."""
        self._merger.remove()

    @property
    def trace(self) -> MergeTrace:
        """What merged in the last call of the tower."""
        return self._merger.trace  # pyright: ignore[reportReturnType]  (asked for after a call alone)

    @property
    def active(self) -> bool:
        """Whether the tower merges; switched off, it runs as its own."""
        return self._merger.active

    @active.setter
    def active(self, active: bool) -> None:
        self._merger.active = active

    def _spread(self, projector: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.trace.unmerge(output) if self.active else output

    def signals(self, signals: dict[Signal, Tensor]) -> dict[Signal, Tensor]:
        """Tower values (one row per row of their block) back at every patch."""
        deepest = len(self.trace.counts) - 1

        def spread(signal: Signal, values: Tensor) -> Tensor:
            if signal.per_view:
                return values
            return self.trace.unmerge(values, min(deepest, signal.layer + isinstance(signal, TowerOutput)))

        return {signal: spread(signal, values) for signal, values in signals.items()}

    def survivors(self, kind: str, call: dict[str, Any], layouts: list[Layout]) -> list[Selection]:
        """For every picture, one token of each group and who speaks for whom.

        A group keeps the place of the token that the others merged into or, where padding was cut off there, its
        first one.

        Raises:
            InputError: after the tower, tokens are averaged with their neighbours, so that none stands for a group
                any more.
        """
        owner = self.trace.owner
        views, n = owner.shape
        first = n * torch.arange(views, device=owner.device)[:, None]
        places = (torch.arange(n, device=owner.device) + first, owner + first)
        # as floats the numbers travel the way of features; float32 is exact far beyond any number of patches
        mine, speaker = (self.adapter.arrange(kind, x[..., None].float(), layouts, call) for x in places)
        return [self._picture(kind, *pair, layout) for *pair, layout in zip(mine, speaker, layouts, strict=True)]

    def _picture(self, kind: str, mine: Tensor, speaker: Tensor, layout: Layout) -> Selection:
        mine, speaker = mine.squeeze(-1), speaker.squeeze(-1)
        if len(mine) != layout.size or not bool((mine == mine.round()).all()):
            raise InputError(
                f"{type(self.adapter.model).__name__} averages the tokens of this {kind} after its tower, where "
                f"{self.pruner.name} has merged them already; use smaller pictures, or a method that acts at the "
                "decoder's entry"
            )
        token = torch.arange(len(mine), device=mine.device)
        groups, member_of = speaker.unique(return_inverse=True)
        choice = torch.where(mine == speaker, token - len(mine), token)  # the speaker's own place goes first
        place = torch.full((len(groups),), len(mine), device=mine.device).scatter_reduce(0, member_of, choice, "amin")
        place = torch.where(place < 0, place + len(mine), place)
        return Selection(place.sort().values, owner=place[member_of])
