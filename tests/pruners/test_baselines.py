"""The published and the trivial baselines."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from foveate.cuda import conditional_dpp
from foveate.errors import BudgetError, InputError, MissingSignalError, ParameterError, UnsupportedModelError
from foveate.pruners import (
    AvgPool,
    CDPruner,
    ClipText,
    DivPrune,
    Downsample,
    FastV,
    Grid,
    Hook,
    Layout,
    ModelInfo,
    Random,
    Tokens,
    VisionZip,
)
from foveate.pruners.cdpruner import similarity, stretch
from foveate.pruners.core.lattice import host_slots, lattice, middles, nearest_host
from foveate.pruners.core.method import EncoderFeatures, LastTokenAttention, ReceivedAttention
from foveate.pruners.visionzip import assign, complement, merge
from tests.pruners.synthetic import CLIP, QWEN, C, anyres, first_stage, make_signals, make_tokens, run

# ------------------------------------------------------------------------------------------------------------ FastV


def test_fastv_acts_behind_the_layer_it_reads() -> None:
    """Statement: layers 0 .. K - 1 see everything, layer K - 1's last row decides, positions stay."""
    (stage,) = FastV(k=3).stages(CLIP)
    assert (stage.hook, stage.layer, stage.positions) == (Hook.LLM_LAYER, 3, "keep")
    assert dict(stage.signals) == {"attention": LastTokenAttention(2)}


def test_fastv_counts_what_is_there() -> None:
    """Statement: a fraction counts the tokens that reach the layer (half to even), ties go to lower indices."""
    tokens = make_tokens(Layout.grid(3, 3), 1, 0)
    tokens.embeds = tokens.embeds[:, :5]  # four are gone already
    chosen = FastV().select(tokens, torch.tensor([[0.1, 0.3, 0.3, 0.3, 0.0]]))
    assert chosen.index.tolist() == [[1, 2]]


@pytest.mark.parametrize("k", [0, 32])
def test_fastv_needs_a_layer_before_and_behind(k: int) -> None:
    """Statement: a cut before layer 1 or behind the last layer is refused."""
    with pytest.raises(ParameterError, match=f"k={k}"):
        FastV(k=k).stages(CLIP)


# -------------------------------------------------------------------------------------------------------- VisionZip


