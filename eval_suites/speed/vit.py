"""``foveate speed vit``: pictures per second of merging methods against the unmodified model, beside their ceiling.

The *ceiling* of a method is the same model with the same number of rows in every block, where choosing and merging costs
nothing: rows are cut off instead. All variants run in one process, round-robin with a rotating start, so that whatever else
the machine does hits all alike; factors are medians over rounds of ratios within a round. Where a process happens to lay its
memory out shifts them by a per cent or so, hence rounds may be spread over several processes. One CPU thread
is timed by its own clock, several by the one on the wall. Weights are random: nothing here depends on them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapters import attach
from foveate.adapters.towers.base import Tower, tower_for
from foveate.errors import FoveateError, ParameterError
from foveate.eval_suites.running.environment import machine, version_of
from foveate.eval_suites.speed.clock import now
from foveate.eval_suites.terminal import markdown_table, versions
from foveate.pruners import create
from foveate.pruners.core.merging import Merger

__all__ = ["Line", "add_arguments", "main", "measure", "report", "table"]

MODELS = "vit_small_patch16_224,vit_base_patch16_224"
METHODS = "tome(r=13),tome(r=16),pitome(ratio=0.95),pitome(ratio=0.925),pitome(ratio=0.9)"

_NOTE = "Goals, of the ceiling at batch 8: 95 % for ToMe, 93 % for PiToMe. Above 100 % is noise of the times.\n"


@dataclass(frozen=True)
class Line:
    """One method on one model at one batch size.

    Attributes:
        rows: that leave the last block; per_second: pictures, median; factor: over the unmodified model; ceiling: the same
            for free; of_ceiling: share of the ceiling's speed that the method reaches.
    """

    model: str
    batch: int
    method: str
    rows: int
    per_second: float
    factor: float
    ceiling: float
    of_ceiling: float


def measure(
    name: str,
    batch: int,
    mergers: Sequence[tuple[str, Merger]],
    rounds: int,
    device: str = "cpu",
    processes: int = 1,
) -> list[Line]:
    """Measure one timm model for ``rounds`` in each of ``processes``, one behind the other; a single one is this one.

    Raises:
        UnsupportedModelError: tokens cannot be merged in it. FoveateError: timm does not know it.
    """
    model = _model(name, device)
    tower, patches = tower_for(model), model.patch_embed.num_patches
    if processes > 1:
        fresh = multiprocessing.get_context("spawn")
        threads = torch.get_num_threads()
        with ProcessPoolExecutor(1, fresh, torch.set_num_threads, (threads,), max_tasks_per_child=1) as pool:
            runs = [pool.submit(_seconds, name, batch, mergers, rounds, device) for _ in range(processes)]
            parts = [run.result() for run in runs]
        seconds = {variant: [x for part in parts for x in part[variant]] for variant in parts[0]}
    else:
        seconds = _seconds(name, batch, mergers, rounds, device)
    plain = seconds[""]
    lines = [Line(name, batch, "unmodified", patches + tower.prefix, batch / median(plain), 1.0, 1.0, 1.0)]
    for label, merger in mergers:
        mine, free = seconds[label], seconds[f"ceiling {label}"]
        lines.append(
            Line(
                name,
                batch,
                label,
                merger.counts(patches, tower.info)[-1],
                batch / median(mine),
                _ratio(plain, mine),
                _ratio(plain, free),
                _ratio(free, mine),
            )
        )
    return lines


def _model(name: str, device: str) -> nn.Module:
    import timm

    torch.manual_seed(0)
    try:
        return timm.create_model(name).eval().to(device)
    except RuntimeError as error:
        raise FoveateError(f"timm has no model {name!r} ({error}); see timm.list_models()") from None


def _ratio(over: Sequence[float], under: Sequence[float]) -> float:
    return median(a / b for a, b in zip(over, under))


def _seconds(
    name: str, batch: int, mergers: Sequence[tuple[str, Merger]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of every variant of a model in every round, "" being the unmodified one; a first round warms up."""
    model = _model(name, device)
    tower, patches = tower_for(model), model.patch_embed.num_patches
    x = torch.randn(batch, *model.default_cfg["input_size"], device=device)
    variants: dict[str, Callable[[], Any]] = {"": nullcontext}
    for label, merger in mergers:
        variants[label] = lambda merger=merger: attach(model, merger)
        variants[f"ceiling {label}"] = lambda merger=merger: ceiling(tower, merger, patches)
    names, seconds = list(variants), {variant: [] for variant in variants}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            start = turn % len(names)
            for variant in names[start:] + names[:start]:
                with variants[variant]():
                    began = now(x.device)
                    model(x)
                    elapsed = now(x.device) - began
                if turn:
                    seconds[variant].append(elapsed)
    return seconds


