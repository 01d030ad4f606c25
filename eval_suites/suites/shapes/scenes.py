"""Seeded synthetic scenes, their questions and their pictures.

A scene is one to five objects and at most one printed two-letter code, each in its own cell of a 3 x 3 grid, on a
textured noisy background. Layout (what is where), questions and pixels all come from one `numpy.random.Generator`, so
a seed gives the same picture on every machine.

Held-out scenes are disjoint from training scenes by construction: the CRC-32 of a scene's layout decides its split, so
no layout that can be drawn for one split can ever be drawn for the other, whatever the seeds.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 96
CELL_SIZE = 32
MAX_OBJECTS = 5

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35), "green": (30, 180, 50), "blue": (40, 70, 235),
    "yellow": (240, 220, 40), "magenta": (225, 50, 215), "cyan": (40, 220, 225),
}  # fmt: skip
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring", "star")
ROWS: tuple[str, ...] = ("top", "middle", "bottom")
COLUMNS: tuple[str, ...] = ("left", "centre", "right")
TASKS: tuple[str, ...] = ("presence", "colour", "shape", "count", "location", "code")

# 5 x 7 glyphs, row by row: drawn here so that no font, and no version of one, changes the pictures.
GLYPHS: dict[str, str] = {
    "C": ".###./#...#/#..../#..../#..../#...#/.###.", "E": "#####/#..../#..../####./#..../#..../#####",
    "H": "#...#/#...#/#...#/#####/#...#/#...#/#...#", "K": "#...#/#..#./#.#../##.../#.#../#..#./#...#",
    "L": "#..../#..../#..../#..../#..../#..../#####", "P": "####./#...#/#...#/####./#..../#..../#....",
    "T": "#####/..#../..#../..#../..#../..#../..#..", "U": "#...#/#...#/#...#/#...#/#...#/#...#/.###.",
    "X": "#...#/#...#/.#.#./..#../.#.#./#...#/#...#", "Z": "#####/....#/...#./..#../.#.../#..../#####",
}  # fmt: skip
ALPHABET: tuple[str, ...] = tuple(GLYPHS)
CODE_LENGTH = 2

_SIZES = (22, 24, 26, 28)
_ANGLES = (-10, -5, 0, 5, 10)
_JITTER = 2
_GLYPH_WIDTHS = (11, 12)
_GLYPH_HEIGHTS = (16, 18)
_PLATE_HEIGHT = 24


@dataclass(frozen=True)
class Thing:
    """One object: its shape, colour and cell (0 to 8, row by row)."""

    shape: str
    colour: str
    cell: int


@dataclass(frozen=True)
class Scene:
    """What is in a picture: the objects in cell order and, possibly, a code in a cell of its own."""

    things: tuple[Thing, ...]
    code: str | None = None
    code_cell: int | None = None

    def held_out(self) -> bool:
        """Whether this layout belongs to the held-out split (one layout in ten)."""
        return zlib.crc32(repr((self.things, self.code, self.code_cell)).encode()) % 10 == 0


@dataclass(frozen=True)
class Question:
    """One question on a scene with its only right answer."""

    task: str
    text: str
    answer: str


@dataclass(frozen=True)
class RenderedScene:
    """A rendered scene and where everything is, in pixels.

    Attributes:
        pixels: (96, 96, 3) uint8.
        owner: (96, 96) int8: -1 background, i for pixels of `things[i]`, 100 + k for the code's k-th letter box.
    """

    pixels: np.ndarray
    owner: np.ndarray


def place(cell: int) -> str:
    """Name of a cell: its row, then its column."""
    return f"{ROWS[cell // 3]} {COLUMNS[cell % 3]}"


def draw_scene(
    rng: np.random.Generator, held_out: bool, count: int | None = None, code: bool | None = None, alike: bool = False
) -> Scene:
    """Draw one layout of the given split; colours, shapes and cells are uniform and no colour-shape pair repeats.

    With `alike`, the objects share three colours and two shapes, so that only both together tell them apart.
    """
    while True:
        n = count if count is not None else int(rng.integers(1, MAX_OBJECTS + 1))
        with_code = code if code is not None else rng.random() < 0.6
        cells = rng.permutation(9)[: n + 1].tolist()
        if alike:
            few = (rng.permutation(6)[:3, None] * 6 + rng.permutation(6)[None, :2]).flatten()
            pairs = rng.permutation(few)[:n].tolist()
        else:
            pairs = rng.permutation(len(COLOURS) * len(SHAPES))[:n].tolist()
        names = tuple(COLOURS)
        things = [Thing(SHAPES[p % 6], names[p // 6], c) for p, c in zip(pairs, cells)]
        scene = Scene(
            things=tuple(sorted(things, key=lambda thing: thing.cell)),
            code="".join(ALPHABET[i] for i in rng.integers(len(ALPHABET), size=CODE_LENGTH)) if with_code else None,
            code_cell=cells[n] if with_code else None,
        )
        if scene.held_out() == held_out:
            return scene


def caption(scene: Scene) -> str:
    """The scene in words, cell by cell."""
    parts = [(thing.cell, f"{thing.colour} {thing.shape}") for thing in scene.things]
    if scene.code is not None:
        parts.append((scene.code_cell, f"code {' '.join(scene.code)}"))
    return ", ".join(f"{place(cell)} {words}" for cell, words in sorted(parts))


def ask(scene: Scene, task: str, rng: np.random.Generator) -> Question | None:
    """One question of `task` on `scene`; None when the scene has no unambiguous one.

    The answer's prior is uniform given the question: presence is yes or no with equal chance, and the negatives share
    their colour or shape with an object half of the time.
    """
    things = scene.things
    shapes = [thing.shape for thing in things]
    colours = [thing.colour for thing in things]
    if task == "count":
        return Question(task, "How many objects are there?", str(len(things)))
    if task == "code":
        return None if scene.code is None else Question(task, "What does the code say?", scene.code)
    if task == "colour":
        unique = [thing for thing in things if shapes.count(thing.shape) == 1]
        if not unique:
            return None
        thing = unique[rng.integers(len(unique))]
        return Question(task, f"What colour is the {thing.shape}?", thing.colour)
    if task == "shape":
        unique = [thing for thing in things if colours.count(thing.colour) == 1]
        if not unique:
            return None
        thing = unique[rng.integers(len(unique))]
        return Question(task, f"What shape is the {thing.colour} object?", thing.shape)
    thing = things[rng.integers(len(things))]
    if task == "location":
        return Question(task, f"Where is the {thing.colour} {thing.shape}?", place(thing.cell))
    if task != "presence":
        raise ValueError(f"unknown task {task!r}: expected one of {TASKS}")
    if rng.random() < 0.5:
        return Question(task, f"Is there a {thing.colour} {thing.shape}?", "yes")
    there = {(t.colour, t.shape) for t in things}
    near = [(c, s) for c in COLOURS for s in SHAPES if (c in colours or s in shapes) and (c, s) not in there]
    far = [(c, s) for c in COLOURS for s in SHAPES if c not in colours and s not in shapes]
    pool = far if far and rng.random() < 0.5 else near
    colour, shape = pool[rng.integers(len(pool))]
    return Question(task, f"Is there a {colour} {shape}?", "no")


def ask_all(scene: Scene, rng: np.random.Generator, tasks: Sequence[str] = TASKS) -> list[Question]:
    """One question of each task that the scene allows, in random order."""
    questions = [ask(scene, task, rng) for task in tasks]
    found = [question for question in questions if question is not None]
    return [found[i] for i in rng.permutation(len(found))]


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a polygonal shape in the box [-1, 1] x [-1, 1]."""
    if shape == "square":
        return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    if shape == "triangle":
        return [(0, -1), (1, 0.9), (-1, 0.9)]
    if shape == "cross":
        a = 0.32
        half = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
        return half + [(-x, -y) for x, y in half]
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return list(zip((radii * np.sin(angles)).tolist(), (-radii * np.cos(angles)).tolist()))


