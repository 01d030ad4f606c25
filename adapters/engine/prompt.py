"""What a call brings into the decoder: the pictures of its prompt, where their tokens are, and what is left of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.adapters.engine.decoder import Decoder
from foveate.adapters.engine.decoder_signals import Present
from foveate.adapters.engine.spans import Span
from foveate.adapters.trace import ImageTrace, Trace
from foveate.errors import InputError
from foveate.pruners.core.method import Layout, Selection, Stage


@dataclass
class Item:
    """One image or video of the running prompt (one per beam)."""

    kind: str
    number: int  # which of the encoded ones
    sample: int
    layout: Layout
    places: Tensor  # (length,) places in the sequence, separators included
    tokens: Tensor  # (N,) places of the tokens alone
    alive: Tensor  # (K,) token numbers still there, ascending
    width: int  # places still taken, separators included
    trace: ImageTrace | None  # None for beams behind the first
    id: int = 0  # seeds what is drawn for it
    text_gone: int = 0  # places of text that went with empty frames
    entered: tuple[int, int] = (0, 0)  # into the decoder: tokens, and places with separators

    @classmethod
    def whole(cls, kind: str, number: int, sample: int, layout: Layout, places: Tensor) -> Item:
        """A picture of which nothing is gone yet; without a trace."""
        everything = torch.arange(layout.size, device=places.device)
        tokens = places[layout.places(places.device)]
        return cls(kind, number, sample, layout, places, tokens, everything, layout.length, None)

    @property
    def numbers(self) -> Tensor:
        """``(length,)`` token number of every place of the picture, -1 for separators."""
        count = torch.arange(self.layout.size, device=self.places.device)
        blank = torch.full_like(self.places, -1)
        return blank.index_copy(0, self.layout.places(self.places.device), count)

    @property
    def newline_places(self) -> Tensor:
        """Places of the picture's separators in the sequence."""
        return self.places[self.layout.separators(self.places.device)]

    def left(self, values: Tensor) -> Tensor:
        """What is known of the tokens ``(N, …)``, of those that are left; of the views ``(V, …)``, all."""
        full = self.layout.size
        return values if len(self.alive) == full or len(values) != full else values[self.alive.to(values.device)]


def find_items(kind: str, here: Tensor, layouts: Sequence[Layout], centre_crop: bool) -> list[Item]:
    """Match placeholder tokens ``here (B, L)`` with the encoded pictures, which beams may have multiplied.

    The first beam's items get a trace; ``centre_crop`` is noted there.

    Raises:
        InputError: the prompt's tokens are no whole number of pictures.
    """
    counts = here.sum(dim=1).tolist()
    lengths = [layout.length for layout in layouts]
    beams, rest = divmod(sum(counts), sum(lengths)) if lengths else (0, 1)
    if rest or len(counts) % max(beams, 1):
        raise InputError(
            f"the prompt has {sum(counts)} {kind} tokens in this call, the vision side encoded {sum(lengths)}; "
            "chunked prefill, prompts that were cut short and features that were encoded before attaching cannot be pruned"
        )
    places = here.nonzero()[:, 1].split(counts)
    items, first = [], 0
    for row in range(0, len(counts), beams):
        stop, total = first, 0
        while total < counts[row] and stop < len(lengths):
            total += lengths[stop]
            stop += 1
        for sample in range(row, row + beams):
            if total != counts[sample]:
                raise InputError(
                    f"row {sample} has {counts[sample]} {kind} tokens, which is no whole number of pictures"
                )
            for number, where in zip(range(first, stop), places[sample].split(lengths[first:stop])):
                item = Item.whole(kind, number, sample, layouts[number], where)
                if sample == row:
                    item.trace = ImageTrace(sample, kind, item.layout, centre_crop=centre_crop)
                items.append(item)
        first = stop
    return items


