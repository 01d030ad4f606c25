"""Statement: the Python in README and docs/ runs as it stands, and what a script writes there is what it would write now."""

from __future__ import annotations

import importlib.util
import re
import sys
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


@pytest.fixture(scope="module")
def method_pages():
    spec = importlib.util.spec_from_file_location("method_pages", ROOT / "docs/method_pages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_method_pages_are_up_to_date(method_pages):
    """Write them again with `python docs/method_pages.py`."""
    wanted = method_pages.files()
    assert {page.name for page in wanted} >= {f"{name}.md" for name in method_pages.methods()} | {"README.md"}
    assert set(method_pages.FOLDER.iterdir()) == set(wanted), "a page or picture of no method"
    stale = [path.name for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
    assert not stale
