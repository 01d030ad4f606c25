"""Baselines every pruner must beat: a random choice, a regular lattice, average pooling, and a smaller picture.

None reads the content. Random, Grid and AvgPool act at the decoder's entry and cost nothing (Random also inside the
decoder, as the control for FastV); Downsample also shortens the vision encoder. Conventions follow the harnesses that report them (UniPruneBench, arXiv 2511.02650; Wen et al., arXiv
2502.11501), with survivors in raster order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d, interpolate

from foveate.errors import BudgetError, InputError, ParameterError, UnsupportedModelError
from foveate.pruners.core import (
    AtEntry,
    AtPixels,
    BeforeLayer,
    Keep,
    Layout,
    ModelInfo,
    Pruner,
    Selection,
    Stage,
    Tokens,
    budget,
    keep_all,
    per_view,
    register,
    seeded,
    view_budgets,
)
from foveate.pruners.core.lattice import host_slots, lattice, lattice_size, middles, nearest_host
from foveate.pruners.core.parameters import check_choice as one_of
from foveate.pruners.core.parameters import check_integer as integer
from foveate.pruners.core.parameters import check_keep

if TYPE_CHECKING:
    from PIL.Image import Image


@register("random")
@dataclass(frozen=True)
class Random(Pruner):
    """A random choice, drawn for every view by itself with the same ratio, or once per image inside the decoder.

    Attributes:
        keep: fraction (of every view) or number of tokens (shared among the views); with ``layer`` of all tokens present there.
        seed: with the image's id it determines the choice, on every device and in every batch.
        shuffle: feed the survivors in the order drawn, as one public harness does; at the decoder's entry only.
        layer: None chooses at the decoder's entry, an integer in front of that decoder layer, positions kept: the control
            for FastV with this ``k``.
    """

    title: ClassVar[str] = "Random choice"
    paper: ClassVar[str] = "baseline"
    cost: ClassVar[str] = "none"
    content_free: ClassVar[bool] = True

    keep: Keep = 0.25
    seed: int = 0
    shuffle: bool = False
    layer: int | None = None

    def __post_init__(self) -> None:
        check_keep("keep", self.keep)
        integer("seed", self.seed, "seed")
        if self.layer is not None:
            integer("layer", self.layer, "decoder layer that tokens can leave in front of", 1)
        if self.layer is not None and self.shuffle:
            raise ParameterError(
                f"shuffle=True needs the decoder's entry; at layer={self.layer} tokens keep their positions"
            )

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        if self.layer is None:
            return (AtEntry(self.select),)
        layer = model.decoder_layer("layer", self.layer)
        return (BeforeLayer(self.select, layer=layer, positions="keep"),)

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        return sum(self.budgets(layout))

    def budgets(self, layout: Layout) -> tuple[int, ...]:
        if self.layer is not None:
            return (budget(self.keep, layout.size),)
        if isinstance(self.keep, int):
            return view_budgets(self.keep, layout)
        return tuple(budget(self.keep, view.size) for view in layout.views)

    def select(self, tokens: Tokens) -> Selection:
        """As many tokens as the budget allows, drawn by the image's id."""
        if self.layer is not None:  # survivors of an earlier stage have no grid, and are counted as FastV counts them
            return self._select_view(tokens, budget(self.keep, tokens.count))
        return per_view(tokens, self.budgets(tokens.layout), self._select_view)

    def _select_view(self, tokens: Tokens, k: int) -> Selection:
        drawn = torch.stack([torch.randperm(tokens.count, generator=g)[:k] for g in seeded(self.seed, tokens)])
        drawn = drawn.to(tokens.embeds.device)
        index = drawn.sort(dim=1).values
        return Selection(index, order=torch.searchsorted(index, drawn) if self.shuffle else None)


