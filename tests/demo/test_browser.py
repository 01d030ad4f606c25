"""The app in a real browser: what a visitor does, and eight visitors at once."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from foveate.demo import launch
from foveate.demo.examples import BY_MODEL
from foveate.eval_suites.running.runner import bench

pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EXAMPLES = BY_MODEL["shapes-llava"]
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
FLAGS += " --no-first-run"
PATIENCE = 60_000  # ms: a loaded machine is slow, not wrong

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium found (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS.split())
        yield launched
        launched.close()


def window(browser: Browser) -> BrowserContext:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    return context


def visit(context: BrowserContext, address: str) -> Page:
    page = context.new_page()
    page.goto(address)
    expect(page.locator(".fv-stage img")).to_be_visible(timeout=PATIENCE)
    return page


def upload(page: Page, file: Path) -> None:
    page.get_by_role("button", name="Remove Image").click()
    page.locator("#fv-picture input[type=file]").set_input_files(file)
    expect(page.locator("#fv-picture img")).to_be_visible(timeout=PATIENCE)


def choose(page: Page, method: str) -> None:
    """Pick a method, which asks at once."""
    box = page.locator("#fv-method input")
    box.click()
    page.get_by_role("option", name=method, exact=True).click()


def answered(page: Page, method: str, count: str) -> None:
    expect(page.locator(".fv-card.pruned h3")).to_contain_text(f"With {method}", timeout=PATIENCE)
    expect(page.locator(".fv-count")).to_have_text(count, timeout=PATIENCE)


def test_a_visitor_uploads_asks_looks_closer_and_exports(browser, address, tmp_path):
    asked_elsewhere: list[str] = []
    failures: list[str] = []
    page = window(browser).new_page()
    page.on(
        "request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else asked_elsewhere.append(r.url)
    )
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto(address)
    answered(page, "visionzip", "36 of 144")  # the first screen shows a result

    own = tmp_path / "own.png"
    EXAMPLES[1].make().save(own)
    before = page.locator(".fv-stage img").get_attribute("src")
    upload(page, own)
    expect(page.locator(".fv-stage img")).not_to_have_attribute("src", before, timeout=PATIENCE)  # asked about at once
    expect(page.locator(".fv-outdated")).to_have_count(0, timeout=PATIENCE)
    page.locator("#fv-question textarea").fill(EXAMPLES[1].question)
    before = page.locator(".fv-stage img").get_attribute("src")
    choose(page, "fastv")
    page.locator("#fv-run").click()
    answered(page, "fastv", "36 of 144")
    expect(page.locator(".fv-card.unpruned .said")).to_have_text("c p", timeout=PATIENCE)
    expect(page.locator(".fv-card.pruned .said")).not_to_be_empty()
    assert page.locator(".fv-stage img").get_attribute("src") != before

    layer = page.locator("#fv-layer input[type=range]")  # FastV drops tokens inside the decoder
    layer.focus()
    page.keyboard.press("Home")
    expect(page.locator(".fv-count")).to_have_text("144 of 144", timeout=PATIENCE)

    budget = page.locator("#fv-budget input[type=range]")
    budget.scroll_into_view_if_needed()
    box = budget.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    expect(page.locator(".fv-count")).not_to_have_text(re.compile("^(36|144) of"), timeout=PATIENCE)
    shown = page.locator("#fv-budget input[type=number]").input_value()
    assert page.locator(".fv-count").inner_text() == f"{round(144 * int(shown) / 100)} of 144"

    stage = page.locator(".fv-stage")
    stage.hover(position={"x": 5, "y": 5})
    expect(page.locator(".fv-token")).to_contain_text("Token 0 · row 0, column 0")
    stage.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.locator(".fv-token")).to_contain_text("Token 13 · row 1, column 1")

    page.get_by_role("button", name="Export").click()
    with page.expect_download() as download:
        page.locator("#fv-json").click()
    told = json.loads(download.value.path().read_text())
    assert told["trace"]["method"] == "fastv"
    with page.expect_download() as download:
        page.locator("#fv-png").click()
    assert download.value.path().read_bytes().startswith(b"\x89PNG")

    page.get_by_role("tab", name="Compare").click()
    expect(page.locator("#fv-comparison article")).to_have_count(6, timeout=PATIENCE)
    page.get_by_role("tab", name="Inspect").click()
    expect(page.locator(".fv-card.pruned h3")).to_contain_text("With fastv")
    assert asked_elsewhere == []
    assert failures == []
    page.context.close()


def test_a_refused_upload_says_why_and_the_page_goes_on(browser, address, tmp_path):
    page = visit(window(browser), address)
    Image.new("1", (6000, 6000)).save(tmp_path / "huge.png")
    upload(page, tmp_path / "huge.png")
    expect(page.get_by_text("at most 20 million are accepted")).to_be_visible(timeout=PATIENCE)
    expect(page.locator(".fv-outdated")).to_be_visible(timeout=PATIENCE)
    page.get_by_role("button", name="Remove Image").click()
    (tmp_path / "bad.png").write_text("no picture")
    page.locator("#fv-picture input[type=file]").set_input_files(tmp_path / "bad.png")
    expect(page.get_by_text("cannot be read as a picture")).to_be_visible(timeout=PATIENCE)
    page.locator("#fv-examples button").nth(1).click()
    expect(page.locator(".fv-card.unpruned .said")).to_have_text("c p", timeout=PATIENCE)
    expect(page.locator(".fv-outdated")).to_have_count(0, timeout=PATIENCE)
    page.context.close()


def test_the_page_fits_a_phone(browser, address):
    page = visit(window(browser), address)
    page.set_viewport_size({"width": 390, "height": 844})
    expect(page.locator(".fv-stage img")).to_be_visible()
    fits_a_phone(page, ".fv-stage")
    page.get_by_role("tab", name="Compare").click()
    expect(page.locator("#fv-comparison article")).to_have_count(6, timeout=PATIENCE)
    fits_a_phone(page, "#fv-comparison article")
    page.context.close()


def fits_a_phone(page: Page, inside: str) -> None:
    """Neither the page nor what is ``inside`` is wider than the screen."""
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for box in page.locator(inside).all():
        left, width = box.bounding_box()["x"], box.bounding_box()["width"]
        assert 0 <= left <= left + width <= 390


def test_eight_visitors_at_once_do_not_meet(browser, address, app):
    """Each asks with another method or about another picture, and all have asked before any answer is read."""
    names = ("random", "divprune", "hiprune", "grid", "fopru", "visionzip", "random", "divprune")
    wanted = list(zip(names, (0, 1, 2, 3, 1, 2, 3, 0)))
    # a page keeps a connection open and a browser opens six to a server, so four share a window (and what it has
    # loaded)
    pages = [visit(context, address) for context in (window(browser), window(browser)) for _ in range(4)]
    for page, (_, index) in zip(pages, wanted):
        if index:  # the first one is there already
            page.locator("#fv-examples button").nth(index).click()
            expect(page.locator("#fv-question textarea")).to_have_value(EXAMPLES[index].question, timeout=PATIENCE)
    for page, (name, _) in zip(pages, wanted):
        choose(page, name)
    for page, (name, index) in zip(pages, wanted):
        answered(page, name, "36 of 144")
        example = EXAMPLES[index]
        alone = app.engine.pruned(example.make(), example.question, app.engine.method(name, 0.25), "keep")
        expect(page.locator(".fv-card.pruned .said")).to_have_text(alone.text, timeout=PATIENCE)
        told = json.loads(page.locator(".fv-figure").get_attribute("data-tokens"))
        assert [token for token, left in enumerate(told["left"]) if left < 0] == alone.trace.images[0].kept.tolist()
    for page in pages[::4]:
        page.context.close()


def test_a_clip_is_shown_frame_by_frame_on_the_model_that_takes_video(browser, address):
    page = visit(window(browser), address)
    page.locator("#fv-model input").click()
    page.get_by_role("option", name="shapes-qwen", exact=True).click()
    expect(page.get_by_role("button", name="Example: clip: colour")).to_be_visible(timeout=PATIENCE)
    answered(page, "visionzip", "24 of 96")
    choose(page, "quota")
    page.get_by_role("button", name="Example: clip: colour").click()
    expect(page.get_by_text("scores of the frames")).to_be_visible(timeout=PATIENCE)
    told = json.loads(page.locator(".fv-figure").get_attribute("data-tokens"))
    assert [panel["title"] for panel in told["panels"]][:2] == ["frames 0-1", "frames 2-3"]
    page.locator(".fv-stage").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".fv-token")).to_contain_text("Token 0 · frames 0-1, row 0, column 0")
    choose(page, "pospad")
    page.locator("#fv-inner input").click()
    page.get_by_role("option", name="random", exact=True).click()
    expect(page.locator(".fv-card.pruned h3")).to_contain_text("With pospad:random", timeout=PATIENCE)
    page.context.close()


def test_a_click_on_a_row_of_the_leaderboard_shows_its_samples_failures_first(browser, tmp_path):
    results = str(tmp_path / "results.db")
    bench(pruners="divprune", keep=0.1, limit=12, seeds=1, positions="keep", out=results, progress=False)
    app = launch.create(results=results)
    page = visit(window(browser), launch.serve(app, block=False))
    page.get_by_role("tab", name="Leaderboard").click()
    page.locator("#fv-board [role=gridcell]:visible", has_text="downsample").first.click(timeout=PATIENCE)
    samples = page.locator("#fv-samples article")
    expect(samples).to_have_count(12, timeout=PATIENCE)
    marks = samples.locator(".fv-same").all_inner_texts()
    assert marks == sorted(marks, key=lambda mark: mark == "right")
    assert marks[0] == "wrong"
    assert samples.locator("img").count() == 12
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(500)  # the plot follows the window
    fits_a_phone(page, "#fv-samples article")
    page.context.close()
    app.blocks.close(verbose=False)
