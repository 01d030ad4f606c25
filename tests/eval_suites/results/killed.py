"""Run a bench that is killed again and again, and compare it with one that is not; prints what happened as JSON.

    python -m tests.eval_suites.results.killed MODEL KILLS [stub]

A process of its own, because children are forked from it: each must start within milliseconds, with the model loaded.
``stub`` answers by rule instead of by the model.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator

import torch

from foveate.eval_suites.results.rows import Answer
from foveate.eval_suites.results.store import Store
from foveate.eval_suites.running import models, runner
from foveate.eval_suites.running.meter import Meter, MethodRun

LIMIT, BATCH, BUDGET = 12, 2, 0.25


class Stub(Meter):
    """Answers by rule, a batch in five milliseconds."""

    def measure(self, run: MethodRun, firsts: Iterable[int]) -> Iterator[tuple[list[Answer], dict[str, str]]]:
        for first in firsts:
            time.sleep(0.005)
            answers = []
            for number in self.numbers(first):
                text = f"{run.label} {run.keep} {run.seed} {number}"
                score = float(sum(text.encode()) % 2)
                answers.append(
                    Answer(number, str(number), self.samples[number].task, text, score, (9, 4), (9, 4), 4, 7, 0.001)
                )
            yield answers, {"llm_input": "keep"}


def bench(loaded: models.Loaded, path: pathlib.Path) -> None:
    runner.bench(
        loaded, "shapes", "divprune", BUDGET, LIMIT, batch_size=BATCH, seeds=2, out=path, positions="keep",
        timing=False, progress=False
    )  # fmt: skip


def child(work: Callable[[], None]) -> int:
    """The process that does ``work``."""
    number = os.fork()
    if number:
        return number
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def timed(work: Callable[[], None]) -> float:
    """Seconds that a child takes for ``work``."""
    began = time.perf_counter()
    os.waitpid(child(work), 0)
    return time.perf_counter() - began


def wait_for(path: pathlib.Path, answers: int, number: int) -> None:
    """Until the file holds so many answers, or process ``number`` has ended."""
    while os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        with contextlib.suppress(sqlite3.OperationalError), sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
            if db.execute("SELECT count(*) FROM answer").fetchone()[0] >= answers:
                return
        time.sleep(0.002)


def counted(path: pathlib.Path) -> list[tuple[int, int]]:
    """Run and number of every answer; the file must be sound, and batches whole."""
    if not path.exists():
        return []
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'answer'").fetchall():
            return []
        found = db.execute("SELECT run, number FROM answer").fetchall()
    assert all((run, number ^ 1) in found for run, number in found)
    return found


def told(path: pathlib.Path) -> list:
    """The table and all answers, without their times."""
    with Store(path, create=False) as store:
        results = store.as_json()
        (board,) = store.boards()
    rows = [row.as_json() | {"seconds_per_sample": None, "speedup": None, "answers": row.answers} for row in board.rows]
    answers = [answer | {"seconds": None} for run in results["benches"][0]["runs"] for answer in run["answers"]]
    return [rows, answers]


def main(model: str, kills: int, stub: bool) -> None:
    loaded = models.load(model, device="cpu")
    if stub:
        runner.Meter = Stub
    rng, partial = random.Random(0), []
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = pathlib.Path(folder) / "whole.db", pathlib.Path(folder) / "killed.db"
        bench(loaded, whole)
        start = timed(lambda: bench(loaded, whole))  # finds all done
        before: list[tuple[int, int]] = []
        for _ in range(kills):
            number = child(lambda: bench(loaded, killed))
            if rng.random() < 0.3:  # before anything is written, maybe
                time.sleep(rng.uniform(0, start))
            else:  # in the middle of the next batches, however fast this machine is today
                wait_for(killed, len(before) + rng.randint(1, 3) * BATCH, number)
                time.sleep(rng.uniform(0, 0.01))
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
            now = counted(killed)
            assert set(before) <= set(now), "an answer is gone"
            before = now
            partial.append(len(now))
        _, status = os.waitpid(child(lambda: bench(loaded, killed)), 0)
        same = told(whole) == told(killed)
        print(json.dumps({"status": status, "same": same, "answers": len(counted(whole)), "partial": partial}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["stub"])
