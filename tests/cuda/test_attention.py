"""Attention statistics: torch references against the materialised map in float64, kernels against the references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.cuda import class_attention, given_attention, received_attention, rows_to_columns_attention
from foveate.errors import ParameterError

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def attention(
    n: int, d: int, dtype: torch.dtype = torch.float32, *, heads: int = 4, shared: int = 1
) -> tuple[Tensor, Tensor]:
    """Queries ``(2, heads, n, d)`` and keys with ``shared`` times fewer heads, laid out as a projection leaves them."""
    torch.manual_seed(n * d)
    q = torch.randn(2, n, heads, d).to(dtype).transpose(1, 2)
    k = torch.randn(2, n, heads // shared, d).to(dtype).transpose(1, 2)
    return 1.5 * q, k


def whole_map(q: Tensor, k: Tensor, seen: Tensor | None = None, scale: float | None = None) -> Tensor:
    """``softmax(scale * q k^T)`` in float64, ``(B, H, Q, K)``; rows that see nothing are zero."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(dim=-1).nan_to_num(0.0)


def log_sum_exp(q: Tensor, k: Tensor) -> Tensor:
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (q.double() @ k.mT * q.shape[-1] ** -0.5).logsumexp(dim=-1).float()


def mask(n: int, causal: bool = False, window: int | None = None, segments: Tensor | None = None) -> Tensor:
    """``(B or 1, 1, n, n)`` written as the documentation says it."""
    i, j = torch.arange(n)[:, None], torch.arange(n)
    seen = torch.ones(1, 1, n, n, dtype=torch.bool)
    if causal:
        seen = seen & (j <= i)
    if window is not None:
        seen = seen & ((i - j).abs() < window)
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None])
    return seen


