"""Every kernel that the launchers can ask for compiles for every supported architecture, without a GPU."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch

from foveate.cuda import (
    best_match,
    class_attention,
    conditional_dpp,
    dispatch,
    diverse_subset,
    gather_tokens,
    given_attention,
    launch,
    match_counts,
    merge_tokens,
    received_attention,
    rows_to_columns_attention,
    selection,
    similarity_energy,
    transition_score,
    warmup,
)

ARCHITECTURES = (80, 90, 100, 120)
ALL_INSTANCES = 90  # the architecture for which all of them are compiled
REGISTERS = 65536  # of a multiprocessor, all architectures
SHARED = 99 << 10  # bytes that a block may ask for on sm_120, the least of them


def calls() -> None:
    """All operations, so that every kernel is launched once in the instances that matter most."""
    for dtype, d, causal in (
        (torch.bfloat16, 64, False),
        (torch.bfloat16, 128, True),
        (torch.float16, 64, False),  # the same code as bfloat16 but for one instruction
        (torch.float32, 128, True),
    ):
        q, k = torch.zeros(2, 1, 4, 8, d, dtype=dtype)
        received_attention(q, k, causal=causal)
        class_attention(q, k)
        rows_to_columns_attention(q, k[:, :1], row_positions=torch.arange(8)[None])  # 32 rows share a key head
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(1, 8, 64, dtype=dtype)
        diverse_subset(x, 2)
        merge_tokens(x, *torch.zeros(3, 1, 2, dtype=torch.int64))
        transition_score(x, x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selection, "_GRAM_ELEMENTS", {"cpu": 0})
            diverse_subset(x, 2)
            conditional_dpp(x, torch.ones(1, 8), 2)
        match_counts(x, x[:, 0] > 0)
    x = torch.zeros(1, 8, 64, dtype=torch.bfloat16)
    similarity_energy(x, 0.5)
    best_match(x, x)
    conditional_dpp(x, torch.ones(1, 8), 2)
    for rest in ((16,), (2,), (1,)):
        gather_tokens(torch.zeros(1, 8, *rest, dtype=torch.bfloat16), torch.zeros(1, 4, dtype=torch.int64))
    match_counts(torch.zeros(1, 8, 16, dtype=torch.bool), torch.zeros(1, 16, dtype=torch.bool))


def many_tokens() -> None:
    """All operations on 16,384 tokens of 8,192 values, which nobody reads."""
    n, half = 16384, 8192
    wide, q = torch.empty(1, n, 8192, dtype=torch.bfloat16), torch.empty(1, 2, n, 128, dtype=torch.bfloat16)
    order, last = torch.zeros(1, n, dtype=torch.int64), torch.zeros(1, 64, dtype=torch.int64)
    received_attention(q, q, causal=True)
    given_attention(q, q, first=1)
    class_attention(q, q)
    rows_to_columns_attention(q[:, :, :64], q, row_positions=last)
    rows_to_columns_attention(q[:, :, :8], q, row_positions=last[:, :8])
    diverse_subset(wide, 100, last[0, :1])
    diverse_subset(wide, 2)
    conditional_dpp(wide, torch.ones(1, n), n)
    similarity_energy(wide, 0.5)
    best_match(wide[:, ::2], wide[:, 1::2])
    gather_tokens(wide, order)
    merge_tokens(wide, order[:, half:], order[:, :half], order[:, :half])
    transition_score(wide, wide)
    match_counts(wide, wide[:, 0] > 0)


def asked_for(run: Callable[[], None]) -> dict[str, dict[str, tuple[int, int]]]:
    """File -> kernel instance -> (threads, bytes of dynamic shared memory), as the launchers ask."""
    files: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)

    def record(file, kernel, grid, threads, values, shared, device):
        files[file][kernel] = threads, max(shared, files[file].get(kernel, (0, 0))[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_execute", record)
        patch.setattr(dispatch, "_has_kernels", lambda device: True)
        patch.setenv("FOVEATE_KERNELS", "cupy")
        run()
    return files


@pytest.fixture(scope="module")
def wanted() -> dict[str, dict[str, tuple[int, int]]]:
    return asked_for(calls)


def test_warmup_loads_every_kernel(wanted):
    """No operation compiles anything afterwards, which a CUDA-graph capture would not survive."""
    loaded = asked_for(
        lambda: warmup("cpu", dtypes=(torch.bfloat16, torch.float16, torch.float32), head_dims=(64, 128))
    )
    for file, instances in wanted.items():
        assert not set(instances) - set(loaded[file])


def test_every_operation_has_a_kernel_for_16384_tokens():
    assert set(asked_for(many_tokens)) == {path.name for path in launch.FOLDER.glob("*.cu")}


def test_every_budget_fits_where_similarities_are_held():
    """Up to all tokens of the largest image whose Gram matrix a GPU would hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(selection._GRAM_ELEMENTS, "cpu", selection._GRAM_ELEMENTS["cuda"])
        most = selection.most_with_gram(torch.device("cpu"))
        files = asked_for(lambda: conditional_dpp(torch.empty(1, most, 8), torch.ones(1, most), most))
    assert "conditional_dpp" in files["greedy.cu"]


