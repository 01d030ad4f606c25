"""GlobalCom²: the thumbnail of a high-resolution picture commands how its crops are compressed.

"Global Compression Commander", arXiv 2501.05179 (v4-v6; AAAI 2026). Models of the LLaVA-NeXT kind see a picture twice:
squeezed into a *thumbnail* and cut into *crops*. What the class token looks at in the thumbnail decides how many tokens
each crop may keep, and, mixed with what each crop's own class token looks at, which ones. Headline: LLaVA-NeXT-7B keeps
96.7 % of its score with 25 % of the visual tokens and 91.6 % with 10 %.

Acts at the decoder's entry; reads the class token's attention logits in the last encoder block. As in the released code
the softmax is left out: after it all regions would look alike. Every canvas row keeps its newline, also where no token
is left; newlines do not count in the budget. Pictures without crops (LLaVA-1.5) and video frames keep the best of each
view. Experimental: towers without class token (LLaVA-OneVision) score by the paper's other rule, the negative cosine
with the view's mean token; canvases that the model shrinks are refused, for their tokens belong to no crop. Cost: two
matrix-vector products for the logits, one resize of the thumbnail's map and one sort per crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, normalize, one_hot

from foveate.errors import ParameterError
from foveate.pruners.core import AtEntry, Keep, Layout, ModelInfo, Pruner, Selection, Stage, Tokens, keep_all, register
from foveate.pruners.core.canvas import Canvas, canvas_of
from foveate.pruners.core.parameters import choice, number
from foveate.pruners.core.selection import among_top, best, budget, kept_tokens, per_view, ranked, view_budgets
from foveate.pruners.core.signals import ClassAttention, EncoderFeatures, Signal


@register("globalcom2")
@dataclass(frozen=True)
class GlobalCom2(Pruner):
    """GlobalCom²: thumbnail-guided budgets and scores for AnyRes crops.

    Attributes:
        keep: retention ratio R of the thumbnail and, on average, of the crops. A number of tokens is met exactly, as
            with ``redistribute``.
        temperature: of the softmax over the crops' shares of the thumbnail's attention.
        alpha: weight of the thumbnail's map against the crop's own attention.
        score: ``"cls_logits"``, ``"cls_softmax"`` or ``"neg_cos"``; None: logits, or ``"neg_cos"`` without class token.
        redistribute: meet the budget exactly. Otherwise each crop rounds down and forgoes what exceeds its size, as
            published, and the total depends on the picture.
        order: ``"spatial"``, or ``"official"``: the released code's sequence of the same tokens (thumbnail by score,
            tokens of padded crops re-packed towards the crop's corner).
        newline: rows closed by a newline: ``"valid"`` or ``"all"``, padding included. None: valid, or all in official
            order.
        compress_single: prune pictures without crops too; the released code leaves them whole.
    """

    title: ClassVar[str] = "Thumbnail-guided compression of AnyRes crops"
    paper: ClassVar[str] = "arXiv 2501.05179 (AAAI 2026)"
    cost: ClassVar[str] = "class-token logits of one encoder block, one sort per crop"
    families: ClassVar[tuple[str, ...]] = ("llava_next", "llava", "llava_onevision (experimental)")

    keep: Keep = 0.25
    temperature: float = number(10.0, "temperature", 0, above=True)
    alpha: float = number(0.5, "weight", 0, 1)
    score: str | None = choice(None, "cls_logits", "cls_softmax", "neg_cos")
    redistribute: bool = False
    order: str = choice("spatial", "spatial", "official")
    newline: str | None = choice(None, "valid", "all")
    compress_single: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order == "official" and self.newline == "valid":
            raise ParameterError("newline='valid': the official order closes all rows of the canvas, padding included")

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        score = self.score or ("cls_logits" if model.class_token else "neg_cos")
        signals: dict[str, Signal] = {"features": EncoderFeatures(model.feature_layer)}
        if score != "neg_cos":
            model.require_class_token(f"score={score!r}", "score='neg_cos'")
            signals = {"attention": ClassAttention(model.encoder_layers - 1, logits=score == "cls_logits")}
        return (AtEntry(self.select, signals, newlines="keep"),)

    def ratio(self, layout: Layout) -> float:
        """R of this picture."""
        return self.keep if isinstance(self.keep, float) else self.keep / layout.size

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        if canvas_of(layout) is None:
            return sum(self._single(layout))
        exact = self.redistribute or isinstance(self.keep, int) or self.keep == 1.0
        return budget(self.keep, layout.size) if exact else None

    def _single(self, layout: Layout) -> tuple[int, ...]:
        """Tokens of each view that a picture without crops keeps, or a video."""
        if not self.compress_single:
            return layout.sizes
        if isinstance(self.keep, float):
            return tuple(budget(self.keep, size, int) for size in layout.sizes)
        return view_budgets(self.keep, layout)

    def select(self, tokens: Tokens, attention: Tensor | None = None, features: Tensor | None = None) -> Selection:
        """Budgets from the thumbnail, then the best tokens of thumbnail and crops.

        Args:
            attention: ``(B, N)`` of the class token.
            features: ``(B, N, C)`` of the encoder, read without a class token.

        Raises:
            InputError: the model has shrunk the canvas, so that tokens belong to no crop.
        """
        layout, canvas = tokens.layout, canvas_of(tokens.layout)
        scores = distinctness(features, layout) if attention is None else attention.float()
        if canvas is None:
            return per_view(tokens, self._single(layout), best, scores=scores)
        canvas.refuse_shrunk("globalcom2")
        if self.ratio(layout) >= 1.0:
            return keep_all(tokens)
        overview, first = scores[:, : canvas.thumbnail.size], canvas.thumbnail.size
        ratios = crop_ratios(richness(overview, canvas), self.ratio(layout), self.temperature)
        counts = self.counts(ratios, layout)
        stretched = global_map(overview, canvas).flatten(1)  # (B, tokens of the canvas)
        kept = torch.zeros_like(scores, dtype=torch.bool)
        for c, view in enumerate((canvas.thumbnail, *canvas.crops)):
            where = view.tokens(scores.device)
            judged = token_score(scores[:, where], stretched[:, where - first], self.alpha) if c else scores[:, where]
            kept[:, where] = among_top(judged, counts[:, c, None])
        chosen = Selection(kept_tokens(kept, self.count(layout)), scores=scores)
        if self.order == "official":
            chosen.order = official_order(chosen.index, overview, canvas)
        elif self.newline == "all":
            rows = torch.arange(canvas.rows, device=scores.device).repeat_interleave(canvas.cols) + canvas.top
            ascending = torch.arange(chosen.index.shape[1], device=scores.device).expand_as(chosen.index)
            chosen.order = closed_rows(ascending, row_ends(chosen.index, rows, canvas))
        return chosen

    def counts(self, ratios: Tensor, layout: Layout) -> Tensor:
        """Tokens that the thumbnail and each crop keep, from ``ratios (B, n)``: ``(B, 1 + n)`` int64."""
        thumbnail, *crops = layout.sizes
        sizes, total = ratios.new_tensor(crops), self.count(layout)
        first = int(thumbnail * self.ratio(layout))
        if total is None:
            by_crop = (sizes * ratios).long()
            mine = torch.where(by_crop.sum(dim=1) + first > 0, first, 1)  # something is left of every picture
        else:
            first = max(first, total - sum(crops))
            by_crop = apportion(sizes * ratios, total - first, sizes)
            mine = torch.full_like(by_crop[:, 0], first)
        return torch.cat([mine[:, None], by_crop], dim=1)


def distinctness(features: Tensor, layout: Layout) -> Tensor:
    """Negative cosine of each token with the mean token of its view: ``(B, N, C) -> (B, N)`` float32."""
    scores = features.new_zeros(features.shape[:2], dtype=torch.float32)
    for view in layout.views:
        x = features[:, view.tokens(features.device)].float()
        scores[:, view.tokens(features.device)] = -cosine_similarity(x, x.mean(dim=1, keepdim=True), dim=-1)
    return scores


def richness(thumbnail: Tensor, canvas: Canvas) -> Tensor:
    """Attention of the thumbnail's region under every crop, summed: ``(B, N) -> (B, n)`` float64.

    Rows and columns that do not divide evenly go to the last region; padding is not considered.
    """
    rows, cols = canvas.thumbnail.grid
    down = torch.arange(rows, device=thumbnail.device) // max(rows // canvas.down, 1)
    across = torch.arange(cols, device=thumbnail.device) // max(cols // canvas.across, 1)
    down, across = down.clamp(max=canvas.down - 1), across.clamp(max=canvas.across - 1)
    region = (down[:, None] * canvas.across + across).flatten()
    return thumbnail.double() @ one_hot(region, len(canvas.crops)).double()


def crop_ratios(richness: Tensor, ratio: float, temperature: float = 10.0) -> Tensor:
    """Retention ratio of every crop, at most 1 and on average ``ratio``: ``(B, n) -> (B, n)`` float64."""
    shares = ((richness - richness.amax(dim=1, keepdim=True)) / temperature).exp()
    shares = shares / (shares.sum(dim=1, keepdim=True) + 1e-8)
    return (ratio * (1 + shares - shares.mean(dim=1, keepdim=True))).clamp(max=1.0)


def global_map(thumbnail: Tensor, canvas: Canvas) -> Tensor:
    """The thumbnail's attention stretched over the valid canvas: ``(B, N) -> (B, rows, cols)``, bilinear."""
    grid = thumbnail.unflatten(1, canvas.thumbnail.grid)[:, None]
    return interpolate(grid, (canvas.rows, canvas.cols), mode="bilinear", align_corners=False)[:, 0]


