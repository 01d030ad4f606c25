"""Composition: several methods one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from foveate.errors import ParameterError
from foveate.pruners.core.method import ModelInfo, Pruner
from foveate.pruners.core.stages import AtEntry, AtPixels, BeforeLayer, InTower, Stage
from foveate.pruners.core.tokens import Layout

if TYPE_CHECKING:
    from PIL.Image import Image

# of what changes the sequence; reading neurons and zeroing a cache do not
_DEPTH = {AtPixels: 0, InTower: 1, AtEntry: 2, BeforeLayer: 3}


@dataclass(frozen=True, init=False)
class Then(Pruner):
    """``Then(a, b, …)``: methods that act one after the other, each on what the one before left.

    A fraction of a later method counts the tokens that are left: ``Then(DivPrune(keep=0.5), FastV(keep=0.5))`` ends
    with a quarter. Methods must act in the order of the model, and only one may act at the decoder's entry: a second
    one would need the grid that the first has taken apart.

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

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        stages: list[tuple[Pruner, Stage]] = []
        for pruner in self.pruners:
            for stage in pruner.stages(model):
                before = [pair for pair in stages if type(pair[1]) in _DEPTH]
                if before and type(stage) in _DEPTH:
                    _check_order(*before[-1], pruner, stage)
                stages.append((pruner, stage))
        return tuple(stage for _, stage in stages)

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        first, *rest = self.pruners
        kept = first.count(layout, model)
        for pruner in rest:
            kept = None if kept is None else pruner.count(Layout.grid(1, kept), model)
        return kept

    def prepare(self, image: Image) -> Image:
        for pruner in self.pruners:
            image = pruner.prepare(image)
        return image

    def parameters(self) -> dict[str, Any]:
        return {"pruners": tuple((p.name, p.parameters()) for p in self.pruners)}


def _check_order(before: Pruner, first: Stage, after: Pruner, second: Stage) -> None:
    """Raise unless ``second`` may follow ``first``."""
    if isinstance(first, AtEntry) and isinstance(second, AtEntry):
        raise ParameterError(
            f"{before.name} and {after.name} both act at the decoder's entry; combine one of them with a method that "
            "acts before a decoder layer, such as fastv"
        )
    if (_DEPTH[type(second)], second.layer) <= (_DEPTH[type(first)], first.layer):
        raise ParameterError(
            f"{after.name} acts at {second.label}, not after {before.name} at {first.label}; change their order or "
            "their layers"
        )
