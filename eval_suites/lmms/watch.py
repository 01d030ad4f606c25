"""A method on a model that somebody else calls, and a count of what the decoder sees of every prompt."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from foveate.adapters import Session, attach
from foveate.adapters.families.base import adapter_for
from foveate.errors import UnsupportedModelError
from foveate.eval_suites.running.meter import prefill_widths, seen_pruned, seen_unpruned
from foveate.pruners.core import Pruner

__all__ = ["Said", "Seen", "Watch"]


@dataclass(frozen=True)
class Seen:
    """What was counted of one prompt.

    Attributes:
        tokens: visual tokens that each decoder layer saw.
        cached: visual tokens that each layer caches.
        asked: visual tokens asked for.
        text_tokens: tokens of its text.
    """

    tokens: tuple[int, ...]
    cached: tuple[int, ...]
    asked: int | None
    text_tokens: int


@dataclass(frozen=True)
class Said:
    """What came of a document: the text as the model gave it and what was counted meanwhile, or why it failed."""

    text: str
    seen: Seen | None
    seconds: float | None
    error: str | None = None


class Watch:
    """``pruner`` on ``model`` (None: only counting) until :meth:`close`.

    Every prompt that goes through the model adds to :attr:`prompts`, in the order of the rows of its batch.

    Raises:
        UnsupportedModelError: the method cannot work on this model, or works before the processor, which is not
            ours here.
    """

    def __init__(self, model: torch.nn.Module, pruner: Pruner | None, positions: str = "auto") -> None:
        self.adapter, self.pruner = adapter_for(model), pruner
        self.prompts: list[Seen] = []
        if pruner is not None and not pruner.stages(self.adapter.info):
            raise UnsupportedModelError(
                f"{pruner.name} works on pictures before the processor of a {type(model).__name__}; within lmms-eval "
                "only methods inside the model can be used"
            )
        self.session: Session | None = None if pruner is None else attach(model, pruner, positions=positions)
        self._hooks = ExitStack()
        self._widths = self._hooks.enter_context(prefill_widths(self.adapter))
        self._hooks.callback(model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        self._hooks.callback(model.register_forward_hook(self._end, with_kwargs=True).remove)

    def close(self) -> None:
        """Leave the model as it was."""
        self._hooks.close()
        if self.session is not None:
            self.session.detach()
            self.session = None

    @property
    def positions(self) -> dict[str, str]:
        """What was done with positions, by hook point."""
        return dict(self.session.trace.positions) if self.session is not None and self.session.trace else {}

    def _begin(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._widths.clear()
        if self.session is not None and _is_prompt(kwargs):
            self.session.trace = None

    def _end(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not _is_prompt(kwargs):
            return
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(dim=1).tolist()
        whole = seen_unpruned(self.adapter, ids, [ids.shape[1]] * self.adapter.info.decoder_layers)
        asked: Sequence[int | None]
        if self.pruner is None:
            seen = cached = seen_unpruned(self.adapter, ids, self._widths)
            asked = [None] * len(ids)
        else:
            seen, cached, asked = seen_pruned(self.adapter, self.pruner, self.session.trace, ids, self._widths)
        self.prompts += [
            Seen(tuple(tokens), tuple(held), want, length - full[0])
            for tokens, held, want, length, full in zip(seen, cached, asked, lengths, whole)
        ]


def _is_prompt(kwargs: dict[str, Any]) -> bool:
    """A prompt, and not a step of decoding."""
    ids = kwargs.get("input_ids")
    return ids is not None and ids.shape[1] > 1
