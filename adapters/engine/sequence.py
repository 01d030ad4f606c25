"""Write what a stage selected into the sequence: which places stay, in which order, with which separators and texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.adapters.engine.prompt import Item, Prompt, Result
from foveate.adapters.engine.spans import Choice
from foveate.adapters.families.base import Adapter
from foveate.adapters.trace import StageTrace
from foveate.errors import InputError
from foveate.pruners.core.method import Selection, Stage


class SequenceWriter:
    """Carries selections over to the running prompt's items, its trace and the decoder.

    Args:
        adapter: of the model's family.
        positions: the policy for rotary positions that the user asked for (``auto``: the stage's or the family's own).
        separators: what the user wants of separators (``auto``: the stage's own policy).
        adaptive: whether selections may be padded with -1.
    """

    def __init__(self, adapter: Adapter, positions: str, separators: str, adaptive: bool) -> None:
        self.adapter, self.positions, self.separators, self.adaptive = adapter, positions, separators, adaptive

    def write(
        self, prompt: Prompt, stage: Stage, results: Sequence[Result], layer: int, before: Tensor | None = None
    ) -> Choice | None:
        """Take in one result per item of the prompt; None if every token stays as it is.

        ``before (B, L)`` bool: places still there, None for all.
        """
        alive = torch.ones_like(prompt.visual) if before is None else before.clone()
        rank, changed, mixtures = None, [], []
        widths = [item.width for item in prompt.items]
        for item, one in zip(prompt.items, results):
            result = one.selection
            index = (result.index[result.index >= 0] if self.adaptive else result.index).to(item.alive.device)
            chosen = item.alive[index]  # token numbers
            _record(item, stage, result, chosen)
            places = item.tokens[chosen]
            breaks = None
            if len(index) < len(item.alive) or result.breaks is not None or one.separators is not None:
                breaks = self._thin(prompt, item, stage, one, chosen, alive)
            if breaks is not None:
                changed.append(breaks)
            if result.resample is not None:
                mixtures.append((item.sample, item.tokens[item.alive], places, result.resample))
            if result.values is not None:
                changed.append((torch.full_like(places, item.sample), places, result.values[: len(places)]))
            if result.order is not None or breaks is not None:
                if rank is None:
                    rank = torch.arange(alive.shape[1], device=alive.device).repeat(len(alive), 1)
                entering = places if result.order is None else places[result.order[result.order < len(places)]]
                if breaks is not None:
                    entering = _interleave(entering, breaks[1], result.breaks)
                rank[item.sample, entering] = entering.sort().values
            item.alive = chosen
        self.count(prompt, layer, stage.evict)
        policy = self.positions if self.positions != "auto" else stage.positions
        policy = policy or ("keep" if self.adapter.info.mrope else "compact")
        prompt.trace.positions[stage.hook.value] = policy
        untouched = widths == [item.width for item in prompt.items]
        if untouched and not changed and rank is None:
            return None
        taken = [0] * len(alive)
        for item in prompt.items:
            taken[item.sample] += item.width - item.layout.length - item.text_gone
        width = alive.shape[1] + max(taken)
        values = tuple(torch.cat(parts) for parts in zip(*changed)) if changed else None
        return Choice(alive, width, policy, rank, values, mixtures=mixtures, deepstack=stage.deepstack)

    def count(self, prompt: Prompt, layer: int, evict: bool = False) -> None:
        """From ``layer`` on, the decoder sees what is left now; with ``evict``, no cache keeps more."""
        depth = self.adapter.info.decoder_layers
        cached = 0 if evict else layer
        for item in prompt.items:
            if item.trace is not None:
                item.trace.tokens_per_layer[layer:] = [item.width] * (depth - layer)
                item.trace.cached_per_layer[cached:] = [item.width] * (depth - cached)
                item.trace.text_gone_per_layer[layer:] = [item.text_gone] * (depth - layer)

    def _thin(
        self, prompt: Prompt, item: Item, stage: Stage, result: Result, chosen: Tensor, alive: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Leave the item's ``chosen`` tokens alone in ``alive``, and the separators that go with them.

        Returns what :func:`_breaks` does if the selection brings separators of its own.
        """
        separators, selection = result.separators, result.selection
        if separators is not None:
            alive[item.sample, item.places] = False
            alive[item.sample, separators] = True
        alive[item.sample, item.tokens] = False
        alive[item.sample, item.tokens[chosen]] = True
        breaks = None
        if selection.breaks is not None and item.layout.newlines:
            breaks = _breaks(item, len(selection.breaks), alive, prompt.embeds)
            stay = len(breaks[1])
        elif separators is not None:
            stay = len(separators)
        else:
            policy = stage.newlines if self.separators == "auto" else self.separators
            stay = _separators(item, "drop" if selection.order is not None else policy, chosen, alive)
        item.width = len(chosen) + stay
        if stage.empty_frames == "drop":
            item.text_gone += self._drop_frame_text(prompt, item, chosen, alive)
        return breaks

    def _drop_frame_text(self, prompt: Prompt, item: Item, chosen: Tensor, alive: Tensor) -> int:
        """Take the text around frames without a token out of ``alive``; returns how many places that frees."""
        views = item.layout.views
        if views[0].kind != "frame" or not self.adapter.writes_frame_text:
            return 0
        bounds = torch.tensor([view.start for view in views] + [item.layout.size], device=chosen.device)
        kept = torch.searchsorted(chosen, bounds).diff().tolist()
        places = item.tokens.tolist()
        frames = [(places[view.start], places[view.start + view.size - 1]) for view in views]
        around = self.adapter.frame_text(prompt.ids[item.sample].tolist(), frames)
        gone = [p for places, k in zip(around, kept) if k == 0 for p in places]
        gone = torch.tensor(gone, dtype=torch.long, device=alive.device)
        freed = int(alive[item.sample, gone].sum())
        alive[item.sample, gone] = False
        return freed


def _breaks(item: Item, count: int, alive: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give ``count`` separators places, of dropped tokens where the picture has too few: rows, places, embeddings."""
    own = item.newline_places
    alive[item.sample, own] = False
    free = item.places[~alive[item.sample, item.places]]
    if count > len(free):
        raise InputError(f"{count} separators do not fit into the {len(free)} places that a picture leaves free")
    borrowed = free[~torch.isin(free, own)]
    places = torch.cat([own, borrowed])[:count]
    alive[item.sample, places] = True
    rows = torch.full_like(places, item.sample)
    return rows, places, embeds[item.sample, own[:1].to(embeds.device)].expand(count, -1)


def _separators(item: Item, policy: str, chosen: Tensor, alive: Tensor) -> int:
    """Decide on the picture's separators in ``alive``; returns how many stay."""
    if not item.layout.newlines:
        return 0
    where = item.newline_places
    stay = alive[item.sample, where]
    if policy == "drop":
        stay = torch.zeros_like(stay)
    elif policy == "rows":
        stay = stay & item.layout.rows_left(chosen)
    alive[item.sample, where] = stay
    return int(stay.sum())


def _interleave(tokens: Tensor, separators: Tensor, breaks: Tensor) -> Tensor:
    """``tokens (K,)`` and ``separators (S,)``, of which number s stands behind ``breaks[s]`` tokens: ``(K + S,)``."""
    entering = tokens.new_empty(len(tokens) + len(separators))
    here = breaks + torch.arange(len(breaks), device=breaks.device)
    is_token = torch.ones_like(entering, dtype=torch.bool).index_fill(0, here, False)
    entering[here], entering[is_token] = separators, tokens
    return entering


def _record(item: Item, stage: Stage, result: Selection, chosen: Tensor) -> None:
    """Note the stage in the item's trace, by token numbers of the whole picture."""
    if item.trace is None:
        return
    full = item.layout.size
    scores = owner = None
    if result.scores is not None:
        scores = torch.full((full,), float("nan"), device=chosen.device)
        scores[item.alive] = result.scores.detach().float()
    if result.owner is not None:
        owner = torch.full((full,), -1, dtype=torch.long, device=chosen.device)
        owner[item.alive] = torch.where(result.owner >= 0, item.alive[result.owner.clamp(min=0)], -1)
    markers = None if result.markers is None else item.alive[result.markers]
    item.trace.stages.append(StageTrace(stage.hook.value, stage.layer, chosen, owner, scores, markers))
