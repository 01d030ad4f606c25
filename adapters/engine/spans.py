"""What the decoder's hooks and whoever chooses tokens tell each other.

A call brings *new* sequence places 0 .. L-1 behind *past* ones that the cache has seen. A :class:`Span` says what a run of
consecutive decoder layers works on: which new places (``index``), which past places their cache really holds (``held``), and
at which positions. A :class:`Selector` answers with a :class:`Choice`, which starts a new span.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass
class Held:
    """What the cache of the layers from ``first_layer`` on holds.

    Attributes:
        places: ``(B, P)`` int64 places of the unpruned sequence in cache order, -1 where a row is padded.
        shift: ``(B,)`` how far positions of later tokens move back.
        last: after a prompt, what :attr:`Span.last` says, where the next call is to be compared with it.
    """

    first_layer: int
    places: Tensor
    shift: Tensor
    last: tuple[Tensor, Tensor] | None = None


@dataclass
class Span:
    """What a run of decoder layers works on; see the module's docstring.

    Attributes:
        index: ``(B, K)`` new places in the order in which they enter, L where a row is padded (on the left).
        alive: ``(B, L)`` bool, the same as a set; rank: ``(B, L)`` order of entry where it is not ascending, else None.
        place_positions: ``(…, B, L)`` rotary position of every living place; shift: ``(B,)`` as in :class:`Held`.
        held: ``(B, P)`` past places, -1 where padded.
        mask: ``(B, P + K)`` bool, what may be attended.
        evict: what is not here leaves the caches of the layers above too.
    """

    first_layer: int
    index: Tensor
    alive: Tensor
    rank: Tensor | None
    place_positions: Tensor
    shift: Tensor
    held: Tensor
    mask: Tensor
    evict: bool = False
    layer_kwargs: dict[str, Any] | None = field(default=None, repr=False)
    _column: Tensor | None = field(default=None, repr=False)

    @property
    def past(self) -> int:
        """Past places held, P."""
        return self.held.shape[1]

    @property
    def positions(self) -> Tensor:
        """Rotary positions in order of entry, ``(…, B, K)``; 0 where padded."""
        places = self.index.clamp(max=self.alive.shape[1] - 1)
        return self.place_positions.gather(-1, places.expand(*self.place_positions.shape[:-1], -1))

    @property
    def column(self) -> Tensor:
        """``(B, L + 1)`` where every new place stands in this span; anything for places that are not alive."""
        if self._column is None:
            batch, width = self.index.shape
            places = torch.arange(width, device=self.index.device).expand(batch, -1)
            self._column = self.index.new_zeros(batch, self.alive.shape[1] + 1).scatter(1, self.index, places)
        return self._column

    @property
    def last(self) -> tuple[Tensor, Tensor]:
        """``(B,)`` the largest rotary position of a row, and whether the row's last place is there and attended."""
        there = torch.zeros_like(self.alive, dtype=torch.bool)
        attended = self.mask[:, self.past :] & (self.index < self.alive.shape[1])
        there = torch.nn.functional.pad(there, (0, 1)).scatter(1, self.index, attended)[:, :-1]
        positions = self.place_positions.reshape(-1, *self.alive.shape).amax(0)
        return torch.where(there, positions, -1).amax(1), there[:, -1]

    def restore(self, hidden: Tensor) -> Tensor:
        """``(B, K, D)`` back to the unpruned length ``(B, L, D)``.

        A place that was dropped shows the state of the nearest survivor that entered before it, so that the token behind
        it is still predicted from what the decoder has seen.
        """
        batch, length = self.alive.shape
        places = torch.arange(length, device=self.index.device).expand(batch, -1)
        before = torch.where(self.alive, places, -1).cummax(dim=1).values.clamp(min=0)
        by_entry = self.column
        if self.rank is not None:  # survivors stand in the order of their ranks, a permutation of the living places
            by_entry = by_entry.new_zeros(by_entry.shape).scatter(1, self.rank, self.column[:, :length])
        source = torch.where(self.alive, self.column[:, :length], by_entry.gather(1, before))
        return take(hidden, source)


@dataclass
class Choice:
    """The outcome of a stage for the whole batch.

    Attributes:
        alive: ``(B, L)`` bool over new places; width: the largest number of survivors in a row, known on the host.
        positions: ``"keep"`` or ``"compact"``.
        rank: ``(B, L)`` order of entry: a permutation of the living places among themselves; None = unchanged.
        values: ``(rows, places, embeddings)``, ``(M,), (M,), (M, D)``: places that carry something new; None where all keep
            their own.
        evict: drop them from the caches of earlier layers too, in the end.
        follow: told which columns of the old span, ``(B, width)``, go on.
        mixtures: ``(row, places (N,), survivors (K,), resample)`` per picture whose survivors are mixtures: what the places
            carry beside their embeddings goes to the survivors by ``resample``.
        deepstack: which DeepStack levels join, ``"all"`` or ``"first"``.
    """

    alive: Tensor
    width: int
    positions: str
    rank: Tensor | None = None
    values: tuple[Tensor, Tensor, Tensor] | None = None
    evict: bool = False
    follow: Callable[[Tensor], None] | None = None
    mixtures: list[tuple[int, Tensor, Tensor, Callable[[Tensor], Tensor]]] = field(default_factory=list)
    deepstack: str = "all"


class Call(Enum):
    """What a call of the decoder brings."""

    CONTINUATION = "continuation"
    TEXT_PROMPT = "text prompt"  # to be read, without visual tokens
    PROMPT = "prompt"  # with visual tokens


class Selector(Protocol):
    """What the decoder asks while a prompt with visual tokens runs through it (the session answers).

    ``layers`` are those that tokens may leave in front of, ``neuron_layers`` those whose MLP may run in part.
    """

    layers: frozenset[int]
    neuron_layers: frozenset[int]

    def begin(self, embeds: Tensor, mask: Tensor | None, past: int) -> Call:
        """A call starts: what do ``embeds (B, L, D)`` bring, behind ``past`` places? ``mask (B, past + L)`` or None."""

    def at_input(self, embeds: Tensor) -> Choice | None:
        """Which new places of ``embeds (B, L, D)`` enter the decoder; None keeps all."""

    def at_layer(self, layer: int, hidden: Tensor, span: Span, cache: Any) -> Choice | None:
        """Which of the span's places enter decoder layer ``layer``, by ``hidden (B, K, D)`` in front of it; None keeps all."""

    def neurons(self) -> dict[int, Tensor]:
        """By layer, ``(B, F)`` bool: the neurons that run from now on."""

    def erased(self, hidden: Tensor, span: Span) -> dict[int, Tensor]:
        """By layer, ``(B, L)`` bool: places whose keys and values are zeroed; ``hidden`` left the last layer."""

    def finish(self, cache_lengths: list[int] | None) -> None:
        """The prompt ended without error; what each layer's cache holds for it, None without a cache."""

    def forget(self) -> None:
        """The call is over, well or not: let go of its tensors."""


def take(hidden: Tensor, columns: Tensor) -> Tensor:
    """``hidden (B, K, D)`` at ``columns (B, M)`` -> ``(B, M, D)``."""
    return hidden.gather(1, columns.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))
