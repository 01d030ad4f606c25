"""Tiny random models of every family and inputs for them, without downloads: for tests and ``foveate doctor``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foveate.adapters import compat

IMAGE, VIDEO, VISION_START, VISION_END, PAD, EOS = 90, 91, 92, 93, 0, 99
VOCAB = 100
SIDE, PATCH = 32, 8  # pixels per view, pixels per patch: 4 x 4 tokens a view

TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": PAD, "bos_token_id": 1,
    "eos_token_id": EOS,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip
QWEN_VISION = {"depth": 4, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
QWEN_IDS = {**IDS, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
PINPOINTS = [[32, 64], [64, 32], [64, 64], [32, 96]]
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
VIDEO_FAMILIES = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def tiny(family: str, attention: str = "sdpa", seed: int = 0) -> torch.nn.Module:
    """A random model of ``family`` in float32 and eval mode, with weights large enough that attention is not flat."""
    torch.manual_seed(seed)
    config = configuration(family)
    for part in (config, config.text_config, config.vision_config):
        compat.set_attention_kind(part, attention)
    model = getattr(transformers, CLASSES[family])(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0 if "norm" not in name else 1.0)
        model.lm_head.weight[IMAGE:] = 0  # greedy decoding stays clear of special tokens
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    assert compat.attention_kind(config.text_config) == attention
    return model


CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


def configuration(family: str) -> Any:
    """The configuration of a family's tiny model."""
    t = transformers
    if family in ("llava", "llava_next"):
        parts = {"vision_config": t.CLIPVisionConfig(**VISION), "text_config": t.LlamaConfig(**TEXT)}
        parts |= {"image_token_index": IMAGE, "image_token_id": IMAGE, "vision_feature_layer": -2}
        return (
            t.LlavaConfig(**parts) if family == "llava" else t.LlavaNextConfig(**parts, image_grid_pinpoints=PINPOINTS)
        )
    if family == "llava_onevision":
        return t.LlavaOnevisionConfig(
            vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False),
            text_config=t.Qwen2Config(**TEXT),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            **IDS,
            image_grid_pinpoints=PINPOINTS,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_4",
        )
    text = {**TEXT, "rope_parameters": MROPE}
    if family == "qwen2_vl":
        vision = {**QWEN_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        return t.Qwen2VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    vision = {**QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
    if family == "qwen2_5_vl":
        vision |= {"window_size": 32, "fullatt_block_indexes": [1, 3]}
        return t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
    text |= {"head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    return t.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)


@dataclass
class PromptMedia:
    """One image (or video) of a prompt: its pixels, its size facts and how many placeholders it takes."""

    kind: str
    pixels: Tensor
    facts: Tensor
    tokens: int


def picture(family: str, seed: int, shape: Any = None) -> PromptMedia:
    """A random image, of ``shape`` (rows, cols), or with three entries (frames, rows, cols of tokens) a
    random video.
    """
    g = torch.Generator().manual_seed(seed)
    kind = "video" if shape is not None and len(shape) == 3 else "image"
    if family == "llava":
        return PromptMedia("image", torch.randn(3, SIDE, SIDE, generator=g), torch.tensor([SIDE, SIDE]), 16)
    if family.startswith("llava") and kind == "video":
        frames = torch.randn(shape[0], 3, SIDE, SIDE, generator=g)
        return PromptMedia(kind, frames, torch.tensor([0]), shape[0] * 4 + 1)
    if family.startswith("llava"):
        height, width = shape or (60, 40)
        left, down, across = compat.anyres_canvas(height, width, PINPOINTS, SIDE, SIDE // PATCH)
        rows, cols = left.shape
        pixels = torch.randn(1 + down * across, 3, SIDE, SIDE, generator=g)
        return PromptMedia(kind, pixels, torch.tensor([height, width]), (SIDE // PATCH) ** 2 + rows * (cols + 1))
    size: Any = shape if kind == "video" else (1, *(shape or (4, 5)))
    frames, rows, cols = size
    grid = torch.tensor([frames, rows * 2, cols * 2])
    pixels = torch.randn(int(grid.prod()), 3 * 2 * PATCH * PATCH, generator=g)
    return PromptMedia(kind, pixels, grid, frames * rows * cols)


def inputs(
    family: str, samples: list[list[PromptMedia | int]], seed: int = 0, pad_left: bool = True
) -> dict[str, Tensor]:
    """Model inputs of a batch. A sample is a list of pictures and numbers of random text tokens.

    Several images in a LLaVA-OneVision sample are single views there, so build them with ``single_view``.
    """
    g = torch.Generator().manual_seed(seed)
    rows, pictures = [], []
    for sample in samples:
        ids: list[int] = []
        for part in sample:
            if isinstance(part, int):
                ids += torch.randint(3, 80, (part,), generator=g).tolist()
            else:
                pictures.append(part)
                ids += _placeholders(family, part)
        rows.append(ids)
    side = "left" if pad_left else "right"
    prompts, mask = (
        pad_sequence([torch.tensor(row) for row in padded], batch_first=True, padding_value=PAD, padding_side=side)
        for padded in (rows, [[1] * len(row) for row in rows])
    )
    made: dict[str, Any] = {"input_ids": prompts, "attention_mask": mask}
    images = [p for p in pictures if p.kind == "image"]
    videos = [p for p in pictures if p.kind == "video"]
    if images:
        made["pixel_values"] = _stack(family, [p.pixels for p in images])
        if family.startswith("qwen"):
            made["image_grid_thw"] = torch.stack([p.facts for p in images])
        elif family != "llava":
            made["image_sizes"] = torch.stack([p.facts for p in images])
        if family == "llava_onevision":
            made["batch_num_images"] = torch.tensor([sum(isinstance(p, PromptMedia) for p in s) for s in samples])
    if videos:
        made["pixel_values_videos"] = _stack(family, [p.pixels for p in videos], video=True)
        if family.startswith("qwen"):
            made["video_grid_thw"] = torch.stack([p.facts for p in videos])
    if family.startswith("qwen"):
        made["mm_token_type_ids"] = (prompts == IMAGE).long() + 2 * (prompts == VIDEO).long()
    return made


def single_view(seed: int) -> PromptMedia:
    """An image as LLaVA-OneVision sees it beside others: one view and a newline."""
    g = torch.Generator().manual_seed(seed)
    return PromptMedia("image", torch.randn(1, 3, SIDE, SIDE, generator=g), torch.tensor([SIDE, SIDE]), 17)


def _placeholders(family: str, part: PromptMedia) -> list[int]:
    token = IMAGE if part.kind == "image" else VIDEO
    if not family.startswith("qwen"):
        return [token] * part.tokens
    if family == "qwen3_vl" and part.kind == "video":  # every frame has its own markers
        frames = int(part.facts[0])
        return ([7, VISION_START] + [token] * (part.tokens // frames) + [VISION_END]) * frames
    return [VISION_START] + [token] * part.tokens + [VISION_END]


def _stack(family: str, pixels: list[Tensor], video: bool = False) -> Tensor:
    if family.startswith("qwen"):
        return torch.cat(pixels)
    if family == "llava" or video:
        return torch.stack(pixels)
    most = max(len(p) for p in pixels)
    return torch.stack([torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in pixels])
