"""How much merging changes what a vision model says of a picture.

*Fidelity* needs no labels: the cosine of every picture's final features (or logits) with those of the unmerged model,
of its patch features after unmerging, and how often the first choice stays. With labels comes accuracy, zero-shot where
the model has a text encoder; with captions recall@1 both ways. All methods look at a batch one after the other, in
rotating order, so that times compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import fmean, median

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.adapters import attach
from foveate.adapters.towers.base import tower_for
from foveate.errors import BudgetError, UnsupportedModelError
from foveate.eval_suites.speed.harness import now
from foveate.eval_suites.vision.pictures import Pictures
from foveate.eval_suites.vision.subjects import Subject
from foveate.pruners.core import Keep, ModelInfo, Pruner, budget
from foveate.pruners.core.control import RandomLike


@dataclass(frozen=True)
class MergingRun:
    """One method to measure: several ``pruners`` are draws of one random choice, whose figures are averaged."""

    label: str
    pruners: Sequence[Pruner]
    keep: Keep | None = None


@dataclass
class MergingFidelity:
    """One method. What the model or the pictures do not allow is None.

    Attributes:
        method, keep: as asked for.
        draws: random choices averaged over.
        rows: that enter each block, and that leave the last one; class, distillation and register rows count.
        cosine: of final features with the unmerged model's.
        patch_cosine: of the tower's rows, unmerged to every patch.
        agreement: share of pictures whose first choice stays: of the classes, or without classes of the other pictures,
            by their unmerged features.
        accuracy: share whose first choice is right.
        image_to_text, text_to_image: recall@1, equal captions being one.
        factor: pictures per second over the unmerged model's, the same batch measured back to back.
    """

    method: str
    keep: Keep | None
    draws: int
    rows: list[int]
    cosine: float
    patch_cosine: float
    agreement: float
    accuracy: float | None = None
    image_to_text: float | None = None
    text_to_image: float | None = None
    factor: float = 1.0


@dataclass
class _Seen:
    """What one pruner's model made of the pictures, batch by batch."""

    final: list[Tensor] = field(default_factory=list)
    patch_cosine: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def at(method: Pruner, keep: Keep, patches: int, model: ModelInfo) -> Pruner:
    """The method with equal shares of its tokens merged in every block, so that ``keep`` of all patches are left.

    Raises:
        BudgetError: more would have to merge than half of a block's tokens.
    """
    if isinstance(method, RandomLike):
        return RandomLike(at(method.pruner, keep, patches, model), method.seed)
    left, depth = budget(keep, patches), model.encoder_layers
    after = [round(patches * (left / patches) ** ((i + 1) / depth)) for i in range(depth)]
    before = [patches, *after[:-1]]
    if any(b < (a + 1) // 2 for a, b in zip(before, after)):
        raise BudgetError(
            f"keep={keep}: {left} of {patches} patches cannot be left after {depth} blocks, each of which at most "
            "halves them"
        )
    return method.removing(tuple(a - b for a, b in zip(before, after)), patches, model)


def class_places(subject: Subject, pictures: Pictures) -> tuple[list[int], str]:
    """Where in the model's choice each class of the pictures stands; or nothing, and why there is no accuracy.

    A text encoder chooses among the pictures' own classes. Logits are found by the model's names for them, whatever the
    order: a class is one of these names, or one of several separated by commas, in any case, ``_`` being a space.
    """
    names = pictures.classes
    if not pictures.labels:
        return [], "the pictures have no classes"
    if subject.encode is not None:
        return (list(range(len(names))), "") if len(names) > 1 else ([], "there is only one class to choose")
    if not subject.classifies:
        return [], "the model has neither logits nor a text encoder"
    whole: dict[str, set[int]] = {}
    parts: dict[str, set[int]] = {}
    for place, known in enumerate(subject.labels):
        for label in known:
            whole.setdefault(_plain(label), set()).add(place)
            for part in label.split(","):
                parts.setdefault(_plain(part), set()).add(place)
    found = [whole.get(_plain(name)) or parts.get(_plain(name), set()) for name in names]
    for name, places in zip(names, found):
        if len(places) != 1:
            if not subject.labels:
                return [], "the model does not name its logits"
            if not places:
                return [], f"the model has no label {name!r}"
            return [], f"the model has labels {name!r} for logits {sorted(places)}"
    return [place for places in found for place in places], ""


@torch.inference_mode()
def evaluate(
    subject: Subject, pictures: Pictures, runs: Sequence[MergingRun], batch_size: int = 16
) -> list[MergingFidelity]:
    """Measure the runs beside the unmerged model, which comes first.

    Raises:
        UnsupportedModelError: tokens cannot be merged in this model.
    """
    tower = tower_for(subject.model)
    if tower is None:
        raise UnsupportedModelError(f"{type(subject.model).__name__} is not a vision tower of a known family")
    pruners: list[Pruner | None] = [None, *(pruner for run in runs for pruner in run.pruners)]
    seen = [_Seen() for _ in pruners]
    for turn, first in enumerate(range(0, len(pictures), batch_size)):
        pixels = subject.prepare([open_() for open_ in pictures.open[first : first + batch_size]])
        if not turn:
            subject.final(pixels)  # warms up
        plain = _look(subject, None, pixels, seen[0], None)
        order = list(range(1, len(pruners)))
        for i in order[turn % max(1, len(order)) :] + order[: turn % max(1, len(order))]:
            _look(subject, pruners[i], pixels, seen[i], plain)
    reference = _Reference.of(subject, pictures, torch.cat(seen[0].final))
    lines = [reference.line(MergingRun("unmerged", [None]), [seen[0]], seen[0])]
    rest = iter(seen[1:])
    return lines + [reference.line(run, [next(rest) for _ in run.pruners], seen[0]) for run in runs]


def _look(subject: Subject, pruner: Pruner | None, pixels: Tensor, seen: _Seen, plain: Tensor | None) -> Tensor:
    """Look at one batch; returns the tower's rows, unmerged."""
    heard: list[Tensor] = []
    handle = subject.rows.register_forward_hook(lambda module, args, output: heard.append(output))
    try:
        with nullcontext() if pruner is None else attach(subject.model, pruner) as session:
            began = now(pixels.device)
            seen.final.append(subject.final(pixels).float())
            seen.seconds.append(now(pixels.device) - began)
            rows = heard[0] if session is None else session.unmerge(heard[0])
            seen.rows = [heard[0].shape[1]] if session is None else session.trace.counts
    finally:
        handle.remove()
    rows = rows.float()
    seen.patch_cosine.append(F.cosine_similarity(rows, rows if plain is None else plain, dim=-1).mean(dim=1))
    return rows


@dataclass
class _Reference:
    """What the unmerged model says, and what is right."""

    final: Tensor
    classes: Tensor | None
    labels: Tensor | None
    captions: Tensor | None
    same: Tensor | None

    @classmethod
    def of(cls, subject: Subject, pictures: Pictures, final: Tensor) -> _Reference:
        names, classes, labels = pictures.classes, None, None
        if subject.encode is not None and len(names) > 1:
            classes = F.normalize(
                subject.encode([pictures.prompt.format(_spoken(name)) for name in names]).float(), dim=-1
            )
        elif subject.classifies:
            classes = torch.eye(final.shape[1], device=final.device)  # logits choose for themselves
        places, _ = class_places(subject, pictures)
        if places:
            labels = torch.zeros(len(final), len(classes), dtype=torch.bool, device=final.device)
            for row, right in zip(labels, pictures.labels):
                row[[places[i] for i in right]] = True
        captions, same = None, None
        if subject.encode is not None and pictures.captions is not None:
            texts = pictures.captions
            parts = (texts[i : i + 64] for i in range(0, len(texts), 64))
            captions = torch.cat([F.normalize(subject.encode(part).float(), dim=-1) for part in parts])
            number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
            ids = torch.tensor([number[text] for text in texts], device=final.device)
            same = ids[:, None] == ids
        return cls(final, classes, labels, captions, same)

    def line(self, run: MergingRun, seen: Sequence[_Seen], plain: _Seen) -> MergingFidelity:
        figures = [self._figures(torch.cat(one.final)) for one in seen]
        mean = {name: None if figures[0][name] is None else fmean(f[name] for f in figures) for name in figures[0]}
        ratios = [p / s for one in seen for p, s in zip(plain.seconds, one.seconds)]
        return MergingFidelity(
            run.label,
            run.keep,
            len(seen),
            seen[0].rows,
            patch_cosine=fmean(torch.cat(one.patch_cosine).mean().item() for one in seen),
            factor=median(ratios),
            **mean,
        )

    def _figures(self, final: Tensor) -> dict[str, float | None]:
        choice = self._choice(final)
        found: dict[str, float | None] = dict.fromkeys(("accuracy", "image_to_text", "text_to_image"))
        found["cosine"] = F.cosine_similarity(final, self.final, dim=-1).mean().item()
        found["agreement"] = (choice == self._choice(self.final)).float().mean().item()
        if self.labels is not None:
            found["accuracy"] = self.labels.gather(1, choice[:, None]).float().mean().item()
        if self.captions is not None:
            similarity = F.normalize(final, dim=-1) @ self.captions.T
            for name, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
                found[name] = self.same.gather(1, scores.argmax(dim=1, keepdim=True)).float().mean().item()
        return found

    def _choice(self, final: Tensor) -> Tensor:
        """The class, or the other picture, that every picture is nearest to: ``(n,)``."""
        if self.classes is not None:
            return (final @ self.classes.T).argmax(dim=-1)
        similarity = F.normalize(final, dim=-1) @ F.normalize(self.final, dim=-1).T
        return similarity.fill_diagonal_(-torch.inf).argmax(dim=-1)


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _plain(name: str) -> str:
    """A label as it compares with others."""
    return " ".join(_spoken(name).split()).casefold()
