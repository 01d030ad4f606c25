"""Statement: the pages of docs/methods say what `docs/method_pages.py` reads from the registry and the results."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from foveate.eval_suites.results.leaderboard import Leaderboard
from foveate.eval_suites.results.rows import Row
from foveate.eval_suites.running.compare import Difference

SCRIPT = Path(__file__).parents[1] / "docs/method_pages.py"


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("method_pages", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_pages_are_up_to_date(pages):
    """Write them again with `python docs/method_pages.py`."""
    wanted = pages.files()
    assert {page.name for page in wanted} >= {f"{name}.md" for name in pages.methods()} | {"README.md"}
    assert set(pages.FOLDER.iterdir()) == set(wanted), "a page or picture of no method"
    stale = [path.name for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
    assert not stale


def test_no_page_is_left_without_its_markers(pages, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- generated -->\nold\n<!-- /generated -->\n")
    assert pages._filled(page, "new") == "<!-- generated -->\nnew\n<!-- /generated -->\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match=r"page\.md has 0 pairs"):
        pages._filled(page, "new")


def measured(label: str, accuracy: float, tokens: float, keep: float | None = 0.5, **more: object) -> Row:
    n = 100
    low, high = max(0.0, accuracy - 0.1), min(1.0, accuracy + 0.1)
    more = {"method": label.partition("(")[0], "tasks": {"count": accuracy, "code": accuracy - 0.1}} | more
    return Row(
        label=label,
        keep=keep,
        n=n,
        correct=accuracy * n,
        accuracy=accuracy,
        interval=(low, high),
        tokens_mean=tokens,
        **more,
    )


@pytest.fixture
def bench(pages):
    better = Difference(mean=0.25, low=0.1, high=0.4, p=0.001)
    rows = [
        measured("unpruned", 0.95, 64, None),
        measured("no-image", 0.2, 64, None),
        measured("random", 0.5, 32, seed=0),
        measured("random", 0.7, 32, seed=1),
        measured("grid", 0.8, 32),
        measured("fastv", 0.9, 48, versus_random=better),
        measured("fastv", 0.7, 40, 0.25, versus_random=better),
        measured("random@fastv", 0.65, 48, seed=0),
        measured("tome(r=8)", 0.75, 16, None),
    ]
    facts = {"model": "toy", "suite": "toys", "limit": 100}
    return pages.Bench.of(pages.bench(Leaderboard(rows, facts, ("count", "code"))))


def test_draws_of_chance_are_one_point_with_their_spread(bench):
    (point,) = bench.curve("random")
    assert (point.draws, point.accuracy) == (2, pytest.approx(0.6))
    assert point.text == "60.0 ± 14.1"  # the sample standard deviation of 0.5 and 0.7
    assert [round(value, 3) for value in (point.low, point.high)] == [0.459, 0.741]


def test_numbers_stand_beside_their_control(pages, bench):
    head, _, *rows = pages.number_table(bench, "fastv").splitlines()
    assert head == "| setting | tokens | right, % | against random | `random@fastv` | weakest task |"
    assert rows[0] == "| keep 0.5 | 48 | **90.0 [80, 100]** | +25.0\\* | 65.0 [55, 75] | code 80 |"
    assert rows[1] == "| keep 0.25 | 40 | **70.0 [60, 80]** | +25.0\\* |  | code 60 |"
    head, _, row = pages.number_table(bench, "tome").splitlines()
    assert row == "| `r=8` | 16 | **75.0 [65, 85]** |  |  | code 65 |"


def test_a_picture_shows_every_point_at_its_place(pages, bench):
    drawn = pages.figure(bench, "tome")
    assert drawn.count('<circle class="mark"') == 1 + 1  # the point, and in the legend
    levels = [
        float(part.partition('y1="')[2].partition('"')[0]) for part in drawn.split("<line")[1:] if "level" in part
    ]
    top, bottom = pages._TOP, pages._BOTTOM
    assert levels == [pytest.approx(bottom - share * (bottom - top), abs=0.06) for share in (0.95, 0.2)]
