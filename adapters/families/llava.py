"""LLaVA-1.5: one fixed-size picture per placeholder run, CLIP or SigLIP tower, per-token projector."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor

from foveate.adapters import compat
from foveate.adapters.families.base import Adapter, Modality
from foveate.adapters.taps import SplitProjectionTap, Values
from foveate.adapters.towers.transformers import HFTower
from foveate.errors import UnsupportedModelError
from foveate.pruners.core import Layout, ModelInfo, Signal

TOWERS = ("CLIPVisionModel", "SiglipVisionModel")


class LlavaAdapter(Adapter):
    """``LlavaForConditionalGeneration`` with a CLIP or SigLIP tower."""

    family = "llava"
    classes: ClassVar = ("LlavaForConditionalGeneration", "LlavaModel")
    centre_crop = True

    def describe(self) -> ModelInfo:
        config, self.tower, self.projector = (
            self.inner.config,
            self.inner.vision_tower,
            self.inner.multi_modal_projector,
        )
        self.modalities = (Modality("image", compat.IMAGE_ENCODER, "pixel_values", config.image_token_id),)
        state = config.vision_feature_layer
        self.project = self.projector if isinstance(state, int) else None
        name = type(self.tower).__name__
        if name not in TOWERS:
            raise UnsupportedModelError(
                f"vision tower {name} of {type(self.model).__name__} is not one of {', '.join(TOWERS)}"
            )
        info = self.of_tower(config.vision_config, state if isinstance(state, int) else state[-1])  # the deepest speaks
        if info.class_token != (config.vision_feature_select_strategy == "default"):
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} with {name} "
                "makes the class token a visual token (or drops a patch); this layout is not supported"
            )
        return info

    def of_tower(self, config: Any, state: int) -> ModelInfo:
        """What the tower says, whose hidden state number ``state`` is used; notes its blocks, prefix and patches per
        side.
        """
        encoder = getattr(self.tower, "vision_model", self.tower)
        self.encoder, self.blocks = encoder, encoder.encoder.layers
        self.side = config.image_size // config.patch_size
        has_class = hasattr(encoder.embeddings, "class_embedding")
        if not has_class:  # SigLIP, whose processor does not crop either
            self.pixel_mean = self.pixel_std = (0.5, 0.5, 0.5)
        self.centre_crop = has_class and type(self).centre_crop
        blocks = len(self.blocks)
        return ModelInfo(
            family=self.family,
            tower=type(self.tower).__name__,
            encoder_layers=blocks,
            feature_layer=blocks + state if state < 0 else state - 1,
            class_token=has_class,
            decoder_layers=len(self.text_model.layers),
            patch_size=config.patch_size,
        )

    def tap(self, signals: Iterable[Signal], values: Callable[[], Values | None]) -> SplitProjectionTap:
        return SplitProjectionTap(self.blocks, signals, values, prefix=self.info.prefix_tokens)

    def block_tower(self) -> HFTower:
        if not isinstance(self.inner.config.vision_feature_layer, int):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} joins the features of blocks {self.inner.config.vision_feature_layer}, "
                "which "
                "hold different numbers of tokens once they merge"
            )
        return HFTower(self.tower, self.encoder)

    def layouts(self, kind: str, call: dict[str, Any], output: Any) -> list[Layout]:
        return [Layout.grid(self.side, self.side)] * len(getattr(output, compat.FEATURES))

    def patch_pixels(self, pixels: Tensor, layouts: list[Layout], kind: str, call: dict[str, Any]) -> list[Tensor]:
        patch = self.info.patch_size
        views = pixels.flatten(0, -4)[..., : self.side * patch, : self.side * patch]  # (V, 3, H, W)
        cut = views.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (V, 3, rows, h, cols, w)
        flat = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (V, n, 3 h w)
        return [x.unflatten(1, (3, 1, patch, patch)) for x in self.arrange(kind, flat, layouts, call)]

    def arrange(self, kind: str, values: Tensor, layouts: list[Layout], call: dict[str, Any]) -> list[Tensor]:
        return list(values)
