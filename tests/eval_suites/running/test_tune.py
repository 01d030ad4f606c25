"""`foveate tune` searches, promises, checks and writes what attach and the bench read."""

from __future__ import annotations

import functools
import json
import pathlib
from dataclasses import replace
from typing import Any

import pytest
import yaml

import foveate
from foveate.cli import main
from foveate.errors import BudgetError, FoveateError, ParameterError, UnknownNameError, UnsupportedModelError
from foveate.eval_suites import suites
from foveate.eval_suites.results.rows import Answer, Timing
from foveate.eval_suites.running import models, runner, tune
from foveate.eval_suites.running.meter import Meter, MethodRun
from foveate.eval_suites.suites.questions import load, normalised
from foveate.pruners import Grid
from foveate.pruners.core.preset import Preset


@pytest.fixture(scope="module")
def loaded(checkpoint: pathlib.Path) -> models.Loaded:
    return models.load(checkpoint, device="cpu")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Answers by rule: the unpruned model is right on 9 of 10, a method on as many of these as ``keeps`` says."""
    facts: dict[str, Any] = {"keeps": lambda run, meter: 1.0, "asked": [], "seconds": lambda run: 0.5}

    def measure(self: Meter, run: MethodRun, firsts: Any) -> Any:
        facts["asked"].append((run.label, run.keep, self.positions, [sample.id for sample in self.samples]))
        share = 1.0 if run.pruner is None else facts["keeps"](run, self)
        for first in firsts:
            answers = []
            for n in self.numbers(first):
                right = n % 10 != 9 and (n * 7919 % 1000) / 1000 < share
                tokens = 16 if run.pruner is None else run.keep * 16
                answers.append(Answer(n, str(n), "t", "x", float(right), (tokens,), None, 7, 0.1))
            self.unpruned_counts.update(dict.fromkeys(self.numbers(first), 16))
            yield answers, {}

    def timed(meter: Meter, run: MethodRun, batch: int) -> Timing:
        return Timing(batch, 3, facts["seconds"](run), 0.01, unpruned_prefill=1.0, unpruned_decode=0.01)

    monkeypatch.setattr(Meter, "measure", measure)
    monkeypatch.setattr(tune, "measure", timed)
    return facts


def found(loaded: models.Loaded, **more: Any) -> tune.Tuned:
    options: dict[str, Any] = {"pruners": "grid,divprune", "keep": [0.25, 0.75, 0.5], "limit": 800, "progress": False}
    return tune.tune(loaded, cheap(), 0.9, **(options | more))


@functools.cache
def cheap() -> suites.Suite:
    """The embedded suite with few pictures, each many times: nobody looks at them."""
    suite = suites.find("shapes")
    drawn = list(suite.samples(4, 0))
    return replace(suite, samples=lambda limit, seed: (replace(drawn[i % 4], id=str(i)) for i in range(limit)))


def test_the_fastest_setting_that_holds_is_found_checked_and_told(loaded, world):
    world["keeps"] = lambda run, meter: 1.0 if run.keep >= (0.5 if run.label == "grid" else 0.25) else 0.3
    world["seconds"] = lambda run: run.keep
    result = found(loaded)
    chosen = result.chosen
    assert (chosen.label, chosen.keep, chosen.positions) == ("divprune", 0.25, "keep")
    assert chosen.speedup == pytest.approx(1.0 / 0.25, rel=0.1)
    assert chosen.bound >= 0.9
    assert not any("at no budget" in note for note in result.notes())
    assert result.checked == 1.0
    assert result.level == pytest.approx(0.05 / 4)  # two methods, two policies
    tested = [(s.label, s.keep, s.certified) for s in result.measured if s.positions == "keep"]
    assert tested[:3] == [("grid", 0.75, True), ("grid", 0.5, True), ("grid", 0.25, False)]  # gentle first
    assert "divprune keep 0.25, positions keep" in result.verdict("p.yaml")[0]


def test_the_other_half_is_asked_only_about_the_chosen_setting(loaded, world):
    found(loaded)
    calibrating, checking = world["asked"][0][3], world["asked"][-1][3]
    assert not set(calibrating) & set(checking)
    assert len(calibrating) == len(checking) == 400
    assert [label for label, *_, ids in world["asked"] if ids == checking] == ["unpruned", "grid"]


def test_nothing_holds_and_it_is_said(loaded, world, tmp_path, capsys):
    world["keeps"] = lambda run, meter: 0.5
    result = found(loaded)
    assert result.chosen is None
    assert result.verdict("p.yaml")[0].startswith("Nothing holds at least 90 %")
    assert len(result.measured) == 4  # every chain ended with its gentlest setting
    assert (
        "shown to hold at no budget: grid (keep), grid (compact), divprune (keep), divprune (compact)" in result.notes()
    )
    result.print("p.yaml")
    assert "Nothing holds" in capsys.readouterr().out


def test_too_few_questions_are_said_to_be_too_few(loaded, world):
    said = " ".join(found(loaded, limit=40).verdict("p.yaml"))
    assert "20 calibrating questions could not show it even of a method that changes no answer" in said


def test_a_target_that_breaks_on_the_other_half_is_told(loaded, world):
    first: list[Any] = []

    def keeps(run: MethodRun, meter: Meter) -> float:
        first.append(meter.samples[0].id) if not first else None
        return 1.0 if meter.samples[0].id == first[0] else 0.5

    world["keeps"] = keeps
    assert "BELOW the target" in " ".join(found(loaded, pruners="grid", keep=0.5).verdict("p.yaml"))


def test_a_slower_winner_is_told(loaded, world):
    world["seconds"] = lambda run: 2.0
    assert "Nothing that holds the target is noticeably faster" in " ".join(found(loaded).verdict("p.yaml"))


def test_fewest_tokens_win_where_time_does_not_count(loaded, world, monkeypatch):
    monkeypatch.setattr(tune, "measure", lambda *args, **more: pytest.fail("timed"))
    assert found(loaded, by="tokens").chosen.keep == 0.25


def test_methods_that_do_not_work_here_are_named(loaded, world, monkeypatch):
    real = Meter.measure

    def refuses(self: Meter, run: MethodRun, firsts: Any) -> Any:
        if run.label == "divprune":
            raise UnsupportedModelError("no such tower")
        return real(self, run, firsts)

    monkeypatch.setattr(Meter, "measure", refuses)
    result = found(loaded)
    assert result.chosen.label == "grid"
    assert "not searched: divprune: no such tower" in result.notes()


@pytest.mark.parametrize(
    ("more", "said"),
    [({"confidence": 1.0}, "confidence=1.0"), ({"positions": ["sideways"]}, "sideways"),
     ({"positions": []}, "positions is empty"), ({"keep": []}, "keep is empty"), ({"by": "luck"}, "luck"),
     ({"limit": 3}, "halved")],
)  # fmt: skip
def test_bad_input_is_refused(loaded, more, said):
    with pytest.raises(ParameterError, match=said):
        found(loaded, **more)


def test_a_target_must_be_a_share(loaded):
    with pytest.raises(ParameterError, match="target=98"):
        tune.tune(loaded, "shapes", 98)


def test_a_model_that_knows_nothing_has_nothing_to_keep(loaded, world, monkeypatch):
    monkeypatch.setattr(tune, "_scores", lambda answers: [0.0] * len(answers))
    with pytest.raises(FoveateError, match="answers none of"):
        found(loaded)


def test_command_line_writes_a_preset_that_attach_and_bench_read(checkpoint, world, tmp_path, capsys, monkeypatch):
    world["keeps"] = lambda run, meter: 1.0 if run.keep >= 0.5 else 0.1
    out = tmp_path / "mine.yaml"
    argv = ["tune", "--model", str(checkpoint), "--pruners", "fastv(k=1)", "--keep", "0.5,0.25", "--target", "0.9"]
    assert (
        main([*argv, "--limit", "240", "--out", str(out), "--json", str(tmp_path / "all.json"), "--device", "cpu"]) == 0
    )
    assert "fastv(k=1)" in capsys.readouterr().out
    written = yaml.safe_load(out.read_text())
    assert (written["method"], written["parameters"]["keep"], written["parameters"]["k"]) == ("fastv", 0.5, 1)
    assert written["tuned"]["target"] == 0.9
    assert json.loads((tmp_path / "all.json").read_text())["chosen"]["keep"] == 0.5
    monkeypatch.undo()
    loaded = models.load(checkpoint, device="cpu")
    with foveate.attach(loaded.model, str(out)) as session:
        assert session.pruner == foveate.FastV(keep=0.5, k=1)
        assert session.positions == written["positions"]
    with foveate.attach(loaded.model, out, keep=0.25, positions="compact") as session:
        assert (session.pruner.keep, session.positions) == (0.25, "compact")
    board = runner.bench(loaded, "shapes", str(out), 0.25, 3, seeds=1, timing=False, progress=False)
    assert board.rows[-1].label == "fastv(k=1)"
    assert board.rows[-1].keep == 0.5


def test_command_line_says_by_its_exit_code_that_nothing_holds(checkpoint, world, tmp_path, capsys):
    world["keeps"] = lambda run, meter: 0.1
    out = tmp_path / "mine.yaml"
    argv = [
        "tune",
        "--model",
        str(checkpoint),
        "--pruners",
        "grid",
        "--limit",
        "400",
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    assert main(argv) == 1
    assert not out.exists()
    assert main([*argv[:-4], "--out", "preset.txt"]) == 2
    assert "ends in .yaml" in capsys.readouterr().err


def test_the_trained_model_is_tuned_for_real(tmp_path, capsys):
    """Nothing is made up here: divprune keeps what this model knows, smaller pictures do not, and the preset runs."""
    out = tmp_path / "p.yaml"
    argv = ["tune", "--pruners", "divprune,downsample", "--keep", "0.5,0.25", "--positions", "keep", "--target", "0.8"]
    argv += [
        "--limit",
        "120",
        "--by",
        "tokens",
        "--device",
        "cpu",
        "--out",
        str(out),
        "--json",
        str(tmp_path / "all.json"),
    ]
    assert main(argv) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "divprune keep 0.25, positions keep: at least 80 % of the unpruned accuracy, with 95 % confidence." in said
    assert "the target is held." in said
    chains = json.loads((tmp_path / "all.json").read_text())["chains"]
    certified = {(s["label"], s["keep"]): s["certified"] for chain in chains for s in chain["settings"]}
    assert certified == {
        ("divprune", 0.5): True,
        ("divprune", 0.25): True,
        ("downsample", 0.5): False,
        ("downsample", 0.25): False,
    }
    loaded = models.load("shapes-llava", device="cpu")
    suite = suites.find("shapes")
    (sample,) = suite.samples(1, suite.seed)
    inputs = loaded.processor(images=sample.image, text=suite.prompt(sample.question), return_tensors="pt")
    with foveate.attach(loaded.model, out) as session:
        loaded.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert session.trace.images[0].tokens_per_layer == [36] * 4


def test_output_that_cannot_be_written_is_refused_before_the_search(checkpoint, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tune, "tune", lambda *args, **more: pytest.fail("searched"))
    for more in (["--out", str(tmp_path / "missing" / "p.yaml")], ["--json", str(tmp_path / "missing" / "all.json")]):
        assert main(["tune", "--model", str(checkpoint), "--out", str(tmp_path / "p.yaml"), *more]) == 2
        assert "cannot be written" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- presets


def test_presets_of_composed_methods_come_back(tmp_path):
    for method in (foveate.PosPad(inner=Grid(keep=0.3)), foveate.FastV(keep=5), foveate.ToDRE()):
        Preset(method, "compact").write(tmp_path / "p.yaml")
        assert Preset.read(tmp_path / "p.yaml") == Preset(method, "compact")


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("method: nothing", UnknownNameError, "unknown method 'nothing'"),
        ("method: fastv\nparameters: {keeps: 1}", UnknownNameError, "no parameter 'keeps'"),
        ("method: fastv\nparameters: {keep: 7.5}", BudgetError, "7.5"),
        ("parameters: {keep: 0.5}", ParameterError, "names no method"),
        ("- fastv", ParameterError, "names no method"),
        ("method: fastv\nkeep: 0.5", ParameterError, "unknown keys keep"),
        ("method: fastv\nparameters: [1]", ParameterError, "maps names to values"),
        ("method: other.yaml", ParameterError, "a method's name"),
        ("method: [", ParameterError, "no plain YAML"),
        ("method: !!python/object/apply:os.system ['touch broken']", ParameterError, "no plain YAML"),
    ],
)
def test_what_is_no_preset_is_refused(text, error, said, tmp_path):
    (tmp_path / "p.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(error, match=said):
        Preset.read(tmp_path / "p.yaml")
    with pytest.raises(ParameterError, match="cannot be read"):
        Preset.read(tmp_path / "none.yaml")


# ------------------------------------------------------------------------------------------------------ own questions


def questions(folder: pathlib.Path, count: int = 12) -> pathlib.Path:
    """Questions of the embedded suite as a user would have them."""
    lines = []
    for n, sample in enumerate(suites.find("shapes").samples(count, 3)):
        sample.image.save(folder / f"{n}.png")
        lines.append(
            json.dumps({"image": f"{n}.png", "question": sample.question, "answer": [sample.answer, "no idea"]})
        )
    (folder / "own.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return folder / "own.jsonl"


def test_own_questions_are_a_suite(tmp_path):
    suite = suites.find(str(questions(tmp_path)))
    first, again = list(suite.samples(5, 1)), list(suite.samples(5, 1))
    assert first == again
    assert len({sample.id for sample in suite.samples(100, 0)}) == 12
    assert first[0].image.mode == "RGB"
    assert suite.score(first[0], f" {first[0].answer.upper()}. ")
    assert suite.score(first[0], "No idea")
    assert not suite.score(first[0], "something else")


def test_answers_are_compared_without_form_but_numbers_stay():
    assert normalised("The Red, ball!") == normalised("red ball")
    assert normalised("3.5") != normalised("35")
    assert normalised("a") == "a"


def test_own_questions_are_tuned_on(loaded, tmp_path):
    path = questions(tmp_path)
    suite = suites.find(str(path))
    board = runner.bench(loaded, str(path), "grid", 0.5, 12, seeds=1, timing=False, progress=False)
    assert board.rows[0].n == 12
    if board.rows[0].accuracy == 0:  # a random model
        with pytest.raises(FoveateError, match="answers none of"):
            tune.tune(loaded, suite, 0.9, pruners="grid", limit=12, progress=False)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: no JSON"),
        ("[]", "no JSON object"),
        ('{"image": "x.png", "question": "?"}', "needs `image`"),
        ('{"image": "x.png", "question": "?", "answer": "y"}', "no picture"),
        ("", "is empty"),
    ],
)
def test_bad_questions_are_refused_by_line(line, said, tmp_path):
    (tmp_path / "own.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(ParameterError, match=said):
        load(tmp_path / "own.jsonl")
    with pytest.raises(ParameterError, match="cannot be read"):
        load(tmp_path / "none.jsonl")
