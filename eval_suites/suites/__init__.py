"""Suites by name. A suite is a list of questions about pictures or videos with a rule that scores an answer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from foveate.errors import UnknownNameError, nearest
from foveate.pruners.core.frame_questions import FramePrompts

__all__ = ["SUITES", "Sample", "Suite", "find"]


class Sample(Protocol):
    """One question about a picture, or about a video: then ``video``, ``(T, H, W, 3)`` uint8, replaces ``image``."""

    id: str
    task: str
    image: Any  # PIL.Image.Image
    question: str
    answer: str


@dataclass(frozen=True)
class Suite:
    """A suite.

    Attributes:
        name: its name.
        title: what it asks, in a line.
        tasks: names of its tasks, in the order in which tables show them.
        chance: what guessing gets, by task.
        seed: which samples are drawn if nobody says otherwise.
        samples: ``samples(limit, seed)`` gives the same samples on every machine.
        score: ``score(sample, answer)``, right or wrong.
        prompt: ``prompt(question)``, the full text for models whose processor has no chat template.
        max_new_tokens: no right answer is longer.
        frame_prompts: how the model itself scores the frames of a video for methods that read such scores; None: as
            published, which takes a model that follows instructions.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    chance: Mapping[str, float]
    seed: int
    samples: Callable[[int, int], Iterator[Sample]]
    score: Callable[[Any, str], bool]
    prompt: Callable[[str], str]
    max_new_tokens: int
    frame_prompts: FramePrompts | None = None


def _suite(name: str, title: str, **more: Any) -> Suite:
    """The suite that the module of its name holds, up to a hyphen; none is loaded before it is asked for."""
    module = importlib.import_module(f"{__name__}.{name.partition('-')[0]}")
    return Suite(
        name=name,
        title=title,
        tasks=tuple(module.TASKS),
        chance=module.CHANCE,
        seed=module.HELD_OUT_SEED,
        samples=module.samples,
        score=module.score,
        prompt=module.prompt,
        max_new_tokens=8,
        **more,
    )


def _shapes_wide() -> Suite:
    from foveate.eval_suites.suites.shapes import WIDE

    suite = _suite("shapes-wide", "the six tasks on pictures of 192 x 96 pixels, for models that cut crops")
    return replace(suite, samples=partial(suite.samples, width=WIDE))


_ASKED = FramePrompts(information="{question}", yes=None)  # shapes-qwen only ever answers

SUITES: dict[str, Callable[[], Suite]] = {
    "shapes": partial(_suite, "shapes", "six tasks on synthetic pictures"),
    "shapes-wide": _shapes_wide,
    "screens": partial(_suite, "screens", "where to click on synthetic screenshots"),
    "clips": partial(_suite, "clips", "what a few frames of synthetic videos show", frame_prompts=_ASKED),
}
"""Name -> what builds the suite."""


def find(name: str) -> Suite:
    """The suite called ``name``, or the questions of a ``.jsonl`` file.

    Raises:
        UnknownNameError: there is none; the message suggests the nearest. ParameterError: the file holds something
            else.
    """
    if name.lower().endswith(".jsonl"):
        from foveate.eval_suites.suites import questions

        return questions.load(name)
    if name not in SUITES:
        raise UnknownNameError(f"unknown suite {name!r}; {nearest(name, SUITES)}")
    return SUITES[name]()
