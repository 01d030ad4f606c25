"""FocusUI: budgets, whose instruction is read, where the scorer comes from, pixels under tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import foveate
from foveate.errors import InputError, MissingSignalError, ParameterError
from foveate.pruners import FocusUI, Layout, ModelInfo, Tokens
from foveate.pruners.core import AtEntry, Pruner, Selection, Stage
from foveate.pruners.core.patch_scorer import PatchScorer, save_scorer
from foveate.pruners.core.selection import keep_all
from foveate.pruners.core.signals import PatchPixels
from foveate.pruners.core.ui_graph import image_blocks, ui_graph
from foveate.pruners.focusui import SCORER_FILE, instruction_words, relevance
from tests.models import FAMILIES, PATCH, SIDE, VIDEO_FAMILIES, inputs, picture, tiny
from tests.pruners.synthetic import QWEN, make_tokens
from tests.test_oracles import check_against_masking, scene_inputs

WIDTH = 32
pytestmark = pytest.mark.filterwarnings("ignore:focusui. this")


@pytest.fixture
def scorer() -> PatchScorer:
    torch.manual_seed(0)
    return PatchScorer(WIDTH).eval()


def make(layout: Layout, batch: int = 2, width: int = WIDTH) -> Tokens:
    g = torch.Generator().manual_seed(0)
    tokens = make_tokens(layout, batch, 0, text=5)
    tokens.embeds = torch.randn(batch, layout.size, width, generator=g)
    tokens.instruction = torch.randn(batch, 5, width, generator=g)
    return tokens


# --------------------------------------------------------------------------------------------------------- budgets


def test_both_namings_of_the_budget() -> None:
    """Statement: ``keep`` is floored with a whisker, ``reduct`` truncates as released and leaves ``min_keep``."""
    assert FocusUI(keep=0.1).count(Layout.grid(1, 1000)) == 100
    assert FocusUI(reduct=0.9).count(Layout.grid(1, 1000)) == 99  # 1 - 0.9 is a little less than a tenth
    assert FocusUI(reduct=0.9).count(Layout.grid(1, 10)) == 1
    assert FocusUI(reduct=0.9, min_keep=0).count(Layout.grid(1, 10)) == 0
    assert FocusUI(reduct=0.0).count(Layout.grid(1, 10)) == FocusUI(reduct=-1.0).count(Layout.grid(1, 10)) == 10
    assert FocusUI(keep=0.29).count(Layout.grid(1, 100)) == 29
    assert FocusUI(keep=0.001).count(Layout.grid(1, 100)) == 1
    assert FocusUI(keep=7).count(Layout.grid(1, 100)) == 7
    assert FocusUI(keep=0.5).budgets(Layout.video(3, 1, 3)) == (4,)


@pytest.mark.parametrize(
    "wrong",
    [
        {"reduct": 1.5},
        {"min_keep": -1},
        {"pooling": "sum"},
        {"threshold": 0.0},
        {"mode": "cubic"},
        {"deepstack": "two"},
    ],
    ids=str,
)
def test_wrong_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=str(next(iter(wrong.values())))):
        FocusUI(**wrong)


# ----------------------------------------------------------------------------------------------------------- scores


def test_the_best_scores_stay(scorer: PatchScorer) -> None:
    """Statement: the K highest relevances, the earlier of equals, whatever the width of the batch's text."""
    layout = Layout.grid(4, 5)
    tokens, method = make(layout), FocusUI(keep=0.3, scorer=scorer)
    (stage,) = method.stages(QWEN)
    assert stage.reads_text
    assert (stage.positions, dict(stage.signals)) == ("keep", {})
    chosen = stage.select(tokens)
    expected = relevance(scorer, tokens, {})
    for b in range(2):
        assert set(chosen.index[b].tolist()) == set(expected[b].topk(6).indices.tolist())
    assert torch.equal(chosen.scores, expected)
    flat = method.choose(tokens, 6, torch.tensor([[0.5] * 20, [float("nan")] * 19 + [0.1]]))
    assert flat.index.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 19]]


