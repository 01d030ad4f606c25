"""Train FocusUI's patch scorer for shapes-qwen: stage 1 of the paper, the model itself stays as it is.

    python -m foveate.eval_suites.training.screens_scorer --model shapes-qwen --out patch_scorer.safetensors

Labels are the paper's: how much of a token the box of the element asked for covers, and the UI graph, fused. The scorer
reads visual tokens as they enter the decoder and the embeddings of the instruction's words. Pictures are drawn on line
and looked at once each; every step asks for one element of each.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from foveate.eval_suites.running import models
from foveate.eval_suites.suites.screens import scenes
from foveate.eval_suites.training.base import stream
from foveate.eval_suites.training.screens_lessons import hit
from foveate.eval_suites.training.screens_model import PATCH, TOKEN, TOKENS, encode
from foveate.eval_suites.training.shapes_qwen import see
from foveate.pruners.core.patch_scorer import PatchScorer, save_scorer, scorer_loss
from foveate.pruners.core.ui_graph import box_coverage, fused_label, image_blocks, ui_graph

WORDS = 9  # most words of an instruction


class ScorerPictures:
    """Screens with their visual tokens and UI graphs, and instructions on them drawn at will."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, number: int, seed: int, held_out: bool) -> None:
        rng = np.random.default_rng((stream(held_out), seed, 77))
        self.embedding = model.get_input_embeddings()
        self.screens = [scenes.draw_screen(rng, held_out) for _ in range(number)]
        tokens, graphs = [], []
        for screen in self.screens:
            pixels = torch.from_numpy(scenes.render(screen, rng))
            tokens.append(see(model.model.visual, pixels[None, None])[0])
            blocks, layout = image_blocks(pixels, TOKEN)
            graphs.append(ui_graph(blocks, layout).view(layout.views[0].grid))
        self.tokens, self.graphs = torch.stack(tokens), graphs

    @torch.no_grad()
    def ask(self, chosen: np.ndarray, rng: np.random.Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        """One instruction on each of the chosen screens.

        Returns:
            What the scorer reads: tokens (B, M, D), words (B, 9, D) and which of these are there (B, 9); labels (B, M);
            the tokens whose middle is in the element (B, M) bool.
        """
        ids, labels, inside = torch.zeros(len(chosen), WORDS, dtype=torch.long), [], []
        for row, number in zip(ids, chosen):
            elements = self.screens[number].elements
            element = elements[rng.integers(len(elements))]
            words = encode(scenes.instruction(element))
            row[: len(words)] = torch.tensor(words)
            coverage = box_coverage(element.box, scenes.HEIGHT, scenes.WIDTH, PATCH)
            labels.append(fused_label(coverage, self.graphs[number]))
            inside.append(torch.from_numpy(hit(element).reshape(-1)))
        there = ids != TOKENS["<|endoftext|>"]
        return (self.tokens[chosen], self.embedding(ids), there), torch.stack(labels), torch.stack(inside)


def recall(scores: Tensor, inside: Tensor, keep: float) -> float:
    """Share of the tokens in the element asked for that are among the best share `keep`."""
    best = scores.argsort(dim=1, descending=True, stable=True)[:, : round(keep * scores.shape[1])]
    return float(inside.gather(1, best).sum() / inside.sum())


def main() -> None:
    """Train, print and log, and write the scorer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes-qwen")
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file")
    parser.add_argument("--log", type=Path, help="JSON lines are added to it")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--pictures", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model = models.load(options.model, "cpu", "float32").model
    training, checking = (
        ScorerPictures(model, n, options.seed, held) for n, held in ((options.pictures, False), (256, True))
    )
    scorer = PatchScorer(model.config.text_config.hidden_size)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=options.lr)
    start, running = time.monotonic(), []
    for step in range(options.steps):
        rng = np.random.default_rng((stream(False), options.seed, 78, step))
        read, labels, _ = training.ask(rng.integers(options.pictures, size=options.batch), rng)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / 50, (options.steps - step) / (options.steps / 2))
        loss = scorer_loss(scorer(*read), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        running.append(float(loss.detach()))
        if (step + 1) % 100 == 0 or step + 1 == options.steps:
            scorer.eval()
            read, labels, inside = checking.ask(np.arange(256), np.random.default_rng(options.seed))
            with torch.no_grad():
                scores = scorer(*read)
            scorer.train()
            record = {"stage": "scorer", "step": step + 1, "minutes": round((time.monotonic() - start) / 60, 2)}
            record |= {"train_loss": float(np.mean(running)), "held_out_loss": float(scorer_loss(scores, labels))}
            record |= {f"held_out_recall_{keep:g}": recall(scores, inside, keep) for keep in (0.5, 0.25, 0.1)}
            line = json.dumps({name: round(v, 4) if isinstance(v, float) else v for name, v in record.items()})
            print(line, flush=True)
            if options.log:
                with options.log.open("a") as file:
                    file.write(line + "\n")
            running.clear()
    save_scorer(scorer.eval(), options.out)


if __name__ == "__main__":
    main()
