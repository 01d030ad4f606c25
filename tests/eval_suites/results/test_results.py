"""Result files leave as CSV, JSON and Parquet, come together again, and tell where they differ."""

from __future__ import annotations

import csv
import io
import json
import pathlib
import subprocess
import sys

import pytest

from foveate.cli import main
from foveate.eval_suites.results.rows import Row
from foveate.eval_suites.results.store import Store
from tests.eval_suites.results.test_store import FACTS, TASKS, answer, rows


def fill(path: pathlib.Path, wrong: tuple[int, ...] = (), **facts: str) -> pathlib.Path:
    with Store(path) as store:
        first, second = store.open_runs(store.open_bench(FACTS | facts, TASKS), rows())
        store.add(first, [answer(n, asked=None) for n in range(3)])
        store.add(second, [answer(n, text="no", score=0.0) if n in wrong else answer(n) for n in range(3)])
    return path


@pytest.fixture
def filled(tmp_path: pathlib.Path) -> pathlib.Path:
    return fill(tmp_path / "a.db", wrong=(1,))


def run(*argv: object) -> int:
    return main(["results", *map(str, argv)])


def printed_csv(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_csv_has_a_line_per_row_with_what_is_needed_to_repeat_it(filled, capsys):
    assert run("export", filled, "--csv", "-") == 0
    unpruned, fastv = printed_csv(capsys)
    assert (unpruned["method"], unpruned["keep"], unpruned["accuracy"]) == ("unpruned", "", "1.0")
    assert (fastv["label"], fastv["keep"], fastv["n"], fastv["correct"]) == ("fastv(k=2)", "0.25", "3", "2")
    assert (fastv["accuracy_a"], fastv["accuracy_b"]) == ("1.0", "0.0")
    assert json.loads(fastv["parameters"]) == {"k": 2}
    assert (fastv["torch"], fastv["weights_sha256"]) == (FACTS["torch"], FACTS["weights_sha256"])


def test_differences_from_random_are_numbers(tmp_path, capsys):
    with Store(tmp_path / "r.db") as store:
        drawn = [Row("random", "random", 0.5, 0), Row("fastv", "fastv", 0.5)]
        for run_, right in zip(store.open_runs(store.open_bench(FACTS, TASKS), drawn), ((0,), (0, 1, 2))):
            store.add(run_, [answer(n, score=float(n in right)) for n in range(3)])
    assert run("export", tmp_path / "r.db", "--csv", "-") == 0
    random, fastv = printed_csv(capsys)
    assert float(fastv["versus_random"]) == pytest.approx(2 / 3)
    assert 0 <= float(fastv["versus_random_low"]) <= float(fastv["versus_random_high"]) <= 1
    assert float(fastv["versus_random_p"]) > 0.05
    assert random["versus_random"] == ""


def test_samples_have_a_line_each(filled, tmp_path):
    assert run("export", filled, "--csv", tmp_path / "s.csv", "--samples") == 0
    lines = list(csv.DictReader((tmp_path / "s.csv").open(encoding="utf-8")))
    assert [(line["label"], line["number"], line["text"]) for line in lines][3:] == [
        ("fastv(k=2)", "0", "yes"), ("fastv(k=2)", "1", "no"), ("fastv(k=2)", "2", "yes"),
    ]  # fmt: skip
    assert lines[4]["tokens"] == "[9, 4]"


def test_parquet_is_the_same_table(filled, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run("export", filled, "--parquet", tmp_path / "t.parquet") == 0
    read = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert [(line["label"], line["keep"], line["accuracy"]) for line in read] == [
        ("unpruned", None, 1.0), ("fastv(k=2)", "0.25", 2 / 3),
    ]  # fmt: skip


def test_parquet_says_what_it_needs(filled, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run("export", filled, "--parquet", tmp_path / "t.parquet") == 2
    assert "pip install pyarrow" in capsys.readouterr().err


def test_json_goes_round(filled, tmp_path, capsys):
    assert run("export", filled, "--json", tmp_path / "a.json") == 0
    assert run("import", tmp_path / "b.db", tmp_path / "a.json", filled) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'a.json'}: 6 new answers", f"{filled}: 0 new answers",
    ]  # fmt: skip
    assert run("diff", filled, tmp_path / "b.db") == 0
    assert run("diff", tmp_path / "a.json", tmp_path / "b.db") == 0


def test_import_brings_shares_of_one_bench_together(tmp_path):
    for name, numbers in (("x", (0, 2)), ("y", (1,))):
        with Store(tmp_path / f"{name}.db") as store:
            (number,) = store.open_runs(store.open_bench(FACTS, TASKS), rows()[:1])
            store.add(number, [answer(n, asked=None) for n in numbers])
    assert run("import", tmp_path / "all.db", tmp_path / "x.db", tmp_path / "y.db") == 0
    with Store(tmp_path / "all.db") as store:
        assert store.boards()[0].rows[0].n == 3


def test_import_of_other_settings_writes_nothing(filled, tmp_path, capsys):
    other = fill(tmp_path / "b.db", torch="9")
    assert run("import", filled, other) == 2
    assert "torch (<torch> there, 9 now)" in capsys.readouterr().err


def test_diff_says_what_differs(filled, tmp_path, capsys):
    other = fill(tmp_path / "b.db", wrong=(1, 2), torch="9")
    with Store(other) as store:
        store.open_runs(1, [Row("grid", "grid", 0.5)])
        store.open_bench(FACTS | {"model": "n"}, TASKS)
    assert run("diff", filled, other) == 1
    assert capsys.readouterr().out.splitlines() == [
        "m on s: torch (<torch> in A, 9 in B)",
        "m on s: fastv(k=2) keep 0.25: 1 of 3 answers differ (first s2), accuracy 66.7 -> 33.3 %",
        "m on s: grid keep 0.5: only in B",
        "n on s: only in B",
    ]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["export", "nothing.db", "--csv", "-"],
            "no result file nothing.db; `foveate bench --out nothing.db` makes one",
        ),
        (["export", "nothing.json", "--csv", "-"], "nothing.json"),
        (
            ["export", "a.db"],
            "one of the arguments --csv --json --parquet is required; see `foveate results export --help`",
        ),
        (["diff", "a.db", "./a.db"], "are the same file"),
        (["merge", "a.db"], "invalid choice: 'merge'"),
        (["import", "a.db", "empty.json"], "empty.json does not hold results"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(filled, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(filled.parent)
    (filled.parent / "empty.json").write_text("{}", encoding="utf-8")
    try:
        code = run(*argv)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_reading_results_loads_no_torch(filled):
    code = (
        f"import sys, foveate.cli; foveate.cli.main(['results', 'export', {str(filled)!r}, '--csv', '-']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[3]).returncode == 0
