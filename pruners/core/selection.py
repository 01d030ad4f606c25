"""From a budget to a selection: how many tokens each view keeps, which have the best scores, one view at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.pruners.core.parameters import Keep
from foveate.pruners.core.tokens import Layout, Selection, Tokens

# --------------------------------------------------------------------------------------------------------- budgets


def budget(keep: Keep, n_tokens: int, rounding: Callable[[float], int] = round) -> int:
    """Tokens kept of ``n_tokens``: ``keep`` itself if integral (at most ``n_tokens``, said once in a warning), else
    ``rounding(keep * n_tokens)``, at least 1. ``round`` is Python's (half to even)."""
    if isinstance(keep, int):
        if keep > n_tokens:
            warnings.warn(f"keep={keep} exceeds the {n_tokens} visual tokens of an image; all are kept", stacklevel=2)
        return min(keep, n_tokens)
    return min(n_tokens, max(1, int(rounding(keep * n_tokens))))


def floor(x: float) -> int:
    """``math.floor`` that forgives the last bit, so that 0.29 * 100 counts as 29."""
    return math.floor(x + 1e-9)


def split_budget(total: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Share ``total`` among parts in proportion to ``sizes``, exactly (largest remainders, earlier part first)."""
    whole = sum(sizes)
    shares = [total * size // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % whole), i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return tuple(shares)


def view_budgets(keep: Keep, layout: Layout, rounding: Callable[[float], int] = round) -> tuple[int, ...]:
    """The :func:`budget` of a whole layout, shared among its views in proportion to their token counts."""
    return split_budget(budget(keep, layout.size, rounding), tuple(view.size for view in layout.views))


# ---------------------------------------------------------------------------------------------------- best by score


def ranked(scores: Tensor) -> Tensor:
    """Indices from the largest to the smallest score along the last axis: ``(…, N) -> (…, N)`` int64.

    Ties go to the lower index, NaN counts as lowest; arithmetic in float32.
    """
    scores = scores.float().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    return scores.argsort(dim=-1, descending=True, stable=True)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest scores along the last axis, :func:`ranked`, but ascending: ``(…, N) -> (…, k)`` int64."""
    return ranked(scores)[..., :k].sort(dim=-1).values


def among_top(scores: Tensor, k: int | Tensor) -> Tensor:
    """Which scores are among the ``k`` largest of their row, :func:`ranked`: ``(B, N)`` bool; ``k`` may be ``(B, 1)``."""
    return ranked(scores).argsort(dim=1) < k


def kept_tokens(kept: Tensor, most: int | None = None) -> Tensor:
    """Ascending indices of a ``(B, N)`` bool mask, rows padded on the right with -1.

    ``most``: the largest count of a row where it is known; None counts, for which the host waits for the device.
    """
    most = int(kept.sum(dim=1).max()) if most is None else most
    order = (~kept).long().argsort(dim=1, stable=True)[:, :most]
    return order.masked_fill(~kept.gather(1, order), -1)


def gather(values: Tensor, index: Tensor) -> Tensor:
    """``values (B, N, …)`` at ``index (B, K)`` -> ``(B, K, …)``."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]


def keep_all(tokens: Tokens) -> Selection:
    """The selection that changes nothing."""
    return Selection(torch.arange(tokens.count, device=tokens.embeds.device).expand(len(tokens.embeds), -1))


def seeded(seed: int, tokens: Tokens) -> list[torch.Generator]:
    """One CPU generator per image, from ``seed`` and the image's id alone: the same draw on every device, in every batch."""
    ids = tokens.sample_ids or range(len(tokens.embeds))
    return [torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + i) % 2**63) for i in ids]


