"""What foveate brings for lmms-eval, as far as it can be tested without it; tests/lmms has the rest."""

from __future__ import annotations

import ast
import importlib.util
import json
import pathlib

import pytest
import torch

import foveate
from foveate.cli import main
from foveate.errors import FoveateError, ParameterError, UnknownNameError, UnsupportedModelError
from foveate.eval_suites import suites
from foveate.eval_suites.lmms import arguments, benchmarks, manifests, tasks
from foveate.eval_suites.lmms.bench import _complete, _quoted, answers, bench
from foveate.eval_suites.lmms.watch import Watch
from foveate.eval_suites.results.rows import Answer, Row, summarise
from foveate.eval_suites.results.store import Store
from foveate.eval_suites.running import models
from foveate.eval_suites.running.meter import BudgetMismatch
from foveate.eval_suites.suites import shapes
from foveate.pruners.core import create
from foveate.pruners.core.control import RandomLike

DATA = pathlib.Path(__file__).parents[2] / "data" / "lmms"
HERE = pathlib.Path(manifests.__file__).parent


# ----------------------------------------------------------------------------------------------------- model arguments


def test_method_parameters_are_told_from_the_models() -> None:
    own, rest = arguments.split("fastv", {"keep": "1/9", "k": 3, "pretrained": "x", "device": "cpu"})
    assert (own, rest) == ({"keep": 1 / 9, "k": 3}, {"pretrained": "x", "device": "cpu"})
    assert arguments.method("fastv", own) == create("fastv", keep=1 / 9, k=3)


def test_one_token_is_not_the_whole() -> None:
    assert type(arguments.split("grid", {"keep": 1})[0]["keep"]) is int
    assert type(arguments.split("grid", {"keep": 1.0})[0]["keep"]) is float


def test_lists_become_tuples_and_words_stay_words() -> None:
    own, _ = arguments.split("transprune", {"prune_layers": "[7,9,12]", "direction": "abs"})
    assert own == {"prune_layers": (7, 9, 12), "direction": "abs"}
    assert arguments.method("transprune", own).prune_layers == (7, 9, 12)


def test_composed_methods_and_controls_can_be_named() -> None:
    own, _ = arguments.split("pospad:hiprune", {"keep": 0.25, "alpha": 0.2})
    assert arguments.method("pospad:hiprune", own).inner == create("hiprune", keep=0.25, alpha=0.2)
    own, _ = arguments.split("random@fastv", {"keep": 0.25, "seed": 3})
    assert arguments.method("random@fastv", own) == RandomLike(create("fastv", keep=0.25), seed=3)


@pytest.mark.parametrize("name", [None, "no-image"])
def test_budget_without_a_method_is_refused(name: str | None) -> None:
    with pytest.raises(ParameterError, match="keep is a method's parameter: add pruner=NAME"):
        arguments.split(name, {"keep": 0.25})


def test_parameter_of_another_method_is_refused() -> None:
    with pytest.raises(ParameterError, match="alpha is a method's parameter: fastv has no such"):
        arguments.split("fastv", {"alpha": 0.25})


@pytest.mark.parametrize("given", [None, "0.0.1"])
def test_only_the_installed_version_may_be_named(given: str | None) -> None:
    with pytest.raises(ParameterError, match=f"write foveate_version={foveate.__version__}"):
        arguments.check_version(given)
    arguments.check_version(foveate.__version__)


def test_no_parameter_of_a_method_is_an_argument_of_lmms_evals_models() -> None:
    """They share one list, so a name must belong to one side only."""
    theirs = {"pretrained", "revision", "device", "dtype", "batch_size", "trust_remote_code", "attn_implementation"}
    theirs |= {
        "device_map",
        "chat_template",
        "use_cache",
        "max_frames_num",
        "max_num_frames",
        "min_pixels",
        "max_pixels",
    }
    theirs |= {"total_pixels", "fps", "system_prompt", "interleave_visuals", "enable_thinking", "reasoning_prompt"}
    from foveate.pruners.core.method import PRUNERS

    for name in PRUNERS:
        assert not theirs & arguments.parameters(name), name


