"""Attention statistics from queries and keys, never holding more than a block of rows of the attention map.

Queries are ``(B, H, Q, d)``, keys ``(B, H_kv, K, d)`` with ``H`` a multiple of ``H_kv`` (grouped-query attention).
Inputs may have any float dtype and strides; arithmetic and results are float32. On CUDA the kernels of ``attention.cu``
run, or those of ``rows.cu`` for a few query rows, for head dimensions up to 128. They multiply 16-bit inputs exactly
(tensor cores, float32 sums) and give the same bits in every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from foveate.cuda.dispatch import KernelUnavailable, operation, rows_at_once
from foveate.cuda.launch import TYPES, launch, pointer, rows
from foveate.errors import ParameterError

# -------------------------------------------------------------------------------------------------- public functions


def received_attention(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    first_query: int = 0,
    logits: bool = False,
    causal: bool = False,
    window: int | None = None,
    segments: Tensor | None = None,
    log_sum_exp: Tensor | None = None,
) -> Tensor:
    """Attention received by every key: mean over heads and query rows of ``softmax(scale * q k^T)``.

    Args:
        scale: ``1 / sqrt(d)`` if None.
        first_query: leave out the query rows before it (class and register tokens); their keys stay in the softmax.
        logits: average ``scale * q k^T`` itself; O(N d), without softmax; excludes all options below.
        causal: query ``i`` sees keys up to ``i``. Needs as many queries as keys, as the next two do.
        window: a query sees only keys nearer than that (tokens).
        segments: ``(B, K)`` integers; a query sees only keys of its own number.
        log_sum_exp: ``(B, H, Q)`` natural logarithms of the softmax denominators, as flash attention returns them;
            saves half of the work.

    Returns:
        ``(B, K)`` float32. O(H Q K d) time, O(B H (Q + K)) memory plus one block of the attention map.

    Raises:
        ParameterError: shapes or options that do not fit together.
    """
    _check_heads(q, k)
    if logits:
        if causal or window is not None or segments is not None or log_sum_exp is not None:
            raise ParameterError("logits=True averages unmasked logits; drop causal, window, segments and log_sum_exp")
        mean_q = _grouped(q[:, :, first_query:].float().mean(dim=2, keepdim=True), k)
        return (_scale(q, scale) * mean_q @ k.float().mT).mean(dim=1).squeeze(1)
    if (causal or window is not None or segments is not None) and q.shape[2] != k.shape[2]:
        raise ParameterError(f"a mask needs as many queries as keys, not {q.shape[2]} and {k.shape[2]}")
    if window is not None and window < 1:
        raise ParameterError(f"window={window} lets a token not even see itself; use None or at least 1")
    if segments is not None and segments.shape != (len(k), k.shape[2]):
        raise ParameterError(f"segments are {tuple(segments.shape)}, not (B, K) = {(len(k), k.shape[2])}")
    if log_sum_exp is not None and log_sum_exp.shape != q.shape[:3]:
        raise ParameterError(f"log_sum_exp is {tuple(log_sum_exp.shape)}, not (B, H, Q) = {tuple(q.shape[:3])}")
    return _received(q, k, _scale(q, scale), first_query, causal, window or 0, segments, log_sum_exp)


def given_attention(
    q: Tensor, k: Tensor, *, scale: float | None = None, first: int = 0, logits: bool = False
) -> Tensor:
    """Attention given by every query row to the keys from ``first`` on: mean over heads and those keys.

    The softmax still runs over all keys. Rows before ``first`` are left out.

    Returns:
        ``(B, Q - first)`` float32. O(H Q K d) time.
    """
    _check_heads(q, k)
    if logits:
        mean_k = k[:, :, first:].float().mean(dim=2, keepdim=True).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        return (_scale(q, scale) * q[:, :, first:].float() @ mean_k.mT).mean(dim=1).squeeze(-1)
    return _given(q, k, _scale(q, scale), first)


def class_attention(q: Tensor, k: Tensor, *, scale: float | None = None, row: int = 0) -> Tensor:
    """Attention that query row ``row`` pays to every key, mean over heads: ``(B, K)`` float32. O(H K d)."""
    _check_heads(q, k)
    return _rows_to_columns(q[:, :, row : row + 1 or None], k, _scale(q, scale), None, None, None)


def rows_to_columns_attention(
    q: Tensor,
    k: Tensor,
    *,
    row_positions: Tensor,
    row_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention that a few query rows pay to every key under a causal mask, mean over heads and valid rows.

    Args:
        q: ``(B, H, R, d)`` the chosen rows only.
        row_positions: ``(B, R)`` int64, the index of each row among the keys: it sees keys 0 .. position.
        row_valid: ``(B, R)`` bool, rows to average (all if None).
        key_valid: ``(B, K)`` bool, keys that may be seen (all if None).

    Returns:
        ``(B, K)`` float32, zero for a batch item without a valid row. O(H R K d) time, without a K x K map.
    """
    _check_heads(q, k)
    return _rows_to_columns(q, k, _scale(q, scale), row_positions, row_valid, key_valid)


