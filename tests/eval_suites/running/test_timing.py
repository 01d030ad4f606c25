"""What rows cost is measured on both contenders alike, kept, shown and exported."""

from __future__ import annotations

import csv
import pathlib
import sqlite3
from typing import Any

import pytest
import torch

from foveate.cli import main
from foveate.errors import StoreError
from foveate.eval_suites.results.leaderboard import Leaderboard
from foveate.eval_suites.results.page import page
from foveate.eval_suites.results.rows import Timing
from foveate.eval_suites.results.store import _TABLES, SCHEMA, Store, read
from foveate.eval_suites.running import models, runner, timing


@pytest.fixture(scope="module")
def measured(checkpoint: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Leaderboard, pathlib.Path]:
    """A bench with timings, and its file."""
    path = tmp_path_factory.mktemp("timing") / "results.db"
    loaded = models.load(checkpoint, device="cpu")
    options: dict[str, Any] = {"limit": 9, "seeds": 2, "batch_size": 5, "progress": False, "out": path}
    return runner.bench(loaded, "shapes", "fastv,divprune,tome", 0.25, **options), path


def line(board: Leaderboard, label: str) -> Any:
    return next(x for section in board.sections for x in section.lines if x.first.label == label)


def test_every_row_is_timed_in_both_batch_sizes(measured):
    board, _ = measured
    timed = [row for row in board.rows if not row.seed]
    assert all(tuple(row.timings) == timing.BATCHES for row in timed)
    for row in timed:
        for t in row.timings.values():
            assert t.error is None
            assert min(t.prefill, t.decode, t.unpruned_prefill, t.unpruned_decode, t.peak_bytes) > 0
            assert t.decode < t.prefill
    assert not any(row.timings for row in board.rows if row.seed)  # other draws cost the same


def test_selection_is_counted_where_the_trace_counts_it(measured):
    board, _ = measured
    for label in ("fastv", "divprune"):
        t = line(board, label).first.timings[1]
        assert 0 < t.selection < t.prefill
    assert line(board, "unpruned").first.timings[1].selection is None
    assert line(board, "tome").first.timings[1].selection is None


def test_the_unpruned_model_is_its_own_baseline(measured):
    t = line(measured[0], "unpruned").first.timings[8]
    assert (t.prefill, t.decode, t.peak_bytes) == (t.unpruned_prefill, t.unpruned_decode, t.unpruned_peak_bytes)
    assert (t.prefill_speedup, t.decode_speedup) == (1, 1)


def test_memory_grows_with_the_batch_and_shrinks_with_the_tokens(measured):
    board, _ = measured
    whole, few = (line(board, label).first.timings for label in ("unpruned", "divprune"))
    assert 4 * whole[1].peak_bytes < whole[8].peak_bytes < 12 * whole[1].peak_bytes
    assert few[8].peak_bytes < whole[8].peak_bytes
    assert few[8].unpruned_peak_bytes == whole[8].peak_bytes


def test_peak_is_the_most_that_was_there_at_once():
    def work() -> None:
        a = torch.empty(1000, 1000)
        b = torch.empty(500, 1000)
        del a
        torch.empty(1000, 500)
        del b

    assert timing.peak(torch.device("cpu"), work) == 6_000_000


def test_contenders_take_turns_and_the_first_call_does_not_count(checkpoint, monkeypatch):
    loaded = models.load(checkpoint, device="cpu")
    suite = runner.suites.find("shapes")
    meter = runner.Meter(loaded, suite, list(suite.samples(6, 0)), 2, "auto")
    calls, real = [], timing._call

    def watch(meter: Any, run: Any, samples: Any) -> tuple[float, float, float | None]:
        calls.append((run.label, tuple(sample.id for sample in samples)))
        return {"unpruned": 6.0, "grid": 2.0}[run.label], *real(meter, run, samples)[1:]

    monkeypatch.setattr(timing, "_call", watch)
    run = runner.MethodRun("grid", runner.create("grid", keep=0.25), baseline=True)
    found = timing.measure(meter, run, batch=1, repeats=4)
    assert [label for label, _ in calls] == ["unpruned", "grid", "grid", "unpruned"] * 2
    asked = [ids for _, ids in calls]
    assert asked[::2] == asked[1::2]  # both contenders see the same samples
    assert len(set(asked)) == 4  # and every turn has others
    assert (found.prefill, found.unpruned_prefill, found.prefill_speedup) == (2, 6, 3)


