"""``foveate speed kernels``: every operation against its plain torch forms and against what the hardware allows.

For each operation and size: this package's form, the plain form that holds whole similarity or attention maps
("eager"), the same through torch.compile, and the floor: the most of bytes / bandwidth, products / rate, exponentials /
rate, with the rates measured on the device at the start. Times are medians; on CUDA every run starts with a cold L2
cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, gelu, normalize, scaled_dot_product_attention, silu

from foveate import cuda
from foveate.cuda.launch import launched
from foveate.errors import ParameterError
from foveate.eval_suites.running.environment import machine, version_of
from foveate.eval_suites.speed.harness import ColdTimer, in_turns, ratios, show, write

HEADS, HEAD_DIM, WIDTH, NEURONS = 16, 64, 1024, 11008
SIZES = {"cuda": tuple((b, n) for n in (576, 2880, 16384) for b in (1, 8, 32)), "cpu": ((1, 576),)}
KEEP = 0.1  # share of tokens that greedy selection picks
MARGIN = 0.5
ROWS = 32  # instruction tokens that look at the image
RATES = ("bytes", "flops", "exps")  # moved, multiply-adds counted twice, exponentials
SECONDS = 5.0  # that repeating one form may take, if two calls do not take longer
MEASURED = {  # by: did kernels run in all rows, in any?
    (True, True): "CuPy kernels",
    (False, True): "CuPy kernels where the table says so, torch references elsewhere",
    (False, False): "torch references; no kernel ran, nothing here holds for a GPU's kernels",
}


# --------------------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True)
class Case:
    """One operation: ``make(B, N, dtype, device)`` gives the arguments of all forms.

    Attributes:
        plain: None for loops over picks, which torch runs as they stand in the reference; they are not compiled.
        work: of ``(B, N, bytes of an element)``, what no implementation can do without: ``RATES``, as far as needed.
        held: of ``(B, N)``, bytes that the plain form holds at once.
    """

    name: str
    make: Callable[[int, int, torch.dtype, str], tuple[Any, ...]]
    ours: Callable[..., Any]
    plain: Callable[..., Any] | None
    work: Callable[[int, int, int], tuple[float, ...]]
    held: Callable[[int, int], float] = lambda b, n: 0.0


def heads(b: int, n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    q, k = torch.randn(2, b, n, HEADS, HEAD_DIM, dtype=dtype, device=device).transpose(2, 3)
    return q, k


def heads_and_lse(b: int, n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    q, k = heads(b, n, dtype, device)
    step, keys = max(1, (1 << 26) // (b * HEADS * n)), k.float().mT
    parts = [(q[:, :, s : s + step].float() @ keys * HEAD_DIM**-0.5).logsumexp(-1) for s in range(0, n, step)]
    return q, k, torch.cat(parts, dim=-1)


def tokens(b: int, n: int, dtype: torch.dtype, device: str) -> tuple[Tensor]:
    return (torch.randn(b, n, WIDTH, dtype=dtype, device=device),)


def merging(b: int, n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = torch.rand(b, n, device=device).argsort(dim=1)
    merged = n // 2
    target = torch.randint(0, n - merged, (b, merged), device=device)
    return (*tokens(b, n, dtype, device), order[:, merged:], order[:, :merged], target)


def neurons(b: int, n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    return torch.randn(b, n, NEURONS, dtype=dtype, device=device), torch.rand(b, NEURONS, device=device) < 0.3


def plain_map(q: Tensor, k: Tensor, lse: Tensor | None = None) -> Tensor:
    return (q @ k.mT * HEAD_DIM**-0.5).softmax(dim=-1, dtype=torch.float32)


def plain_energy(x: Tensor) -> Tensor:
    unit = normalize(x.float(), dim=-1)
    excess = unit @ unit.mT - MARGIN
    return torch.where(excess > 0, excess, excess.exp() - 1.0).mean(dim=-1)


def plain_match(x: Tensor) -> Tensor:
    unit = normalize(x.float(), dim=-1)
    return (unit[:, ::2] @ unit[:, 1::2].mT).max(dim=-1).indices


def plain_merge(x: Tensor, keep: Tensor, source: Tensor, target: Tensor) -> Tensor:
    wide = [index[..., None].expand(-1, -1, x.shape[-1]) for index in (keep, source, target)]
    total = x.float().gather(1, wide[0]).scatter_add(1, wide[2], x.float().gather(1, wide[1]))
    count = torch.ones(keep.shape, device=x.device).scatter_add(1, target, torch.ones(source.shape, device=x.device))
    return (total / count[..., None]).to(x.dtype)


def plain_transition(before: Tensor, after: Tensor) -> Tensor:
    before, after = before.float(), after.float()
    return after.norm(dim=-1) / before.norm(dim=-1) * (1.0 - cosine_similarity(before, after, dim=-1)).exp()


def picks(n: int) -> int:
    return max(1, int(KEEP * n))


def last_rows(b: int, n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    q, k = heads(b, n, dtype, device)
    rows = min(ROWS, n)
    return q[:, :, -rows:], k, torch.arange(n - rows, n, device=device).expand(b, rows)


def plain_rows(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    hidden = torch.arange(k.shape[2], device=k.device) > positions[:, None, :, None]
    scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(hidden, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32).mean(dim=(1, 2))


def map_bytes(b: int, n: int) -> float:
    return 10.0 * b * HEADS * n * n  # scores and probabilities, half and single precision


def one_pass(b: int, n: int, e: int) -> tuple[float, ...]:
    """Work of attention maps whose sums are known, or that are read once."""
    return 2 * b * HEADS * n * HEAD_DIM * e, 2 * b * HEADS * n * n * HEAD_DIM, b * HEADS * n * n


# fmt: off
CASES = (
    Case("received_attention", heads, cuda.received_attention, lambda q, k: plain_map(q, k).mean(dim=(1, 2)),
         lambda b, n, e: (2 * b * HEADS * n * HEAD_DIM * e, 4 * b * HEADS * n * n * HEAD_DIM, 2 * b * HEADS * n * n),
         map_bytes),
    Case("received_attention, log_sum_exp given", heads_and_lse,
         lambda q, k, lse: cuda.received_attention(q, k, log_sum_exp=lse),
         lambda q, k, lse: plain_map(q, k).mean(dim=(1, 2)), one_pass, map_bytes),
    Case("given_attention", heads, lambda q, k: cuda.given_attention(q, k, first=1),
         lambda q, k: plain_map(q[:, :, 1:], k)[..., 1:].mean(dim=(1, 3)), one_pass, map_bytes),
    Case("class_attention", heads, cuda.class_attention, lambda q, k: plain_map(q[:, :, :1], k).mean(dim=(1, 2)),
         lambda b, n, e: (b * HEADS * n * HEAD_DIM * e,)),
    Case("rows_to_columns_attention", last_rows,
         lambda q, k, positions: cuda.rows_to_columns_attention(q, k, row_positions=positions), plain_rows,
         lambda b, n, e: (b * HEADS * n * HEAD_DIM * e, 4 * b * HEADS * min(ROWS, n) * n * HEAD_DIM)),
    Case("diverse_subset", tokens, lambda x: cuda.diverse_subset(x, picks(x.shape[1])), None,
         lambda b, n, e: (b * n * WIDTH * e + 4 * b * n * (n + picks(n)), b * n * n * WIDTH)),
    Case("conditional_dpp", lambda *how: (*tokens(*how), torch.rand(*how[:2], device=how[3])),
         lambda x, r: cuda.conditional_dpp(x, r, picks(x.shape[1])), None,
         lambda b, n, e: (b * n * WIDTH * e + 2 * b * n * picks(n) ** 2, b * n * n * WIDTH)),
    Case("similarity_energy", tokens, lambda x: cuda.similarity_energy(x, MARGIN), plain_energy,
         lambda b, n, e: (b * n * WIDTH * e, b * n * n * WIDTH), lambda b, n: 8.0 * b * n * n),
    Case("best_match", tokens, lambda x: cuda.best_match(x[:, ::2], x[:, 1::2])[1], plain_match,
         lambda b, n, e: (b * n * WIDTH * e, b * n * n * WIDTH / 2), lambda b, n: 2.0 * b * n * n),
    Case("gather_tokens",
         lambda *how: (*tokens(*how), torch.rand(*how[:2], device=how[3]).argsort(dim=1)[:, : max(1, how[1] // 3)]),
         cuda.gather_tokens, lambda x, index: x.gather(1, index[..., None].expand(-1, -1, x.shape[-1])),
         lambda b, n, e: (2 * b * max(1, n // 3) * WIDTH * e,)),
    Case("merge_tokens", merging, lambda *args: cuda.merge_tokens(*args)[0], plain_merge,
         lambda b, n, e: (1.5 * b * n * WIDTH * e,), lambda b, n: 12.0 * b * n * WIDTH),
    Case("transition_score", lambda *how: (*tokens(*how), *tokens(*how)),
         lambda before, after: cuda.transition_score(before, after)[0], plain_transition,
         lambda b, n, e: (2 * b * n * WIDTH * e,), lambda b, n: 16.0 * b * n * WIDTH),
    Case("match_counts", neurons, cuda.match_counts, lambda hidden, core: ((hidden > 0) & core[:, None]).sum(dim=-1),
         lambda b, n, e: (b * n * NEURONS * e,), lambda b, n: 5.0 * b * n * NEURONS),
)
# fmt: on


# -------------------------------------------------------------------------------------------------------- measurement


class Bench:
    """Measures on one device; the first thing measured is what the device can do.

    Attributes:
        rate: bytes, flops and exponentials per second that plain torch reaches.
    """

    def __init__(self, device: str, dtype: torch.dtype, repeats: int, compiled: bool = True) -> None:
        self.device, self.dtype, self.repeats, self.compiled = device, dtype, repeats, compiled
        self.timer = ColdTimer(torch.device(device))
        self.rate = self._rates()

    def times(self, forms: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Seconds of every form of an operation, which take turns."""
        turns = {name: lambda turn, form=form: self.timer(form) for name, form in forms.items()}
        return in_turns(turns, self.repeats, SECONDS)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Median of one call."""
        return median(self.times({"": call})[""])

    def _rates(self) -> dict[str, float]:
        large = self.device == "cuda"
        source = torch.ones(1 << (28 if large else 24), device=self.device)
        target = torch.empty_like(source)
        side = 8192 if large else 1024
        a = torch.ones(side, side, dtype=self.dtype, device=self.device)
        copied, multiplied = self.seconds(lambda: target.copy_(source)), self.seconds(lambda: a @ a)
        found = {"bytes": 2 * source.nbytes / copied, "flops": 2 * side**3 / multiplied}
        if large:  # 16 per clock and multiprocessor, all architectures; the clock that the device may run at
            properties = torch.cuda.get_device_properties(0)
            if hasattr(properties, "clock_rate"):  # else exponentials set no floor
                found["exps"] = 16e3 * properties.multi_processor_count * properties.clock_rate
        else:
            small = source[: 1 << 20]  # stays in cache
            found["exps"] = small.numel() / self.seconds(lambda: torch.exp(small, out=target[: 1 << 20]))
        return found

    def row(self, case: Case, b: int, n: int) -> dict[str, Any]:
        """All forms of one operation at one size."""
        args = case.make(b, n, self.dtype, self.device)
        launched.clear()
        expected = case.ours(*args)
        body = "kernel" if launched else "torch"
        forms: dict[str, Callable[..., Any]] = {"ours": case.ours}
        if case.plain is None:
            forms["eager"] = patch.dict(os.environ, FOVEATE_KERNELS="torch")(
                case.ours
            )  # the reference, whatever is set
        elif case.held(b, n) < 0.5 * _free_bytes(self.device):
            forms["eager"] = case.plain
            if self.compiled:
                torch._dynamo.reset()
                forms["compile"] = torch.compile(case.plain)
        times = self.times({name: lambda form=form: form(*args) for name, form in forms.items()})
        work = dict(zip(RATES, (*case.work(b, n, self.dtype.itemsize), 0.0, 0.0)))
        ours = median(times["ours"])
        needs = {kind: work[kind] / rate for kind, rate in self.rate.items()}
        slowest = max(needs, key=needs.__getitem__)
        row = {"operation": case.name, "B": b, "N": n, "dtype": str(self.dtype).removeprefix("torch.")}
        row |= {"ours_ms": 1e3 * ours, "body": body, "floor_by": slowest}
        row |= {"floor_ms": 1e3 * needs[slowest], "floor_share": needs[slowest] / ours}
        row |= {"GB/s": 1e-9 * work["bytes"] / ours, "TFLOP/s": 1e-12 * work["flops"] / ours}
        for name in list(forms)[1:]:
            row[f"{name}_ms"] = 1e3 * median(times[name])
            row[f"{name}_ratio"] = median(ratios(times[name], times["ours"]))
        if "eager" in forms:
            row["agreement"] = _agreement(expected, forms["eager"](*args))
        return row


def _agreement(ours: Tensor, plain: Tensor) -> float:
    """Share of equal entries of indices and counts; of floats 1 - relative error of the worst entry."""
    if not ours.is_floating_point():
        return (ours == plain).double().mean().item()
    ours, plain = ours.double(), plain.double()
    return 1.0 - ((ours - plain).abs().max() / plain.abs().max()).item()


def _free_bytes(device: str) -> float:
    if device == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later counts as taken
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ------------------------------------------------------------------------------------------- beside a prefill, at start


@dataclass(frozen=True)
class Prefill:
    """What a prefill of LLaVA-1.5 multiplies; the defaults are the 7B model's, with an instruction of 64 tokens."""

    patches: int = 576
    text: int = 64
    tower: tuple[int, int, int, int] = (24, 1024, 16, 4096)  # layers, width, heads, width of the MLP
    decoder: tuple[int, int, int, int] = (32, 4096, 32, 11008)


