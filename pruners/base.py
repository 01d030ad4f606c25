"""What every method is made of: budgets, visual tokens and their layout, signals, stages and selections.

A method is a frozen dataclass of its paper's parameters. ``stages(model)`` returns where it acts (:class:`Hook`), what
it wants to read (:class:`Signal`) and the function that turns visual tokens into a :class:`Selection`. Nothing here
knows a model.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from foveate.errors import BudgetError, ParameterError

if TYPE_CHECKING:
    from PIL.Image import Image

Keep = int | float


class Hook(str, Enum):
    """Where a stage acts."""

    PIXELS = "pixels"  # in front of the vision tower
    LLM_INPUT = "llm_input"  # where the sequence enters the decoder
    LLM_LAYER = "llm_layer"  # in front of one decoder layer, in prefill


# --------------------------------------------------------------------------------------------------- visual tokens


@dataclass(frozen=True)
class View:
    """A rectangle of visual tokens: an image, a thumbnail, one AnyRes crop or one video frame.

    Token (r, c) has number ``start + r * stride + c`` among the tokens of its image.
    """

    rows: int
    cols: int
    start: int = 0
    stride: int = 0
    kind: str = "image"  # "image" | "thumbnail" | "crop" | "frame"

    @property
    def size(self) -> int:
        return self.rows * self.cols

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows, self.cols

    def tokens(self, device: torch.device | str | None = None) -> Tensor:
        """Numbers of the view's tokens in raster order, ``(rows * cols,)`` int64."""
        rows = torch.arange(self.rows, device=device) * (self.stride or self.cols)
        return (self.start + rows[:, None] + torch.arange(self.cols, device=device)).flatten()


@dataclass(frozen=True)
class Newline:
    """A separator embedding behind tokens ``first .. last - 1``; it occupies a place in the sequence, not a token number."""

    place: int
    first: int
    last: int


@dataclass(frozen=True)
class Layout:
    """How the visual tokens of one image or video lie on the picture and in the sequence.

    Tokens are numbered 0 .. N-1 in sequence order without separators; equal layouts are processed as one dense batch.
    """

    views: tuple[View, ...]
    newlines: tuple[Newline, ...] = ()

    @property
    def size(self) -> int:
        """Number of visual tokens N, separators not counted."""
        return sum(view.size for view in self.views)

    @property
    def length(self) -> int:
        """Places taken in the unpruned sequence, separators counted."""
        return self.size + len(self.newlines)

    @classmethod
    def grid(cls, rows: int, cols: int) -> Layout:
        """The layout of a single picture of ``rows x cols`` tokens."""
        return cls((View(rows, cols),))

    @classmethod
    def video(cls, frames: int, rows: int, cols: int) -> Layout:
        """The layout of a video: one view per (merged) frame."""
        return cls(tuple(View(rows, cols, start=t * rows * cols, kind="frame") for t in range(frames)))


@dataclass
class Tokens:
    """The visual tokens of B images of equal layout at one hook point.

    Attributes:
        embeds: ``(B, N, D)`` what the decoder would see (projected embeddings, or hidden states at ``llm_layer``).
        layout: the tokens' layout; at ``llm_layer`` that of the *unpruned* image.
        sample_ids: one number per image, stable under batching; seeds everything random.
        instruction: ``(B, T, D)`` embeddings of the non-visual tokens, zero where ``instruction_mask`` is False, or None.
        instruction_mask: ``(B, T)`` bool.
        instruction_ids: ``(B, T)`` token ids, -1 where masked.
        project: maps encoder features ``(..., C)`` to decoder embeddings ``(..., D)``; None where there is no projector.
    """

    embeds: Tensor
    layout: Layout
    sample_ids: tuple[int, ...] = ()
    instruction: Tensor | None = None
    instruction_mask: Tensor | None = None
    instruction_ids: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None

    @property
    def count(self) -> int:
        return self.embeds.shape[1]


