"""From a budget to a selection: how many tokens each view keeps, which have the best scores, one view at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foveate.pruners.core.parameters import Keep
from foveate.pruners.core.tokens import Layout, Selection, Tokens

# ------------------------------------------------------------------------------------------------------------- budgets


def budget(keep: Keep, n_tokens: int, rounding: Callable[[float], int] = round) -> int:
    """Tokens kept of ``n_tokens``: ``keep`` itself if integral (at most ``n_tokens``, said once in a warning), else
    ``rounding(keep * n_tokens)``, at least 1. ``round`` is Python's (half to even).
    """
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


def view_budgets(keep: Keep, layout: Layout) -> tuple[int, ...]:
    """The :func:`budget` of a whole layout, shared among its views in proportion to their token counts."""
    return split_budget(budget(keep, layout.size), layout.sizes)


# ------------------------------------------------------------------------------------------------------- best by score


def ranked(scores: Tensor) -> Tensor:
    """Indices from the largest to the smallest score along the last axis: ``(…, N) -> (…, N)`` int64.

    Ties go to the lower index, NaN counts as lowest; arithmetic in float32.
    """
    scores = scores.float().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    return scores.argsort(dim=-1, descending=True, stable=True)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest scores along the last axis, as :func:`ranked`, ascending: ``(…, N) -> (…, k)``."""
    return ranked(scores)[..., :k].sort(dim=-1).values


def best(tokens: Tokens, k: int, scores: Tensor) -> Selection:
    """The ``k`` of ``tokens`` that have the highest ``scores (B, N)``, ties to the lower number."""
    return Selection(top_k(scores, k), scores=scores)


def among_top(scores: Tensor, k: int | Tensor) -> Tensor:
    """Which scores are among the ``k`` largest of a row, :func:`ranked`: ``(B, N)`` bool; ``k`` may be ``(B, 1)``."""
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


def largest_fitting(most: int, images: Tensor, fits: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The largest k in 0 .. ``most`` of every image, ``(B,)`` as ``images``, for which ``fits(k (M,), rows (M,))``
    holds, by bisection.
    """
    low, high = torch.zeros_like(images), torch.full_like(images, most)
    while len(rows := (low < high).nonzero()[:, 0]):
        middle = (low[rows] + high[rows] + 1) // 2
        good = fits(middle, rows)
        low[rows] = torch.where(good, middle, low[rows])
        high[rows] = torch.where(good, high[rows], middle - 1)
    return low


def stacked(chosen: Sequence[Selection]) -> Selection:
    """One batch of selections of single images: rows are padded on the right, the index with -1, values with zeros."""
    whole: dict[str, Tensor] = {}
    for name, filling in (("index", -1), ("values", 0), ("owner", -1), ("scores", 0)):
        rows = [getattr(one, name) for one in chosen]
        given = next((row for row in rows if row is not None), None)
        if given is not None:  # where an image has none it has nothing to say
            rows = [given[0, :0] if row is None else row[0] for row in rows]
            whole[name] = pad_sequence(rows, batch_first=True, padding_value=filling)
    follow = None if chosen[0].resample is None else [one.resample[0] for one in chosen]
    return Selection(**whole, resample=follow)


def seeded(seed: int, tokens: Tokens) -> list[torch.Generator]:
    """One CPU generator per image, of ``seed`` and the image's id alone: equal draws on all devices, in all batches."""
    return [torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + i) % 2**63) for i in tokens.ids]


