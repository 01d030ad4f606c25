"""The leaderboard tab: a result file as a table, its Pareto front, and the samples behind a row."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from html import escape
from typing import Any

import gradio as gr
import numpy as np
import pandas as pd
from PIL import Image

from foveate.demo import views
from foveate.errors import FoveateError
from foveate.eval_suites import suites
from foveate.eval_suites.results import export
from foveate.eval_suites.results.leaderboard import Leaderboard
from foveate.eval_suites.results.rows import Row, Status

COLUMNS = ("method", "budget", "seed", "accuracy %", "same answer %", "tokens per layer", "ms per sample", "status")
FRONT, BEHIND, BASELINE = "on the Pareto front", "behind it", "baseline"
_COLOURS = {FRONT: "#d55e00", BEHIND: "#0072b2", BASELINE: "#8a8f98"}
_MEASURED = "measured"  # not "ok", which would sound like a verdict on the accuracy
_SHOWN = 24  # samples of a row


def frame(board: Leaderboard, budgets: Iterable[str] = (), baselines: bool = True) -> pd.DataFrame:
    """The board's rows as a table, with ``budgets`` only (none: all of them)."""
    wanted = set(budgets)
    rows = [
        row
        for row in board.rows
        if (not wanted or _budget(row) in wanted or row.keep is None) and (baselines or not row.baseline)
    ]
    return pd.DataFrame([_line(row) for row in rows], columns=list(COLUMNS))


def front(board: Leaderboard, budgets: Iterable[str] = (), baselines: bool = True) -> pd.DataFrame:
    """What was measured, as points: tokens, accuracy, and whether nothing is better with as few tokens."""
    table = frame(board, budgets, baselines)
    table = table[table["status"] == _MEASURED].copy()
    reads_nothing = {row.label for row in board.rows if row.baseline}
    points = table[["tokens per layer", "accuracy %"]].to_numpy(float)
    best = [
        not any(
            (other[0] <= point[0] and other[1] >= point[1]) and (other[0] < point[0] or other[1] > point[1])
            for other in points
        )
        for point in points
    ]
    table["kind"] = [
        FRONT if is_best else BASELINE if method in reads_nothing else BEHIND
        for method, is_best in zip(table["method"], best)
    ]
    return table


def find(board: Leaderboard, method: str, budget: str, seed: Any) -> Row | None:
    """The row that a line of :func:`frame` shows."""
    return next((r for r in board.rows if _line(r)[:3] == [method, budget, _seed(seed)]), None)


def samples(board: Leaderboard, row: Row) -> str:
    """The samples behind a row, failures first, with their pictures."""
    if row.status is not Status.OK:
        return f'<p class="fv-note"><strong>{escape(row.label)}</strong>: {escape(row.reason or row.status.value)}</p>'
    facts = board.environment
    try:
        known = _samples(facts["suite"], facts["limit"], facts["suite_seed"])
    except (FoveateError, KeyError):
        return f'<p class="fv-note">The pictures of suite {escape(str(facts.get("suite")))} are not at hand.</p>'
    answered = sorted(zip(known, row.answers, row.scores), key=lambda item: item[2] >= 1)
    wrong = sum(score < 1 for *_, score in answered)
    cards = "".join(_sample(*item) for item in answered[:_SHOWN])
    told = (
        f"{wrong} of {len(answered)} answers are wrong, and come first"
        if wrong
        else f"All {len(answered)} answers are right"
    )
    more = f"; the first {_SHOWN} are shown" if len(answered) > _SHOWN else ""
    return (
        f'<h3 class="fv-h">{escape(row.label)} at {_budget(row)}</h3>'
        f'<p class="fv-note">{told}{more}.</p>'
        f'<div class="fv-grid fv-small">{cards}</div>'
    )


