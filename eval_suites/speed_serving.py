"""``foveate speed serving``: what pruning does to a vLLM engine under load, beside vLLM as it comes.

Every concurrency is a number of users that ask one question after the other, each about a picture that nobody has asked
about, so that no cache answers. Engines run one after the other in processes of their own; the stock engine does not load
the plugin. ``--only`` measures one of them and adds it to the file, where machines must not be taken for long.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from foveate.errors import ParameterError, UnsupportedModelError
from foveate.eval_suites.environment import machine
from foveate.eval_suites.models import EMBEDDED, source
from foveate.eval_suites.terminal import console

__all__ = ["Line", "add_arguments", "as_hub", "main"]

ENGINES = ("stock", "pruned")


@dataclass(frozen=True)
class Line:
    """One engine at one concurrency.

    Attributes:
        prompt: tokens of a prompt; first: seconds to the first token, median over requests; first_90: their ninth decile;
            per_second: requests; tokens_per_second: produced tokens.
    """

    engine: str
    users: int
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
    add("--requests", default=64, type=int, metavar="N", help="per concurrency (default: 64)")
    add("--new", default=16, type=int, metavar="N", help="tokens of an answer (default: 16)")
    add("--side", default=96, type=int, metavar="N", help="of the square pictures in pixels (default: 96)")
    add("--prompt", metavar="TEXT", help="with the model's placeholder for a picture (default: its chat template's)")
    add("--engine", type=json.loads, default={}, metavar="JSON", help="other arguments of vLLM's engine")
    add("--only", choices=ENGINES, help="measure this engine alone, and keep what the file has of the other")
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
    if min(*users, args.requests, args.new, args.side) < 1:
        raise ParameterError("--users, --requests, --new and --side must be at least 1")
    lines = [] if args.only is None or not args.json else _known(args.json, args.only)
    with tempfile.TemporaryDirectory() as place:
        model = args.model
        if model in EMBEDDED:
            model = str(as_hub(Path(source(model)), Path(place) / model))
        for engine in [args.only] if args.only else ENGINES:
            lines += _in_a_process(engine, model, users, args)
    lines.sort(key=lambda line: (line.users, ENGINES.index(line.engine)))
    if args.json:
        told = {name: value for name, value in vars(args).items() if name != "json"}  # no path of this machine
        facts = {name: value for name, value in told.items() if isinstance(value, (str, int, float, dict))}
        text = json.dumps(
            {"settings": facts, "machine": machine(torch.device("cpu")), "rows": [asdict(line) for line in lines]},
            indent=2,
        )
        Path(args.json).write_text(text + "\n")
    _print(lines)
    return 0


def _known(path: str, but: str) -> list[Line]:
    """Lines of other engines in a result file."""
    if not Path(path).exists():
        return []
    return [Line(**row) for row in json.loads(Path(path).read_text())["rows"] if row["engine"] != but]


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


def _in_a_process(engine: str, model: str, users: list[int], args: argparse.Namespace) -> list[Line]:
    fresh = multiprocessing.get_context("spawn")
    ours, theirs = fresh.Pipe(duplex=False)
    process = fresh.Process(target=_measure, args=(theirs, engine, model, users, args))
    process.start()
    theirs.close()
    try:
        lines = ours.recv()
    except EOFError:
        raise UnsupportedModelError(f"the {engine} engine ended early; what vLLM said of it stands above") from None
    finally:
        process.join()
    return lines


def _measure(answer: Any, engine: str, model: str, users: list[int], args: argparse.Namespace) -> None:
    args = argparse.Namespace(**{name: value for name, value in vars(args).items() if not callable(value)})
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if engine == "stock":
        os.environ["VLLM_PLUGINS"] = ""
    answer.send(asyncio.run(_load(engine, model, users, args)))


async def _load(engine: str, model: str, users: list[int], args: argparse.Namespace) -> list[Line]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    entry = {"pruner": args.pruner, "keep": args.keep}
    options = {"hf_overrides": {"foveate": entry}} if engine == "pruned" else {}
    served = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model, limit_mm_per_prompt={"image": 1}, max_num_seqs=max(users), **options, **args.engine
        )
    )
    try:
        prompt = args.prompt or _prompt(model)
        pictures = itertools.count()
        await _users(served, engine, prompt, 2, 4, args, pictures)  # the first requests pay for what comes once
        return [await _users(served, engine, prompt, n, max(args.requests, 2 * n), args, pictures) for n in users]
    finally:
        served.shutdown()


async def _users(served: Any, engine: str, prompt: str, users: int, requests: int, args: Any, pictures: Any) -> Line:
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
    return Line(
        engine,
        users,
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


def _print(lines: list[Line]) -> None:
    from rich.table import Table

    table = Table("users", "engine", "prompt tokens", "first token (ms)", "9th decile", "requests/s", "tokens/s")
    for line in lines:
        table.add_row(
            str(line.users),
            line.engine,
            str(line.prompt),
            f"{1e3 * line.first:.0f}",
            f"{1e3 * line.first_90:.0f}",
            f"{line.per_second:.2f}",
            f"{line.tokens_per_second:.1f}",
        )
    console().print(table)
