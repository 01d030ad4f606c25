"""Tiny random models and inputs (see :mod:`foveate.eval_suites.tiny`), and a processor for them."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from foveate.adapters import compat
from foveate.eval_suites.tiny import (
    EOS,
    FAMILIES,
    IDS,
    IMAGE,
    MROPE,
    PAD,
    PATCH,
    PINPOINTS,
    QWEN_IDS,
    QWEN_VISION,
    SIDE,
    TEXT,
    VIDEO,
    VIDEO_FAMILIES,
    VISION,
    VISION_END,
    VISION_START,
    VOCAB,
    PromptMedia,
    inputs,
    picture,
    single_view,
    tiny,
)

__all__ = [
    "EOS",
    "FAMILIES",
    "IDS",
    "IMAGE",
    "MROPE",
    "PAD",
    "PATCH",
    "PINPOINTS",
    "QWEN_IDS",
    "QWEN_VISION",
    "SIDE",
    "TEXT",
    "VIDEO",
    "VIDEO_FAMILIES",
    "VISION",
    "VISION_END",
    "VISION_START",
    "VOCAB",
    "PromptMedia",
    "cache_of",
    "cached",
    "inputs",
    "picture",
    "qwen_processor",
    "single_view",
    "tiny",
]

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n.,:;?!<>'\"[]"
CHAT = (
    "{% for message in messages %}user\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


def cache_of(output: Any) -> Any:
    """The KV cache of a model's output, whatever this transformers calls it."""
    return compat.returned_cache(output)


def cached(model: nn.Module, cache: Any) -> dict[str, Any]:
    """``cache`` as an argument of the model."""
    return compat.cache_argument(model.forward, cache)


def character_tokenizer(special: dict[str, int]) -> Any:
    """A tokenizer of one token per character, with ``special`` tokens: padding, beginning, unknown, then others."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = special | {c: 3 + i for i, c in enumerate(CHARACTERS)}
    vocabulary |= {f"<unused{i}>": i for i in set(range(VOCAB)) - set(vocabulary.values())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(special)[3:],
        padding_side="left",
    )


def qwen_processor(family: str = "qwen2_5_vl") -> Any:
    """A processor for the tiny model of a Qwen family: one token per character, patches of 8 pixels."""
    special = {"<pad>": PAD, "<bos>": 1, "<unk>": 2, "<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<eos>": EOS}
    special |= {"<|vision_start|>": VISION_START, "<|vision_end|>": VISION_END}
    fast = character_tokenizer(special)
    sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    film = {"size": {**pixels, "longest_edge": 64 * 64 * 16}, "cap_pixels_per_frame": False}
    if family == "qwen3_vl":
        video = transformers.Qwen3VLVideoProcessor(**sizes, **film)
        kind = transformers.Qwen3VLProcessor
    else:
        video = transformers.Qwen2VLVideoProcessor(**sizes, **film)
        kind = transformers.Qwen2_5_VLProcessor if family == "qwen2_5_vl" else transformers.Qwen2VLProcessor
    image = transformers.Qwen2VLImageProcessor(**sizes, size=pixels)
    return kind(image_processor=image, tokenizer=fast, video_processor=video, chat_template=CHAT)
