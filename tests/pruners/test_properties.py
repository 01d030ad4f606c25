"""What every method must satisfy, whatever the picture, the layout and the budget."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import BudgetError, FoveateError
from foveate.pruners import PRUNERS, Layout, Pruner, Selection, Tokens, create
from foveate.pruners.core import Keep
from foveate.pruners.core.canvas import canvas_of
from foveate.pruners.core.merging import Merger
from foveate.pruners.core.runs import stretch_ends
from tests.pruners.synthetic import CLIP, QWEN, anyres, first_stage, make_signals, make_tokens, most, one, run

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens")

# mergers inside the tower select rows of blocks, not visual tokens: test_mergers.py
BUDGETED = sorted(name for name, cls in PRUNERS.items() if not issubclass(cls, Merger))
VARIANTS: list[Pruner] = [
    *(create(name) for name in BUDGETED),
    create("random", shuffle=True),
    create("random", layer=2),
    create("grid", variant="stride"),
    create("avgpool", pool="max"),
    create("fopru", strategy="row"),
    create("fopru", reorder=False, score_kind="logits"),
    create("fopru", strategy="row", reorder=False, direction="given"),
    create("hiprune", alpha=1.0),
    create("hiprune", alpha=0.6, buffer="square", border="grid"),
    create("hiprune", alpha=0.3, buffer="row", query_rows="cls"),
    create("todre", diversity="k_center", pivot="random"),
    create("todre", pivot="center", stage2=False),
    create("cdpruner", relevance="none"),
    create("globalcom2", redistribute=True),
    create("pospad:random", count_markers=False, marker="last"),
    create("pospad:visionzip"),
    create("globalcom2", order="official", score="neg_cos"),
    create("visionzip", dominant=2, contextual=2),
    create("quota", assigner="adaptive_avg", cap="official", remainder="largest"),
    create("quota", assigner="linspace", cap="waterfill", remainder="largest"),
    create("quota", assigner="tome", cap="waterfill", remainder="largest"),
    create("transprune", direction="abs", alpha=0.2),
    create("quota", assigner="separable_tome", cap="waterfill"),
]
BUDGETED = [name for name in sorted(PRUNERS) if hasattr(PRUNERS[name], "keep")]
GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))
LAYOUTS = st.one_of(
    GRIDS.map(lambda grid: Layout.grid(*grid)),
    st.builds(lambda frames, grid: Layout.video(frames, *grid), st.integers(2, 4), GRIDS),
    st.builds(
        anyres,
        GRIDS,
        st.lists(st.integers(0, 4), min_size=1, max_size=3),
        st.lists(st.integers(1, 4), min_size=1, max_size=3),
    ),
)
KEEPS = st.one_of(st.integers(1, 40), st.floats(0.01, 1.0))
CASES = {"layout": LAYOUTS, "keep": KEEPS, "batch": st.integers(1, 3), "seed": st.integers(0, 2**16)}


def at(variant: Pruner, keep: object) -> Pruner:
    """The variant at a budget; of a schedule inside the decoder, its only step."""
    if variant.name == "transprune":
        return replace(variant, prune_layers=(2,), ratios=(keep if isinstance(keep, float) else 1 / keep,))
    return replace(variant, **{variant.budget_parameter: keep})


def drawn(variant: Pruner, layout: Layout, batch: int, seed: int) -> Tokens:
    """Tokens for the variant; a smaller picture's features come first, zeros behind them."""
    tokens = make_tokens(layout, batch, seed)
    if variant.name == "downsample":
        tokens.embeds[:, variant.count(layout) :] = 0
    return tokens


def supported(variant: Pruner, layout: Layout) -> bool:
    if getattr(variant, "dominant", None) is not None:  # as many tokens of every view, also without class token
        return all(view.size >= variant.dominant + variant.contextual for view in layout.views if view.size)
    if variant.name.startswith("pospad"):  # a marker for each stretch fits
        return not variant.count_markers or variant.total(layout) >= stretch_ends(layout).sum()
    if variant.name == "globalcom2" and (canvas := canvas_of(layout)):  # of a canvas that fits its crops
        rows, cols = canvas.thumbnail.grid
        fits = all(crop.rows <= rows and crop.cols <= cols for crop in canvas.crops)
        return fits and (canvas.rows == rows * canvas.down or canvas.cols == cols * canvas.across)
    return variant.name != "downsample" or len(layout.views) == 1


