"""``foveate speed decoder``: where a method's time goes in a decoder of any size with random weights.

Every method stands beside the unpruned model and beside a random choice of as many tokens in every layer, which shows
what pruning itself gives, without the method's work.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapters import attach, compat
from foveate.adapters.trace import Trace
from foveate.errors import ParameterError
from foveate.eval_suites.running.environment import environment
from foveate.eval_suites.speed.harness import Clock, at_least, in_turns, ratios, show, spread, write
from foveate.pruners.core import BeforeLayer, ModelInfo, Pruner, Selection, Stage, Tokens, keep_all, seeded
from foveate.pruners.corematching import CoreMatching
from foveate.pruners.transprune import TransPrune

__all__ = ["DecoderTimes", "Geometry", "add_arguments", "cells", "main", "measure"]

LLAMA_RATIO = 11008 / 4096  # of MLP to model width in LLaMA-7B


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foveate speed decoder``."""
    add = parser.add_argument
    add("--geometry", metavar="LAYERSxWIDTH", default="8x1024", help="of the decoder (default: 8x1024)")
    add("--intermediate", metavar="F", type=int, help="width of its MLPs (default: LLaMA's ratio, in steps of 64)")
    add("--vocabulary", metavar="V", type=int, default=2048, help="(default: 2048; every token reads the embedding)")
    add("--visual", metavar="N", type=int, default=576, help="visual tokens, a square number (default: 576)")
    add("--text", metavar="N", type=int, default=48, help="text tokens, a quarter before the picture (default: 48)")
    add("--new", metavar="N", type=int, default=16, help="tokens decoded per run (default: 16)")
    add("--batch", metavar="B", type=int, default=1, help="equal prompts per call (default: 1)")
    add("--repeats", metavar="N", type=int, default=5, help="runs of every contender after a warm-up (default: 5)")
    add("--threads", metavar="N", type=int, help="CPU threads (default: torch's own)")
    add("--device", default="cpu", help="(default: cpu)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="(default: float32)")
    add("--json", metavar="PATH", help="write all numbers and the environment; '-' prints them instead of the table")


def main(args: argparse.Namespace) -> int:
    """Measure, and print a table or write the numbers; 0.

    Raises:
        ParameterError: unusable numbers, before anything has run.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", args.geometry)
    if not found:
        raise ParameterError(f"--geometry {args.geometry!r}: give layers and width, for example 8x1024")
    width = int(found[2])
    mlp = args.intermediate or max(64, round(width * LLAMA_RATIO / 64) * 64)
    geometry = Geometry(int(found[1]), width, mlp, args.vocabulary, args.visual, args.text)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = geometry.model(args.device, args.dtype)
    times = measure(geometry, model, args.new, args.batch, args.repeats)
    facts = environment(model) | {"geometry": asdict(geometry), "new": args.new, "batch": args.batch}
    result = {"environment": facts, "rows": [asdict(one) for one in times]}
    if args.json == "-":
        print(json.dumps(result, indent=2, default=str))
        return 0
    write(args.json, result)
    whole = times[0]
    show(
        COLUMNS,
        cells(times),
        f"{geometry.layers} layers x {geometry.width}, MLP {geometry.intermediate}, {geometry.visual} visual and "
        f"{geometry.text} text tokens. The unpruned model's MLPs take {whole.mlp_prefill:.0%} of its prefill and "
        f"{whole.mlp_decode:.0%} of its decode time.",
        "tokens, cached: visual, mean over the layers; x: times faster than unpruned; own: what the method itself "
        "adds to the prefill of its random twin; both within each turn, median and quartiles; first: the first "
        "decoded token, with what is done once per prompt. One CPU thread is timed by its own clock, which stands "
        "still while others run.",
    )
    return 0


# -------------------------------------------------------------------------------------------------------- contenders


@dataclass(frozen=True)
class Geometry:
    """A LLaVA's decoder and its prompt."""

    layers: int
    width: int
    intermediate: int
    vocabulary: int = 2048
    visual: int = 576
    text: int = 48

    def __post_init__(self) -> None:
        least = {"layers": 2, "width": 64, "intermediate": 1, "vocabulary": 8, "visual": 1, "text": 4}
        for name, value in asdict(self).items():
            at_least(least[name], {name: value})
        if self.width % 64:
            raise ParameterError(f"width={self.width}: give a multiple of 64, the width of a head")
        if math.isqrt(self.visual) ** 2 != self.visual:
            raise ParameterError(f"visual={self.visual} tokens do not lie on a square; give 64, 144, 256, 576, …")

    def model(self, device: str, dtype: str) -> nn.Module:
        """A LLaVA of this size with random weights and a vision tower of next to no size."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
        heads, mark = self.width // 64, self.vocabulary - 1
        text = LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=2 * (self.visual + self.text) + 1024,
        )
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**tower, image_size=math.isqrt(self.visual), patch_size=1),
            text_config=text,
            image_token_index=mark,
            image_token_id=mark,
        )
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval().to(device, getattr(torch, dtype))
        return model.requires_grad_(False)

    def prompt(self, batch: int, model: nn.Module) -> dict[str, Tensor]:
        """Text, picture, text: ``batch`` times the same."""
        side, g = math.isqrt(self.visual), torch.Generator().manual_seed(0)
        words = torch.randint(3, self.vocabulary - 1, (self.text,), generator=g)
        picture = torch.full((self.visual,), self.vocabulary - 1)
        ids = torch.cat([words[: self.text // 4], picture, words[self.text // 4 :]]).to(model.device)
        pixels = torch.randn(1, 3, side, side, generator=g).to(model.device, model.dtype)
        return {
            "input_ids": ids.expand(batch, -1),
            "attention_mask": torch.ones(batch, len(ids), dtype=torch.long, device=model.device),
            "pixel_values": pixels.expand(batch, -1, -1, -1),
        }


@dataclass(frozen=True)
class _Equal(Pruner):
    """Random choice of as many tokens per layer as another method had."""

    counts: tuple[tuple[int, int], ...] = ()  # layer, tokens from there on
    evict: bool = False
    name = "random"

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        def stage(layer: int, count: int) -> Stage:
            def select(tokens: Tokens) -> Selection:
                if count >= tokens.count:
                    return keep_all(tokens)
                drawn = [torch.randperm(tokens.count, generator=g)[:count].sort().values for g in seeded(layer, tokens)]
                return Selection(torch.stack(drawn).to(tokens.embeds.device))

            return BeforeLayer(select, layer=layer, evict=self.evict)

        return tuple(stage(layer, count) for layer, count in self.counts)

    @classmethod
    def of(cls, trace: Trace) -> _Equal:
        seen = trace.images[0].tokens_per_layer
        cuts = tuple((i, seen[i]) for i in range(1, len(seen)) if seen[i] != seen[i - 1])
        return cls(cuts, evict=trace.images[0].cached_per_layer != seen)


# ------------------------------------------------------------------------------------------------------------ timing


@dataclass
class DecoderTimes:
    """What one contender took, in seconds; one entry per run.

    Attributes:
        prefill: of the whole prompt.
        first: of the first decoded token, which bears what a prompt's answer costs once.
        decode: of each later token, median.
        tokens_per_layer: visual tokens of a prompt.
        cached_per_layer: visual tokens of a prompt in the KV cache.
        mlp_prefill: the MLPs' share of the time (measured on the unpruned model only).
        mlp_decode: likewise of a decoded token.
    """

    label: str
    prefill: list[float]
    first: list[float]
    decode: list[float]
    tokens_per_layer: list[int]
    cached_per_layer: list[int]
    mlp_prefill: float | None = None
    mlp_decode: float | None = None


@torch.no_grad()
def measure(
    geometry: Geometry, model: nn.Module, new: int = 16, batch: int = 1, repeats: int = 5
) -> list[DecoderTimes]:
    """Time the unpruned ``model`` of this geometry, both methods, and beside each a random choice of as many tokens.

    Raises:
        ParameterError: unusable numbers.
    """
    at_least(2, {"new": new})
    at_least(1, {"batch": batch, "repeats": repeats})
    prompt = geometry.prompt(batch, model)

    def traced(pruner: Pruner) -> Any:
        with attach(model, pruner) as session:
            model(**prompt, use_cache=True, logits_to_keep=1)
        return session.trace

    contenders: dict[str, Pruner | None] = {"unpruned": None}
    for method in (TransPrune(), CoreMatching()):
        contenders |= {method.name: method, f"random like {method.name}": _Equal.of(traced(method))}
    counts = {"unpruned": 2 * ([geometry.visual] * geometry.layers,)}
    for label in list(contenders)[1:]:
        seen = traced(contenders[label]).images[0]
        counts[label] = (seen.tokens_per_layer, seen.cached_per_layer)
    run = partial(_run, model, prompt, new)
    runs = in_turns({label: lambda turn, p=pruner: run(p) for label, pruner in contenders.items()}, repeats)
    times = [DecoderTimes(label, *map(list, zip(*runs[label])), *counts[label]) for label in contenders]
    times[0].mlp_prefill, times[0].mlp_decode = _mlp_shares(model, prompt, new)
    return times


def _run(model: nn.Module, prompt: dict[str, Tensor], new: int, pruner: Pruner | None) -> tuple[float, float, float]:
    """Seconds of a prompt's prefill, of the first of ``new`` tokens after it, and of a later one."""
    with nullcontext() if pruner is None else attach(model, pruner):
        clock = Clock(model.device)
        output = model(**prompt, use_cache=True, logits_to_keep=1)
        prefill, mask, steps = clock.lap(), prompt["attention_mask"], []
        for _ in range(new):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            clock = Clock(model.device)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = model(input_ids=token, attention_mask=mask, use_cache=True, **compat.handed_on(model, output))
            steps.append(clock.lap())
    return prefill, steps[0], median(steps[1:])


def _mlp_shares(model: Any, prompt: dict[str, Tensor], new: int) -> tuple[float, float]:
    """The MLPs' share of prefill and decoding, in runs of their own, because stopping at every MLP takes time too."""
    layers, shares = model.model.language_model.layers, []
    for _ in range(3):
        with _stopwatches([layer.mlp for layer in layers]) as laps:
            whole_prefill, _, whole_decode = _run(model, prompt, new, None)
        prefill, *steps = (sum(laps[i : i + len(layers)]) for i in range(0, len(laps), len(layers)))
        shares.append((prefill / whole_prefill, median(steps[1:]) / whole_decode))
    return tuple(median(share) for share in zip(*shares))


@contextmanager
def _stopwatches(modules: Sequence[nn.Module]) -> Iterator[list[float]]:
    """A list that fills with the seconds of every call of the modules."""
    laps: list[float] = []
    running: list[Clock] = []
    with ExitStack() as hooks:
        for module in modules:
            start = module.register_forward_pre_hook(lambda module, args: running.append(Clock(args[0].device)))
            stop = module.register_forward_hook(lambda module, args, output: laps.append(running.pop().lap()))
            hooks.callback(start.remove)
            hooks.callback(stop.remove)
        yield laps


COLUMNS = ("", "tokens", "cached", "prefill s", "x", "own", "first ms", "decode ms", "x")


def cells(times: Sequence[DecoderTimes]) -> list[list[str]]:
    """The rows of the table under :data:`COLUMNS`; the first is unpruned, and ratios are taken within each turn."""
    whole, by_label = times[0], {one.label: one for one in times}
    rows = []
    for one in times:
        twin = by_label.get(f"random like {one.label}")
        own = "" if twin is None else spread([ratio - 1 for ratio in ratios(one.prefill, twin.prefill)], "+.1%")
        visual = [f"{fmean(counts):.0f}" for counts in (one.tokens_per_layer, one.cached_per_layer)]
        prefill = [f"{median(one.prefill):.3f}", f"{median(ratios(whole.prefill, one.prefill)):.2f}", own]
        decode = [f"{median(one.first) * 1e3:.0f}", f"{median(one.decode) * 1e3:.1f}"]
        faster = "1.00" if one is whole else spread(ratios(whole.decode, one.decode), ".2f")
        rows.append([one.label, *visual, *prefill, *decode, faster])
    return rows
