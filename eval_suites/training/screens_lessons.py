"""What shapes-qwen learns from: pictures and clips with dense labels, and questions on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foveate.eval_suites.suites.clips import scenes as clips
from foveate.eval_suites.suites.screens import scenes as screens
from foveate.eval_suites.training.screens_model import (
    COLOURS,
    COLUMNS,
    KINDS,
    LETTERS,
    ROWS,
    TOKEN,
    TOKENS,
    WORDS,
    encode,
    points,
)

QUESTIONS, BLOCK_LENGTH = 6, 66  # most questions on a picture, and tokens of all of them, padded


def _label(kind: str, colour: str | None, word: str) -> tuple[int, int, int]:
    return KINDS.index(kind), COLOURS.index(colour or "nothing"), WORDS.index(word.lower())


def screen_labels(screen: screens.Screen) -> np.ndarray:
    """Kind, colour and word of the element under the middle of every visual token, (96, 3) int64, row by row."""
    labels = np.zeros((ROWS, COLUMNS, 3), np.int64)
    for element in screen.elements:
        labels[hit(element)] = _label(element.kind, element.colour, element.label)
    return labels.reshape(-1, 3)


def screen_letters(screen: screens.Screen) -> np.ndarray:
    """Which letters of labels have their middle inside every visual token, (96, 28) float32."""
    seen = np.zeros((ROWS, COLUMNS, len(LETTERS)), np.float32)
    for element in screen.elements:
        if element.kind != "icon":
            x, y = screens.lettering(element)
            for letter in element.label:
                width = screens.word_mask(letter).shape[1]
                seen[(y + 4) // TOKEN, (2 * x + width) // 2 // TOKEN, LETTERS.index(letter)] = 1
                x += width + 1
    return seen.reshape(-1, len(LETTERS))


def hit(element: screens.Element) -> np.ndarray:
    """Which visual tokens have their middle inside an element, (8, 12) bool."""
    left, top, right, bottom = element.box
    x, y = (np.arange(count) * TOKEN + TOKEN // 2 for count in (COLUMNS, ROWS))
    return ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None]


def clip_labels(clip: clips.Clip) -> np.ndarray:
    """Kind, colour and word of what covers a quarter of a visual token in either of its two frames, (8, 16, 3)."""
    side = clips.SIZE // TOKEN
    labels = np.zeros((clips.FRAMES // 2, side, side, 3), np.int64)
    edges = np.arange(side) * TOKEN
    for event in clip.events:
        for frame in event.frames():
            left, top, right, bottom = event.box(frame)
            x = np.clip(np.minimum(right, edges + TOKEN) - np.maximum(left, edges), 0, None)
            y = np.clip(np.minimum(bottom, edges + TOKEN) - np.maximum(top, edges), 0, None)
            covered = y[:, None] * x[None] >= TOKEN * TOKEN // 4
            labels[frame // 2][covered] = _label("sign" if event.is_sign else "object", event.colour, event.what)
    return labels.reshape(clips.FRAMES // 2, -1, 3)


def labelled(
    seed: tuple[int, ...], counts: tuple[int, int], held_out: bool, crowded: float
) -> tuple[dict[str, Tensor], list, list]:
    """Pictures with dense labels: so many screens and so many clips, a pure function of the arguments.

    Returns:
        screens (S, 1, 128, 192, 3) and pairs of frames (P, 2, 64, 64, 3) uint8; screen_labels (S, 96, 3) and
        pair_labels (P, 16, 3).
    """
    rng = np.random.default_rng(seed)
    drawn = [screens.draw_screen(rng, held_out, crowded=rng.random() < crowded) for _ in range(counts[0])]
    films = [clips.draw_clip(rng, held_out, 0.4 + 0.5 * crowded) for _ in range(counts[1])]
    pairs = [clips.render(clip, rng).reshape(-1, 2, clips.SIZE, clips.SIZE, 3) for clip in films]
    arrays = {
        "screens": np.stack([screens.render(screen, rng) for screen in drawn])[:, None],
        "pairs": np.concatenate(pairs),
        "screen_labels": np.stack([screen_labels(screen) for screen in drawn]),
        "screen_letters": np.stack([screen_letters(screen) for screen in drawn]),
        "pair_labels": np.concatenate([clip_labels(clip) for clip in films]),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, drawn, films


def tower_batch(seed: tuple[int, ...], size: int, held_out: bool, crowded: float = 0.0) -> dict[str, Tensor]:
    """Pictures with dense labels only, a quarter as many clips as screens."""
    return labelled(seed, (size, size // 4), held_out, crowded)[0]


def event_tokens(event: clips.Event) -> np.ndarray:
    """Which visual tokens show an event, (8, 16) bool."""
    return clip_labels(clips.Clip((event,)))[..., 0] > 0


@dataclass(frozen=True)
class Asked:
    """One question for training: its text, all right answers, and the visual tokens (M,) that show what it is about."""

    task: str
    text: str
    answers: tuple[str, ...]
    evidence: np.ndarray


def ask_screen(screen: screens.Screen, rng: np.random.Generator) -> list[Asked]:
    """Instructions on some of the elements; every point inside the element is right."""
    some = [screen.elements[i] for i in rng.permutation(len(screen.elements))[:QUESTIONS]]
    names = np.array(points())
    evidence = [hit(element).reshape(-1) for element in some]
    return [Asked(e.kind, screens.instruction(e), tuple(names[at]), at) for e, at in zip(some, evidence)]


def ask_clip(clip: clips.Clip, rng: np.random.Generator) -> list[Asked]:
    """All questions on a clip, as many as fit."""
    found = []
    for event in clip.events:
        for task in ("letter",) if event.is_sign else ("colour", "shape"):
            question = clips.ask(clips.Clip((event,)), task, rng)
            answer = question.answer.lower()
            found.append(Asked(task, question.text, (answer,), event_tokens(event).reshape(-1)))
    return [found[i] for i in rng.permutation(len(found))[:QUESTIONS]]


TASKS = (*screens.TASKS, *clips.TASKS)


def question_blocks(questions: list[Asked], tokens: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Questions in a row.

    Returns:
        ids, block (number of the question, -1 padding) and offset (place in the block), (66,) int64; at (6,) where the
        answer is to be said, -1 where there is no question; accept (6, V) bool right answers; evidence (6, M) bool;
        task (6,) numbers in `TASKS`.
    """
    out = {name: np.zeros(BLOCK_LENGTH, np.int64) for name in ("ids", "block", "offset")}
    out["block"] -= 1
    out |= {"at": np.full(QUESTIONS, -1), "task": np.full(QUESTIONS, -1)}
    out |= {"accept": np.zeros((QUESTIONS, len(TOKENS)), bool), "evidence": np.zeros((QUESTIONS, tokens), bool)}
    start = 0
    for number, question in enumerate(questions):
        asked = encode(f"{question.text}<|im_end|><|im_start|>assistant")
        answer = TOKENS[question.answers[rng.integers(len(question.answers))]]
        end = start + len(asked) + 1
        if end > BLOCK_LENGTH:
            break
        span = slice(start, end)
        out["ids"][span], out["block"][span], out["offset"][span] = [*asked, answer], number, np.arange(end - start)
        out["at"][number], out["task"][number] = end - 2, TASKS.index(question.task)
        out["accept"][number, [TOKENS[answer] for answer in question.answers]] = True
        out["evidence"][number] = question.evidence
        start = end
    return out