@register("grid")
@dataclass(frozen=True)
class Grid(Pruner):
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
    variant: str = "lattice"

    def __post_init__(self) -> None:
        check_keep("keep", self.keep)
        one_of("variant", self.variant, ("lattice", "stride"))

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        return (AtEntry(self.select),)

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        return sum(self.budgets(layout))

    def budgets(self, layout: Layout) -> tuple[int, ...]:
        shares = view_budgets(self.keep, layout)
        if self.variant == "stride":
            return shares
        return tuple(lattice_size(view.grid, share) for view, share in zip(layout.views, shares))

    def select(self, tokens: Tokens) -> Selection:
        """The lattice of every view."""
        return per_view(tokens, self.budgets(tokens.layout), self._select_view)

    def _select_view(self, tokens: Tokens, k: int) -> Selection:
        if self.variant == "stride":
            places = middles(tokens.count, k)
        else:
            grid = tokens.layout.views[0].grid
            places = host_slots(grid, lattice(grid, k))
        return Selection(places.to(tokens.embeds.device).expand(len(tokens.embeds), -1))


@register("avgpool")
@dataclass(frozen=True)
class AvgPool(Pruner):
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
    pool: str = "mean"

    def __post_init__(self) -> None:
        check_keep("keep", self.keep)
        one_of("pool", self.pool, ("mean", "max"))

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        return (AtEntry(self.select),)

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        return sum(self.budgets(layout))

    def budgets(self, layout: Layout) -> tuple[int, ...]:
        return tuple(lattice_size(v.grid, share) for v, share in zip(layout.views, view_budgets(self.keep, layout)))

    def select(self, tokens: Tokens) -> Selection:
        """Every view pooled to its lattice."""
        return per_view(tokens, self.budgets(tokens.layout), self._select_view)

    def _select_view(self, tokens: Tokens, k: int) -> Selection:
        grid, batch = tokens.layout.views[0].grid, len(tokens.embeds)
        small = lattice(grid, k)
        picture = tokens.embeds.float().mT.unflatten(2, grid)  # (B, D, rows, cols)
        pooled = (adaptive_avg_pool2d if self.pool == "mean" else adaptive_max_pool2d)(picture, small)
        index = host_slots(grid, small).to(tokens.embeds.device).expand(batch, -1)
        owner = nearest_host(grid, small).to(index.device).expand(batch, -1)
        return Selection(index, pooled.flatten(2).mT.to(tokens.embeds.dtype), owner)


@register("downsample")
@dataclass(frozen=True)
class Downsample(Pruner):
    """The picture itself made smaller: cheapest of all, since the vision encoder shrinks too.

    A tower of fixed resolution gets smaller ``pixel_values`` (bilinear, antialiased) with interpolated position
    embeddings, and its patches stand on the slots of the grid baseline. Families of any resolution (Qwen) have nothing
    to do inside the model: call :meth:`prepare` on every picture before the processor, whose rounding then decides the count.

    Attributes:
        keep: fraction or number of tokens, as for the grid baseline. ``prepare`` needs a fraction.
    """

    title: ClassVar[str] = "Smaller input picture"
    paper: ClassVar[str] = "baseline"
    cost: ClassVar[str] = "none; the vision encoder gets cheaper too"
    families: ClassVar[tuple[str, ...]] = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")

    keep: Keep = 0.25

    def __post_init__(self) -> None:
        check_keep("keep", self.keep)

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
        return sum(self.budgets(layout))

    def budgets(self, layout: Layout) -> tuple[int, ...]:
        if len(layout.views) > 1:
            raise UnsupportedModelError(f"downsample takes pictures of one view, not {len(layout.views)}")
        (view,) = layout.views
        return (lattice_size(view.grid, budget(self.keep, view.size)),)

    def select(self, tokens: Tokens) -> Selection:
        """Put the smaller tower's patches, which come first, where they belong on the picture.

        Raises:
            InputError: the tower returned another number of patches.
        """
        (k,) = self.budgets(tokens.layout)
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
