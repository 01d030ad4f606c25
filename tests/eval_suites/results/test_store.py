"""No finished answer is lost or counted twice, whoever writes, whatever happens; what does not compare is refused."""

from __future__ import annotations

import json
import os
import pathlib
import sqlite3
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from foveate.errors import StoreError
from foveate.eval_suites import suites
from foveate.eval_suites.results.leaderboard import Leaderboard
from foveate.eval_suites.results.rows import Answer, Row, Status
from foveate.eval_suites.results.store import MUST_AGREE, SCHEMA, Store, read
from foveate.eval_suites.running import models, runner
from foveate.eval_suites.running.meter import Meter, MethodRun

ROOT = pathlib.Path(__file__).resolve().parents[3]
FACTS = {"model": "m", "suite": "s", "limit": 3, **{key: f"<{key}>" for key in MUST_AGREE if key != "limit"}}
TASKS = ("a", "b")


def answer(number: int, **more: Any) -> Answer:
    fields = {"sample": f"s{number}", "task": TASKS[number % 2], "text": "yes", "score": 1.0, "tokens": (9, 4)}
    return Answer(number, **fields | {"asked": 4, "seconds": 0.5} | more)


def rows() -> list[Row]:
    return [Row("unpruned", "unpruned"), Row("fastv", "fastv(k=2)", 0.25, None, parameters={"k": 2})]


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "results.db"


@pytest.fixture
def filled(path: pathlib.Path) -> pathlib.Path:
    with Store(path) as store:
        first, second = store.open_runs(store.open_bench(FACTS, TASKS), rows())
        store.add(first, [answer(n, asked=None) for n in range(3)])
        store.add(second, [answer(0), answer(1, text="no", score=0.0), answer(2, text="maybe")], {"llm_layer": "keep"})
    return path


def only(path: pathlib.Path) -> Leaderboard:
    with Store(path, create=False) as store:
        (board,) = store.boards()
    return board


# ------------------------------------------------------------------------------------------------------- what is kept


def test_rows_are_made_of_answers(filled):
    unpruned, fastv = only(filled).rows
    assert (unpruned.accuracy, unpruned.loyalty, unpruned.relative_accuracy) == (1, 1, 1)
    assert (fastv.n, fastv.correct, fastv.loyalty, fastv.relative_accuracy) == (3, 2, 1 / 3, 2 / 3)
    assert fastv.tasks == {"a": 1.0, "b": 0.0}
    assert (fastv.tokens_per_layer, fastv.kept_requested, fastv.seconds_per_sample) == ([9, 4], 4, 0.5)
    assert (fastv.parameters, fastv.positions, fastv.keep) == ({"k": 2}, {"llm_layer": "keep"}, 0.25)


def test_a_number_of_tokens_is_not_a_fraction(path):
    with Store(path) as store:
        bench = store.open_bench(FACTS, TASKS)
        numbers = store.open_runs(bench, [Row("grid", "grid", 1), Row("grid", "grid", 1.0)])
        assert len(set(numbers)) == 2
        assert [type(row.keep) for row in store.board(bench).rows] == [int, float]


def test_an_answer_is_kept_once_and_the_first_stays(filled):
    with Store(filled) as store:
        store.add(2, [answer(1, text="other", score=1.0)])
    assert only(filled).rows[1].answers == ["yes", "no", "maybe"]


def test_a_batch_is_kept_whole_or_not_at_all(path):
    with Store(path) as store:
        (run,) = store.open_runs(store.open_bench(FACTS, TASKS), rows()[:1])
        with pytest.raises(StoreError):
            store.add(run, [answer(0), replace(answer(1), sample=None)])
        assert store.finished(run) == set()


def test_answers_need_their_run_and_go_with_it(filled):
    with Store(filled) as store, pytest.raises(StoreError, match="FOREIGN KEY"):
        store.add(99, [answer(0)])
    with Store(filled) as store:
        store.open_bench(FACTS, TASKS, fresh="always")
    with sqlite3.connect(filled) as db:
        assert db.execute("SELECT count(*) FROM answer").fetchone() == (0,)


def test_unfinished_rows_have_no_accuracy(path):
    with Store(path) as store:
        bench = store.open_bench(FACTS, TASKS)
        (run, _) = store.open_runs(bench, rows())
        store.add(run, [answer(0), answer(1)])
        row = store.board(bench).rows[0]
    assert (row.status, row.accuracy) == (Status.UNFINISHED, None)
    assert row.reason.startswith("2 of 3 samples")


def test_answers_wait_for_their_scores_and_count_as_missing(path):
    """As those of lmms-eval do: what was said is safe before the whole run is scored, and becomes what was scored."""
    with Store(path) as store:
        bench = store.open_bench(FACTS, TASKS)
        (run, _) = store.open_runs(bench, rows())
        store.add(run, [answer(n, text=" as said ", score=None) for n in range(3)])
        row = store.board(bench).rows[0]
        assert (row.status, row.accuracy) == (Status.UNFINISHED, None)
        assert row.reason.startswith("3 of 3 samples without scores")
        store.add(run, [answer(n, text="cut", score=0.5) for n in range(3)])
        store.add(run, [answer(n, score=1.0) for n in range(3)])
        row = store.board(bench).rows[0]
    assert (row.accuracy, row.answers) == (0.5, ["cut"] * 3)


