"""References hold blocks, not maps, of many tokens; the bench command runs where there is no GPU."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from foveate.cuda import bench

ROOT = pathlib.Path(__file__).resolve().parents[2]
# a whole map would take 1 GiB
MANY = """
import resource, torch
from foveate import cuda
n = 16384
def run(n):
    x, q = torch.ones(1, n, 16), torch.ones(1, 1, n, 16)
    {call}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
run(64)
before = peak()
run(n)
print(peak() - before)
"""


@pytest.mark.parametrize(
    "call",
    [
        "cuda.received_attention(q, q)",
        "cuda.diverse_subset(x, 20)",
        "cuda.conditional_dpp(x, x[..., 0], 20)",
    ],
)
def test_references_stay_within_300_mb_at_16384_tokens(call):
    pytest.importorskip("resource", reason="needs a system that reports peak memory")
    done = subprocess.run([sys.executable, "-c", MANY.format(call=call)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300


def test_bench_times_every_operation_and_says_what_ran(tmp_path, capsys):
    out = tmp_path / "bench.json"
    bench.main(["--device", "cpu", "--sizes", "2x24", "--repeats", "1", "--no-compile", "--output", str(out)])
    result = json.loads(out.read_text())
    assert [row["operation"] for row in result["results"]] == [case.name for case in bench.CASES]
    assert "no kernel ran" in result["environment"]["measured"]
    for row in result["results"]:
        assert row["agreement"] > 0.999, row
        assert row["ours_ms"] > 0
        assert row["floor_ms"] > 0
    assert "torch references; no kernel ran, nothing here holds for a GPU" in " ".join(capsys.readouterr().out.split())


def test_bench_refuses_unknown_operations(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--operations", "sort"])
    assert "no operation is called sort; there are: received_attention" in capsys.readouterr().err
