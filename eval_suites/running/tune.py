"""``foveate tune``: how far can a model be pruned before it loses more accuracy than it may?

Half of the questions calibrate: every method under every position policy is a chain of budgets from gentle to
aggressive, tested in that order until one fails. Of all settings that hold the target the fastest is chosen, and
checked once on the other half. The statistics are in ``certify``.
"""

from __future__ import annotations

import argparse
import json
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from foveate.errors import FoveateError, ParameterError
from foveate.eval_suites import suites
from foveate.eval_suites.results.leaderboard import value_text
from foveate.eval_suites.results.rows import Answer, Timing, pareto
from foveate.eval_suites.running import models
from foveate.eval_suites.running.budgets import checked_budgets, parse_keep
from foveate.eval_suites.running.certify import least_samples, lower_bound, p_value, relative_accuracy
from foveate.eval_suites.running.environment import environment
from foveate.eval_suites.running.meter import UNPRUNED, BudgetMismatch, Meter, MethodRun
from foveate.eval_suites.running.runner import check_writable, methods_of, progress_bar
from foveate.eval_suites.running.timing import measure
from foveate.eval_suites.suites import Suite
from foveate.eval_suites.terminal import console, write
from foveate.pruners.core import Keep, Pruner, budget
from foveate.pruners.core.parameters import check_choice
from foveate.pruners.core.preset import Preset

__all__ = ["Chain", "Setting", "Tuned", "add_arguments", "main", "search", "tune"]

POLICIES = ("keep", "compact")
_KEEP = "0.9,0.75,0.5,0.35,0.25,0.15,0.1"
_WORTH_IT = 1.05  # times as fast, below which a gain is not worth the words


# ------------------------------------------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foveate tune``."""
    add = parser.add_argument
    help_ = f"{', '.join(models.EMBEDDED)}, a folder, or a name on the hub"
    add("--model", metavar="NAME", default="shapes-llava", help=help_)
    help_ = f"one of: {', '.join(suites.SUITES)}; or a JSONL file of yours with image, question and answer a line"
    add("--suite", metavar="NAME", default="shapes", help=help_)
    add("--target", metavar="SHARE", type=float, default=0.98, help="of the unpruned accuracy to keep (default: 0.98)")
    add("--confidence", metavar="SHARE", type=float, default=0.95, help="that it is kept (default: 0.95)")
    add("--pruners", metavar="NAMES", default="all", help="methods to search, as for `foveate bench` (default: all)")
    add("--keep", metavar="BUDGETS", default=_KEEP, help=f"budgets to search (default: {_KEEP})")
    help_ = "position policies to search (default: keep,compact)"
    add("--positions", metavar="POLICIES", default=",".join(POLICIES), help=help_)
    help_ = "questions, half to calibrate, half to check (default: 1000)"
    add("--limit", metavar="N", type=int, default=1000, help=help_)
    add("--seed", metavar="N", type=int, help="draws and halves the questions (default: the suite's own)")
    help_ = "what makes the fastest: measured time, or fewest tokens in the decoder (default: time)"
    add("--by", choices=("time", "tokens"), default="time", help=help_)
    add("--batch-size", metavar="N", type=int, default=32, help="questions per call of the model (default: 32)")
    models.add_arguments(parser)
    add("--out", metavar="PATH", default="preset.yaml", help="the preset to write (default: preset.yaml)")
    add("--json", metavar="PATH", help="write all that was found; '-' prints it instead of the table")


