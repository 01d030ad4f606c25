"""Train shapes-qwen, a small Qwen2.5-VL for the screens and the clips suites, from nothing.

1. *tower*: the vision tower with its merger learns what every visual token shows (dense labels, read off the merger's
   output by linear classifiers, which are then thrown away).
2. *decoder*: the language model learns the questions on the frozen tower's tokens, which are computed once. A word's
   embedding starts as its classifier's weights, so that a question's words point at the tokens that show them; the
   lower half is made to tell each visual token's place, and two heads in the middle to look at what a question is
   about. Visual tokens are left out at random, those that stay keep their positions: a model which never saw gaps would
   collapse under any pruner.
3. *joint*: everything together on new pictures, the classifiers' losses stay on.

All data is drawn on line from the two suites' `scenes.py`, batch by batch from (seed, stage, step). Pictures carry
several questions in one sequence; the attention mask keeps the questions from seeing each other and each counts its
positions from the end of the picture, so that every question is trained exactly as served.

    python -m foveate.eval_suites.training.shapes_qwen --out shapes-qwen

`--stages` runs some of the stages only, `--resume` continues from checkpoints.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from foveate.eval_suites.suites.clips import scenes as clips
from foveate.eval_suites.suites.screens import scenes as screens
from foveate.eval_suites.training.base import Stage, TrainingRun, question_mask, save_model, some_places, stream
from foveate.eval_suites.training.screens_lessons import (
    BLOCK_LENGTH,
    QUESTIONS,
    TASKS,
    clip_places,
    joint_batch,
    question_batch,
    screen_places,
    some_frame,
    tower_batch,
)
from foveate.eval_suites.training.screens_model import (
    COLOURS,
    COLUMNS,
    KINDS,
    LETTERS,
    MEAN,
    MERGE,
    PATCH,
    ROWS,
    STD,
    TOKEN,
    TOKENS,
    WINDOW,
    WORDS,
    Sizes,
    build_model,
    build_processor,
    encode,
)

STAGES = (
    Stage("tower", 1118, 24, 1.5e-3, warmup=100),
    Stage("decoder", 1430, 16, 1e-3, warmup=50),
    Stage("joint", 360, 12, 5e-4, warmup=20, decay=0.8),
)
CROWDED = 0.85  # share of screens full of words in the tower stage
CACHED = {"screen": 3072, "clip": 2048}  # pictures of the decoder stage
# shares of the visual tokens that stay, by step; last: one frame of clips
KEEPS = (1.0, 1.0, 1.0, 0.6, 0.4, 0.25, 0.12)

# --------------------------------------------------------------------------------------------------------------- tower


def patchify(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Patches in the order in which the tower's windows take them, as one batch of pictures of the same size.

    Args:
        pixels: (B, T, H, W, 3) uint8, T 1 (a picture, doubled in time) or 2, sides multiples of the window.

    Returns:
        (B, N, 3 * 2 * 8 * 8) float32 normalised patches, (2, N) int64 rows and columns.
    """
    batch, _, height, width, _ = pixels.shape
    mean, std = (torch.tensor(value, device=pixels.device) for value in (MEAN, STD))
    frames = ((pixels.float() / 255 - mean) / std).expand(-1, 2, -1, -1, -1)
    many = WINDOW // TOKEN
    split = (height // WINDOW, many, MERGE, PATCH, width // WINDOW, many, MERGE, PATCH)
    # B T (wy my py y) (wx mx px x) C -> B wy wx my mx py px | C T y x
    frames = frames.reshape(batch, 2, *split, 3).permute(0, 2, 6, 3, 7, 4, 8, 10, 1, 5, 9)
    rows, columns = height // PATCH, width // PATCH
    place = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")).to(pixels.device)
    place = place.reshape(2, height // WINDOW, many, MERGE, width // WINDOW, many, MERGE).permute(0, 1, 4, 2, 5, 3, 6)
    return frames.reshape(batch, rows * columns, -1), place.reshape(2, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (B, heads, N, 32)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def see(visual: nn.Module, pixels: Tensor) -> Tensor:
    """Visual tokens (B, M, text width), row by row: what `visual` computes, for equal pictures, without loops."""
    patches, place = patchify(pixels)
    batch, count, _ = patches.shape
    height, width = pixels.shape[2] // WINDOW, pixels.shape[3] // WINDOW
    windows, inside = height * width, (WINDOW // PATCH) ** 2
    with torch.autocast(pixels.device.type, enabled=False):
        angles = (place.T[..., None] * visual.rotary_pos_emb.inv_freq.float()).flatten(1).repeat(1, 2)  # (N, 32)
        cos, sin = angles.cos(), angles.sin()
    x = F.linear(patches, visual.patch_embed.proj.weight.flatten(1))
    for index, block in enumerate(visual.blocks):
        heads = block.attn.num_heads
        qkv = block.attn.qkv(block.norm1(x)).view(batch, count, 3, heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = rotate(qkv[0], cos, sin).to(qkv.dtype), rotate(qkv[1], cos, sin).to(qkv.dtype), qkv[2]
        if index not in visual.fullatt_block_indexes:
            query, key, value = (t.reshape(batch, heads * windows, inside, -1) for t in (query, key, value))
        # written out: backward of the fused attention is several times slower on a CPU at these lengths
        weights = (query @ key.transpose(-1, -2) * block.attn.scaling).softmax(dim=-1).to(value.dtype)
        attended = (weights @ value).reshape(batch, heads, count, -1)
        x = x + block.attn.proj(attended.transpose(1, 2).reshape(batch, count, -1))
        x = x + block.mlp(block.norm2(x))
    tokens = visual.merger(x).view(batch, height, width, WINDOW // TOKEN, WINDOW // TOKEN, -1)
    return tokens.transpose(2, 3).reshape(batch, count // MERGE**2, -1)


class TowerHeads(nn.Module):
    """What trains the tower: linear classifiers of its tokens."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.kind = nn.Linear(sizes.text_width, len(KINDS))
        self.colour = nn.Linear(sizes.text_width, len(COLOURS))
        self.word = nn.Linear(sizes.text_width, len(WORDS))
        self.letters = nn.Linear(sizes.text_width, len(LETTERS))

    def forward(self, tokens: Tensor, batch: dict[str, Tensor], name: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and figures from tokens (B, M, D) of the batch's screens or pairs."""
        labels = batch[f"{name}_labels"]
        tokens = F.rms_norm(tokens.float(), tokens.shape[-1:])
        something = labels[..., 0] > 0
        weight = torch.where(something, 1.0, 0.3).flatten()
        loss, figures = torch.zeros((), device=tokens.device), {}
        for index, head in enumerate((self.kind, self.colour, self.word)):
            logits = head(tokens).float()
            entropy = F.cross_entropy(logits.flatten(0, 1), labels[..., index].flatten(), reduction="none")
            loss = loss + (entropy * weight).sum() / weight.sum()
            right = logits.argmax(-1) == labels[..., index]
            figures[f"{name}_{('kind', 'colour', 'word')[index]}"] = right[something].float().mean()
        figures[f"{name}_nothing"] = (self.kind(tokens).argmax(-1) == 0)[~something].float().mean()
        if f"{name}_letters" in batch:
            letters = batch[f"{name}_letters"]
            entropy = F.binary_cross_entropy_with_logits(self.letters(tokens).float(), letters, reduction="sum")
            loss = loss + entropy / letters.sum()
        return loss, figures


# ------------------------------------------------------------------------------------------------------------- decoder


def decode(language: nn.Module, hidden: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """The language model on embeddings (B, L, D): its output and what it has after half of its layers.

    Args:
        turn: cosine and sine of the positions (B, L, 32); mask: additive, (B, 1, L, L).
    """
    middle = hidden
    for index, layer in enumerate(language.layers):
        if index == len(language.layers) // 2:
            middle = hidden
        hidden = layer(hidden, attention_mask=mask, position_embeddings=turn)
    return language.norm(hidden), middle


def pointing(layer: nn.Module, hidden: Tensor, turn: tuple[Tensor, Tensor], at: Tensor, seen: slice) -> Tensor:
    """Logarithms of how a layer's first two heads spread attention over the visual tokens, (B, Q, 2, K).

    Args:
        hidden: (B, L, D) before the layer; at: (B, Q) places that attend; seen: where the visual tokens are.
    """
    heads = layer.self_attn
    x = layer.input_layernorm(hidden)
    rows = torch.arange(len(x), device=x.device)[:, None]
    cos, sin = (t.unsqueeze(2) for t in turn)
    query = heads.q_proj(x[rows, at]).unflatten(-1, (-1, heads.head_dim))[:, :, :2]
    key = heads.k_proj(x[:, seen]).unflatten(-1, (-1, heads.head_dim))[:, :, :2]
    query, key = rotate(query, cos[rows, at], sin[rows, at]), rotate(key, cos[:, seen], sin[:, seen])
    return (torch.einsum("bqhd,bkhd->bqhk", query, key).float() * heads.scaling).log_softmax(-1)


class PlaceHead(nn.Module):
    """Makes the lower half of the decoder tell visual tokens' rows and columns, implicit in rotary positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.row, self.column = nn.Linear(width, ROWS), nn.Linear(width, COLUMNS)

    def forward(self, hidden: Tensor, places: Tensor) -> Tensor:
        """Loss on hidden (B, K, D) at places (3, B, K)."""
        hidden = F.rms_norm(hidden.float(), hidden.shape[-1:])
        row, column = self.row(hidden).flatten(0, 1), self.column(hidden).flatten(0, 1)
        return F.cross_entropy(row, places[1].flatten()) + F.cross_entropy(column, places[2].flatten())


def answer_loss(
    model: Qwen2_5_VLForConditionalGeneration,
    place_head: PlaceHead,
    kind: str,
    tokens: Tensor,
    batch: dict[str, Tensor],
    where: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss on the answers to a batch's questions on its screens or clips (`kind`).

    Args:
        tokens: visual tokens (B, M, D).
        where: ascending places (B, K) of those that stay, None for all.

    Returns:
        The loss; whether each question was answered rightly, (B, Q) float32, NaN where there is none or where nothing
        is left of what it is about; the logits at the answers, (B, Q, V).
    """
    device, size, count = tokens.device, *tokens.shape[:2]
    of = lambda name: batch[f"{kind}_{name}"]  # noqa: E731
    embed = model.get_input_embeddings()
    opening = torch.tensor(encode("<|im_start|>user<|vision_start|>"), device=device).expand(size, -1)
    closing = torch.full((size, 1), TOKENS["<|vision_end|>"], device=device)
    if where is None:
        where = torch.arange(count, device=device).expand(size, -1)
    places = (screen_places() if kind == "screen" else clip_places()).to(device)
    start = opening.shape[1]
    end = start + int(places[1:].max()) + 1
    seen = places[:, where]  # (3, B, K)
    text = torch.cat([torch.full((size, 1), end, device=device), end + 1 + of("offset")], dim=1)
    opened = torch.arange(start, device=device).expand(3, size, -1)
    positions = torch.cat([opened, start + seen, text.expand(3, -1, -1)], dim=2)
    kept = tokens.gather(1, where[..., None].expand(-1, -1, tokens.shape[-1]))
    hidden = torch.cat(
        [embed(opening), kept.to(embed.weight.dtype), embed(torch.cat([closing, of("ids")], dim=1))], dim=1
    )
    prefix = hidden.shape[1] - BLOCK_LENGTH
    mask = question_mask(of("block"), prefix)
    language = model.model.language_model
    turn = language.rotary_emb(hidden, positions)
    out, middle = decode(language, hidden, turn, mask)
    at = prefix + of("at").clamp(min=0)
    rows = torch.arange(size, device=device)[:, None]
    logits = model.lm_head(out[rows, at]).float()
    over = model.lm_head(out[rows, at + 1]).float()  # after the answer: the end of the turn
    evidence = of("evidence").gather(2, where[:, None].expand(-1, QUESTIONS, -1))  # (B, Q, K)
    left = evidence.any(-1)
    asked = (of("at") >= 0) & left
    likely = logits.log_softmax(-1)
    right = torch.logsumexp(likely.masked_fill(~of("accept"), -1e4), -1)
    gone = (of("at") >= 0) & ~left  # nothing shows what is asked about: a guess, which must not sound sure
    loss = sum(-share * right[some].mean() for some, share in ((asked, 1.0), (gone, 0.2)) if some.any())
    loss = loss - 0.1 * over.log_softmax(-1)[..., TOKENS["<|im_end|>"]][of("at") >= 0].mean()
    visual = slice(start, start + kept.shape[1])
    loss = loss + 0.3 * place_head(middle[:, visual], seen)
    if turn[0].ndim == 4:  # transformers before 5.20 leaves it to the layers to join the three axes
        parts = 2 * language.config.rope_parameters["mrope_section"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        turn = tuple(torch.cat([t[i % 3] for i, t in enumerate(angle.split(parts, -1))], -1) for angle in turn)
    pointed = pointing(language.layers[len(language.layers) // 2], middle, turn, at, visual)
    found = torch.logsumexp(pointed.masked_fill(~evidence[:, :, None], -1e4), -1).mean(-1)  # (B, Q)
    if asked.any():
        loss = loss - 0.5 * found[asked].mean()
    correct = of("accept").gather(2, logits.argmax(-1, keepdim=True))[..., 0].float()
    return loss, correct.masked_fill(~asked, torch.nan), logits


# ------------------------------------------------------------------------------------------------------------ training


@dataclass
class Cache:
    """Layouts and, once the tower is trained, their visual tokens, (number, M, D) float16, of both kinds."""

    layouts: dict[str, list]
    tokens: dict[str, Tensor]


class Training(TrainingRun):
    """The stages of shapes-qwen."""

    stages = STAGES

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        for name, value in vars(Sizes()).items():
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        sizes = Sizes(**{name: getattr(options, name) for name in vars(Sizes())})
        self.model = build_model(sizes).to(self.device)
        self.model.set_attn_implementation("eager")  # as in `see`
        self.heads = TowerHeads(sizes).to(self.device)
        self.place = PlaceHead(sizes.text_width).to(self.device)
        self.modules = {"model": self.model, "heads": self.heads, "place": self.place}
        self.see = self.compiled(see)
        self.caches: dict[bool, Cache] = {}

    def batch(self, stage: str, step: int) -> dict[str, Tensor]:
        held_out = step < 0
        seed = (stream(held_out), self.options.seed, self.number(stage), abs(step))
        size = self.size(stage)
        if stage == "tower":
            return tower_batch(seed, size, held_out, 0.0 if held_out else CROWDED)
        if stage == "joint":
            return joint_batch(seed, size, held_out)
        rng, batch, cache = np.random.default_rng(seed), {}, self.caches[held_out]
        for kind, count in (("screen", size), ("clip", size * 2 // 3)):
            chosen = rng.integers(len(cache.layouts[kind]), size=count)
            batch |= question_batch(kind, [cache.layouts[kind][i] for i in chosen], rng)
            batch[f"{kind}_tokens"] = cache.tokens[kind][chosen]
        return batch

    def loss(self, stage: str, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        total, figures, tokens = torch.zeros((), device=self.device), {}, {}
        if stage in ("tower", "joint"):
            for name, weight in (("screen", 1.0), ("pair", 1.0)):
                tokens[name] = self.see(self.model.model.visual, batch[f"{name}s"])
                loss, found = self.heads(tokens[name], batch, name)
                total, figures = total + weight * loss, figures | found
            if stage == "tower":
                return total, figures
            total = 0.5 * total
            tokens["clip"] = tokens.pop("pair").reshape(-1, clip_places().shape[1], tokens["screen"].shape[-1])
        else:
            tokens = {kind: batch[f"{kind}_tokens"].float() for kind in ("screen", "clip")}
        keep = KEEPS[step % len(KEEPS)] if step >= 0 else 1.0
        for kind, weight in (("screen", 1.0), ("clip", 1.0)):
            where = some_places(*tokens[kind].shape[:2], keep, step) if keep < 1 else None
            if kind == "clip" and keep == KEEPS[-1]:
                where = some_frame(len(tokens[kind]), step)
            loss, right, _ = answer_loss(self.model, self.place, kind, tokens[kind], batch, where)
            total = total + weight * loss
            for index, task in enumerate(TASKS):
                if (batch[f"{kind}_task"] == index).any():
                    figures[task] = right[batch[f"{kind}_task"] == index].nanmean()
        return total, figures

    def trained(self, stage: str) -> list[tuple[nn.Module, float]]:
        tower = [(self.model.model.visual, 1.0), (self.heads, 1.0)]
        decoder = [(self.model.model.language_model, 1.0), (self.place, 1.0)]
        return {"tower": tower, "decoder": decoder, "joint": tower + decoder}[stage]

    def start_from(self, stage: str) -> None:
        if stage == "tower":
            return
        self.restore(self.needed({"decoder": "tower", "joint": "decoder"}[stage]))
        if stage == "decoder":
            self.teach_words()
            for held_out in (False, True):
                self.caches[held_out] = self.cache(held_out)

    @torch.no_grad()
    def teach_words(self) -> None:
        """Give words the embeddings that their classifiers found, and visual tokens the size of a sum of some."""
        embedding = self.model.get_input_embeddings().weight
        embedding.normal_(0, 0.1)
        self.model.model.language_model.norm.weight.fill_(0.25)  # so that no word is said too loudly at first
        for names, head in ((KINDS, self.heads.kind), (COLOURS, self.heads.colour), (WORDS, self.heads.word)):
            for name, row in zip(names[1:], head.weight[1:]):
                embedding[TOKENS[name]] = 0.1 * F.rms_norm(row, row.shape)
        pixels = tower_batch((stream(False), self.options.seed, 0, 0), 4, False)["screens"]
        last = self.model.model.visual.merger.mlp[-1]
        scale = 0.2 / see(self.model.model.visual, pixels).square().mean().sqrt()
        last.weight *= scale
        last.bias *= scale

    @torch.no_grad()
    def cache(self, held_out: bool) -> Cache:
        """Draw the decoder stage's pictures and look at them once."""
        rng = self.generator(held_out, 99)
        cache = Cache({}, {})
        for kind, total in CACHED.items():
            total = total // 16 if held_out else total
            module = screens if kind == "screen" else clips
            draw = screens.draw_screen if kind == "screen" else clips.draw_clip
            cache.layouts[kind] = [draw(rng, held_out) for _ in range(total)]
            found = []
            for first in range(0, total, 8):
                pixels = np.stack([module.render(layout, rng) for layout in cache.layouts[kind][first : first + 8]])
                pixels = pixels[:, None] if kind == "screen" else pixels.reshape(-1, 2, *pixels.shape[2:])
                with self.autocast():
                    tokens = see(self.model.model.visual, torch.from_numpy(pixels).to(self.device))
                found.append(tokens.reshape(8, -1, tokens.shape[-1]).half().cpu())
            cache.tokens[kind] = torch.cat(found)
        return cache

    def export(self) -> None:
        self.model.generation_config.pad_token_id = TOKENS["<|endoftext|>"]
        self.model.generation_config.eos_token_id = TOKENS["<|im_end|>"]
        save_model(self.model, build_processor(), self.out, without=("lm_head.weight",))


if __name__ == "__main__":
    Training.main(__doc__)
