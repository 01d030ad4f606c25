"""Short synthetic videos in which few frames hold the answer; `shapes-qwen` of the screens suite answers them, too.

Three tasks (`scenes.py`), each scored exactly. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..screens import MODEL_PATH
from ..shapes import normalise
from ..streams import numbered
from . import scenes
from .scenes import FPS, TASKS

__all__ = ["CHANCE", "FPS", "HELD_OUT_SEED", "MODEL_PATH", "TASKS", "Sample", "prompt", "samples", "score"]

HELD_OUT_SEED = 20_262
CHANCE: dict[str, float] = {
    "colour": 1 / len(scenes.COLOURS),
    "shape": 1 / len(scenes.SHAPES),
    "letter": 1 / len(scenes.ALPHABET),
}


@dataclass(frozen=True)
class Sample:
    """One held-out question: a video, plain question text without the video marker, and the only right answer.

    Attributes:
        video: (16, 64, 64, 3) uint8, `FPS` frames a second.
        frames: those which show what is asked about.
    """

    id: str
    task: str
    video: np.ndarray
    question: str
    answer: str
    frames: tuple[int, ...]


def samples(limit: int | None = None, seed: int = HELD_OUT_SEED) -> Iterator[Sample]:
    """Held-out questions, the tasks in turn, one clip each; endless when `limit` is None.

    Training can reach none of these clips: the CRC-32 of a clip's layout decides its split (`Clip.held_out`), and the
    generators are seeded by different streams besides. Sample `i` depends on `seed` and `i` only.
    """
    for index, rng in numbered(limit, seed):
        clip = scenes.draw_clip(rng, held_out=True)
        question = scenes.ask(clip, TASKS[index % len(TASKS)], rng)
        video = scenes.render(clip, rng)
        yield Sample(f"{seed}-{index}", question.task, video, question.text, question.answer, question.frames)


def score(sample: Sample, prediction: str) -> bool:
    """Whether a prediction is exactly the answer after normalisation."""
    return normalise(prediction) == normalise(sample.answer)


def prompt(question: str) -> str:
    """The full text for the processor: Qwen's turn form with the video marker."""
    return f"<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
