"""What shapes-llava learns from: pictures with dense labels and captions, and questions on them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foveate.eval_suites.suites.shapes import scenes
from foveate.eval_suites.training.shapes_model import CELL_COUNT, GRID, IMAGE_TOKENS, PATCH, TOKENS, encode

BLOCK_LENGTH = 72  # tokens of all the questions on one picture, padded
DESCRIBE = "Describe the picture."

# Dense patch labels. "what" is a shape, nothing, or a letter in the first or second place of the code.
COLOUR_NAMES = (*scenes.COLOURS, "code", "background")
WHAT_NAMES = (*scenes.SHAPES, *scenes.ALPHABET, *scenes.ALPHABET, "background")
PAIRS = len(scenes.COLOURS) * len(scenes.SHAPES)


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


def question_blocks(questions: list[scenes.Question]) -> dict[str, np.ndarray]:
    """Questions in a row.

    Returns:
        ids, targets (-100 where none), block (number of the question, -1 padding) and offset (place in the block),
        (72,) int64; tasks (8,) numbers in `scenes.TASKS`, -1 where none.
    """
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
        row |= question_blocks(questions)
        if pictures:
            row["pixels"] = picture.pixels
        rows.append(row)
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


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
