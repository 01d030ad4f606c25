"""Run methods over a suite and measure what they keep, what they cost and what they break.

What a row claims is measured, not computed: visual tokens are counted at the decoder's own layers, and a method that
keeps another number than its budget gets no accuracy but the mark FAILED.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from inspect import signature
from statistics import fmean
from typing import Any

import torch

from foveate.errors import BudgetError, FoveateError, ParameterError, StoreError, UnsupportedModelError
from foveate.eval_suites import suites
from foveate.eval_suites.results.leaderboard import Leaderboard
from foveate.eval_suites.results.rows import Row, Status, Timing
from foveate.eval_suites.results.show import save
from foveate.eval_suites.results.store import Store
from foveate.eval_suites.running import models
from foveate.eval_suites.running.budgets import checked_budgets, parse_keep
from foveate.eval_suites.running.cost import DecoderShape
from foveate.eval_suites.running.distributed import World, world
from foveate.eval_suites.running.environment import environment
from foveate.eval_suites.running.meter import UNPRUNED, BudgetMismatch, Meter, MethodRun
from foveate.eval_suites.running.timing import BATCHES, measure
from foveate.eval_suites.suites import Sample, Suite
from foveate.eval_suites.terminal import call_text
from foveate.pruners.core import Keep, Pruner, create
from foveate.pruners.core.control import RandomLike
from foveate.pruners.core.method import PRUNERS
from foveate.pruners.core.parameters import check_choice
from foveate.pruners.core.preset import Preset, is_preset

logger = logging.getLogger(__name__)

__all__ = ["BASELINES", "add_arguments", "bench", "main", "methods_of", "progress_bar"]

BASELINES = ("random", "grid", "avgpool", "downsample")
"""Methods that every bench runs at every budget."""

_SUITE = "shapes"
_POSITIONS = ("auto", "keep", "compact")


# ------------------------------------------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foveate bench``."""
    add = parser.add_argument
    help_ = f"{', '.join(models.EMBEDDED)} (embedded), a folder, or a name on the hub; a vision model: shapes-clip, "
    help_ += "timm/NAME[:WEIGHTS], open_clip/NAME:WEIGHTS, hf/OWNER/NAME, a folder"
    add("--model", metavar="NAME", default="shapes-llava", help=help_)
    add("--images", metavar="FOLDER", help="pictures for a vision model; sub-folders are classes")
    public = "or public benchmarks through lmms-eval, like lmms:pope,gqa (see `foveate suites list`)"
    add("--suite", metavar="NAME", default=_SUITE, help=f"one of: {', '.join(suites.SUITES)}; {public}")
    methods = (
        'all, or methods like "fastv,todre(stage2=False)"; a preset that `foveate tune` wrote; random@METHOD keeps as '
        "many tokens as METHOD in every layer; the baselines always run"
    )
    add("--pruners", metavar="NAMES", default="all", help=methods)
    help_ = "fractions like 0.25 or 1/9, or whole numbers of tokens like 64"
    add("--keep", metavar="BUDGETS", default="0.5,0.25,0.11", help=help_)
    add("--limit", metavar="N", type=int, default=200, help="number of samples (default: 200)")
    add("--seed", metavar="N", type=int, help="which samples are drawn (default: the suite's own)")
    add("--seeds", metavar="N", type=int, default=5, help="how often the random choice is repeated (default: 5)")
    add("--batch-size", metavar="N", type=int, default=32, help="samples per call of the model (default: 32)")
    models.add_arguments(parser)
    help_ = "of the tokens that stay (default: auto; keep for the embedded models, trained without closed gaps)"
    add("--positions", choices=_POSITIONS, help=help_)
    add("--out", metavar="PATH", help="result file (SQLite): go on where it ends, and add to it after every batch")
    help_ = "drop what the result file holds of this model and suite; with 'changed': if settings or versions differ"
    add("--fresh", nargs="?", const="always", default="", choices=("always", "changed"), help=help_)
    add("--retry", action="store_true", help="do the samples and methods again that failed")
    help_ = "do not measure prefill, decode, selection and memory of every row, beside the unpruned model"
    add("--no-timing", dest="timing", action="store_false", help=help_)
    add("--html", metavar="PATH", help="write the table as a web page that needs nothing else")
    add("--json", metavar="PATH", help="write all rows and the environment")
    add("--markdown", metavar="PATH", help="write the table as Markdown; '-' prints it instead of the table")


