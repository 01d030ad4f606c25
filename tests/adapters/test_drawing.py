"""The drawing says what the trace says: every token in its place, kept ones clear, scores in order, groups apart."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate.adapters.drawing import draw, facts, panels, token_at
from foveate.adapters.families.anyres import anyres as _anyres
from foveate.adapters.trace import ImageTrace, StageTrace, Trace
from foveate.errors import ParameterError
from foveate.pruners.core import Layout
from tests.models import inputs, picture, tiny

PINPOINTS = ((32, 64), (64, 32), (64, 64), (32, 96))
LAYOUTS = {
    "grid": Layout.grid(5, 7),
    "one row": Layout.grid(1, 9),
    "anyres": _anyres(60, 90, PINPOINTS, 32, 4, None),
    "anyres wide": _anyres(20, 90, PINPOINTS, 32, 4, None),
    "video": Layout.video(6, 3, 4),
    "long video": Layout.video(33, 3, 4),
}
GRADIENT = Image.fromarray(
    np.stack(np.broadcast_arrays(*np.ogrid[60:250:100j, 60:250:150j], np.full((1, 1), 90.0)), -1).astype(np.uint8)
)


def traced(layout: Layout, *stages: StageTrace, depth: int = 4, **more: bool) -> ImageTrace:
    trace = ImageTrace(0, "image", layout, list(stages), **more)
    trace.tokens_per_layer = [len(trace.kept_at(layer)) for layer in range(depth)]
    return trace


def kept(tokens: Sequence[int], layer: int = 0, **more: torch.Tensor) -> StageTrace:
    return StageTrace("llm_layer" if layer else "llm_input", layer, torch.tensor(tokens, dtype=torch.long), **more)


def cell(drawing: Image.Image, trace: ImageTrace, token: int, width: int = 768) -> np.ndarray:
    """Pixels of a token's square without its edges, float."""
    for panel in panels(trace.layout, width):
        spots = np.argwhere(panel.tokens == token)
        if len(spots):
            (r, c), n = spots[0], panel.cell
            left, top = panel.box[0] + c * n, panel.box[1] + r * n
            return np.asarray(drawing.convert("RGB"), float)[top + 3 : top + n - 3, left + 3 : left + n - 3]
    raise AssertionError(token)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("width", [200, 768])
def test_every_token_is_drawn_once_and_found_where_it_is_drawn(layout, width):
    where = panels(layout, width)
    assert sorted(np.concatenate([p.tokens.ravel() for p in where]).tolist()) == list(range(layout.size))
    for panel in where:
        left, top, right, bottom = panel.box
        assert (right - left, bottom - top) == (panel.tokens.shape[1] * panel.cell, panel.tokens.shape[0] * panel.cell)
        for (r, c), token in np.ndenumerate(panel.tokens):
            assert token_at(where, left + (c + 0.5) * panel.cell, top + (r + 0.5) * panel.cell) == token
        assert token_at(where, right, bottom) is None


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_panels_do_not_overlap_and_keep_to_the_width(layout):
    boxes = [panel.box for panel in panels(layout, 768)]
    for i, a in enumerate(boxes):
        assert a[2] <= 768
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_crops_lie_on_one_canvas_where_the_model_cut_them():
    thumbnail, crops = panels(LAYOUTS["anyres"])
    assert (thumbnail.kind, crops.kind) == ("thumbnail", "crops")
    views = [v for v in LAYOUTS["anyres"].views if v.kind == "crop"]
    assert crops.tokens.shape == (views[0].rows + views[2].rows, views[0].cols + views[1].cols)
    assert crops.seams == ((views[0].rows,), (views[0].cols,))
    corner = crops.tokens[: views[0].rows, : views[0].cols]
    assert corner.ravel().tolist() == views[0].tokens().tolist()


def test_kept_tokens_are_the_picture_itself_and_dropped_ones_dark_and_grey():
    trace = traced(Layout.grid(4, 6), kept([0, 9, 23]))
    drawing = draw(trace, GRADIENT, width=240)
    clear = GRADIENT.resize((240, 160), Image.Resampling.LANCZOS)
    for token in range(24):
        seen, true = (cell(picture, trace, token, 240) for picture in (drawing, clear))
        if token in (0, 9, 23):
            assert np.abs(seen - true).max() <= 1
        else:
            assert seen.mean() < 0.6 * true.mean()
            assert np.ptp(seen, axis=-1).max() < 12


def test_the_drawing_follows_the_layer():
    trace = traced(Layout.grid(2, 2), kept([0, 1, 2]), kept([1], layer=2), kept([], layer=3))
    for layer, alive in ((0, {0, 1, 2}), (1, {0, 1, 2}), (2, {1}), (3, set())):
        drawing = draw(trace, GRADIENT, layer=layer)
        assert {t for t in range(4) if np.ptp(cell(drawing, trace, t), axis=-1).mean() > 20} == alive
    assert facts(trace).left.tolist() == [2, 3, 2, 0]
    assert draw(trace, GRADIENT).tobytes() == draw(trace, GRADIENT, layer=3).tobytes()


def test_higher_scores_are_lighter_and_tokens_without_a_score_have_no_colour():
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, float("nan")])
    trace = traced(Layout.grid(2, 3), kept([4, 5], scores=scores))
    drawing = draw(trace, Image.new("RGB", (60, 40), (128, 128, 128)), show="scores")
    light = [cell(drawing, trace, t).mean(axis=(0, 1)) @ (0.299, 0.587, 0.114) for t in range(5)]
    assert sorted(light) == light
    assert min(np.diff(light)) > 10
    assert np.ptp(cell(drawing, trace, 5), axis=-1).max() < 12