def visionzip_by_definition(
    embeds: Tensor, attention: Tensor, keys: Tensor, features: Tensor, dominant: int, contextual: int
) -> tuple[list[int], list[int], Tensor, dict[int, int]]:
    """One image, one token at a time: dominant patches, targets, merged features, member -> target."""
    n = len(attention)
    best = sorted(sorted(range(n), key=lambda i: (-float(attention[i]), i))[:dominant])
    rest = [i for i in range(n) if i not in best]
    step = max(1, len(rest) // contextual)
    targets = [rest[i * step] for i in range(contextual)]
    x = normalize(keys.double(), dim=-1)
    home = {i: max(targets, key=lambda t: float(x[i] @ x[t])) for i in rest if i not in targets}
    merged = []
    for t in targets:
        members = [features[i] for i, own in home.items() if own == t]
        merged.append(features[t] + (sum(members) / len(members) if members else 0))
    return best, targets, torch.stack(merged), home


@pytest.mark.parametrize("class_token", [True, False])
def test_visionzip_against_its_definition(class_token: bool) -> None:
    """Statement: dominant tokens, targets, merged values, owners and order of entry are those of the definition."""
    tokens = make_tokens(Layout.grid(6, 6), 2, 5)
    g = torch.Generator().manual_seed(1)
    attention, keys = torch.rand(2, 36, generator=g), torch.randn(2, 36, C, generator=g)
    features, klass = torch.randn(2, 36, C, generator=g), torch.randn(2, 1, C, generator=g)
    method = VisionZip(dominant=7, contextual=4)
    chosen = method.select(tokens, attention, keys, features, klass if class_token else None)
    entered = chosen.index.gather(1, chosen.order)
    values = chosen.values.gather(1, chosen.order[..., None].expand(-1, -1, 6))
    for b in range(2):
        best, targets, merged, home = visionzip_by_definition(
            tokens.embeds[b], attention[b], keys[b], features[b], 7 - class_token, 4
        )
        free = [i for i in range(36) if i not in best and i not in targets]
        assert entered[b].tolist() == [*free[: int(class_token)], *best, *targets]
        expected = [tokens.project(klass[b])] if class_token else []
        torch.testing.assert_close(values[b], torch.cat([*expected, tokens.embeds[b, best], tokens.project(merged)]))
        for token, target in home.items():
            hosts_class = class_token and token == free[0]
            assert chosen.owner[b, token] == (token if hosts_class else target)


@pytest.mark.parametrize(
    ("k", "split"), [(64, (54, 10)), (128, (108, 20)), (192, (162, 30)), (32, (27, 5)), (1, (1, 0)), (2, (2, 0))]
)
def test_visionzip_splits_as_published(k: int, split: tuple[int, int]) -> None:
    """Statement: budgets divide 54 : 10, which gives every split that was published."""
    assert VisionZip(keep=k).split(k) == split


def test_visionzip_alone_keeps_the_class_token() -> None:
    """Statement: a budget of one is the class token where there is one, else the most attended patch."""
    tokens = make_tokens(Layout.grid(3, 3), 1, 0)
    g = torch.Generator().manual_seed(0)
    attention, keys, features = torch.rand(1, 9, generator=g), torch.randn(1, 9, C), torch.randn(1, 9, C)
    klass = torch.randn(1, 1, C)
    with_class = VisionZip(keep=1).select(tokens, attention, keys, features, klass)
    torch.testing.assert_close(with_class.values, tokens.project(klass))
    without = VisionZip(keep=1).select(tokens, attention, keys, features)
    assert without.index.tolist() == [[int(attention.argmax())]]


def test_visionzip_merges_in_front_of_the_decoder_without_projector() -> None:
    """Statement: where tokens are merged on the way (no per-token projector), decoder embeddings are merged."""
    tokens = make_tokens(Layout.grid(4, 4), 1, 0)
    tokens.project = None
    g = torch.Generator().manual_seed(0)
    attention, keys = torch.rand(1, 16, generator=g), torch.randn(1, 16, C, generator=g)
    chosen = VisionZip(dominant=3, contextual=2).select(tokens, attention, keys, torch.full((1, 16, C), torch.nan))
    _, _, merged, _ = visionzip_by_definition(tokens.embeds[0], attention[0], keys[0], tokens.embeds[0], 3, 2)
    torch.testing.assert_close(chosen.values.gather(1, chosen.order[..., None].expand(-1, -1, 6))[0, 3:], merged)


def test_visionzip_refuses_more_than_a_view_has() -> None:
    """Statement: at most N + 1 tokens with a class token, N without; empty views do not count, ``keep`` is capped as ever."""
    layout = anyres((4, 4), [3, 0], [3, 2])  # the smallest view that is not empty: 3 x 2
    tokens = make_tokens(layout, 1, 0)
    for dominant, contextual, class_token, fits in [
        (4, 3, True, True),
        (5, 3, True, False),
        (4, 2, False, True),
        (4, 3, False, False),
    ]:
        method, model = VisionZip(dominant=dominant, contextual=contextual), CLIP if class_token else QWEN
        if fits:
            assert run(method, tokens, model).index.shape[1] == method.kept_in(layout)
        else:
            asked = dominant + contextual
            with pytest.raises(BudgetError, match=rf"{dominant} and .*{contextual} ask for {asked} .* 3 x 2 has 6"):
                run(method, tokens, model)
    with pytest.raises(BudgetError, match="ask for 8 tokens"):
        VisionZip(dominant=5, contextual=3).kept_in(layout)
    assert VisionZip(keep=layout.size).kept_in(layout) == layout.size


@pytest.mark.parametrize("features_dtype", [torch.float32, torch.bfloat16])
def test_visionzip_in_half_precision(features_dtype: torch.dtype) -> None:
    """Statement: features of any precision are merged in float32 and reach the decoder in the tokens' precision."""
    tokens = make_tokens(Layout.grid(4, 4), 2, 0)
    exact, seen = tokens.project, []

    def project(features: Tensor) -> Tensor:
        seen.append(features.dtype)
        return exact(features.float()).bfloat16()

    stage = first_stage(VisionZip(dominant=5, contextual=3))
    signals = make_signals(stage, tokens, 0)
    for name in ("features", "class_features"):
        signals[name] = signals[name].to(features_dtype)
    expected = stage.select(tokens, **{name: signal.float() for name, signal in signals.items()})
    tokens.embeds, tokens.project = tokens.embeds.bfloat16(), project
    chosen = stage.select(tokens, **signals)
    assert seen == [torch.float32, features_dtype]
    assert chosen.values.dtype == torch.bfloat16
    assert torch.equal(chosen.index, expected.index)
    torch.testing.assert_close(chosen.values, expected.values.bfloat16())


def test_visionzip_needs_a_way_for_the_class_token() -> None:
    """Statement: a class token that no projector takes to the decoder is an error that names other methods."""
    tokens = make_tokens(Layout.grid(4, 4), 1, 0)
    tokens.project = None
    with pytest.raises(MissingSignalError, match=r"no projector.*hiprune"):
        run(VisionZip(keep=4), tokens)


def test_visionzip_order_of_crops() -> None:
    """Statement: thumbnail first; then the crops' dominant patches in raster order of the canvas; then class and merged tokens."""
    layout = anyres((3, 3), [3], [3, 3])
    tokens = make_tokens(layout, 1, 0)
    chosen = run(VisionZip(dominant=3, contextual=2), tokens)
    entered = chosen.index.gather(1, chosen.order)[0]
    kinds = [next(v.kind for v in layout.views if int(t) in v.tokens().tolist()) for t in entered]
    assert kinds == ["thumbnail"] * 5 + ["crop"] * 10
    patches = entered[5:9]
    assert (patches.diff() > 0).all()
    unchanged = (chosen.values[0] == tokens.embeds[0, chosen.index[0]]).all(dim=1)[chosen.order[0]]
    assert unchanged.tolist() == [False, True, True, False, False] + [True] * 4 + [False] * 6


def test_visionzip_without_class_token_reads_received_attention() -> None:
    """Statement: towers without class token are ranked by the attention each token receives from all."""
    assert first_stage(VisionZip(), QWEN).signals["attention"] == ReceivedAttention(31)
    assert "class_features" not in first_stage(VisionZip(), QWEN).signals


def test_visionzip_pieces() -> None:
    """Statement: complement, target spacing and the target-plus-mean rule on an example worked by hand."""
    assert complement(torch.tensor([[3, 0]]), 5).tolist() == [[1, 2, 4]]
    keys = torch.tensor([[[1.0, 0], [0, 1.0], [0.9, 0.1], [0.1, 0.9], [1.0, 0.1]]])
    rest = torch.arange(5)[None]
    targets, assigned = assign(keys, rest, 2)  # step 2: tokens 0 and 2
    assert targets.tolist() == [[0, 2]]
    assert assigned.tolist() == [[0, 2, 2, 2, 2]]
    hidden = torch.arange(5.0)[None, :, None]
    assert merge(hidden, rest, targets, assigned).flatten().tolist() == pytest.approx([0.0, 2 + (1 + 3 + 4) / 3])


@pytest.mark.parametrize(
    "wrong", [{"dominant": 5}, {"dominant": 0, "contextual": 3}, {"dominant": 3, "contextual": -1}]
)
def test_visionzip_bad_splits(wrong: dict[str, int]) -> None:
    """Statement: half a split, or one without dominant tokens, is refused."""
    with pytest.raises((ParameterError, BudgetError), match=r"dominant=|contextual="):
        VisionZip(**wrong)


# --------------------------------------------------------------------------------------------------------- DivPrune


def divprune_by_definition(features: Tensor, k: int) -> list[int]:
    """Max-min diversity over the cosine distance matrix in float64, as the paper writes it."""
    x = normalize(features.double(), dim=-1)
    distance = 1 - x @ x.T
    distance = distance.triu() + distance.triu(1).T  # a pair has one distance, however (i, j) and (j, i) are rounded
    n = len(x)
    nearest = [min(float(distance[i, j]) for j in range(n) if j != i) for i in range(n)]
    chosen = [max(range(n), key=lambda i: (nearest[i], -i))]
    while len(chosen) < k:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: (min(float(distance[i, c]) for c in chosen), -i)))
    return chosen


