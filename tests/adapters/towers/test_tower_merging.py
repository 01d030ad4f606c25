"""Merging inside the towers of vision-language models: what the decoder gets, against the models themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import foveate
from foveate.adapters.trace import ImageTrace
from foveate.errors import InputError, UnsupportedModelError
from foveate.pruners.core import Layout
from tests.models import FAMILIES, inputs, picture, single_view, tiny

LLAVAS = tuple(family for family in FAMILIES if family.startswith("llava"))
ONE_ROW = {"llava": 16, "llava_next": 64, "llava_onevision": 64}  # tokens of a picture, separators not counted
MERGERS = [foveate.ToMe(r=2), foveate.PiToMe(ratio=0.8), foveate.PiToMe(ratio=0.8, order="llava")]
every_merger = pytest.mark.parametrize("merger", MERGERS, ids=lambda m: f"{m.name}-{getattr(m, 'order', '')}")
every_family = pytest.mark.parametrize("family", LLAVAS)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {family: tiny(family).requires_grad_(False) for family in LLAVAS}


def batch(family: str) -> dict[str, Tensor]:
    return inputs(family, [[3, picture(family, 0), 5], [picture(family, 1), 9]])


def check_groups(image: ImageTrace) -> None:
    """Survivors are distinct tokens of the picture; each token has one of them as its owner, a survivor itself."""
    kept, owner, n = image.kept, image.owner, image.layout.size
    assert torch.equal(kept, kept.unique())
    assert kept[0] >= 0
    assert kept[-1] < n
    assert owner.shape == (n,)
    assert torch.equal(owner.unique(), kept), "every token is spoken for by a survivor, every survivor speaks"
    assert torch.equal(owner[kept], kept), "survivors stand in their own slots"


@every_family
@every_merger
def test_the_decoder_sees_the_announced_tokens(models: dict[str, nn.Module], family: str, merger) -> None:
    """Statement: each picture enters the decoder with as many tokens as announced; each patch has an owner among them.

    Exact where views are whole (LLaVA-1.5); where padding is cut off crops, an upper bound.
    """
    model, given = models[family], batch(family)
    plain = model(**given).logits
    with foveate.attach(model, merger) as session:
        merged = model(**given).logits
        images = session.trace.images
        announced = [merger.count(image.layout, session.adapter.info) for image in images]
    assert merged.shape == plain.shape
    assert not torch.equal(merged, plain)
    assert len(images) == 2
    for image, most in zip(images, announced, strict=True):
        check_groups(image)
        assert image.layout.size == ONE_ROW[family]
        assert len(image.kept) <= most < image.layout.size
        if family == "llava":
            assert len(image.kept) == most
        # a row of which no token is left has no separator
        separators = sum(any(row.first <= i < row.last for i in image.kept) for row in image.layout.newlines)
        assert image.tokens_per_layer == [len(image.kept) + separators] * 4


def test_counts_are_those_of_the_blocks(models: dict[str, nn.Module]) -> None:
    """Statement: a LLaVA tower's feature layer is its last but one, so its last block neither merges nor counts."""
    with foveate.attach(models["llava"], foveate.ToMe(r=2)) as session:
        models["llava"](**batch("llava"))
        assert [len(image.kept) for image in session.trace.images] == [16 - 4 * 2] * 2
        assert session.merging.trace.counts == [17, 15, 13, 11, 9]
    assert foveate.ToMe(r=16).count(Layout.grid(24, 24)) == 576 - 23 * 16


@every_family
def test_keeping_everything_and_detaching_change_no_bit(models: dict[str, nn.Module], family: str) -> None:
    """Statement: r = 0 and ratio = 1 are bit-equal to the bare model, and so is the model after detaching a merger."""
    model, given = models[family], batch(family)
    plain = model(**given).logits
    for merger in (foveate.ToMe(r=0), foveate.PiToMe(ratio=1.0), foveate.PiToMe(ratio=1.0, order="llava")):
        with foveate.attach(model, merger):
            assert torch.equal(model(**given).logits, plain)
    for merger in MERGERS:
        with foveate.attach(model, merger):
            assert not torch.equal(model(**given).logits, plain)
        assert torch.equal(model(**given).logits, plain)


@every_family
@every_merger
def test_a_batch_gives_what_its_samples_give_alone(models: dict[str, nn.Module], family: str, merger) -> None:
    """Statement: left-padded batches generate and keep exactly what their samples do alone."""
    model = models[family]
    samples = [[3, picture(family, 0), 5], [picture(family, 1), 9]]
    together = inputs(family, samples)
    with foveate.attach(model, merger) as session:
        said = model.generate(**together, max_new_tokens=4, do_sample=False)[:, -4:]
        kept = [image.kept for image in session.trace.images]
        logits = model(**together).logits[:, -1]
        for b, sample in enumerate(samples):
            alone = inputs(family, [sample])
            ids = together["input_ids"][b][together["attention_mask"][b].bool()]
            alone["input_ids"] = ids[None]
            assert torch.equal(model.generate(**alone, max_new_tokens=4, do_sample=False)[0, -4:], said[b])
            assert torch.equal(session.trace.images[0].kept, kept[b])
            torch.testing.assert_close(model(**alone).logits[0, -1], logits[b], atol=2e-4, rtol=1e-4)


