"""``foveate reproduce``: settings that papers published, run with our code, and both numbers side by side.

A recipe is an entry of a YAML file in this folder: method and parameters, model, the geometry it was published for, and
the scores with their source. Scores are only what the source prints; nothing is filled in.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError, ParameterError, UnknownNameError
from foveate.eval_suites.lmms.benchmarks import BENCHMARKS
from foveate.eval_suites.results.leaderboard import Leaderboard
from foveate.eval_suites.terminal import call_text, console
from foveate.pruners.core import Layout, Pruner, create

__all__ = ["ELSEWHERE", "Recipe", "add_arguments", "find", "main", "recipes"]

ELSEWHERE = {
    "mmbench": "a language model judges the answers",
    "mmbench-cn": "a language model judges the answers",
    "mmvet": "a language model judges the answers",
    "mmmu": "lmms-eval's prompt is another",
    "vqav2-test": "published on test-dev, whose answers are not public",
    "vizwiz-test": "published on the test split, whose answers are not public",
    "vizwiz-unknown": "the source does not name the split",
    "textvqa-ocr": "published with OCR hints in the prompt, which lmms-eval leaves out",
    "osworld-g": "needs a grounding head",
    "ui-vision": "not part of lmms-eval",
}
"""Benchmarks that papers quote and we do not run, and why."""


@dataclass(frozen=True)
class Recipe:
    """A published setting.

    Attributes:
        name: ``hiprune-llava15-192``.
        method, parameters: ours.
        model: on the hub (no source names a revision).
        paper: where the method is from.
        source: where the scores are from.
        note: what to know when comparing.
        unpruned, published: scores by benchmark, in the paper's units; {} where none could be read.
        layout: grids of the published geometry, ``[[24, 24]]``, or ``{video: [frames, rows, columns]}``.
        kept: visual tokens that the source names for it. share: the fraction it names where the geometry depends on the
            picture.
        benchmarks: what is run where it is not what was published. needs: what keeps us from running it at all.
    """

    name: str
    method: str
    paper: str
    source: str
    model: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    unpruned: Mapping[str, float] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    layout: Any = None
    kept: int | None = None
    share: float | None = None
    note: str | None = None
    benchmarks: tuple[str, ...] = ()
    needs: str | None = None

    @property
    def pruner(self) -> Pruner:
        """The method with its parameters."""
        return create(self.method, **self.parameters)

    @property
    def geometry(self) -> Layout | None:
        """The layout that the published number of tokens is for."""
        if self.layout is None:
            return None
        if isinstance(self.layout, Mapping):
            return Layout.video(*self.layout["video"])
        return Layout.joined([Layout.grid(*grid) for grid in self.layout])

    @property
    def runs(self) -> tuple[str, ...]:
        """Benchmarks that can be run."""
        return self.benchmarks or tuple(name for name in self.published if name in BENCHMARKS)


def recipes() -> dict[str, Recipe]:
    """All recipes by name.

    Raises:
        ParameterError: a file that cannot be read as recipes; the message names it.
    """
    import yaml  # comes with transformers

    found: dict[str, Recipe] = {}
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            common = {key: value for key, value in content.items() if key != "recipes"}
            entries = [Recipe(**common, **_plain(entry)) for entry in content["recipes"]]
        except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            raise ParameterError(f"recipes of {path.name} cannot be read ({error})") from error
        for entry in entries:
            if entry.name in found:
                raise ParameterError(f"{path.name}: there are two recipes called {entry.name}")
            found[entry.name] = entry
    return found


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    parameters = {k: tuple(v) if isinstance(v, list) else v for k, v in (entry.get("parameters") or {}).items()}
    return {**entry, "parameters": parameters, "benchmarks": tuple(entry.get("benchmarks", ()))}


def find(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        UnknownNameError: there is none; the message suggests the nearest.
    """
    known = recipes()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UnknownNameError(f"no recipe {name!r}; {hint}`foveate reproduce --list` prints all {len(known)}")
    return known[name]


# ------------------------------------------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foveate reproduce``."""
    add = parser.add_argument
    add("name", metavar="NAME", nargs="?", help="a recipe")
    add("--list", action="store_true", help="print all recipes")
    add("--dry-run", action="store_true", help="say what would be run, and what was published, and run nothing")
    add("--limit", metavar="N", type=int, help="documents of each benchmark (default: all)")
    add("--model", metavar="NAME", help="this model instead, for example a folder")
    add("--benchmarks", metavar="NAMES", help="these benchmarks instead, separated by commas")
    add("--batch-size", metavar="N", type=int, default=1, help="documents per call of the model (default: 1)")
    add("--device", help="cpu, cuda, … (default: cuda where there is one)")
    add("--out", metavar="PATH", help="result file, as for `foveate bench`")


