"""GlobalCom²: budgets of crops, exact totals, layouts of every shape, orders of emission, several pictures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveate
from foveate.adapters.families.anyres import anyres as _anyres
from foveate.errors import FoveateError, InputError, MissingSignalError, ParameterError
from foveate.pruners import GlobalCom2, Layout, ModelInfo, Selection
from foveate.pruners.core.canvas import canvas_of
from foveate.pruners.core.signals import ClassAttention, EncoderFeatures
from foveate.pruners.globalcom2 import apportion, crop_ratios, distinctness, richness, token_score
from tests.models import PINPOINTS, SIDE, inputs, picture, tiny
from tests.pruners.synthetic import CLIP, QWEN, anyres, make_tokens, most
from tests.test_oracles import check_against_masking

SIZES = [(60, 60), (60, 40), (40, 60), (20, 90), (90, 20), (33, 100), (64, 64), (31, 64), (100, 12), (7, 200)]
CANVASES = [*map(tuple, PINPOINTS), (32, 128), (128, 32), (96, 96)]


def layout_of(height: int, width: int, side: int = 6) -> Layout:
    return _anyres(height, width, tuple(CANVASES), SIDE, side, None)


def run(pruner: GlobalCom2, layout: Layout, attention: Tensor) -> Selection:
    (stage,) = pruner.stages(CLIP)
    return stage.select(make_tokens(layout, len(attention), 0), attention=attention)


def logits(layout: Layout, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, layout.size, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------- budgets


def test_ratios_follow_the_formula() -> None:
    """Statement: shares are a softmax at the temperature, ratios average R, lie in its known range, and end at 1."""
    z = torch.tensor([[0.0, 10.0, 20.0, 5.0], [1000.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]], dtype=torch.float64)
    ratios = crop_ratios(z, 0.25)
    torch.testing.assert_close(ratios[0], 0.25 * (0.75 + (z[0] / 10).softmax(0)), atol=1e-7, rtol=0)
    assert ratios[1, 0] < 0.25 * (2 - 1 / 4) < ratios[1, 0] + 1e-8  # saturated, and just below
    torch.testing.assert_close(ratios[2], torch.full((4,), 0.25, dtype=torch.float64))
    assert crop_ratios(z, 0.9)[1].tolist()[0] == 1.0


def test_regions_give_rest_rows_to_the_last() -> None:
    """Statement: a 7 x 7 thumbnail over 3 x 2 crops has regions of 2, 2, 3 rows and 3, 4 columns."""
    canvas = canvas_of(anyres((7, 7), [7, 7, 7], [7, 7]))
    assert (canvas.down, canvas.across) == (3, 2)
    z = richness(torch.ones(1, 49), canvas)
    assert z.tolist() == [[6.0, 8.0, 6.0, 8.0, 9.0, 12.0]]


@pytest.mark.parametrize("size", SIZES[:-1], ids=str)
@pytest.mark.parametrize("keep", [0.05, 0.25, 0.6, 0.97, 1, 37])
def test_exact_budgets_are_met(size: tuple[int, int], keep: float | int) -> None:
    """Statement: with ``redistribute``, or a number of tokens, exactly the budget survives, whatever the picture."""
    layout = layout_of(*size)
    pruner = GlobalCom2(keep=keep, redistribute=True)
    asked = keep if isinstance(keep, int) else max(1, round(keep * layout.size))
    assert pruner.count(layout) == asked
    for scale in (0.1, 30.0):  # even crops, and one that takes all
        assert run(pruner, layout, scale * logits(layout)).index.shape == (2, asked)


@pytest.mark.parametrize("size", SIZES[:-1], ids=str)
def test_published_floors_stay_below_the_stated_bound(size: tuple[int, int]) -> None:
    """Statement: thumbnail ``int(N R)``, each crop ``int(n r)``, in all never more than stated; the count says so."""
    layout, pruner = layout_of(*size), GlobalCom2(keep=0.3)
    assert pruner.count(layout) is None
    crops = [view.size for view in layout.views[1:]]
    for seed, scale in enumerate((0.1, 1.0, 30.0)):
        attention = scale * logits(layout, seed=seed)
        index = run(pruner, layout, attention).index
        canvas = canvas_of(layout)
        ratios = crop_ratios(richness(attention[:, :36], canvas), 0.3)
        for b in range(2):
            mine = index[b][index[b] >= 0]
            assert int((mine < 36).sum()) == int(36 * 0.3)
            for tokens, n, r in zip((view.tokens() for view in canvas.crops), crops, ratios[b]):
                assert int(torch.isin(mine, tokens).sum()) == int(n * r.item())
            assert len(mine) <= most(pruner, layout)


def test_apportioning_is_proportional_capped_and_exact() -> None:
    """Statement: quotas follow the weights, what a part cannot hold goes to others, remainders decide the rest."""
    weights = torch.tensor([[1.0, 1.0, 2.0], [10.0, 1.0, 1.0], [0.0, 0.0, 5.0]], dtype=torch.float64)
    most = torch.tensor([4.0, 4.0, 9.0], dtype=torch.float64)
    assert apportion(weights, 8, most).tolist() == [[2, 2, 4], [4, 2, 2], [0, 0, 8]]
    assert apportion(weights, 7, most).tolist()[0] == [2, 2, 3]
    assert apportion(weights[:2], 17, most).tolist() == [[4, 4, 9]] * 2
    assert apportion(weights[:2], 0, most).tolist() == [[0, 0, 0]] * 2


def test_tiny_budgets_leave_something() -> None:
    """Statement: where R N < 1 the thumbnail keeps nothing, crops may, and no picture is left without any token."""
    layout = layout_of(60, 60)
    index = run(GlobalCom2(keep=0.004), layout, logits(layout)).index
    assert (index >= 0).sum(dim=1).tolist() == [1, 1]
    rich = run(GlobalCom2(keep=0.02), layout, 30 * logits(layout)).index
    assert (rich >= 36).any(), "a saturated crop keeps a token"
    assert ((rich >= 0) & (rich < 36)).sum() == 0, "R N < 1"


def test_everything_is_kept_at_ratio_one() -> None:
    """Statement: the formula would drop tokens of poor crops at R = 1; the method keeps all, in order."""
    layout = layout_of(60, 40)
    for keep in (1.0, layout.size):
        assert torch.equal(run(GlobalCom2(keep=keep), layout, logits(layout)).index[0], torch.arange(layout.size))


# ----------------------------------------------------------------------------------------------------------- scores


def test_alpha_weighs_the_thumbnail() -> None:
    """Statement: at 0.5 the plain sum of the unit vectors; at 0 and 1 only one of them ranks."""
    crop, overview = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(token_score(crop, overview), torch.tensor([[0.6, 1.8]]))
    torch.testing.assert_close(token_score(crop, overview, 0.0), torch.tensor([[1.2, 1.6]]))
    torch.testing.assert_close(token_score(crop, overview, 1.0), torch.tensor([[0.0, 2.0]]))
    assert torch.isfinite(token_score(torch.zeros(1, 2), torch.zeros(1, 2))).all()


def test_towers_without_class_token_score_by_distinctness() -> None:
    """Statement: the negative cosine with the mean token of the same view, one view never touching another."""
    assert isinstance(GlobalCom2().stages(CLIP)[0].signals["attention"], ClassAttention)
    assert isinstance(GlobalCom2().stages(QWEN)[0].signals["features"], EncoderFeatures)
    with pytest.raises(MissingSignalError, match="neg_cos"):
        GlobalCom2(score="cls_logits").stages(QWEN)
    layout = Layout.video(2, 1, 2)
    x = torch.tensor([[[1.0, 0], [0, 1], [5, 0], [5, 0]]])
    torch.testing.assert_close(distinctness(x, layout), torch.tensor([[-(0.5**0.5), -(0.5**0.5), -1, -1]]))
    (stage,) = GlobalCom2(keep=1).stages(QWEN)
    picked = stage.select(make_tokens(layout, 1, 0), features=x)
    assert picked.index.tolist() == [[0]]


def test_logits_are_read_where_asked() -> None:
    (stage,) = GlobalCom2(score="cls_softmax").stages(ModelInfo(encoder_layers=12))
    assert stage.signals["attention"] == ClassAttention(11)
    (stage,) = GlobalCom2().stages(ModelInfo(encoder_layers=12))
    assert stage.signals["attention"] == ClassAttention(11, logits=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"alpha": 1.5},
        {"score": "attention"},
        {"order": "raster"},
        {"newline": "some"},
        {"order": "official", "newline": "valid"},
    ],
    ids=str,
)
def test_wrong_parameters_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match=str(next(iter(wrong.values())) if len(wrong) == 1 else "official")):
        GlobalCom2(**wrong)


# ---------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("size", SIZES[:-1], ids=str)
def test_the_canvas_is_read_off_the_layout(size: tuple[int, int]) -> None:
    """Statement: crops down and across as the model chose them, and the padding above the picture."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    down, across = get_anyres_image_grid_shape(size, [list(c) for c in CANVASES], SIDE)
    canvas = canvas_of(layout_of(*size))
    assert (canvas.down, canvas.across) == (down, across)
    rows = torch.arange(down * 6)[:, None].expand(-1, across * 6)[None]
    valid = unpad_image(rows, size)[0]
    assert (canvas.rows, canvas.cols, canvas.top) == (*valid.shape, int(valid[0, 0]))


