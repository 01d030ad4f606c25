"""The clock of all measurements of speed."""

from __future__ import annotations

import time

import torch

__all__ = ["now"]


def now(device: torch.device) -> float:
    """Seconds, with the device's work done: of one CPU thread its own, so that others do not count, else those on the wall.

    With several threads the process's own time is the sum over all of them, which grows where the work gets faster.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()
