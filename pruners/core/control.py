"""The control of a method that acts inside the decoder: its own schedule, with tokens that chance has chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.pruners.core.matching import random_groups
from foveate.pruners.core.merging import BlockTokens, Groups
from foveate.pruners.core.method import ModelInfo, Pruner
from foveate.pruners.core.parameters import Keep
from foveate.pruners.core.selection import kept_tokens, seeded
from foveate.pruners.core.stages import InTower, Stage, TokenStage
from foveate.pruners.core.tokens import Layout, Selection, Tokens


@dataclass(frozen=True)
class RandomLike(Pruner):
    """A random choice of as many tokens as ``pruner`` takes, in the same layers, picture by picture.

    Whatever else the method does (eviction, sparse neurons) stays, so the difference is what its choice is worth. It
    reads what the method reads to learn the numbers, and so takes its time as well: for accuracy, not for speed. Inside
    vision towers, where numbers are known in advance, random pairs merge, the same ones in all pictures.

    Attributes:
        pruner: the method.
        seed: with the picture's id and the layer it determines the choice.
    """

    title: ClassVar[str] = "Random choice with another method's schedule"
    paper: ClassVar[str] = "baseline"

    pruner: Pruner
    seed: int = 0

    @property
    def name(self) -> str:
        return f"random@{self.pruner.name}"

    @property
    def keep(self) -> Keep | None:
        """The method's budget. Like the method, it may not have the attribute."""
        return getattr(self.pruner, self.pruner.budget_parameter)

    def at(self, keep: Keep) -> RandomLike:
        """The control of the method at this budget."""
        return replace(self, pruner=replace(self.pruner, **{self.pruner.budget_parameter: keep}))

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        return tuple(map(self._random, self.pruner.stages(model)))

    def _random(self, stage: Stage) -> Stage:
        if isinstance(stage, InTower):
            return self._in_block(stage)
        if isinstance(stage, TokenStage) and stage.point != "llm_cache":
            return replace(stage, select=self._by_chance(stage))
        return stage

    def _in_block(self, stage: InTower) -> InTower:
        def select(tokens: BlockTokens) -> Groups:
            drawn = torch.Generator().manual_seed(self.seed * 1_000_003 + stage.layer)
            return random_groups(tokens.embeds, tokens.count, drawn, prefix=tokens.prefix, pairs=True)

        return replace(stage, select=select, signals={})

    def _by_chance(self, stage: Stage) -> Any:
        def select(tokens: Tokens, **signals: Tensor) -> Selection:
            count = (stage.select(tokens, **signals).index >= 0).sum(dim=1, keepdim=True)
            draws = seeded(0x10001 * self.seed + stage.layer, tokens)
            rank = torch.stack([torch.randperm(tokens.count, generator=g) for g in draws]).to(count.device)
            return Selection(kept_tokens(rank < count))

        return select

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        return self.pruner.count(layout, model)

    def parameters(self) -> dict[str, Any]:
        return {"pruner": (self.pruner.name, self.pruner.parameters()), "seed": self.seed}