@cache
def shape_mask(shape: str, size: int, angle: int) -> np.ndarray:
    """Anti-aliased coverage (size, size) float32 in [0, 1] of a shape turned by `angle` degrees."""
    scale = 4
    side = size * scale
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
        if shape == "ring":
            inset = side * 0.25
            draw.ellipse((inset, inset, side - 1 - inset, side - 1 - inset), fill=0)
    else:
        turn = np.deg2rad(angle)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        corners = np.array(_outline(shape)) @ rotation.T
        corners = corners / max(1.0, np.abs(corners).max())
        draw.polygon([tuple(xy) for xy in ((corners + 1) * (side - 1) / 2).tolist()], fill=255)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32) / 255


@cache
def glyph_mask(letter: str, width: int, height: int) -> np.ndarray:
    """Anti-aliased coverage (height, width) float32 in [0, 1] of a letter."""
    bits = np.array([[pixel == "#" for pixel in row] for row in GLYPHS[letter].split("/")], np.uint8) * 255
    big = Image.fromarray(bits).resize((width * 4, height * 4), Image.Resampling.NEAREST)
    return np.asarray(big.resize((width, height), Image.Resampling.BOX), np.float32) / 255


@cache
def stretch(cells: int, length: int) -> np.ndarray:
    """(length, cells) matrix of linear interpolation from a coarse grid to pixels."""
    position = np.linspace(0, cells - 1, length)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(cells)[None])).astype(np.float32)


