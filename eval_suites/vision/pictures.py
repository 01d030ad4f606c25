"""Pictures to look at: held-out scenes of the shapes suite, or a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from foveate.errors import InputError
from foveate.eval_suites.suites.shapes import scenes
from foveate.eval_suites.suites.streams import numbered
from foveate.eval_suites.vision import HELD_OUT_SEED
from foveate.eval_suites.vision.scenes import CLASSES, PROMPT, caption, draw, objects

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_FOLDER_PROMPT = "a photo of a {}"


@dataclass(frozen=True)
class Pictures:
    """Pictures and what is known of them.

    Attributes:
        source: what they are, in words.
        open: one function per picture that loads it, RGB.
        classes: names to choose from, empty if there are none.
        labels: for every picture the classes that are right.
        prompt: what a class is called to a text encoder, with ``{}``.
        captions: one per picture, or None.
    """

    source: str
    open: Sequence[Callable[[], Image.Image]]
    classes: Sequence[str] = ()
    labels: Sequence[frozenset[int]] = ()
    prompt: str = PROMPT
    captions: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.open)


def held_out_scenes(limit: int, seed: int | None = None) -> Pictures:
    """``limit`` held-out scenes of one to three objects; picture ``i`` depends on ``seed`` and ``i`` only."""
    seed = HELD_OUT_SEED if seed is None else seed
    drawn = []
    for _, rng in numbered(limit, seed):
        scene = draw(rng, held_out=True)
        drawn.append((scene, scenes.render(scene, rng).pixels))
    return Pictures(
        f"held-out scenes, seed {seed}",
        [lambda pixels=pixels: Image.fromarray(pixels) for _, pixels in drawn],
        CLASSES,
        [objects(scene) for scene, _ in drawn],
        captions=[caption(scene) for scene, _ in drawn],
    )


def folder(path: Path, limit: int | None = None) -> Pictures:
    """The first ``limit`` pictures of a folder, its sub-folders taking turns.

    Sub-folders are classes (the ImageFolder layout); ``metadata.jsonl`` with ``file_name`` and ``text`` gives captions.

    Raises:
        InputError: no such folder, no pictures in it, or captions that cannot be read.
    """
    if not path.is_dir():
        raise InputError(
            f"{path} is not a folder; give one with pictures, or with one sub-folder of pictures per class"
        )
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _ENDINGS)
    if not files:
        raise InputError(f"no pictures ({', '.join(_ENDINGS)}) below {path}")
    classes = sorted({file.relative_to(path).parts[0] for file in files if file.parent != path})
    if any(file.parent == path for file in files):
        classes = []  # some belong to none
    turn: dict[Path, int] = {}
    order = []
    for file in files:
        turn[file.parent] = turn.get(file.parent, -1) + 1
        order.append((turn[file.parent], file))
    files = [file for _, file in sorted(order)][:limit]
    return Pictures(
        f"{len(files)} pictures of {path.name}",
        [lambda file=file: Image.open(file).convert("RGB") for file in files],
        classes,
        [frozenset([classes.index(file.relative_to(path).parts[0])]) for file in files] if classes else (),
        _FOLDER_PROMPT,
        _captions(path, files),
    )


def _captions(path: Path, files: Sequence[Path]) -> list[str] | None:
    """Those of ``metadata.jsonl``, if there is one and it names every picture."""
    metadata = path / "metadata.jsonl"
    if not metadata.is_file():
        return None
    try:
        lines = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
        known = {line["file_name"]: line["text"] for line in lines}
        return [known[file.relative_to(path).as_posix()] for file in files]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{metadata} gives no captions ({error}); every line needs file_name and text, every picture a line"
        ) from None