def compile_report(source: str, names: list[str], architecture: int) -> dict[str, str]:
    """Kernel instance -> what ptxas says about it."""
    nvrtc = pytest.importorskip("cupy.cuda", reason="needs CuPy (extras cuda12, cuda13) for NVRTC").nvrtc
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="needs cuda-pathfinder, which comes with CuPy")
    headers = pathfinder.find_nvidia_header_directory("cudart")
    if headers is None:
        pytest.skip("needs the CUDA runtime's headers, which come with torch for CUDA")
    if architecture not in nvrtc.getSupportedArchs():
        pytest.skip(f"NVRTC {'.'.join(map(str, nvrtc.getVersion()))} does not know sm_{architecture}")
    program = nvrtc.createProgram(source, "kernels.cu", (), ())
    for name in names:
        nvrtc.addNameExpression(program, name)
    # as RawModule compiles, and a report
    options = ("-std=c++17", "-ftz=true", f"-arch=sm_{architecture}", "--device-as-default-execution-space")
    options = (*options, f"-I{headers}", "--ptxas-options=-v")
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    log = nvrtc.getProgramLog(program)
    reports = re.split(r"Compiling entry function '(\w+)'", log)[1:]
    by_symbol = dict(zip(reports[::2], reports[1::2]))
    return {name: by_symbol[nvrtc.getLoweredName(program, name)] for name in names}


def number(pattern: str, report: str) -> int:
    found = re.search(pattern, report)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills_and_fit_a_multiprocessor(architecture, wanted):
    assert set(wanted) == {path.name for path in launch.FOLDER.glob("*.cu")}  # every file is launched from somewhere
    for file, instances in wanted.items():
        if architecture != ALL_INSTANCES:  # of each kernel the last instance of each type, for time
            instances = {(name.split("<")[0], name.split(",")[0]): (name, size) for name, size in instances.items()}
            instances = dict(instances.values())
        reports = compile_report(launch.source(file), list(instances), architecture)
        for name, (threads, shared) in instances.items():
            report = reports[name]
            assert "registers" in report, report
            assert number(r"(\d+) bytes spill stores", report) == 0, f"{name}: {report}"
            assert number(r"(\d+) bytes spill loads", report) == 0, f"{name}: {report}"
            assert number(r"Used (\d+) registers", report) * threads <= REGISTERS, f"{name}: {report}"
            assert shared <= launch.MOST_SHARED, name  # which the launcher asks permission for, whatever a launch takes
            assert number(r"(\d+) bytes smem", report) + launch.MOST_SHARED <= SHARED, f"{name}: {report}"


def test_sources_hold_their_headers():
    for path in launch.FOLDER.glob("*.cu"):
        assert '#include "' not in launch.source(path.name)
