"""A regular sub-lattice of every view: a baseline that reads no content and costs nothing, at the decoder's entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.pruners.core import ByView, Keep, Layout, Selection, Tokens, choice, register
from foveate.pruners.core.lattice import host_slots, lattice, lattice_size, middles


@register("grid")
@dataclass(frozen=True)
class Grid(ByView):
    """A regular sub-lattice of every view.

    Attributes:
        keep: fraction or number of tokens. The largest lattice within the budget is kept, which may be smaller.
        variant: ``"lattice"``, or ``"stride"``: evenly spaced in raster order, exact in number and blind to the aspect.
    """

    title: ClassVar[str] = "Uniform spatial grid"
    paper: ClassVar[str] = "baseline"
    cost: ClassVar[str] = "none"
    content_free: ClassVar[bool] = True

    keep: Keep = 0.25
    variant: str = choice("lattice", "lattice", "stride")

    def budgets(self, layout: Layout) -> tuple[int, ...]:
        shares = super().budgets(layout)
        return (
            shares if self.variant == "stride" else tuple(lattice_size(v.grid, k) for v, k in zip(layout.views, shares))
        )

    def choose(self, tokens: Tokens, k: int) -> Selection:
        grid = tokens.layout.views[0].grid
        places = middles(tokens.count, k) if self.variant == "stride" else host_slots(grid, lattice(grid, k))
        return Selection(places.to(tokens.embeds.device).expand(len(tokens.embeds), -1))