def test_vanished_crops_take_nothing() -> None:
    """Statement: a crop that unpadding removes has no tokens and no share; its neighbours are cut where they lie."""
    layout = anyres((4, 4), [0, 4, 0], [4, 4])
    canvas = canvas_of(layout)
    assert (canvas.down, canvas.across, canvas.rows, canvas.cols) == (3, 2, 4, 8)
    index = run(GlobalCom2(keep=0.5, redistribute=True), layout, logits(layout)).index
    assert index.shape == (2, 24)
    hair = layout_of(*SIZES[-1])
    assert canvas_of(hair) is None, "no row of the canvas is valid: the thumbnail is all there is"
    assert run(GlobalCom2(keep=0.5), hair, logits(hair)).index.shape == (2, 18)
    sideways = canvas_of(anyres((4, 4), [4, 4], [0, 4, 0]))
    assert (sideways.down, sideways.across, sideways.cols) == (2, 3, 4)


def test_shrunk_canvases_are_refused() -> None:
    """Statement: where the model scales the canvas down, tokens belong to no crop; the message says what to do."""
    layout = _anyres(96, 96, ((96, 96),), SIDE, 6, 4)
    with pytest.raises(InputError, match=r"18 x 18 tokens to 12 x 12.*smaller picture"):
        run(GlobalCom2(), layout, logits(layout))


