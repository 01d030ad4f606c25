"""What all measurements of speed share: one clock, contenders that take turns, ratios within a round, tables and files.

Contenders take turns in every round and the first of a round changes, so that whatever else the machine does hits all
of them alike. A first round warms up and does not count. Two contenders are compared by the ratios of their times
within each round; a table shows the median of these, with quartiles where it is a goal.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeVar

import torch

from foveate.errors import ParameterError
from foveate.eval_suites.terminal import console

__all__ = [
    "Clock", "ColdTimer", "at_least", "in_turns", "now", "numbers", "order", "own_time", "ratios", "show", "spread",
    "write",
]  # fmt: skip

T = TypeVar("T")


# -------------------------------------------------------------------------------------------------------------- clock


def own_time(device: torch.device) -> bool:
    """Whether the process's own time is taken: of one CPU thread, so that other processes do not count.

    With several threads the process's own time is the sum over all of them, which grows where the work gets faster.
    """
    return device.type == "cpu" and torch.get_num_threads() == 1


def now(device: torch.device) -> float:
    """Seconds, after the device has done its work: the process's own (:func:`own_time`), or else wall-clock time."""
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


class ColdTimer:
    """Seconds of single calls: on CUDA by events, each after a write that clears the L2 cache; elsewhere of a Clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            clock = Clock(self.device)
            call()
            return clock.lap()
        self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)


# -------------------------------------------------------------------------------------------------------------- turns


def order(names: Sequence[T], turn: int) -> list[T]:
    """``names`` in their order of round ``turn``: another one goes first in the next round."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def in_turns(
    contenders: Mapping[str, Callable[[int], T]], rounds: int, seconds: float | None = None
) -> dict[str, list[T]]:
    """What every contender returned in every round.

    Args:
        contenders: name -> function of the round; in round -1 it warms up and what it returns is dropped.
        rounds: counted rounds.
        seconds: a contender that has taken so long leaves, after two counted rounds at the earliest; None: nobody
            leaves.
    """
    found: dict[str, list[T]] = {name: [] for name in contenders}
    taken = dict.fromkeys(contenders, 0.0)
    for turn in range(-1, rounds):
        for name in order(list(contenders), turn):
            if seconds is not None and turn >= 2 and taken[name] > seconds:
                continue
            began = time.perf_counter()
            result = contenders[name](turn)
            if turn >= 0:
                found[name].append(result)
                taken[name] += time.perf_counter() - began
    return found


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Of two contenders' times within each round that both took part in."""
    return [a / b for a, b in zip(over, under)]


def spread(values: Sequence[float], form: str) -> str:
    """Median and quartiles as text; a single value as it is."""
    if len(values) < 2:
        return f"{values[0]:{form}}"
    low, _, high = quantiles(values, n=4)
    return f"{median(values):{form}} ({low:{form}} … {high:{form}})"


# ------------------------------------------------------------------------------------------------- arguments, results


def numbers(option: str, text: str) -> list[int]:
    """The numbers of an option, which are separated by commas.

    Raises:
        ParameterError: something else.
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ParameterError(f"{option} {text!r}: give numbers, for example 1,8,32") from None


def at_least(least: int, given: Mapping[str, int]) -> None:
    """Check numbers, which are given by their names.

    Raises:
        ParameterError: one of them is smaller than ``least``.
    """
    for name, value in given.items():
        if value < least:
            raise ParameterError(f"{name}={value}: give at least {least}")


def show(head: Sequence[str], rows: Sequence[Sequence[str]], *notes: str, title: str = "", width: int = 120) -> None:
    """Print a table, its first column on the left and the numbers on the right, and notes below it."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title or None)
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    page = console(width)
    page.print(table)
    for note in notes:
        page.print(note, style="dim")


def write(path: str | Path | None, result: Any, indent: int = 2) -> None:
    """Write a result as JSON; None: nowhere."""
    if path is not None:
        Path(path).write_text(json.dumps(result, indent=indent, default=str) + "\n", encoding="utf-8")