def main(args: argparse.Namespace) -> int:
    """Run ``foveate tune``; 0, or 1 if nothing holds the target.

    Raises:
        FoveateError: bad input.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if not args.out.lower().endswith((".yaml", ".yml")):
        raise ParameterError(f"--out {args.out}: a preset's name ends in .yaml, so that foveate.attach knows it")
    for option, path in (("--out", args.out), ("--json", args.json)):  # a search takes minutes
        if path not in (None, "-"):
            check_writable(option, path)
    names = ("confidence", "pruners", "limit", "seed", "by", "batch_size", "device", "dtype")
    options = {name: getattr(args, name) for name in names}
    policies = tuple(filter(None, map(str.strip, args.positions.split(","))))
    found = tune(args.model, args.suite, args.target, keep=parse_keep(args.keep), positions=policies, **options)
    if found.chosen is not None:
        found.preset().write(args.out)
    if args.json:
        write(args.json, json.dumps(found.as_json(), indent=1, default=repr) + "\n")
    if args.json != "-":
        found.print(args.out)
    return int(found.chosen is None)


# ------------------------------------------------------------------------------------------------------------ results


@dataclass
class Setting:
    """A method at a budget under a position policy, and what the calibration half says of it.

    Attributes:
        p: of the hypothesis that it loses too much.
        certified: whether its chain was tested up to it, and all held.
        relative, bound: its relative accuracy, and the one-sided lower bound at the chain's level.
        tokens: mean tokens over the decoder's layers.
        timing: of one sample a call, of certified settings only.
        speedup: the unpruned model's time of an answer divided by this one's.
    """

    label: str
    pruner: Pruner
    positions: str
    p: float | None = None
    certified: bool = False
    accuracy: float | None = None
    relative: float | None = None
    bound: float | None = None
    scores: Sequence[float] = field(default=(), repr=False)
    tokens: float | None = None
    timing: Timing | None = None
    speedup: float | None = None

    @property
    def keep(self) -> Keep | None:
        return getattr(self.pruner, self.pruner.budget_parameter, None)

    @property
    def budget(self) -> str:
        return "" if self.keep is None else str(self.keep) if isinstance(self.keep, int) else value_text(self.keep)

    def as_json(self) -> dict[str, Any]:
        plain = {name: value for name, value in vars(self).items() if name not in ("pruner", "scores", "timing")}
        return plain | {"keep": self.keep, "timing": None if self.timing is None else asdict(self.timing)}


@dataclass
class Chain:
    """The settings of one method under one position policy, from gentle to aggressive.

    Attributes:
        settings: in the order in which they are tested.
        reason: why it ended early.
    """

    settings: list[Setting]
    reason: str | None = None


@dataclass
class Tuned:
    """What was found.

    Attributes:
        chains: all that was searched.
        level: of each chain's tests.
        chosen: the fastest that holds the target, or None.
        checked: its relative accuracy on the other half.
        checked_bound: the one-sided lower bound of it.
        facts: model, suite, target, confidence, numbers of samples, versions.
    """

    chains: list[Chain]
    level: float
    chosen: Setting | None = None
    checked: float | None = None
    checked_bound: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def measured(self) -> list[Setting]:
        """Settings that were tested."""
        return [setting for chain in self.chains for setting in chain.settings if setting.p is not None]

    @property
    def front(self) -> list[Setting]:
        """Tested settings that no other beats in both accuracy and tokens, fewest tokens first."""
        measured = self.measured
        return [measured[i] for i in pareto([(setting.tokens, setting.accuracy) for setting in measured])]

    def preset(self) -> Preset:
        """The chosen setting, with how it was found."""
        chosen, facts = self.chosen, self.facts
        names = (
            "model", "weights_sha256", "suite", "target", "confidence", "calibration", "check", "foveate", "torch",
            "transformers", "hardware", "date",
        )  # fmt: skip
        told = {name: facts[name] for name in names if facts.get(name) is not None}
        told |= {
            "relative_accuracy": round(chosen.relative, 4),
            "at_least": round(chosen.bound, 4),
            "checked": round(self.checked, 4),
            "speedup": None if chosen.speedup is None else round(chosen.speedup, 3),
        }
        return Preset(chosen.pruner, chosen.positions, told)

    def as_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("facts", "level", "checked", "checked_bound")}
        chains = [{"reason": c.reason, "settings": [s.as_json() for s in c.settings]} for c in self.chains]
        return plain | {"chosen": None if self.chosen is None else self.chosen.as_json(), "chains": chains}

    def print(self, out: str) -> None:
        """Print on the terminal."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        facts, screen = self.facts, console()
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{facts['model']} on {facts['suite']}")
        for head in ("method", "keep", "positions", "tokens", "rel. %", "at least", "speed", "holds"):
            left = head in ("method", "positions", "holds")
            table.add_column(head, justify="left" if left else "right", no_wrap=True)
        front = {id(setting) for setting in self.front}
        for setting in sorted(self.measured, key=lambda s: (s.tokens, -s.accuracy)):
            if not (setting.certified or id(setting) in front):
                continue
            name = ("▸ " if setting is self.chosen else "◆ " if id(setting) in front else "  ") + setting.label
            shares = [f"{100 * share:.1f}" for share in (setting.relative, setting.bound)]
            speed = "" if setting.speedup is None else f"{setting.speedup:.2f}×"
            holds = "yes" if setting.certified else "not shown"
            cells = (name, setting.budget, setting.positions, f"{setting.tokens:.1f}", *shares, speed, holds)
            style = "bold green" if setting is self.chosen else "" if setting.certified else "dim"
            table.add_row(*map(Text, cells), style=style)
        screen.print(table)
        screen.print(Text("\n".join(self.notes()), style="dim"))
        screen.print()
        screen.print(Text("\n".join(self.verdict(out))))

    def notes(self) -> list[str]:
        """How to read the table, and what could not be searched."""
        f = self.facts
        chains = f"all {n} chains together" if (n := len(self.chains)) > 1 else "the one chain of budgets"
        lines = [
            f"{f['calibration']} questions calibrate, the unpruned model answers {100 * f['unpruned_accuracy']:.1f} % "
            f"of them; {f['check']} others check.",
            f"at least: one-sided bound at {100 * (1 - self.level):.2f} %, which is {100 * f['confidence']:g} % for "
            f"{chains} (betting test, fixed sequence from gentle to aggressive, Bonferroni over methods and policies).",
            "▸ the choice; ◆ no other tested setting is more accurate with as few tokens. speed: the unpruned model's "
            "time of an answer divided by its own.",
        ]
        gentlest = [chain.settings[0] for chain in self.chains]
        if lost := [f"{s.label} ({s.positions})" for s in gentlest if s.p is not None and not s.certified]:
            lines.append(f"shown to hold at no budget: {', '.join(lost)}")
        reasons: dict[str, list[str]] = {}
        for chain in self.chains:
            if chain.reason:
                reasons.setdefault(chain.reason, []).append(chain.settings[0].label)
        lines += [f"not searched: {', '.join(dict.fromkeys(labels))}: {reason}" for reason, labels in reasons.items()]
        return lines

    def verdict(self, out: str) -> list[str]:
        """What was found, in words."""
        f = self.facts
        target, confidence = 100 * f["target"], 100 * f["confidence"]
        promise = f"at least {target:g} % of the unpruned accuracy, with {confidence:g} % confidence"
        if self.chosen is None:
            need = least_samples(f["target"], self.level, f["unpruned_accuracy"])
            advice = "Allow a lower --target, larger budgets (--keep), or give more questions (--limit)."
            if need > f["calibration"]:
                advice = (
                    f"{f['calibration']} calibrating questions could not show it even of a method that changes no "
                    f"answer: about {2 * need} questions in all (--limit), fewer methods (--pruners) or a lower "
                    "--target would."
                )
            return [f"Nothing holds {promise}.", advice, "No preset was written."]
        c = self.chosen
        speed = "" if c.speedup is None else f", {c.speedup:.2f} times as fast"
        held = "the target is held." if self.checked >= f["target"] else "BELOW the target there."
        said = [
            f"{c.label} keep {c.budget or 'of its own'}, positions {c.positions}{speed}: {promise}.",
            f"On the {f['check']} questions that were not searched on it has {100 * self.checked:.1f} % (at least "
            f"{100 * self.checked_bound:.1f} %): {held}",
        ]
        if c.speedup is not None and c.speedup < _WORTH_IT:
            said.append("Nothing that holds the target is noticeably faster than the unpruned model on this machine.")
        return [*said, f"wrote {out}: foveate.attach(model, {out!r})"]


