"""Positions of three axes on pruned prompts, against those of the whole prompt; vLLM itself is not needed for that."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from foveate.adapters.vllm_plugin.mrope import (
    CHANNELS,
    corrected,
    shortened_positions,
    with_positions,
    without_positions,
)

IMAGE = 9


@dataclass
class Where:
    offset: int
    length: int


@dataclass
class Feature:
    grid: tuple[int, int]
    mm_position: Where


def whole_positions(ids, features):
    """Positions as Qwen gives them: text counts on from the largest of a picture."""
    positions, done = [], 0
    for feature in features:
        start = len(positions) and int(torch.tensor(positions).max()) + 1
        positions += [[start + i] * 3 for i in range(feature.mm_position.offset - done)]
        start = int(torch.tensor(positions).max()) + 1
        rows, cols = feature.grid
        assert feature.mm_position.length == rows * cols
        positions += [[start, start + r, start + c] for r in range(rows) for c in range(cols)]
        done = feature.mm_position.offset + feature.mm_position.length
    start = int(torch.tensor(positions).max()) + 1
    positions += [[start + i] * 3 for i in range(len(ids) - done)]
    return torch.tensor(positions).T, int(torch.tensor(positions).max()) + 1 - len(ids)


def size(feature):
    return feature.grid[0] * feature.grid[1]


KEPT = (torch.tensor([0, 7, 11]), torch.tensor([2, 3, 4, 199 * 201 + 200]))
GRIDS = ((3, 4), (200, 201))


def prompt():
    """Text, a picture that keeps 3 of 12 tokens, text, one that keeps 4 of 40,200, text; and the same unpruned."""
    ids = [1, 2, *[IMAGE] * 3, 3, *[IMAGE] * 4, 4, 5]
    features = [Feature(GRIDS[0], Where(2, 3)), Feature(GRIDS[1], Where(6, 4))]
    whole_ids = [1, 2, *[IMAGE] * 12, 3, *[IMAGE] * 40200, 4, 5]
    whole = whole_positions(whole_ids, [Feature(GRIDS[0], Where(2, 12)), Feature(GRIDS[1], Where(15, 40200))])[0]
    stay = [0, 1, *(2 + KEPT[0]).tolist(), 14, *(15 + KEPT[1]).tolist(), 40215, 40216]
    return ids, features, whole[:, stay], whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [[0], [0, 4], [0, 3, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]], ids=str)
def test_survivors_have_the_positions_of_the_whole_prompt(chunks, dtype):
    ids, features, expected, whole = prompt()
    positions, delta = shortened_positions(whole_positions, ids, features, size)
    assert delta == int(whole.max()) + 1 - len(ids)
    rows = [with_positions(torch.zeros(len(k), 2, dtype=dtype), k, g[1]) for k, g in zip(KEPT, GRIDS)]
    for first, stop in zip(chunks, [*chunks[1:], len(ids)]):
        window = []
        for feature, row in zip(features, rows):
            at = feature.mm_position.offset
            part = row[max(first - at, 0) : max(stop - at, 0)]
            window += [part] if len(part) else []
        positions = corrected(torch.tensor(ids), IMAGE, window, positions, first)
    assert torch.equal(positions, expected)


def test_correcting_again_changes_nothing():
    ids, features, _, _ = prompt()
    positions, _ = shortened_positions(whole_positions, ids, features, size)
    rows = [with_positions(torch.zeros(len(k), 2), k, g[1]) for k, g in zip(KEPT, GRIDS)]
    once = corrected(torch.tensor(ids), IMAGE, rows, positions, 0)
    assert torch.equal(corrected(torch.tensor(ids), IMAGE, rows, once, 0), once)


def test_rows_of_videos_correct_nothing():
    positions = torch.arange(6).expand(3, -1)
    rows = [without_positions(torch.ones(2, 3))]
    assert torch.equal(corrected(torch.tensor([1, IMAGE, IMAGE, 2, 8, 8]), IMAGE, rows, positions, 0), positions)
    assert rows[0].shape[1] == 3 + CHANNELS


def test_a_text_prompt_keeps_its_positions():
    positions = torch.arange(4).expand(3, -1)
    assert torch.equal(corrected(torch.tensor([1, 2, 3, 4]), IMAGE, [], positions, 0), positions)


def test_whole_pictures_keep_the_positions_they_had():
    ids = [1, *[IMAGE] * 6, 2]
    features = [Feature((2, 3), Where(1, 6))]
    positions, delta = shortened_positions(whole_positions, ids, features, size)
    same, also = whole_positions(ids, [dataclasses.replace(f) for f in features])
    assert torch.equal(positions, same)
    assert delta == also