def _check_heads(q: Tensor, k: Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or len(q) != len(k) or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        raise ParameterError(
            f"queries {tuple(q.shape)} and keys {tuple(k.shape)} are not (B, H, Q, d) and (B, H_kv, K, d) with H a "
            "multiple of H_kv"
        )


def _scale(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """Mean of the query heads that share a key head: ``(B, H, Q, d) -> (B, H_kv, Q, d)``."""
    return q.unflatten(1, (k.shape[1], -1)).mean(dim=2)


# ------------------------------------------------------------------------------------------------------------ kernels

_OWN = 64  # tokens of a block's own tile, in attention.cu
_FEW_KEYS = 128  # keys of a block, in rows.cu
_WIDEST = 128
_FEW = 32  # query rows that rows.cu is for; the tiles of attention.cu would be mostly empty
_SCORE_BYTES = 1 << 28  # that it may hold of their scores
_EVERYWHERE = 1 << 30  # tokens before or after a row, no mask
_GEOMETRY = np.dtype(
    [
        *((name, np.uint64) for name in ("q", "k")),
        *((name, np.int64) for name in ("q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row")),
        *((name, np.uint64) for name in ("row_positions", "segments", "key_valid")),
        *((name, np.int32) for name in ("rows", "keys", "depth", "group", "before", "after", "first_query")),
        ("scale", np.float32),
    ],
    align=True,
)


class _Attention:
    """One geometry for the kernels of ``attention.cu`` and ``rows.cu``; keeps the tensors of its pointers alive."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        *,
        causal: bool = False,
        window: int = 0,
        first_query: int = 0,
        row_positions: Tensor | None = None,
        segments: Tensor | None = None,
        key_valid: Tensor | None = None,
    ) -> None:
        if q.shape[-1] > _WIDEST:
            raise KernelUnavailable(
                f"attention kernels end at a head dimension of {_WIDEST}, this one is {q.shape[-1]}"
            )
        if q.dtype != k.dtype:
            q, k = q.float(), k.float()
        self.q, self.k = rows(q), rows(k)
        self.row_positions = None if row_positions is None else row_positions.long().contiguous()
        self.segments = None if segments is None else segments.int().contiguous()
        self.key_valid = None if key_valid is None else key_valid.bool().contiguous()
        masked = causal or window or segments is not None or key_valid is not None
        reach = window - 1 if window else _EVERYWHERE
        self.width = -(-q.shape[-1] // 16) * 16
        self.instance = f"<{TYPES[self.q.dtype]}, {self.width}, {'true' if masked else 'false'}>"
        self.structure = np.array(
            (
                *map(pointer, (self.q, self.k)),
                *self.q.stride()[:3],
                *self.k.stride()[:3],
                *map(pointer, (self.row_positions, self.segments, self.key_valid)),
                *(q.shape[2], k.shape[2], q.shape[3], q.shape[1] // k.shape[1]),
                *(reach, 0 if causal else reach, first_query),
                scale,
            ),
            dtype=_GEOMETRY,
        )

    def row_lse(self) -> Tensor:
        """Natural log of every row's softmax denominator: ``(B, H, Q)``."""
        lse = self.q.new_empty(self.q.shape[:3], dtype=torch.float32)
        self._launch("row_lse", self.q.shape[2], lse)
        return lse

    def column_sums(self, lse: Tensor) -> Tensor:
        """Sum over query rows of ``exp(score - lse)``: ``(B, H, K)``."""
        received = self.q.new_empty(*self.q.shape[:2], self.k.shape[2], dtype=torch.float32)
        self._launch("column_sums", self.k.shape[2], lse.float().contiguous(), received)
        return received

    def mean_of_few(self, row_valid: Tensor | None) -> Tensor:
        """Mean over heads and valid rows of the softmax, every key read once: ``(B, K)``."""
        (batch, heads, n_rows), (_, kv_heads, n_keys) = self.q.shape[:3], self.k.shape[:3]
        tiles = -(-n_keys // _FEW_KEYS)
        scores = self.q.new_empty(batch, heads * n_rows, n_keys, dtype=torch.float32)
        parts = self.q.new_empty(batch, tiles, heads * n_rows, 2, dtype=torch.float32)
        listed = n_rows * (heads // kv_heads)  # rows that share a key head
        eights = 1 if listed <= 8 else 4
        kernel = f"row_scores<{TYPES[self.q.dtype]}, {self.width}, {eights}>"
        grid = (tiles, kv_heads * -(-listed // (8 * eights)), batch)
        shared = (_FEW_KEYS + 8 * eights) * (self.width * self.q.itemsize + 16)
        args = (self.structure, scores, parts)
        launch("rows.cu", kernel, grid, 128, args, shared=shared, device=self.q.device)
        received = self.q.new_empty(batch, n_keys, dtype=torch.float32)
        row_valid = None if row_valid is None else row_valid.bool().contiguous()
        args = (scores, parts, row_valid, *map(np.int32, (heads, n_rows, n_keys, tiles)), received)
        grid = (-(-n_keys // 64), batch, 1)
        launch("rows.cu", "key_means", grid, 256, args, shared=4 * heads * n_rows, device=self.q.device)
        return received

    def _launch(self, kernel: str, tokens: int, *args: Tensor) -> None:
        batch, heads = self.q.shape[:2]
        streamed = 32 if self.q.dtype == torch.float32 else 64
        shared = (_OWN + 2 * streamed) * (self.width * self.q.itemsize + 16)
        grid = (-(-tokens // _OWN), heads, batch)
        launch(
            "attention.cu",
            kernel + self.instance,
            grid,
            128,
            (self.structure, *args),
            shared=shared,
            device=self.q.device,
        )


def _received_kernel(
    q: Tensor,
    k: Tensor,
    scale: float,
    first_query: int,
    causal: bool,
    window: int,
    segments: Tensor | None,
    log_sum_exp: Tensor | None,
) -> Tensor:
    q = q[:, :, first_query:]
    attention = _Attention(q, k, scale, causal=causal, window=window, first_query=first_query, segments=segments)
    lse = attention.row_lse() if log_sum_exp is None else log_sum_exp[:, :, first_query:]
    return attention.column_sums(lse).sum(dim=1) / (q.shape[1] * q.shape[2])


def _given_kernel(q: Tensor, k: Tensor, scale: float, first: int) -> Tensor:
    counted = k.shape[2] - first
    if first == 0:
        return q.new_full((len(q), q.shape[2]), 1 / counted, dtype=torch.float32)
    q = q[:, :, first:]
    # what goes to the keys from `first` on, against the rest: e^l / (e^l + e^l'), without the cancellation of 1 - p
    share = _Attention(q, k[:, :, first:], scale).row_lse() - _Attention(q, k[:, :, :first], scale).row_lse()
    return share.sigmoid().mean(dim=1) / counted


def _rows_to_columns_kernel(
    q: Tensor,
    k: Tensor,
    scale: float,
    row_positions: Tensor | None,
    row_valid: Tensor | None,
    key_valid: Tensor | None,
) -> Tensor:
    heads, n_rows = q.shape[1:3]
    causal = row_positions is not None
    attention = _Attention(q, k, scale, causal=causal, row_positions=row_positions, key_valid=key_valid)
    if n_rows <= _FEW and 4 * len(q) * heads * n_rows * k.shape[2] <= _SCORE_BYTES:
        return attention.mean_of_few(row_valid)
    lse = attention.row_lse()
    if row_valid is None:
        return attention.column_sums(lse).sum(dim=1) / (heads * n_rows)
    row_valid = row_valid.bool()
    sums = attention.column_sums(lse.masked_fill(~row_valid[:, None], torch.inf)).sum(dim=1)
    return sums / (heads * row_valid.sum(dim=1, keepdim=True).clamp(min=1))


# ---------------------------------------------------------------------------------------------------- torch references


def _per_key(q: Tensor, k: Tensor, *_: object) -> Tensor:
    return q.new_empty(len(k), k.shape[2], dtype=torch.float32)


@operation(
    "received_attention(Tensor q, Tensor k, float scale, int first_query, bool causal, int window, Tensor? segments,"
    " Tensor? log_sum_exp) -> Tensor",
    kernel=_received_kernel,
    fake=_per_key,
)
def _received(
    q: Tensor,
    k: Tensor,
    scale: float,
    first_query: int,
    causal: bool,
    window: int,
    segments: Tensor | None,
    log_sum_exp: Tensor | None,
) -> Tensor:
    q = q[:, :, first_query:]
    masked = causal or window or segments is not None
    received = q.new_zeros(len(k), k.shape[2], dtype=torch.float32)
    for block, scores in _score_blocks(q, k, scale):
        seen = None
        if masked:
            seen = _seen(range(first_query + block.start, first_query + block.stop), k, causal, window, segments)
            scores.masked_fill_(~seen[:, None], -torch.inf)
        if log_sum_exp is None:
            probs = scores.softmax(dim=-1)
        else:
            probs = scores.sub_(log_sum_exp[:, :, first_query:][:, :, block, None].float()).exp_()
        received += probs.sum(dim=(1, 2))
    return received / (q.shape[1] * q.shape[2])


@operation(
    "given_attention(Tensor q, Tensor k, float scale, int first) -> Tensor",
    kernel=_given_kernel,
    fake=lambda q, k, scale, first: q.new_empty(len(q), q.shape[2] - first, dtype=torch.float32),
)
def _given(q: Tensor, k: Tensor, scale: float, first: int) -> Tensor:
    q = q[:, :, first:]
    given = [scores.softmax(dim=-1)[..., first:].mean(dim=-1).mean(dim=1) for _, scores in _score_blocks(q, k, scale)]
    return torch.cat(given, dim=-1)


@operation(
    "rows_to_columns_attention(Tensor q, Tensor k, float scale, Tensor? row_positions, Tensor? row_valid,"
    " Tensor? key_valid) -> Tensor",
    kernel=_rows_to_columns_kernel,
    fake=_per_key,
)
def _rows_to_columns(
    q: Tensor,
    k: Tensor,
    scale: float,
    row_positions: Tensor | None,
    row_valid: Tensor | None,
    key_valid: Tensor | None,
) -> Tensor:
    batch, heads, n_rows, _ = q.shape
    keys = torch.arange(k.shape[2], device=k.device)
    row_valid = q.new_ones(batch, n_rows, dtype=torch.bool) if row_valid is None else row_valid
    total = q.new_zeros(batch, k.shape[2], dtype=torch.float32)
    for block, scores in _score_blocks(q, k, scale):
        seen = scores.new_ones(batch, 1, len(keys), dtype=torch.bool) if key_valid is None else key_valid[:, None]
        if row_positions is not None:
            seen = seen & (keys <= row_positions[:, block, None])  # (B, R, K)
        # -finfo.min, not -inf: a padding row sees nothing and must give zeros, not NaN
        unseen = scores.new_zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
        probs = scores.add_(unseen[:, None]).softmax(dim=-1)
        counted = (row_valid[:, block] & seen.any(dim=-1)).float()  # (B, R)
        total += (counted[:, None, None] @ probs).sum(dim=(1, 2))
    return total / (heads * row_valid.sum(dim=1, keepdim=True).clamp(min=1))


def _seen(positions: range, k: Tensor, causal: bool, window: int, segments: Tensor | None) -> Tensor:
    """Which keys the queries at ``positions`` may attend: ``(B or 1, rows, K)`` bool."""
    keys = torch.arange(k.shape[2], device=k.device)
    at = keys[positions.start : positions.stop, None]
    seen = torch.ones(len(at), len(keys), dtype=torch.bool, device=k.device)
    if causal:
        seen = seen & (keys <= at)
    if window:
        seen = seen & (keys > at - window) & (keys < at + window)
    if segments is None:
        return seen[None]
    return seen & (segments[:, positions.start : positions.stop, None] == segments[:, None])


def _score_blocks(q: Tensor, k: Tensor, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """``scale * q k^T`` in float32, a block of query rows at a time: which rows, ``(B, H, rows, K)``."""
    batch, heads, n_rows, _ = q.shape
    shared = heads // k.shape[1]
    keys = k.float().mT
    step = rows_at_once(batch * heads * k.shape[2])
    for start in range(0, n_rows, step):
        block = slice(start, min(start + step, n_rows))
        queries = q[:, :, block].float() * scale
        if shared == 1:
            yield block, queries @ keys
        else:  # query heads of one key head in one product, so that no key is repeated in memory
            scores = queries.unflatten(1, (-1, shared)).flatten(2, 3) @ keys
            yield block, scores.unflatten(2, (shared, -1)).flatten(1, 2)