# -------------------------------------------------------------------------------------------------------------- search


def search(
    chains: Sequence[Chain],
    scores: Callable[[Setting], Sequence[float]],
    unpruned: Sequence[float],
    target: float,
    alpha: float,
) -> float:
    """Test the chains' settings, and mark those that hold the target; returns each chain's level.

    With probability 1 - ``alpha`` no setting is marked that has less than ``target`` times the unpruned accuracy. Which
    chains there are, and in which order their settings stand, must not depend on these scores.

    Args:
        scores: gives a setting's scores on the calibrating samples, of which ``unpruned`` are the unpruned model's.
            What it raises of :class:`FoveateError` ends the chain and is its reason.
    """
    level = alpha / max(1, len(chains))
    for chain in chains:
        for setting in chain.settings:
            try:
                found = scores(setting)
            except FoveateError as error:
                chain.reason = str(error)
                break
            setting.p, setting.scores = p_value(found, unpruned, target), found
            setting.accuracy, setting.relative = fmean(found), relative_accuracy(found, unpruned)
            setting.certified = setting.p <= level
            if not setting.certified:
                break
    return level


def tune(
    model: str | models.Loaded = "shapes-llava",
    suite: str | Suite = "shapes",
    target: float = 0.98,
    *,
    confidence: float = 0.95,
    pruners: Any = "all",
    keep: Keep | Sequence[Keep] = (0.9, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1),
    positions: Sequence[str] = POLICIES,
    limit: int = 1000,
    seed: int | None = None,
    by: str = "time",
    batch_size: int = 32,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
) -> Tuned:
    """Find the fastest setting that keeps ``target`` of the unpruned accuracy.

    Args:
        model, suite, pruners, keep, batch_size, device, dtype: as for :func:`foveate.eval_suites.running.runner.bench`;
            ``suite`` may be a JSONL file.
        target: relative accuracy in (0, 1); confidence: that no certified setting has less.
        positions: policies to search; limit: questions in all; seed: which ones, and how they are halved.
        by: ``"time"`` measures certified settings, ``"tokens"`` counts what the decoder sees.

    Raises:
        FoveateError: bad input, or a model that answers nothing right.
    """
    for name, share in (("target", target), ("confidence", confidence)):
        if not 0 < share < 1:
            raise ParameterError(f"{name}={share}: give a share between 0 and 1, for example 0.95")
    check_choice("by", by, ("time", "tokens"))
    for policy in positions:
        check_choice("positions", policy, ("auto", *POLICIES))
    if not positions:
        raise ParameterError("positions is empty; give keep, compact, or both")
    budgets = checked_budgets(keep)
    suite = suites.find(suite) if isinstance(suite, str) else suite
    if not isinstance(model, models.Loaded):
        model = models.load(model, device, dtype)
    seed = suite.seed if seed is None else seed
    samples = list(suite.samples(limit, seed))
    if len(samples) < 4:
        raise ParameterError(f"{len(samples)} questions cannot be halved and searched on; give more (--limit)")
    random.Random(seed).shuffle(samples)
    halves = samples[: len(samples) // 2], samples[len(samples) // 2 :]
    meters = {policy: Meter(model, suite, halves[0], batch_size, policy) for policy in positions}
    meter = next(iter(meters.values()))
    facts = environment(model.model) | {
        "model": model.name, "weights_sha256": model.weights_sha256, "suite": suite.name, "suite_seed": seed,
        "target": target, "confidence": confidence, "calibration": len(halves[0]), "check": len(halves[1]),
        "positions": list(positions), "by": by,
    }  # fmt: skip

    reference = _answers(meter, UNPRUNED)
    for other in meters.values():
        other.unpruned_counts = meter.unpruned_counts
    unpruned = _scores(reference)
    if not any(unpruned):
        raise FoveateError(
            f"{model.name} answers none of {len(unpruned)} questions of {suite.name} right, so that there is nothing "
            "to keep; check the model, the suite and its prompt"
        )
    facts["unpruned_accuracy"] = fmean(unpruned)
    count = round(fmean(meter.unpruned_counts.values()))
    chains = list(plan(pruners, budgets, positions, count))
    found = Tuned(chains, 0.0, facts=facts)

    with warnings.catch_warnings(), progress_bar(progress, sum(len(c.settings) for c in chains), "settings") as step:
        warnings.simplefilter("ignore")  # what methods say of themselves was said when they were made

        def scores(setting: Setting) -> list[float]:
            step(f"{setting.label} {setting.budget}", 1)
            answers = _answers(meters[setting.positions], _run(setting))
            worked = [answer for answer in answers if answer.tokens is not None]
            if not worked:
                raise FoveateError(f"no question could be answered ({answers[0].error})")
            setting.tokens = fmean(fmean(answer.tokens) for answer in worked)
            return _scores(answers)

        found.level = search(chains, scores, unpruned, target, 1 - confidence)
        for setting in found.measured:
            setting.bound = lower_bound(setting.scores, unpruned, found.level)
        certified = [setting for setting in found.measured if setting.certified]
        if by == "time":
            written = _written(model, reference)
            for setting in certified:
                step(f"timing {setting.label} {setting.budget}", 0)
                _time(meters[setting.positions], setting, written)
    if certified:
        found.chosen = min(certified, key=lambda s: (-(s.speedup or 0.0), s.tokens, -s.relative))
        check = Meter(model, suite, halves[1], batch_size, found.chosen.positions)
        whole = _scores(_answers(check, UNPRUNED))
        pruned = _scores(_answers(check, _run(found.chosen)))
        found.checked = relative_accuracy(pruned, whole)
        found.checked_bound = lower_bound(pruned, whole, 1 - confidence)
    return found


def plan(pruners: Any, budgets: Sequence[Keep], positions: Sequence[str], count: int) -> Iterator[Chain]:
    """All chains, declared before anything is measured: most tokens first; ``count``: visual tokens of a sample."""
    ordered = sorted(budgets, key=lambda k: budget(k, count), reverse=True)
    for label, pruner, swept in methods_of(pruners):
        for policy in positions:
            at = [replace(pruner, **{pruner.budget_parameter: k}) for k in ordered] if swept else [pruner]
            yield Chain([Setting(label, one, policy) for one in at])


def _run(setting: Setting) -> MethodRun:
    return MethodRun(setting.label, setting.pruner)


def _answers(meter: Meter, run: MethodRun) -> list[Answer]:
    """The answers to all samples.

    Raises:
        FoveateError: the method does not work on this model, or kept another number of tokens than it should.
    """
    firsts = range(0, len(meter.samples), meter.batch_size)
    try:
        return [answer for answers, _ in meter.measure(run, firsts) for answer in answers]
    except BudgetMismatch as error:
        raise FoveateError(f"FAILED: {error}") from None


def _scores(answers: Sequence[Answer]) -> list[float]:
    """What failed counts as wrong."""
    return [answer.score or 0.0 for answer in answers]


def _written(model: models.Loaded, answers: Sequence[Answer]) -> float:
    """Mean tokens of an answer, its end included."""
    texts = [answer.text for answer in answers if answer.text is not None]
    return 1 + fmean(len(ids) for ids in model.processor.tokenizer(texts, add_special_tokens=False)["input_ids"])


def _time(meter: Meter, setting: Setting, written: float) -> None:
    setting.timing = t = measure(meter, _run(setting), batch=1)
    whole = t.unpruned_prefill + (written - 1) * t.unpruned_decode
    setting.speedup = whole / (t.prefill + (written - 1) * t.decode)
