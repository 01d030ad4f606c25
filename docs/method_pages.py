"""The generated parts of docs/methods: parameters out of the registry, curves and numbers out of measured results.

python docs/method_pages.py                       # write them again, from eval_suites/results/methods.json
python docs/method_pages.py methods.db …          # first put the benches of these result files in there
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from foveate.eval_suites.results.export import opened
from foveate.eval_suites.results.leaderboard import ALPHA, Leaderboard, Line
from foveate.eval_suites.results.rows import mean_sd
from foveate.eval_suites.terminal import versions
from foveate.pruners import PRUNERS
from foveate.registry_view import Card, card

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs/methods"
RESULTS = ROOT / "eval_suites/results/methods.json"

SUITES = {
    "focusui": ("screens", "shapes"),
    "pospad": ("screens",),
    "quota": ("clips",),
    "globalcom2": ("shapes-wide", "shapes"),
}
"""Which suites a method's page shows, where it is not ``shapes`` alone: those that its paper is about come first."""

CAVEATS = {
    "shapes": " The scenes stand on a 3 × 3 grid, which flatters `grid` where its lattice fits them (9 and 36 tokens)."
}
"""What a reader of a suite's numbers has to know."""

BESIDE = {"pospad": "focusui", "quota": "avgpool"}
"""What stands beside a method apart from random choice and the grid, unless it is the control with its own schedule."""

