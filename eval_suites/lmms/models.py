"""lmms-eval's models with a method: ``--model foveate_llava_hf --model_args pretrained=…,pruner=hiprune,keep=0.25``.

A method's parameters stand among the model's arguments because lmms-eval's answer cache looks at nothing else. What the
decoder really sees is counted prompt by prompt; a budget that was not kept ends the run with an error.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts, unwrap_generation_output
from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL
from lmms_eval.models.chat.qwen3_vl import Qwen3_VL
from lmms_eval.models.simple import llava_hf
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm import tqdm

from foveate.errors import FoveateError, InputError, ParameterError
from foveate.eval_suites.lmms import arguments
from foveate.eval_suites.lmms.watch import Said, Watch
from foveate.eval_suites.running.meter import GREY, BudgetMismatch
from foveate.pruners.core import Pruner, view_id

__all__ = ["LlavaHf", "LlavaHfChat", "LlavaOnevision", "LlavaOnevisionChat", "Qwen3VLChat", "Qwen25VLChat"]

logger = logging.getLogger(__name__)

_NEW_TOKENS = 1024  # where a task names no limit; lmms-eval's own
_ALIKE = 5  # documents in a row with one and the same error: it is the device's or the method's, not theirs


@dataclass
class _Counts(TokenCounts):
    """lmms-eval's counts of a sample, and ours: they end up in its log of samples."""

    said: Said | None = None

    def to_dict(self) -> dict[str, Any]:
        if self.said is None:
            return super().to_dict()
        seen = {} if self.said.seen is None else vars(self.said.seen)
        ours = {name: list(value) if isinstance(value, tuple) else value for name, value in seen.items()}
        return super().to_dict() | ours | {"seconds": self.said.seconds, "error": self.said.error}


