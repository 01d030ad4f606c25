"""Results in one SQLite file: every answer is durable before the next batch starts, and nothing is ever counted twice.

A file holds benches (a model on a suite, with all that has to be equal for rows to compare), their runs (a method at a
budget with a seed) and the runs' answers. Several processes may write to one file at once.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any

from foveate.errors import StoreError
from foveate.eval_suites.results.leaderboard import Leaderboard
from foveate.eval_suites.results.rows import Answer, Row, Status, Timing, summarise
from foveate.eval_suites.running.compare import compare
from foveate.eval_suites.running.cost import DecoderShape

__all__ = ["MUST_AGREE", "SCHEMA", "Store", "differences", "read"]

SCHEMA = 4
"""Version of the tables below. Raise it with every change to them, and teach :meth:`Store._prepare` the way there."""

_APPLICATION = int.from_bytes(b"fovt", "big")  # marks the file as ours, see `PRAGMA application_id`
_PATIENCE = 60  # seconds that a writer waits for others

_TABLES = """
CREATE TABLE bench (
    id INTEGER PRIMARY KEY,
    model TEXT NOT NULL,
    suite TEXT NOT NULL,
    samples INTEGER NOT NULL,
    tasks TEXT NOT NULL,        -- JSON list
    facts TEXT NOT NULL,        -- JSON object: settings, versions, hardware
    UNIQUE (model, suite)
);
CREATE TABLE run (
    id INTEGER PRIMARY KEY,     -- in the order in which tables show them
    bench INTEGER NOT NULL REFERENCES bench ON DELETE CASCADE,
    method TEXT NOT NULL,
    label TEXT NOT NULL,
    keep TEXT NOT NULL,         -- JSON: 1 token is not the fraction 1.0
    seed TEXT NOT NULL,         -- JSON: null where nothing is drawn
    baseline INTEGER NOT NULL,
    adaptive INTEGER NOT NULL,
    guided INTEGER NOT NULL,
    parameters TEXT NOT NULL,   -- JSON object
    positions TEXT NOT NULL,    -- JSON object
    status TEXT NOT NULL,       -- 'ok', or why the run was given up
    reason TEXT,
    stopped_at INTEGER,         -- first sample of the batch that ended the run
    UNIQUE (bench, label, keep, seed)
);
CREATE TABLE answer (
    run INTEGER NOT NULL REFERENCES run ON DELETE CASCADE,
    number INTEGER NOT NULL,
    sample TEXT NOT NULL,
    task TEXT NOT NULL,
    text TEXT,
    score REAL,
    tokens TEXT,                -- JSON list: visual tokens seen by each decoder layer
    asked INTEGER,
    text_tokens INTEGER,
    seconds REAL,
    error TEXT,
    PRIMARY KEY (run, number)
) WITHOUT ROWID;
"""

_TIMINGS = """
CREATE TABLE timing (
    run INTEGER NOT NULL REFERENCES run ON DELETE CASCADE,
    batch INTEGER NOT NULL,     -- samples per call, for all of which seconds are
    repeats INTEGER, prefill REAL, decode REAL, selection REAL, peak_bytes INTEGER,
    unpruned_prefill REAL, unpruned_decode REAL, unpruned_peak_bytes INTEGER,
    prefill_speedup REAL, decode_speedup REAL, error TEXT,
    PRIMARY KEY (run, batch)
) WITHOUT ROWID;
"""

_CACHED = "ALTER TABLE answer ADD COLUMN cached TEXT"  # JSON list: visual tokens in each layer's KV cache

_QUOTED = "ALTER TABLE run ADD COLUMN quoted REAL"  # the number that papers quote

_STEPS = {0: _TABLES, 1: _TIMINGS, 2: _CACHED, 3: _QUOTED}
"""What makes the next format out of each; 0 is an empty file."""

MUST_AGREE = {
    "weights_sha256": "weights", "revision": "revision", "limit": "limit", "suite_seed": "seed",
    "samples_sha256": "samples", "batch_size": "batch size", "positions": "positions", "dtype": "dtype",
    "attention": "attention", "device": "device", "hardware": "hardware", "foveate": "foveate",
    "source_sha256": "foveate's code", "torch": "torch", "transformers": "transformers", "lmms_eval": "lmms-eval",
}  # fmt: skip
"""Facts that have to be equal for rows to stand in one table, and what messages call them."""

_TIMING = tuple(f.name for f in fields(Timing))
_ANSWER = tuple(f.name for f in fields(Answer))
_LISTS = ("tokens", "cached")
_RUN = (
    "method", "label", "keep", "seed", "baseline", "adaptive", "guided", "parameters", "positions", "status", "reason",
    "stopped_at", "quoted",
)  # fmt: skip
_INSERT = (
    f"INSERT INTO answer (run, {', '.join(_ANSWER)}) VALUES ({', '.join('?' * (1 + len(_ANSWER)))}) "
    "ON CONFLICT (run, number) DO UPDATE SET score = excluded.score, text = excluded.text "
    "WHERE score IS NULL AND error IS NULL"
)


def differences(
    there: Mapping[str, Any], now: Mapping[str, Any], words: tuple[str, str] = ("there", "now")
) -> list[str]:
    """Which of the facts that must agree do not, in words."""
    found = []
    drawn_otherwise = any(there.get(key) != now.get(key) for key in ("limit", "suite_seed"))
    for key, name in MUST_AGREE.items():
        old, new = there.get(key), now.get(key)
        if old == new or (key == "samples_sha256" and drawn_otherwise):
            continue
        if key.endswith("sha256"):
            old, new = (str(value)[:12] for value in (old, new))
        found.append(f"{name} ({old} {words[0]}, {new} {words[1]})")
    return found


class Store:
    """A result file.

    Args:
        path: the file, made if it is not there; ``":memory:"`` for results that nobody wants to keep.
        create: whether to make it.

    Raises:
        StoreError: no file, not one of ours, from a newer version of foveate, or unusable; the message says what to do.
    """

    def __init__(self, path: str | os.PathLike[str], create: bool = True) -> None:
        self.path = os.fspath(path)
        if self.path != ":memory:" and not create and not os.path.isfile(self.path):
            raise StoreError(f"no result file {self.path}; `foveate bench --out {self.path}` makes one")
        try:
            self._db = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise StoreError(f"{self.path} cannot be opened ({error}); give another path") from None
        self._db.row_factory = sqlite3.Row
        try:
            with self._errors():
                self._prepare(create)
        except StoreError:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --------------------------------------------------------------------------------------------------------- writing

    def open_bench(self, facts: Mapping[str, Any], tasks: Sequence[str], fresh: str = "") -> int:
        """The number of the bench that ``facts`` describe, made if it is not there.

        Args:
            facts: settings and environment: ``model``, ``suite``, ``limit`` and those of :data:`MUST_AGREE`.
            tasks: names of the suite's tasks.
            fresh: ``"always"`` drops what there is of this model and suite first, ``"changed"`` where it does not
                agree.

        Raises:
            StoreError: what is there was made with other settings or versions.

        Facts that need not agree stay those of the first opening: ``commit`` may be older than a later run's, but the
        code that makes results is the same, for ``source_sha256`` must agree.
        """
        model, suite = str(facts["model"]), str(facts["suite"])
        with self._transaction():
            there = self._db.execute("SELECT * FROM bench WHERE model = ? AND suite = ?", (model, suite)).fetchone()
            changed = differences(json.loads(there["facts"]), facts) if there else []
            if there and (fresh == "always" or (fresh == "changed" and changed)):
                self._db.execute("DELETE FROM bench WHERE id = ?", (there["id"],))
            elif changed:
                raise StoreError(
                    f"{self.path} holds {model} on {suite} with other settings: {'; '.join(changed)}. Rows of both "
                    "would not compare: run with the settings of the file, give another file, or drop the old rows "
                    "with --fresh"
                )
            elif there:
                return there["id"]
            values = (model, suite, facts["limit"], _json(list(tasks)), _json(dict(facts)))
            return self._db.execute(
                "INSERT INTO bench (model, suite, samples, tasks, facts) VALUES (?, ?, ?, ?, ?)", values
            ).lastrowid  # pyright: ignore[reportReturnType]  (an INSERT has one)

    def open_runs(self, bench: int, rows: Iterable[Row]) -> list[int]:
        """The numbers of the runs that ``rows`` name, made in this order if they are not there.

        Raises:
            StoreError: a run of the same name, budget and seed had other parameters.
        """
        numbers = []
        with self._transaction():
            for row in rows:
                parameters = _json(row.parameters)
                where = (bench, row.label, _json(row.keep), _json(row.seed))
                there = self._db.execute(
                    "SELECT id, parameters FROM run WHERE (bench, label, keep, seed) = (?, ?, ?, ?)", where
                ).fetchone()
                if there and there["parameters"] != parameters:
                    raise StoreError(
                        f"{self.path} holds {row.label} with other parameters: {there['parameters']} there, "
                        f"{parameters} now; give another file, or drop the old rows with --fresh"
                    )
                if there:
                    numbers.append(there["id"])
                    continue
                made = self._db.execute(
                    "INSERT INTO run (bench, label, keep, seed, method, baseline, adaptive, guided, parameters, "
                    "positions, status) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, '{}', 'ok')",
                    (*where, row.method, row.baseline, row.adaptive, row.guided, parameters),
                )
                numbers.append(made.lastrowid)
        return numbers

    def add(self, run: int, answers: Iterable[Answer], positions: Mapping[str, str] | None = None) -> None:
        """Add the answers of a batch, all or none of them; answers that are there already stay as they are.

        An answer without a score waits for it, and counts as missing; the same with a score gives it, with the text
        that was scored.
        """
        with self._transaction():
            self._db.executemany(_INSERT, [(run, *_values(answer)) for answer in answers])
            if positions:
                self._db.execute("UPDATE run SET positions = ? WHERE id = ?", (_json(dict(positions)), run))

    def add_timing(self, run: int, timing: Timing) -> None:
        """Add what a batch size costs; one that is there already stays as it is."""
        names, marks = ", ".join(_TIMING), ", ".join("?" * (1 + len(_TIMING)))
        insert = f"INSERT INTO timing (run, {names}) VALUES ({marks}) ON CONFLICT DO NOTHING"
        with self._transaction():
            self._db.execute(insert, (run, *astuple(timing)))

    def quote(self, run: int, value: float) -> None:
        """Add the number that papers quote; one that is there already stays as it is."""
        with self._transaction():
            self._db.execute("UPDATE run SET quoted = coalesce(quoted, ?) WHERE id = ?", (value, run))

    def give_up(self, run: int, status: Status, reason: str, at: int) -> None:
        """Note that a run ended at sample ``at`` for a reason not the sample's own; the first such sample counts."""
        with self._transaction():
            self._db.execute(
                "UPDATE run SET status = ?, reason = ?, stopped_at = ? WHERE id = ? AND (status = 'ok' OR stopped_at > "
                "?)",
                (status.value, reason, at, run, at),
            )

    def retry(self, bench: int) -> None:
        """Forget the samples and the runs that failed, so that they are done again."""
        with self._transaction():
            runs = "SELECT id FROM run WHERE bench = ?"
            failed = f"SELECT run FROM answer WHERE error IS NOT NULL AND run IN ({runs})"
            self._db.execute(f"UPDATE run SET quoted = NULL WHERE id IN ({failed})", (bench,))
            for table in ("answer", "timing"):
                self._db.execute(f"DELETE FROM {table} WHERE error IS NOT NULL AND run IN ({runs})", (bench,))
            self._db.execute("UPDATE run SET status = 'ok', reason = NULL, stopped_at = NULL WHERE bench = ?", (bench,))

    # --------------------------------------------------------------------------------------------------------- reading

    def finished(self, run: int) -> set[int]:
        """Numbers of the samples that are done."""
        return {row[0] for row in self._db.execute("SELECT number FROM answer WHERE run = ?", (run,))}

    def status(self, run: int) -> Status:
        """Whether the run was given up."""
        return Status(self._db.execute("SELECT status FROM run WHERE id = ?", (run,)).fetchone()[0])

    def reason(self, run: int) -> str | None:
        """Why the run was given up."""
        return self._db.execute("SELECT reason FROM run WHERE id = ?", (run,)).fetchone()[0]

    def quoted(self, run: int) -> float | None:
        """The number that papers quote; None if it is not there."""
        return self._db.execute("SELECT quoted FROM run WHERE id = ?", (run,)).fetchone()[0]

    def answers(self, run: int) -> dict[int, Answer]:
        """The answers of a run by sample number."""
        rows = self._db.execute(f"SELECT {', '.join(_ANSWER)} FROM answer WHERE run = ? ORDER BY number", (run,))
        return {row["number"]: _answer(dict(row)) for row in rows}

    def timings(self, run: int) -> dict[int, Timing]:
        """What a run costs, by batch size."""
        rows = self._db.execute(f"SELECT {', '.join(_TIMING)} FROM timing WHERE run = ? ORDER BY batch", (run,))
        return {row["batch"]: Timing(**dict(row)) for row in rows}

    def boards(self) -> list[Leaderboard]:
        """A leaderboard per model and suite, in the order in which they were begun."""
        return [self.board(row["id"]) for row in self._db.execute("SELECT id FROM bench ORDER BY id").fetchall()]

    def board(self, bench: int) -> Leaderboard:
        """The leaderboard of a bench."""
        with self._errors():
            head = self._db.execute("SELECT * FROM bench WHERE id = ?", (bench,)).fetchone()
            runs = self._db.execute("SELECT * FROM run WHERE bench = ? ORDER BY id", (bench,)).fetchall()
            tasks, facts = tuple(json.loads(head["tasks"])), json.loads(head["facts"])
            shape = DecoderShape.read(facts.get("decoder"))
            rows: list[Row] = []
            reference = None
            for run in sorted(runs, key=lambda run: run["method"] != "unpruned"):  # stable; the reference comes first
                row = Row(**{name: run[name] for name in ("method", "label", "reason", "quoted")}, **_decoded(run))
                row.status, row.timings = Status(run["status"]), self.timings(run["id"])
                summarise(row, self.answers(run["id"]), head["samples"], tasks, reference, shape)
                reference = row if row.method == "unpruned" else reference
                rows.append(row)
        compare(rows)
        return Leaderboard(rows, facts, tasks)

    # -------------------------------------------------------------------------------------------------- export, import

    def as_json(self, bench: int | None = None) -> dict[str, Any]:
        """All that the file holds, or one bench, in plain types; :meth:`merge` reads it back."""
        benches = []
        for head in self._db.execute("SELECT * FROM bench WHERE id = coalesce(?, id) ORDER BY id", (bench,)).fetchall():
            runs = []
            for run in self._db.execute("SELECT * FROM run WHERE bench = ? ORDER BY id", (head["id"],)).fetchall():
                plain = {name: run[name] for name in _RUN} | _decoded(run)
                plain["answers"] = [_plain(answer) for answer in self.answers(run["id"]).values()]
                plain["timings"] = [asdict(timing) for timing in self.timings(run["id"]).values()]
                runs.append(plain)
            benches.append({"tasks": json.loads(head["tasks"]), "facts": json.loads(head["facts"]), "runs": runs})
        return {"format": "foveate results", "schema": SCHEMA, "benches": benches}

    def merge(self, results: Mapping[str, Any], source: str = "the results") -> int:
        """Add what :meth:`as_json` gave; returns how many answers were new.

        Raises:
            StoreError: ``results`` are not that, or of a newer foveate, or do not agree with what is there.
        """
        _check_format(results, source)
        before = self._count()
        try:
            for bench in results["benches"]:
                number = self.open_bench(bench["facts"], bench["tasks"])
                runs = bench["runs"]
                named = [Row(**{name: run[name] for name in _RUN[:8]}, positions=run["positions"]) for run in runs]
                for run, into in zip(runs, self.open_runs(number, named)):
                    self.add(into, map(_answer, run["answers"]), run["positions"])
                    for timing in run.get("timings", ()):  # exports of format 1 have none
                        self.add_timing(into, Timing(**timing))
                    if run.get("quoted") is not None:  # exports of format 3 and before have none
                        self.quote(into, run["quoted"])
                    if run["status"] != Status.OK.value:
                        self.give_up(into, Status(run["status"]), run["reason"], run["stopped_at"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{source}: damaged results ({type(error).__name__}: {error}); export them again"
            ) from None
        return self._count() - before

    # --------------------------------------------------------------------------------------------------------- helpers

    def _prepare(self, create: bool) -> None:
        """Look what the file is; make the tables in an empty one."""
        pragma = self._db.execute
        pragma("PRAGMA foreign_keys = ON")
        if create:
            _patiently(lambda: pragma("PRAGMA journal_mode = WAL"))
            pragma("PRAGMA synchronous = FULL")  # durable even if the power goes
        version = pragma("PRAGMA user_version").fetchone()[0]
        empty = pragma("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if empty and version == 0:
            if not create:
                raise StoreError(f"{self.path} is empty; `foveate bench --out {self.path}` fills it")
        elif pragma("PRAGMA application_id").fetchone()[0] != _APPLICATION:
            raise StoreError(f"{self.path} is a database of another program; give another path")
        _check_schema(self.path, version)
        if version < SCHEMA:
            self._upgrade()

    def _upgrade(self) -> None:
        """Bring the tables of an empty file, or of an older foveate's, to this format; what they hold stays."""
        with self._transaction():
            version = self._db.execute("PRAGMA user_version").fetchone()[0]  # somebody may have been faster
            for step in range(version, SCHEMA):
                for statement in _STEPS[step].split(";"):
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._db.execute(f"PRAGMA user_version = {SCHEMA}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing; others wait."""
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            hint = "another process holds it; try again" if "locked" in str(error) else "give another path"
            raise StoreError(f"{self.path} is not usable as a result file ({error}); {hint}") from error

    def _count(self) -> int:
        return self._db.execute("SELECT count(*) FROM answer").fetchone()[0]


def _check_format(results: Any, source: str) -> None:
    if not isinstance(results, Mapping) or results.get("format") != "foveate results":
        raise StoreError(f"{source} does not hold results; `foveate results export FILE --json PATH` writes some")
    _check_schema(source, results["schema"])


def _check_schema(path: str, version: int) -> None:
    if version > SCHEMA:
        raise StoreError(
            f"{path} was written by a newer foveate (format {version}, this one reads {SCHEMA}); upgrade foveate"
        )


def _patiently(action: Any) -> None:
    """SQLite does not wait by itself where two processes turn the same new file to WAL."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            action()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _json(value: Any) -> str:
    """JSON; what JSON does not know is its ``repr`` without memory addresses."""
    return json.dumps(value, default=lambda x: re.sub(r" at 0x[0-9a-f]+", "", repr(x)))


def _values(answer: Answer) -> list[Any]:
    return [_json(value) if isinstance(value, tuple) else value for value in (getattr(answer, n) for n in _ANSWER)]


def _plain(answer: Answer) -> dict[str, Any]:
    plain = asdict(answer)
    return plain | {name: list(plain[name]) for name in _LISTS if plain[name] is not None}


def _answer(plain: Mapping[str, Any]) -> Answer:
    lists = {name: plain.get(name) for name in _LISTS}  # exports of formats 1 and 2 have no "cached"
    lists = {name: json.loads(x) if isinstance(x, str) else x for name, x in lists.items()}
    return Answer(**{**plain, **{name: None if x is None else tuple(x) for name, x in lists.items()}})


def _decoded(run: sqlite3.Row) -> dict[str, Any]:
    """What a run has in JSON, or as a number that says yes or no."""
    plain = {name: json.loads(run[name]) for name in ("keep", "seed", "parameters", "positions")}
    return plain | {name: bool(run[name]) for name in ("baseline", "adaptive", "guided")}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a result file or a JSON export holds, in the form of :meth:`Store.as_json`.

    Raises:
        StoreError: it is neither.
    """
    if Path(path).suffix.lower() == ".json":
        try:
            results = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError:
            raise StoreError(f"{path} is not readable JSON; export it again") from None
        _check_format(results, str(path))
        return results
    with Store(path, create=False) as store:
        return store.as_json()