def tab(path: str | None) -> None:
    """Fill the tab in."""
    boards = export.boards(path) if path else []
    if not boards:
        gr.HTML(
            '<p class="fv-note"><strong>No results yet.</strong> <code>foveate bench --out results.db</code> measures '
            "every method "
            "on the embedded model, <code>foveate demo --results results.db</code> shows what came out.</p>"
        )
        return
    names = [f"{b.environment['model']} on {b.environment['suite']} ({len(b.rows)} rows)" for b in boards]
    first = boards[0]
    with gr.Row():
        which = gr.Dropdown(list(zip(names, range(len(names)))), value=0, label="Bench", scale=2, min_width=240)
        budgets = gr.Dropdown(
            _budgets(first), value=[], multiselect=True, label="Budgets (none: all)", scale=2, min_width=240
        )
        baselines = gr.Checkbox(True, label="Baselines", scale=1, min_width=120)
    plot = gr.ScatterPlot(
        front(first),
        x="tokens per layer",
        y="accuracy %",
        color="kind",
        color_map=_COLOURS,
        tooltip=["method", "budget", "accuracy %", "tokens per layer"],
        color_title=" ",
        x_lim=[0, 1.05 * max((row.tokens_mean or 1 for row in first.rows), default=1)],
        y_lim=[0, 105],  # points at 100 stay whole
        height=380,
        label="Accuracy over visual tokens",
    )
    dots = "".join(f'<span><i style="background:{colour}"></i>{kind}</span>' for kind, colour in _COLOURS.items())
    gr.HTML(f'<p class="fv-note fv-dots">{dots}</p>')
    table = gr.Dataframe(
        frame(first),
        label="All rows; click one to see its samples",
        interactive=False,
        show_search="filter",
        max_height=460,
        elem_id="fv-board",
    )
    chosen = gr.HTML(elem_id="fv-samples")

    def shown(number: int, wanted: list[str], plain: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
        return front(boards[number], wanted, plain), frame(boards[number], wanted, plain)

    def other(number: int, plain: bool) -> tuple[Any, ...]:
        return gr.Dropdown(_budgets(boards[number]), value=[]), *shown(number, [], plain), ""

    def look(number: int, event: gr.SelectData) -> str:
        row = find(boards[number], *event.row_value[:3])
        return samples(boards[number], row) if row else ""

    which.input(other, [which, baselines], [budgets, plot, table, chosen])
    gr.on([budgets.input, baselines.input], shown, [which, budgets, baselines], [plot, table], show_progress="hidden")
    table.select(look, which, chosen, show_progress="minimal")


def _budget(row: Row) -> str:
    if row.keep is None:
        return "all"
    return f"{row.keep} tokens" if isinstance(row.keep, int) else f"{row.keep:.3g}"


def _budgets(board: Leaderboard) -> list[str]:
    return list(dict.fromkeys(_budget(row) for row in board.rows if row.keep is not None))


def _line(row: Row) -> list[Any]:
    return [
        row.label,
        _budget(row),
        _seed(row.seed),
        _rounded(row.accuracy, 100),
        _rounded(row.loyalty, 100),
        _rounded(row.tokens_mean),
        _rounded(row.seconds_per_sample, 1e3),
        _MEASURED if row.status is Status.OK else row.status.value,
    ]


def _seed(seed: Any) -> str:
    return "" if seed is None else str(seed)


def _rounded(x: float | None, times: float = 1) -> float | None:
    return None if x is None else round(x * times, 1)


@lru_cache(maxsize=4)
def _samples(suite: str, limit: int, seed: int) -> list[Any]:
    return list(suites.find(suite).samples(limit, seed))


def _sample(sample: Any, said: str, score: float) -> str:
    picture = getattr(sample, "image", None)
    if picture is None:
        picture = Image.fromarray(np.concatenate(sample.video[:: max(1, len(sample.video) // 4)][:4], axis=1))
    picture = picture.copy()
    picture.thumbnail((320, 320))
    right = score >= 1
    return (
        f'<article class="fv-card"><img src="{views.data_url(picture)}" alt="picture of sample {escape(sample.id)}">'
        f'<div class="text"><h3>{escape(sample.task)}<span class="fv-same '
        f'{"yes" if right else "no"}">{"right" if right else "wrong"}'
        f'</span></h3><p class="fv-note">{escape(sample.question)}</p><p class="said">{_words(said) or "(nothing)"}</p>'
        f'<p class="facts">expected: <b>{_words(sample.answer)}</b></p></div></article>'
    )


def _words(text: str) -> str:
    """An answer as people write it: the embedded models have single tokens such as ``top_left``."""
    return escape(text.replace("_", " "))
