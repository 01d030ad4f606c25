"""What a row costs in seconds and bytes, measured beside the unpruned model: in turns, warm, the device's work done.

A pass of its own after the accuracy pass, over a few samples in batches of 1 and of 8. It needs no right answers, so
that generation always writes the same number of tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from foveate.eval_suites.results.rows import Timing
from foveate.eval_suites.running.meter import UNPRUNED, Meter, MethodRun
from foveate.eval_suites.speed.harness import Clock, in_turns, ratios
from foveate.eval_suites.suites import Sample

__all__ = ["BATCHES", "REPEATS", "measure", "peak"]

BATCHES = (1, 8)
"""Samples per call."""
REPEATS = 3
_NEW = 3  # tokens written per call: the first ends the prefill, each of the others is a decoding step


class _Laps(StoppingCriteria):
    """Notes when each token was there; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.clock, self.laps = Clock(device), []

    def __call__(self, ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        self.laps.append(self.clock.lap())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def measure(meter: Meter, run: MethodRun, batch: int, repeats: int = REPEATS) -> Timing:
    """Time ``run`` and the unpruned model, call by call in turns, in batches of ``batch`` samples.

    Every call has other samples, the same for all rows. The first call of either warms up, counts for the memory only,
    and is not timed. Prefill lasts from the processed inputs to the first token, encoder and selection included; decode
    is one further token; selection is what the trace has counted, which is a part of prefill. All are for the whole
    batch.

    Raises:
        FoveateError, RuntimeError: whatever the model or the method raises.
    """
    contenders = {"unpruned": UNPRUNED} | ({} if run.pruner is None and run.label == "unpruned" else {"own": run})
    laid: dict[str, list[tuple[float, float, float | None]]] = {name: [] for name in contenders}
    memory: dict[str, int | None] = {}

    def turn(name: str, number: int) -> None:
        samples = _samples(meter, number + 1, batch)
        if number >= 0:
            laid[name].append(_call(meter, contenders[name], samples))
        elif name == "own" or batch not in meter.unpruned_memory:
            memory[name] = _memory(meter, contenders[name], samples)
        else:
            memory[name] = meter.unpruned_memory[batch]

    in_turns({name: partial(turn, name) for name in contenders}, repeats)
    meter.unpruned_memory.setdefault(batch, memory["unpruned"])
    last = list(contenders)[-1]
    unpruned_prefill, unpruned_decode, _ = zip(*laid["unpruned"])
    prefill, decode, selection = zip(*laid[last])
    chosen = [seconds for seconds in selection if seconds is not None]
    return Timing(
        batch=batch,
        repeats=repeats,
        prefill=median(prefill),
        decode=median(decode),
        selection=median(chosen) if chosen else None,
        peak_bytes=memory[last],
        unpruned_prefill=median(unpruned_prefill),
        unpruned_decode=median(unpruned_decode),
        unpruned_peak_bytes=memory["unpruned"],
        prefill_speedup=median(ratios(unpruned_prefill, prefill)),
        decode_speedup=median(ratios(unpruned_decode, decode)),
    )


def _samples(meter: Meter, turn: int, batch: int) -> list[Sample]:
    """Other samples every turn, as long as there are any."""
    return [meter.samples[(turn * batch + i) % len(meter.samples)] for i in range(batch)]


@torch.no_grad()
def _call(meter: Meter, run: MethodRun, samples: Sequence[Sample]) -> tuple[float, float, float | None]:
    """Generate a few tokens from scratch, with the method attached for this one call.

    Returns the seconds of prefill, of a decoding step, and of choosing (None where it is not counted apart).
    """
    inputs = meter.inputs(run, samples)
    with meter.attached(run) as session:
        laps, reads_scores = _Laps(meter.model.device), False
        if session is not None:
            session.sample_ids = range(len(samples))
            reads_scores = meter.score_frames(session, run, samples)
        scored = laps.clock.lap() if reads_scores else 0.0
        options = {"max_new_tokens": _NEW, "min_new_tokens": _NEW, "stopping_criteria": StoppingCriteriaList([laps])}
        meter.generate(inputs, **options)
        spans = {} if session is None else session.trace.seconds
    chosen = [seconds for name, seconds in spans.items() if name != "encoder"]
    decode = median(b - a for a, b in zip(laps.laps, laps.laps[1:]))
    return laps.laps[0], decode, sum(chosen) + scored if chosen else None


@torch.no_grad()
def _memory(meter: Meter, run: MethodRun, samples: Sequence[Sample]) -> int | None:
    """Most bytes of tensors that a prefill had at once, beyond the weights and its inputs."""
    inputs = meter.inputs(run, samples)
    with meter.attached(run) as session:
        if session is not None:
            session.sample_ids = range(len(samples))
            meter.score_frames(session, run, samples)
        return peak(meter.model.device, lambda: meter.generate(inputs, max_new_tokens=1, min_new_tokens=1))


def peak(device: torch.device, work: Any) -> int | None:
    """Most bytes of tensors on ``device`` at once while ``work()`` runs, beyond those that were there before.

    On CUDA the caching allocator's own count, on a CPU the sum over every allocation that torch's profiler saw: the
    process's resident memory would not tell, because freed memory stays with it. None on other devices.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        work()
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells stderr where it looked for a GPU
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    found = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(found, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
