"""Statistics against published values, and a table that ranks, marks and explains."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from foveate.eval_suites.leaderboard import Leaderboard
from foveate.eval_suites.rows import Row, Status, agreement, mean_sd, share, wilson

TASKS = ("colour", "count")


# Newcombe, Statistics in Medicine 17 (1998), table I, method 3
@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_has_the_published_values(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(n - correct, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_interval_at_the_edges():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0
    assert wilson(50, 100, confidence=0.99)[1] > wilson(50, 100)[1]


def test_mean_and_sample_standard_deviation():
    mean, sd = mean_sd([2, 4, 4, 4, 5, 5, 7, 9])
    assert (mean, sd) == (5.0, pytest.approx((32 / 7) ** 0.5))
    assert mean_sd([0.5]) == (0.5, 0.0)


def test_loyalty_is_agreement_with_the_unpruned_answers_not_with_the_truth():
    assert agreement(["red", "blue", "2"], ["red", "red", "2"]) == pytest.approx(2 / 3)
    assert agreement([], []) is None
    with pytest.raises(ValueError, match="zip"):
        agreement(["red"], ["red", "red"])


def test_share_of_nothing_is_unknown():
    assert share(0, 0) is None
    assert share(3, 4) == 0.75


def row(method: str, accuracy: float | None, keep: float | None = 0.25, **more: object) -> Row:
    made = Row(method, str(more.pop("label", method)), keep, **more)
    if accuracy is not None:
        made.n, made.correct = 100, round(100 * accuracy)
        made.accuracy, made.interval = accuracy, wilson(made.correct, 100)
        made.relative_accuracy = made.loyalty = accuracy
        made.tasks = {"colour": accuracy, "count": None}
        made.tokens_per_layer, made.tokens_mean, made.tokens_last = [9.0, 4.0], 6.5, 4.0
        made.seconds_per_sample = 0.01
    return made


@pytest.fixture
def board() -> Leaderboard:
    rows = [
        row("unpruned", 0.9, None),
        row("no-image", 0.3, None, baseline=True),
        *(row("random", a, seed=s, baseline=True) for s, a in enumerate((0.5, 0.6, 0.7))),
        row("weak", 0.4),
        row("strong", 0.8),
        row("grid", 0.85, baseline=True),
        row("broken", None, status=Status.FAILED, reason="kept 7 of 16"),
        row("blind", None, status=Status.NOT_APPLICABLE, reason="no class token"),
        row("odd", 0.75, adaptive=True),
        row("strong", 0.7, 4),
        row("odd", 0.7, 1),
    ]
    return Leaderboard(rows, {"model": "m", "suite": "s", "batch_size": 8, "chance": 0.25}, TASKS)


def text(board: Leaderboard, width: int = 120) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as captured:
        console.print(board)
    return captured.get()


def test_sections_are_budgets_and_lines_are_ranked(board):
    titles = [section.title for section in board.sections]
    assert titles == ["all visual tokens", "keep 0.25", "keep 4 tokens", "keep 1 token"]
    names = [line.name for line in board.sections[1].lines]
    assert names == ["grid", "strong", "odd", "random ×3", "weak", "blind", "broken"]


def test_best_is_the_best_method_that_is_no_baseline(board):
    best = [[line.name for line in section.lines if section.is_best(line)] for section in board.sections]
    assert best == [[], ["strong"], ["strong"], ["odd"]]


def test_random_is_one_line_with_its_deviation_over_seeds(board):
    (line,) = [line for line in board.sections[1].lines if line.first.method == "random"]
    assert line.accuracy == "60.0 ± 10.0"
    assert line.mean("loyalty") == pytest.approx(0.6)
    assert line.task("count") is None


def test_table_shows_both_token_counts_the_interval_and_every_reason(board):
    shown = text(board)
    assert "80.0 [71, 87]" in shown
    (strong, *_) = [line.split() for line in shown.splitlines() if line.strip().startswith("strong")]
    assert strong[4:] == ["80", "80", "6.5", "4", "0.01", "80", "-"]
    assert "~6.5" in shown
    assert "FAILED: broken, keep 0.25: kept 7 of 16" in shown
    assert "n/a: blind, keep 0.25: no class token" in shown


@pytest.mark.parametrize("width", [80, 120])
def test_table_fits_its_console_and_leaves_out_tasks_first(board, width):
    wide = Leaderboard(board.rows, board.environment, (*TASKS, "localisation", "transcription"))
    shown = text(wide, width)
    assert max(map(len, shown.splitlines())) <= width
    assert ("transcription" in shown) == (width == 120)
    assert "s/sample" in shown


def test_markdown_has_one_column_for_every_head(board):
    lines = [line for line in board.markdown().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {1 + 7 + len(TASKS)}
    assert "| **strong** | **80.0 [71, 87]** |" in board.markdown()
    assert "| *grid* | 85.0" in board.markdown()


def test_failures_are_what_went_wrong_not_what_a_model_cannot_do(board):
    assert [row.method for row in board.failures] == ["broken"]


def test_json_can_be_read_back(board, tmp_path):
    board.write_json(tmp_path / "rows.json")
    read = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [r["method"] for r in read["rows"]] == [r.method for r in board.rows]
    assert read["rows"][8]["status"] == "failed"
    assert read["rows"][9]["accuracy"] is None
    assert "answers" not in read["rows"][0]


def test_long_labels_are_cut_in_tables_only():
    long = row("then", 0.5, None, label="then(" + "x" * 60 + ")")
    assert len(Leaderboard([long], {}).sections[0].lines[0].name) == 32