@dataclass
class Prompt:
    """Where things are among the new places of the running call; masks are ``(B, L)`` bool.

    ``trace`` and ``items`` are empty for a call that brings text alone.
    """

    decoder: Decoder
    ids: Tensor | None
    embeds: Tensor
    attended: Tensor
    visual: Tensor
    items: list[Item] = field(default_factory=list)
    trace: Trace | None = None
    _text: dict[int | None, Tensor] = field(default_factory=dict)

    def text(self, system_tokens: int | None) -> Tensor:
        """Attended, not visual, and behind the system prompt (None: behind the first picture)."""
        if system_tokens not in self._text:
            if system_tokens is None:
                behind = self.visual.long().cumsum(1) > 0
            else:
                behind = self.attended.long().cumsum(1) > system_tokens
            self._text[system_tokens] = behind & self.attended & ~self.visual
        return self._text[system_tokens]

    @property
    def instruction(self) -> Tensor:
        """Text behind the last picture."""
        ahead = self.visual.flip(1).long().cumsum(1).flip(1) > 0  # here or further on is a picture
        return self.text(None) & ~ahead

    def words(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor] | None:
        """The text behind the first picture of some rows: embeddings ``(R, T, D)``, valid ``(R, T)``, ids (-1: padding).

        None if there is none.
        """
        text = self.text(None)[rows]
        width = int(text.sum(dim=1).amax())
        if not width:
            return None
        order = text.long().argsort(dim=1, descending=True, stable=True)[:, :width]
        valid = text.gather(1, order)
        words = self.embeds[rows].gather(1, order[..., None].expand(-1, -1, self.embeds.shape[-1]))
        return words * valid[..., None], valid, self.ids[rows].gather(1, order).masked_fill(~valid, -1)

    def present(self, device: torch.device) -> Present:
        """What the decoder's layers work on now."""
        span = self.decoder.frame.span
        return Present(span.mask.to(device), span.past, span.index.to(device), span.alive.shape[1])

    def rotary(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of these."""
        return self.decoder.rotary(hidden)

    @property
    def cache(self) -> Any:
        """The running call's KV cache, None without one or where it is new."""
        return self.decoder.cache

    def timed(self, name: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Count the body's time in the trace, if there is one."""
        return contextlib.nullcontext() if self.trace is None else self.trace.timed(name, device)


@dataclass(eq=False)
class Pool:
    """Visual tokens of one sample that a stage in front of a decoder layer selects from together.

    ``places (K,)`` of the sequence; ``sizes``: how many of them belong to each of the ``items``; ``entered``: how many there
    were when the sequence entered the decoder.
    """

    items: list[Item]
    places: Tensor
    sizes: list[int]
    layout: Layout
    entered: int

    @property
    def sample(self) -> int:
        """Row of the batch."""
        return self.items[0].sample

    @property
    def key(self) -> tuple[Layout, int, int]:
        """Pools of one key can be stacked."""
        return self.layout, len(self.places), self.entered


@dataclass
class Result:
    """What a stage selected of one picture; ``separators``: places that stay, None if the stage's policy decides."""

    selection: Selection
    separators: Tensor | None = None


def pools_of(items: Sequence[Item], stage: Stage, span: Span) -> list[Pool]:
    """What the stage selects from together, in the order of the items."""
    compete = stage.newlines == "compete"
    pools: list[Pool] = []
    for item in items:
        places = item.tokens[item.alive]
        if compete and item.layout.newlines:
            places = item.places[span.alive[item.sample, item.places]]
        if stage.scope == "sample" and pools and pools[-1].sample == item.sample:
            pool = pools[-1]
            pool.items.append(item)
            pool.places = torch.cat([pool.places, places])
        else:
            pool = Pool([item], places, [], item.layout, 0)
            pools.append(pool)
        pool.sizes.append(len(places))
        pool.entered += item.entered[compete]
    for pool in pools:
        if len(pool.items) > 1:
            pool.layout = Layout.joined([item.layout for item in pool.items])
    return pools


def by_item(stage: Stage, pool: Pool, selection: Selection) -> list[Result]:
    """A pool's selection, picture by picture, in numbers of each picture's living tokens."""
    compete = stage.newlines == "compete"
    if len(pool.items) == 1 and not (compete and pool.layout.newlines):
        return [Result(selection)]
    chosen = torch.zeros_like(pool.places, dtype=torch.bool)
    chosen[selection.index[selection.index >= 0].to(chosen.device)] = True
    scores = [None] * len(pool.items) if selection.scores is None else selection.scores.split(pool.sizes)
    results = []
    for item, places, kept, score in zip(pool.items, pool.places.split(pool.sizes), chosen.split(pool.sizes), scores):
        number = item.numbers[torch.searchsorted(item.places, places)]
        token = number >= 0
        index = kept[token].nonzero().squeeze(1)
        score = None if score is None else score[token.to(score.device)]
        results.append(Result(Selection(index, scores=score), places[kept & ~token] if compete else None))
    return results
