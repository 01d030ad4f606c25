"""Greedy subset selection. Inputs may have any float dtype; arithmetic is float32, ties go to the lower index.

Every pick depends on those before it, so what counts is the time of one pick. On CUDA the kernels of ``greedy.cu`` make
all picks of an image in one launch, from similarities that tensor cores computed before; for images with more than
11,585 tokens one launch makes one pick, on all multiprocessors. Similarities are never rounded below float32, but their
last bits depend on the device, and so may a pick between two tokens that differ in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from foveate.cuda.dispatch import operation
from foveate.cuda.launch import TYPES, launch, rows
from foveate.cuda.similarity import gram, inverse_norms
from foveate.errors import ParameterError

_TINY = 1e-12
# of a determinantal gain, relative to the token's own kernel entry, after hundreds of float32 updates
_ROUND_OFF = 1e-5
_GRAM_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 27}  # similarities held at once: 128 and 512 MiB of float32
_BLOCK_ELEMENTS = 1 << 22  # the same where they are only looked through
_OBJECTIVES = ("max_min", "max_sum")

# -------------------------------------------------------------------------------------------------- public functions


def diverse_subset(features: Tensor, k: int, start: Tensor | None = None, *, objective: str = "max_min") -> Tensor:
    """Greedy diversity by cosine similarity.

    Args:
        features: ``(B, N, D)``, finite; zero rows count as orthogonal to everything.
        k: tokens to pick, 1 <= k <= N.
        start: ``(B,)`` int64 first picks; None takes the most isolated token, whose nearest other token is farthest.
        objective: ``"max_min"`` takes the token farthest from its nearest pick (farthest-first traversal, k-center),
            ``"max_sum"`` the one with the smallest summed similarity to all picks.

    Returns:
        ``(B, k)`` int64 in order of selection, without repetition. O(N^2 D) once, then O(N) per pick; memory O(N D) and
        128 MiB of similarities (CUDA: 512), beyond which they are computed pick by pick, O(N D) each.

    Raises:
        ParameterError: ``k`` or ``objective``.
    """
    _check_k(k, features)
    if objective not in _OBJECTIVES:
        raise ParameterError(f"objective={objective!r} is not one of {', '.join(map(repr, _OBJECTIVES))}")
    return _diverse(features.detach(), k, start, objective == "max_sum")


def conditional_dpp(features: Tensor, relevance: Tensor, k: int) -> Tensor:
    """Greedy MAP of a determinantal point process with kernel ``r_i (x_i . x_j) r_j`` (CDPruner).

    Args:
        features: ``(B, N, D)``, finite, normalised here.
        relevance: ``(B, N)``, non-negative.
        k: tokens to pick. Gains within float32 round-off of zero count as zero, and beyond the kernel's rank all do:
            the lowest free indices follow.

    Returns:
        ``(B, k)`` int64 in order of selection, without repetition. O(N^2 D + k^2 N); memory O(N (D + k)) and 128 MiB of
        similarities (CUDA: 512), beyond which they are computed pick by pick, O(N D) each.

    Raises:
        ParameterError: ``k``.
    """
    _check_k(k, features)
    return _dpp(features.detach(), relevance.detach(), k)


def _check_k(k: int, features: Tensor) -> None:
    if not 1 <= k <= features.shape[1]:
        raise ParameterError(f"k={k} tokens cannot be picked from {features.shape[1]}; use 1 to {features.shape[1]}")


def most_with_gram(device: torch.device) -> int:
    """Tokens of an image beyond which its similarities are computed pick by pick."""
    return math.isqrt(_gram_elements(device))


def _images_at_once(features: Tensor) -> int:
    """Images whose similarities are held together; 0 if not even one's are."""
    return _gram_elements(features.device) // features.shape[1] ** 2


def _gram_elements(device: torch.device) -> int:
    return _GRAM_ELEMENTS.get(device.type, _GRAM_ELEMENTS["cpu"])


# ------------------------------------------------------------------------------------------------------------ kernels

_FILE = "greedy.cu"
_STEP_ROWS = 64  # tokens of a block of diverse_step


