"""How a sub-block of a decoder layer moves its tokens. Any float dtype; arithmetic and results are float32."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foveate.cuda.dispatch import operation
from foveate.cuda.launch import TYPES, launch, rows
from foveate.errors import ParameterError

_TINY = 1e-8  # of norms, as cosine similarity customarily has it
DIRECTIONS = ("signed", "abs")


def transition_score(before: Tensor, after: Tensor, *, direction: str = "signed") -> tuple[Tensor, Tensor]:
    """Size and direction of the step from ``before`` to ``after``, token by token.

    With ``m = |after| / |before|`` and ``e = exp(1 - cos(before, after))`` (``direction="abs"``: of ``|cos|``), the
    share of a token is ``m e / sum of e`` over the tokens that count. The caller, who knows which count, takes the sum.

    Args:
        before: ``(…, D)``, what enters the sub-block.
        after: ``(…, D)``, what the sub-block adds to the residual stream.
        direction: ``"signed"`` or ``"abs"``.

    Returns:
        ``(m e, e)``, both ``(…)`` float32. Both finite for finite inputs, zero rows included. One pass over the inputs.

    Raises:
        ParameterError: unknown direction.
    """
    if direction not in DIRECTIONS:
        raise ParameterError(f"direction={direction!r} is not one of {', '.join(map(repr, DIRECTIONS))}")
    return _transition(before, after, direction == "abs")


def _transition_kernel(before: Tensor, after: Tensor, absolute: bool) -> tuple[Tensor, Tensor]:
    if before.dtype != after.dtype:
        before, after = before.float(), after.float()
    shape, depth = before.shape[:-1], before.shape[-1]
    before, after = (rows(x.reshape(-1, depth)) for x in (before, after))
    magnitude, turn = (before.new_empty(shape, dtype=torch.float32) for _ in range(2))
    strides = np.int64(before.stride(0)), np.int64(after.stride(0))
    numbers = np.int32(len(before)), np.int32(depth), np.int32(absolute)
    args = (before, after, *strides, *numbers, magnitude, turn)
    grid = (-(-len(before) // 8), 1, 1)
    launch("tokens.cu", f"transition<{TYPES[before.dtype]}>", grid, 256, args, device=before.device)
    return magnitude, turn


def _fake_transition(before: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    magnitude, turn = (before.new_empty(before.shape[:-1], dtype=torch.float32) for _ in range(2))
    return magnitude, turn


@operation(
    "transition_score(Tensor before, Tensor after, bool absolute) -> (Tensor, Tensor)",
    kernel=_transition_kernel,
    fake=_fake_transition,
)
def _transition(before: Tensor, after: Tensor, absolute: bool) -> tuple[Tensor, Tensor]:
    before, after = before.float(), after.float()
    norm_before = torch.linalg.vector_norm(before, dim=-1).clamp(min=_TINY)
    norm_after = torch.linalg.vector_norm(after, dim=-1)
    dot = torch.einsum("...d,...d->...", before, after)
    cosine = dot / (norm_before * norm_after.clamp(min=_TINY))
    turn = torch.exp(1.0 - (cosine.abs() if absolute else cosine))
    return norm_after / norm_before * turn, turn
