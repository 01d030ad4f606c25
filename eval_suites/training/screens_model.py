"""The untrained shapes-qwen: its words, its processor, its architecture."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
)

from foveate.eval_suites.suites.clips import scenes as clips
from foveate.eval_suites.suites.screens import scenes as screens
from foveate.eval_suites.suites.shapes import scenes as shapes

PATCH, MERGE, WINDOW = 8, 2, 64
TOKEN = PATCH * MERGE  # pixels a side
COLUMNS, ROWS = screens.WIDTH // TOKEN, screens.HEIGHT // TOKEN
MEAN, STD = [0.5, 0.5, 0.5], [0.28, 0.28, 0.28]
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<unk>",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Dense labels of a visual token; the first of each means nothing.
KINDS = ("nothing", *screens.TASKS, "object", "sign")
COLOURS = ("nothing", *dict.fromkeys([*screens.COLOURS, *clips.COLOURS]))
_SHOWN = (*screens.ACTIONS, *screens.SUBJECTS, *screens.SIGNS, *shapes.SHAPES, *clips.ALPHABET)
WORDS = ("nothing", *dict.fromkeys(word.lower() for word in _SHOWN))

LETTERS = tuple(screens.GLYPHS)


@dataclass
class Sizes:
    """Sizes of the model; the defaults are those of the shipped weights. Heads are 32 wide.

    Attributes:
        width, hidden, depth: of the tower, whose odd layers see the whole picture and whose even ones a window.
        text_width, text_hidden, text_depth: of the decoder.
    """

    width: int = 128
    hidden: int = 352
    depth: int = 4
    text_width: int = 160
    text_hidden: int = 416
    text_depth: int = 4


def points() -> list[str]:
    """Answers of the screens suite: the middles of the visual tokens, row by row."""
    return [f"({x * TOKEN + TOKEN // 2}, {y * TOKEN + TOKEN // 2})" for y in range(ROWS) for x in range(COLUMNS)]


def vocabulary() -> list[str]:
    """Every token, special ones first, points last."""
    text = "system user assistant click the title of window button icon field . ? what colour is shape object letter on"
    text += " sign"
    words = [*text.split(), *COLOURS, *KINDS, *WORDS]
    return [*SPECIAL, *dict.fromkeys(words), *points()]


TOKENS = {word: index for index, word in enumerate(vocabulary())}


def encode(text: str) -> list[int]:
    """Token ids of plain text and special tokens, as the saved tokenizer gives them."""
    return [TOKENS[word] for word in re.findall(r"<\|\w+\|>|\(\d+, \d+\)|\w+|[^\w\s<]+", text.lower())]


def build_processor() -> Qwen2_5_VLProcessor:
    """Word-level tokenizer with Qwen's special tokens, and picture and video processors that resize nothing of ours."""
    tokenizer = Tokenizer(models.WordLevel(TOKENS, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(point, normalized=False) for point in points()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    size = {"shortest_edge": TOKEN * TOKEN, "longest_edge": 512 * 512}
    shared = {"size": size, "patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    shared |= {"image_mean": MEAN, "image_std": STD}
    pictures, videos = Qwen2VLImageProcessorPil(**shared), Qwen2VLVideoProcessor(cap_pixels_per_frame=False, **shared)
    return Qwen2_5_VLProcessor(pictures, fast, videos, chat_template=CHAT_TEMPLATE)


def build_model(sizes: Sizes) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained model."""
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": sizes.depth,
            "hidden_size": sizes.width,
            "intermediate_size": sizes.hidden,
            "num_heads": sizes.width // 32,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": WINDOW,
            "fullatt_block_indexes": list(range(1, sizes.depth, 2)),
            "out_hidden_size": sizes.text_width,
            "tokens_per_second": 12,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
        },
        text_config={
            "vocab_size": len(TOKENS),
            "hidden_size": sizes.text_width,
            "intermediate_size": sizes.text_hidden,
            "num_hidden_layers": sizes.text_depth,
            "num_attention_heads": sizes.text_width // 32,
            "num_key_value_heads": sizes.text_width // 32,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True,
            "bos_token_id": TOKENS["<|endoftext|>"],
            "eos_token_id": TOKENS["<|im_end|>"],
            "pad_token_id": TOKENS["<|endoftext|>"],
        },
        image_token_id=TOKENS["<|image_pad|>"],
        video_token_id=TOKENS["<|video_pad|>"],
        vision_start_token_id=TOKENS["<|vision_start|>"],
        vision_end_token_id=TOKENS["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)
