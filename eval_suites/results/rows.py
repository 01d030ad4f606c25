"""What was measured: an answer to one sample, all of a run's answers as one row, and the statistics of rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.eval_suites.running.compare import Difference, resampled_means
from foveate.eval_suites.running.cost import DecoderShape

if TYPE_CHECKING:
    from foveate.pruners.core import Keep

__all__ = [
    "Answer", "Row", "Status", "Timing", "agreement", "interval", "mean_sd", "pareto", "share", "summarise", "wilson",
]  # fmt: skip


# -------------------------------------------------------------------------------------------------------- statistics


def share(part: float, whole: float) -> float | None:
    """``part / whole``, None of nothing."""
    return part / whole if whole else None


def wilson(correct: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927); (0, 1) without any observation."""
    if n == 0:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    p, spread = correct / n, z * z / n
    centre = (p + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (p * (1 - p) + spread / 4)) / (1 + spread)
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)


def interval(scores: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of scores in [0, 1].

    Wilson's where all are right or wrong. Partial scores have another variance than a coin of the same mean, so theirs
    is the percentile bootstrap's (Efron 1979), seeded; all of one value leave nothing to resample and get the wider one
    of Wilson.
    """
    if set(scores) <= {0.0, 1.0} or len(set(scores)) < 2:
        return wilson(math.fsum(scores), len(scores), confidence)
    tail = 50 * (1 - confidence)
    means = resampled_means(np.asarray(scores, float), np.random.default_rng(0))
    low, high = np.percentile(means, (tail, 100 - tail))
    return float(low), float(high)


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1; 0 of a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def agreement(answers: Sequence[str], reference: Sequence[str]) -> float | None:
    """Loyalty: the share of answers that are the same text as the unpruned model's, right or wrong."""
    return share(sum(a == b for a, b in zip(answers, reference, strict=True)), len(reference))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of ``(cost, gain)`` no other point beats in both, by ascending cost."""
    front, best = [], -math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            front.append(i)
            best = points[i][1]
    return front


# ----------------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True)
class Answer:
    """What came of one sample in one run.

    Attributes:
        number: the sample's place in the bench.
        sample, task: its id and task.
        text: what the model said.
        score: in [0, 1], 1 is right. None if the sample failed; a text whose score is None waits for it.
        tokens: visual tokens that each decoder layer saw, separators counted.
        cached: those that its KV cache holds when the prompt is through (files of format 2 and before do not tell).
        asked: tokens that the budget stands for (None without a pruner).
        text_tokens: length of the prompt without visual tokens.
        seconds: the sample's share of its batch, wall time.
        error: why the sample failed.
    """

    number: int
    sample: str
    task: str
    text: str | None = None
    score: float | None = None
    tokens: tuple[int, ...] | None = None
    cached: tuple[int, ...] | None = None
    asked: int | None = None
    text_tokens: int | None = None
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Timing:
    """What one batch size costs (:func:`foveate.eval_suites.running.timing.measure`): medians, for the whole batch.

    Attributes:
        batch: samples per call.
        repeats: calls that were timed, each beside one of the unpruned model.
        prefill: seconds from the processed inputs to the first token.
        decode: per further token.
        selection: what choosing took of the prefill, as the trace counts it (None inside vision towers).
        peak_bytes: most memory of tensors at once in a prefill, beyond weights and inputs; None if it is not known.
        unpruned_prefill, unpruned_decode, unpruned_peak_bytes: the unpruned model's, in turns with the row's own.
        prefill_speedup, decode_speedup: the unpruned model's seconds divided by the row's, median over the turns.
        error: why nothing was measured; everything else is None then.
    """

    batch: int
    repeats: int | None = None
    prefill: float | None = None
    decode: float | None = None
    selection: float | None = None
    peak_bytes: int | None = None
    unpruned_prefill: float | None = None
    unpruned_decode: float | None = None
    unpruned_peak_bytes: int | None = None
    prefill_speedup: float | None = None
    decode_speedup: float | None = None
    error: str | None = None


class Status(str, Enum):
    """What became of a run."""

    OK = "ok"
    UNFINISHED = "unfinished"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"


@dataclass
class Row:
    """One method at one budget with one seed, over all samples. What was not measured is None.

    Attributes:
        method: registry name, ``"unpruned"`` or ``"no-image"``.
        label: the same with the parameters that were asked for.
        keep: the budget asked for; None where there is none. seed: of the random choice, None where nothing is drawn.
        baseline: reads no content.
        guided: the choice depends on the question.
        adaptive: the number of tokens depends on the content, or on the processor's rounding.
        status, reason: what went wrong, if anything did.
        parameters: all of the method's.
        positions: what was done with positions, by hook point.
        kept_requested: visual tokens per image that the budget stands for.
        tokens_per_layer: visual tokens that each decoder layer really saw, separators counted (means over the images).
        tokens_mean, tokens_last: over the layers, and of the last one.
        n, correct, accuracy, interval: over all samples, with the 95 % :func:`interval`.
        tasks: accuracy by task.
        errors: samples that failed; they count as wrong.
        quoted: the number that papers quote, of public benchmarks in which no sample failed.
        relative_accuracy: accuracy divided by that of the unpruned model.
        loyalty: :func:`agreement`.
        versus_random: accuracy minus that of random choice with as many tokens on the average.
        hard: accuracy on the ``hard_n`` samples that the downsampled picture of the same budget gets wrong.
        leads: not told from the best method of its budget, which others are. See :mod:`.running.compare`.
        prefill_flops, cache_bytes: of the decoder for one sample, by :class:`.running.cost.DecoderShape`.
        seconds_per_sample: processor and generation, wall time.
        speedup: the unpruned model's divided by it.
        timings: seconds and memory by batch size; empty if they were not measured.
        answers: what the model said, in the order of the samples.
        scores: of the answers. Neither is part of the JSON.
    """

    method: str
    label: str
    keep: Keep | None = None
    seed: int | None = None
    baseline: bool = False
    adaptive: bool = False
    guided: bool = False
    status: Status = Status.OK
    reason: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    positions: dict[str, str] = field(default_factory=dict)
    kept_requested: float | None = None
    tokens_per_layer: list[float] | None = None
    tokens_mean: float | None = None
    tokens_last: float | None = None
    n: int | None = None
    correct: float | None = None
    accuracy: float | None = None
    interval: tuple[float, float] | None = None
    errors: int = 0
    quoted: float | None = None
    relative_accuracy: float | None = None
    tasks: dict[str, float | None] = field(default_factory=dict)
    loyalty: float | None = None
    versus_random: Difference | None = None
    hard: float | None = None
    hard_n: int | None = None
    leads: bool = False
    prefill_flops: float | None = None
    cache_bytes: float | None = None
    seconds_per_sample: float | None = None
    speedup: float | None = None
    timings: dict[int, Timing] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list, repr=False)
    scores: list[float] = field(default_factory=list, repr=False)

    def as_json(self) -> dict[str, Any]:
        """All but the answers and their scores."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("answers", "scores")}
        plain["timings"] = [asdict(timing) for timing in self.timings.values()]
        return plain | {"versus_random": asdict(self.versus_random) if self.versus_random else None}


def summarise(
    row: Row,
    answers: Mapping[int, Answer],
    samples: int,
    tasks: Sequence[str],
    reference: Row | None,
    shape: DecoderShape | None = None,
) -> Row:
    """Fill ``row`` in from the answers of its run, by number, and return it.

    Args:
        row: with its names, and with ``status`` and ``reason`` where the run was given up.
        samples: how many there should be.
        reference: the unpruned row; None if this is it, or if there is none.
        shape: the decoder's, if its cost is known.
    """
    if row.status is not Status.OK:
        return row
    waiting = sum(answer.score is None and answer.error is None for answer in answers.values())
    if len(answers) - waiting < samples:
        unscored = " without scores" if waiting else ""
        row.status = Status.UNFINISHED
        row.reason = f"{len(answers)} of {samples} samples{unscored}; the same command goes on"
        return row
    rows = [answers[number] for number in sorted(answers)]
    worked = [answer for answer in rows if answer.error is None]
    row.n, row.errors = len(rows), len(rows) - len(worked)
    if row.errors:
        first = next(answer for answer in rows if answer.error is not None)
        row.reason = f"{row.errors} of {row.n} samples failed and count as wrong; first {first.sample}: {first.error}"
    if not worked:
        row.status, row.reason = Status.FAILED, rows[0].error
        return row
    row.answers = [(answer.text or "").strip() for answer in rows]
    row.scores = [answer.score or 0.0 for answer in rows]
    asked = [answer.asked for answer in worked if answer.asked is not None]
    row.kept_requested = statistics.fmean(asked) if asked else None
    row.tokens_per_layer = [statistics.fmean(layer) for layer in zip(*(answer.tokens for answer in worked))]
    row.tokens_mean, row.tokens_last = statistics.fmean(row.tokens_per_layer), row.tokens_per_layer[-1]
    if shape is not None and all(answer.text_tokens is not None for answer in worked):
        lengths = [[n + answer.text_tokens for n in answer.tokens] for answer in worked]
        row.prefill_flops = statistics.fmean(map(shape.prefill_flops, lengths))
        if all(answer.cached is not None for answer in worked):
            lengths = [[n + answer.text_tokens for n in answer.cached] for answer in worked]
            row.cache_bytes = statistics.fmean(map(shape.cache_bytes, lengths))
    row.seconds_per_sample = statistics.fmean(answer.seconds for answer in worked)
    correct = math.fsum(row.scores)
    row.correct = int(correct) if correct.is_integer() else correct
    row.accuracy, row.interval = share(row.correct, row.n), interval(row.scores)
    for task in tasks:
        hits = [score for score, answer in zip(row.scores, rows) if answer.task == task]
        row.tasks[task] = share(math.fsum(hits), len(hits))
    reference = row if reference is None and row.method == "unpruned" else reference
    if reference is not None and reference.status is Status.OK:
        row.loyalty = agreement(row.answers, reference.answers)
        row.relative_accuracy = share(row.correct, reference.correct)
        row.speedup = share(reference.seconds_per_sample, row.seconds_per_sample)
    return row