def test_only_words_of_the_instruction_are_read(scorer: PatchScorer) -> None:
    """Statement: special tokens, padding, and all from the first end of turn on leave the scores as they are."""
    tokens = make(Layout.grid(2, 3), 1)
    ids = {"eos": (7,), "vision_end": (8,), "pad": (0,)}
    tokens.instruction_ids = torch.tensor([[8, 21, 22, 7, 33]])
    assert instruction_words(tokens, ids).tolist() == [[False, True, True, False, False]]
    scores = relevance(scorer, tokens, ids)
    changed = tokens.instruction.clone()
    changed[:, [0, 3, 4]] *= -3
    torch.testing.assert_close(
        relevance(
            scorer,
            Tokens(tokens.embeds, tokens.layout, (), changed, tokens.instruction_mask, tokens.instruction_ids),
            ids,
        ),
        scores,
    )
    tokens.instruction_ids = torch.tensor([[7, 8, 21, 22, 23]])  # an end in front of the words ends nothing
    assert instruction_words(tokens, ids).tolist() == [[False, False, True, True, True]]
    pooled = relevance(scorer, tokens, ids, "max")
    assert (pooled >= relevance(scorer, tokens, ids)).all()


def test_a_prompt_without_instruction_is_refused(scorer: PatchScorer) -> None:
    """Statement: nothing is kept or dropped silently; also in a model, which stays usable."""
    tokens = make(Layout.grid(2, 3), 1)
    tokens.instruction_mask = torch.zeros_like(tokens.instruction_mask)
    with pytest.raises(InputError, match="no instruction"):
        relevance(scorer, tokens, {})
    model = tiny("qwen2_5_vl")
    given = inputs("qwen2_5_vl", [[5, picture("qwen2_5_vl", 1)]])
    with foveate.attach(model, FocusUI(keep=0.5, scorer=scorer)), pytest.raises(InputError, match="scorer='uigraph'"):
        model(**given)
    assert torch.isfinite(model(**given).logits).all()


def test_a_scorer_of_another_model_is_refused(scorer: PatchScorer) -> None:
    with pytest.raises(MissingSignalError, match="reads embeddings of 32 channels, this model's have 48"):
        relevance(scorer, make(Layout.grid(2, 3), 1, 48), {})


# ------------------------------------------------------------------------------------------------ where it comes from


def test_the_scorer_beside_the_weights_is_found(scorer: PatchScorer, tmp_path: Path) -> None:
    """Statement: by default the model's own scorer, then the UI graph with a warning; a file or folder by name; both by
    word.
    """
    model = ModelInfo(family="qwen2_5_vl", token_ids={"eos": (1,)})
    with pytest.warns(UserWarning, match="without a patch scorer"):
        assert FocusUI().stages(model)[0].signals == {"pixels": PatchPixels()}
    assert FocusUI(scorer="uigraph").stages(model)[0].signals == {"pixels": PatchPixels()}
    save_scorer(scorer, tmp_path / SCORER_FILE)
    beside = ModelInfo(family="qwen2_5_vl", find_file=lambda name: str(tmp_path / name))
    tokens = make(Layout.grid(3, 3))
    expected = FocusUI(scorer=scorer).stages(QWEN)[0].select(tokens).index
    for method, info in (
        (FocusUI(), beside),
        (FocusUI(scorer=tmp_path / SCORER_FILE), QWEN),
        (FocusUI(scorer=str(tmp_path)), QWEN),
    ):
        assert torch.equal(method.stages(info)[0].select(tokens).index, expected)
    with pytest.raises(ParameterError, match=r"absent\.safetensors"):
        FocusUI(scorer="absent.safetensors").stages(QWEN)


def test_a_saved_model_brings_its_scorer_and_normalisation(scorer: PatchScorer, tmp_path: Path) -> None:
    """Statement: files beside the weights of a loaded model are found by the adapter, without asking the network."""
    from transformers import AutoModelForImageTextToText

    tiny("qwen2_5_vl").save_pretrained(tmp_path)
    save_scorer(scorer, tmp_path / SCORER_FILE)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    given = scene_inputs("qwen2_5_vl", "single")
    with foveate.attach(model, "focusui", keep=0.4) as session, torch.no_grad():
        assert session.adapter.normalisation() == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        model(**given)
        found = session.trace.images[0].kept
    with foveate.attach(model, FocusUI(keep=0.4, scorer=scorer)) as session, torch.no_grad():
        model(**given)
        assert torch.equal(session.trace.images[0].kept, found)
    assert tiny("llava_onevision") is not None
    with foveate.attach(tiny("llava_onevision"), FocusUI(scorer="uigraph")) as session:
        assert session.adapter.normalisation() == ((0.5,) * 3, (0.5,) * 3)


