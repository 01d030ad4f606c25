"""The leaderboard tab shows what a result file holds, marks what nothing beats, and puts failures first."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("gradio", reason="gradio is not installed (extras demo and dev)")

from foveate.demo import board
from foveate.errors import StoreError
from foveate.eval_suites import suites
from foveate.eval_suites.results.leaderboard import Leaderboard
from foveate.eval_suites.results.rows import Row, Status

KNOWN = list(suites.find("shapes").samples(3, 5))
FACTS = {"model": "shapes-llava", "suite": "shapes", "limit": 3, "suite_seed": 5}


def row(label: str, keep: float | None, tokens: float, accuracy: float, **more) -> Row:
    return Row(label, label, keep, tokens_mean=tokens, accuracy=accuracy, loyalty=1.0, seconds_per_sample=0.01, **more)


BOARD = Leaderboard(
    [
        row("unpruned", None, 144, 1.0),
        row("random", 0.5, 72, 0.5, baseline=True, seed=0),
        row("divprune", 0.5, 72, 0.9),
        row("fastv", 0.5, 80, 0.9),
        row("divprune", 0.1, 14, 0.6),
        Row("todre", "todre", 0.1, status=Status.FAILED, reason="out of <luck>"),
    ],
    FACTS,
)


def test_the_front_is_what_nothing_beats_with_as_few_tokens():
    points = board.front(BOARD)
    kinds = dict(zip(zip(points["method"], points["budget"]), points["kind"]))
    assert {point for point, kind in kinds.items() if kind == board.FRONT} == {
        ("unpruned", "all"),
        ("divprune", "0.5"),
        ("divprune", "0.1"),
    }
    assert kinds["random", "0.5"] == board.BASELINE
    assert kinds["fastv", "0.5"] == board.BEHIND
    assert "todre" not in set(points["method"])


def test_the_table_filters_by_budget_and_baseline():
    assert len(board.frame(BOARD)) == 6
    assert board.frame(BOARD)["status"].tolist() == ["measured"] * 5 + ["failed"]
    assert board.frame(BOARD, ["0.1"])["method"].tolist() == ["unpruned", "divprune", "todre"]
    assert "random" not in board.frame(BOARD, baselines=False)["method"].tolist()


def test_every_line_of_the_table_leads_back_to_its_row():
    for line, expected in zip(board.frame(BOARD).itertuples(index=False), BOARD.rows):
        assert board.find(BOARD, *line[:3]) is expected
    assert board.find(BOARD, "nothing", "0.5", "") is None


def test_samples_come_with_pictures_and_failures_first():
    right = [sample.answer for sample in KNOWN]
    shown = board.samples(
        BOARD, row("grid", 0.5, 72, 2 / 3, answers=[right[0], "<b>", right[2]], scores=[1.0, 0.0, 1.0])
    )
    assert "1 of 3 answers are wrong" in shown
    questions = re.findall(r'<p class="fv-note">([^<]*\?)</p>', shown)
    assert questions == [KNOWN[i].question for i in (1, 0, 2)]
    assert shown.count("data:image/png") == 3
    assert "&lt;b&gt;" in shown


def test_answers_are_shown_as_words_beside_what_was_expected():
    shown = board.samples(BOARD, row("grid", 0.5, 72, 0.0, answers=["top_left"] * 3, scores=[0.0] * 3))
    assert shown.count('<p class="said">top left</p>') == 3
    for sample in KNOWN:
        assert f"expected: <b>{sample.answer}</b>" in shown


def test_a_row_without_a_wrong_answer_says_so():
    right = [sample.answer for sample in KNOWN]
    assert "All 3 answers are right." in board.samples(
        BOARD, row("grid", 0.5, 72, 1.0, answers=right, scores=[1.0] * 3)
    )


def test_a_row_that_failed_says_why():
    assert "out of &lt;luck&gt;" in board.samples(BOARD, BOARD.rows[-1])


def test_a_missing_result_file_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no result file"):
        board.tab(str(tmp_path / "nothing.db"))