def question_batch(kind: str, layouts: list, rng: np.random.Generator) -> dict[str, Tensor]:
    """The questions on a batch of screens or clips."""
    ask, tokens = (ask_screen, ROWS * COLUMNS) if kind == "screen" else (ask_clip, clip_places().shape[1])
    rows = [question_blocks(ask(layout, rng), tokens, rng) for layout in layouts]
    return {f"{kind}_{name}": torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def screen_places() -> Tensor:
    """Temporal, vertical and horizontal place of a screen's visual tokens, (3, 96)."""
    return torch.stack(
        torch.meshgrid(torch.zeros(1).long(), torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    ).flatten(1)


def clip_places() -> Tensor:
    """The same of a clip's, (3, 128)."""
    side = torch.arange(clips.SIZE // TOKEN)
    return torch.stack(torch.meshgrid(torch.arange(clips.FRAMES // 2), side, side, indexing="ij")).flatten(1)


def some_frame(size: int, seed: int) -> Tensor:
    """The places (B, 16) of a random pair of frames of each clip: what a model sees that judges frame by frame."""
    inside = (clips.SIZE // TOKEN) ** 2
    chosen = torch.randint(clips.FRAMES // 2, (size, 1), generator=torch.Generator().manual_seed(seed))
    return chosen * inside + torch.arange(inside)


def joint_batch(seed: tuple[int, ...], size: int, held_out: bool) -> dict[str, Tensor]:
    """Pictures with dense labels and questions, as many clips as screens."""
    rng = np.random.default_rng((*seed, 1))
    batch, drawn, films = labelled(seed, (size, size), held_out, 0.0 if held_out else 0.2)
    return batch | question_batch("screen", drawn, rng) | question_batch("clip", films, rng)
