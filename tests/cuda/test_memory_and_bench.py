"""References hold blocks, not maps, of many tokens; the bench command runs where there is no GPU."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from foveate.cli import main
from foveate.eval_suites.speed import kernels

ROOT = pathlib.Path(__file__).resolve().parents[2]
MOST = 300  # MiB beyond the inputs; a whole map would take 1 GiB. One token more than 16,384: blocks do not divide it
# every operation in a process of its own making: the kernel's peak of resident memory, which can be reset
PEAKS = """
import ctypes, json, torch
from foveate import cuda
torch.set_num_threads(1)
N, HALF = 16385, 8192
heads = torch.randn(1, 1, N, 32)
narrow, wide = torch.randn(1, N, 32), torch.randn(1, N, 1024).bfloat16()
order, last = torch.randperm(N)[None], torch.arange(N - 32, N)[None]
active = torch.randn(1, N, 1376).bfloat16().repeat(1, 1, 8)
calls = {
    "received_attention": lambda: cuda.received_attention(heads, heads),
    "received_attention, masked": lambda: cuda.received_attention(heads, heads, causal=True, window=4096),
    "given_attention": lambda: cuda.given_attention(heads, heads, first=1),
    "class_attention": lambda: cuda.class_attention(heads, heads),
    "rows_to_columns_attention": lambda: cuda.rows_to_columns_attention(heads[:, :, -32:], heads, row_positions=last),
    "similarity_energy": lambda: cuda.similarity_energy(narrow, 0.5),
    "best_match": lambda: cuda.best_match(narrow[:, ::2], narrow[:, 1::2]),
    "diverse_subset": lambda: cuda.diverse_subset(narrow, 20),
    "diverse_subset, wide": lambda: cuda.diverse_subset(wide, 2, torch.zeros(1, dtype=torch.int64)),
    "conditional_dpp": lambda: cuda.conditional_dpp(wide, torch.ones(1, N), 3),
    "transition_score": lambda: cuda.transition_score(wide, wide),
    "match_counts": lambda: cuda.match_counts(active, active[:, 0] > 0),
    "gather_tokens": lambda: cuda.gather_tokens(wide, order, marked=order > HALF, marker=wide[:, 0]),
    "merge_tokens": lambda: cuda.merge_tokens(wide, order[:, HALF:], order[:, :HALF], order[:, :HALF] // 2),
}
def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) >> 10
peaks = {}
for name, call in calls.items():
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    call()
    peaks[name] = status("VmHWM") - before
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """Operation -> MiB that its reference took for 16,384 tokens."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux, which reports and resets the peak of a process's memory")
    done = subprocess.run([sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_references_stay_within_300_mib_at_16384_tokens(peaks):
    asked = {name.partition(",")[0] for name in peaks}
    assert asked >= {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("foveate::")
    }
    assert {name: peak for name, peak in peaks.items() if peak > MOST} == {}


def bench(*argv: str) -> None:
    assert main(["speed", "kernels", *argv]) == 0


def test_bench_times_every_operation_and_says_what_ran(tmp_path, capsys):
    out = tmp_path / "bench.json"
    bench("--device", "cpu", "--sizes", "2x24", "--repeats", "1", "--no-compile", "--output", str(out))
    result = json.loads(out.read_text())
    assert [row["operation"] for row in result["results"]] == [case.name for case in kernels.CASES]
    assert "no kernel ran" in result["environment"]["measured"]
    for row in result["results"]:
        assert row["agreement"] > 0.999, row
        assert row["ours_ms"] > 0
        assert row["floor_ms"] > 0
    assert "torch references; no kernel ran, nothing here holds for a GPU" in " ".join(capsys.readouterr().out.split())


def test_bench_extends_an_earlier_run_of_the_same_kind(tmp_path, capsys):
    out = tmp_path / "bench.json"
    how = ["--device", "cpu", "--repeats", "1", "--no-compile", "--extend", "--output", str(out)]
    how += ["--operations", "gather"]
    bench(*how, "--sizes", "1x24", "2x24")
    before = json.loads(out.read_text())["results"]
    bench(*how, "--sizes", "2x24", "3x24")
    result = json.loads(out.read_text())
    assert [row["B"] for row in result["results"]] == [1, 2, 3]
    assert result["results"][0] == before[0]
    result["environment"]["device"] = "another"
    out.write_text(json.dumps(result))
    assert main(["speed", "kernels", *how, "--sizes", "1x24"]) == 2
    assert "was made with device another" in capsys.readouterr().err


def test_bench_refuses_unknown_operations(capsys):
    assert main(["speed", "kernels", "--operations", "sort"]) == 2
    assert "no operation is called sort; there are: received_attention" in capsys.readouterr().err


def test_bench_compares_selection_with_a_prefill(tmp_path, monkeypatch, capsys):
    small = kernels.Prefill(patches=36, text=4, tower=(2, 32, 2, 64), decoder=(3, 48, 3, 96))
    monkeypatch.setattr(kernels, "Prefill", lambda: small)
    out = tmp_path / "bench.json"
    how = ["--device", "cpu", "--sizes", "1x24", "--repeats", "1", "--operations", "match_counts"]
    bench(*how, "--prefill", "--output", str(out))  # with torch.compile
    result = json.loads(out.read_text())
    assert result["prefill_shares"]["prefill_ms"] > 0
    assert result["prefill_shares"]["diverse_subset"] > 0
    assert result["results"][0]["compile_ms"] > 0
    assert "diverse_subset: " in capsys.readouterr().out
