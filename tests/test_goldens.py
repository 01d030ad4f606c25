"""Statement: every golden case gives the recorded outputs when its inputs go through the shipped functions.

Runs all files of ``tests/data/goldens``, or of the folder named by ``FOVEATE_GOLDENS``. A file whose method foveate
does not have yet is skipped by name; ``--require fopru,hiprune`` turns such a skip, or a missing file, into a failure.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import goldens

FOLDER = Path(os.environ.get("FOVEATE_GOLDENS") or Path(__file__).parent / "data" / "goldens")


@dataclass(frozen=True)
class Golden:
    """One case of one file; without a case, why the file cannot be run."""

    method: str
    case: dict[str, Any] | None = None
    why: str = ""
    required: bool = False

    def __str__(self) -> str:
        return f"{self.method}-{self.case['name'] if self.case else 'all'}"


def collect(folder: Path, required: set[str]) -> list[Golden]:
    """Every case of the folder, and an entry for every file that is missing, empty or of an unknown method."""
    found = []
    seen = set()
    for path in sorted(folder.glob("*.json")):
        text = json.loads(path.read_text())
        method, cases = text["method"], text["cases"]
        seen.add(method)
        must = method in required
        if method not in goldens.RUNNERS:
            found.append(
                Golden(method, why=f"{len(cases)} golden cases of {method!r}: no such method yet", required=must)
            )
        elif not cases:
            found.append(Golden(method, why=f"{path.name} has no cases", required=True))
        else:
            found += [Golden(method, case, required=must) for case in cases]
    missing = sorted(required - seen)
    found += [Golden(m, why=f"no golden file of {m!r} in {folder}", required=True) for m in missing]
    return found or [Golden("none", why=f"no golden files in {folder}", required=True)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        required = {name.strip() for name in metafunc.config.getoption("--require").split(",") if name.strip()}
        metafunc.parametrize("golden", collect(FOLDER, required), ids=str)


def test_golden(golden: Golden) -> None:
    if golden.case is None:
        (pytest.fail if golden.required else pytest.skip)(golden.why)
    check(golden.method, golden.case, load_file(FOLDER / f"{golden.method}.safetensors"))


def check(method: str, case: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Hold what the shipped functions give for one case against what its file has.

    Raises:
        AssertionError: they differ. UnknownParameter: the case has something that is not mapped.
    """
    inputs = case_inputs(case, tensors)
    if "cases" in case:  # a table of small cases, with their results in place
        assert case["cases"], "a table without rows proves nothing"
        for row in case["cases"]:
            given = {name: value for name, value in row.items() if name != "out"}
            assert goldens.run_case(method, {**case["params"], **given}, {})["out"].tolist() == row["out"]
        return
    inputs |= recorded_choices(case, tensors)
    results = goldens.run_case(method, case["params"], inputs)
    stated = "expected_objects" in case["params"]  # the runner holds the result against it
    assert case["outputs"] or stated, "a case without outputs proves nothing"
    names = {short_name(case, name): name for name in case["outputs"]}
    assert set(names) <= set(results), f"run_case gave no {sorted(set(names) - set(results))}"
    found = {short: results[short].numpy() for short in names}
    expected = {short: tensors[name].numpy() for short, name in names.items()}
    if "assign" in names and re.search("through assign|equal partitions", case["compare"]):
        found = in_recorded_order(found, expected)
    for short, name in names.items():
        compare(case, name, short, found[short], expected[short])


def short_name(case: dict[str, Any], name: str) -> str:
    """A tensor's name without that of its case; files separate them with a dot or a slash."""
    return name.removeprefix(case["name"] + ".").removeprefix(case["name"] + "/")


