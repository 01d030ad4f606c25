"""``foveate results``: export result files (CSV, JSON, Parquet), put them together, and say where two differ."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from foveate.errors import FoveateError, ParameterError
from foveate.eval_suites.results.leaderboard import Leaderboard
from foveate.eval_suites.results.rows import Row
from foveate.eval_suites.results.store import Store, differences, read
from foveate.eval_suites.terminal import write

__all__ = ["add_arguments", "boards", "compare", "main", "opened", "table"]

_FACTS = (
    "limit", "suite_seed", "positions", "batch_size", "dtype", "attention", "hardware", "weights_sha256", "revision",
    "foveate", "commit", "modified", "torch", "transformers", "date",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foveate results``."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    export = actions.add_parser("export", help="write rows, or single answers, for other programs")
    export.add_argument("file", help="a result file, or a JSON export of one")
    form = export.add_mutually_exclusive_group(required=True)
    form.add_argument("--csv", metavar="PATH", help="one line per row; '-' is the terminal")
    form.add_argument("--json", metavar="PATH", help="everything, to be imported again; '-' is the terminal")
    form.add_argument("--parquet", metavar="PATH", help="the table of --csv (needs pyarrow)")
    export.add_argument("--samples", action="store_true", help="one line per answer instead (for CSV and Parquet)")
    export.set_defaults(action=_export)

    imports = actions.add_parser("import", help="add results to a result file")
    imports.add_argument("into", metavar="INTO", help="the result file, made if it is not there")
    imports.add_argument("files", metavar="FROM", nargs="+", help="result files or JSON exports")
    imports.set_defaults(action=_import)

    diff = actions.add_parser("diff", help="where two result files differ; exit code 1 if they do (times aside)")
    diff.add_argument("a", metavar="A", help="a result file or a JSON export")
    diff.add_argument("b", metavar="B", help="another one")
    diff.set_defaults(action=_diff)


# ------------------------------------------------------------------------------------------------------------- export


def table(store: Store, samples: bool = False) -> list[dict[str, Any]]:
    """One flat record per row, with what is needed to repeat it; or one per answer."""
    if not samples:
        return [_flat(row, board) for board in store.boards() for row in board.rows]
    records = []
    for bench in store.as_json()["benches"]:
        for run in bench["runs"]:
            head = {name: bench["facts"][name] for name in ("model", "suite")}
            head |= {name: run[name] for name in ("method", "label", "keep", "seed")}
            for answer in run["answers"]:
                records.append(head | answer | {name: _text(answer.get(name)) for name in ("tokens", "cached")})
    return records


def _flat(row: Row, board: Leaderboard) -> dict[str, Any]:
    facts = board.environment
    flat = {name: facts[name] for name in ("model", "suite")} | row.as_json()
    low, high = flat.pop("interval") or (None, None)
    tasks, versus = flat.pop("tasks"), flat.pop("versus_random") or {}
    flat |= {"versus_random": versus.get("mean")} | {f"versus_random_{x}": versus.get(x) for x in ("low", "high", "p")}
    timings = flat.pop("timings")
    flat |= {name: _text(flat[name]) for name in ("parameters", "positions", "tokens_per_layer")}
    flat |= {"status": row.status.value, "low": low, "high": high}
    flat |= {f"accuracy_{task}": tasks.get(task) for task in board.tasks}
    flat |= {f"{name}_b{x['batch']}": value for x in timings for name, value in x.items() if name != "batch"}
    return flat | {name: facts.get(name) for name in _FACTS}


def _text(value: Any) -> str | None:
    return None if value is None else json.dumps(value, default=repr)


def _export(args: argparse.Namespace) -> int:
    if args.json:
        write(args.json, json.dumps(read(args.file), indent=1, allow_nan=False) + "\n")
        return 0
    with opened(args.file) as store:
        records = table(store, args.samples)
    names = list(dict.fromkeys(name for record in records for name in record))
    if args.csv:
        _write_csv(args.csv, [names, *([record.get(name) for name in names] for record in records)])
    else:
        _write_parquet(args.parquet, {name: [record.get(name) for record in records] for name in names})
    return 0


def opened(path: str) -> Store:
    """A result file, or a JSON export as one."""
    if not path.lower().endswith(".json"):
        return Store(path, create=False)
    store = Store(":memory:")
    store.merge(read(path), path)
    return store


def boards(path: str) -> list[Leaderboard]:
    """The leaderboards of a result file, or of a JSON export of one.

    Raises:
        StoreError: no such file, or not one of ours.
    """
    with opened(path) as store:
        return store.boards()


def _write_csv(path: str, lines: Sequence[Sequence[Any]]) -> None:
    if path == "-":
        csv.writer(sys.stdout, lineterminator="\n").writerows(lines)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(lines)


def _write_parquet(path: str, columns: Mapping[str, Sequence[Any]]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise FoveateError("--parquet needs pyarrow: run `pip install pyarrow`, or use --csv") from None
    # keep is 0.25 here and 64 there: text, so that a fraction of 1.0 stays apart from 1 token
    plain = {name: [_text(v) for v in values] if name == "keep" else list(values) for name, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(plain), path)


# ------------------------------------------------------------------------------------------------------------- import


def _import(args: argparse.Namespace) -> int:
    taken = [(path, read(path)) for path in args.files]  # all are readable before anything is written
    with Store(args.into) as store:
        for path, results in taken:
            print(f"{path}: {store.merge(results, path)} new answers")
    return 0


# --------------------------------------------------------------------------------------------------------------- diff


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What :func:`foveate.eval_suites.results.store.read` found in two files: a line per difference, times aside."""
    lines = []
    benches = [{(x["facts"]["model"], x["facts"]["suite"]): x for x in results["benches"]} for results in (a, b)]
    for key in dict.fromkeys([*benches[0], *benches[1]]):
        name = " on ".join(key)
        pair = [side.get(key) for side in benches]
        if None in pair:
            lines.append(f"{name}: only in {'AB'[pair.index(None) ^ 1]}")
            continue
        lines += [f"{name}: {text}" for text in differences(pair[0]["facts"], pair[1]["facts"], ("in A", "in B"))]
        lines += [f"{name}: {text}" for text in _compare_runs(*(_runs(bench) for bench in pair))]
    return lines