def test_announced_classes_exist_and_nothing_heavy_is_imported() -> None:
    tree = ast.parse((HERE / "models.py").read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert {cls for classes in manifests.CLASSES.values() for cls in classes.values()} <= defined
    assert set(manifests.MODELS.values()) == set(manifests.CLASSES)
    imported = [
        node for node in ast.parse((HERE / "manifests.py").read_text()).body if isinstance(node, ast.ImportFrom)
    ]
    assert {node.module for node in imported} == {"__future__", "typing"}


# --------------------------------------------------------------------------------------------------------------- tasks


def test_suites_become_tasks(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    class Loader(yaml.SafeLoader):
        """Knows lmms-eval's functions by name."""

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    assert main(["suites", "export", str(tmp_path / "new"), "--limit", "3"]) == 0
    assert f"--include_path {tmp_path / 'new'}" in capsys.readouterr().out
    for name in suites.SUITES:
        task = "foveate_" + name.replace("-", "_")
        config = yaml.load((tmp_path / "new" / f"{task}.yaml").read_text(), Loader)
        assert config["task"] == task
        data = pathlib.Path(config["dataset_kwargs"]["data_files"]["test"])
        assert data.is_absolute()
        samples = suites.find(name).samples(3, suites.find(name).seed)
        for document, sample in zip(map(json.loads, data.read_text().splitlines()), samples, strict=True):
            (shown,) = tasks.doc_to_visual(document)
            assert tasks.doc_to_text(document) == sample.question
            if name == "clips":
                assert [frame.size for frame in shown] == [(64, 64)] * 16
            else:
                assert shown.tobytes() == sample.image.convert("RGB").tobytes()
            (turn,) = tasks.doc_to_messages(document)
            assert [part["type"] for part in turn["content"]] == ["video" if name == "clips" else "image", "text"]
            assert tasks.process_results(document, [f" {sample.answer}"]) == {"right": 1.0}
            assert tasks.process_results(document, ["nonsense"]) == {"right": 0.0}


def test_task_data_of_another_version_is_refused(tmp_path: pathlib.Path) -> None:
    tasks.export(tmp_path, ["shapes"], 1)
    document = json.loads((tmp_path / "foveate_shapes.jsonl").read_text())
    with pytest.raises(FoveateError, match="foveate suites export"):
        tasks.process_results(document | {"answer": "another"}, ["another"])


def test_list_names_suites_and_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suites", "list"]) == 0
    out = capsys.readouterr().out
    assert "lmms:pope" in out
    assert "shapes-wide" in out


# ---------------------------------------------------------------------------------------------------------- benchmarks


@pytest.mark.parametrize(
    ("name", "sample", "score"),
    [
        ("pope", {"pope_accuracy": {"score": 1.0}}, 1.0),
        ("mme", {"mme_cognition_score": {"score": 0.0}}, 0.0),
        ("gqa", {"exact_match": 1.0}, 1.0),
        ("textvqa", {"exact_match": 0.3}, 0.3),
        ("seedbench", {"seed_all": {"pred": "A", "answer": "B"}}, 0.0),
        ("mlvu", {"mlvu_percetion_score": {"pred_answer": "A", "answer": "A"}}, 1.0),
        ("refcoco", {"refcoco_ACC@0.5": {"bbox": [0, 0, 0.5, 0.5], "pred": [0, 0, 0.5, 0.3]}}, 1.0),
        ("refcoco", {"refcoco_ACC@0.5": {"bbox": [0, 0, 0.5, 0.5], "pred": [0.3, 0, 0.8, 0.5]}}, 0.0),
        ("refcoco", {"refcoco_ACC@0.5": {"bbox": [0, 0, 0.5, 0.5], "pred": [0, 0, 0, 0]}}, 0.0),
        ("screenspot-pro", {"screenspot_pro_action_acc": {"correct": True}}, 1.0),
    ],
)
def test_logged_samples_are_scored(name: str, sample: dict, score: float) -> None:
    assert benchmarks.find(name).read(sample) == score


def test_a_sample_without_a_score_is_refused() -> None:
    with pytest.raises(FoveateError, match="logged no pope_accuracy for pope"):
        benchmarks.find("pope").read({"doc_id": 3})


def test_quoted_numbers_are_those_of_papers() -> None:
    mme = {"mme_perception_score,none": 1500.0, "mme_cognition_score,none": 350.0}
    assert benchmarks.find("mme").quoted(mme) == 1850.0
    assert benchmarks.find("mme-perception").quoted(mme) == 1500.0
    assert benchmarks.find("pope").quoted({"pope_f1_score,none": 0.859}) == pytest.approx(85.9)


def test_a_headline_that_lmms_eval_does_not_give_is_named() -> None:
    with pytest.raises(FoveateError, match=r"of mme hold no mme_cognition_score.*hold mme_perception_score,none"):
        benchmarks.find("mme").quoted({"mme_perception_score,none": 1500.0})


def test_nothing_is_quoted_where_documents_failed_or_the_first_ones_do_not_tell() -> None:
    pope, results = benchmarks.find("pope"), {"pope_f1_score,none": 0.859}
    whole = [Answer(0, "pope-0", "pope", text="yes", score=1.0)]
    failed = [*whole, Answer(1, "pope-1", "pope", error="OSError: gone")]
    assert _quoted(whole, pope, results, None) == pytest.approx(85.9)
    assert _quoted(failed, pope, results, None) is None
    assert _quoted(whole, pope, {}, 1) is None
    with pytest.raises(FoveateError, match="hold no pope_f1_score"):
        _quoted(whole, pope, {}, None)


def test_a_run_without_the_quoted_number_is_not_complete(tmp_path: pathlib.Path) -> None:
    """As in files of format 3; where a document failed there is none."""
    with Store(tmp_path / "r.db") as store:
        number = store.open_bench({"model": "m", "suite": "lmms:pope", "limit": 2}, ("pope",))
        whole, failed = store.open_runs(number, [Row("unpruned", "unpruned"), Row("grid", "grid", 0.5)])
        said = [Answer(n, f"pope-{n}", "pope", text="yes", score=1.0) for n in range(2)]
        store.add(whole, said)
        store.add(failed, [said[0], Answer(1, "pope-1", "pope", error="OSError: gone")])
        assert not _complete(store, whole, 2)
        assert _complete(store, failed, 2)
        store.quote(whole, 100.0)
        assert _complete(store, whole, 2)


def test_unknown_benchmarks_are_named() -> None:
    with pytest.raises(UnknownNameError, match="lmms:popo; did you mean 'pope'"):
        benchmarks.find("popo")


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None, reason="lmms-eval is installed here")
def test_without_lmms_eval_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--suite", "lmms:pope", "--pruners", "grid", "--keep", "0.5"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'foveate[eval]'" in error


# ------------------------------------------------------------------------------------------------ what lmms-eval logged


def logged() -> list[dict]:
    """Samples of a real run: shapes-llava, divprune at a quarter, batch 2."""
    return [json.loads(line) for line in (DATA / "shapes_divprune.jsonl").read_text().splitlines()]


def test_a_real_log_becomes_a_row() -> None:
    """Scores, answers and tokens of lmms-eval 0.7.3's own log stand in the leaderboard as any other row's."""
    samples = logged()
    benchmark = benchmarks.find("foveate_shapes")
    read = answers(samples, benchmark, 4)
    asked = list(shapes.samples(len(samples)))
    assert [answer.number for answer in read] == list(range(len(asked)))
    wanted = [float(shapes.score(sample, answer.text)) for answer, sample in zip(read, asked)]
    assert [answer.score for answer in read] == wanted
    assert read[1].text == asked[1].answer == "yellow"
    row = summarise(Row("divprune", "divprune", 0.25), dict(enumerate(read)), len(read), ("foveate_shapes",), None)
    assert row.tokens_per_layer == [36.0] * 4
    assert row.kept_requested == 36
    assert row.accuracy == sum(wanted) / len(wanted)


def test_answers_out_of_lmms_evals_cache_are_refused() -> None:
    samples = logged()
    samples[1]["token_counts"] = [None]
    with pytest.raises(FoveateError, match="document 1 of foveate_shapes comes without its number of visual tokens"):
        answers(samples, benchmarks.find("foveate_shapes"), 4)


# ----------------------------------------------------------------------------------------------------- what is refused


def test_several_processes_are_told_to_be_several_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval would share the documents out, and the file would hold a part of them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ParameterError, match=r"this is one of 2 that torchrun.*CUDA_VISIBLE_DEVICES=0 foveate bench"):
        bench("shapes-llava", "lmms:pope", "grid", [0.5])


