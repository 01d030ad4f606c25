"""A merger attached to a vision model that stands by itself: timm, open_clip, or a ``transformers`` tower."""

from __future__ import annotations

from torch import Tensor, nn

from foveate.adapters.attachment import Attachment
from foveate.adapters.towers.base import BlockMerger, MergeTrace, Tower, block_stages
from foveate.errors import AttachError, UnsupportedModelError
from foveate.pruners.core.method import ModelInfo, Pruner


class VitSession(Attachment):
    """A merger on a vision transformer. It acts in every call of the model until :meth:`detach`.

    Numbers of tokens follow from the input's shape, so ``torch.compile`` makes no graph break. Attach to the model itself, not
    to what ``torch.compile`` returned.
    """

    def __init__(self, model: nn.Module, pruner: Pruner, tower: Tower) -> None:
        super().__init__(model, pruner, tower.trunk)
        stages = pruner.stages(tower.info)
        inside = block_stages(stages)
        if not inside or len(inside) < len(stages):
            raise UnsupportedModelError(
                f"{pruner.name} also acts outside of the vision tower, and {type(model).__name__} is nothing but one; methods "
                "that work here: pitome, tome"
            )
        self._tower = tower
        self._merger = BlockMerger(tower, pruner, inside)
        self._merger.holder = self  # the model keeps the merger, so it keeps the session
        self._claim()

    @property
    def info(self) -> ModelInfo:
        """What the method knows of the model; ``pruner.counts(n_patches, session.info)`` announces the rows of every block."""
        return self._tower.info

    @property
    def trace(self) -> MergeTrace | None:
        """What merged in the last call, None before."""
        return self._merger.trace

    @property
    def sizes(self) -> Tensor | None:
        """``(B, K)`` patches in each row at the end of the last call; None where none merged."""
        return self._merger.sizes

    def unmerge(self, features: Tensor) -> Tensor:
        """Rows at the end of the tower back at every original row: ``(B, K, C) -> (B, N, C)``; see :meth:`MergeTrace.unmerge`.

        Raises:
            AttachError: no call has run.
        """
        if self.trace is None:
            raise AttachError("nothing to unmerge: the model has not been called since the pruner was attached")
        return self.trace.unmerge(features)

    def detach(self) -> None:
        self._merger.remove()
        self._release()
