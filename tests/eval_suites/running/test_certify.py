"""The promise of `foveate tune` holds: error rates of the test, of the search, and on the unseen half."""

from __future__ import annotations

import math

import numpy as np
import pytest

from docs.tune_splits import recorded, splits
from foveate.errors import ParameterError
from foveate.eval_suites.results.leaderboard import Leaderboard
from foveate.eval_suites.results.rows import Row, Status
from foveate.eval_suites.running.certify import least_samples, lower_bound, p_value, relative_accuracy
from foveate.eval_suites.running.tune import Chain, Setting, search
from foveate.pruners import Grid


def draw(
    rng: np.random.Generator, n: int, accuracy: float, relative: float, churn: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of an unpruned model and of one with ``relative`` times its accuracy; ``churn``: answers turned right."""
    unpruned = (rng.random(n) < accuracy).astype(float)
    gains = churn / (1 - accuracy)
    losses = 1 - relative + churn / accuracy
    turned = rng.random(n)
    return np.where(unpruned == 1, turned >= losses, turned < gains).astype(float), unpruned


@pytest.mark.parametrize("churn", [0.0, 0.02])
@pytest.mark.parametrize("alpha", [0.05, 0.002])
def test_a_model_at_the_target_passes_no_more_often_than_promised(alpha, churn):
    """1500 draws of a model that has exactly the target: at most alpha of them pass (and four standard errors)."""
    rng = np.random.default_rng(0)
    passed = sum(p_value(*draw(rng, 300, 0.9, 0.95, churn), 0.95) <= alpha for _ in range(1500))
    assert passed / 1500 <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / 1500)


def test_partial_scores_are_tested_as_validly():
    """Scores such as ANLS or IoU: here uniform ones, halved in mean as far as the target says."""
    rng = np.random.default_rng(1)
    passed = 0
    for _ in range(1500):
        unpruned = rng.random(200)
        passed += p_value(rng.random(200) * 0.9, unpruned, 0.9) <= 0.05
    assert passed / 1500 <= 0.05


def test_the_test_has_power():
    """A method that changes hardly any answer is certified at 0.95 with 400 samples, 9 of 10 times."""
    rng = np.random.default_rng(2)
    passed = sum(p_value(*draw(rng, 400, 0.9, 0.995, 0.005), 0.95) <= 0.05 for _ in range(300))
    assert passed > 270


def test_order_of_samples_does_not_matter():
    rng = np.random.default_rng(3)
    pruned, unpruned = draw(rng, 200, 0.8, 0.99, 0.01)
    order = rng.permutation(200)
    assert p_value(pruned, unpruned, 0.9) == p_value(pruned[order], unpruned[order], 0.9)


def test_edges():
    assert p_value([], [], 0.9) == 1.0
    assert p_value([0.0] * 50, [1.0] * 50, 0.9) == 1.0
    assert math.isnan(relative_accuracy([0.0], [0.0]))
    assert relative_accuracy([1, 0, 1], [1, 1, 1]) == pytest.approx(2 / 3)


def test_the_bound_is_what_the_test_refutes():
    rng = np.random.default_rng(4)
    pruned, unpruned = draw(rng, 500, 0.9, 0.97, 0.01)
    bound = lower_bound(pruned, unpruned, 0.05)
    assert bound < relative_accuracy(pruned, unpruned)
    assert p_value(pruned, unpruned, bound - 0.001) <= 0.05 < p_value(pruned, unpruned, bound + 0.001)


def test_so_many_samples_certify_a_method_that_changes_nothing():
    for target, alpha in ((0.98, 0.05), (0.9, 0.001)):
        n = least_samples(target, alpha)
        assert p_value([1.0] * n, [1.0] * n, target) <= alpha
        assert p_value([1.0] * (n // 2), [1.0] * (n // 2), target) > alpha
    assert least_samples(1.0, 0.05) == math.inf


def chains(count: int, length: int) -> list[Chain]:
    return [Chain([Setting(f"m{i}", Grid(keep=1 / (j + 1)), "keep") for j in range(length)]) for i in range(count)]


def test_a_chain_ends_at_its_first_failure_and_nothing_behind_it_is_measured():
    good, bad = [1.0] * 400, [0.0] * 400
    answers = iter([good, bad, good])
    (chain,) = made = chains(1, 3)
    level = search(made, lambda setting: next(answers), good, 0.9, 0.05)
    assert level == 0.05
    assert [s.certified for s in chain.settings] == [True, False, False]
    assert [s.p is None for s in chain.settings] == [False, False, True]


def test_chains_share_the_error():
    good = [1.0] * 400
    assert search(chains(10, 1), lambda setting: good, good, 0.9, 0.05) == pytest.approx(0.005)


def test_searching_many_settings_certifies_a_bad_one_no_more_often_than_promised():
    """8 methods x 3 budgets, the first too bad by a hair, the others worse: of 700 searches at most 5 % go wrong."""
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(700):
        unpruned = (rng.random(250) < 0.9).astype(float)

        def scores(setting: Setting, unpruned: np.ndarray = unpruned) -> np.ndarray:
            relative = 0.9 if setting.keep == 1 else 0.8
            kept = rng.random(250) < relative
            return unpruned * kept

        made = chains(8, 3)
        search(made, scores, unpruned, 0.9, 0.05)
        wrong += any(s.certified for chain in made for s in chain.settings)
    assert wrong / 700 <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 700)


def test_testing_without_correction_would_break_the_promise():
    """The same search at the full level per chain goes wrong far more often: the correction is not for show."""
    rng = np.random.default_rng(6)
    wrong = 0
    for _ in range(100):
        unpruned = np.ones(250)
        wrong += any(p_value((rng.random(250) < 0.9).astype(float), unpruned, 0.9) <= 0.05 for _ in range(200))
    assert wrong / 100 > 0.1


# ------------------------------------------------------------------------------------------------------ random halves


def board(positions: str, relative: dict[tuple[str, float], float], answers: str = "x") -> Leaderboard:
    """Recorded answers of settings that have ``relative`` times the unpruned accuracy."""
    rng = np.random.default_rng(0)
    whole = (rng.random(1200) < 0.9).astype(float)
    rows = [Row("unpruned", "unpruned", scores=list(whole), answers=[answers] * 1200)]
    for (label, keep), share in relative.items():
        scores = list(whole * (rng.random(1200) < share))
        rows.append(Row(label, label, keep, tokens_mean=100 * keep, scores=scores))
    rows.append(Row("random", "random", 0.1, seed=1, tokens_mean=1.0, scores=list(whole)))
    rows.append(Row("broken", "broken", 0.1, status=Status.FAILED))
    return Leaderboard(rows, {"model": "m", "suite": "s", "positions": positions})


def test_recorded_settings_of_all_policies_are_searched_on_random_halves():
    """The cheapest that is good is found, and what is too bad under one policy is not taken for the other."""
    boards = [
        board("keep", {("a", 0.9): 1.0, ("a", 0.5): 0.99, ("a", 0.1): 0.5}),
        board("compact", {("a", 0.9): 1.0, ("a", 0.5): 0.7, ("b", 0.9): 0.94}),
    ]
    whole, rows = recorded(boards)
    assert len(rows) == 6
    found = splits(whole, rows, 0.95, 0.95, 20)
    assert (found["chosen"], found["held"], found["with_a_false_certificate"]) == (20, 20, 0)
    assert {split["chosen"] for split in found["each"]} == {"a 0.5 keep"}
    assert splits(whole, rows, 0.95, 0.95, 20) == found


def test_files_of_other_questions_or_answers_are_refused():
    one, other = board("keep", {}), board("compact", {}, answers="y")
    with pytest.raises(ParameterError, match="answers otherwise"):
        recorded([one, other])
    other.environment["suite"] = "t"
    with pytest.raises(ParameterError, match="differ in suite"):
        recorded([one, other])