def test_single_views() -> None:
    """Statement: without crops the best int(N R) of every view stay, or everything, as in the released code."""
    layout, attention = Layout.grid(4, 4), torch.arange(32.0).view(2, 16)
    assert run(GlobalCom2(keep=0.2), layout, attention).index.tolist() == [[13, 14, 15]] * 2
    whole = GlobalCom2(keep=0.2, compress_single=False)
    assert whole.count(layout) == 16
    assert run(whole, layout, attention).index.shape == (2, 16)
    frames = Layout.video(3, 2, 2)
    assert run(GlobalCom2(keep=0.5), frames, logits(frames)).index.shape == (2, 6)


# ----------------------------------------------------------------------------------------------------------- models


def entering(model: torch.nn.Module, given: dict[str, Tensor], pruner: GlobalCom2 | None) -> tuple[Tensor, object]:
    """What the decoder is fed: embeddings ``(1, L', D)``, and the trace."""
    seen: list[Tensor] = []

    def note(module: object, args: object, kwargs: dict[str, Tensor]) -> None:
        seen.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    session = foveate.attach(model, pruner) if pruner else None
    handle = model.model.language_model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    model(**given)
    handle.remove()
    trace = session.trace if session else None
    if session:
        session.detach()
    return seen[0], trace


@torch.no_grad()
@pytest.mark.parametrize("size", [(60, 40), (40, 60), (60, 60), (20, 90)], ids=str)
@pytest.mark.parametrize("order", ["spatial", "all", "official"])
def test_the_decoder_sees_tokens_and_newlines_in_the_stated_order(size: tuple[int, int], order: str) -> None:
    """Statement: kept tokens with their own embeddings in the method's order, a newline behind every row it closes."""
    model = tiny("llava_next")
    given = inputs("llava_next", [[3, picture("llava_next", 1, size), 4]])
    bare, _ = entering(model, given, None)
    options = {"spatial": {}, "all": {"newline": "all"}, "official": {"order": "official"}}[order]
    pruner = GlobalCom2(keep=0.3, **options)
    fed, trace = entering(model, given, pruner)
    layout = trace.images[0].layout
    canvas, visual = canvas_of(layout), bare[0, 3:-4]
    newline = visual[layout.newlines[0].place]
    tokens = visual[layout.places()]
    kept = trace.images[0].kept
    thumbnail, crops = kept[kept < 16], kept[kept >= 16]
    row = (crops - 16) // canvas.cols
    if order == "official":
        assert trace.tokens_per_layer[0] == len(kept) + canvas.down * 4
        assert sorted(map(tuple, fed[0, 3:-4].tolist())) == sorted(
            map(tuple, [*tokens[kept].tolist(), *[newline.tolist()] * (canvas.down * 4)])
        )
        assert trace.images[0].scores[thumbnail].diff().any()
        first = trace.images[0].scores[:16].argsort(descending=True)[: len(thumbnail)]
        assert torch.equal(fed[0, 3 : 3 + len(thumbnail)], tokens[first])
        return
    top = 0 if order == "spatial" else canvas.top
    rows = canvas.rows if order == "spatial" else canvas.down * 4
    expected = [tokens[thumbnail]]
    for r in range(rows):
        expected += [tokens[crops[row + top == r]], newline[None]]
    expected = torch.cat(expected)
    assert torch.equal(fed[0, 3:-4], expected)
    assert trace.tokens_per_layer[0] == len(expected)


