"""Pictures with captions, drawn from the scenes of the shapes suite."""

from __future__ import annotations

import numpy as np

from foveate.eval_suites.suites.shapes import scenes

COLOURS, SHAPES = tuple(scenes.COLOURS), scenes.SHAPES
CLASSES: tuple[str, ...] = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
PROMPT = "a {}"
"""What a class is called to a text encoder."""


def draw(rng: np.random.Generator, held_out: bool, count: int | None = None) -> scenes.Scene:
    """A scene of `count` objects (None: one to three), without a printed code."""
    return scenes.draw_scene(rng, held_out, count=count or int(rng.integers(1, 4)), code=False)


def caption(scene: scenes.Scene, places: bool = True) -> str:
    """The scene in words: `"top left red circle, middle right blue star"`, or without places `"a red circle, …"`."""
    if places:
        return scenes.caption(scene)
    return ", ".join(f"a {thing.colour} {thing.shape}" for thing in scene.things)


def objects(scene: scenes.Scene) -> frozenset[int]:
    """Indices in :data:`CLASSES` of what is in a scene."""
    return frozenset(CLASSES.index(f"{thing.colour} {thing.shape}") for thing in scene.things)
