"""The statements that fix what pruning means, for every family and attention implementation (README, *How it works*).

1. Dropping tokens at the entry, positions kept, equals the unpruned model with those tokens masked out.
2. Dropping tokens in front of decoder layer i equals masking their columns from layer i on.
3. Batched, left-padded generation equals generation sample by sample, token for token.
4. Keeping everything is bit-equal to no attachment, and so is the model after detaching.
5. With compact positions, the pruned model equals the decoder run on the shortened sequence.
6. Caches of different length per layer, evicted caches and MLPs that run some neurons only, over many decoded tokens,
   equal the unpruned model whose columns and neurons are masked out where and when they are gone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.pruners.core import Pruner
from tests.models import FAMILIES, IMAGE, VIDEO, VIDEO_FAMILIES, cache_of, cached, inputs, picture, single_view, tiny
from tests.pruners.synthetic import TopNorm

TOLERANCE = 1e-5
ATTENTION = ("sdpa", "eager")
SCENES = ("single", "padded", "several", "video")
CASES = [
    pytest.param(family, attention, scene, id=f"{family}-{attention}-{scene}")
    for family in FAMILIES
    for attention in ATTENTION
    for scene in SCENES
    if scene != "video" or family in VIDEO_FAMILIES
]


def scene_inputs(family: str, scene: str) -> dict[str, Any]:
    """A prompt per sample; ``padded`` has samples of different length, ``several`` several images in one sample."""
    if scene == "single":
        return inputs(family, [[4, picture(family, 1), 6]])
    if scene == "video":
        return inputs(family, [[3, picture(family, 2, (4, 2, 2)), 5]])
    if scene == "padded":
        shapes = {"llava": (None, None), "llava_next": ((60, 40), (30, 60)), "llava_onevision": ((60, 40), (30, 60))}
        first, second = shapes.get(family, ((4, 5), (2, 3)))
        return inputs(family, [[2, picture(family, 1, first), 4], [5, picture(family, 2, second), 9]])
    if family == "llava_onevision":
        return inputs(family, [[3, single_view(1), 4, single_view(2), 5]])
    other = {"llava": None, "llava_next": (30, 60)}.get(family, (2, 3))
    return inputs(family, [[3, picture(family, 1), 4, picture(family, 2, other), 5]])


def rope_positions(model: torch.nn.Module, given: dict[str, Any]) -> Tensor:
    """The unpruned model's positions, padding-aware: ``(B, L)`` or ``(3, B, L)``."""
    if "mm_token_type_ids" in given:
        grids = {k: v for k, v in given.items() if k.endswith("grid_thw")}
        return model.model.get_rope_index(
            given["input_ids"],
            mm_token_type_ids=given["mm_token_type_ids"],
            attention_mask=given["attention_mask"],
            **grids,
        )[0]
    return (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def dropped_places(given: dict[str, Any], trace: foveate.Trace, depth: int) -> list[Tensor]:
    """Per decoder layer ``(B, L)`` bool: visual places (separators included) that the trace says are gone."""
    visual = (given["input_ids"] == IMAGE) | (given["input_ids"] == VIDEO)
    gone = []
    for layer in range(depth):
        dropped = torch.zeros_like(visual)
        for row in range(len(visual)):
            places, start = visual[row].nonzero()[:, 0], 0
            for image in (i for i in trace.images if i.sample == row):
                mine = places[start : start + image.layout.length]
                start += image.layout.length
                stays = torch.zeros(len(mine), dtype=torch.bool)
                kept = image.kept_at(layer)
                stays[image.layout.places()[kept]] = True
                for newline in image.layout.newlines:
                    stays[newline.place] = bool(((kept >= newline.first) & (kept < newline.last)).any())
                dropped[row, mine[~stays]] = True
                assert int(stays.sum()) == image.tokens_per_layer[layer]
        gone.append(dropped)
    return gone


def masked_logits(
    model: torch.nn.Module,
    given: dict[str, Any],
    positions: Tensor,
    gone: list[Tensor],
    later: list[Tensor] | None = None,
) -> Tensor:
    """The unpruned model with columns ``gone[i]`` masked out in layer i. ``given`` may be longer than ``gone`` is wide.

    ``later[i]``, if given, holds instead for the rows behind those that ``gone`` is wide.
    """
    length = given["input_ids"].shape[1]
    causal = torch.ones(length, length).tril().bool()
    handles = []
    for i, layer in enumerate(model.model.language_model.layers):
        grown = torch.nn.functional.pad(gone[i], (0, length - gone[i].shape[1]))
        seen = causal & (given["attention_mask"].bool() & ~grown)[:, None, None]
        if later is not None:
            prompt = gone[i].shape[1]
            grown = torch.nn.functional.pad(later[i], (0, length - prompt))
            seen[:, :, prompt:] = (causal & (given["attention_mask"].bool() & ~grown)[:, None, None])[:, :, prompt:]
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

        def substitute(module: Any, args: Any, kwargs: Any, mask: Tensor = mask) -> Any:
            return args, {**kwargs, "attention_mask": mask}

        handles.append(layer.register_forward_pre_hook(substitute, with_kwargs=True))
    try:
        return model(**given, position_ids=positions, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def greedy_by_masking(
    model: torch.nn.Module, given: dict[str, Any], gone: list[Tensor], steps: int
) -> tuple[Tensor, Tensor]:
    """Greedy tokens ``(B, steps)`` of the masked, unpruned model, every step computed anew without a cache."""
    positions = rope_positions(model, given)
    given = dict(given)
    margin = torch.full((len(given["input_ids"]),), torch.inf)
    for _ in range(steps):
        logits = masked_logits(model, given, positions, gone)[:, -1]
        best = logits.topk(2).values
        margin = torch.minimum(margin, best[:, 0] - best[:, 1])
        given["input_ids"] = torch.cat([given["input_ids"], logits.argmax(-1, keepdim=True)], dim=1)
        given["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)  # as generate() counts on
        if "mm_token_type_ids" in given:
            given["mm_token_type_ids"] = torch.nn.functional.pad(given["mm_token_type_ids"], (0, 1))
    return given["input_ids"][:, -steps:], margin


@torch.no_grad()
def check_against_masking(family: str, attention: str, scene: str, pruner: Pruner) -> None:
    model, given = tiny(family, attention), scene_inputs(family, scene)
    positions = rope_positions(model, given)
    with foveate.attach(model, pruner, positions="keep") as session:
        extra = {} if positions.ndim == 3 else {"position_ids": positions}
        pruned = model(**given, **extra).logits
        trace = session.trace
        tokens = model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False)[:, -5:]
    gone = dropped_places(given, trace, len(model.model.language_model.layers))
    assert gone[-1].any(), "the case prunes nothing"
    reference = masked_logits(model, given, positions, gone)
    alive = given["attention_mask"].bool() & ~gone[-1]
    assert reference[alive].abs().max() > 0.5, "the case is numerically trivial"
    assert (pruned - reference)[alive].abs().max() < TOLERANCE
    expected, margin = greedy_by_masking(model, given, gone, 5)
    assert margin.min() > 10 * TOLERANCE, "greedy decoding is ambiguous in this case"
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize(("family", "attention", "scene"), CASES)
def test_entry_pruning_equals_masking(family: str, attention: str, scene: str) -> None:
    check_against_masking(family, attention, scene, TopNorm(at_input=0.4))


@pytest.mark.parametrize(("family", "attention", "scene"), CASES)
def test_layer_pruning_equals_masking_from_that_layer_on(family: str, attention: str, scene: str) -> None:
    check_against_masking(family, attention, scene, TopNorm(at_input=0.8, at_layer=((1, 0.7), (3, 0.5))))


@pytest.mark.parametrize("keep", [0.5, 8])  # a share of each picture; all of the smallest pictures
@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_batched_generation_equals_singles(family: str, attention: str, positions: str, keep: float | int) -> None:
    model = tiny(family, attention)
    shapes = {"llava": (None, None), "llava_next": ((60, 40), (30, 60)), "llava_onevision": ((60, 40), (30, 60))}
    first, second = shapes.get(family, ((4, 5), (2, 3)))
    samples = [[2, picture(family, 1, first), 4], [5, picture(family, 2, second), 9]]
    batch = inputs(family, samples)
    with foveate.attach(model, TopNorm(at_input=keep, at_layer=((2, 0.5),)), positions=positions):
        together = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
        for row, sample in enumerate(samples):
            single = inputs(family, [sample])
            width = single["input_ids"].shape[1]
            single["input_ids"] = batch["input_ids"][row : row + 1, -width:]  # the same random text
            alone = model.generate(**single, max_new_tokens=8, do_sample=False)[:, width:]
            assert torch.equal(together[row : row + 1, : alone.shape[1]], alone)


@pytest.mark.parametrize(("family", "attention", "scene"), CASES)
@torch.no_grad()
def test_keeping_everything_and_detaching_are_bit_equal(family: str, attention: str, scene: str) -> None:
    model, given = tiny(family, attention), scene_inputs(family, scene)
    before = model(**given).logits
    tokens = model.generate(**given, max_new_tokens=5, do_sample=False)
    with foveate.attach(model, TopNorm(at_input=1.0, at_layer=((2, 1.0),))):
        assert torch.equal(model(**given).logits, before)
        assert torch.equal(model.generate(**given, max_new_tokens=5, do_sample=False), tokens)
    with foveate.attach(model, TopNorm(at_input=0.3, at_layer=((2, 0.5),))):
        assert not torch.equal(model(**given).logits, before)
    assert torch.equal(model(**given).logits, before)
    assert torch.equal(model.generate(**given, max_new_tokens=5, do_sample=False), tokens)


@pytest.mark.parametrize("scene", ["several", "video"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_batched_generation_equals_singles_with_more_to_see(family: str, scene: str) -> None:
    """Statement 3 for samples of several pictures and for videos, beside a sample of another length."""
    if scene == "video" and family not in VIDEO_FAMILIES:
        pytest.skip(f"{family} takes no video")
    model, pruner = tiny(family), TopNorm(at_input=0.5, at_layer=((2, 0.5),))
    if scene == "video":
        samples = [[3, picture(family, 2, (4, 2, 2)), 5], [6, picture(family, 3, (4, 2, 2)), 9]]
    else:
        one = (lambda seed: single_view(seed)) if family == "llava_onevision" else (lambda seed: picture(family, seed))
        samples = [[3, one(1), 4, one(2), 5], [2, one(3), 6, one(4), 8]]
    batch = inputs(family, samples)
    with foveate.attach(model, pruner):
        together = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
        for row, sample in enumerate(samples):
            single = inputs(family, [sample])
            width = single["input_ids"].shape[1]
            single["input_ids"] = batch["input_ids"][row : row + 1, -width:]
            alone = model.generate(**single, max_new_tokens=6, do_sample=False)[:, width:]
            assert torch.equal(together[row : row + 1, : alone.shape[1]], alone)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_compact_positions_equal_the_shortened_sequence(family: str, attention: str) -> None:
    """The decoder by itself on the surviving embeddings, counted 0, 1, 2, …, with DeepStack rows of the survivors."""
    model, given = tiny(family, attention), scene_inputs(family, "single")
    seen: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.update(kwargs)

    handle = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    model(**given)
    handle.remove()
    with foveate.attach(model, TopNorm(at_input=0.4), positions="compact") as session:
        pruned = model(**given).logits
        tokens = model.generate(**given, max_new_tokens=5, do_sample=False)[0, given["input_ids"].shape[1] :]
    gone = dropped_places(given, session.trace, 4)[0]
    short = seen["inputs_embeds"][~gone][None]
    more = {}
    if seen.get("deepstack_visual_embeds") is not None:
        mask = seen["visual_pos_masks"]
        more["visual_pos_masks"] = mask[~gone][None]
        more["deepstack_visual_embeds"] = [level[~gone[mask]] for level in seen["deepstack_visual_embeds"]]
    positions = torch.arange(short.shape[1])[None]
    if family.startswith("qwen"):
        positions = positions.expand(3, 1, -1)
    everything = torch.ones(short.shape[:2], dtype=torch.long)
    hidden = model.model.language_model(inputs_embeds=short, attention_mask=everything, position_ids=positions, **more)
    reference = model.lm_head(hidden.last_hidden_state)[0]
    assert (reference - pruned[~gone]).abs().max() < TOLERANCE
    for token in tokens:  # and decoding counts on from there
        assert reference[-1].argmax() == token
        short = torch.cat([short, model.get_input_embeddings()(token.view(1, 1))], dim=1)
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
        everything = torch.ones(short.shape[:2], dtype=torch.long)
        if more:
            more["visual_pos_masks"] = torch.nn.functional.pad(more["visual_pos_masks"], (0, 1))
        hidden = model.model.language_model(
            inputs_embeds=short, attention_mask=everything, position_ids=positions, **more
        )
        reference = model.lm_head(hidden.last_hidden_state)[0]


# ------------------------------------------------------------------------------------------- methods inside the decoder

STEPS = 32


def continued(
    model: torch.nn.Module, given: dict[str, Any], pruner: Pruner, tokens: Tensor
) -> tuple[Tensor, Any, foveate.Trace]:
    """Logits ``(B, 1 + steps, V)`` of the prompt's last token and of ``tokens (B, steps)`` behind it, and the cache."""
    positions = rope_positions(model, given)
    with foveate.attach(model, pruner, positions="keep") as session:
        extra = {} if positions.ndim == 3 else {"position_ids": positions}
        output = model(**given, **extra, use_cache=True)
        logits, mask = [output.logits[:, -1]], given["attention_mask"]
        cache, trace = cache_of(output), session.trace
        for step in range(tokens.shape[1]):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            output = model(
                input_ids=tokens[:, step : step + 1],
                attention_mask=mask,
                position_ids=positions[..., -1:] + 1 + step,
                **cached(model, cache),
                use_cache=True,
            )
            logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1), cache, trace


def grown(model: torch.nn.Module, given: dict[str, Any], tokens: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The prompt with ``tokens`` behind it in one call, and its positions."""
    positions, steps = rope_positions(model, given), tokens.shape[1]
    later = positions[..., -1:] + 1 + torch.arange(steps)
    long = {**given, "input_ids": torch.cat([given["input_ids"], tokens], dim=1)}
    long["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (0, steps), value=1)
    if "mm_token_type_ids" in long:
        long["mm_token_type_ids"] = torch.nn.functional.pad(long["mm_token_type_ids"], (0, steps))
    return long, torch.cat([positions, later], dim=-1)


def absent(cache: Any, length: int, depth: int) -> list[Tensor]:
    """Per layer ``(B, length)`` bool: places of the prompt that its cache does not hold."""
    gone = []
    for layer in range(depth):
        held = [held for held in cache.foveate.held if held.first_layer <= layer][-1].places
        there = torch.zeros(len(held), length + 1, dtype=torch.bool)
        there.scatter_(1, held.masked_fill((held < 0) | (held >= length), length), True)
        gone.append(~there[:, :length])
    return gone


@pytest.mark.parametrize("scene", ["padded", "several"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ragged_caches_equal_masking_over_many_steps(family: str, scene: str) -> None:
    """TransPrune drops before several layers; each layer's cache holds what it saw, and nothing is pruned again."""
    model, given = tiny(family), scene_inputs(family, scene)
    tokens = torch.randint(3, 80, (len(given["input_ids"]), STEPS), generator=torch.Generator().manual_seed(5))
    pruner = foveate.TransPrune(ratios=(0.8, 0.5, 0.2), prune_layers=(1, 2, 3), accumulate_layers=(1, 2))
    logits, cache, trace = continued(model, given, pruner, tokens)
    length = given["input_ids"].shape[1]
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert len(set(lengths)) == 4, "caches of four different lengths"
    assert trace.cache_lengths == [n - STEPS for n in lengths]
    assert trace.cached_per_layer == trace.tokens_per_layer
    for ratio, seen in zip((1.0, 0.8, 0.5, 0.2), zip(*(image.tokens_per_layer for image in trace.images))):
        for row in range(len(tokens)):
            mine = [n for n, image in zip(seen, trace.images) if image.sample == row]
            entered = sum(image.layout.length for image in trace.images if image.sample == row)
            assert sum(mine) == int(entered * ratio), "one budget for all pictures of a prompt"
    long, positions = grown(model, given, tokens)
    reference = masked_logits(model, long, positions, absent(cache, length, 4))[:, length - 1 :]
    assert (logits - reference).abs().max() < TOLERANCE


@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_eviction_and_core_neurons_equal_masking_over_many_steps(family: str, evict: bool) -> None:
    """CoreMatching: the prompt has all tokens up to the selecting layer; the answer has core tokens and neurons."""
    model, given = tiny(family), scene_inputs(family, "padded")
    tokens = torch.randint(3, 80, (len(given["input_ids"]), STEPS), generator=torch.Generator().manual_seed(6))
    method = foveate.CoreMatching(budget=0.4, select_layer=1, neuron_layers=(0, 2, 3), kv_evict=evict)
    logits, cache, trace = continued(model, given, method, tokens)
    length = given["input_ids"].shape[1]
    lengths = {layer.keys.shape[2] for layer in cache.layers}
    assert len(lengths) == (1 if evict else 2)
    _, ragged, _ = continued(model, given, replace(method, kv_evict=False), tokens[:, :0])
    gone = absent(ragged, length, 4)
    assert not gone[1].any() or scene_pads(gone[1], given), "all tokens enter the selecting layer"
    assert gone[2].any()
    later = [gone[3]] * 4 if evict else gone
    assert trace.cached_per_layer == ([trace.tokens_per_layer[3]] * 4 if evict else trace.tokens_per_layer)
    for mine, expected in zip(absent(cache, length, 4), later):
        assert torch.equal(mine & given["attention_mask"].bool(), expected & given["attention_mask"].bool())
    neurons = cache.foveate.neurons
    assert sorted(neurons) == [0, 2, 3]
    assert all(0 < int(core.sum(dim=1).amax()) <= int(0.4 * core.shape[1]) for core in neurons.values())
    handles = []
    for i, core in neurons.items():

        def only(module: Any, args: Any, core: Tensor = core) -> Any:
            hidden = args[0].clone()
            hidden[:, length:] *= core[:, None]
            return (hidden,)

        handles.append(model.model.language_model.layers[i].mlp.down_proj.register_forward_pre_hook(only))
    long, positions = grown(model, given, tokens)
    reference = masked_logits(model, long, positions, gone, later)[:, length - 1 :]
    for handle in handles:
        handle.remove()
    assert (logits - reference).abs().max() < TOLERANCE
    dense = masked_logits(model, long, positions, gone, later)[:, length - 1 :]
    assert torch.equal(dense[:, 0], reference[:, 0])
    assert (dense - reference)[:, 1:].abs().max() > 100 * TOLERANCE, "neuron sparsity changes nothing here"


def scene_pads(gone: Tensor, given: dict[str, Any]) -> bool:
    """Is nothing but padding gone?"""
    return not bool((gone & given["attention_mask"].bool()).any())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_all_neurons_as_core_equal_the_dense_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With beta = 1 where all neurons count, decoding core neurons is decoding; the rest of the method is the same."""
    model, given = tiny(family), scene_inputs(family, "padded")
    tokens = torch.randint(3, 80, (len(given["input_ids"]), 8), generator=torch.Generator().manual_seed(7))
    method = foveate.CoreMatching(beta=1.0, select_layer=None)
    with monkeypatch.context() as patch:  # a few neurons of a random model are never active
        patch.setattr(
            "foveate.pruners.core.signals.neuron_counts",
            lambda hidden, *_, **__: torch.ones_like(hidden[:, 0]).long(),
        )
        logits, cache, _ = continued(model, given, method, tokens)
    assert all(core.all() for core in cache.foveate.neurons.values()), "every neuron counts"
    long, positions = grown(model, given, tokens)
    nothing = [torch.zeros_like(given["input_ids"], dtype=torch.bool)] * 4
    reference = masked_logits(model, long, positions, nothing)[:, given["input_ids"].shape[1] - 1 :]
    assert (logits - reference).abs().max() < TOLERANCE
