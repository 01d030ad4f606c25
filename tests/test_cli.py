"""The command line shows what is registered, hands `bench` to its runner, and answers bad input with one clear line."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

import foveate
from foveate import registry_view as view
from foveate.cli import main
from foveate.errors import MissingSignalError, ParameterError
from foveate.pruners import PRUNERS
from foveate.pruners.core import (
    AtEntry,
    BeforeLayer,
    ClassAttention,
    ModelInfo,
    Pruner,
    ReceivedAttention,
    Stage,
    register,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    """Two registered methods: one that needs a class token, one that is built around another method."""

    @register("toy-class")
    @dataclass(frozen=True)
    class ToyClass(Pruner):
        """Keeps what the class token looks at.

        Args:
            keep: tokens kept per image, as a fraction
                or a number.
            layer (int): encoder block that is read.

        Headline: it is a toy.
        """

        keep: int | float = 1 / 9
        layer: int = 22
        names: tuple[str, ...] = ()

        title = "A toy"
        paper = "arXiv 0000.00000 [not real]"
        cost = "one product per token"
        families = ("llava", "toys")

        def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
            if not model.class_token:
                raise MissingSignalError(f"{model.tower} has no class token")
            reads = {"seen": ClassAttention(self.layer), "received": ReceivedAttention(8, queries="patches")}
            first = AtEntry(select=lambda tokens: tokens, signals=reads, positions="keep")
            return first, BeforeLayer(select=lambda tokens: tokens, layer=2)

    @register("toy-around")
    @dataclass(frozen=True)
    class ToyAround(Pruner):
        """Wraps."""

        inner: Pruner

        title = "A wrapper"

    yield
    del PRUNERS["toy-class"], PRUNERS["toy-around"]


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that bad input gets, after checking the exit code."""
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert not out
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


# ------------------------------------------------------------------------------------------------------- list and show