@contextmanager
def ceiling(tower: Tower, merger: Merger, patches: int) -> Iterator[None]:
    """Cut as many rows off behind every block's attention as the merger would merge away."""
    counts = merger.counts(patches, tower.info)

    def cut(halves: Any, rows: int) -> Callable[..., Tensor]:
        return lambda x, **kwargs: halves.feed(halves.attend(x, None, **kwargs)[:, :rows])

    try:
        for block, rows in zip(tower.blocks, counts[1:]):
            vars(block)["forward"] = cut(tower.halves(block), rows)
        yield
    finally:
        for block in tower.blocks:
            vars(block).pop("forward", None)


def table(lines: Sequence[Line]) -> str:
    """The lines as a Markdown table."""
    head = ("model", "batch", "method", "rows left", "pictures/s", "factor", "ceiling", "of ceiling")
    rows = [
        (
            line.model,
            str(line.batch),
            line.method,
            str(line.rows),
            f"{line.per_second:.2f}",
            f"{line.factor:.2f}x",
            f"{line.ceiling:.2f}x",
            f"{line.of_ceiling:.1%}",
        )
        for line in lines
    ]
    return markdown_table(head, rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``foveate speed vit``."""
    parser.add_argument("--model", default=MODELS, help=f"timm models, by comma (default: {MODELS})")
    parser.add_argument("--method", default=METHODS, help=f"merging methods (default: {METHODS})")
    parser.add_argument("--batch", default="8", help="batch sizes, by comma (default: 8)")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds (default: 9)")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="processes, one behind the other, that take these rounds each (default: 1)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--out", type=Path, help="also add to FILE.json and FILE.md")


def main(args: argparse.Namespace) -> int:
    """Measure, print the table, and write it where asked to.

    Raises:
        ParameterError: unusable options.
    """
    from foveate.eval_suites.running.runner import parse_methods

    mergers: list[tuple[str, Merger]] = []
    for name, given in parse_methods(args.method):
        merger = create(name, **given)
        if not isinstance(merger, Merger):
            raise ParameterError(f"{name} does not merge inside vision towers; give tome, pitome")
        mergers.append((f"{name}({', '.join(f'{k}={v!r}' for k, v in given.items())})", merger))
    try:
        batches = [int(batch) for batch in args.batch.split(",")]
    except ValueError:
        raise ParameterError(f"batch={args.batch!r}: give numbers, by comma") from None
    if args.rounds < 1 or args.processes < 1:
        raise ParameterError(f"rounds={args.rounds}, processes={args.processes}: give at least 1 of both")
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        names = args.model.split(",")
        lines = [
            line
            for name in names
            for batch in batches
            for line in measure(name, batch, mergers, args.rounds, args.device, args.processes)
        ]
        facts = {
            **machine(torch.device(args.device)),
            "timm": version_of("timm"),
            "rounds": args.rounds * args.processes,
            "processes": args.processes,
            "dtype": "float32",
        }
    finally:
        torch.set_num_threads(before)
    print(table(lines))
    if args.out is not None:
        _write(args.out.with_suffix(""), {"environment": facts, "lines": [asdict(line) for line in lines]})
    return 0


def _write(base: Path, result: dict[str, Any]) -> None:
    """Add a measurement to those in ``base``.json, where it replaces older ones of the same lines, and write them as Markdown."""
    path = base.with_suffix(".json")
    measured = {(line["model"], line["batch"], line["method"]) for line in result["lines"]}
    results = []
    for known in json.loads(path.read_text(encoding="utf-8")) if path.exists() else []:
        left = [x for x in known["lines"] if (x["model"], x["batch"], x["method"]) not in measured]
        results += [{**known, "lines": left}] if left else []
    results.append(result)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    base.with_suffix(".md").write_text(report(results), encoding="utf-8")


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """All measurements of a result file as Markdown."""
    parts = []
    for one in results:
        facts = one["environment"]
        packages = versions(facts, names=("torch", "transformers", "timm"))
        about = f"{facts['hardware']}, {packages}, {facts['dtype']}, {facts['date']}"
        rounds = f"{facts['rounds']} rounds" + (f" in {n} processes" if (n := facts.get("processes", 1)) > 1 else "")
        parts.append(f"{table([Line(**line) for line in one['lines']])}\n\n{about}; {rounds}.\n")
    return "\n".join([*parts, _NOTE])
