"""FocusUI's scorer and what it learns from: masks, pooling, loading, components, labels, loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from foveate.errors import ParameterError
from foveate.pruners import Layout
from foveate.pruners.core.patch_scorer import PatchScorer, load_scorer, save_scorer, scorer_loss
from foveate.pruners.core.ui_graph import box_coverage, components, fused_label, image_blocks, supervision, ui_graph

WIDTH = 16


@pytest.fixture
def scorer() -> PatchScorer:
    torch.manual_seed(0)
    return PatchScorer(WIDTH).eval()


def embeds(n: int, seed: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, n, WIDTH, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------- scorer


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_scores_pool_cosines_of_the_unpadded_text(scorer: PatchScorer, pooling: str) -> None:
    """Statement: mean or largest entry of U_v U_e^T, and padded text changes nothing."""
    scorer.pooling = pooling
    image, text = embeds(5, 1), embeds(3, 2)
    table = scorer.vision_enhancer(image) @ scorer.text_enhancer(text).mT
    expected = table.mean(-1) if pooling == "mean" else table.amax(-1)
    torch.testing.assert_close(scorer(image, text), expected)
    padded = torch.cat([text, 100 * embeds(4, 3)], dim=1)
    mask = torch.arange(7).expand(2, -1) < 3
    torch.testing.assert_close(scorer(image, padded, mask), expected)
    assert (expected.abs() < 1).all()


@torch.no_grad()
def test_the_enhancer_is_the_papers(scorer: PatchScorer) -> None:
    """Statement: attention, residual and norm, an MLP without residual, tanh, unit length."""
    x, one = embeds(4, 1), scorer.vision_enhancer
    attended = one.attn(x, x, x)[0]
    y = one.mlp[2](torch.nn.functional.gelu(one.mlp[0](one.layer_norm(x + attended)))).tanh()
    torch.testing.assert_close(one(x), y / y.norm(dim=-1, keepdim=True))


def test_half_precision_weights_score_in_float32(scorer: PatchScorer) -> None:
    assert scorer.bfloat16()(embeds(4, 1), embeds(2, 2)).dtype == torch.float32


def test_widths_must_divide() -> None:
    with pytest.raises(ParameterError, match="12 is not a multiple of its 8 heads"):
        PatchScorer(12)


def test_the_scorer_learns_a_label() -> None:
    """Statement: the loss is zero at labels, differentiable, ignores filling, and training on it ranks as labelled."""
    labels = torch.tensor([[0.5, -1.0, 0.0, -1.0]])
    assert scorer_loss(labels + 3, labels).abs() < 1e-6
    filled = torch.cat([labels, torch.full((1, 2), -torch.inf)], dim=1)
    torch.testing.assert_close(scorer_loss(filled * 2, filled), scorer_loss(labels * 2, labels))
    torch.manual_seed(0)
    scorer, image, text = PatchScorer(WIDTH, dropout=0.0), embeds(4, 1, 1), embeds(2, 2, 1)
    optimizer = torch.optim.Adam(scorer.parameters(), 1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        scorer_loss(scorer(image, text), labels).backward()
        optimizer.step()
    assert scorer(image, text)[0].argsort(descending=True)[:2].tolist() == [0, 2]


# ---------------------------------------------------------------------------------------------------------- loading


@torch.no_grad()
@pytest.mark.parametrize("form", ["plain", "module", "inside", "pt", "state_dict", "folder", "shards", "own folder"])
def test_published_layouts_load(scorer: PatchScorer, tmp_path: Path, form: str) -> None:
    """Statement: the scorer's own file, one of a data-parallel run, and whole models give the same scorer."""
    state = dict(scorer.state_dict())
    path = tmp_path / "scorer.safetensors"
    other = {"model.layers.0.weight": torch.zeros(3)}
    inside = {f"model.patch_scorer.{name}": tensor for name, tensor in state.items()} | other
    if form == "plain":
        save_scorer(scorer, path)
    elif form == "module":
        save_file({f"module.{name}": tensor for name, tensor in state.items()}, path)
    elif form == "inside":
        save_file(inside, path)
    elif form in ("pt", "state_dict"):
        path = tmp_path / "scorer.pt"
        torch.save({"state_dict": state} if form == "state_dict" else state, path)
    elif form == "folder":
        path = tmp_path
        save_file(inside, path / "model.safetensors")
    elif form == "own folder":
        path = tmp_path
        save_scorer(scorer, path / "patch_scorer.safetensors")
    else:
        path = tmp_path
        names = sorted(inside)
        halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, mine in halves.items():
            save_file({name: inside[name] for name in mine}, path / file)
        index = {"weight_map": {name: file for file, mine in halves.items() for name in mine}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_scorer(path)
    assert not loaded.training
    assert torch.equal(loaded(embeds(5, 1), embeds(3, 2)), scorer(embeds(5, 1), embeds(3, 2)))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda s: s.pop("text_enhancer.mlp.0.bias"), "text_enhancer.mlp.0.bias is missing"),
        (lambda s: s.update({"extra": torch.zeros(1)}), "extra is unknown"),
        (lambda s: s.update({"text_enhancer.mlp.0.bias": torch.zeros(3)}), r"is \(3,\), not \(16,\)"),
        (lambda s: [s.pop(name) for name in list(s)[1:]] and s.pop(next(iter(s))), "holds no patch scorer"),
        (lambda s: s.pop("vision_enhancer.attn.in_proj_weight"), "holds no patch scorer"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(scorer: PatchScorer, tmp_path: Path, spoil, said: str) -> None:
    """Statement: nothing is loaded in part; the message names what is wrong."""
    state = dict(scorer.state_dict())
    spoil(state)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ParameterError, match=said):
        load_scorer(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.pt", "broken.safetensors", ""])
def test_unreadable_files_are_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ParameterError, match=name or "no patch scorer"):
        load_scorer(tmp_path / name)


