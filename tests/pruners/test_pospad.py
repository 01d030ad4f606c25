"""PosPad: runs, markers, budgets that count them, and what a model sees."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.errors import BudgetError, FoveateError, MissingSignalError, ParameterError, UnknownNameError
from foveate.eval_suites.running.runner import parse_methods
from foveate.pruners import (
    DivPrune,
    FastV,
    FocusUI,
    Layout,
    ModelInfo,
    PosPad,
    Random,
    Selection,
    Then,
    Tokens,
    create,
)
from foveate.pruners.core.runs import stretch_ends
from tests.models import FAMILIES, VIDEO_FAMILIES, inputs, picture, tiny
from tests.pruners.synthetic import CLIP, QWEN, STRETCHES, make_signals, make_tokens, most, runs_by_hand
from tests.test_oracles import dropped_places, greedy_by_masking, masked_logits, rope_positions, scene_inputs

pytestmark = pytest.mark.filterwarnings("ignore:pospad. this", "ignore:focusui. this")
# ---------------------------------------------------------------------------------------------------------- markers


def padded(method: PosPad, tokens: Tokens, model: ModelInfo = QWEN, **signals: Tensor) -> Selection:
    (stage,) = method.stages(model)
    return stage.select(tokens, **(signals or make_signals(stage, tokens, 0)))


@pytest.mark.parametrize("layout", STRETCHES, ids=str)
@pytest.mark.parametrize("placement", ["end", "first", "middle", "full", "none"])
def test_markers_stand_in_their_seats(layout: Layout, placement: str) -> None:
    """Statement: survivors of the inner method with their own embeddings, and for each run the mean of what it was."""
    tokens, inner = make_tokens(layout, 3, 1), Random(keep=0.5, seed=3)
    plain = inner.stages(QWEN)[0].select(tokens)
    chosen = padded(PosPad(inner, count_markers=False, placement=placement), tokens)
    for b in range(3):
        kept = set(plain.index[b].tolist())
        seats: dict[int, Tensor] = {}
        for run in runs_by_hand([i not in kept for i in range(layout.size)], layout):
            mean = tokens.embeds[b, run].mean(dim=0)
            where = {"end": run[-1:], "first": run[:1], "middle": [(run[0] + run[-1]) // 2], "full": run, "none": []}
            seats |= dict.fromkeys(where[placement], mean)
            if placement in ("end", "first", "middle"):
                assert set(chosen.owner[b, run].tolist()) == set(where[placement])
        index = chosen.index[b][chosen.index[b] >= 0].tolist()
        assert index == sorted(kept | set(seats))
        if placement == "none":
            assert chosen.values is None
            continue
        assert chosen.markers[b].nonzero()[:, 0].tolist() == sorted(seats)
        for slot, value in zip(index, chosen.values[b]):
            if slot in kept:
                assert torch.equal(value, tokens.embeds[b, slot])
            else:
                torch.testing.assert_close(value, seats[slot])


def test_kinds_of_markers() -> None:
    """Statement: which vector each name means; the last token is left as it is."""
    tokens, table = make_tokens(Layout.grid(3, 4), 2, 1), torch.nn.Embedding(20, 6)
    tokens.embed = table
    info = ModelInfo(token_ids={"image_drop_end": (7,), "pad": (3,), "bos": (5,)})
    inner = Random(keep=0.4, seed=1)

    def marks(marker: Any, info: ModelInfo = info, **more: Any) -> Tensor:
        chosen = padded(PosPad(inner, marker=marker, count_markers=False, **more), tokens, info)
        return chosen.values[0][chosen.markers[0].gather(0, chosen.index[0].clamp(min=0)) & (chosen.index[0] >= 0)]

    vector = torch.randn(6)
    for found, expected in (
        (marks("trained"), table.weight[7]),
        (marks(None), table.weight[7]),
        (marks("pad"), table.weight[3]),
        (marks("pad", ModelInfo(token_ids={"bos": (5,)})), table.weight[5]),
        (marks("mean_vocab"), table.weight.mean(dim=0)),
        (marks("mean_vocab", vocab=4), table.weight[:4].mean(dim=0)),
        (marks(vector), vector),
    ):
        assert len(found)
        torch.testing.assert_close(found, expected.expand_as(found))
    mean = marks(None, ModelInfo())  # of the run
    assert not torch.equal(mean, table.weight[7].expand_as(mean))
    last = padded(PosPad(inner, marker="last", count_markers=False), tokens)
    assert last.values is None
    assert last.markers.any()


def test_deepstack_features_follow_the_marker() -> None:
    """Statement: of a mean the mean, of a foreign vector nothing, of the last token its own; survivors keep theirs."""
    tokens, level = make_tokens(Layout.grid(2, 5), 2, 1), torch.randn(10, 4)
    inner = Random(keep=0.4, seed=1)
    for marker in ("run_mean", torch.zeros(6)):
        chosen = padded(PosPad(inner, marker=marker, count_markers=False), tokens)
        for b in range(2):
            index = chosen.index[b][chosen.index[b] >= 0]
            found = chosen.resample[b](level)
            kept = ~chosen.markers[b, index]
            assert torch.equal(found[kept], level[index[kept]])
            seats = {
                run[-1]: run
                for run in runs_by_hand((~torch.isin(torch.arange(10), index[kept])).tolist(), tokens.layout)
            }
            for slot, features in zip(index[~kept].tolist(), found[~kept]):
                expected = level[seats[slot]].mean(dim=0) if isinstance(marker, str) else torch.zeros(4)
                torch.testing.assert_close(features, expected)
    assert padded(PosPad(inner, marker="last", count_markers=False), tokens).resample is None


# ---------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("layout", STRETCHES, ids=str)
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("inner", [FocusUI(scorer="uigraph"), Random(), DivPrune()], ids=["ranked", "random", "greedy"])
def test_counted_markers_fit_the_budget_and_fill_it(layout: Layout, keep: float, inner: foveate.pruners.Pruner) -> None:
    """Statement: survivors and markers together stay within the inner method's budget; of nested choices one more would
    not.
    """
    method, tokens = PosPad(inner, keep=keep), make_tokens(layout, 3, 5)
    (stage,) = method.stages(QWEN)
    signals = make_signals(stage, tokens, 5)
    total = method.inner.count(layout)
    if int(stretch_ends(layout).sum()) > total:
        with pytest.raises(BudgetError, match="separate stretches"):
            stage.select(tokens, **signals)
        return
    chosen = stage.select(tokens, **signals)
    assert method.count(layout) is None
    assert most(method, layout) == total
    counts = (chosen.index >= 0).sum(dim=1)
    assert (counts <= total).all()
    if isinstance(inner, Random) and len(layout.views) > 1:
        return  # shares of the views do not grow one by one
    for b in range(3):
        marks = 0 if chosen.markers is None else int(chosen.markers[b].sum())
        k = int(counts[b]) - marks
        if k == layout.size:
            continue
        (bare,) = PosPad(inner, keep=k + 1, count_markers=False).stages(QWEN)
        assert int((bare.select(tokens, **signals).index[b] >= 0).sum()) > total


def test_published_budgets_put_markers_on_top() -> None:
    """Statement: with ``count_markers=False`` the inner method keeps its number, and the stated bound holds."""
    for layout in STRETCHES:
        tokens = make_tokens(layout, 3, 2)
        method = PosPad(Random(keep=0.4, seed=2), count_markers=False)
        chosen = padded(method, tokens)
        kept = (chosen.index >= 0).sum(dim=1) - chosen.markers.sum(dim=1)
        assert (kept == Random(keep=0.4).count(layout)).all()
        assert ((chosen.index >= 0).sum(dim=1) <= most(method, layout)).all()
    assert PosPad(Random(keep=0.4), count_markers=False, placement="full").total(Layout.grid(1, 10)) == 4
    assert most(PosPad(Random(keep=0.4), count_markers=False, placement="full"), Layout.grid(1, 10)) == 10


def test_a_full_budget_passes_through() -> None:
    tokens = make_tokens(Layout.grid(3, 3), 2, 0)
    chosen = padded(PosPad(Random(keep=1.0)), tokens)
    assert torch.equal(chosen.index, torch.arange(9).expand(2, -1))
    assert chosen.values is chosen.markers is None


def test_an_image_that_loses_everything_leaves_its_last_place() -> None:
    """Statement: with ``min_keep=0`` nothing survives but one marker for each stretch, at its end."""
    method = PosPad(FocusUI(reduct=1.0, min_keep=0, scorer="uigraph"), count_markers=False)
    assert padded(method, make_tokens(Layout.grid(3, 3), 2, 0)).index.tolist() == [[8], [8]]
    assert padded(method, make_tokens(Layout.video(2, 1, 3), 1, 0)).index.tolist() == [[2, 5]]


# ----------------------------------------------------------------------------------------------------- composition


def test_names_compose() -> None:
    """Statement: ``outer:inner`` on the command line, parameters where they belong, labels that tell methods apart."""
    assert create("pospad:random", keep=0.3, seed=2, marker="last") == PosPad(Random(keep=0.3, seed=2), marker="last")
    assert create("then:divprune+fastv") == Then(DivPrune(), FastV())
    assert create("pospad").name == "pospad:focusui"
    parsed = parse_methods("random,pospad:focusui(scorer='uigraph'),pospad:random,then:divprune+fastv")
    assert parsed[1:] == [("pospad:focusui", {"scorer": "uigraph"}), ("pospad:random", {}), ("then:divprune+fastv", {})]
    assert [create(name, **given).name for name, given in parsed] == [
        "random",
        "pospad:focusui",
        "pospad:random",
        "then",
    ]
    method = PosPad(foveate.FocusUI(keep=0.3))
    assert (method.keep, method.inner.keep) == (0.3, 0.3)
    assert method.parameters()["inner"]["method"] == "focusui"
    for wrong, error, said in (
        ("random:pospad", ParameterError, "random goes around no other"),
        ("pospad:rondom", UnknownNameError, "did you mean 'random'"),
        ("nothing:random", UnknownNameError, "unknown method 'nothing'"),
    ):
        with pytest.raises(error, match=said):
            create(wrong)
    with pytest.raises(UnknownNameError, match="no parameter 'colour'"):
        create("pospad:random", colour=1)
    with pytest.raises(ParameterError, match="takes no parameters"):
        create("then:divprune+fastv", keep=0.5)


@pytest.mark.parametrize("inner", ["avgpool", "downsample", "todre", "quota"])
def test_methods_without_anchors_are_refused(inner: str) -> None:
    """Statement: where survivors stand for a resampled picture, or two selections act, there is no run to mark."""
    with pytest.raises(ParameterError, match=f"one selection drops.*{inner}"):
        PosPad(inner).stages(CLIP)


def test_inside_the_decoder_only_the_last_token_marks() -> None:
    with pytest.raises(ParameterError, match="marker='last'"):
        PosPad("fastv").stages(CLIP)
    tokens = make_tokens(Layout.grid(3, 4), 2, 0)
    chosen = padded(PosPad("fastv", keep=0.6, marker="last"), tokens, CLIP)
    assert chosen.values is None
    assert ((chosen.index >= 0).sum(dim=1) <= 7).all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"marker": "zero"}, "'zero'"),
        ({"marker": torch.zeros(2, 3)}, r"\(2, 3\)"),
        ({"placement": "start"}, "'start'"),
        ({"placement": "full"}, "count_markers=False"),
        ({"inner": Then(DivPrune(), FastV())}, "then has no budget"),
        ({"inner": Then(DivPrune(), FastV()), "keep": 0.5, "count_markers": False}, "keep=0.5: then has no budget"),
    ],
)
def test_wrong_parameters_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        PosPad(**wrong)


def test_markers_that_the_model_lacks_are_refused() -> None:
    info = ModelInfo(family="qwen3_vl", token_ids={"eos": (1,)})
    with pytest.raises(MissingSignalError, match="no image_drop_end_token_id"):
        PosPad("random", marker="trained").stages(info)
    with pytest.raises(MissingSignalError, match="no pad_token_id and no bos_token_id"):
        PosPad("random", marker="pad").stages(info)
    tokens = make_tokens(Layout.grid(2, 3), 1, 0)
    with pytest.raises(ParameterError, match="has 4 channels, the tokens have 6"):
        padded(PosPad("random", marker=torch.zeros(4)), tokens)
    with pytest.warns(UserWarning, match="not trained with a marker"):
        PosPad("random").stages(info)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PosPad("random").stages(ModelInfo(token_ids={"image_drop_end": (4,)}))


# ----------------------------------------------------------------------------------------------------------- models


@contextlib.contextmanager
def substituted(model: torch.nn.Module, places: tuple[Tensor, Tensor], rows: list[Tensor]) -> Iterator[None]:
    """The decoder is fed ``rows[0]`` at (samples, places); DeepStack levels carry ``rows[1:]`` there."""

    def put(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs["inputs_embeds"].clone()
        embeds[places] = rows[0]
        kwargs = {**kwargs, "inputs_embeds": embeds}
        if kwargs.get("deepstack_visual_embeds") is not None:
            mask = kwargs["visual_pos_masks"]
            number = (mask.flatten().long().cumsum(0) - 1).view_as(mask)[places]
            kwargs["deepstack_visual_embeds"] = [
                level.index_copy(0, number, mine) for level, mine in zip(kwargs["deepstack_visual_embeds"], rows[1:])
            ]
        return args, kwargs

    handle = model.model.language_model.register_forward_pre_hook(put, with_kwargs=True)
    yield
    handle.remove()


def unpruned_features(model: torch.nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """What the decoder is fed without pruning: embeddings, visual mask, DeepStack levels."""
    seen: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    handle = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    model(**given)
    handle.remove()
    return seen["inputs_embeds"], seen.get("visual_pos_masks"), seen.get("deepstack_visual_embeds") or []


@torch.no_grad()
@pytest.mark.parametrize("marker", ["run_mean", "last", "vector"])
@pytest.mark.parametrize(
    ("family", "scene"),
    [(f, s) for f in FAMILIES for s in ("padded", "several", "video") if s != "video" or f in VIDEO_FAMILIES],
)
def test_padded_equals_the_unpruned_model_with_markers_in_it(family: str, scene: str, marker: str) -> None:
    """Statement: at full-sequence positions, the model is the unpruned one in which the markers' places carry the
    marker and the other dropped places are masked; generated tokens too.
    """
    model, given = tiny(family), scene_inputs(family, scene)
    positions = rope_positions(model, given)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    method = PosPad(Random(keep=0.5, seed=4), marker=vector if marker == "vector" else marker, count_markers=False)
    with foveate.attach(model, method) as session:
        extra = {} if positions.ndim == 3 else {"position_ids": positions}
        found = model(**given, **extra).logits
        trace = session.trace
        generated = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, -4:]
        again = session.trace
    assert set(trace.positions.values()) == {"keep"}
    gone = dropped_places(given, trace, 4)
    embeds, mask, levels = unpruned_features(model, given)

    def rows_of(trace: foveate.Trace) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
        visual = (given["input_ids"] == 90) | (given["input_ids"] == 91)
        samples, places, rows = [], [], [[] for _ in range(1 + len(levels))]
        start = [0] * len(visual)
        for image in trace.images:
            b, layout = image.sample, image.layout
            mine = visual[b].nonzero()[:, 0][start[b] : start[b] + layout.length][layout.places()]
            start[b] += layout.length
            marks = set(image.markers.tolist())
            dropped = [i not in set(image.kept.tolist()) - marks for i in range(layout.size)]
            for run in runs_by_hand(dropped, layout):
                assert run[-1] in marks
                samples.append(b)
                places.append(int(mine[run[-1]]))
                number = None if mask is None else (mask.flatten().long().cumsum(0) - 1).view_as(mask)[b, mine[run]]
                sources = [embeds[b, mine[run]], *(level[number] for level in levels)]
                for n, source in enumerate(sources):
                    foreign = vector if n == 0 else torch.zeros(32)
                    rows[n].append({"run_mean": source.mean(dim=0), "last": source[-1], "vector": foreign}[marker])
        assert samples, "the case marks nothing"
        return (torch.tensor(samples), torch.tensor(places)), [torch.stack(r) for r in rows]

    with substituted(model, *rows_of(trace)):
        expected = masked_logits(model, given, positions, gone)
    alive = given["attention_mask"].bool() & ~gone[-1]
    assert (found - expected)[alive].abs().max() < 1e-5
    gone = dropped_places(given, again, 4)
    with substituted(model, *rows_of(again)):
        tokens, margin = greedy_by_masking(model, given, gone, 4)
    assert margin.min() > 1e-4, "greedy decoding is ambiguous in this case"
    assert torch.equal(generated, tokens)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_generates_as_its_samples_do_alone(family: str) -> None:
    """Statement: images of a batch have markers of different number, and none disturbs another."""
    model = tiny(family)
    given, method = scene_inputs(family, "padded"), PosPad(DivPrune(keep=0.7))
    with foveate.attach(model, method) as session:
        together = model.generate(**given, max_new_tokens=5, do_sample=False)[:, given["input_ids"].shape[1] :]
        assert len(session.trace.images) == 2
        shapes = {"llava": (None, None), "llava_next": ((60, 40), (30, 60)), "llava_onevision": ((60, 40), (30, 60))}
        first, second = shapes.get(family, ((4, 5), (2, 3)))
        samples = [[2, picture(family, 1, first), 4], [5, picture(family, 2, second), 9]]
        for row, sample in enumerate(samples):
            single = inputs(family, [sample])
            width = single["input_ids"].shape[1]
            single["input_ids"] = given["input_ids"][row : row + 1, -width:]
            alone = model.generate(**single, max_new_tokens=5, do_sample=False)[:, width:]
            assert torch.equal(together[row : row + 1, : alone.shape[1]], alone)


@torch.no_grad()
def test_full_placement_of_last_tokens_is_the_unpruned_model() -> None:
    model, given = tiny("qwen3_vl"), scene_inputs("qwen3_vl", "single")
    plain = model(**given).logits
    with foveate.attach(model, PosPad("random", placement="full", marker="last", count_markers=False)):
        assert (model(**given).logits - plain).abs().max() < 1e-6


@torch.no_grad()
def test_official_deepstack_is_the_first_level_only() -> None:
    """Statement: ``FocusUI(deepstack="first")`` is the model whose later levels are zero; at full budget all levels
    join.
    """
    model, given = tiny("qwen3_vl"), scene_inputs("qwen3_vl", "single")
    positions = rope_positions(model, given)
    embeds, mask, levels = unpruned_features(model, given)
    method = FocusUI(scorer="uigraph", keep=0.4, threshold=20.0, deepstack="first")
    with foveate.attach(model, method) as session:
        found = model(**given).logits
        gone = dropped_places(given, session.trace, 4)
    everything = mask.nonzero(as_tuple=True)
    flat = [embeds[everything], levels[0], *(torch.zeros_like(level) for level in levels[1:])]
    with substituted(model, everything, flat):
        expected = masked_logits(model, given, positions, gone)
    assert (found - expected)[~gone[-1]].abs().max() < 1e-5
    plain = model(**given).logits
    with foveate.attach(model, FocusUI(scorer="uigraph", keep=1.0, deepstack="first")):
        assert torch.equal(model(**given).logits, plain)


@torch.no_grad()
def test_traces_show_markers() -> None:
    model = tiny("qwen2_5_vl")
    with foveate.attach(model, "pospad:random", keep=0.7) as session:
        model(**scene_inputs("qwen2_5_vl", "single"))
        image = session.trace.images[0]
        assert set(image.markers.tolist()) <= set(image.kept.tolist())
        assert f"{len(image.markers)} of them markers" in str(session.trace)
        assert session.trace.method == "pospad:random"


@torch.no_grad()
def test_an_impossible_budget_leaves_the_model_usable() -> None:
    model, given = tiny("llava_next"), scene_inputs("llava_next", "single")
    with foveate.attach(model, "pospad:random", keep=2) as session:
        with pytest.raises(FoveateError, match="stretches"):
            model(**given)
        assert session.attached
    assert torch.isfinite(model(**given).logits).all()
