"""What the plugin announces and picks is what `foveate.attach` keeps; vLLM itself is not needed for that."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

import foveate
from foveate.adapters.vllm_plugin import TESTED, _check_at_start
from foveate.adapters.vllm_plugin.serving import (
    Serving,
    announced,
    check_request,
    check_start,
    check_version,
    deepest_block,
    emitted,
    everything,
    skeleton,
)
from foveate.adapters.vllm_plugin.settings import parse
from foveate.errors import FoveateError, ParameterError, UnsupportedModelError
from foveate.pruners.core import Layout, Selection
from tests.models import FAMILIES, inputs, picture, tiny

METHODS = ("random", "grid", "avgpool", "fopru", "hiprune", "divprune", "visionzip", "globalcom2", "todre")
FIXED = {"globalcom2": {"redistribute": True}, "todre": {"stage2": False}}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_rows_are_announced_as_attach_lets_in(family, name):
    if name == "globalcom2" and family.startswith("qwen"):
        pytest.skip("GlobalCom² knows AnyRes families")
    model, shown = tiny(family), picture(family, 1)
    entry = {"pruner": name, "keep": 0.3, **FIXED.get(name, {})}
    adapter = skeleton(model.config)
    serving = Serving(adapter, parse(entry))
    known = "auto" if serving.newlines == serving.stage.newlines else serving.newlines
    with foveate.attach(model, name, keep=0.3, separators=known, **FIXED.get(name, {})) as session, torch.no_grad():
        session.sample_ids = [0]
        model(**inputs(family, [[4, shown, 5]]))
    (seen,) = session.trace.images
    assert announced(adapter, entry, seen.layout) == seen.tokens_per_layer[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_skeleton_knows_what_the_model_knows(family):
    from foveate.adapters import adapter_for

    model = tiny(family)
    mine, own = skeleton(model.config), adapter_for(model)
    assert mine.info == own.info
    assert next(mine.model.parameters()).is_meta


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"pruner": "cdpruner"}, "reads the question"),
        ({"pruner": "fastv"}, "inside the decoder"),
        ({"pruner": "transprune"}, "inside the decoder"),
        ({"pruner": "tome"}, "inside the vision tower"),
        ({"pruner": "downsample"}, "resize them"),
        ({"pruner": "hiprune", "exclude": "official"}, '"exclude": "strict"'),
        ({"pruner": "todre"}, "inside the decoder"),
        ({"pruner": "globalcom2"}, '"redistribute": true'),
        ({"pruner": "pospad:grid"}, "gaps between positions"),
    ],
)
def test_methods_that_cannot_be_served_say_why(entry, says):
    with pytest.raises(UnsupportedModelError, match=says):
        Serving(skeleton(tiny("llava").config), parse(entry))


def test_pospad_counts_behind_a_choice_that_the_layout_makes():
    adapter = skeleton(tiny("qwen2_5_vl").config)
    assert announced(adapter, {"pruner": "pospad:grid", "keep": 0.5}, Layout.grid(6, 6)) <= 18
    with pytest.raises(UnsupportedModelError, match="content decide"):
        Serving(adapter, parse({"pruner": "pospad:divprune"}))


def test_budgets_that_a_picture_cannot_meet_fail_in_the_front_end():
    adapter = skeleton(tiny("llava").config)
    with pytest.raises(FoveateError, match="dominant=20"):
        announced(adapter, {"pruner": "visionzip", "dominant": 20, "contextual": 2}, Layout.grid(4, 4))


def test_a_method_that_keeps_another_number_than_it_announces_fails_in_the_front_end(monkeypatch):
    serving = Serving(skeleton(tiny("llava").config), parse({"pruner": "hiprune", "keep": 4}))
    monkeypatch.setattr(type(serving.pruner), "kept_on", lambda self, model, layout: 5)
    with pytest.raises(ParameterError, match="hiprune announces 5 tokens for a picture of 16 and keeps 4"):
        serving.length(Layout.grid(4, 4))


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
def test_an_engine_behind_the_front_end_in_rust_does_not_start(monkeypatch, entry, given):
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


def test_blocks_behind_the_feature_layer_are_loaded_only_when_read():
    adapter = skeleton(tiny("llava").config)  # 5 blocks, block 3 feeds the projector
    assert deepest_block(adapter, {"pruner": "fopru"}) == 3
    assert deepest_block(adapter, {"pruner": "todre", "stage2": False}) == 4
    with pytest.raises(ParameterError, match="block 4"):
        check_request(adapter, {"pruner": "fopru"}, {"pruner": "todre", "stage2": False})


LINES = Layout.grid(2, 3)
LINES = Layout(LINES.views, tuple(foveate.pruners.core.method.Newline(r * 4 + 3, r * 3, r * 3 + 3) for r in range(2)))


@pytest.mark.parametrize(
    ("newlines", "places"), [("drop", [1, 2]), ("rows", [1, 2, 3]), ("keep", [1, 2, 3, 7])], ids=str
)
def test_separators_follow_the_policy(newlines, places):
    assert emitted(Selection(torch.tensor([1, 2])), LINES, newlines).places.tolist() == places


def test_nothing_changes_where_everything_stays():
    assert everything(LINES).places.tolist() == list(range(8))
    assert emitted(Selection(torch.arange(6)), LINES, "drop").places.tolist() == list(range(8))


def test_survivors_enter_in_their_order_with_their_values():
    values = torch.tensor([[10.0], [20.0]])
    emission = emitted(Selection(torch.tensor([0, 4]), values, order=torch.tensor([1, 0])), LINES, "rows")
    assert emission.apply(torch.zeros(8, 1), 1).tolist() == [[20.0], [10.0]]
    assert emission.places.tolist() == [5, 0]


def test_deepstack_levels_go_with_their_token():
    rows = torch.arange(18.0).view(6, 3)  # one channel of embedding, two levels
    emission = emitted(Selection(torch.tensor([1, 4]), torch.tensor([[-1.0], [-2.0]])), Layout.grid(2, 3), "rows")
    assert emission.apply(rows, 1).tolist() == [[-1.0, 4.0, 5.0], [-2.0, 13.0, 14.0]]