@every_family
def test_survivors_stand_in_their_own_slots(models: dict[str, nn.Module], family: str) -> None:
    """Statement: the decoder sees survivors at their places of the unpruned prompt, with their groups' features.

    With positions kept, that equals the bare decoder on the whole prompt where groups' features fill all places of
    their members and all but the survivors are masked.
    """
    model, given = models[family], batch(family)
    with foveate.attach(model, foveate.ToMe(r=2), positions="keep") as session:
        logits = model(**given).logits
        images, slots = session.trace.images, [torch.ones_like(given["attention_mask"][0]) for _ in range(2)]
        spread: list[Tensor] = []
        handle = session.adapter.projector.register_forward_hook(lambda module, args, output: spread.append(output))
        model(**given)
        handle.remove()
    for b, image in enumerate(images):
        places = (given["input_ids"][b] == 90).nonzero()[:, 0]
        gone = torch.ones(image.layout.size, dtype=torch.bool)
        gone[image.kept] = False
        slots[b][places[image.layout.places()[gone]]] = 0
    seen = given["attention_mask"] * torch.stack(slots)
    # the projector's output, spread over all places, is what the unpruned model would lay out
    handle = model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: spread[0])
    positions = (given["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    expected = model(**(given | {"attention_mask": seen}), position_ids=positions).logits
    handle.remove()
    for b in range(2):
        at = seen[b].bool()
        torch.testing.assert_close(logits[b, at], expected[b, at], atol=3e-4, rtol=1e-4)


@every_family
@pytest.mark.parametrize(
    "second",
    [foveate.DivPrune(keep=0.5), foveate.FoPru(keep=0.5), foveate.HiPrune(keep=0.5), foveate.FastV(keep=0.5)],
    ids=lambda p: p.name,
)
def test_methods_behind_the_tower_choose_among_survivors(models: dict[str, nn.Module], family: str, second) -> None:
    """Statement: a method at the decoder's entry or inside it prunes what a merger leaves, to its own budget."""
    model, given = models[family], batch(family)
    with foveate.attach(model, foveate.ToMe(r=1)) as session:
        model(**given)
        survivors = [image.kept for image in session.trace.images]
    with foveate.attach(model, foveate.Then(foveate.ToMe(r=1), second)) as session:
        model(**given)
        images = session.trace.images
    for image, left in zip(images, survivors, strict=True):
        assert torch.isin(image.kept, left).all()
        assert 0 < len(image.kept) <= (len(left) + 1) // 2 + 1
        assert image.tokens_per_layer[0] >= image.tokens_per_layer[-1]
        if second.name == "fastv":
            assert image.tokens_per_layer[0] == len(left) + len(image.layout.newlines)


def test_pooled_tokens_are_refused(models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Statement: where OneVision averages neighbours after its tower (videos, shrunk canvases), no token is a group."""
    model = models["llava_onevision"]
    film = inputs("llava_onevision", [[2, picture("llava_onevision", 0, (3, 4, 4)), 4]])
    whole = picture("llava_onevision", 0)
    shrunk = replace(whole, tokens=16 + 6 * (4 + 1))  # its canvas of 8 x 6 tokens has to fit into two views' worth
    with foveate.attach(model, foveate.ToMe(r=2)):
        with pytest.raises(InputError, match="averages the tokens of this video"):
            model(**film)
        model(**inputs("llava_onevision", [[2, whole, 4]]))  # nothing was shrunk
        for config in (model.config, model.model.config):
            monkeypatch.setattr(config, "vision_aspect_ratio", "anyres_max_2")
        with pytest.raises(InputError, match="averages the tokens of this image"):
            model(**inputs("llava_onevision", [[2, shrunk, 4]]))
    assert model(**inputs("llava_onevision", [[2, shrunk, 4]])).logits.isfinite().all(), "the bare model takes it"


def test_several_pictures_merge_one_by_one(models: dict[str, nn.Module]) -> None:
    """Statement: pictures of one sample keep their own tokens; no group crosses from one to the other."""
    model = models["llava_onevision"]
    given = inputs("llava_onevision", [[2, single_view(0), 1, single_view(1), 3]])
    with foveate.attach(model, foveate.ToMe(r=2)) as session:
        model(**given)
        for image in session.trace.images:
            check_groups(image)
            assert len(image.kept) == 16 - 5 * 2


@pytest.mark.parametrize(
    ("family", "why"), [("qwen2_5_vl", "windows"), ("qwen2_vl", "joins neighbouring patches"), ("qwen3_vl", "joins")]
)
def test_towers_that_join_patches_are_refused(family: str, why: str) -> None:
    """Statement: towers whose tokens are windows or blocks of neighbours are refused when a merger is attached."""
    with pytest.raises(UnsupportedModelError, match=why):
        foveate.attach(tiny(family), foveate.ToMe(r=2))
