"""The result of a bench: rows, their statistics, and ways to show them (rich, Markdown, JSON)."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foveate.eval_suites.rows import Row, Status, mean_sd

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

__all__ = ["Leaderboard", "Line", "Section"]


@dataclass
class Line:
    """What a table shows in one line: a row, or the rows of one method at one budget that differ in their seed."""

    rows: list[Row]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def measured(self) -> bool:
        return all(row.status is Status.OK for row in self.rows)

    def mean(self, name: str) -> float | None:
        """Mean of an attribute over the rows, None if it was not measured in all of them."""
        values = [getattr(row, name) for row in self.rows]
        return None if None in values else statistics.fmean(values)

    def task(self, name: str) -> float | None:
        """Mean accuracy in one task."""
        values = [row.tasks.get(name) for row in self.rows]
        return None if None in values else statistics.fmean(values)

    @property
    def accuracy(self) -> str:
        """In percent, with the 95 % interval, or with the standard deviation over seeds."""
        if len(self.rows) > 1:
            mean, sd = mean_sd([row.accuracy for row in self.rows])
            return f"{100 * mean:.1f} ± {100 * sd:.1f}"
        low, high = self.first.interval
        return f"{100 * self.first.accuracy:.1f} [{100 * low:.0f}, {100 * high:.0f}]"

    @property
    def name(self) -> str:
        label = self.first.label if len(self.first.label) <= 32 else f"{self.first.label[:31]}…"
        return f"{label} ×{len(self.rows)}" if len(self.rows) > 1 else label


@dataclass
class Section:
    """Lines of equal budget: the best accuracy first, then what could not be measured; ``contest``: has it a winner?"""

    title: str
    lines: list[Line]
    contest: bool = True

    @property
    def best(self) -> float | None:
        """Highest accuracy of a method that is no baseline."""
        return max((x.mean("accuracy") for x in self.lines if x.measured and not x.first.baseline), default=None)

    def is_best(self, line: Line) -> bool:
        return self.contest and line.measured and not line.first.baseline and line.mean("accuracy") == self.best


# ------------------------------------------------------------------------------------------------------- leaderboard


@dataclass
class Leaderboard:
    """All rows in the order in which they ran, and what is needed to repeat them.

    Attributes:
        rows: one per method, budget and seed; environment: versions, hardware, model, suite and seed.
        tasks: names of the suite's tasks.
    """

    rows: list[Row]
    environment: dict[str, Any]
    tasks: tuple[str, ...] = ()

    @property
    def failures(self) -> list[Row]:
        """Rows that went wrong, or some of whose samples did (what a model or a method cannot do is no failure)."""
        return [row for row in self.rows if row.status is Status.FAILED or row.errors]

    @property
    def sections(self) -> list[Section]:
        """Unpruned and no-image, then one section per budget in the order in which they ran."""
        groups: dict[Any, dict[str, Line]] = {}
        for row in self.rows:
            key = "whole" if row.method in ("unpruned", "no-image") else (type(row.keep), row.keep)
            groups.setdefault(key, {}).setdefault(row.label, Line([])).rows.append(row)
        sections = []
        for key, group in groups.items():
            lines = list(group.values())
            if key == "whole":
                sections.append(Section("all visual tokens", lines, contest=False))
            else:
                sections.append(Section(_budget_title(lines), sorted(lines, key=_rank)))
        return sections

    # -------------------------------------------------------------------------------------------------------- output

    def as_json(self) -> dict[str, Any]:
        return {"rows": [row.as_json() for row in self.rows], "environment": self.environment}

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`as_json`."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.as_json(), file, indent=2, default=str, allow_nan=False)
            file.write("\n")

    def table(self, by_task: bool = True) -> Table:
        """A rich table, with accuracy by task if wanted."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        tasks = self.tasks if by_task else ()
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, title=self.title)
        for number, head in enumerate((*_HEADS, *tasks)):
            table.add_column(head, justify="right" if number else "left", no_wrap=True)
        for section in self.sections:
            table.add_section()
            table.add_row(Text(section.title, style="bold cyan"))
            for line in section.lines:
                style = "bold green" if section.is_best(line) else "dim italic" if line.first.baseline else ""
                style = {Status.FAILED: "bold red", Status.NOT_APPLICABLE: "dim"}.get(_status(line), style)
                table.add_row(*_cells(line, tasks), style=style)
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.measure import Measurement

        table = self.table()
        if Measurement.get(console, options.update(width=1000), table).maximum > options.max_width:
            table = self.table(by_task=False)
        yield table
        yield from self.notes

    def _repr_markdown_(self) -> str:
        return self.markdown()

    def markdown(self) -> str:
        """The same as a Markdown table, with all tasks."""
        heads = (*_HEADS, *self.tasks)
        lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
        for section in self.sections:
            lines.append(f"| **{section.title}** |{' |' * (len(heads) - 1)}")
            for line in section.lines:
                name, *cells = (cell.replace("|", "\\|") for cell in _cells(line, self.tasks))
                if section.is_best(line):
                    name, cells[0] = f"**{name}**", f"**{cells[0]}**"
                elif line.first.baseline:
                    name = f"*{name}*"
                lines.append(f"| {' | '.join((name, *cells))} |")
        notes = [f"- {note}" for note in (self.title, *self.notes)]
        return "\n".join([*lines, "", *notes, ""])

    @property
    def title(self) -> str:
        e = self.environment
        drawn = f"{e.get('limit')} samples (seed {e.get('suite_seed')})"
        return f"{e.get('model')} on {e.get('suite')}, {drawn}, positions: {e.get('positions')}"

    @property
    def notes(self) -> list[str]:
        """What a reader of the table has to know, and the reason of everything that is missing in it."""
        e = self.environment
        notes = [
            "Accuracy in % with its 95 % interval, or ± standard deviation over seeds; rel.: % of the unpruned accuracy; "
            "loyal: % of answers equal to the unpruned model's.",
            "Tokens: visual tokens that the decoder saw, mean over its layers and in the last one; ~ not fixed by the budget alone.",
            "Italic: baselines that read no content. The best method of each budget stands out.",
            f"Guessing would get {_percent(e.get('chance'))} %. The JSON file has all rows, seeds and tasks.",
            f"s/sample: processing and generation in batches of {e.get('batch_size')}, {e.get('dtype')}, on {e.get('hardware')}.",
        ]
        for section in self.sections:
            for line in section.lines:
                for reason, row in {row.reason: row for row in line.rows if row.reason}.items():
                    head = _HEAD_OF[row.status]
                    notes.append(f"{head}: {row.label}, {section.title}: {reason}")
        return list(dict.fromkeys(notes))


