"""Seeded synthetic screenshots, the instructions on them and where each asks to click.

A screen is one or two windows on a desktop, possibly with a dock. Windows have a title bar and rows of buttons (a
colour and a word), icons (a colour and a sign), text fields (a word) and lines of running text. Layout, instruction and
pixels all come from one `numpy.random.Generator`, so a seed gives the same picture on every machine; glyphs and icons
are drawn here, so no font changes it.

Held-out screens are disjoint from training screens by construction: the CRC-32 of a screen's layout decides its split.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np

WIDTH, HEIGHT = 192, 128
TASKS: tuple[str, ...] = ("button", "icon", "field", "window")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 48, 48), "green": (42, 150, 70), "blue": (48, 98, 214),
    "orange": (232, 134, 28), "purple": (136, 66, 178), "teal": (24, 152, 160),
}  # fmt: skip
ACTIONS: tuple[str, ...] = (
    "Save", "Open", "Send", "Copy", "Help", "Edit", "Find", "Stop", "Next", "Back", "Play", "Undo",
)  # fmt: skip
SUBJECTS: tuple[str, ...] = ("Mail", "Chat", "Date", "Name", "City", "Note")
"""Words on fields and in title bars; the same word may be on one of each."""

# Glyphs row by row from the top of the capitals; lower case begins lower by itself (empty rows).
GLYPHS: dict[str, str] = {
    "B": "####./#...#/#...#/####./#...#/#...#/####.", "C": ".###./#...#/#..../#..../#..../#...#/.###.",
    "D": "####./#...#/#...#/#...#/#...#/#...#/####.", "E": "#####/#..../#..../####./#..../#..../#####",
    "F": "#####/#..../#..../####./#..../#..../#....", "H": "#...#/#...#/#...#/#####/#...#/#...#/#...#",
    "M": "#...#/##.##/#.#.#/#.#.#/#...#/#...#/#...#", "N": "#...#/##..#/##..#/#.#.#/#..##/#..##/#...#",
    "O": ".###./#...#/#...#/#...#/#...#/#...#/.###.", "P": "####./#...#/#...#/####./#..../#..../#....",
    "S": ".####/#..../#..../.###./....#/....#/####.", "U": "#...#/#...#/#...#/#...#/#...#/#...#/.###.",
    "a": "//.###/...#/.###/#..#/.###", "c": "//.###/#.../#.../#.../.###", "d": "...#/...#/.###/#..#/#..#/#..#/.###",
    "e": "//.##./#..#/####/#.../.###", "h": "#.../#.../###./#..#/#..#/#..#/#..#", "i": "#/./#/#/#/#/#",
    "k": "#.../#.../#..#/#.#./##../#.#./#..#", "l": "#/#/#/#/#/#/#", "m": "//####./#.#.#/#.#.#/#.#.#/#.#.#",
    "n": "//###./#..#/#..#/#..#/#..#", "o": "//.##./#..#/#..#/#..#/.##.", "p": "//###./#..#/#..#/#..#/###./#.../#...",
    "t": ".#./.#./###/.#./.#./.#./.##", "v": "//#...#/#...#/.#.#./.#.#./..#..", "x": "//#..#/#..#/.##./#..#/#..#",
    "y": "//#..#/#..#/#..#/#..#/.###/...#/###.",
}  # fmt: skip
SIGNS: dict[str, str] = {
    "star": "....#..../....#..../...###.../#########/.#######./..#####../..#####../.###.###./.#.....#.",
    "heart": ".##...##./####.####/#########/#########/#########/.#######./..#####../...###.../....#....",
    "bell": "....#..../..#####../.#######./.#######./.#######./.#######./#########/........./...###...",
    "lock": "..#####../.##...##./.##...##./.##...##./#########/####.####/####.####/#########/#########",
    "home": "....#..../...###.../..#####../.#######./#########/.#######./.##...##./.##...##./.##...##.",
    "plus": "...###.../...###.../...###.../#########/#########/#########/...###.../...###.../...###...",
}

_GRID = 4  # user interfaces are laid out on a grid, this one in steps of 4 pixels
_DOCK = 28


@dataclass(frozen=True)
class Element:
    """Something to click: `kind` is a task; `colour` is None for fields and windows.

    Attributes:
        box: left, top, right, bottom in pixels, the last two exclusive; of a window, its title bar.
    """

    kind: str
    label: str
    colour: str | None
    box: tuple[int, int, int, int]

    def contains(self, x: float, y: float) -> bool:
        """Whether the point is inside the box."""
        left, top, right, bottom = self.box
        return left <= x < right and top <= y < bottom


@dataclass(frozen=True)
class Screen:
    """What is on a screen.

    Attributes:
        elements: all that can be asked for.
        windows: whole windows, boxes as in `Element`.
        texts: lines of running text, boxes.
        dock: box of the dock or None.
    """

    elements: tuple[Element, ...]
    windows: tuple[tuple[int, int, int, int], ...]
    texts: tuple[tuple[int, int, int, int], ...] = ()
    dock: tuple[int, int, int, int] | None = None

    def held_out(self) -> bool:
        """Whether this layout belongs to the held-out split (one layout in ten)."""
        return zlib.crc32(repr(self).encode()) % 10 == 0


def draw_screen(rng: np.random.Generator, held_out: bool, crowded: bool = False) -> Screen:
    """Draw one layout of the given split; a `crowded` one has large windows full of words, which teach more.

    No two elements answer to the same instruction. Buttons share a few colours and words, and icons a few colours and
    signs, so that mostly only both together tell them apart.
    """
    while True:
        screen = _Layout(rng, crowded).screen()
        if screen.held_out() == held_out:
            return screen


class _Layout:
    """Fills a screen from top to bottom."""

    def __init__(self, rng: np.random.Generator, crowded: bool) -> None:
        self.rng, self.crowded = rng, crowded
        self.elements: list[Element] = []
        self.texts: list[tuple[int, int, int, int]] = []
        self.buttons = self._pairs(ACTIONS, 4)
        self.icons = self._pairs(tuple(SIGNS), 3)
        self.titles, self.fields = (rng.permutation(SUBJECTS).tolist() for _ in range(2))

    def _pairs(self, words: tuple[str, ...], few: int) -> list[tuple[str, str]]:
        """All (word, colour) pairs, those of `few` words and three colours first."""
        words, colours = self.rng.permutation(words).tolist(), self.rng.permutation(list(COLOURS)).tolist()
        near = [(word, colour) for word in words[:few] for colour in colours[:3]]
        far = [(word, colour) for word in words for colour in colours if (word, colour) not in near]
        return [pool[i] for pool in (near, far) for i in self.rng.permutation(len(pool))]

    def screen(self) -> Screen:
        rng, dock = self.rng, None
        shape = rng.choice(["beside", "stacked", "dock"])
        if shape == "dock":
            side = 0 if rng.random() < 0.5 else WIDTH - _DOCK
            dock = (side, 0, side + _DOCK, HEIGHT)
            self._dock(dock)
            areas = [(_DOCK, 0, WIDTH, HEIGHT) if side == 0 else (0, 0, side, HEIGHT)]
        elif shape == "beside":
            areas = [(0, 0, WIDTH // 2, HEIGHT), (WIDTH // 2, 0, WIDTH, HEIGHT)]
        else:
            middle = self._between(52, 76)
            areas = [(0, 0, WIDTH, middle), (0, middle, WIDTH, HEIGHT)]
        windows = [self._window(area) for area in areas]
        return Screen(tuple(self.elements), tuple(windows), tuple(self.texts), dock)

    def _between(self, least: int, most: int) -> int:
        """A multiple of the grid between two such, both included."""
        return int(self.rng.integers(least // _GRID, most // _GRID + 1)) * _GRID

    def _span(self, start: int, end: int, least: int) -> tuple[int, int]:
        """A part of an interval, at least so long."""
        if self.crowded:
            return start, end
        least = min(least, end - start)
        length = max(self._between(least, end - start) for _ in range(2))
        start += self._between(0, end - start - length)
        return start, start + length

    def _dock(self, box: tuple[int, int, int, int]) -> None:
        y = self._between(4, 20)
        while y + 20 < HEIGHT:
            size = self._between(16, 20)
            if self.rng.random() < 0.85:
                self._icon(box[0] + 4, y, size)
            y += size + 4

    def _icon(self, x: int, y: int, size: int) -> None:
        sign, colour = self.icons.pop(0)
        self.elements.append(Element("icon", sign, colour, (x, y, x + size, y + size)))

    def _window(self, area: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """Place a window within an area and fill it."""
        left, right = self._span(area[0] + 4, area[2] - 4, 80)
        top, bottom = self._span(area[1] + 4, area[3] - 4, 44)
        bar = self._between(16, 20)
        self.elements.append(Element("window", self.titles.pop(), None, (left, top, right, top + bar)))
        y = top + bar + 4
        while y + (size := self._between(16, 20)) < bottom:
            self._row(left + 4, right - 4, y, size)
            y += size + 4
        return left, top, right, bottom

    def _row(self, x: int, right: int, y: int, size: int) -> None:
        """One row of a window: buttons, icons, fields or running text."""
        rng = self.rng
        kind = rng.choice(
            ["button", "field", "icon", "text"], p=[0.7, 0.2, 0.1, 0] if self.crowded else [0.5, 0.25, 0.15, 0.1]
        )
        if kind == "text" or (kind == "field" and not self.fields):
            self.texts.append((x, y, right - self._between(0, 24), y + size))
            return
        least, most = {"button": (32, 44), "icon": (size, size), "field": (44, 92)}[kind]
        while x + least <= right:
            width = self._between(least, min(most, right - x))
            if kind == "icon":
                self._icon(x, y, size)
            elif kind == "field":
                if not self.fields:
                    return
                self.elements.append(Element("field", self.fields.pop(), None, (x, y, x + width, y + size)))
            elif rng.random() < 0.9:
                word, colour = self.buttons.pop(0)
                self.elements.append(Element("button", word, colour, (x, y, x + width, y + size)))
            x += width + self._between(4, 8)


def instruction(element: Element) -> str:
    """What a user asks for."""
    return {
        "button": f"Click the {element.colour} {element.label} button.",
        "icon": f"Click the {element.colour} {element.label} icon.",
        "field": f"Click the {element.label} field.",
        "window": f"Click the title of the {element.label} window.",
    }[element.kind]


# ------------------------------------------------------------------------------------------------------------- drawing


@cache
def _bitmap(rows: str) -> np.ndarray:
    """(height, width) bool."""
    lines = rows.split("/")
    width = max(map(len, lines))
    return np.array([[mark == "#" for mark in line.ljust(width, ".")] for line in lines])


@cache
def word_mask(word: str) -> np.ndarray:
    """A word in the 9-pixel type, (9, width) bool, one empty column between letters."""
    columns = []
    for letter in word:
        glyph = _bitmap(GLYPHS[letter])
        columns += [np.pad(glyph, ((0, 9 - len(glyph)), (0, 1)))]
    return np.concatenate(columns, axis=1)[:, :-1]


def lettering(element: Element) -> tuple[int, int]:
    """Left and top of an element's written label: beside the lamps of a window, left in a field, amid a button."""
    left, top, right, bottom = element.box
    start = {"window": 26, "field": 4}.get(element.kind)
    x = (left + right - word_mask(element.label).shape[1]) // 2 if start is None else left + start
    return x, (top + bottom - 8) // 2


