"""Corners of methods inside the decoder: plain MLPs, the released mode, later turns, shared neurons, a combination."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import foveate
from foveate.errors import MissingSignalError, ParameterError
from foveate.eval_suites.speed.decoder import Geometry
from tests import models
from tests.models import IMAGE, cache_of, cached, tiny
from tests.test_oracles import TOLERANCE, absent, continued, masked_logits, rope_positions, scene_inputs

TOKENS_ONLY = foveate.CoreMatching(budget=0.4, neuron_layers=())


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


class PlainMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x).relu())


def test_a_decoder_without_gated_mlps_is_refused_and_stays_usable() -> None:
    model, given = tiny("llava"), scene_inputs("llava", "single")
    model.model.language_model.layers[2].mlp = PlainMLP(models.TEXT["hidden_size"])
    before = model(**given).logits
    with pytest.raises(MissingSignalError, match="MLP of decoder layer 2 is a PlainMLP without gate_proj"):
        foveate.attach(model, "corematching")
    assert torch.equal(model(**given).logits, before)
    with foveate.attach(model, TOKENS_ONLY):  # layer 1 has one, and no other is read
        assert not torch.equal(model(**given).logits, before)


def test_schedules_that_do_not_fit_are_refused_on_attaching() -> None:
    model = tiny("llava")
    for method in (
        foveate.TransPrune(ratios=(0.5,), prune_layers=(4,)),
        foveate.TransPrune(accumulate_layers=(5,)),
        foveate.CoreMatching(select_layer=3),
        foveate.CoreMatching(neuron_layers=(4,)),
    ):
        with pytest.raises(ParameterError, match="layer"):
            foveate.attach(model, method)
    foveate.attach(model, foveate.TransPrune()).detach()


def test_the_released_mode_zeroes_cached_rows_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statement: the prompt's logits and every cache length stay; from layer 5 on some visual rows are zero, no others;
    it generates."""
    monkeypatch.setitem(models.TEXT, "num_hidden_layers", 7)
    model, given = tiny("llava"), scene_inputs("llava", "padded")
    plain = model(**given, use_cache=True)
    visual, length = given["input_ids"] == IMAGE, given["input_ids"].shape[1]
    with foveate.attach(model, foveate.CoreMatching(mode="released")) as session:
        output = model(**given, use_cache=True)
        tokens = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape[1] == length + 4
    assert torch.equal(output.logits, plain.logits)
    assert session.trace.cache_lengths == [length] * 7
    for i, (mine, theirs) in enumerate(zip(cache_of(output).layers, cache_of(plain).layers)):
        zero = (mine.keys == 0).all(dim=(1, 3)) & given["attention_mask"].bool()
        assert torch.equal(zero, (mine.values == 0).all(dim=(1, 3)) & given["attention_mask"].bool())
        assert bool(zero.any()) == (i >= 5)
        assert not (zero & ~visual).any()
        kept = ~zero[:, None, :, None]
        assert torch.equal(mine.keys * kept, theirs.keys * kept)


@pytest.mark.parametrize("shared", [False, True])
def test_shared_neurons_are_one_set_for_the_batch(shared: bool) -> None:
    model, given = tiny("llava"), scene_inputs("llava", "padded")
    _, cache, _ = continued(
        model, given, foveate.CoreMatching(select_layer=None, shared=shared), torch.ones(2, 1).long()
    )
    assert all(torch.equal(core[0], core[1]) == shared for core in cache.foveate.neurons.values())


@pytest.mark.parametrize("refresh", [False, True])
def test_a_later_turn_counts_again_if_it_shall(refresh: bool) -> None:
    """Statement: several tokens after the cache give a new set with ``refresh``, and keep the old one without."""
    model, given = tiny("llava"), scene_inputs("llava", "single")
    turn = torch.tensor([[11, 12, 13, 14, 15]])
    mask = torch.ones(1, given["input_ids"].shape[1] + turn.shape[1], dtype=torch.long)
    with foveate.attach(model, foveate.CoreMatching(select_layer=None, refresh=refresh)):
        cache = cache_of(model(**given, use_cache=True))
        first = dict(cache.foveate.neurons)
        model(input_ids=turn, attention_mask=mask, **cached(model, cache))
    assert list(first) == [0, 1, 2, 3]
    changed = [not torch.equal(first[i], core) for i, core in cache.foveate.neurons.items()]
    assert changed == [refresh] * 4


@pytest.mark.parametrize(("family", "positions"), [("llava", "keep"), ("llava", "compact"), ("qwen2_5_vl", "keep")])
def test_a_later_turn_sees_evicted_caches(family: str, positions: str) -> None:
    """Statement: a turn of several tokens equals the masked model in which it sees the core tokens only, in every
    layer, each layer at its own positions."""
    model, given = tiny(family), scene_inputs(family, "single")
    length, turn = given["input_ids"].shape[1], torch.tensor([[11, 12, 13, 14]])
    _, ragged, _ = continued(
        model, given, foveate.CoreMatching(budget=0.4, neuron_layers=(), kv_evict=False), turn[:, :0]
    )
    gone = absent(ragged, length, 4)
    assert gone[2].any()
    whole = {**given, "input_ids": torch.cat([given["input_ids"], turn], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    if "mm_token_type_ids" in given:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(given["mm_token_type_ids"], (0, 4))
    place = rope_positions(model, whole)
    with foveate.attach(model, TOKENS_ONLY, positions=positions):
        cache = cache_of(model(**given, use_cache=True))
        assert len({layer.keys.shape[2] for layer in cache.layers}) == 1, "evicted everywhere"
        found = model(input_ids=turn, attention_mask=whole["attention_mask"], **cached(model, cache)).logits
        assert cache.get_seq_length() == length + 4
    closed = place - torch.nn.functional.pad(gone[2], (0, 4)).long().cumsum(-1) if positions == "compact" else place
    rotary, handles = model.model.language_model.rotary_emb, []
    for layer in model.model.language_model.layers[2:]:

        def moved(module: Any, args: Any, kwargs: Any) -> Any:
            return args, {**kwargs, "position_embeddings": rotary(args[0], closed)}

        handles.append(layer.register_forward_pre_hook(moved, with_kwargs=True))
    reference = masked_logits(model, whole, place, gone, [gone[3]] * 4)[:, length:]
    for handle in handles:
        handle.remove()
    assert (found - reference).abs().max() < TOLERANCE


def test_the_published_combination_with_visionzip_runs() -> None:
    """Statement: on 576 tokens and 32 layers, VisionZip leaves 192 and TransPrune 96, 48 and 24 of them, in the
    published layers; the caches hold what their layers saw."""
    geometry = Geometry(layers=32, width=64, intermediate=64)
    model = geometry.model("cpu", "float32")
    pruner = foveate.Then(foveate.VisionZip(keep=192), foveate.TransPrune.combined())
    with foveate.attach(model, pruner) as session:
        model.generate(**geometry.prompt(1, model), max_new_tokens=2, do_sample=False)
    trace = session.trace
    assert trace.tokens_per_layer == [192] * 7 + [96] * 2 + [48] * 3 + [24] * 20
    assert trace.cached_per_layer == trace.tokens_per_layer
    assert trace.cache_lengths == [n + geometry.text for n in trace.tokens_per_layer]
