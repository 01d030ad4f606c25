"""Train shapes-llava from nothing, in the order real vision-language models are built.

1. *tower*: a CLIP vision model learns what every patch shows (dense labels on the layer the decoder will read) while its
   class token is trained contrastively against captions and to name the colour-shape pairs present.
2. *decoder*: a small Llama learns the questions on text only: each patch is the sum of the embeddings of the words for
   what it shows, so that no picture is needed.
3. *align*: the projector alone learns to turn the frozen tower's patches into those word sums.
4. *vqa*: everything is trained together on pictures and questions.
5. *read*: the decoder alone, on the frozen tower's tokens, some of them left out for speed, and hard scenes.

All data is drawn on line from `scenes.py`, batch by batch from (seed, stage, step), so that a run can be resumed and
repeated. Pictures carry several questions in one sequence; the attention mask keeps the questions from seeing each
other and each counts its positions from the end of the picture, so that every question is trained exactly as served.

    python -m foveate.eval_suites.shapes.train --out shapes-llava

`--stages` runs some of the stages only (1 and 2 do not depend on each other); `--resume` continues from checkpoints.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from ..training import CHECK_STREAM, TRAIN_STREAM, Run, Stage, add_stage_arguments
from . import scenes

STAGES = (
    Stage("tower", 657, 64, 1e-3),
    Stage("decoder", 2665, 32, 1e-3),
    Stage("align", 150, 64, 2e-3, warmup=20),
    Stage("vqa", 421, 32, 5e-4),
    Stage("read", 260, 32, 1e-3, warmup=20, decay=0.4),
)
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
PATCH = 8
GRID = scenes.IMAGE_SIZE // PATCH
IMAGE_TOKENS = GRID * GRID
BLOCK_LENGTH = 72  # tokens of all the questions on one picture, padded
MEAN, STD = [0.4, 0.4, 0.4], [0.25, 0.25, 0.25]
ALIKE_FROM = 284  # step of the last stage from which scenes are made hard
DESCRIBE = "Describe the picture."
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# Dense patch labels. "what" is a shape, nothing, or a letter in the first or second place of the code.
COLOUR_NAMES = (*scenes.COLOURS, "code", "background")
WHAT_NAMES = (*scenes.SHAPES, *scenes.ALPHABET, *scenes.ALPHABET, "background")
CELL_COUNT = 9
PAIRS = len(scenes.COLOURS) * len(scenes.SHAPES)


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


# ---------------------------------------------------------------------------------------------------------------- data


def patch_labels(scene: scenes.Scene, owner: np.ndarray) -> np.ndarray:
    """Colour, what and cell of every patch, (144, 3) int64: what covers most of it, if at least a quarter."""
    grid = owner.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(IMAGE_TOKENS, -1)
    labels = np.tile(np.array([len(COLOUR_NAMES) - 1, len(WHAT_NAMES) - 1, CELL_COUNT]), (IMAGE_TOKENS, 1))
    best = np.full(IMAGE_TOKENS, PATCH * PATCH // 4 - 1)
    colours, shapes = list(scenes.COLOURS), len(scenes.SHAPES)
    entries = [(i, colours.index(t.colour), scenes.SHAPES.index(t.shape), t.cell) for i, t in enumerate(scene.things)]
    for k, letter in enumerate(scene.code or ""):
        what = shapes + k * len(scenes.ALPHABET) + scenes.ALPHABET.index(letter)
        entries.append((100 + k, len(colours), what, scene.code_cell))
    for identity, *label in entries:
        covered = (grid == identity).sum(1)
        labels[covered > best] = label
        best = np.maximum(best, covered)
    return labels


def caption_bag(scene: scenes.Scene) -> np.ndarray:
    """The caption as parts, (6, 5) token ids padded with 0: place, then colour and shape or `code` and letters."""
    bag = np.zeros((scenes.MAX_OBJECTS + 1, 5), np.int64)
    for row, part in zip(bag, scenes.caption(scene).split(",")):
        ids = encode(part)
        row[: len(ids)] = ids
    return bag


def question_blocks(questions: list[scenes.Question]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Questions in a row: ids, targets (-100 where none), block number (-1 padding) and position in block, (72,)."""
    ids = np.zeros(BLOCK_LENGTH, np.int64)
    targets, block, offset = np.full_like(ids, -100), np.full_like(ids, -1), np.zeros_like(ids)
    start = 0
    for number, question in enumerate(questions):
        asked = encode(f"{question.text} ASSISTANT:")
        answer = " ".join(question.answer) if question.task == "code" else question.answer
        if question.task == "location":
            answer = answer.replace(" ", "_")
        tokens = [*asked, *encode(answer), TOKENS["</s>"]]
        end = start + len(tokens)
        if end > BLOCK_LENGTH:
            break
        ids[start:end], block[start:end], offset[start:end] = tokens, number, np.arange(len(tokens))
        targets[start + len(asked) - 1 : end - 1] = tokens[len(asked) :]
        start = end
    return ids, targets, block, offset


