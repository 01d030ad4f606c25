"""``foveate doctor``: what this machine has, what works on it, and what would help."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

import foveate
from foveate.adapters import attach
from foveate.cuda import received_attention, warmup
from foveate.errors import FoveateError
from foveate.eval_suites import tiny
from foveate.eval_suites.running import models
from foveate.eval_suites.running.environment import version_of
from foveate.eval_suites.terminal import console
from foveate.pruners import PRUNERS

__all__ = ["OPTIONAL", "Finding", "State", "add_arguments", "examine", "main"]

OPTIONAL = {
    "timm": ("timm", "vit", "merging in timm's vision transformers"),
    "open_clip": ("open_clip_torch", "vit", "merging in open_clip's vision transformers"),
    "cupy": ("cupy-cuda13x", "cuda13", "CUDA kernels; without them plain torch gives the same results, slower"),
    "gradio": ("gradio", "demo", "`foveate demo`"),
    "lmms_eval": ("lmms-eval", "eval", "public benchmarks"),
    "av": ("av", "video", "reading video files"),
    "accelerate": ("accelerate", "", "models spread over several devices"),
    "torchvision": ("torchvision", "", "processors of Qwen models, timm and open_clip"),
    "pyarrow": ("pyarrow", "", "`foveate results export --parquet`"),
}
"""Import name -> package, foveate's extra that brings it, and what it enables."""

_CORE = ("torch", "transformers", "numpy", "safetensors", "pillow", "pyyaml", "rich")
_CUPY_WHEELS = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


class State(str, Enum):
    """``ok``, ``note`` (it could be better, nothing is broken), ``failed`` (it should work and does not)."""

    OK = "ok"
    NOTE = "note"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """One line: of which part of the machine, what was looked at, how it is, and what was found or is to be done."""

    part: str
    what: str
    state: State
    told: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foveate doctor``."""
    help_ = "run every method on a tiny model of every family (a minute)"
    parser.add_argument("--full", action="store_true", help=help_)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def main(args: argparse.Namespace) -> int:
    """Run ``foveate doctor``; 0, or 1 if something does not work that should."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is worth telling is a finding
        findings = list(examine(args.full))
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print(findings)
    return int(any(finding.state is State.FAILED for finding in findings))


def examine(full: bool = False) -> Iterator[Finding]:
    """Look at everything; ``full`` runs every method on every family."""
    yield from _versions()
    yield from _gpu()
    yield from _kernels()
    yield from _embedded()
    yield from _families(full)
    yield from _optional(full)


# --------------------------------------------------------------------------------------------------- what is looked at


def _versions() -> Iterator[Finding]:
    part = "versions"
    yield Finding(part, "foveate", State.OK, f"{foveate.__version__}, {Path(foveate.__file__).parent}")
    yield Finding(part, "python", State.OK, f"{platform.python_version()}, {sys.executable}")
    for name in _CORE:
        version, missing = version_of(name), f"is not installed: run `pip install {name}`"
        yield Finding(part, name, State.OK if version else State.FAILED, version or missing)


def _gpu() -> Iterator[Finding]:
    part = "GPU"
    if not torch.cuda.is_available():
        built = f"torch was built {f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"
        yield Finding(part, "device", State.NOTE, f"none found ({built}); everything runs on the CPU")
        return
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        told = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute capability {facts.major}.{facts.minor}"
        with _caught() as failure:
            torch.ones(8, device=f"cuda:{i}").sum().item()
        yield Finding(part, f"cuda:{i}", *_outcome(failure, told))