def segments_of(n: int) -> Tensor:
    """Two items of three segments each, cut at different places."""
    return torch.stack([(torch.arange(n) * 3).div(n, rounding_mode="floor"), (torch.arange(n) * 2 // n + 5) % 7])


MASKS: dict[str, Any] = {
    "causal": {"causal": True},
    "window": {"window": 7},
    "causal window": {"causal": True, "window": 19},
    "segments": {"segments": segments_of},
    "causal segments": {"causal": True, "segments": segments_of},
}


def options(name: str, n: int) -> dict[str, Any]:
    return {key: value(n) if callable(value) else value for key, value in MASKS[name].items()}


def check_received(q: Tensor, k: Tensor, rtol: float = 1e-5) -> None:
    n = k.shape[2]
    torch.testing.assert_close(received_attention(q, k), whole_map(q, k).mean(dim=(1, 2)).float(), rtol=rtol, atol=1e-9)
    first = min(5, n - 1)
    expected = whole_map(q, k, scale=0.3)[:, :, first:].mean(dim=(1, 2)).float()
    torch.testing.assert_close(received_attention(q, k, scale=0.3, first_query=first), expected, rtol=rtol, atol=1e-9)


def check_mask(name: str, n: int, d: int, dtype: torch.dtype) -> None:
    q, k = attention(n, d, dtype, shared=2)
    how = options(name, n)
    expected = whole_map(q, k, mask(n, **how))[:, :, 3:].mean(dim=(1, 2)).float()
    torch.testing.assert_close(received_attention(q, k, first_query=3, **how), expected, rtol=1e-5, atol=1e-9)


def check_given(q: Tensor, k: Tensor) -> None:
    expected = whole_map(q, k)[:, :, 1:, 1:].mean(dim=(1, 3)).float()
    torch.testing.assert_close(given_attention(q, k, first=1), expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(given_attention(q, k), torch.full((2, q.shape[2]), 1 / k.shape[2]))


def check_rows_to_columns(n: int, d: int, dtype: torch.dtype) -> None:
    q, k = attention(n, d, dtype, shared=4)
    positions = torch.tensor([[0, n // 3, n - 2, n - 1], [5, 6, 7, 8]]) % n
    q = q.gather(2, positions[:, None, :, None].expand(-1, q.shape[1], -1, d))
    row_valid = torch.tensor([[True, False, True, True], [True] * 4])
    key_valid = torch.rand(2, n) < 0.8
    key_valid[1] = False  # an item whose rows see nothing
    key_valid[0, 0] = True
    seen = (torch.arange(n) <= positions[:, None, :, None]) & key_valid[:, None, None]
    probs = whole_map(q, k, seen) * row_valid[:, None, :, None]
    expected = (probs.mean(dim=1).sum(dim=1) / row_valid.sum(dim=1, keepdim=True)).float()
    got = rows_to_columns_attention(q, k, row_positions=positions, row_valid=row_valid, key_valid=key_valid)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
    assert not got[1].any()
    plain = rows_to_columns_attention(q, k, row_positions=positions)
    expected = whole_map(q, k, torch.arange(n) <= positions[:, None, :, None]).mean(dim=(1, 2)).float()
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-9)


# ---------------------------------------------------------------------------------------------------- torch references


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 33, 197])
def test_received_is_the_column_mean_of_the_map(n, shared):
    check_received(*attention(n, 64, shared=shared))


def test_received_does_not_depend_on_the_blocks(monkeypatch):
    q, k = attention(197, 64, shared=2)
    monkeypatch.setattr("foveate.cuda.dispatch._BLOCK_ELEMENTS", 4096)
    check_received(q, k)


@pytest.mark.parametrize("name", MASKS)
def test_received_under_a_mask(name, monkeypatch):
    check_mask(name, 65, 32, torch.float32)
    monkeypatch.setattr("foveate.cuda.dispatch._BLOCK_ELEMENTS", 4096)
    check_mask(name, 65, 32, torch.float32)


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_received_with_a_given_log_sum_exp(dtype):
    q, k = attention(97, 64, dtype)
    plain = received_attention(q, k, first_query=2)
    torch.testing.assert_close(
        received_attention(q, k, first_query=2, log_sum_exp=log_sum_exp(q, k)), plain, rtol=1e-5, atol=0
    )


def test_given_is_the_row_mean_of_the_map():
    check_given(*attention(97, 64, shared=2))


def test_class_attention_is_one_row_of_the_map():
    q, k = attention(97, 64, shared=2)
    rows = whole_map(q, k).mean(dim=1).float()
    for row in (0, 5, -1):
        torch.testing.assert_close(class_attention(q, k, row=row), rows[:, row])


def test_rows_to_columns_is_some_rows_of_the_causal_map():
    check_rows_to_columns(97, 32, torch.float32)


def test_logits_are_averaged_without_softmax():
    q, k = attention(33, 32, shared=2)
    scores = q @ k.repeat_interleave(2, dim=1).mT * 32**-0.5
    torch.testing.assert_close(received_attention(q, k, logits=True, first_query=1), scores[:, :, 1:].mean(dim=(1, 2)))
    torch.testing.assert_close(given_attention(q, k, logits=True, first=1), scores[:, :, 1:, 1:].mean(dim=(1, 3)))


def test_received_attention_is_differentiable():
    q, k = (x.double().requires_grad_() for x in attention(6, 4, heads=2))

    def received(q: Tensor, k: Tensor) -> Tensor:
        return received_attention(q, k).square().sum(dim=1)

    assert torch.autograd.gradcheck(received, (q, k), eps=1e-2, atol=1e-2, rtol=1e-2)  # float32 inside


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": True, "causal": True}, "drop causal"),
        ({"window": 0}, "window=0"),
        ({"segments": torch.zeros(2, 3)}, r"segments are \(2, 3\)"),
        ({"log_sum_exp": torch.zeros(2, 4)}, r"log_sum_exp is \(2, 4\)"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message):
    q, k = attention(33, 32)
    with pytest.raises(ParameterError, match=message):
        received_attention(q, k, **arguments)


def test_shapes_that_do_not_fit_are_refused():
    q, k = attention(33, 32)
    with pytest.raises(ParameterError, match="as many queries as keys"):
        received_attention(q[:, :, 1:], k, causal=True)
    for function in (received_attention, given_attention, class_attention):
        with pytest.raises(ParameterError, match="multiple of H_kv"):
            function(q, k[:, :3])


# ------------------------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize(
    ("n", "d", "dtype", "shared"),
    [
        (1, 64, "float32", 1),
        (33, 64, "float32", 2),
        (197, 64, "float32", 1),
        (1, 64, "bfloat16", 1),
        (33, 64, "bfloat16", 2),
        (197, 72, "float16", 1),  # a width that is no power of two: SigLIP
        (577, 64, "bfloat16", 4),
    ],
)
def test_received_kernel(n, d, dtype, shared, kernels_on_cpu):
    check_received(*attention(n, d, TYPES[dtype], shared=shared))


@pytest.mark.parametrize("name", MASKS)
def test_received_kernel_under_a_mask(name, kernels_on_cpu):
    check_mask(name, 97, 128, torch.bfloat16)


@pytest.mark.parametrize("d", [33, 40])
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_received_kernel_reads_any_layout(d, dtype, kernels_on_cpu):
    """Rows that do not start at 16 bytes, a last dimension that is not contiguous, a slice."""
    q, k = attention(70, d, dtype, heads=2)
    check_received(q, k.mT.contiguous().mT)
    check_received(q[:, :, 3:], torch.cat([k, k], dim=-1)[:, :, 3:, :d])


def test_received_kernel_takes_a_log_sum_exp(kernels_on_cpu):
    q, k = attention(97, 64, torch.bfloat16, shared=2)
    expected = whole_map(q, k)[:, :, 2:].mean(dim=(1, 2)).float()
    got = received_attention(q, k, first_query=2, log_sum_exp=log_sum_exp(q, k))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)


def test_received_kernel_survives_large_scores(kernels_on_cpu):
    q, k = attention(97, 64, torch.bfloat16)
    check_received(30 * q, k, rtol=2e-4)  # of a score of 1000 float32 keeps 6e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_given_kernel(dtype, kernels_on_cpu):
    check_given(*attention(97, 64, TYPES[dtype], shared=2))


def test_class_attention_kernel(kernels_on_cpu):
    q, k = attention(197, 64, torch.bfloat16)
    torch.testing.assert_close(class_attention(q, k), whole_map(q, k).mean(dim=1)[:, 0].float(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("n", "d", "dtype"),
    [(97, 128, "bfloat16"), (9, 40, "float16"), (128, 33, "float32"), (300, 128, "float32"), (300, 32, "bfloat16")],
)
def test_rows_to_columns_kernel(n, d, dtype, kernels_on_cpu):
    check_rows_to_columns(n, d, TYPES[dtype])


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("n_rows", [1, 3, 9, 32, 33, 70])
def test_rows_to_columns_kernels_for_few_and_for_many_rows(n_rows, shared, kernels_on_cpu):
    """One row of one key head up to several lists of them; from 33 on the tiles of received_attention take over."""
    n, d = 150, 48
    q, k = attention(n, d, torch.bfloat16, shared=shared)
    positions = torch.stack([torch.randperm(n)[:n_rows] for _ in range(2)])
    q = q.gather(2, positions[:, None, :, None].expand(-1, q.shape[1], -1, d))
    row_valid = torch.rand(2, n_rows) < 0.7
    row_valid[1] = False
    probs = whole_map(q, k, torch.arange(n) <= positions[:, None, :, None])
    expected = (probs * row_valid[:, None, :, None]).mean(dim=1).sum(dim=1) / row_valid.sum(dim=1, keepdim=True).clamp(
        min=1
    )
    got = rows_to_columns_attention(q, k, row_positions=positions, row_valid=row_valid)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-9)
    assert torch.equal(got, rows_to_columns_attention(q, k, row_positions=positions, row_valid=row_valid))


@pytest.mark.parametrize("n", [1, 64, 129, 300])
def test_class_attention_kernel_at_any_length(n, kernels_on_cpu):
    q, k = attention(n, 72, torch.float16, shared=2)
    rows = whole_map(30 * q, k).mean(dim=1).float()
    for row in (0, n // 2, -1):
        torch.testing.assert_close(class_attention(30 * q, k, row=row), rows[:, row], rtol=2e-4, atol=1e-9)


def test_kernels_give_the_same_bits_again(kernels_on_cpu):
    q, k = attention(97, 64, torch.bfloat16)
    assert torch.equal(received_attention(q, k), received_attention(q, k))


def test_wide_heads_are_left_to_the_reference(kernels_on_cpu, monkeypatch):
    q, k = attention(9, 160)
    with pytest.raises(ParameterError, match="head dimension of 128, this one is 160"):
        received_attention(q, k)
    monkeypatch.setenv("FOVEATE_KERNELS", "auto")
    monkeypatch.setattr("foveate.cuda.dispatch._reported", set())
    with pytest.warns(UserWarning, match="head dimension of 128"):
        check_received(q, k)