def question_fields(questions: list[scenes.Question]) -> dict[str, np.ndarray]:
    """What :func:`answer_loss` reads of the questions on one picture; tasks (8,) are numbers, -1 where none."""
    ids, targets, block, offset = question_blocks(questions)
    tasks = np.full(len(scenes.TASKS) + 2, -1)
    tasks[: len(questions)] = [scenes.TASKS.index(q.task) if q.task in scenes.TASKS else -1 for q in questions]
    return {"ids": ids, "targets": targets, "block": block, "offset": offset, "tasks": tasks}


def make_batch(
    seed: tuple[int, ...],
    size: int,
    held_out: bool,
    pictures: bool,
    most: int = 5,
    captions: float = 0.0,
    alike: float = 0.0,
) -> dict[str, Tensor]:
    """One batch, a pure function of its arguments.

    Args:
        most: bound on the objects of a scene.
        captions: how often a caption is asked for.
        alike: share of scenes whose objects are hard to tell apart; if any, every scene is asked for more places.
    """
    tasks = (*scenes.TASKS, "location", "location") if alike else scenes.TASKS
    rng = np.random.default_rng(seed)
    rows: list[dict[str, np.ndarray]] = []
    for _ in range(size):
        count = int(rng.integers(1, most + 1))
        scene = scenes.draw_scene(rng, held_out, count, alike=alike > 0 and rng.random() < alike)
        picture = scenes.render(scene, rng)
        questions = scenes.ask_all(scene, rng, tasks)
        if rng.random() < captions:
            questions = [scenes.Question("caption", DESCRIBE, scenes.caption(scene)), *questions]
        pairs = np.zeros(PAIRS, np.float32)
        for thing in scene.things:
            pairs[list(scenes.COLOURS).index(thing.colour) * 6 + scenes.SHAPES.index(thing.shape)] = 1
        row = {"labels": patch_labels(scene, picture.owner), "bag": caption_bag(scene), "pairs": pairs}
        row |= question_fields(questions)
        if pictures:
            row["pixels"] = picture.pixels
        rows.append(row)
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


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


