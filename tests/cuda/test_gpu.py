"""On a GPU: kernels as CuPy loads them, against the references on the CPU; streams, graphs, bits."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate import cuda
from foveate.cuda import launch
from tests.cuda.test_attention import MASKS, TYPES, attention, log_sum_exp, options
from tests.cuda.test_tokens import tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def _last_rows(count: int) -> Callable[[Tensor, Tensor], Tensor]:
    def call(q: Tensor, k: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2] - count, q.shape[2], device=q.device).expand(len(q), -1)
        return cuda.rows_to_columns_attention(q[:, :, -count:], k, row_positions=positions)

    return call


def _gather(x: Tensor) -> Tensor:
    index = torch.arange(-1, x.shape[1], 3, device=x.device).expand(len(x), -1)
    return cuda.gather_tokens(x, index, marked=index % 2 == 0, marker=x[:, : index.shape[1]])


def _relevance(x: Tensor) -> Tensor:
    return x[..., 0].abs() + 0.1


def _with_subnormals(x: Tensor) -> Tensor:
    """Every seventh value so small that arithmetic which flushes such numbers takes it for zero."""
    x[..., ::7] = x[..., ::7].sign() * torch.finfo(x.dtype).smallest_normal / 4
    return x


def _merge(x: Tensor) -> Tensor:
    merged, kept = (torch.arange(start, x.shape[1], 2, device=x.device).expand(len(x), -1) for start in (1, 0))
    return cuda.merge_tokens(x, kept, merged, merged % 7)[0]


ROOT = pathlib.Path(__file__).resolve().parents[2]
CALLS: dict[str, Callable[[str], Any]] = {
    "received": lambda t: (cuda.received_attention, attention(577, 64, TYPES[t], shared=2)),
    "received, log_sum_exp given": lambda t: (
        lambda q, k, lse: cuda.received_attention(q, k, log_sum_exp=lse),
        (*attention(577, 64, TYPES[t]), log_sum_exp(*attention(577, 64, TYPES[t]))),
    ),
    "given": lambda t: (lambda q, k: cuda.given_attention(q, k, first=1), attention(577, 72, TYPES[t])),
    "class": lambda t: (cuda.class_attention, attention(577, 128, TYPES[t])),
    "diverse": lambda t: (lambda x: cuda.diverse_subset(x, 60), (tokens(577, 1024, t),)),
    "dpp": lambda t: (lambda x: cuda.conditional_dpp(x, _relevance(x), 60), (tokens(577, 1024, t),)),
    "energy": lambda t: (lambda x: cuda.similarity_energy(x, 0.5), (tokens(577, 1024, t),)),
    "match": lambda t: (lambda x: cuda.best_match(x[:, ::2], x[:, 1::2])[0], (tokens(577, 1024, t),)),
    "match, indices": lambda t: (lambda x: cuda.best_match(x[:, ::2], x[:, 1::2])[1], (tokens(577, 1024, t),)),
    "few rows": lambda t: (_last_rows(32), attention(577, 64, TYPES[t], shared=2)),
    "many rows": lambda t: (_last_rows(100), attention(577, 64, TYPES[t], shared=2)),
    "matches": lambda t: (lambda x: cuda.match_counts(x, x[:, 0] > 0), (_with_subnormals(tokens(577, 1000, t)),)),
    "matches, bool": lambda t: (lambda x: cuda.match_counts(x > 0, x[:, 0] > 0), (tokens(577, 1000, t),)),
    "gather": lambda t: (_gather, (tokens(577, 1024, t),)),
    "gather, odd rows": lambda t: (lambda x: _gather(x[..., 1:]), (tokens(577, 100, t),)),
    "merge": lambda t: (_merge, (tokens(577, 1024, t),)),
    "one token": lambda t: (lambda x: cuda.diverse_subset(x, 1), (tokens(1, 8, t),)),
    "widest": lambda t: (lambda x: cuda.similarity_energy(x, 0.5), (tokens(70, 8192, t),)),
    "another layout": lambda t: (lambda x: cuda.similarity_energy(x.mT, 0.5), (tokens(100, 577, t),)),
    "transition": lambda t: (lambda x: cuda.transition_score(x, x.flip(1))[0], (tokens(577, 1024, t),)),
    **{
        f"received, {name}": lambda t, name=name: (
            lambda q, k: cuda.received_attention(
                q, k, **{key: v.to(q.device) if isinstance(v, Tensor) else v for key, v in options(name, 577).items()}
            ),
            attention(577, 64, TYPES[t]),
        )
        for name in MASKS
    },
}


# Choices hang on the last bits of float32 where two tokens are as good but for these. So what is chosen on a GPU is not
# held against another choice, but against the best one: by how much does it fall short, at its turn, in float64?


def _cosines(x: Tensor) -> Tensor:
    unit = normalize(x.double(), dim=-1)
    return unit @ unit.mT


def _diverse_shortfall(x: Tensor, picks: Tensor) -> float:
    cosines, items, worst = _cosines(x), torch.arange(len(x), device=x.device), 0.0
    others = cosines.clone()
    others.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    score = others.amax(dim=-1)
    for turn, pick in enumerate(picks.T):
        worst = max(worst, (score[items, pick] - score.amin(dim=1)).max().item())
        score = torch.maximum(score, cosines[items, pick]) if turn else cosines[items, pick]
        score[items, pick] = torch.inf  # picked again, it falls infinitely short
    return worst


def _dpp_shortfall(x: Tensor, picks: Tensor) -> float:
    """Relative to the best gain."""
    relevance, items, worst = _relevance(x).double(), torch.arange(len(x), device=x.device), []
    kernel = relevance[:, :, None] * _cosines(x) * relevance[:, None]
    gain, factors = kernel.diagonal(dim1=1, dim2=2).clone(), []
    for pick in picks.T:
        left, best = gain[items, pick], gain.amax(dim=1)
        worst.append((1 - left / best).amax())
        factor = kernel[items, pick] - sum(f[items, pick, None] * f for f in factors)
        factors.append(factor / left.sqrt()[:, None])
        gain = gain - factors[-1].square()
        gain[items, pick] = -torch.inf
    return torch.stack(worst).amax().item()  # NaN if one is


def _match_shortfall(x: Tensor, index: Tensor) -> float:
    cosines = _cosines(x)[:, ::2, 1::2]
    return (cosines.amax(dim=-1) - cosines.gather(-1, index[..., None]).squeeze(-1)).max().item()


SHORTFALLS = {"diverse": _diverse_shortfall, "dpp": _dpp_shortfall, "match, indices": _match_shortfall}


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No test may pass on the reference."""
    monkeypatch.setenv("FOVEATE_KERNELS", "cupy")
    return monkeypatch


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", CALLS)
def test_kernels_equal_the_references(name, dtype, forced):
    call, args = CALLS[name](dtype)
    on_gpu = [arg.cuda() for arg in args]
    got = call(*on_gpu)
    assert torch.equal(got, call(*on_gpu))  # the same bits again
    if name in SHORTFALLS:
        assert SHORTFALLS[name](*args, got.cpu()) < 1e-5
        return
    forced.setenv("FOVEATE_KERNELS", "torch")
    expected = call(*args)
    if got.is_floating_point():
        rounding = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(got.dtype, 2e-5)  # of a result in x's own dtype
        torch.testing.assert_close(got.cpu(), expected, rtol=rounding, atol=1e-6)
    else:
        assert torch.equal(got.cpu(), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_kernels_run_where_the_tensors_are():
    x = torch.randn(2, 97, 64)
    assert torch.cuda.current_device() == 0
    first, second = (cuda.similarity_energy(x.to(f"cuda:{i}"), 0.5) for i in range(2))
    assert second.device.index == 1
    assert torch.equal(first.cpu(), second.cpu())


def test_kernels_run_on_the_current_stream():
    x = torch.zeros(1, 2880, 1024, device="cuda")
    fresh = torch.randn_like(x)
    expected = cuda.similarity_energy(fresh, 0.5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(fresh)
        got = cuda.similarity_energy(x, 0.5)  # on another stream it would see zeros
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", [name for name in CALLS if "segments" not in name])  # which the calls move to the GPU
def test_nothing_waits_for_the_gpu(name):
    call, args = CALLS[name]("bfloat16")
    on_gpu = [arg.cuda() for arg in args]
    call(*on_gpu)  # loads
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_marker_that_is_a_number_is_not_copied_from_the_host():
    x, index = torch.randn(1, 9, 8, device="cuda"), torch.tensor([[0, -1]], device="cuda")
    cuda.gather_tokens(x, index, marked=index < 0, marker=2.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = cuda.gather_tokens(x, index, marked=index < 0, marker=2.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (got[0, 1] == 2.5).all()


def test_kernels_come_from_the_disk_in_another_process(tmp_path):
    """The first process fills CuPy's cache; the second writes nothing there, as it would after a compilation."""
    program = "import torch; from foveate import cuda; cuda.similarity_energy(torch.ones(1, 9, 8, device='cuda'), 0.5)"
    environment = {**os.environ, "CUPY_CACHE_DIR": str(tmp_path), "FOVEATE_KERNELS": "cupy"}
    written = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        written.append({path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()})
    assert len(written[0]) >= 2  # inverse norms and similarities
    assert written[0] == written[1]


@pytest.mark.parametrize("name", [name for name in CALLS if "segments" not in name])
def test_a_captured_graph_repeats_the_kernels(name):
    call, args = CALLS[name]("bfloat16")
    still = [arg.cuda() for arg in args]
    call(*still)  # loads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*still)
    for arg in still:
        arg.copy_(arg.flip(-2))
    graph.replay()
    assert torch.equal(captured, call(*still))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["received", "diverse", "dpp", "merge"])
def test_a_compiled_call_launches_the_kernels(name, mode):
    """With the operator in one graph, and in the CUDA graphs that torch.compile makes itself."""
    pytest.importorskip("triton", reason="needs Triton, which torch.compile calls on a GPU")
    call, args = CALLS[name]("bfloat16")
    on_gpu = [arg.cuda() for arg in args]
    expected = call(*on_gpu)
    compiled = torch.compile(call, fullgraph=True, mode=mode)
    launch.launched.clear()
    for _ in range(3):  # the first compiles, the second records, the third replays
        got = compiled(*on_gpu).clone()
        assert torch.equal(got, expected)
    assert launch.launched


def test_warmup_loads_what_a_capture_needs():
    cuda.warmup(dtypes=[torch.float16], head_dims=[96])
    q, k = (x.cuda() for x in attention(65, 96, torch.float16))
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        cuda.received_attention(q, k)


@pytest.mark.parametrize("n", [12000, 16384])
@pytest.mark.parametrize("name", ["diverse", "dpp"])
def test_many_tokens_are_picked_without_a_gram_matrix(name, n):
    x = torch.randn(1, n, 256, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    picks = CALLS[name]("float32")[0](x)
    assert torch.cuda.max_memory_allocated() - before < 64 << 20
    assert SHORTFALLS[name](x, picks) < 1e-5