@cache
def _rounded(height: int, width: int, radius: int) -> np.ndarray:
    """(height, width) bool: a rectangle with round corners."""
    y, x = np.ogrid[:height, :width]
    dy = np.maximum(0, np.maximum(radius - 0.5 - y - 0.5, y + 0.5 - (height - radius + 0.5) + 0.5))
    dx = np.maximum(0, np.maximum(radius - 0.5 - x - 0.5, x + 0.5 - (width - radius + 0.5) + 0.5))
    return dy**2 + dx**2 <= radius**2


@cache
def _slope() -> np.ndarray:
    """(128, 192, 1) float32: 0 in the upper left corner, 1 in the lower right one."""
    return np.add.outer(np.arange(HEIGHT) / HEIGHT, np.arange(WIDTH) / WIDTH).astype(np.float32)[..., None] / 2


class _Canvas:
    """Pixels (height, width, 3) float32 and what is painted on them."""

    def __init__(self) -> None:
        self.pixels = np.zeros((HEIGHT, WIDTH, 3), np.float32)

    def paint(self, mask: np.ndarray, x: int, y: int, tone: np.ndarray, alpha: float = 1.0) -> None:
        """Paint where a mask, put with its corner at (x, y), is set; what is outside the picture is cut off."""
        y0, x0 = max(0, -y), max(0, -x)
        mask = mask[y0 : max(0, HEIGHT - y), x0 : max(0, WIDTH - x)]
        region = self.pixels[y + y0 : y + y0 + mask.shape[0], x + x0 : x + x0 + mask.shape[1]]
        if alpha < 1:
            tone = region + np.float32(alpha) * (tone.astype(np.float32) - region)
        np.copyto(region, tone, where=mask[..., None], casting="same_kind")

    def panel(self, box: tuple[int, int, int, int], tone: np.ndarray, radius: int = 3, alpha: float = 1.0) -> None:
        """A filled rectangle with round corners."""
        left, top, right, bottom = box
        self.paint(_rounded(bottom - top, right - left, radius), left, top, tone, alpha)


