"""Score the frames of a video for a question with a vision-language model, as QuoTA does (arXiv 2503.08689).

Every frame is shown alone, as one picture, and asked a yes-or-no question; its score is the probability of the
letter for yes as the first token of the answer, over the whole vocabulary. Nothing is decoded but the question's
objects, once.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from foveate.adapters.session import session_of
from foveate.adapters.video.reading import Video
from foveate.errors import InputError, ParameterError
from foveate.pruners.core.frame_questions import FramePrompts, parsed_objects

DEFAULT_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
"""For ``generate``: the likeliest token every time, whatever the checkpoint's own generation settings."""
_MAX_PIXELS = 1280 * 28 * 28  # per frame, the authors' setting
_T = TypeVar("_T")


@dataclass(frozen=True)
class FrameScores(Sequence[float]):
    """Scores of a video's frames, usable wherever a sequence of numbers is, and how they came about.

    Attributes:
        scores: one per frame, in [0, 1].
        question: what was asked about the video.
        prompt: what each frame was asked.
        objects: what the question was found to look for.
        reply: what the language model said about the question, None where it was not asked.
        plain: the frames were asked the plain question, since it gave no objects: scores of less worth.
    """

    scores: tuple[float, ...]
    question: str
    prompt: str
    objects: tuple[str, ...] = ()
    reply: str | None = None
    plain: bool = False

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, i: Any) -> Any:
        return self.scores[i]