def test_divprune_against_its_definition() -> None:
    """Statement: first the token whose nearest other token is farthest, then farthest from the nearest pick."""
    tokens = make_tokens(Layout.grid(5, 5), 3, 2)
    index = DivPrune(keep=9).select(tokens).index
    for b in range(3):
        assert index[b].tolist() == sorted(divprune_by_definition(tokens.embeds[b], 9))


def test_divprune_never_repeats_a_duplicate() -> None:
    """Statement: more picks than distinct tokens still gives distinct indices, lowest first."""
    embeds = torch.eye(3).repeat_interleave(3, dim=0)[None]  # three of each
    chosen = DivPrune(keep=5).select(Tokens(embeds, Layout.grid(3, 3), (0,)))
    assert chosen.index.tolist() == [[0, 1, 2, 3, 6]]


def test_divprune_takes_zero_tokens() -> None:
    """Statement: zero vectors are orthogonal to everything and give no NaN."""
    embeds = torch.zeros(1, 4, 3)
    embeds[0, 1] = torch.tensor([1.0, 0, 0])
    assert DivPrune(keep=2).select(Tokens(embeds, Layout.grid(2, 2), (0,))).index.tolist() == [[0, 1]]


def test_divprune_budget() -> None:
    """Statement: the published ratio 0.098 keeps 56 of 576."""
    assert DivPrune().kept(576) == 56