def main(args: argparse.Namespace) -> int:
    """Run ``foveate reproduce``; 0, or 1 if a run failed.

    Raises:
        FoveateError: no such recipe, or something that it needs is missing.
    """
    if args.list:
        _print_all()
        return 0
    if args.name is None:
        raise ParameterError("say which recipe; `foveate reproduce --list` prints all")
    recipe = find(args.name)
    chosen = [part.strip() for part in (args.benchmarks or "").split(",") if part.strip()] or list(recipe.runs)
    model = args.model or recipe.model
    _announce(recipe, model, chosen)
    if args.dry_run:
        _compare(recipe, {})
        return 0
    return _run(recipe, model, chosen, args)


def _print_all() -> None:
    from rich.table import Column, Table

    # on a narrow terminal all may wrap, but for the name that is typed
    name = Column("recipe", no_wrap=True, min_width=max(map(len, recipes())))
    table = Table(name, "method", Column("model", overflow="fold"), "tokens", "runs", "published, source", box=None)
    for recipe in recipes().values():
        tokens = recipe.kept if recipe.kept is not None else f"{recipe.share:.1%}" if recipe.share else ""
        runs = f"no: needs {recipe.needs}" if recipe.needs else ", ".join(recipe.runs) or "-"
        source = f"{recipe.paper}, {recipe.source}"
        table.add_row(recipe.name, recipe.method, recipe.model, str(tokens), runs, source)
    console(220).print(table)


def _announce(recipe: Recipe, model: str, chosen: list[str]) -> None:
    geometry = recipe.geometry
    print(f"{recipe.name}: {call_text(recipe.method, recipe.parameters)} on {model}")
    print(f"source: {recipe.paper}, {recipe.source}")
    if recipe.kept is not None and geometry is not None:
        print(f"tokens: {recipe.kept} of {geometry.size} ({Fraction(recipe.kept, geometry.size)})")
    if recipe.note:
        print(f"note: {recipe.note}")
    print(f"benchmarks: {', '.join('lmms:' + name for name in chosen) or 'none that can be run here'}")


def _run(recipe: Recipe, model: str, chosen: list[str], args: argparse.Namespace) -> int:
    from foveate.eval_suites.lmms import bench as through
    from foveate.eval_suites.running.meter import MethodRun

    if recipe.needs:
        _compare(recipe, {})
        raise FoveateError(f"{recipe.name} cannot be run here: it needs {recipe.needs}")
    if not chosen:
        _compare(recipe, {})
        raise FoveateError(f"{recipe.name} cannot be run here: none of its benchmarks can (see the table)")
    runs = [MethodRun("unpruned", None), MethodRun(recipe.method, recipe.pruner)]
    options = {name: getattr(args, name) for name in ("limit", "batch_size", "device", "out")}
    boards = through.bench(model, ",".join(chosen), runs=runs, **options)
    _compare(recipe, _ours(boards, through.PREFIX))
    if args.limit:
        print(f"only the first {args.limit} documents of each benchmark: these scores do not compare with the paper's")
    return int(any(board.failures for board in boards))


def _ours(boards: Sequence[Leaderboard], prefix: str) -> dict[tuple[str, str], float | None]:
    """Our numbers by benchmark and label of the run, as papers quote them; runs that failed are not there.

    None where the run has no such number: documents failed, or lmms-eval gave none.
    """
    return {
        (board.environment["suite"].removeprefix(prefix), row.label): row.quoted
        for board in boards
        for row in board.rows
        if row.accuracy is not None
    }


def _compare(recipe: Recipe, ours: Mapping[tuple[str, str], float | None]) -> None:
    """Print published scores and ours, which are by benchmark and label of the run, None (``?``) without a number."""
    from rich.table import Table

    table = Table(box=None)
    for heading in ("benchmark", "unpruned: paper", "ours", "pruned: paper", "ours", "relative: paper", "ours"):
        table.add_column(heading, justify="left" if heading == "benchmark" else "right")
    names = dict.fromkeys([*recipe.published, *(name for name, _ in ours)])
    for name in names:
        theirs = recipe.unpruned.get(name), recipe.published.get(name)
        runs = (name, "unpruned"), (name, recipe.method)
        mine = ours.get(runs[0]), ours.get(runs[1])
        shown = ["?" if run in ours and ours[run] is None else _number(ours.get(run)) for run in runs]
        cells = [_number(theirs[0]), shown[0], _number(theirs[1]), shown[1]]
        cells += [_relative(theirs), _relative(mine)]
        why = f" (not run: {ELSEWHERE[name]})" if name in ELSEWHERE else ""
        table.add_row(name + why, *cells)
    if names:
        console(160).print(table)
        if None in ours.values():
            print("?: documents failed, or lmms-eval gave no number of the kind that papers quote")
    else:
        print("no score by benchmark was published, or none could be read")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _relative(pair: tuple[float | None, float | None]) -> str:
    whole, part = pair
    return "-" if None in pair or not whole else f"{100 * part / whole:.1f} %"