def layer(tokens: int, width: int, heads: int, inner: int, gated: bool, dtype: torch.dtype, device: str) -> Callable:
    """A transformer layer's products and attention; its norms are left out, so that the prefill is rather too fast."""
    x = torch.randn(1, tokens, width, dtype=dtype, device=device)
    sides = [(width, 3 * width), (width, width), (width, inner * (2 if gated else 1)), (inner, width)]
    qkv, out, up, down = (torch.randn(side, dtype=dtype, device=device) * side[0] ** -0.5 for side in sides)

    def run() -> Tensor:
        q, k, v = (x @ qkv).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=gated).transpose(1, 2).flatten(2)
        y = x + mixed @ out
        hidden = y @ up
        return y + (silu(hidden[..., :inner]) * hidden[..., inner:] if gated else gelu(hidden)) @ down

    return run


def prefill_shares(bench: Bench, prefill: Prefill) -> dict[str, float]:
    """Milliseconds of a prefill, and the share of it that each operation takes once, on tensors of its size there."""
    n, text, how = prefill.patches, prefill.text, {"dtype": bench.dtype, "device": bench.device}
    whole = 0.0
    for (layers, *sides), count, gated in ((prefill.tower, n + 1, False), (prefill.decoder, n + text, True)):
        whole += layers * bench.seconds(layer(count, *sides, gated, **how))
    (_, tower_width, tower_heads, _), (_, width, llm_heads, _) = prefill.tower, prefill.decoder
    q = torch.randn(1, tower_heads, n + 1, tower_width // tower_heads, **how)
    k = torch.randn(1, llm_heads, n + text, width // llm_heads, **how)
    x, budget = torch.randn(1, n, width, **how), max(1, n // 9)
    last = torch.arange(n, n + text, device=bench.device)[None]
    every_ninth = torch.arange(0, n, 9, device=bench.device)[None]
    calls: dict[str, Callable[[], Any]] = {
        "received_attention": lambda: cuda.received_attention(q, q, first_query=1),
        "class_attention": lambda: cuda.class_attention(q, q),
        "rows_to_columns_attention": lambda: cuda.rows_to_columns_attention(k[:, :, n:], k, row_positions=last),
        "diverse_subset": lambda: cuda.diverse_subset(x, budget),
        "conditional_dpp": lambda: cuda.conditional_dpp(x, torch.ones(1, n, device=bench.device), budget),
        "transition_score": lambda: cuda.transition_score(x, x),
        "gather_tokens": lambda: cuda.gather_tokens(x, every_ninth),
    }
    return {"prefill_ms": 1e3 * whole, **{name: bench.seconds(call) / whole for name, call in calls.items()}}


def start_seconds() -> dict[str, float | str]:
    """What the first use takes in a process with an empty cache on disk, and in one with a full one.

    CuPy's import, one operation, then all kernels by `foveate.cuda.warmup`; ``error`` if they do not load.
    """
    program = (
        "import time, torch; from foveate import cuda\n"
        "q = torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16, device='cuda')\n"
        "def took(call):\n"
        "    start = time.perf_counter(); call(); torch.cuda.synchronize(); return time.perf_counter() - start\n"
        "print(took(lambda: __import__('cupy')), took(lambda: cuda.received_attention(q, q)), took(cuda.warmup))"
    )
    found: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory() as cache:
        for when in ("compiled", "cached"):
            environment = {**os.environ, "CUPY_CACHE_DIR": cache, "FOVEATE_KERNELS": "cupy"}
            done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
            if done.returncode:
                return found | {"error": done.stderr.strip().splitlines()[-1]}
            keys = "import_s", f"one_operation_{when}_s", f"all_kernels_{when}_s"
            found.update(zip(keys, map(float, done.stdout.split())))
    return found


# ------------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foveate speed kernels``."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--sizes", nargs="+", type=_size, metavar="BxN", help="images x tokens, as 8x2880")
    add("--operations", nargs="+", metavar="NAME", help="only those whose name starts so")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="bfloat16; on a CPU float32")
    add("--repeats", type=int, default=20)
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--prefill", action="store_true", help="also: shares of a LLaVA-1.5-7B prefill (a GPU: always)")
    add("--output", type=Path, help="where to write the JSON")
    add("--extend", action="store_true", help="keep rows of an earlier --output that are not made again")


def _size(text: str) -> tuple[int, int]:
    batch, _, count = text.partition("x")
    return int(batch), int(count)


@torch.inference_mode()
def main(args: argparse.Namespace) -> int:
    """Measure and print; 0.

    Raises:
        ParameterError: no such operation, or an earlier --output of another kind.
    """
    cases = [case for case in CASES if not args.operations or case.name.startswith(tuple(args.operations))]
    if not cases:
        there = ", ".join(case.name for case in CASES)
        raise ParameterError(f"no operation is called {' or '.join(args.operations)}; there are: {there}")
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    facts, sizes = _facts(args.device), args.sizes or SIZES[args.device]
    rows: list[dict[str, Any]] = []
    if args.extend and args.output and args.output.exists():
        made_again = {(case.name, *at, str(dtype).removeprefix("torch.")) for case in cases for at in sizes}
        rows += _earlier_rows(args.output, facts, made_again)
    torch.manual_seed(0)
    bench = Bench(args.device, dtype, args.repeats, compiled=not args.no_compile)
    result: dict[str, Any] = {"environment": facts, "results": rows, "rates_per_second": bench.rate}
    for case in cases:
        rows += [bench.row(case, b, n) for b, n in sizes]
        bodies = {row["body"] for row in rows}
        facts["measured"] = MEASURED[bodies == {"kernel"}, "kernel" in bodies]
        write(args.output, result, indent=1)  # what was measured so far is safe whatever comes
    if args.prefill or args.device == "cuda":
        result["prefill_shares"] = prefill_shares(bench, Prefill())
    cells = [[_cell(row.get(key)) for key in COLUMNS] for row in rows]
    show(list(COLUMNS.values()), cells, title=f"{facts['hardware']}: {facts['measured']}", width=170)
    rates = "; ".join(f"{1e-12 * value:.3g} T{kind}/s" for kind, value in bench.rate.items())
    print(rates, "reached by plain torch")
    for name, share in result.get("prefill_shares", {}).items():
        print(f"prefill: {share:.4g} ms" if name == "prefill_ms" else f"{name}: {share:.2%} of it")
    write(args.output, result, indent=1)
    if args.device == "cuda":
        result["start_seconds"] = start_seconds()
        print("; ".join(f"{name}: {value}" for name, value in result["start_seconds"].items()))
        write(args.output, result, indent=1)
    return 0


COLUMNS = {
    "operation": "operation", "B": "B", "N": "N", "body": "ran",
    "ours_ms": "ours, ms", "eager_ms": "eager, ms", "compile_ms": "compile, ms",
    "eager_ratio": "eager / ours", "compile_ratio": "compile / ours",
    "floor_ms": "floor, ms", "floor_share": "floor / ours", "GB/s": "GB/s", "TFLOP/s": "TFLOP/s",
    "agreement": "agreement",
}  # fmt: skip
"""Entry of a row -> head of the table's column."""


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _facts(device: str) -> dict[str, Any]:
    return machine(torch.device(device)) | {
        "kernels": os.environ.get("FOVEATE_KERNELS", "auto"),
        "cuda": torch.version.cuda,
        "cupy": version_of("cupy-cuda13x") or version_of("cupy-cuda12x"),
    }


def _earlier_rows(path: Path, facts: dict[str, Any], made_again: set[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Of a run on the same device with the same versions, the rows (operation, B, N, dtype) not in ``made_again``."""
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for key in ("device", "hardware", "kernels", "foveate", "torch", "cupy", "cuda", "python"):
        if (before := earlier["environment"].get(key)) != facts[key]:
            raise ParameterError(f"{path} was made with {key} {before}, not {facts[key]}; write to another --output")
    of = ("operation", "B", "N", "dtype")
    return [row for row in earlier["results"] if tuple(row[key] for key in of) not in made_again]
