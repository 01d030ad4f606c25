"""Promise that a pruned model keeps a share of the unpruned one's accuracy, on samples that were also searched on.

Three known pieces:

- *Relative accuracy as a mean.* "The pruned model has at least ``target`` times the unpruned accuracy" says that
  ``d = pruned - target * unpruned``, sample by sample, has a mean above 0. ``d`` is bounded, and paired.
- *A test by betting* that the mean is not above 0 (Waudby-Smith and Ramdas, "Estimating means of bounded random
  variables by betting", JRSS B 86, 2024). Whoever stakes a share of the wealth on every ``d`` cannot expect to grow
  rich if its mean is at most 0, so that great wealth is evidence, by Markov's inequality, for any number of samples and
  any distribution of the scores: no normal approximation, no bootstrap, which both promise too much where hardly any
  answer changes.
- *Learn then test* (Angelopoulos, Bates, Candès, Jordan and Lei, arXiv 2110.01052): every setting is a hypothesis, and
  the chance that any certified setting breaks the promise is held to ``alpha``. Settings of a chain are tested in an
  order fixed beforehand, from gentle to aggressive, each at the chain's full level, until the first that fails
  (fixed-sequence testing: Maurer, Hothorn and Lehmacher 1995). Chains share ``alpha`` equally (Bonferroni). Walking a
  chain the other way, from aggressive to gentle until something passes, would give every bad setting its own chance to
  pass by luck.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["least_samples", "lower_bound", "p_value", "relative_accuracy"]

_STAKES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)
"""Shares of the wealth that are bet; the mean over all of them is a bet as fair as each."""


def p_value(pruned: Sequence[float], unpruned: Sequence[float], target: float) -> float:
    """Of the hypothesis that the pruned model has less than ``target`` times the unpruned accuracy.

    Args:
        pruned, unpruned: scores in [0, 1] of the same samples; target: > 0.

    Returns:
        A valid p-value for any sample size: under the hypothesis it is at most ``a`` with probability at most ``a``.
        The order of the samples does not matter; they may be drawn with or without replacement.
    """
    d = np.asarray(pruned, float) - target * np.asarray(unpruned, float)
    if not len(d):
        return 1.0
    values, counts = np.unique(d, return_counts=True)
    stakes = np.array(_STAKES)[:, None] / target  # d >= -target, so that no bet loses more than its stake
    wealth = np.log1p(stakes * values) @ counts
    most = wealth.max()
    return float(min(1.0, math.exp(-most) * len(_STAKES) / np.exp(wealth - most).sum()))


def lower_bound(pruned: Sequence[float], unpruned: Sequence[float], alpha: float) -> float:
    """One-sided bound of the relative accuracy: the least target that the samples do not refute at level ``alpha``."""
    low, high = 0.0, 2.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(pruned, unpruned, middle) <= alpha else (low, middle)
    return low


def relative_accuracy(pruned: Sequence[float], unpruned: Sequence[float]) -> float:
    """Accuracy divided by the unpruned model's; NaN if that is 0."""
    whole = math.fsum(unpruned)
    return math.fsum(pruned) / whole if whole else math.nan


def least_samples(target: float, alpha: float, accuracy: float = 1.0) -> float:
    """Samples needed to certify at level ``alpha`` a method that changes no answer; infinite if target >= 1."""
    if target >= 1 or accuracy <= 0:
        return math.inf
    # every sample that is right before and after multiplies the bet's wealth by 1 + stake * (1 - target)
    growth = math.log1p(_STAKES[-1] * (1 - target) / target)
    return math.ceil(math.log(len(_STAKES) / alpha) / growth / accuracy)
