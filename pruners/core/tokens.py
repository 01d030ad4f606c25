"""Visual tokens, how they lie on a picture and in the sequence, and what is selected of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from foveate.errors import ParameterError


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
        """Number of tokens."""
        return self.rows * self.cols

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.cols

    def tokens(self, device: torch.device | str | None = None) -> Tensor:
        """Numbers of the view's tokens in raster order, ``(rows * cols,)`` int64."""
        rows = torch.arange(self.rows, device=device) * (self.stride or self.cols)
        return (self.start + rows[:, None] + torch.arange(self.cols, device=device)).flatten()


@dataclass(frozen=True)
class Newline:
    """A separator embedding after tokens ``first .. last - 1``; it has a place in the sequence, not a token number."""

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
    def sizes(self) -> tuple[int, ...]:
        """Number of visual tokens of every view."""
        return tuple(view.size for view in self.views)

    @property
    def size(self) -> int:
        """Number of visual tokens N, separators not counted."""
        return sum(self.sizes)

    @property
    def length(self) -> int:
        """Places taken in the unpruned sequence, separators counted."""
        return self.size + len(self.newlines)

    def places(self, device: torch.device | str | None = None) -> Tensor:
        """Place of every token among the image's places, ``(N,)`` int64."""
        return _places(self, str(device or "cpu"))

    def separators(self, device: torch.device | str | None = None) -> Tensor:
        """Place of every separator among the image's places, ``(S,)`` int64."""
        return torch.tensor([n.place for n in self.newlines], dtype=torch.long, device=device)

    def rows_left(self, chosen: Tensor) -> Tensor:
        """For every separator whether any of the tokens that it closes is ``chosen (K,)``: ``(S,)`` bool."""
        upto = chosen.new_zeros(self.size + 1).index_fill(0, chosen + 1, 1).cumsum(0)
        first, last = chosen.new_tensor([(n.first, n.last) for n in self.newlines]).view(-1, 2).unbind(1)
        return upto[last] > upto[first]

    @classmethod
    def joined(cls, layouts: Sequence[Layout]) -> Layout:
        """The layout of several pictures one after the other, as one."""
        views: list[View] = []
        newlines: list[Newline] = []
        size = length = 0
        for layout in layouts:
            views += [dataclasses.replace(view, start=view.start + size) for view in layout.views]
            newlines += [Newline(n.place + length, n.first + size, n.last + size) for n in layout.newlines]
            size, length = size + layout.size, length + layout.length
        return cls(tuple(views), tuple(newlines))

    @classmethod
    def grid(cls, rows: int, cols: int) -> Layout:
        """The layout of a single picture of ``rows x cols`` tokens."""
        return cls((View(rows, cols),))

    @classmethod
    def video(cls, frames: int, rows: int, cols: int) -> Layout:
        """The layout of a video: one view per (merged) frame."""
        return cls(tuple(View(rows, cols, start=t * rows * cols, kind="frame") for t in range(frames)))


@lru_cache(maxsize=256)
def _places(layout: Layout, device: str) -> Tensor:
    token = torch.ones(layout.length, dtype=torch.bool)
    token[layout.separators()] = False
    return token.nonzero().squeeze(1).to(device)