CONTENT_DECIDES = ("quota", "globalcom2", "pospad", "todre")


def may_stay_below(pruner: Pruner, layout: Layout) -> bool:
    """Methods whose first selection takes the budget as an upper bound; they pad. ToDRE's second one decides."""
    return pruner.count(layout) is None and pruner.name != "todre"


def check_bounded(selection: Selection, tokens: Tokens, most: int) -> None:
    """The form of a selection that keeps at most ``most`` of ``tokens``, each image another number."""
    padded = selection.index < 0
    for b in range(len(padded)):
        kept = int((~padded[b]).sum())
        assert 1 <= kept <= most
        assert not padded[b, :kept].any(), "padded on the right"
        check(without_padding(selection, b), one(tokens, b), kept)


def without_padding(selection: Selection, b: int) -> Selection:
    """Image ``b`` of a batch, as a batch of one."""
    kept = int((selection.index[b] >= 0).sum())
    cut = {
        name: None if value is None else value[b : b + 1, :kept]
        for name, value in (("index", selection.index), ("values", selection.values))
    }
    if selection.order is not None:  # separators, -1, count
        cut["order"] = selection.order[b : b + 1, selection.order[b] < kept]
    whole = {
        name: None if value is None else value[b : b + 1]
        for name, value in (("owner", selection.owner), ("scores", selection.scores))
    }
    return Selection(**cut, **whole)


def check(selection: Selection, tokens: Tokens, kept: int) -> None:
    """The form of a selection that keeps ``kept`` of ``tokens``."""
    batch, n, d = tokens.embeds.shape
    index = selection.index
    assert index.dtype == torch.int64
    assert index.shape == (batch, kept)
    assert (index >= 0).all()
    assert (index < n).all()
    assert (index.diff(dim=1) > 0).all(), "ascending and unique"
    if selection.values is not None:
        assert selection.values.shape == (batch, kept, d)
        assert selection.values.dtype == tokens.embeds.dtype
    if selection.scores is not None:
        assert selection.scores.shape == (batch, n)
    if selection.order is not None:
        columns = [row[row >= 0].sort().values for row in selection.order]  # the others are separators
        assert all(torch.equal(row, torch.arange(kept)) for row in columns), "a permutation"
    if selection.owner is not None:
        assert selection.owner.shape == (batch, n)
        assert torch.equal(selection.owner.gather(1, index), index), "survivors speak for themselves"
        for b in range(batch):
            assert set(selection.owner[b].tolist()) <= {*index[b].tolist(), -1}, "only survivors speak"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@settings(max_examples=25, deadline=None)
@given(**CASES)
def test_selections_have_the_promised_size_and_form(
    variant: Pruner, layout: Layout, keep: Keep, batch: int, seed: int
) -> None:
    """Statement: exactly ``count(layout)`` tokens survive, at most the stated bound where content decides, and the
    selection is well-formed, on both kinds of tower.
    """
    pruner = at(variant, keep)
    if not supported(pruner, layout):
        return
    tokens = drawn(pruner, layout, batch, seed)
    for model in (CLIP, QWEN):
        try:
            pruner.stages(model)
        except FoveateError:
            assert not model.class_token, "only the missing class token excuses a method"
            continue
        if pruner.stages(model):
            fits = check_bounded if may_stay_below(pruner, layout) else check
            fits(run(pruner, tokens, model, seed), tokens, most(pruner, layout))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@settings(max_examples=10, deadline=None)
@given(**CASES)
def test_a_batch_selects_as_its_images_do_alone(
    variant: Pruner, layout: Layout, keep: Keep, batch: int, seed: int
) -> None:
    """Statement: selecting again gives the same, and no image influences another one."""
    pruner = at(variant, keep)
    if not supported(pruner, layout) or not pruner.stages(CLIP):
        return
    tokens = drawn(pruner, layout, batch, seed)
    stage = first_stage(pruner)
    signals = make_signals(stage, tokens, seed)
    together, again = stage.select(tokens, **signals), stage.select(tokens, **signals)
    assert torch.equal(together.index, again.index)
    for b in range(batch):
        alone = stage.select(one(tokens, b), **{name: s[b : b + 1] for name, s in signals.items()})
        mine = without_padding(together, b)
        assert torch.equal(alone.index, mine.index)
        if together.order is not None:
            assert torch.equal(without_padding(alone, 0).order, mine.order)
        if together.values is not None:
            torch.testing.assert_close(alone.values, mine.values)
        if together.owner is not None:
            assert torch.equal(alone.owner, mine.owner)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@settings(max_examples=10, deadline=None)
