"""The result of a bench: rows, their statistics, and ways to show them (rich, Markdown, JSON)."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

from foveate.eval_suites.results.rows import Row, Status, mean_sd
from foveate.eval_suites.terminal import console, versions

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

    from foveate.pruners.core import Keep

__all__ = ["COLUMNS", "Column", "Leaderboard", "MethodRows", "Section"]


@dataclass
class MethodRows:
    """What a table shows in one line: a row, or the rows of one method at one budget that differ in their seed."""

    rows: list[Row]

    @property
    def first(self) -> Row:
        """That of the first seed."""
        return self.rows[0]

    @property
    def measured(self) -> bool:
        """Whether all rows have an accuracy."""
        return all(row.status is Status.OK for row in self.rows)

    @property
    def leads(self) -> bool:
        """Whether it is the best of its budget or not told from it (``running.compare``)."""
        return any(row.leads for row in self.rows)

    def mean(self, name: str) -> float | None:
        """Mean of an attribute over the rows, None if it was not measured in all of them."""
        return _mean([getattr(row, name) for row in self.rows])

    def timing(self, batch: int, name: str) -> float | None:
        """An attribute of the timing in batches of ``batch``, of the first row that has one: seeds cost alike."""
        values = (getattr(row.timings[batch], name) for row in self.rows if self.measured and batch in row.timings)
        return next((value for value in values if value is not None), None)

    def task(self, name: str) -> float | None:
        """Mean accuracy in one task."""
        return _mean([row.tasks.get(name) for row in self.rows])

    @property
    def accuracy(self) -> str:
        """In percent, with the 95 % interval, or with the standard deviation over seeds."""
        if not self.measured:
            return _HEAD_OF[_status(self)]
        if len(self.rows) > 1:
            mean, sd = mean_sd([row.accuracy for row in self.rows])
            return f"{100 * mean:.1f} ± {100 * sd:.1f}"
        low, high = self.first.interval or (0.0, 1.0)
        return f"{100 * self.first.accuracy:.1f} [{100 * low:.0f}, {100 * high:.0f}]"

    @property
    def versus_random(self) -> str:
        """Percentage points, with a star if the difference from random choice is not an accident."""
        found = self.first.versus_random
        return "" if found is None else f"{100 * found.mean:+.1f}{'*' if found.p < ALPHA else ' '}"

    @property
    def name(self) -> str:
        """The label, cut to the width of a table; † reads the question, ×5 over five seeds."""
        label = self.first.label if len(self.first.label) <= 32 else f"{self.first.label[:31]}…"
        label += "†" if self.first.guided else ""
        return f"{label} ×{len(self.rows)}" if len(self.rows) > 1 else label


ALPHA = 0.05
"""Below which a corrected p-value earns its star."""


@dataclass
class Section:
    """Lines of equal budget: the best accuracy first, then what could not be measured."""

    title: str
    lines: list[MethodRows]


# ------------------------------------------------------------------------------------------------------------ columns


@dataclass(frozen=True)
class Column:
    """A column of the tables.

    Attributes:
        head: its title.
        text: what it shows of a line.
        value: the number that it is sorted by, None where there is none.
        rank: which columns go first where there is little room (the highest), None: never.
        markdown: whether Markdown shows it.
    """

    head: str
    text: Callable[[MethodRows], str]
    value: Callable[[MethodRows], float | None]
    rank: int | None = None
    markdown: bool = True

    @property
    def note(self) -> str:
        """What a reader has to know."""
        name = "×8" if self.head.endswith("×8") else self.head
        return f"{name}: {_NOTES[name]}" if name in _NOTES else ""


_NOTES = {
    "quoted": "the score as papers give it; ? where samples failed, or lmms-eval gave none.",
    "vs random": "percentage points above random choice with as many tokens on the average; * differs from it "
    f"(paired test, p < {ALPHA}, corrected for the number of methods).",
    "rel.": "% of the unpruned accuracy.",
    "hard": "accuracy on the samples that the downsampled picture of the same budget gets wrong.",
    "loyal": "% of answers equal to the unpruned model's.",
    "tokens": "that the decoder saw, mean over its layers.",
    "last": "tokens in the last layer.",
    "FLOPs": "of the decoder's prefill for a sample, by arithmetic from the tokens that each layer saw.",
    "KV": "of the caches after it, likewise.",
    "prefill": "milliseconds to the first token, one sample a call, warm, without the processor.",
    "gain": "time to the first token of the unpruned model divided by the row's, one sample a call, measured in turns.",
    "decode": "milliseconds per further token.",
    "select": "milliseconds for choosing, a part of prefill; empty where it happens inside the vision tower.",
    "peak": "most memory of tensors at once in a prefill, beyond weights and inputs.",
    "×8": "eight samples a call, for all of them.",
}


def _column(
    head: str, name: str, shown: Callable[[float], str], rank: int | None = None, markdown: bool = True
) -> Column:
    """Of an attribute of the rows; of ``name/8``, of their timing in batches of 8."""
    name, _, batch = name.partition("/")

    def value(line: MethodRows) -> float | None:
        return line.timing(int(batch), name) if batch else line.mean(name)

    def text(line: MethodRows) -> str:
        found = value(line)
        mark = "~" if line.first.adaptive and name.startswith("tokens") else ""
        return "" if found is None else mark + shown(found)

    return Column(head, text, value, rank, markdown)


def _percent_of(share: float) -> str:
    return f"{100 * share:.0f}"


def _count(tokens: float) -> str:
    return f"{tokens:.1f}".removesuffix(".0")


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}" if seconds < 0.9995 else f"{1000 * seconds:.0f}"


def _times(factor: float) -> str:
    return f"{factor:.2f}×"


def _size(unit: str) -> Callable[[float], str]:
    def shown(value: float) -> str:
        for letter in ("", *"KMGT"):
            if value < 999.5:
                return f"{value:.3g} {letter}{unit}"
            value /= 1000
        return f"{value:.3g} P{unit}"

    return shown


def _difference(line: MethodRows) -> float | None:
    return None if line.first.versus_random is None else line.first.versus_random.mean


def _quoted(line: MethodRows) -> str:
    found = line.mean("quoted")
    return f"{found:.1f}" if found is not None else "?" if line.measured else ""


_wide = partial(_column, markdown=False)

COLUMNS = (
    Column("accuracy", lambda line: line.accuracy, lambda line: line.mean("accuracy")),
    Column("quoted", _quoted, lambda line: line.mean("quoted"), rank=1),
    Column("vs random", lambda line: line.versus_random, _difference, rank=2),
    _column("rel.", "relative_accuracy", _percent_of, rank=3),
    _column("hard", "hard", _percent_of, rank=5),
    _column("loyal", "loyalty", _percent_of, rank=8),
    _column("tokens", "tokens_mean", _count, rank=0),
    _wide("last", "tokens_last", _count, rank=13),
    _wide("FLOPs", "prefill_flops", _size(""), rank=9),
    _wide("KV", "cache_bytes", _size("B"), rank=12),
    _wide("prefill", "prefill/1", _ms, rank=1),
    _column("gain", "prefill_speedup/1", _times, rank=4),
    _wide("decode", "decode/1", _ms, rank=14),
    _wide("select", "selection/1", _ms, rank=11),
    _wide("prefill ×8", "prefill/8", _ms, rank=16),
    _wide("gain ×8", "prefill_speedup/8", _times, rank=10),
    _wide("decode ×8", "decode/8", _ms, rank=18),
    _wide("select ×8", "selection/8", _ms, rank=19),
    _wide("peak", "peak_bytes/1", _size("B"), rank=15),
    _wide("peak ×8", "peak_bytes/8", _size("B"), rank=17),
    _column("ms", "seconds_per_sample", _ms, rank=6),
    _column("speed", "speedup", _times, rank=7),
)


# ------------------------------------------------------------------------------------------------------- leaderboard


@dataclass
class Leaderboard:
    """All rows in the order in which they ran, and what is needed to repeat them.

    Attributes:
        rows: one per method, budget and seed.
        environment: versions, hardware, model, suite and seed.
        tasks: names of the suite's tasks.
    """

    rows: list[Row]
    environment: dict[str, Any]
    tasks: tuple[str, ...] = ()

    @property
    def failures(self) -> list[Row]:
        """Rows that went wrong, or some of whose samples did (what a model or a method cannot do is not a failure)."""
        return [row for row in self.rows if row.status is Status.FAILED or row.errors]

    @property
    def sections(self) -> list[Section]:
        """Unpruned and no-image, then one section per budget in the order in which they ran."""
        groups: dict[Any, dict[str, MethodRows]] = {}
        for row in self.rows:
            key = "whole" if row.method in ("unpruned", "no-image") else (type(row.keep), row.keep)
            groups.setdefault(key, {}).setdefault(row.label, MethodRows([])).rows.append(row)
        sections = []
        for key, group in groups.items():
            lines = list(group.values())
            if key == "whole":
                sections.append(Section("all visual tokens", lines))
            else:
                sections.append(Section(_budget_title(lines), sorted(lines, key=_rank)))
        return sections

    def only(self, keep: Sequence[Keep]) -> Leaderboard:
        """The same with these budgets only, beside the unpruned model."""
        kept = [row for row in self.rows if row.keep is None or any(_same(row.keep, k) for k in keep)]
        return Leaderboard(kept, self.environment, self.tasks)

    @property
    def parts(self) -> tuple[str, ...]:
        """Tasks that have a column of their own; a single one is the accuracy."""
        return self.tasks if len(self.tasks) > 1 else ()

    # -------------------------------------------------------------------------------------------------------- output

    def as_json(self) -> dict[str, Any]:
        """Rows, without their answers, and environment."""
        return {"rows": [row.as_json() for row in self.rows], "environment": self.environment}

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`as_json`."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.as_json(), file, indent=2, default=str, allow_nan=False)
            file.write("\n")

    def columns(self) -> list[Column]:
        """Those that have something to show."""
        lines = [line for section in self.sections for line in section.lines]
        candidates = (column for column in COLUMNS if column.head != "quoted" or self._quotes_otherwise)
        return [column for column in candidates if any(map(column.text, lines))]

    @property
    def _quotes_otherwise(self) -> bool:
        """Whether there are quoted numbers, and they are not all the accuracy."""
        found = [(row.quoted, 100 * row.accuracy) for row in self.rows if row.accuracy is not None]
        return any(quoted is not None for quoted, _ in found) and not all(
            quoted is not None and math.isclose(quoted, accuracy, abs_tol=1e-6) for quoted, accuracy in found
        )

    def table(self, columns: Sequence[Column], tasks: Sequence[str] = (), title: str | None = None) -> Table:
        """A rich table of these columns and of the accuracy in these tasks."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, title=title)
        for number, head in enumerate(("method", *(column.head for column in columns), *tasks)):
            table.add_column(head, justify="right" if number else "left", no_wrap=True)
        for section in self.sections:
            table.add_section()
            table.add_row(Text(section.title, style="bold cyan"))
            for line in section.lines:
                style = "bold green" if line.leads else "dim" if line.first.baseline else ""
                style = {Status.FAILED: "bold red", Status.NOT_APPLICABLE: "dim"}.get(_status(line), style)
                name = ("▸ " if line.leads else "· " if line.first.baseline else "  ") + line.name
                table.add_row(*map(Text, (name, *_cells(line, columns, tasks))), style=style)
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.measure import Measurement
        from rich.text import Text

        def fits(table: Table) -> bool:
            return Measurement.get(console, options.update(width=1000), table).maximum <= options.max_width

        columns = self.columns()
        table = self.table(columns, self.parts, self.title)
        if fits(table):
            yield table
        else:
            while not fits(self.table(columns)) and any(column.rank for column in columns):
                columns.remove(max(columns, key=lambda column: column.rank or 0))
            yield self.table(columns, title=self.title)
            left = list(self.parts)
            while left:
                most = max((n for n in range(1, len(left) + 1) if fits(self.table((), left[:n]))), default=1)
                yield self.table((), left[:most], "accuracy by task")
                left = left[most:]
        yield from map(Text, self.notes(columns, bold="▸", italic="·"))

    def print(self) -> None:
        """Print on the terminal, or :func:`foveate.eval_suites.terminal.console`'s page."""
        console().print(self)

    def _repr_markdown_(self) -> str:
        return self.markdown()

    def markdown(self) -> str:
        """The same as a Markdown table, with all tasks."""
        columns = [column for column in self.columns() if column.markdown]
        heads = ("method", *(column.head for column in columns), *self.parts)
        lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
        for section in self.sections:
            lines.append(f"| **{section.title}** |{' |' * (len(heads) - 1)}")
            for line in section.lines:
                cells = (line.name, *_cells(line, columns, self.parts))
                name, *cells = (cell.strip().replace("|", "\\|").replace("*", "\\*") for cell in cells)
                if line.leads:
                    name, cells[0] = f"**{name}**", f"**{cells[0]}**"
                elif line.first.baseline:
                    name = f"*{name}*"
                lines.append(f"| {' | '.join((name, *cells))} |")
        notes = [f"- {note}".replace("; * differs", "; \\* differs") for note in (self.title, *self.notes(columns))]
        return "\n".join([*lines, "", *notes, ""])

    @property
    def title(self) -> str:
        """What was asked of which model, and with which versions."""
        e = self.environment
        asked = f"{e.get('model')} on {e.get('suite')}, {self.drawn}, positions: {e.get('positions')}"
        return f"{asked}; {self.versions}" if self.versions else asked

    @property
    def versions(self) -> str:
        """Of the packages that results depend on, which are equal for all rows (``MUST_AGREE`` of the store)."""
        return versions(self.environment, names=("foveate", "torch", "transformers", "lmms_eval"))

    @property
    def drawn(self) -> str:
        """How many samples, and by which seed if they were drawn."""
        limit, seed = (self.environment.get(name) for name in ("limit", "suite_seed"))
        return f"{limit} samples" + ("" if seed is None else f" (seed {seed})")

    def notes(self, columns: Sequence[Column], bold: str = "Bold", italic: str = "Italic") -> list[str]:
        """What a reader of the table has to know, and the reason of everything that is missing in it.

        Args:
            columns: those that are shown; bold, italic: what marks leaders and baselines.
        """
        e = self.environment
        lines = [line for section in self.sections for line in section.lines]
        seeds = max((len(line.rows) for line in lines), default=1)
        accuracy = "Accuracy in % with its 95 % interval"
        notes = [accuracy + (f", or ± standard deviation over {seeds} seeds." if seeds > 1 else ".")]
        if any(line.leads for line in lines):
            notes.append(
                f"{bold}: the best of a budget by accuracy, and what the same samples cannot tell from it; not those "
                "that see more tokens on the average than the budget."
            )
        elif sum(not line.first.baseline and line.first.method != "unpruned" for line in lines) > 1:
            notes.append(
                f"{e.get('limit')} samples do not tell the methods of any budget apart: none is marked as best."
            )
        if any(line.first.baseline for line in lines):
            notes.append(f"{italic}: baselines that read no content.")
        if any(line.first.guided for line in lines):
            notes.append("†: reads the question; the others choose the same tokens for every question.")
        notes += dict.fromkeys(column.note for column in columns if column.note)
        if any(line.first.adaptive for line in lines):
            notes.append("~: not fixed by the budget alone.")
        if e.get("chance") is not None:
            notes.append(f"Guessing would get {_percent(e['chance'])} %.")
        if any(column.head.startswith(("prefill", "gain")) for column in columns):
            notes.append(f"The unpruned model runs with {e.get('attention')} attention.")
        if any(column.head == "ms" for column in columns):
            notes.append(
                f"ms: processing and generation of a sample in batches of {e.get('batch_size')}, {e.get('dtype')}, on "
                f"{e.get('hardware')}; speed: against the unpruned model."
            )
        reasons: dict[tuple[str, str, str], list[str]] = {}
        untimed = []
        for section in self.sections:
            for line in section.lines:
                for row in (row for row in line.rows if row.reason):
                    reasons.setdefault((_HEAD_OF[row.status], section.title, row.reason), []).append(row.label)
                for timing in (timing for timing in line.first.timings.values() if timing.error):
                    where = f"{line.first.label}, {section.title}, batches of {timing.batch}"
                    untimed.append(f"not timed: {where}: {timing.error}")
        for (head, where, reason), labels in reasons.items():
            notes.append(f"{head}: {', '.join(dict.fromkeys(labels))}, {where}: {reason}")
        return list(dict.fromkeys(notes + untimed))


