"""The picture itself made smaller: the cheapest baseline of all, since the vision encoder shrinks too.

A tower of fixed resolution gets smaller ``pixel_values`` (bilinear, antialiased) with interpolated position embeddings,
and its patches stand on the slots of the grid baseline. Families of any resolution (Qwen) have nothing to do inside the
model: call ``prepare`` on every picture before the processor, whose rounding then decides the count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.nn.functional import interpolate

from foveate.errors import BudgetError, InputError, UnsupportedModelError
from foveate.pruners.core import AtEntry, AtPixels, Keep, Layout, ModelInfo, Pruner, Selection, Stage, Tokens, register
from foveate.pruners.core.lattice import lattice, lattice_size
from foveate.pruners.core.selection import budget, keep_all
from foveate.pruners.grid import Grid

if TYPE_CHECKING:
    from PIL.Image import Image


@register("downsample")
@dataclass(frozen=True)
class Downsample(Pruner):
    """A smaller input picture.

    Attributes:
        keep: fraction or number of tokens, as for the grid baseline. ``prepare`` needs a fraction.
    """

    title: ClassVar[str] = "Smaller input picture"
    paper: ClassVar[str] = "baseline"
    cost: ClassVar[str] = "none; the vision encoder gets cheaper too"
    families: ClassVar[tuple[str, ...]] = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")

    keep: Keep = 0.25

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        if model.family not in self.families:
            raise UnsupportedModelError(
                f"downsample knows families with one fixed-size view ({self.families[0]}) and of any resolution "
                f"({', '.join(self.families[1:])}), not {model.family}; use avgpool or grid"
            )
        if model.family.startswith("qwen"):
            return ()

        def shrink(pixel_values: Tensor) -> Tensor:
            patch = model.patch_size
            grid = pixel_values.shape[2] // patch, pixel_values.shape[3] // patch
            rows, cols = lattice(grid, budget(self.keep, grid[0] * grid[1]))
            small = interpolate(pixel_values.float(), (rows * patch, cols * patch), mode="bilinear", antialias=True)
            return small.to(pixel_values.dtype)

        return AtPixels(shrink), AtEntry(self.select)

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        view, *more = layout.views
        if more:
            raise UnsupportedModelError(f"downsample takes pictures of one view, not {len(layout.views)}")
        return lattice_size(view.grid, budget(self.keep, layout.size))

    def select(self, tokens: Tokens) -> Selection:
        """Put the smaller tower's patches, which come first, where they belong on the picture.

        Raises:
            InputError: the tower returned another number of patches.
        """
        k = self.count(tokens.layout)
        if k >= tokens.count:
            return keep_all(tokens)
        filled = int(tokens.embeds.ne(0).any(dim=2).any(dim=0).sum())
        if filled != k:
            raise InputError(f"downsample asked the vision tower for {k} patches, and it returned {filled}")
        return replace(Grid(keep=k).select(tokens), values=tokens.embeds[:, :k])

    def prepare(self, image: Image) -> Image:
        """A picture for a family of any resolution, each side times ``sqrt(keep)``.

        Raises:
            BudgetError: ``keep`` is a number of tokens; the picture does not tell how many it will have.
        """
        if isinstance(self.keep, int):
            raise BudgetError(f"keep={self.keep}: to resize pictures, give the budget as a fraction of the tokens")
        width, height = (max(1, round(side * self.keep**0.5)) for side in image.size)
        return image.resize((width, height), resample=2)  # bilinear, antialiased