_FACTS = (
    "model", "suite", "limit", "suite_seed", "positions", "batch_size", "dtype", "weights_sha256",
    "foveate", "commit", "torch", "transformers", "hardware", "date",
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------ results


def bench(board: Leaderboard) -> dict[str, Any]:
    """What the pages need of a leaderboard: one record per method and budget, with the random draws taken together."""
    lines = [line for section in board.sections for line in section.lines if line.measured]
    return {
        "facts": {name: board.environment.get(name) for name in _FACTS},
        "tasks": list(board.tasks),
        "points": [_point(line, board.tasks) for line in lines],
    }


def _point(line: Line, tasks: Sequence[str]) -> dict[str, Any]:
    first, mean = line.first, line.mean("accuracy")
    low, high = first.interval
    if len(line.rows) > 1:
        spread = mean_sd([row.accuracy for row in line.rows])[1]
        low, high = mean - spread, mean + spread
    versus = first.versus_random if len(line.rows) == 1 else None
    return {
        "label": first.label,
        "method": first.method,
        "keep": first.keep,
        "draws": len(line.rows),
        "adaptive": first.adaptive,
        "tokens": round(line.mean("tokens_mean"), 2),
        "accuracy": round(mean, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "versus_random": None if versus is None else [round(versus.mean, 4), round(versus.p, 4)],
        "tasks": [None if line.task(task) is None else round(line.task(task), 3) for task in tasks],
    }


def read() -> dict[str, dict[str, Any]]:
    """The committed benches by suite."""
    return {one["facts"]["suite"]: one for one in json.loads(RESULTS.read_text(encoding="utf-8"))["benches"]}


def write(benches: Iterable[Mapping[str, Any]]) -> None:
    """Commit benches: a line per point, so that a change can be read."""
    parts = []
    for one in benches:
        points = ",\n   ".join(json.dumps(point) for point in one["points"])
        head = json.dumps({"facts": one["facts"], "tasks": one["tasks"]})[:-1]
        parts.append(f'  {head},\n   "points": [\n   {points}]}}')
    RESULTS.write_text('{"benches": [\n' + ",\n".join(parts) + "\n]}\n", encoding="utf-8")


@dataclass(frozen=True)
class Point:
    """One method at one budget; see :func:`_point`."""

    label: str
    method: str
    keep: float | int | None
    draws: int
    adaptive: bool
    tokens: float
    accuracy: float
    low: float
    high: float
    versus_random: tuple[float, float] | None
    tasks: tuple[float | None, ...]

    @property
    def text(self) -> str:
        if self.draws > 1:
            return f"{100 * self.accuracy:.1f} ± {50 * (self.high - self.low):.1f}"
        return f"{100 * self.accuracy:.1f} [{100 * self.low:.0f}, {100 * self.high:.0f}]"

    @property
    def against_random(self) -> str:
        if self.versus_random is None:
            return ""
        mean, p = self.versus_random
        return f"{100 * mean:+.1f}" + ("\\*" if p < ALPHA else "")

    @property
    def setting(self) -> str:
        """The budget, or what was given in its place."""
        if self.keep is not None:
            return f"keep {self.keep}"
        _, _, given = self.label.partition("(")
        return f"`{given[:-1]}`" if given else "default"


@dataclass(frozen=True)
class Bench:
    """The measured points of one suite."""

    facts: Mapping[str, Any]
    tasks: Sequence[str]
    points: Sequence[Point]

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Bench:
        return cls(plain["facts"], plain["tasks"], [Point(**point) for point in plain["points"]])

    def curve(self, method: str) -> list[Point]:
        """The points of a method, fewest tokens first; PosPad's are those behind its default selector."""
        mine = [p for p in self.points if p.method == method or p.method.startswith(f"{method}:")]
        return sorted(mine, key=lambda point: point.tokens)

    def one(self, method: str) -> Point:
        return next(point for point in self.points if point.method == method)

    def at(self, label: str, keep: float | int | None) -> Point | None:
        return next((p for p in self.points if p.label == label and p.keep == keep), None)


# ----------------------------------------------------------------------------------------------------------- Markdown


def parameter_table(method: Card) -> str:
    """Name, default and meaning of a method's parameters, as ``foveate show`` prints them."""
    rows = ["| parameter | default | meaning |", "| --- | --- | --- |"]
    for p in method.parameters:
        default = "required" if p.default is None else f"`{p.default}`"
        rows.append(f"| `{p.name}` | {default} | {_cell(p.doc)} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def beside(method: str) -> str:
    """The fourth curve of a picture."""
    return BESIDE.get(method, f"random@{method}")


def number_table(bench: Bench, method: str) -> str:
    """A method's points beside what chance and a plain grid reach."""
    curve = bench.curve(method)[::-1]
    others = {"random": "random", "grid": "grid", BESIDE.get(method, ""): BESIDE.get(method, "")}
    if any(bench.at(f"random@{p.label}", p.keep) for p in curve):  # it alone sees as many tokens
        others = {f"random@{method}": "random@{}"}
    others = {name: label for name, label in others.items() if name != method and bench.curve(name)}
    judged = any(p.versus_random for p in curve)
    heads = [
        "setting",
        "tokens",
        "right, %",
        *(["against random"] if judged else []),
        *(f"`{name}`" for name in others),
        "weakest task",
    ]
    rows = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 2)} --- |"]
    for p in curve:
        beside = [bench.at(label.format(p.label), p.keep) for label in others.values()]
        cells = [p.setting, f"{'~' if p.adaptive else ''}{p.tokens:.1f}".removesuffix(".0"), f"**{p.text}**"]
        cells += [p.against_random] if judged else []
        cells += ["" if other is None else other.text for other in beside]
        worst = min(range(len(bench.tasks)), key=lambda i: math.inf if p.tasks[i] is None else p.tasks[i])
        rows.append(f"| {' | '.join([*cells, f'{bench.tasks[worst]} {100 * p.tasks[worst]:.0f}'])} |")
    return "\n".join(rows)


def results(bench: Bench, method: str) -> str:
    """Picture, caption and numbers."""
    facts, whole = bench.facts, bench.one("unpruned")
    draws = max(p.draws for p in bench.points)
    picture = f"{method}-{facts['suite']}.svg"
    return "\n\n".join(
        [
            f"![Right answers of {method}, random choice and a grid against the number of visual tokens]({picture})",
            f"`{facts['model']}` on {facts['limit']} held-out questions of the suite `{facts['suite']}`; with all "
            f"{whole.tokens:.0f} tokens {whole.text} % are right. Tokens are those that a decoder layer sees, mean "
            "over layers and questions. Bands, bars and brackets are 95 % intervals; of random choice, they and ± are "
            f"the standard deviation over {draws} draws. *Against random*: percentage points beyond a random choice of "
            "as many tokens, on the same questions (\\*: p < 0.05, corrected for the number of methods)."
            + CAVEATS.get(facts["suite"], ""),
            number_table(bench, method),
        ]
    )


def index_table(benches: Mapping[str, Bench]) -> str:
    """All methods, with what they reach at two budgets on the suite ``shapes``."""
    shapes, keeps = benches.get("shapes"), (0.25, 0.11)
    heads = [
        "method",
        "what",
        *(f"right at {keep}, %" for keep in keeps if shapes),
        *(["tokens there"] if shapes else []),
    ]
    rows = [f"| {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * (len(heads) - 2)}"]
    for name in methods():
        cells = [f"[`{name}`]({name}.md)", card(name).title]
        if shapes:
            found = [next((p for p in shapes.curve(name) if p.keep == keep), None) for keep in keeps]
            cells += ["" if p is None else p.text for p in found]
            cells.append(", ".join("" if p is None else f"{p.tokens:.0f}" for p in found) if any(found) else "")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


# ---------------------------------------------------------------------------------------------------------------- SVG

_STYLE = """
svg { font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif;
  --page: #ffffff; --text: #24292f; --soft: #57606a; --line: #d8dee4; \
--a: #0072b2; --b: #c2500a; --c: #00805c; --d: #a4508b }
@media (prefers-color-scheme: dark) { svg {
  --page: #0d1117; --text: #e6edf3; --soft: #9aa4af; --line: #30363d; \
--a: #58b4f0; --b: #f0883e; --c: #3fc39a; --d: #e08fc6 } }
.page { fill: var(--page) } text { fill: var(--text) } .soft { fill: var(--soft); font-size: 13px }
.grid { stroke: var(--line) } .level { stroke: var(--soft); stroke-dasharray: 2 4 }
.a { --ink: var(--a) } .b { --ink: var(--b) } .c { --ink: var(--c) } .d { --ink: var(--d) }
path, line { stroke: var(--ink); fill: none } .mark { fill: var(--ink); stroke: var(--page); stroke-width: 1.5 }
.band { fill: var(--ink); stroke: none; opacity: .16 } .bar { stroke-width: 1.25; opacity: .75 }
.a .curve { stroke-width: 3 } .b .curve { stroke-width: 2; stroke-dasharray: 7 4 }
.c .curve { stroke-width: 2; stroke-dasharray: 2 3 } .d .curve { stroke-width: 2; stroke-dasharray: 9 3 2 3 }
"""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 400, 46, 632, 40, 340
_MARKS = {  # drawn around (0, 0)
    "a": '<circle class="mark" r="5"/>',
    "b": '<path class="mark" d="M0 -6 L5.5 4.5 L-5.5 4.5 Z"/>',
    "c": '<rect class="mark" x="-4.5" y="-4.5" width="9" height="9"/>',
    "d": '<path class="mark" d="M0 -6 L6 0 L0 6 L-6 0 Z"/>',
}


def figure(bench: Bench, method: str) -> str:
    """The SVG of one method's curve, with those of random choice and the grid, and the level of the unpruned model.

    The axes hold the method and the control with its schedule; what the others do with fewer tokens is cut off.
    """
    whole, blind = bench.one("unpruned"), bench.one("no-image")
    fewest = min(point.tokens for name in (method, beside(method)) for point in bench.curve(name))
    names = dict.fromkeys((method, "random", "grid", beside(method)))
    inside = {name: [p for p in bench.curve(name) if p.tokens >= 0.95 * fewest] for name in names}
    series = [(css, name, bench.curve(name)) for css, name in zip("abcd", names) if inside[name]]
    lowest = min(point.low for points in inside.values() for point in points)
    span, bottom = math.log(whole.tokens / fewest), 0.6 if lowest > 0.62 else 0.0

    def x(tokens: float) -> float:
        return _LEFT + 14 + (_RIGHT - _LEFT - 28) * math.log(tokens / fewest) / span

    def y(share: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (share - bottom) / (1 - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        'role="img" aria-labelledby="title">',
        '<title id="title">Right answers against visual tokens: '
        f"{escape(method)} on {escape(bench.facts['suite'])}</title>",
        f"<style>{_STYLE}</style>",
        f'<clipPath id="plot"><rect x="{_LEFT}" y="{_TOP - 8}" width="{_RIGHT - _LEFT}" '
        f'height="{_BOTTOM - _TOP + 8}"/></clipPath>',
        f'<rect class="page" width="{_WIDTH}" height="{_HEIGHT}" rx="6"/>',
        '<text class="soft" x="14" y="22">right answers, %</text>',
        f'<text class="soft" x="{(_LEFT + _RIGHT) / 2:.0f}" y="{_HEIGHT - 14}" text-anchor="middle">'
        "visual tokens per decoder layer, mean (logarithmic scale)</text>",
    ]
    for percent in range(round(100 * bottom), 101, 10 if bottom else 20):
        at = y(percent / 100)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="soft" x="{_LEFT - 8}" y="{at + 4.5:.1f}" text-anchor="end">{percent}</text>')
    for tokens in _ticks(fewest, whole.tokens):
        at = x(tokens)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_BOTTOM}" y2="{_BOTTOM + 5}"/>')
        parts.append(
            f'<text class="soft" x="{at:.1f}" y="{_BOTTOM + 20}" text-anchor="middle">{_number(tokens)}</text>'
        )
    for level, text in ((whole, "all tokens"), (blind, "no picture")):
        if level.accuracy > bottom:
            at = y(level.accuracy)
            parts.append(f'<line class="level" x1="{_LEFT}" x2="{_RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            for line, words in enumerate((text, f"{100 * level.accuracy:.1f}")):
                parts.append(f'<text class="soft" x="{_RIGHT + 8}" y="{at + 4.5 + 16 * line:.1f}">{words}</text>')
    parts.append('<g clip-path="url(#plot)">')
    parts += [
        f'<g class="{css}">{_drawn(css, curve, x, y)}</g>' for css, _, curve in reversed(series)
    ]  # the method on top
    return "\n".join([*parts, "</g>", *_legend(series), "</svg>", ""])


def _drawn(css: str, curve: Sequence[Point], x: Any, y: Any) -> str:
    """A curve: band or bars, line, marks. A point without a budget beside points with one stands alone."""
    joined = [p for p in curve if p.keep is not None] or list(curve)
    path = "L".join(f"{x(p.tokens):.1f} {y(p.accuracy):.1f}" for p in joined)
    parts = []
    if css == "a" and len(joined) > 1:
        edge = [(p.tokens, p.high) for p in joined] + [(p.tokens, p.low) for p in reversed(joined)]
        parts.append(f'<path class="band" d="M{"L".join(f"{x(t):.1f} {y(v):.1f}" for t, v in edge)}Z"/>')
    barred = [p for p in curve if p not in joined] if css == "a" else curve
    parts += [f'<path class="bar" d="M{x(p.tokens):.1f} {y(p.low):.1f}V{y(p.high):.1f}"/>' for p in barred]
    parts.append(f'<path class="curve" d="M{path}"/>')
    parts += [f'<g transform="translate({x(p.tokens):.1f} {y(p.accuracy):.1f})">{_MARKS[css]}</g>' for p in curve]
    return "".join(parts)


def _legend(series: Sequence[tuple[str, str, Any]]) -> Iterator[str]:
    """In the lower right corner, where no curve comes: few wrong answers with many tokens."""
    width = 74 + 8 * max(len(name) for _, name, _ in series)
    left, top = _RIGHT - width, _BOTTOM - 14 - 24 * len(series)
    yield f'<rect class="page" x="{left}" y="{top}" width="{width}" height="{24 * len(series) + 6}" opacity=".85"/>'
    for row, (css, name, _) in enumerate(series):
        at = top + 16 + 24 * row
        yield (
            f'<g class="{css}"><path class="curve" d="M{left + 10} {at}h40"/>'
            f'<g transform="translate({left + 30} {at})">{_MARKS[css]}</g>'
            f'<text x="{left + 60}" y="{at + 5}">{escape(name)}</text></g>'
        )


def _ticks(fewest: float, whole: float) -> Iterator[float]:
    """All tokens, half of them, a quarter, …; or round numbers where these would be too few."""
    if whole > 3 * fewest:
        for power in range(math.floor(math.log2(whole / fewest) + 0.05) + 1):
            yield whole / 2**power
    else:
        step = 10 if whole < 2 * fewest else 20
        yield from (step * i for i in range(math.ceil(fewest / step), math.floor(0.96 * whole / step) + 1))
        yield whole


def _number(tokens: float) -> str:
    return f"{tokens:.1f}".removesuffix(".0") if tokens < 20 else f"{tokens:.0f}"


# -------------------------------------------------------------------------------------------------------------- files

_REPEAT = (
    "To repeat it: `sh docs/measure_methods.sh methods.db`, then `python docs/method_pages.py methods.db` "
    "([all methods](README.md#measure-again))."
)
_GENERATED = re.compile(r"(?<=<!-- generated -->\n).*?(?=<!-- /generated -->)", re.DOTALL)


def methods() -> list[str]:
    """Names of the methods that come with the package."""
    return sorted(name for name, cls in PRUNERS.items() if cls.__module__.startswith("foveate.pruners"))


def files() -> dict[Path, str]:
    """Every file that has generated parts, as it should be."""
    benches = {suite: Bench.of(plain) for suite, plain in read().items()}
    wanted = {}
    for name in methods():
        shown = [benches[suite] for suite in SUITES.get(name, ("shapes",)) if suite in benches]
        shown = [bench for bench in shown if bench.curve(name)]
        parts = ["## Parameters", parameter_table(card(name))]
        parts += ["## Measured"] if shown else []
        parts += [results(bench, name) for bench in shown]
        parts += [f"{_with(shown)} {_REPEAT}"] if shown else []
        wanted[FOLDER / f"{name}.md"] = _filled(FOLDER / f"{name}.md", "\n\n".join(parts))
        wanted |= {FOLDER / f"{name}-{bench.facts['suite']}.svg": figure(bench, name) for bench in shown}
    index = "\n\n".join([index_table(benches), *(_with([benches[suite]]) for suite in ("shapes",) if suite in benches)])
    wanted[FOLDER / "README.md"] = _filled(FOLDER / "README.md", index)
    return wanted


def _with(shown: Iterable[Bench]) -> str:
    return f"Measured with {versions(*(bench.facts for bench in shown))}."


def _filled(page: Path, generated: str) -> str:
    text, found = _GENERATED.subn(lambda _: f"{generated}\n", page.read_text(encoding="utf-8"))
    if found != 1:
        raise ValueError(f"{page} has {found} pairs of <!-- generated --> and <!-- /generated -->, not one")
    return text


def main(paths: Sequence[str]) -> None:
    """Take in result files, if any, and write all generated parts."""
    if paths:
        benches = read()
        for path in paths:
            with opened(path) as store:
                benches |= {board.environment["suite"]: bench(board) for board in store.boards()}
        write(benches.values())
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
