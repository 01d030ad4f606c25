"""Draw what a pruner did on the picture: a plain function of the trace, made with PIL and numpy.

``panels`` says where the tokens of a layout lie in the drawing, ``draw`` makes it, ``token_at`` finds the token under a
point of it and ``facts`` what became of every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from foveate.errors import ParameterError
from foveate.pruners.core import Layout, View
from foveate.pruners.core.parameters import check_choice

if TYPE_CHECKING:
    from foveate.adapters.trace import ImageTrace

SHOW = ("kept", "scores", "groups")
Picture = Image.Image | np.ndarray

# viridis (Smith and van der Walt, CC0) in steps of a tenth: even steps in lightness, also for colour-blind readers
_VIRIDIS = "440154 482475 414487 355f8d 2a788e 21918c 22a884 44bf70 7ad151 bddf26 fde725"
# Okabe and Ito's palette without black, and the same colours halfway to white
_GROUPS = "e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7"
_DIM = np.array((20, 22, 28), np.float32)
_PAPER = np.array((224, 226, 230), np.float32)
_LINE, _UNDER, _LABEL = (255, 255, 255), (16, 18, 24), (116, 122, 134)  # the label reads on white and on black
_GAP, _TITLE, _FONT = 14, 26, 17


# ------------------------------------------------------------------------------------------------- where tokens lie


@dataclass(frozen=True, eq=False)
class Panel:
    """One rectangle of the drawing: a picture, a thumbnail, the canvas of all AnyRes crops, or a video frame.

    Attributes:
        kind: ``"image"``, ``"thumbnail"``, ``"crops"`` or ``"frame"``.
        number: which frame (or picture), from 0.
        tokens: ``(rows, cols)`` int64, the token number of each cell.
        box: left, top, right, bottom in pixels of the drawing.
        seams: rows and columns that a crop begins at.
        frames: how many frames of the video it stands for.
    """

    kind: str
    number: int
    tokens: np.ndarray
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    seams: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    frames: int = 1

    @property
    def cell(self) -> int:
        """Side of a token's square in pixels."""
        return (self.box[2] - self.box[0]) // self.tokens.shape[1]

    @property
    def title(self) -> str:
        """What the drawing calls it: ``"crops"``, ``"frame 3"``, ``"frames 2-3"``."""
        if self.kind in ("crops", "thumbnail"):
            return self.kind
        if self.frames > 1:
            first = self.number * self.frames
            return f"frames {first}-{first + self.frames - 1}"
        return f"{self.kind} {self.number}"