# --------------------------------------------------------------------------------------------------------- CDPruner


def dpp_by_definition(features: Tensor, relevance: Tensor, k: int) -> list[int]:
    """Greedy MAP by determinants in float64."""
    x = normalize(features.double(), dim=-1)
    kernel = relevance.double()[:, None] * (x @ x.T) * relevance.double()
    chosen: list[int] = []
    for _ in range(k):
        left = [i for i in range(len(x)) if i not in chosen]
        volume = {i: float(torch.det(kernel[[*chosen, i]][:, [*chosen, i]])) for i in left}
        chosen.append(max(left, key=lambda i: (volume[i], -i)))
    return chosen


def test_dpp_maximises_the_determinant_greedily() -> None:
    """Statement: every pick makes the kernel's determinant as large as one more token can."""
    g = torch.Generator().manual_seed(0)
    features, relevance = torch.randn(2, 14, 9, generator=g), torch.rand(2, 14, generator=g) + 0.1
    picks = conditional_dpp(features, relevance, 6)
    for b in range(2):
        assert picks[b].tolist() == dpp_by_definition(features[b], relevance[b], 6)


def test_dpp_beyond_its_rank() -> None:
    """Statement: once the rank is used up the lowest free tokens follow, without NaN or repetition."""
    g = torch.Generator().manual_seed(3)
    features, relevance = torch.randn(1, 12, 3, generator=g), torch.rand(1, 12, generator=g) + 0.1
    picks = conditional_dpp(features, relevance, 8)[0].tolist()
    assert picks[:3] == dpp_by_definition(features[0], relevance[0], 3)
    assert picks[3:] == [i for i in range(12) if i not in picks[:3]][:5]


def test_dpp_of_equal_relevance_starts_at_the_lowest_index() -> None:
    """Statement: all first gains tie when relevance is constant, and round-off of the norms does not break the tie."""
    for seed in range(20):
        features = torch.randn(1, 40, 7, generator=torch.Generator().manual_seed(seed))
        assert int(conditional_dpp(features, torch.ones(1, 40), 1)) == 0


def test_constant_relevance_is_a_plain_dpp() -> None:
    """Statement: equal relevance, up to float32 noise, becomes ones instead of a division by zero."""
    assert torch.equal(stretch(torch.full((1, 4), 0.3) + torch.tensor([0, 1e-8, 0, 0])), torch.ones(1, 4))
    spread = stretch(torch.tensor([[0.0, 1.0, 3.0]]))
    torch.testing.assert_close(
        spread, torch.tensor([[1e-6, 1.0, 3.0]]) / torch.tensor([3.0, 3.0, 3.0]), atol=1e-6, rtol=0
    )


