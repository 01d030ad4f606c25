"""Statement: the Python in README and docs/ runs as it stands, block after block in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from foveate.adapters import FAMILIES
from foveate.pruners import PRUNERS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))
DOWNLOADS = re.compile(
    r"llava-hf/|liuhaotian/|Qwen/|street\.jpg|preset\.yaml"
)  # such a block needs weights or a file of the reader's own
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return [code for code in BLOCK.findall(page.read_text(encoding="utf-8")) if not DOWNLOADS.search(code)]


@pytest.fixture
def registry():
    """What a page registers is forgotten afterwards."""
    methods, families = dict(PRUNERS), list(FAMILIES)
    yield
    PRUNERS.clear()
    PRUNERS.update(methods)
    FAMILIES[:] = families


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_examples_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "example"}
    for number, code in enumerate(blocks(page)):
        exec(compile(code, f"{page.name}, block {number}", "exec", dont_inherit=True), namespace)
    assert capsys.readouterr().out, "an example shows something"


def test_pages_are_found():
    assert any("docs" in page.parts for page in PAGES)
    assert all(page.is_file() for page in PAGES)


def test_links_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
