"""`foveate speed serving` with engines: both answer in every round, and only the pruned one takes shorter prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.engines import ROOT

ENGINE = {"max_model_len": 1024, "enforce_eager": True, "block_size": 32, "dtype": "float32"}


@pytest.mark.timeout(600)
def test_both_engines_answer_by_turns(tmp_path: Path) -> None:
    out = tmp_path / "serving.json"
    command = [
        sys.executable,
        "-m",
        "foveate",
        "speed",
        "serving",
        "--users",
        "1,2",
        "--requests",
        "2",
        "--rounds",
        "2",
    ]
    command += ["--new", "2", "--engine", json.dumps(ENGINE), "--json", str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "Traceback" not in run.stderr
    rows = json.loads(out.read_text())["rows"]
    turns = [(row["engine"], row["users"], row["turn"]) for row in rows]
    assert turns == [
        *(("stock", 1, 0), ("pruned", 1, 0), ("stock", 2, 0), ("pruned", 2, 0)),
        *(("pruned", 1, 1), ("stock", 1, 1), ("pruned", 2, 1), ("stock", 2, 1)),
    ]
    shorter = {row["engine"]: row["prompt"] for row in rows}
    assert shorter["stock"] - shorter["pruned"] == 144 - 36
    assert all(row["per_second"] > 0 and 0 < row["first"] <= row["first_90"] for row in rows)
    assert "over stock" in run.stdout
