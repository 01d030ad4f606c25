"""Synthetic screenshots and instructions to click something, with a small Qwen2.5-VL which was really trained on them.

Four tasks (`scenes.py`), each answered by a point in pixels that has to lie inside the element asked for; and
`shapes-qwen`, which answers them and those of the clips suite, in the ordinary transformers format (`MODEL_PATH`; its
data card is the README beside the weights). Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from ..streams import numbered
from . import scenes
from .scenes import TASKS, Element

__all__ = ["CHANCE", "HELD_OUT_SEED", "MODEL_PATH", "TASKS", "Sample", "prompt", "samples", "score"]

MODEL_PATH = pathlib.Path(__file__).parent / "shapes-qwen"
HELD_OUT_SEED = 20_261
CHANCE: dict[str, float] = {"button": 0.08, "icon": 0.06, "field": 0.14, "window": 0.49}
"""How often the best fixed point, one a task, hits: what a blind model can reach (a random point hits less)."""


@dataclass(frozen=True)
class Sample:
    """One held-out instruction: a picture, plain text without the image marker, and the element that it is about.

    `answer` is one right point among many, as text.
    """

    id: str
    task: str
    image: Image.Image
    question: str
    answer: str
    target: Element


def samples(limit: int | None = None, seed: int = HELD_OUT_SEED) -> Iterator[Sample]:
    """Held-out instructions, the tasks in turn, one picture each; endless when `limit` is None.

    Training can reach none of these screens: the CRC-32 of a screen's layout decides its split (`Screen.held_out`), and
    the generators are seeded by different streams besides. Sample `i` depends on `seed` and `i` only.
    """
    for index, rng in numbered(limit, seed):
        task = TASKS[index % len(TASKS)]
        there: list[Element] = []
        while not there:
            screen = scenes.draw_screen(rng, held_out=True)
            there = [element for element in screen.elements if element.kind == task]
        target = there[rng.integers(len(there))]
        image = Image.fromarray(scenes.render(screen, rng))
        left, top, right, bottom = target.box
        answer = f"({(left + right) // 2}, {(top + bottom) // 2})"
        yield Sample(f"{seed}-{index}", task, image, scenes.instruction(target), answer, target)


def point(text: str) -> tuple[float, float] | None:
    """The point that an answer gives in pixels, as the only two numbers in it; None if it gives none."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text)
    return (float(numbers[0]), float(numbers[1])) if len(numbers) == 2 else None


def score(sample: Sample, prediction: str) -> bool:
    """Whether a prediction is a point inside the element asked for."""
    found = point(prediction)
    return found is not None and sample.target.contains(*found)


def prompt(question: str) -> str:
    """The full text for the processor: Qwen's turn form with the image marker."""
    return f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