def view_id(sample: int, view: int) -> int:
    """An id in 0 .. 2**64 - 1 for one of several views of image ``sample``, unlike that of any other view or image.

    Step ``view + 1`` of the SplitMix64 generator seeded with the image's id (Steele et al., OOPSLA 2014).
    """
    x = (sample + (view + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


# ----------------------------------------------------------------------------------------------------- view by view


def per_view(
    tokens: Tokens,
    budgets: tuple[int, ...],
    select: Callable[..., Selection],
    **signals: Tensor,
) -> Selection:
    """Run ``select(view_tokens, k, **view_signals)`` on every view by itself and join the results.

    Views of equal grid and budget are stacked into one batch. ``signals`` of shape ``(B, N, …)`` are cut to the view's
    tokens, those of shape ``(B, V, …)`` with V views (V != N) to the view's row. ``budgets`` has one entry per view; a
    view with budget 0 keeps nothing, one whose budget is not below its size keeps everything without asking ``select``.
    An only view goes by its image's id, one of several by its :func:`view_id`.
    """
    views = tokens.layout.views
    if all(k >= view.size for view, k in zip(views, budgets)):
        return keep_all(tokens)
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
            sample_ids=tuple(view_id(s, v) for s in tokens.sample_ids or range(batch) for v in members),
            instruction=_repeat(tokens.instruction, len(members)),
            instruction_mask=_repeat(tokens.instruction_mask, len(members)),
            instruction_ids=_repeat(tokens.instruction_ids, len(members)),
            project=tokens.project,
        )
        if k >= part.count:
            chosen = keep_all(part)
        else:
            chosen = select(part, k, **{name: cut(s) for name, s in signals.items()})
        parts.append(_Part(tuple(members), where, part, chosen))
    return _join(parts, batch, tokens.count, device)


def _by_view(signal: Tensor, tokens: Tokens) -> bool:
    return signal.ndim > 1 and signal.shape[1] == len(tokens.layout.views) != tokens.count


def _repeat(x: Tensor | None, times: int) -> Tensor | None:
    return None if x is None else x.repeat_interleave(times, dim=0)


@dataclass
class _Part:
    """M views of equal grid and budget, selected as one batch: row ``b * M + m`` is member m of image b."""

    members: tuple[int, ...]
    where: Tensor  # (M, n) token numbers
    tokens: Tokens
    chosen: Selection


def _join(parts: list[_Part], batch: int, count: int, device: torch.device) -> Selection:
    """Merge the selections of disjoint views into one over all ``count`` tokens; -1 in an index means no token."""
    chosen = [part.chosen for part in parts]
    merging = any(c.values is not None for c in chosen)
    speaking = any(c.owner is not None for c in chosen)
    scores = torch.full((batch, count), float("nan"), device=device)
    owner = torch.full((batch, count), -1, dtype=torch.long, device=device)
    index, values, emitted = [], [], {}
    for part in parts:
        members, c = len(part.members), part.chosen
        rows = part.where.repeat(batch, 1)  # (B * M, n)
        mapped = rows.gather(1, c.index.clamp(min=0)).masked_fill(c.index < 0, count)  # absent ones sort to the end
        k = mapped.shape[1]
        start = sum(i.shape[1] for i in index)
        index.append(mapped.unflatten(0, (batch, members)).flatten(1))
        order = torch.arange(k, device=device) if c.order is None else c.order
        for m, (view, one) in enumerate(
            zip(part.members, order.expand(batch * members, -1).unflatten(0, (batch, -1)).unbind(1))
        ):
            emitted[view] = one + start + m * k
        if merging:
            own = gather(part.tokens.embeds, c.index.clamp(min=0)) if c.values is None else c.values
            values.append(own.unflatten(0, (batch, members)).flatten(1, 2))
        if c.scores is not None:
            scores[:, part.where] = c.scores.float().unflatten(0, (batch, members))
        if speaking:
            own = torch.full_like(rows, -1) if c.owner is None else c.owner
            if c.owner is None:  # a view that merged nothing: survivors speak for themselves
                own.scatter_(1, c.index.clamp(min=0), c.index)
            owner[:, part.where] = torch.where(own >= 0, rows.gather(1, own.clamp(min=0)), -1).unflatten(
                0, (batch, members)
            )
    ascending, perm = torch.cat(index, dim=1).sort(dim=1)
    joined = Selection(ascending.masked_fill(ascending == count, -1))
    if any(c.scores is not None for c in chosen):
        joined.scores = scores
    if merging:
        joined.values = gather(torch.cat(values, dim=1), perm)
    if speaking:
        joined.owner = owner
    if any(c.order is not None for c in chosen):  # views enter one after the other, each in its own order
        joined.order = perm.argsort(dim=1).gather(1, torch.cat([emitted[v] for v in sorted(emitted)], dim=1))
    return joined