def test_timings_are_not_measured_again_and_can_be_left_out(measured, checkpoint, tmp_path, monkeypatch):
    board, path = measured
    monkeypatch.setattr(runner, "measure", lambda *args: pytest.fail("measured again"))
    loaded = models.load(checkpoint, device="cpu")
    options: dict[str, Any] = {"limit": 9, "seeds": 2, "batch_size": 5, "progress": False}
    again = runner.bench(loaded, "shapes", "fastv,divprune,tome", 0.25, **options, out=path)
    assert [row.timings for row in again.rows] == [row.timings for row in board.rows]
    without = runner.bench(loaded, "shapes", "fastv", 0.25, **options, timing=False)
    assert not any(row.timings for row in without.rows)
    shown = {column.head for column in without.columns()}
    assert "ms" in shown
    assert not shown & {"prefill", "gain", "decode", "select", "peak"}


def test_a_row_that_cannot_be_timed_keeps_its_answers_and_says_why(checkpoint, monkeypatch):
    def fails(meter: Any, run: Any, batch: int) -> Timing:
        if batch == 8:
            raise MemoryError("no room")
        return Timing(batch, 3, 0.1, 0.1)

    monkeypatch.setattr(runner, "measure", fails)
    loaded = models.load(checkpoint, device="cpu")
    board = runner.bench(loaded, "shapes", "fastv", 0.25, 3, seeds=1, progress=False)
    assert not board.failures
    assert "not timed: fastv, keep 0.25, batches of 8: MemoryError: no room" in board.notes(board.columns())


def test_timings_are_shown_and_exported(measured, tmp_path, capsys):
    board, path = measured
    heads = [column.head for column in board.columns()]
    for head in ("prefill", "gain", "decode", "select", "prefill ×8", "gain ×8", "peak", "peak ×8"):
        assert head in heads
    assert "| gain |" in board.markdown()
    assert "milliseconds to the first token" in page([board])
    table = tmp_path / "rows.csv"
    assert main(["results", "export", str(path), "--csv", str(table)]) == 0
    with table.open(newline="") as file:
        rows = {row["label"]: row for row in csv.DictReader(file) if row["seed"] in ("", "0")}
    t = line(board, "fastv").first.timings[8]
    assert float(rows["fastv"]["prefill_b8"]) == t.prefill
    assert float(rows["fastv"]["unpruned_prefill_b8"]) == t.unpruned_prefill
    assert int(rows["fastv"]["peak_bytes_b8"]) == t.peak_bytes
    capsys.readouterr()


def test_timings_survive_export_and_import(measured, tmp_path):
    board, path = measured
    with Store(tmp_path / "copy.db") as copy:
        copy.merge(read(path))
        (other,) = copy.boards()
    assert [row.timings for row in other.rows] == [row.timings for row in board.rows]


def old_file(path: pathlib.Path) -> None:
    """A result file of format 1 with one answer."""
    with sqlite3.connect(path) as db:
        db.executescript(_TABLES)
        db.execute("PRAGMA user_version = 1")
        db.execute(f"PRAGMA application_id = {int.from_bytes(b'fovt', 'big')}")
        db.execute('INSERT INTO bench VALUES (1, \'m\', \'s\', 1, \'["a"]\', \'{"model": "m", "suite": "s"}\')')
        db.execute(
            "INSERT INTO run VALUES (1, 1, 'unpruned', 'unpruned', 'null', 'null', 0, 0, 0, '{}', '{}', 'ok', NULL, "
            "NULL)"
        )
        db.execute("INSERT INTO answer VALUES (1, 0, 's0', 'a', 'yes', 1.0, '[9, 4]', NULL, 7, 0.5, NULL)")
    db.close()


def test_files_of_format_1_are_brought_up_to_date_and_keep_their_answers(tmp_path):
    path = tmp_path / "old.db"
    old_file(path)
    with Store(path, create=False) as store:
        (board,) = store.boards()
        assert (board.rows[0].accuracy, board.rows[0].timings) == (1, {})
        store.add_timing(1, Timing(8, 3, 0.1, 0.2, peak_bytes=5))
        assert store.timings(1) == {8: Timing(8, 3, 0.1, 0.2, peak_bytes=5)}
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA,)
    with Store(path) as store:  # nothing is left to do
        assert store.timings(1).keys() == {8}


def test_exports_of_format_1_can_be_imported(measured, tmp_path):
    _, path = measured
    results = read(path) | {"schema": 1}
    for bench in results["benches"]:
        for run in bench["runs"]:
            del run["timings"]
    with Store(tmp_path / "new.db") as store:
        assert store.merge(results) > 0
        assert not any(row.timings for row in store.boards()[0].rows)


def test_a_failed_upgrade_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "old.db"
    old_file(path)
    with monkeypatch.context() as patched:
        patched.setitem(
            __import__("foveate.eval_suites.results.store", fromlist=["x"])._STEPS,
            1,
            "CREATE TABLE timing (x); NONSENSE",
        )
        with pytest.raises(StoreError):
            Store(path)
    with Store(path) as store:
        assert store.boards()[0].rows[0].accuracy == 1
