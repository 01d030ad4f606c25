"""TransPrune: keep the visual tokens that decoder layers change most and that the instruction looks at.

Li et al., "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model", arXiv 2507.20630 (CVPR
2026). Token Transition Variation (TTV) measures how far attention and MLP of a layer move a token, relative to its size
and weighted by the change of direction; it accumulates over some middle layers. Instruction-Guided Attention (IGA) is
what the text after the picture would pay to each token in the next layer. Their normalised sum decides, in a few steps
that share one schedule. Headline (LLaVA-1.5-7B, "High"): 41 % of the prefill FLOPs at unchanged mean score. Follows the
released code where paper and code differ (signed cosine, both scores normalised, closed-up positions on one-axis
models).

Acts before several decoder layers, in prefill. Layers are numbered from 1 as in the paper: prune layer p acts when p
layers have run. The caches of earlier layers keep what those layers saw: with the defaults and 576 tokens a 32-layer
decoder holds 576, 504, 360 and at last 72 of them, 236 on average. So the KV cache shrinks to 41 %, not to 12.5 %, and
peak memory stays that of the first layers. No vision-tower signal, no attention map. Cost: three dot products per token
in the accumulated layers; per prune layer the instruction's queries against all keys, which the layer itself then uses.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from foveate.errors import BudgetError, ParameterError
from foveate.pruners.core import BeforeLayer, Layout, ModelInfo, Pruner, Selection, Signal, Stage, Tokens, register
from foveate.pruners.core.parameters import check_number, choice, layers, number, several
from foveate.pruners.core.selection import keep_all, top_k
from foveate.pruners.core.signals import InstructionAttention, TransitionVariation

HIGH_DEPTH = 32  # layers of the decoders that the published schedule belongs to
HIGH_PRUNE_LAYERS, HIGH_ACCUMULATE_LAYERS = (7, 9, 12), (7, 8, 9, 10, 11, 12)
HIGH_RATIOS, COMBINED_RATIOS = (0.875, 0.625, 0.125), (0.5, 0.25, 0.125)


def _ratio(name: str, value: float) -> float:
    if not 0.0 < check_number(name, value, "share of tokens") <= 1.0:
        raise BudgetError(f"{name}: {value} keeps nothing, or too much; give fractions in (0, 1]")
    return value


@register("transprune")
@dataclass(frozen=True)
class TransPrune(Pruner):
    """TransPrune: token transitions plus instruction attention, on a schedule.

    Attributes:
        ratios: share of the tokens that entered the decoder which is left after each prune layer, never rising. The
            product is rounded down; a small picture may lose all its tokens.
        prune_layers: after which layers, counted from 1, one per ratio. None: the published 7, 9, 12 of 32; on other
            depths in proportion (our rule), where the last one counts if two fall together.
        accumulate_layers: whose transitions are summed, counted from 1; those after a prune layer count from the next
            one on. None: the published 7 to 12 of 32, in proportion.
        alpha: weight of the transitions beside the instruction's attention.
        direction: what makes a turn large: a ``"signed"`` cosine that is small (released code), or one that is small in
            magnitude (``"abs"``, as the paper writes it).
        softmax_scope: a token's turn counts relative to those of the whole ``"sequence"`` (released code) or the
            ``"image"``.
        per_image: give every picture of a prompt the schedule by itself, instead of one budget for all of them.
    """

    title: ClassVar[str] = "Token transitions and instruction attention, in steps inside the decoder"
    paper: ClassVar[str] = "arXiv 2507.20630 (CVPR 2026)"
    cost: ClassVar[str] = (
        "O(N d) per accumulated layer and O(H L N d_h) per prune layer for L instruction tokens; the mean KV cache "
        "kept (41 % by default) is far above the last ratio (12.5 %)"
    )

    ratios: tuple[float, ...] = several(HIGH_RATIOS, _ratio)
    prune_layers: tuple[int, ...] | None = layers(None)
    accumulate_layers: tuple[int, ...] | None = layers(None)
    alpha: float = number(0.5, "weight", 0, 1)
    direction: str = choice("signed", "signed", "abs")
    softmax_scope: str = choice("sequence", "sequence", "image")
    per_image: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        ratios, steps = self.ratios, HIGH_PRUNE_LAYERS if self.prune_layers is None else self.prune_layers
        if not ratios or any(b > a for a, b in itertools.pairwise(ratios)):
            raise ParameterError(f"ratios={ratios}: give one or more, each at most the one before")
        if len(steps) != len(ratios):
            raise ParameterError(f"prune_layers={steps} and ratios={ratios} differ in number; give one ratio per layer")
        if any(b <= a for a, b in itertools.pairwise(steps)):
            raise ParameterError(f"prune_layers={steps} must rise")

    @classmethod
    def high(cls) -> TransPrune:
        """TransPrune-High, the published setting and the default."""
        return cls()

    @classmethod
    def combined(cls) -> TransPrune:
        """For tokens that another method has thinned out: ``Then(VisionZip(keep=192), TransPrune.combined())``."""
        return cls(ratios=COMBINED_RATIOS)

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        read, scope = self.accumulated(model), "image" if self.per_image else "sample"
        stages, before = [], 1.0
        for layer, ratio in self.schedule(model).items():
            signals: dict[str, Signal] = {
                f"transition_{n}": TransitionVariation(n - 1, self.direction, self.softmax_scope)
                for n in read
                if n <= layer and self.alpha > 0
            }
            signals["attention"] = InstructionAttention(layer)
            if ratio < before:
                select = partial(self.step, ratio)
                stages.append(BeforeLayer(select, signals, layer=layer, newlines="compete", scope=scope))
            before = ratio
        return tuple(stages)

    def schedule(self, model: ModelInfo) -> dict[int, float]:
        """Ratio by prune layer, rising."""
        if self.prune_layers is not None:
            steps = [model.decoder_layer("prune_layers", n) for n in self.prune_layers]
        else:
            last = model.decoder_layer("prune_layers", model.decoder_layers - 1)
            steps = [min(_scaled(n, model), last) for n in HIGH_PRUNE_LAYERS]
        return dict(zip(steps, self.ratios))

    def accumulated(self, model: ModelInfo) -> tuple[int, ...]:
        """Accumulated layers, counted from 1, rising."""
        if self.accumulate_layers is None:
            return tuple(sorted({min(_scaled(n, model), model.decoder_layers) for n in HIGH_ACCUMULATE_LAYERS}))
        for n in self.accumulate_layers:
            if not 1 <= n <= model.decoder_layers:
                raise ParameterError(f"accumulate_layers={n}: the decoder has layers 1 .. {model.decoder_layers}")
        return tuple(sorted(set(self.accumulate_layers)))

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        return int(layout.length * self.ratios[-1])  # separators count as tokens

    def step(self, ratio: float, tokens: Tokens, attention: Tensor, **transitions: Tensor) -> Selection:
        """One prune layer, after which ``ratio`` of the tokens that entered are left; signals ``(B, N)``."""
        keep = int(tokens.entered * ratio)  # the float product, as published: 90 * 0.7 keeps 62
        if keep >= tokens.count:
            return keep_all(tokens)
        score = combined_score(tuple(transitions.values()), attention, self.alpha)
        return Selection(top_k(score, keep), scores=score)


def combined_score(transitions: tuple[Tensor, ...], attention: Tensor, alpha: float = 0.5) -> Tensor:
    """Accumulated transitions and attention, each over its sum, added with weights ``2 alpha`` and ``2 (1 - alpha)``.

    Args:
        transitions: of every accumulated layer, ``(B, N)`` float32; none: attention alone decides.
        attention: ``(B, N)``.
    """
    score = 2 * (1 - alpha) * _share(attention)
    return score + 2 * alpha * _share(sum(transitions)) if transitions else score


def _share(values: Tensor) -> Tensor:
    return values / (values.sum(dim=-1, keepdim=True) + 1e-8)


def _scaled(layer: int, model: ModelInfo) -> int:
    """A layer of the published schedule on a decoder of this depth, halves rounded up."""
    return max(1, math.floor(layer * model.decoder_layers / HIGH_DEPTH + 0.5))
