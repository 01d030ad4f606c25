"""What the recipes of the embedded models share: stages with checkpoints, a log, held-out figures, and batches.

A recipe subclasses :class:`TrainingRun`, says what each stage trains (`trained`), how a batch is drawn (`batch`) and
what the loss is (`loss`); its `main` is :meth:`TrainingRun.main`. Every batch is a pure function of (seed, stage,
step), so that a run can be resumed and repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from foveate.eval_suites.suites.streams import CHECKS, TRAINING

__all__ = ["Stage", "TrainingRun", "question_mask", "save_model", "some_places", "stream"]


def stream(held_out: bool) -> int:
    """First number of a recipe's seeds."""
    return CHECKS if held_out else TRAINING


@dataclass(frozen=True)
class Stage:
    """One stage's name and the defaults of its options.

    Attributes:
        steps, batch, lr: number of steps, pictures a step, peak learning rate.
        warmup: steps over which the rate rises.
        decay: share of the steps, the last ones, over which it falls to zero.
    """

    name: str
    steps: int
    batch: int
    lr: float
    warmup: int = 200
    decay: float = 0.0


class TrainingRun(ABC):
    """Modules, files and the loop of one run.

    Attributes:
        model: what is trained and exported.
        modules: what checkpoints hold, by name.
        stages: in the order in which they run.
    """

    stages: ClassVar[Sequence[Stage]]
    model: nn.Module

    @classmethod
    def main(cls, description: str) -> None:
        """Run the stages that the command line chooses; write the model folder after the last one."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        cls.add_arguments(parser)
        run = cls(parser.parse_args())
        for stage in run.options.stages:
            run.train(stage)
        if stage == cls.stages[-1].name:
            run.export()

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Arguments that every recipe takes; the defaults made the shipped weights."""
        names = [stage.name for stage in cls.stages]
        parser.add_argument("--out", required=True, help="folder for the model, its log and its checkpoints")
        parser.add_argument("--stages", nargs="+", choices=names, default=names)
        parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in --out")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch, 0 for its own choice")
        parser.add_argument("--check-every", type=int, default=200, help="steps between held-out checks")
        parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
        parser.add_argument(
            "--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler"
        )
        for stage in cls.stages:
            parser.add_argument(f"--{stage.name}-steps", type=int, default=stage.steps)
            parser.add_argument(f"--{stage.name}-batch", type=int, default=stage.batch, help="pictures a step")
            parser.add_argument(f"--{stage.name}-lr", type=float, default=stage.lr)

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(options.seed)
        if options.threads:
            torch.set_num_threads(options.threads)
        self.out = Path(options.out)
        self.work = self.out / "checkpoints"
        self.work.mkdir(parents=True, exist_ok=True)
        self.modules: dict[str, nn.Module] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a worker that draws batches gets where workers are not forked: no modules, and nothing compiled."""
        left_out = (nn.Module, _Compiled)
        return {k: v for k, v in vars(self).items() if k != "modules" and not isinstance(v, left_out)}

    @abstractmethod
    def batch(self, stage: str, step: int) -> dict[str, Tensor]:
        """The training batch of a step, or of a held-out check where `step` is negative."""

    @abstractmethod
    def loss(self, stage: str, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and figures of a stage on a batch."""

    @abstractmethod
    def trained(self, stage: str) -> list[tuple[nn.Module, float]]:
        """Modules that a stage trains, with their share of its learning rate; everything else is frozen."""

    @abstractmethod
    def start_from(self, stage: str) -> None:
        """Bring in the weights of the stages before."""

    @abstractmethod
    def export(self) -> None:
        """Write the model folder."""

    def size(self, stage: str) -> int:
        """Pictures a step."""
        return getattr(self.options, f"{stage}_batch")

    def number(self, stage: str) -> int:
        """Which of the stages it is, from 0; seeds what it draws."""
        return [known.name for known in self.stages].index(stage)

    def generator(self, held_out: bool, *key: int) -> np.random.Generator:
        """Draws of this run's training or held-out checks, for one of many purposes."""
        return np.random.default_rng((stream(held_out), self.options.seed, *key))

    def autocast(self) -> contextlib.AbstractContextManager:
        """bfloat16 matrix products, float32 weights."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16)

    def compiled(self, function: Callable) -> Callable:
        """`function`, in training steps compiled for fixed shapes if the options say so.

        The few held-out checks are not worth a second compilation.
        """
        if not self.options.compile:
            return function
        return _Compiled(self.model, function, torch.compile(function, dynamic=False))

    def parameters(self, stage: str) -> list[dict]:
        """Parameter groups for the optimiser: weight decay on matrices only."""
        for module in self.modules.values():
            module.requires_grad_(False)
        groups = []
        for module, share in self.trained(stage):
            module.requires_grad_(True)
            wide = [p for p in module.parameters() if p.ndim > 1]
            narrow = [p for p in module.parameters() if p.ndim <= 1]
            groups += [{"params": wide, "share": share}, {"params": narrow, "share": share, "weight_decay": 0.0}]
        return groups

    def check(self, stage: str, batches: int = 4) -> dict[str, float]:
        """Mean figures on a fixed set of held-out pictures, other ones than `samples()` draws."""
        for module in self.modules.values():
            module.eval()
        figures: dict[str, list[float]] = {}
        for number in range(batches):
            batch = {name: value.to(self.device) for name, value in self.batch(stage, -1 - number).items()}
            with torch.no_grad(), self.autocast():
                loss, found = self.loss(stage, batch, -1 - number)
            for name, value in {"loss": loss, **found}.items():
                figures.setdefault(name, []).append(float(value))
        for module in self.modules.values():
            module.train()
        return {name: round(float(np.nanmean(values)), 4) for name, values in figures.items()}

    def log(self, record: dict) -> None:
        """Append one line to the run's log and print it."""
        line = json.dumps(record)
        print(line, flush=True)
        with (self.out / "training_log.jsonl").open("a") as file:
            file.write(line + "\n")

    def save(self, stage: str, **state: object) -> None:
        """Checkpoint all modules and `state`."""
        everything = {name: module.state_dict() for name, module in self.modules.items()} | state
        torch.save(everything, self.work / f"{stage}.tmp")
        (self.work / f"{stage}.tmp").replace(self.work / f"{stage}.pt")

    def load(self, stage: str) -> dict | None:
        """A stage's checkpoint, or None."""
        path = self.work / f"{stage}.pt"
        return torch.load(path, map_location=self.device, weights_only=True) if path.exists() else None

    def needed(self, stage: str) -> dict:
        """A stage's checkpoint, which the next stage starts from.

        Raises:
            FileNotFoundError: the stage has not run.
        """
        state = self.load(stage)
        if state is None:
            raise FileNotFoundError(f"there is no {self.work / stage}.pt to start from: run stage {stage!r} first")
        return state

    def restore(self, state: dict) -> None:
        """Put all modules into the state of a checkpoint."""
        for name, module in self.modules.items():
            module.load_state_dict(state[name])

    def train(self, name: str) -> None:
        """Train one stage: warm-up, a constant rate, then a linear fall to zero where the stage has one."""
        stage = self.stages[self.number(name)]
        total, peak = getattr(self.options, f"{name}_steps"), getattr(self.options, f"{name}_lr")
        self.start_from(name)
        optimizer = torch.optim.AdamW(self.parameters(name), lr=peak, betas=(0.9, 0.98), weight_decay=0.02)
        state = self.load(name) if self.options.resume else None
        first, before = 0, 0.0
        if state is not None:
            self.restore(state)
            optimizer.load_state_dict(state["optimizer"])
            first, before = state["step"], state["minutes"]
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        loader = DataLoader(_Batches(self.batch, name, first, total), batch_size=None, num_workers=1, prefetch_factor=4)
        start = saved = time.monotonic()
        decay = max(1, round(stage.decay * total))
        running: list[float] = []
        for step, batch in enumerate(loader, first):
            rate = peak * min(1.0, (step + 1) / stage.warmup, (total - step) / decay)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            with self.autocast():
                loss, _ = self.loss(name, {k: v.to(self.device) for k, v in batch.items()}, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            running.append(float(loss.detach()))
            done, now = step + 1, time.monotonic()
            minutes = before + (now - start) / 60
            if done % self.options.check_every == 0 or done == total:
                record = {"stage": name, "step": done, "minutes": round(minutes, 2), "lr": round(rate, 6)}
                record |= {"pictures": done * self.size(name), "train_loss": round(float(np.mean(running)), 4)}
                self.log(record | {f"held_out_{k}": v for k, v in self.check(name).items()})
                running.clear()
            if now - saved > 180 or done == total:
                self.save(name, step=done, minutes=minutes, optimizer=optimizer.state_dict())
                saved = now


@dataclass(frozen=True)
class _Compiled:
    """``fast`` while ``model`` trains, and ``plain`` otherwise."""

    model: nn.Module
    plain: Callable
    fast: Callable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.fast if self.model.training else self.plain)(*args, **kwargs)


