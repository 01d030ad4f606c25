"""vLLM with foveate says what transformers says with `foveate.attach`: every family, every servable method."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.errors import InputError
from tests.vllm.engines import ARMED, Served, picture, served

TOLERANCE = 1e-4
METHODS = {
    "random": {"keep": 0.25},
    "grid": {"keep": 0.25},
    "avgpool": {"keep": 0.25},
    "fopru": {"keep": 0.25},
    "hiprune": {"keep": 0.3},
    "divprune": {"keep": 0.2},
    "visionzip": {"keep": 0.25},
    "todre": {"keep": 0.2, "stage2": False},
    "globalcom2": {"keep": 0.25, "redistribute": True},
    "pospad:grid": {"keep": 0.5},
}
WHERE = {
    "globalcom2": ("llava", "llava_next"),  # Qwen has no thumbnail, and shrinks OneVision's canvas of the test picture
    "pospad:grid": ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),  # needs positions with gaps
}
FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request, tmp_path_factory):
    with served(request.param, tmp_path_factory.mktemp("models", numbered=True), max_num_batched_tokens=2048) as it:
        yield it


def settings(engine: Served, name: str) -> dict:
    """The method with separators as vLLM has to treat them."""
    entry = {"pruner": name, **METHODS[name]}
    if engine.family in ("llava_next", "llava_onevision") and name not in ("hiprune", "globalcom2"):
        entry["separators"] = "keep"
    return entry


@pytest.mark.parametrize("name", METHODS)
def test_first_token_is_as_likely_as_in_transformers(engine, name):
    if engine.family not in WHERE.get(name, (engine.family,)):
        pytest.skip(f"{name} is not for {engine.family}")
    entry = settings(engine, name)
    shown = [picture(engine.family, seed) for seed in range(3)]
    together = engine.answer([engine.request([one], entry) for one in shown])
    again = engine.answer([engine.request([one], entry) for one in shown])  # from the prefix cache
    expected = [engine.expected([one], entry) for one in shown]
    for outputs in (together, again):
        for output, reference in zip(outputs, expected):
            assert engine.compare(output, reference) < TOLERANCE


def test_two_pictures_in_a_prompt(engine):
    entry = settings(engine, "hiprune")
    shown = [picture(engine.family, 5), picture(engine.family, 6)]
    (output,) = engine.answer([engine.request(shown, entry)])
    assert engine.compare(output, engine.expected(shown, entry)) < TOLERANCE


def test_requests_of_one_batch_have_their_own_budgets(engine):
    shown = picture(engine.family, 7)
    entries = [{"pruner": "divprune", "keep": k, "separators": "drop"} for k in (2, 5, 1.0)]
    outputs = engine.answer([engine.request([shown], entry) for entry in entries])
    for output, entry in zip(outputs, entries):
        assert engine.compare(output, engine.expected([shown], entry)) < TOLERANCE
    assert len({len(output.prompt_token_ids) for output in outputs}) == 3


def test_a_request_without_pruning_is_unpruned(engine):
    shown = picture(engine.family, 8)
    (output,) = engine.answer([engine.request([shown], False)])
    assert engine.compare(output, engine.expected([shown], None)) < TOLERANCE


def test_text_alone_is_answered(engine):
    (output,) = engine.answer([engine.request([])])
    assert engine.compare(output, engine.expected([], None)) < TOLERANCE


def test_longer_answers_stay_equal(engine):
    """Decoding counts positions on from the whole picture."""
    entry = settings(engine, "fopru")
    shown = [picture(engine.family, 9)]
    (output,) = engine.answer([engine.request(shown, entry)], tokens=6)
    produced = list(output.outputs[0].token_ids)
    params = dict(entry)
    inputs = engine.processor(text=engine.prompt(1), images=shown, return_tensors="pt")
    with torch.no_grad(), foveate.attach(engine.model, params.pop("pruner"), **params):
        made = engine.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert made[0, inputs["input_ids"].shape[1] :].tolist() == produced


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"pruner": "nope"}, "unknown method 'nope'"),
        ({"keep": 0}, "keep=0"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"pruner": "cdpruner"}, "reads the question"),
        ({"pruner": "fastv"}, "inside the decoder"),
        (3, "no settings"),
    ],
)
def test_bad_requests_fail_alone(engine, entry, says):
    shown = picture(engine.family, 1)
    with pytest.raises(ValueError, match=says):
        engine.answer([engine.request([shown], entry)])
    assert engine.answer([engine.request([shown])])[0].outputs


def test_pictures_that_nobody_counted_are_refused_by_the_worker(engine):
    """As from a front end that does not know the plugin."""
    model = engine.llm.llm_engine.model_executor.driver_worker.worker.get_model()
    with pytest.raises(InputError, match="without foveate's count"):
        model.embed_multimodal(pixel_values=torch.zeros(1, 3, 8, 8))


def test_the_engine_was_started_for_all_methods(engine):
    assert engine.llm.llm_engine.model_config.hf_config.foveate == ARMED
