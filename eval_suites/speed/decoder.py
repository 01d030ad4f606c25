"""Time pruned models of any size with random weights: where a method's seconds go, without accuracy.

``python -m foveate.eval_suites.speed.decoder decoder --geometry 8x1024 --visual 576`` or ``foveate speed decoder …``. Contenders take
turns within every repetition, so that what else the machine does hits all alike; medians are printed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from statistics import fmean, median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapters import attach, compat
from foveate.adapters.trace import Trace
from foveate.errors import ParameterError
from foveate.eval_suites.running.environment import environment
from foveate.eval_suites.speed import serving as speed_serving
from foveate.eval_suites.speed import vit as speed_vit
from foveate.eval_suites.speed.clock import Clock
from foveate.eval_suites.terminal import console
from foveate.pruners.core.method import Hook, ModelInfo, Pruner, Selection, Stage, Tokens, keep_all, seeded
from foveate.pruners.corematching import CoreMatching
from foveate.pruners.transprune import TransPrune

__all__ = ["Geometry", "Timing", "add_arguments", "decoder", "main"]

LLAMA_RATIO = 11008 / 4096  # of MLP to model width in LLaMA-7B


# ------------------------------------------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foveate speed``: a sub-command per part of the model."""
    parts = parser.add_subparsers(metavar="PART", required=True)
    help_ = "methods inside the decoder beside the unpruned model and random choice of as many tokens per layer"
    add = (part := parts.add_parser("decoder", help=help_, description=f"Time {help_}.")).add_argument
    add("--geometry", metavar="LAYERSxWIDTH", default="8x1024", help="of the decoder (default: 8x1024)")
    add("--intermediate", metavar="F", type=int, help="width of its MLPs (default: LLaMA's ratio, in steps of 64)")
    add(
        "--vocabulary",
        metavar="V",
        type=int,
        default=2048,
        help="(default: 2048; the embedding is read for every token)",
    )
    add("--visual", metavar="N", type=int, default=576, help="visual tokens, a square number (default: 576)")
    add("--text", metavar="N", type=int, default=48, help="text tokens, a quarter of them in front (default: 48)")
    add("--new", metavar="N", type=int, default=16, help="tokens decoded per run (default: 16)")
    add("--batch", metavar="B", type=int, default=1, help="equal prompts per call (default: 1)")
    add(
        "--repeats",
        metavar="N",
        type=int,
        default=5,
        help="runs of every contender (default: 5, after one that does not count)",
    )
    add("--threads", metavar="N", type=int, help="CPU threads (default: torch's own)")
    add("--device", default="cpu", help="(default: cpu)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="(default: float32)")
    add("--json", metavar="PATH", help="write all numbers and the environment; '-' prints them instead of the table")
    part.set_defaults(time_part=_main_decoder)
    help_ = "methods inside vision towers beside the unmodified timm model and the ceiling of their token counts"
    part = parts.add_parser("vit", help=help_, description=f"Time {help_}.")
    speed_vit.add_arguments(part)
    part.set_defaults(time_part=speed_vit.main)
    help_ = "a vLLM engine with a method against vLLM as it comes, at several numbers of users"
    part = parts.add_parser("serving", help=help_, description=f"Time {help_}.")
    speed_serving.add_arguments(part)
    part.set_defaults(time_part=speed_serving.main)


def main(args: argparse.Namespace) -> int:
    """Run ``foveate speed``; 0.

    Raises:
        FoveateError: bad input, before anything has run.
    """
    return args.time_part(args)


def _main_decoder(args: argparse.Namespace) -> int:
    found = re.fullmatch(r"(\d+)x(\d+)", args.geometry)
    if not found:
        raise ParameterError(f"--geometry {args.geometry!r}: give layers and width, for example 8x1024")
    width = int(found[2])
    mlp = args.intermediate or max(64, round(width * LLAMA_RATIO / 64) * 64)
    geometry = Geometry(int(found[1]), width, mlp, args.vocabulary, args.visual, args.text)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = geometry.model(args.device, args.dtype)
    timings = decoder(geometry, model, args.new, args.batch, args.repeats)
    facts = environment(model) | {
        "geometry": asdict(geometry),
        "new": args.new,
        "batch": args.batch,
        "threads": torch.get_num_threads(),
    }
    text = json.dumps({"environment": facts, "rows": [asdict(t) for t in timings]}, indent=2, default=str)
    if args.json == "-":
        print(text)
        return 0
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    _print(geometry, timings)
    return 0


# ------------------------------------------------------------------------------------------------------------- model


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
        for name, least in (
            ("layers", 2),
            ("width", 64),
            ("intermediate", 1),
            ("vocabulary", 8),
            ("visual", 1),
            ("text", 4),
        ):
            if getattr(self, name) < least:
                raise ParameterError(f"{name}={getattr(self, name)}: give at least {least}")
        if self.width % 64:
            raise ParameterError(f"width={self.width}: give a multiple of 64, the width of a head")
        if math.isqrt(self.visual) ** 2 != self.visual:
            raise ParameterError(f"visual={self.visual} tokens do not lie on a square; give 64, 144, 256, 576, …")

    def model(self, device: str, dtype: str) -> nn.Module:
        """A LLaVA of this size with random weights and a vision tower of next to no size."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        side = math.isqrt(self.visual)
        vision = CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=1,
            image_size=side,
            patch_size=1,
        )
        text = LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            num_key_value_heads=self.width // 64,
            vocab_size=self.vocabulary,
            max_position_embeddings=2 * (self.visual + self.text) + 1024,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=self.vocabulary - 1,
            image_token_id=self.vocabulary - 1,
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
    """Random choice of as many tokens per layer as another method had: what pruning itself gives, without a method's work."""

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

            return Stage(Hook.LLM_LAYER, select, layer=layer, evict=self.evict)

        return tuple(stage(layer, count) for layer, count in self.counts)

    @classmethod
    def of(cls, trace: Trace) -> _Equal:
        seen = trace.images[0].tokens_per_layer
        cuts = tuple((i, seen[i]) for i in range(1, len(seen)) if seen[i] != seen[i - 1])
        return cls(cuts, evict=trace.images[0].cached_per_layer != seen)


# ------------------------------------------------------------------------------------------------------------ timing


@dataclass
class Timing:
    """What one contender took, in seconds; one entry per run.

    Attributes:
        prefill: the whole prompt; first: the first decoded token, which bears what a prompt's answer costs once; decode: each later one.
        tokens_per_layer, cached_per_layer: visual tokens of a prompt.
        mlp_prefill, mlp_decode: the MLPs' share of the time (measured on the unpruned model only).
    """

    label: str
    prefill: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    tokens_per_layer: list[int] = field(default_factory=list)
    cached_per_layer: list[int] = field(default_factory=list)
    mlp_prefill: float | None = None
    mlp_decode: float | None = None


@torch.no_grad()
def decoder(geometry: Geometry, model: nn.Module, new: int = 16, batch: int = 1, repeats: int = 5) -> list[Timing]:
    """Time the unpruned ``model`` of this geometry, TransPrune and CoreMatching, and beside each a random choice of as many tokens per layer.

    Raises:
        ParameterError: unusable numbers.
    """
    for name, value, least in (("new", new, 2), ("batch", batch, 1), ("repeats", repeats, 1)):
        if value < least:
            raise ParameterError(f"{name}={value}: give at least {least}")
    prompt = geometry.prompt(batch, model)
    contenders: dict[str, Pruner | None] = {"unpruned": None}
    for method in (TransPrune(), CoreMatching()):
        with attach(model, method) as session:
            model(**prompt, use_cache=True, logits_to_keep=1)
        contenders[method.name] = method
        contenders[f"random like {method.name}"] = _Equal.of(session.trace)
    timings = {label: Timing(label) for label in contenders}
    for turn in range(repeats + 1):
        for label, pruner in contenders.items():
            one = Timing(label) if turn == 0 else timings[label]  # the first turn warms up
            _run(model, prompt, new, pruner, one)
    for timing in timings.values():
        if not timing.tokens_per_layer:
            timing.tokens_per_layer = timing.cached_per_layer = [geometry.visual] * geometry.layers
    _measure_mlps(model, prompt, new, timings["unpruned"])
    return list(timings.values())


def _run(model: nn.Module, prompt: dict[str, Tensor], new: int, pruner: Pruner | None, timing: Timing) -> None:
    """One prompt and ``new`` tokens behind it."""
    with nullcontext() if pruner is None else attach(model, pruner) as session:
        clock = Clock(model.device)
        output = model(**prompt, use_cache=True, logits_to_keep=1)
        timing.prefill.append(clock.lap())
        mask, steps = prompt["attention_mask"], []
        for _ in range(new):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            clock = Clock(model.device)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = model(input_ids=token, attention_mask=mask, use_cache=True, **compat.handed_on(model, output))
            steps.append(clock.lap())
        timing.first.append(steps[0])
        timing.decode.append(median(steps[1:]))
        if session is not None:
            trace = session.trace
            timing.tokens_per_layer = trace.images[0].tokens_per_layer
            timing.cached_per_layer = trace.images[0].cached_per_layer


def _measure_mlps(model: nn.Module, prompt: dict[str, Tensor], new: int, timing: Timing) -> None:
    """The MLPs' share of an unpruned run, in a run of its own, for stopping at every MLP takes time too."""
    layers, shares = model.model.language_model.layers, []
    for _ in range(3):
        whole = Timing("")
        with _stopwatches([layer.mlp for layer in layers]) as laps:
            _run(model, prompt, new, None, whole)
        prefill, *steps = (sum(laps[i : i + len(layers)]) for i in range(0, len(laps), len(layers)))
        shares.append((prefill / whole.prefill[0], median(steps[1:]) / whole.decode[0]))
    timing.mlp_prefill, timing.mlp_decode = (median(share) for share in zip(*shares))


@contextmanager
def _stopwatches(modules: Sequence[nn.Module]) -> Iterator[list[float]]:
    """A list that fills with the seconds of every call of the modules."""
    laps: list[float] = []
    running: list[Clock] = []

    def start(module: nn.Module, args: Any) -> None:
        running.append(Clock(args[0].device))

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        laps.append(running.pop().lap())

    handles = [m.register_forward_pre_hook(start) for m in modules] + [m.register_forward_hook(stop) for m in modules]
    try:
        yield laps
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------------------- print


COLUMNS = ("", "tokens", "cached", "prefill s", "x", "own", "first ms", "decode ms", "x")


def cells(timings: Sequence[Timing]) -> list[list[str]]:
    """The rows of the table under :data:`COLUMNS`; what is compared, is compared within each turn. The first is unpruned."""
    whole, by_label = timings[0], {t.label: t for t in timings}
    rows = []
    for t in timings:
        twin = by_label.get(f"random like {t.label}")
        rows.append(
            [
                t.label,
                f"{fmean(t.tokens_per_layer):.0f}",
                f"{fmean(t.cached_per_layer):.0f}",
                f"{median(t.prefill):.3f}",
                f"{median(a / b for a, b in zip(whole.prefill, t.prefill)):.2f}",
                "" if twin is None else _spread([a / b - 1 for a, b in zip(t.prefill, twin.prefill)], "+.1%"),
                f"{median(t.first) * 1e3:.0f}",
                f"{median(t.decode) * 1e3:.1f}",
                "1.00" if t is whole else _spread([a / b for a, b in zip(whole.decode, t.decode)], ".2f"),
            ]
        )
    return rows


def _spread(values: Sequence[float], form: str) -> str:
    """Median and quartiles; a single value as it is."""
    if len(values) < 2:
        return f"{values[0]:{form}}"
    low, _, high = quantiles(values, n=4)
    return f"{median(values):{form}} ({low:{form}} … {high:{form}})"


def _print(geometry: Geometry, timings: Sequence[Timing]) -> None:
    from rich import box
    from rich.table import Table

    whole = timings[0]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if not name else "right")
    for row in cells(timings):
        table.add_row(*row)
    page = console()
    page.print(table)
    page.print(
        f"{geometry.layers} layers x {geometry.width}, MLP {geometry.intermediate}, {geometry.visual} visual and {geometry.text} text "
        f"tokens. The unpruned model's MLPs take {whole.mlp_prefill:.0%} of its prefill and {whole.mlp_decode:.0%} of its decode time."
    )
    page.print(
        "tokens, cached: visual, mean over the layers; x: times faster than unpruned; own: what the method itself adds to the prefill of "
        "its random twin; both within each turn, median and quartiles; first: the first decoded token, with what is done once per prompt. One CPU thread is "
        "timed by its own clock, which stands still while others run.",
        style="dim",
    )


if __name__ == "__main__":
    from foveate.cli import main as command

    sys.exit(command(["speed", *sys.argv[1:]]))
