"""The `image-text-to-text` pipeline runs on an attached model, on the shipped weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import foveate
from foveate.eval_suites.suites import shapes


@pytest.fixture(scope="module")
def chat() -> object:
    model = AutoModelForImageTextToText.from_pretrained(shapes.MODEL_PATH, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(shapes.MODEL_PATH)
    return pipeline("image-text-to-text", model=model, processor=processor)


def messages(sample: shapes.Sample) -> list[dict[str, object]]:
    content = [{"type": "image", "image": sample.image}, {"type": "text", "text": sample.question}]
    return [{"role": "user", "content": content}]


def test_the_pipeline_answers_and_is_pruned(chat) -> None:
    samples = list(shapes.samples(12))
    asked = [messages(sample) for sample in samples]
    plain = [out[0]["generated_text"][-1]["content"] for out in chat(text=asked, max_new_tokens=6)]
    with foveate.attach(chat.model, "hiprune", keep=72) as session:
        pruned = [out[0]["generated_text"][-1]["content"] for out in chat(text=asked, max_new_tokens=6)]
        assert session.trace.tokens_per_layer == [72] * session.trace.decoder_layers
    again = [out[0]["generated_text"][-1]["content"] for out in chat(text=asked, max_new_tokens=6)]
    assert again == plain
    right = sum(shapes.score(sample, text) for sample, text in zip(samples, plain))
    assert right >= 8  # of 12, for the trained model
    assert sum(shapes.score(sample, text) for sample, text in zip(samples, pruned)) >= 4