def main(args: argparse.Namespace) -> int:
    """Run ``foveate bench``; 0, or 1 if a row failed.

    Raises:
        FoveateError: bad input, before anything has run.
    """
    from transformers.utils import logging

    from foveate.eval_suites.vision import is_vision_model

    written = {f"--{name}": getattr(args, name) for name in ("out", "html", "json", "markdown")}
    if args.markdown == "-":
        del written["--markdown"]
    for option, path in written.items():
        if path is not None:
            check_writable(option, path)
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what is wrong with a checkpoint is one line of ours
    if is_vision_model(args.model):
        from foveate.eval_suites.vision import bench as vision_bench

        if args.suite != _SUITE:
            raise ParameterError(
                f"--suite {args.suite} asks questions of vision-language models; {args.model} looks at pictures "
                "(--images)"
            )
        return vision_bench.main(args)
    if args.images:
        raise ParameterError(f"--images is for vision models; {args.model} is asked the questions of --suite")
    try:
        if args.suite.startswith(_PUBLIC):
            boards = _public(args)
        else:
            boards = [bench(suite=args.suite, seed=args.seed, timing=args.timing, **_shared(args))]
    except KeyboardInterrupt:
        kept = f"what is done is in {args.out}; the same command goes on"
        print(f"foveate: stopped; {kept if args.out else 'nothing was kept (see --out)'}", file=sys.stderr)
        return 130
    if world().first:
        _show(boards, args)
        if files := [path for path in written.values() if path is not None]:
            print(f"wrote {', '.join(map(os.path.abspath, files))}", file=sys.stderr)
    return int(any(board.failures for board in boards))


def _show(boards: Sequence[Leaderboard], args: argparse.Namespace) -> None:
    """Print the tables, and write the files that were asked for."""
    if args.json:
        boards[0].write_json(args.json)  # there is one, see `_public`
    save(boards, args.html, args.markdown)
    if args.markdown != "-":
        for board in boards:
            board.print()


_PUBLIC = "lmms:"


def _shared(args: argparse.Namespace) -> dict[str, Any]:
    """What our suites and those of lmms-eval are run with alike."""
    names = ("model", "pruners", "limit", "seeds", "batch_size", "device", "dtype", "out", "fresh", "retry")
    positions = args.positions or ("keep" if args.model in models.EMBEDDED else "auto")
    return {name: getattr(args, name) for name in names} | {"keep": parse_keep(args.keep), "positions": positions}


def _public(args: argparse.Namespace) -> list[Leaderboard]:
    """Run public benchmarks."""
    from foveate.eval_suites.lmms.bench import bench as public

    if args.json:
        raise ParameterError("--json writes one suite; for lmms-eval use --out, and `foveate results export`")
    if args.seed is not None:
        raise ParameterError(f"--seed {args.seed}: benchmarks of lmms-eval are taken from their beginning; drop it")
    return public(names=args.suite, **_shared(args))


def check_writable(option: str, path: str) -> None:
    """Raise :class:`ParameterError` unless ``path`` can be written; a file that is there keeps its content."""
    existed = os.path.lexists(path)
    try:
        open(path, "a", encoding="utf-8").close()
    except OSError as error:
        raise ParameterError(f"{option} {path} cannot be written: {error.strerror}; give another path") from None
    if not existed:
        os.unlink(path)


def check_numbers(limit: int, seed: int | None, seeds: int, batch_size: int) -> None:
    """Raise :class:`ParameterError` unless there is something to measure, and a seed to draw it by."""
    for name, value in (("limit", limit), ("seeds", seeds), ("batch_size", batch_size)):
        if value < 1:
            raise ParameterError(f"{name}={value}: give at least 1")
    if seed is not None and seed < 0:
        raise ParameterError(f"seed={seed}: give a number >= 0")


