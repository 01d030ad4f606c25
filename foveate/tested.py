"""The releases that foveate's tests were run with: the one place that says so. Loads nothing but the standard library.

`make check-releases` compares the newest ones with the package index. After testing a newer release, write it here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["TESTED", "Tested", "minor", "release"]


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparing: ``"2.15.0+cu132"`` gives ``(2, 15)``, as ``"2.15"`` does."""
    numbers = re.match(r"v?(\d+(?:\.\d+)*)", version)
    if numbers is None:
        raise ValueError(f"{version!r} is not a version; it has to begin with numbers, as 2.15.0 does")
    parts = [int(number) for number in numbers[1].split(".")]
    while len(parts) > 1 and not parts[-1]:
        parts.pop()
    return tuple(parts)


def minor(version: str) -> tuple[int, int]:
    """The minor release that a version belongs to: ``"5.24.1"`` gives ``(5, 24)``."""
    major, number, *_ = (*release(version), 0)
    return major, number


@dataclass(frozen=True)
class Tested:
    """What the tests were run with, of one package.

    oldest: the oldest release that passes (version)
    newest: the newest release that passes (version)
    between: other releases that pass, one for each further minor release (versions)
    """

    oldest: str
    newest: str
    between: tuple[str, ...] = ()

    @property
    def minors(self) -> tuple[tuple[int, int], ...]:
        """Every minor release tested, oldest first."""
        return tuple(sorted({minor(version) for version in (self.oldest, *self.between, self.newest)}))


# By the name on the package index. `make test` covers all but the last two, which have environments of their own.
TESTED = {
    "transformers": Tested(
        oldest="5.16.0",
        newest="5.24.0",
        between=("5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0"),
    ),
    "torch": Tested(oldest="2.7.0", newest="2.15.0"),
    "torchvision": Tested(oldest="0.22.0", newest="0.29.2"),
    "timm": Tested(oldest="1.0.26", newest="1.0.31"),
    "open_clip_torch": Tested(oldest="2.32.0", newest="3.3.0"),
    "gradio": Tested(oldest="6.0.0", newest="6.31.0"),
    "accelerate": Tested(oldest="1.1.0", newest="1.15.0"),
    "cupy-cuda13x": Tested(oldest="14.0.0", newest="14.2.0"),
    "av": Tested(oldest="14.0.0", newest="18.1.0"),
    "lmms-eval": Tested(oldest="0.7.3", newest="0.7.3"),
    "vllm": Tested(oldest="0.32.0", newest="0.33.0"),  # 0.33 once, by hand: docs/serving.md
}
