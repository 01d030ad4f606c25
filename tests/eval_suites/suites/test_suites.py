"""What all embedded suites promise: equal samples everywhere, splits that share nothing, light import, small models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from foveate.eval_suites.running import models
from foveate.eval_suites.suites import clips, screens, shapes

DRAW = {shapes: shapes.scenes.draw_scene, screens: screens.scenes.draw_screen, clips: clips.scenes.draw_clip}
LAYOUTS = {shapes: 4000, screens: 600, clips: 600}
MODEL_BYTES = 12 * 2**20

each_suite = pytest.mark.parametrize("suite", DRAW, ids=lambda suite: suite.__name__.rpartition(".")[2])


def told(sample: Any) -> dict[str, Any]:
    """All that a sample says, pixels as bytes."""
    return {name: value.tobytes() if name in ("image", "video") else value for name, value in vars(sample).items()}


@each_suite
def test_samples_are_a_function_of_the_seed(suite: ModuleType) -> None:
    first, again, other = (list(map(told, suite.samples(8, seed=seed))) for seed in (5, 5, 6))
    assert first == again
    shown = {"image", "video"} & first[0].keys()
    assert all(a[name] != b[name] for a, b in zip(first, other) for name in shown)


@each_suite
def test_samples_take_the_tasks_in_turn(suite: ModuleType) -> None:
    tasks = [sample.task for sample in suite.samples(2 * len(suite.TASKS) + 1)]
    assert tasks == [*suite.TASKS, *suite.TASKS, suite.TASKS[0]]


@each_suite
def test_no_layout_is_in_both_splits(suite: ModuleType) -> None:
    count, rng = LAYOUTS[suite], np.random.default_rng(3)
    training, held_out = ({DRAW[suite](rng, held_out) for _ in range(count)} for held_out in (False, True))
    assert len(training) > 0.83 * count
    assert not training & held_out


def test_importing_the_suites_loads_no_torch() -> None:
    # the top package may import torch: what the suites themselves add is measured, in a fresh interpreter
    program = """
import sys, types
for name, folder in (("rooms", "."), ("rooms.suites", "suites")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
sys.modules["torch"] = sys.modules["transformers"] = None
import rooms.suites.shapes, rooms.suites.screens, rooms.suites.clips, rooms.vision
"""
    folder = shapes.MODEL_PATH.parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", models.EMBEDDED)
def test_a_models_folder_is_small_and_its_weights_are_safetensors(name: str) -> None:
    files = [path for path in Path(models.source(name)).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MODEL_BYTES
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".jinja", ".md"}
    assert {"README.md", "training_log.jsonl", "config.json"} <= {path.name for path in files}