def _runs(bench: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    named = {}
    for run in bench["runs"]:
        keep = "" if run["keep"] is None else f" keep {run['keep']}"
        seed = "" if run["seed"] is None else f" seed {run['seed']}"
        named[f"{run['label']}{keep}{seed}"] = run
    return named


def _compare_runs(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in dict.fromkeys([*a, *b]):
        if name not in a or name not in b:
            lines.append(f"{name}: only in {'A' if name in a else 'B'}")
            continue
        one, two = a[name], b[name]
        lines += [
            f"{name}: {what} {one[what]} in A, {two[what]} in B"
            for what in ("parameters", "positions", "status")
            if one[what] != two[what]
        ]
        answers = [{x["number"]: x for x in run["answers"]} for run in (one, two)]
        shared = answers[0].keys() & answers[1].keys()
        if missing := len(answers[0].keys() ^ answers[1].keys()):
            lines.append(f"{name}: {missing} samples in one file only")
        changed = [n for n in sorted(shared) if answers[0][n]["text"] != answers[1][n]["text"]]
        scores = [sum(side[n]["score"] or 0 for n in shared) for side in answers]
        if changed:
            percent = " -> ".join(f"{100 * score / len(shared):.1f}" for score in scores)
            first = answers[0][changed[0]]["sample"]
            lines.append(
                f"{name}: {len(changed)} of {len(shared)} answers differ (first {first}), accuracy {percent} %"
            )
        elif scores[0] != scores[1]:
            lines.append(f"{name}: the same answers are scored differently")
        if any(answers[0][n]["tokens"] != answers[1][n]["tokens"] for n in shared):
            lines.append(f"{name}: the decoder saw other numbers of tokens")
    return lines


def _diff(args: argparse.Namespace) -> int:
    if os.path.abspath(args.a) == os.path.abspath(args.b):
        raise ParameterError(f"{args.a} and {args.b} are the same file; give two")
    lines = compare(read(args.a), read(args.b))
    print("\n".join(lines) if lines else "the same rows with the same answers")
    return int(bool(lines))


def main(args: argparse.Namespace) -> int:
    """Run ``foveate results``: export, import or diff."""
    return args.action(args)