def _kernels() -> Iterator[Finding]:
    part = "kernels"
    mode = os.environ.get("FOVEATE_KERNELS", "auto")
    with _caught() as failure:
        received_attention(*torch.zeros(2, 1, 1, 4, 64))
    if mode == "cupy" and not torch.cuda.is_available():
        yield Finding(part, "FOVEATE_KERNELS", State.FAILED, "cupy, but there is no GPU: set auto")
    else:
        yield Finding(part, "FOVEATE_KERNELS", *_outcome(failure, mode))
    version = _version_of_any(_CUPY_WHEELS)
    if version is None:
        help_ = "`pip install 'foveate[cuda13]'` (or [cuda12]) makes selection faster on a GPU"
        told = f"not installed; {help_ if torch.cuda.is_available() else 'of use with a GPU only'}"
        yield Finding(part, "CuPy", State.NOTE, told)
        return
    with _caught() as failure:
        import cupy

        cupy.show_config  # noqa: B018  # a broken installation fails on first use
    yield Finding(part, "CuPy", *_outcome(failure, version))
    yield _cache(Path(os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache").expanduser())
    if failure or not torch.cuda.is_available():
        return
    with _caught() as failure:
        _compare()
    yield Finding(part, "compile and agree", *_outcome(failure, "all kernels compile, and give what plain torch gives"))


def _cache(folder: Path) -> Finding:
    """Where compiled kernels are kept, and whether they can be."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if place.is_dir() and os.access(place, os.W_OK):
        return Finding("kernels", "disk cache", State.OK, str(folder))
    hint = f"{folder} cannot be written, so that kernels compile in every process: set CUPY_CACHE_DIR"
    return Finding("kernels", "disk cache", State.FAILED if torch.cuda.is_available() else State.NOTE, hint)


def _compare() -> None:
    """Compile all kernels, and hold one against the reference."""
    old = os.environ.get("FOVEATE_KERNELS")
    try:
        os.environ["FOVEATE_KERNELS"] = "cupy"  # else a kernel that does not load is quietly replaced
        warmup()
        q, k = torch.randn(2, 1, 2, 40, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        fast = received_attention(q, k)
        os.environ["FOVEATE_KERNELS"] = "torch"
        torch.testing.assert_close(fast, received_attention(q, k), rtol=1e-3, atol=1e-5)
    finally:
        os.environ.pop("FOVEATE_KERNELS")
        if old is not None:
            os.environ["FOVEATE_KERNELS"] = old


def _embedded() -> Iterator[Finding]:
    for name in models.EMBEDDED:
        with _caught() as failure:
            models.check_folder(models.source(name))
        yield Finding("embedded models", name, *_outcome(failure, "complete"))


def _families(full: bool) -> Iterator[Finding]:
    """A tiny random model of every family, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for family in tiny.FAMILIES:
        works, refuses, broken = [], {}, []
        with _caught() as failure:
            model = tiny.tiny(family).to(device)
            prompt = tiny.inputs(family, [[tiny.picture(family, 0), 5]])
            inputs = {name: value.to(device) for name, value in prompt.items()}
            for name in sorted(PRUNERS) if full else ("grid", "random"):
                try:
                    _run(model, inputs, name)
                    works.append(name)
                except FoveateError as error:
                    refuses[name] = error
                except Exception as error:  # whatever a broken installation raises
                    broken.append(f"{name}: {type(error).__name__}: {error}")
        if failure or broken or not works:
            reasons = failure or broken or [f"{name} ({error})" for name, error in refuses.items()]
            yield Finding("families", family, State.FAILED, "; ".join(reasons))
            continue
        told = f"{len(works)} methods run" if full else "works"
        told += f"; not meant for it: {', '.join(refuses)}" if refuses else ""
        yield Finding("families", family, State.OK, told)


@torch.no_grad()
def _run(model: Any, inputs: dict[str, Any], name: str) -> None:
    with attach(model, name):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)


def _optional(full: bool) -> Iterator[Finding]:
    part = "optional"
    for module, (package, extra, enables) in OPTIONAL.items():
        version = _version_of_any(_CUPY_WHEELS if module == "cupy" else (package,))
        if version is None:
            how = f"`pip install 'foveate[{extra}]'`" if extra else f"`pip install {package}`"
            yield Finding(part, package, State.NOTE, f"not installed; {how} for {enables}")
            continue
        with _caught() as failure:
            if full:
                importlib.import_module(module)
        yield Finding(part, package, *_outcome(failure, f"{version}: {enables}"))


# -------------------------------------------------------------------------------------------------------------- helpers


@contextlib.contextmanager
def _caught() -> Iterator[list[str]]:
    """A list that has the reason in it if the block fails."""
    failure: list[str] = []
    try:
        yield failure
    except Exception as error:  # whatever it is, it is what the user wants to know
        failure.append(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _version_of_any(packages: Iterable[str]) -> str | None:
    return next(filter(None, map(version_of, packages)), None)


def _outcome(failure: list[str], told: str) -> tuple[State, str]:
    return (State.FAILED, failure[0]) if failure else (State.OK, told)


_MARKS = {State.OK: ("✓", "green"), State.NOTE: ("·", "yellow"), State.FAILED: ("✗", "bold red")}


def _print(findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1), pad_edge=False, show_header=False)
    for part, group in itertools.groupby(findings, lambda finding: finding.part):
        table.add_row("", Text(part, style="bold cyan"), "")
        for finding in group:
            mark, style = _MARKS[finding.state]
            told = Text(finding.told, style="" if finding.state is State.OK else style)
            table.add_row(Text(mark, style=style), finding.what, told)
    broken = sum(finding.state is State.FAILED for finding in findings)
    told = f"{broken} of {len(findings)} checks failed." if broken else "All that should work here works."
    console().print(table, Text(f"\n{told}", style="bold"))
