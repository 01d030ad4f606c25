"""FocusUI's UI graph: tokens of large uniform areas carry little, single blocks that differ from all around carry much.

Section 3 of "FocusUI", arXiv 2601.03928 (CVPR 2026), as released: neighbouring blocks of pixels that hardly differ are
joined, and a token's weight falls with the size of its component. It needs no training and no instruction, and together
with the box of the element that an instruction means it labels what a patch scorer learns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.errors import ParameterError
from foveate.pruners.core.parameters import check_choice
from foveate.pruners.core.tokens import Layout

MODES = ("log", "inverse", "sqrt")


def ui_graph(pixels: Tensor, layout: Layout, threshold: float = 2.0, mode: str = "log") -> Tensor:
    """Weight of every token in (0, 1]: 1 for one unlike all its neighbours, less the more it is joined with.

    Args:
        pixels: ``(B, N, 3, T, h, w)`` the pixels under each token in [0, 1], T frames each.
        threshold: neighbours in a row or column of a view are joined where ``sqrt(2 / T) * distance`` is below it. The
            released code counts a picture as two equal frames, which the root makes up for.
        mode: weight of a component of size c: ``"log"`` is ``1 / max(1, ln(c + 1))``, ``"inverse"`` ``1 / c``,
            ``"sqrt"`` ``1 / sqrt(c)``.

    Returns:
        ``(B, N)`` float32.
    """
    check_choice("mode", mode, MODES)
    scale = math.sqrt(2 / pixels.shape[3])
    blocks = pixels.flatten(2)
    batch, n = blocks.shape[:2]
    number = torch.arange(batch * n, device=pixels.device).view(batch, n)
    edges = []
    for view in layout.views:
        where = view.tokens(pixels.device).view(view.grid)
        for one, other in ((where[:, :-1], where[:, 1:]), (where[:-1], where[1:])):
            one, other = one.flatten(), other.flatten()
            alike = scale * _distance(blocks, one, other) < threshold  # (B, E)
            edges.append(torch.stack([number[:, one][alike], number[:, other][alike]]))
    label = components(batch * n, torch.cat(edges, dim=1))
    size = torch.zeros_like(label).scatter_add(0, label, torch.ones_like(label))[label].float()
    if mode == "log":
        weight = 1 / (size + 1).log().clamp(min=1)
    else:
        weight = 1 / (size if mode == "inverse" else size.sqrt())
    return weight.view(batch, n)


def _distance(blocks: Tensor, one: Tensor, other: Tensor, at_once: int = 4096) -> Tensor:
    """Euclidean distances ``(B, E)`` of blocks ``one`` and ``other`` of ``blocks (B, N, P)``, a few edges at a time."""
    parts = [
        (blocks[:, a].float() - blocks[:, b].float()).norm(dim=-1)
        for a, b in zip(one.split(at_once), other.split(at_once))
    ]
    return torch.cat(parts, dim=1) if parts else blocks.new_zeros(len(blocks), 0)


def components(n: int, edges: Tensor) -> Tensor:
    """Connected components of ``n`` nodes joined by ``edges (2, E)``: ``(n,)`` the lowest node of each one's component.

    Union by minimum with pointer jumping (Shiloach and Vishkin, 1982): a few rounds over all edges at once.
    """
    label = torch.arange(n, device=edges.device)
    one, other = edges
    while True:
        low = torch.minimum(label[one], label[other])
        joined = label.scatter_reduce(0, label[one], low, "amin").scatter_reduce(0, label[other], low, "amin")
        joined = joined[joined]
        if torch.equal(joined, label):
            return label
        label = joined


def image_blocks(image: Tensor, block: int) -> tuple[Tensor, Layout]:
    """Cut ``image (H, W, 3)`` uint8 into blocks of ``block`` pixels: ``(1, N, 3, 1, block, block)`` in [0, 1], and
    their layout.

    Raises:
        ParameterError: not an RGB picture, or sides that are not multiples of ``block``.
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise ParameterError(
            f"a picture of shape {tuple(image.shape)} is not (height, width, 3); convert it to RGB first"
        )
    rows, cols = image.shape[0] / block, image.shape[1] / block
    if not (rows.is_integer() and cols.is_integer()):
        height, width = image.shape[:2]
        raise ParameterError(
            f"a picture of {height} x {width} pixels does not divide into blocks of {block}; resize it first"
        )
    grid = (image / 255.0).unflatten(1, (-1, block)).unflatten(0, (-1, block))  # (rows, h, cols, w, 3)
    return grid.permute(0, 2, 4, 1, 3).flatten(0, 1)[None, :, :, None], Layout.grid(int(rows), int(cols))


def box_coverage(box: Sequence[float], height: int, width: int, patch: int) -> Tensor:
    """Share of every patch that ``box`` (left, top, right, bottom) covers: ``(height / patch, width / patch)`` float32.

    A box whose coordinates are all <= 1 is relative to the picture. Coordinates are cut to whole pixels.
    """
    left, top, right, bottom = box
    if max(box) <= 1:
        left, right, top, bottom = left * width, right * width, top * height, bottom * height

    def covered(first: float, last: float, size: int) -> Tensor:
        edges = torch.arange(0, size + 1, patch, dtype=torch.float32).clamp(int(first), max(int(last), int(first)))
        return edges.diff() / patch

    return covered(top, bottom, height)[:, None] * covered(left, right, width)


def fused_label(
    coverage: Tensor, graph: Tensor, *, merge: int = 2, box_weight: float = 1.0, graph_weight: float = 0.5
) -> Tensor:
    """What the scorer learns, per token: ``coverage (rows * merge, cols * merge)``, ``graph (rows, cols)`` ->
    ``(rows * cols,)``.

    ``clip(box_weight * coverage + graph_weight * graph, 0, 1) * 2 - 1`` of each patch, then the mean over a token's
    patches.
    """
    by_patch = graph.repeat_interleave(merge, dim=0).repeat_interleave(merge, dim=1)
    label = (box_weight * coverage + graph_weight * by_patch).clamp(0, 1) * 2 - 1
    return label.unflatten(1, (-1, merge)).unflatten(0, (-1, merge)).mean(dim=(1, 3)).flatten()


def supervision(
    image: Tensor,
    box: Sequence[float],
    *,
    patch: int = 14,
    merge: int = 2,
    threshold: float = 2.0,
    mode: str = "log",
    box_weight: float = 1.0,
    graph_weight: float = 0.5,
) -> Tensor:
    """Labels ``(tokens,)`` in [-1, 1] of a screenshot ``image (H, W, 3)`` uint8 whose sides are multiples of
    ``patch * merge``.

    Args:
        box: left, top, right, bottom of the element that the instruction means, in pixels or relative.

    Other arguments are those of :func:`ui_graph` and :func:`fused_label`.
    """
    blocks, layout = image_blocks(image, patch * merge)
    graph = ui_graph(blocks, layout, threshold, mode).view(layout.views[0].grid)
    coverage = box_coverage(box, *image.shape[:2], patch)
    return fused_label(coverage, graph, merge=merge, box_weight=box_weight, graph_weight=graph_weight)