def test_relevance_is_stretched_per_image_over_all_crops() -> None:
    """Statement: minimum and maximum are taken over the crops of an image together, never across images."""
    layout = Layout.video(2, 1, 3)
    tokens = make_tokens(layout, 2, 0)
    tokens.embeds[0, :3] *= 0  # irrelevant crop of the first image
    scores = CDPruner(keep=2).select(tokens).scores
    expected = torch.stack([stretch(similarity(tokens.embeds[[b]], tokens.instruction[[b]]))[0] for b in range(2)])
    torch.testing.assert_close(scores, expected)


def test_masked_words_do_not_count() -> None:
    """Statement: padding of the instruction changes nothing, and an image without text gets a plain DPP."""
    tokens = make_tokens(Layout.grid(4, 4), 2, 1)
    tokens.instruction_mask = torch.tensor([[True, True, False], [False, False, False]])
    tokens.instruction = tokens.instruction.masked_fill(~tokens.instruction_mask[..., None], 7.0)
    scores = CDPruner(keep=3).select(tokens).scores
    torch.testing.assert_close(scores[0], stretch(similarity(tokens.embeds[:1], tokens.instruction[:1, :2]))[0])
    assert torch.equal(scores[1], torch.ones(16))
    silent = CDPruner(keep=3, relevance="none").select(tokens)
    assert torch.equal(silent.index[1], CDPruner(keep=3).select(tokens).index[1])


class Words:
    """A tokenizer whose words are numbers."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i == 0))

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *(int(word) for word in text.split()), 2]}


def tiny_clip() -> ClipText:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    shared = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(
        text_config={"hidden_size": 8, "vocab_size": 64, "max_position_embeddings": 5, "eos_token_id": 2, **shared},
        vision_config={"hidden_size": C, "image_size": 8, "patch_size": 4, **shared},
        projection_dim=7,
    )
    return ClipText(CLIPModel(config).eval(), Words(), Words())


def test_clip_text_is_cut_into_segments() -> None:
    """Statement: text longer than the text tower becomes several zero-padded segments; shorter samples have fewer."""
    clip = tiny_clip()
    ids = torch.tensor([[9, 8, 7, 6, 5, 4], [3, 0, -1, -1, -1, -1]])
    embeds, exists = clip.text_embeds(ids)
    assert exists.tolist() == [[True, True], [True, False]]
    words = torch.tensor([[1, 9, 8, 7, 6], [5, 4, 2, 0, 0], [1, 3, 2, 0, 0]])
    with torch.no_grad():
        expected = clip.model.get_text_features(words, return_dict=True).pooler_output
    torch.testing.assert_close(embeds[exists], expected)


def test_clip_relevance_is_negated() -> None:
    """Statement: with CLIP the patches *least* similar to the text are most relevant, through post-norm and projection."""
    method = CDPruner(keep=3, clip=tiny_clip())
    assert dict(first_stage(method).signals) == {"features": EncoderFeatures(22)}
    tokens = make_tokens(Layout.grid(4, 4), 1, 0)
    tokens.instruction_ids = torch.tensor([[9, 8, 7]])
    features = torch.randn(1, 16, C, generator=torch.Generator().manual_seed(0))
    scores = method.select(tokens, features).scores
    with torch.no_grad():
        image = clip_space(method.clip, features)
        text, _ = method.clip.text_embeds(tokens.instruction_ids)
    cosine = normalize(image, dim=-1) @ normalize(text, dim=-1).mT
    falling = cosine[0, scores[0].argsort(), 0]
    assert (falling.diff() < 1e-6).all()
    assert falling[0] - falling[-1] > 0.1


def clip_space(clip: ClipText, features: Tensor) -> Tensor:
    return clip.model.visual_projection(clip.model.vision_model.post_layernorm(features))


def test_clip_of_another_tower_is_refused() -> None:
    """Statement: a CLIP model that cannot read the tower's features is named, with the way out."""
    with pytest.raises(MissingSignalError, match=r"9 channels.*reads 5"):
        tiny_clip().image_embeds(torch.zeros(1, 2, 9))
    with pytest.raises(ParameterError, match="contradicts"):
        CDPruner(relevance="none", clip=tiny_clip())
    with pytest.raises(MissingSignalError, match="Qwen2_5_VisionTransformer"):
        CDPruner(clip=tiny_clip()).stages(QWEN)


