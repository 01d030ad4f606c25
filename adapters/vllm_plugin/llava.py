"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision as vLLM serves them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava, llava_next, llava_onevision
from vllm.multimodal import MULTIMODAL_REGISTRY

from foveate.adapters.families.base import Adapter
from foveate.adapters.vllm_plugin.model import Pruning, blocks_of
from foveate.adapters.vllm_plugin.processor import Announcing
from foveate.adapters.vllm_plugin.towers import TowerTap
from foveate.errors import UnsupportedModelError
from foveate.pruners.core import Signal


class LlavaPruning(Pruning):
    """What the three have in common: a tower that sees batches of views, and a projector behind one of its blocks."""

    @contextlib.contextmanager
    def _loading(self, config: Any, adapter: Adapter, block: int) -> Iterator[None]:
        # vLLM leaves out the blocks behind the one that feeds the projector; methods may read those, too
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
        layer = None if self.foveate_adapter is None else self.foveate_adapter.adapter.info.feature_layer
        if layer is None or len(blocks_of(vision_tower)) == layer + 1:
            return super()._image_pixels_to_features(vision_tower, pixel_values)
        return vision_tower(  # there are blocks behind the one that feeds the projector
            pixel_values,
            select_layers=[layer + 1],
            feature_select_strategy=self.config.vision_feature_select_strategy,
        )

    def _tap(self, signals: Sequence[Signal], call: dict[str, Any]) -> TowerTap:
        return TowerTap(blocks_of(self.vision_tower), signals, prefix=self.foveate_adapter.adapter.info.prefix_tokens)

    @property
    def _project(self) -> Callable[[Tensor], Tensor] | None:
        if self.foveate_adapter.adapter.project is None:
            return None
        dtype = self.multi_modal_projector.linear_1.weight.dtype
        return lambda features: self.multi_modal_projector(features.to(dtype))


class AnyResPruning(LlavaPruning):
    """Pictures of fewer views than others in the call are filled up with empty ones."""

    def _arranged(self, values: Tensor, call: dict[str, Any]) -> Tensor:
        views = [len(pixels) for pixels in call["pixel_values"]]
        layouts = self.foveate_adapter.adapter.layouts("image", call, None)
        return torch.cat([part[: len(layout.views)] for part, layout in zip(values.split(views), layouts)])


class LlavaProcessor(Announcing, llava.LlavaMultiModalProcessor):
    pass


class LlavaNextProcessor(Announcing, llava_next.LlavaNextMultiModalProcessor):
    pass


class LlavaOnevisionProcessor(Announcing, llava_onevision.LlavaOnevisionMultiModalProcessor):
    pass


def _llava_processor(info: Any, dummy_inputs: Any) -> Any:
    """Pixtral shares the architecture's name; it is served unpruned."""
    if isinstance(info, llava.LlavaProcessingInfo):
        return LlavaProcessor(info, dummy_inputs)
    return llava._build_llava_or_pixtral_hf_processor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(
    _llava_processor, info=llava._build_llava_or_pixtral_hf_info, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class Llava(LlavaPruning, llava.LlavaForConditionalGeneration):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor, info=llava_next.LlavaNextProcessingInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class LlavaNext(AnyResPruning, llava_next.LlavaNextForConditionalGeneration):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionProcessor,
    info=llava_onevision.LlavaOnevisionProcessingInfo,
    dummy_inputs=llava_onevision.LlavaOnevisionDummyInputsBuilder,
)
class LlavaOnevision(AnyResPruning, llava_onevision.LlavaOnevisionForConditionalGeneration):
    pass
