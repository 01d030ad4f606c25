"""HiPrune: anchors, buffers and registers, told apart by how attention changes through the vision encoder.

"HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models", arXiv 2508.00553
(2025; AAAI-26 student abstract, ACL 2026 Findings). Middle blocks look at objects, the output block at global register
tokens. Kept are the tokens most attended in a middle block (*anchors*), their neighbours on the grid (*buffers*), and,
filling the budget, the tokens most attended in the output block (*registers*). Headline: LLaVA-1.5-7B keeps 99.3 % of
its score with 192 of 576 tokens and 92.7 % with 64.

Acts at the decoder's entry; reads the attention received by every patch in two encoder blocks. Text is never read.
Separators (newlines) do not reach the decoder, as in the official code; but padding areas, which compete there, are no
candidates here: the processor has already cut them off. Cost: two blocks' attention reductions, O(H N^2 d), and two
sorts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.errors import ParameterError
from foveate.pruners.core import AtEntry, ByView, Keep, Layout, ModelInfo, Selection, Stage, Tokens, register
from foveate.pruners.core.parameters import choice, integer, number
from foveate.pruners.core.selection import among_top, kept_tokens, ranked, split_budget
from foveate.pruners.core.signals import ClassAttention, ReceivedAttention

STEPS = {
    "cross": ((0, -1), (0, 1), (-1, 0), (1, 0)),
    "square": ((0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)),
    "row": ((0, -1), (0, 1)),
    "none": (),
}
"""(row, column) steps from an anchor to its buffers, in the order in which they are added."""


@register("hiprune")
@dataclass(frozen=True)
class HiPrune(ByView):
    """HiPrune: object-block anchors with their neighbours, and output-block registers.

    Attributes:
        keep: fraction or number of tokens of the image; each of its V views gets ``int(total / V)``.
        alpha: share of the budget for anchors with their buffers.
        object_layer: encoder block of the anchors, counted from **1**; None: 9 of 24 (CLIP-L), 16 of 32 (Qwen), else
            3/8 of the depth.
        deep_layer: encoder block of the registers, 0-based or from the end; None: the block that feeds the projector.
        buffer: neighbourhood of an anchor: ``"cross"`` (4), ``"square"`` (8), ``"row"`` (2) or ``"none"``.
        border: ``"official"`` steps through flat indices (wraps into the next row, clamps at both ends), ``"grid"``
            takes true neighbours only.
        exclude: ``"strict"`` never counts a token twice; ``"official"`` subtracts 1 from the scores of tokens already
            kept, which on towers without class token (summed scores) may keep fewer tokens than asked for.
        query_rows: attention from ``"all"`` tokens or from the ``"cls"`` token only.
        newline: ``"drop"`` all separators (official), or keep those of the ``"rows"`` that keep a token; never in the
            budget.
    """

    title: ClassVar[str] = "Anchors, buffers and registers from hierarchical encoder attention"
    paper: ClassVar[str] = "arXiv 2508.00553 (ACL 2026 Findings)"
    cost: ClassVar[str] = "two encoder blocks' attention statistics, O(H N^2 d)"

    keep: Keep = 1 / 3
    alpha: float = number(0.1, "share", 0, 1)
    object_layer: int | None = integer(None, "block of the vision tower")
    deep_layer: int | None = integer(None, "block of the vision tower")
    buffer: str = choice("cross", *STEPS)
    border: str = choice("official", "official", "grid")
    exclude: str = choice("strict", "strict", "official")
    query_rows: str = choice("all", "all", "cls")
    newline: str = choice("drop", "drop", "rows")

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        read = ReceivedAttention
        if self.query_rows == "cls":
            model.require_class_token("query_rows='cls'", "query_rows='all'")
            read = ClassAttention
        signals = {"anchor": read(self._object_block(model)), "deep": read(model.block("deep_layer", self.deep_layer))}

        def select(tokens: Tokens, anchor: Tensor, deep: Tensor) -> Selection:
            # the published Qwen code excludes on column sums: over all patches their mean is 1
            summed = self.exclude == "official" and not model.class_token
            return self.select(tokens, anchor=anchor, deep=deep / deep.mean(dim=1, keepdim=True) if summed else deep)

        return (AtEntry(select, signals, newlines=self.newline),)

    def _object_block(self, model: ModelInfo) -> int:
        if self.object_layer is not None:
            if self.object_layer < 1:
                raise ParameterError(f"object_layer={self.object_layer}: blocks are counted from 1 here")
            return model.block("object_layer - 1", self.object_layer - 1)
        depth = model.encoder_layers
        block = (16 if depth == 32 and model.family.startswith("qwen") else max(1, round(3 / 8 * depth))) - 1
        return min(model.full_attention or (block,), key=lambda full: abs(full - block))

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        return None if self.exclude == "official" else super().count(layout, model)

    def budgets(self, layout: Layout) -> tuple[int, ...]:
        return per_view_budget(self.total(layout.size), layout.sizes)

    def choose(self, tokens: Tokens, k: int, anchor: Tensor, deep: Tensor) -> Selection:
        """Anchors and buffers by ``anchor (B, N)``, registers by ``deep (B, N)``."""
        best, grid = anchors(anchor, anchor_count(k, self.alpha, self.buffer)), tokens.layout.views[0].grid
        core = anchors_and_buffers(best, k, grid, buffer=self.buffer, border=self.border)
        kept = core | registers(deep, core, k, self.exclude)
        return Selection(kept_tokens(kept, k if self.exclude == "strict" else None), scores=deep)


def per_view_budget(total: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """``int(total / V)`` for each of V views; what does not fit into a small view goes to the others.

    Fewer tokens than views: one for each of the first views.
    """
    if total >= sum(sizes):
        return sizes
    if total < len(sizes):
        return split_budget(total, tuple(min(size, 1) for size in sizes))
    left, views = total, len(sizes)
    for size in sorted(sizes):
        share = left // views
        if size >= share:
            break
        left, views = left - size, views - 1
    return tuple(min(share, size) for size in sizes)


def anchor_count(k: int, alpha: float, buffer: str = "cross") -> int:
    """Anchors of a budget: ``round(k * alpha / (1 + buffers per anchor))``, half to even."""
    return round(k * alpha / (1 + len(STEPS[buffer])))


def anchors(scores: Tensor, count: int) -> Tensor:
    """The ``count`` most attended tokens of the object block, best first: ``(B, N) -> (B, count)``."""
    return ranked(scores)[:, :count]


def anchors_and_buffers(
    anchors: Tensor, k: int, grid: tuple[int, int], *, buffer: str = "cross", border: str = "official"
) -> Tensor:
    """``(B, A)`` anchors, best first, with their neighbours: ``(B, N)`` bool, the first ``k`` of them in that order."""
    rows, cols = grid
    steps = anchors.new_tensor(((0, 0), *STEPS[buffer]))  # (S, 2)
    y, x = anchors[..., None] // cols + steps[:, 0], anchors[..., None] % cols + steps[:, 1]  # (B, A, S)
    added = (y * cols + x).clamp(0, rows * cols - 1).flatten(1)
    turn = torch.arange(added.shape[1], device=added.device).expand_as(added)
    never = added.shape[1]
    if border == "grid":
        inside = (y >= 0) & (y < rows) & (x >= 0) & (x < cols)
        turn = turn.where(inside.flatten(1), never)
    first_turn = turn.new_full((len(added), rows * cols), never).scatter_reduce(1, added, turn, "amin")
    place = first_turn.argsort(dim=1, stable=True).argsort(dim=1)
    return (first_turn < never) & (place < k)


def registers(deep: Tensor, core: Tensor, k: int, exclude: str = "strict") -> Tensor:
    """The tokens most attended in the output block that fill ``core (B, N)`` up to ``k``: ``(B, N)`` bool.

    ``exclude="official"`` subtracts 1 from the scores of the core instead of leaving it out.
    """
    deep = deep.float()
    if exclude == "strict":
        lowest = torch.finfo(deep.dtype).min  # of tokens without a score: still before the core
        left = deep.nan_to_num(lowest, torch.inf, lowest).masked_fill(core, -torch.inf)
    else:
        left = deep - core.float()
    return among_top(left, k - core.sum(dim=1, keepdim=True))
