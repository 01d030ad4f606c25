"""The untrained shapes-llava: its words, its processor, its architecture."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from foveate.eval_suites.suites.shapes import scenes

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
PATCH = 8
GRID = scenes.IMAGE_SIZE // PATCH
IMAGE_TOKENS = GRID * GRID
CELL_COUNT = 9  # of a scene
MEAN, STD = [0.4, 0.4, 0.4], [0.25, 0.25, 0.25]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass
class Sizes:
    """Sizes of the model; the defaults are those of the shipped weights.

    Attributes:
        width: hidden size of the tower; heads are 32 wide.
        depth: layers of the tower; the decoder reads the last but one.
        text_width: hidden size of the decoder; heads are 32 wide.
        text_depth: layers of the decoder.
    """

    width: int = 128
    depth: int = 5
    text_width: int = 160
    text_depth: int = 4


def vocabulary() -> list[str]:
    """Every token, special ones first."""
    text = "user assistant : ? , . what colour is the shape object how many objects are there where a does code say"
    text += " describe picture background first second yes no"
    words = [*text.split(), *scenes.COLOURS, *scenes.SHAPES, *scenes.ROWS, *scenes.COLUMNS]
    words += [str(n) for n in range(1, scenes.MAX_OBJECTS + 1)] + [letter.lower() for letter in scenes.ALPHABET]
    # a place is answered in one token: looking the object up again for the second word is what was never learnt
    places = [scenes.place(cell).replace(" ", "_") for cell in range(CELL_COUNT)]
    return [*SPECIAL, *dict.fromkeys(words), *places]


TOKENS = {word: index for index, word in enumerate(vocabulary())}


def encode(text: str) -> list[int]:
    """Token ids of plain text, as the saved tokenizer gives them but without its start token."""
    return [TOKENS[word] for word in re.findall(r"\w+|[^\w\s]+", text.lower())]


def build_processor() -> LlavaProcessor:
    """Word-level tokenizer and 96-pixel CLIP image processor (the one that needs no torchvision)."""
    tokenizer = Tokenizer(models.WordLevel(TOKENS, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", TOKENS["<s>"])]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **names, extra_special_tokens={"image_token": "<image>"}, padding_side="left"
    )
    side = {"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(size=side, crop_size=side, image_mean=MEAN, image_std=STD)
    return LlavaProcessor(
        image_processor,
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(sizes: Sizes) -> LlavaForConditionalGeneration:
    """An untrained model; the eager attention is the fastest in bfloat16 on a CPU at these lengths."""
    vision = CLIPVisionConfig(
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.width // 32,
        image_size=scenes.IMAGE_SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=sizes.text_width,
        intermediate_size=int(2.5 * sizes.text_width),
        num_hidden_layers=sizes.text_depth,
        num_attention_heads=sizes.text_width // 32,
        num_key_value_heads=sizes.text_width // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=TOKENS["<pad>"],
        bos_token_id=TOKENS["<s>"],
        eos_token_id=TOKENS["</s>"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=TOKENS["<image>"],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return LlavaForConditionalGeneration(config)
