"""Run methods over a suite and measure what they keep, what they cost and what they break.

What a row claims is measured, not computed: visual tokens are counted at the decoder's own layers, and a method that
keeps another number than its budget gets no accuracy but the mark FAILED.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import datetime
import itertools
import math
import os
import platform
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import foveate
from foveate.adapters import Session, attach
from foveate.adapters.base import Adapter, adapter_for
from foveate.adapters.trace import ImageTrace, Trace
from foveate.errors import BudgetError, FoveateError, ParameterError, UnsupportedModelError
from foveate.eval_suites import models, suites
from foveate.eval_suites.leaderboard import Leaderboard, Row, Status, agreement, share, wilson
from foveate.eval_suites.suites import Sample, Suite
from foveate.pruners.base import Hook, Keep, Pruner, Stage, budget, check_keep, one_of
from foveate.pruners.registry import PRUNERS, create

__all__ = ["BASELINES", "add_arguments", "bench", "main"]

BASELINES = ("random", "grid", "avgpool", "downsample")
"""Methods that every bench runs at every budget."""

GREY = (128, 128, 128)
"""What ``no-image`` shows in place of each picture: the same for all samples, so that nothing of a sample leaks."""

_POSITIONS = ("auto", "keep", "compact")
_NO_SAMPLING = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


# ------------------------------------------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foveate bench``."""
    add = parser.add_argument
    add("--model", default="shapes-llava", help="shapes-llava (embedded), a folder, or a name on the hub")
    add("--suite", default="shapes", help=f"one of: {', '.join(suites.SUITES)}")
    add("--pruners", default="all", help="all, or methods like fastv,'todre(stage2=False)'; baselines always run")
    add("--keep", default="0.5,0.25,0.11", help="budgets: fractions like 0.25, or whole numbers of tokens like 64")
    add("--limit", type=int, default=200, help="number of samples (default: 200)")
    add("--seed", type=int, help="which samples are drawn (default: the suite's own)")
    add("--seeds", type=int, default=5, help="how often the random choice is repeated (default: 5)")
    add("--batch-size", type=int, default=32, help="samples per call of the model (default: 32)")
    add("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    add("--dtype", choices=models.DTYPES, help="default: float32 on a CPU, that of the checkpoint elsewhere")
    add("--positions", default="auto", choices=_POSITIONS, help="of the tokens that stay (default: auto)")
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
        positions=args.positions,
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
    meter = _Meter(model, suite, samples, batch_size, positions)
    environment = _environment(model, suite, seed, limit, batch_size)
    environment["chance"] = fmean(suite.chance[sample.task] for sample in samples)
    rows: list[Row] = []
    with warnings.catch_warnings(), _bar(progress, len(runs) * len(samples)) as step:
        warnings.filterwarnings("ignore", message="keep=.* exceeds")  # every method says it; see below
        for run in runs:
            rows.append(meter.row(run, rows[0] if rows else None, step))
    most = max(meter.unpruned_counts)
    for large in (k for k in budgets if isinstance(k, int) and k > most):
        warnings.warn(f"keep={large} exceeds the {most} visual tokens of an image; all are kept", stacklevel=2)
    return Leaderboard(rows, environment, suite.tasks)


@dataclass(frozen=True)
class _Run:
    """One line of the plan: a method, ready to attach (None: the bare model)."""

    label: str
    pruner: Pruner | None
    seed: int | None = None
    baseline: bool = False

    @property
    def method(self) -> str:
        return self.pruner.name if self.pruner else self.label

    @property
    def keep(self) -> Keep | None:
        return getattr(self.pruner, "keep", None)


def _plan(methods: Any, budgets: Sequence[Keep], seeds: int) -> list[_Run]:
    """All runs in order: the bare model, then per budget the baselines and the methods, then what has its own budget."""
    swept, fixed = {name: create(name) for name in BASELINES}, []
    for pruner, given in _methods(methods):
        label = _label(pruner, given)
        if given is None or "keep" in given or not hasattr(pruner, "keep"):
            fixed.append((label, pruner))
        else:
            swept[label] = pruner
    runs = [_Run("unpruned", None), _Run("no-image", None, baseline=True)]
    for keep, (label, pruner) in itertools.product(budgets, swept.items()):
        for seed in range(seeds) if label == "random" else (None,):
            drawn = {} if seed is None else {"seed": seed}
            runs.append(_Run(label, replace(pruner, keep=keep, **drawn), seed, pruner.name in BASELINES))
    runs += [_Run(label, pruner, None, pruner.name in BASELINES) for label, pruner in fixed]
    distinct: dict[Any, _Run] = {}
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
            try:
                yield create(name, **given), given
            except TypeError as error:  # a value of another type, or a parameter that has no default
                raise ParameterError(f"{name} with parameters {given} cannot be built: {error}") from None
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


# --------------------------------------------------------------------------------------------------------- measuring


class BudgetMismatch(FoveateError):
    """A method kept another number of tokens than it was asked for, or than it says."""


class _Meter:
    """Runs methods over the samples and counts what the decoder's layers see."""

    def __init__(
        self, loaded: models.Loaded, suite: Suite, samples: Sequence[Sample], batch_size: int, positions: str
    ) -> None:
        self.model, self.processor, self.suite, self.samples = loaded.model, loaded.processor, suite, samples
        self.batch_size, self.positions = batch_size, positions
        self.adapter: Adapter = adapter_for(self.model)
        self.unpruned_counts: list[int] = []  # visual tokens of every sample
        self._warm: set[str] = set()

    def row(self, run: _Run, reference: Row | None, step: Callable[[str, int], None]) -> Row:
        """Measure one run against the unpruned row (None: this is it)."""
        step(run.label, 0)
        row = Row(run.method, run.label, run.keep, run.seed, run.baseline)
        if run.pruner is not None:
            row.parameters, row.adaptive = run.pruner.parameters(), bool(run.pruner.adaptive)
        done = 0

        def count(n: int) -> None:
            nonlocal done
            done += n
            step(run.label, n)

        try:
            self._measure(run, row, count)
        except (UnsupportedModelError, BudgetError) as error:
            row.status, row.reason = Status.NOT_APPLICABLE, str(error)
        except BudgetMismatch as error:
            row.status, row.reason = Status.FAILED, str(error)
        except Exception as error:
            row.status, row.reason = Status.FAILED, f"{type(error).__name__}: {error}"
        if reference is None:
            if row.status is not Status.OK:
                raise FoveateError(
                    f"{type(self.model).__name__} cannot answer {self.suite.name} even without a pruner ({row.reason}); "
                    "check that model and processor belong together, or give a smaller batch size"
                )
            reference = row
        step(run.label, len(self.samples) - done)
        if row.status is Status.OK:
            row.loyalty = agreement(row.answers, reference.answers)
            row.relative_accuracy = share(row.correct, reference.correct)
        return row

    def _measure(self, run: _Run, row: Row, count: Callable[[int], None]) -> None:
        seconds, seen, asked = 0.0, [], []
        warm = run.label in self._warm
        with self._attached(run) as (session, widths):
            for first in range(0, len(self.samples), self.batch_size):
                batch = self.samples[first : first + self.batch_size]
                for counted in (True,) if warm else (False, True):  # the first batch of a method runs twice
                    widths.clear()
                    if session is not None:
                        session.trace, session.sample_ids = None, range(first, first + len(batch))
                    began = time.perf_counter()
                    answers, ids = self._answer(run, batch)
                    elapsed = time.perf_counter() - began
                    if not counted:
                        continue
                    seconds += elapsed
                    row.answers += answers
                    if session is None:
                        seen += self._unpruned(ids, widths)
                    else:
                        checked = self._pruned(run.pruner, session.trace, ids, widths, first)
                        seen += checked[0]
                        asked += checked[1]
                        row.positions = dict(session.trace.positions)
                        row.adaptive |= not run.pruner.stages(self.adapter.info)  # the processor's rounding decides
                    count(len(batch))
                warm = True
        self._warm.add(run.label)
        row.kept_requested = fmean(asked) if asked else None
        row.tokens_per_layer = [fmean(layer) for layer in zip(*seen)]
        row.tokens_mean, row.tokens_last = fmean(row.tokens_per_layer), row.tokens_per_layer[-1]
        row.seconds_per_sample = seconds / len(self.samples)
        right = [bool(self.suite.score(sample, answer)) for sample, answer in zip(self.samples, row.answers)]
        row.n, row.correct = len(right), sum(right)
        row.accuracy, row.interval = share(row.correct, row.n), wilson(row.correct, row.n)
        for task in self.suite.tasks:
            hits = [hit for hit, sample in zip(right, self.samples) if sample.task == task]
            row.tasks[task] = share(sum(hits), len(hits))

    @contextmanager
    def _attached(self, run: _Run) -> Iterator[tuple[Session | None, list[int]]]:
        """The session, and the width of the sequence that each decoder layer works on in prefill."""
        if run.pruner is None:
            with _widths(self.adapter) as widths:
                yield None, widths
        else:  # hooks run in order, so those that count come behind the session's
            with attach(self.model, run.pruner, positions=self.positions) as session, _widths(self.adapter) as widths:
                yield session, widths

    @torch.no_grad()
    def _answer(self, run: _Run, batch: Sequence[Sample]) -> tuple[list[str], Tensor]:
        """The answers, and the prompt's token ids ``(B, L)``."""
        images = [sample.image for sample in batch]
        if run.method == "no-image":
            images = [Image.new("RGB", image.size, GREY) for image in images]
        elif run.pruner is not None and not self._works_on_pixels(run.pruner):
            images = [run.pruner.prepare(image) for image in images]
        texts = [self._prompt(sample.question) for sample in batch]
        inputs = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        output = self.model.generate(**inputs, max_new_tokens=self.suite.max_new_tokens, **_NO_SAMPLING)
        ids = inputs["input_ids"]
        new = self.processor.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in new], ids

    def _prompt(self, question: str) -> str:
        if not getattr(self.processor, "chat_template", None):
            return self.suite.prompt(question)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _works_on_pixels(self, pruner: Pruner) -> bool:
        """Does it shrink the pictures inside the model? Then preparing them as well would shrink them twice."""
        return any(stage.hook is Hook.PIXELS for stage in pruner.stages(self.adapter.info))

    # ------------------------------------------------------------------------------------------------------ counting

    def _unpruned(self, ids: Tensor, widths: list[int]) -> list[list[int]]:
        """Visual tokens seen by each layer, per picture."""
        depth, length = self.adapter.info.decoder_layers, ids.shape[1]
        if widths != [length] * depth:
            raise BudgetMismatch(f"the prompt has {length} tokens, but the decoder's layers saw {widths}")
        counts = self._placeholders(ids)
        self.unpruned_counts += counts
        return [[n] * depth for n in counts]

    def _placeholders(self, ids: Tensor) -> list[int]:
        tokens = [modality.token_id for modality in self.adapter.modalities]
        return torch.isin(ids, torch.tensor(tokens, device=ids.device)).sum(dim=1).tolist()

    def _pruned(
        self, pruner: Pruner, trace: Trace | None, ids: Tensor, widths: list[int], first: int
    ) -> tuple[list[list[int]], list[int]]:
        """Visual tokens seen by each layer, and the number asked for, per picture.

        Raises:
            BudgetMismatch: what the layers saw is not what the trace says, or not what was asked for.
        """
        counts = self._placeholders(ids)
        if trace is None or [image.layout.length for image in trace.images] != counts:
            raise BudgetMismatch(f"{pruner.name} was attached, but did not see the pictures' {sum(counts)} tokens")
        dropped = [
            min(n - image.tokens_per_layer[i] for n, image in zip(counts, trace.images)) for i in range(len(widths))
        ]
        claimed = [ids.shape[1] - n for n in dropped]
        if widths != claimed:
            raise BudgetMismatch(
                f"the decoder's layers saw {widths} tokens of the longest prompt, the trace says {claimed}"
            )
        stages = pruner.stages(self.adapter.info)
        asked = []
        for sample, image in enumerate(trace.images, first):
            if stages:
                asked.append(pruner.kept_in(image.layout))
                check_image(pruner, stages, image, asked[-1])
            else:
                asked.append(budget(pruner.keep, self.unpruned_counts[sample]))
                check_resized(pruner, image.layout.size, asked[-1])
        return [image.tokens_per_layer for image in trace.images], asked


