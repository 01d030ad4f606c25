"""Train shapes-llava from nothing, in the order real vision-language models are built.

1. *tower*: a CLIP vision model learns what every patch shows (dense labels on the layer the decoder will read) while
   its class token is trained contrastively against captions and to name the colour-shape pairs present.
2. *decoder*: a small Llama learns the questions on text only: each patch is the sum of the embeddings of the words for
   what it shows, so that no picture is needed.
3. *align*: the projector alone learns to turn the frozen tower's patches into those word sums.
4. *vqa*: everything is trained together on pictures and questions.
5. *read*: the decoder alone, on the frozen tower's tokens, some of them left out for speed, and hard scenes.

All data is drawn on line from `scenes.py`, batch by batch from (seed, stage, step), so that a run can be resumed and
repeated. Pictures carry several questions in one sequence; the attention mask keeps the questions from seeing each
other and each counts its positions from the end of the picture, so that every question is trained exactly as served.

    python -m foveate.eval_suites.training.shapes_llava --out shapes-llava

`--stages` runs some of the stages only (1 and 2 do not depend on each other); `--resume` continues from checkpoints.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from foveate.eval_suites.suites.shapes import scenes
from foveate.eval_suites.training.base import Stage, TrainingRun, question_mask, save_model, stream
from foveate.eval_suites.training.shapes_lessons import (
    COLOUR_NAMES,
    PAIRS,
    WHAT_NAMES,
    corrupt,
    make_batch,
    some_patches,
)
from foveate.eval_suites.training.shapes_model import (
    CELL_COUNT,
    IMAGE_TOKENS,
    MEAN,
    STD,
    TOKENS,
    Sizes,
    build_model,
    build_processor,
)

STAGES = (
    Stage("tower", 657, 64, 1e-3),
    Stage("decoder", 2665, 32, 1e-3),
    Stage("align", 150, 64, 2e-3, warmup=20),
    Stage("vqa", 421, 32, 5e-4),
    Stage("read", 260, 32, 1e-3, warmup=20, decay=0.4),
)
ALIKE_FROM = 284  # step of the vqa stage from which scenes are made hard

# -------------------------------------------------------------------------------------------------------------- losses


class TowerHeads(nn.Module):
    """What trains the tower and is then thrown away: patch classifiers, a caption encoder, pair classifiers."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(sizes.width)
        self.colour = nn.Linear(sizes.width, len(COLOUR_NAMES))
        self.what = nn.Linear(sizes.width, len(WHAT_NAMES))
        self.cell = nn.Linear(sizes.width, CELL_COUNT + 1)
        self.pairs = nn.Linear(sizes.width, PAIRS)
        self.image = nn.Linear(sizes.width, 64)
        self.words = nn.Embedding(len(TOKENS), 128, padding_idx=0)
        self.part = nn.Sequential(nn.Linear(5 * 128, 256), nn.GELU(), nn.Linear(256, 128))
        self.text = nn.Linear(128, 64)
        self.scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, patches: Tensor, pooled: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and figures from `patches` (B, 144, D), `pooled` (B, D) and the batch's labels."""
        labels = batch["labels"]
        patches = self.norm(patches)
        object_patch = labels[..., 2] < CELL_COUNT
        # background is two patches in three and easy: it counts a fifth
        weight = torch.where(object_patch, 1.0, 0.2).flatten()
        figures: dict[str, Tensor] = {}
        loss = torch.zeros((), device=patches.device)
        for index, head in enumerate((self.colour, self.what, self.cell)):
            logits = head(patches).float()
            entropy = F.cross_entropy(logits.flatten(0, 1), labels[..., index].flatten(), reduction="none")
            loss = loss + (entropy * weight).sum() / weight.sum()
            name = ("patch_colour", "patch_what", "patch_cell")[index]
            figures[name] = (logits.argmax(-1) == labels[..., index])[object_patch].float().mean()
        pair_logits = self.pairs(pooled).float()
        image = F.normalize(self.image(pooled).float(), dim=-1)
        # (B, parts, 5, 128) -> one vector a part -> summed over the parts that are there
        there = (batch["bag"][..., 0] > 0).float()[..., None]
        text = self.text((self.part(self.words(batch["bag"]).flatten(2)) * there).sum(1)).float()
        similarity = image @ F.normalize(text, dim=-1).T * self.scale.exp().clamp(max=60)
        truth = torch.arange(len(similarity), device=similarity.device)
        contrast = (F.cross_entropy(similarity, truth) + F.cross_entropy(similarity.T, truth)) / 2
        pairs = F.binary_cross_entropy_with_logits(pair_logits, batch["pairs"]) * PAIRS / 5
        figures |= {"contrast": contrast, "matched": (similarity.argmax(1) == truth).float().mean()}
        figures["pair_recall"] = (pair_logits > 0)[batch["pairs"] > 0].float().mean()
        return loss + 0.5 * contrast + 0.5 * pairs, figures


