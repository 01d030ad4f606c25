"""Greedy subsets: references against a literal loop in float64, kernels against the references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.cuda import conditional_dpp, diverse_subset, selection
from foveate.errors import ParameterError

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def tokens(n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Two images, the rows of different lengths."""
    torch.manual_seed(n + d)
    return (torch.randn(2, n, d) * torch.rand(2, n, 1).add(0.1)).to(dtype)


def literal_diverse(features: Tensor, k: int, start: Tensor | None, objective: str) -> list[list[int]]:
    result = []
    for image, x in enumerate(normalize(features.double(), dim=-1)):
        cosine = x @ x.T
        cosine = cosine.triu() + cosine.triu(1).T  # a pair has one similarity, however (i, j) and (j, i) are rounded
        if start is None:
            isolation = [
                max([cosine[i, j].item() for j in range(len(x)) if j != i], default=-1.0) for i in range(len(x))
            ]
            picks = [min(range(len(x)), key=lambda i: isolation[i])]
        else:
            picks = [int(start[image])]
        while len(picks) < k:
            total = (cosine[picks].amax(dim=0) if objective == "max_min" else cosine[picks].sum(dim=0)).tolist()
            picks.append(min((i for i in range(len(x)) if i not in picks), key=lambda i: total[i]))
        result.append(picks)
    return result


def literal_dpp(features: Tensor, relevance: Tensor, k: int) -> list[list[int]]:
    """The subset whose determinant grows most, by determinants."""
    result = []
    for x, r in zip(normalize(features.double(), dim=-1), relevance.double()):
        kernel = r[:, None] * (x @ x.T) * r
        picks: list[int] = []
        for _ in range(k):
            free = [i for i in range(len(x)) if i not in picks]
            gains = [kernel[[*picks, i]][:, [*picks, i]].logdet().item() for i in free]
            picks.append(free[max(range(len(free)), key=lambda i: gains[i])])
        result.append(picks)
    return result


def check_diverse(features: Tensor, k: int, start: Tensor | None, objective: str) -> None:
    picks = diverse_subset(features, k, start, objective=objective)
    assert picks.dtype == torch.int64
    assert picks.tolist() == literal_diverse(features, k, start, objective)


OBJECTIVES = pytest.mark.parametrize("objective", ["max_min", "max_sum"])
SIMILARITIES = pytest.mark.parametrize("held", [1 << 25, 3000], ids=["whole", "in steps"])
STARTS = pytest.mark.parametrize("start", [None, torch.tensor([3, 0])], ids=["isolated", "given"])


@OBJECTIVES
@STARTS
def test_diverse_subset_is_the_greedy_loop(objective, start):
    check_diverse(tokens(40, 16), 12, start, objective)


@OBJECTIVES
@STARTS
def test_diverse_subset_without_a_gram_matrix(objective, start, monkeypatch):
    monkeypatch.setattr(selection, "_GRAM_ELEMENTS", {"cpu": 40 * 40 - 1})
    monkeypatch.setattr(selection, "_BLOCK_ELEMENTS", 1000)
    check_diverse(tokens(40, 16), 12, start, objective)


