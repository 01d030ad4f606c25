"""Merge tokens inside the blocks of a vision transformer, whichever library it comes from.

A :class:`Tower` says where a model's blocks are; a :class:`OpenBlock` opens one block between attention and MLP.
Attached, every block that merges gets a ``forward`` of its own on the *instance*, which runs the block's own
modules; what happens in a call lives in :class:`BlockMerger`, never on the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.adapters.taps import exactly
from foveate.cuda import merge_tokens
from foveate.cuda.merging import merged_sizes, size_bias
from foveate.errors import AttachError, UnsupportedModelError
from foveate.pruners.core import InTower, ModelInfo, Pruner
from foveate.pruners.core.merging import BlockKeys, BlockTokens, Groups, owners

TOWERS: list[type[Tower]] = []


class OpenBlock(ABC):
    """One block, open between its attention and its MLP. ``classes`` names the block classes that a subclass serves."""

    classes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    @abstractmethod
    def attend(self, x: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """The block up to and with the attention's residual; ``bias (B, 1, 1, N)`` is added to the logits of every
        key.
        """

    @abstractmethod
    def feed(self, x: Tensor) -> Tensor:
        """The rest of the block."""

    @abstractmethod
    def listen(self, tell: Callable[[Tensor, int], None]) -> Any:
        """Call ``tell(keys, dim)`` with the keys of all heads, ``(B, H, N, d)`` or ``(B, N, H, d)``, and the
        dimension of the heads; returns a hook's handle.
        """


class Tower(ABC):
    """The transformer of one vision model. Subclasses register by naming their ``family``."""

    family: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.family:
            TOWERS.append(cls)

    def __init__(self, model: nn.Module, trunk: Any) -> None:
        self.model, self.trunk = model, trunk

    @classmethod
    @abstractmethod
    def find(cls, model: nn.Module) -> Tower | None:
        """The tower of ``model`` if it is of this family.

        Raises:
            UnsupportedModelError: it is, but tokens cannot leave it.
        """

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in order."""

    @property
    @abstractmethod
    def prefix(self) -> int:
        """Class, distillation and register rows before the patches."""

    @abstractmethod
    def open_block(self, block: nn.Module) -> OpenBlock:
        """The block opened.

        Raises:
            UnsupportedModelError: it cannot be.
        """

    @abstractmethod
    def pooled(self, merger: BlockMerger) -> None:
        """Make what follows the blocks count tokens by size, through ``merger.hook`` and ``merger.replace``."""

    @abstractmethod
    def check(self, stages: Sequence[InTower]) -> None:
        """Raise :class:`UnsupportedModelError` if these stages cannot run here."""

    @property
    def checkpointing(self) -> bool:
        """Whether blocks run a second time in the backward pass."""
        return False

    @property
    def info(self) -> ModelInfo:
        """What methods may know of the tower."""
        depth = len(self.blocks)
        return ModelInfo(
            family=self.family,
            tower=type(self.trunk).__name__,
            encoder_layers=depth,
            feature_layer=depth - 1,
            class_token=self.prefix > 0,
            decoder_layers=0,
            prefix_tokens=self.prefix,
        )

    def refuse(self, block: nn.Module, why: str) -> UnsupportedModelError:
        """The error for a block that cannot be opened."""
        return UnsupportedModelError(
            f"tokens cannot be merged in {type(block).__name__} of {type(self.model).__name__}: {why}"
        )


def tower_for(model: nn.Module) -> Tower | None:
    """The tower of a vision model of a known family, None for anything else.

    Raises:
        UnsupportedModelError: a vision model whose tokens cannot be merged.
    """
    return next((tower for family in TOWERS if (tower := family.find(model)) is not None), None)


def lineage(model: nn.Module, library: str) -> set[str]:
    """Names of the model's classes that come from ``library``."""
    return {cls.__name__ for cls in type(model).__mro__ if cls.__module__.partition(".")[0] == library}


