"""Processes share a bench by its batches, and the table is that of one process."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from foveate.errors import ParameterError
from foveate.eval_suites.results.store import Store, read
from foveate.eval_suites.running import runner
from foveate.eval_suites.running.distributed import World, world

ROOT = pathlib.Path(__file__).resolve().parents[3]
BENCH = [
    "bench",
    "--suite",
    "shapes",
    "--pruners",
    "fastv",
    "--keep",
    "0.25",
    "--limit",
    "8",
    "--seeds",
    "2",
    "--batch-size",
    "2",
    "--device",
    "cpu",
]


def launch(launcher: list[str], *argv: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, "-m", "foveate.cli", *BENCH, *argv]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def alone(checkpoint: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of one process."""
    board = runner.bench(
        str(checkpoint), "shapes", "fastv", 0.25, 8, seeds=2, batch_size=2, device="cpu", progress=False
    )  # fmt: skip
    return timeless(board.as_json()["rows"])


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        row | {"seconds_per_sample": None, "speedup": None, "timings": len(row["timings"])}
        for row in json.loads(json.dumps(rows))
    ]


TWO = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_two_processes_make_the_table_of_one(checkpoint, alone, tmp_path):
    path = tmp_path / "two.db"
    done = launch(TWO, "--model", str(checkpoint), "--out", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" on shapes, 8") == 1, "both processes printed"
    with Store(path, create=False) as store:
        (board,) = store.boards()
    assert timeless(board.as_json()["rows"]) == alone
    answers = [answer for run in read(path)["benches"][0]["runs"] for answer in run["answers"]]
    assert len(answers) == 8 * (2 + 2 + 3 + 1)


def test_processes_that_keep_nothing_on_disk_gather_all_answers(checkpoint, alone, tmp_path):
    """As on several machines, whose files are apart."""
    path = tmp_path / "rows.json"
    done = launch(TWO, "--model", str(checkpoint), "--json", str(path))
    assert done.returncode == 0, done.stderr
    board = json.loads(path.read_text())
    assert timeless(board["rows"]) == alone
    assert board["environment"]["processes"] == 2


def test_accelerate_that_starts_one_process_for_two_is_refused(checkpoint):
    pytest.importorskip("accelerate")
    done = launch(
        ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
         "--mixed_precision", "no",
         "--dynamo_backend", "no"],
        "--model", str(checkpoint),
    )  # fmt: skip
    assert done.returncode != 0
    assert "asked for several processes but started only this one" in done.stderr


def test_the_share_of_a_process_comes_from_the_launcher():
    assert world({}) == World()
    assert world({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "GROUP_RANK": "1"}) == World(3, 4, 1, 1)
    assert world({"ACCELERATE_MIXED_PRECISION": "no"}) == World()  # one process, as asked for
    with pytest.raises(ParameterError, match=r"torch\.distributed\.run"):
        world({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"})


def test_every_batch_belongs_to_one_process_and_every_machine_has_its_file():
    shares = [[b for b in range(11) if World(rank, 3).mine(b)] for rank in range(3)]
    assert sorted(b for share in shares for b in share) == list(range(11))
    assert World(0, 2).file("r.db") == "r.db"
    assert World(1, 2, 0, node=1).file("r.db") == "r.db.node1"
