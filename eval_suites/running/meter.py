"""Run one method over the samples of a suite, and count what the decoder really sees meanwhile."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.adapters import FrameScorer, Session, attach
from foveate.adapters.families.base import Adapter, adapter_for
from foveate.adapters.trace import ImageTrace, Trace
from foveate.adapters.video.frame_scorer import GREEDY
from foveate.errors import BudgetError, FoveateError, UnsupportedModelError
from foveate.eval_suites.results.rows import Answer, Row
from foveate.eval_suites.running.models import Loaded
from foveate.eval_suites.suites import Sample, Suite
from foveate.pruners.core import AtPixels, BeforeLayer, InCache, InMLP, InTower, Keep, ModelInfo, Pruner, Stage, budget
from foveate.pruners.core.method import content_decides

__all__ = [
    "GREY", "UNPRUNED", "BudgetMismatch", "Meter", "MethodRun", "check_image", "placeholders", "prefill_widths",
    "seen_pruned", "seen_unpruned",
]  # fmt: skip

logger = logging.getLogger(__name__)

GREY = (128, 128, 128)
"""What ``no-image`` shows in place of each picture: the same for all samples, so that nothing of a sample leaks."""


@dataclass(frozen=True)
class MethodRun:
    """One run over all samples: a method, ready to attach (None: the bare model).

    Attributes:
        label: how tables call it; ``"no-image"`` hides the pictures.
        seed: of the random choice.
        baseline: reads no content.
    """

    label: str
    pruner: Pruner | None
    seed: int | None = None
    baseline: bool = False

    @property
    def method(self) -> str:
        """The method's name; of the bare model, the label."""
        return self.pruner.name if self.pruner else self.label

    @property
    def keep(self) -> Keep | None:
        """The budget, None without one."""
        return None if self.pruner is None else getattr(self.pruner, self.pruner.budget_parameter, None)

    def row(self) -> Row:
        """A row with the run's names, and nothing measured."""
        row = Row(self.method, self.label, self.keep, self.seed, self.baseline)
        if self.pruner is not None:
            row.parameters, row.adaptive = self.pruner.parameters(), content_decides(self.pruner)
        return row