def token_score(crop: Tensor, overview: Tensor, alpha: float = 0.5) -> Tensor:
    """A crop's own scores ``(B, n)`` and the thumbnail's map of it, each of unit length; at 0.5 their plain sum."""
    crop, overview = (normalize(scores, dim=1, eps=1e-12) for scores in (crop, overview))
    return 2 * (1 - alpha) * crop + 2 * alpha * overview


def apportion(weights: Tensor, total: int, most: Tensor) -> Tensor:
    """Share ``total`` in proportion to ``weights (B, n)``, at most ``most (n,)`` each: ``(B, n)`` int64.

    Largest remainders, earlier parts first; what exceeds a part's size goes to the others.
    """
    full = torch.zeros_like(weights, dtype=torch.bool)
    for _ in range(weights.shape[1]):
        left = total - (most * full).sum(dim=1, keepdim=True)
        quota = weights * left / weights.masked_fill(full, 0).sum(dim=1, keepdim=True).clamp(min=1e-300)
        full = full | (quota >= most)
    quota = torch.where(full, most, quota)
    shares = quota.floor()
    remainder = (quota - shares).masked_fill(full, -1)
    missing = total - shares.sum(dim=1, keepdim=True)
    return (shares + among_top(remainder, missing)).long()


def official_order(index: Tensor, thumbnail: Tensor, canvas: Canvas) -> Tensor:
    """Order of the released code for ``index (B, K)``, ascending and padded with -1.

    It takes a token's number among the valid tokens of its crop for its place in the crop, so that crops with padding
    above or on their left move towards their corner.
    """
    side_rows, side_cols = canvas.thumbnail.grid
    first, width = canvas.thumbnail.size, canvas.across * side_cols
    place = torch.zeros(canvas.rows * canvas.cols, dtype=torch.long, device=index.device)
    for c, crop in enumerate(canvas.crops):
        n = torch.arange(crop.size, device=index.device)
        row, col = c // canvas.across * side_rows + n // side_cols, c % canvas.across * side_cols + n % side_cols
        place[crop.tokens(index.device) - first] = row * width + col
    by_score = ranked(thumbnail).argsort(dim=1)
    turn = torch.cat([by_score, (first + place).expand(len(index), -1)], dim=1).gather(1, index.clamp(min=0))
    order = turn.masked_fill(index < 0, first + canvas.down * side_rows * width).argsort(dim=1, stable=True)
    return closed_rows(order, row_ends(index, place // width, canvas))


def row_ends(index: Tensor, row: Tensor, canvas: Canvas) -> Tensor:
    """How many tokens enter up to the end of each row of the padded canvas, where token i of the valid canvas enters in
    row ``row[i]``: ``(B, S)``.
    """
    rows = canvas.down * canvas.thumbnail.rows
    row = torch.cat([row.new_zeros(canvas.thumbnail.size), row + 1])[index.clamp(min=0)]
    filled = index.new_zeros(len(index), rows + 1).scatter_add(1, row, (index >= 0).long())
    return filled.cumsum(dim=1)[:, 1:]


def closed_rows(order: Tensor, ends: Tensor) -> Tensor:
    """``order (B, K)`` with a separator, -1, after ``ends[b, s]`` tokens, ascending in s: ``(B, K + S)``."""
    closes = ends + torch.arange(ends.shape[1], device=ends.device)
    entering = order.new_full((len(order), order.shape[1] + ends.shape[1]), -1)
    is_token = torch.ones_like(entering, dtype=torch.bool).scatter(1, closes, False)
    return entering.masked_scatter(is_token, order)
