"""A checkpoint folder with a tiny random LLaVA and a processor that knows the words of the shapes suite."""

from __future__ import annotations

import pathlib
import re

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from foveate.eval_suites.suites import shapes
from tests.models import EOS, IMAGE, PAD, PATCH, SIDE, VIDEO, VISION_END, VISION_START, tiny

CHAT_TEMPLATE = (
    "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)


def words() -> dict[str, int]:
    """Token ids of the words of some questions and answers, apart from those of the special tokens."""
    texts = " ".join(f"{shapes.prompt(s.question)} {s.answer}" for s in shapes.samples(120)).replace("<image>", "")
    known = sorted(set(re.findall(r"\w+|[^\w\s]+", texts.lower())))
    assert len(known) < IMAGE - 3
    ids = {word: number for number, word in enumerate(known, start=3)}
    return ids | {"<pad>": PAD, "<s>": 1, "<unk>": 2, "</s>": EOS}


def tokenizer(padding_side: str = "right", **special: tuple[str, int]) -> PreTrainedTokenizerFast:
    """Whole words; ``special`` maps names of extra tokens to text and id."""
    fast = Tokenizer(models.WordLevel(words() | dict(special.values()), unk_token="<unk>"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    extra = {name: text for name, (text, _) in special.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, **names, extra_special_tokens=extra, padding_side=padding_side
    )


def llava_processor() -> LlavaProcessor:
    side = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer(image_token=("<image>", IMAGE)),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def qwen_processor() -> Qwen2VLProcessor:
    """Of Qwen2-VL: pictures keep their size, the prompt comes from the chat template."""
    sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessorPil(**sizes, size={"shortest_edge": 16 * 16, "longest_edge": 10**6}),
        tokenizer(
            "left",
            image_token=("<|image_pad|>", IMAGE),
            video_token=("<|video_pad|>", VIDEO),
            vision_start_token=("<|vision_start|>", VISION_START),
            vision_end_token=("<|vision_end|>", VISION_END),
        ),
        Qwen2VLVideoProcessor(**sizes),
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """16 visual tokens, four decoder layers, float32."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    tiny("llava").save_pretrained(folder)
    llava_processor().save_pretrained(folder)
    return folder
