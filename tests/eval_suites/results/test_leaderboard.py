"""Statistics against published values, and tables that rank, mark and explain."""

from __future__ import annotations

import html.parser
import json
import math
import random
import re

import numpy as np
import pytest
from rich.console import Console

from foveate.cli import main
from foveate.eval_suites.results.leaderboard import Leaderboard, value_text
from foveate.eval_suites.results.page import page
from foveate.eval_suites.results.rows import Row, Status, agreement, interval, mean_sd, pareto, share, wilson
from foveate.eval_suites.running import compare as comparing
from foveate.eval_suites.running.compare import compare, holm, paired

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


def vqa(rng: np.random.Generator, n: int) -> np.ndarray:
    """Scores as VQA gives them, by how many of ten people agree; their mean is 0.59."""
    return rng.choice([0.0, 0.3, 0.6, 1.0], n, p=[0.3, 0.1, 0.1, 0.5])


def overlap(rng: np.random.Generator, n: int) -> np.ndarray:
    """Scores that are all different and close to each other, like overlaps of boxes; their mean is 2/3."""
    return rng.beta(4, 2, n)


@pytest.mark.parametrize(("draw", "mean", "draws"), [(vqa, 0.59, 500), (overlap, 2 / 3, 100)])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_intervals_of_partial_scores_hold_what_they_promise(draw, mean, draws, confidence):
    """So often they hold the true mean as they say, and they are narrower than those of right and wrong answers."""
    rng, n, held, widths = np.random.default_rng(1), 80, 0, []
    for _ in range(draws):
        scores = draw(rng, n)
        low, high = interval(scores, confidence)
        held += low <= mean <= high
        coin = wilson(scores.sum(), n, confidence)
        widths.append((high - low) / (coin[1] - coin[0]))
    allowed = 3 * (confidence * (1 - confidence) / draws) ** 0.5
    assert held / draws == pytest.approx(confidence, abs=allowed)
    assert np.mean(widths) == pytest.approx({vqa: 0.91, overlap: 0.37}[draw], abs=0.02)


def test_intervals_of_right_and_wrong_or_equal_scores_are_wilsons():
    assert interval([1.0] * 3 + [0.0] * 7) == wilson(3, 10)
    assert interval([0.5] * 8) == wilson(4, 8)  # nothing to resample, and yet not known exactly
    assert interval([]) == (0.0, 1.0)
    assert interval([0.2, 0.9, 0.4]) == interval([0.4, 0.2, 0.9])


def test_quoted_numbers_have_a_column_where_they_are_not_the_accuracy():
    """And ``?`` stands where a run has none."""

    def cells(*quoted: float | None) -> list[str]:
        rows = [Row(f"m{n}", f"m{n}", accuracy=0.8, interval=(0.7, 0.9), quoted=one) for n, one in enumerate(quoted)]
        column = next((c for c in Leaderboard(rows, {}).columns() if c.head == "quoted"), None)
        lines = Leaderboard(rows, {}).sections[0].lines
        return [] if column is None else [column.text(line) for line in lines]

    assert cells(80.0, 80.0) == cells(None, None) == []
    assert cells(1800.0, 80.0) == ["1800.0", "80.0"]
    assert cells(80.0, None) == ["80.0", "?"]


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


# -------------------------------------------------------------------------------------------------------- paired tests


def test_paired_difference_is_of_the_same_samples():
    a, b = [1.0] * 30 + [0.0] * 70, [0.0] * 100
    found = paired(a, b)
    assert found.mean == pytest.approx(0.3)
    assert found.low == pytest.approx(0.21, abs=0.02)  # 0.3 -+ 1.96 sqrt(0.3 * 0.7 / 100)
    assert found.high == pytest.approx(0.39, abs=0.02)
    assert found.p == pytest.approx(1 / 2001)
    same = paired(a, a)
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_paired_test_is_the_exact_sign_test_of_few_changes():
    """5 changes, all for the better: 2 of 32 sign patterns are as extreme."""
    found = paired([1.0] * 5 + [0.0] * 20, [0.0] * 25)
    assert found.p == pytest.approx(2 / 32, abs=0.015)


def test_paired_intervals_hold_what_they_promise():
    """Of 200 draws from two equal methods, about 5 % are told apart."""
    rng = random.Random(1)
    draws = ([[float(rng.random() < 0.6) for _ in range(80)] for _ in "ab"] for _ in range(200))
    wrong = sum(not (d.low <= 0 <= d.high) for d in (paired(a, b) for a, b in draws))
    assert 2 <= wrong <= 22


