"""ToMe: merge the most similar pairs of a bipartite split, a few in every transformer block.

Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman, "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461. In
each block, between attention and MLP, tokens are split into two sets by turns; every token of the first finds its most
similar token in the second by the block's keys, and the ``r`` best pairs are averaged, weighted by the patches they
stand for. Attention then counts a token as often as it has patches. Headline: twice the throughput of ViT-L at 512 px
for 0.2 to 0.3 points of ImageNet accuracy, without training.

Class, distillation and register tokens never merge (the official code protects the first two). The order inside the
network is that of the official code, which mixes positions on purpose, except that without a class token unmerged
tokens stay in ascending order unless ``order="official"``. Cost: N^2 / 4 similarities of key width per block; the merge
touches r rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from foveate.errors import ParameterError
from foveate.pruners.core import InTower, ModelInfo, choice, integer, number, one_or_several, parameter, register
from foveate.pruners.core.matching import bipartite, kth, random_groups
from foveate.pruners.core.merging import BlockKeys, BlockTokens, Groups, Merger, ratio_of_block, removed


@register("tome")
@dataclass(frozen=True)
class ToMe(Merger):
    """ToMe: bipartite soft matching on keys.

    Attributes:
        r: tokens that every block merges away, or one number per block (missing ones are 0). Usual: 8 to 16 of 197
            tokens, 7 or 8 for large models at 224 px, 23 at 384 px, 40 to 45 above. A block can lose at most half its
            tokens.
        inflection: for a single ``r``, from -1 (twice as many in the first block, none in the last) over 0 (constant)
            to 1.
        ratio: instead of ``r``: the share of its tokens, class token counted, that every block keeps.
        prop_attn: attention counts a token as often as it has patches. Best without training for supervised models;
            leave it off for MAE models, and as in training for models trained with ToMe.
        matching: ``"bipartite"``; ``"kth"`` merges all of every ``k`` tokens but the last into their best match among
            the last ones, ``r`` unread; ``"random"`` merges random tokens into their best match, ``"pairs"`` into
            random ones.
        k: period of ``matching="kth"``.
        order: of unmerged tokens in models without class token: ``"ascending"``, or ``"official"``, by falling
            similarity.
        seed: of the random matchings, which draw alike for all pictures.
    """

    title: ClassVar[str] = "Average the most similar pairs of tokens in every block of the vision tower"
    paper: ClassVar[str] = "arXiv 2210.09461 (ICLR 2023)"
    cost: ClassVar[str] = "N^2 / 4 similarities of key width per block"

    r: int | tuple[int, ...] = one_or_several(8, integer(0, "number of tokens", 0))
    inflection: float = number(0.0, "bend", -1, 1)
    ratio: float | None = parameter(None, ratio_of_block)
    prop_attn: bool = True
    matching: str = choice("bipartite", "bipartite", "kth", "random", "pairs")
    k: int = integer(2, "group of tokens of which one is left", 2)
    order: str = choice("ascending", "ascending", "official")
    seed: int = integer(0, "seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inflection and isinstance(self.r, tuple):
            raise ParameterError("inflection bends a single r; with one r per block leave it at 0")

    def removing(self, counts: tuple[int, ...], n_patches: int, model: ModelInfo) -> ToMe:
        if self.matching == "kth":
            raise ParameterError(f"matching='kth' merges all but every {self.k}th token; it has no other schedule")
        return replace(self, r=counts, inflection=0.0, ratio=None)

    def block(self, i: int, model: ModelInfo) -> InTower:
        prefix, official = model.prefix_tokens, self.order == "official"
        planned = schedule(self.r, model.encoder_layers, self.inflection)[i]

        def removes(n: int) -> int:
            patches = max(0, n - prefix)
            if self.matching == "kth":
                return patches // self.k * (self.k - 1)
            return min(planned if self.ratio is None else removed(self.ratio, n), patches // 2)

        def select(tokens: BlockTokens, metric: Tensor) -> Groups:
            if self.matching == "kth":
                return kth(metric, self.k, prefix=prefix)
            if self.matching == "bipartite":
                return bipartite(metric, tokens.count, prefix=prefix, ascending=not official)
            drawn = torch.Generator().manual_seed(self.seed * 1_000_003 + i)
            return random_groups(metric, tokens.count, drawn, prefix=prefix, pairs=self.matching == "pairs")

        return InTower(select, {"metric": BlockKeys()}, layer=i, removes=removes, proportional=self.prop_attn)


def schedule(r: int | tuple[int, ...], layers: int, inflection: float = 0.0) -> list[int]:
    """How many tokens each of ``layers`` blocks merges; cut to integers, as officially, so the sum may be lower."""
    if isinstance(r, tuple):
        return [*r, *[0] * layers][:layers]
    lowest = int(r * (1.0 - inflection))
    highest = 2 * r - lowest
    step = (highest - lowest) / max(1, layers - 1)
    return [int(lowest + step * i) for i in range(layers)] if layers > 1 else [int(r)]