def _same(a: Keep, b: Keep) -> bool:
    return type(a) is type(b) and abs(a - b) < 1e-9


def _rank(line: MethodRows) -> tuple[Any, ...]:
    if not line.measured:
        return (1, 0.0, 0.0, line.name)
    return (0, -line.mean("accuracy"), line.mean("tokens_mean"), line.name)


_HEAD_OF = {Status.OK: "ERRORS", Status.NOT_APPLICABLE: "n/a", Status.UNFINISHED: "unfinished", Status.FAILED: "FAILED"}


def _status(line: MethodRows) -> Status:
    """The worst of its rows'."""
    return max((row.status for row in line.rows), key=list(_HEAD_OF).index)


def _budget_title(lines: list[MethodRows]) -> str:
    keep = lines[0].first.keep
    if keep is None:
        return "fixed budget"
    if isinstance(keep, int):
        return f"keep {keep} token{'s' * (keep != 1)}"
    return f"keep {value_text(keep)}"


def value_text(keep: float) -> str:
    """``0.25``, ``1.0``, and ``1/9`` for what is a simple fraction and no short decimal."""
    if len(repr(keep)) <= 6:
        return repr(keep)
    fraction = Fraction(keep).limit_denominator(100)
    return str(fraction) if abs(fraction - keep) < 1e-9 else f"{keep:.4g}"


def _percent(value: float | None) -> str:
    return "" if value is None else _percent_of(value)


def _cells(line: MethodRows, columns: Sequence[Column], tasks: Sequence[str]) -> list[str]:
    return [*(column.text(line) for column in columns), *(_percent(line.task(task)) for task in tasks)]


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)
