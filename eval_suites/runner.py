"""Run methods over a suite and measure what they keep, what they cost and what they break.

What a row claims is measured, not computed: visual tokens are counted at the decoder's own layers, and a method that
keeps another number than its budget gets no accuracy but the mark FAILED.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from foveate.errors import BudgetError, ParameterError
from foveate.eval_suites import models, suites
from foveate.eval_suites.environment import environment
from foveate.eval_suites.leaderboard import Leaderboard, Row
from foveate.eval_suites.meter import Meter, Run
from foveate.eval_suites.suites import Suite
from foveate.pruners.base import Keep, Pruner, check_keep, one_of
from foveate.pruners.registry import PRUNERS, create

__all__ = ["BASELINES", "add_arguments", "bench", "main"]

BASELINES = ("random", "grid", "avgpool", "downsample")
"""Methods that every bench runs at every budget."""

_POSITIONS = ("auto", "keep", "compact")


# ------------------------------------------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foveate bench``."""
    add = parser.add_argument
    add(
        "--model",
        metavar="NAME",
        default="shapes-llava",
        help="shapes-llava (embedded), a folder, or a name on the hub",
    )
    add("--suite", metavar="NAME", default="shapes", help=f"one of: {', '.join(suites.SUITES)}")
    methods = 'all, or methods like "fastv,todre(stage2=False)"; the baselines always run'
    add("--pruners", metavar="NAMES", default="all", help=methods)
    add(
        "--keep",
        metavar="BUDGETS",
        default="0.5,0.25,0.11",
        help="fractions like 0.25, or whole numbers of tokens like 64",
    )
    add("--limit", metavar="N", type=int, default=200, help="number of samples (default: 200)")
    add("--seed", metavar="N", type=int, help="which samples are drawn (default: the suite's own)")
    add("--seeds", metavar="N", type=int, default=5, help="how often the random choice is repeated (default: 5)")
    add("--batch-size", metavar="N", type=int, default=32, help="samples per call of the model (default: 32)")
    add("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    add("--dtype", choices=models.DTYPES, help="default: float32 on a CPU, that of the checkpoint elsewhere")
    help_ = "of the tokens that stay (default: auto; keep for shapes-llava, which never met closed gaps in training)"
    add("--positions", choices=_POSITIONS, help=help_)
    add("--json", metavar="PATH", help="write all rows and the environment")
    add("--markdown", metavar="PATH", help="write the table as Markdown; '-' prints it instead of the table")


def main(args: argparse.Namespace) -> int:
    """Run ``foveate bench``; 0, or 1 if a row failed.

    Raises:
        FoveateError: bad input, before anything has run.
    """
    from rich.console import Console
    from transformers.utils import logging

    written = {"--json": args.json, "--markdown": None if args.markdown == "-" else args.markdown}
    for option, path in written.items():
        if path is not None:
            _check_writable(option, path)
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what is wrong with a checkpoint is one line of ours
    board = bench(
        model=args.model,
        suite=args.suite,
        pruners=args.pruners,
        keep=parse_keep(args.keep),
        limit=args.limit,
        seed=args.seed,
        seeds=args.seeds,
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
        positions=args.positions or ("keep" if args.model in models.EMBEDDED else "auto"),
    )
    if args.json:
        board.write_json(args.json)
    if args.markdown == "-":
        print(board.markdown(), end="")
        return int(bool(board.failures))
    if args.markdown:
        Path(args.markdown).write_text(board.markdown(), encoding="utf-8")
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(board)
    return int(bool(board.failures))


def _check_writable(option: str, path: str) -> None:
    """Raise :class:`ParameterError` unless ``path`` can be written; a file that is there keeps its content."""
    existed = os.path.lexists(path)
    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ParameterError(f"{option} {path} cannot be written: {error.strerror}; give another path") from None
    if not existed:
        os.unlink(path)


def parse_keep(text: str) -> list[Keep]:
    """``"0.5,64"`` -> ``[0.5, 64]``: what has only digits is a number of tokens, the rest fractions.

    Raises:
        ParameterError: not a number. BudgetError: no usable budget.
    """
    budgets: list[Keep] = []
    for part in filter(None, map(str.strip, text.split(","))):
        try:
            budgets.append(check_keep(int(part) if re.fullmatch(r"[+-]?\d+", part) else float(part)))
        except BudgetError:
            raise
        except ValueError:
            raise ParameterError(f"keep={part!r} is no number; give fractions in (0, 1] or numbers of tokens") from None
    return budgets


def parse_methods(text: str) -> list[str | tuple[str, dict[str, Any]]]:
    """``"fastv(k=3),divprune"`` -> ``[("fastv", {"k": 3}), ("divprune", {})]``.

    Raises:
        ParameterError: unreadable.
    """
    methods = []
    for part in filter(None, map(str.strip, re.split(r",(?![^()]*\))", text))):
        match = re.fullmatch(r"([\w.-]+)\s*(?:\((.*)\))?", part)
        try:
            call = ast.parse(f"f({match[2] or ''})", mode="eval").body if match else None
            if not isinstance(call, ast.Call) or call.args:
                raise ValueError
            methods.append((match[1], {k.arg: ast.literal_eval(k.value) for k in call.keywords}))
        except (ValueError, SyntaxError):
            raise ParameterError(
                f"method {part!r} cannot be read; write a name, or a name with parameters: \"fopru(strategy='row')\""
            ) from None
    return methods


# ------------------------------------------------------------------------------------------------------------- bench


def bench(
    model: str | os.PathLike[str] | models.Loaded = "shapes-llava",
    suite: str | Suite = "shapes",
    pruners: str | Sequence[str | Pruner | type[Pruner]] = "all",
    keep: Keep | Sequence[Keep] = (0.5, 0.25, 0.11),
    limit: int = 200,
    *,
    seed: int | None = None,
    seeds: int = 5,
    batch_size: int = 32,
    device: str | None = None,
    dtype: str | None = None,
    positions: str = "auto",
    progress: bool = True,
) -> Leaderboard:
    """Measure methods on a suite, beside the unpruned model, a blind one and the baselines.

    Args:
        model: ``"shapes-llava"``, a folder, a name on the hub, or what :func:`foveate.eval_suites.models.load` returned.
        suite: a name, or a suite.
        pruners: ``"all"``, or methods by name, class or instance, separated by commas in a string. Names may carry
            parameters: ``"fastv(k=3)"``. Whatever has a parameter ``keep`` runs at every budget; instances, and methods
            whose ``keep`` is given in parentheses, run once as they are.
        keep: budgets, fractions in (0, 1] or whole numbers of tokens per picture.
        limit: number of samples; seed: which ones (None: the suite's own choice).
        seeds: how often the random choice is repeated.
        batch_size: samples per call of the model.
        device, dtype: see :func:`foveate.eval_suites.models.load`; not for a loaded model.
        positions: as for :func:`foveate.attach`.
        progress: show a progress bar on stderr.

    Returns:
        A :class:`Leaderboard`. A method that the model cannot serve, or that failed, has a row that says why.

    Raises:
        FoveateError: bad input, or a model that cannot answer at all. Everything that can be is checked before the model loads.
    """
    budgets = _distinct([check_keep(k) for k in (keep if isinstance(keep, Sequence) else [keep])])
    if not budgets:
        raise ParameterError("keep is empty; give at least one budget, for example 0.25")
    for name, value in (("limit", limit), ("seeds", seeds), ("batch_size", batch_size)):
        if value < 1:
            raise ParameterError(f"{name}={value}: give at least 1")
    if seed is not None and seed < 0:
        raise ParameterError(f"seed={seed}: give a number >= 0")
    one_of("positions", positions, _POSITIONS)
    suite = suites.find(suite) if isinstance(suite, str) else suite
    runs = _plan(pruners, budgets, seeds)
    if not isinstance(model, models.Loaded):
        model = models.load(model, device, dtype)
    seed = suite.seed if seed is None else seed
    samples = list(suite.samples(limit, seed))
    meter = Meter(model, suite, samples, batch_size, positions)
    facts = environment(model.model) | {
        "model": model.name,
        "weights_sha256": model.weights_sha256,
        "suite": suite.name,
        "suite_seed": seed,
        "limit": limit,
        "chance": fmean(suite.chance[sample.task] for sample in samples),
        "batch_size": batch_size,
        "positions": positions,
    }
    rows: list[Row] = []
    with warnings.catch_warnings(), _bar(progress, len(runs) * len(samples)) as step:
        warnings.filterwarnings("ignore", message="keep=.* exceeds")  # every method says it; see below
        for run in runs:
            rows.append(meter.row(run, rows[0] if rows else None, step))
    most = max(meter.unpruned_counts)
    for large in (k for k in budgets if isinstance(k, int) and k > most):
        warnings.warn(f"keep={large} exceeds the {most} visual tokens of an image; all are kept", stacklevel=2)
    return Leaderboard(rows, facts, suite.tasks)


def _plan(methods: Any, budgets: Sequence[Keep], seeds: int) -> list[Run]:
    """All runs in order: the bare model, then per budget the baselines and the methods, then what has its own budget."""
    swept, fixed = {name: create(name) for name in BASELINES}, []
    for pruner, given in _methods(methods):
        label = _label(pruner, given)
        if given is None or "keep" in given or not hasattr(pruner, "keep"):
            fixed.append((label, pruner))
        else:
            swept[label] = pruner
    runs = [Run("unpruned", None), Run("no-image", None, baseline=True)]
    for keep, (label, pruner) in itertools.product(budgets, swept.items()):
        for seed in range(seeds) if label == "random" else (None,):
            drawn = {} if seed is None else {"seed": seed}
            runs.append(Run(label, replace(pruner, keep=keep, **drawn), seed, pruner.name in BASELINES))
    runs += [Run(label, pruner, None, pruner.name in BASELINES) for label, pruner in fixed]
    distinct: dict[Any, Run] = {}
    for run in runs:
        distinct.setdefault((run.label, type(run.keep), run.keep, run.seed), run)
    return list(distinct.values())


def _methods(methods: Any) -> Iterator[tuple[Pruner, dict[str, Any] | None]]:
    """Methods, with the parameters that were given by name (None: a ready instance)."""
    if isinstance(methods, str):
        for name, given in parse_methods(methods):
            if name == "all" and not given:
                yield from ((cls(), {}) for _, cls in sorted(PRUNERS.items()) if _runs_by_itself(cls))
                continue
            yield create(name, **given), given
    elif isinstance(methods, Sequence):
        for method in methods:
            yield from _methods(method)
    else:
        yield create(methods), None if isinstance(methods, Pruner) else {}


def _runs_by_itself(cls: type[Pruner]) -> bool:
    """Methods that are built around others need parameters, so they are not part of ``all``."""
    return all(
        f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        for f in dataclasses.fields(cls)
        if f.init
    )


def _label(pruner: Pruner, given: dict[str, Any] | None) -> str:
    """Name and parameters as given; of an instance, those that are not the default. ``keep`` has its own column."""
    if given is None:
        usual = {f.name: f.default for f in dataclasses.fields(pruner)}
        given = {name: value for name, value in pruner.parameters().items() if usual.get(name) != value}
    shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if name != "keep")
    return f"{pruner.name}({shown})" if shown else pruner.name


def _distinct(budgets: Sequence[Keep]) -> list[Keep]:
    return list({(type(k), k): k for k in budgets}.values())  # 1 token is not the fraction 1.0


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar on stderr; yields ``step(what, samples)``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda what, samples: bar.update(task, description=f"{what:<14}", advance=samples)
