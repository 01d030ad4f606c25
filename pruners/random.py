"""A random choice: the baseline every pruner must beat, at the decoder's entry or as the control for FastV inside it.

Drawn as in the harnesses that report it (UniPruneBench, arXiv 2511.02650; Wen et al., arXiv 2502.11501), with survivors
in raster order. It reads no content and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.errors import ParameterError
from foveate.pruners.core import BeforeLayer, ByView, Keep, Layout, ModelInfo, Selection, Stage, Tokens, register
from foveate.pruners.core.parameters import integer
from foveate.pruners.core.selection import budget, seeded


@register("random")
@dataclass(frozen=True)
class Random(ByView):
    """A random choice, drawn for every view by itself with the same ratio, or once per image inside the decoder.

    Attributes:
        keep: fraction (of every view) or number of tokens (shared among the views); with ``layer`` of all tokens
            present there.
        seed: with the image's id it determines the choice, on every device and in every batch.
        shuffle: feed the survivors in the order drawn, as one public harness does; at the decoder's entry only.
        layer: None chooses at the decoder's entry, an integer before that decoder layer, positions kept: the control
            for FastV with this ``k``.
    """

    title: ClassVar[str] = "Random choice"
    paper: ClassVar[str] = "baseline"
    cost: ClassVar[str] = "none"
    content_free: ClassVar[bool] = True

    keep: Keep = 0.25
    seed: int = integer(0, "seed")
    shuffle: bool = False
    layer: int | None = integer(None, "decoder layer that tokens can leave before", 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None and self.shuffle:
            where = f"at layer={self.layer} tokens keep their positions"
            raise ParameterError(f"shuffle=True needs the decoder's entry; {where}")

    @property
    def pooled(self) -> bool:
        """At a layer: survivors of an earlier stage have no grid, and are counted as FastV counts them."""
        return self.layer is not None

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        if self.layer is None:
            return super().stages(model)
        return (BeforeLayer(self.select, layer=model.decoder_layer("layer", self.layer), positions="keep"),)

    def budgets(self, layout: Layout) -> tuple[int, ...]:
        if self.pooled or isinstance(self.keep, int):
            return super().budgets(layout)
        return tuple(budget(self.keep, size) for size in layout.sizes)

    def choose(self, tokens: Tokens, k: int) -> Selection:
        drawn = torch.stack([torch.randperm(tokens.count, generator=g)[:k] for g in seeded(self.seed, tokens)])
        drawn = drawn.to(tokens.embeds.device)
        index = drawn.sort(dim=1).values
        return Selection(index, order=torch.searchsorted(index, drawn) if self.shuffle else None)
