"""The bench measures what it claims: rows, budgets, loyalty, and one clear line for bad input."""

from __future__ import annotations

import json
import pathlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import foveate
from foveate.adapters.engine.prefill import Prefill
from foveate.adapters.session import Session
from foveate.adapters.trace import ImageTrace, StageTrace
from foveate.cli import main
from foveate.errors import BudgetError, FoveateError, MissingSignalError, ParameterError, UnknownNameError
from foveate.eval_suites import suites
from foveate.eval_suites.results.leaderboard import Leaderboard
from foveate.eval_suites.results.rows import Row, Status
from foveate.eval_suites.running import models
from foveate.eval_suites.running.meter import GREY, BudgetMismatch, Meter, check_image
from foveate.eval_suites.running.runner import BASELINES, bench, parse_keep, parse_methods
from foveate.pruners import (
    PRUNERS,
    AtEntry,
    BeforeLayer,
    Downsample,
    FastV,
    Layout,
    ModelInfo,
    Pruner,
    Random,
    Selection,
    Stage,
)
from foveate.pruners.core import keep_all
from foveate.pruners.core.method import content_decides
from tests.eval_suites.conftest import qwen_processor
from tests.models import tiny

TOKENS, LAYERS = 16, 4
LIMIT = 7  # no multiple of the batch size


@pytest.fixture(scope="module")
def loaded(checkpoint: pathlib.Path) -> models.Loaded:
    return models.load(checkpoint, device="cpu")


def quick(loaded: models.Loaded, pruners: Any = (), keep: Any = 0.25, **more: Any) -> Leaderboard:
    options: dict[str, Any] = {"limit": LIMIT, "seeds": 2, "batch_size": 3, "progress": False, "timing": False}
    return bench(loaded, "shapes", pruners, keep, **(options | more))


@pytest.fixture(scope="module")
def board(loaded: models.Loaded) -> Leaderboard:
    return quick(loaded, "all", (0.25, 5), seeds=3)


def rows(board: Leaderboard, method: str, keep: float | None = 0.25) -> list[Row]:
    return [row for row in board.rows if row.method == method and row.keep == keep]


def one(board: Leaderboard, method: str, keep: float | None = 0.25) -> Row:
    (row,) = rows(board, method, keep)
    return row


# ---------------------------------------------------------------------------------------------------------------- rows


def has_budget(method: str) -> bool:
    return hasattr(PRUNERS[method], PRUNERS[method].budget_parameter)


def registered(row: Row) -> str:
    """A row's method as the registry knows it: PosPad's name also tells whose tokens it pads."""
    return row.method.partition(":")[0]


def test_rows_come_in_a_fixed_order_with_all_baselines(board):
    others = sorted(set(PRUNERS) - set(BASELINES))
    per_budget = ["random", "random", "random", *BASELINES[1:], *filter(has_budget, others)]
    once = [m for m in others if not has_budget(m) or getattr(PRUNERS[m], PRUNERS[m].budget_parameter) is None]
    assert [registered(row) for row in board.rows] == ["unpruned", "no-image", *per_budget, *per_budget, *once]
    budgets = [None, None, *[0.25] * len(per_budget), *[5] * len(per_budget), *[None] * len(once)]
    assert [row.keep for row in board.rows] == budgets
    assert [row.seed for row in rows(board, "random")] == [0, 1, 2]
    assert {row.status for row in board.rows} == {Status.OK}


def test_baselines_run_beside_any_choice_of_methods(loaded):
    board = quick(loaded, "fopru", (0.5, 0.25))
    assert {row.method for row in board.rows} == {"unpruned", "no-image", *BASELINES, "fopru"}
    assert len(rows(board, "random", 0.5)) == len(rows(board, "random", 0.25)) == 2


@pytest.mark.parametrize("name", ["corematching(select_layer=None)", "random@corematching(select_layer=None)"])
def test_a_method_that_keeps_all_tokens_is_not_swept(loaded, name):
    """Statement: parameters that leave a method without a budget leave it one row beside the budgets, which runs."""
    found = [row for row in quick(loaded, name, (0.5, 0.25)).rows if "corematching" in row.method]
    assert {row.keep for row in found} == {None}
    assert {row.status for row in found} == {Status.OK}
    assert {tuple(row.tokens_per_layer) for row in found} == {(TOKENS,) * len(found[0].tokens_per_layer)}


