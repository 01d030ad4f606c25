"""One web page of leaderboards that needs nothing else: table, Pareto plots, accuracy by task, method cards."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from foveate.errors import UnknownNameError
from foveate.eval_suites.results.leaderboard import Column, Leaderboard, MethodRows, Section
from foveate.eval_suites.results.rows import mean_sd, pareto

__all__ = ["page", "plot"]

_WIDTH, _HEIGHT = 440, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 14, 12, 40
_COLOURS = 8  # --k0 .. --k7 in page.html
_LETTER, _LINE = 7, 13  # size of a label's letter


def page(boards: Sequence[Leaderboard]) -> str:
    """The page, as HTML."""
    budgets = list(dict.fromkeys(s.title for board in boards for s in board.sections))
    colours = {title: f"var(--k{i % _COLOURS})" for i, title in enumerate(budgets)}
    template = string.Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    methods = dict.fromkeys(row.method for board in boards for row in board.rows)
    return template.substitute(
        intro=escape(
            "Accuracy, tokens and time of visual-token pruners, measured. Choose what to see; click a heading to sort; "
            "point at a dot to read it."
        ),
        filters=_filters(boards, colours),
        boards="\n".join(_board(board, colours) for board in boards),
        cards="\n".join(_cards(methods)),
    )


def _filters(boards: Sequence[Leaderboard], colours: dict[str, str]) -> str:
    parts = []
    for what in ("model", "suite"):
        names = list(dict.fromkeys(str(board.environment[what]) for board in boards))
        if len(names) > 1:
            options = "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in names)
            parts.append(
                f'<select name="{what}" aria-label="{what}"><option value="">every {what}</option>{options}</select>'
            )
    parts += [
        f'<label class="chip" style="--c:{colour}"><input type="checkbox" name="keep" value="{escape(title)}" checked>'
        f'<span class="dot"></span>{escape(title)}</label>'
        for title, colour in colours.items()
    ]
    return "\n".join(parts)


def _board(board: Leaderboard, colours: dict[str, str]) -> str:
    e = board.environment
    facts = (
        f"{board.drawn}, positions: {e.get('positions')}, {e.get('dtype')}, batches of "
        f"{e.get('batch_size')}, {e.get('hardware')}; {board.versions}"
    )
    columns = board.columns()
    notes = "".join(f"<li>{escape(note)}</li>" for note in board.notes(columns, "Bold green", "Grey rows, hollow dots"))
    costs = [("tokens", lambda line: line.mean("tokens_mean"), "visual tokens in the decoder, mean over its layers")]
    if any(row.timings for row in board.rows):
        costs.append(("latency", _prefill, "milliseconds to the first token, one sample a call"))
    else:
        costs.append(("time", lambda line: 1000 * line.mean("seconds_per_sample"), "milliseconds per sample"))
    plots = "".join(
        f'<figure class="card"><h3>Accuracy and {what}</h3>{plot(board, cost, unit, colours)}</figure>'
        for what, cost, unit in costs
    )
    return (
        f'<section class="board" data-model="{escape(str(e["model"]))}" data-suite="{escape(str(e["suite"]))}">'
        f"<h2>{escape(str(e['model']))} on {escape(str(e['suite']))}</h2>"
        f'<p class="soft">{escape(facts)}</p>'
        f'<div class="plots">{plots}</div><p class="soft">Dashed: no other row is as accurate with less. '
        "Whiskers: 95 % interval, or the deviation over seeds.</p>"
        f'<div class="card scroll">{_table(board)}</div><ul class="notes">{notes}</ul>{_heat(board)}</section>'
    )


# ------------------------------------------------------------------------------------------------------------- tables


def _table(board: Leaderboard) -> str:
    columns = board.columns()
    heads = "".join(
        f'<th scope="col"><button type="button">{escape(head)}</button></th>'
        for head in ("method", "keep", *(column.head for column in columns))
    )
    rows = []
    for number, section in enumerate(board.sections):
        for place, line in enumerate(section.lines):
            cells = "".join(_cell(line, column) for column in columns)
            style = "lead" if line.leads else "base" if line.first.baseline else "" if line.measured else "bad"
            style += " first" if place == 0 and number else ""
            rows.append(
                f'<tr class="{style}" data-keep="{escape(section.title)}">'
                f'<th scope="row" data-value="{escape(line.name)}" '
                f'title="{escape(line.first.label)}">{escape(line.name)}</th>'
                f'<td data-value="{-number}">{escape(_short(section))}</td>{cells}</tr>'
            )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(line: MethodRows, column: Column) -> str:
    """A number with the value that it is sorted by."""
    value, shown, found = column.value(line), escape(column.text(line).strip()), line.first.versus_random
    if column.head == "vs random" and found:
        shown += f'<span class="soft">[{100 * found.low:+.0f}, {100 * found.high:+.0f}]</span>'
    main = ' class="main"' if column.head == "accuracy" else ""
    return f'<td{main} data-value="{"" if value is None else f"{value:.6g}"}">{shown}</td>'


def _heat(board: Leaderboard) -> str:
    if not board.parts:
        return ""
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in ("method", "keep", *board.parts))
    rows = []
    for section in board.sections:
        for line in section.lines:
            if line.measured:
                cells = "".join(
                    "<td></td>" if value is None else f'<td style="--v:{value:.3f}">{100 * value:.0f}</td>'
                    for value in map(line.task, board.parts)
                )
                rows.append(
                    f'<tr data-keep="{escape(section.title)}"><th scope="row" title="{escape(line.first.label)}">'
                    f'{escape(line.name)}</th><td class="keep">{escape(_short(section))}</td>{cells}</tr>'
                )
    return (
        '<details open><summary><strong>Accuracy by task</strong> <span class="soft">in %</span></summary>'
        f'<div class="card scroll"><table class="heat"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _prefill(line: MethodRows) -> float | None:
    seconds = line.timing(1, "prefill")
    return None if seconds is None else 1000 * seconds


def _short(section: Section) -> str:
    return section.title.removeprefix("keep ").replace("all visual tokens", "all").replace("fixed budget", "own")


# -------------------------------------------------------------------------------------------------------------- plots


@dataclass(frozen=True)
class _Dot:
    """A row in a plot: where it stands, its interval, and how it looks."""

    x: float
    y: float
    low: float
    high: float
    line: MethodRows
    budget: str


def plot(board: Leaderboard, cost: Callable[[MethodRows], float | None], unit: str, colours: dict[str, str]) -> str:
    """Accuracy over ``cost`` as SVG: a dot per line that has one, its interval, and the front of what is best."""
    dots = [
        _Dot(x, line.mean("accuracy"), *_interval(line), line, section.title)
        for section in board.sections
        for line in section.lines
        if line.measured and line.first.method != "no-image" and (x := cost(line)) is not None
    ]
    if not dots:
        return '<p class="soft">Nothing to show yet.</p>'
    right = max(dot.x for dot in dots) * 1.06 or 1
    low = 100 * min(dot.low for dot in dots)
    step = 20 if low < 50 else 10
    lowest = min(80, int(low // step) * step)  # dots are not bars, they need no zero

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + x / right * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (y - lowest / 100) / (1 - lowest / 100) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="accuracy over {escape(unit)}">']
    for percent in range(lowest, 101, step):
        x, y = place(0, percent / 100)
        parts.append(f'<line class="grid" x1="{x}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4:.1f}" text-anchor="end">{percent}</text>')
    for tick in _ticks(right):
        x, y = place(tick, lowest / 100)
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(unit)}</text>')
    front = [dots[i] for i in pareto([(dot.x, dot.y) for dot in dots])]
    corners = " ".join("{:.1f},{:.1f}".format(*place(dot.x, dot.y)) for dot in front)
    parts.append(f'<polyline class="front" points="{corners}"/>')
    for dot in dots:
        x, y = place(dot.x, dot.y)
        (_, top), (_, bottom) = place(0, dot.high), place(0, dot.low)
        told = f"{dot.line.name}, {dot.budget}: {dot.line.accuracy} %, {dot.x:.3g} {unit}"
        parts.append(
            f'<g class="point{" base" if dot.line.first.baseline else ""}" data-keep="{escape(dot.budget)}" '
            f'style="--c:{colours[dot.budget]}"><title>{escape(told)}</title>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/><circle cx="{x:.1f}" cy="{y:.1f}" '
            'r="4"/></g>'
        )
    parts += _labels(front, [place(dot.x, dot.y) for dot in dots], [place(dot.x, dot.y) for dot in front])
    return "".join([*parts, "</svg>"])


def _interval(line: MethodRows) -> tuple[float, float]:
    if len(line.rows) > 1:
        mean, sd = mean_sd([row.accuracy for row in line.rows])
        return max(0.0, mean - sd), min(1.0, mean + sd)
    return line.first.interval or (0.0, 1.0)


def _ticks(most: float) -> list[float]:
    """About five round numbers from 0 to ``most``."""
    step = 10 ** math.floor(math.log10(most / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if most / (step * factor) <= 6)
    return [i * step for i in range(int(most / step) + 1)]


def _labels(
    dots: Sequence[_Dot], taken: Sequence[tuple[float, float]], places: Sequence[tuple[float, float]]
) -> Iterable[str]:
    """Names beside dots where there is room; the others have theirs as a tooltip."""
    boxes = [(x - 4, y - 4, x + 4, y + 4) for x, y in taken]
    for dot, (x, y) in zip(dots, places):
        width = _LETTER * len(dot.line.first.label[:24])
        for left, top in (
            (x + 7, y - _LINE / 2), (x - width / 2, y + 7), (x + 4, y + 6), (x - width / 2, y - 7 - _LINE),
            (x - 7 - width, y - _LINE / 2),
        ):  # fmt: skip
            box = (left, top, left + width, top + _LINE)
            inside = box[0] > _LEFT and box[2] < _WIDTH and box[1] > 0 and box[3] < _HEIGHT - _BOTTOM
            if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in boxes):
                boxes.append(box)
                yield (
                    f'<text class="name" data-keep="{escape(dot.budget)}" x="{left:.1f}" y="{top + _LINE - 2.5:.1f}">'
                    f"{escape(dot.line.first.label[:24])}</text>"
                )
                break


# -------------------------------------------------------------------------------------------------------------- cards


def _cards(methods: Iterable[str]) -> Iterable[str]:
    """What the registry knows about these methods."""
    from foveate.registry_view import card

    for name in methods:
        try:
            known = card(name)
        except UnknownNameError:  # the bare model, or a method that this installation does not have
            continue
        acts = ", ".join(known.hooks) or "depends on its parameters"
        cost = known.cost and f"cost: {known.cost}"
        facts = [known.paper, f"acts at {acts}", f"families: {', '.join(known.families)}", cost]
        texts = "".join(f'<p class="soft">{escape(fact)}</p>' for fact in facts if fact)
        doc = escape(known.doc.split("\n\n")[0])
        more = f'<details><summary class="soft">more</summary><p>{doc}</p></details>'
        title = f"<h3>{escape(name)}</h3><p>{escape(known.title)}</p>"
        yield f'<article class="card">{title}{texts}{more}</article>'
