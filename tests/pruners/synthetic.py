"""Random visual tokens, layouts and signals, without any model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.pruners.core import (
    AtEntry,
    AtPixels,
    BeforeLayer,
    ClassFeatures,
    CoreMatches,
    CrossModalAttention,
    EncoderFeatures,
    EncoderKeys,
    Layout,
    ModelInfo,
    PatchPixels,
    Pruner,
    Selection,
    Signal,
    Stage,
    Tokens,
    View,
    budget,
    top_k,
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
    return Tokens(
        embeds=tokens.embeds[b : b + 1],
        layout=tokens.layout,
        sample_ids=tokens.sample_ids[b : b + 1],
        instruction=tokens.instruction[b : b + 1],
        instruction_mask=tokens.instruction_mask[b : b + 1],
        instruction_ids=tokens.instruction_ids[b : b + 1],
        project=tokens.project,
        frame_scores=tokens.frame_scores[b : b + 1],
        entered=tokens.entered,
    )


@dataclass(frozen=True)
class TopNorm(Pruner):
    """Keeps the tokens of largest norm: ``at_input`` of them at the entry, ``at_layer[i]`` in front of layer i."""

    at_input: float | int = 1.0
    at_layer: tuple[tuple[int, float | int], ...] = ()
    name = "top_norm"

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        stages = [AtEntry(lambda tokens: self._select(tokens, self.at_input))]
        for layer, keep in self.at_layer:
            stages.append(BeforeLayer(lambda tokens, keep=keep: self._select(tokens, keep), layer=layer))
        return tuple(stages)

    @staticmethod
    def _select(tokens: Tokens, keep: float | int) -> Selection:
        norms = tokens.embeds.float().norm(dim=-1)
        return Selection(top_k(norms, budget(keep, tokens.count)), scores=norms)
