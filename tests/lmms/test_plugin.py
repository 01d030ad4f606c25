"""foveate in the real lmms-eval, on the small trained models that come with the code; ``make test-lmms`` runs it."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

import foveate
from foveate.cli import main
from foveate.eval_suites.lmms import bench as through
from foveate.eval_suites.lmms import tasks
from foveate.eval_suites.results.rows import Row, Status
from foveate.eval_suites.results.store import Store
from foveate.eval_suites.running import models, runner
from foveate.eval_suites.running.meter import BudgetMismatch

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; `make test-lmms` makes an environment with it")
pytest.importorskip("decord", reason="decord is not installed; lmms-eval's models import it")
from lmms_eval.utils import load_yaml_config

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
        assert theirs.cache_bytes == row.cache_bytes, row.label


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


QUICK = {"pruners": "divprune", "keep": [0.25], "limit": 6, "seeds": 1, "batch_size": 2, "device": "cpu"}


@pytest.mark.timeout(600)
def test_an_interrupted_bench_goes_on_behind_the_last_batch(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every batch is in the file before the next; none is asked again, none is scored before all are there."""
    from foveate.eval_suites.lmms.models import LlavaHfChat

    (whole,) = through.bench("shapes-llava", "foveate_shapes", out=tmp_path / "whole.db", **QUICK)
    asked, stop, real = [], True, LlavaHfChat._said

    def said(self: LlavaHfChat, requests: list) -> list:
        asked.append([request.doc_id for request in requests])
        if stop and len(asked) == 3 * 2 + 2:  # the second batch of the third run
            raise KeyboardInterrupt
        return real(self, requests)

    monkeypatch.setattr(LlavaHfChat, "_said", said)
    path = tmp_path / "cut.db"
    with pytest.raises(KeyboardInterrupt):
        through.bench("shapes-llava", "foveate_shapes", out=path, **QUICK)
    with Store(path) as store:
        (board,) = store.boards()
        assert [len(store.answers(n)) for n in (1, 2, 3, 4)] == [6, 6, 2, 0]
        assert {answer.score for answer in store.answers(3).values()} == {None}
    assert [row.status for row in board.rows[:3]] == [Status.OK, Status.OK, Status.UNFINISHED]
    asked.clear()
    stop = False
    (resumed,) = through.bench("shapes-llava", "foveate_shapes", out=path, **QUICK)
    assert asked[:3] == [[2, 3], [4, 5], [0, 1]], "the rest of the third run, then the fourth"
    assert [timeless(row) for row in resumed.rows] == [timeless(row) for row in whole.rows]


def timeless(row: Row) -> dict:
    return row.as_json() | {"seconds_per_sample": None, "speedup": None, "answers": row.answers}