# ----------------------------------------------------------------------------------------------------------- Random


def test_random_depends_on_seed_and_image_alone() -> None:
    """Statement: the draw follows the image through batches and changes with the seed."""
    tokens = make_tokens(Layout.grid(8, 8), 3, 0)
    index = Random(keep=10).select(tokens).index
    swapped = Tokens(tokens.embeds * 2, tokens.layout, tokens.sample_ids[::-1])
    assert torch.equal(Random(keep=10).select(swapped).index, index.flip(0))
    assert not torch.equal(Random(keep=10, seed=1).select(tokens).index, index)
    assert len({tuple(row) for row in index.tolist()}) == 3


def test_random_is_uniform() -> None:
    """Statement: over many images every token is kept about equally often."""
    tokens = Tokens(torch.zeros(2000, 12, 1), Layout.grid(3, 4), tuple(range(2000)))
    counts = Random(keep=4).select(tokens).index.flatten().bincount(minlength=12)
    assert (counts - 2000 / 3).abs().max() < 5 * math.sqrt(2000 * 2 / 9)


def test_random_draws_views_apart() -> None:
    """Statement: thumbnail and crops are drawn separately with the same ratio."""
    layout = anyres((4, 4), [4], [4, 2])
    assert Random(keep=0.25).budgets(layout) == (4, 4, 2)
    assert Random(keep=5).budgets(layout) == (2, 2, 1)
    index = Random(keep=0.25).select(make_tokens(layout, 1, 0)).index[0]
    local = [torch.isin(view.tokens(), index).nonzero().flatten().tolist() for view in layout.views]
    assert [len(part) for part in local] == [4, 4, 2]
    assert local[0] != local[1]


def test_random_draws_images_of_several_views_apart() -> None:
    """Statement: no view draws like one of another image, and a view's draw does not depend on the batch."""
    frames, picture = Layout.video(2, 8, 8), Layout.grid(8, 8)

    def draw(layout: Layout, *ids: int) -> Tensor:
        tokens = Tokens(torch.zeros(len(ids), layout.size, 1), layout, ids)
        return Random(keep=0.25).select(tokens).index.view(len(ids), len(layout.views), 16) % 64

    drawn = torch.cat([draw(frames, *range(5)).flatten(0, 1), draw(picture, *range(12)).flatten(0, 1)])
    assert len({tuple(row) for row in drawn.tolist()}) == len(drawn) == 22
    assert torch.equal(draw(frames, 3), draw(frames, 0, 3)[1:])


def test_random_shuffles_on_request() -> None:
    """Statement: the same tokens are kept, in another order."""
    tokens = make_tokens(Layout.grid(6, 6), 1, 0)
    plain, shuffled = Random(keep=12).select(tokens), Random(keep=12, shuffle=True).select(tokens)
    assert torch.equal(plain.index, shuffled.index)
    assert plain.order is None
    assert not torch.equal(shuffled.order, torch.arange(12)[None])


def test_random_is_the_control_for_fastv() -> None:
    """Statement: at a layer it acts where and on as many tokens as FastV, crops and survivors of other stages included."""
    (control,), (fastv,) = Random(layer=3).stages(CLIP), FastV(k=3).stages(CLIP)
    assert (control.hook, control.layer, control.positions) == (fastv.hook, fastv.layer, fastv.positions)
    assert not control.signals
    layout = anyres((3, 3), [3], [3, 2])
    tokens = make_tokens(layout, 2, 0)
    for count in (layout.size, 11):
        tokens.embeds = tokens.embeds[:, :count]
        for keep in (0.25, 0.5, 1.0, 7):
            chosen = Random(keep=keep, layer=3).select(tokens)
            assert chosen.index.shape == FastV(keep=keep, k=3).select(tokens, torch.rand(2, count)).index.shape
            assert (chosen.index.diff(dim=1) > 0).all()
            assert chosen.order is None
            assert int(chosen.index.max()) < count
    assert Random(keep=0.3, layer=3).budgets(layout) == FastV(keep=0.3, k=3).budgets(layout)


