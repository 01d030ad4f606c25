"""`foveate speed vit`: factors beside the ceiling, and result files that grow measurement by measurement."""

from __future__ import annotations

import json
import time

import pytest
import torch

from foveate.cli import main
from foveate.eval_suites.speed.harness import now
from foveate.eval_suites.speed.vit import TowerSpeed, table


@pytest.mark.parametrize(("threads", "its"), [(1, "process_time"), (2, "perf_counter")])
def test_only_one_thread_is_timed_by_its_own_clock(threads, its, monkeypatch):
    """Statement: the process's time, a sum over threads, is read with one thread only; others on the wall."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(time, "process_time", lambda: "process_time")
    monkeypatch.setattr(time, "perf_counter", lambda: "perf_counter")
    assert now(torch.device("cpu")) == its


def test_measurements_gather_in_one_file(tmp_path, capsys):
    """Statement: another batch size is added to a result file, the same one again replaces the older lines."""
    pytest.importorskip("timm")
    out = tmp_path / "speed.json"

    def measure(batch: str, method: str, *options: str) -> list[list[TowerSpeed]]:
        command = ["speed", "vit", "--model", "vit_tiny_patch16_224", "--batch", batch, "--method", method]
        assert main([*command, "--rounds", "1", "--out", str(out), *options]) == 0
        return [[TowerSpeed(**line) for line in one["lines"]] for one in json.loads(out.read_text())]

    (first,) = measure("1", "tome(r=13),pitome(ratio=0.9)")
    assert [(line.method, line.rows) for line in first] == [
        ("unmodified", 197),
        ("tome(r=13)", 41),
        ("pitome(ratio=0.9)", 60),
    ]
    assert all(line.factor > 0 and line.ceiling > 0 and line.of_ceiling > 0 for line in first)
    assert table(first) in capsys.readouterr().out
    second = measure("2", "tome(r=13)")
    assert [len(lines) for lines in second] == [3, 2]
    assert second[0] == first
    third = measure("1", "tome(r=13)", "--processes", "2")
    assert [[(line.batch, line.method) for line in lines] for lines in third] == [
        [(1, "pitome(ratio=0.9)")],
        [(2, "unmodified"), (2, "tome(r=13)")],
        [(1, "unmodified"), (1, "tome(r=13)")],
    ]
    written = out.with_suffix(".md").read_text()
    assert all(table(lines) in written for lines in third)
    assert "; 1 rounds.\n" in written
    assert "; 2 rounds in 2 processes.\n" in written


@pytest.mark.parametrize("option", ["--rounds", "--processes"])
def test_nothing_is_measured_in_no_rounds(option, capsys):
    """Statement: without a round or a process there is an error, and no table."""
    assert main(["speed", "vit", "--model", "vit_tiny_patch16_224", option, "0"]) == 2
    said = capsys.readouterr()
    assert f"{option}=0: give at least 1" in said.err
    assert not said.out