UNPRUNED = MethodRun("unpruned", None)


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
        self.unpruned_counts: dict[int, int] = {}  # sample number -> visual tokens
        self.unpruned_memory: dict[int, int | None] = {}  # samples per call -> bytes, see `timing`
        self._warm: set[str] = set()
        self._frame_scorer: FrameScorer | None = None

    def numbers(self, first: int) -> range:
        """Numbers of the samples of the batch that begins at ``first``."""
        return range(first, min(first + self.batch_size, len(self.samples)))

    def count(self, firsts: Iterable[int]) -> int:
        """How many samples there are in the batches that begin at ``firsts``."""
        return sum(len(self.numbers(first)) for first in firsts)

    def measure(self, run: MethodRun, firsts: Iterable[int]) -> Iterator[tuple[list[Answer], dict[str, str]]]:
        """Answer one batch after the other; ``firsts`` are the numbers of their first samples.

        Yields the answers (a sample that fails has its error for one), and what was done with positions by hook point.

        Raises:
            UnsupportedModelError, BudgetError, ParameterError: the method does not work on this model, or not with this
                budget.
            BudgetMismatch: it kept another number of tokens than it should.
        """
        with self.attached(run) as session, prefill_widths(self.adapter) as widths:  # hooks run in order
            for first in firsts:
                batch = self.samples[first : first + self.batch_size]
                answers = self._answers(run, session, widths, first, batch)
                trace = None if session is None else session.trace
                yield answers, dict(trace.positions) if trace else {}

    def _answers(
        self, run: MethodRun, session: Session | None, widths: list[int], first: int, batch: Sequence[Sample]
    ) -> list[Answer]:
        """The answers to a batch; if it fails, to its samples one by one."""
        try:
            if run.label not in self._warm:  # the first batch of a method runs twice
                self._ask(run, session, widths, first, batch)
                self._warm.add(run.label)
            return self._ask(run, session, widths, first, batch)
        except (UnsupportedModelError, BudgetError, BudgetMismatch):
            raise
        except Exception as error:  # the other samples go on
            if len(batch) > 1:
                alone = (self._answers(run, session, widths, i, [sample]) for i, sample in enumerate(batch, first))
                return [answer for answers in alone for answer in answers]
            logger.info("%s failed on %s", run.label, batch[0].id, exc_info=True)
            return [Answer(first, batch[0].id, batch[0].task, error=f"{type(error).__name__}: {error}")]

    def _ask(
        self, run: MethodRun, session: Session | None, widths: list[int], first: int, batch: Sequence[Sample]
    ) -> list[Answer]:
        if session is not None:
            session.trace, session.sample_ids = None, range(first, first + len(batch))
        began = time.perf_counter()
        if session is not None:
            self.score_frames(session, run, batch)
        widths.clear()  # the scorer may be the same model
        texts, ids, lengths = self._answer(run, batch)
        seconds = (time.perf_counter() - began) / len(batch)
        if session is None:
            seen = cached = seen_unpruned(self.adapter, ids, widths)
            self.unpruned_counts.update((number, tokens[0]) for number, tokens in enumerate(seen, first))
            asked = [None] * len(batch)
        else:
            seen, cached, asked = seen_pruned(self.adapter, run.pruner, session.trace, ids, widths)
            if not run.pruner.stages(self.adapter.info):
                asked = self._asked_before_processing(run.pruner, session.trace, first)
        written = [length - n for length, n in zip(lengths, placeholders(self.adapter, ids))]
        counted = zip(map(tuple, seen), map(tuple, cached), asked, written)
        return [
            Answer(number, sample.id, sample.task, text, float(self.suite.score(sample, text)), *counts, seconds)
            for number, (sample, text, counts) in enumerate(zip(batch, texts, counted), first)
        ]

    @contextmanager
    def attached(self, run: MethodRun) -> Iterator[Any]:
        """The run's method on the model, for the block; None if it has none."""
        if run.pruner is None:
            yield None
        else:
            with attach(self.model, run.pruner, positions=self.positions) as session:
                yield session

    def _answer(self, run: MethodRun, batch: Sequence[Sample]) -> tuple[list[str], Tensor, list[int]]:
        """The answers, the prompts' token ids ``(B, L)``, and their lengths."""
        inputs = self.inputs(run, batch)
        output = self.generate(inputs, max_new_tokens=self.suite.max_new_tokens)
        ids = inputs["input_ids"]
        new = self.processor.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in new], ids, inputs["attention_mask"].sum(dim=1).tolist()

    def inputs(self, run: MethodRun, batch: Sequence[Sample]) -> Any:
        """What the model gets for a batch, on its device; pictures are prepared as the method wants them."""
        media = [sample.video if _is_video(sample) else sample.image for sample in batch]
        if run.method == "no-image":
            media = [_grey(one) for one in media]
        elif run.pruner is not None and not self._works_on_pixels(run.pruner):  # else they would shrink twice
            media = [_prepared(run.pruner, one) for one in media]
        texts = [self._prompt(sample) for sample in batch]
        media = {"videos": media, "do_sample_frames": False} if _is_video(batch[0]) else {"images": media}
        inputs = self.processor(**media, text=texts, padding=True, return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def generate(self, inputs: Any, **options: Any) -> Tensor:
        """Greedy token ids ``(B, L + new)`` after the prompts' own."""
        return self.model.generate(**inputs, **GREEDY, **options)

    def _prompt(self, sample: Sample) -> str:
        if not getattr(self.processor, "chat_template", None):
            return self.suite.prompt(sample.question)
        content = [{"type": "video" if _is_video(sample) else "image"}, {"type": "text", "text": sample.question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    @property
    def frame_scorer(self) -> FrameScorer:
        """The model itself, unpruned. It remembers one video only, so that every run pays for its scores."""
        if self._frame_scorer is None:
            prompts = self.suite.frame_prompts
            turn: Callable[[str], str] | None = None
            if not getattr(self.processor, "chat_template", None):
                marker, picture = self.processor.video_token, self.processor.image_token

                def marked(prompt: str) -> str:
                    return self.suite.prompt(prompt).replace(marker, picture)

                turn = marked

            self._frame_scorer = FrameScorer(
                self.model, self.processor, prompts=prompts, turn=turn, decouple=prompts is None, cache_size=1
            )
        return self._frame_scorer

    def score_frames(self, session: Session, run: MethodRun, batch: Sequence[Sample]) -> bool:
        """Give the session the frame scores that the method reads; whether it reads any."""
        stages = run.pruner.stages(self.adapter.info)
        reads = _is_video(batch[0]) and any(stage.reads_frame_scores for stage in stages)
        if reads:
            session.frame_scores = [self.frame_scorer.score(sample.video, sample.question) for sample in batch]
        return reads

    def _works_on_pixels(self, pruner: Pruner) -> bool:
        """Whether it shrinks the pictures inside the model."""
        return any(isinstance(stage, AtPixels) for stage in pruner.stages(self.adapter.info))

    def _asked_before_processing(self, pruner: Pruner, trace: Trace, first: int) -> list[int]:
        """Tokens that a method which makes pictures smaller asks for, per picture.

        Raises:
            BudgetMismatch: the processor, whose rounding of both sides decides the count, made far more or fewer.
        """
        asked = []
        for sample, image in enumerate(trace.images, first):
            if sample not in self.unpruned_counts:
                raise FoveateError("the unpruned model failed on this sample, so its tokens are not known")
            asked.append(budget(pruner.keep, self.unpruned_counts[sample]))
            if abs(image.layout.size - asked[-1]) > 2 * math.sqrt(asked[-1]) + 1:  # more than such a rounding
                raise BudgetMismatch(
                    f"{pruner.name}: pictures were resized to {asked[-1]} tokens, but the processor made "
                    f"{image.layout.size} of them; see its smallest and largest number of pixels"
                )
        return asked


def placeholders(adapter: Adapter, ids: Tensor) -> list[int]:
    """Visual tokens of each prompt of ``ids (B, L)``, separators counted."""
    tokens = [modality.token_id for modality in adapter.modalities]
    return torch.isin(ids, torch.tensor(tokens, device=ids.device)).sum(dim=1).tolist()


def seen_unpruned(adapter: Adapter, ids: Tensor, widths: Sequence[int]) -> list[list[int]]:
    """Visual tokens that each decoder layer saw of each prompt, without a method.

    Args:
        ids: token ids of the prompts, ``(B, L)``; widths: length of the sequence at each layer in prefill.

    Raises:
        BudgetMismatch: some layer saw another sequence.
    """
    depth, length = adapter.info.decoder_layers, ids.shape[1]
    if list(widths) != [length] * depth:
        raise BudgetMismatch(f"the prompt has {length} tokens, but the decoder's layers saw {list(widths)}")
    return [[n] * depth for n in placeholders(adapter, ids)]


def seen_pruned(
    adapter: Adapter, pruner: Pruner, trace: Trace | None, ids: Tensor, widths: Sequence[int]
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Visual tokens that each decoder layer saw and cached of each prompt, and the number asked for.

    A method that works before the processor (it has no stages) changes the pictures: then nothing is asked of
    these.

    Args:
        trace: what the session says of this call; ids, widths: see :func:`seen_unpruned`.

    Raises:
        BudgetMismatch: what the layers saw is not what the trace says, or not what was asked for.
    """
    counts = placeholders(adapter, ids)
    if not any(counts):
        seen = seen_unpruned(adapter, ids, widths)
        return seen, seen, [0] * len(counts)
    rows = _by_prompt(trace.images if trace else [], counts)
    if rows is None:
        raise BudgetMismatch(f"{pruner.name} was attached, but did not see the pictures' {sum(counts)} tokens")
    seen, cached = (
        [[sum(layers) for layers in zip(*(getattr(image, name) for image in row))] or [0] * len(widths) for row in rows]
        for name in ("tokens_per_layer", "cached_per_layer")
    )
    dropped = [
        min(
            n - tokens[i] + sum(image.text_gone_per_layer[i] for image in row)
            for n, tokens, row in zip(counts, seen, rows)
        )
        for i in range(len(widths))
    ]
    claimed = [ids.shape[1] - n for n in dropped]
    if list(widths) != claimed:
        raise BudgetMismatch(
            f"the decoder's layers saw {list(widths)} tokens of the longest prompt, the trace says {claimed}"
        )
    stages = pruner.stages(adapter.info)
    if not stages:
        return seen, cached, [sum(image.layout.length for image in row) for row in rows]
    return seen, cached, [sum(check_image(pruner, stages, image, adapter.info) for image in row) for row in rows]


def _by_prompt(images: Sequence[ImageTrace], counts: Sequence[int]) -> list[list[ImageTrace]] | None:
    """The pictures of each prompt, which has ``counts`` visual tokens; None if they do not add up."""
    left, rows = list(images), []
    for count in counts:
        row: list[ImageTrace] = []
        while left and sum(image.layout.length for image in row) < count:
            row.append(left.pop(0))
        if sum(image.layout.length for image in row) != count:
            return None
        rows.append(row)
    return None if left else rows


def _is_video(sample: Sample) -> bool:
    return hasattr(sample, "video")


def _grey(shown: Any) -> Any:
    """A picture or video of the same size that shows nothing."""
    if isinstance(shown, np.ndarray):
        return np.broadcast_to(np.array(GREY, shown.dtype), shown.shape).copy()
    return Image.new("RGB", shown.size, GREY)


def _prepared(pruner: Pruner, shown: Any) -> Any:
    """The picture, or every frame of the video, as the method wants it before the processor."""
    if isinstance(shown, np.ndarray):
        return np.stack([np.asarray(pruner.prepare(Image.fromarray(frame))) for frame in shown])
    return pruner.prepare(shown)


def check_image(pruner: Pruner, stages: Sequence[Stage], image: ImageTrace, info: ModelInfo) -> int:
    """Hold what happened to a picture against the budget; returns that, in tokens.

    Raises:
        BudgetMismatch: tokens counted twice, other tokens in a layer than the trace's, or not the method's count at
            the end (where the content decides how many: more than its budget).
    """
    layout, keep = image.layout, getattr(pruner, pruner.budget_parameter, None)
    acts = [stage for stage in stages if not isinstance(stage, (InMLP, InCache))]  # these drop no token
    competing = [getattr(stage, "newlines", None) == "compete" for stage in acts]
    compete = any(competing)  # separators count as tokens; how many another method has left is not known in advance
    whole, slack = (layout.length, 0 if all(competing) else len(layout.newlines)) if compete else (layout.size, 0)
    most = whole if keep is None else budget(keep, whole, math.ceil) + len(layout.views) - 1
    count = pruner.count(layout, info)
    if count is None:  # its content decides, and markers come on top
        free = keep is None or getattr(pruner, "count_markers", True) is False
        asked = whole if free else budget(keep, whole)
    else:
        asked = count
    if count is not None and asked > most:
        raise BudgetMismatch(f"{pruner.name} announces {asked} tokens where keep={keep} of {layout.size} allows {most}")
    acting = [stage.layer if isinstance(stage, BeforeLayer) else 0 for stage in acts] or [0]
    # crops merge whole, and what of them was padding goes after the tower: the picture's shape decides
    cut = any(isinstance(stage, InTower) for stage in stages) and len({view.size for view in layout.views}) > 1
    adaptive = count is None or cut
    for layer, seen in enumerate(image.tokens_per_layer):
        kept = image.kept_at(layer)
        if not bool((kept.diff() > 0).all()):
            raise BudgetMismatch(f"{pruner.name} kept some token twice, so that fewer than {len(kept)} are left")
        if not 0 <= seen - len(kept) <= len(layout.newlines):
            raise BudgetMismatch(f"{pruner.name}: layer {layer} saw {seen} tokens where {len(kept)} were kept")
        found = seen if compete else len(kept)
        want = whole if layer < min(acting) else asked if layer >= max(acting) else None
        if adaptive and layer >= min(acting) and found > asked + slack:
            raise BudgetMismatch(
                f"{pruner.name} kept {found} of {whole} tokens at decoder layer {layer}, more than its budget of "
                f"{asked}"
            )
        if not adaptive and want is not None and not want <= found <= want + slack:
            raise BudgetMismatch(
                f"{pruner.name} kept {found} of {whole} tokens at decoder layer {layer} where its budget is {want}"
            )
    return asked


@contextmanager
def prefill_widths(adapter: Adapter) -> Iterator[list[int]]:
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
