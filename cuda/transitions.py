"""How a sub-block of a decoder layer moves its tokens. Any float dtype; arithmetic and results are float32."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.errors import ParameterError

_TINY = 1e-8  # of norms, as cosine similarity customarily has it
DIRECTIONS = ("signed", "abs")


def transition_score(before: Tensor, after: Tensor, *, direction: str = "signed") -> tuple[Tensor, Tensor]:
    """Size and direction of the step from ``before`` to ``after``, token by token.

    With ``m = |after| / |before|`` and ``e = exp(1 - cos(before, after))`` (``direction="abs"``: of ``|cos|``), a token's
    share is ``m e / sum of e`` over the tokens that count. That sum is left to the caller, who knows which count.

    Args:
        before, after: ``(…, D)``, what enters the sub-block and what it adds to the residual stream.

    Returns:
        ``(m e, e)``, both ``(…)`` float32. Both finite for finite inputs, zero rows included. One pass over the inputs.

    Raises:
        ParameterError: unknown direction.
    """
    if direction not in DIRECTIONS:
        raise ParameterError(f"direction={direction!r} is not one of {', '.join(map(repr, DIRECTIONS))}")
    before, after = before.float(), after.float()
    norm_before = torch.linalg.vector_norm(before, dim=-1).clamp(min=_TINY)
    norm_after = torch.linalg.vector_norm(after, dim=-1)
    dot = torch.einsum("...d,...d->...", before, after)
    cosine = dot / (norm_before * norm_after.clamp(min=_TINY))
    turn = torch.exp(1.0 - (cosine.abs() if direction == "abs" else cosine))
    return norm_after / norm_before * turn, turn
