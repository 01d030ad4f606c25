"""Served models beside the same models in transformers: what each says to the same prompt.

Tests that import this are skipped where vLLM is not installed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import foveate
from foveate.eval_suites import tiny
from foveate.eval_suites.speed.serving import as_hub
from tests import models
from tests.models import EOS, IMAGE, PAD, PATCH, PINPOINTS, SIDE, VIDEO

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
pytest.importorskip(
    "vllm", reason="vLLM is not in this environment: `make test-vllm` runs these tests in one of its own"
)

ROOT = pathlib.Path(__file__).parents[2]
EMBEDDED = {
    "llava": ROOT / "eval_suites/suites/shapes/shapes-llava",
    "llava_next": ROOT / "eval_suites/suites/shapes/shapes-next",
}
"""Not shapes-qwen: its tower was trained with another rotary base than the one that vLLM has built in."""
SIZES = {"llava": (96, 96), "llava_next": (150, 90), "llava_onevision": (60, 40)}
ARMED = {"pruner": "todre", "stage2": False}
"""A method that reads the deepest block of the tower: an engine that starts with it can serve all others on request."""


def folder(family: str, into: pathlib.Path) -> pathlib.Path:
    """A model of ``family`` as vLLM loads it, with its processor, inside the folder ``into``."""
    home = into / family
    if home.exists():
        return home
    if family in EMBEDDED:
        return as_hub(EMBEDDED[family], home)
    with tempfile.TemporaryDirectory() as place:
        _random(family).save_pretrained(place)
        _processor(family).save_pretrained(place)
        return as_hub(pathlib.Path(place), home)


def _random(family: str) -> Any:
    """The tiny model of the other tests, with attention heads of a size that vLLM's processor backend knows."""
    config = tiny.configuration(family)
    text = config.text_config
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim = 64, 2, 2, 32
    if family.startswith("qwen"):
        text.rope_parameters["mrope_section"] = [4, 6, 6]
    vision = config.vision_config
    if family == "qwen2_vl":
        vision.hidden_size = 64
    if family in ("qwen2_5_vl", "qwen3_vl"):
        vision.out_hidden_size = 64
    if family == "llava_onevision":
        config.vision_aspect_ratio = "anyres_max_9"  # vLLM knows no other
    torch.manual_seed(0)
    model = getattr(transformers, tiny.CLASSES[family])(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.mul_(3.0)  # attention is not flat, and rounding does not grow beyond the tolerance
    return model


def _processor(family: str) -> Any:
    if family.startswith("qwen"):
        return models.qwen_processor(family)
    special = {"<pad>": PAD, "<bos>": 1, "<unk>": 2, "<image>": IMAGE, "<video>": VIDEO, "<eos>": EOS}
    fast = models.character_tokenizer(special)
    view = {"height": SIDE, "width": SIDE}
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=view, image_grid_pinpoints=PINPOINTS),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=view),
        tokenizer=fast,
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template="{% for m in messages %}{% for p in m['content'] %}"
        "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endfor %}",
        vision_aspect_ratio="anyres_max_9",
    )


def picture(family: str, seed: int, size: tuple[int, int] | None = None) -> Image.Image:
    width, height = size or SIZES.get(family, (64, 48))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@dataclass
class Served:
    """One engine and the model that it serves."""

    family: str
    home: pathlib.Path
    llm: Any
    processor: Any
    model: Any

    def prompt(self, pictures: int, text: str = "what is here") -> str:
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def request(
        self, pictures: Sequence[Image.Image], settings: Any = None, text: str = "what is here"
    ) -> dict[str, Any]:
        """``settings``: the request's own foveate entry; None: the engine's holds."""
        asked = {
            "prompt": self.prompt(len(pictures), text),
            "multi_modal_data": {"image": list(pictures)} if pictures else {},
        }
        return asked if settings is None else {**asked, "mm_processor_kwargs": {"foveate": settings}}

    def answer(self, requests: Sequence[dict[str, Any]], tokens: int = 1) -> list[Any]:
        from vllm import SamplingParams

        how = SamplingParams(max_tokens=tokens, temperature=0, logprobs=20, ignore_eos=True)
        return self.llm.generate(list(requests), how, use_tqdm=False)

    def expected(
        self, pictures: Sequence[Image.Image], settings: Mapping[str, Any] | None, text: str = "what is here"
    ) -> tuple[torch.Tensor, int]:
        """Log-probabilities of the first token by transformers with ``foveate.attach``, and the prompt's length."""
        inputs = self.processor(
            text=self.prompt(len(pictures), text), images=list(pictures) or None, return_tensors="pt"
        )
        if self.family == "llava_onevision":  # vLLM treats several pictures as it does one
            inputs["batch_num_images"] = torch.ones(len(pictures), dtype=torch.long)
        length = inputs["input_ids"].shape[1]
        params = dict(settings or {})
        attached: Any = contextlib.nullcontext()
        if settings is not None:
            attached = foveate.attach(self.model, params.pop("pruner"), **params)
        with torch.no_grad(), attached as session:
            if session is not None:
                session.sample_ids = [0] * len(pictures)
            logits = self.model(**inputs).logits[0, -1]
            if session is not None:
                length -= sum(image.layout.length - image.tokens_per_layer[0] for image in session.trace.images)
        return logits.log_softmax(-1), length

    def compare(self, output: Any, expected: tuple[torch.Tensor, int]) -> float:
        """Largest difference of the log-probabilities of the likeliest tokens; the lengths must be equal."""
        reference, length = expected
        assert len(output.prompt_token_ids) == length
        given = output.outputs[0].logprobs[0]
        assert len(given) >= 20
        return max(abs(entry.logprob - float(reference[token])) for token, entry in given.items())


def start(home: pathlib.Path, entry: Any, **options: Any) -> Any:
    """An engine in float32, in this process unless ``options`` say otherwise."""
    from vllm import LLM

    options = {
        "max_num_seqs": 4,
        "block_size": 32,
        "limit_mm_per_prompt": {"image": 2, "video": 0},
        "distributed_executor_backend": "uni",
        **options,
    }
    if "llava" in home.name and home.name != "llava_onevision":
        options["limit_mm_per_prompt"] = {"image": 2}
    return LLM(
        model=str(home),
        dtype="float32",
        max_model_len=1024 if home.name in EMBEDDED else 512,
        enforce_eager=True,
        hf_overrides={} if entry is None else {"foveate": entry},
        **options,
    )


@contextlib.contextmanager
def served(family: str, into: pathlib.Path, entry: Any = ARMED, **options: Any) -> Iterator[Served]:
    """An engine for ``family``, gone afterwards."""
    from vllm.distributed import cleanup_dist_env_and_memory

    home = folder(family, into)
    model = transformers.AutoModelForImageTextToText.from_pretrained(home, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # answers go on, as with vLLM's ignore_eos
    processor = transformers.AutoProcessor.from_pretrained(home)
    llm = start(home, entry, **options)
    try:
        yield Served(family, home, llm, processor, model)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
