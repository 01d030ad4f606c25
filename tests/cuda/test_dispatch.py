"""Which body of an operation runs where, and what torch.compile sees of it."""

from __future__ import annotations

import ast
import contextlib
import gc
import multiprocessing
import os
import shutil
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import foveate.cuda
from foveate.cuda import dispatch, launch, received_attention, similarity_energy
from foveate.errors import ParameterError


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 2, 9, 8), torch.randn(2, 1, 9, 8)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors count as tensors on a GPU; launching them is the test's business."""
    monkeypatch.setattr(dispatch, "_has_kernels", lambda device: True)
    monkeypatch.setattr(dispatch, "_reported", set())


def test_an_unknown_mode_is_refused(monkeypatch, pair):
    monkeypatch.setenv("FOVEATE_KERNELS", "cuda")
    with pytest.raises(ParameterError, match="FOVEATE_KERNELS='cuda' is unknown; use one of auto, cupy, torch"):
        received_attention(*pair)


def test_forced_kernels_need_a_gpu(monkeypatch, pair):
    monkeypatch.setenv("FOVEATE_KERNELS", "cupy")
    with pytest.raises(ParameterError, match="the tensors are on cpu, where no CuPy kernel runs"):
        received_attention(*pair)


def test_torch_mode_never_launches(monkeypatch, pair, gpu):
    def fail(*_):
        raise AssertionError("launched")

    monkeypatch.setattr(launch, "_execute", fail)
    with pytest.raises(AssertionError, match="launched"):
        received_attention(*pair)
    monkeypatch.setenv("FOVEATE_KERNELS", "torch")
    assert received_attention(*pair).shape == (2, 9)