def render(scene: Scene, rng: np.random.Generator, width: int = IMAGE_SIZE) -> RenderedScene:
    """Draw a scene: textured background, objects with jittered size, place, turn and colour, the code, pixel noise.

    A picture of more than 96 pixels' `width` has wider cells; what is in them keeps its size, anywhere from side to
    side.
    """
    canvas = np.empty((IMAGE_SIZE, width, 3), np.float32)
    canvas[:] = rng.uniform(60, 130) + rng.uniform(-15, 15, 3)
    for cells, strength in ((4, 18.0), (13, 12.0)):
        texture = rng.standard_normal((cells, cells), np.float32) * strength
        canvas += (stretch(cells, IMAGE_SIZE) @ texture @ stretch(cells, width).T)[..., None]
    owner = np.full(canvas.shape[:2], -1, np.int8)
    for index, thing in enumerate(scene.things):
        size = int(rng.choice(_SIZES))
        top, left = _corner(thing.cell, size, size, width, rng)
        mask = shape_mask(thing.shape, size, int(rng.choice(_ANGLES)))
        tone = np.array(COLOURS[thing.colour], np.float32) + rng.uniform(-18, 18, 3).astype(np.float32)
        _paint(canvas, owner, mask, tone, top, left, index)
    if scene.code is not None:
        _print_code(canvas, owner, scene, rng)
    canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(4, 10))
    return RenderedScene(np.clip(canvas, 0, 255).astype(np.uint8), owner)


def _corner(cell: int, height: int, width: int, across: int, rng: np.random.Generator) -> tuple[int, int]:
    """Top-left pixel of a box of this size near a cell's middle, kept inside a picture `across` pixels wide."""
    spare = across // 3 - CELL_SIZE
    jitter = rng.integers((-_JITTER, -_JITTER - spare // 2), (_JITTER + 1, _JITTER + spare // 2 + 1))
    top = (cell // 3) * CELL_SIZE + (CELL_SIZE - height) // 2 + int(jitter[0])
    left = (cell % 3) * (across // 3) + (across // 3 - width) // 2 + int(jitter[1])
    return min(max(top, 0), IMAGE_SIZE - height), min(max(left, 0), across - width)


def _paint(canvas: np.ndarray, owner: np.ndarray, mask: np.ndarray, tone: np.ndarray, top: int, left: int, index: int):
    """Blend one mask of one tone into the canvas and note whose pixels those are."""
    box = np.s_[top : top + mask.shape[0], left : left + mask.shape[1]]
    canvas[box] += mask[..., None] * (tone - canvas[box])
    owner[box][mask > 0.5] = index


def _print_code(canvas: np.ndarray, owner: np.ndarray, scene: Scene, rng: np.random.Generator) -> None:
    """Print the code in dark ink on a light plate."""
    width, height = int(rng.choice(_GLYPH_WIDTHS)), int(rng.choice(_GLYPH_HEIGHTS))
    plate_width = CODE_LENGTH * width + 3 * 2
    top, left = _corner(scene.code_cell, _PLATE_HEIGHT, plate_width, canvas.shape[1], rng)
    paper, ink = np.full(3, rng.uniform(225, 250), np.float32), np.full(3, rng.uniform(5, 35), np.float32)
    plate = np.ones((_PLATE_HEIGHT, plate_width), np.float32)
    _paint(canvas, owner, plate, paper, top, left, 100)
    for k, letter in enumerate(scene.code):
        x, y = left + 2 + k * (width + 2), top + (_PLATE_HEIGHT - height) // 2
        _paint(canvas, owner, glyph_mask(letter, width, height), ink, y, x, 100 + k)
        start = left if k == 0 else x - 1
        owner[top : top + _PLATE_HEIGHT, start : left + plate_width] = 100 + k