# --------------------------------------------------------------------------------------------------------- UI graph


@pytest.mark.parametrize("seed", range(8))
def test_components_are_those_of_a_flood_fill(seed: int) -> None:
    """Statement: joining equal neighbours of a random picture of few colours gives the components of a flood fill."""
    g = torch.Generator().manual_seed(seed)
    rows, cols = 9 + seed, 14
    colours = torch.randint(0, 2, (rows, cols), generator=g)
    number = torch.arange(rows * cols).view(rows, cols)
    right, down = colours[:, :-1] == colours[:, 1:], colours[:-1] == colours[1:]
    edges = torch.cat(
        [
            torch.stack([number[:, :-1][right], number[:, 1:][right]]),
            torch.stack([number[:-1][down], number[1:][down]]),
        ],
        1,
    )
    found = components(rows * cols, edges)
    expected = torch.full((rows, cols), -1)
    for start in range(rows * cols):  # the lowest node reaches its component first
        todo = [divmod(start, cols)]
        while todo:
            y, x = todo.pop()
            if expected[y, x] < 0 and colours[y, x] == colours.flatten()[start]:
                expected[y, x] = start
                beside = ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
                todo += [(v, u) for v, u in beside if 0 <= v < rows and 0 <= u < cols]
    assert torch.equal(found.view(rows, cols), expected)


def test_a_winding_component_is_one() -> None:
    """Statement: a chain through shuffled nodes, the slowest case for labels that spread, is a single component."""
    chain = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert (components(1001, torch.stack([chain[:-1], chain[1:]])) == torch.tensor([0] * 1000 + [1000])).all()
    assert components(3, torch.zeros(2, 0, dtype=torch.long)).tolist() == [0, 1, 2]


def test_weights_fall_with_the_size_of_a_component() -> None:
    """Statement: 1 / max(1, ln(c + 1)), 1 / c, 1 / sqrt(c); a frame or crop is never joined with another."""
    pixels = torch.zeros(1, 8, 3, 1, 2, 2)
    pixels[:, 3] = 1.0
    layout = Layout.video(2, 2, 2)
    sizes = [3, 3, 3, 1, 4, 4, 4, 4]
    for mode, weight in (
        ("log", lambda c: 1 / max(1, math.log(c + 1))),
        ("inverse", lambda c: 1 / c),
        ("sqrt", lambda c: c**-0.5),
    ):
        torch.testing.assert_close(ui_graph(pixels, layout, mode=mode)[0], torch.tensor([weight(c) for c in sizes]))
    with pytest.raises(ParameterError, match="'cubic'"):
        ui_graph(pixels, layout, mode="cubic")


def test_the_threshold_counts_a_picture_twice() -> None:
    """Statement: a picture of one frame and of two equal ones join alike, at sqrt(2) times the distance of a block."""
    one = torch.zeros(1, 2, 3, 1, 2, 2)
    one[:, 1] = 0.4  # distance 0.4 * sqrt(12) = 1.386, times sqrt(2) = 1.960
    for pixels in (one, one.expand(-1, -1, -1, 2, -1, -1)):
        assert ui_graph(pixels, Layout.grid(1, 2)).lt(1).all()
        assert ui_graph(pixels, Layout.grid(1, 2), threshold=1.95).eq(1).all()


def test_a_batch_of_pictures_keeps_them_apart() -> None:
    pixels = torch.rand(3, 12, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.6
    together = ui_graph(pixels, Layout.grid(3, 4))
    assert together.unique().numel() > 1
    for b in range(3):
        assert torch.equal(ui_graph(pixels[b : b + 1], Layout.grid(3, 4))[0], together[b])


# ----------------------------------------------------------------------------------------------------------- labels


def test_boxes_cover_patches_in_whole_pixels() -> None:
    """Statement: relative and absolute boxes agree after cutting to pixels; a degenerate one covers nothing."""
    covered = box_coverage((5.9, 0, 10, 4.2), 8, 12, 4)
    torch.testing.assert_close(covered, torch.tensor([[0.0, 0.75, 0.5], [0.0, 0.0, 0.0]]))
    assert torch.equal(box_coverage((5.9 / 12, 0, 10 / 12, 4.2 / 8), 8, 12, 4), covered)
    assert box_coverage((9, 1, 3, 4), 8, 12, 4).sum() == 0


def test_labels_fuse_before_they_merge() -> None:
    """Statement: clip per patch, then the mean over the patches of a token."""
    coverage = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    label = fused_label(coverage, torch.tensor([[1.0]]))
    torch.testing.assert_close(label, torch.tensor([(1.0 + 3 * 0.0) / 4]))
    torch.testing.assert_close(fused_label(coverage, torch.tensor([[1.0]]), graph_weight=0.0), torch.tensor([-0.5]))


def test_pictures_that_do_not_fit_are_said() -> None:
    with pytest.raises(ParameterError, match="does not divide into blocks of 28"):
        image_blocks(torch.zeros(30, 56, 3, dtype=torch.uint8), 28)
    with pytest.raises(ParameterError, match="RGB"):
        supervision(torch.zeros(28, 28, 4, dtype=torch.uint8), (0, 0, 1, 1))
