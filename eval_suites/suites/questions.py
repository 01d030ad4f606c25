"""The user's own questions as a suite: a JSONL file whose objects have ``image``, ``question`` and ``answer``."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from foveate.errors import ParameterError
from foveate.eval_suites.suites import Suite

__all__ = ["Question", "load", "normalised"]

MAX_NEW_TOKENS = 32
_ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class Question:
    """A line of the file; the picture is opened when it is asked for.

    Attributes:
        id: the line's ``id``, or its number.
        task: its ``task``, or ``"questions"``.
        file: the picture.
        answer: the first right answer.
        answers: all of them.
    """

    id: str
    task: str
    file: Path
    question: str
    answers: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The first of the right ones."""
        return self.answers[0]

    @property
    def image(self) -> Image.Image:
        """In RGB.

        Raises:
            OSError: no such file, or not a picture.
        """
        with Image.open(self.file) as picture:
            return picture.convert("RGB")


def normalised(answer: str) -> str:
    """What is compared: without case, punctuation at the ends of words, articles and extra space."""
    words = re.sub(r"(?<!\d)[.,]|[.,](?!\d)|[!?;:\"']", " ", answer.casefold()).split()
    return " ".join(word for word in words if word not in _ARTICLES) or answer.strip().casefold()


def load(path: str | os.PathLike[str]) -> Suite:
    """The suite of a file.

    Each line is a JSON object: ``image`` is a path, relative to the file's folder; ``answer`` a text, or a list of
    texts any of which is right; ``id`` and ``task`` may be added. An answer is right if it is one of them,
    :func:`normalised`.

    Raises:
        ParameterError: a line is not that; the message names it.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(f"questions {path} cannot be read ({error}); give a JSONL file") from None
    questions = [_question(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise ParameterError(
            f'questions {path}: the file is empty; give lines like {{"image": …, "question": …, "answer": …}}'
        )
    tasks = tuple(dict.fromkeys(question.task for question in questions))

    def samples(limit: int, seed: int) -> Iterator[Question]:
        order = list(range(len(questions)))
        random.Random(seed).shuffle(order)
        return (questions[i] for i in order[:limit])

    return Suite(
        name=path.name,
        title=f"{len(questions)} questions of {path.name}",
        tasks=tasks,
        chance=dict.fromkeys(tasks, 0.0),
        seed=0,
        samples=samples,
        score=lambda sample, answer: normalised(answer) in map(normalised, sample.answers),
        prompt=lambda question: f"USER: <image>\n{question} ASSISTANT:",  # LLaVA-1.5's turn form
        max_new_tokens=MAX_NEW_TOKENS,
    )


def _question(path: Path, number: int, line: str) -> Question:
    where = f"questions {path}, line {number}"
    try:
        plain: Any = json.loads(line)
    except ValueError:
        raise ParameterError(f"{where}: no JSON; give one object per line") from None
    if not isinstance(plain, dict):
        raise ParameterError(f"{where}: no JSON object; give image, question and answer")
    answers = plain.get("answer")
    answers = tuple(map(str, answers)) if isinstance(answers, list) else () if answers is None else (str(answers),)
    if not (isinstance(plain.get("image"), str) and isinstance(plain.get("question"), str) and answers):
        raise ParameterError(
            f"{where}: it needs `image` (a path), `question` (a text) and `answer` (a text, or several)"
        )
    file = path.parent / plain["image"]
    if not file.is_file():
        raise ParameterError(f"{where}: no picture {file}; paths are relative to the folder of the JSONL file")
    return Question(str(plain.get("id", number)), str(plain.get("task", "questions")), file, plain["question"], answers)
