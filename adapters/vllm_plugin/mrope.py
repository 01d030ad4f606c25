"""Three-axis positions: survivors keep the row and column they had, and text counts on from the whole picture.

vLLM asks a model for the positions of a prompt before any picture is encoded, when only the picture's corner is known.
Which rows and columns stay is known after the encoder. They travel as extra channels of the embeddings to the hook that
vLLM has for its own video pruning (``recompute_mrope_positions``), which takes them off and corrects the positions of
the part of the prompt that is about to run. Rows and columns are written in two digits, so that bfloat16 holds them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DIGIT = 128
CHANNELS = 5
"""A flag that the row belongs to a picture, then row and column in two digits each."""


def with_positions(rows: Tensor, places: Tensor, columns: int) -> Tensor:
    """``rows (K, D)`` of the tokens ``places (K,)`` of a picture of ``columns`` columns: ``(K, D + CHANNELS)``."""
    row, column = places // columns, places % columns
    marks = torch.stack([torch.ones_like(row), row // DIGIT, row % DIGIT, column // DIGIT, column % DIGIT], dim=1)
    return torch.cat([rows, marks.to(rows)], dim=1)


def without_positions(rows: Tensor) -> Tensor:
    """Rows that keep the positions vLLM gave them, ``(K, D) -> (K, D + CHANNELS)``."""
    return torch.cat([rows, rows.new_zeros(len(rows), CHANNELS)], dim=1)


def corrected(ids: Tensor, image_token: int, rows: Sequence[Tensor], positions: Tensor, computed: int) -> Tensor:
    """Positions ``(3, L)`` with rows and columns of the picture tokens that are about to run.

    ``ids (L,)`` is the whole prompt, of which ``computed`` tokens have run; ``rows`` are what :func:`with_positions`
    made of the next ones. A picture's first axis holds its corner throughout, so correcting twice changes nothing.
    """
    marks = torch.cat([ids.new_zeros(0, CHANNELS), *(row[:, -CHANNELS:].long() for row in rows)])
    marks = marks[marks[:, 0] > 0].to(positions.device)
    at = (ids[computed:] == image_token).nonzero()[:, 0][: len(marks)].to(positions.device) + computed
    fixed = positions.clone()
    fixed[1, at] = positions[0, at] + marks[:, 1] * DIGIT + marks[:, 2]
    fixed[2, at] = positions[0, at] + marks[:, 3] * DIGIT + marks[:, 4]
    return fixed


def shortened_positions(
    positions_of: Callable[[list[int], list[Any]], tuple[Tensor, int]],
    ids: list[int],
    features: Sequence[Any],
    length_of: Callable[[Any], int],
) -> tuple[Tensor, int]:
    """Positions ``(3, L)`` of a prompt whose pictures are shorter than vLLM thinks, and what decoding adds to them.

    vLLM's own ``positions_of`` answers for the prompt with whole pictures, of which the parts that are there are taken;
    a shortened picture's tokens all get its corner for now. ``length_of(feature)``: tokens of the whole picture.
    """
    whole, whole_features, columns, done = [], [], [], 0  # columns: of the whole prompt, one for each of ``ids``
    for feature in sorted(features, key=lambda f: f.mm_position.offset):
        start, length = feature.mm_position.offset, feature.mm_position.length
        columns += range(len(whole), len(whole) + start - done)
        whole += ids[done:start]
        full, first = length_of(feature), len(whole)
        where = dataclasses.replace(feature.mm_position, offset=first, length=full)
        whole_features.append(dataclasses.replace(feature, mm_position=where))
        whole += ids[start : start + length] if full == length else [ids[start]] * full
        columns += range(first, first + length) if full == length else [first] * length
        done = start + length
    columns += range(len(whole), len(whole) + len(ids) - done)
    positions, _ = positions_of(whole + ids[done:], whole_features)
    return positions[:, columns], int(positions.max()) + 1 - len(ids)
