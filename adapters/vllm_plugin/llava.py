"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision as vLLM serves them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models import llava, llava_next, llava_onevision
from vllm.multimodal import MULTIMODAL_REGISTRY

from foveate.adapters.families.base import Adapter
from foveate.adapters.taps import Values
from foveate.adapters.vllm_plugin.model import PrunedModel
from foveate.adapters.vllm_plugin.processor import pruned
from foveate.adapters.vllm_plugin.towers import VllmTowerTap
from foveate.errors import UnsupportedModelError
from foveate.pruners.core import Signal


class PrunedLlava(PrunedModel):
    """What the three have in common: a tower that sees batches of views, and a projector after one of its blocks."""

    @contextlib.contextmanager
    def _building(self, config: Any, adapter: Adapter, block: int) -> Iterator[None]:
        # vLLM leaves out the blocks after the one that feeds the projector; methods may read those, too
        wanted = config.vision_feature_layer
        deeper = block > adapter.info.feature_layer
        if deeper and not isinstance(wanted, int):
            raise UnsupportedModelError(
                f"the method reads block {block} of the vision tower, which vLLM leaves out of a model that joins the "
                f"features of blocks {wanted}"
            )
        config.vision_feature_layer = block + 1 if deeper else wanted
        try:
            yield
        finally:
            config.vision_feature_layer = wanted

    def _image_pixels_to_features(self, vision_tower: Any, pixel_values: Tensor) -> Tensor:
        layer = None if self.foveate_adapter is None else self.foveate_adapter.info.feature_layer
        if layer is None or len(blocks_of(vision_tower)) == layer + 1:
            return super()._image_pixels_to_features(vision_tower, pixel_values)
        strategy = self.config.vision_feature_select_strategy  # and blocks come after the one that feeds the projector
        return vision_tower(pixel_values, select_layers=[layer + 1], feature_select_strategy=strategy)

    def _tap(self, signals: Sequence[Signal], values: Values, call: dict[str, Any]) -> VllmTowerTap:
        prefix = self.foveate_adapter.info.prefix_tokens
        return VllmTowerTap(blocks_of(self.vision_tower), signals, lambda: values, prefix=prefix)

    @property
    def _project(self) -> Callable[[Tensor], Tensor] | None:
        if self.foveate_adapter.project is None:
            return None
        dtype = self.multi_modal_projector.linear_1.weight.dtype
        return lambda features: self.multi_modal_projector(features.to(dtype))


class PrunedAnyRes(PrunedLlava):
    """Pictures of fewer views than others in the call are filled up with empty ones."""

    def _without_padding(self, values: Tensor, call: dict[str, Any]) -> Tensor:
        views = [len(pixels) for pixels in call["pixel_values"]]
        layouts = self.foveate_adapter.layouts("image", call, None)
        return torch.cat([part[: len(layout.views)] for part, layout in zip(values.split(views), layouts)])


def blocks_of(tower: Any) -> nn.ModuleList:
    """Blocks of a CLIP or SigLIP tower."""
    return getattr(tower, "vision_model", tower).encoder.layers


LlavaProcessor = pruned(llava.LlavaMultiModalProcessor)


def _llava_processor(info: Any, dummy_inputs: Any) -> Any:
    """Pixtral shares the architecture's name; it is served unpruned."""
    if isinstance(info, llava.LlavaProcessingInfo):
        return LlavaProcessor(info, dummy_inputs)
    return llava._build_llava_or_pixtral_hf_processor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(
    _llava_processor, info=llava._build_llava_or_pixtral_hf_info, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class Llava(PrunedLlava, llava.LlavaForConditionalGeneration):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    pruned(llava_next.LlavaNextMultiModalProcessor),
    info=llava_next.LlavaNextProcessingInfo,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class LlavaNext(PrunedAnyRes, llava_next.LlavaNextForConditionalGeneration):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    pruned(llava_onevision.LlavaOnevisionMultiModalProcessor),
    info=llava_onevision.LlavaOnevisionProcessingInfo,
    dummy_inputs=llava_onevision.LlavaOnevisionDummyInputsBuilder,
)
class LlavaOnevision(PrunedAnyRes, llava_onevision.LlavaOnevisionForConditionalGeneration):
    pass
