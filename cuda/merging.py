"""What token mergers need: how redundant a token is, its nearest partner, and the weighted mean of a group.

Inputs may have any float dtype and strides; scores are float32 products of float32 factors, also where TF32 is allowed:
the groups depend on the order of scores, which coarser products change. Their last bits depend on the processor, and so
may the choice between targets whose scores differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from foveate.cuda.dispatch import KernelUnavailable, operation, rows_at_once
from foveate.cuda.launch import TYPES, launch, rows
from foveate.cuda.similarity import energy, match

_TINY = 1e-12


def similarity_energy(metric: Tensor, margin: float, *, alpha: float = 1.0, jump: bool = False) -> Tensor:
    """PiToMe's energy: how much a token resembles all others (arXiv 2405.16148, section 3.2).

    ``E_i = mean_j f(cos(metric_i, metric_j))`` over all j, itself included, where ``f(x) = x - margin`` above the
    margin and ``alpha * (exp(x - margin) - 1)`` below.

    Args:
        metric: ``(B, N, C)``, normalised here; a zero row is similar to nothing.
        jump: the paper's f, which is ``x`` itself above the margin; the published code subtracts the margin.

    Returns:
        ``(B, N)`` float32, without gradient. O(N^2 C) time; holds one block of rows of the N x N similarities.
    """
    return _energy(metric.detach(), margin, alpha, jump)


def best_match(
    sources: Tensor, targets: Tensor, *, source_valid: Tensor | None = None, target_valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The target most similar to every source, by cosine.

    Args:
        sources: ``(B, S, C)``; zero rows have similarity 0 to everything.
        targets: ``(B, T, C)``, T >= 1, zero rows likewise.
        source_valid: ``(B, S)`` bool, False gives score -inf.
        target_valid: ``(B, T)`` bool, False is never a match.

    Returns:
        ``(B, S)`` float32 similarity, without gradient, and ``(B, S)`` int64 target, the lower of equally similar ones.
        O(S T C) time; holds one block of rows of the S x T similarities.
    """
    score, index = _match(sources.detach(), targets.detach(), None if target_valid is None else target_valid.bool())
    if source_valid is not None:
        score = score.masked_fill(~source_valid.bool(), -torch.inf)
    return score, index