def view_id(sample: int, view: int) -> int:
    """An id in 0 .. 2**64 - 1 for one of several views of image ``sample``, unlike that of any other view or image.

    Step ``view + 1`` of the SplitMix64 generator seeded with the image's id (Steele et al., OOPSLA 2014).
    """
    x = (sample + (view + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


# -------------------------------------------------------------------------------------------------------- view by view


def per_view(
    tokens: Tokens,
    budgets: tuple[int, ...],
    select: Callable[..., Selection],
    by_view: Collection[str] = (),
    **signals: Tensor,
) -> Selection:
    """Run ``select(view_tokens, k, **view_signals)`` on every view by itself and join the results.

    Views of equal grid and budget are stacked into one batch. ``signals (B, N, …)`` are cut to the view's tokens, those
    named in ``by_view`` are ``(B, V, …)`` and cut to the view's row. ``budgets`` has one entry per view; a view with
    budget 0 keeps nothing, one whose budget is not below its size keeps everything without asking ``select``. An only
    view goes by its image's id, one of several by its :func:`view_id`.
    """
    views = tokens.layout.views
    if all(k >= view.size for view, k in zip(views, budgets)):
        return keep_all(tokens)

    if len(views) == 1:
        return select(tokens, budgets[0], **{name: x[:, 0] if name in by_view else x for name, x in signals.items()})
    alike: dict[tuple[tuple[int, int], int], list[int]] = {}
    for v, (view, k) in enumerate(zip(views, budgets)):
        if k:
            alike.setdefault((view.grid, k), []).append(v)
    parts = []
    for (grid, k), members in alike.items():
        where = torch.stack([views[v].tokens(tokens.embeds.device) for v in members])  # (M, n)
        cut = {
            name: (x[:, members] if name in by_view else x[:, where]).flatten(0, 1)  # (B * M, …)
            for name, x in {"": tokens.embeds, **signals}.items()
        }
        part = replace(
            tokens,
            embeds=cut.pop(""),
            layout=Layout.grid(*grid),
            sample_ids=tuple(view_id(s, v) for s in tokens.ids for v in members),
            frame_scores=None,
            **{name: x.repeat_interleave(len(members), dim=0) for name, x in tokens.text.items()},
        )
        parts.append(_Part(members, where, part, keep_all(part) if k >= part.count else select(part, k, **cut)))
    return _join(parts, len(tokens.embeds), tokens.count)


@dataclass
class _Part:
    """M views of equal grid and budget, selected as one batch: row ``b * M + m`` is view m of image b.

    Attributes:
        views: their numbers.
        where: numbers of their tokens, ``(M, n)``.
        tokens: what was selected from.
        chosen: what was selected.
    """

    views: list[int]
    where: Tensor
    tokens: Tokens
    chosen: Selection

    def by_image(self, x: Tensor) -> Tensor:
        """``(B * M, k, …) -> (B, M * k, …)``."""
        return x.unflatten(0, (-1, len(self.views))).flatten(1, 2)


def _join(parts: list[_Part], batch: int, count: int) -> Selection:
    """Merge the selections of disjoint views into one over all ``count`` tokens; -1 in an index means no token."""
    merging, speaking, scoring, ordering = (
        any(getattr(part.chosen, name) is not None for part in parts) for name in ("values", "owner", "scores", "order")
    )
    device = parts[0].where.device
    scores = torch.full((batch, count), float("nan"), device=device)
    owner = torch.full((batch, count), -1, dtype=torch.long, device=device)
    places, values, turns = [], [], []
    for part in parts:
        chosen, number = part.chosen, part.where.repeat(batch, 1)  # (B * M, n)
        slot, absent = chosen.index.clamp(min=0), chosen.index < 0
        places.append(part.by_image(number.gather(1, slot).masked_fill(absent, count)))  # absent ones sort to the end
        if merging:
            values.append(part.by_image(gather(part.tokens.embeds, slot) if chosen.values is None else chosen.values))
        if ordering:  # views enter one after the other, each in its own order
            column = torch.arange(slot.shape[1], device=device).expand_as(slot)
            turn = column if chosen.order is None else chosen.order.expand_as(slot).argsort(dim=1)
            first = torch.tensor(part.views, device=device).repeat(batch)[:, None] * count
            turns.append(part.by_image(first + turn))
        if chosen.scores is not None:
            scores[:, part.where] = part.by_image(chosen.scores.float()).view(batch, *part.where.shape)
        if speaking:
            own = chosen.owner
            if own is None:  # a view that merged nothing: survivors speak for themselves
                own = torch.full_like(number, -1).scatter_(1, slot, chosen.index)
            spoken = torch.where(own >= 0, number.gather(1, own.clamp(min=0)), -1)
            owner[:, part.where] = part.by_image(spoken).view(batch, *part.where.shape)
    index, perm = torch.cat(places, dim=1).sort(dim=1)
    return Selection(
        index.masked_fill(index == count, -1),
        values=gather(torch.cat(values, dim=1), perm) if merging else None,
        owner=owner if speaking else None,
        scores=scores if scoring else None,
        order=torch.cat(turns, dim=1).gather(1, perm).argsort(dim=1) if ordering else None,
    )
