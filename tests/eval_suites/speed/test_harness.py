"""What all parts of `foveate speed` share: turns, ratios within a round, checks of numbers, two command names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foveate.errors import ParameterError
from foveate.eval_suites.speed import PARTS, decoder, harness

ROOT = Path(__file__).parents[3]


def test_contenders_take_turns_and_the_first_of_a_round_changes() -> None:
    """Statement: a warm-up round that does not count, then every contender once a round, each of them first in turn."""
    called: list[tuple[int, str]] = []

    def contender(name: str) -> object:
        return lambda turn: called.append((turn, name)) or len(called)

    found = harness.in_turns({name: contender(name) for name in "abc"}, rounds=3)
    assert [turn for turn, _ in called] == [-1, -1, -1, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert ["".join(name for turn, name in called if turn == wanted) for wanted in (0, 1, 2)] == ["abc", "bca", "cab"]
    assert {name: len(results) for name, results in found.items()} == {"a": 3, "b": 3, "c": 3}
    assert found["a"] == [4, 9, 11]  # calls 1 to 3 warmed up


def test_a_slow_contender_leaves_after_two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statement: who takes longer than allowed has two counted rounds all the same, the others have all of them."""
    time = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: time[0])

    def takes(seconds: float) -> object:
        def run(turn: int) -> float:
            time[0] += seconds
            return seconds

        return run

    found = harness.in_turns({"slow": takes(9.0), "fast": takes(0.1)}, rounds=5, seconds=5.0)
    assert {name: len(results) for name, results in found.items()} == {"slow": 2, "fast": 5}


def test_ratios_and_their_spread_are_within_rounds() -> None:
    assert harness.ratios([2.0, 8.0, 3.0], [1.0, 2.0]) == [2.0, 4.0]
    assert harness.spread([2.0], ".2f") == "2.00"
    assert harness.spread([1.0, 2.0, 3.0], ".1f") == "2.0 (1.0 … 3.0)"


def test_numbers_are_checked() -> None:
    assert harness.numbers("--users", "1,8") == [1, 8]
    with pytest.raises(ParameterError, match="--users 'one': give numbers"):
        harness.numbers("--users", "one")
    with pytest.raises(ParameterError, match="rounds=0: give at least 1"):
        harness.at_least(1, {"batch": 3, "rounds": 0})


def test_the_decoder_is_timed_beside_random_twins(tmp_path: Path) -> None:
    """Statement: `python -m foveate.eval_suites.speed` is the command, and writes times, tokens and the MLPs' share."""
    out, rounds = tmp_path / "decoder.json", 2
    small = ["--geometry", "6x64", "--visual", "64", "--text", "8", "--new", "3", "--repeats", str(rounds)]
    command = [sys.executable, "-m", "foveate.eval_suites.speed", "decoder", *small, "--json", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "random like corematching" in done.stdout
    assert "MLPs take" in done.stdout
    result = json.loads(out.read_text())
    assert result["environment"]["geometry"]["layers"] == 6
    whole, *rows = [decoder.DecoderTimes(**row) for row in result["rows"]]
    assert [row.label for row in rows[::2]] == ["transprune", "corematching"]
    assert 0 < whole.mlp_prefill < 1
    assert 0 < whole.mlp_decode < 1
    for method, twin in zip(rows[::2], rows[1::2], strict=True):
        assert twin.label == f"random like {method.label}"
        assert (twin.tokens_per_layer, twin.cached_per_layer) == (method.tokens_per_layer, method.cached_per_layer)
        assert min(method.tokens_per_layer) < whole.tokens_per_layer[-1] == 64
    for row in (whole, *rows):
        assert len(row.prefill) == len(row.first) == len(row.decode) == rounds
        assert min(*row.prefill, *row.first, *row.decode) > 0


def test_every_part_has_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    from foveate.cli import main

    with pytest.raises(SystemExit):
        main(["speed", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(part in shown and what[:40] in shown for part, what in PARTS.items())