def merge_tokens(
    x: Tensor, keep: Tensor, source: Tensor, target: Tensor, sizes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Replace some tokens by the weighted mean of themselves and those that merge into them; drop the merged ones.

    Written to be cheap where few tokens merge: rows that stay are copied once, and only the r sources and their targets
    are computed with. O((K + r) C) time and memory.

    Args:
        x: ``(B, N, C)``.
        keep: ``(B, K)`` int64, the rows that stay, in the order in which they leave.
        source: ``(B, r)`` int64, rows that merge.
        target: ``(B, r)`` int64, the *positions in keep* that they merge into. Several may share one.
        sizes: ``(B, N)`` float32 weights, the number of patches in each row; None = all one.

    Returns:
        ``(B, K, C)`` in the dtype of ``x``, and ``(B, K)`` float32 new sizes. Means are taken in float32, or in float64
        for float64 input.
    """
    return _merge(x, keep, source, target, sizes)


def merged_sizes(keep: Tensor, source: Tensor, target: Tensor, sizes: Tensor | None = None) -> Tensor:
    """The sizes of :func:`merge_tokens` alone: ``(B, K)`` float32."""
    if sizes is None:
        ones = torch.ones(keep.shape, device=keep.device)
        return ones.scatter_add_(1, target, torch.ones(source.shape, device=keep.device))
    return sizes.gather(1, keep).scatter_add_(1, target, sizes.gather(1, source))


def size_bias(sizes: Tensor) -> Tensor:
    """What to add to the attention logits of keys that stand for several patches each: ``(B, 1, 1, N)`` float32.

    A key with bias ``log s`` weighs in the softmax like s equal keys.

    Args:
        sizes: ``(B, N)``, patches per key.
    """
    return sizes.float().log().unsqueeze(1).unsqueeze(1)


# ------------------------------------------------------------------------------------------------------------ kernels


def _merge_kernel(
    x: Tensor, keep: Tensor, source: Tensor, target: Tensor, sizes: Tensor | None
) -> tuple[Tensor, Tensor]:
    (batch, n, depth), kept, merged = x.shape, keep.shape[1], source.shape[1]
    if x.dtype not in TYPES:
        raise KernelUnavailable(f"the kernel of merge_tokens was not written for {x.dtype}")
    x = rows(x)
    out, after = x.new_empty(batch, kept, depth), x.new_empty(batch, kept, dtype=torch.float32)
    lists = (index.long().contiguous() for index in (keep, source, target))
    sizes = None if sizes is None else sizes.float().contiguous()
    numbers = map(np.int32, (n, depth, kept, merged))
    args = (x, np.int64(x.stride(0)), np.int64(x.stride(1)), *lists, sizes, *numbers, out, after)
    grid = (-(-kept // 8), batch, 1)
    shared = 4 * 8 * -(-merged // 8)
    launch("tokens.cu", f"merge<{TYPES[x.dtype]}>", grid, 256, args, shared=shared, device=x.device)
    return out, after


# ---------------------------------------------------------------------------------------------------- torch references


@operation(
    "similarity_energy(Tensor metric, float margin, float alpha, bool jump) -> Tensor",
    kernel=energy,
    fake=lambda metric, *_: metric.new_empty(metric.shape[:2], dtype=torch.float32),
)
def _energy(metric: Tensor, margin: float, alpha: float, jump: bool) -> Tensor:
    unit = _unit(metric)
    energy = []
    for block in _row_blocks(unit, unit.shape[1]):
        excess = torch.bmm(block, unit.mT).sub_(margin)  # (B, rows, N)
        above = excess.relu()
        if jump:
            above = above + margin * (above > 0)
        # the two halves of an ELU: `exp` of what lies below, 1 for the rest, is far cheaper than the `expm1` in `elu`
        below = excess.clamp_(max=0).exp_().mean(dim=-1) - 1
        energy.append(above.mean(dim=-1).add_(below, alpha=alpha))
    return torch.cat(energy, dim=1) if len(energy) > 1 else energy[0]


def _fake_match(sources: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    shape = sources.shape[:2]
    return sources.new_empty(shape, dtype=torch.float32), sources.new_empty(shape, dtype=torch.int64)


@operation(
    "best_match(Tensor sources, Tensor targets, Tensor? target_valid) -> (Tensor, Tensor)",
    kernel=match,
    fake=_fake_match,
)
def _match(sources: Tensor, targets: Tensor, target_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    sources, targets = sources.float(), _unit(targets)
    best = []
    for block in _row_blocks(sources, targets.shape[1]):
        score = torch.bmm(block, targets.mT)  # (B, rows, T)
        if target_valid is not None:
            score.masked_fill_(~target_valid[:, None], -torch.inf)
        best.append(score.max(dim=-1))  # of equal ones the first
    score, index = best[0] if len(best) == 1 else (torch.cat(parts, dim=1) for parts in zip(*best))
    score = score / _length(sources)  # a factor of all scores of a source
    if target_valid is not None:  # a length that overflows has made NaN of -inf
        score = score.masked_fill(~target_valid.any(dim=1, keepdim=True), -torch.inf)
    return score, index


def _unit(x: Tensor) -> Tensor:
    """Rows of length one in float32; zero rows stay zero."""
    x = x.float()
    return x / _length(x).unsqueeze(-1)


def _length(x: Tensor) -> Tensor:
    """The length of rows ``x (..., C)``, of zero rows a tiny one."""
    return torch.linalg.vector_norm(x, dim=-1).clamp(min=_TINY)


def _row_blocks(rows: Tensor, columns: int) -> Sequence[Tensor]:
    """``rows (B, N, C)`` in blocks whose products with ``columns`` vectors just fill the block size."""
    step = rows_at_once(len(rows) * columns)
    return rows.split(step, dim=1) if step < rows.shape[1] else (rows,)


def _fake_merge(x: Tensor, keep: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(*keep.shape, x.shape[-1]), x.new_empty(keep.shape, dtype=torch.float32)


@operation(
    "merge_tokens(Tensor x, Tensor keep, Tensor source, Tensor target, Tensor? sizes) -> (Tensor, Tensor)",
    kernel=_merge_kernel,
    fake=_fake_merge,
)
def _merge(x: Tensor, keep: Tensor, source: Tensor, target: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, n, width = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    first = torch.arange(batch, device=x.device).unsqueeze(1)  # indexing with None takes longer
    rows = x.reshape(batch * n, width)
    sizes = torch.ones(x.shape[:2], dtype=wide, device=x.device) if sizes is None else sizes.to(wide)
    weight = sizes.gather(1, source)  # `gather` finds wrong indices, which later would be those of other pictures
    after = sizes.gather(1, keep).scatter_add_(1, target, weight)
    share = weight / after.gather(1, target)
    kept = rows.index_select(0, _flat(keep, first, n)).to(wide)  # by whole rows, where `gather` goes by elements
    moved = rows.index_select(0, _flat(source, first, n)).to(wide)
    # the mean of a group is its target and, for each source, that one's share of the way from the target to it
    place = _flat(target, first, keep.shape[1])
    kept.index_add_(0, place, moved.sub_(kept.index_select(0, place)).mul_(share.view(-1, 1)))
    return kept.to(x.dtype).view(*keep.shape, width), after.float()


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x (B, N, C)`` at rows ``index (B, K)``: ``(B, K, C)``."""
    first = torch.arange(len(index), device=index.device).unsqueeze(1)
    return x.reshape(-1, x.shape[-1]).index_select(0, _flat(index, first, x.shape[1])).view(*index.shape, x.shape[-1])


def _flat(index: Tensor, image: Tensor, n: int) -> Tensor:
    """``index (B, K)`` into ``n`` rows of each ``image (B, 1)`` as one into all rows: ``(B * K,)``."""
    return torch.add(index, image, alpha=n).flatten()