def case_inputs(case: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The case's inputs by short name; ``weights/*`` stands for all tensors whose names begin so."""
    names = [n for name in case["inputs"] for n in (sorted(fnmatch.filter(tensors, name)) if "*" in name else [name])]
    return {short_name(case, name): tensors[name] for name in names}


def recorded_choices(case: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """Outputs that the case leaves to chance: the runner judges them, and goes on from what was recorded."""
    if not case["params"].get("tie_at_boundary"):
        return {}
    return {short: tensors[name] for name in case["outputs"] if (short := short_name(case, name)) == "core"}


def in_recorded_order(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A merger's outputs with their rows as recorded, if both make the same groups of tokens; else as they are.

    Cases demand equal groups, not an equal order of them; ``assign`` has every token's row.
    """
    ours, theirs = found["assign"], expected["assign"]
    if ours.shape != theirs.shape or (ours == theirs).all() or (ours == goldens.ANY).any():
        return found
    place = np.full((len(ours), int(ours.max()) + 1), -1)  # of our rows among the recorded ones
    np.put_along_axis(place, ours, theirs, axis=1)
    same = (np.take_along_axis(place, ours, axis=1) == theirs).all()
    if not same or any(len(set(row)) < len(row) for row in place.tolist()):
        return found
    back = place.argsort(axis=1)
    moved = {"assign": np.take_along_axis(place, ours, axis=1).astype(theirs.dtype)}
    for name in {"x_out", "size_out"} & set(found):
        moved[name] = np.take_along_axis(found[name], back[..., None], axis=1)
    if "unm_pos" in found:  # in the order of the rows
        moved["unm_pos"], expected["unm_pos"] = np.sort(found["unm_pos"]), np.sort(expected["unm_pos"])
    return found | moved


def statements(case: dict[str, Any], name: str, short: str) -> list[str]:
    """What the file says about comparing an output, most specific first: its description, then ``compare``."""
    clauses, short = re.split(r"[;,] ", case["compare"]), short.rpartition(".")[2]
    return [str(case["outputs"][name]), *(c for c in clauses if re.search(rf"\b{short}\b", c)), case["compare"]]


def compare(case: dict[str, Any], name: str, short: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Floats agree within the stated tolerance, integers exactly; index lists as sets where no order is promised."""
    if found.size == expected.size == 1:
        found = found.reshape(expected.shape)  # a number
    if found.dtype.kind == "i":
        found = without_meaningless(found, expected)
    assert found.shape == expected.shape, f"{name}: shape {found.shape}, expected {expected.shape}"
    said = statements(case, name, short)
    if expected.dtype.kind == "f" and not any("tol " in text for text in said):
        assert any("exact" in text for text in said), f"{name}: nothing says how to compare it"
        np.testing.assert_array_equal(found, expected, err_msg=name)
        return
    if expected.dtype.kind == "f":
        atol, rtol = tolerance(next(text for text in said if "tol " in text), case["params"].get("score_kind"))
        np.testing.assert_allclose(found, expected, atol=atol, rtol=rtol, err_msg=name)
        return
    promised = next((text for text in said if "exact" in text), "exact order")
    if "exact set" in promised and "exact order" not in promised and expected.dtype == np.int64:
        found, expected = np.sort(found, axis=-1), np.sort(expected, axis=-1)
    np.testing.assert_array_equal(found, expected, err_msg=name)


def without_meaningless(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """``found`` without the places at its end that mean nothing to the recorded code, or with what that has there."""
    idle = (found == goldens.ANY).all(axis=tuple(range(found.ndim - 1)))
    if not idle.any():
        return found
    if expected.shape[-1] == (~idle).sum():
        return found[..., ~idle]
    return np.where(idle, expected, found) if expected.shape == found.shape else found


def tolerance(text: str, score_kind: str | None) -> tuple[float, float]:
    """``(atol, rtol)`` of a statement such as ``atol 1e-7, rtol 1e-4`` or ``atol 1e-6 (probs) or 1e-4 (logits)``."""
    number = r"(\d[\d.]*(?:e-?\d+)?)"
    atol = re.search(rf"{number} \({score_kind}\)", text) or re.search(rf"atol {number}", text)
    rtol = re.search(rf"rtol {number}", text)
    assert atol or rtol, f"no tolerance in {text!r}"
    return float(atol[1]) if atol else 0.0, float(rtol[1]) if rtol else 0.0


@pytest.mark.parametrize("method", sorted(goldens.RUNNERS))
def test_unknown_parameters_are_refused(method: str) -> None:
    """Statement: a case with an unmapped parameter cannot pass; one with an input that nothing reads says so."""
    path = Path(__file__).parent / "data" / "goldens" / f"{method}.json"
    case = json.loads(path.read_text())["cases"][0]
    tensors = load_file(path.with_suffix(".safetensors"))
    inputs = case_inputs(case, tensors)
    with pytest.raises(goldens.UnknownParameter, match="unheard_of"):
        goldens.run_case(method, {**case["params"], "unheard_of": 1}, inputs)
    with pytest.warns(UserWarning, match="unheard_of"):
        goldens.run_case(method, case["params"], {**inputs, "unheard_of": torch.zeros(1)})


def test_a_wrong_output_is_noticed() -> None:
    """Statement: the comparison fails for another order, another set and a value outside the tolerance."""
    case = {"params": {"score_kind": "probs"}, "compare": "a: exact order; b: exact set; c: allclose atol 1e-3 (probs)"}
    case["outputs"] = dict.fromkeys("abc", "")
    one, other = np.array([1, 2]), np.array([2, 1])
    compare(case, "b", "b", one, other)
    compare(case, "c", "c", np.array([0.5]), np.array([0.5005]))
    for name, found, expected in [
        ("a", one, other),
        ("b", one, np.array([1, 3])),
        ("c", np.array([0.5]), np.array([0.502])),
    ]:
        with pytest.raises(AssertionError):
            compare(case, name, name, found, expected)


def test_required_methods_cannot_be_skipped(tmp_path: Path) -> None:
    """Statement: a required method fails if its file is absent or its method unknown; others are skipped by name."""
    (tmp_path / "novel.json").write_text(json.dumps({"method": "novel", "cases": [{"name": "x"}]}))
    entries = {golden.method: golden for golden in collect(tmp_path, {"fopru", "novel"})}
    assert entries["fopru"].required
    assert "no golden file" in entries["fopru"].why
    assert entries["novel"].required
    assert "no such method" in entries["novel"].why
    assert not collect(tmp_path, set())[0].required
    assert "'novel'" in collect(tmp_path, set())[0].why
