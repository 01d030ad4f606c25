"""foveate within the real lmms-eval, on the small trained models that come with the code. ``make test-lmms`` runs these."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

import foveate
from foveate.eval_suites import models, runner
from foveate.eval_suites.lmms import bench as through
from foveate.eval_suites.lmms import tasks
from foveate.eval_suites.meter import BudgetMismatch
from foveate.eval_suites.store import Store

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; `make test-lmms` makes an environment with it")
pytest.importorskip("decord", reason="decord is not installed; lmms-eval's models import it")

LIMIT = 12
SHAPES = models.source("shapes-llava")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The suite shapes as a task."""
    folder = tmp_path_factory.mktemp("tasks")
    assert tasks.export(folder, ["shapes"], LIMIT) == ["foveate_shapes"]
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """No network, and no cache of data sets but our own."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def lmms_eval(folder: pathlib.Path, out: pathlib.Path, model_args: str, *more: str) -> list[dict]:
    """Run the command of lmms-eval, and return the samples that it logged, in order."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lmms_eval", "--model", "foveate_llava_hf", "--verbosity", "DEBUG"),
            *("--model_args", f"pretrained={SHAPES},device_map=cpu,dtype=float32,{model_args}"),
            *("--device", "cpu", "--tasks", "foveate_shapes", "--include_path", str(folder), "--batch_size", "2"),
            *("--output_path", str(out), "--log_samples", *more),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr + done.stdout)
    (log,) = out.rglob("*_samples_foveate_shapes.jsonl")
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    return sorted(samples, key=lambda sample: sample["doc_id"])


def said(samples: list[dict]) -> list[str]:
    return [sample["filtered_resps"].strip() for sample in samples]


