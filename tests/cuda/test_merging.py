"""The operations of token mergers against definitions written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.cuda import best_match, merge_tokens, similarity_energy
from foveate.cuda.merging import take_rows


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def energy_by_hand(metric: Tensor, margin: float, alpha: float, jump: bool) -> Tensor:
    metric = metric.double()
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    similarity = unit @ unit.mT
    above = similarity if jump else similarity - margin
    return torch.where(similarity > margin, above, alpha * ((similarity - margin).exp() - 1)).mean(dim=-1)


@pytest.mark.parametrize(("alpha", "jump"), [(1.0, False), (0.5, False), (0.0, False), (1.0, True)])
def test_energy_is_its_definition(alpha: float, jump: bool) -> None:
    """Statement: the energy is the mean of f over all tokens, zero rows being similar to nothing."""
    metric = drawn(2, 17, 6)
    metric[0, 3] = 0
    found = similarity_energy(metric, 0.3, alpha=alpha, jump=jump)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, energy_by_hand(metric, 0.3, alpha, jump).float(), atol=1e-6, rtol=1e-5)


def test_what_lies_above_the_margin_keeps_its_precision() -> None:
    """Statement: with alpha 0 the energies, about a thousandth, are right to 5e-9: nothing larger is subtracted."""
    metric = drawn(2, 196, 64) + drawn(2, 1, 64, seed=1)
    found = similarity_energy(metric, 0.75, alpha=0.0)
    by_hand = energy_by_hand(metric, 0.75, 0.0, jump=False)
    assert 0 < by_hand.min() < by_hand.max() < 0.01
    torch.testing.assert_close(found.double(), by_hand, atol=5e-9, rtol=0)


def test_the_best_match_is_the_nearest_by_cosine() -> None:
    """Statement: score and index are those of the largest cosine among valid targets, invalid sources score -inf."""
    sources, targets = drawn(2, 9, 5), 3 * drawn(2, 7, 5, seed=1)
    target_valid = torch.ones(2, 7, dtype=torch.bool)
    target_valid[0, :3] = False
    source_valid = torch.ones(2, 9, dtype=torch.bool)
    source_valid[1, 4] = False
    score, index = best_match(sources, targets, source_valid=source_valid, target_valid=target_valid)
    cosine = torch.nn.functional.cosine_similarity(sources[:, :, None].double(), targets[:, None].double(), dim=-1)
    cosine[0, :, :3] = -torch.inf
    best = cosine.max(dim=-1)
    assert torch.equal(index, best.indices)
    expected = best.values.float().masked_fill(~source_valid, -torch.inf)
    torch.testing.assert_close(score, expected, atol=1e-6, rtol=1e-5)


def test_equal_matches_go_to_the_lower_index() -> None:
    """Statement: of equally similar targets the first is taken, also by a zero row."""
    sources = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    targets = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [2.0, 0.0]]])
    assert best_match(sources, targets)[1].tolist() == [[1, 0]]


def test_nothing_matches_where_no_target_is_valid() -> None:
    """Statement: without a valid target the score is -inf, whatever the source."""
    sources = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [3e38, 3e38]]])
    score, _ = best_match(sources, drawn(1, 4, 2), target_valid=torch.zeros(1, 4, dtype=torch.bool))
    assert score.tolist() == [[-torch.inf] * 3]


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statement: the result is the same when only a few rows of the N x N similarities are held at a time."""
    metric = drawn(2, 23, 8)
    energy, match = similarity_energy(metric, 0.2), best_match(metric[:, ::2], metric[:, 1::2])
    monkeypatch.setattr("foveate.cuda.dispatch._BLOCK_ELEMENTS", 2 * 23 * 3)
    # products of fewer rows may be summed in another order: some units in the last place of cosines near one
    torch.testing.assert_close(similarity_energy(metric, 0.2), energy, atol=1e-6, rtol=1e-5)
    blocked = best_match(metric[:, ::2], metric[:, 1::2])
    assert torch.equal(blocked[1], match[1])
    torch.testing.assert_close(blocked[0], match[0], atol=1e-6, rtol=1e-5)


GROUPS = {
    "keep": torch.tensor([[5, 0, 3], [1, 2, 4]]),
    "source": torch.tensor([[1, 2, 4], [0, 3, 5]]),
    "target": torch.tensor([[2, 0, 2], [1, 1, 1]]),
}


