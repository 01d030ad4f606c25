"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL as vLLM serves them: pictures are pruned, videos are not."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl, qwen2_vl, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform

from foveate.adapters.engine.decoder import Kept
from foveate.adapters.taps import Values
from foveate.adapters.vllm_plugin import mrope
from foveate.adapters.vllm_plugin.model import PrunedModel
from foveate.adapters.vllm_plugin.processor import FIELD, Reservation, pruned
from foveate.adapters.vllm_plugin.towers import VllmTowerTap
from foveate.errors import ParameterError
from foveate.pruners.core import Layout, Signal

_NEXT_TO_NOTHING = 1e-17  # 1 - this is 1: no video token goes


class PrunedQwen(PrunedModel):
    """A packed tower, positions of three axes, and embeddings that carry them to vLLM's hook for pruned positions."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.multimodal_config
        if self.foveate_adapter is None:
            return
        if config.is_multimodal_pruning_enabled():
            raise ParameterError(
                "foveate and vLLM's own video pruning cannot share a model: leave out --video-pruning-rate"
            )
        self.supports_multimodal_pruning = True
        _ask_for_positions(config)

    def _tap(self, signals: Sequence[Signal], values: Values, call: dict[str, Any]) -> VllmTowerTap:
        bounds = [0, *itertools.accumulate(call["image_grid_thw"].prod(dim=-1).tolist())]
        unit = self.visual.spatial_merge_size**2
        return VllmTowerTap(self.visual.blocks, signals, lambda: values, unit=unit, bounds=bounds)

    def _width(self, rows: Sequence[Tensor]) -> int:
        return self.config.text_config.hidden_size

    def _finished(self, rows: Tensor, kept: Kept | None, layout: Layout | None) -> Tensor:
        if kept is None:
            return mrope.without_positions(rows)
        return mrope.with_positions(rows, kept.index[0].to(rows.device), layout.views[0].cols)

    # ---------------------------------------------------------------------------------------------- what vLLM calls

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        positions_of = super().get_mrope_input_positions
        if self.foveate_adapter is None:
            return positions_of(input_tokens, mm_features)
        return mrope.shortened_positions(positions_of, input_tokens, mm_features, _whole_length)

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        rows, positions = multimodal_embeddings, mrope_positions
        if self.foveate_adapter is None:  # vLLM's own video pruning
            return super().recompute_mrope_positions(input_ids, rows, positions, num_computed_tokens)
        if len(rows):
            ids = torch.as_tensor(input_ids)
            positions = mrope.corrected(ids, self.config.image_token_id, rows, positions, num_computed_tokens)
        # pictures end with a token of their own, so the largest position is one of text
        delta = int(positions.max()) + 1 - len(input_ids)
        return [row[:, : -mrope.CHANNELS] for row in rows], positions, delta

    def get_encoder_cudagraph_config(self) -> Any:
        config = super().get_encoder_cudagraph_config()
        # graphs of the encoder go around embed_multimodal
        return config if self.foveate_adapter is None else dataclasses.replace(config, modalities=[])


def _whole_length(feature: Any) -> int:
    """Tokens of a picture or video before pruning."""
    if feature.modality != "image" or FIELD not in feature.data:
        return feature.mm_position.length
    return Reservation.unpacked(feature.data[FIELD].data).length


def _ask_for_positions(config: Any) -> None:
    """Make vLLM's runners call ``recompute_mrope_positions``.

    They do so for models that prune videos. Those of the first generation are told by the model itself, for the one for
    processors forgets to ask the configuration; the second generation's ask for a rate above 0.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    gather = GPUModelRunner._gather_mm_embeddings
    if not hasattr(gather, "foveate"):

        @functools.wraps(gather)
        def asking(runner: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(runner.get_model(), "foveate_adapter", None) is not None:
                runner.is_multimodal_pruning_enabled = _prefills_pictures(runner)
            return gather(runner, *args, **kwargs)

        asking.foveate = True
        GPUModelRunner._gather_mm_embeddings = asking
    if not current_platform.is_cpu():
        config.video_pruning_rate = _NEXT_TO_NOTHING


def _prefills_pictures(runner: Any) -> bool:
    """Whether a prompt with pictures or videos is still on its way in: steps that only decode need no corrections."""
    requests = (runner.requests[name] for name in runner.input_batch.req_ids)
    return any(r.mm_features and r.num_computed_tokens < r.num_prompt_tokens for r in requests)


@MULTIMODAL_REGISTRY.register_processor(
    pruned(qwen2_vl.Qwen2VLMultiModalProcessor),
    info=qwen2_vl.Qwen2VLProcessingInfo,
    dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder,
)
class Qwen2VL(PrunedQwen, qwen2_vl.Qwen2VLForConditionalGeneration):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    pruned(qwen2_5_vl.Qwen2_5_VLMultiModalProcessor),
    info=qwen2_5_vl.Qwen2_5_VLProcessingInfo,
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class Qwen25VL(PrunedQwen, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    pruned(qwen3_vl.Qwen3VLMultiModalProcessor),
    info=qwen3_vl.Qwen3VLProcessingInfo,
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class Qwen3VL(PrunedQwen, qwen3_vl.Qwen3VLForConditionalGeneration):
    pass