def test_a_large_suite_is_compared_as_a_small_one():
    """Scores that are all different are rounded before they are drawn: interval and test are those of arithmetic."""
    rng = np.random.default_rng(0)
    a, b = rng.random(20_000) * 0.9 + 1 / 3000, rng.random(20_000) * 0.9
    sizes, counts = comparing._grouped(a - b)
    assert len(sizes) < 2000 < len(a) == counts.sum()
    found, delta = paired(a, b), a - b
    error = delta.std() / len(a) ** 0.5
    assert found.mean == pytest.approx(delta.mean())
    assert (found.low, found.high) == pytest.approx(
        (found.mean - 1.96 * error, found.mean + 1.96 * error), abs=0.1 * error
    )
    two_sided = math.erfc(abs(found.mean) / error / math.sqrt(2))
    assert found.p == pytest.approx(two_sided, abs=0.04)


def test_holm_has_the_textbook_values():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


# --------------------------------------------------------------------------------------------------------------- rows

N = 100


def scores(accuracy: float, start: int = 0) -> list[float]:
    """Right answers to ``accuracy`` of the samples, from sample ``start`` on."""
    right = {(start + i) % N for i in range(round(N * accuracy))}
    return [float(i in right) for i in range(N)]


def row(method: str, accuracy: float | None, keep: float | None = 0.25, tokens: float = 4.0, **more: object) -> Row:
    start = int(more.pop("start", 0))
    made = Row(method, str(more.pop("label", method)), keep, **more)
    if accuracy is not None:
        made.scores, made.n, made.correct = scores(accuracy, start), N, round(N * accuracy)
        made.accuracy, made.interval = accuracy, wilson(made.correct, N)
        made.relative_accuracy = made.loyalty = accuracy
        made.tasks = {"colour": accuracy, "count": None}
        made.tokens_per_layer, made.tokens_mean, made.tokens_last = [tokens, 4.0], tokens, 4.0
        made.kept_requested = 4.0 if method != "unpruned" else None
        made.seconds_per_sample, made.speedup = 0.01, 1.5
    return made


@pytest.fixture
def board() -> Leaderboard:
    rows = [
        row("unpruned", 0.9, None, 16.0),
        row("no-image", 0.3, None, 16.0, baseline=True),
        *(row("random", a, seed=s, baseline=True) for s, a in enumerate((0.5, 0.6, 0.7))),
        row("weak", 0.4),
        row("strong", 0.8),
        row("near", 0.79, guided=True),
        row("late", 0.85, tokens=10.0),
        row("grid", 0.83, baseline=True),
        row("downsample", 0.3, baseline=True),
        row("broken", None, status=Status.FAILED, reason="kept 7 of 16"),
        row("blind", None, status=Status.NOT_APPLICABLE, reason="no class token"),
        row("odd", 0.78, adaptive=True, start=40),
        row("strong", 0.7, 4),
        row("odd", 0.7, 1),
    ]
    compare(rows)
    facts = {"model": "m", "suite": "s", "batch_size": 8, "chance": 0.25, "limit": N, "hardware": "abacus"}
    return Leaderboard(rows, facts, TASKS)


def text(board: Leaderboard, width: int = 130) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as captured:
        console.print(board)
    return captured.get()


def of(board: Leaderboard, method: str) -> Row:
    return next(row for row in board.rows if row.method == method)


def test_sections_are_budgets_and_lines_are_ranked(board):
    titles = [section.title for section in board.sections]
    assert titles == ["all visual tokens", "keep 0.25", "keep 4 tokens", "keep 1 token"]
    names = [line.name for line in board.sections[1].lines]
    assert names == [
        "late", "grid", "strong", "near†", "odd", "random ×3", "weak", "downsample", "blind", "broken",
    ]  # fmt: skip


def test_random_is_one_line_with_its_deviation_over_seeds(board):
    (line,) = [line for line in board.sections[1].lines if line.first.method == "random"]
    assert line.accuracy == "60.0 ± 10.0"
    assert line.mean("loyalty") == pytest.approx(0.6)
    assert line.task("count") is None


def test_methods_are_compared_with_random_choice_on_the_same_samples(board):
    assert of(board, "strong").versus_random.mean == pytest.approx(0.2)
    assert of(board, "weak").versus_random.mean == pytest.approx(-0.2)
    assert of(board, "random").versus_random is None


