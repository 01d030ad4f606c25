"""The model behind the app: one instance for all users, one call at a time."""

from __future__ import annotations

import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import BatchFeature

import foveate
from foveate.adapters import FrameScorer, Session, Trace, adapter_for
from foveate.demo.media import Clip, Media, key
from foveate.errors import FoveateError, ParameterError
from foveate.eval_suites import suites
from foveate.eval_suites.running.models import EMBEDDED, Loaded
from foveate.eval_suites.running.runner import parse_methods
from foveate.pruners import PRUNERS, AtPixels, BeforeLayer, Pruner, RandomLike, create

MAX_QUESTION, MAX_NAME, MAX_MORE = 500, 80, 200  # characters
_REMEMBERED = 32  # unpruned answers

AROUND = {"pospad": "pospad:", "random@": "random@"}
"""Methods that need another one, and how their names begin."""


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: the answer.
        seconds: of ``generate``, and of scoring the frames where the method reads such scores.
        tokens: visual tokens that each decoder layer saw.
        trace: what the method did, on the CPU; None for the unpruned model.
        scoring: seconds that the frames' scores took.
    """

    text: str
    seconds: float
    tokens: list[int] = field(repr=False)
    trace: Trace | None = None
    scoring: float = 0.0

    @property
    def mean_tokens(self) -> float:
        """Visual tokens per decoder layer, on average."""
        return sum(self.tokens) / len(self.tokens)


class Engine:
    """Answers questions with and without a method attached.

    A method sits on the model itself, so calls are serialised: whoever asks meanwhile waits, and never meets another
    user's method.

    Attributes:
        name: the model's name.
        methods: names of the methods that run on it at their defaults.
        inner: for each of ``AROUND``, the methods that can be inside; only what has any is there.
        refused: name -> why the model cannot serve the method.
        positions: policy for tokens' positions that suits the model.
        takes_video: whether it answers questions about clips.

    Raises:
        FoveateError: no method runs on the model.
    """

    def __init__(self, loaded: Loaded, max_new_tokens: int = 32) -> None:
        self.model, self.processor, self.name = loaded.model, loaded.processor, loaded.name
        self.max_new_tokens = max_new_tokens
        self.adapter = adapter_for(self.model)
        self.takes_video = any(modality.kind == "video" for modality in self.adapter.modalities)
        self.positions = "keep" if loaded.name in EMBEDDED else "auto"  # embedded models never met closed gaps
        self._lock = threading.Lock()
        self._warm: set[str] = set()
        self._unpruned: OrderedDict[Any, Answer] = OrderedDict()
        self.methods, self.refused = [], {}
        for name in sorted(PRUNERS):
            if why := self._refusal(name):
                self.refused[name] = why
            else:
                self.methods.append(name)
        if not self.methods:
            raise FoveateError(f"no method runs on {self.name}: {self.refused}")
        runs = [n for n in self.methods if n not in AROUND and n != "random"]
        self.inner = {
            "pospad": [n for n in ["random", *runs] if not self._refusal(f"pospad:{n}")],
            "random@": [n for n in runs if self._acts_inside(n)],
        }
        self.inner = {name: inside for name, inside in self.inner.items() if inside}

    def _refusal(self, name: str) -> str:
        """Why the model cannot serve a method; empty if it can."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody has asked for it yet
            try:
                foveate.attach(self.model, name).detach()
            except FoveateError as error:
                return str(error)
        return ""

    def _acts_inside(self, name: str) -> bool:
        """Whether the method drops tokens before a decoder layer: elsewhere its control is ``random``."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return any(isinstance(stage, BeforeLayer) for stage in create(name).stages(self.adapter.info))

    # ------------------------------------------------------------------------------------------------------- methods

    def method(self, name: str, keep: int | float | None, more: str = "") -> Pruner:
        """A method with its budget and further parameters, written as in Python: ``"layer=2, strategy='row'"``.

        Names may compose, as for :func:`foveate.pruners.create`.

        Raises:
            FoveateError: unknown or unusable parameters.
        """
        if len(name) > MAX_NAME or len(more) > MAX_MORE:
            raise ParameterError(
                f"a method's name may have {MAX_NAME} characters and its parameters {MAX_MORE}; these have {len(name)} "
                f"and {len(more)}"
            )
        parsed = parse_methods(f"{name}({more})")
        if len(parsed) != 1 or isinstance(parsed[0], str):
            raise ParameterError(f"{name!r} is not one method; choose one of the list")
        ((name, params),) = parsed
        budget = self.budget_parameter(name)
        if keep is not None and budget is not None and budget not in params:
            params[budget] = keep
        return create(name, **params)

    @staticmethod
    def budget_parameter(name: str) -> str | None:
        """Which of the method's parameters is its budget, None if it has none."""
        pruner = create(name)
        pruner = pruner.pruner if isinstance(pruner, RandomLike) else pruner
        return pruner.budget_parameter if hasattr(pruner, pruner.budget_parameter) else None

    def prepares(self, pruner: Pruner) -> bool:
        """Whether the method makes the picture smaller before the processor sees it, and not in the model."""
        inside = any(isinstance(stage, AtPixels) for stage in pruner.stages(self.adapter.info))
        return not inside and type(pruner).prepare is not Pruner.prepare

    def reads_frame_scores(self, pruner: Pruner, media: Media) -> bool:
        """Whether the method wants to know how much each frame helps to answer the question."""
        return isinstance(media, Clip) and any(stage.reads_frame_scores for stage in pruner.stages(self.adapter.info))

    # ------------------------------------------------------------------------------------------------------- answers

    def prompt(self, question: str, video: bool = False) -> str:
        """The full text for the processor."""
        if not getattr(self.processor, "chat_template", None):
            marker = self.processor.video_token if video else self.processor.image_token
            return f"USER: {marker}\n{question} ASSISTANT:"
        content = [{"type": "video" if video else "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    @property
    def tells_time(self) -> bool:
        """Whether the model is told when a clip's frames were taken; the embedded ones have learnt a single rate."""
        return self.name not in EMBEDDED

    def scorer(self) -> FrameScorer:
        """The model itself, unpruned, which remembers nothing: every answer pays for its scores."""
        prompts = suites.find("clips").frame_prompts if self.name in EMBEDDED else None
        turn = None if getattr(self.processor, "chat_template", None) else self.prompt
        return FrameScorer(self.model, self.processor, prompts=prompts, turn=turn, decouple=prompts is None)

    @torch.no_grad()
    def warm_up(self, media: Media) -> None:
        """Spend the first call, which is slower than all others, on a single token."""
        with self._lock:
            self.model.generate(**self._inputs(media, "?").to(self.model.device, self.model.dtype), max_new_tokens=1)

    def unpruned(self, media: Media, question: str) -> Answer:
        """The bare model's answer; asked again, it is remembered."""
        known = (key(media), question)
        with self._lock:
            if known not in self._unpruned:
                self._unpruned[known] = self._ask(media, question)
                if len(self._unpruned) > _REMEMBERED:
                    self._unpruned.popitem(last=False)
            return self._unpruned[known]

    def pruned(self, media: Media, question: str, pruner: Pruner, positions: str = "auto") -> Answer:
        """The answer with a method attached, and the trace of what it did."""
        with self._lock:
            if self.prepares(pruner):
                media = _prepared(pruner, media)
            with foveate.attach(self.model, pruner, positions=positions) as session:
                for _ in range(1 if pruner.name in self._warm else 2):  # the first call is slower than all others
                    answer = self._ask(media, question, session)
            self._warm.add(pruner.name)
            return answer

    @torch.no_grad()
    def _ask(self, media: Media, question: str, session: Session | None = None) -> Answer:
        question = question.strip()
        if not question:
            raise ParameterError("the question is empty; ask something about the picture")
        if len(question) > MAX_QUESTION:
            raise ParameterError(f"the question has {len(question)} characters; ask in at most {MAX_QUESTION}")
        inputs = self._inputs(media, question).to(self.model.device, self.model.dtype)
        began = time.perf_counter()
        scored = began
        if session is not None:
            session.sample_ids = [0]
            if self.reads_frame_scores(session.pruner, media):
                session.frame_scores = [self.scorer().score(media.frames, question)]
                scored = time.perf_counter()
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        text = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        seconds = time.perf_counter() - began
        if session is None:
            markers = torch.tensor([modality.token_id for modality in self.adapter.modalities])
            visual = int(torch.isin(inputs["input_ids"].cpu(), markers).sum())
            return Answer(text, seconds, [visual] * self.adapter.info.decoder_layers)
        return Answer(text, seconds, session.trace.tokens_per_layer, session.trace.cpu(), scored - began)

    def _inputs(self, media: Media, question: str) -> BatchFeature:
        if not isinstance(media, Clip):
            return self.processor(images=media, text=self.prompt(question), return_tensors="pt")
        if not self.takes_video:
            raise ParameterError(f"{self.name} takes pictures and no video; choose another model, or a picture")
        told = {"video_metadata": [media.metadata]} if self.tells_time else {}
        text = [self.prompt(question, video=True)]
        return self.processor(videos=[media.array], text=text, do_sample_frames=False, **told, return_tensors="pt")


def _prepared(pruner: Pruner, media: Media) -> Media:
    if isinstance(media, Clip):
        return Clip(tuple(map(pruner.prepare, media.frames)), media.fps)
    return pruner.prepare(media)


class Engines:
    """Engines by model, each loaded when it is first asked for.

    Attributes:
        names: the models that there are to choose from.
    """

    def __init__(self, names: Sequence[str], make: Callable[[str], Engine]) -> None:
        self.names = tuple(names)
        self._make, self._made = make, {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Engine:
        """The engine of a model.

        Raises:
            ParameterError: it is not one of ``names``. FoveateError: it cannot be loaded.
        """
        if name not in self.names:
            raise ParameterError(f"no model {name!r} here; choose one of the list")
        with self._lock:
            if name not in self._made:
                self._made[name] = self._make(name)
            return self._made[name]
