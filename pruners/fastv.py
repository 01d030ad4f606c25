"""FastV: after the first decoder layers keep the visual tokens that the last prompt token looks at.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764 (ECCV 2024 oral). The paper averages the
attention of all tokens; every released implementation reads the last prompt token's row only, and so does this one.
Headline: K = 2 with half of the tokens removed costs 55 % of the FLOPs at unchanged scores.

Acts in front of decoder layer K, in prefill only; reads one row of layer K - 1's attention. Survivors keep their
positions, the cache is long below layer K and short from there on. Cost: one query row per head, O(H N d).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.pruners.core.method import (
    Hook,
    Keep,
    LastTokenAttention,
    Layout,
    ModelInfo,
    Pruner,
    Selection,
    Stage,
    Tokens,
    budget,
    check_keep,
    integer,
    top_k,
)
from foveate.pruners.core.registry import register


@register("fastv")
@dataclass(frozen=True)
class FastV(Pruner):
    """FastV: attention of the last prompt token in an early decoder layer.

    Attributes:
        keep: fraction or number of the visual tokens present at layer ``k`` (the paper's 1 - R).
        k: the first decoder layer that works on fewer tokens.
    """

    title: ClassVar[str] = "Last-token attention after an early decoder layer"
    paper: ClassVar[str] = "arXiv 2403.06764 (ECCV 2024)"
    cost: ClassVar[str] = "one attention row per head, O(H N d); layers below k run on all tokens"

    keep: Keep = 0.5
    k: int = 2

    def __post_init__(self) -> None:
        check_keep(self.keep)
        integer("k", self.k, "layer that follows one whose attention can be read", 1)

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        layer = model.decoder_layer("k", self.k)
        read = {"attention": LastTokenAttention(layer - 1)}
        return (Stage(Hook.LLM_LAYER, self.select, read, layer=layer, positions="keep"),)

    def budgets(self, layout: Layout) -> tuple[int, ...]:
        return (budget(self.keep, layout.size),)

    def select(self, tokens: Tokens, attention: Tensor) -> Selection:
        """Those of the tokens present to which the last prompt token pays most ``attention (B, N)``."""
        return Selection(top_k(attention, budget(self.keep, tokens.count)), scores=attention)