def parse_methods(text: str) -> list[str | tuple[str, dict[str, Any]]]:
    """``"fastv(k=3),divprune"`` -> ``[("fastv", {"k": 3}), ("divprune", {})]``.

    Raises:
        ParameterError: unreadable.
    """
    methods = []
    for part in filter(None, map(str.strip, re.split(r",(?![^()]*(?:\([^()]*\)[^()]*)*\))", text))):
        match = re.fullmatch(r"([\w.:+@/\\~-]+)\s*(?:\((.*)\))?", part)
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
    out: str | os.PathLike[str] | None = None,
    fresh: str = "",
    retry: bool = False,
    timing: bool = True,
    progress: bool = True,
) -> Leaderboard:
    """Measure methods on a suite, beside the unpruned model, a blind one and the baselines.

    Args:
        model: the name of an embedded model, a folder, a name on the hub, or what
            :func:`foveate.eval_suites.running.models.load` returned.
        suite: a name, or a suite.
        pruners: ``"all"``, or methods by name, class or instance, separated by commas in a string. Names may carry
            parameters: ``"fastv(k=3)"``; ``"random@fastv"`` is the control that keeps as many tokens as FastV in every
            layer. Whatever has a parameter ``keep`` runs at every budget; instances, and methods whose ``keep`` is
            given in parentheses, run once as they are.
        keep: budgets, fractions in (0, 1] or whole numbers of tokens per picture.
        limit: number of samples; seed: which ones (None: the suite's own choice).
        seeds: how often the random choice is repeated.
        batch_size: samples per call of the model.
        device, dtype: see :func:`foveate.eval_suites.running.models.load`; not for a loaded model.
        positions: as for :func:`foveate.attach`.
        out: a result file (see :class:`foveate.eval_suites.results.store.Store`). What it holds of this bench is not
            done again, and every batch is in it before the next one starts. None: nothing is kept.
        fresh: ``"always"`` drops what ``out`` holds of this model and suite, ``"changed"`` only where it was made with
            other settings or versions, which is refused otherwise.
        retry: do the samples and methods again that failed.
        timing: measure prefill, decode, selection and memory of every row when all answers are there, see
            :func:`foveate.eval_suites.running.timing.measure`; a random choice is timed with its first seed only.
        progress: show a progress bar on stderr, if that is a terminal.

    Under ``torchrun`` or ``accelerate launch`` the processes share the batches, and each returns the whole table.

    Returns:
        A :class:`Leaderboard` of all rows of this model and suite in ``out``. A method that the model cannot serve, or
        that failed, has a row that says why.

    Raises:
        StoreError: ``out`` cannot be used, or its rows would not compare with these.
        FoveateError: bad input, or a model that cannot answer at all. Everything that can be is checked before the
            model loads.
    """
    budgets = checked_budgets(keep)
    check_numbers(limit, seed, seeds, batch_size)
    check_choice("positions", positions, _POSITIONS)
    suite = suites.find(suite) if isinstance(suite, str) else suite
    runs = plan(pruners, budgets, seeds)
    others = world()
    if device is None and others.size > 1 and torch.cuda.is_available():
        device = f"cuda:{others.local_rank % torch.cuda.device_count()}"
    if not isinstance(model, models.Loaded):
        model = models.load(model, device, dtype)
    seed = suite.seed if seed is None else seed
    samples = list(suite.samples(limit, seed))
    meter = Meter(model, suite, samples, batch_size, positions)
    shape = DecoderShape.of(meter.adapter.text_model.config, model.model.dtype.itemsize)
    facts = environment(model.model) | {
        "model": model.name, "weights_sha256": model.weights_sha256, "suite": suite.name, "suite_seed": seed,
        "limit": limit, "samples_sha256": _digest(samples), "processes": others.size, "batch_size": batch_size,
        "positions": positions, "chance": fmean(suite.chance[sample.task] for sample in samples),
        "decoder": shape.as_json() if shape else None,
    }  # fmt: skip
    _check_parameters(runs, meter)
    try:
        with Store(":memory:" if out is None else others.file(out)) as store:
            number = _open(store, facts, suite, others, fresh, retry)
            _measure(store, number, meter, runs, others, progress)
            if timing:
                _time(store, number, meter, runs, others, progress)
            board = store.board(number)
    finally:
        others.close()
    most = max(meter.unpruned_counts.values(), default=math.inf)
    for large in (k for k in budgets if isinstance(k, int) and k > most):
        warnings.warn(f"keep={large} exceeds the {most} visual tokens of an image; all are kept", stacklevel=2)
    return board


def _open(store: Store, facts: dict[str, Any], suite: Suite, others: World, fresh: str, retry: bool) -> int:
    """The bench's number in the store; the first process of a machine clears what is in the way."""
    if others.local_rank == 0:
        number = store.open_bench(facts, suite.tasks, fresh)
        if retry:
            store.retry(number)
    others.exchange(None)
    return store.open_bench(facts, suite.tasks)


def _measure(store: Store, bench: int, meter: Meter, runs: Sequence[MethodRun], others: World, progress: bool) -> None:
    """Do what the store does not hold yet.

    Batches are always the same ones, whoever does them and whenever, so that a bench which was interrupted or shared
    gives the answers of one that was not.
    """
    numbers = store.open_runs(bench, [_row(run, meter) for run in runs])
    _share(store, bench, others)
    meter.unpruned_counts.update((n, a.tokens[0]) for n, a in store.answers(numbers[0]).items() if a.tokens)
    firsts = [first for i, first in enumerate(range(0, len(meter.samples), meter.batch_size)) if others.mine(i)]
    done = [store.finished(number) if store.status(number) is Status.OK else None for number in numbers]
    with warnings.catch_warnings(), progress_bar(progress and others.first, len(runs) * meter.count(firsts)) as step:
        warnings.filterwarnings("ignore", message="keep=.* exceeds")  # every method says it; see `bench`
        for run, number, finished in zip(runs, numbers, done):
            left = [] if finished is None else [f for f in firsts if not finished.issuperset(meter.numbers(f))]
            step(run.label, meter.count(firsts) - meter.count(left), skipped=True)
            _finish(store, number, meter, run, left, step)
            if run.method == "unpruned":
                _check_reference(store, number, meter)
    _share(store, bench, others)


