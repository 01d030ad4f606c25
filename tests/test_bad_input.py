"""Statement: bad input is one `FoveateError` that says what, where and what to do, and the model goes on as before.

Every row names a part of foveate, an action and what its message must hold. After each action on a model, that model
answers a good request bit for bit as it did before, and carries no hooks.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import foveate
from foveate import cuda
from foveate.cli import main
from foveate.errors import FoveateError
from foveate.eval_suites.results import store
from foveate.eval_suites.running import models as loading
from foveate.pruners.core import AtEntry, Layout, Pruner, Selection, Stage, Tokens
from tests.models import inputs, picture, tiny

# ------------------------------------------------------------------------------------------------- attaching to a model


class Broken(Pruner):
    """Does something wrong with the tokens it is given."""

    name = "broken"

    def __init__(self, select: Callable[[Tokens], Any]) -> None:
        self.select = select

    def parameters(self) -> dict[str, Any]:
        return {}

    def stages(self, model: Any) -> tuple[Stage, ...]:
        return (AtEntry(self.select),)

    def count(self, layout: Layout, model: Any = None) -> int | None:
        return 2


ATTACH: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"pruner": "hiprun"}, "did you mean 'hiprune'"),
    "method of a wrong type": ({"pruner": 7}, "7"),
    "keep of zero": ({"pruner": "grid", "keep": 0}, "keep=0"),
    "keep of zero as a share": ({"pruner": "grid", "keep": 0.0}, "keep=0.0"),
    "negative keep": ({"pruner": "grid", "keep": -3}, "keep=-3"),
    "keep above one": ({"pruner": "grid", "keep": 1.5}, "keep=1.5"),
    "keep that is no number": ({"pruner": "grid", "keep": float("nan")}, "keep=nan"),
    "infinite keep": ({"pruner": "grid", "keep": float("inf")}, "keep=inf"),
    "keep in words": ({"pruner": "grid", "keep": "half"}, "keep='half'"),
    "keep that is a truth value": ({"pruner": "grid", "keep": True}, "keep=True"),
    "keep of nothing": ({"pruner": "grid", "keep": None}, "keep=None"),
    "unknown parameter": ({"pruner": "hiprune", "kep": 3}, "kep"),
    "budget for a method with a schedule": (
        {"pruner": "tome", "keep": 0.5},
        "a schedule of its own in place of a budget",
    ),
    "layer that the tower lacks": ({"pruner": "hiprune", "object_layer": 99}, "blocks 0 .. 4"),
    "decoder layer too deep": ({"pruner": "fastv", "k": 4}, "1 .. 3"),
    "decoder layer zero": ({"pruner": "fastv", "k": 0}, "k=0"),
    "unknown position policy": ({"pruner": "grid", "positions": "squeeze"}, "positions='squeeze'"),
    "unknown inner method": ({"pruner": "pospad:nothing"}, "nothing"),
    "composition of nothing": ({"pruner": "then:"}, "unknown method ''"),
    "share of neurons above one": ({"pruner": "corematching", "beta": 1.5}, "beta=1.5"),
    "share of neurons of zero": ({"pruner": "corematching", "beta": 0.0}, "beta=0.0"),
    "share of neurons that is none of them": ({"pruner": "corematching", "beta": 1e-9}, "beta=1e-09 of the"),
    "share that is a truth value": ({"pruner": "corematching", "rho": True}, "rho=True"),
    "one layer for several": ({"pruner": "corematching", "neuron_layers": 5}, "neuron_layers=5"),
    "layers in words": ({"pruner": "corematching", "neuron_layers": ("a",)}, "neuron_layers='a'"),
    "half a layer among several": ({"pruner": "corematching", "neuron_layers": (1.5,)}, "neuron_layers=1.5"),
    "a layer twice": ({"pruner": "corematching", "neuron_layers": (1, 1)}, "neuron_layers=(1, 1)"),
    "layer in words": ({"pruner": "corematching", "select_layer": "1"}, "select_layer='1'"),
    "half a layer": ({"pruner": "corematching", "select_layer": 1.5}, "select_layer=1.5"),
    "bound in words": ({"pruner": "corematching", "min_keep": "1"}, "min_keep='1'"),
    "bound of half a token": ({"pruner": "corematching", "max_keep": 2.5}, "max_keep=2.5"),
    "bounds that cross": ({"pruner": "corematching", "min_keep": 5, "max_keep": 2}, "max_keep=2"),
    "weight in words": ({"pruner": "transprune", "alpha": "x"}, "alpha='x'"),
    "share of anchors in words": ({"pruner": "hiprune", "alpha": "x"}, "alpha='x'"),
    "half a layer to prune at": ({"pruner": "transprune", "prune_layers": (1.5, 2, 3)}, "prune_layers=1.5"),
    "half a layer to read": ({"pruner": "transprune", "accumulate_layers": (1.5,)}, "accumulate_layers=1.5"),
    "ratios in words": ({"pruner": "transprune", "ratios": "half"}, "ratios='half'"),
    "half a layer to act in front of": ({"pruner": "fastv", "k": 1.5}, "k=1.5"),
    "a random method's half layer": ({"pruner": "random", "layer": 1.5}, "layer=1.5"),
    "block in words": ({"pruner": "hiprune", "object_layer": "2"}, "object_layer='2'"),
    "half a block": ({"pruner": "fopru", "layer": 1.5}, "layer=1.5"),
    "temperature in words": ({"pruner": "globalcom2", "temperature": "hot"}, "temperature='hot'"),
    "depth that is no sequence": ({"pruner": "todre", "check_depth": 0.5}, "check_depth=0.5"),
    "pivot of half a token": ({"pruner": "todre", "pivot": 1.5}, "pivot=1.5"),
    "half a contextual token": ({"pruner": "visionzip", "dominant": 3, "contextual": 1.5}, "contextual=1.5"),
    "power in words": ({"pruner": "quota", "score_power": "x"}, "score_power='x'"),
    "scores in words": ({"pruner": "quota", "scores": ("x",)}, "scores ('x',)"),
    "dropped share in words": ({"pruner": "focusui", "reduct": "x"}, "reduct='x'"),
    "marker of a wrong type": ({"pruner": "pospad:random", "marker": 5}, "marker=5"),
    "slope in words": ({"pruner": "pitome", "alpha": "x"}, "alpha='x'"),
    "margin in words": ({"pruner": "pitome", "margin": "x"}, "margin='x'"),
    "bend in words": ({"pruner": "tome", "inflection": "x"}, "inflection='x'"),
}


@pytest.fixture(scope="module")
def asked() -> tuple[nn.Module, dict[str, Any]]:
    """A model and a good request."""
    return tiny("llava"), inputs("llava", [[4, picture("llava", 1), 6]])


@torch.inference_mode()
def answer(model: nn.Module, request: dict[str, Any]) -> torch.Tensor:
    with foveate.attach(model, "grid", keep=0.5):
        return model(**request).logits


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def says(error: Exception, holds: str) -> None:
    message = str(error)
    assert isinstance(error, FoveateError), repr(error)
    assert holds in message, message
    assert len(message) > 25, "a message says what, where and what to do"


def after(
    asked: tuple[nn.Module, dict[str, Any]], action: Callable[[nn.Module, dict[str, Any]], Any], holds: str
) -> None:
    """The action fails as it should, and the model is what it was."""
    model, request = asked
    before, bare = answer(model, request), hooks(model)
    with pytest.raises(FoveateError) as caught:
        action(model, request)
    says(caught.value, holds)
    assert hooks(model) == bare
    assert torch.equal(answer(model, request), before)


@pytest.mark.parametrize("row", ATTACH)
def test_attach_refuses(asked, row):
    options, holds = ATTACH[row]
    after(asked, lambda model, request: foveate.attach(model, **options), holds)


def test_attach_refuses_what_is_no_model(asked):
    model, _ = asked
    things = (
        (nn.Linear(2, 2), "Linear"),
        (model.model.language_model, "no vision tower"),
        (object(), "known families"),
        (torch.compile(model), "OptimizedModule wraps LlavaForConditionalGeneration; attach to the model itself"),
        (nn.DataParallel(model), "DataParallel wraps"),
    )
    for thing, holds in things:
        with pytest.raises(FoveateError) as caught:
            foveate.attach(thing, "grid")
        says(caught.value, holds)
    with pytest.raises(FoveateError, match="the model comes first"):
        foveate.attach("grid", model)


# ---------------------------------------------------------------------------------------------------- calling the model


def with_nan(request: dict[str, Any]) -> dict[str, Any]:
    pixels = request["pixel_values"].clone()
    pixels[0, 0, 0, 0] = float("nan")
    return {**request, "pixel_values": pixels}


CALLS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "pixels with NaN": (with_nan, "NaN or infinite"),
    "a mask of four dimensions": (
        lambda request: {**request, "attention_mask": torch.zeros(1, 1, 26, 26)},
        "mask",
    ),
}


@pytest.mark.parametrize("row", CALLS)
def test_a_call_refuses(asked, row):
    spoil, holds = CALLS[row]

    def call(model: nn.Module, request: dict[str, Any]) -> None:
        with foveate.attach(model, "grid", keep=0.5), torch.inference_mode():
            model(**spoil(request))

    after(asked, call, holds)


SELECTIONS: dict[str, tuple[Callable[[Tokens], Any], str]] = {
    "nothing at all": (lambda tokens: None, "return a Selection"),
    "a token that is not there": (lambda tokens: Selection(torch.tensor([[1, 400]])), "400"),
    "a token twice": (lambda tokens: Selection(torch.tensor([[3, 3]])), "ascending"),
    "tokens in disorder": (lambda tokens: Selection(torch.tensor([[5, 2]])), "ascending"),
    "padding where none was announced": (lambda tokens: Selection(torch.tensor([[3, -1]])), "[3, -1]"),
    "a wrong number of pictures": (lambda tokens: Selection(torch.tensor([[1], [2]])), "B = 1"),
    "fractions of tokens": (lambda tokens: Selection(torch.tensor([[0.5]])), "int64"),
}


@pytest.mark.parametrize("row", SELECTIONS)
def test_a_method_of_ones_own_that_goes_wrong_is_named(asked, row):
    select, holds = SELECTIONS[row]

    def call(model: nn.Module, request: dict[str, Any]) -> None:
        with foveate.attach(model, Broken(select)), torch.inference_mode():
            model(**request)

    after(asked, call, holds)


def test_wrong_order_is_refused(asked):
    def twice(model: nn.Module, request: dict[str, Any]) -> None:
        with foveate.attach(model, "grid") as session:
            try:
                foveate.attach(model, "random")
            finally:
                assert session.attached  # the first goes on

    def again(model: nn.Module, request: dict[str, Any]) -> None:
        session = foveate.attach(model, "grid")
        session.detach()
        with session:
            pass

    def ids(model: nn.Module, request: dict[str, Any]) -> None:
        with foveate.attach(model, "random", keep=0.5) as session:
            session.sample_ids = [1, 2, 3]
            model(**request)

    after(asked, twice, "already has 'grid' attached")
    after(asked, again, "was detached")
    after(asked, ids, "sample_ids names 3 images")


# --------------------------------------------------------------------------------------------------------- command line

COMMANDS: dict[str, tuple[list[str], str]] = {
    "unknown command": (["prune"], "prune"),
    "show of an unknown method": (["show", "hiprun"], "hiprune"),
    "bench of an unknown method": (["bench", "--pruners", "divprun"], "divprune"),
    "bench on an unknown suite": (["bench", "--suite", "shape"], "shapes"),
    "bench on a model that is not there": (["bench", "--model", "./no-such-folder"], "no-such-folder"),
    "bench with no budget": (["bench", "--keep", ""], "keep"),
    "bench with half a budget": (["bench", "--keep", "half"], "half"),
    "bench with a budget above all": (["bench", "--keep", "1.5"], "1.5"),
    "bench of no sample": (["bench", "--limit", "0"], "limit"),
    "bench on no such device": (["bench", "--device", "abacus"], "abacus"),
    "bench in no such dtype": (["bench", "--dtype", "float12"], "float12"),
    "vision bench of no picture": (["bench", "--model", "shapes-clip", "--limit", "0"], "limit=0"),
    "vision bench of less than none": (["bench", "--model", "shapes-clip", "--limit", "-1"], "limit=-1"),
    "vision bench without draws": (["bench", "--model", "shapes-clip", "--seeds", "0"], "seeds=0"),
    "vision bench by no seed": (["bench", "--model", "shapes-clip", "--seed", "-1"], "seed=-1"),
    "vision bench in batches of none": (["bench", "--model", "shapes-clip", "--batch-size", "0"], "batch_size=0"),
    "vision bench on no such device": (["bench", "--model", "shapes-clip", "--device", "abacus"], "abacus"),
    "vision bench on a suite": (["bench", "--model", "shapes-clip", "--suite", "nosuchsuite"], "--suite nosuchsuite"),
    "leaderboard of nothing": (["leaderboard", "no-such.db"], "no-such.db"),
    "export of nothing": (["results", "export", "no-such.db", "--csv", "out.csv"], "no-such.db"),
    "demo on an impossible port": (["demo", "--port", "99999"], "99999"),
}


@pytest.mark.parametrize("row", COMMANDS)
def test_the_command_line_refuses(row, tmp_path, monkeypatch, capsys):
    argv, holds = COMMANDS[row]
    monkeypatch.chdir(tmp_path)
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if not line.startswith("usage:")]
    assert code == 2
    assert len(lines) == 1, output.err
    assert holds in lines[0], output.err
    assert "Traceback" not in output.err
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


def test_a_vision_bench_by_several_processes_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["bench", "--model", "shapes-clip"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 processes would all do the same" in line


# --------------------------------------------------------------------------------------------------- files of all sorts


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE recipes (name TEXT)")
    database.close()


FILES: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any], str]] = {
    "results in a text file": (lambda p: p.write_text("hello " * 50), lambda p: store.Store(p), "result file"),
    "results of another program": (foreign, lambda p: store.Store(p), "another program"),
    "results in a folder": (lambda p: p.mkdir(), lambda p: store.Store(p), "cannot be opened"),
    "JSON cut short": (lambda p: p.write_text('{"benches": ['), store.read, "not readable JSON"),
    "JSON of something else": (
        lambda p: p.write_text(json.dumps({"a": 1})),
        lambda p: store.Store(p.with_suffix(".db")).merge(store.read(p), str(p)),
        "does not hold results",
    ),
    "a video that is text": (
        lambda p: p.write_text("no video"),
        lambda p: foveate.read_video(str(p)),
        "no video file",
    ),
    "a model folder without weights": (
        lambda p: (p.mkdir(), (p / "config.json").write_text("{}")),
        lambda p: loading.load(str(p)),
        "missing",
    ),
}


@pytest.mark.parametrize("row", FILES)
def test_files_are_refused(row, tmp_path):
    make, use, holds = FILES[row]
    path = tmp_path / "thing.json"
    make(path)
    with pytest.raises(FoveateError) as caught:
        use(path)
    says(caught.value, holds)


# -------------------------------------------------------------------------------------------------------------- kernels

X = torch.randn(1, 2, 5, 4)
KERNELS: dict[str, tuple[Callable[[], Any], str]] = {
    "more picks than tokens": (lambda: cuda.diverse_subset(torch.randn(1, 5, 4), 6), "k=6"),
    "no pick": (lambda: cuda.diverse_subset(torch.randn(1, 5, 4), 0), "k=0"),
    "an unknown objective": (
        lambda: cuda.diverse_subset(torch.randn(1, 5, 4), 2, objective="best"),
        "objective='best'",
    ),
    "a window of nothing": (lambda: cuda.received_attention(X, X, causal=True, window=0), "window=0"),
    "segments of another length": (
        lambda: cuda.received_attention(X, X, segments=torch.zeros(1, 3, dtype=torch.long)),
        "segments are (1, 3)",
    ),
    "logits under a mask": (lambda: cuda.received_attention(X, X, logits=True, causal=True), "logits=True"),
}


@pytest.mark.parametrize("row", KERNELS)
def test_operations_refuse(row):
    action, holds = KERNELS[row]
    with pytest.raises(FoveateError) as caught:
        action()
    says(caught.value, holds)
