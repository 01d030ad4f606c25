"""Several processes that share the samples of one bench, as `torchrun` or `accelerate launch` start them."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foveate.errors import ParameterError

__all__ = ["World", "world"]

_PATIENCE = datetime.timedelta(days=7)  # the slowest process may take that much longer than the fastest


@dataclass(frozen=True)
class World:
    """The processes that share a bench.

    Attributes:
        rank: which one this is.
        size: how many there are.
        local_rank: which one this is on its machine.
        node: which machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    node: int = 0

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def file(self, path: str | os.PathLike[str]) -> str:
        """The result file of this machine: SQLite must not be shared over a network."""
        return f"{os.fspath(path)}.node{self.node}" if self.node else os.fspath(path)

    def mine(self, batch: int) -> bool:
        """Whether batch number ``batch`` is this process's share."""
        return batch % self.size == self.rank

    def exchange(self, value: Any) -> list[Any]:
        """Everybody's ``value``, in order of rank; waits for all processes."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """Let go of the other processes."""
        import torch.distributed as dist

        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def world(environment: Mapping[str, str] = os.environ) -> World:
    """The processes that the launcher started, by its environment variables.

    Raises:
        ParameterError: `accelerate launch` was asked for several processes and started one, which would do all the
            work.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK")
        return World(*(int(environment.get(name, 0)) for name in names))
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment:
        raise ParameterError(
            "accelerate launch was asked for several processes but started only this one (it does so for --cpu without "
            "--multi_cpu, for example); start them with `python -m torch.distributed.run --nproc_per_node N -m "
            "foveate.cli bench ...`, or ask for --num_processes 1"
        )
    return World()
