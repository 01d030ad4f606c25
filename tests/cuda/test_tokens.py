"""Kernels that reduce pairs of tokens or treat every token by itself, against the torch references.

The references have tests of their own, in test_merging.py, test_transitions.py and test_neurons.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from foveate.cuda import best_match, gather_tokens, match_counts, merge_tokens, similarity_energy, transition_score
from foveate.errors import ParameterError

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHAPES = pytest.mark.parametrize(
    ("n", "d", "dtype"), [(1, 8, "float32"), (33, 100, "bfloat16"), (197, 40, "float16"), (300, 67, "float32")]
)
Both = Callable[..., tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]


@pytest.fixture
def both(kernels_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> Both:
    """Results of the kernel and of the reference."""

    def run(operation: Callable[..., Tensor | tuple[Tensor, ...]], *args: object, **options: object):
        results = []
        for mode in ("cupy", "torch"):
            monkeypatch.setenv("FOVEATE_KERNELS", mode)
            result = operation(*args, **options)
            results.append(result if isinstance(result, tuple) else (result,))
        return results

    return run


def tokens(n: int, d: int, dtype: str) -> Tensor:
    """Two images whose tokens resemble each other, one of them zero."""
    torch.manual_seed(n + d)
    x = torch.randn(2, n, d) + 2 * torch.randn(2, 1, d)
    x[1, n // 2] = 0.0
    return x.to(TYPES[dtype])


def test_marked_rows_need_a_marker():
    with pytest.raises(ParameterError, match="marked rows need a marker"):
        gather_tokens(torch.zeros(1, 2, 3), torch.zeros(1, 1, dtype=torch.long), marked=torch.ones(1, 1).bool())


@SHAPES
@pytest.mark.parametrize("jump", [False, True])
def test_energy(n, d, dtype, jump, both):
    (kernel,), (reference,) = both(similarity_energy, tokens(n, d, dtype), 0.45, alpha=0.7, jump=jump)
    torch.testing.assert_close(kernel, reference, rtol=1e-5, atol=1e-6)


@SHAPES
def test_best_match(n, d, dtype, both):
    sources, targets = tokens(n, d, dtype), tokens(n, d + 1, dtype)[:, : n // 2 + 1, 1:]
    targets[:, 0] = targets[:, -1]  # equal targets: the lower index counts
    kernel, reference = both(best_match, sources, targets)
    torch.testing.assert_close(kernel[0], reference[0], rtol=1e-5, atol=1e-6)
    # some processors round the reference's products with the last target unlike those with the first
    by_rule = reference[1].where(reference[1] < targets.shape[1] - 1, 0)
    assert torch.equal(kernel[1], by_rule)


def test_best_match_of_valid_tokens(both):
    sources, targets = tokens(70, 40, "float32"), tokens(140, 40, "float32")
    target_valid = torch.rand(2, 140) < 0.3
    target_valid[1] = False  # nothing to match
    options = {"source_valid": torch.rand(2, 70) < 0.5, "target_valid": target_valid}
    kernel, reference = both(best_match, sources, targets, **options)
    torch.testing.assert_close(kernel[0], reference[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(kernel[1], reference[1])


@SHAPES
@pytest.mark.parametrize("sized", [False, True])
def test_merge(n, d, dtype, sized, both):
    x = tokens(n, d, dtype)
    merged = n // 3
    order = torch.stack([torch.randperm(n) for _ in range(2)])
    source, keep = order[:, :merged], order[:, merged:]
    target = torch.randint(0, (n - merged + 1) // 2, (2, merged))  # crowded: several sources in one target
    sizes = torch.randint(1, 5, (2, n)).float() if sized else None
    kernel, reference = both(merge_tokens, x, keep, source, target, sizes)
    assert kernel[0].dtype == x.dtype
    torch.testing.assert_close(
        kernel[0], reference[0], rtol={"bfloat16": 1e-2, "float16": 2e-3}.get(dtype, 1e-5), atol=1e-6
    )
    assert torch.equal(kernel[1], reference[1])
    alone = torch.ones(2, n - merged, dtype=torch.bool).scatter(1, target, False)
    assert torch.equal(kernel[0][alone], x.gather(1, keep[..., None].expand(-1, -1, d))[alone])


@SHAPES
@pytest.mark.parametrize("direction", ["signed", "abs"])
def test_transition(n, d, dtype, direction, both):
    for before, after in ((tokens(n, d, dtype), 0.3 * tokens(n, d + 2, dtype)[..., 2:]), (tokens(n, d, dtype)[0],) * 2):
        for kernel, reference in zip(*both(transition_score, before, after, direction=direction)):
            torch.testing.assert_close(kernel, reference, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "width"), [(1, 1), (33, 100), (9, 1024)])
def test_match_counts(n, width, both):
    torch.manual_seed(n)
    (kernel,), (reference,) = both(match_counts, torch.rand(2, n, width) < 0.5, torch.rand(2, width) < 0.4)
    assert torch.equal(kernel, reference)


@pytest.mark.parametrize("dtype", [*TYPES.values(), torch.float64])
@pytest.mark.parametrize(("n", "width"), [(1, 1), (33, 100), (9, 1043)])
def test_match_counts_of_activations(n, width, dtype, both):
    """What counts is what `> 0` says: neither zeros of either sign nor NaN, but the smallest of numbers."""
    torch.manual_seed(n)
    values = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 2.5, -2.5], dtype=dtype)
    smallest = torch.tensor([1, -1], dtype=dtype) * torch.finfo(dtype).smallest_normal / 4
    values = torch.cat([values, smallest])
    hidden, core = values[torch.randint(len(values), (2, n, width))], torch.rand(2, width) < 0.7
    (kernel,), (reference,) = both(match_counts, hidden, core)
    assert torch.equal(kernel, reference)
    assert torch.equal(kernel, both(match_counts, hidden > 0, core)[0][0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16])
def test_match_counts_of_other_layouts(dtype, both):
    active = (torch.rand(100, 9, 2).permute(2, 1, 0) < 0.5).to(dtype)
    for part in (active, active[:, 1:, 3:], active.contiguous()[..., 16:]):
        (kernel,), (reference,) = both(match_counts, part, part[:, 0] > 0)
        assert torch.equal(kernel, reference)


MARKERS = {
    "none": lambda x, k: None,
    "number": lambda x, k: 2.5,
    "row": lambda x, k: torch.randn(x.shape[2:]).to(x.dtype),
    "row for each": lambda x, k: torch.randn(len(x), k, *x.shape[2:]).to(x.dtype),
    "other dtype": lambda x, k: torch.randn(len(x), k, *x.shape[2:], dtype=torch.float64),
}


@SHAPES
@pytest.mark.parametrize("marker", MARKERS)
def test_gather(n, d, dtype, marker, both):
    x = tokens(n, d, dtype)
    index = torch.randint(-1, n, (2, n // 2 + 1))
    marked = None if marker == "none" else torch.rand(index.shape) < 0.3
    for source in (
        x,
        x[..., 1:],
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x[..., None],
        x.unflatten(2, (1, -1)),
    ):
        options = {"marked": marked, "marker": MARKERS[marker](source, index.shape[1])}
        (kernel,), (reference,) = both(gather_tokens, source, index, **options)
        assert kernel.dtype == x.dtype
        assert torch.equal(kernel, reference)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64, torch.complex64])
def test_gather_of_any_type(dtype, both):
    for shape in ((2, 9), (2, 9, 3), (2, 9, 16)):
        x = (torch.rand(shape) * 9 - 4).to(dtype)
        (kernel,), (reference,) = both(gather_tokens, x, torch.tensor([[3, -1, 8], [0, 0, 2]]))
        assert torch.equal(kernel, reference)


def test_gather_of_nothing(both):
    x = torch.rand(2, 9, 4)
    for index in (torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64)):
        (kernel,), (reference,) = both(gather_tokens, x[: len(index)], index)
        assert kernel.shape == reference.shape == (*index.shape, 4)


def test_gather_refuses_rows_that_are_not_there(kernels_on_cpu):
    with pytest.raises(AssertionError, match="__trap"):
        gather_tokens(torch.rand(1, 9, 4), torch.tensor([[9]]))


@pytest.mark.parametrize(
    ("keep", "source", "target"), [(9, 1, 0), (0, 9, 0), (-1, 1, 0), (0, -1, 0), (0, 1, 1), (0, 1, -1)]
)
def test_merge_refuses_rows_that_are_not_there(keep, source, target, kernels_on_cpu):
    with pytest.raises(AssertionError, match="__trap"):
        merge_tokens(torch.rand(1, 9, 4), torch.tensor([[keep]]), torch.tensor([[source]]), torch.tensor([[target]]))


def test_gather_by_another_integer_type(both):
    x, index = tokens(9, 8, "float32"), torch.tensor([[3, -1], [1, 2]], dtype=torch.int32)
    (kernel,), (reference,) = both(gather_tokens, x, index, marked=index > 1, marker=2.5)
    assert torch.equal(kernel, reference)


@pytest.mark.parametrize(("n", "merged"), [(700, 300), (700, 699), (40, 1), (9, 0)])
def test_merge_of_many_into_few(n, merged, both):
    """Lists of sources that are longer than a warp, in all parts; all sources into one row; none at all."""
    x = tokens(n, 24, "float32")
    order = torch.stack([torch.randperm(n) for _ in range(2)])
    target = torch.randint(0, max(1, (n - merged) // 100), (2, merged))
    kernel, reference = both(merge_tokens, x, order[:, merged:], order[:, :merged], target)
    torch.testing.assert_close(kernel[0], reference[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(kernel[1], reference[1])


@pytest.mark.parametrize("dtype", TYPES)
def test_widest_tokens(dtype, both):
    """8192 values a token, which many steps of a warp move."""
    x = tokens(17, 8192, dtype)
    for operation, args in (
        (transition_score, (x, x.flip(1))),
        (similarity_energy, (x, 0.45)),
        (gather_tokens, (x, torch.tensor([[3, -1], [16, 2]]))),
    ):
        for kernel, reference in zip(*both(operation, *args)):
            torch.testing.assert_close(kernel, reference, rtol=2e-5, atol=1e-5)
