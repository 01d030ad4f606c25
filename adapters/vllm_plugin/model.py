"""vLLM's worker: encode pictures as vLLM does, then let only the chosen rows out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapters import compat
from foveate.adapters.families.base import Adapter, Encoded
from foveate.adapters.vllm_plugin.processor import FIELD, Announcement
from foveate.adapters.vllm_plugin.serving import Emission, Serving, check_start, deepest_block, everything, skeleton
from foveate.adapters.vllm_plugin.settings import canonical, parse
from foveate.adapters.vllm_plugin.towers import TowerTap
from foveate.errors import InputError, UnsupportedModelError
from foveate.pruners.core import Signal


class Pruning:
    """Goes in front of one of vLLM's models; families fill in where their tower is.

    Without a ``foveate`` entry in the model's configuration nothing changes.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        model_config = vllm_config.model_config
        engine = getattr(model_config.hf_config, FIELD, None)
        if engine is None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.foveate_adapter = None
            return
        check_start(model_config.architecture, model_config.hf_config, engine)
        if getattr(vllm_config.compilation_config, "compile_mm_encoder", False):
            raise UnsupportedModelError("foveate cannot read a compiled vision tower: leave compile_mm_encoder off")
        adapter = skeleton(model_config.hf_config)
        with self._loading(model_config.hf_config, adapter, deepest_block(adapter, engine)):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.foveate_adapter = _Hidden(adapter)

    # ------------------------------------------------------------------------------------- what a family must answer

    @contextlib.contextmanager
    def _loading(self, config: Any, adapter: Adapter, block: int) -> Iterator[None]:
        """While this holds, vLLM builds the vision tower up to ``block`` at least."""
        yield

    def _tap(self, signals: Sequence[Signal], call: dict[str, Any]) -> TowerTap:
        """A tap on the vision tower for one call."""
        raise NotImplementedError

    def _arranged(self, values: Tensor, call: dict[str, Any]) -> Tensor:
        """Tower values without what only fills up the call's tensors."""
        return values

    @property
    def _project(self) -> Callable[[Tensor], Tensor] | None:
        """Maps features of the tower to embeddings, where that is done token by token."""
        return None

    def _marked(self, rows: Tensor, emission: Emission, encoded: Encoded, number: int) -> Tensor:
        """Rows of a picture with what else the family's decoder has to know."""
        return rows

    def _unpruned(self, kind: str, rows: Sequence[Tensor]) -> Any:
        """Rows of videos."""
        return rows

    # ---------------------------------------------------------------------------------------------- what vLLM calls

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The rows of each picture that were announced, ``[(K, D)]``, in the order in which they enter the decoder.

        Raises:
            InputError: the method kept another number than was announced, or nothing was.
        """
        fields = kwargs.pop(FIELD, None)
        if self.foveate_adapter is None:
            return super().embed_multimodal(**kwargs)
        if fields is None and "pixel_values" in kwargs:
            raise InputError(
                "a picture came without foveate's count of its tokens: whatever prepared it had not loaded the plugin; send "
                "requests through vLLM's own front end in Python, with foveate installed there, too"
            )
        if fields is None:
            return self._unpruned(
                "video" if "pixel_values_videos" in kwargs else "image", super().embed_multimodal(**kwargs)
            )
        promises = [Announcement.unpacked(field) for field in fields]
        servings = [
            None if p.entry is None else Serving(self.foveate_adapter.adapter, parse(p.entry)) for p in promises
        ]
        # in one order in all processes, which a set would not have
        signals = dict.fromkeys(signal for serving in servings if serving is not None for signal in serving.signals)
        tap = self._tap(tuple(signals), kwargs)
        tap.open = True
        try:
            rows = super().embed_multimodal(**kwargs)
            encoded = self._encoded(rows, kwargs, tap.close())
        finally:
            tap.remove()
        emissions = self._chosen(servings, promises, encoded)
        made = []
        for number, (row, emission, promise) in enumerate(zip(rows, emissions, promises, strict=True)):
            entering = self._marked(emission.apply(row, encoded.features[number].shape[1]), emission, encoded, number)
            if len(entering) != promise.rows:  # vLLM would cut or misread it without a word
                raise InputError(
                    f"{promise.entry} announced {promise.rows} tokens for a picture of {promise.length}, and kept {len(entering)}"
                )
            made.append(entering)
        return made

    def _encoded(self, rows: Sequence[Tensor], kwargs: dict[str, Any], values: dict[Signal, Tensor]) -> Encoded:
        """Tokens and signals sorted by picture."""
        call = {"vision_feature_select_strategy": None, **kwargs}
        width = self._width(rows)
        values = {signal: self._arranged(value, kwargs) for signal, value in values.items()}
        features = compat.as_output([row[:, :width] for row in rows])
        return self.foveate_adapter.adapter.encoded("image", features, call, values)

    def _width(self, rows: Sequence[Tensor]) -> int:
        """Channels of an embedding; behind them may come DeepStack levels."""
        return rows[0].shape[1]

    def _chosen(
        self, servings: Sequence[Serving | None], promises: Sequence[Announcement], encoded: Encoded
    ) -> list[Emission]:
        """One emission per picture; pictures of one layout under one method are chosen as one batch."""
        groups: dict[tuple[str, Any], list[int]] = {}
        for number, (promise, layout) in enumerate(zip(promises, encoded.layouts)):
            groups.setdefault((canonical(promise.entry), layout), []).append(number)
        emissions: dict[int, Emission] = {}
        for (_, layout), numbers in groups.items():
            serving = servings[numbers[0]]
            if serving is None:
                emissions.update(dict.fromkeys(numbers, everything(layout)))
                continue
            signals = {signal: [encoded.signals[signal][n] for n in numbers] for signal in serving.signals}
            with torch.no_grad():
                chosen = serving.select(
                    [encoded.features[n] for n in numbers],
                    layout,
                    signals,
                    project=self._project,
                    embed=getattr(self.get_language_model().model, "embed_tokens", None),
                )
            emissions.update(zip(numbers, chosen))
        return [emissions[number] for number in range(len(promises))]


class _Hidden:
    """Holds an adapter so that its skeleton does not become part of the served model."""

    def __init__(self, adapter: Any) -> None:
        self.adapter = adapter


def blocks_of(tower: nn.Module) -> nn.ModuleList:
    """Blocks of a CLIP or SigLIP tower."""
    return getattr(tower, "vision_model", tower).encoder.layers