def test_a_method_that_sees_more_tokens_is_compared_with_random_choice_that_does(board):
    """10 tokens lie half-way between random choice of 4 (60 %) and all 16 (90 %)."""
    assert of(board, "late").versus_random.mean == pytest.approx(0.85 - 0.75)


def test_no_method_is_compared_with_random_choice_of_more_tokens():
    rows = [row("unpruned", 0.9, None, 16.0), row("random", 0.5, seed=0), row("few", 0.7, tokens=2.0)]
    compare(rows)
    assert rows[-1].versus_random is None


def test_hard_samples_are_those_that_the_small_picture_gets_wrong(board):
    strong = of(board, "strong")
    assert strong.hard_n == 70
    assert strong.hard == pytest.approx((80 - 30) / 70)
    assert of(board, "downsample").hard is None  # it would be 0 by definition


def test_best_are_those_that_the_samples_cannot_tell_from_the_best(board):
    """Late sees more tokens, grid is a baseline, weak is worse on the same samples."""
    assert {row.method for row in board.rows if row.leads} == {"strong", "near", "odd"}
    assert "none is marked" not in text(board)


def test_nobody_is_best_if_the_samples_tell_nobody_apart():
    rows = [row("unpruned", 0.9, None, 16.0), row("random", 0.1, seed=0), row("a", 0.8), row("b", 0.79)]
    compare(rows)
    assert not any(row.leads for row in rows)
    assert "100 samples do not tell the methods of any budget apart" in " ".join(
        text(Leaderboard(rows, {"limit": N})).split()
    )


# -------------------------------------------------------------------------------------------------------------- tables


def test_table_shows_what_was_measured_and_every_reason(board):
    shown = text(board)
    assert "80.0 [71, 87]" in shown
    (strong, *_) = [line.split() for line in shown.splitlines() if line.strip().startswith("▸ strong")]
    assert strong[2:] == ["80.0", "[71,", "87]", "+20.0*", "80", "71", "80", "4", "4", "10.0", "1.50×", "80"]
    assert "~4" in shown
    assert "FAILED: broken, keep 0.25: kept 7 of 16" in shown
    assert "n/a: blind, keep 0.25: no class token" in shown


@pytest.mark.parametrize("width", [62, 80, 150])
def test_table_fits_its_console_and_gives_tasks_a_table_of_their_own(board, width):
    wide = Leaderboard(board.rows, board.environment, (*TASKS, "localisation", "transcription"))
    shown = text(wide, width)
    assert max(map(len, shown.splitlines())) <= width
    assert "transcription" in shown
    assert ("accuracy by task" in shown) == (width < 150)
    assert ("loyal" in shown) == (width == 150)


def test_notes_explain_only_what_there_is():
    alone = Leaderboard([row("unpruned", 0.9, None), row("some", 0.8)], {"limit": N})
    shown = text(alone)
    for absent in ("±", "†", "~", "·", "▸", "vs random", "hard", "KV", "Guessing", "JSON"):
        assert absent not in shown
    assert "rel.: % of the unpruned accuracy." in shown


def test_piped_output_has_the_width_that_columns_says(board, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "70")
    board.print()
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 70


