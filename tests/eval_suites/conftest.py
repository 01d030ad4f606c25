"""A checkpoint folder with a tiny random LLaVA and a processor that knows the words of the shapes suite."""

from __future__ import annotations

import pathlib
import re

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from foveate.eval_suites import shapes
from tests.models import EOS, IMAGE, PAD, PATCH, SIDE, tiny


def words() -> dict[str, int]:
    """Token ids of the words of some questions and answers, apart from those of the special tokens."""
    texts = " ".join(f"{shapes.prompt(s.question)} {s.answer}" for s in shapes.samples(120)).replace("<image>", "")
    known = sorted(set(re.findall(r"\w+|[^\w\s]+", texts.lower())))
    assert len(known) < IMAGE - 3
    ids = {word: number for number, word in enumerate(known, start=3)}
    return ids | {"<pad>": PAD, "<s>": 1, "<unk>": 2, "<image>": IMAGE, "</s>": EOS}


def processor(**options: object) -> LlavaProcessor:
    tokenizer = Tokenizer(models.WordLevel(words(), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **names, extra_special_tokens={"image_token": "<image>"}, padding_side="right"
    )
    side = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessor(size=side, crop_size=side),
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        **options,
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """16 visual tokens, four decoder layers, float32."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    tiny("llava").save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder
