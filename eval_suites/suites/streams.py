"""What the embedded suites draw from: random numbers of which no two uses of their generators draw alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

TRAINING, SAMPLES, CHECKS = 0, 1, 2
"""First number of a seed: of a recipe's batches, of a suite's ``samples()``, of a recipe's held-out checks."""


def numbered(limit: int | None, seed: int) -> Iterator[tuple[int, np.random.Generator]]:
    """Number and generator of each of a suite's samples; endless when ``limit`` is None."""
    for index in itertools.count() if limit is None else range(limit):
        yield index, np.random.default_rng((SAMPLES, seed, index))
