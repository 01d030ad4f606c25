"""The weights of a CLIP of ``transformers`` in the models of open_clip and timm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from foveate.errors import UnsupportedModelError


def to_open_clip(clip: CLIPModel) -> nn.Module:
    """An open_clip ``CLIP`` with the same weights, in evaluation mode.

    Raises:
        UnsupportedModelError: the end token is not the last of the vocabulary, where open_clip looks for it.
    """
    from open_clip.model import CLIP

    vision, text = clip.config.vision_config, clip.config.text_config
    if text.eos_token_id != text.vocab_size - 1:
        raise UnsupportedModelError(
            "open_clip reads the caption at its highest token id, which must be the end token's"
        )
    tower = {
        "layers": vision.num_hidden_layers,
        "width": vision.hidden_size,
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        "patch_size": vision.patch_size,
        "image_size": vision.image_size,
    }
    words = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": text.intermediate_size / text.hidden_size,
    }
    model = CLIP(clip.config.projection_dim, tower, words, quick_gelu=vision.hidden_act == "quick_gelu")
    old = clip.state_dict()
    state = {
        "visual.class_embedding": old["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": old["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": old["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": old["visual_projection.weight"].T,
        "token_embedding.weight": old["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": old["text_model.embeddings.position_embedding.weight"],
        "text_projection": old["text_projection.weight"].T,
        "logit_scale": old["logit_scale"],
        **_renamed(old, "vision_model.pre_layrnorm", "visual.ln_pre"),
        **_renamed(old, "vision_model.post_layernorm", "visual.ln_post"),
        **_renamed(old, "text_model.final_layer_norm", "ln_final"),
    }
    for i in range(vision.num_hidden_layers):
        state |= _open_clip_block(old, f"vision_model.encoder.layers.{i}", f"visual.transformer.resblocks.{i}")
    for i in range(text.num_hidden_layers):
        state |= _open_clip_block(old, f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}")
    state |= {name: value for name, value in model.state_dict().items() if name == "attn_mask"}
    model.load_state_dict(state)
    return _like(model, clip)


def to_timm(clip: CLIPModel) -> nn.Module:
    """The image side as a timm ``VisionTransformer`` whose head is the projection, in evaluation mode."""
    from functools import partial

    from timm.models.vision_transformer import VisionTransformer

    vision = clip.config.vision_config
    model = VisionTransformer(
        img_size=vision.image_size,
        patch_size=vision.patch_size,
        embed_dim=vision.hidden_size,
        depth=vision.num_hidden_layers,
        num_heads=vision.num_attention_heads,
        mlp_ratio=vision.intermediate_size / vision.hidden_size,
        num_classes=clip.config.projection_dim,
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=vision.layer_norm_eps),
    )
    old = clip.vision_model.state_dict()
    positions = old["embeddings.position_embedding.weight"]
    state = {
        "cls_token": old["embeddings.class_embedding"][None, None],
        "pos_embed": positions[None],
        "patch_embed.proj.weight": old["embeddings.patch_embedding.weight"],
        "head.weight": clip.visual_projection.weight,
        "head.bias": torch.zeros(clip.config.projection_dim),
        **_renamed(old, "pre_layrnorm", "norm_pre"),
        **_renamed(old, "post_layernorm", "norm"),
    }
    for i in range(vision.num_hidden_layers):
        source, block = f"encoder.layers.{i}", f"blocks.{i}"
        state |= {
            **_renamed(old, f"{source}.layer_norm1", f"{block}.norm1"),
            **_renamed(old, f"{source}.layer_norm2", f"{block}.norm2"),
            **_renamed(old, f"{source}.self_attn.out_proj", f"{block}.attn.proj"),
            **_renamed(old, f"{source}.mlp.fc1", f"{block}.mlp.fc1"),
            **_renamed(old, f"{source}.mlp.fc2", f"{block}.mlp.fc2"),
            f"{block}.attn.qkv.weight": _joined(old, source, "weight"),
            f"{block}.attn.qkv.bias": _joined(old, source, "bias"),
        }
    model.load_state_dict(state)
    return _like(model, clip)


def _like(model: nn.Module, clip: CLIPModel) -> nn.Module:
    return model.to(clip.device, clip.dtype).eval()


def _renamed(old: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """Weight and bias of one module under another name."""
    return {f"{target}.{part}": old[f"{source}.{part}"] for part in ("weight", "bias")}


def _joined(old: dict[str, Tensor], layer: str, part: str) -> Tensor:
    return torch.cat([old[f"{layer}.self_attn.{name}_proj.{part}"] for name in "qkv"])


def _open_clip_block(old: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    return {
        **_renamed(old, f"{source}.layer_norm1", f"{target}.ln_1"),
        **_renamed(old, f"{source}.layer_norm2", f"{target}.ln_2"),
        **_renamed(old, f"{source}.self_attn.out_proj", f"{target}.attn.out_proj"),
        **_renamed(old, f"{source}.mlp.fc1", f"{target}.mlp.c_fc"),
        **_renamed(old, f"{source}.mlp.fc2", f"{target}.mlp.c_proj"),
        f"{target}.attn.in_proj_weight": _joined(old, source, "weight"),
        f"{target}.attn.in_proj_bias": _joined(old, source, "bias"),
    }