@dataclass
class MergeTrace:
    """What one call merged inside the tower.

    Attributes:
        method: registry name.
        parameters: the method's.
        prefix: rows before the patches.
        counts: rows that entered each block, and those that left the last one that ran.
    """

    method: str
    parameters: dict[str, Any]
    prefix: int
    counts: list[int] = field(default_factory=list)
    _groups: list[tuple[int, Groups]] = field(default_factory=list, repr=False)
    _batch: tuple[int, torch.device] = field(default=(0, torch.device("cpu")), repr=False)

    def rows(self, layer: int | None = None) -> Tensor:
        """``(B, N)`` int64: the row that contains each original row at the entry of block ``layer`` (None: at the
        end).
        """
        return self._follow(layer, lambda rows, groups: owners(groups).gather(1, rows))

    def origins(self, layer: int | None = None) -> Tensor:
        """``(B, K)`` int64: the original row whose place each row at the entry of block ``layer`` (None: at the end)
        took.
        """
        return self._follow(layer, lambda origins, groups: origins.gather(1, groups.keep))

    def _follow(self, layer: int | None, step: Callable[[Tensor, Groups], Tensor]) -> Tensor:
        batch, device = self._batch
        rows = torch.arange(self.counts[0], device=device).expand(batch, -1)
        for at, groups in self._groups:
            if layer is None or at < layer:
                rows = step(rows, groups)
        return rows

    @property
    def kept(self) -> Tensor:
        """``(B, K)`` int64: patches whose places are still taken, ascending, prefix not counted."""
        return self.origins()[:, self.prefix :].sort(dim=1).values - self.prefix

    @property
    def owner(self) -> Tensor:
        """``(B, n)`` int64: for every patch the patch that speaks for it, prefix not counted."""
        return self.origins().gather(1, self.rows()[:, self.prefix :]) - self.prefix

    def unmerge(self, features: Tensor, layer: int | None = None) -> Tensor:
        """Give every original row the features of the row that contains it: ``(B, K, C) -> (B, N, C)``.

        ``features`` are rows at the end of the tower (or at the entry of block ``layer``), with the prefix or without.
        """
        rows = self.rows(layer)
        if features.shape[1] == int(self.counts[-1] if layer is None else self.counts[layer]) - self.prefix:
            rows = rows[:, self.prefix :] - self.prefix
        return features[torch.arange(len(rows), device=rows.device)[:, None], rows]

    def __str__(self) -> str:
        given = ", ".join(f"{k}={v!r}" for k, v in self.parameters.items())
        return f"{self.method}({given})\n  rows per block: {', '.join(map(str, self.counts))}"


