"""``foveate bench`` for vision models: fidelity, accuracy and retrieval of merging methods."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from foveate.adapters.towers.base import tower_for
from foveate.errors import ParameterError, UnsupportedModelError
from foveate.eval_suites.running import models
from foveate.eval_suites.running.budgets import parse_keep
from foveate.eval_suites.running.distributed import world
from foveate.eval_suites.running.environment import machine, version_of
from foveate.eval_suites.terminal import call_text, markdown_table, versions
from foveate.eval_suites.vision import EMBEDDED
from foveate.eval_suites.vision.evaluate import MergingFidelity, MergingRun, at, class_places, evaluate
from foveate.eval_suites.vision.pictures import Pictures, folder, held_out_scenes
from foveate.eval_suites.vision.subjects import Subject, load
from foveate.pruners import ToMe, create
from foveate.pruners.core import Keep, Pruner
from foveate.pruners.core.control import RandomLike
from foveate.pruners.core.merging import Merger

__all__ = ["main", "table"]

_ALL = "tome,pitome"
_RANDOM = "random"
"""Random pairs in every block, as many as ToMe's."""
_MANY = 100


def main(args: argparse.Namespace) -> int:
    """Run ``foveate bench`` on a vision model.

    Raises:
        FoveateError: unusable options, model or pictures.
    """
    from foveate.eval_suites.running.runner import check_numbers

    check_numbers(args.limit, args.seed, args.seeds, args.batch_size)
    budgets, device = parse_keep(args.keep), models.find_device(args.device)
    if world().size > 1:
        raise ParameterError(
            f"{world().size} processes would all do the same: vision models are measured by one; start it without "
            "torchrun"
        )
    unused = {"--out": args.out, "--html": args.html, "--fresh": args.fresh, "--retry": args.retry}
    for option, value in {**unused, "--positions": args.positions}.items():
        if value:
            raise ParameterError(
                f"{option} is for vision-language models; {args.model} answers with --json and --markdown"
            )
    if args.images is None and args.model not in EMBEDDED:
        raise ParameterError(f"{args.model} looks at pictures of yours: give --images FOLDER")
    pictures = held_out_scenes(args.limit, args.seed) if args.images is None else folder(Path(args.images), args.limit)
    subject = load(args.model, device, getattr(torch, args.dtype or models.DTYPES[0]))
    runs = plan(subject, pictures, args.pruners, budgets, args.seeds)
    lines = evaluate(subject, pictures, runs, args.batch_size)
    facts = machine(device) | {
        "model": args.model,
        "model_class": type(subject.model).__name__,
        "dtype": args.dtype or models.DTYPES[0],
        "pictures": len(pictures),
        "source": pictures.source,
        "classes": len(pictures.classes),
        "no_accuracy": class_places(subject, pictures)[1] or None,
        "captions": pictures.captions is not None,
        "batch_size": args.batch_size,
        "timm": version_of("timm"),
        "open_clip": version_of("open_clip_torch"),
    }
    report = table(lines, facts)
    if args.json:
        result = {"environment": facts, "lines": [asdict(line) for line in lines]}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.markdown and args.markdown != "-":
        Path(args.markdown).write_text(report, encoding="utf-8")
    print(report, end="")
    return 0


def plan(subject: Subject, pictures: Pictures, methods: str, budgets: Sequence[Keep], seeds: int) -> list[MergingRun]:
    """Per budget the random control and every method without parameters of its own, then the others as they are.

    Raises:
        ParameterError: a method that does not merge inside vision towers.
    """
    from foveate.eval_suites.running.runner import parse_methods

    tower = tower_for(subject.model)
    if tower is None:
        raise UnsupportedModelError(f"{type(subject.model).__name__} is not a vision tower of a known family")
    with torch.inference_mode():
        patches = _patches(subject, pictures, tower.blocks[0]) - tower.prefix
    swept: dict[str, Pruner] = {_RANDOM: RandomLike(ToMe())}
    fixed: dict[str, Pruner] = {}
    for name, given in parse_methods(_ALL if methods == "all" else methods):
        if name == _RANDOM and not given:
            continue
        controlled = name.startswith("random@")
        method = create(name.removeprefix("random@"), **given)
        if not isinstance(method, Merger):
            raise ParameterError(
                f"{name} does not merge inside vision towers; methods that do: {_ALL}, random, random@METHOD"
            )
        (fixed if given else swept)[call_text(name, given)] = RandomLike(method) if controlled else method

    def drawn(label: str, method: Pruner, keep: Keep | None = None) -> MergingRun:
        random = isinstance(method, RandomLike)
        return MergingRun(label, [replace(method, seed=i) for i in range(seeds)] if random else [method], keep)

    budgeted = ((label, method, keep) for keep in budgets for label, method in swept.items())
    runs = [drawn(label, at(method, keep, patches, tower.info), keep) for label, method, keep in budgeted]
    return runs + [drawn(label, method) for label, method in fixed.items()]


def _patches(subject: Subject, pictures: Pictures, block: torch.nn.Module) -> int:
    """Rows that enter the first block."""
    widths: list[int] = []
    handle = block.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    try:
        subject.final(subject.prepare([pictures.open[0]()]))
    finally:
        handle.remove()
    return widths[0]


_COLUMNS = {
    "cosine": "cosine",
    "patch_cosine": "patch cosine",
    "agreement": "same choice",
    "accuracy": "accuracy",
    "image_to_text": "image to text",
    "text_to_image": "text to image",
}


def table(lines: Sequence[MergingFidelity], facts: dict[str, Any], timed: bool = True) -> str:
    """The lines as Markdown; columns that nothing filled are left out, and speed unless ``timed``."""
    shown = [name for name in _COLUMNS if lines[0].__dict__[name] is not None]
    head = ["method", "keep", "rows left", *["speed"] * timed, *(_COLUMNS[name] for name in shown)]
    rows = []
    for line in lines:
        keep = "" if line.keep is None else f"{line.keep:.4g}"
        draws = f" ({line.draws} draws)" if line.draws > 1 else ""
        cosines = [
            f"{value:.4f}" if "cosine" in name else _share(value, facts["pictures"] * line.draws)
            for name, value in ((name, line.__dict__[name]) for name in shown)
        ]
        rows.append([line.method + draws, keep, str(line.rows[-1]), *[f"{line.factor:.2f}x"] * timed, *cosines])
    text = markdown_table(head, rows)
    schedules = {tuple(line.rows): (line.method, line.keep) for line in reversed(lines) if len(line.rows) > 1}
    for rows_, (method, keep) in reversed(schedules.items()):
        budget = "" if keep is None else f" at keep {keep:.4g}"
        text += f"\n\nRows per block, {method}{budget}: {', '.join(map(str, rows_))}."
    if facts["classes"] and facts.get("no_accuracy"):
        text += f"\n\nNo accuracy: {facts['no_accuracy']}."
    packages = versions(facts, names=("foveate", "torch", "transformers", "timm", "open_clip"))
    about = f"{facts['model']}, {facts['pictures']} pictures ({facts['source']}); {facts['hardware']}, {packages}"
    return f"{text}\n\n{about}, {facts['dtype']}, {facts['date'][:10]}.\n"


def _share(value: float, of: int) -> str:
    """In per cent, which of few would feign precision."""
    return f"{100 * value:.1f}" if of >= _MANY else f"{round(value * of)}/{of}"