def check_image(pruner: Pruner, stages: Sequence[Stage], image: ImageTrace, asked: int) -> None:
    """Hold what happened to a picture against the budget.

    Raises:
        BudgetMismatch: tokens counted twice, other tokens in a layer than the trace's, or not ``asked`` at the end.
    """
    layout, keep = image.layout, getattr(pruner, "keep", None)
    most = layout.size if keep is None else budget(keep, layout.size, math.ceil) + len(layout.views) - 1
    if not pruner.adaptive and asked > most:
        raise BudgetMismatch(f"{pruner.name} announces {asked} tokens where keep={keep} of {layout.size} allows {most}")
    acting = [stage.layer for stage in stages]
    for layer, seen in enumerate(image.tokens_per_layer):
        kept = image.kept_at(layer)
        if not bool((kept.diff() > 0).all()):
            raise BudgetMismatch(f"{pruner.name} kept some token twice, so that fewer than {len(kept)} are left")
        if not 0 <= seen - len(kept) <= len(layout.newlines):
            raise BudgetMismatch(f"{pruner.name}: layer {layer} saw {seen} tokens where {len(kept)} were kept")
        want = layout.size if layer < min(acting) else asked if layer >= max(acting) else None
        if not pruner.adaptive and want is not None and len(kept) != want:
            raise BudgetMismatch(
                f"{pruner.name} kept {len(kept)} of {layout.size} tokens at decoder layer {layer} where its budget is {want}"
            )