_HEADS = ("method", "accuracy", "rel.", "loyal", "tokens", "last", "s/sample")


def _rank(line: Line) -> tuple[Any, ...]:
    if not line.measured:
        return (1, 0.0, 0.0, line.name)
    return (0, -line.mean("accuracy"), line.mean("tokens_mean"), line.name)


_HEAD_OF = {
    Status.OK: "ERRORS",
    Status.NOT_APPLICABLE: "n/a",
    Status.UNFINISHED: "unfinished",
    Status.FAILED: "FAILED",
}


def _status(line: Line) -> Status:
    """The worst of its rows'."""
    return max((row.status for row in line.rows), key=list(_HEAD_OF).index)


def _budget_title(lines: list[Line]) -> str:
    keep = lines[0].first.keep
    if keep is None:
        return "fixed budget"
    if isinstance(keep, int):
        return f"keep {keep} token{'s' * (keep != 1)}"
    return "keep 1.0" if keep == 1 else f"keep {keep:.4g}"


def _cells(line: Line, tasks: Sequence[str]) -> list[str]:
    if not line.measured:
        return [
            line.name,
            _HEAD_OF[_status(line)],
            *[""] * (len(_HEADS) - 2 + len(tasks)),
        ]
    about = "~" if line.first.adaptive else ""
    return [
        line.name,
        line.accuracy,
        _percent(line.mean("relative_accuracy")),
        _percent(line.mean("loyalty")),
        about + _count(line.mean("tokens_mean")),
        about + _count(line.mean("tokens_last")),
        f"{line.mean('seconds_per_sample'):.3g}",
        *(_percent(line.task(task)) for task in tasks),
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def _count(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
