"""Rows of a token sequence: gathered with gaps and markers, averaged over runs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foveate.cuda.dispatch import operation
from foveate.cuda.launch import launch
from foveate.errors import ParameterError

_WORDS = {16: "uint4", 4: "unsigned", 2: "unsigned short", 1: "unsigned char"}  # what rows can be moved in


def gather_tokens(
    x: Tensor, index: Tensor, *, marked: Tensor | None = None, marker: Tensor | float | None = None
) -> Tensor:
    """Rows ``index (B, K)`` of ``x (B, N, …)``: ``(B, K, …)`` of x's dtype, bit for bit.

    Args:
        x: any dtype and strides; on CUDA without a copy if every row is contiguous.
        index: int64, -1 gives a row of zeros.
        marked: ``(B, K)`` bool, rows that become ``marker``.
        marker: a number, one row ``(…)``, or one for each, ``(B, K, …)``; needed with ``marked``.

    Reads and writes the K rows once.

    Raises:
        ParameterError: ``marked`` without ``marker``.
    """
    if marked is None:
        return _gather(x, index, None, None)
    if marker is None:
        raise ParameterError("marked rows need a marker: a number or a tensor of rows")
    if not isinstance(marker, Tensor):  # filled on the device: copying it there would wait for it
        marker = torch.full(x.shape[2:], marker, dtype=x.dtype, device=x.device)
    return _gather(x, index, marked, marker)


def run_mean(x: Tensor, run: Tensor, count: int) -> Tensor:
    """Mean of the rows of each run of tokens.

    Args:
        x: ``(B, N, D)``, any float dtype.
        run: ``(B, N)`` int64, the run of each row, -1 for none.
        count: number of runs.

    Returns:
        ``(B, count, D)`` float32, zero for a run without rows.
    """
    inside = (run >= 0)[..., None]
    where = run.clamp(min=0)[..., None].expand_as(x)
    total = x.new_zeros(len(x), max(count, 1), x.shape[2], dtype=torch.float32)
    total = total.scatter_add(1, where, torch.where(inside, x.float(), 0.0))
    size = total.new_zeros(len(x), max(count, 1), 1).scatter_add(1, where[..., :1], inside.float())
    return (total / size.clamp(min=1))[:, :count]


def _gather_kernel(x: Tensor, index: Tensor, marked: Tensor | None, marker: Tensor | None) -> Tensor:
    taken = x.new_empty(*index.shape, *x.shape[2:])
    sources = [_with_whole_rows(x)]
    if marked is not None and marker is not None:
        marked = marked.bool().contiguous()
        sources.append(_with_whole_rows(marker.to(x.dtype).expand(taken.shape)))
    width = sources[0].shape[2] * x.itemsize
    strides = [stride * x.itemsize for source in sources for stride in source.stride()[:2]]
    word = next(
        size for size in _WORDS if all(place % size == 0 for place in (width, *strides, *map(Tensor.data_ptr, sources)))
    )
    steps = [np.int64(stride // word) for stride in (*strides, 0, 0)[:4]]
    numbers = map(np.int32, (x.shape[1], width // word, index.shape[1]))
    marker = sources[1] if marked is not None else None
    args = (sources[0], *steps[:2], index.long().contiguous(), marked, marker, *steps[2:], *numbers, taken)
    grid = (-(-index.shape[1] // 8), len(x), 1)
    launch("tokens.cu", f"gather<{_WORDS[word]}>", grid, 256, args, device=x.device)
    return taken


def _with_whole_rows(x: Tensor) -> Tensor:
    """``(B, N, …) -> (B, N, D)`` with D contiguous; a copy only where it is not."""
    x = x.flatten(2) if x.ndim > 2 else x[..., None]
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@operation(
    "gather_tokens(Tensor x, Tensor index, Tensor? marked, Tensor? marker) -> Tensor",
    kernel=_gather_kernel,
    fake=lambda x, index, *_: x.new_empty(*index.shape, *x.shape[2:]),
)
def _gather(x: Tensor, index: Tensor, marked: Tensor | None, marker: Tensor | None) -> Tensor:
    rows = torch.arange(len(x), device=x.device)[:, None]
    taken = x[rows, index.clamp(min=0)]
    shape = (*index.shape, *[1] * (x.ndim - 2))
    taken = taken.masked_fill((index < 0).view(shape), 0)
    if marked is None or marker is None:
        return taken
    return torch.where(marked.view(shape), marker.to(x.dtype), taken)
