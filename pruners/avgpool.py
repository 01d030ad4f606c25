"""Projected tokens pooled to a smaller grid: a baseline that acts at the decoder's entry and reads nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d

from foveate.pruners.core import ByView, Keep, Layout, Selection, Tokens, choice, register
from foveate.pruners.core.lattice import host_slots, lattice, lattice_size, nearest_host


@register("avgpool")
@dataclass(frozen=True)
class AvgPool(ByView):
    """Projected tokens pooled to the lattice of the grid baseline; a pooled token stands in the middle of its bin.

    Attributes:
        keep: fraction or number of tokens, as for the grid baseline.
        pool: ``"mean"`` or ``"max"``.
    """

    title: ClassVar[str] = "Average pooling to a smaller grid"
    paper: ClassVar[str] = "baseline"
    cost: ClassVar[str] = "one adaptive pooling"
    regrids: ClassVar[bool] = True
    content_free: ClassVar[bool] = True

    keep: Keep = 0.25
    pool: str = choice("mean", "mean", "max")

    def budgets(self, layout: Layout) -> tuple[int, ...]:
        return tuple(lattice_size(view.grid, k) for view, k in zip(layout.views, super().budgets(layout)))

    def choose(self, tokens: Tokens, k: int) -> Selection:
        grid, batch = tokens.layout.views[0].grid, len(tokens.embeds)
        small = lattice(grid, k)
        picture = tokens.embeds.float().mT.unflatten(2, grid)  # (B, D, rows, cols)
        pooled = (adaptive_avg_pool2d if self.pool == "mean" else adaptive_max_pool2d)(picture, small)
        index = host_slots(grid, small).to(tokens.embeds.device).expand(batch, -1)
        owner = nearest_host(grid, small).to(index.device).expand(batch, -1)
        return Selection(index, pooled.flatten(2).mT.to(tokens.embeds.dtype), owner)
