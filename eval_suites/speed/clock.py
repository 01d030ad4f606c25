"""The clock of all measurements of speed."""

from __future__ import annotations

import time

import torch

__all__ = ["Clock", "now", "own_time"]


def own_time(device: torch.device) -> bool:
    """Whether the thread's own time is taken: of one CPU thread, so that others do not count.

    With several threads the process's own time is the sum over all of them, which grows where the work gets faster.
    """
    return device.type == "cpu" and torch.get_num_threads() == 1


def now(device: torch.device) -> float:
    """Seconds, with the device's work done: the thread's own (:func:`own_time`), else those on the wall."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if own_time(device) else time.perf_counter()


class Clock:
    """Seconds since it was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began = now(device)

    def lap(self) -> float:
        """Seconds since the clock was made."""
        return now(self.device) - self.began