def test_random_at_a_layer_follows_the_image() -> None:
    """Statement: the draw depends on seed and image id there, too, and is made over all crops together."""
    tokens = make_tokens(anyres((4, 4), [4], [4, 4]), 3, 0)
    index = Random(keep=12, layer=2).select(tokens).index
    swapped = Tokens(tokens.embeds, tokens.layout, tokens.sample_ids[::-1])
    assert torch.equal(Random(keep=12, layer=2).select(swapped).index, index.flip(0))
    assert not torch.equal(Random(keep=12, layer=2, seed=1).select(tokens).index, index)
    assert len({tuple(row) for row in index.tolist()}) == 3


def test_random_needs_a_layer_before_and_behind() -> None:
    """Statement: layer 0, a layer the decoder does not have, and shuffling inside it are refused."""
    with pytest.raises(ParameterError, match="layer=0"):
        Random(layer=0)
    with pytest.raises(ParameterError, match=r"layer=32.*1 \.\. 31"):
        Random(layer=32).stages(CLIP)
    with pytest.raises(ParameterError, match=r"shuffle.*layer=2"):
        Random(layer=2, shuffle=True)


# ------------------------------------------------------------------------------------------------- Grid and AvgPool


def test_lattice_rule() -> None:
    """Statement: largest product within the budget, then nearest aspect ratio, then more rows; checked exhaustively."""
    for rows, cols, k in itertools.product(range(1, 8), range(1, 8), range(1, 50)):
        sizes = [(r, c) for r in range(1, rows + 1) for c in range(1, cols + 1) if r * c <= k]
        most = max(r * c for r, c in sizes)
        expected = min((s for s in sizes if s[0] * s[1] == most), key=lambda s: (abs(s[0] / s[1] - rows / cols), -s[0]))
        assert lattice((rows, cols), k) == expected


@pytest.mark.parametrize(("k", "small"), [(144, (12, 12)), (64, (8, 8)), (192, (12, 16)), (128, (8, 16)), (32, (4, 8))])
def test_lattices_of_the_usual_budgets(k: int, small: tuple[int, int]) -> None:
    """Statement: what the usual budgets mean on 24 x 24 tokens: rows over columns nearest to one."""
    assert lattice((24, 24), k) == small


def test_lattice_positions() -> None:
    """Statement: row i stands at ``floor((i + 1/2) rows / gr)``, columns alike, in raster order."""
    assert middles(24, 5).tolist() == [math.floor((i + 0.5) * 24 / 5) for i in range(5)]
    assert Grid(keep=4).select(make_tokens(Layout.grid(4, 6), 1, 0)).index.tolist() == [[7, 10, 19, 22]]


def test_lattice_counts_are_real() -> None:
    """Statement: the count reported is that of the lattice, not the budget."""
    assert Grid(keep=7).kept(16, (4, 4)) == 6  # no 7-token lattice fits 4 rows and columns
    with pytest.raises(ParameterError, match="grid"):
        Grid(keep=7).kept(16)


def test_stride_is_exact() -> None:
    """Statement: the one-axis variant keeps exactly k, evenly spaced in raster order."""
    tokens = make_tokens(Layout.grid(4, 5), 1, 0)
    index = Grid(keep=7, variant="stride").select(tokens).index[0].tolist()
    assert index == [math.floor((i + 0.5) * 20 / 7) for i in range(7)]
    assert Grid(keep=7, variant="stride").kept(20) == 7


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize(("grid", "k"), [((6, 4), 6), ((5, 7), 6), ((3, 8), 5), ((4, 4), 1)])
def test_pooling_bins(pool: str, grid: tuple[int, int], k: int) -> None:
    """Statement: bin i covers rows floor(i rows / gr) .. ceil((i + 1) rows / gr) exclusive, columns alike."""
    (rows, cols), small = grid, lattice(grid, k)
    tokens = make_tokens(Layout.grid(*grid), 2, 0)
    chosen = AvgPool(keep=k, pool=pool).select(tokens)
    picture = tokens.embeds.unflatten(1, grid)

    def span(i: int, n: int, m: int) -> slice:
        return slice(math.floor(i * n / m), math.ceil((i + 1) * n / m))

    for j, (r, c) in enumerate(itertools.product(range(small[0]), range(small[1]))):
        cell = picture[:, span(r, rows, small[0]), span(c, cols, small[1])].flatten(1, 2)
        torch.testing.assert_close(chosen.values[:, j], cell.mean(dim=1) if pool == "mean" else cell.amax(dim=1))