@dataclass
class Selection:
    """Which visual tokens survive a stage, and what they carry.

    Attributes:
        index: ``(B, K)`` int64, surviving tokens, ascending and unique; methods with a content-dependent count pad
            rows on the right with -1.
        values: ``(B, K, D)`` new embeddings of the survivors (mergers), or None: they keep their own.
        owner: ``(B, N)`` the surviving token that speaks for each token, -1 if none does; None for pure pruners.
        scores: ``(B, N)`` float, higher is more worth keeping; only for people to look at.
        order: ``(B, K)`` permutation of 0 .. K-1: column ``order[b, j]`` of ``index`` enters the decoder as j-th; None = ascending.
    """

    index: Tensor
    values: Tensor | None = None
    owner: Tensor | None = None
    scores: Tensor | None = None
    order: Tensor | None = None


# --------------------------------------------------------------------------------------------------------- signals


@dataclass(frozen=True)
class Signal:
    """Something a stage wants to read. Tensors arrive per visual token, equal layouts stacked: ``(B, N, …)``.

    ``layer`` is a 0-based block of the vision encoder, or of the decoder for the ``Decoder…`` signals.
    """

    layer: int


@dataclass(frozen=True)
class ReceivedAttention(Signal):
    """``(B, N)`` attention received by each token: mean over heads and query rows of the softmax (or of the logits).

    ``queries="all"`` averages over class and register rows too, ``"patches"`` over the patch rows only. Prefix columns
    are dropped afterwards, nothing is renormalised.
    """

    queries: str = "all"
    logits: bool = False


@dataclass(frozen=True)
class GivenAttention(Signal):
    """``(B, N)`` attention each patch gives: mean over heads and the patch columns of its softmax row (or of the logits)."""

    logits: bool = False


@dataclass(frozen=True)
class ClassAttention(Signal):
    """``(B, N)`` attention that the class token pays to each patch, mean over heads."""


@dataclass(frozen=True)
class EncoderKeys(Signal):
    """``(B, N, d)`` attention keys, bias included, unscaled, mean over heads."""


@dataclass(frozen=True)
class EncoderFeatures(Signal):
    """``(B, N, C)`` output of the block."""


@dataclass(frozen=True)
class ClassFeatures(Signal):
    """``(B, V, C)`` class token of the block's output, one per view of the layout."""


@dataclass(frozen=True)
class LastTokenAttention(Signal):
    """``(B, N)`` attention that the last prompt token pays to each present visual token in decoder layer ``layer``."""


@dataclass(frozen=True)
class CrossModalAttention(Signal):
    """``(B, 2)`` shares of attention text -> visual and visual -> text in decoder layer ``layer`` (whole sample).

    Text are all non-visual tokens but the first ``system_tokens`` of the prompt (None: all in front of the first image).
    """

    system_tokens: int | None = None


# ---------------------------------------------------------------------------------------------------------- method


@dataclass(frozen=True)
class ModelInfo:
    """What a method may know about the model it is attached to.

    Attributes:
        family: adapter name (``"llava"``, ``"qwen2_5_vl"``, …); tower: class name of the vision tower.
        encoder_layers: number of encoder blocks; feature_layer: the 0-based block whose output feeds the projector.
        class_token: whether the tower has one.
        decoder_layers: number of decoder layers; mrope: three-axis positions.
        full_attention: encoder blocks without windows (all of them for most towers).
    """

    family: str = "none"
    tower: str = "none"
    encoder_layers: int = 24
    feature_layer: int = 22
    class_token: bool = True
    decoder_layers: int = 32
    mrope: bool = False
    full_attention: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Stage:
    """One place where a method acts.

    Attributes:
        hook: the hook point; layer: which decoder layer, for ``Hook.LLM_LAYER``.
        select: ``select(tokens, **signals) -> Selection``; at ``llm_layer`` the index runs over the tokens still there.
            At ``Hook.PIXELS`` it is ``select(pixel_values) -> pixel_values``.
        signals: argument name -> what to read.
        positions: ``"keep"`` or ``"compact"`` where the method's specification demands one; None = the family's custom
            (compact for one-axis positions, keep for m-RoPE).
        newlines: what becomes of separators: ``"rows"`` keeps those whose row keeps a token, ``"drop"`` none, ``"keep"`` all.
    """

    hook: Hook
    select: Callable[..., Any]
    signals: Mapping[str, Signal] = field(default_factory=dict)
    layer: int = 0
    positions: str | None = None
    newlines: str = "rows"