@dataclass
class Tokens:
    """The visual tokens of B images of equal layout at one hook point.

    Attributes:
        embeds: ``(B, N, D)`` what the decoder would see (projected embeddings, or hidden states before a decoder
            layer).
        layout: the tokens' layout; inside the decoder that of the *unpruned* image.
        sample_ids: one number per image, stable under batching; seeds everything random.
        instruction: ``(B, T, D)`` embeddings of the text after the first picture, zero where ``instruction_mask`` is
            False; None unless the stage says that it reads text, or where there is none.
        instruction_mask: ``(B, T)`` bool.
        instruction_ids: ``(B, T)`` token ids, -1 where masked.
        embed: the decoder's input embedding, token ids ``(…)`` to ``(…, D)``; None without a model.
        project: maps encoder features ``(..., C)`` to decoder embeddings ``(..., D)``; None where there is no
            projector.
        frame_scores: ``B`` sequences, one score per sampled frame of each video; None for pictures, where nobody gave
            any, and unless the stage reads them.
        entered: inside the decoder: how many of the tokens entered it; None elsewhere.
    """

    embeds: Tensor
    layout: Layout
    sample_ids: tuple[int, ...] = ()
    instruction: Tensor | None = None
    instruction_mask: Tensor | None = None
    instruction_ids: Tensor | None = None
    embed: nn.Module | None = None
    project: Callable[[Tensor], Tensor] | None = None
    frame_scores: Sequence[Sequence[float]] | None = None
    entered: int | None = None

    @property
    def count(self) -> int:
        """Tokens of each image, N."""
        return self.embeds.shape[1]

    @property
    def ids(self) -> Sequence[int]:
        """The images' ``sample_ids``, by default their numbers in the batch."""
        return self.sample_ids or range(len(self.embeds))

    @property
    def text(self) -> dict[str, Tensor]:
        """What there is of the instruction's tensors, by attribute."""
        found = {name: getattr(self, name) for name in ("instruction", "instruction_mask", "instruction_ids")}
        return {name: value for name, value in found.items() if value is not None}

    def images(self, rows: Tensor) -> Tokens:
        """Some images of the batch, ``rows (M,)`` int64."""
        numbers = rows.tolist()
        return dataclasses.replace(
            self,
            embeds=self.embeds[rows],
            sample_ids=tuple(self.ids[b] for b in numbers),
            frame_scores=None if self.frame_scores is None else [self.frame_scores[b] for b in numbers],
            **{name: value[rows] for name, value in self.text.items()},
        )


@dataclass
class Selection:
    """Which visual tokens survive a stage, and what they carry.

    Attributes:
        index: ``(B, K)`` int64, surviving tokens, ascending and unique; methods with a content-dependent count pad rows
            on the right with -1.
        values: ``(B, K, D)`` new embeddings of the survivors (mergers), or None: they keep their own.
        owner: ``(B, N)`` the surviving token that speaks for each token, -1 if none does; None for pure pruners.
        scores: ``(B, N)`` float, higher is more worth keeping; only for people to look at.
        order: ``(B, M)`` what enters the decoder, in order: columns of ``index``, each once, and -1 for a separator.
            None: ascending, with separators as the stage's policy has it. Columns beyond a row's own count are passed
            over.
        resample: B functions ``(N, C) -> (K, C)``, how other features of the tokens (DeepStack levels) become those of
            the survivors where ``values`` are mixtures; None: each survivor keeps its own.
        markers: survivors that only stand for dropped tokens, ``(B, N)`` bool; for people to look at.
    """

    index: Tensor
    values: Tensor | None = None
    owner: Tensor | None = None
    scores: Tensor | None = None
    order: Tensor | None = None
    resample: Sequence[Callable[[Tensor], Tensor]] | None = None
    markers: Tensor | None = None

    def check(self, method: str, batch: int, count: int, padded: bool = True) -> None:
        """Hold ``index`` to what is said above, for ``batch`` pictures of ``count`` tokens; ``padded``: -1 may stand
        there.

        Raises:
            ParameterError: it is something else; the message names the ``method``.
        """
        index = self.index
        if index.ndim != 2 or len(index) != batch or index.dtype is not torch.int64:
            found = f"{tuple(index.shape)} of {index.dtype}"
            raise ParameterError(f"{method} returned an index {found}; give (B, K) int64 with B = {batch}")
        gone = (index == -1) & padded
        token = (index >= 0) & (index < count) | gone
        rising = (index[:, 1:] > index[:, :-1]) & ~gone[:, :-1] | gone[:, 1:]
        if not bool(token.all() & rising.all()):
            wrong = (~token.all(dim=1) | ~rising.all(dim=1)).nonzero()[0, 0]
            raise ParameterError(
                f"{method} chose {index[wrong].tolist()}; give unique, ascending token numbers 0 .. {count - 1}"
            )

    def kept(self, count: int) -> Tensor:
        """``(B, count)`` bool: which of ``count`` tokens survive."""
        kept = torch.zeros(len(self.index), count + 1, dtype=torch.bool, device=self.index.device)
        return kept.scatter(1, self.index.where(self.index >= 0, count), True)[:, :-1]

    def written(self, embeds: Tensor) -> Tensor:
        """``embeds (B, N, D)`` with the survivors' new values, if any, in their places."""
        if self.values is None:
            return embeds
        wide = torch.cat([embeds, embeds[:, :1]], dim=1)  # absent survivors write after the end
        where = self.index.where(self.index >= 0, embeds.shape[1])[..., None].expand_as(self.values)
        return wide.scatter(1, where, self.values.to(embeds.dtype))[:, :-1]