def _finish(
    store: Store, number: int, meter: Meter, run: MethodRun, firsts: Sequence[int], step: Callable[..., None]
) -> None:
    """Measure the batches that begin at ``firsts``; a method that cannot go on leaves its reason."""
    if not firsts:
        return
    left = list(firsts)
    try:
        for answers, positions in meter.measure(run, firsts):
            store.add(number, answers, positions)
            step(run.label, len(answers))
            left.pop(0)
    except StoreError:
        raise
    except (UnsupportedModelError, BudgetError, ParameterError) as error:
        store.give_up(number, Status.NOT_APPLICABLE, str(error), left[0])
    except BudgetMismatch as error:
        store.give_up(number, Status.FAILED, str(error), left[0])
    except Exception as error:  # the other methods go on
        logger.info("%s failed", run.label, exc_info=True)
        store.give_up(number, Status.FAILED, f"{type(error).__name__}: {error}", left[0])
    step(run.label, meter.count(left), skipped=True)


def _time(store: Store, bench: int, meter: Meter, runs: Sequence[MethodRun], others: World, progress: bool) -> None:
    """Measure what rows cost where the store does not know it. One process does, while the others wait."""
    if others.first:
        numbers = store.open_runs(bench, [run.row() for run in runs])
        left = [
            (run, number, batch)
            for run, number in zip(runs, numbers)
            for batch in sorted(set(BATCHES) - store.timings(number).keys())
            if not run.seed and store.status(number) is Status.OK
        ]
        with warnings.catch_warnings(), progress_bar(progress, len(left), "rows") as step:
            warnings.simplefilter("ignore")  # every one of them was told when the answers were given
            for run, number, batch in left:
                step(f"timing {run.label}", 0)
                try:
                    measured = measure(meter, run, batch)
                except Exception as error:  # out of memory, say; the answers stand
                    logger.info("%s could not be timed", run.label, exc_info=True)
                    measured = Timing(batch, error=f"{type(error).__name__}: {error}")
                store.add_timing(number, measured)
                step(f"timing {run.label}", 1)
    _share(store, bench, others)


def _check_reference(store: Store, number: int, meter: Meter) -> None:
    """Raise :class:`FoveateError` if the bare model could not answer anything."""
    errors, given_up = [answer.error for answer in store.answers(number).values()], store.reason(number)
    if given_up or (errors and all(errors)):
        raise FoveateError(
            f"{type(meter.model).__name__} cannot answer {meter.suite.name} even without a pruner "
            f"({given_up or errors[0]}); check that model and processor belong together, or give a smaller batch size"
        )


def _row(run: MethodRun, meter: Meter) -> Row:
    """The run's row, with what the method's stages on this model say."""
    row = run.row()
    with contextlib.suppress(FoveateError):  # else it will not run at all
        if run.pruner is not None:
            stages = run.pruner.stages(meter.adapter.info)
            row.guided = any(stage.text_guided for stage in stages)
            row.adaptive |= not stages  # the processor rounds
    return row


def _share(store: Store, bench: int, others: World) -> None:
    """Let every process have the answers of all."""
    if others.size > 1:
        for results in others.exchange(store.as_json(bench)):
            store.merge(results)


def _check_parameters(runs: Sequence[MethodRun], meter: Meter) -> None:
    """Raise :class:`ParameterError` if the model cannot do what a user asked for; defaults may be impossible."""
    for run in runs:
        if run.pruner is not None and run.label != run.method:
            try:
                run.pruner.stages(meter.adapter.info)
            except ParameterError as error:
                raise ParameterError(f"{run.label} on {type(meter.model).__name__}: {error}") from None
            except FoveateError:
                pass  # the model lacks something: the row will say it


