"""ToDRE: token diversity before the decoder, task relevance inside it.

Li et al., "ToDRE", arXiv 2505.18757 (v1 May 2025: greedy k-center; v2 Nov 2025: greedy max-sum diversification,
followed here). Stage 1 keeps mutually dissimilar projected tokens, starting from the one the class token attends to
most; all crops or frames form one pool. Stage 2 removes every visual token before a late decoder layer once text and
image hardly attend to each other. Headline: 10 % of the tokens keep 95 % of LLaVA-NeXT-7B's score.

Acts at the decoder's entry (reads the class token's attention in the last encoder block) and before decoder layer
``floor(7 L / 8)`` (reads cross-modal attention of the layer below). Stage 2 saves nothing below that layer: the keys
and values of the layers below stay cached, and decoding reads them; there is no switch to drop them. It runs in
multi-turn chat too, where a later turn cannot get the image's keys back in the layers that lost them: use
``stage2=False`` there. Cost: one N x N similarity matrix and k dependent steps of O(N); stage 2 one pass over the text
rows of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.cuda import diverse_subset
from foveate.errors import ParameterError
from foveate.pruners.core import AtEntry, BeforeLayer, Layout, ModelInfo, Pruner, Selection, Stage, Tokens, register
from foveate.pruners.core.parameters import Keep, choice, integer, number, several
from foveate.pruners.core.selection import budget, floor, keep_all, seeded
from foveate.pruners.core.signals import ClassAttention, CrossModalAttention

OBJECTIVES = {"max_sum": "max_sum", "k_center": "max_min"}


@register("todre")
@dataclass(frozen=True)
class ToDRE(Pruner):
    """ToDRE: diverse tokens first, none at all in the last layers.

    Attributes:
        keep: fraction or number of tokens that stage 1 keeps of the whole image or video.
        diversity: ``"max_sum"`` (smallest summed similarity to the chosen, v2) or ``"k_center"`` (farthest from its
            nearest chosen token, v1).
        pivot: first token: ``"cls"`` (most attended by the class token), ``"farthest"`` from or nearest to
            (``"center"``) the mean direction, ``"random"``, or a token number. None: ``"cls"``, or ``"farthest"``
            without class token.
        cls_layer: encoder block of the class attention, 0-based or counted from the end.
        tau: stage 2 removes the visual tokens when both cross-modal shares are below it.
        check_depth: where stage 2 looks, as fractions of the decoder's depth; the first place that passes wins.
        system_tokens: how many tokens at the start of the prompt are the system prompt, which stage 2 does not count as
            text. None: everything before the first picture counts as system prompt.
        stage1: whether stage 1 runs.
        stage2: whether stage 2 runs.
        seed: of ``pivot="random"``.
    """

    title: ClassVar[str] = "Token diversity, then removal of all visual tokens from late layers"
    paper: ClassVar[str] = "arXiv 2505.18757 (2025)"
    cost: ClassVar[str] = "one N x N similarity matrix and k greedy steps"

    keep: Keep = 0.1
    diversity: str = choice("max_sum", *OBJECTIVES)
    pivot: str | int | None = choice(
        None, "cls", "farthest", "center", "random", otherwise=integer(0, "token number or rule", 0)
    )
    cls_layer: int = integer(-1, "block of the vision tower")
    tau: float = number(0.1, "share of attention", 0, 1)
    check_depth: tuple[float, ...] = several((7 / 8,), number(0, "share of the layers", 0, 1))
    system_tokens: int | None = integer(None, "number of tokens", 0)
    stage1: bool = True
    stage2: bool = True
    seed: int = integer(0, "seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.check_depth or not all(0.0 < depth < 1.0 for depth in self.check_depth):
            raise ParameterError(f"check_depth={self.check_depth}: give fractions between 0 and 1, at least one")
        if not (self.stage1 or self.stage2):
            raise ParameterError("stage1 and stage2 are both off: nothing would be pruned")

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        stages: list[Stage] = []
        if self.stage1:
            pivot = ("cls" if model.class_token else "farthest") if self.pivot is None else self.pivot
            read = {}
            if pivot == "cls":
                model.require_class_token("pivot='cls'", "pivot='farthest', 'center' or 'random'")
                read["class_attention"] = ClassAttention(model.block("cls_layer", self.cls_layer))
            stages.append(AtEntry(replace(self, pivot=pivot).diversify, read))
        if self.stage2:
            layers = {floor(depth * model.decoder_layers) for depth in self.check_depth}
            for layer in sorted(model.decoder_layer("check_depth * layers", n) for n in layers):
                read = {"shares": CrossModalAttention(layer - 1, self.system_tokens)}
                stages.append(BeforeLayer(self.drop_irrelevant, read, layer=layer, positions="keep"))
        return tuple(stages)

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        return None if self.stage2 else budget(self.keep, layout.size)  # stage 2 removes all of an image or nothing

    def diversify(self, tokens: Tokens, class_attention: Tensor | None = None) -> Selection:
        """Stage 1: tokens as unlike as can be; ``class_attention (B, N)`` finds the pivot where it is read."""
        k = budget(self.keep, tokens.count)
        if k >= tokens.count:
            return keep_all(tokens)
        chosen = diversification(tokens.embeds, k, self._pivot(tokens, class_attention), self.diversity)
        return Selection(chosen.sort(dim=1).values, scores=class_attention)

    def _pivot(self, tokens: Tokens, class_attention: Tensor | None) -> Tensor:
        if self.pivot == "cls" and class_attention is not None:
            return attended_pivot(class_attention, tokens.layout)
        if self.pivot == "random":
            drawn = [torch.randint(tokens.count, (), generator=g) for g in seeded(self.seed, tokens)]
            return torch.stack(drawn).to(tokens.embeds.device)
        if isinstance(self.pivot, int):
            if self.pivot >= tokens.count:
                raise ParameterError(f"pivot={self.pivot}: the image has tokens 0 .. {tokens.count - 1}")
            return torch.full((len(tokens.embeds),), self.pivot, device=tokens.embeds.device)
        closeness = closeness_to_mean(tokens.embeds)
        return closeness.argmax(dim=1) if self.pivot == "center" else closeness.argmin(dim=1)

    def drop_irrelevant(self, tokens: Tokens, shares: Tensor) -> Selection:
        """Stage 2: no token of images whose ``shares (B, 2)`` of attention between text and picture are both small."""
        gone = irrelevant(shares, self.tau)
        index = keep_all(tokens).index.masked_fill(gone[:, None], -1)
        return Selection(index[:, :0] if bool(gone.all()) else index)


def attended_pivot(class_attention: Tensor, layout: Layout) -> Tensor:
    """The token the class token attends to most, of the thumbnail if there is one: ``(B, N) -> (B,)`` int64.

    Frames compete with their raw attention, each from its own softmax.
    """
    thumbnails = [view for view in layout.views if view.kind == "thumbnail"]
    may = torch.cat([view.tokens(class_attention.device) for view in thumbnails or layout.views])
    return may[class_attention[:, may].float().argmax(dim=1)]


def diversification(embeds: Tensor, k: int, pivot: Tensor, diversity: str = "max_sum") -> Tensor:
    """``k`` tokens in order of selection, ``pivot (B,)`` first: ``(B, N, D) -> (B, k)`` int64."""
    return diverse_subset(embeds, k, pivot, objective=OBJECTIVES[diversity])


def closeness_to_mean(embeds: Tensor) -> Tensor:
    """Cosine of every token with the mean of the normalised tokens: ``(B, N, D) -> (B, N)`` float32."""
    x = normalize(embeds.float(), dim=-1, eps=1e-12)
    return (x @ normalize(x.mean(dim=1, keepdim=True), dim=-1, eps=1e-12).mT).squeeze(-1)


def irrelevant(shares: Tensor, tau: float) -> Tensor:
    """Do text and visual tokens both pay each other less than ``tau`` of their attention? ``(…, 2) -> (…)`` bool."""
    return (shares.float() < tau).all(dim=-1)
