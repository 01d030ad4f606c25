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

from foveate.cuda import best_match
from foveate.errors import ParameterError
from foveate.pruners.core import InTower, ModelInfo, choice, integer, number, one_or_several, parameter, register
from foveate.pruners.core.merging import BlockKeys, BlockTokens, Groups, Merger, ratio_of_block, removed
from foveate.pruners.core.parameters import check_integer
from foveate.pruners.core.selection import ranked


def _tokens(name: str, value: int) -> int:
    return check_integer(name, value, "number of tokens", 0)


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

    r: int | tuple[int, ...] = one_or_several(8, _tokens)
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
    """How many tokens each of ``layers`` blocks merges; cut to integers as officially, so the sum may be below ``r * layers``."""
    if isinstance(r, tuple):
        return [*r, *[0] * layers][:layers]
    lowest = int(r * (1.0 - inflection))
    highest = 2 * r - lowest
    step = (highest - lowest) / max(1, layers - 1)
    return [int(lowest + step * i) for i in range(layers)] if layers > 1 else [int(r)]


def bipartite(metric: Tensor, r: int, *, prefix: int = 0, ascending: bool = True) -> Groups:
    """Bipartite soft matching of ``metric (B, N, d)``: even rows against odd ones, the ``r`` best pairs merge.

    ``prefix`` rows stay first. After them come the even rows that stay (ascending, or by falling similarity), then all
    odd rows. ``r`` is at most half of the other rows.
    """
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    score, match = best_match(metric[:, even::2], metric[:, odd::2])
    order = ranked(score)
    target = match.gather(1, order[:, :r])
    order = order.mul_(2).add_(even)  # as rows of the metric
    source, stay = order[:, :r], order[:, r:]
    if ascending or prefix:
        stay = stay.sort(dim=1).values
    rows = torch.arange(metric.shape[1], device=metric.device).expand(len(metric), -1)
    keep = torch.cat([rows[:, :prefix], stay, rows[:, odd::2]], dim=1)
    return Groups(keep, source, target + (prefix + stay.shape[1]))


def kth(metric: Tensor, k: int, *, prefix: int = 0) -> Groups:
    """Of every ``k`` consecutive rows after the prefix, the first k - 1 merge into their best match among the k-th
    ones.

    ``metric (B, N, d)``; the last N mod k rows, which the official code loses, stay as they are.
    """
    rows = torch.arange(metric.shape[1], device=metric.device).expand(len(metric), -1)
    whole = (metric.shape[1] - prefix) // k * k
    periods = rows[:, prefix : prefix + whole].unflatten(1, (-1, k))
    source, last = periods[..., :-1].flatten(1), periods[..., -1]
    _, match = best_match(metric[:, source[0]], metric[:, last[0]])
    return Groups(torch.cat([rows[:, :prefix], last, rows[:, prefix + whole :]], dim=1), source, prefix + match)


def random_groups(
    metric: Tensor, r: int, generator: torch.Generator, *, prefix: int = 0, pairs: bool = False
) -> Groups:
    """``r`` random rows of ``metric (B, N, d)`` merge into their best match among the others, or (``pairs``) into random ones."""
    batch, n, _ = metric.shape
    shuffled = prefix + torch.randperm(n - prefix, generator=generator).to(metric.device)
    source, stay = shuffled[:r], shuffled[r:].sort().values
    if pairs:
        match = torch.randint(len(stay), (r,), generator=generator).to(metric.device).expand(batch, -1)
    else:
        _, match = best_match(metric[:, source], metric[:, stay])
    keep = torch.cat([torch.arange(prefix, device=metric.device), stay])
    return Groups(keep.expand(batch, -1), source.expand(batch, -1), prefix + match)
