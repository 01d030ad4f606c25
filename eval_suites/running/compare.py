"""Compare rows sample by sample: with random choice at equal cost, on samples that need detail, with each other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from foveate.eval_suites.results.rows import Row

__all__ = ["Difference", "compare", "holm", "paired", "resampled_means"]

_RESAMPLES = 2000
_ROOM = 1.05  # mean tokens beyond the budget's, as a factor, that still count as the budget


@dataclass(frozen=True)
class Difference:
    """Mean difference of two rows' scores on the same samples.

    Attributes:
        mean: of the differences.
        low, high: 95 % interval of the paired bootstrap.
        p: two-sided, of a sign-flip permutation test; :func:`compare` corrects it for the number of methods.
    """

    mean: float
    low: float
    high: float
    p: float


def paired(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Difference:
    """``a`` minus ``b``, which are scores of the same samples in the same order.

    The bootstrap draws samples with replacement (percentile interval); the test flips the signs of the differences,
    which are as likely either way if the two do not differ.
    """
    delta = np.asarray(a, float) - np.asarray(b, float)
    rng = np.random.default_rng(seed)
    low, high = np.percentile(resampled_means(delta, rng), (2.5, 97.5))
    moved = delta[delta != 0]
    sizes, counts = _grouped(np.abs(moved))
    flipped = (2 * rng.binomial(counts, 0.5, (_RESAMPLES, len(sizes))) - counts) @ sizes
    extreme = int((np.abs(flipped) >= abs(moved.sum()) - 1e-9).sum())
    return Difference(float(delta.mean()), float(low), float(high), (1 + extreme) / (1 + _RESAMPLES))


def resampled_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of as many samples drawn with replacement, 2000 times."""
    distinct, counts = _grouped(values)
    return rng.multinomial(len(values), counts / len(values), _RESAMPLES) @ distinct / len(values)


def _grouped(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different values, and how often each is there: what is equal can be drawn together.

    Of more than 1000 those within 0.001 are one, their mean, so that the largest suite takes little time and memory.
    """
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= 1000:
        return distinct, counts
    _, group, counts = np.unique(np.round(values, 3), return_inverse=True, return_counts=True)
    return np.bincount(group, values) / counts, counts


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979): p-values that hold for all tests together, in the given order."""
    corrected, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = highest
    return corrected


def compare(rows: Sequence[Row]) -> None:
    """Fill in ``versus_random``, ``hard`` and ``leads`` of rows of one bench that have scores."""
    scored = [row for row in rows if row.scores]
    control = _Control(scored)
    sections: dict[Any, list[Row]] = {}
    for row in scored:
        sections.setdefault((type(row.keep), row.keep), []).append(row)
    for section in sections.values():
        small = next((row for row in section if row.method == "downsample"), None)
        for row in section:
            if small is not None and row is not small:
                wrong = [score for score, blurred in zip(row.scores, small.scores) if blurred < 0.5]
                row.hard, row.hard_n = (statistics.fmean(wrong) if wrong else None), len(wrong)
        judged = [row for row in section if row.method not in ("unpruned", "no-image", "random")]
        for row in judged:
            row.versus_random = control.difference(row)
        against = [row for row in judged if row.versus_random is not None]
        for row, p in zip(against, holm([row.versus_random.p for row in against])):
            row.versus_random = replace(row.versus_random, p=p)
        _mark_leaders([row for row in judged if not row.baseline])


def _mark_leaders(methods: Sequence[Row]) -> None:
    """Mark the best method of a budget and those that cannot be told from it; nobody if that is everybody.

    Methods that saw more tokens on the average than the budget, because they prune late, do not compete.
    """
    entered = [row for row in methods if row.kept_requested and row.tokens_mean <= _ROOM * row.kept_requested + 1]
    if len(entered) < 2:
        return
    best = max(entered, key=lambda row: row.accuracy)
    leaders = [row for row in entered if row is best or paired(best.scores, row.scores).low <= 0]
    if len(leaders) < len(entered):
        for row in leaders:
            row.leads = row.versus_random is None or row.versus_random.low > 0


class _Control:
    """Random choice at any cost: its scores, sample by sample, interpolated between budgets by mean tokens per layer.

    A method that prunes inside the decoder sees more tokens than its budget says. What it has to beat is random choice
    with as many tokens on the average, which no single random row needs to have.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        budgets: dict[float, list[Row]] = {}
        for row in rows:
            if row.method == "random":
                budgets.setdefault(row.tokens_mean, []).append(row)
        self.points: list[tuple[float, np.ndarray]] = sorted(
            (tokens, np.mean([row.scores for row in group], axis=0)) for tokens, group in budgets.items()
        )
        whole = next((row for row in rows if row.method == "unpruned"), None)
        if self.points and whole is not None and whole.tokens_mean > self.points[-1][0]:
            self.points.append((whole.tokens_mean, np.asarray(whole.scores, float)))

    def difference(self, row: Row) -> Difference | None:
        """``row`` minus random choice with as many tokens; None where that is not known (fewer than any random row)."""
        tokens = row.tokens_mean
        for (few, low), (many, high) in zip(self.points, self.points[1:]):
            if few <= tokens <= many:
                share = (tokens - few) / (many - few)
                return paired(row.scores, (1 - share) * low + share * high)
        if self.points and tokens > 0.9 * self.points[0][0]:  # a rounding below the smallest budget, or all of them
            return paired(row.scores, self.points[0 if tokens < self.points[0][0] else -1][1])
        return None
