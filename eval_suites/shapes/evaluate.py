"""Held-out accuracy of a shapes model, whole, on blank pictures and with visual tokens dropped at random.

    python -m foveate.eval_suites.shapes.evaluate --limit 2000 --out evaluation.json

Answers are greedy, from the processor's own output and `model.generate`. Random dropping is the floor that a pruner has
to beat: the kept positions are drawn uniformly per question, and the language model sees the shorter sequence with
positions counted on without gaps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from . import MODEL_PATH, TASKS, Sample, prompt, samples, score

KEEPS = (1.0, 0.5, 0.25, 0.11, 0.05)


def blank(image: Image.Image) -> Image.Image:
    """A picture of one colour, the mean of `image`."""
    return Image.new("RGB", image.size, image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))


def keep_random(is_image: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """Mask (B, N) of the sequence with `round(keep * image tokens)` random image tokens a row; text always stays."""
    noise = torch.rand(is_image.shape, generator=generator).masked_fill(~is_image, -1)
    kept = max(1, round(keep * int(is_image[0].sum())))
    threshold = noise.topk(kept, dim=1).values[:, -1:]
    return (noise >= threshold) | ~is_image


@torch.no_grad()
def answers(
    model: LlavaForConditionalGeneration, processor: AutoProcessor, batch: list[Sample], keep: float, seed: int
) -> list[str]:
    """Greedy answers to a batch of questions with a share `keep` of the visual tokens."""
    inputs = processor(
        images=[sample.image for sample in batch],
        text=[prompt(sample.question) for sample in batch],
        padding=True,
        return_tensors="pt",
    )
    if keep < 1:
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        is_image = ids == model.config.image_token_id
        patches = torch.cat(list(model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output))
        embeds = model.get_input_embeddings()(ids).masked_scatter(is_image[..., None], patches)
        mask = keep_random(is_image, keep, torch.Generator().manual_seed(seed))
        rows = len(batch)
        inputs = {
            "inputs_embeds": embeds[mask].view(rows, -1, embeds.shape[-1]),
            "attention_mask": attention[mask].view(rows, -1),
        }
        written = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    else:
        written = model.generate(**inputs, do_sample=False, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(written, skip_special_tokens=True)


def accuracy(
    model: LlavaForConditionalGeneration,
    processor: AutoProcessor,
    questions: Iterator[Sample],
    keep: float = 1.0,
    blanked: bool = False,
    batch_size: int = 50,
) -> dict[str, float]:
    """Accuracy per task and overall."""
    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    number = 0
    while batch := list(islice(questions, batch_size)):
        if blanked:
            batch = [Sample(s.id, s.task, blank(s.image), s.question, s.answer) for s in batch]
        for sample, said in zip(batch, answers(model, processor, batch, keep, seed=number)):
            right[sample.task].append(score(sample, said))
        number += 1
    everything = [hit for hits in right.values() for hit in hits]
    return {task: sum(hits) / max(1, len(hits)) for task, hits in {**right, "overall": everything}.items()}


def main() -> None:
    """Print one line a setting and, with --out, write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_PATH)
    parser.add_argument("--limit", type=int, default=2000, help="held-out questions")
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    table = {}
    for name, keep, blanked in [(f"keep {k:g}", k, False) for k in options.keep] + [("blank", 1.0, True)]:
        table[name] = accuracy(model, processor, samples(options.limit), keep, blanked)
        print(name, {task: round(value, 3) for task, value in table[name].items()}, flush=True)
    if options.out:
        options.out.write_text(json.dumps({"questions": options.limit, "accuracy": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
