"""FastV: after the first decoder layers keep the visual tokens that the last prompt token looks at.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764 (ECCV 2024 oral). The paper averages all
rows of attention; released code, and this, reads the last prompt token's. K = 2 without half of the tokens costs 55 %
of the FLOPs at equal scores. In prefill; positions stay, the cache is long below layer K, then short.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.pruners.core import BeforeLayer, Keep, LastTokenAttention, ModelInfo, Scorer, Tokens, integer, register


@register("fastv")
@dataclass(frozen=True)
class FastV(Scorer):
    """FastV: attention of the last prompt token in an early decoder layer.

    Attributes:
        keep: fraction or number of the visual tokens present at layer ``k`` (the paper's 1 - R).
        k: the first decoder layer that works on fewer tokens.
    """

    title: ClassVar[str] = "Last-token attention after an early decoder layer"
    paper: ClassVar[str] = "arXiv 2403.06764 (ECCV 2024)"
    cost: ClassVar[str] = "one attention row per head, O(H N d); layers below k run on all tokens"
    pooled: ClassVar[bool] = True
    keep: Keep = 0.5
    k: int = integer(2, "layer that follows one whose attention can be read", 1)

    def stages(self, model: ModelInfo) -> tuple[BeforeLayer, ...]:
        read = {"attention": LastTokenAttention(self.k - 1)}
        return (BeforeLayer(self.select, read, layer=model.decoder_layer("k", self.k), positions="keep"),)

    def score(self, tokens: Tokens, attention: Tensor) -> Tensor:
        return attention