def test_the_quoted_number_is_kept_exported_and_dropped_when_samples_are_done_again(path, tmp_path):
    with Store(path) as store:
        bench = store.open_bench(FACTS, TASKS)
        (run, _) = store.open_runs(bench, rows())
        store.add(run, [answer(0), answer(1), replace(answer(2), score=None, text=None, error="OSError: gone")])
        store.quote(run, 85.9)
        store.quote(run, 12.0)
        with Store(tmp_path / "copy.db") as copy:
            copy.merge(store.as_json())
            (board,) = copy.boards()
        assert board.rows[0].quoted == 85.9
        assert "| 85.9 |" in board.markdown()
        assert store.quoted(run) == 85.9
        store.retry(bench)
        assert store.board(bench).rows[0].quoted is None
        assert store.quoted(run) is None


def test_failed_samples_count_as_wrong_and_are_told(path):
    with Store(path) as store:
        bench = store.open_bench(FACTS, TASKS)
        run, _ = store.open_runs(bench, rows())
        store.add(run, [answer(0), Answer(1, "s1", "b", error="OSError: no picture"), answer(2)])
        board = store.board(bench)
    row = board.rows[0]
    assert (row.status, row.n, row.correct, row.errors) == (Status.OK, 3, 2, 1)
    assert "first s1: OSError: no picture" in row.reason
    assert row in board.failures


def test_the_first_batch_that_ends_a_run_gives_the_reason(filled):
    with Store(filled) as store:
        store.give_up(2, Status.FAILED, "late", 2)
        store.give_up(2, Status.NOT_APPLICABLE, "early", 1)
        store.give_up(2, Status.FAILED, "later", 2)
    row = only(filled).rows[1]
    assert (row.status, row.reason, row.accuracy) == (Status.NOT_APPLICABLE, "early", None)


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("key", [key for key in MUST_AGREE if key != "samples_sha256"])
def test_other_settings_or_versions_are_refused_by_name(filled, key):
    with Store(filled) as store, pytest.raises(StoreError) as refused:
        store.open_bench(FACTS | {key: "other"}, TASKS)
    message = str(refused.value)
    assert f"settings: {MUST_AGREE[key]} (" in message
    assert "other now)" in message
    assert "--fresh" in message
    assert len(only(filled).rows) == 2


def test_what_need_not_agree_may_differ(filled):
    with Store(filled) as store:
        assert store.open_bench(FACTS | {"date": "today", "processes": 2}, TASKS) == 1


def test_old_rows_are_dropped_on_demand_only(filled):
    with Store(filled) as store:
        bench = store.open_bench(FACTS, TASKS, fresh="changed")
        assert len(store.board(bench).rows) == 2
        bench = store.open_bench(FACTS | {"torch": "9"}, TASKS, fresh="changed")
        assert store.board(bench).rows == []


def test_a_file_holds_several_models_and_suites(filled):
    with Store(filled) as store:
        store.open_bench(FACTS | {"model": "n", "torch": "9"}, TASKS)
        assert [board.environment["model"] for board in store.boards()] == ["m", "n"]


def test_changed_defaults_of_a_method_are_refused(filled):
    with Store(filled) as store, pytest.raises(StoreError, match=r"fastv\(k=2\) with other parameters"):
        store.open_runs(1, [replace(rows()[1], parameters={"k": 2, "new": 1})])


def test_files_of_others_are_refused(tmp_path):
    text, foreign, newer = tmp_path / "text.db", tmp_path / "foreign.db", tmp_path / "newer.db"
    text.write_text("no database " * 100, encoding="utf-8")
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE theirs (x)")
    Store(newer).close()
    with sqlite3.connect(newer) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    for path, said in (
        (text, "not usable as a result file"),
        (foreign, "a database of another program"),
        (newer, f"written by a newer foveate \\(format {SCHEMA + 1}, this one reads {SCHEMA}\\)"),
        (tmp_path, "cannot be opened"),
        (tmp_path / "missing" / "x.db", "cannot be opened"),
    ):
        with pytest.raises(StoreError, match=said):
            Store(path)
    with pytest.raises(StoreError, match="no result file"):
        Store(tmp_path / "nothing.db", create=False)
    assert not (tmp_path / "nothing.db").exists()


# -------------------------------------------------------------------------------------------------- export and import


def test_results_come_back_as_they_went(filled, tmp_path):
    (tmp_path / "all.json").write_text(json.dumps(read(filled)), encoding="utf-8")
    with Store(tmp_path / "copy.db") as store:
        assert store.merge(read(tmp_path / "all.json")) == 6
        assert store.merge(read(tmp_path / "all.json")) == 0
        assert store.as_json() == read(filled)
    assert only(tmp_path / "copy.db").rows == only(filled).rows


