"""A small visual question suite that ships with a model which was really trained on it.

Six tasks on synthetic pictures (`scenes.py`), each scored exactly, and `shapes-llava`, a LLaVA-style model in the
ordinary transformers format (`MODEL_PATH`; its data card is the README beside the weights). Importing this module
loads neither torch nor transformers.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from ..streams import numbered
from . import scenes
from .scenes import TASKS

__all__ = ["CHANCE", "HELD_OUT_SEED", "MODEL_PATH", "TASKS", "WIDE", "Sample", "prompt", "samples", "score"]

MODEL_PATH = pathlib.Path(__file__).parent / "shapes-llava"
HELD_OUT_SEED = 20_260
WIDE = 192
"""Width of the pictures that shapes-next is for; they are 96 pixels high as all are."""
CHANCE: dict[str, float] = {
    "presence": 1 / 2,
    "colour": 1 / len(scenes.COLOURS),
    "shape": 1 / len(scenes.SHAPES),
    "count": 1 / scenes.MAX_OBJECTS,
    "location": 1 / 9,
    "code": 1 / len(scenes.ALPHABET) ** scenes.CODE_LENGTH,
}


@dataclass(frozen=True)
class Sample:
    """One held-out question: a picture, plain question text without the image marker, and the only right answer."""

    id: str
    task: str
    image: Image.Image
    question: str
    answer: str


def samples(limit: int | None = None, seed: int = HELD_OUT_SEED, width: int = scenes.IMAGE_SIZE) -> Iterator[Sample]:
    """Held-out questions, the tasks in turn, one picture each; endless when `limit` is None.

    Training can reach none of these scenes: the CRC-32 of a scene's layout decides its split (`Scene.held_out`), and
    the generators are seeded by different streams besides. Sample `i` depends on `seed`, `i` and `width` only.
    """
    for index, rng in numbered(limit, seed):
        task = TASKS[index % len(TASKS)]
        question = None
        while question is None:
            scene = scenes.draw_scene(rng, held_out=True, code=True if task == "code" else None)
            question = scenes.ask(scene, task, rng)
        image = Image.fromarray(scenes.render(scene, rng, width).pixels)
        yield Sample(f"{seed}-{index}", task, image, question.text, question.answer)


def normalise(text: str) -> str:
    """Lower case, letters and digits only, one space between words."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def score(sample: Sample, prediction: str) -> bool:
    """Whether a prediction is exactly the answer after normalisation; spaces within a code do not count."""
    said, right = normalise(prediction), normalise(sample.answer)
    if sample.task == "code":
        return said.replace(" ", "") == right.replace(" ", "")
    return said == right


def prompt(question: str) -> str:
    """The full text for the processor: LLaVA-1.5's turn form with the image marker."""
    return f"USER: <image>\n{question} ASSISTANT:"
