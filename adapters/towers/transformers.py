"""Vision towers of transformers: CLIP, SigLIP, ViT and DINOv2 (with registers)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.adapters import compat
from foveate.adapters.towers.base import BlockMerger, OpenBlock, Tower, lineage
from foveate.errors import InputError, UnsupportedModelError
from foveate.pruners.core import InTower

# where the tower is, inside the models that hold one and read nothing but its first row, its pooler or its rows
_INSIDE = {
    "CLIPVisionModel": "",
    "CLIPVisionModelWithProjection": "vision_model",
    "CLIPModel": "vision_model",
    "SiglipVisionModel": "",
    "SiglipModel": "vision_model",
    "ViTModel": "",
    "ViTForImageClassification": "vit",
    "Dinov2Model": "",
    "Dinov2WithRegistersModel": "",
}
_AVERAGING = ("CLIPForImageClassification", "SiglipForImageClassification", "Dinov2ForImageClassification")
_BIASED = ("sdpa", "eager")  # attention implementations that take an additive mask


class _HFOpenBlock(OpenBlock):
    """Keys are heard at ``k_proj``, before heads are told apart."""

    attention: ClassVar[str] = "attention"

    def listen(self, tell: Callable[[Tensor, int], None]) -> Any:
        attention = getattr(self.block, self.attention)
        width = attention.head_dim
        return attention.k_proj.register_forward_hook(
            lambda module, args, keys: tell(keys.unflatten(-1, (-1, width)), 2)
        )

    def branch(self, x: Tensor, bias: Tensor | None, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        """The attention's output."""
        if attention_mask is not None:
            raise InputError("a vision tower whose tokens merge takes no attention mask")
        return getattr(self.block, self.attention)(x, attention_mask=bias, **kwargs)[0]


class ClipOpenBlock(_HFOpenBlock):
    """CLIP and SigLIP layers."""

    classes = compat.CLIP_BLOCKS
    attention = "self_attn"

    def attend(self, x: Tensor, bias: Tensor | None, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        return x + self.branch(self.block.layer_norm1(x), bias, attention_mask, kwargs)

    def feed(self, x: Tensor) -> Tensor:
        return x + self.block.mlp(self.block.layer_norm2(x))


class ViTOpenBlock(_HFOpenBlock):
    """ViT layers."""

    classes = compat.VIT_BLOCKS

    def attend(self, x: Tensor, bias: Tensor | None, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        block = self.block
        return block.dropout(self.branch(block.layernorm_before(x), bias, attention_mask, kwargs)) + x

    def feed(self, x: Tensor) -> Tensor:
        block = self.block
        return block.dropout(block.mlp(block.layernorm_after(x))) + x


class Dinov2OpenBlock(_HFOpenBlock):
    """DINOv2 layers, with LayerScale and drop path."""

    classes = compat.DINOV2_BLOCKS

    def attend(self, x: Tensor, bias: Tensor | None, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        block = self.block
        return block.drop_path(block.layer_scale1(self.branch(block.norm1(x), bias, attention_mask, kwargs))) + x

    def feed(self, x: Tensor) -> Tensor:
        block = self.block
        return block.drop_path(block.layer_scale2(block.mlp(block.norm2(x)))) + x


_OPEN_BLOCKS = {name: kind for kind in (ClipOpenBlock, ViTOpenBlock, Dinov2OpenBlock) for name in kind.classes}


class HFTower(Tower):
    """A tower of transformers, alone or inside CLIP and SigLIP models."""

    family: ClassVar[str] = "transformers"

    @classmethod
    def find(cls, model: nn.Module) -> HFTower | None:
        names = lineage(model, "transformers")
        if names & set(_AVERAGING):
            raise UnsupportedModelError(
                f"tokens cannot be merged in {type(model).__name__}: it averages the tower's tokens as if each stood "
                "for one "
                "patch; attach to its tower and pool with session.sizes or session.unmerge"
            )
        name = next((name for name in _INSIDE if name in names), None)
        if name is None:
            return None
        compat.check_version(type(model).__name__)
        return cls(model, getattr(model, _INSIDE[name]) if _INSIDE[name] else model)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        holder: Any = getattr(self.trunk, "encoder", self.trunk)
        return holder.layer if hasattr(holder, "layer") else holder.layers

    @property
    def prefix(self) -> int:
        embeddings = self.trunk.embeddings
        has_class = hasattr(embeddings, "cls_token") or hasattr(embeddings, "class_embedding")
        registers = getattr(embeddings, "register_tokens", None)
        return int(has_class) + (0 if registers is None else registers.shape[1])

    @property
    def checkpointing(self) -> bool:
        return self.trunk.training and any(map(compat.checkpoints, self.blocks))

    def open_block(self, block: nn.Module) -> OpenBlock:
        name = type(block).__name__
        if name not in _OPEN_BLOCKS:
            raise self.refuse(
                block, f"its attention and MLP cannot be told apart; known blocks: {', '.join(_OPEN_BLOCKS)}"
            )
        if not hasattr(getattr(block, _OPEN_BLOCKS[name].attention), "k_proj"):
            raise self.refuse(block, "its attention has no k_proj; this version of transformers is too old for it")
        return _OPEN_BLOCKS[name](block)

    def check(self, stages: Sequence[InTower]) -> None:
        how = compat.attention_kind(self.trunk.config)
        if how not in _BIASED and any(stage.proportional for stage in stages):
            raise UnsupportedModelError(
                f"attn_implementation={how!r} takes no log sizes as a mask; load {type(self.model).__name__} with "
                "'sdpa', or "
                "pass prop_attn=False"
            )

    def pooled(self, merger: BlockMerger) -> None:
        head = getattr(self.trunk, "head", None)  # SigLIP's attention pooling
        if head is not None:
            merger.weigh_attention(head.attention)