class Pruned:
    """Mixed into a model of lmms-eval, before its class.

    Args:
        pruner: name of a method (``random@METHOD``: the control of one; ``no-image``: grey pictures); its parameters
            stand beside it. None: nothing is pruned.
        positions: as for :func:`foveate.attach`.
        foveate_version: the installed version, see :func:`foveate.eval_suites.lmms.arguments.check_version`.

    Raises:
        FoveateError: a wrong version, an unknown method or parameter, or a model that the method cannot work on.
    """

    journal: Any = None
    """Keeps what is said as soon as it is said: :class:`foveate.eval_suites.lmms.bench.Kept`."""
    _silent = False  # lmms-eval's constructors ask for the rank
    _failures: tuple[str, ...] = ()  # errors of the last documents, all of them alike

    def __init__(
        self,
        *args: Any,
        pruner: str | None = None,
        positions: str = "auto",
        foveate_version: str | None = None,
        **kwargs: Any,
    ) -> None:
        arguments.check_version(foveate_version)
        own, kwargs = arguments.split(pruner, kwargs)
        method = arguments.method(pruner, own)
        device = str(kwargs.get("device", "cuda"))
        # the defaults do not load under transformers 5
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or device == "cpu":
            kwargs.setdefault("device_map", device)
        super().__init__(*args, **kwargs)
        self.kept_for_later = False
        self._watch: Watch | None = None
        self._docs: list[tuple[str, Any]] = []
        self.use(method, positions, blank=pruner == arguments.NO_IMAGE)

    def use(self, pruner: Pruner | None, positions: str = "auto", blank: bool = False) -> None:
        """Put another method on the model; ``blank``: show it grey pictures."""
        self.unuse()
        self._blank, self._watch = blank, Watch(self.model, pruner, positions)

    def unuse(self) -> None:
        """Take the method off the model."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def clean(self) -> None:
        """lmms-eval drops the model after every evaluation; :attr:`kept_for_later` holds on to it."""
        if not self.kept_for_later:
            self.unuse()
            super().clean()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers, with the number of visual tokens that each decoder layer saw; with a journal batch by batch.

        Raises:
            BudgetMismatch: a method kept another number of tokens than it should, or could not be watched.
            Exception: what five documents in a row failed with; other failures are their documents' own.
        """
        numbers = [request.doc_id for request in requests]
        if self.journal is None or sorted(set(numbers)) != numbers:  # asked again and again, or in another order
            return [GenerationResult(counts.said.text, counts) for counts in self._said(requests)]
        known, results = dict(self.journal.known()), []
        self._silent, self._failures = True, ()
        try:
            for first in tqdm(range(0, len(requests), self.batch_size), desc=self.journal.label):
                batch = requests[first : first + self.batch_size]
                places = range(first, first + len(batch))
                if not known.keys() >= set(places):  # batches are always the same ones
                    fresh = self._said_or_failed(batch)
                    self.journal.add(first, numbers[first : first + len(batch)], fresh, self.watch.positions)
                    known |= zip(places, fresh)
                results += [known[place] for place in places]
        finally:
            self._silent = False
        return [GenerationResult(one.text, _Counts(said=one)) for one in results]

    @property
    def rank(self) -> int:
        """lmms-eval shows a bar per call where this is 0; with a journal there is one bar for all calls."""
        return 1 if self._silent else super().rank

    def _said_or_failed(self, batch: Sequence[Instance]) -> list[Said]:
        """What the model says; if a batch fails, to its documents one by one, so that the others go on."""
        try:
            said = [counts.said for counts in self._said(batch)]
        except FoveateError:  # the method or the model cannot go on
            raise
        except Exception as error:
            if len(batch) > 1:
                return [one for request in batch for one in self._said_or_failed([request])]
            what = f"{type(error).__name__}: {error}"
            self._failures = (*(one for one in self._failures if one == what), what)
            if len(self._failures) == _ALIKE:
                raise
            logger.info("%s failed on document %s", self.journal.label, batch[0].doc_id, exc_info=True)
            return [Said("", None, None, what)]
        self._failures = ()
        return said  # pyright: ignore[reportReturnType]  (all are answered by now)

    def _said(self, requests: Sequence[Instance]) -> list[_Counts]:
        """What the model says, beside lmms-eval's own counts."""
        watch = self.watch
        self._docs.clear()
        watch.prompts.clear()
        if watch.session is not None:
            watch.session.sample_ids = None  # of a batch that failed
        began = time.perf_counter()
        results = super().generate_until([self._shown(request) for request in requests])
        seconds = (time.perf_counter() - began) / max(1, len(requests))
        seen = dict(zip(self._docs, watch.prompts))
        asked = [(request.task_name, request.doc_id) for request in requests]
        if len(watch.prompts) != len(self._docs) or not seen.keys() >= set(asked):
            raise BudgetMismatch(
                f"the model was called with {len(watch.prompts)} prompts for {len(self._docs)} documents: what was "
                "pruned for which is not known"
            )
        counted = []
        for document, result in zip(asked, results, strict=True):
            text, theirs = unwrap_generation_output(result)
            known = {} if theirs is None else vars(theirs)
            counted.append(_Counts(**known, said=Said(text, seen[document], seconds)))
        return counted

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise InputError("foveate's models answer questions; tasks that compare likelihoods are not supported")

    def _shown(self, request: Instance) -> Instance:
        """The request, noting when its document is looked at; with grey pictures where nothing is to be seen."""
        shown = copy.copy(request)
        place, change = (2, self._simple) if self.is_simple else (1, self._chat)
        changed = change(request.args[place], request.task_name, request.doc_id)
        shown.arguments = (*request.args[:place], changed, *request.args[place + 1 :])
        return shown

    def _simple(self, doc_to_visual: Callable[..., list[Any]], task: str, doc_id: Any) -> Callable[..., list[Any]]:
        def visuals(doc: Any) -> list[Any]:
            found = [self._blanked(one) for one in doc_to_visual(doc)]
            self._note(task, doc_id, len(found))
            return found

        return visuals

    def _chat(self, doc_to_messages: Callable[..., list[Any]], task: str, doc_id: Any) -> Callable[..., list[Any]]:
        def messages(doc: Any) -> list[Any]:
            found = copy.copy(doc_to_messages(doc))
            count = 0
            for number, message in enumerate(found):
                parts = [dict(part) for part in message["content"]]
                for part in parts:
                    if part["type"] in ("image", "video"):
                        part["url"] = self._blanked(part["url"])
                        count += 1
                found[number] = {**message, "content": parts}
            self._note(task, doc_id, count)
            return found

        return messages

    def _blanked(self, visual: Any) -> Any:
        if not self._blank:
            return visual
        if not isinstance(visual, Image.Image):
            raise InputError("no-image needs pictures; videos cannot be hidden here")
        return Image.new("RGB", visual.size, GREY)

    def _note(self, task: str, doc_id: Any, visuals: int) -> None:
        """What comes next through the model; random choices go by the document's number."""
        self._docs.append((task, doc_id))
        session = self.watch.session
        if session is not None:
            ids = [int(doc_id)] if visuals == 1 else [view_id(int(doc_id), i) for i in range(visuals)]
            session.sample_ids = [*(session.sample_ids or []), *ids]

    @property
    def watch(self) -> Watch:
        """What counts tokens.

        Raises:
            FoveateError: the model was cleaned up.
        """
        if self._watch is None:
            raise FoveateError("lmms-eval has dropped this model already; make a new one")
        return self._watch


# --------------------------------------------------------------------------------------------------------------- LLaVA