@pytest.mark.timeout(600)
def test_a_crash_is_no_empty_answer(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval's loop answers "" where the model crashes; here the document has its error, and the exit code too."""
    from foveate.eval_suites.lmms.models import LlavaHfChat

    sick, real = [3], LlavaHfChat._ask

    def ask(self: LlavaHfChat, args: tuple) -> tuple:
        if args[3] in sick and self.watch.pruner is not None and self.watch.pruner.name == "divprune":
            raise OSError(f"picture {args[3]} is damaged")
        return real(self, args)

    monkeypatch.setattr(LlavaHfChat, "_ask", ask)
    path = tmp_path / "r.db"
    argv = [
        "bench",
        "--suite",
        "lmms:foveate_shapes",
        "--pruners",
        "divprune",
        "--keep",
        "0.25",
        "--limit",
        "6",
        "--seeds",
        "1",
    ]
    argv += ["--batch-size", "2", "--device", "cpu", "--out", str(path)]
    assert main(argv) == 1
    with Store(path) as store:
        row = store.boards()[0].rows[-1]
    assert (row.label, row.status, row.n, row.errors, row.answers[3]) == ("divprune", Status.OK, 6, 1, "")
    assert "OSError: picture 3 is damaged" in row.reason
    assert row.tasks["foveate_shapes"] == row.accuracy <= 5 / 6
    assert row.quoted is None, "lmms-eval's number takes the failed document for an empty answer"
    sick.clear()
    assert main(argv) == 1, "what failed is done again on demand only"
    assert main([*argv, "--retry"]) == 0
    with Store(path) as store:
        row = store.boards()[0].rows[-1]
        assert (row.errors, row.quoted) == (0, pytest.approx(100 * row.accuracy))
    sick += range(6)
    assert main([*argv[:-1], str(tmp_path / "all.db")]) == 1
    with Store(tmp_path / "all.db") as store:
        row = store.boards()[0].rows[-1]
    assert (row.status, row.accuracy) == (Status.FAILED, None)


@pytest.mark.timeout(600)
def test_one_error_document_after_document_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead device is no fault of documents; four of them in a row may still fail alike, and be counted."""
    from foveate.eval_suites.lmms.models import LlavaHfChat

    sick, real = range(1, 6), LlavaHfChat._ask

    def ask(self: LlavaHfChat, args: tuple) -> tuple:
        if args[3] in sick and self.watch.pruner is not None and self.watch.pruner.name == "divprune":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(self, args)

    monkeypatch.setattr(LlavaHfChat, "_ask", ask)
    runs = [runner.Run("unpruned", None), runner.plan("divprune", [0.25], 1)[-1]]
    options = {"limit": 8, "batch_size": 2, "device": "cpu", "runs": runs}
    (board,) = through.bench("shapes-llava", "foveate_shapes", **options)
    assert (board.rows[1].status, board.rows[1].errors) == (Status.FAILED, 0)
    assert "RuntimeError: CUDA error" in board.rows[1].reason
    sick = range(1, 5)
    (board,) = through.bench("shapes-llava", "foveate_shapes", **options)
    assert (board.rows[1].status, board.rows[1].errors) == (Status.OK, 4)


@pytest.mark.timeout(600)
def test_lmms_evals_own_command_fails_where_a_method_crashes(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A method that this model cannot serve, and one that fails in the middle, leave no results behind."""
    version = f"foveate_version={foveate.__version__}"
    with pytest.raises(RuntimeError, match="k=99: the decoder has 4 layers"):
        lmms_eval(folder, tmp_path / "a", f"{version},pruner=fastv,k=99")
    with pytest.raises(RuntimeError, match="num_beams=3: tokens are counted for greedy answers"):
        lmms_eval(folder, tmp_path / "b", version, "--gen_kwargs", "num_beams=3")
    assert not list(tmp_path.rglob("*results.json"))
    assert not list(tmp_path.rglob("*samples*"))


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


# ---------------------------------------------------------------------------------------------------- public benchmarks

BOX = {"bbox": [0.0, 0.0, 0.5, 0.5]}
ASKED = {
    "pope": ({"answer": "yes", "question_id": 1}, "Yes", "no"),
    "mme": ({"answer": "Yes", "question_id": "1", "category": "existence"}, "yes", "no"),
    "textvqa": ({"answers": ["stop"] * 10, "question_id": 1}, "stop", "go"),
    "ocrbench": ({"answer": ["Cafe"], "dataset": "x", "question_type": "y"}, "a cafe", "tea"),
    "chartqa": ({"answer": "10", "type": "human_test"}, "10.2", "12"),
    "seedbench": ({"answer": "B", "data_type": "image", "question_id": 1}, "B", "A"),
    "refcoco": ({"answer": "x", "question_id": 1, **BOX}, "[0.0, 0.0, 0.5, 0.4]", "[0.4, 0.4, 1.0, 1.0]"),
    "screenspot": (
        {"instruction": "x", "file_name": "f", "data_type": "icon", "data_source": "web", **BOX},
        "[0.0, 0.0, 0.5, 0.4]", "nowhere",
    ),
    "videomme": (
        {"answer": "B", "domain": "d", "sub_category": "s", "task_type": "t", "question_id": 1, "duration": "short",
         "videoID": "v"},
        "B.", "A.",
    ),
    "mlvu": ({"answer": "B", "question": "?", "task_type": "t"}, "B", "C"),
    "longvideobench": (
        {"option0": "a", "option1": "b", "option2": "N/A", "id": 1, "duration_group": 15, "question_category": "T",
         "correct_choice": 1},
        "B", "A",
    ),
}  # fmt: skip
"""Documents with the fields that lmms-eval's scoring reads, a right answer and a wrong one."""


@pytest.fixture(scope="module")
def manager() -> object:
    from lmms_eval.tasks import TaskManager

    return TaskManager("ERROR")


@pytest.mark.parametrize("name", through.benchmarks.BENCHMARKS)
def test_benchmarks_are_tasks_of_lmms_eval_with_the_metrics_that_papers_quote(manager: object, name: str) -> None:
    benchmark = through.benchmarks.find(name)
    config = load_yaml_config(manager.task_index[benchmark.task]["yaml_path"])
    metrics = {entry["metric"] for entry in config["metric_list"]}
    assert set(benchmark.headline) <= metrics
    assert config.get("output_type", "generate_until") == "generate_until"
    if name in ASKED:
        document, right, wrong = ASKED[name]
        # lmms-eval guesses where LongVideoBench's answers name no option
        asked = (right, wrong) if name == "longvideobench" else (right, wrong, "")
        scores = [benchmark.read(config["process_results"](dict(document), [said])) for said in asked]
        assert scores == [1.0, 0.0, 0.0][: len(asked)]