class FrameScorer:
    """Scores frames with a model and its processor. The model runs unpruned, also while a pruner is attached to it.

    Args:
        model: any ``transformers`` vision-language model; processor: the model's own.
        prompts: what is asked.
        turn: ``turn(prompt)``, the full text with image marker, for processors without chat template.
        decouple: first let the language model find the objects of the question; else ask about the plain question.
        language: ``(model, processor)`` that finds the objects; None: the scoring model does.
        batch_size: frames per forward pass; cache_size: videos whose scores are remembered, oldest forgotten first.
        max_new_tokens: longest reply about the question.

    Raises:
        ParameterError: a size below 1, or a tokenizer that has no single token for the letter that means yes.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        prompts: FramePrompts | None = None,
        turn: Callable[[str], str] | None = None,
        decouple: bool = True,
        language: tuple[nn.Module, Any] | None = None,
        batch_size: int = 64,
        cache_size: int = 256,
        max_new_tokens: int = 4096,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("cache_size", cache_size), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ParameterError(f"{name}={value}: give at least 1")
        self.model, self.processor = model, processor
        self.prompts = prompts or FramePrompts()
        self.turn, self.decouple, self.language = turn, decouple, language or (model, processor)
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.yes = None if self.prompts.yes is None else _single_token(processor, self.prompts.yes)
        self._scores: _Recent[FrameScores] = _Recent(cache_size)
        self._replies: _Recent[str] = _Recent(cache_size)

    @classmethod
    def load(
        cls,
        name: str = DEFAULT_MODEL,
        *,
        fallback: tuple[nn.Module, Any] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = "auto",
        **options: Any,
    ) -> FrameScorer:
        """A scorer on its own model from the hub or a folder. ``fallback``: model and processor to use, with a
        warning, where that cannot be loaded; the attached ones, for example.

        Raises:
            InputError: it cannot be loaded, and there is no fallback.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(name, max_pixels=_MAX_PIXELS)
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).eval()
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, … alike
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if fallback is None:
                raise InputError(
                    f"the scoring model {name!r} cannot be loaded: {reason}; give another name, or fallback=(model, "
                    "processor)"
                ) from error
            warnings.warn(
                f"the scoring model {name!r} cannot be loaded ({reason}); {type(fallback[0]).__name__} scores instead",
                stacklevel=2,
            )
            return cls(*fallback, **options)
        return cls(model if device is None else model.to(device), processor, **options)

    def score(self, frames: Video | Sequence[Any] | np.ndarray, question: str) -> FrameScores:
        """A score for every frame.

        Args:
            frames: a :class:`Video`, pictures, or an array ``(T, H, W, 3)`` uint8. The same frames and question are not
                scored again.
            question: with its answer options, as the model is asked.

        Raises:
            InputError: no frames, or an empty question.
        """
        frames = list(frames.frames if isinstance(frames, Video) else frames)
        if not frames or not question.strip():
            raise InputError(f"{len(frames)} frames and the question {question!r}: there is nothing to score")
        return self._scores.get_or_make((_digest(frames), question), lambda: self._score(frames, question))

    def _score(self, frames: list[Any], question: str) -> FrameScores:
        reply, objects = None, []
        if self.decouple:
            reply = self._replies.get_or_make(question, lambda: self._reply(question))
            objects = parsed_objects(reply)
            if not objects:
                warnings.warn(
                    f"no objects to look for in the reply {reply[:200]!r} about {question!r}; each frame is asked "
                    "the plain "
                    "question, which scores worse",
                    stacklevel=4,
                )
        prompt = self.prompts.about(question, objects)
        with torch.no_grad(), unpruned(self.model):
            scores = [
                p
                for first in range(0, len(frames), self.batch_size)
                for p in self._probabilities(frames[first : first + self.batch_size], prompt)
            ]
        return FrameScores(tuple(scores), question, prompt, tuple(objects), reply, plain=not objects)

    def _reply(self, question: str) -> str:
        model, processor = self.language
        text = _turn(processor, self.prompts.decouple.replace("{question}", question), image=False)
        tokenizer = getattr(processor, "tokenizer", processor)
        inputs = tokenizer([text], return_tensors="pt").to(model.device)
        with torch.no_grad(), unpruned(model):
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=self.max_new_tokens,
                **GREEDY,
            )
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _probabilities(self, frames: list[Any], prompt: str) -> list[float]:
        """Of the letter for yes after the last prompt token, one forward pass."""
        text = self.turn(prompt) if self.turn else _turn(self.processor, prompt, image=True)
        inputs = self.processor(images=frames, text=[text] * len(frames), padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        mask = inputs["attention_mask"]
        # the last attended column, whichever side is padded
        last = torch.where(mask.bool(), torch.arange(mask.shape[1], device=mask.device), -1).amax(dim=1)
        places, column = last.unique(return_inverse=True)
        logits = self.model(**inputs, use_cache=False, logits_to_keep=places).logits  # (B, places, vocabulary)
        rows = logits[torch.arange(len(frames), device=logits.device), column.to(logits.device)]
        probabilities = rows.float().softmax(dim=-1)
        return (probabilities.amax(dim=-1) if self.yes is None else probabilities[:, self.yes]).tolist()


@contextlib.contextmanager
def unpruned(model: nn.Module) -> Iterator[None]:
    """In this block the model runs without the pruner that is attached to it, if one is."""
    session = session_of(model)
    with session.paused() if session else contextlib.nullcontext():
        yield


class _Recent(OrderedDict[Hashable, _T]):
    """Remembers the values asked for last."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def get_or_make(self, key: Hashable, make: Callable[[], _T]) -> _T:
        if key not in self:
            self[key] = make()
        self.move_to_end(key)
        if len(self) > self.size:
            self.popitem(last=False)
        return self[key]


def _turn(processor: Any, prompt: str, *, image: bool) -> str:
    """A user's turn with the prompt, ready to be answered; the bare prompt where there is no chat template."""
    if not getattr(processor, "chat_template", None):
        if image:
            raise ParameterError(
                f"{type(processor).__name__} has no chat template; give turn=..., which puts a prompt after an image "
                "marker"
            )
        return prompt
    content = [{"type": "image"}] * image + [{"type": "text", "text": prompt}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )


def _single_token(processor: Any, letter: str) -> int:
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = tokenizer.encode(letter, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ParameterError(
            f"{type(tokenizer).__name__} has no single token for the answer {letter!r} (ids {ids}); give prompts "
            "with another"
        )
    return ids[0]


def _digest(frames: list[Any]) -> bytes:
    """Tells videos apart by their pixels."""
    digest = hashlib.blake2b(digest_size=16)
    for frame in frames:
        pixels = frame.cpu().numpy() if isinstance(frame, Tensor) else np.asarray(frame)
        digest.update(f"{pixels.shape}{pixels.dtype}".encode())
        digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()
