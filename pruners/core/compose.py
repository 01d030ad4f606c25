"""Composition: several methods one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from foveate.errors import ParameterError
from foveate.pruners.core.method import Hook, Layout, ModelInfo, Pruner, Stage

if TYPE_CHECKING:
    from PIL.Image import Image

# of what changes the sequence; reading neurons and zeroing a cache do not
_DEPTH = {Hook.PIXELS: 0, Hook.VIT_BLOCK: 1, Hook.LLM_INPUT: 2, Hook.LLM_LAYER: 3}


@dataclass(frozen=True, init=False)
class Then(Pruner):
    """``Then(a, b, …)``: methods that act one after the other, each on what the one before left.

    A fraction of a later method counts the tokens that are left: ``Then(DivPrune(keep=0.5), FastV(keep=0.5))`` ends with a
    quarter. Methods must act in the order of the model, and only one may act at the decoder's entry: a second one would
    need the grid that the first has taken apart.

    Raises:
        ParameterError: from ``stages``, when the order does not fit the model.
    """

    name: ClassVar[str] = "then"
    title: ClassVar[str] = "Several methods in sequence"
    paper: ClassVar[str] = "composition"
    cost: ClassVar[str] = "that of its parts"

    pruners: tuple[Pruner, ...] = ()

    def __init__(self, *pruners: Pruner) -> None:
        if not pruners or not all(isinstance(p, Pruner) for p in pruners):
            raise ParameterError(f"Then takes configured methods, e.g. Then(DivPrune(), FastV()); got {pruners!r}")
        object.__setattr__(self, "pruners", pruners)

    @property
    def adaptive(self) -> bool:
        return any(p.adaptive for p in self.pruners)

    @property
    def needs_grid(self) -> bool:
        return any(p.needs_grid for p in self.pruners)

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        stages: list[tuple[Pruner, Stage]] = []
        for pruner in self.pruners:
            for stage in pruner.stages(model):
                before = [pair for pair in stages if pair[1].hook in _DEPTH]
                if before and stage.hook in _DEPTH:
                    _check_order(*before[-1], pruner, stage)
                stages.append((pruner, stage))
        return tuple(stage for _, stage in stages)

    def kept_in(self, layout: Layout) -> int:
        kept = self.pruners[0].kept_in(layout)
        for pruner in self.pruners[1:]:
            kept = pruner.kept(kept)
        return kept

    def kept_on(self, model: ModelInfo, layout: Layout) -> int:
        kept = self.pruners[0].kept_on(model, layout)
        for pruner in self.pruners[1:]:
            kept = pruner.kept(kept)
        return kept

    def prepare(self, image: Image) -> Image:
        for pruner in self.pruners:
            image = pruner.prepare(image)
        return image

    def parameters(self) -> dict[str, Any]:
        return {"pruners": tuple((p.name, p.parameters()) for p in self.pruners)}


def _check_order(before: Pruner, first: Stage, after: Pruner, second: Stage) -> None:
    """Raise unless ``second`` may follow ``first``."""
    if first.hook == second.hook == Hook.LLM_INPUT:
        raise ParameterError(
            f"{before.name} and {after.name} both act at the decoder's entry; combine one of them with a method that acts "
            "in front of a decoder layer, such as fastv"
        )
    if (_DEPTH[second.hook], second.layer) <= (_DEPTH[first.hook], first.layer):
        raise ParameterError(
            f"{after.name} acts at {second.hook.value} {second.layer}, not after {before.name} at {first.hook.value} "
            f"{first.layer}; change their order or their layers"
        )
