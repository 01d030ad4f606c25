"""Statement: every measured figure stands beside the torch and transformers that it was measured with."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foveate.eval_suites.speed import vit as speed_vit
from foveate.eval_suites.terminal import versions
from foveate.eval_suites.vision import bench as vision
from foveate.eval_suites.vision.evaluate import MergingFidelity

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "eval_suites/results"
PAGES = {
    **{f"docs/methods/{page.name}": ("methods",) for page in sorted((ROOT / "docs/methods").glob("*.md"))},
    **{f"eval_suites/results/{page.name}": (page.stem,) for page in sorted(RESULTS.glob("*.md"))},
    "docs/vision-transformers.md": ("speed_vit", "vision_fidelity"),
    "eval_suites/vision/shapes-clip/README.md": ("vision_shapes",),
    "docs/serving.md": ("speed_serving", "speed_serving_next"),
}
"""Pages with figures, and the result files that these come from."""
OTHERS = (
    "README.md",
    "docs/results.md",
    "docs/pospad.md",
    "docs/corematching.md",
    *(
        f"eval_suites/suites/{card}/README.md"
        for card in ("shapes/shapes-llava", "shapes/shapes-next", "screens/shapes-qwen")
    ),
)
"""Pages with figures that were not kept in a result file."""
NAMED = {name: re.compile(rf"\b{name} (\d+\.\d+\.\d+)") for name in ("torch", "transformers")}


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def runs(name: str) -> list[dict[str, Any]]:
    """What a result file knows of the machine, for every run in it."""
    found = read(name)
    found = found.get("benches", [found]) if isinstance(found, dict) else found
    return [next(run[key] for key in ("environment", "facts", "machine") if key in run) for run in found]


def of(package: str, facts: dict[str, Any]) -> Iterator[str]:
    """Versions without what follows a plus."""
    for version in [facts[package]] if isinstance(facts[package], str) else facts[package]:
        yield version.partition("+")[0]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_result_file_has_its_page():
    assert {name for names in PAGES.values() for name in names} == {path.stem for path in RESULTS.glob("*.json")}


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("*.json")))
def test_results_name_their_versions(name):
    """Each of them, on one of their pages at least."""
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page, names in PAGES.items() if name in names)
    for package, named in NAMED.items():
        measured = [set(of(package, facts)) for facts in runs(name)]
        assert measured, "no run"
        assert all(measured), f"a run without {package}"
        assert set.union(*measured) <= set(named.findall(text))


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_versions_of_their_results_and_no_others(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for package, named in NAMED.items():
        measured = {version for name in PAGES[page] for facts in runs(name) for version in of(package, facts)}
        found = set(named.findall(text))
        assert found, f"no {package}"
        assert found <= measured, package


@pytest.mark.parametrize("page", OTHERS)
def test_other_figures_name_a_version(page):
    assert NAMED["transformers"].search((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_tables_of_make_bench_name_their_versions(page):
    (table,) = re.findall(
        r"<!-- bench -->\n(.*?)<!-- /bench -->", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert all(len(set(named.findall(table))) == 1 for named in NAMED.values())


def test_generated_pages_are_up_to_date(capsys):
    """What a generator makes of a result file stands on its page."""

    def page(name: str) -> str:
        return (RESULTS / f"{name}.md").read_text(encoding="utf-8")

    assert page("speed_vit") == speed_vit.report(read("speed_vit"))
    for name in ("vision_shapes", "vision_fidelity"):
        lines = [MergingFidelity(**line) for line in read(name)["lines"]]
        assert page(name).startswith(vision.table(lines, read(name)["environment"], timed=name == "vision_shapes"))
    for run in read("speed_decoder"):
        script("speed_table").table(run)
        assert capsys.readouterr().out in page("speed_decoder")
    script("vit_speed_table").main(str(RESULTS / "speed_vit.json"))
    shown = (ROOT / "docs/vision-transformers.md").read_text(encoding="utf-8")
    assert f"<!-- speed -->\n{capsys.readouterr().out}<!-- /speed -->" in shown


def test_versions_that_differ_are_all_named():
    old, new = (
        {"torch": "2.14.1", "transformers": "5.23.0"},
        {"torch": "2.14.1", "transformers": "5.24.0", "timm": None},
    )
    assert versions(old) == "torch 2.14.1, transformers 5.23.0"
    assert versions(old, new, old) == "torch 2.14.1, transformers 5.23.0 and 5.24.0"
    assert versions(old, new, names=("timm", "torch")) == "torch 2.14.1"
    assert versions({}) == ""