def test_pooled_tokens_stand_in_their_bins() -> None:
    """Statement: host slots are the grid baseline's, and the owner of every token is a host whose bin holds the token."""
    for rows, cols, k in itertools.product(range(1, 9), range(1, 9), (1, 2, 3, 5, 8, 13, 21)):
        small = lattice((rows, cols), k)
        hosts, owner = host_slots((rows, cols), small), nearest_host((rows, cols), small)
        assert torch.equal(owner[hosts], hosts)
        for token, host in enumerate(owner.tolist()):
            for at, to, n, m in (
                (token // cols, host // cols, rows, small[0]),
                (token % cols, host % cols, cols, small[1]),
            ):
                i = middles(n, m).tolist().index(to)
                assert math.floor(i * n / m) <= at < math.ceil((i + 1) * n / m)


# ------------------------------------------------------------------------------------------------------- Downsample


def test_downsample_shrinks_pixels_to_the_lattice() -> None:
    """Statement: the tower sees exactly gr x gc patches; a flat picture stays flat, brightness and dtype are kept."""
    model = ModelInfo(family="llava", patch_size=4)
    pixels, tokens = Downsample(keep=6).stages(model)
    assert (pixels.hook, tokens.hook) == (Hook.PIXELS, Hook.LLM_INPUT)
    small = pixels.select(torch.full((2, 3, 16, 16), 0.25, dtype=torch.bfloat16))
    assert lattice((4, 4), 6) == (2, 3)
    assert small.shape == (2, 3, 8, 12)
    assert small.dtype == torch.bfloat16
    torch.testing.assert_close(small, torch.full_like(small, 0.25))
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    torch.testing.assert_close(pixels.select(ramp).mean(), ramp.mean(), atol=0.01, rtol=0)


def test_downsample_hosts_the_features_on_the_grid() -> None:
    """Statement: the fewer features, which come first, move to the slots of the grid baseline."""
    tokens = make_tokens(Layout.grid(4, 4), 2, 0)
    tokens.embeds[:, 6:] = 0
    chosen = Downsample(keep=6).select(tokens)
    assert torch.equal(chosen.index, Grid(keep=6).select(tokens).index)
    assert torch.equal(chosen.values, tokens.embeds[:, :6])


def test_downsample_notices_another_number_of_patches() -> None:
    """Statement: a tower that did not shrink as asked is an error, not a wrong picture."""
    with pytest.raises(InputError, match=r"for 6 patches.*returned 16"):
        Downsample(keep=6).select(make_tokens(Layout.grid(4, 4), 1, 0))


def test_downsample_of_any_resolution_resizes_the_picture() -> None:
    """Statement: Qwen families have no stage; ``prepare`` scales each side by sqrt(keep), and needs a fraction."""
    assert Downsample().stages(QWEN) == ()
    assert Downsample(keep=0.25).prepare(Image.new("RGB", (100, 61))).size == (50, 30)
    assert Downsample(keep=1.0).prepare(Image.new("RGB", (7, 9))).size == (7, 9)
    with pytest.raises(BudgetError, match="fraction"):
        Downsample(keep=64).prepare(Image.new("RGB", (100, 61)))


def test_downsample_refuses_crops() -> None:
    """Statement: families that cut pictures into crops are named as unsupported, with alternatives."""
    with pytest.raises(UnsupportedModelError, match="llava_next; use avgpool or grid"):
        Downsample().stages(ModelInfo(family="llava_next"))
    with pytest.raises(UnsupportedModelError, match="3"):
        Downsample().kept_in(anyres((2, 2), [2], [2, 2]))


@pytest.mark.parametrize(
    ("method", "wrong"), [(Grid, {"variant": "hex"}), (AvgPool, {"pool": "sum"}), (CDPruner, {"relevance": "clip"})]
)
def test_bad_parameters_are_named(method: type, wrong: dict[str, str]) -> None:
    """Statement: an unknown choice is refused with its value."""
    with pytest.raises(ParameterError, match=next(iter(wrong.values()))):
        method(**wrong)
