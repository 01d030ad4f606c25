"""How an engine of vLLM behaves with foveate in it, apart from what the methods choose."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from foveate.adapters.vllm_plugin import ARCHITECTURES, TESTED
from tests.vllm.engines import EMBEDDED, ROOT, folder, picture, served, start

HIPRUNE = {"pruner": "hiprune", "keep": 0.3}


def test_vllm_is_of_a_version_that_the_plugin_knows():
    import vllm

    assert ".".join(vllm.__version__.split(".")[:2]) in TESTED


def test_vllm_still_has_what_the_plugin_overrides():
    """Private names: they may change with any minor version."""
    from vllm.config.multimodal import MultiModalConfig
    from vllm.model_executor.models import llava, llava_next, llava_onevision, qwen2_5_vl, qwen2_vl, qwen3_vl
    from vllm.multimodal.processing import BaseMultiModalProcessor, InputProcessingContext
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for name in ("_apply_hf_processor_main", "_get_prompt_updates", "_get_mm_fields_config", "_get_mm_hashes", "apply"):
        assert callable(getattr(BaseMultiModalProcessor, name))
    assert callable(InputProcessingContext.get_merged_mm_kwargs)
    assert callable(GPUModelRunner._gather_mm_embeddings)
    assert callable(MultiModalConfig.is_multimodal_pruning_enabled)
    for module in (llava, llava_next, llava_onevision, qwen2_5_vl, qwen2_vl, qwen3_vl):
        (own,) = (
            name for name in ARCHITECTURES if name in vars(module) and vars(module)[name].__module__ == module.__name__
        )
        assert callable(vars(module)[own].embed_multimodal)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_without_an_entry_vllm_is_bit_equal_to_itself(family, tmp_path, monkeypatch):
    """The plugin's classes without settings against vLLM's own."""
    shown = [picture(family, seed) for seed in range(2)]
    answers = []
    for stock in (False, True):
        if stock:
            from vllm import ModelRegistry

            for architecture in ARCHITECTURES:
                own = {"LlavaForConditionalGeneration": "llava", "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl"}
                if architecture in own:
                    monkeypatch.setitem(ModelRegistry.models, architecture, _stock(own[architecture], architecture))
        # vLLM remembers the class of a folder
        with served(family, tmp_path / str(stock), None) as engine:
            kind = type(engine.llm.llm_engine.model_executor.driver_worker.worker.get_model()).__module__
            assert kind.startswith("vllm." if stock else "foveate.")
            outputs = engine.answer([engine.request([one]) for one in shown] + [engine.request(shown)], tokens=3)
            answers.append(
                [[{t: e.logprob for t, e in step.items()} for step in o.outputs[0].logprobs] for o in outputs]
            )
    assert answers[0] == answers[1]


def _stock(module: str, architecture: str):
    from vllm.model_executor.models.registry import _LazyRegisteredModel

    return _LazyRegisteredModel(f"vllm.model_executor.models.{module}", architecture)


@pytest.mark.parametrize(
    ("family", "keep", "at_once"), [("llava", 0.3, 64), ("qwen2_5_vl", 0.8, 32), ("qwen3_vl", 0.8, 32)]
)
def test_prompts_may_be_prefilled_in_chunks(family, keep, at_once, tmp_path):
    """A chunk ends inside a picture."""
    entry = {"pruner": "hiprune", "keep": keep}
    with served(family, tmp_path, entry, max_num_batched_tokens=at_once, enable_prefix_caching=False) as engine:
        shown = [picture(family, seed, None if family == "llava" else (64, 64)) for seed in (1, 2)]
        (output,) = engine.answer([engine.request(shown)])
        assert output.prompt_token_ids[at_once - 1 : at_once + 1] == [engine.model.config.image_token_id] * 2
        assert engine.compare(output, engine.expected(shown, entry)) < 1e-4


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_precomputed_embeddings_are_refused_and_pass_when_pruning_is_off(family, tmp_path):
    with served(family, tmp_path, HIPRUNE, enable_mm_embeds=True) as engine:
        with torch.no_grad():
            inputs = engine.processor.image_processor(picture(family, 1), return_tensors="pt")
            (embeds,) = engine.model.get_image_features(**inputs).pooler_output
        given = embeds[None]
        if "image_grid_thw" in inputs:
            given = {"image_embeds": embeds, "image_grid_thw": inputs["image_grid_thw"]}
        request = {"prompt": engine.prompt(1), "multi_modal_data": {"image": given}}
        with pytest.raises(ValueError, match="precomputed"):
            engine.answer([request])
        (output,) = engine.answer([{**request, "mm_processor_kwargs": {"foveate": False}}])
        assert engine.compare(output, engine.expected([picture(family, 1)], None)) < 1e-4


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_settings_may_come_with_the_arguments_of_the_engines_processor(family, tmp_path):
    """``--mm-processor-kwargs``: what they say holds for all requests, and a request changes them."""
    with served(family, tmp_path, {}, mm_processor_kwargs={"foveate": HIPRUNE}) as engine:
        shown = picture(family, 4)
        for entry, whole in ((None, HIPRUNE), ({"keep": 0.5}, {**HIPRUNE, "keep": 0.5}), (False, None)):
            (output,) = engine.answer([engine.request([shown], entry)])
            assert engine.compare(output, engine.expected([shown], whole)) < 1e-4


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_two_tensor_parallel_processes_choose_as_one(family, tmp_path, monkeypatch):
    """Attention heads are spread over both: a choice by one's own would be another."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with served(family, tmp_path, **parallel) as engine:
        shown = [picture(family, seed) for seed in (1, 2)]
        for name in ("hiprune", "fopru", "visionzip", "divprune"):
            entry = {"pruner": name, "keep": 0.3, "separators": "drop"}
            outputs = engine.answer([engine.request([one], entry) for one in shown])
            for one, output in zip(shown, outputs):
                assert engine.compare(output, engine.expected([one], entry)) < 1e-4


