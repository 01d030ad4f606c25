"""vLLM's worker: encode pictures as vLLM does, then let only the chosen rows out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.adapters import compat
from foveate.adapters.engine.decoder import Kept
from foveate.adapters.families.base import Adapter, Encoded
from foveate.adapters.taps import Values
from foveate.adapters.vllm_plugin.processor import FIELD, Reservation
from foveate.adapters.vllm_plugin.serving import ServedMethod, applied, deepest_block, served, skeleton, whole
from foveate.adapters.vllm_plugin.towers import VllmTowerTap
from foveate.errors import InputError, UnsupportedModelError
from foveate.pruners.core import Layout, Signal


class PrunedModel:
    """First base of a subclass of one of vLLM's models; families fill in where their tower is.

    Without a ``foveate`` entry in the model's configuration nothing changes.

    Attributes:
        foveate_adapter: of the family, without weights; None without an entry.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        model_config = vllm_config.model_config
        engine = getattr(model_config.hf_config, FIELD, None)
        if engine is None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.foveate_adapter: Adapter | None = None
            return
        if getattr(vllm_config.compilation_config, "compile_mm_encoder", False):
            raise UnsupportedModelError("foveate cannot read a compiled vision tower: leave compile_mm_encoder off")
        adapter = skeleton(model_config.hf_config)
        with self._building(model_config.hf_config, adapter, deepest_block(adapter, engine)):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.foveate_adapter = adapter

    # ------------------------------------------------------------------------------------- what a family must answer

    def _building(self, config: Any, adapter: Adapter, block: int) -> contextlib.AbstractContextManager[None]:
        """While this holds, vLLM builds the vision tower up to ``block`` at least."""
        return contextlib.nullcontext()

    def _tap(self, signals: Sequence[Signal], values: Values, call: dict[str, Any]) -> VllmTowerTap:
        """A tap on the vision tower for one call, which puts what it reads into ``values``."""
        raise NotImplementedError

    def _without_padding(self, values: Tensor, call: dict[str, Any]) -> Tensor:
        """Tower values without those of views that only fill up the call's tensors."""
        return values

    @property
    def _project(self) -> Callable[[Tensor], Tensor] | None:
        """Maps features of the tower to embeddings, where that is done token by token."""
        return None

    def _width(self, rows: Sequence[Tensor]) -> int:
        """Channels of an embedding; after them may come DeepStack levels."""
        return rows[0].shape[1]

    def _finished(self, rows: Tensor, kept: Kept | None, layout: Layout | None) -> Tensor:
        """Rows of a picture with what else the family's decoder has to know; None: rows of what is never pruned."""
        return rows

    # ---------------------------------------------------------------------------------------------- what vLLM calls

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The rows of each picture that were reserved, ``[(K, D)]``, in the order in which they enter the decoder.

        Raises:
            InputError: the method kept another number than was reserved, or nothing was.
        """
        fields = kwargs.pop(FIELD, None)
        if self.foveate_adapter is None:
            return super().embed_multimodal(**kwargs)
        if fields is None and "pixel_values" in kwargs:
            raise InputError(
                "a picture came without foveate's count of its tokens: whatever prepared it had not loaded the plugin; "
                "send requests through vLLM's own front end in Python, with foveate installed there, too"
            )
        if fields is None:  # videos, and embeddings that the user computed
            return [self._finished(row, None, None) for row in super().embed_multimodal(**kwargs)]
        reserved = [Reservation.unpacked(field) for field in fields]
        methods = [None if one.entry is None else served(self.foveate_adapter, one.entry) for one in reserved]
        # in one order in all processes, which a set would not have
        signals = dict.fromkeys(signal for method in methods if method is not None for signal in method.signals)
        values: Values = {}
        tap = self._tap(tuple(signals), values, kwargs)
        try:
            rows = super().embed_multimodal(**kwargs)
        finally:
            tap.remove()
        width = self._width(rows)
        embeds = [row[:, :width] for row in rows]
        encoded = self._encoded(embeds, kwargs, values)
        everything = zip(rows, self._kept(methods, encoded, embeds), encoded.layouts, reserved, strict=True)
        made = []
        for row, kept, layout, one in everything:
            entering = self._finished(applied(kept, row, width), kept, layout)
            if len(entering) != one.rows:  # vLLM would cut or misread it without a word
                raise InputError(
                    f"{one.entry} announced {one.rows} places for a picture of {one.length} and filled {len(entering)}"
                )
            made.append(entering)
        return made

    def _encoded(self, embeds: Sequence[Tensor], kwargs: dict[str, Any], values: Values) -> Any:
        """Tokens and signals sorted by picture."""
        call = {"vision_feature_select_strategy": None, **kwargs}
        values = {signal: self._without_padding(value, kwargs) for signal, value in values.items()}
        return self.foveate_adapter.encoded("image", compat.as_output(embeds), call, values)

    def _kept(self, methods: Sequence[ServedMethod | None], encoded: Encoded, embeds: Sequence[Tensor]) -> list[Kept]:
        """What enters of each picture; those of one layout under one method are chosen as one batch."""
        groups: dict[tuple[ServedMethod | None, Layout], list[int]] = {}
        for number, key in enumerate(zip(methods, encoded.layouts, strict=True)):
            groups.setdefault(key, []).append(number)
        kept: dict[int, Kept] = {}
        for (method, layout), numbers in groups.items():
            if method is None:
                kept |= dict.fromkeys(numbers, whole(layout))
                continue
            with torch.no_grad():
                chosen = method.select(
                    [embeds[n] for n in numbers],
                    layout,
                    {signal: [encoded.signals[signal][n] for n in numbers] for signal in method.signals},
                    project=self._project,
                    embed=getattr(self.get_language_model().model, "embed_tokens", None),
                )
            kept |= zip(numbers, chosen)
        return [kept[number] for number in range(len(methods))]