def check_resized(pruner: Pruner, counted: int, asked: int) -> None:
    """A picture that was made smaller in front of the processor, whose rounding of both sides decides the count.

    Raises:
        BudgetMismatch: the difference is more than such a rounding.
    """
    if abs(counted - asked) > 2 * math.sqrt(asked) + 1:
        raise BudgetMismatch(
            f"{pruner.name}: pictures were resized to {asked} tokens, but the processor made {counted} of them; "
            "see its smallest and largest number of pixels"
        )


@contextmanager
def _widths(adapter: Adapter) -> Iterator[list[int]]:
    """A list that fills with the sequence length at each decoder layer during prefill; clear it before every call."""
    layers = list(adapter.text_model.layers)
    widths: list[int] = []

    def watch(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if len(widths) < len(layers):  # later calls decode
            widths.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    handles = [layer.register_forward_pre_hook(watch, with_kwargs=True) for layer in layers]
    try:
        yield widths
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------------- environment


def _environment(loaded: models.Loaded, suite: Suite, seed: int, limit: int, batch_size: int) -> dict[str, Any]:
    """All it takes to repeat the run, and to judge its times."""
    import transformers

    device = loaded.model.device
    cpu = _cpu()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "model": loaded.name,
        "model_class": type(loaded.model).__name__,
        "weights_sha256": loaded.weights_sha256,
        "suite": suite.name,
        "suite_seed": seed,
        "limit": limit,
        "batch_size": batch_size,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "attention": getattr(loaded.model.config, "_attn_implementation", None),
        "device": str(device),
        "hardware": gpu or f"{cpu}, {torch.get_num_threads()} threads",
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "foveate": foveate.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit() -> dict[str, Any]:
    """The commit of a source checkout, and whether files differ from it; None where foveate is installed otherwise."""
    root = Path(foveate.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {"commit": None, "modified": None}
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "modified": None}
    return {"commit": head, "modified": bool(changes)}


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar on stderr; yields ``step(what, samples)``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda what, samples: bar.update(task, description=f"{what:<14}", advance=samples)
