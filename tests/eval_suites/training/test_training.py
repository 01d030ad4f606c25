"""Statement: a recipe runs from nothing to a folder that loads; a stopped run goes on as if it had not been."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch

from foveate.eval_suites.running import models
from foveate.eval_suites.training import shapes_llava as recipe

SMALL = ("--width", "32", "--depth", "2", "--text-width", "32", "--text-depth", "2", "--no-compile", "--no-bf16")
NAMES = [stage.name for stage in recipe.STAGES]


class Quick(recipe.Training):
    """The recipe of shapes-llava with few held-out pictures."""

    def check(self, stage: str, batches: int = 1) -> dict[str, float]:
        return super().check(stage, batches)


def trained(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> Quick:
    """What ``main`` has trained."""
    runs = []

    class Kept(Quick):
        def export(self) -> None:
            super().export()
            runs.append(self)

    monkeypatch.setattr(sys, "argv", ["train", "--out", str(out), *SMALL, *options])
    Kept.main("a recipe")
    return runs[0] if runs else None


def steps(count: int, *stages: str) -> list[str]:
    return [text for name in stages for text in (f"--{name}-steps", str(count), f"--{name}-batch", "2")]


def test_all_stages_run_and_the_folder_loads(tmp_path, monkeypatch):
    run = trained(monkeypatch, tmp_path, *steps(1, *NAMES))
    log = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert [record["stage"] for record in log] == NAMES
    loaded = models.load(str(tmp_path), "cpu", "float32").model
    for name, weight in run.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.half().float()), name


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    def decoder(folder: str, count: int, *more: str) -> dict[str, torch.Tensor]:
        trained(monkeypatch, tmp_path / folder, "--stages", "decoder", *steps(count, "decoder"), *more)
        path = tmp_path / folder / "checkpoints" / "decoder.pt"
        return torch.load(path, weights_only=True)["model"]

    whole = decoder("whole", 3)
    stopped = decoder("halves", 1)
    resumed = decoder("halves", 3, "--resume")
    assert any(not torch.equal(whole[name], stopped[name]) for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_workers_that_are_not_forked_draw_the_same_batches(tmp_path, monkeypatch):
    """They get the recipe pickled: compiled functions must not be in it, nor the model."""
    runs = []
    monkeypatch.setattr(recipe.Training, "train", lambda self, stage: runs.append(self))
    options = [option for option in SMALL if option != "--no-compile"]
    monkeypatch.setattr(
        sys, "argv", ["train", "--out", str(tmp_path), *options, *steps(1, "decoder"), "--stages", "decoder"]
    )
    recipe.Training.main("a recipe")
    worker = pickle.loads(pickle.dumps(runs[0].batch))
    assert not {"model", "modules", "see", "decode"} & vars(worker.__self__).keys()
    drawn, there = runs[0].batch("decoder", 0), worker("decoder", 0)
    assert drawn.keys() == there.keys()
    assert all(torch.equal(drawn[name], there[name]) for name in drawn)


def test_a_stage_without_the_one_before_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="run stage 'tower' first"):
        trained(monkeypatch, tmp_path, "--stages", "align", *steps(1, "align"))