@torch.no_grad()
def test_several_pictures_have_each_their_own_thumbnail() -> None:
    """Statement: in a prompt of two pictures, and in a batch, each is pruned as it is alone."""
    model, pruner = tiny("llava_next"), GlobalCom2(keep=0.3)
    sizes = [(60, 40), (30, 60), (20, 90)]
    pictures = [picture("llava_next", i, size) for i, size in enumerate(sizes)]
    alone = []
    for one in pictures:
        with foveate.attach(model, pruner) as session:
            model(**inputs("llava_next", [[3, one, 4]]))
            alone.append(session.trace.images[0].kept)
    together = inputs("llava_next", [[3, pictures[0], 2, pictures[1], 4], [5, pictures[2], 6]])
    with foveate.attach(model, pruner) as session:
        model(**together)
        for found, expected in zip(session.trace.images, alone):
            assert torch.equal(found.kept, expected)


@torch.no_grad()
def test_class_logits_are_those_of_the_last_block() -> None:
    """Statement: mean over heads of q_cls . k / sqrt(d) before the softmax, class column dropped, in the layout's
    order.
    """
    model, seen = tiny("llava_next"), {}
    attention = model.model.vision_tower.encoder.layers[-1].self_attn
    handles = [
        getattr(attention, f"{name}_proj").register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        for name in "qk"
    ]
    with foveate.attach(model, GlobalCom2(keep=0.3)) as session:
        model(**inputs("llava_next", [[3, picture("llava_next", 1, (60, 40)), 4]]))
    for handle in handles:
        handle.remove()
    q, k = (seen[name].unflatten(-1, (attention.num_heads, -1)) for name in "qk")
    expected = (torch.einsum("vhd,vnhd->vhn", q[:, 0], k[:, 1:]) * attention.scale).mean(dim=1)
    scores, canvas = session.trace.images[0].scores, canvas_of(session.trace.images[0].layout)
    torch.testing.assert_close(scores[:16], expected[0], atol=1e-5, rtol=1e-4)
    valid = expected[1:].view(canvas.down, canvas.across, 4, 4).transpose(1, 2).reshape(canvas.down * 4, -1)
    left = (canvas.across * 4 - canvas.cols) // 2
    valid = valid[canvas.top : canvas.top + canvas.rows, left : left + canvas.cols]
    torch.testing.assert_close(scores[16:], valid.flatten(), atol=1e-5, rtol=1e-4)


def test_pruned_equals_masked() -> None:
    """Statement: the oracle of entry pruning holds for towers without class token, too."""
    check_against_masking("llava_onevision", "sdpa", "several", GlobalCom2(keep=0.4))


@torch.no_grad()
def test_official_order_that_does_not_fit_is_said() -> None:
    """Statement: more newlines than free places are an error that names both, and the model stays usable."""
    model = tiny("llava_next")
    given = inputs("llava_next", [[3, picture("llava_next", 1, (10, 90)), 4]])  # 2 of 4 canvas rows are padding
    with foveate.attach(model, GlobalCom2(keep=39, order="official")), pytest.raises(FoveateError, match="separators"):
        model(**given)
    assert torch.isfinite(model(**given).logits).all()