def test_import_refuses_what_does_not_compare(filled, tmp_path):
    other = read(filled)
    other["benches"][0]["facts"]["torch"] = "9"
    with Store(filled) as store:
        with pytest.raises(StoreError, match="torch"):
            store.merge(other)
        for damaged in ({}, {"format": "foveate results", "schema": 99}, {"format": "foveate results", "schema": 1}):
            with pytest.raises(StoreError):
                store.merge(damaged)


# ------------------------------------------------------------------------------------------- interrupted, and together


def python(*argv: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more
    return subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(("model", "stub"), [("tiny", ["stub"]), ("shapes-llava", [])])
def test_a_bench_killed_at_20_random_moments_ends_with_the_same_table(checkpoint, model, stub):
    name = str(checkpoint) if model == "tiny" else model
    done = python("-m", "tests.eval_suites.results.killed", name, "20", *stub)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["status"] == 0
    assert told["same"]
    rows = 2 + (2 + 4)  # unpruned, no-image; random twice and four others
    assert told["answers"] == rows * 12
    cut = [n for n in told["partial"] if 0 < n < told["answers"]]
    assert len(set(cut)) >= 3, f"nothing was interrupted: {told['partial']}"


def test_several_processes_write_one_new_file(path):
    code = (
        "import sys; from foveate.eval_suites.results.store import Store; from foveate.eval_suites.results.rows import "
        "Answer, Row\n"
        f"store = Store({str(path)!r}); bench = store.open_bench({FACTS | {'limit': 400}!r}, ('a', 'b'))\n"
        "(run,) = store.open_runs(bench, [Row('unpruned', 'unpruned')]); me = int(sys.argv[1])\n"
        "for n in range(0, 400, 2): store.add(run, [Answer(n + me % 2, 's', 'a', 'x', 1.0, (4,), seconds=0.1)])\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    writers = [subprocess.Popen([sys.executable, "-c", code, str(i)], env=env) for i in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    (row,) = only(path).rows
    assert (row.n, row.correct) == (400, 400)


@pytest.fixture(scope="module")
def loaded(checkpoint: pathlib.Path) -> models.Loaded:
    return models.load(checkpoint, device="cpu")


def quick(loaded: models.Loaded, path: pathlib.Path | None, pruners: Any = "fastv", **more: Any) -> Leaderboard:
    options: dict[str, Any] = {"limit": 7, "seeds": 1, "batch_size": 3, "progress": False, "out": path, "timing": False}
    return runner.bench(loaded, "shapes", pruners, 0.25, **(options | more))


def test_a_second_run_measures_nothing_again(loaded, path, monkeypatch):
    first = quick(loaded, path)
    monkeypatch.setattr(Meter, "_answer", lambda *args: pytest.fail("measured again"))
    assert quick(loaded, path).rows == first.rows


def test_more_methods_join_the_table(loaded, path, monkeypatch):
    quick(loaded, path, "fastv")
    labels, real = [], Meter.measure

    def watch(self: Meter, run: MethodRun, firsts: Any) -> Any:
        labels.append(run.label)
        return real(self, run, firsts)

    monkeypatch.setattr(Meter, "measure", watch)
    board = quick(loaded, path, "divprune")
    assert labels == ["divprune"]
    assert [row.label for row in board.rows[-2:]] == ["fastv", "divprune"]


def test_an_interrupt_leaves_what_was_done_and_the_next_run_goes_on(loaded, path, monkeypatch):
    calls, real = [], Meter._answer

    def interrupted(self: Meter, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Meter, "_answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(loaded, path)
    states = [row.status for row in only(path).rows]
    assert states[0] is Status.OK
    assert Status.UNFINISHED in states
    resumed, whole = quick(loaded, path), quick(loaded, None)
    assert [row.answers for row in resumed.rows] == [row.answers for row in whole.rows]


def test_a_failed_sample_is_recorded_and_done_again_on_demand(loaded, path, monkeypatch):
    sick, real = True, Meter._answer

    def fails_on_4(self: Meter, run: MethodRun, batch: Any) -> Any:
        if sick and run.label == "fastv" and self.samples[4] in batch:
            raise OSError("picture 4 is damaged")
        return real(self, run, batch)

    monkeypatch.setattr(Meter, "_answer", fails_on_4)
    row = quick(loaded, path).rows[-1]
    assert (row.status, row.errors, row.n, row.answers[4]) == (Status.OK, 1, 7, "")
    assert "OSError: picture 4 is damaged" in row.reason
    sick = False
    assert quick(loaded, path).rows[-1].errors == 1
    assert quick(loaded, path, retry=True).rows[-1].errors == 0


def test_a_suite_that_asks_something_else_is_refused(loaded, path):
    quick(loaded, path)
    suite = suites.find("shapes")
    other = replace(suite, samples=lambda n, seed: suite.samples(n, seed + 1))
    with pytest.raises(StoreError, match="samples"):
        runner.bench(loaded, other, "fastv", 0.25, 7, seeds=1, batch_size=3, out=path, progress=False, timing=False)
