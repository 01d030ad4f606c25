"""Make the pictures of the demo in docs/images: ``python docs/screenshots.py [RESULTS]``.

Needs chromium and the extra dev. RESULTS, for the picture of the leaderboard, is a file of ``foveate bench --out``.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from foveate.demo import launch

FOLDER = Path(__file__).parent / "images"
MOST = 300_000  # bytes
DESKTOP, PHONE = {"width": 1280, "height": 1120}, {"width": 390, "height": 844}
WAIT = 120_000  # ms


def main() -> int:
    """Write all pictures; 1 if one is too large."""
    results = sys.argv[1] if len(sys.argv) > 1 else None
    address = launch.serve(launch.create(results=results), block=False)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = opened(browser, address, DESKTOP)
        stage = page.locator(".fv-stage")
        stage.focus()
        stage.hover(position={"x": 200, "y": 360})
        save(page, "demo-desktop")
        page.get_by_role("tab", name="Compare").click()
        page.locator(".fv-table").wait_for(timeout=WAIT)
        page.wait_for_timeout(500)
        save(page, "demo-compare", whole=True)
        if results:
            page.get_by_role("tab", name="Leaderboard").click()
            page.locator("#fv-board [role=gridcell]:visible", has_text="visionzip").last.click(timeout=WAIT)
            page.locator("#fv-samples article").first.wait_for(timeout=WAIT)
            page.wait_for_timeout(500)
            save(page, "demo-leaderboard", whole=True)
        page.context.close()
        page = opened(browser, address, DESKTOP)
        page.locator("#fv-model input").click()
        page.get_by_role("option", name="shapes-qwen", exact=True).click()
        page.get_by_role("button", name="Example: clip: letter").click(timeout=WAIT)
        page.locator("#fv-method input").click()
        page.get_by_role("option", name="quota", exact=True).click()
        page.get_by_text("scores of the frames").wait_for(timeout=WAIT)
        page.wait_for_timeout(1000)
        save(page, "demo-video")
        page.context.close()
        page = opened(browser, address, DESKTOP, dark=True)
        page.get_by_text("Groups", exact=True).click()
        page.get_by_text("merged tokens share a colour").wait_for(timeout=WAIT)
        save(page, "demo-dark")
        page.context.close()
        page = opened(browser, address, PHONE)
        page.locator("#fv-answers").scroll_into_view_if_needed()
        page.evaluate("document.querySelector('#fv-answers').scrollIntoView()")
        save(page, "demo-phone")
        browser.close()
    return int(any(file.stat().st_size > MOST for file in FOLDER.glob("demo-*.webp")))


def opened(browser: Browser, address: str, size: dict[str, int], dark: bool = False) -> Page:
    """The app in a window of ``size``, ready."""
    page = browser.new_context(viewport=size, color_scheme="dark" if dark else "light").new_page()
    page.goto(address + ("?__theme=dark" if dark else "?__theme=light"))
    page.locator(".fv-stage img").wait_for(timeout=WAIT)
    page.wait_for_timeout(1000)
    return page


def save(page: Page, name: str, whole: bool = False) -> None:
    """Write what the page shows, or all of the page."""
    shot = Image.open(io.BytesIO(page.screenshot(full_page=whole, animations="disabled"))).convert("RGB")
    shot.save(FOLDER / f"{name}.webp", quality=88, method=6)


if __name__ == "__main__":
    sys.exit(main())