@dataclass(frozen=True)
class Pruner:
    """Base of all methods. Subclasses are frozen dataclasses whose fields are the paper's parameters.

    Class attributes (for ``foveate list`` and ``foveate show``): ``name`` is set by :func:`register`; ``title``, ``paper``,
    ``cost`` and ``families`` describe the method; ``adaptive`` is True when the number of kept tokens depends on content.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    families: ClassVar[tuple[str, ...]] = ("all",)
    adaptive: ClassVar[bool] = False

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        """Where the method acts on this model.

        Raises:
            MissingSignalError: the model cannot provide what the method reads.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement stages()")

    def kept(self, n_tokens: int, grid: tuple[int, int] | None = None) -> int:
        """How many of ``n_tokens`` visual tokens of one image survive (the last stage that prunes)."""
        raise NotImplementedError(f"{type(self).__name__} keeps a content-dependent number of tokens")

    def prepare(self, image: Image) -> Image:
        """What to do to a picture before the processor sees it; the identity for all methods that act in the model."""
        return image

    def parameters(self) -> dict[str, Any]:
        """The method's parameters by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


# --------------------------------------------------------------------------------------------------------- budgets


def check_keep(keep: Keep) -> Keep:
    """Return ``keep`` if it is a fraction in (0, 1] or an integer >= 1.

    Raises:
        BudgetError: it is not.
    """
    whole = isinstance(keep, int) and not isinstance(keep, bool)
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise BudgetError(
            f"keep={keep!r} is a {type(keep).__name__}; give a fraction in (0, 1] or a number of tokens >= 1"
        )
    if whole and keep < 1:
        raise BudgetError(f"keep={keep} tokens leaves no visual token; give at least 1, or a fraction in (0, 1]")
    if not whole and not (0.0 < keep <= 1.0):
        raise BudgetError(f"keep={keep} is no fraction in (0, 1]; for a number of tokens pass an int")
    return keep


def budget(keep: Keep, n_tokens: int, rounding: Callable[[float], int] = round) -> int:
    """Tokens kept of ``n_tokens``: ``keep`` itself if integral (at most ``n_tokens``, said once in a warning), else
    ``rounding(keep * n_tokens)``, at least 1. ``round`` is Python's (half to even)."""
    if isinstance(keep, int):
        if keep > n_tokens:
            warnings.warn(f"keep={keep} exceeds the {n_tokens} visual tokens of an image; all are kept", stacklevel=2)
        return min(keep, n_tokens)
    return max(1, min(n_tokens, int(rounding(keep * n_tokens))))


def floor(x: float) -> int:
    """``math.floor`` that forgives the last bit, so that 0.29 * 100 counts as 29."""
    return math.floor(x + 1e-9)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise :class:`ParameterError` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ParameterError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


# -------------------------------------------------------------------------------------------------------- selecting


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest scores along the last axis, ascending: ``(…, N) -> (…, k)`` int64.

    Ties go to the lower index, NaN counts as lowest; arithmetic in float32.
    """
    scores = scores.float().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :k].sort(dim=-1).values


def gather(values: Tensor, index: Tensor) -> Tensor:
    """``values (B, N, …)`` at ``index (B, K)`` -> ``(B, K, …)``."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]


