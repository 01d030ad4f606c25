"""Runs of dropped tokens in sequence order, and the markers that stand for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from foveate.cuda import gather_tokens, run_mean
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
        """``(B, N)`` the token in whose place each dropped token's run has its marker (``"full"``: its own place)."""
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


def with_markers(x: Tensor, index: Tensor, markers: Tensor, gone: Runs, vector: Tensor | None) -> Tensor:
    """Rows ``index (B, K)`` of ``x (B, N, D)``, markers' rows being ``vector``, or None: the mean of their run.

    ``markers (B, N)`` bool: which tokens are markers of the runs ``gone``.
    """
    slot = index.clamp(min=0)
    marked = markers.gather(1, slot) & (index >= 0)
    if vector is None:
        means = run_mean(x, gone.number, int(gone.counts.max()))
        vector = gather_tokens(means, gone.number.gather(1, slot))
    return gather_tokens(x, index, marked=marked, marker=vector)


def features_with_markers(index: Tensor, markers: Tensor, gone: Runs, mean: bool, x: Tensor) -> Tensor:
    """Other features ``x (N, C)`` of one picture's tokens for its survivors ``index (K,)``, -1 for none: markers have
    their run's ``mean``, or nothing.
    """
    present = index[index >= 0][None]
    return with_markers(x[None], present, markers[None], gone, None if mean else x.new_zeros(x.shape[1]))[0]


@torch.no_grad()
def mean_embedding(embed: nn.Module, count: int, at_once: int = 8192) -> Tensor:
    """Mean output ``(D,)`` of an input embedding over its first ``count`` tokens, in float32."""
    device = next(embed.parameters()).device
    parts = [embed(ids).float().sum(dim=0) for ids in torch.arange(count, device=device).split(at_once)]
    return torch.stack(parts).sum(dim=0) / count
