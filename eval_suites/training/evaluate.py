"""Held-out accuracy of an embedded model, whole, on blank pictures and with visual tokens dropped at random.

    python -m foveate.eval_suites.training.evaluate --model shapes-qwen --suite screens --out evaluation.json

Answers are greedy, from the processor's own output and `model.generate`. Random dropping is the floor that a pruner has
to beat: the kept tokens are drawn uniformly per question.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from foveate.adapters import attach
from foveate.eval_suites import suites
from foveate.eval_suites.running import models
from foveate.eval_suites.suites import Suite

KEEPS = (1.0, 0.5, 0.25, 0.11, 0.05)


def blank(sample: Any) -> Any:
    """The sample with a picture, or a video, of one colour: the mean of its own."""
    if hasattr(sample, "video"):
        video = sample.video
        tone = video.reshape(-1, video.shape[-1]).mean(0).round().astype(video.dtype)
        return dataclasses.replace(sample, video=np.broadcast_to(tone, video.shape).copy())
    tone = sample.image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    return dataclasses.replace(sample, image=Image.new("RGB", sample.image.size, tone))


@torch.no_grad()
def answers(model: Any, processor: Any, suite: Suite, batch: Sequence[Any]) -> list[str]:
    """Greedy answers to a batch of questions."""
    kind = "videos" if hasattr(batch[0], "video") else "images"
    media = {kind: [sample.video if kind == "videos" else sample.image for sample in batch]}
    texts = [suite.prompt(sample.question) for sample in batch]
    inputs = processor(text=texts, padding=True, return_tensors="pt", **media)
    written = model.generate(**inputs, do_sample=False, max_new_tokens=suite.max_new_tokens)
    return processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(
    model: Any,
    processor: Any,
    suite: Suite,
    questions: Iterator[Any],
    keep: float = 1.0,
    blanked: bool = False,
    positions: str = "keep",
    batch_size: int = 50,
) -> dict[str, float]:
    """Accuracy per task and overall.

    Args:
        keep: share of the visual tokens that stay, drawn at random; positions: theirs, as for :func:`foveate.attach`.
        blanked: hide the pictures.
    """
    right: dict[str, list[bool]] = {task: [] for task in suite.tasks}
    while batch := list(islice(questions, batch_size)):
        seed = sum(map(len, right.values()))  # another draw for every batch
        with attach(model, "random", keep=keep, seed=seed, positions=positions) if keep < 1 else nullcontext():
            said = answers(model, processor, suite, [blank(s) for s in batch] if blanked else batch)
        for sample, answer in zip(batch, said):
            right[sample.task].append(suite.score(sample, answer))
    everything = [hit for hits in right.values() for hit in hits]
    return {task: sum(hits) / max(1, len(hits)) for task, hits in {**right, "overall": everything}.items()}


def main() -> None:
    """Print one line a setting and, with --out, write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes-llava", help=f"one of {', '.join(models.EMBEDDED)}, or a folder")
    parser.add_argument("--suite", default="shapes", choices=list(suites.SUITES))
    parser.add_argument("--limit", type=int, default=2000, help="held-out questions")
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--positions", default="keep", choices=("keep", "compact"), help="of the tokens that stay")
    parser.add_argument("--out", type=Path, help="JSON; what it says of other suites stays")
    options = parser.parse_args()
    loaded, suite = models.load(options.model, "cpu", "float32"), suites.find(options.suite)
    table = {}
    for name, keep, blanked in [(f"keep {k:g}", k, False) for k in options.keep] + [("blank", 1.0, True)]:
        questions = suite.samples(options.limit, suite.seed)
        table[name] = accuracy(
            loaded.model, loaded.processor, suite, questions, keep, blanked, positions=options.positions
        )
        print(name, {task: round(value, 3) for task, value in table[name].items()}, flush=True)
    if options.out:
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        known[suite.name] = {
            "questions": options.limit,
            "positions": options.positions,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accuracy": table,
        }
        options.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
