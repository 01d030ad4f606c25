"""vLLM's front end: reserve as many places as each picture will take, before any encoder runs.

Everything a request can get wrong is found here, as a ``ValueError`` that vLLM's server answers with status 400. The
worker learns of a picture's settings through the field :data:`FIELD` beside its pixels.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement

import foveate
from foveate.adapters.families.base import Adapter
from foveate.adapters.vllm_plugin.serving import check_request, layouts_of, places_taken, servable, served, skeleton
from foveate.adapters.vllm_plugin.settings import Entry, identity, merged
from foveate.errors import FoveateError, InputError, ParameterError, UnsupportedModelError

FIELD = "foveate"


@dataclasses.dataclass(frozen=True)
class Reservation:
    """What the front end promises of one picture.

    Attributes:
        entry: its settings; None: unpruned.
        length: places of the unpruned picture.
        rows: places reserved for it.
    """

    entry: dict[str, Any] | None
    length: int
    rows: int

    def packed(self) -> Tensor:
        """As a field that travels beside the pixels, ``(bytes,)`` uint8."""
        return torch.tensor(list(json.dumps(dataclasses.asdict(self)).encode()), dtype=torch.uint8)

    @classmethod
    def unpacked(cls, field: Tensor) -> Reservation:
        """What :meth:`packed` made."""
        return cls(**json.loads(bytes(field.tolist())))


class PrunedProcessor:
    """First base of a subclass of a vLLM processor that replaces pictures by repetitions of one token."""

    foveate = True  # requests that ask for pruning are heard

    @property
    def _engine(self) -> Any:
        """The engine's own entry, None where it was started without one."""
        return getattr(self.info.ctx.model_config.hf_config, FIELD, None)

    @cached_property
    def _adapter(self) -> Adapter:
        return skeleton(self.info.ctx.model_config.hf_config)

    def _entry(self, kwargs: Mapping[str, Any]) -> Entry | None:
        """The settings that hold for a request with these ``mm_processor_kwargs``."""
        request = self.info.ctx.get_merged_mm_kwargs(kwargs).get(FIELD)
        if self._engine is None:
            if request is None:
                return None
            raise ParameterError(
                f"foveate={request!r}: this engine cannot prune; start it with --hf-overrides '{{\"foveate\": {{}}}}'"
            )
        entry = merged(self._engine, request)
        if entry is None:
            return None
        signals = check_request(self._adapter, self._engine, entry).signals
        if signals and self.info.ctx.get_mm_config().mm_encoder_tp_mode == "data":
            blind = [n for n in servable(self._adapter) if not served(self._adapter, {"pruner": n}).signals]
            raise UnsupportedModelError(
                f"{entry['pruner']} reads the vision tower, which the engine's processes share by pictures; start it "
                f"without --mm-encoder-tp-mode data, or use {', '.join(blind)}"
            )
        return entry

    # ------------------------------------------------------------------------------------------ what vLLM asks, by name

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().apply(*args, **kwargs)
        except FoveateError as error:  # vLLM answers a request that raised a ValueError, and goes on
            raise ValueError(f"foveate: {error}") from error

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Features of one picture differ with the settings: no cache, in this engine or shared, may confuse them."""
        hashes = super()._get_mm_hashes(inputs)
        entry = self._entry(inputs.hf_processor_mm_kwargs)
        if self._engine is None:
            return hashes
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        mark = identity(entry, foveate.__version__)
        return {
            modality: [MultiModalHasher.hash_kwargs(algorithm, foveate=mark, item=item) for item in items]
            for modality, items in hashes.items()
        }

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        made = super()._apply_hf_processor_main(mm_items=mm_items, hf_kwargs=_without_field(hf_kwargs))
        entry = self._entry(hf_kwargs)
        if self._engine is None:
            return made
        if "image_embeds" in made and entry is not None:
            raise InputError(
                "foveate cannot prune pictures that come as precomputed embeddings; send pictures, or switch pruning "
                'off for this request with mm_processor_kwargs={"foveate": false}'
            )
        if "pixel_values" in made:
            facts = {name: made[name] for name in ("image_sizes", "image_grid_thw") if name in made}
            layouts = layouts_of(self._adapter, facts, len(next(iter(facts.values()), made["pixel_values"])))
            taken = [places_taken(self._adapter, entry, layout) for layout in layouts]
            made[FIELD] = [Reservation(entry, one.length, rows).packed() for one, rows in zip(layouts, taken)]
        return made

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, FIELD: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        kwargs = {"hf_processor_mm_kwargs": _without_field(hf_processor_mm_kwargs), "out_mm_kwargs": out_mm_kwargs}
        updates = super()._get_prompt_updates(mm_items=mm_items, **kwargs)
        if self._engine is None:
            return updates
        return [_shortened(u, out_mm_kwargs) if u.modality == "image" else u for u in updates]


def pruned(processor: type) -> type:
    """A subclass of a vLLM processor whose pictures take as many places as their methods leave."""
    return type(f"Pruned{processor.__name__}", (PrunedProcessor, processor), {})


def _without_field(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != FIELD}


def _shortened(update: Any, out_mm_kwargs: Any) -> PromptReplacement:
    """The replacement of a picture by as many tokens as are reserved."""

    def replacement(number: int) -> list[int]:
        full = update.replacement(number)
        item = out_mm_kwargs["image"][number]
        if FIELD not in item:
            return full
        reserved = Reservation.unpacked(item[FIELD].data)
        if len(full) != reserved.length:
            raise InputError(
                f"vLLM gives picture {number} {len(full)} tokens and foveate {reserved.length}; the model's "
                "configuration lays out pictures as this version of vLLM does not"
            )
        return full[: reserved.rows]

    return PromptReplacement(modality="image", target=update.target, replacement=replacement)