def test_features_of_other_settings_are_never_taken_from_a_cache(tmp_path):
    """Alternating settings on one picture: each answer is that of its own settings."""
    with served("llava", tmp_path, HIPRUNE) as engine:
        shown = picture("llava", 3)
        for entry in (
            None,
            {"keep": 0.5},
            {"pruner": "fopru", "keep": 0.3},
            None,
            False,
            {"keep": 0.5},
            {"pruner": "random"},
        ):
            (output,) = engine.answer([engine.request([shown], entry)])
            whole = None if entry is False else {**({} if entry and "pruner" in entry else HIPRUNE), **(entry or {})}
            assert engine.compare(output, engine.expected([shown], whole)) < 1e-4


def test_an_engine_with_a_bad_entry_does_not_start(tmp_path):
    home = folder("llava", tmp_path)
    for entry, says in (
        ({"pruner": "nope"}, "unknown method"),
        ({"pruner": "hiprune", "keep": 0}, "keep=0"),
        ({"pruner": "cdpruner"}, "reads the question"),
        ({"pruner": "tome"}, "inside the vision tower"),
    ):
        with pytest.raises(Exception, match=says):
            start(home, entry)


def test_vllms_server_does_not_start_with_an_entry_and_its_front_end_in_rust(tmp_path):
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "VLLM_USE_RUST_FRONTEND": "1",
        "VLLM_RUST_FRONTEND_PATH": sys.executable,  # never started
    }
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder("llava", tmp_path))]
    command += ["--hf-overrides", json.dumps({"foveate": HIPRUNE}), "--dtype", "float32", "--max-model-len", "1024"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert run.returncode != 0
    assert "VLLM_USE_RUST_FRONTEND=1: vLLM's front end in Rust loads no plugin" in run.stderr


def test_a_model_without_pictures_is_refused_where_pruning_was_asked_for(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=76, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "text")
    transformers.AutoTokenizer.from_pretrained(EMBEDDED["llava"]).save_pretrained(tmp_path / "text")
    with pytest.raises(Exception, match="foveate cannot prune LlamaForCausalLM"):
        start(tmp_path / "text", HIPRUNE, limit_mm_per_prompt={})


def test_a_request_for_pruning_is_refused_where_vllm_serves_a_model_of_its_own(tmp_path, monkeypatch):
    """LLaVA stands for a family that the plugin does not know."""
    from vllm import ModelRegistry

    architecture = "LlavaForConditionalGeneration"
    monkeypatch.setitem(ModelRegistry.models, architecture, _stock("llava", architecture))
    monkeypatch.delitem(ARCHITECTURES, architecture)
    with served("llava", tmp_path, None) as engine:
        shown = picture("llava", 5)
        for entry in ({"pruner": "hiprune"}, {"keep": 0.5}, {}):
            with pytest.raises(ValueError, match=f"vLLM serves {architecture} with LlavaMultiModalProcessor"):
                engine.answer([engine.request([shown], entry)])
        for entry in (None, False):
            (output,) = engine.answer([engine.request([shown], entry)])
            assert engine.compare(output, engine.expected([shown], None)) < 1e-4
    with pytest.raises(Exception, match=f"vLLM serves {architecture}"):
        start(engine.home, None, mm_processor_kwargs={"foveate": HIPRUNE})
