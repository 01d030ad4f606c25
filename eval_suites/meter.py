"""Run one method over the samples of a suite, and count what the decoder really sees meanwhile."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from foveate.adapters import Session, attach
from foveate.adapters.base import Adapter, adapter_for
from foveate.adapters.trace import ImageTrace, Trace
from foveate.errors import BudgetError, FoveateError, UnsupportedModelError
from foveate.eval_suites.leaderboard import Row, Status, agreement, share, wilson
from foveate.eval_suites.models import Loaded
from foveate.eval_suites.suites import Sample, Suite
from foveate.pruners.base import Hook, Keep, Pruner, Stage, budget

__all__ = ["GREY", "BudgetMismatch", "Meter", "Run", "check_image", "check_resized"]

logger = logging.getLogger(__name__)

GREY = (128, 128, 128)
"""What ``no-image`` shows in place of each picture: the same for all samples, so that nothing of a sample leaks."""

_NO_SAMPLING = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Run:
    """One run over all samples: a method, ready to attach (None: the bare model).

    Attributes:
        label: how tables call it; ``"no-image"`` hides the pictures.
        seed: of the random choice; baseline: reads no content.
    """

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


class BudgetMismatch(FoveateError):
    """A method kept another number of tokens than it was asked for, or than it says."""


class Meter:
    """Runs methods over the samples and counts what the decoder's layers see."""

    def __init__(
        self, loaded: Loaded, suite: Suite, samples: Sequence[Sample], batch_size: int, positions: str
    ) -> None:
        self.model, self.processor, self.suite, self.samples = loaded.model, loaded.processor, suite, samples
        self.batch_size, self.positions = batch_size, positions
        self.adapter: Adapter = adapter_for(self.model)
        self.unpruned_counts: list[int] = []  # visual tokens of every sample
        self._warm: set[str] = set()

    def row(self, run: Run, reference: Row | None, step: Callable[[str, int], None]) -> Row:
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
        except Exception as error:  # the other methods go on
            logger.info("%s failed", run.label, exc_info=True)
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

    def _measure(self, run: Run, row: Row, count: Callable[[int], None]) -> None:
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
    def _attached(self, run: Run) -> Iterator[tuple[Session | None, list[int]]]:
        """The session, and the width of the sequence that each decoder layer works on in prefill."""
        if run.pruner is None:
            with _widths(self.adapter) as widths:
                yield None, widths
        else:  # hooks run in order, so those that count come behind the session's
            with attach(self.model, run.pruner, positions=self.positions) as session, _widths(self.adapter) as widths:
                yield session, widths

    @torch.no_grad()
    def _answer(self, run: Run, batch: Sequence[Sample]) -> tuple[list[str], Tensor]:
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
        BudgetMismatch: tokens counted twice, other tokens in a layer than the trace's, or not ``asked`` at the end (where
            the content decides how many: more than ``asked``).
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
        if pruner.adaptive and layer >= min(acting) and len(kept) > asked:
            raise BudgetMismatch(
                f"{pruner.name} kept {len(kept)} of {layout.size} tokens at decoder layer {layer}, more than its budget of {asked}"
            )
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
