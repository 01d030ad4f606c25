"""Pictures and clips to try, drawn on the spot: shapes, a page of a document, screens, videos of a moment."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from foveate.demo.media import Clip, Media
from foveate.eval_suites.suites import clips, screens, shapes

INK, PAPER, BLUE, GREY = (28, 30, 36), (252, 251, 247), (32, 90, 170), (205, 208, 214)


@dataclass(frozen=True)
class Example:
    """A picture or clip with a question about it; its name is unique."""

    name: str
    question: str
    make: Callable[[], Media]


def example(name: str) -> Media:
    """The picture or clip of the example called ``name``."""
    return next(
        known for known in (*EVERYWHERE, *(e for each in BY_MODEL.values() for e in each)) if known.name == name
    ).make()


def examples(model: str, takes_video: bool = False) -> tuple[Example, ...]:
    """What suits the model."""
    return BY_MODEL.get(model, (*EVERYWHERE, _MOVING) if takes_video else EVERYWHERE)


def _drawn(suite: ModuleType, index: int, prefix: str = "", **options: int) -> Example:
    """A held-out sample of a suite, which can be drawn again at any time."""

    def sample() -> Any:
        return next(itertools.islice(suite.samples(index + 1, **options), index, None))

    def media() -> Media:
        drawn = sample()
        return Clip(tuple(map(Image.fromarray, drawn.video)), clips.FPS) if hasattr(drawn, "video") else drawn.image

    asked = sample()
    return Example(prefix + asked.task, asked.question, media)


def _text(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, fill: tuple[int, ...] = INK) -> None:
    pen.text(at, text, fill=fill, font=ImageFont.load_default(size))


def invoice() -> Image.Image:
    """A page with a heading, a table and a total."""
    page = Image.new("RGB", (640, 640), PAPER)
    pen = ImageDraw.Draw(page)
    _text(pen, (48, 40), "INVOICE 2041", 34, BLUE)
    _text(pen, (48, 92), "Harbour Light Books, 3 Quay Street", 18)
    pen.line((48, 134, 592, 134), fill=GREY, width=3)
    for row, (what, amount) in enumerate((("Atlas of tides", "24.00"), ("Lamp oil", "7.50"), ("Rope, 20 m", "18.20"))):
        top = 160 + 56 * row
        _text(pen, (48, top), what, 24)
        _text(pen, (500, top), amount, 24)
        pen.line((48, top + 42, 592, top + 42), fill=GREY, width=1)
    pen.rectangle((330, 356, 592, 416), fill=(232, 240, 250))
    _text(pen, (348, 370), "TOTAL", 26, BLUE)
    _text(pen, (500, 370), "49.70", 26, BLUE)
    for line in range(4):
        pen.rectangle((48, 470 + 30 * line, 48 + (500, 470, 520, 260)[line], 480 + 30 * line), fill=GREY)
    return page


def screen() -> Image.Image:
    """A settings window with switches and a button."""
    shot = Image.new("RGB", (720, 540), (58, 84, 110))
    pen = ImageDraw.Draw(shot)
    pen.rounded_rectangle((60, 40, 660, 500), 14, fill=(246, 247, 249))
    pen.rounded_rectangle((60, 40, 660, 88), 14, fill=(226, 229, 234))
    for i, colour in enumerate(((213, 94, 0), (230, 159, 0), (0, 158, 115))):
        pen.ellipse((80 + 26 * i, 56, 96 + 26 * i, 72), fill=colour)
    _text(pen, (300, 52), "Settings", 20)
    for row, (name, on) in enumerate((("Notifications", True), ("Dark mode", False), ("Automatic updates", True))):
        top = 124 + 72 * row
        _text(pen, (96, top), name, 24)
        pen.rounded_rectangle((540, top, 604, top + 32), 16, fill=BLUE if on else (176, 180, 188))
        knob = 574 if on else 542
        pen.ellipse((knob, top + 2, knob + 28, top + 30), fill="white")
    pen.rounded_rectangle((470, 416, 620, 466), 10, fill=BLUE)
    _text(pen, (518, 428), "Save", 24, (255, 255, 255))
    _text(pen, (96, 428), "Version 4.2", 18, (110, 114, 122))
    return shot


def moving(frames: int = 8, side: int = 192) -> Clip:
    """A short video: a disc crosses the picture over a still background."""
    rng = np.random.default_rng(7)
    ground = Image.fromarray(rng.integers(80, 130, (12, 12, 3), dtype=np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    made = []
    for i in range(frames):
        frame = ground.copy()
        x = side * (0.1 + 0.8 * i / max(1, frames - 1))
        ImageDraw.Draw(frame).ellipse((x - 22, side / 2 - 22, x + 22, side / 2 + 22), fill=(225, 35, 35))
        made.append(frame)
    return Clip(tuple(made), fps=4)


_DOCUMENT = Example("document", "What does the total say?", invoice)
_SCREEN = Example("screen", "What colour is the Save button?", screen)
_MOVING = Example("video", "What moves, and where to?", moving)
_SHAPES = tuple(_drawn(shapes, index) for index in (1, 5, 3, 4))
EVERYWHERE: tuple[Example, ...] = (_DOCUMENT, _SCREEN, *_SHAPES)
BY_MODEL: dict[str, tuple[Example, ...]] = {
    "shapes-llava": (*_SHAPES, _DOCUMENT, _SCREEN),
    "shapes-next": (*(_drawn(shapes, index, "wide ", width=shapes.WIDE) for index in (1, 2, 4, 5)), _DOCUMENT, _SCREEN),
    "shapes-qwen": (
        *(_drawn(screens, index) for index in (0, 1, 2)),
        *(_drawn(clips, index, "clip: ") for index in (0, 1, 2)),
    ),
}
"""Name of an embedded model -> what it was trained for, and pictures that it has never seen the like of."""
FOR_CLIPS = "shapes-qwen"
"""The embedded model that takes video."""
