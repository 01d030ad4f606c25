"""Signals read by the taps equal what the model's own eager attention maps say, and lie where the layout says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate
from foveate.adapters.taps import TowerTap
from foveate.pruners.core import (
    AtEntry,
    BeforeLayer,
    ClassAttention,
    ClassFeatures,
    CrossModalAttention,
    EncoderFeatures,
    EncoderKeys,
    GivenAttention,
    LastTokenAttention,
    ModelInfo,
    Pruner,
    ReceivedAttention,
    Selection,
    Signal,
    Stage,
    Tokens,
)
from tests.models import FAMILIES, IMAGE, VIDEO_FAMILIES, inputs, picture, tiny
from tests.test_oracles import scene_inputs

CLOSE = {"atol": 1e-6, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Probe(Pruner):
    """Keeps everything and writes down what it was shown."""

    seen: Any = None
    signals: Any = None
    stage: Any = AtEntry
    layer: int = 0
    name = "probe"

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        def select(tokens: Tokens, **signals: Tensor) -> Selection:
            self.seen.append((tokens, signals))
            everything = torch.arange(tokens.count).expand(len(tokens.embeds), -1)
            return Selection(everything)

        return (self.stage(select, self.signals, layer=self.layer, reads_text=True),)


def read(model: torch.nn.Module, batch: dict[str, Any], /, **signals: Signal) -> list[tuple[Tokens, dict[str, Tensor]]]:
    seen: list[Any] = []
    decoder = [s.layer + 1 for s in signals.values() if isinstance(s, (LastTokenAttention, CrossModalAttention))]
    where = {"stage": BeforeLayer, "layer": decoder[0]} if decoder else {}
    with foveate.attach(model, Probe(seen, signals, **where)):
        model(**batch)
    return seen


def tower_maps(model: torch.nn.Module, given: dict[str, Any]) -> Any:
    pixels = given["pixel_values"]
    if pixels.ndim == 5:
        pixels = pixels.flatten(0, 1)
    return model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_clip_statistics_equal_eager_maps(attention: str) -> None:
    given = inputs("llava", [[3, picture("llava", 1), 2], [1, picture("llava", 2), 4]])
    out = tower_maps(tiny("llava", "eager"), given)
    maps, hidden = out.attentions[2].mean(1), out.hidden_states[3]  # block 2, class token first
    ((tokens, seen),) = read(
        tiny("llava", attention),
        given,
        everyone=ReceivedAttention(2),
        patches=ReceivedAttention(2, queries="patches"),
        given=GivenAttention(2),
        cls=ClassAttention(2),
        features=EncoderFeatures(2),
        class_features=ClassFeatures(2),
        keys=EncoderKeys(2),
    )
    torch.testing.assert_close(seen["everyone"], maps.mean(1)[:, 1:], **CLOSE)
    torch.testing.assert_close(seen["patches"], maps[:, 1:].mean(1)[:, 1:], **CLOSE)
    torch.testing.assert_close(seen["given"], maps[:, 1:, 1:].mean(2), **CLOSE)
    torch.testing.assert_close(seen["cls"], maps[:, 0, 1:], **CLOSE)
    # two attentions' sums, in other orders, behind three blocks
    torch.testing.assert_close(seen["features"], hidden[:, 1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen["class_features"], hidden[:, None, 0], atol=1e-4, rtol=1e-4)
    assert seen["keys"].shape == (2, 16, 8)
    torch.testing.assert_close(tokens.embeds, tokens.project(tokens_features(out, -2)), atol=1e-4, rtol=1e-4)
    assert len(tokens.embeds) == 2
    assert maps[:, 0, 1:].std() > 1e-3, "flat attention proves nothing"


def tokens_features(out: Any, state: int) -> Tensor:
    return out.hidden_states[state][:, 1:]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("layer", [0, 1])
def test_qwen_statistics_equal_eager_maps_per_image_and_window(family: str, layer: int) -> None:
    """Maps recomputed densely, one picture after the other; block 0 of Qwen2.5-VL attends inside windows."""
    model = tiny(family)
    given = inputs(family, [[3, picture(family, 1, (4, 6)), 2, picture(family, 2, (2, 3)), 4]])
    seen = read(model, given, received=ReceivedAttention(layer), keys=EncoderKeys(layer))
    assert [tokens.layout.views[0].grid for tokens, _ in seen] == [(4, 6), (2, 3)]
    start = 0
    for tokens, signals in seen:
        rows, cols = tokens.layout.views[0].grid
        patches = rows * cols * 4
        grid = torch.tensor([[1, rows * 2, cols * 2]])
        expected = dense_received(model, given["pixel_values"][start : start + patches], grid, layer)
        torch.testing.assert_close(signals["received"][0], expected, **CLOSE)
        start += patches
        assert expected.std() > 1e-4, "flat attention proves nothing"


def dense_received(model: torch.nn.Module, pixels: Tensor, grid: Tensor, layer: int) -> Tensor:
    """Column means of the full map of one picture, merge units averaged, in raster order."""
    noted: dict[str, Any] = {}
    attention = model.model.visual.blocks[layer].attn
    handles = [
        attention.qkv.register_forward_hook(lambda m, a, out: noted.update(qkv=out)),
        attention.register_forward_pre_hook(lambda m, a, kwargs: noted.update(kwargs), with_kwargs=True),
    ]
    model.model.visual(pixels, grid_thw=grid)
    for handle in handles:
        handle.remove()
    import sys

    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
    q, k, _ = noted["qkv"].reshape(len(pixels), 3, attention.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    q, k = rotate(q, k, *noted["position_embeddings"])
    scores = torch.einsum("ihd,jhd->hij", q, k) * attention.scaling
    segment = torch.bucketize(torch.arange(len(pixels)), noted["cu_seqlens"][1:].long(), right=True)
    same = segment[:, None] == segment
    maps = scores.masked_fill(~same, -torch.inf).softmax(-1).mean(0)
    received = maps.sum(0) / same.sum(0)  # mean over the queries that can see the key
    units = received.view(-1, 4).mean(1)
    if model.config.model_type == "qwen2_5_vl":
        from transformers.vision_utils import get_vision_window_index

        order = get_vision_window_index(grid, spatial_merge_size=2, window_size=32, patch_size=8, kwargs={})[0]
        raster = torch.empty_like(units)
        raster[order] = units
        return raster
    return units


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_statistics_equal_eager_maps(family: str, attention: str) -> None:
    given = scene_inputs(family, "padded")
    maps = tiny(family, "eager")(**given, output_attentions=True).attentions[1].mean(1)  # (B, L, L)
    visual = given["input_ids"] == IMAGE
    attended = given["attention_mask"].bool()
    text = (visual.cumsum(1) > 0) & ~visual & attended
    seen = read(tiny(family, attention), given, last=LastTokenAttention(1), shares=CrossModalAttention(1))
    row = 0
    for tokens, signals in seen:
        for i in range(len(tokens.embeds)):
            places = visual[row].nonzero()[:, 0][tokens.layout.places()]
            torch.testing.assert_close(signals["last"][i], maps[row, -1, places], **CLOSE)
            to_visual = maps[row][text[row]][:, visual[row]].sum() / text[row].sum()
            to_text = maps[row][visual[row]][:, text[row]].sum() / visual[row].sum()
            torch.testing.assert_close(signals["shares"][i], torch.stack([to_visual, to_text]), **CLOSE)
            assert to_visual > 0.01
            row += 1
    assert row == 2


def test_system_tokens_make_text_in_front_of_the_picture_count() -> None:
    model = tiny("llava", "eager")
    given = inputs("llava", [[6, picture("llava", 1), 4]])
    maps = model(**given, output_attentions=True).attentions[1].mean(1)[0]
    ((_, signals),) = read(model, given, shares=CrossModalAttention(1, system_tokens=2))
    text = torch.tensor([2, 3, 4, 5, 22, 23, 24, 25])
    visual = torch.arange(6, 22)
    torch.testing.assert_close(signals["shares"][0, 0], maps[text][:, visual].sum() / len(text), **CLOSE)
    torch.testing.assert_close(signals["shares"][0, 1], maps[visual][:, text].sum() / len(visual), **CLOSE)
    assert signals["shares"][0, 1] > 0.01


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("shape", [(60, 40), (30, 90), (64, 64), (20, 20)])
def test_anyres_values_and_views_lie_where_the_pixels_are(family: str, shape: tuple[int, int]) -> None:
    """Features whose value is their own place on the canvas come out in their view, row and column."""
    model, given = tiny(family), inputs(family, [[2, picture(family, 1, shape), 3]])
    ((tokens, signals),) = read(model, given, features=EncoderFeatures(0))
    layout, adapter = tokens.layout, foveate.adapters.adapter_for(model)
    count = len(given["pixel_values"][0])
    side = 4
    # value = view * 100 + row * 10 + column of the patch in its view
    patch = torch.arange(side * side)
    values = (torch.arange(count)[:, None] * 100 + patch // side * 10 + patch % side).float()[..., None]
    call = {
        "image_sizes": given["image_sizes"],
        "vision_feature_select_strategy": None,
        "batch_num_images": torch.tensor([1]),
    }
    (placed,) = adapter.arrange("image", values, [layout], call)
    assert sum(view.size for view in layout.views) == len(placed) == tokens.count == signals["features"].shape[1]
    assert len(layout.newlines) == layout.length - layout.size
    for number, view in enumerate(layout.views):
        mine = placed[view.tokens(), 0].view(view.grid)
        if not view.size:
            continue
        assert (mine // 100 == number).all()
        assert (mine.diff(dim=1) == 1).all()
        assert (mine.diff(dim=0) == 10).all()


def test_onevision_shrinks_large_canvases_and_still_covers_every_token() -> None:
    model = tiny("llava_onevision")
    model.config.vision_aspect_ratio = "anyres_max_2"
    model.model.config.vision_aspect_ratio = "anyres_max_2"
    adapter = foveate.adapters.adapter_for(model)
    call = {"image_sizes": torch.tensor([[64, 64]]), "vision_feature_select_strategy": None, "batch_num_images": None}
    call["vision_aspect_ratio"] = "anyres_max_2"
    (layout,) = adapter.layouts("image", call, None)
    values = torch.randn(5, 16, 3)
    (placed,) = adapter.arrange("image", values, [layout], call)
    assert len(placed) == layout.size == 16 + 25  # 8 x 8 shrinks to 5 x 5
    together = torch.cat([view.tokens() for view in layout.views]).sort().values
    assert torch.equal(together, torch.arange(layout.size))


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_frames_are_views(family: str) -> None:
    model, given = tiny(family), scene_inputs(family, "video")
    seen = read(model, given, received=ReceivedAttention(1))
    ((tokens, signals),) = seen
    assert len(tokens.layout.views) == 4
    assert {view.kind for view in tokens.layout.views} == {"frame"}
    assert signals["received"].shape == tokens.embeds.shape[:2] == (1, tokens.layout.size)


@pytest.mark.parametrize("family", FAMILIES)
def test_instructions_are_the_words_behind_the_picture(family: str) -> None:
    model, given = tiny(family), scene_inputs(family, "padded")
    seen = read(model, given)
    embed = model.get_input_embeddings()
    rows = [(tokens, i) for tokens, _ in seen for i in range(len(tokens.embeds))]
    for row, (tokens, i) in enumerate(rows):
        visual = given["input_ids"][row] == IMAGE
        words = given["input_ids"][row][(visual.cumsum(0) > 0) & ~visual]
        assert tokens.instruction_ids[i][tokens.instruction_mask[i]].tolist() == words.tolist()
        torch.testing.assert_close(tokens.instruction[i][tokens.instruction_mask[i]], embed(words))


def test_statistics_of_a_block_are_taken_in_the_order_in_which_they_were_asked_for():
    """Tensor-parallel processes add theirs up one after the other: in another order, different statistics."""

    class Orders(TowerTap):
        def tap_output(self, block: nn.Module, signals: list[Signal]) -> None:
            taken.append(signals)

        def tap_attention(self, block: nn.Module, signals: list[Signal]) -> None:
            taken.append(signals)

    asked = [ReceivedAttention(0), GivenAttention(0), ClassAttention(0), EncoderKeys(0), GivenAttention(0, logits=True)]
    for order in (asked, asked[::-1]):
        taken: list[list[Signal]] = []
        Orders([nn.Identity()], order, lambda: None)
        assert taken == [order]
