"""Runs of dropped tokens in sequence order, and where a marker for each stands."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from foveate.pruners.core.tokens import Layout


@dataclass(frozen=True)
class Runs:
    """Maximal runs of dropped tokens.

    Attributes:
        dropped: ``(B, N)`` bool.
        first: where the run of a dropped token begins, ``(B, N)`` int64; of other tokens anything.
        last: where it ends.
        number: which run of its row a token is in, ``(B, N)`` int64, -1 for none.
    """

    dropped: Tensor
    first: Tensor
    last: Tensor
    number: Tensor

    @property
    def counts(self) -> Tensor:
        """Runs in every row, ``(B,)``."""
        return self.number.amax(dim=1) + 1

    def image(self, b: int) -> Runs:
        """Those of image ``b``, as a batch of one."""
        return Runs(*(x[b : b + 1] for x in (self.dropped, self.first, self.last, self.number)))

    def marker_places(self, placement: str) -> Tensor:
        """``(B, N)`` the token in whose place the marker of each dropped token's run stands (``"full"``: its own place)."""
        if placement == "full":
            return torch.arange(self.dropped.shape[1], device=self.dropped.device).expand_as(self.first)
        return {"end": self.last, "first": self.first, "middle": (self.first + self.last) // 2}[placement]


def runs(dropped: Tensor, layout: Layout) -> Runs:
    """The runs of ``dropped (B, N)`` bool. None leads from one view into the next, or over a separator."""
    place = torch.arange(layout.size, device=dropped.device).expand_as(dropped)
    cut = stretch_ends(layout).to(dropped.device)  # (N,)
    ends = dropped & (cut | ~dropped.roll(-1, dims=1))
    begins = dropped & (cut.roll(1) | ~dropped.roll(1, dims=1))
    first = torch.where(begins, place, 0).cummax(dim=1).values
    last = torch.where(ends, place, layout.size).flip(1).cummin(dim=1).values.flip(1)
    return Runs(dropped, first, last, (begins.long().cumsum(dim=1) - 1).masked_fill(~dropped, -1))


@lru_cache(maxsize=256)
def stretch_ends(layout: Layout) -> Tensor:
    """``(N,)`` bool: tokens that the next token of the same view does not follow directly."""
    view_of = torch.empty(layout.size, dtype=torch.long)
    for v, view in enumerate(layout.views):
        view_of[view.tokens()] = v
    ends = torch.ones(layout.size, dtype=torch.bool)
    ends[:-1] = view_of[1:] != view_of[:-1]
    ends[[newline.last - 1 for newline in layout.newlines if newline.last]] = True
    return ends