def split_budget(total: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Share ``total`` among parts in proportion to ``sizes``, exactly (largest remainders, earlier part first)."""
    whole = sum(sizes)
    shares = [total * size // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % whole), i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return tuple(shares)


def per_view(
    tokens: Tokens,
    budgets: tuple[int, ...],
    select: Callable[..., Selection],
    **signals: Tensor,
) -> Selection:
    """Run ``select(view_tokens, k, **view_signals)`` on every view by itself and join the results.

    Views of equal grid and budget are stacked into one batch. ``signals`` of shape ``(B, N, …)`` are cut to the view's
    tokens, those of shape ``(B, V, …)`` with V views (V != N) to the view's row. ``budgets`` has one entry per view; a
    view with budget 0 keeps nothing.
    """
    views = tokens.layout.views
    if len(views) == 1:
        return select(
            tokens, budgets[0], **{name: s[:, 0] if _by_view(s, tokens) else s for name, s in signals.items()}
        )
    batch = len(tokens.embeds)
    device = tokens.embeds.device
    groups: dict[tuple[tuple[int, int], int], list[int]] = {}
    for v, (view, k) in enumerate(zip(views, budgets)):
        if k:
            groups.setdefault((view.grid, k), []).append(v)
    parts = []
    for (grid, k), members in groups.items():
        where = torch.stack([views[v].tokens(device) for v in members])  # (M, n)

        def cut(x: Tensor, where: Tensor = where, members: list[int] = members) -> Tensor:
            x = x[:, members] if _by_view(x, tokens) else x[:, where]  # (B, M, …)
            return x.flatten(0, 1)

        part = Tokens(
            embeds=cut(tokens.embeds),
            layout=Layout.grid(*grid),
            sample_ids=tuple(s * len(views) + v for s in tokens.sample_ids for v in members),
            instruction=_repeat(tokens.instruction, len(members)),
            instruction_mask=_repeat(tokens.instruction_mask, len(members)),
            instruction_ids=_repeat(tokens.instruction_ids, len(members)),
            project=tokens.project,
        )
        chosen = select(part, k, **{name: cut(s) for name, s in signals.items()})
        parts.append((where, chosen))
    return _join(parts, batch, tokens.count, device)


def _by_view(signal: Tensor, tokens: Tokens) -> bool:
    return signal.ndim > 1 and signal.shape[1] == len(tokens.layout.views) != tokens.count


def _repeat(x: Tensor | None, times: int) -> Tensor | None:
    return None if x is None else x.repeat_interleave(times, dim=0)


def _join(parts: list[tuple[Tensor, Selection]], batch: int, count: int, device: torch.device) -> Selection:
    """Merge the selections of disjoint token groups ``where (M, n)`` into one over all ``count`` tokens."""
    index, values, emitted = [], [], []
    scores = torch.full((batch, count), float("nan"), device=device)
    owner = torch.full((batch, count), -1, dtype=torch.long, device=device)
    for where, chosen in parts:
        members, n = where.shape
        rows = where.repeat(batch, 1)  # (B * M, n), row b * M + m is view m
        mapped = rows.gather(1, chosen.index).unflatten(0, (batch, members))  # (B, M, k)
        order = torch.arange(mapped.shape[-1], device=device) if chosen.order is None else chosen.order
        emitted.append(order.expand(batch * members, -1).unflatten(0, (batch, members)))
        index.append(mapped)
        if chosen.values is not None:
            values.append(chosen.values.unflatten(0, (batch, members)))
        if chosen.scores is not None:
            scores[:, where] = chosen.scores.float().unflatten(0, (batch, members))
        if chosen.owner is not None:
            local = chosen.owner.unflatten(0, (batch, members))
            spoken = where.expand(batch, -1, -1).gather(2, local.clamp(min=0))
            owner[:, where] = torch.where(local >= 0, spoken, -1)
    flat = torch.cat([i.flatten(1) for i in index], dim=1)
    ascending, perm = flat.sort(dim=1)
    joined = Selection(ascending, scores=scores if any(p.scores is not None for _, p in parts) else None)
    if values:
        joined.values = gather(torch.cat([v.flatten(1, 2) for v in values], dim=1), perm)
    if any(p.owner is not None for _, p in parts):
        joined.owner = owner
    if any(p.order is not None for _, p in parts):
        joined.order = _joined_order(emitted, perm)
    return joined


def _joined_order(emitted: list[Tensor], perm: Tensor) -> Tensor:
    """Views speak one after the other, each in its own order; returned as columns of the sorted joint index."""
    offset, flat = 0, []
    for order in emitted:  # (B, M, k)
        members, k = order.shape[1:]
        base = offset + k * torch.arange(members, device=order.device)[:, None]
        flat.append((order + base).flatten(1))
        offset += members * k
    return perm.argsort(dim=1).gather(1, torch.cat(flat, dim=1))