def corrupt(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Give a share of the patches the label of another patch of the batch, as an imperfect tower would."""
    flat = labels.flatten(0, 1)
    other = flat[torch.randint(len(flat), (len(flat),), generator=generator).to(flat.device)]
    swap = (torch.rand(len(flat), generator=generator) < share).to(flat.device)
    return torch.where(swap[:, None], other, flat).view_as(labels)


def some_patches(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Ascending places (B, count) of most objects' patches and some of the background's: shorter, so faster."""
    draw = torch.rand(labels.shape[:2], generator=generator).to(labels.device)
    order = torch.where(labels[..., 2] == CELL_COUNT, draw + 0.8, draw)  # an object's patch nearly always first
    return order.argsort(1)[:, :count].sort(1).values


def answer_loss(
    decode: nn.Module,
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
    block = F.pad(batch["block"], (prefix, 0), value=-2)  # -2 the shared prefix, -1 padding
    positions = torch.cat([opened, opening.shape[1] + where, end + batch["offset"]], dim=1)
    length = block.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    seen = causal & ((block[:, :, None] == block[:, None, :]) | (block[:, None, :] == -2))
    mask = torch.zeros(seen.shape, device=device).masked_fill(~seen, -1e4)[:, None]
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


class Training(Run):
    """The stages of shapes-llava."""

    stages = STAGES

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        sizes = Sizes(options.width, options.depth, options.text_width, options.text_depth)
        self.model = build_model(sizes).to(self.device)
        self.heads = TowerHeads(sizes).to(self.device)
        self.modules = {"model": self.model, "heads": self.heads}
        self.compiled_see = self.compiled(self._see)
        self.compiled_decode = self.compiled(self.model.model.language_model)

    def batch(self, stage: str, step: int) -> dict[str, Tensor]:
        """See :class:`Run`."""
        pictures = stage != "decoder"
        if step < 0:
            return make_batch((CHECK_STREAM, self.options.seed, -1 - step), 64, True, pictures)
        # the decoder meets few objects first: presence and place leave the guessing line much sooner
        most = scenes.MAX_OBJECTS if pictures else min(scenes.MAX_OBJECTS, 2 + step // 300)
        # once pictures are read, half of the scenes need colour and shape together to find the object asked about
        alike = 0.5 if stage == "read" or (stage == "vqa" and step >= ALIKE_FROM) else 0.0
        seed = (TRAIN_STREAM, self.options.seed, [known.name for known in STAGES].index(stage), step)
        size = getattr(self.options, f"{stage}_batch")
        return make_batch(seed, size, False, pictures, most, 0.0 if pictures else 0.1, alike)

    @property
    def see(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The tower, compiled while training only: the few held-out checks are not worth a second compilation."""
        return self.compiled_see if self.model.training else self._see

    @property
    def decode(self) -> nn.Module:
        """The language model, compiled while training only."""
        return self.compiled_decode if self.model.training else self.model.model.language_model

    def _see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Patches of the layer that the decoder reads, (B, 144, D), and the class token's output, (B, D)."""
        mean, std = (torch.tensor(value, device=pixels.device)[:, None, None] for value in (MEAN, STD))
        pixels = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
        out = self.model.model.vision_tower(pixels, output_hidden_states=True)
        return out.hidden_states[-2][:, 1:], out.pooler_output

    def loss(self, stage: str, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and figures of one stage on one batch."""
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
        """See :class:`Run`."""
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
        """Write the model folder: float16 safetensors that load as float32, and the processor."""
        self.model.config.dtype = self.model.config.text_config.dtype = self.model.config.vision_config.dtype = (
            "float32"
        )
        weights = {name: value.half() for name, value in self.model.state_dict().items()}
        self.model.generation_config.pad_token_id = TOKENS["<pad>"]
        self.model.generation_config.max_new_tokens = 40
        self.model.save_pretrained(self.out, state_dict=weights)
        build_processor().save_pretrained(self.out)


def parse() -> argparse.Namespace:
    """Command line; the defaults made the shipped weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_stage_arguments(parser, STAGES)
    parser.add_argument("--decoder-patches", type=int, default=36, help="patches a picture in the decoder stage")
    parser.add_argument("--read-patches", type=int, default=60, help="patches a picture in the read stage")
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return parser.parse_args()


def main() -> None:
    """Run the chosen stages and write the model folder after the last one."""
    options = parse()
    training = Training(options)
    for stage in options.stages:
        training.train(stage)
    if stage == STAGES[-1].name:
        training.export()


if __name__ == "__main__":
    main()