def test_groups_share_a_colour_and_neighbours_differ():
    owner = torch.tensor([0, 0, 2, 2, 0, 5, 6, 2, -1])
    trace = traced(Layout.grid(3, 3), kept([0, 2, 5, 6], owner=owner))
    drawing = draw(trace, Image.new("RGB", (90, 90), (128, 128, 128)), show="groups")

    def tint(token: int) -> tuple[int, ...]:  # beside the dot in the middle
        return tuple(cell(drawing, trace, token)[2, 2].astype(int).tolist())

    assert tint(0) == tint(1) == tint(4)
    assert tint(2) == tint(3) == tint(7)
    assert tint(0) != tint(2)
    assert tint(5) == tint(6) == (128, 128, 128)  # alone: as they were
    assert max(tint(8)) < 100  # nobody speaks for it


def test_groups_of_several_mergers_are_followed_to_the_end():
    first = kept([0, 2, 3], owner=torch.tensor([0, 0, 2, 3]))
    second = kept([2, 3], layer=2, owner=torch.tensor([2, -1, 2, 3]))
    trace = traced(Layout.grid(2, 2), first, second)
    assert facts(trace, 1).owner.tolist() == [0, 0, 2, 3]
    assert facts(trace, 2).owner.tolist() == [2, 2, 2, 3]


def test_markers_are_diamonds_on_dimmed_ground():
    trace = traced(Layout.grid(2, 2), kept([0, 3], markers=torch.tensor([3])))
    assert facts(trace).markers.tolist() == [False, False, False, True]
    square = cell(draw(trace, GRADIENT, width=200), trace, 3, 200)
    assert square[len(square) // 2, len(square) // 2].tolist() == [240, 228, 66]
    assert np.ptp(square[2, 2]) < 12


def test_the_centre_square_is_drawn_where_the_processor_crops():
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    everything = torch.arange(4).tolist()
    whole = draw(traced(Layout.grid(2, 2), kept(everything)), wide)
    square = draw(traced(Layout.grid(2, 2), kept(everything), centre_crop=True), wide)
    assert {c[:3] for _, c in square.getcolors()} == {(0, 0, 255)}
    assert (255, 0, 0) in {c[:3] for _, c in whole.getcolors(1 << 20)}


def test_frames_are_drawn_from_the_frames_given():
    trace = traced(Layout.video(3, 2, 2), kept(range(12)))
    frames = [Image.new("RGB", (20, 20), (40 * i, 0, 0)) for i in range(6)]
    drawing = draw(trace, frames)
    assert [int(cell(drawing, trace, 4 * frame)[0, 0, 0]) for frame in range(3)] == [40, 120, 200]


def test_frames_may_be_an_array_and_titles_count_them():
    trace = traced(Layout.video(3, 2, 2), kept(range(12)))
    video = np.stack([np.full((20, 20, 3), 40 * i, np.uint8) for i in range(6)])
    assert draw(trace, video).tobytes() == draw(trace, [Image.fromarray(frame) for frame in video]).tobytes()
    assert [panel.title for panel in panels(trace.layout, 768, 6)] == ["frames 0-1", "frames 2-3", "frames 4-5"]
    assert [panel.title for panel in panels(trace.layout, 768, 3)] == ["frame 0", "frame 1", "frame 2"]
    assert [panel.title for panel in panels(LAYOUTS["anyres"], 768, 1)] == ["thumbnail", "crops"]


def test_without_a_picture_it_draws_on_grey():
    trace = traced(Layout.grid(2, 2), kept([3]))
    drawing = draw(trace)
    assert cell(drawing, trace, 3).mean() > 200 > 120 > cell(drawing, trace, 0).mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"show": "heat"}, "show='heat' is not one of"),
        ({"show": "scores"}, "ranks no tokens"),
        ({"show": "groups"}, "merges no tokens"),
        ({"layer": 4}, "layer=4: the decoder has layers 0 .. 3"),
        ({"number": 1}, "number=1: the prompt had 1 pictures"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    trace = Trace("random", {}, images=[traced(Layout.grid(2, 2), kept([3]))])
    with pytest.raises(ParameterError, match=message):
        trace.show(GRADIENT, **options)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_a_session_s_trace_draws_saves_and_exports_itself(family, tmp_path):
    model = tiny(family)
    with foveate.attach(model, "divprune", keep=0.5) as session:
        model(**inputs(family, [[3, picture(family, 0), 4]]))
    (trace,) = session.trace.images
    assert trace.centre_crop == (family == "llava")
    drawing = session.trace.show(GRADIENT, width=320)
    assert drawing.mode == "RGBA"
    session.trace.save_image(tmp_path / "a.png", GRADIENT, width=320)
    assert Image.open(tmp_path / "a.png").tobytes() == drawing.tobytes()
    session.trace.save_image(tmp_path / "a.jpg", image=GRADIENT)
    assert Image.open(tmp_path / "a.jpg").mode == "RGB"
    told = json.loads(json.dumps(session.trace.as_json(), allow_nan=False))
    assert told["method"] == "divprune"
    assert told["images"][0]["stages"][0]["kept"] == trace.kept.tolist()
    assert told["images"][0]["tokens"] == trace.layout.size
    assert told["images"][0]["tokens_per_layer"] == trace.tokens_per_layer
