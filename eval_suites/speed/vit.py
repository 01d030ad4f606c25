"""``foveate speed vit``: pictures per second of merging methods against the unmodified model, beside their ceiling.

The *ceiling* of a method is the same model with the same number of rows in every block, where choosing and merging
costs nothing: rows are cut off instead. Where a process happens to lay its memory out shifts ratios by a per cent or
so, hence rounds may be spread over several processes. Weights are random: nothing here depends on them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapters import attach
from foveate.adapters.towers.base import Tower, tower_for
from foveate.errors import FoveateError, ParameterError
from foveate.eval_suites.running.environment import machine, version_of
from foveate.eval_suites.speed.harness import Clock, at_least, in_turns, numbers, ratios, write
from foveate.eval_suites.terminal import call_text, markdown_table, versions
from foveate.pruners import create
from foveate.pruners.core.merging import Merger

__all__ = ["TowerSpeed", "add_arguments", "main", "measure", "report", "table"]

MODELS = "vit_small_patch16_224,vit_base_patch16_224"
METHODS = "tome(r=13),tome(r=16),pitome(ratio=0.95),pitome(ratio=0.925),pitome(ratio=0.9)"

_NOTE = "Goals, of the ceiling at batch 8: 95 % for ToMe, 93 % for PiToMe. Above 100 % is noise of the times.\n"


@dataclass(frozen=True)
class TowerSpeed:
    """One method on one model at one batch size.

    Attributes:
        rows: that leave the last block.
        per_second: pictures, median.
        factor: speed over the unmodified model's.
        ceiling: the same where merging costs nothing.
        of_ceiling: share of the ceiling's speed that the method reaches.
    """

    model: str
    batch: int
    method: str
    rows: int
    per_second: float
    factor: float = 1.0
    ceiling: float = 1.0
    of_ceiling: float = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foveate speed vit``."""
    add = parser.add_argument
    add("--model", default=MODELS, help=f"timm models, by comma (default: {MODELS})")
    add("--method", default=METHODS, help=f"merging methods (default: {METHODS})")
    add("--batch", default="8", help="batch sizes, by comma (default: 8)")
    add("--rounds", type=int, default=9, help="measured rounds (default: 9)")
    add("--processes", type=int, default=1, help="that take these rounds each, one after the other (default: 1)")
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add("--device", default="cpu", help="torch device (default: cpu)")
    add("--out", type=Path, help="also add to FILE.json and FILE.md")


def main(args: argparse.Namespace) -> int:
    """Measure, print the table, and write it where asked to; 0.

    Raises:
        ParameterError: unusable options.
    """
    from foveate.eval_suites.running.runner import parse_methods

    mergers: dict[str, Merger] = {}
    for name, given in parse_methods(args.method):
        merger = create(name, **given)
        if not isinstance(merger, Merger):
            raise ParameterError(f"{name} does not merge inside vision towers; give tome, pitome")
        mergers[call_text(name, given)] = merger
    batches = numbers("--batch", args.batch)
    at_least(1, {"--rounds": args.rounds, "--processes": args.processes})
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        how = (mergers, args.rounds, args.device, args.processes)
        speeds = [one for name in args.model.split(",") for batch in batches for one in measure(name, batch, *how)]
        rounds = {"rounds": args.rounds * args.processes, "processes": args.processes}
        facts = {**machine(torch.device(args.device)), "timm": version_of("timm"), **rounds, "dtype": "float32"}
    finally:
        torch.set_num_threads(before)
    print(table(speeds))
    if args.out is not None:
        _add(args.out.with_suffix(""), {"environment": facts, "lines": [asdict(one) for one in speeds]})
    return 0


