"""VisionZip: dominant tokens as they are, the rest merged into a few contextual ones.

Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv 2412.04467 (CVPR 2025).
*Dominant* are the class token itself and the patches it attends to most. Of the others evenly spaced *targets* are
chosen; every remaining patch goes to the target with the most similar attention key, and a target becomes itself plus
the mean of its members: the *contextual* tokens. Headline: 64 of 576 tokens keep 93 % of LLaVA-1.5-7B's score.

Acts at the decoder's entry (merging encoder features, which are projected afterwards); reads class attention, keys and
features of the block that feeds the projector. Towers without class token are ranked by received attention instead and
send none. Cost: one attention row (or column sum) of one block, and an R x contextual similarity matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.errors import BudgetError, MissingSignalError, ParameterError
from foveate.pruners.core import AtEntry, ByView, Keep, Layout, ModelInfo, Selection, Signal, Stage, Tokens, register
from foveate.pruners.core.parameters import integer
from foveate.pruners.core.selection import gather, top_k
from foveate.pruners.core.signals import ClassAttention, ClassFeatures, EncoderFeatures, EncoderKeys, ReceivedAttention


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(ByView):
    """VisionZip: dominant and contextual tokens.

    The class token has no place on the picture: it travels in the lowest slot that no kept patch takes, and that slot's
    ``owner`` entry says itself.

    Attributes:
        keep: fraction or number of tokens of the image, the class token counted; split 54 : 10 into dominant and
            contextual.
        dominant: tokens **per view**, the class token counted, instead of ``keep``; with ``contextual`` or not at all.
            Together at most the tokens of the smallest view, the class token included: else :class:`BudgetError`.
        contextual: merged tokens **per view**.
    """

    title: ClassVar[str] = "Dominant tokens by class attention, the rest merged by key similarity"
    paper: ClassVar[str] = "arXiv 2412.04467 (CVPR 2025)"
    cost: ClassVar[str] = "one class attention row, one N x contextual similarity matrix"
    by_view: ClassVar[tuple[str, ...]] = ("class_features",)

    keep: Keep = 1 / 9
    dominant: int | None = integer(None, "number of tokens", 1, error=BudgetError)
    contextual: int | None = integer(None, "number of tokens", 0, error=BudgetError)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.dominant is None) != (self.contextual is None):
            raise ParameterError(f"dominant={self.dominant}, contextual={self.contextual}: give both or none")

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        block = model.block("feature_layer", None)
        signals: dict[str, Signal] = {"keys": EncoderKeys(block), "features": EncoderFeatures(block)}
        if model.class_token:
            signals |= {"attention": ClassAttention(block), "class_features": ClassFeatures(block)}
        else:
            signals["attention"] = ReceivedAttention(block)
        return (AtEntry(self.select, signals),)

    def budgets(self, layout: Layout) -> tuple[int, ...]:
        """Tokens kept of each view.

        Raises:
            BudgetError: a view has fewer tokens than ``dominant + contextual``, even with a class token.
        """
        if self.dominant is None:
            return super().budgets(layout)
        self._require_room(layout, class_token=True)
        return tuple(min(self.dominant + self.contextual, size) for size in layout.sizes)

    def _require_room(self, layout: Layout, class_token: bool) -> None:
        """Raise if ``dominant + contextual`` is more than a view has; views that are all padding do not count."""
        asked = (self.dominant or 0) + (self.contextual or 0)
        for view in layout.views:
            if view.size and asked > view.size + class_token:
                raise BudgetError(
                    f"dominant={self.dominant} and contextual={self.contextual} ask for {asked} tokens per view, and a "
                    f"view of {view.rows} x {view.cols} has {view.size}{' and a class token' if class_token else ''}; "
                    "ask for fewer, or give keep, which is shared among the views by their sizes"
                )

    def split(self, k: int) -> tuple[int, int]:
        """Dominant and contextual share of a view's ``k`` tokens."""
        contextual = round(k * 10 / 64) if self.contextual is None else self.contextual
        return k - contextual, contextual

    def select(self, tokens: Tokens, **signals: Tensor) -> Selection:
        """Dominant and contextual tokens of every view."""
        has_class, budgets = "class_features" in signals, self.budgets(tokens.layout)
        self._require_room(tokens.layout, has_class)
        selection = super().select(tokens, **signals)
        if selection.order is not None and any(view.kind == "crop" for view in tokens.layout.views):
            selection.order = self._crops_order(selection.order, tokens.layout, budgets, has_class)
        return selection

    def choose(
        self,
        tokens: Tokens,
        k: int,
        attention: Tensor,
        keys: Tensor,
        features: Tensor,
        class_features: Tensor | None = None,
    ) -> Selection:
        """Dominant and contextual tokens.

        Args:
            attention: ``(B, N)`` by which dominant tokens are ranked.
            keys: ``(B, N, d)`` of the encoder's attention.
            features: ``(B, N, C)`` of the encoder.
            class_features: ``(B, C)``, the class token's; None: there is none.
        """
        n_dominant, n_contextual = self.split(k)
        has_class, project = class_features is not None, tokens.project
        dominant = top_k(attention, n_dominant - has_class)  # (B, d)
        rest = complement(dominant, tokens.count)
        targets, assigned = assign(keys, rest, n_contextual)  # (B, c), (B, R)
        values, places = [gather(tokens.embeds, dominant)], [dominant, targets]
        if n_contextual:  # without a projector, merging happens where the tokens are: before the decoder
            merged = merge(tokens.embeds if project is None else features, rest, targets, assigned)
            values.append(merged if project is None else project(merged))
        if has_class:
            if project is None and class_features.shape[-1] != tokens.embeds.shape[-1]:
                raise MissingSignalError(
                    "visionzip sends the class token to the decoder, and this model has no projector that could take "
                    "it there; use hiprune or fopru"
                )
            values.insert(0, (class_features if project is None else project(class_features))[:, None])
            places.insert(0, complement(torch.cat([dominant, targets], dim=1), tokens.count)[:, :1])
        index, order, values = hosted(places, values, tokens.embeds.dtype)
        owner = torch.full_like(attention, -1, dtype=torch.long)
        if n_contextual:
            owner.scatter_(1, rest, assigned)
        return Selection(index, values, owner.scatter_(1, index, index), attention, order)

    def _crops_order(self, order: Tensor, layout: Layout, budgets: tuple[int, ...], has_class: bool) -> Tensor:
        """Thumbnail as it is; then the dominant patches of all crops in raster order; then the crops' other tokens."""
        first, patches, classes, contextual = [], [], [], []
        for view, k, part in zip(layout.views, budgets, order.split(budgets, dim=1)):
            if view.kind != "crop" or k >= view.size:
                (patches if view.kind == "crop" else first).append(part)
                continue
            n_dominant, n_contextual = self.split(k)
            classes.append(part[:, : int(has_class)])
            patches.append(part[:, int(has_class) : n_dominant])
            contextual.append(part[:, k - n_contextual :])
        patches = [torch.cat(patches, dim=1).sort(dim=1).values]
        return torch.cat(first + patches + classes + contextual, dim=1)