def test_list_has_a_line_for_every_method(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert {line.split()[0] for line in out.splitlines() if line.strip()} >= set(PRUNERS)


def test_list_as_json_is_complete(capsys):
    assert main(["list", "--json"]) == 0
    assert [card["name"] for card in json.loads(capsys.readouterr().out)] == sorted(PRUNERS)


def test_list_as_markdown_is_a_table(capsys):
    assert main(["list", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(PRUNERS)
    assert "| `toy-class` | A toy | arXiv 0000.00000 [not real] | `llm_input`, `llm_layer` |" in lines


def test_readme_lists_the_methods_there_are():
    """Fill the table from `foveate list --markdown`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("<!-- methods -->")[2].partition("<!-- /methods -->")[0]
    promised = set(re.findall(r"^\| \[`([\w-]+)`\]\(docs/methods/\1\.md\) \|", table, re.MULTILINE))
    assert promised == {name for name, cls in PRUNERS.items() if cls.__module__.startswith("foveate.pruners")}


@pytest.mark.parametrize("name", ["toy-class", "Toy-Class"])
def test_show_tells_everything(name, capsys):
    assert main(["show", name]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for said in (
        "A toy",
        "arXiv 0000.00000 [not real]",
        "Keeps what the class token looks at.",
        "Headline: it is a toy.",
        "1/9",
        "encoder block that is read.",
        "llm_input [positions: keep] reads seen: ClassAttention(layer=22) reads received: "
        "ReceivedAttention(layer=8, queries='patches')",
        "llm_layer 2",
        "not on this model: Qwen2_5_VisionTransformerPretrainedModel has no class token",
        "families: llava, toys",
        "cost: one product per token",
    ):
        assert said in out


def test_show_of_a_wrapper_says_what_it_depends_on():
    card = view.card("toy-around")
    assert set(card.stages.values()) == {"depends on inner"}
    assert card.parameters[0].default is None
    assert card.hooks == ()


@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_every_method_can_be_shown_in_full(name, capsys):
    assert main(["show", name]) == 0
    card = view.card(name)
    assert card.title
    assert card.paper or card.doc
    assert [p.name for p in card.parameters if not p.doc] == []


def test_docstring_section_is_split_off():
    doc = (
        "What.\n\nAttributes:\n    a: first\n        goes on\n    b (int): second\n\n        with a gap\n"
        "    c, d: both\n\nAfter."
    )
    entries = {"a": "first goes on", "b": "second with a gap", "c": "both", "d": "both"}
    assert view.split_doc(doc) == ("What.\n\nAfter.", entries)
    assert view.split_doc("Only text: here.") == ("Only text: here.", {})


@pytest.mark.parametrize(
    ("value", "text"), [(1 / 9, "1/9"), (0.25, "0.25"), (0.123456789012, "0.123457"), (3, "3"), ("a", "'a'")]
)
def test_values_read_well(value, text):
    assert view.value_text(value) == text


# --------------------------------------------------------------------------------------------------------------- bench


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for the suite runner, which has the two functions that the command line calls."""
    module = types.ModuleType("foveate.eval_suites.running.runner")

    def run(args):
        if args.output:
            with open(args.output, "w") as file:
                file.write("results")
        if args.keep > 1:
            raise ParameterError(f"--keep {args.keep} is no fraction")
        return args.code

    module.add_arguments = lambda parser: [
        parser.add_argument("--keep", type=float, default=1.0),
        parser.add_argument("--code", type=int, default=0),
        parser.add_argument("--output"),
    ]
    module.main = run
    import foveate.eval_suites

    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(foveate.eval_suites, "runner", module, raising=False)
    return module


@pytest.mark.parametrize("code", [0, 1])
def test_bench_is_the_runners(runner, code):
    assert main(["bench", "--keep", "0.5", "--code", str(code)]) == code


def test_errors_of_a_run_are_one_line(runner, capsys, tmp_path):
    assert fails(["bench", "--keep", "7"], capsys) == "foveate: error: --keep 7.0 is no fraction"
    assert "invalid float value: 'many'" in fails(["bench", "--keep", "many"], capsys)
    (tmp_path / "file").touch()
    output = str(tmp_path / "file" / "results.json")  # below a file, so that it fails for root too
    assert output in fails(["bench", "--output", output], capsys)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_unknown_method_suggests_the_nearest(capsys):
    assert "unknown method 'toy-clas'; did you mean 'toy-class'?" in fails(["show", "toy-clas"], capsys)


@pytest.mark.parametrize("argv", [[], ["shwo"], ["show"], ["list", "--color", "pink"], ["show", "toy-class", "extra"]])
def test_unknown_commands_and_options(argv, capsys):
    assert fails(argv, capsys).startswith("foveate")


# ------------------------------------------------------------------------------------------------------- ways to start


def python(*argv: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds this checkout, installed or not."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *argv], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("module", ["foveate", "foveate.cli"])
def test_runs_as_a_module(module):
    assert python("-m", module, "--version").stdout == f"foveate {foveate.__version__}\n"
    wrong = python("-m", module, "show", "no-such-method")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("foveate: error: unknown method 'no-such-method'")
    assert len(wrong.stderr.splitlines()) == 1


def test_help_loads_no_torch():
    code = (
        "import sys, foveate.cli\n"
        "try: foveate.cli.main(['--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert python("-c", code).returncode == 0


def test_bench_is_imported_only_when_asked_for():
    code = (
        "import sys, foveate.cli; foveate.cli.main(['list']); "
        "sys.exit(any(name.startswith('foveate.eval_suites') for name in sys.modules))"
    )
    assert python("-c", code).returncode == 0


def test_a_closed_pipe_is_no_error():
    """`foveate list | head -0`"""
    code = (
        "import os, sys, foveate.cli\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "sys.exit(foveate.cli.main(['list', '--json']))"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_runs_of_stages_are_one_line() -> None:
    """Statement: MLPs that read the same of themselves fold into a range; a gap in the layers starts another line."""
    hooks = [stage.hook for stage in view.card("corematching").stages[next(iter(view.EXAMPLES))]]
    assert hooks == ["llm_layer 2", "llm_mlp 0 .. 31"]
    gap = view._folded(
        foveate.CoreMatching(neuron_layers=(0, 1, 3), select_layer=None).stages(next(iter(view.EXAMPLES.values())))
    )
    assert [(stage.hook, stage.signals) for stage in gap] == [
        ("llm_mlp 0 .. 1", ("core: CoreNeurons(layer=…)",)),
        ("llm_mlp 3", ("core: CoreNeurons(layer=3)",)),
    ]


@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_show_says_where_the_final_ratio_is_not_that_of_the_cache(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Statement: methods that act before decoder layers, and no others, are said to keep more than their last ratio."""
    assert main(["show", name]) == 0
    said = "is not the final ratio" in " ".join(capsys.readouterr().out.split())
    assert said == ("llm_layer" in view.card(name).hooks)