def round_unevenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right halves of products are one last-place unit larger, so that (i, j) and (j, i) differ on any processor."""
    matmul = torch.matmul

    def uneven(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
        product = matmul(a, b, out=out)
        right = product[..., product.shape[-1] // 2 :]
        right.copy_(right.nextafter(torch.full_like(right, torch.inf)))
        return product

    monkeypatch.setattr(torch, "matmul", uneven)
    monkeypatch.setattr(Tensor, "__matmul__", uneven)


@pytest.mark.parametrize("uneven", [False, True], ids=["rounded as here", "rounded unevenly"])
@pytest.mark.parametrize("elements", [1 << 25, 0], ids=["whole", "row by row"])
def test_of_two_tokens_nearest_to_each_other_the_first_is_as_isolated(elements, uneven, monkeypatch):
    """Whatever rounding makes of their similarity in one order and in the other."""
    pictures = []
    for seed in range(20):
        torch.manual_seed(seed)
        crowd, pair = torch.randn(1, 1, 96) + 0.1 * torch.randn(1, 67, 96), torch.randn(1, 1, 96)
        pair = torch.cat([pair, pair + 3 * torch.randn(1, 1, 96)], dim=1)
        pictures.append(torch.cat([crowd[:, :30], pair[:, :1], crowd[:, 30:], pair[:, 1:]], dim=1))
    expected = [literal_diverse(features, 1, None, "max_min") for features in pictures]
    monkeypatch.setattr(selection, "_GRAM_ELEMENTS", {"cpu": elements})
    # four rows at once, and four products of shapes of their own
    monkeypatch.setattr(selection, "_BLOCK_ELEMENTS", 4 * 70)
    if uneven:
        round_unevenly(monkeypatch)
    assert [diverse_subset(features, 1).tolist() for features in pictures] == expected


def test_images_are_grouped_by_memory_without_changing_them(monkeypatch):
    features = torch.cat([tokens(20, 8), tokens(20, 9)[..., :8], tokens(20, 7).repeat(1, 1, 2)[..., :8]])
    start = torch.arange(6)
    whole = diverse_subset(features, 9, start), conditional_dpp(features, torch.ones(6, 20), 9)
    monkeypatch.setattr(selection, "_GRAM_ELEMENTS", {"cpu": 4 * 400})
    assert torch.equal(diverse_subset(features, 9, start), whole[0])
    assert torch.equal(conditional_dpp(features, torch.ones(6, 20), 9), whole[1])


@pytest.mark.parametrize("gram", [1 << 25, 0], ids=["whole", "row by row"])
def test_conditional_dpp_maximises_the_determinant(gram, monkeypatch):
    monkeypatch.setattr(selection, "_GRAM_ELEMENTS", {"cpu": gram})
    features, relevance = tokens(24, 32), torch.rand(2, 24) + 0.1
    assert conditional_dpp(features, relevance, 8).tolist() == literal_dpp(features, relevance, 8)


@pytest.mark.parametrize("k", [0, 6, -1])
def test_budgets_that_do_not_fit_are_refused(k):
    with pytest.raises(ParameterError, match=f"k={k} tokens cannot be picked from 5; use 1 to 5"):
        diverse_subset(torch.randn(1, 5, 4), k)
    with pytest.raises(ParameterError, match=f"k={k} tokens cannot be picked from 5; use 1 to 5"):
        conditional_dpp(torch.randn(1, 5, 4), torch.ones(1, 5), k)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ParameterError, match="objective='max' is not one of 'max_min', 'max_sum'"):
        diverse_subset(torch.randn(1, 5, 4), 2, objective="max")


# ------------------------------------------------------------------------------------------------------------ kernels


@OBJECTIVES
@pytest.mark.parametrize(
    ("n", "d", "dtype", "k"),
    [(1, 8, "float32", 1), (33, 40, "float32", 33), (197, 100, "float32", 30), (197, 200, "bfloat16", 30)],
)
def test_diverse_kernel(n, d, dtype, k, objective, kernels_on_cpu):
    features = tokens(n, d, TYPES[dtype])
    check_diverse(features, k, None, objective)
    check_diverse(features, k, torch.tensor([n // 2, n - 1]), objective)


@OBJECTIVES
@pytest.mark.parametrize(("n", "dtype", "k"), [(1, "float32", 1), (70, "float16", 20), (197, "float32", 30)])
def test_diverse_kernel_without_a_gram_matrix(n, dtype, k, objective, kernels_on_cpu, monkeypatch):
    monkeypatch.setattr(selection, "_GRAM_ELEMENTS", {"cpu": 0})
    features = tokens(n, 72, TYPES[dtype])
    check_diverse(features, k, None, objective)
    check_diverse(features[..., 3:], k, torch.tensor([n // 2, n - 1]), objective)


def test_diverse_kernel_breaks_ties_and_reads_zero_rows_like_the_reference(kernels_on_cpu, monkeypatch):
    features = torch.eye(8).repeat(1, 5, 1)  # every direction five times
    features[:, 9] = 0.0
    got = diverse_subset(features, 40)
    monkeypatch.setenv("FOVEATE_KERNELS", "torch")
    assert torch.equal(got, diverse_subset(features, 40))


@SIMILARITIES
@pytest.mark.parametrize("start", [57, -1])
def test_diverse_kernel_refuses_a_start_that_is_not_there(start, held, kernels_on_cpu, monkeypatch):
    monkeypatch.setattr(selection, "_GRAM_ELEMENTS", {"cpu": held})
    with pytest.raises(AssertionError, match="__trap"):
        diverse_subset(tokens(57, 16), 3, torch.tensor([0, start]))


def test_diverse_kernel_takes_images_in_groups(kernels_on_cpu, monkeypatch):
    monkeypatch.setattr(selection, "_GRAM_ELEMENTS", {"cpu": 40 * 40})
    check_diverse(tokens(40, 16), 12, torch.tensor([3, 0]), "max_min")


@SIMILARITIES
@pytest.mark.parametrize(
    ("n", "d", "dtype", "k"), [(57, 100, "float32", 8), (97, 200, "bfloat16", 12), (70, 72, "float16", 20)]
)
def test_dpp_kernel(n, d, dtype, k, held, kernels_on_cpu, monkeypatch):
    """In steps: 3000 values hold the factors of both images, or of one, but no Gram matrix."""
    monkeypatch.setattr(selection, "_GRAM_ELEMENTS", {"cpu": held})
    features, relevance = tokens(n, d, TYPES[dtype]), torch.rand(2, n) + 0.1
    assert conditional_dpp(features[..., 3:], relevance, k).tolist() == literal_dpp(features[..., 3:], relevance, k)


@SIMILARITIES
@pytest.mark.parametrize("k", [1, 57])
def test_dpp_kernel_beyond_the_rank_and_with_ties(k, held, kernels_on_cpu, monkeypatch):
    monkeypatch.setattr(selection, "_GRAM_ELEMENTS", {"cpu": held})
    features, relevance = tokens(57, 6), torch.ones(2, 57)
    features[0, 5] = 0.0
    relevance[1, 7] = 0.0
    relevance[1, 9] = torch.nan
    got = conditional_dpp(features, relevance, k)
    monkeypatch.setenv("FOVEATE_KERNELS", "torch")
    assert torch.equal(got, conditional_dpp(features, relevance, k))


@pytest.mark.parametrize("held", [1, 0], ids=["whole", "in steps"])
def test_dpp_kernel_of_one_token(held, kernels_on_cpu, monkeypatch):
    monkeypatch.setattr(selection, "_GRAM_ELEMENTS", {"cpu": held})
    assert conditional_dpp(torch.randn(2, 1, 8), torch.ones(2, 1), 1).tolist() == [[0], [0]]


def test_features_that_need_gradients_choose_alike(monkeypatch) -> None:
    """Choices have no gradient: features under training choose what detached ones do, row by row as well."""
    x, relevance = torch.randn(2, 9, 4, requires_grad=True), torch.rand(2, 9)
    expected = diverse_subset(x.detach(), 4), conditional_dpp(x.detach(), relevance, 4)
    for elements in (selection._GRAM_ELEMENTS, {"cpu": 0}):
        monkeypatch.setattr(selection, "_GRAM_ELEMENTS", elements)
        assert torch.equal(diverse_subset(x, 4), expected[0])
        assert torch.equal(conditional_dpp(x, relevance, 4), expected[1])