def test_a_kernel_that_cannot_be_had_is_replaced_with_one_warning(monkeypatch, pair, gpu):
    expected = received_attention(*(x.clone().requires_grad_() for x in pair)).detach()  # gradients need the reference

    def fail(*_):
        raise dispatch.KernelUnavailable("no compiler today")

    monkeypatch.setattr(launch, "_execute", fail)
    with pytest.warns(
        UserWarning, match="foveate runs on plain torch, slower, with the same results: no compiler today"
    ):
        assert torch.equal(received_attention(*pair), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(received_attention(*pair), expected)
    monkeypatch.setenv("FOVEATE_KERNELS", "cupy")
    with pytest.raises(ParameterError, match="received_attention has no kernel here: no compiler today"):
        received_attention(*pair)


@pytest.mark.parametrize("installed", [False, True])
def test_without_cupy_or_driver_there_is_no_kernel(installed, monkeypatch):
    if installed:
        pytest.importorskip("cupy")
        if torch.cuda.is_available():
            pytest.skip("needs a machine without a GPU")
    else:
        monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launch._function.cache_clear()
    reason = launch._function("attention.cu", "row_lse<float, 64, false>", 0)
    launch._function.cache_clear()
    assert isinstance(reason, str)
    assert ("does not load" if installed else "CuPy is not installed") in reason


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    """The launcher up to CuPy, without a driver."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    launch._function.cache_clear()
    yield
    launch._function.cache_clear()


class Broken:
    """CuPy whose compiler fails."""

    compiled = 0

    def RawModule(self, **_):
        Broken.compiled += 1
        raise RuntimeError(f"nvrtc: error number {Broken.compiled}")


@pytest.mark.parametrize("cupy", [None, Broken()], ids=["missing", "broken"])
def test_kernels_that_do_not_load_are_missed_once(cupy, monkeypatch, pair, fake_device):
    """One warning for all operations together, the reference's results, no second compilation, no tensor kept alive."""
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    x = torch.randn(1, 9, 8)
    with monkeypatch.context() as forced:
        forced.setenv("FOVEATE_KERNELS", "torch")
        expected = [received_attention(*pair), similarity_energy(x, 0.5)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            got = [received_attention(*pair), similarity_energy(x, 0.5)]
    assert len(caught) == 1
    assert "foveate runs on plain torch, slower, with the same results" in str(caught[0].message)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    compiled = Broken.compiled
    mine = [p.clone() for p in pair]
    held = weakref.ref(mine[0])
    received_attention(*mine)
    del mine
    gc.collect()
    assert held() is None
    assert Broken.compiled == compiled


def test_what_cupy_is_asked_for(monkeypatch, pair, fake_device):
    """One module per kernel: C++17, the source with its headers; launched on torch's stream, values of C's width."""
    asked, launched = [], []

    class Kernel:
        def kernel(self, *args):
            launched.append(args)

    class Cupy:
        def RawModule(self, **options):
            asked.append(options)
            return types.SimpleNamespace(get_function=lambda name: Kernel())

    monkeypatch.setitem(sys.modules, "cupy", Cupy())
    for _ in range(2):
        received_attention(*pair)
    names = ("row_lse<float, 16, false>", "column_sums<float, 16, false>")
    assert [options["name_expressions"] for options in asked] == [(name,) for name in names]
    for options in asked:
        assert set(options) == {"code", "options", "name_expressions"}
        assert options["options"] == ("-std=c++17",)
        assert '#include "' not in options["code"]
    assert len(launched) == 4
    for grid, block, values, shared, stream in launched:
        assert (grid, block) == ((1, 2, 2), (128, 1, 1))
        assert 0 < shared <= launch.MOST_SHARED
        assert stream.ptr == 77
        assert all(isinstance(value, (np.generic, np.ndarray)) for value in values)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_has_all_operations(pair):
    """As a data loader makes them: after operations ran in the parent."""
    expected = received_attention(*pair)
    with multiprocessing.get_context("fork").Pool(1, torch.set_num_threads, (1,)) as pool:
        got = pool.apply_async(_received, [x.numpy() for x in pair]).get(60)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def _received(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    return received_attention(torch.from_numpy(q), torch.from_numpy(k)).numpy()


def test_references_on_a_gpu_are_exact_whatever_precision_is_set():
    """Both of torch's settings for TF32, which complain of each other, come back as they were."""
    products = torch.backends.cuda.matmul
    if not hasattr(products, "fp32_precision"):
        pytest.skip("needs a torch with the setting fp32_precision")
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        assert dispatch.full_precision(lambda x: products.fp32_precision)(x) == "ieee"
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before


def test_kernels_want_all_tensors_on_one_device(pair, gpu):
    with pytest.raises(ParameterError, match=r"received_attention got tensors on cpu and .*meta.*; move them to one"):
        received_attention(pair[0], pair[1].to("meta"))


def test_arguments_of_kernels_have_a_width():
    x = torch.zeros(3)
    with pytest.raises(TypeError, match=r"give its width, as in np.int32\(3\)"):
        launch.launch("attention.cu", "row_lse", (1, 1, 1), 32, (x, 3), device=x.device)
    assert launch._value(None) == 0
    assert launch._value(x) == x.data_ptr()
    assert launch._value(np.float32(0.5)).nbytes == 4


def test_an_empty_grid_launches_nothing(monkeypatch):
    monkeypatch.setattr(launch, "_execute", None)
    launch.launch("attention.cu", "row_lse", (1, 0, 1), 32, (), device=torch.device("cpu"))


def test_rows_copies_only_what_kernels_cannot_read():
    x = torch.zeros(2, 3, 4, 8)
    assert launch.rows(x) is x
    assert launch.rows(x.transpose(1, 2)).data_ptr() == x.data_ptr()
    for odd in (x[..., 1:], x.mT, x[..., :3].contiguous(), x.double()):
        fixed = launch.rows(odd)
        assert torch.equal(fixed, odd.float())
        assert fixed.data_ptr() % 16 == 0
        assert all(s * fixed.itemsize % 16 == 0 for s in fixed.stride()[:-1])


# ------------------------------------------------------------------------------------------------------- torch.compile


def operators() -> dict[str, tuple[object, ...]]:
    """Every operator with arguments it can run on."""
    torch.manual_seed(0)
    q, k, x = torch.randn(1, 2, 9, 8), torch.randn(1, 1, 9, 8), torch.randn(1, 9, 8)
    keep, source, target = torch.tensor([[0, 2, 3, 5, 6, 8]]), torch.tensor([[1, 4, 7]]), torch.tensor([[0, 0, 5]])
    return {
        "received_attention": (q, k, 0.5, 1, True, 0, None, None),
        "given_attention": (q, k, 0.5, 1),
        "rows_to_columns_attention": (q[:, :, :3], k, 0.5, torch.tensor([[2, 5, 8]]), None, None),
        "diverse_subset": (x, 4, None, False),
        "conditional_dpp": (x, torch.rand(1, 9), 4),
        "similarity_energy": (x, 0.5, 1.0, False),
        "best_match": (x[:, :4], x[:, 4:], None),
        "merge_tokens": (x, keep, source, target, None),
        "transition_score": (x, x.flip(1), False),
        "match_counts": (x, x[:, 0] > 0),
        "gather_tokens": (x, torch.tensor([[2, -1, 8]]), torch.tensor([[False, False, True]]), x[:, :3]),
    }


def test_type_checkers_are_told_of_every_public_name():
    tree = ast.parse(Path(foveate.cuda.__file__).read_text(encoding="utf-8"))
    (told,) = [node for node in tree.body if isinstance(node, ast.If)]
    names = {alias.asname: node.module for node in told.body for alias in node.names}
    assert names == {name: f"foveate.cuda.{home}" for name, home in foveate.cuda._HOME.items()}


def test_every_operator_is_listed():
    for name in 2 * foveate.cuda.__all__:  # the first time loads it; a submodule of the same name would hide it then
        assert callable(getattr(foveate.cuda, name)), name
    assert set(operators()) == {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("foveate::")
    }


@pytest.mark.parametrize("name", operators())
def test_operators_are_registered_as_torch_wants_them(name):
    assert callable(getattr(foveate.cuda, name))  # which registers it
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    opcheck(getattr(torch.ops.foveate, name).default, operators()[name], test_utils=checks)


FUNCTIONS: dict[str, Callable[..., object]] = {
    "received_attention": lambda t: foveate.cuda.received_attention(2 * t["q"], t["k"], causal=True, first_query=1) + 1,
    "given_attention": lambda t: foveate.cuda.given_attention(t["q"], t["k"], first=1),
    "class_attention": lambda t: foveate.cuda.class_attention(t["q"], t["k"], row=-1),
    "rows_to_columns_attention": lambda t: foveate.cuda.rows_to_columns_attention(
        t["q"][:, :, :3], t["k"], row_positions=t["target"], key_valid=t["x"][..., 0] > -1
    ),
    "diverse_subset": lambda t: foveate.cuda.diverse_subset(t["x"], 4, objective="max_sum"),
    "conditional_dpp": lambda t: foveate.cuda.conditional_dpp(t["x"], t["x"][..., 0].abs(), 4),
    "similarity_energy": lambda t: foveate.cuda.similarity_energy(t["x"] + 1, 0.5),
    "best_match": lambda t: foveate.cuda.best_match(
        t["x"][:, ::2], t["x"][:, 1::2], source_valid=t["x"][:, ::2, 0] > 0
    ),
    "merge_tokens": lambda t: foveate.cuda.merge_tokens(t["x"], t["keep"], t["source"], t["target"], t["sizes"]),
    "transition_score": lambda t: foveate.cuda.transition_score(t["x"], t["x"].flip(1), direction="abs"),
    "match_counts": lambda t: foveate.cuda.match_counts(t["x"], t["x"][:, 0] > 0) + 1,
    "gather_tokens": lambda t: foveate.cuda.gather_tokens(t["x"], t["keep"], marked=t["keep"] > 4, marker=2.5),
    "core_neurons": lambda t: foveate.cuda.core_neurons(t["keep"], 0.5),
    "run_mean": lambda t: foveate.cuda.run_mean(t["x"], t["x"][..., 0].long(), 3),
}


@pytest.fixture
def arguments() -> dict[str, torch.Tensor]:
    """What FUNCTIONS compute with."""
    merge = operators()["merge_tokens"]
    q, k = operators()["received_attention"][:2]
    return {"q": q, "k": k, "sizes": torch.rand(1, 9), **dict(zip(("x", "keep", "source", "target"), merge))}


def test_every_function_is_compiled_by_a_test():
    own = {"neuron_counts", "warmup"}  # sized by its values; for the launcher alone
    assert set(FUNCTIONS) == set(foveate.cuda.__all__) - own


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_functions_are_one_graph_and_equal(name, dynamic, arguments):
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(arguments), FUNCTIONS[name](arguments))


def test_functions_compiled_together_by_inductor_are_equal(arguments):
    """Operators of one result and of two; all of them would keep the C++ compiler busy for half a minute."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++, which torch.compile calls on a CPU")

    def together(t):
        return [FUNCTIONS[name](t) for name in ("received_attention", "conditional_dpp", "merge_tokens")]

    torch.testing.assert_close(torch.compile(together, fullgraph=True)(arguments), together(arguments))


def test_shapes_on_a_gpu_are_known_without_one():
    with FakeTensorMode():
        q, k = (torch.empty(2, heads, 9, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
        out = received_attention(q, k)
    assert (out.shape, out.dtype, out.device.type) == ((2, 9), torch.float32, "cuda")
