"""The leaderboard's page in a real browser: sorting, filters, phone width."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from foveate.eval_suites.results.leaderboard import Leaderboard
from foveate.eval_suites.results.page import page
from foveate.eval_suites.results.rows import Row, Status, Timing, wilson
from foveate.eval_suites.running.compare import compare

pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
FLAGS += " --no-first-run"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium found (Debian: apt install chromium)")

N = 100


def row(method: str, accuracy: float | None, keep: float | None, tokens: float, prefill: float, **more: object) -> Row:
    made = Row(method, method, keep, **more)
    if accuracy is None:
        return made
    made.scores = [float(i < round(N * accuracy)) for i in range(N)]
    made.n, made.correct, made.accuracy, made.interval = N, N * accuracy, accuracy, wilson(N * accuracy, N)
    made.tasks = {"colour": accuracy, "count": accuracy / 2}
    made.tokens_per_layer, made.tokens_mean, made.tokens_last = [tokens, tokens], tokens, tokens
    made.kept_requested = tokens if keep else None
    made.relative_accuracy, made.loyalty = accuracy / 0.9, accuracy
    made.seconds_per_sample, made.speedup, made.prefill_flops, made.cache_bytes = (
        prefill / 500,
        1.1,
        1e9 * tokens,
        900.0 * tokens,
    )
    made.timings = {
        b: Timing(
            b, 3, b * prefill / 1000, 0.004, 0.001, int(1e6 * b), 0.1 * b, 0.004, int(3e6 * b), 100 / prefill, 1.0
        )
        for b in (1, 8)
    }
    return made


def board(model: str, suite: str) -> Leaderboard:
    rows = [
        row("unpruned", 0.9, None, 144, 100),
        row("no-image", 0.3, None, 144, 100, baseline=True),
        row("broken", None, 0.5, 0, 0, status=Status.FAILED, reason="kept 7 of 16"),
    ]
    for keep in (0.5, 0.25):
        rows += [
            row("random", 0.5 + keep / 4, keep, 144 * keep, 80 * keep, seed=0, baseline=True),
            row("a-method-with-quite-a-long-name", 0.6 + keep / 4, keep, 144 * keep, 90 * keep, guided=True),
            row("fastv", 0.7 + keep / 4, keep, 144 * keep, 70 * keep),
            row("downsample", 0.2, keep, 144 * keep, 60 * keep, baseline=True),
        ]
    compare(rows)
    facts = {"model": model, "suite": suite, "batch_size": 8, "limit": N, "hardware": "abacus", "attention": "sdpa"}
    return Leaderboard(rows, facts, ("colour", "count"))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "leaderboard.html"
    boards = [board("first-model", "shapes"), board("first-model", "screens"), board("second-model", "shapes")]
    path.write_text(page(boards), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS.split())
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Page]:
    """The page; whatever goes wrong in it, or is fetched from elsewhere, fails the test."""
    wrong: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(60_000)
    opened = context.new_page()
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda request: None if request.url == address else wrong.append(request.url))
    opened.goto(address)
    yield opened
    context.close()
    assert wrong == []


def methods(visit: Page) -> list[str]:
    """Names in the first table, from top to bottom."""
    return visit.locator(".board:visible table:not(.heat)").first.locator("tbody tr:visible th").all_inner_texts()


def column(visit: Page, head: str) -> list[str]:
    table = visit.locator(".board:visible table:not(.heat)").first
    heads = table.locator("thead th").all_inner_texts()
    number = [text.rstrip(" ▲▼") for text in heads].index(head)
    return [
        cells.nth(number - 1).inner_text()
        for cells in (r.locator("td") for r in table.locator("tbody tr:visible").all())
    ]


def heading(visit: Page, head: str) -> object:
    return visit.locator(".board:visible table:not(.heat)").first.get_by_role("button", name=head, exact=True)


def test_headings_sort_up_and_down_and_what_is_missing_stays_last(visit):
    heading(visit, "prefill").click()
    down = [float(text) for text in column(visit, "prefill") if text]
    assert down == sorted(down, reverse=True)
    assert column(visit, "prefill")[-1] == ""  # the row that failed
    heading(visit, "prefill").click()
    up = [float(text) for text in column(visit, "prefill") if text]
    assert up == sorted(up)
    assert column(visit, "prefill")[-1] == ""
    heading(visit, "method").click()
    assert methods(visit) == sorted(methods(visit), key=str.casefold)


def test_sorting_by_accuracy_is_by_the_number(visit):
    heading(visit, "accuracy").click()
    shown = [float(text.split()[0]) for text in column(visit, "accuracy") if text[0].isdigit()]
    assert shown == sorted(shown, reverse=True)
    assert column(visit, "accuracy")[-1] == "FAILED"


def test_headings_sort_by_the_keyboard_too(visit):
    heading(visit, "tokens").focus()
    visit.keyboard.press("Enter")
    expect(visit.locator("th[aria-sort=descending]")).to_have_count(1)


def test_model_and_suite_filters_choose_boards(visit):
    expect(visit.locator(".board:visible")).to_have_count(3)
    visit.get_by_label("model").select_option("first-model")
    expect(visit.locator(".board:visible")).to_have_count(2)
    visit.get_by_label("suite").select_option("screens")
    expect(visit.locator(".board:visible h2")).to_have_text("first-model on screens")
    visit.get_by_label("model").select_option("second-model")
    expect(visit.locator(".board:visible")).to_have_count(0)
    expect(visit.get_by_text("Nothing fits")).to_be_visible()
    visit.get_by_label("suite").select_option("")
    expect(visit.locator(".board:visible")).to_have_count(1)
    expect(visit.get_by_text("Nothing fits")).to_be_hidden()


def test_budget_filters_hide_rows_dots_and_heat_alike(visit):
    first = visit.locator(".board").first
    rows, dots = first.locator("tbody tr:visible"), first.locator("g.point:visible")
    before = rows.count(), dots.count()
    visit.get_by_text("keep 0.25", exact=True).first.click()
    assert rows.count() == before[0] - 8  # four in the table, four in the heat map
    assert dots.count() == before[1] - 8  # four in each plot
    assert "0.25" not in column(visit, "keep")
    visit.get_by_text("keep 0.25", exact=True).first.click()
    assert (rows.count(), dots.count()) == before


def test_dots_tell_what_they_are(visit):
    titles = visit.locator("svg").nth(1).locator("g.point title").all_text_contents()
    assert any(
        title.startswith("fastv, keep 0.25: 76.2 [") and "17.5 milliseconds to the first token" in title
        for title in titles
    )


@pytest.mark.parametrize("width", [390, 320])
def test_the_page_fits_a_phone(visit, width):
    visit.set_viewport_size({"width": width, "height": 844})
    assert visit.evaluate("document.documentElement.scrollWidth") <= width
    table = visit.locator(".board").first.locator(".scroll").first
    assert table.evaluate("t => t.scrollWidth > t.clientWidth")  # the table scrolls inside its card
    table.evaluate("t => t.scrollLeft = 300")
    name = visit.locator(".board").first.locator("tbody th").first.bounding_box()
    assert 0 <= name["x"] < 40  # the method's name stays in sight
    assert name["width"] < 0.6 * width


def test_the_page_can_be_pictured(visit, tmp_path):
    visit.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_the_page_needs_nothing_else(address):
    text = Path(address.removeprefix("file://")).read_text(encoding="utf-8")
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "<link" not in text
    assert "src=" not in text
