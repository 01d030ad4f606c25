"""What the mergers inside vision towers share: groups of a block's tokens, and how many of them merge away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.errors import UnsupportedModelError
from foveate.pruners.core.method import ModelInfo, Pruner
from foveate.pruners.core.parameters import check_number
from foveate.pruners.core.signals import Signal
from foveate.pruners.core.stages import InTower, Stage
from foveate.pruners.core.tokens import Layout


@dataclass(frozen=True)
class BlockKeys(Signal):
    """``(B, N, d)`` float32: attention keys of the block itself, bias and key norm included, before any rotation, for
    all rows.

    Summed over heads where papers take the mean: their scale means nothing, compare them by cosine.
    """

    layer: int = 0


@dataclass
class BlockTokens:
    """The rows of one transformer block between its attention and its MLP.

    Attributes:
        embeds: ``(B, N, C)``.
        prefix: class, distillation and register rows, which come first and must not merge.
        count: how many rows are to merge away, as announced by the stage; at least 1.
    """

    embeds: Tensor
    prefix: int
    count: int


@dataclass
class Groups:
    """Which rows of a block become one.

    Attributes:
        keep: ``(B, K)`` int64, rows that stay, in the order in which they leave the block; the prefix comes first.
        source: ``(B, r)`` int64, rows that merge.
        target: ``(B, r)`` int64, positions in ``keep`` that they merge into.
    """

    keep: Tensor
    source: Tensor
    target: Tensor


@dataclass(frozen=True)
class Merger(Pruner):
    """Base of the methods that merge tokens inside a vision tower, block by block.

    Subclasses say what one block does (:meth:`block`); the number of patches and the tower alone decide how many tokens
    are left.
    """

    families: ClassVar[tuple[str, ...]] = (
        "timm",
        "open_clip",
        "clip",
        "siglip",
        "vit",
        "dinov2",
        "llava",
        "llava_next",
        "llava_onevision",
    )

    def block(self, i: int, model: ModelInfo) -> InTower:
        """The stage of the 0-based block ``i``."""
        raise NotImplementedError(f"{type(self).__name__} does not implement block()")

    def removing(self, counts: tuple[int, ...], n_patches: int, model: ModelInfo) -> Merger:
        """The method with a schedule of its own: ``counts[i]`` of the tokens that ``n_patches`` patches became merge in
        block i.

        Raises:
            ParameterError: the method's parameters fix another schedule.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement removing()")

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        """One stage for every block up to the one whose output is used.

        Raises:
            UnsupportedModelError: the tower attends inside windows, where rows cannot leave.
        """
        if model.full_attention is not None:
            raise UnsupportedModelError(
                f"{self.name} merges tokens anywhere in a picture, but the {model.tower} tower of {model.family} "
                "attends inside windows of a fixed size; use a method that acts at the decoder's entry"
            )
        return tuple(self.block(i, model) for i in range(model.feature_layer + 1))

    def counts(self, n_patches: int, model: ModelInfo) -> tuple[int, ...]:
        """Rows that enter block 0, 1, …, and those that leave the last one, prefix counted."""
        rows = [n_patches + model.prefix_tokens]
        for stage in self.stages(model):
            rows.append(rows[-1] - stage.removes(rows[-1]))
        return tuple(rows)

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        """Exact where all views are whole; an upper bound where padding is cut off some of them after the tower."""
        model = model or ModelInfo()  # LLaVA-1.5, of whose CLIP-L tower 23 blocks count
        kept = self.counts(max(layout.sizes), model)[-1] - model.prefix_tokens  # crops go whole through the tower
        return sum(min(size, kept) for size in layout.sizes)


def removed(ratio: float, n: int) -> int:
    """Tokens that a keep ratio removes of ``n``: ``floor(n - n * ratio)``."""
    return int(n - n * ratio)


def ratio_of_block(name: str, value: float) -> float:
    """A parameter's check: a keep ratio in (0, 1]."""
    return check_number(name, value, "share of tokens that a block keeps", 0, 1, above=True)


def owners(groups: Groups) -> Tensor:
    """For every row that entered the block, the row that contains it now: ``(B, N)`` int64."""
    batch, kept = groups.keep.shape
    owner = groups.keep.new_empty(batch, kept + groups.source.shape[1])
    owner.scatter_(1, groups.keep, torch.arange(kept, device=owner.device).expand(batch, -1))
    return owner.scatter_(1, groups.source, groups.target)
