"""What the plugin announces and picks is what `foveate.attach` keeps; vLLM itself is not needed for that."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch

import foveate
from foveate.adapters.vllm_plugin import TESTED, _check_at_start
from foveate.adapters.vllm_plugin.serving import (
    ServedMethod,
    applied,
    check_request,
    check_start,
    check_version,
    deepest_block,
    kept_of,
    places_taken,
    served,
    skeleton,
    whole,
)
from foveate.adapters.vllm_plugin.settings import parse
from foveate.errors import FoveateError, ParameterError, UnsupportedModelError
from foveate.pruners.core import Layout, Newline, Selection, View
from tests.models import FAMILIES, inputs, picture, tiny

METHODS = ("random", "grid", "avgpool", "fopru", "hiprune", "divprune", "visionzip", "globalcom2", "todre")
FIXED = {"globalcom2": {"redistribute": True}, "todre": {"stage2": False}}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_places_are_reserved_as_attach_lets_in(family, name):
    if name == "globalcom2" and family.startswith("qwen"):
        pytest.skip("GlobalCom² knows AnyRes families")
    model, shown = tiny(family), picture(family, 1)
    entry = {"pruner": name, "keep": 0.3, **FIXED.get(name, {})}
    adapter = skeleton(model.config)
    method = served(adapter, entry)
    known = "auto" if method.newlines == method.stage.newlines else method.newlines
    with foveate.attach(model, name, keep=0.3, separators=known, **FIXED.get(name, {})) as session, torch.no_grad():
        session.sample_ids = [0]
        model(**inputs(family, [[4, shown, 5]]))
    (seen,) = session.trace.images
    assert places_taken(adapter, entry, seen.layout) == seen.tokens_per_layer[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_skeleton_knows_what_the_model_knows(family):
    from foveate.adapters import adapter_for

    model = tiny(family)
    mine, own = skeleton(model.config), adapter_for(model)
    assert mine.info == own.info
    assert next(mine.model.parameters()).is_meta


@pytest.mark.parametrize(
    ("family", "entry", "says"),
    [
        ("llava", {"pruner": "cdpruner"}, "reads the question"),
        ("llava", {"pruner": "fastv"}, "inside the decoder"),
        ("llava", {"pruner": "transprune"}, "inside the decoder"),
        ("llava", {"pruner": "tome"}, "inside the vision tower"),
        ("llava", {"pruner": "downsample"}, "resize them"),
        ("llava", {"pruner": "hiprune", "exclude": "official"}, 'content decide .* add "exclude": "strict"; or: '),
        ("llava", {"pruner": "todre"}, 'inside the decoder.* add "stage2": false; or: '),
        ("llava_next", {"pruner": "globalcom2"}, 'content decide .* add "redistribute": true; or: '),
        ("llava", {"pruner": "pospad:grid"}, "gaps between positions"),
    ],
)
def test_methods_that_cannot_be_served_say_why(family, entry, says):
    with pytest.raises(UnsupportedModelError, match=says):
        served(skeleton(tiny(family).config), entry)


def test_a_method_whose_count_follows_from_the_model_is_served_where_it_does():
    """Without crops GlobalCom² keeps a fraction of the only view."""
    assert places_taken(skeleton(tiny("llava").config), {"pruner": "globalcom2", "keep": 0.25}, Layout.grid(4, 4)) == 4


def test_a_picture_whose_content_decides_is_refused_by_itself():
    method = served(skeleton(tiny("llava").config), {"pruner": "globalcom2"})
    crops = Layout((View(4, 4, kind="thumbnail"), View(4, 4, start=16, stride=4, kind="crop")))
    with pytest.raises(UnsupportedModelError, match=r'content decide .* add "redistribute": true'):
        method.length(crops)


def test_pospad_counts_after_a_choice_that_the_layout_makes():
    adapter = skeleton(tiny("qwen2_5_vl").config)
    assert places_taken(adapter, {"pruner": "pospad:grid", "keep": 0.5}, Layout.grid(6, 6)) <= 18
    with pytest.raises(UnsupportedModelError, match="content decide"):
        served(adapter, {"pruner": "pospad:divprune"})


def test_budgets_that_a_picture_cannot_meet_fail_in_the_front_end():
    adapter = skeleton(tiny("llava").config)
    with pytest.raises(FoveateError, match="dominant=20"):
        places_taken(adapter, {"pruner": "visionzip", "dominant": 20, "contextual": 2}, Layout.grid(4, 4))


def test_a_method_that_keeps_another_number_than_it_announces_fails_in_the_front_end(monkeypatch):
    method = served(skeleton(tiny("llava").config), {"pruner": "hiprune", "keep": 4})
    monkeypatch.setattr(type(method.pruner), "count", lambda self, layout, model=None: 5)
    with pytest.raises(ParameterError, match="hiprune announces 5 tokens for a picture of 16 and keeps 4"):
        method.length(Layout.grid(4, 4))


def test_versions_that_the_plugin_does_not_know_are_refused(monkeypatch):
    for version in (*(f"{minor}.0" for minor in TESTED), f"{TESTED[-1]}.1+cu130"):
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
        check_version()
    for version in ("0.31.0", "0.34.0", f"{TESTED[0]}0.0", f"1.{TESTED[0]}"):
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
        with pytest.raises(UnsupportedModelError, match=f"inside vLLM 0.32 and 0.33, and this is vLLM {version}"):
            check_version()


@pytest.mark.parametrize("given", ["1", "2", " 1 ", "true", ""])
@pytest.mark.parametrize("entry", [{}, {"pruner": "hiprune", "keep": 0.25}], ids=str)
def test_an_engine_of_the_front_end_in_rust_does_not_start(monkeypatch, entry, given):
    """It would serve every picture unpruned: that front end loads no plugin."""
    registry = SimpleNamespace(inspect_model_cls=lambda *_: pytest.fail("vLLM went on"))
    _check_at_start(registry)
    config = SimpleNamespace(hf_config=SimpleNamespace(foveate=entry), model_impl="auto")
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", given)
    with pytest.raises(UnsupportedModelError, match=f"VLLM_USE_RUST_FRONTEND={given}: .*would not be pruned; unset"):
        registry.inspect_model_cls("LlavaForConditionalGeneration", config)


def test_engines_start_with_known_families_only():
    config = tiny("llava").config
    check_start("LlavaForConditionalGeneration", config, {"pruner": "hiprune"})
    check_start(["LlavaForConditionalGeneration"], config, {})
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        check_start(["LlamaForCausalLM"], config.text_config, {"pruner": "hiprune"})
    with pytest.raises(UnsupportedModelError, match="model-impl"):
        check_start("LlavaForConditionalGeneration", config, {}, "transformers")


def test_blocks_after_the_feature_layer_are_loaded_only_when_read():
    adapter = skeleton(tiny("llava").config)  # 5 blocks, block 3 feeds the projector
    assert deepest_block(adapter, {"pruner": "fopru"}) == 3
    assert deepest_block(adapter, {"pruner": "todre", "stage2": False}) == 4
    with pytest.raises(ParameterError, match="block 4"):
        check_request(adapter, {"pruner": "fopru"}, {"pruner": "todre", "stage2": False})


LINES = Layout(Layout.grid(2, 3).views, tuple(Newline(r * 4 + 3, r * 3, r * 3 + 3) for r in range(2)))
BLANK = torch.zeros(8, 1)


def entering(selection: Selection, newlines: str) -> list[int]:
    """Places of a picture of :data:`LINES`."""
    return kept_of(selection, LINES, newlines, BLANK).index[0].tolist()


@pytest.mark.parametrize(
    ("newlines", "places"), [("drop", [1, 2]), ("rows", [1, 2, 3]), ("keep", [1, 2, 3, 7])], ids=str
)
def test_separators_follow_the_policy(newlines, places):
    assert entering(Selection(torch.tensor([1, 2])), newlines) == places


def test_nothing_changes_where_everything_stays():
    assert whole(LINES).index[0].tolist() == list(range(8))
    assert entering(Selection(torch.arange(6)), "drop") == list(range(8))


@pytest.mark.parametrize("newlines", ["drop", "rows", "keep"])
def test_survivors_enter_in_their_order_with_their_values(newlines):
    values = torch.tensor([[10.0], [20.0]])
    kept = kept_of(Selection(torch.tensor([0, 4]), values, order=torch.tensor([1, 0])), LINES, newlines, BLANK)
    assert applied(kept, BLANK, 1).tolist() == [[20.0], [10.0]]
    assert kept.index.tolist() == [[5, 0]]


def test_an_order_of_all_tokens_is_an_order():
    """As in `foveate.attach`, where tokens in an order of their own have no rows to close."""
    backwards = Selection(torch.arange(6), order=torch.arange(6).flip(0))
    assert entering(backwards, "keep") == [6, 5, 4, 2, 1, 0]


def test_separators_keep_what_they_had_between_new_values():
    kept = kept_of(Selection(torch.tensor([1, 4]), torch.tensor([[-1.0], [-2.0]])), LINES, "keep", torch.ones(8, 1))
    assert applied(kept, torch.ones(8, 1), 1).tolist() == [[-1.0], [1.0], [-2.0], [1.0]]


@pytest.mark.parametrize("padded", [[], [-1]], ids=str)
def test_deepstack_levels_go_with_their_token(padded):
    rows = torch.arange(18.0).view(6, 3)  # one channel of embedding, two levels
    index, values = torch.tensor([1, 4, *padded]), torch.tensor([[-1.0], [-2.0], *[[0.0] for _ in padded]])
    kept = kept_of(Selection(index, values), Layout.grid(2, 3), "rows", rows[:, :1])
    assert applied(kept, rows, 1).tolist() == [[-1.0, 4.0, 5.0], [-2.0, 13.0, 14.0]]


def test_deepstack_levels_are_mixed_as_the_embeddings_are():
    rows = torch.arange(18.0).view(6, 3)
    selection = Selection(
        torch.tensor([1, 4]),
        torch.zeros(2, 1),
        resample=lambda level: torch.stack([level[:3].mean(0), level[3:].mean(0)]),
    )
    kept = kept_of(selection, Layout.grid(2, 3), "rows", rows[:, :1])
    assert applied(kept, rows, 1).tolist() == [[0.0, 4.0, 5.0], [0.0, 13.0, 14.0]]


def test_levels_that_do_not_join_add_nothing():
    rows = torch.arange(18.0).view(6, 3)
    kept = kept_of(Selection(torch.tensor([1, 4])), Layout.grid(2, 3), "rows", rows[:, :1], deepstack="first")
    assert applied(kept, rows, 1).tolist() == [[3.0, 4.0, 0.0], [12.0, 13.0, 0.0]]


def on_llava(chosen):
    """HiPrune on LLaVA with a stage that returns ``chosen``."""
    method = ServedMethod(skeleton(tiny("llava").config), parse({"pruner": "hiprune", "keep": 4}))
    method.stage = dataclasses.replace(method.stage, select=lambda tokens, **signals: chosen(tokens))
    return method


def test_separators_of_a_methods_own_placing_are_refused():
    order = torch.tensor([[0, 1, -1, 2, 3]])
    method = on_llava(lambda tokens: Selection(torch.tensor([[1, 3, 5, 7]]), order=order))
    with pytest.raises(ParameterError, match="hiprune: separators of its own placing cannot be served"):
        method.length(Layout.grid(4, 4))


@pytest.mark.parametrize("wrong", [[3, 1, 5, 7], [1, 1, 5, 7], [1, 3, 5, 16]], ids=str)
def test_what_is_not_a_selection_is_refused_before_it_is_served(wrong):
    method = on_llava(lambda tokens: Selection(torch.tensor([wrong])))
    with pytest.raises(ParameterError, match=r"hiprune chose .* give unique, ascending token numbers 0 .. 15"):
        method.length(Layout.grid(4, 4))


def test_a_choice_is_made_in_full_precision_under_autocast():
    seen = []

    def chosen(tokens):
        seen.append(torch.is_autocast_enabled("cpu"))
        return Selection(torch.tensor([[1, 3, 5, 7]]))

    method = on_llava(chosen)
    signals = {signal: [torch.rand(16)] for signal in method.signals}
    with torch.autocast("cpu", torch.bfloat16):
        (kept,) = method.select([torch.rand(16, 8)], Layout.grid(4, 4), signals)
    assert seen == [False]
    assert kept.index.tolist() == [[1, 3, 5, 7]]
