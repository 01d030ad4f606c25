"""Published settings: every recipe loads, and keeps as many tokens as its paper says."""

from __future__ import annotations

import importlib.util

import pytest

from foveate.cli import main
from foveate.errors import UnknownNameError
from foveate.eval_suites.lmms.benchmarks import BENCHMARKS
from foveate.eval_suites.recipes import ELSEWHERE, Recipe, find, recipes
from foveate.eval_suites.results.leaderboard import Leaderboard
from foveate.eval_suites.results.rows import Row, Status
from foveate.pruners.core import Layout, ModelInfo, budget

ALL = list(recipes().values())
THE_NINE = {"fopru", "hiprune", "todre", "transprune", "corematching", "pitome", "globalcom2", "quota", "focusui"}
CLIP = ModelInfo(family="llava", tower="CLIPVisionModel")


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_recipe_says_what_is_run_and_where_its_numbers_are_from(recipe: Recipe) -> None:
    assert recipe.pruner.name == recipe.method
    assert recipe.paper.startswith("arXiv ")
    assert recipe.source
    assert recipe.name.startswith(recipe.method)
    assert recipe.model.count("/") == 1
    for name in (*recipe.published, *recipe.unpruned, *recipe.benchmarks):
        assert (name in BENCHMARKS) != (name in ELSEWHERE), name
    assert recipe.published.keys() <= recipe.unpruned.keys()
    assert recipe.published or recipe.note, "a recipe without scores says why"
    assert recipe.runs or recipe.needs, "a recipe that runs nothing says why"


@pytest.mark.parametrize("recipe", [r for r in ALL if r.kept is not None], ids=lambda recipe: recipe.name)
def test_as_many_tokens_as_published_on_the_published_geometry(recipe: Recipe) -> None:
    count = recipe.pruner.count(recipe.geometry, CLIP)
    # where the content decides, it is the budget that was published
    assert recipe.kept == (budget(recipe.pruner.keep, recipe.geometry.size) if count is None else count)


@pytest.mark.parametrize("recipe", [r for r in ALL if r.share is not None], ids=lambda recipe: recipe.name)
def test_the_published_share_of_pictures_of_any_size(recipe: Recipe) -> None:
    layout = Layout.grid(40, 50)
    assert recipe.pruner.count(layout, CLIP) == pytest.approx(recipe.share * layout.size, abs=1)


def test_every_method_of_this_library_that_was_published_here_has_one() -> None:
    assert {recipe.method for recipe in ALL} >= THE_NINE | {
        "tome",
        "fastv",
        "visionzip",
        "divprune",
        "cdpruner",
        "random",
    }


def test_some_published_numbers_as_printed() -> None:
    """Anchors against slips in the files: one per table."""
    assert find("hiprune-llava15-192").published["pope"] == 86.1
    assert find("hiprune-next-160").published["pope"] == 67.7
    assert find("hiprune-qwen25vl3b-11").published["scienceqa"] == 79.1
    assert find("hiprune-qwen25vl7b-33").published["mme"] == 2297
    assert find("globalcom2-next-10").published["mme-perception"] == 1365.5
    assert find("todre-next-288").published["gqa"] == 59.4
    assert find("transprune-llava15-high").published["mme-perception"] == 1540
    assert find("transprune-next-high").published["seedbench"] == 70.1
    assert find("pitome-llava15-90").published["gqa"] == 59.65
    assert find("tome-llava15-90").published["textvqa"] == 38.80
    assert find("quota-onevision-64").published["videomme"] == 60.7
    assert find("focusui-7b-30").published["screenspot-pro"] == 45.1
    assert find("visionzip-llava15-64").published["pope"] == 77.0
    assert find("divprune-llava15-128").published["pope"] == 86.72
    assert find("cdpruner-llava15-32").published["gqa"] == 57.0
    assert find("fastv-llava15-k2-r75").published["pope"] == 79.2
    assert find("avgpool-llava15-144").published["mme"] == 1763


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'hiprune-llava15-192'"):
        find("hiprune-llava15-19")


@pytest.mark.parametrize("columns", ["80", "220"])
def test_list_and_dry_run(columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["reproduce", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(recipe.name in out for recipe in ALL)
    assert main(["reproduce", "hiprune-llava15-192", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for text in ("hiprune(keep=192) on llava-hf/llava-1.5-7b-hf", "192 of 576", "version 3, Table 2", "86.1", "95.6 %"):
        assert text in out


@pytest.mark.parametrize(
    ("args", "missing"),
    [
        ([], "say which recipe"),
        (["focusui-7b-50"], "needs the checkpoint's own grounding head"),
        (["quota-onevision-64"], "a score per frame"),
    ],
)
def test_what_cannot_be_run_says_why(args: list[str], missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *args]) == 2
    assert missing in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None, reason="lmms-eval is installed here")
def test_without_lmms_eval_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "hiprune-llava15-192"]) == 2
    assert "lmms_eval" in capsys.readouterr().err


def test_without_weights_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    """Offline, with an empty cache: the model's name and what to do, exit code not 0."""
    from foveate.eval_suites.lmms import bench

    monkeypatch.setattr(bench, "check_installed", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["reproduce", "hiprune-llava15-192", "--model", "nobody/no-such-model"]) == 2
    error = capsys.readouterr().err
    assert "model 'nobody/no-such-model' cannot be had" in error
    assert "network" in error


def test_ours_stands_beside_theirs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from foveate.eval_suites.lmms import bench

    def measured(model: str, names: str, *, runs: list, **options: object) -> list:
        assert [run.label for run in runs] == ["unpruned", "hiprune"]
        assert runs[1].pruner == find("hiprune-llava15-192").pruner
        whole, pruned = (Row(run.method, run.label, accuracy=0.7) for run in runs)
        whole.quoted, pruned.quoted = 86.0, 43.0
        failed = Row("hiprune", "another", status=Status.FAILED)
        return [Leaderboard([whole, pruned, failed], {"suite": "lmms:pope"})]

    monkeypatch.setattr(bench, "bench", measured)
    assert main(["reproduce", "hiprune-llava15-192", "--benchmarks", "pope"]) == 1, "one of the runs failed"
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["pope"])
    assert line.split() == ["pope", "85.9", "86.0", "86.1", "43.0", "100.2", "%", "50.0", "%"]


def test_the_mean_score_does_not_stand_for_a_number_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """80 of MME's samples in 100 are no 80 points."""
    from foveate.eval_suites.lmms import bench

    def measured(model: str, names: str, *, runs: list, **options: object) -> list:
        whole, pruned = (Row(run.method, run.label, accuracy=0.8) for run in runs)
        whole.quoted = 1800.0
        return [Leaderboard([whole, pruned], {"suite": "lmms:mme"})]

    monkeypatch.setattr(bench, "bench", measured)
    assert main(["reproduce", "hiprune-llava15-192", "--benchmarks", "mme"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.split()[:1] == ["mme"])
    assert line.split()[2::2][:2] == ["1800.0", "?"]
    assert line.split()[-1] == "-"
    assert "?: documents failed, or" in out