class _Batches(IterableDataset):
    """Training batches of one stage from a given step on."""

    def __init__(self, draw: Callable[[str, int], dict[str, Tensor]], stage: str, start: int, total: int) -> None:
        self.draw, self.stage, self.start, self.total = draw, stage, start, total

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for step in range(self.start, self.total):
            yield self.draw(self.stage, step)


def save_model(model: nn.Module, processor: Any, folder: Path, without: Sequence[str] = ()) -> None:
    """Write a model folder: float16 safetensors that load as float32, and the processor.

    ``without``: weights that are tied to others and need not be written.
    """
    config = model.config
    config.dtype = config.text_config.dtype = config.vision_config.dtype = "float32"
    weights = {name: value.half() for name, value in model.state_dict().items() if name not in without}
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)


def question_mask(block: Tensor, prefix: int) -> Tensor:
    """Attention mask of several questions in one sequence after a prefix of ``prefix`` places, which all of them see.

    Args:
        block: ``(B, L)`` which question each further place belongs to, -1 for padding.

    Returns:
        ``(B, 1, prefix + L, prefix + L)`` float32 to be added to logits: questions do not see each other.
    """
    block = F.pad(block, (prefix, 0), value=-2)
    causal = torch.ones(block.shape[1], block.shape[1], dtype=torch.bool, device=block.device).tril()
    seen = causal & ((block[:, :, None] == block[:, None, :]) | (block[:, None, :] == -2))
    return torch.zeros(seen.shape, device=block.device).masked_fill(~seen, -1e4)[:, None]


def some_places(size: int, count: int, keep: float, seed: int) -> Tensor:
    """Ascending random places (B, K), K a share `keep` of `count`."""
    noise = torch.rand(size, count, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(1)[:, : max(1, round(keep * count))].sort(1).values
