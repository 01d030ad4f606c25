"""Load every kernel ahead of time."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from foveate.cuda.attention import (
    class_attention,
    given_attention,
    received_attention,
    rows_to_columns_attention,
)
from foveate.cuda.gather import gather_tokens
from foveate.cuda.merging import best_match, merge_tokens, similarity_energy
from foveate.cuda.neurons import match_counts
from foveate.cuda.selection import conditional_dpp, diverse_subset, most_with_gram
from foveate.cuda.transitions import transition_score


def warmup(
    device: torch.device | str = "cuda",
    *,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    head_dims: Iterable[int] = (64, 128),
) -> None:
    """Compile and load all kernels for some kinds of input, by running every operation once on a few tokens.

    The first time on a machine this takes about a second per kernel; later calls read CuPy's cache on disk. Needed
    before a CUDA-graph capture, which no compilation may interrupt; otherwise kernels load when they are first called.
    """
    for dtype in dtypes:
        for d in head_dims:
            q = torch.zeros(1, 1, 8, d, dtype=dtype, device=device)
            received_attention(q, q)
            received_attention(q, q, causal=True)
            given_attention(q, q, first=1)
            class_attention(q, q)
            for rows in (16, 40):  # a few, and more
                q = torch.zeros(1, 1, rows, d, dtype=dtype, device=device)
                rows_to_columns_attention(q, q, row_positions=torch.arange(rows, device=device)[None])
        x = torch.zeros(1, 8, 64, dtype=dtype, device=device)
        diverse_subset(x, 2)
        many = torch.zeros(1, most_with_gram(x.device) + 1, 8, dtype=dtype, device=device)
        diverse_subset(many, 2, torch.zeros(1, dtype=torch.int64, device=device))
        conditional_dpp(many, torch.ones(1, many.shape[1], device=device), 2)
        conditional_dpp(x, torch.ones(1, 8, device=device), 2)
        similarity_energy(x, 0.5)
        best_match(x, x)
        merge_tokens(x, *torch.zeros(3, 1, 2, dtype=torch.int64, device=device))
        transition_score(x, x)
        for width in (64, 2, 1):  # rows move in words of 16 bytes or fewer
            gather_tokens(x[..., :width].contiguous(), torch.zeros(1, 2, dtype=torch.int64, device=device))
        match_counts(x, x[:, 0] > 0)
    active = torch.zeros(1, 8, 64, dtype=torch.bool, device=device)
    match_counts(active, active[:, 0])