def _diverse_kernel(features: Tensor, k: int, start: Tensor | None, max_sum: bool) -> Tensor:
    features = rows(features)
    batch, n, depth = features.shape
    start = None if start is None else start.long().contiguous()
    picks = torch.empty(batch, k, dtype=torch.int64, device=features.device)
    inverse, limit = inverse_norms(features), np.int32(max_sum)
    at_once = _images_at_once(features)
    if not at_once:
        picks[:, 0] = gram(features, inverse, write=False)[1].amax(dim=1).argmin(dim=1) if start is None else start
        score = features.new_empty(batch, n, dtype=torch.float32)
        _in_steps("diverse_step", features, inverse, (limit, score), picks, shared=4 * depth)
        return picks
    for part in _parts(batch, at_once):
        x = features[part]
        cosines, nearest = gram(x, inverse[part])
        args = (cosines, nearest, np.int32(nearest.shape[1]), None if start is None else start[part])
        sizes = (np.int32(n), np.int32(k), limit, picks[part])
        launch(_FILE, "diverse", (len(x), 1, 1), 1024, (*args, *sizes), shared=4 * n, device=x.device)
    return picks


def _dpp_kernel(features: Tensor, relevance: Tensor, k: int) -> Tensor:
    features, relevance = rows(features), relevance.float().contiguous()
    batch, n, depth = features.shape
    picks = torch.empty(batch, k, dtype=torch.int64, device=features.device)
    inverse, noise = inverse_norms(features), np.float32(_ROUND_OFF)
    diagonal = relevance.square() * (inverse < 1 / _TINY)
    at_once = _images_at_once(features)
    # without similarities, the factors are what takes room
    for part in _parts(batch, at_once or max(1, _gram_elements(features.device) // (k * n))):
        x, relevant, own = features[part], relevance[part], diagonal[part]
        factors = own.new_empty(len(x), k, n)
        if at_once:
            cosines, _ = gram(x, inverse[part])
            args = (cosines, relevant, own, noise, np.int32(n), np.int32(k), factors, picks[part])
            launch(_FILE, "conditional_dpp", (len(x), 1, 1), 1024, args, shared=4 * (n + k), device=x.device)
        else:
            picks[part, 0] = own.nan_to_num(0.0, 0.0).argmax(dim=1)
            args = (relevant, own, noise, own.clone(), factors)
            _in_steps("dpp_step", x, inverse[part], args, picks[part], shared=4 * (depth + k))
    return picks


def _in_steps(
    kernel: str, x: Tensor, inverse: Tensor, args: tuple[Tensor | np.generic, ...], picks: Tensor, *, shared: int
) -> None:
    """One launch per pick, for images with too many tokens to hold their similarities. ``picks`` has the first pick."""
    (batch, n, depth), k = x.shape, picks.shape[1]
    blocks = -(-n // _STEP_ROWS)
    lows = torch.empty(2, batch, blocks, dtype=torch.int64, device=x.device)
    tokens = (x, np.int64(x.stride(0)), np.int64(x.stride(1)), inverse, np.int32(n), np.int32(depth), np.int32(k))
    kernel = f"{kernel}<{TYPES[x.dtype]}>"
    for step in range(k):
        values = (*tokens, np.int32(step), *args, lows, picks)
        launch(_FILE, kernel, (blocks, batch, 1), 256, values, shared=shared, device=x.device)


def _parts(batch: int, at_once: int) -> Iterator[slice]:
    return (slice(first, first + at_once) for first in range(0, batch, at_once))


# ---------------------------------------------------------------------------------------------------- torch references


def _indices(features: Tensor, k: int) -> Tensor:
    return features.new_empty(len(features), k, dtype=torch.int64)


@operation(
    "diverse_subset(Tensor features, int k, Tensor? start, bool max_sum) -> Tensor",
    kernel=_diverse_kernel,
    fake=lambda features, k, start, max_sum: _indices(features, k),
)
def _diverse(features: Tensor, k: int, start: Tensor | None, max_sum: bool) -> Tensor:
    picks = [
        _diverse_group(similarities, k, None if start is None else start[part], max_sum)
        for part, similarities in _similarities(features)
    ]
    return torch.cat(picks)


def _diverse_group(similarities: _Similarities, k: int, start: Tensor | None, max_sum: bool) -> Tensor:
    if start is None:
        start = similarities.with_nearest().argmin(dim=1)
    picks = [start]
    score = similarities.of(start).clone()
    batch = torch.arange(len(score), device=score.device)
    score[batch, start] = torch.inf
    for _ in range(k - 1):
        pick = score.argmin(dim=1)
        picks.append(pick)
        similarity = similarities.of(pick)
        # a picked token's score is inf, and stays inf under both updates
        score = score + similarity if max_sum else torch.maximum(score, similarity)
        score[batch, pick] = torch.inf
    return torch.stack(picks, dim=1)


@operation(
    "conditional_dpp(Tensor features, Tensor relevance, int k) -> Tensor",
    kernel=_dpp_kernel,
    fake=lambda features, relevance, k: _indices(features, k),
)
def _dpp(features: Tensor, relevance: Tensor, k: int) -> Tensor:
    return torch.cat([_dpp_group(group, relevance[part].float(), k) for part, group in _similarities(features)])


def _dpp_group(similarities: _Similarities, relevance: Tensor, k: int) -> Tensor:
    batch, n = relevance.shape
    items = torch.arange(batch, device=relevance.device)
    # the diagonal free of round-off, which would break the ties of equally relevant tokens
    gain = relevance.square() * similarities.unit.any(dim=-1)  # (B, N)
    noise = _ROUND_OFF * gain
    taken = torch.zeros_like(gain, dtype=torch.bool)
    factors = gain.new_zeros(batch, k, n)
    picks = []
    for step in range(k):
        pick = gain.where(gain > noise, 0.0).masked_fill(taken, -torch.inf).argmax(dim=1)
        picks.append(pick)
        taken[items, pick] = True
        left, adds = gain[items, pick], (gain > noise)[items, pick]
        projected = (factors[items, :step, pick][:, None] @ factors[:, :step]).squeeze(1) if step else 0.0
        kernel = relevance[items, pick][:, None] * similarities.of(pick) * relevance
        factor = (kernel - projected) / left.where(adds, 1.0).sqrt()[:, None]
        factor = factor.where(adds[:, None], 0.0)
        factors[:, step] = factor
        gain = gain - factor.square()
    return torch.stack(picks, dim=1)


class _Similarities:
    """Cosines of all pairs of tokens of some images: all at once where they are few, else row by row."""

    def __init__(self, unit: Tensor, whole: bool) -> None:
        self.unit = unit  # (B, N, D)
        self.gram = unit @ unit.mT if whole else None
        self.items = torch.arange(len(unit), device=unit.device)

    def of(self, token: Tensor) -> Tensor:
        """Of one token of every image ``(B,)`` with all others: ``(B, N)``."""
        if self.gram is not None:
            return self.gram[self.items, token]
        return (self.unit @ self.unit[self.items, token][..., None]).squeeze(-1)

    def with_nearest(self) -> Tensor:
        """Of every token with the other token nearest to it: ``(B, N)``, equal for two that are nearest to each other.

        The two products of a pair, row by column and column by row, may differ in their last bits; the larger counts
        for both.
        """
        batch, n, _ = self.unit.shape
        if self.gram is not None:
            others = _without_self(self.gram.clone(), 0)
            return torch.maximum(others.amax(dim=-1), others.amax(dim=-2))
        step = max(1, _BLOCK_ELEMENTS // (batch * n))
        nearest = self.unit.new_full((batch, n), -torch.inf)
        block = self.unit.new_empty(batch, min(step, n), n)  # one for all: an allocator may not find a freed one again
        for start in range(0, n, step):
            rows = self.unit[:, start : start + step]
            similarities = torch.matmul(rows, self.unit.mT, out=block[:, : rows.shape[1]])
            nearest = torch.maximum(nearest, _without_self(similarities, start).amax(dim=1))
            own = nearest[:, start : start + step]
            torch.maximum(own, similarities.amax(dim=-1), out=own)
        return nearest


def _without_self(similarities: Tensor, start: int) -> Tensor:
    """``(B, rows, N)`` of the tokens from ``start`` on, -inf with themselves."""
    similarities.diagonal(start, dim1=-2, dim2=-1).fill_(-torch.inf)
    return similarities


def _similarities(features: Tensor) -> Iterator[tuple[slice, _Similarities]]:
    """Groups of images as large as memory allows."""
    at_once = _images_at_once(features)
    for part in _parts(len(features), max(1, at_once)):
        yield part, _Similarities(_unit(features[part]), whole=at_once > 0)


def _unit(features: Tensor) -> Tensor:
    """Rows of length 1 in float32; zero rows stay zero."""
    x = features.float()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=_TINY)
    return x / norm if x.dtype == features.dtype else x.div_(norm)  # a conversion's copy is ours