def panels(layout: Layout, width: int = 768, frames: int | None = None) -> list[Panel]:
    """Where the tokens of ``layout`` lie in a drawing about ``width`` pixels wide; ``frames`` of a video were given.

    A single picture fills it; an AnyRes picture has its thumbnail on the left and the canvas of crops on the right;
    frames stand in a strip that wraps.
    """
    bare = _bare(layout)
    moving = sum(panel.kind == "frame" for panel in bare)
    if frames and moving and frames > moving:  # models that merge successive frames
        bare = [replace(panel, frames=-(-frames // moving)) for panel in bare]
    if len(bare) == 1:
        rows, cols = bare[0].tokens.shape
        cell = max(4, width // max(rows, cols))
        return [_placed(bare[0], 0, 0, cell)]
    if [panel.kind for panel in bare] == ["thumbnail", "crops"]:
        thumbnail, crops = bare
        cell = max(4, int(0.68 * (width - _GAP)) // max(crops.tokens.shape))
        left = width - _GAP - cell * crops.tokens.shape[1]
        small = max(3, min(left, int(0.4 * width)) // thumbnail.tokens.shape[1])
        return [
            _placed(thumbnail, 0, _TITLE, small),
            _placed(crops, small * thumbnail.tokens.shape[1] + _GAP, _TITLE, cell),
        ]
    across = min(len(bare), 4 if len(bare) <= 16 else 8)
    share = (width - _GAP * (across - 1)) // across
    placed, top = [], 0
    for first in range(0, len(bare), across):
        row = [_placed(p, i * (share + _GAP), top + _TITLE, max(2, share // max(p.tokens.shape)))
               for i, p in enumerate(bare[first : first + across])]  # fmt: skip
        placed += row
        top = max(panel.box[3] for panel in row) + _GAP
    return placed


def token_at(where: Sequence[Panel], x: float, y: float) -> int | None:
    """The token drawn at pixel ``(x, y)``, None beside the panels."""
    for panel in where:
        left, top, right, bottom = panel.box
        if left <= x < right and top <= y < bottom:
            return int(panel.tokens[int(y - top) // panel.cell, int(x - left) // panel.cell])
    return None


def _bare(layout: Layout) -> list[Panel]:
    """Panels without a place: crops joined, everything else one by one."""
    views = [view for view in layout.views if view.size]
    alone = [view for view in views if view.kind != "crop"]
    bare = [Panel(view.kind, number, view.tokens().numpy().reshape(view.grid)) for number, view in enumerate(alone)]
    crops = [view for view in views if view.kind == "crop"]
    return [*bare, _canvas(crops)] if crops else bare


def _canvas(crops: Sequence[View]) -> Panel:
    """Crops lie row by row on one canvas, whose first token is that of the first crop."""
    first, stride = min(crop.start for crop in crops), crops[0].stride
    corners = [divmod(crop.start - first, stride) for crop in crops]
    rows = max(row + crop.rows for (row, _), crop in zip(corners, crops))
    tokens = first + np.arange(rows * stride, dtype=np.int64).reshape(rows, stride)
    seams = (sorted({row for row, _ in corners if row}), sorted({col for _, col in corners if col}))
    return Panel("crops", 0, tokens, seams=(tuple(seams[0]), tuple(seams[1])))


def _placed(panel: Panel, left: int, top: int, cell: int) -> Panel:
    rows, cols = panel.tokens.shape
    return replace(panel, box=(left, top, left + cols * cell, top + rows * cell))


# ------------------------------------------------------------------------------------------------ what became of them


@dataclass(frozen=True, eq=False)
class Facts:
    """What became of every token of an image up to one decoder layer; numpy arrays of length N.

    Attributes:
        kept: bool, whether the layer sees the token.
        left: the decoder layer before which the token left, -1 if it never does (also after the layer asked for).
        scores: float32 of the last stage up to the layer that ranked (else of the first that ranks); NaN where there
            is none.
        owner: the token that speaks for each, -1 where none does; None if nothing merged.
        markers: bool, kept tokens that carry a marker in place of what they were.
    """

    kept: np.ndarray
    left: np.ndarray
    scores: np.ndarray
    owner: np.ndarray | None
    markers: np.ndarray

    @property
    def merged(self) -> bool:
        """Whether some token speaks for another one."""
        return self.owner is not None and bool((self.owner[self.owner >= 0] != np.flatnonzero(self.owner >= 0)).any())


def facts(trace: ImageTrace, layer: int = 0) -> Facts:
    """What decoder layer ``layer`` sees of an image, and what becomes of its tokens.

    Raises:
        ParameterError: the decoder has no such layer.
    """
    depth = len(trace.tokens_per_layer)
    if not 0 <= layer < max(depth, 1):
        raise ParameterError(f"layer={layer}: the decoder has layers 0 .. {depth - 1}")
    n = trace.layout.size
    kept, left, markers = np.zeros(n, bool), np.full(n, -1), np.zeros(n, bool)
    kept[trace.kept_at(layer).cpu().numpy()] = True
    alive, owner = np.ones(n, bool), None
    for stage in trace.stages:
        stays = np.zeros(n, bool)
        stays[stage.kept.cpu().numpy()] = True
        left[alive & ~stays] = stage.layer
        alive = stays
    reached = trace.reached(layer)
    for stage in reached:
        if stage.markers is not None:
            markers[stage.markers.cpu().numpy()] = True
        if stage.owner is not None:
            speaks = stage.owner.cpu().numpy()
            owner = speaks if owner is None else np.where(owner >= 0, speaks[owner.clip(min=0)], -1)
    ranked = next((s.scores for s in reversed(reached) if s.scores is not None), trace.scores)
    scores = np.full(n, np.nan, np.float32) if ranked is None else ranked.float().cpu().numpy()
    return Facts(kept, left, scores, owner, markers & kept)


# ---------------------------------------------------------------------------------------------------------- drawing


def draw(
    trace: ImageTrace,
    image: Picture | Sequence[Picture] | None = None,
    *,
    show: str = "kept",
    layer: int | None = None,
    width: int = 768,
) -> Image.Image:
    """What became of an image's tokens, drawn on the picture as the model saw it.

    Args:
        trace: what happened to the image.
        image: the picture that was given to the processor, of PIL or ``(H, W, 3)`` uint8 (of a video: its frames,
            from which as many are drawn as the model has, evenly spaced); None draws on grey.
        show: ``"kept"`` leaves kept tokens clear and dims dropped ones; ``"scores"`` is a heat map, kept tokens
            outlined; ``"groups"`` gives tokens that were merged a common colour, neighbouring groups different ones,
            and puts a dot on the token that speaks for them.
        layer: what this decoder layer sees; None: the last.
        width: of the drawing in pixels, about.

    Returns:
        RGBA, transparent between the panels.

    Raises:
        ParameterError: unknown ``show`` or ``layer``; a method that gives no scores, or merges nothing, has none to
            show.
    """
    check_choice("show", show, SHOW)
    layer = max(len(trace.tokens_per_layer) - 1, 0) if layer is None else layer
    known = facts(trace, layer)
    if show == "scores" and np.isnan(known.scores).all():
        raise ParameterError("show='scores': this method ranks no tokens; use show='kept'")
    if show == "groups" and known.owner is None:
        raise ParameterError("show='groups': this method merges no tokens; use show='kept'")
    pictures = _pictures(image)
    where = panels(trace.layout, width, len(pictures))
    size = max(panel.box[2] for panel in where), max(panel.box[3] for panel in where)
    drawing = Image.new("RGBA", size, (0, 0, 0, 0))
    colours = _group_colours(where, known) if show == "groups" else None
    for panel in where:
        pixels = _seen(trace, panel, pictures)
        if show == "kept":
            pixels = _dimmed(pixels, panel, known)
        elif show == "scores":
            pixels = _heated(pixels, panel, known.scores)
        else:
            pixels = _grouped(pixels, panel, known, colours)
        tile = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
        _mark(tile, panel, known, show)
        drawing.paste(tile, panel.box[:2])
        if len(where) > 1:
            _label(drawing, panel, known)
    return drawing


def on_white(drawing: Image.Image) -> Image.Image:
    """The drawing without transparency, RGB."""
    paper = Image.new("RGBA", drawing.size, (255, 255, 255, 255))
    return Image.alpha_composite(paper, drawing).convert("RGB")


def _pictures(image: Picture | Sequence[Picture] | None) -> list[Image.Image]:
    """One picture, the frames of a video, or nothing."""
    if image is None:
        return []
    if isinstance(image, Image.Image) or (isinstance(image, np.ndarray) and image.ndim == 3):
        image = [image]
    return [frame if isinstance(frame, Image.Image) else Image.fromarray(np.asarray(frame)) for frame in image]


def _seen(trace: ImageTrace, panel: Panel, pictures: Sequence[Image.Image]) -> np.ndarray:
    """The panel's part of the picture, ``(height, width, 3)`` float32."""
    left, top, right, bottom = panel.box
    size = right - left, bottom - top
    if not pictures:
        return np.broadcast_to(_PAPER, (size[1], size[0], 3)).copy()
    frames = sum(view.kind == "frame" for view in trace.layout.views) or len(pictures)
    image = pictures[min(len(pictures) - 1, int((panel.number + 0.5) * len(pictures) / frames))]
    image = image.convert("RGB")
    if trace.centre_crop:
        side = min(image.size)
        x, y = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((x, y, x + side, y + side))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS), np.float32)


def _cells(values: np.ndarray, panel: Panel) -> np.ndarray:
    """Values of every token, ``(N, …)``, blown up to the panel's pixels."""
    grid = values[panel.tokens]
    return grid.repeat(panel.cell, axis=0).repeat(panel.cell, axis=1)


def _grey(pixels: np.ndarray) -> np.ndarray:
    return (pixels @ np.array((0.299, 0.587, 0.114), np.float32))[..., None]


def _dark(pixels: np.ndarray) -> np.ndarray:
    """What is gone: without colour, and dark, but not beyond recognition."""
    return 0.38 * _grey(pixels) + 0.62 * _DIM


def _dimmed(pixels: np.ndarray, panel: Panel, known: Facts) -> np.ndarray:
    clear = _cells(known.kept & ~known.markers, panel)[..., None]
    return np.where(clear, pixels, _dark(pixels))


def _heated(pixels: np.ndarray, panel: Panel, scores: np.ndarray) -> np.ndarray:
    heat = _cells(_heat(scores), panel)
    nothing = _cells(np.isnan(scores), panel)[..., None]
    return np.where(nothing, _dark(pixels), 0.25 * _grey(pixels) + 0.75 * heat)


def _heat(scores: np.ndarray) -> np.ndarray:
    """Scores as colours ``(N, 3)``, from their 1st to their 99th percentile so that a single peak does not flatten
    the rest.
    """
    known = np.isfinite(scores)
    low, high = np.percentile(scores[known], (1, 99)) if known.any() else (0.0, 1.0)
    return heat_colours(np.nan_to_num((scores - low) / max(high - low, 1e-12)))


def heat_colours(level: np.ndarray) -> np.ndarray:
    """Levels in [0, 1] as viridis colours, ``(…, 3)`` float32 in 0 .. 255."""
    table = _colours(_VIRIDIS)
    steps = np.linspace(0, 1, len(table))
    return np.stack([np.interp(level.clip(0, 1), steps, table[:, i]) for i in range(3)], axis=-1).astype(np.float32)


def _grouped(pixels: np.ndarray, panel: Panel, known: Facts, colours: np.ndarray) -> np.ndarray:
    tinted = _cells(colours, panel)
    shared = ~np.isnan(tinted[..., :1])
    lost = ~_cells(known.kept[known.owner] & (known.owner >= 0), panel)[..., None]
    mixed = np.where(shared, 0.4 * pixels + 0.6 * np.nan_to_num(tinted), pixels)
    return np.where(lost, _dark(pixels), mixed)


def _group_colours(where: Sequence[Panel], known: Facts) -> np.ndarray:
    """A colour per token, ``(N, 3)``; NaN for tokens that are alone. Neighbouring groups differ as far as 14 colours
    allow.
    """
    owner = known.owner
    sizes = np.bincount(owner[owner >= 0], minlength=len(owner))
    beside: dict[int, set[int]] = {}
    for panel in where:
        grid = owner[panel.tokens]
        for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
            for one, other in zip(a[a != b].tolist(), b[a != b].tolist()):
                beside.setdefault(one, set()).add(other)
                beside.setdefault(other, set()).add(one)
    strong = _colours(_GROUPS)
    table = np.concatenate([strong, (strong + 255) / 2])
    chosen: dict[int, int] = {}
    used = np.zeros(len(table), int)
    for group in np.flatnonzero(sizes > 1).tolist():
        near = np.bincount([chosen[g] for g in beside.get(group, ()) if g in chosen], minlength=len(table))
        chosen[group] = int(np.lexsort((used, near))[0])
        used[chosen[group]] += 1
    colours = np.full((len(owner), 3), np.nan, np.float32)
    for group, number in chosen.items():
        colours[owner == group] = table[number]
    return colours


def _colours(text: str) -> np.ndarray:
    return np.array([tuple(bytes.fromhex(code)) for code in text.split()], np.float32)


def _mark(tile: Image.Image, panel: Panel, known: Facts, show: str) -> None:
    """Lines between what differs, crop seams, dots on owners, diamonds on markers."""
    pen, cell = ImageDraw.Draw(tile), panel.cell
    same = known.owner if show == "groups" else (known.kept & ~known.markers).astype(np.int64)
    grid = same[panel.tokens]
    if cell >= 8:
        across = [((c + 1) * cell, r * cell, (c + 1) * cell, (r + 1) * cell)
                  for r, c in np.argwhere(grid[:, 1:] != grid[:, :-1]).tolist()]  # fmt: skip
        down = [(c * cell, (r + 1) * cell, (c + 1) * cell, (r + 1) * cell)
                for r, c in np.argwhere(grid[1:] != grid[:-1]).tolist()]  # fmt: skip
        for width, colour in ((3, _UNDER), (1, _LINE)):
            for line in across + down:
                pen.line(line, fill=colour, width=width)
    for axis, seams in enumerate(panel.seams):
        for place in seams:
            ends = (
                (0, place * cell, tile.width, place * cell)
                if axis == 0
                else (place * cell, 0, place * cell, tile.height)
            )
            pen.line(ends, fill=_UNDER, width=5)
            pen.line(ends, fill=(230, 159, 0), width=3)
    spots = known.markers[panel.tokens]
    if show == "groups":
        sizes = np.bincount(known.owner[known.owner >= 0], minlength=len(known.owner))
        spots = spots | ((known.owner[panel.tokens] == panel.tokens) & (sizes[panel.tokens] > 1))
    for r, c in np.argwhere(spots).tolist():
        x, y, radius = (c + 0.5) * cell, (r + 0.5) * cell, max(1.5, min(7, cell / 6))
        if known.markers[panel.tokens[r, c]]:
            radius *= 1.6
            corners = [(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)]
            pen.polygon(corners, fill=(240, 228, 66), outline=_UNDER)
        else:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_LINE, outline=_UNDER)


def _label(drawing: Image.Image, panel: Panel, known: Facts) -> None:
    kept, total = int(known.kept[panel.tokens].sum()), panel.tokens.size
    width = panel.box[2] - panel.box[0]
    font = ImageFont.load_default(_FONT)
    pen = ImageDraw.Draw(drawing)
    for text in (f"{panel.title} · {kept} of {total}", f"{panel.title} · {kept}", str(kept)):
        if pen.textlength(text, font) <= width:
            break
    pen.text((panel.box[0], panel.box[1] - _TITLE + 3), text, fill=_LABEL, font=font)
