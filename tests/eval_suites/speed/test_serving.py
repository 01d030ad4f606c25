"""`foveate speed serving` without an engine: what it makes of measurements, and what it says without vLLM."""

from __future__ import annotations

import argparse
import importlib.util

import pytest

from foveate.errors import ParameterError, UnsupportedModelError
from foveate.eval_suites.speed import serving as speed_serving
from foveate.eval_suites.speed.serving import Load, table


def load(engine: str, turn: int, per_second: float, users: int = 8) -> Load:
    return Load(engine, users, turn, 64, 153 if engine == "stock" else 45, 0.1, 0.2, per_second, 16 * per_second)


def settings(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    speed_serving.add_arguments(parser)
    return parser.parse_args(given)


def test_the_gain_is_the_median_of_ratios_within_a_round() -> None:
    # the second round ran on a machine of half the speed; medians of either engine alone would say 1.5
    loads = [load("stock", 0, 20), load("pruned", 0, 30), load("pruned", 1, 20), load("stock", 1, 10)]
    loads += [load("stock", 2, 20), load("pruned", 2, 60)]
    *_, stock, pruned = table(loads).splitlines()
    assert [cell.strip() for cell in stock.split("|")[1:-1]] == ["8", "stock", "153", "100", "200", "20.00", ""]
    assert pruned.endswith("| 30.00 | 2.00 (1.50 .. 3.00) |")


def test_concurrencies_are_told_apart() -> None:
    loads = [load(engine, 0, 10 * users, users) for users in (1, 8) for engine in ("stock", "pruned")]
    cells = [[cell.strip() for cell in row.split("|")] for row in table(loads).splitlines()[2:]]
    assert [(row[1], row[6]) for row in cells] == [("1", "10.00"), ("1", "10.00"), ("8", "80.00"), ("8", "80.00")]


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match=r"pip install 'foveate\[vllm\]'"):
        speed_serving.main(settings())


@pytest.mark.parametrize(
    "given", [("--users", "one"), *((name, "0") for name in ("--users", "--rounds", "--requests", "--new", "--side"))]
)
def test_counts_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch, given: tuple[str, str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ParameterError, match=given[0]):
        speed_serving.main(settings(*given))
