"""The statements that fix what pruning means, for every family and attention implementation (README, *How it works*).

1. Dropping tokens at the entry, positions kept, equals the unpruned model with those tokens masked out.
2. Dropping tokens in front of decoder layer i equals masking their columns from layer i on.
3. Batched, left-padded generation equals generation sample by sample, token for token.
4. Keeping everything is bit-equal to no attachment, and so is the model after detaching.
5. With compact positions, the pruned model equals the decoder run on the shortened sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.pruners.base import Hook, ModelInfo, Pruner, Selection, Stage, Tokens, budget, top_k
from tests.models import FAMILIES, IMAGE, VIDEO, VIDEO_FAMILIES, inputs, picture, single_view, tiny

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


@dataclass(frozen=True)
class TopNorm(Pruner):
    """Keeps the tokens of largest norm: ``at_input`` of them at the entry, ``at_layer[i]`` in front of layer i."""

    at_input: float | int = 1.0
    at_layer: tuple[tuple[int, float | int], ...] = ()
    name = "top_norm"

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        stages = [Stage(Hook.LLM_INPUT, lambda tokens: self._select(tokens, self.at_input))]
        for layer, keep in self.at_layer:
            stages.append(Stage(Hook.LLM_LAYER, lambda tokens, keep=keep: self._select(tokens, keep), layer=layer))
        return tuple(stages)

    @staticmethod
    def _select(tokens: Tokens, keep: float | int) -> Selection:
        norms = tokens.embeds.float().norm(dim=-1)
        return Selection(top_k(norms, budget(keep, tokens.count)), scores=norms)


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


def masked_logits(model: torch.nn.Module, given: dict[str, Any], positions: Tensor, gone: list[Tensor]) -> Tensor:
    """The unpruned model with the columns ``gone[i]`` masked out in layer i. ``given`` may be longer than ``gone`` is wide."""
    length = given["input_ids"].shape[1]
    causal = torch.ones(length, length).tril().bool()
    handles = []
    for i, layer in enumerate(model.model.language_model.layers):
        grown = torch.nn.functional.pad(gone[i], (0, length - gone[i].shape[1]))
        seen = causal & (given["attention_mask"].bool() & ~grown)[:, None, None]
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