def _digest(samples: Sequence[Sample]) -> str:
    """Tells whether a suite still asks the same."""
    asked = [(sample.id, sample.task, sample.question, sample.answer) for sample in samples]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def plan(methods: Any, budgets: Sequence[Keep], seeds: int) -> list[MethodRun]:
    """All runs in order: the bare model, baselines and methods per budget, then what has its own budget."""
    swept, fixed = {name: create(name) for name in BASELINES}, []
    for label, pruner, sweeps in methods_of(methods):
        if sweeps:
            swept[label] = pruner
        if not sweeps or _keep(pruner) is None:  # left to itself it finds its own budget
            fixed.append((label, pruner))
    runs = [UNPRUNED, MethodRun("no-image", None, baseline=True)]
    for keep, (label, pruner) in itertools.product(budgets, swept.items()):
        like = isinstance(pruner, RandomLike)
        budgeted = pruner.at(keep) if like else replace(pruner, **{pruner.budget_parameter: keep})
        runs += _drawn(label, budgeted, seeds if like or label == "random" else 0)
    for label, pruner in fixed:
        runs += _drawn(label, pruner, seeds if isinstance(pruner, RandomLike) else 0)
    distinct: dict[Any, MethodRun] = {}
    for run in runs:
        distinct.setdefault((run.label, type(run.keep), run.keep, run.seed), run)
    return list(distinct.values())


def methods_of(methods: Any) -> Iterator[tuple[str, Pruner, bool]]:
    """Methods as :func:`bench` takes them: label, method, and whether it runs at every budget (else once)."""
    for pruner, given in _methods(methods):
        named = (pruner.pruner if isinstance(pruner, RandomLike) else pruner).budget_parameter
        sweeps = given is not None and named not in given and _keep(pruner) is not _NO_BUDGET
        yield _label(pruner, given), pruner, sweeps


_NO_BUDGET = object()


def _keep(pruner: Pruner) -> Any:
    """The budget; :data:`_NO_BUDGET` of a method without one, or that its other parameters leave without."""
    name, inner = pruner.budget_parameter, pruner.pruner if isinstance(pruner, RandomLike) else pruner
    with contextlib.suppress(FoveateError, TypeError):
        replace(inner, **{inner.budget_parameter: 0.5})
        return getattr(pruner, name, _NO_BUDGET)
    return _NO_BUDGET


def _drawn(label: str, pruner: Pruner, seeds: int) -> list[MethodRun]:
    """A run per seed, or a single one."""
    blind = isinstance(pruner, RandomLike) or pruner.name in BASELINES
    if not seeds:
        return [MethodRun(label, pruner, None, blind)]
    return [MethodRun(label, replace(pruner, seed=seed), seed, blind) for seed in range(seeds)]


def _methods(methods: Any) -> Iterator[tuple[Pruner, Any]]:
    """Methods, with the parameters that were given by name (None: a ready instance)."""
    if isinstance(methods, str):
        for name, given in parse_methods(methods):
            if name == "all" and not given:
                yield from ((cls(), {}) for _, cls in sorted(PRUNERS.items()) if _runs_by_itself(cls))
            elif is_preset(name):
                yield Preset.read(name, **given).pruner, None
            else:
                yield create(name, **given), given
    elif isinstance(methods, Sequence):
        for method in methods:
            yield from _methods(method)
    else:
        yield create(methods), None if isinstance(methods, Pruner) else {}


def _runs_by_itself(cls: type[Pruner]) -> bool:
    """Methods that are built around others need parameters, so they are not part of ``all``."""
    return all(given.default is not given.empty for given in signature(cls).parameters.values())


def _label(pruner: Pruner, given: dict[str, Any] | None) -> str:
    """Name and parameters as given; of an instance, those that are not the default. ``keep`` has its own column."""
    if given is None:
        usual = {f.name: f.default for f in fields(pruner)}
        given = {name: value for name, value in pruner.parameters().items() if usual.get(name) != value}
    return call_text(pruner.name, {name: x for name, x in given.items() if name != pruner.budget_parameter})


@contextmanager
def progress_bar(shown: bool, total: int, unit: str = "samples") -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; yields ``step(what, samples, skipped=False)``. The rate leaves out what is skipped."""
    from rich import progress
    from rich.console import Console

    class Rate(progress.ProgressColumn):
        def render(self, task: progress.Task) -> str:
            return "" if task.speed is None else f"{task.speed:.3g} {unit}/s"

    columns = (progress.TextColumn("{task.description:<14}"), progress.BarColumn(), progress.MofNCompleteColumn())
    columns += (Rate(), progress.TimeRemainingColumn())
    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    with progress.Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total)

        def step(what: str, samples: int, skipped: bool = False) -> None:
            if skipped:
                bar.update(task, description=what, total=bar.tasks[task].total - samples)
            else:
                bar.update(task, description=what, advance=samples)

        yield step
