"""The model behind the app: one instance for all users, one call at a time."""

from __future__ import annotations

import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

import foveate
from foveate.adapters import Trace, adapter_for
from foveate.errors import FoveateError, ParameterError
from foveate.eval_suites.models import EMBEDDED, Loaded
from foveate.eval_suites.runner import parse_methods
from foveate.pruners import PRUNERS, Hook, Pruner, create

MAX_QUESTION = 500
_REMEMBERED = 32  # unpruned answers


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: the answer; seconds: of ``generate``; tokens: visual tokens that each decoder layer saw.
        trace: what the method did, on the CPU; None for the unpruned model.
    """

    text: str
    seconds: float
    tokens: list[int] = field(repr=False)
    trace: Trace | None = None

    @property
    def mean_tokens(self) -> float:
        """Visual tokens per decoder layer, on average."""
        return sum(self.tokens) / len(self.tokens)


class Engine:
    """Answers questions with and without a method attached.

    A method sits on the model itself, so calls are serialised: whoever asks meanwhile waits, and never meets another
    user's method.

    Attributes:
        name: the model's name; methods: names of the methods that run on it at their defaults.
        refused: name -> why the model cannot serve the method.
        positions: policy for tokens' positions that suits the model.
    """

    def __init__(self, loaded: Loaded, max_new_tokens: int = 32) -> None:
        self.model, self.processor, self.name = loaded.model, loaded.processor, loaded.name
        self.max_new_tokens = max_new_tokens
        self.positions = "keep" if loaded.name in EMBEDDED else "auto"  # embedded models never met closed gaps
        self._lock = threading.Lock()
        self._warm: set[str] = set()
        self._unpruned: OrderedDict[Any, Answer] = OrderedDict()
        self.methods, self.refused = [], {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody has asked for any of them yet
            for name in sorted(PRUNERS):
                try:
                    with foveate.attach(self.model, name):
                        self.methods.append(name)
                except FoveateError as error:
                    self.refused[name] = str(error)
        if not self.methods:
            raise FoveateError(f"no method runs on {self.name}: {self.refused}")

    def prompt(self, question: str) -> str:
        """The full text for the processor."""
        if not getattr(self.processor, "chat_template", None):
            return f"USER: <image>\n{question} ASSISTANT:"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def method(self, name: str, keep: int | float | None, more: str = "") -> Pruner:
        """A method with its budget and further parameters, written as in Python: ``"layer=2, strategy='row'"``.

        Raises:
            FoveateError: unknown or unusable parameters.
        """
        ((_, params),) = parse_methods(f"{name}({more})")
        if keep is not None and "keep" not in params and self.has_budget(name):
            params["keep"] = keep
        return create(name, **params)

    @staticmethod
    def has_budget(name: str) -> bool:
        """Whether the method has a parameter ``keep``."""
        return "keep" in getattr(PRUNERS[name], "__dataclass_fields__", ())

    def prepares(self, pruner: Pruner) -> bool:
        """Whether the method makes the picture smaller before the processor sees it (elsewhere that is done in the model)."""
        inside = any(stage.hook is Hook.PIXELS for stage in pruner.stages(adapter_for(self.model).info))
        return not inside and type(pruner).prepare is not Pruner.prepare

    def unpruned(self, image: Image.Image, question: str) -> Answer:
        """The bare model's answer; asked again, it is remembered."""
        key = (image.size, hash(image.tobytes()), question)
        with self._lock:
            if key not in self._unpruned:
                self._unpruned[key] = self._ask(image, question, lambda: None)
                if len(self._unpruned) > _REMEMBERED:
                    self._unpruned.popitem(last=False)
            return self._unpruned[key]

    def pruned(self, image: Image.Image, question: str, pruner: Pruner, positions: str = "auto") -> Answer:
        """The answer with a method attached, and the trace of what it did."""
        with self._lock:
            if self.prepares(pruner):
                image = pruner.prepare(image)
            with foveate.attach(self.model, pruner, positions=positions) as session:
                for _ in range(
                    1 if pruner.name in self._warm else 2
                ):  # a method's first call is slower than all others
                    session.sample_ids = [0]
                    answer = self._ask(image, question, lambda: session.trace)
            self._warm.add(pruner.name)
            return answer

    @torch.no_grad()
    def _ask(self, image: Image.Image, question: str, trace: Callable[[], Trace | None]) -> Answer:
        question = question.strip()
        if not question:
            raise ParameterError("the question is empty; ask something about the picture")
        if len(question) > MAX_QUESTION:
            raise ParameterError(f"the question has {len(question)} characters; ask in at most {MAX_QUESTION}")
        inputs = self.processor(images=image, text=self.prompt(question), return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        began = time.perf_counter()
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        text = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        seconds = time.perf_counter() - began
        happened = trace()
        if happened is None:
            depth = self.model.config.get_text_config().num_hidden_layers
            visual = int((inputs["input_ids"] == self.model.config.image_token_id).sum())
            return Answer(text.strip(), seconds, [visual] * depth)
        return Answer(text.strip(), seconds, happened.tokens_per_layer, happened.cpu())
