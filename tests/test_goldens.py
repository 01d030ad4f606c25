"""Statement: every golden case gives the recorded outputs when its inputs go through the shipped functions.

Runs all files of ``tests/data/goldens``, or of the folder named by ``FOVEATE_GOLDENS``. A file whose method foveate does
not have yet is skipped by name; ``--require fopru,hiprune`` turns such a skip, or a missing file, into a failure.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import goldens

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
    case = golden.case
    prefix = case["name"] + "."
    tensors = load_file(FOLDER / f"{golden.method}.safetensors")
    inputs = {name.removeprefix(prefix): tensors[name] for name in case["inputs"]}
    results = goldens.run_case(golden.method, case["params"], inputs)
    assert case["outputs"], "a case without outputs proves nothing"
    for name in case["outputs"]:
        short = name.removeprefix(prefix)
        assert short in results, f"run_case gave no {short!r}"
        compare(short, results[short].numpy(), tensors[name].numpy(), rule(case, name, short))


@dataclass(frozen=True)
class Rule:
    """How an output must agree: exactly, as a set of indices, or within ``atol + rtol * |expected|``."""

    as_set: bool = False
    atol: float = 0.0
    rtol: float = 0.0


def rule(case: dict[str, Any], name: str, short: str) -> Rule:
    """Read from the output's own description if it says, else from the clause of ``compare`` that speaks of it."""
    clauses = [
        c for c in re.split(r"[;,] ", case["compare"]) if re.search(rf"\b{short}\b|\b{short.split('_')[0]}s?\b", c)
    ]
    for text in [case["outputs"][name], *clauses, case["compare"]]:
        if "allclose" in text:
            kind = case["params"].get("score_kind")
            by_kind = re.search(rf"([\d.e-]+) \({kind}\)", text)
            atol = by_kind or re.search(r"atol ([\d.e-]+\d)", text)
            rtol = re.search(r"rtol ([\d.e-]+\d)", text)
            assert atol or rtol, f"no tolerance in {text!r}"
            return Rule(atol=float(atol[1]) if atol else 0.0, rtol=float(rtol[1]) if rtol else 0.0)
        if "exact" in text:
            return Rule(as_set="exact set" in text and "exact order" not in text and "mask" not in short)
    raise AssertionError(f"{name}: no comparison stated")


def compare(name: str, found: np.ndarray, expected: np.ndarray, how: Rule) -> None:
    assert found.shape == expected.shape, f"{name}: shape {found.shape}, expected {expected.shape}"
    if expected.dtype.kind == "f":
        np.testing.assert_allclose(found, expected, atol=how.atol, rtol=how.rtol, err_msg=name)
    else:
        assert how.atol == how.rtol == 0, f"{name}: a tolerance makes no sense for {expected.dtype}"
        if how.as_set:
            found, expected = np.sort(found, axis=-1), np.sort(expected, axis=-1)
        np.testing.assert_array_equal(found, expected, err_msg=name)