# ------------------------------------------------------------------------------------------------------------ counting


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    return models.load("shapes-llava", "cpu", "float32")


def ask(loaded: models.Loaded, count: int = 2) -> None:
    batch = list(shapes.samples(count))
    texts = [shapes.prompt(sample.question) for sample in batch]
    inputs = loaded.processor(images=[s.image for s in batch], text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        loaded.model.generate(**inputs, max_new_tokens=3, do_sample=False)


def test_every_prompt_is_counted_once_and_decoding_is_not(loaded: models.Loaded) -> None:
    for pruner, tokens, asked in ((None, (144,) * 4, None), (create("fastv", keep=0.25), (144, 144, 36, 36), 36)):
        watch = Watch(loaded.model, pruner, "keep")
        try:
            ask(loaded)
        finally:
            watch.close()
        assert [(seen.tokens, seen.asked) for seen in watch.prompts] == [(tokens, asked)] * 2
    ask(loaded)
    assert len(watch.prompts) == 2, "nothing is counted any more"
    assert not loaded.model._forward_hooks
    assert not loaded.model._forward_pre_hooks


def test_tokens_that_did_not_go_are_noticed(loaded: models.Loaded) -> None:
    watch = Watch(loaded.model, create("grid", keep=1.0), "keep")
    watch.pruner = create("divprune", keep=0.25)
    try:
        with pytest.raises(BudgetMismatch, match="kept 144 of 144 tokens"):
            ask(loaded)
    finally:
        watch.close()


def test_several_pictures_of_a_prompt_are_counted_together(loaded: models.Loaded) -> None:
    first, second, third = shapes.samples(3)
    texts = [f"USER: <image>\n<image>\n{first.question} ASSISTANT:", shapes.prompt(third.question)]
    images = [[first.image, second.image], [third.image]]
    inputs = loaded.processor(images=images, text=texts, padding=True, return_tensors="pt")
    for pruner, factor in ((None, 144), (create("divprune", keep=0.25), 36)):
        watch = Watch(loaded.model, pruner, "keep")
        try:
            with torch.no_grad():
                loaded.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        finally:
            watch.close()
        assert [seen.tokens for seen in watch.prompts] == [(2 * factor,) * 4, (factor,) * 4]


def test_methods_in_front_of_the_processor_are_refused() -> None:
    qwen = models.load("shapes-qwen", "cpu", "float32")
    with pytest.raises(UnsupportedModelError, match="before the processor"):
        Watch(qwen.model, create("downsample", keep=0.25))