class BlockMerger:
    """A merging method on a tower. ``trace`` tells what happened in the last call, None before."""

    def __init__(self, tower: Tower, pruner: Pruner, stages: Sequence[InTower]) -> None:
        tower.check(stages)
        self.tower, self.pruner = tower, pruner
        self.trace: MergeTrace | None = None
        self.active = True  # blocks run as their own while it is False
        self.sizes: Tensor | None = None  # (B, N) patches in each row; None = one each
        self._due = False  # the running block will merge
        self._keys: Tensor | None = None  # of the running block, summed over heads
        self._bias: Tensor | None = None  # of the current sizes
        self._undo: list[Callable[[], None]] = []
        self.holder: object = None  # whoever must live as long as the merger acts
        opened = [(stage, tower.open_block(tower.blocks[stage.layer])) for stage in stages]
        try:
            for stage, block in opened:
                self._open(stage, block, first=stage is stages[0])
            tower.pooled(self)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Give the model back what was its own."""
        while self._undo:
            self._undo.pop()()
        self.sizes = self._keys = self._bias = None
        self._due = False

    # ---------------------------------------------------------------------------------------- what towers change with

    def replace(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of one instance until the merger is removed."""
        own = vars(module)
        before = (own[name],) if name in own else ()

        def undo() -> None:
            own.pop(name, None)
            if before:
                own[name] = before[0]

        own[name] = value  # not setattr: a bound method of a module is not a sub-module
        self._undo.append(undo)

    def hook(self, handle: Any) -> None:
        """Remove a hook together with the merger."""
        self._undo.append(handle.remove)

    def key_bias(self, dtype: torch.dtype, first: int = 0) -> Tensor | None:
        """``(B, 1, 1, N - first)`` log sizes to add to attention logits; None while all sizes are one."""
        if self.sizes is None:
            return None
        if self._bias is None:
            self._bias = size_bias(self.sizes)
        bias = self._bias[..., first:] if first else self._bias
        return bias.to(dtype)

    def mean(self, x: Tensor, first: int) -> Tensor:
        """Mean over patches of the rows ``x (B, N, C)`` from number ``first`` on, each counted by its size: ``(B,
        C)``.
        """
        if self.sizes is None:
            return x[:, first:].mean(dim=1)
        sizes = self.sizes[:, first:, None]
        return ((x[:, first:] * sizes).sum(dim=1) / sizes.sum(dim=1)).to(x.dtype)

    def weigh_attention(self, pool: nn.MultiheadAttention) -> None:
        """Let an attention pooling ``pool(query, rows, rows)`` count rows by size."""

        def before(module: nn.MultiheadAttention, args: Any, kwargs: dict[str, Any]) -> Any:
            bias = self.key_bias(args[0].dtype)
            if bias is None:
                return None
            shape = (len(args[1]), module.num_heads, args[0].shape[1], args[1].shape[1])
            return args, {**kwargs, "attn_mask": bias.expand(shape).flatten(0, 1)}

        self.hook(pool.register_forward_pre_hook(before, with_kwargs=True))

    def refuse_intermediates(self, instead: str) -> None:
        """Make the trunk's ``forward_intermediates`` fail, which lays rows out on the grid; ``instead``: what to
        use.
        """

        def refused(*args: Any, **kwargs: Any) -> Any:
            raise AttachError(
                f"{type(self.tower.model).__name__}.forward_intermediates lays rows out on the grid, and "
                f"{self.pruner.name} "
                f"merges them; detach, or use {instead}"
            )

        self.replace(self.tower.trunk, "forward_intermediates", refused)

    # ------------------------------------------------------------------------------------------------------ the blocks

    def _open(self, stage: InTower, opened: OpenBlock, first: bool) -> None:
        block, listens = opened.block, any(isinstance(s, BlockKeys) for s in stage.signals.values())
        original = block.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not self.active:
                return original(x, *args, **kwargs)
            if first:
                self._begin(x)
            return self._run(stage, opened, original, x, args, kwargs)

        if listens:
            self.hook(opened.listen(self._hear))
        self.replace(block, "forward", forward)

    def _hear(self, keys: Tensor, heads_dim: int) -> None:
        if self._due:  # reduced at once: kept, they would hold memory that attention can use again
            self._keys = keys.detach().sum(heads_dim, dtype=torch.float32)

    def _begin(self, x: Tensor) -> None:
        if self.tower.checkpointing and torch.is_grad_enabled():
            raise AttachError(
                f"{self.pruner.name} cannot merge under gradient checkpointing, which runs blocks twice; switch it off"
            )
        self.sizes = self._keys = self._bias = None
        self._due = False
        self.trace = MergeTrace(
            self.pruner.name, self.pruner.parameters(), self.tower.prefix, [x.shape[1]], _batch=(len(x), x.device)
        )

    def _run(self, stage: InTower, opened: OpenBlock, original: Any, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        trace = self.trace
        if trace is None or x.shape[1] != trace.counts[-1]:
            raise AttachError(
                f"block {stage.layer} of {type(self.tower.model).__name__} got {x.shape[1]} rows out of turn; with "
                f"{self.pruner.name} attached, blocks run in order, once per call"
            )
        count = stage.removes(x.shape[1])
        if not count and not trace._groups:  # nothing has merged, nothing will: the block's own business
            trace.counts.append(x.shape[1])
            return original(x, *args, **kwargs)
        bias = self.key_bias(x.dtype) if stage.proportional else None
        self._due = count > 0
        x = opened.attend(x, bias, *args, **self._moved(kwargs))
        keys, self._keys, self._due = self._keys, None, False
        if not stage.after_mlp:
            x = self._merge(stage, x, count, keys)
        x = opened.feed(x)
        if stage.after_mlp:
            x = self._merge(stage, x, count, keys)
        trace.counts.append(x.shape[1])
        return x

    def _moved(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Rotary tables, which the caller keeps passing for all patches, at the patches that are still there."""
        rope = kwargs.get("rope")
        if rope is None or not self.trace._groups:
            return kwargs
        if rope.ndim not in (2, 3):  # (n, 2d), or (H, n, 2d) where every head has its own
            raise AttachError(
                f"a rotary table of shape {tuple(rope.shape)} differs by picture already; switch patch dropout off"
            )
        places = self.trace.origins()[:, self.tower.prefix :] - self.tower.prefix  # (B, n)
        table = rope[places][:, None] if rope.ndim == 2 else rope[:, places].transpose(0, 1)
        return {**kwargs, "rope": table}

    def _merge(self, stage: InTower, x: Tensor, count: int, keys: Tensor | None) -> Tensor:
        if not count:
            return x
        groups = exactly(_chosen, x, stage, self.tower.prefix, count, keys)
        places = groups.keep, groups.source, groups.target
        if stage.weighting == "size":
            x, self.sizes = merge_tokens(x, *places, self.sizes)
        else:
            if stage.weighting == "mean":
                x, _ = merge_tokens(x, *places)
            else:
                x = x[torch.arange(len(x), device=x.device)[:, None], groups.keep]
            self.sizes = merged_sizes(*places, self.sizes)
        self._bias = None
        self.trace._groups.append((stage.layer, groups))
        return x


def _chosen(x: Tensor, stage: InTower, prefix: int, count: int, keys: Tensor | None) -> Groups:
    return stage.select(BlockTokens(x, prefix, count), **dict.fromkeys(stage.signals, keys))
