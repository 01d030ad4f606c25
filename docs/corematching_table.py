"""The tables of docs/corematching.md: what CoreMatching's matching counts say on pictures of which everything is known.

python docs/corematching_table.py [QUESTIONS]
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.adapters import attach
from foveate.cuda import core_neurons, match_counts, neuron_counts
from foveate.eval_suites import suites
from foveate.eval_suites.running import models
from foveate.eval_suites.running.environment import machine
from foveate.eval_suites.running.evaluate import answers
from foveate.eval_suites.suites import shapes
from foveate.eval_suites.suites.shapes import scenes
from foveate.eval_suites.terminal import versions
from foveate.pruners.core.method import Hook, ModelInfo, Pruner, Selection, Stage, Tokens, top_k
from foveate.pruners.corematching import CoreMatching

PATCH, BATCH, KEEPS, METHOD = 8, 30, (72, 36), CoreMatching()
SEED = 7  # of the questions


@dataclass(frozen=True)
class Ranked(Pruner):
    """Keep the tokens of largest given score in front of a layer, as CoreMatching does."""

    scores: Tensor  # (B, N), one row per sample id
    keep: int
    layer: int
    name = "ranked"

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        return (Stage(Hook.LLM_LAYER, self.select, layer=self.layer, positions="keep", evict=True),)

    def select(self, tokens: Tokens) -> Selection:
        return Selection(top_k(self.scores[list(tokens.sample_ids)], self.keep))


def questions(number: int) -> Iterator[tuple[shapes.Sample, Tensor]]:
    """Held-out questions, and which patches ``(N,)`` bool show an object or a letter."""
    rng = np.random.default_rng(SEED)
    for i in range(number):
        task, question = shapes.TASKS[i % len(shapes.TASKS)], None
        while question is None:
            scene = scenes.draw_scene(rng, held_out=True, code=True if task == "code" else None)
            question = scenes.ask(scene, task, rng)
        picture = scenes.render(scene, rng)
        patches = torch.from_numpy(picture.owner >= 0).unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH)
        image = Image.fromarray(picture.pixels)
        yield shapes.Sample(str(i), task, image, question.text, question.answer), patches.any(-1).any(-1).flatten()


@torch.no_grad()
def activations(loaded: models.Loaded, batch: list[shapes.Sample]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Neurons of every layer ``(B, L, F)``, and which places are visual and attended, ``(B, L)`` bool."""
    texts = [shapes.prompt(sample.question) for sample in batch]
    inputs = loaded.processor(images=[s.image for s in batch], text=texts, padding=True, return_tensors="pt")
    seen: list[Tensor] = []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for layer in loaded.model.model.language_model.layers
    ]
    loaded.model(**inputs)
    for handle in handles:
        handle.remove()
    return seen, inputs["input_ids"] == loaded.model.config.image_token_id, inputs["attention_mask"].bool()


def superiority(scores: Tensor, objects: Tensor) -> float:
    """Area under the curve: how often an object token outscores a background token, ties counted half."""
    inside, outside = scores[objects].double(), scores[~objects].double()
    return float(((inside[:, None] > outside).double() + 0.5 * (inside[:, None] == outside).double()).mean())


def main(number: int = 300) -> None:
    loaded, suite = models.load("shapes-llava", "cpu", "float32"), suites.find("shapes")
    depth = loaded.model.config.text_config.num_hidden_layers
    found: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    todo, whole, facts = list(questions(number)), [], defaultdict(list)
    for start in range(0, number, BATCH):
        batch, objects = zip(*todo[start : start + BATCH])
        objects = torch.stack(objects)
        hidden, visual, attended = activations(loaded, list(batch))
        shown = torch.zeros_like(visual).masked_scatter(visual, objects)
        groups = {"all": attended, "text": attended & ~visual, "objects": shown, "background": visual & ~shown}
        facts["objects"] += objects.float().mean(1).tolist()
        facts["text"] += (groups["text"].sum(1) / attended.sum(1)).tolist()
        whole += [suite.score(s, a) for s, a in zip(batch, answers(loaded.model, loaded.processor, suite, batch))]
        draws = torch.stack(
            [
                torch.rand(objects.shape[1], generator=torch.Generator().manual_seed(start + b))
                for b in range(len(batch))
            ]
        )
        rankings: dict[tuple, Tensor] = {(2, "chance"): draws, (2, "objects first"): objects + draws}
        for layer in range(depth - 1):
            active = hidden[layer][visual].unflatten(0, objects.shape) > 0
            for name, voters in groups.items():
                if name == "all" or layer == METHOD.select_layer:
                    core = core_neurons(neuron_counts(hidden[layer], METHOD.rho, valid=voters), METHOD.beta)
                    rankings[layer + 1, f"votes of {name}"] = match_counts(active, core)
            rankings[layer + 1, "fewest matches"] = -rankings[layer + 1, "votes of all"]
            rankings[layer + 1, "active neurons"] = active.sum(-1)
        with attach(
            loaded.model, CoreMatching(budget=1, neuron_layers=())
        ) as session:  # are these the library's counts?
            answers(loaded.model, loaded.processor, suite, batch)
            for image, row in zip(session.trace.images, rankings[2, "votes of all"]):
                assert torch.equal(image.scores, row.float())
        for (layer, name), scores in rankings.items():
            cell = found[layer, name]
            cell["above"] += [superiority(s, o) for s, o in zip(scores, objects) if o.any()]
            for keep in KEEPS:
                kept = objects.gather(1, top_k(scores, keep)).float()
                cell[f"kept {keep}"] += (kept.sum(1) / objects.sum(1).clamp(min=1)).tolist()
                with attach(loaded.model, Ranked(scores, keep, layer)) as session:
                    session.sample_ids = range(len(batch))
                    said = answers(loaded.model, loaded.processor, suite, batch)
                cell[f"right {keep}"] += [suite.score(s, a) for s, a in zip(batch, said)]
    print(
        f"{number} questions; whole {np.mean(whole):.1%}; tokens on objects {np.mean(facts['objects']):.1%}; "
        f"text {np.mean(facts['text']):.1%}"
    )
    columns = found[2, "chance"]
    print(f"| in front of layer | ranked by | {' | '.join(columns)} |\n| {' --- | ' * (2 + len(columns))}")
    for (layer, name), cell in sorted(found.items()):
        print(f"| {layer} | {name} | " + " | ".join(f"{np.mean(v) * 100:.1f}" for v in cell.values()) + " |")
    print(f"\nMeasured with {versions(machine(torch.device('cpu')))}.")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