# ----------------------------------------------------------------------------------------------------------- pixels


class Probe(Pruner):
    """Writes down the pixels it is shown."""

    name = "probe"
    seen: Any = None

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        def select(tokens: Tokens, pixels: Tensor) -> Selection:
            object.__setattr__(self, "seen", pixels)
            return keep_all(tokens)

        return (AtEntry(select, {"pixels": PatchPixels()}),)


def screenshot(height: int, width: int) -> Image.Image:
    g = np.random.default_rng(0)
    colours = g.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(8, 0).repeat(8, 1))


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_pixels_of_packed_families_are_those_under_the_token(family: str) -> None:
    """Statement: what the processor cut up comes back in [0, 1] in raster order, twice in time, and gives the same UI
    graph.
    """
    from transformers import Qwen2VLImageProcessorFast

    own = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if family == "qwen3_vl" else {}
    processor = Qwen2VLImageProcessorFast(patch_size=PATCH, min_pixels=1, max_pixels=10**6, **own)
    image = screenshot(64, 96)
    given = processor(image, return_tensors="pt")
    model, probe = tiny(family), Probe()
    text = inputs(family, [[3, picture(family, 1, (4, 6)), 4]])
    with foveate.attach(model, probe):
        model(**{**text, "pixel_values": given["pixel_values"], "image_grid_thw": given["image_grid_thw"]})
    blocks, layout = image_blocks(torch.from_numpy(np.array(image)), 2 * PATCH)
    assert probe.seen.shape == (1, 24, 3, 2, 4 * PATCH, PATCH)
    for t in range(2):  # the same pixels, in another order inside the token
        torch.testing.assert_close(
            probe.seen[:, :, :, t].flatten(3).sort(-1).values, blocks.flatten(3).sort(-1).values, atol=1e-5, rtol=0
        )
    torch.testing.assert_close(ui_graph(probe.seen, layout, 15.0), ui_graph(blocks, layout, 15.0))
    assert ui_graph(blocks, layout, 15.0).unique().numel() > 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_pixels_of_views_lie_where_their_tokens_do(family: str) -> None:
    """Statement: in the layout's order, padding left out: a view whose patches are numbered shows every token its
    number.
    """
    model, probe = tiny(family), Probe()
    given = inputs(family, [[3, picture(family, 1), 4]])
    side = SIDE // PATCH
    views = given["pixel_values"].flatten(0, -4)
    numbers = torch.arange(len(views) * side * side, dtype=torch.float32).view(-1, 1, side, side) / 1000
    mean, std = (0.5, 0.5) if family == "llava_onevision" else (None, None)
    with foveate.attach(model, probe) as session:
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in session.adapter.normalisation())
        pixels = numbers.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3).expand(-1, 3, -1, -1)
        model(**{**given, "pixel_values": ((pixels - mean) / std).view(given["pixel_values"].shape)})
        layout = session.trace.images[0].layout
    seen = probe.seen[0, :, :, 0].mean(dim=(1, 2, 3)) * 1000
    for v, view in enumerate(layout.views):
        mine = seen[view.tokens()].round().view(view.grid)
        assert (mine // side**2 == v).all()
        assert (mine.diff(dim=1) == 1).all()
        assert (mine.diff(dim=0) == side).all()


# ----------------------------------------------------------------------------------------------------------- models


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by", ["scorer", "uigraph"])
def test_runs_on_every_family(scorer: PatchScorer, family: str, by: str) -> None:
    """Statement: single, batched and video prompts keep the stated number of tokens, each as it does alone."""
    model = tiny(family)
    method = FocusUI(keep=0.4, scorer=scorer if by == "scorer" else "uigraph", threshold=20.0)
    scenes = ["padded", "several", *(["video"] if family in VIDEO_FAMILIES else [])]
    for scene in scenes:
        with foveate.attach(model, method) as session:
            model(**scene_inputs(family, scene))
            for image in session.trace.images:
                assert len(image.kept) == method.count(image.layout) < image.layout.size


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_pruned_equals_masked(scorer: PatchScorer, family: str) -> None:
    check_against_masking(family, "sdpa", "padded", FocusUI(keep=0.4, scorer=scorer))