def patch_words(labels: Tensor, embedding: nn.Embedding) -> Tensor:
    """Patches as sums of word embeddings, (B, 144, text width): what a perfect tower would say."""
    device = labels.device
    colour = torch.tensor([TOKENS[name] for name in COLOUR_NAMES], device=device)
    what = torch.tensor([TOKENS[name.lower()] for name in WHAT_NAMES], device=device)
    shapes, letters = len(scenes.SHAPES), len(scenes.ALPHABET)
    turn = [0] * shapes + [TOKENS["first"]] * letters + [TOKENS["second"]] * letters + [0]
    row = torch.tensor([TOKENS[name] for name in scenes.ROWS for _ in range(3)] + [0], device=device)
    column = torch.tensor([TOKENS[name] for name in scenes.COLUMNS] * 3 + [0], device=device)
    ids = torch.stack(
        [
            colour[labels[..., 0]],
            what[labels[..., 1]],
            torch.tensor(turn, device=device)[labels[..., 1]],
            row[labels[..., 2]],
            column[labels[..., 2]],
        ],
        dim=-1,
    )
    return (embedding(ids) * (ids > 0)[..., None]).sum(-2)


def answer_loss(
    decode: Callable[..., Any],
    model: LlavaForConditionalGeneration,
    patches: Tensor,
    batch: dict[str, Tensor],
    where: Tensor | None = None,
    count: int = IMAGE_TOKENS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss on the answers and exact-match accuracy per task (teacher-forced, which for exact match is greedy decoding).

    Args:
        decode: the language model, possibly compiled.
        patches: visual tokens in the decoder's width, (B, M, text width).
        where: their places among the `count` of a whole picture, (B, M); None when all are there.
    """
    device, size = patches.device, len(patches)
    embed = model.get_input_embeddings()
    opening = torch.tensor([TOKENS["<s>"], TOKENS["user"], TOKENS[":"]], device=device).expand(size, -1)
    hidden = torch.cat([embed(opening), patches, embed(batch["ids"])], dim=1)
    prefix, end = opening.shape[1] + patches.shape[1], opening.shape[1] + count
    if where is None:
        where = torch.arange(count, device=device).expand(size, -1)
    opened = torch.arange(opening.shape[1], device=device).expand(size, -1)
    positions = torch.cat([opened, opening.shape[1] + where, end + batch["offset"]], dim=1)
    mask = question_mask(batch["block"], prefix)
    out = decode(inputs_embeds=hidden, attention_mask=mask, position_ids=positions, use_cache=False)
    logits = model.lm_head(out.last_hidden_state[:, prefix:]).float()
    targets = batch["targets"]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    with torch.no_grad():
        wrong = (logits.argmax(-1) != targets) & (targets != -100)
        figures = {}
        failed = torch.zeros(size, batch["tasks"].shape[1], device=device)
        failed.scatter_add_(1, batch["block"].clamp(min=0), (wrong & (batch["block"] >= 0)).float())
        for index, task in enumerate(scenes.TASKS):
            asked = batch["tasks"] == index
            figures[task] = (failed[asked] == 0).float().mean()
    return loss, figures


# ------------------------------------------------------------------------------------------------------------ training


class Training(TrainingRun):
    """The stages of shapes-llava."""

    stages = STAGES

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--decoder-patches", type=int, default=36, help="patches a picture in the decoder stage")
        parser.add_argument("--read-patches", type=int, default=60, help="patches a picture in the read stage")
        for name, value in vars(Sizes()).items():
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        sizes = Sizes(**{name: getattr(options, name) for name in vars(Sizes())})
        self.model = build_model(sizes).to(self.device)
        self.heads = TowerHeads(sizes).to(self.device)
        self.modules = {"model": self.model, "heads": self.heads}
        self.see = self.compiled(self._see)
        self.decode = self.compiled(self.model.model.language_model)

    def batch(self, stage: str, step: int) -> dict[str, Tensor]:
        pictures = stage != "decoder"
        if step < 0:
            return make_batch((stream(True), self.options.seed, -1 - step), 64, True, pictures)
        # the decoder meets few objects first: presence and place leave the guessing line much sooner
        most = scenes.MAX_OBJECTS if pictures else min(scenes.MAX_OBJECTS, 2 + step // 300)
        # once pictures are read, half of the scenes need colour and shape together to find the object asked about
        alike = 0.5 if stage == "read" or (stage == "vqa" and step >= ALIKE_FROM) else 0.0
        seed = (stream(False), self.options.seed, self.number(stage), step)
        return make_batch(seed, self.size(stage), False, pictures, most, 0.0 if pictures else 0.1, alike)

    def _see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Patches of the layer that the decoder reads, (B, 144, D), and the class token's output, (B, D)."""
        mean, std = (torch.tensor(value, device=pixels.device)[:, None, None] for value in (MEAN, STD))
        pixels = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
        out = self.model.model.vision_tower(pixels, output_hidden_states=True)
        return out.hidden_states[-2][:, 1:], out.pooler_output

    def loss(self, stage: str, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if stage == "tower":
            return self.heads(*self.see(batch["pixels"]), batch)
        embed = self.model.get_input_embeddings()
        if stage == "decoder":
            generator = torch.Generator().manual_seed(self.options.seed + step)
            labels, where = batch["labels"], None
            if self.model.training:
                where = some_patches(labels, self.options.decoder_patches, generator)
                labels = corrupt(labels, 0.05, generator).gather(1, where[..., None].expand(-1, -1, 3))
            return answer_loss(self.decode, self.model, patch_words(labels, embed), batch, where)
        with torch.set_grad_enabled(stage == "vqa" and torch.is_grad_enabled()):
            patches, pooled = self.see(batch["pixels"])
        tokens = self.model.model.multi_modal_projector(patches)
        if stage == "align" and self.model.training:
            words = patch_words(batch["labels"], embed).detach()
            return F.mse_loss(tokens.float(), words) / words.var(), {}
        if stage == "read" and self.model.training:
            generator = torch.Generator().manual_seed(self.options.seed + step)
            where = some_patches(batch["labels"], self.options.read_patches, generator)
            tokens = tokens.detach().gather(1, where[..., None].expand(-1, -1, tokens.shape[-1]))
            return answer_loss(self.decode, self.model, tokens, batch, where)
        loss, figures = answer_loss(self.decode, self.model, tokens, batch)
        if stage in ("align", "read"):
            return loss, figures
        dense, dense_figures = self.heads(patches, pooled, batch)
        return loss + 0.3 * dense, figures | dense_figures

    def trained(self, stage: str) -> list[tuple[nn.Module, float]]:
        tower, projector = self.model.model.vision_tower, self.model.model.multi_modal_projector
        decoder = self.model.model.language_model
        return {
            "tower": [(tower, 1.0), (self.heads, 1.0)],
            "decoder": [(decoder, 1.0)],
            "align": [(projector, 1.0)],
            "read": [(decoder, 1.0)],
            "vqa": [(tower, 1.0), (self.heads, 1.0), (projector, 1.0), (decoder, 1.0)],
        }[stage]

    def start_from(self, stage: str) -> None:
        """Weights of the stages before: the tower's and the decoder's are put together, later ones are whole."""
        if stage == "align":
            for part, prefix in (("tower", "model.vision_tower."), ("decoder", ("model.language_model.", "lm_head."))):
                state = self.needed(part)
                weights = {name: value for name, value in state["model"].items() if name.startswith(prefix)}
                self.model.load_state_dict(weights, strict=False)
                if part == "tower":
                    self.heads.load_state_dict(state["heads"])
        elif stage in ("vqa", "read"):
            self.restore(self.needed({"vqa": "align", "read": "vqa"}[stage]))

    def export(self) -> None:
        self.model.generation_config.pad_token_id = TOKENS["<pad>"]
        self.model.generation_config.max_new_tokens = 40
        save_model(self.model, build_processor(), self.out)


if __name__ == "__main__":
    Training.main(__doc__)