@given(grid=GRIDS, keep=KEEPS)
def test_counts_are_known_from_the_layout_alone(variant: Pruner, grid: tuple[int, int], keep: Keep) -> None:
    """Statement: the layout tells the count, or a bound where content decides, which few methods leave to it; both lie
    in 1 .. n, and never exceed an integer budget.
    """
    pruner, layout = at(variant, keep), Layout.grid(*grid)
    if not supported(pruner, layout):
        return
    kept = most(pruner, layout)
    assert pruner.count(layout) is not None or variant.name.partition(":")[0] in CONTENT_DECIDES
    assert int(variant.name != "transprune") <= kept <= layout.size  # which rounds down
    if (
        isinstance(keep, int)
        and hasattr(variant, "keep")
        and getattr(variant, "dominant", None) is None
        and variant.parameters().get("strategy") != "row"
        and variant.parameters().get("count_markers", True)  # markers on top, as published
    ):
        assert kept <= keep


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("layout", [Layout.grid(3, 4), Layout.video(2, 2, 3), anyres((2, 2), [2, 1], [3, 2])], ids=str)
def test_a_full_budget_changes_nothing(variant: Pruner, layout: Layout) -> None:
    """Statement: ``keep >= N`` keeps all tokens with their own embeddings in their own order."""
    if not supported(variant, layout) or getattr(variant, "dominant", None) is not None:
        return
    tokens = make_tokens(layout, 2, 0)
    for keep in (1.0, layout.size, layout.size + 7) if hasattr(variant, "keep") else (1.0,):
        if not at(variant, keep).stages(CLIP):
            continue  # a step that keeps everything is none
        selection = run(at(variant, keep), tokens)
        assert torch.equal(selection.index, torch.arange(layout.size).expand(2, -1))
        assert selection.values is None
        assert selection.order is None


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("keep", [0, -3, 0.0, -0.5, 1.5, float("nan"), float("inf"), True, "half", None])
def test_impossible_budgets_are_refused(name: str, keep: object) -> None:
    """Statement: a budget that no sequence can meet is refused when the method is configured, with the value named."""
    with pytest.raises(BudgetError, match=str(keep)):
        create(name, keep=keep)


@pytest.mark.parametrize("name", BUDGETED)
def test_budgets_above_the_image_are_said(name: str) -> None:
    """Statement: an integer budget larger than the image is capped with a warning, a fitting one says nothing."""
    with pytest.warns(UserWarning, match="exceeds the 12"):
        assert most(create(name, keep=13), Layout.grid(3, 4)) == 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        most(create(name, keep=8), Layout.grid(3, 4))


@pytest.mark.parametrize("name", BUDGETED)
def test_low_precision_tokens_are_selected_in_float32(name: str) -> None:
    """Statement: bfloat16 tokens are judged like the same values in float32, merged values come back in bfloat16."""
    layout = Layout.grid(5, 5)
    pruner = create(name, keep=6)
    tokens = make_tokens(layout, 2, 3)
    tokens.project = lambda features: torch.cat([features, features[..., :1]], dim=-1)
    tokens.embeds, tokens.instruction = tokens.embeds.bfloat16(), tokens.instruction.bfloat16()
    if name == "downsample":
        tokens.embeds[:, 6:] = 0
    exact = replace(tokens, embeds=tokens.embeds.float(), instruction=tokens.instruction.float())
    low, high = run(pruner, tokens), run(pruner, exact)
    assert torch.equal(low.index, high.index)
    assert low.values is None or low.values.dtype == torch.bfloat16


@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_what_is_listed_is_filled_in(name: str) -> None:
    """Statement: every method states its title, source, cost and families."""
    cls = PRUNERS[name]
    assert all([cls.title, cls.paper, cls.cost, cls.families])
    assert cls.name == name