def test_the_cache_is_what_is_left_in_it(loaded):
    """Statement: evicted tokens do not count in the cache of a row, although its early layers saw them."""
    names = ["corematching(neuron_layers=())", "corematching(neuron_layers=(),kv_evict=False)"]
    board = quick(loaded, ",".join(names), 0.5)
    found = {row.parameters["kv_evict"]: row for row in rows(board, "corematching", 0.5)}
    evicted, ragged = found[True], found[False]
    assert evicted.tokens_per_layer == ragged.tokens_per_layer == [TOKENS, TOKENS, *[TOKENS // 2] * 2]
    unpruned = one(board, "unpruned", None).cache_bytes
    assert evicted.cache_bytes < ragged.cache_bytes < unpruned
    assert unpruned - evicted.cache_bytes == pytest.approx(2 * (unpruned - ragged.cache_bytes))


def test_every_row_tells_all_there_is_to_tell(board):
    for row in board.rows:
        assert row.n == LIMIT == len(row.answers)
        assert row.accuracy == row.correct / LIMIT
        assert row.interval[0] <= row.accuracy <= row.interval[1]
        assert set(row.tasks) == set(board.tasks)
        assert row.seconds_per_sample > 0
        if row.method not in ("unpruned", "no-image"):
            assert row.parameters.get(PRUNERS[registered(row)].budget_parameter) == row.keep
            assert row.positions
            assert row.kept_requested <= {0.25: 4, 5: 5, None: TOKENS}[row.keep]


def test_accuracy_by_task_adds_up(board, loaded):
    suite = suites.find("shapes")
    samples = list(suite.samples(LIMIT, suite.seed))
    sizes = {task: sum(sample.task == task for sample in samples) for task in suite.tasks}
    for row in board.rows:
        assert sum(row.tasks[task] * sizes[task] for task in suite.tasks) == pytest.approx(row.correct)


@pytest.mark.parametrize(
    ("method", "seen"),
    [
        ("unpruned", [16, 16, 16, 16]),
        ("no-image", [16, 16, 16, 16]),
        ("random", [4, 4, 4, 4]),
        ("downsample", [4, 4, 4, 4]),
        ("fastv", [16, 16, 4, 4]),
    ],
)
def test_tokens_are_those_that_each_layer_saw(board, method, seen):
    for row in rows(board, method, None if method in ("unpruned", "no-image") else 0.25):
        assert row.tokens_per_layer == seen
        assert (row.tokens_mean, row.tokens_last) == (sum(seen) / LAYERS, seen[-1])


def test_content_dependent_methods_are_marked(board):
    marked = {row.method for row in board.rows if row.adaptive}
    assert "todre" in marked
    methods = [row for row in board.rows if registered(row) in PRUNERS]
    assert marked == {row.method for row in methods if content_decides(PRUNERS[registered(row)]())}


def test_loyalty_is_agreement_with_the_unpruned_answers(board):
    reference = one(board, "unpruned", None)
    assert reference.loyalty == 1.0
    for row in board.rows:
        assert row.loyalty == sum(a == b for a, b in zip(row.answers, reference.answers)) / LIMIT
    assert len({row.loyalty for row in board.rows}) > 2  # a random model that always says the same would prove nothing


def test_accuracy_is_relative_to_the_unpruned_model(loaded):
    suite = replace(suites.find("shapes"), score=lambda sample, answer: int(sample.id.split("-")[1]) < 8)
    board = bench(loaded, suite, [], 0.25, limit=10, batch_size=5, seeds=1, progress=False, timing=False)
    assert {(row.correct, row.accuracy, row.relative_accuracy) for row in board.rows} == {(8, 0.8, 1.0)}


def test_wrong_answers_everywhere_leave_the_relative_accuracy_open(loaded):
    suite = replace(suites.find("shapes"), score=lambda sample, answer: False)
    board = bench(loaded, suite, [], 0.25, limit=5, batch_size=5, seeds=1, progress=False, timing=False)
    assert {row.relative_accuracy for row in board.rows} == {None}


def test_positions_are_those_that_were_asked_for(loaded):
    for policy in ("keep", "compact"):
        board = quick(loaded, "divprune", positions=policy, limit=2)
        assert {tuple(row.positions.items()) for row in board.rows[2:]} == {(("llm_input", policy),)}
        assert board.environment["positions"] == policy


def test_answers_do_not_depend_on_the_batches(board, loaded):
    alone = quick(loaded, "fastv,divprune", 0.25, batch_size=1, seeds=3)
    for row in alone.rows:
        (same,) = [r for r in rows(board, row.method, row.keep) if r.seed == row.seed]
        assert row.answers == same.answers


def test_no_image_shows_every_sample_the_same_grey(loaded, monkeypatch):
    shown = []
    ask = type(loaded.processor).__call__

    def watch(self, images=None, **more):
        shown.append([image.convert("RGB").getcolors() for image in images])
        return ask(self, images=images, **more)

    monkeypatch.setattr(type(loaded.processor), "__call__", watch)
    quick(loaded)
    blind = [batch for batch in shown if batch[0] == [(96 * 96, GREY)]]
    assert len(blind) == 1 + 3  # three batches, and the first once more to warm up
    assert all(colours == [(96 * 96, GREY)] for batch in blind for colours in batch)


def ours(model: torch.nn.Module) -> int:
    """Number of foveate's hooks; transformers leaves some of its own."""
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return sum(hook.__module__.startswith("foveate") for hook in hooks)


def test_model_is_left_as_it_was(checkpoint):
    fresh = models.load(checkpoint, device="cpu")
    before = {name: value.clone() for name, value in fresh.model.state_dict().items()}
    quick(fresh, "fastv", limit=2)
    assert all(torch.equal(value, before[name]) for name, value in fresh.model.state_dict().items())
    assert ours(fresh.model) == 0
    with foveate.attach(fresh.model, "fastv"):
        assert ours(fresh.model) > 0


# ------------------------------------------------------------------------------------------------- methods and budgets


def test_instances_run_once_as_they_are_and_names_may_carry_parameters(loaded):
    board = quick(loaded, [FastV(keep=0.5, k=1), "fastv(k=3)", "divprune(keep=7)", Random], limit=2, seeds=1)
    labels = [(row.label, row.keep, row.tokens_per_layer) for row in board.rows[2 + len(BASELINES) :]]
    assert labels == [
        ("fastv(k=3)", 0.25, [16, 16, 16, 4]),
        ("fastv(k=1)", 0.5, [16, 8, 8, 8]),
        ("divprune", 7, [7, 7, 7, 7]),
    ]


def test_compositions_are_measured_too(loaded):
    both = foveate.Then(foveate.DivPrune(keep=0.5), FastV(keep=0.5))
    row = quick(loaded, both, limit=2).rows[-1]
    assert (row.status, row.keep, row.tokens_per_layer) == (Status.OK, None, [8, 8, 4, 4])


def test_more_tokens_than_there_are_is_said_once(loaded):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        board = quick(loaded, "fastv", 100, limit=2)
    assert sum("keep=100 exceeds" in str(w.message) for w in caught) == 1
    assert {row.tokens_last for row in board.rows} == {TOKENS}


def test_budgets_are_read_as_fractions_or_numbers_of_tokens():
    assert parse_keep("0.5, 64,1e-1,1,1.0,1/9") == [0.5, 64, 0.1, 1, 1.0, 1 / 9]
    assert [type(k) for k in parse_keep("1,1.0")] == [int, float]


def test_methods_are_read_with_their_parameters():
    assert parse_methods("all,fastv(k=3, keep=0.5), todre(check_depth=(0.5, 0.75))") == [
        ("all", {}),
        ("fastv", {"k": 3, "keep": 0.5}),
        ("todre", {"check_depth": (0.5, 0.75)}),
    ]


# ----------------------------------------------------------------------------------------------- what cannot be claimed


@dataclass(frozen=True)
class Toy(Pruner):
    """Keeps the first tokens as ``work`` says and announces a budget as ``announce`` says."""

    keep: float = 0.25
    work: Callable[[Any], Selection] = lambda tokens: _first(tokens, 4)
    announce: int = 4
    layer: int = 0

    name = "toy"

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        return ((BeforeLayer if self.layer else AtEntry)(self.work, layer=self.layer),)

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        return self.announce


@dataclass(frozen=True)
class Deciding(Toy):
    """Lets the content decide, up to its budget."""

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        return None


def _first(tokens: Any, k: int) -> Selection:
    return Selection(torch.arange(k).expand(len(tokens.embeds), -1))


def _twice(tokens: Any) -> Selection:
    return Selection(torch.tensor([0, 1, 1, 2]).expand(len(tokens.embeds), -1))


def _missing(tokens: Any) -> Selection:
    raise MissingSignalError("the tower has no third eye")


def _broken(tokens: Any) -> Selection:
    raise ZeroDivisionError("oops")


LIARS = {
    "prunes nothing": (Toy(work=keep_all), "kept 16 of 16 tokens at decoder layer 0 where its budget is 4"),
    "keeps more": (Toy(work=lambda tokens: _first(tokens, 5)), "kept 5 of 16 tokens"),
    "keeps less": (Toy(work=lambda tokens: _first(tokens, 3)), "kept 3 of 16 tokens"),
    "announces more": (Toy(work=lambda tokens: _first(tokens, 9), announce=9), "keep=0.25 of 16 allows 4"),
    "counts twice": (Toy(work=_twice), "give unique, ascending token numbers"),
    "decides for more": (Deciding(work=lambda tokens: _first(tokens, 5)), "more than its budget of 4"),
    "late and nothing": (Toy(work=keep_all, layer=2), "tokens at decoder layer 2 where its budget is 4"),
}


@pytest.mark.parametrize("liar", LIARS)
def test_a_lying_method_fails_and_the_others_go_on(loaded, liar):
    pruner, reason = LIARS[liar]
    board = quick(loaded, [pruner, FastV(keep=0.5)], limit=3)
    *others, lie, last = board.rows
    assert lie.status is Status.FAILED
    assert reason in lie.reason
    assert lie.accuracy is lie.loyalty is lie.tokens_per_layer is None
    assert {row.status for row in (*others, last)} == {Status.OK}
    assert board.failures == [lie]


def test_an_honest_method_passes(loaded):
    assert not quick(loaded, [Toy(), Toy(layer=3)], limit=3).failures


def test_a_trace_that_differs_from_the_decoder_fails(loaded, monkeypatch):
    """Tokens are counted where the decoder works: the trace's own word is not enough."""
    count = Prefill._count

    def flattered(self, layer, *more):
        count(self, layer, *more)
        for item in self.items:
            item.trace.tokens_per_layer[layer:] = [n // 2 for n in item.trace.tokens_per_layer[layer:]]

    monkeypatch.setattr(Prefill, "_count", flattered)
    board = quick(loaded, limit=3)
    assert all("the decoder's layers saw" in row.reason for row in board.rows[2:])


def test_a_method_that_never_worked_fails(loaded, monkeypatch):
    monkeypatch.setattr(Session, "begin", lambda self, *args: None)
    assert all("did not see the pictures' " in row.reason for row in quick(loaded, limit=3).rows[2:])


def image_trace(layout: Layout, kept: list[int], seen: list[int]) -> ImageTrace:
    return ImageTrace(0, "image", layout, [StageTrace("llm_input", 0, torch.tensor(kept))], seen)


def test_layers_in_front_of_a_stage_must_see_everything():
    layout, pruner = Layout.grid(4, 4), Toy(layer=2)
    stages = pruner.stages(ModelInfo())
    late = ImageTrace(0, "image", layout, [StageTrace("llm_layer", 2, torch.arange(4))], [16, 16, 4, 4])
    check_image(pruner, stages, late, ModelInfo())
    with pytest.raises(BudgetMismatch, match="at decoder layer 0 where its budget is 16"):
        check_image(pruner, stages, image_trace(layout, [0, 1, 2, 3], [4, 4, 4, 4]), ModelInfo())


def test_adaptive_methods_may_keep_any_number_but_not_twice_the_same():
    layout, pruner = Layout.grid(4, 4), Deciding()
    check_image(pruner, pruner.stages(ModelInfo()), image_trace(layout, [0, 7], [2, 2]), ModelInfo())
    with pytest.raises(BudgetMismatch, match="twice"):
        check_image(pruner, pruner.stages(ModelInfo()), image_trace(layout, [7, 7], [2, 2]), ModelInfo())


def test_what_the_model_lacks_is_no_failure_and_a_crash_is_one(loaded):
    board = quick(loaded, [Toy(work=_missing), Toy(work=_broken, layer=1)], limit=3)
    lacking, crashed = board.rows[-2:]
    assert (lacking.status, lacking.reason) == (Status.NOT_APPLICABLE, "the tower has no third eye")
    assert (crashed.status, crashed.reason) == (Status.FAILED, "ZeroDivisionError: oops")
    assert board.failures == [crashed]


def test_pictures_are_shrunk_in_the_model_or_in_front_of_it_but_not_twice(loaded, monkeypatch):
    monkeypatch.setattr(Downsample, "prepare", lambda self, image: pytest.fail("shrunk a second time"))
    assert one(quick(loaded, limit=3), "downsample").tokens_last == 4


def test_a_processor_that_undoes_the_shrinking_fails_the_row(loaded):
    prepared = []

    @dataclass(frozen=True)
    class Outside(Toy):
        def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
            return ()

        def prepare(self, image: Image.Image) -> Image.Image:
            prepared.append(image.size)
            return image.resize((8, 8))

    row = quick(loaded, Outside(), limit=3).rows[-1]
    assert prepared == [(96, 96)] * 3
    assert row.status is Status.FAILED
    assert "resized to 4 tokens, but the processor made 16" in row.reason


def test_families_of_any_resolution_get_smaller_pictures_by_a_fraction_only():
    board = quick(models.Loaded(tiny("qwen2_vl"), qwen_processor(), "qwen"), (), (0.25, 7), limit=2)
    row = one(board, "downsample")
    assert (row.adaptive, row.kept_requested, row.tokens_last) == (True, 9, 9)  # of 36
    assert one(board, "downsample", 7).status is Status.NOT_APPLICABLE
    assert not board.failures


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def toy() -> Iterator[Callable[[Pruner], None]]:
    """Register a configured toy as the method ``toy``."""

    def add(pruner: Toy) -> None:
        PRUNERS["toy"] = dataclass(frozen=True)(
            type("Registered", (Toy,), {"__annotations__": {"work": Any}, "work": staticmethod(pruner.work)})
        )

    yield add
    PRUNERS.pop("toy", None)


def command(checkpoint: pathlib.Path, *more: str) -> int:
    fixed = ["--keep", "0.25", "--limit", "3", "--seeds", "2", "--pruners", "fastv", "--device", "cpu"]
    return main(["bench", "--model", str(checkpoint), *fixed, *more])


def test_command_writes_json_markdown_and_a_table(checkpoint, tmp_path, capsys):
    json_path, markdown_path = tmp_path / "rows.json", tmp_path / "table.md"
    assert command(checkpoint, "--json", str(json_path), "--markdown", str(markdown_path)) == 0
    out = capsys.readouterr().out
    assert "random ×2" in out
    assert max(map(len, out.splitlines())) <= 120
    read = json.loads(json_path.read_text(encoding="utf-8"))
    assert [r["method"] for r in read["rows"]] == [
        "unpruned", "no-image", "random", "random", "grid", "avgpool", "downsample", "fastv",
    ]  # fmt: skip
    fastv = read["rows"][-1]
    assert fastv["tokens_per_layer"] == [16, 16, 4, 4]
    assert fastv["parameters"] == {"keep": 0.25, "k": 2}
    assert fastv["kept_requested"] == 4
    assert fastv["positions"] == {"llm_layer": "keep"}
    assert fastv["status"] == "ok"
    assert len(fastv["interval"]) == 2
    environment = read["environment"]
    assert environment["foveate"] == foveate.__version__
    assert environment["torch"] == torch.__version__
    assert (environment["dtype"], environment["device"], environment["batch_size"]) == ("float32", "cpu", 32)
    assert (environment["suite"], environment["limit"], environment["positions"]) == ("shapes", 3, "auto")
    assert environment["suite_seed"] == suites.find("shapes").seed
    assert len(environment["weights_sha256"]) == 64
    assert "| fastv† |" in markdown_path.read_text(encoding="utf-8")


def test_markdown_can_be_printed_instead_of_the_table(checkpoint, capsys):
    assert command(checkpoint, "--markdown", "-") == 0
    assert capsys.readouterr().out.startswith("| method |")


@pytest.mark.parametrize(("work", "code", "said"), [(keep_all, 1, "FAILED: toy"), (_missing, 0, "n/a: toy")])
def test_exit_code_tells_failures_from_what_a_model_cannot_do(checkpoint, toy, capsys, work, code, said):
    toy(Toy(work=work))
    assert command(checkpoint, "--pruners", "toy") == code
    assert said in capsys.readouterr().out


def test_what_a_method_cannot_do_on_this_model_is_refused_before_the_run(checkpoint, capsys):
    assert command(checkpoint, "--pruners", "fastv(k=99)") == 2
    out, err = capsys.readouterr()
    assert not out
    assert "fastv(k=99) on LlavaForConditionalGeneration: k=99: the decoder has 4 layers" in err
    assert len(err.splitlines()) == 1


def test_warnings_are_one_line_without_code(checkpoint, capsys):
    assert command(checkpoint, "--keep", "100") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "foveate: warning: keep=100 exceeds the 16 visual tokens of an image; all are kept"


def test_an_interrupt_is_one_line(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Meter, "_answer", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command(checkpoint, "--out", str(tmp_path / "r.db")) == 130
    out, err = capsys.readouterr()
    assert not out
    assert err == f"foveate: stopped; what is done is in {tmp_path / 'r.db'}; the same command goes on\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--suite", "shape"], "unknown suite 'shape'; did you mean 'shapes'?"),
        (["--pruners", "fastvv"], "unknown method 'fastvv'; did you mean 'fastv'?"),
        (["--pruners", "fopru(strateg='row')"], "fopru has no parameter 'strateg'; did you mean 'strategy'?"),
        (["--pruners", "fastv(k=0)"], "k=0 is not a layer that follows one"),
        (["--pruners", "fastv(k='two')"], "give an int >= 1"),
        (["--keep", "1/0"], "keep='1/0' is not a number"),
        (["--pruners", "fastv(2)"], "method 'fastv(2)' cannot be read"),
        (["--keep", "0"], "keep=0 tokens leaves no visual token"),
        (["--keep", "0.0"], "keep=0.0 is not a fraction in (0, 1]"),
        (["--keep=-0.5"], "keep=-0.5 is not a fraction"),
        (["--keep=-3"], "keep=-3 tokens leaves no visual token"),
        (["--keep", "0.5,1.5"], "keep=1.5 is not a fraction"),
        (["--keep", "nan"], "keep=nan is not a fraction"),
        (["--keep", "half"], "keep='half' is not a number"),
        (["--keep", ","], "keep is empty"),
        (["--limit", "0"], "limit=0"),
        (["--limit=-4"], "limit=-4"),
        (["--seeds", "0"], "seeds=0"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--seed=-1"], "seed=-1"),
        (["--device", "abacus"], "device='abacus' cannot be used here"),
        (["--model", "shapes-lava"], "did you mean 'shapes-llava'?"),
        (["--model", "./nowhere"], "no model './nowhere'"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(checkpoint, monkeypatch, capsys, argv, said):
    monkeypatch.setattr(models, "_from_pretrained", lambda *args: pytest.fail("the model was loaded"))
    assert command(checkpoint, *argv) == 2
    out, err = capsys.readouterr()
    assert not out
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("option", ["--out", "--html", "--json", "--markdown"])
def test_output_that_cannot_be_written_is_refused_before_the_run(checkpoint, tmp_path, monkeypatch, capsys, option):
    monkeypatch.setattr(models, "_from_pretrained", lambda *args: pytest.fail("the model was loaded"))
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "rows", tmp_path / "missing" / "rows", tmp_path):
        assert command(checkpoint, option, str(path)) == 2
        assert f"{option} {path} cannot be written" in capsys.readouterr().err


def test_looking_whether_a_file_can_be_written_changes_nothing(checkpoint, tmp_path):
    (tmp_path / "old").write_text("results of last week", encoding="utf-8")
    assert command(checkpoint, "--json", str(tmp_path / "old"), "--limit", "0") == 2
    assert command(checkpoint, "--json", str(tmp_path / "new"), "--limit", "0") == 2
    assert (tmp_path / "old").read_text(encoding="utf-8") == "results of last week"
    assert not (tmp_path / "new").exists()


def test_bench_refuses_what_the_command_refuses(loaded):
    with pytest.raises(BudgetError, match=r"keep=2\.0 is not a fraction"):
        bench(loaded, keep=2.0)
    with pytest.raises(UnknownNameError, match="unknown suite"):
        bench(loaded, "no-suite")
    with pytest.raises(ParameterError, match="positions='sideways'"):
        bench(loaded, positions="sideways")
    with pytest.raises(ParameterError, match="is not a method"):
        bench(loaded, pruners=[3])


# --------------------------------------------------------------------------------------------------------- checkpoints


def cut(path: pathlib.Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def drop_tensor(folder: pathlib.Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if "q_proj" in name)]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lose_shard(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


DAMAGES: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], "config.json is missing"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "half a config": (lambda f: cut(f / "config.json", 0.5), "config.json is cut short or damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "the weights are missing"),
    "most of the weights": (lambda f: cut(f / "model.safetensors", 0.9), "file not fully covered"),
    "start of the weights": (lambda f: cut(f / "model.safetensors", 0.01), "cut short or is not a safetensors file"),
    "no byte of the weights": (lambda f: cut(f / "model.safetensors", 0), "cut short or is not a safetensors file"),
    "a tensor missing": (drop_tensor, "its weights lack 1 tensors"),
    "a shard missing": (lose_shard, "model-00001-of-00002.safetensors is missing"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "the tokenizer is missing"),
    "no processor": (lambda f: [p.unlink() for p in f.glob("*processor*")], "the processor's configuration is missing"),
    "half a tokenizer": (lambda f: cut(f / "tokenizer.json", 0.5), "cannot be loaded"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_one_clear_line(checkpoint, tmp_path, capsys, damage):
    folder = tmp_path / "broken-llava"
    shutil.copytree(checkpoint, folder)
    harm, said = DAMAGES[damage]
    harm(folder)
    assert command(folder) == 2
    out, err = capsys.readouterr()
    assert not out
    (line,) = err.splitlines()
    assert str(folder) in line
    assert said in line
    assert "again" in line or "check" in line


def test_intact_checkpoint_loads_in_evaluation_mode_with_left_padding(checkpoint):
    models.check_folder(checkpoint)
    loaded = models.load(checkpoint, device="cpu", dtype="bfloat16")
    assert (loaded.model.training, loaded.model.dtype) == (False, torch.bfloat16)
    assert loaded.processor.tokenizer.padding_side == "left"


def test_a_model_that_no_adapter_knows_is_refused(loaded):
    stranger = models.Loaded(torch.nn.Linear(1, 1), loaded.processor, "linear")
    with pytest.raises(FoveateError, match="no adapter for Linear"):
        quick(stranger)


def test_a_missing_embedded_model_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(models.suites, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FoveateError, match="install foveate again, or train it"):
        models.load("shapes-llava")
