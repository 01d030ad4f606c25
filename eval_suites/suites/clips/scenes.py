"""Seeded synthetic clips in which few frames hold the answer, and the questions on them.

A clip is 16 frames of 64 x 64 pixels on a drifting, noisy background. Three or four events happen one after the other,
each for two or three frames: an object (a shape in a colour) or a sign (a letter on a coloured plate) appears
somewhere, drifts a little and is gone. Frames between events show nothing but specks. A question is about one event.

Layout, question and pixels all come from one `numpy.random.Generator`; shapes and letters are those of the shapes
suite. Held-out clips are disjoint from training clips by construction: the CRC-32 of the layout decides the split.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from ..shapes import scenes as shapes
from ..shapes.scenes import ALPHABET, COLOURS, glyph_mask, shape_mask, stretch

SIZE, FRAMES, FPS = 64, 16, 24
TASKS: tuple[str, ...] = ("colour", "shape", "letter")
SHAPES: tuple[str, ...] = tuple(shape for shape in shapes.SHAPES if shape != "square")
"""Of a turned square and a circle of 24 pixels, little more than the corners differ."""

_OBJECT_SIZES = (22, 24, 26)
_PLATE, _GLYPH = 24, (12, 16)  # of a sign: side of its plate; width and height of its letter
_PLATE_TONES = 0.8


@dataclass(frozen=True)
class Event:
    """Something that appears and goes.

    Attributes:
        what: a shape, or a letter (upper case) on a plate.
        colour: of the object or of the plate.
        start, length: first frame and number of frames.
        x, y: left and top in the first frame.
        dx, dy: pixels it moves a frame.
        size: side of the box.
    """

    what: str
    colour: str
    start: int
    length: int
    x: int
    y: int
    dx: int
    dy: int
    size: int

    @property
    def is_sign(self) -> bool:
        """Whether it is a letter on a plate."""
        return self.what in ALPHABET

    def frames(self) -> range:
        """The frames that show it."""
        return range(self.start, self.start + self.length)

    def box(self, frame: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom (exclusive) in one of its frames."""
        step = frame - self.start
        left, top = self.x + step * self.dx, self.y + step * self.dy
        return left, top, left + self.size, top + self.size


@dataclass(frozen=True)
class Clip:
    """The events of a clip in the order in which they happen."""

    events: tuple[Event, ...]

    def held_out(self) -> bool:
        """Whether this layout belongs to the held-out split (one layout in ten)."""
        return zlib.crc32(repr(self.events).encode()) % 10 == 0


@dataclass(frozen=True)
class Question:
    """One question on a clip with its only right answer and the frames that show it."""

    task: str
    text: str
    answer: str
    frames: tuple[int, ...]


def draw_clip(rng: np.random.Generator, held_out: bool, signs: float = 0.4) -> Clip:
    """Draw one layout of the given split: no shape, no letter, no colour of objects and none of signs repeats.

    `signs` is the share of signs among the events beyond the first two, one of each kind.
    """
    while True:
        clip = _draw(rng, signs)
        if clip.held_out() == held_out:
            return clip


def _draw(rng: np.random.Generator, share: float) -> Clip:
    count = int(rng.integers(3, 5))
    signs = rng.random(count) < share
    signs[rng.permutation(count)[:2]] = True, False  # at least one of each
    slot = FRAMES // count
    pools = {kind: [rng.permutation(names).tolist() for names in pool] for kind, pool in _POOLS.items()}
    events = []
    for index, sign in enumerate(signs):
        what, colour = (pool.pop() for pool in pools[bool(sign)])
        length = int(rng.integers(2, 4))
        start = index * slot + int(rng.integers(0, slot - length + 1))
        size = _PLATE if sign else int(rng.choice(_OBJECT_SIZES))
        dx, dy = (int(step) for step in rng.integers(-2, 3, size=2))
        room = SIZE - size
        x, y = (int(rng.integers(max(0, -2 * step), room - max(0, 2 * step) + 1)) for step in (dx, dy))
        events.append(Event(what, colour, start, length, x, y, dx, dy, size))
    return Clip(tuple(events))


_POOLS = {True: (list(ALPHABET), list(COLOURS)), False: (list(SHAPES), list(COLOURS))}


def ask(clip: Clip, task: str, rng: np.random.Generator) -> Question:
    """One question of `task` on `clip`, about an event drawn at random."""
    events = [event for event in clip.events if event.is_sign == (task == "letter")]
    event = events[rng.integers(len(events))]
    text, answer = {
        "colour": (f"What colour is the {event.what}?", event.colour),
        "shape": (f"What shape is the {event.colour} object?", event.what),
        "letter": (f"What letter is on the {event.colour} sign?", event.what),
    }[task]
    return Question(task, text, answer, tuple(event.frames()))


def render(clip: Clip, rng: np.random.Generator) -> np.ndarray:
    """Draw a clip: (16, 64, 64, 3) uint8; background, tones, specks and noise are drawn from `rng`."""
    wave = stretch(4, SIZE)
    base = rng.uniform(60, 130) + rng.uniform(-15, 15, 3)
    ends = [wave @ (rng.standard_normal((4, 4), np.float32) * 16) @ wave.T for _ in range(2)]
    share = np.linspace(0, 1, FRAMES, dtype=np.float32)[:, None, None]
    frames = np.asarray(base, np.float32) + ((1 - share) * ends[0] + share * ends[1])[..., None]
    for frame in frames:
        for _ in range(int(rng.integers(0, 5))):
            x, y = rng.integers(0, SIZE - 3, size=2)
            frame[y : y + 3, x : x + 3] += rng.uniform(-50, 50)
    for event in clip.events:
        tone = np.array(COLOURS[event.colour], np.float32) + rng.uniform(-18, 18, 3).astype(np.float32)
        angle = int(rng.choice((-10, -5, 0, 5, 10)))
        for frame in event.frames():
            left, top, right, bottom = event.box(frame)
            region = frames[frame, top:bottom, left:right]
            if event.is_sign:
                region[:] = tone * _PLATE_TONES
                _write(region, event.what)
            else:
                mask = shape_mask(event.what, event.size, angle)[..., None]
                region += mask * (tone - region)
    frames += rng.standard_normal(frames.shape, np.float32) * np.float32(rng.uniform(3, 8))
    return np.clip(frames, 0, 255).astype(np.uint8)


def _write(plate: np.ndarray, letter: str) -> None:
    """A letter on its plate, white with a dark edge so that it can be read on every colour."""
    width, height = _GLYPH
    mask = glyph_mask(letter, width, height)[..., None]
    y, x = (plate.shape[0] - height) // 2, (plate.shape[1] - width) // 2
    for shift, tone in ((1, 10.0), (0, 250.0)):
        region = plate[y + shift : y + shift + height, x + shift : x + shift + width]
        region += mask * (tone - region)