def render(screen: Screen, rng: np.random.Generator) -> np.ndarray:
    """Draw a screen: (128, 192, 3) uint8. Theme, tints, running text and a little noise are drawn from `rng`."""
    canvas, dark = _Canvas(), rng.random() < 0.35
    corners = (rng.uniform(40, 120, (2, 3)) if dark else rng.uniform(110, 215, (2, 3))).astype(np.float32)
    slope = _slope()
    canvas.pixels[:] = corners[0] + slope * (corners[1] - corners[0])
    level = rng.uniform(34, 58) if dark else rng.uniform(232, 250)
    paper = np.full(3, level, np.float32) + rng.uniform(-4, 4, 3)
    ink = np.full(3, rng.uniform(215, 245) if dark else rng.uniform(15, 55), np.float32)
    edge = paper + (42 if dark else -58)
    bar = paper + (26 if dark else -26) + rng.uniform(-8, 8, 3)
    well = paper + (-18 if dark else 6)
    if screen.dock is not None:
        canvas.panel(screen.dock, paper * 0.8 + canvas.pixels.mean((0, 1)) * 0.2, 1, 0.8)
    for left, top, right, bottom in screen.windows:
        canvas.panel((left + 1, top + 2, right + 2, bottom + 2), np.zeros(3), 4, 0.3)
        canvas.panel((left, top, right, bottom), edge, 4)
        canvas.panel((left + 1, top + 1, right - 1, bottom - 1), paper, 3)
    for box in screen.texts:
        _running_text(canvas, box, (ink + 2 * paper) / 3, rng)
    for element in screen.elements:
        left, top, right, bottom = element.box
        if element.kind == "window":
            canvas.panel((left + 1, top + 1, right - 1, bottom), bar, 3)
            canvas.panel((left, bottom - 1, right, bottom), edge, 0)
            middle = (top + bottom) // 2
            for index, lamp in enumerate(((236, 92, 84), (242, 190, 60), (98, 196, 84))):
                x = left + 5 + 6 * index
                canvas.panel((x, middle - 2, x + 4, middle + 2), np.array(lamp, np.float32), 2)
            _letter(canvas, element, ink)
        elif element.kind == "field":
            canvas.panel(element.box, edge, 2)
            canvas.panel((left + 1, top + 1, right - 1, bottom - 1), well, 1)
            _letter(canvas, element, (2 * ink + well) / 3)
        else:
            tone = np.array(COLOURS[element.colour], np.float32) + rng.uniform(-10, 10, 3).astype(np.float32)
            canvas.panel(element.box, tone * 0.72, 4)
            canvas.panel((left + 1, top + 1, right - 1, bottom - 1), tone, 3)
            white = np.full(3, 250, np.float32)
            if element.kind == "icon":
                sign = _bitmap(SIGNS[element.label])
                canvas.paint(sign, (left + right - 9) // 2, (top + bottom - 9) // 2, white)
            else:
                _letter(canvas, element, white)
    canvas.pixels += rng.standard_normal(canvas.pixels.shape, np.float32) * np.float32(rng.uniform(0.5, 3))
    return np.clip(canvas.pixels, 0, 255).astype(np.uint8)


def _letter(canvas: _Canvas, element: Element, ink: np.ndarray) -> None:
    """Write an element's label."""
    x, y = lettering(element)
    canvas.paint(word_mask(element.label), x, y, ink)


def _running_text(canvas: _Canvas, box: tuple[int, int, int, int], tone: np.ndarray, rng: np.random.Generator) -> None:
    """Two lines of words too small to read."""
    left, top, right, bottom = box
    for y in (top + 2, top + 9):
        x = left
        while x < right and y + 3 < bottom:
            width = int(rng.integers(5, 17))
            canvas.paint(rng.random((3, min(width, max(1, right - x)))) < 0.72, x, y, tone)
            x += width + 3