def measure(
    name: str, batch: int, mergers: Mapping[str, Merger], rounds: int, device: str = "cpu", processes: int = 1
) -> list[TowerSpeed]:
    """Measure one timm model for ``rounds`` in each of ``processes``, one after the other; a single one is this one.

    Raises:
        UnsupportedModelError: tokens cannot be merged in it. FoveateError: timm does not know it.
    """
    model = _model(name, device)
    tower, patches = tower_for(model), model.patch_embed.num_patches
    if processes > 1:
        fresh, threads = multiprocessing.get_context("spawn"), (torch.get_num_threads(),)
        with ProcessPoolExecutor(1, fresh, torch.set_num_threads, threads, max_tasks_per_child=1) as pool:
            runs = [pool.submit(_seconds, name, batch, mergers, rounds, device) for _ in range(processes)]
            parts = [run.result() for run in runs]
        seconds = {variant: [x for part in parts for x in part[variant]] for variant in parts[0]}
    else:
        seconds = _seconds(name, batch, mergers, rounds, device)
    plain = seconds[""]
    speeds = [TowerSpeed(name, batch, "unmodified", patches + tower.prefix, batch / median(plain))]
    for label, merger in mergers.items():
        mine, free = seconds[label], seconds[f"ceiling {label}"]
        factors = [median(ratios(over, under)) for over, under in ((plain, mine), (plain, free), (free, mine))]
        rows = merger.counts(patches, tower.info)[-1]
        speeds.append(TowerSpeed(name, batch, label, rows, batch / median(mine), *factors))
    return speeds


def _model(name: str, device: str) -> nn.Module:
    import timm

    torch.manual_seed(0)
    try:
        return timm.create_model(name).eval().to(device)
    except RuntimeError as error:
        raise FoveateError(f"timm has no model {name!r} ({error}); see timm.list_models()") from None


@torch.inference_mode()
def _seconds(name: str, batch: int, mergers: Mapping[str, Merger], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every variant of a model in every round, "" being the unmodified one."""
    model = _model(name, device)
    tower, patches = tower_for(model), model.patch_embed.num_patches
    x = torch.randn(batch, *model.default_cfg["input_size"], device=device)

    def timed(variant: Callable[[], Any]) -> Callable[[int], float]:
        def run(turn: int) -> float:
            with variant():
                clock = Clock(x.device)
                model(x)
                return clock.lap()

        return run

    variants = {"": timed(nullcontext)}
    for label, merger in mergers.items():
        variants[label] = timed(lambda merger=merger: attach(model, merger))
        variants[f"ceiling {label}"] = timed(lambda merger=merger: ceiling(tower, merger, patches))
    return in_turns(variants, rounds)


@contextmanager
def ceiling(tower: Tower, merger: Merger, patches: int) -> Iterator[None]:
    """Cut as many rows off after every block's attention as the merger would merge away."""
    counts = merger.counts(patches, tower.info)

    def cut(halves: Any, rows: int) -> Callable[..., Tensor]:
        return lambda x, **kwargs: halves.feed(halves.attend(x, None, **kwargs)[:, :rows])

    try:
        for block, rows in zip(tower.blocks, counts[1:]):
            vars(block)["forward"] = cut(tower.open_block(block), rows)
        yield
    finally:
        for block in tower.blocks:
            vars(block).pop("forward", None)


def table(speeds: Sequence[TowerSpeed]) -> str:
    """The measurements as a Markdown table."""
    head = ("model", "batch", "method", "rows left", "pictures/s", "factor", "ceiling", "of ceiling")
    forms = ("", "", "", "", ".2f", ".2f", ".2f", ".1%")
    units = ("", "", "", "", "", "x", "x", "")
    rows = [[f"{v:{form}}{unit}" for v, form, unit in zip(astuple(one), forms, units)] for one in speeds]
    return markdown_table(head, rows)


def _add(base: Path, result: dict[str, Any]) -> None:
    """Add a result to those in ``base``.json, where it replaces older ones of the same lines, and write ``base``.md."""
    path, of = base.with_suffix(".json"), ("model", "batch", "method")
    measured = {tuple(line[key] for key in of) for line in result["lines"]}
    results = []
    for known in json.loads(path.read_text(encoding="utf-8")) if path.exists() else []:
        left = [line for line in known["lines"] if tuple(line[key] for key in of) not in measured]
        results += [{**known, "lines": left}] if left else []
    write(path, [*results, result])
    base.with_suffix(".md").write_text(report([*results, result]), encoding="utf-8")


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """All measurements of a result file as Markdown."""
    parts = []
    for one in results:
        facts = one["environment"]
        packages = versions(facts, names=("torch", "transformers", "timm"))
        about = f"{facts['hardware']}, {packages}, {facts['dtype']}, {facts['date']}"
        rounds = f"{facts['rounds']} rounds" + (f" in {n} processes" if (n := facts.get("processes", 1)) > 1 else "")
        parts.append(f"{table([TowerSpeed(**line) for line in one['lines']])}\n\n{about}; {rounds}.\n")
    return "\n".join([*parts, _NOTE])
