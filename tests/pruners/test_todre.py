"""ToDRE: pivots, diversification, and the removal inside the decoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.errors import MissingSignalError, ParameterError
from foveate.pruners import AtEntry, BeforeLayer, Layout, ModelInfo, ToDRE, Tokens
from foveate.pruners.core.signals import ClassAttention, CrossModalAttention
from foveate.pruners.todre import attended_pivot, closeness_to_mean, diversification, irrelevant
from tests.pruners.synthetic import CLIP, QWEN, anyres, first_stage, make_tokens


def by_definition(features: Tensor, k: int, pivot: int, diversity: str) -> list[int]:
    """The paper's greedy rule in float64, one candidate at a time."""
    x = torch.nn.functional.normalize(features.double(), dim=-1)
    chosen = [pivot]
    while len(chosen) < k:
        left = [i for i in range(len(x)) if i not in chosen]
        similar = {i: [float(x[i] @ x[c]) for c in chosen] for i in left}
        score = {i: sum(s) if diversity == "max_sum" else max(s) for i, s in similar.items()}
        chosen.append(min(left, key=lambda i: (score[i], i)))
    return chosen


@pytest.mark.parametrize("diversity", ["max_sum", "k_center"])
def test_diversification_follows_the_greedy_rule(diversity: str) -> None:
    """Statement: each pick minimises the summed (v2) or largest (v1) similarity to the picks before it."""
    torch.manual_seed(0)
    features = torch.randn(3, 20, 8)
    picks = diversification(features, 9, torch.tensor([4, 0, 19]), diversity)
    for b, pivot in enumerate([4, 0, 19]):
        assert picks[b].tolist() == by_definition(features[b], 9, pivot, diversity)


@pytest.mark.parametrize("diversity", ["max_sum", "k_center"])
def test_duplicates_and_zeros_are_taken_once_lowest_first(diversity: str) -> None:
    """Statement: identical or zero tokens never loop, repeat or give NaN; ties go to the lowest index."""
    same = torch.ones(1, 6, 4)
    assert diversification(same, 6, torch.tensor([3]), diversity).tolist() == [[3, 0, 1, 2, 4, 5]]
    assert diversification(torch.zeros(1, 5, 4), 5, torch.tensor([2]), diversity).tolist() == [[2, 0, 1, 3, 4]]


def test_zero_tokens_count_as_orthogonal() -> None:
    """Statement: a zero vector has similarity 0 to everything: farther than a like one, nearer than an opposite one."""
    features = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 0.0], [-1.0, 0.0]]])
    assert diversification(features, 4, torch.tensor([0]), "k_center").tolist() == [[0, 3, 2, 1]]


def test_pivot_is_the_token_the_class_token_attends_to() -> None:
    """Statement: arg max over a plain picture, ties to the lowest index; arg max over all frames of a video."""
    attention = torch.tensor([[0.1, 0.4, 0.4, 0.1]])
    assert attended_pivot(attention, Layout.grid(2, 2)).tolist() == [1]
    assert attended_pivot(torch.tensor([[0.1, 0.2, 0.1, 0.1, 0.5, 0.1]]), Layout.video(2, 1, 3)).tolist() == [4]


def test_pivot_comes_from_the_thumbnail_only() -> None:
    """Statement: with AnyRes the start token lies in the thumbnail, however strongly a crop is attended."""
    layout = anyres((2, 2), [2], [2, 2])
    attention = torch.full((1, 12), 0.9)
    attention[:, :4] = torch.tensor([0.0, 0.1, 0.3, 0.2])
    assert attended_pivot(attention, layout).tolist() == [2]


def test_crops_form_one_pool() -> None:
    """Statement: thumbnail and crops compete for one budget."""
    layout = anyres((2, 2), [2], [2, 2])
    tokens = make_tokens(layout, 1, 0)
    tokens.embeds[:, :8] = torch.eye(6)[0]  # thumbnail and the crops' first row all alike
    attention = torch.rand(1, 12, generator=torch.Generator().manual_seed(0))
    index = ToDRE(keep=5, pivot="cls", diversity="k_center").diversify(tokens, attention).index[0]
    assert int((index < 8).sum()) == 1


@pytest.mark.parametrize(("rule", "expected"), [("center", 0), ("farthest", 3)])
def test_geometric_pivots(rule: str, expected: int) -> None:
    """Statement: ``center`` is nearest to the mean direction, ``farthest`` most opposed to it."""
    features = torch.tensor([[[1.0, 0.1], [1.0, 1.0], [1.0, -0.5], [-1.0, 0.3]]])
    assert closeness_to_mean(features).shape == (1, 4)
    tokens = Tokens(features, Layout.grid(2, 2), (0,))
    assert ToDRE(keep=1, pivot=rule).diversify(tokens).index.tolist() == [[expected]]


def test_random_pivots_depend_on_seed_and_image_only() -> None:
    """Statement: the random start is drawn per (seed, image id)."""
    tokens = make_tokens(Layout.grid(8, 8), 3, 0)

    def pivot(seed: int, tokens: Tokens = tokens) -> list[list[int]]:
        return ToDRE(keep=1, pivot="random", seed=seed).diversify(tokens).index.tolist()

    assert pivot(0) == pivot(0)
    assert len({str(pivot(seed)) for seed in range(8)}) > 4
    swapped = Tokens(tokens.embeds, tokens.layout, tokens.sample_ids[::-1])
    assert pivot(0, swapped) == pivot(0)[::-1]