class _Batches(llava_hf.LlavaHf):
    """lmms-eval's LLaVA asks one question at a time and turns errors into empty answers; this does neither."""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        texts: dict[int, str] = {}
        numbered = list(enumerate(request.args for request in requests))
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for batch in _batches(numbered, self.batch_size, lambda args: _settings(args, self.is_simple)):
                asked = [self._ask(args) for _, args in batch]
                answers = self._answer(asked, _settings(batch[0][1], self.is_simple))
                texts |= {number: text for (number, _), text in zip(batch, answers)}
                bar.update(len(batch))
        return [texts[number] for number in range(len(requests))]

    def _ask(self, args: tuple) -> tuple[str, list[Any], list[Any]]:
        """Prompt, pictures and videos of a request."""
        context, _, doc_to_visual, doc_id, task, split = args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        videos = [visual for visual in visuals if isinstance(visual, str)]
        marker = llava_hf.DEFAULT_VIDEO_TOKEN if videos else llava_hf.DEFAULT_IMAGE_TOKEN
        if llava_hf.DEFAULT_IMAGE_TOKEN not in context and visuals:
            context = " ".join([marker] * (1 if videos else len(visuals))) + "\n" + context
        template = self.chat_template or self.tokenizer.chat_template or llava_hf.VICUNA_CHAT_TEMPLATE
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": context}], chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return text, [] if videos else list(visuals), [self.load_video(videos, self.max_frames_num)] if videos else []

    @torch.no_grad()
    def _answer(self, asked: Sequence[tuple[str, list[Any], list[Any]]], settings: dict[str, Any]) -> list[str]:
        texts = [text for text, _, _ in asked]
        images, videos = ([one for found in asked for one in found[place]] for place in (1, 2))
        media = ({"images": images} if images else {}) | ({"videos": videos} if videos else {})
        inputs = self._image_processor(text=texts, padding=True, return_tensors="pt", **media)
        inputs = inputs.to(self._device, self.model.dtype)
        sampled = settings.get("temperature", 0) > 0
        output = self.model.generate(
            **inputs,
            do_sample=sampled,
            temperature=settings["temperature"] if sampled else None,
            top_p=settings.get("top_p") if sampled else None,
            top_k=None,
            num_beams=settings.get("num_beams", 1),
            max_new_tokens=settings.get("max_new_tokens", _NEW_TOKENS),
            use_cache=self.use_cache,
            pad_token_id=self.eot_token_id,
            eos_token_id=self.eot_token_id,
        )
        return self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class _ChatBatches(_Batches):
    """Prompts from the processor's own chat template."""

    is_simple = False

    def _ask(self, args: tuple) -> tuple[str, list[Any], list[Any]]:
        _, doc_to_messages, _, doc_id, task, split = args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        images, videos, _ = messages.extract_media()
        if not getattr(self._image_processor, "chat_template", None):
            raise ParameterError(f"{self.pretrained} has no chat template; run lmms-eval with --force_simple")
        plain = [
            {"role": message.role, "content": [part.model_dump(exclude={"url"}) for part in message.content]}
            for message in messages.messages
        ]
        text = self._image_processor.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        return text, images, [self.load_video(video, self.max_frames_num) for video in videos]


def _settings(args: tuple, simple: bool) -> dict[str, Any]:
    """The generation settings of a request.

    Raises:
        InputError: beams, which pruning does not count.
    """
    settings = args[1 if simple else 2]
    if settings.get("num_beams", 1) > 1:
        raise InputError(
            f"num_beams={settings['num_beams']}: tokens are counted for greedy answers; use --gen_kwargs num_beams=1"
        )
    return settings


def _batches(
    numbered: Sequence[tuple[int, tuple]], size: int, settings: Callable[[tuple], dict[str, Any]]
) -> Iterator[list[tuple[int, tuple]]]:
    """Requests with equal settings together, in their order."""
    groups: dict[str, list[tuple[int, tuple]]] = {}
    for number, args in numbered:
        groups.setdefault(json.dumps(settings(args), sort_keys=True, default=str), []).append((number, args))
    for group in groups.values():
        for first in range(0, len(group), size):
            yield group[first : first + size]


class LlavaHf(Pruned, _Batches):
    """LLaVA-1.5 and LLaVA-NeXT of ``transformers``."""


class LlavaHfChat(Pruned, _ChatBatches):
    """The same with the processor's chat template."""


_ONEVISION = "llava-hf/llava-onevision-qwen2-7b-ov-hf"


class LlavaOnevision(Pruned, _Batches):
    """LLaVA-OneVision of ``transformers``; lmms-eval's own needs the original package."""

    def __init__(self, pretrained: str = _ONEVISION, **kwargs: Any) -> None:
        super().__init__(pretrained=pretrained, **kwargs)


class LlavaOnevisionChat(Pruned, _ChatBatches):
    """The same with the processor's chat template."""

    def __init__(self, pretrained: str = _ONEVISION, **kwargs: Any) -> None:
        super().__init__(pretrained=pretrained, **kwargs)


# ---------------------------------------------------------------------------------------------------------------- Qwen


class Qwen25VLChat(Pruned, Qwen2_5_VL):
    """Qwen2.5-VL."""


class Qwen3VLChat(Pruned, Qwen3_VL):
    """Qwen3-VL."""