@pytest.mark.timeout(1800)
def test_cached_answers_of_different_budgets_are_never_mixed_up(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Batch 2, one cache for all: unpruned and two budgets each get the answers that they get without a cache."""
    version = f"foveate_version={foveate.__version__},positions=keep"
    budgets = {"unpruned": version, 0.25: f"{version},pruner=avgpool,keep=0.25", 4: f"{version},pruner=avgpool,keep=4"}
    cache = ("--use_cache", str(tmp_path / "cache"))
    cached = {keep: lmms_eval(folder, tmp_path / str(keep), args, *cache) for keep, args in budgets.items()}
    again = {keep: lmms_eval(folder, tmp_path / f"{keep}-2", args, *cache) for keep, args in budgets.items()}
    alone = runner.bench(
        "shapes-llava", "shapes", "avgpool", [0.25, 4], LIMIT, seeds=1, batch_size=2, device="cpu", positions="keep"
    )
    right = {row.keep or row.label: row.answers for row in alone.rows if row.label in ("unpruned", "avgpool")}
    for keep in budgets:
        assert said(cached[keep]) == right[keep], keep
        assert said(again[keep]) == right[keep], keep
        tokens = {"unpruned": 144, 0.25: 36, 4: 4}[keep]
        assert {tuple(sample["token_counts"][0]["tokens"]) for sample in cached[keep]} == {(tokens,) * 4}
        assert all(sample["token_counts"] == [None] for sample in again[keep]), (
            "the second run was to come from the cache"
        )
    assert len(set(map(tuple, right.values()))) == 3, "budgets that answer alike prove nothing"


@pytest.mark.timeout(600)
def test_version_is_part_of_the_arguments(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Without foveate's version nothing runs, so that the cache cannot serve answers of another one."""
    with pytest.raises(RuntimeError, match=f"write foveate_version={foveate.__version__}"):
        lmms_eval(folder, tmp_path / "out", "pruner=avgpool,keep=4")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_same_samples_same_answers_as_foveates_own_bench(tmp_path: pathlib.Path, positions: str) -> None:
    """Answers, scores and tokens of every layer equal those of the suite's own bench."""
    options = {
        "pruners": "divprune,fastv,transprune",
        "limit": LIMIT,
        "seeds": 2,
        "batch_size": 2,
        "positions": positions,
    }
    own = runner.bench(
        "shapes-llava", "shapes", keep=[0.25], device="cpu", out=tmp_path / "own.db", progress=False, **options
    )
    (board,) = through.bench(
        "shapes-llava", "lmms:foveate_shapes", keep=[0.25], device="cpu", out=tmp_path / "lmms.db", **options
    )
    assert not board.failures
    rows = {(row.label, row.keep, row.seed): row for row in board.rows}
    assert rows.keys() == {(row.label, row.keep, row.seed) for row in own.rows}
    for row in own.rows:
        theirs = rows[row.label, row.keep, row.seed]
        assert theirs.answers == row.answers, row.label
        assert theirs.scores == row.scores, row.label
        assert theirs.tokens_per_layer == row.tokens_per_layer, row.label
        assert theirs.kept_requested == row.kept_requested, row.label
        assert theirs.prefill_flops == row.prefill_flops, row.label


def test_bench_goes_on_where_it_was(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the store holds is not done again."""
    options = {"pruners": "grid", "keep": [0.25], "limit": 4, "seeds": 1, "batch_size": 2, "device": "cpu"}
    (before,) = through.bench("shapes-llava", "foveate_shapes", out=tmp_path / "a.db", **options)

    def never(*args: object) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(through, "run", never)
    (after,) = through.bench("shapes-llava", "foveate_shapes", out=tmp_path / "a.db", **options)
    assert [row.as_json() for row in after.rows] == [row.as_json() for row in before.rows]
    with Store(tmp_path / "a.db") as store:
        assert all(len(store.answers(n)) == 4 for n in store.open_runs(1, before.rows))


def test_budget_that_is_not_kept_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method whose tokens do not go is a failed row, and not a good score."""
    from foveate.eval_suites.lmms import watch

    real = watch.attach

    def idle(model: object, pruner: object, **options: object) -> object:
        return real(model, foveate.Grid(keep=1.0), **options)

    monkeypatch.setattr(watch, "attach", idle)
    (board,) = through.bench(
        "shapes-llava", "foveate_shapes", "divprune", [0.25], 2, seeds=1, batch_size=2, device="cpu"
    )
    failed = {row.label: row.reason for row in board.failures}
    assert "divprune" in failed
    assert "kept 144 of 144 tokens" in failed["divprune"]


def test_a_prompt_that_is_not_counted_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers without a prompt that was seen going through the model are refused."""
    lm = through.load("shapes-llava", "foveate_llava_hf", 2, "cpu", None)
    lm.watch._end = None
    for handle in lm.watch._handles:
        handle.remove()
    benchmark = through.benchmarks.find("foveate_shapes")
    with through.tasks_at_hand([benchmark], "foveate_llava_hf", 2) as manager:
        monkeypatch.setattr(lm, "use", lambda *args, **options: None)
        with pytest.raises(BudgetMismatch, match="0 prompts for 2 documents"):
            through.run(lm, runner.Run("unpruned", None), benchmark, manager, "auto", 2)


def test_public_data_that_is_not_there_is_one_line() -> None:
    """Without network and cache: which data set is missing, and what to do."""
    with pytest.raises(foveate.FoveateError, match=r"data of lmms:pope cannot be had.*network"):
        through.bench("shapes-llava", "lmms:pope", "divprune", [0.25], 2, device="cpu")


def test_qwen_runs_with_a_method() -> None:
    """Qwen2.5-VL through lmms-eval's own loop, pruned, batch 2, counted."""
    pytest.importorskip("qwen_vl_utils")
    runs = [runner.Run("unpruned", None), *runner.plan("divprune", [0.25], 1)[-1:]]
    (board,) = through.bench("shapes-qwen", "foveate_screens", limit=4, batch_size=2, device="cpu", runs=runs)
    assert not board.failures
    bare, pruned = board.rows
    assert pruned.tokens_per_layer[-1] == pruned.kept_requested < bare.tokens_per_layer[-1]