@pytest.mark.parametrize("sized", [False, True])
def test_merged_tokens_are_weighted_means(sized: bool) -> None:
    """Statement: a token that others merged into is the mean weighted by sizes, all others are copied bit by bit."""
    x = drawn(2, 6, 4)
    sizes = torch.tensor([[1.0, 2, 3, 1, 5, 1], [2.0, 1, 1, 4, 1, 3]]) if sized else None
    merged, after = merge_tokens(x, **GROUPS, sizes=sizes)
    weight = torch.ones(2, 6) if sizes is None else sizes
    for b in range(2):
        for place, row in enumerate(GROUPS["keep"][b].tolist()):
            members = [row, *(s for s, t in zip(GROUPS["source"][b].tolist(), GROUPS["target"][b]) if t == place)]
            assert after[b, place] == weight[b, members].sum()
            mean = (x[b, members] * weight[b, members, None]).sum(dim=0) / weight[b, members].sum()
            torch.testing.assert_close(merged[b, place], mean)
            if len(members) == 1:
                assert torch.equal(merged[b, place], x[b, row])


def test_low_precision_tokens_are_averaged_in_float32() -> None:
    """Statement: bfloat16 tokens come back in bfloat16, rounded once from the float32 mean."""
    x = drawn(2, 6, 4).bfloat16()
    merged, _ = merge_tokens(x, **GROUPS)
    exact, _ = merge_tokens(x.float(), **GROUPS)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.bfloat16())


def test_gradients_reach_every_member() -> None:
    """Statement: merging is differentiable; a member of a group of three gets a third of its mean's gradient."""
    x = drawn(2, 6, 4).requires_grad_()
    merge_tokens(x, **GROUPS)[0].sum().backward()
    assert torch.equal(x.grad[0, 5], torch.full((4,), 0.5))
    torch.testing.assert_close(x.grad[0, 1], torch.full((4,), 1 / 3))
    assert torch.equal(x.grad[1, 1], torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_sizes_of_any_type_weigh_alike(dtype: torch.dtype) -> None:
    """Statement: sizes may be of any number type; the new ones are float32."""
    x, sizes = drawn(2, 6, 4), torch.tensor([[1, 2, 3, 1, 5, 1], [2, 1, 1, 4, 1, 3]])
    expected = merge_tokens(x, **GROUPS, sizes=sizes.float())
    for found, right in zip(merge_tokens(x, **GROUPS, sizes=sizes.to(dtype)), expected):
        assert found.dtype == torch.float32
        assert torch.equal(found, right)


def test_gradients_reach_sizes() -> None:
    """Statement: merging is differentiable by sizes, as finite differences say."""
    x, sizes = drawn(2, 6, 4).double(), (1 + drawn(2, 6).abs()).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: merge_tokens(x, **GROUPS, sizes=s)[0], (sizes,))


def test_indices_may_have_any_strides() -> None:
    x = torch.randn(2, 5, 3)
    keep, source, target = (
        torch.tensor([[0, 4], [2, 1], [3, 3]]).t(),
        torch.tensor([[2, 0]]).t(),
        torch.tensor([[1, 0]]).t(),
    )
    assert not keep.is_contiguous()
    assert torch.equal(take_rows(x, keep), take_rows(x, keep.contiguous()))
    strided = merge_tokens(x, keep, source, target)
    dense = merge_tokens(x, keep.contiguous(), source.contiguous(), target.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, dense))


def test_an_empty_batch_stays_empty() -> None:
    none = torch.empty(0, 1, dtype=torch.int64)
    merged, sizes = merge_tokens(torch.randn(0, 5, 3), none, none, none)
    assert merged.shape == (0, 1, 3)
    assert sizes.shape == (0, 1)


@pytest.mark.parametrize(("name", "value"), [("keep", 4), ("source", 4), ("target", 3), ("target", -1)])
def test_indices_of_other_pictures_are_refused(name: str, value: int) -> None:
    """Statement: an index out of range is an error, also where the next picture has such a row."""
    indices = {
        "keep": torch.tensor([[0, 1, 2]] * 2),
        "source": torch.tensor([[3]] * 2),
        "target": torch.tensor([[1]] * 2),
    }
    indices[name][0, 0] = value
    with pytest.raises(RuntimeError, match="out of bounds"):
        merge_tokens(drawn(2, 4, 3), **indices)
