"""LLaVA-1.5: one fixed-size picture per placeholder run, CLIP or SigLIP tower, per-token projector."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

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

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if not self.prefix:  # SigLIP
            self.pixel_mean = self.pixel_std = (0.5, 0.5, 0.5)

    @property
    def tower(self) -> nn.Module:
        return self.inner.vision_tower

    @property
    def encoder(self) -> nn.Module:
        """The part of the tower that holds ``embeddings`` and ``encoder.layers``."""
        return getattr(self.tower, "vision_model", self.tower)

    @property
    def vision_config(self) -> Any:
        """The tower's configuration."""
        return self.inner.config.vision_config

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return (Modality("image", compat.IMAGE_ENCODER, "pixel_values", self.inner.config.image_token_id),)

    @property
    def project(self) -> Callable[[Tensor], Tensor] | None:
        several = not isinstance(self.inner.config.vision_feature_layer, int)
        return None if several else self.inner.multi_modal_projector

    @property
    def centre_crop(self) -> bool:
        return self.prefix > 0  # CLIP's processor crops, SigLIP's resizes the whole picture

    @property
    def side(self) -> int:
        """Patches per side of a view."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def prefix(self) -> int:
        """Class tokens in front of the patches."""
        return int(hasattr(self.encoder.embeddings, "class_embedding"))

    def describe(self) -> ModelInfo:
        config, name = self.inner.config, type(self.tower).__name__
        if name not in TOWERS:
            raise UnsupportedModelError(
                f"vision tower {name} of {type(self.model).__name__} is not one of {', '.join(TOWERS)}"
            )
        if bool(self.prefix) != (config.vision_feature_select_strategy == "default"):
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} with {name} "
                "makes the class token a visual token (or drops a patch); this layout is not supported"
            )
        blocks = len(self.encoder.encoder.layers)
        state = config.vision_feature_layer
        state = state if isinstance(state, int) else state[-1]  # several layers are concatenated: the deepest speaks
        return ModelInfo(
            family=self.family,
            tower=name,
            encoder_layers=blocks,
            feature_layer=blocks + state if state < 0 else state - 1,
            class_token=self.prefix > 0,
            decoder_layers=len(self.text_model.layers),
            patch_size=self.vision_config.patch_size,
        )

    def tap(self, signals: Iterable[Signal], values: Callable[[], Values | None]) -> SplitProjectionTap:
        return SplitProjectionTap(self.encoder.encoder.layers, self.prefix, signals, values)

    @property
    def projector(self) -> nn.Module:
        return self.inner.multi_modal_projector

    def block_tower(self) -> HFTower:
        if not isinstance(self.inner.config.vision_feature_layer, int):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} joins the features of blocks {self.inner.config.vision_feature_layer}, which "
                "hold different numbers of tokens once they merge"
            )
        return HFTower(self.tower, self.encoder)

    def layouts(self, kind: str, call: dict[str, Any], output: Any) -> list[Layout]:
        return [Layout.grid(self.side, self.side)] * len(compat.features(output))

    def patch_pixels(self, pixels: Tensor, layouts: list[Layout], kind: str, call: dict[str, Any]) -> list[Tensor]:
        patch = self.vision_config.patch_size
        views = pixels.flatten(0, -4)[..., : self.side * patch, : self.side * patch]  # (V, 3, H, W)
        cut = views.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (V, 3, rows, h, cols, w)
        flat = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (V, n, 3 h w)
        return [x.unflatten(1, (3, 1, patch, patch)) for x in self.arrange(kind, flat, layouts, call)]

    def arrange(self, kind: str, values: Tensor, layouts: list[Layout], call: dict[str, Any]) -> list[Tensor]:
        return list(values)