def test_default_pivot_follows_the_tower() -> None:
    """Statement: by default the class token of the last block decides; towers without one start from the farthest
    token.
    """
    assert dict(first_stage(ToDRE()).signals) == {"class_attention": ClassAttention(23)}
    assert dict(first_stage(ToDRE(cls_layer=-2)).signals) == {"class_attention": ClassAttention(22)}
    stage = first_stage(ToDRE(keep=3), QWEN)
    assert not stage.signals
    tokens = make_tokens(Layout.grid(4, 4), 2, 0)
    assert torch.equal(stage.select(tokens).index, ToDRE(keep=3, pivot="farthest").diversify(tokens).index)


def test_an_explicit_class_pivot_is_not_replaced() -> None:
    """Statement: asking for the class token where there is none is an error naming signal, tower and alternatives."""
    with pytest.raises(MissingSignalError, match=r"class token.*Qwen2_5_VisionTransformer.*farthest"):
        ToDRE(pivot="cls").stages(QWEN)


@pytest.mark.parametrize(("layers", "n"), [(32, 28), (40, 35), (28, 24), (5, 4)])
def test_stage_2_acts_at_seven_eighths(layers: int, n: int) -> None:
    """Statement: ``n = floor(7 L / 8)`` layers see the picture, the test reads layer n - 1, positions stay."""
    stage = ToDRE(stage1=False).stages(ModelInfo(decoder_layers=layers))[0]
    assert (type(stage), stage.layer, stage.positions) == (BeforeLayer, n, "keep")
    assert dict(stage.signals) == {"shares": CrossModalAttention(n - 1)}


def test_the_system_prompt_can_be_told_apart() -> None:
    """Statement: stage 2 reads shares without the stated system tokens; by default all in front of the picture are."""
    (stage,) = ToDRE(stage1=False, system_tokens=5).stages(CLIP)
    assert dict(stage.signals) == {"shares": CrossModalAttention(27, system_tokens=5)}
    (stage,) = ToDRE(stage1=False).stages(CLIP)
    assert dict(stage.signals) == {"shares": CrossModalAttention(27, system_tokens=None)}


def test_several_depths_are_tested_in_order_once() -> None:
    """Statement: check points are visited in depth order, without repetition."""
    stages = ToDRE(stage1=False, check_depth=(7 / 8, 0.5, 0.51)).stages(CLIP)
    assert [stage.layer for stage in stages] == [16, 28]


def test_removal_needs_both_shares_below_the_threshold() -> None:
    """Statement: visual tokens go iff both shares are strictly below tau."""
    shares = torch.tensor([[0.05, 0.05], [0.1, 0.0], [0.0, 0.2], [0.0, 0.0]])
    assert irrelevant(shares, 0.1).tolist() == [True, False, False, True]


def test_every_image_is_decided_by_itself() -> None:
    """Statement: stage 2 removes all tokens of one image and none of another in the same batch."""
    tokens = make_tokens(Layout.grid(1, 3), 2, 0)
    mixed = ToDRE().drop_irrelevant(tokens, torch.tensor([[0.0, 0.0], [0.5, 0.0]]))
    assert mixed.index.tolist() == [[-1, -1, -1], [0, 1, 2]]
    assert ToDRE().drop_irrelevant(tokens, torch.zeros(2, 2)).index.shape == (2, 0)
    assert ToDRE().drop_irrelevant(tokens, torch.ones(2, 2)).index.tolist() == [[0, 1, 2]] * 2


def test_switches() -> None:
    """Statement: each stage can be left out, the count is known exactly without stage 2, and not both may be off."""
    assert [type(s) for s in ToDRE(stage2=False).stages(CLIP)] == [AtEntry]
    assert [type(s) for s in ToDRE(stage1=False).stages(CLIP)] == [BeforeLayer]
    picture = Layout.grid(10, 10)
    assert ToDRE().count(picture) is ToDRE(stage1=False).count(picture) is None
    assert ToDRE(stage2=False).count(picture) == 10
    with pytest.raises(ParameterError, match="both off"):
        ToDRE(stage1=False, stage2=False)


def test_budget_rounds_half_to_even() -> None:
    """Statement: ``k = max(1, round_half_even(ratio * n))``: 288 and 720 of 2880."""
    assert [ToDRE(keep=r, stage2=False).count(Layout.grid(1, 2880)) for r in (0.1, 0.25)] == [288, 720]
    assert [ToDRE(keep=0.5, stage2=False).count(Layout.grid(1, n)) for n in (5, 7, 1)] == [2, 4, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"diversity": "k-center"},
        {"pivot": "first"},
        {"pivot": -1},
        {"tau": 1.5},
        {"check_depth": (1.0,)},
        {"system_tokens": -1},
    ],
)
def test_bad_parameters_are_named(wrong: dict[str, object]) -> None:
    """Statement: an unusable value is refused, naming the parameter."""
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        ToDRE(**wrong)


def test_pivot_outside_the_image() -> None:
    """Statement: a token number beyond the picture is refused when it is known."""
    with pytest.raises(ParameterError, match=r"0 \.\. 15"):
        ToDRE(keep=2, pivot=16).diversify(make_tokens(Layout.grid(4, 4), 1, 0))