def test_markdown_has_one_column_for_every_head(board):
    lines = [line for line in board.markdown().splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "| **strong** | **80.0 [71, 87]** |" in board.markdown()
    assert "| *grid* | 83.0" in board.markdown()


def test_every_form_of_a_board_names_its_versions(board):
    facts = board.environment | {"foveate": "0.0.1", "torch": "2.0.1+x", "transformers": "5.0.1", "lmms_eval": "0.7.1"}
    named = Leaderboard(board.rows, facts, TASKS)
    made = "foveate 0.0.1, torch 2.0.1+x, transformers 5.0.1, lmms_eval 0.7.1"
    assert f"; {made}\n" in named.markdown()
    assert made in text(named, 200)
    assert f"abacus; {made}</p>" in page([named])
    assert "; \n" not in board.markdown()  # one that knows of none


def test_failures_are_what_went_wrong_not_what_a_model_cannot_do(board):
    assert [row.method for row in board.failures] == ["broken"]


def test_json_can_be_read_back(board, tmp_path):
    board.write_json(tmp_path / "rows.json")
    read = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [r["method"] for r in read["rows"]] == [r.method for r in board.rows]
    by_name = {r["method"]: r for r in read["rows"]}
    assert by_name["broken"]["status"] == "failed"
    assert by_name["blind"]["accuracy"] is None
    assert by_name["late"]["versus_random"]["mean"] == pytest.approx(0.1)
    assert "answers" not in read["rows"][0]


def test_long_labels_are_cut_in_tables_only():
    long = row("then", 0.5, None, label="then(" + "x" * 60 + ")")
    assert len(Leaderboard([long], {}).sections[0].lines[0].name) == 32


@pytest.mark.parametrize(
    ("keep", "shown"), [(0.25, "0.25"), (1.0, "1.0"), (1 / 9, "1/9"), (0.1111, "0.1111"), (0.123456789, "0.1235")]
)
def test_budgets_read_well(keep, shown):
    assert value_text(keep) == shown


# ---------------------------------------------------------------------------------------------------------------- page


def test_pareto_front_is_what_no_other_beats():
    assert pareto([(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9)]) == [1, 3, 0]
    assert pareto([]) == []


class Checker(html.parser.HTMLParser):
    """Collects tags, and checks that they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_else(board):
    made = page([board])
    checked = Checker(made)
    assert checked.open == []
    assert "$" not in re.sub(r"\$\{|`[^`]*`", "", made), "a placeholder was left"
    for _, attributes in checked.tags:
        assert not {"src", "href", "onclick"} & attributes.keys()
    assert not re.search(r"https?:|@import|url\(", made)
    assert sum(tag == "svg" for tag, _ in checked.tags) == 2
    points = [attributes for tag, attributes in checked.tags if tag == "g"]
    assert len(points) == 2 * len([x for s in board.sections for x in s.lines if x.measured and x.name != "no-image"])


def test_page_shows_rows_for_every_filter(board):
    other = Leaderboard(board.rows, board.environment | {"model": "n"}, TASKS)
    made = page([board, other])
    tags = Checker(made).tags
    assert [a["data-model"] for tag, a in tags if tag == "section"] == ["m", "n"]
    assert [a["value"] for tag, a in tags if tag == "option"] == ["", "m", "n"]
    budgets = {a["value"] for tag, a in tags if a.get("name") == "keep"}
    assert budgets == {a["data-keep"] for _, a in tags if "data-keep" in a}
    assert '<article class="card"><h3>grid</h3>' in made


def test_page_escapes_everything(board):
    evil = "<script>alert(1)</script>\"'&"
    rows = [*board.rows, row("evil", 0.5, label=evil), row("worse", None, status=Status.FAILED, reason=evil)]
    made = page([Leaderboard(rows, board.environment | {"model": evil, "suite": evil}, (*TASKS, evil))])
    assert "alert(1)</script>" not in made
    assert sum(tag == "script" for tag, _ in Checker(made).tags) == 1


def test_page_of_nothing_measured_is_still_a_page():
    made = page([Leaderboard([row("broken", None, status=Status.FAILED, reason="why")], {"model": "m", "suite": "s"})])
    assert Checker(made).open == []
    assert "Nothing to show yet." in made


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def results(tmp_path):
    from foveate.eval_suites.results.store import Store
    from tests.eval_suites.results.test_store import FACTS, TASKS, answer, rows

    path = tmp_path / "results.db"
    with Store(path) as store:
        for model in ("m", "n"):
            for number in store.open_runs(store.open_bench(FACTS | {"model": model}, TASKS), rows()):
                store.add(number, [answer(n) for n in range(3)])
    return path


def test_command_shows_writes_and_filters(results, tmp_path, capsys):
    assert main(["leaderboard", str(results)]) == 0
    assert "n on s" in capsys.readouterr().out
    assert main(["leaderboard", str(results), "--model", "m", "--keep", "1/4"]) == 0
    out = capsys.readouterr().out
    assert "m on s" in out
    assert "fastv(k=2)" in out
    assert "n on s" not in out
    assert main(["leaderboard", str(results), "--keep", "0.5", "--markdown", "-"]) == 0
    assert "fastv" not in capsys.readouterr().out
    assert main(["leaderboard", str(results), "--html", str(tmp_path / "board.html")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'board.html'}\n"
    assert Checker((tmp_path / "board.html").read_text(encoding="utf-8")).open == []


@pytest.mark.parametrize(
    ("more", "said"),
    [(["--model", "mm"], "no results of model 'mm'"), (["--keep", "two"], "keep='two' is not a number")],
)
def test_command_says_what_is_wrong(results, capsys, more, said):
    assert main(["leaderboard", str(results), *more]) == 2
    assert said in capsys.readouterr().err
