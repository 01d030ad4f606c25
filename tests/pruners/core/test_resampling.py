"""The five assigners, against loops."""

from __future__ import annotations

import pytest
import torch

from foveate.pruners.core.resampling import GRID, PLANS, matching_rounds, merged, pooled


@pytest.mark.parametrize("assigner", sorted(PLANS))
def test_assigners_agree_with_a_plain_account(assigner: str) -> None:
    """Statement: each assigner gives what its definition says, cell by cell (spelled out in loops), and in batches."""
    g = torch.Generator().manual_seed(0)
    frames = torch.randn(2, 5, 5, 3, generator=g)
    cells = (3, 2) if assigner in GRID else 7
    found = PLANS[assigner](frames, cells)(frames)
    for frame, mine in zip(frames, found):
        torch.testing.assert_close(mine, PLAIN[assigner](frame, cells), rtol=0, atol=1e-5)


def plain_bilinear(frame: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
    rows, cols = frame.shape[:2]
    made = []
    for i in range(cells[0]):
        for j in range(cells[1]):
            y, x = max((i + 0.5) * rows / cells[0] - 0.5, 0), max((j + 0.5) * cols / cells[1] - 0.5, 0)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, rows - 1), min(left + 1, cols - 1)
            upper = frame[top, left] * (1 - x + left) + frame[top, right] * (x - left)
            lower = frame[bottom, left] * (1 - x + left) + frame[bottom, right] * (x - left)
            made.append(upper * (1 - y + top) + lower * (y - top))
    return torch.stack(made)


def plain_average(frame: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
    (rows, cols), (h, w) = frame.shape[:2], cells
    return torch.stack(
        [
            frame[i * rows // h : -(-(i + 1) * rows // h), j * cols // w : -(-(j + 1) * cols // w)].mean(dim=(0, 1))
            for i in range(h)
            for j in range(w)
        ]
    )


def plain_tome(tokens: torch.Tensor, k: int) -> torch.Tensor:
    while len(tokens) > k:
        unit = tokens.double() / tokens.double().norm(dim=-1, keepdim=True)
        best = [max((float(unit[a] @ unit[b]), -b) for b in range(1, len(tokens), 2)) for a in range(0, len(tokens), 2)]
        order = sorted(range(len(best)), key=lambda a: -best[a][0])
        r = min(len(tokens) - k, len(tokens) // 2)
        joined = {b: [tokens[b]] for b in range(1, len(tokens), 2)}
        for a in order[:r]:
            joined[-best[a][1]].append(tokens[2 * a])
        tokens = torch.stack([tokens[2 * a] for a in order[r:]] + [torch.stack(j).mean(0) for j in joined.values()])
    return tokens


def plain_separable(frame: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
    rows = torch.stack([plain_tome(row, cells[1]) for row in frame])
    return torch.stack([plain_tome(rows[:, j], cells[0]) for j in range(cells[1])], dim=1).flatten(0, 1)


PLAIN = {
    "bilinear": plain_bilinear,
    "adaptive_avg": plain_average,
    "linspace": lambda frame, k: frame.flatten(0, 1)[[int(i * 24 / (k - 1)) for i in range(k)]],
    "tome": lambda frame, k: plain_tome(frame.flatten(0, 1), k),
    "separable_tome": plain_separable,
}


def test_merging_can_be_repeated_on_other_features() -> None:
    """Statement: the rounds found on some features merge others the same way, so that DeepStack levels can follow."""
    x = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(1))
    rounds = matching_rounds(x, 4)
    torch.testing.assert_close(merged(torch.cat([x, 2 * x], dim=-1), rounds)[..., 4:], 2 * merged(x, rounds))


def test_pooling_halves_both_sides_rounding_up() -> None:
    """Statement: the model's own pooling makes 27 x 27 patches 14 x 14 tokens."""
    assert pooled(torch.zeros(2, 27, 27, 1)).shape == (2, 14, 14, 1)