def complement(taken: Tensor, count: int) -> Tensor:
    """Tokens of 0 .. ``count`` - 1 that are not in ``taken (B, T)``, ascending: ``(B, count - T)``."""
    mask = torch.zeros(len(taken), count, dtype=torch.long, device=taken.device).scatter_(1, taken, 1)
    return mask.argsort(dim=1, stable=True)[:, : count - taken.shape[1]]


def assign(keys: Tensor, rest: Tensor, contextual: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced targets among the tokens ``rest (B, R)``, and for each of these its target by key cosine.

    Returns:
        targets ``(B, contextual)`` and assigned ``(B, R)``, both token numbers; a target is assigned to itself.
    """
    step = max(1, rest.shape[1] // max(1, contextual))
    at = torch.arange(contextual, device=rest.device) * step
    targets = rest[:, at]
    if contextual == 0:
        return targets, rest
    metric = normalize(gather(keys, rest).float(), dim=-1, eps=1e-12)
    nearest = (metric @ metric[:, at].mT).argmax(dim=-1)  # (B, R)
    nearest[:, at] = torch.arange(contextual, device=rest.device)
    return targets, targets.gather(1, nearest)


def merge(hidden: Tensor, rest: Tensor, targets: Tensor, assigned: Tensor) -> Tensor:
    """Every target plus the mean of its members (not a mean of all): ``(B, contextual, C)`` float32."""
    member = (assigned[:, None] == targets[..., None]) & (rest[:, None] != targets[..., None])  # (B, c, R)
    total = member.float() @ gather(hidden, rest).float()
    return gather(hidden, targets).float() + total / member.sum(dim=-1, keepdim=True).clamp(min=1)


def hosted(places: list[Tensor], values: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Sort tokens given in order of entry by their places: index, order and values of a selection.

    ``places [(B, k)]`` and ``values [(B, k, D)]``, part by part -> ``(B, K), (B, K), (B, K, D)``.
    """
    index, perm = torch.cat(places, dim=1).sort(dim=1)
    return index, perm.argsort(dim=1), gather(torch.cat([v.to(dtype) for v in values], dim=1), perm)
