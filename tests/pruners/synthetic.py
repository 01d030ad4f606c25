"""Random visual tokens, layouts and signals, without any model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.pruners import (
    AtEntry,
    AtPixels,
    BeforeLayer,
    GlobalCom2,
    Layout,
    ModelInfo,
    PosPad,
    Pruner,
    Selection,
    Stage,
    Tokens,
    View,
)
from foveate.pruners.core import Newline, Signal, budget, top_k
from foveate.pruners.core.runs import stretch_ends
from foveate.pruners.core.selection import floor
from foveate.pruners.core.signals import (
    ClassFeatures,
    CoreMatches,
    CrossModalAttention,
    EncoderFeatures,
    EncoderKeys,
    PatchPixels,
)
from foveate.registry_view import EXAMPLES

CLIP, QWEN = EXAMPLES.values()
D, C = 6, 5  # decoder and encoder channels


def anyres(thumbnail: tuple[int, int], heights: list[int], widths: list[int]) -> Layout:
    """A thumbnail, then crops of these heights and widths side by side, numbered along the rows of the whole canvas."""
    first, canvas = thumbnail[0] * thumbnail[1], sum(widths)
    crops, top = [], 0
    for height in heights:
        left = 0
        for width in widths:
            crops.append(View(height, width, start=first + top * canvas + left, stride=canvas, kind="crop"))
            left += width
        top += height
    return Layout((View(*thumbnail, kind="thumbnail"), *crops))


ROWS = Layout((View(3, 4),), tuple(Newline(4 + 5 * r, 4 * r, 4 * r + 4) for r in range(3)))
STRETCHES = [Layout.grid(1, 7), Layout.grid(5, 4), Layout.video(3, 2, 3), anyres((2, 2), [2, 1], [3, 0, 2]), ROWS]


def runs_by_hand(dropped: list[bool], layout: Layout) -> list[list[int]]:
    """Runs of one row, token by token."""
    view_of = {int(t): v for v, view in enumerate(layout.views) for t in view.tokens()}
    closed = {newline.last for newline in layout.newlines}
    found: list[list[int]] = []
    for i, gone in enumerate(dropped):
        if not gone:
            continue
        if found and found[-1][-1] == i - 1 and view_of[i] == view_of[i - 1] and i not in closed:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def make_tokens(layout: Layout, batch: int, seed: int, text: int = 3) -> Tokens:
    """Tokens with a projector and an instruction of ``text`` tokens."""
    g = torch.Generator().manual_seed(seed)
    projector = torch.randn(C, D, generator=g)
    return Tokens(
        embeds=torch.randn(batch, layout.size, D, generator=g),
        layout=layout,
        sample_ids=tuple(range(10, 10 + batch)),
        instruction=torch.randn(batch, text, D, generator=g),
        instruction_mask=torch.ones(batch, text, dtype=torch.bool),
        instruction_ids=torch.ones(batch, text, dtype=torch.long),
        entered=layout.size,
        project=lambda features: features @ projector,
        frame_scores=torch.rand(batch, len(layout.views), generator=g).tolist(),
    )


def make_signal(signal: Signal, tokens: Tokens, seed: int) -> Tensor:
    """A random value of the signal's shape."""
    g = torch.Generator().manual_seed(seed)
    batch, n = tokens.embeds.shape[:2]
    if isinstance(signal, CoreMatches):
        return torch.randint(0, 9, (batch, n), generator=g)
    if isinstance(signal, CrossModalAttention):
        return torch.rand(batch, 2, generator=g)
    if isinstance(signal, ClassFeatures):
        return torch.randn(batch, len(tokens.layout.views), C, generator=g)
    if isinstance(signal, PatchPixels):
        return torch.randint(0, 2, (batch, n, 3, 1, 2, 2), generator=g) / 2
    if isinstance(signal, (EncoderFeatures, EncoderKeys)):
        return torch.randn(batch, n, C, generator=g)
    return torch.rand(batch, n, generator=g) / n


def make_signals(stage: Stage, tokens: Tokens, seed: int) -> dict[str, Tensor]:
    """Random values of all signals of a stage."""
    return {name: make_signal(s, tokens, seed + i) for i, (name, s) in enumerate(sorted(stage.signals.items()))}


def first_stage(pruner: Pruner, model: ModelInfo = CLIP) -> Stage:
    """The first stage that selects tokens."""
    return next(stage for stage in pruner.stages(model) if not isinstance(stage, AtPixels))


def run(pruner: Pruner, tokens: Tokens, model: ModelInfo = CLIP, seed: int = 0) -> Selection:
    """The method's first selection from random signals."""
    stage = first_stage(pruner, model)
    return stage.select(tokens, **make_signals(stage, tokens, seed))


def one(tokens: Tokens, b: int) -> Tokens:
    """Image ``b`` of a batch by itself."""
    return tokens.images(torch.tensor([b]))


def most(pruner: Pruner, layout: Layout) -> int:
    """How many tokens a method's first selection of tokens keeps at most, as its documentation says: no more than the
    budget, but for markers and crops; the count itself where the layout alone decides.
    """
    count = pruner.count(layout)
    if count is not None:
        return count
    if isinstance(pruner, PosPad):
        kept = pruner.total(layout)
        if pruner.count_markers:
            return kept
        if pruner.placement == "full":
            return layout.size
        return kept + min(kept + int(stretch_ends(layout).sum()), layout.size - kept)
    if isinstance(pruner, GlobalCom2):  # all attention may lie on the largest crop
        thumbnail, *crops = layout.sizes
        unequal = max(crops) - sum(crops) / len(crops)
        return max(1, int(pruner.keep * thumbnail) + min(sum(crops), floor(pruner.keep * (sum(crops) + unequal))))
    return budget(pruner.keep, layout.size)


@dataclass(frozen=True)
class TopNorm(Pruner):
    """Keeps the tokens of largest norm: ``at_input`` of them at the entry, ``at_layer[i]`` before layer i."""

    at_input: float | int = 1.0
    at_layer: tuple[tuple[int, float | int], ...] = ()
    name = "top_norm"

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        stages: list[Stage] = [AtEntry(lambda tokens: self._select(tokens, self.at_input))]
        for layer, keep in self.at_layer:
            stages.append(BeforeLayer(lambda tokens, keep=keep: self._select(tokens, keep), layer=layer))
        return tuple(stages)

    @staticmethod
    def _select(tokens: Tokens, keep: float | int) -> Selection:
        norms = tokens.embeds.float().norm(dim=-1)
        return Selection(top_k(norms, budget(keep, tokens.count)), scores=norms)
