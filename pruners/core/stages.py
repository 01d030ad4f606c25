"""Where a method acts: one type of stage per hook point, each with the one signature of its ``select``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from foveate.pruners.core.signals import Signal


def _nothing(rows: int) -> int:
    return 0


@dataclass(frozen=True)
class Stage:
    """One place where a method acts.

    Attributes:
        select: what the method does there; its signature is that of the stage's type.
        signals: argument name of ``select`` -> what it reads.
        layer: 0-based block or decoder layer, where the type has any.
    """

    point: ClassVar[str] = ""
    """What traces call the hook point."""

    select: Callable[..., Any]
    signals: Mapping[str, Signal] = field(default_factory=dict)
    layer: int = field(default=0, kw_only=True)

    @property
    def label(self) -> str:
        """The hook point with its layer."""
        return self.point

    @property
    def text_guided(self) -> bool:
        """Whether what the stage chooses depends on the question."""
        return any(signal.from_text for signal in self.signals.values())


@dataclass(frozen=True)
class AtPixels(Stage):
    """Before the vision tower: ``select(pixel_values) -> pixel_values``, smaller ones.

    Smaller pictures give fewer features, which then come first among the tokens at the decoder's entry; zeros fill up.
    """

    point: ClassVar[str] = "pixels"


@dataclass(frozen=True)
class InTower(Stage):
    """Inside block ``layer`` of the vision tower: ``select(tokens: BlockTokens, **signals) -> Groups``
    (``core.merging``).

    Attributes:
        removes: how many of n rows, prefix counted, merge away here; known before the tokens are.
        proportional: the block's attention counts every row as often as it holds patches.
        weighting: a group's row is the ``"size"``-weighted mean of its members, their plain ``"mean"``, or the target
            alone (``"prune"``).
        after_mlp: merge after the whole block instead of between attention and MLP.
    """

    point: ClassVar[str] = "vit_block"

    removes: Callable[[int], int] = field(default=_nothing, kw_only=True)
    proportional: bool = field(default=True, kw_only=True)
    weighting: str = field(default="size", kw_only=True)
    after_mlp: bool = field(default=False, kw_only=True)

    @property
    def label(self) -> str:
        return f"{self.point}({self.layer})"


@dataclass(frozen=True)
class TokenStage(Stage):
    """Selects visual tokens: ``select(tokens: Tokens, **signals) -> Selection``.

    Attributes:
        positions: ``"keep"`` or ``"compact"`` where the method's specification demands one; None: the family's custom
            (compact for one-axis positions, keep for m-RoPE).
        newlines: what becomes of separators: ``"rows"`` keeps those whose row keeps a token, ``"drop"`` none,
            ``"keep"`` all, ``"compete"`` selects among them as among tokens (inside the decoder; they count in
            :class:`Tokens`). A selection with an ``order`` of its own has no rows: of the separators it keeps those
            that the order names.
        reads_text: fill in the instruction of :class:`Tokens`.
        reads_frame_scores: fill in its frame scores.
    """

    positions: str | None = field(default=None, kw_only=True)
    newlines: str = field(default="rows", kw_only=True)
    reads_text: bool = field(default=False, kw_only=True)
    reads_frame_scores: bool = field(default=False, kw_only=True)

    @property
    def text_guided(self) -> bool:
        return self.reads_text or self.reads_frame_scores or super().text_guided


@dataclass(frozen=True)
class AtEntry(TokenStage):
    """Where the sequence enters the decoder, image by image.

    Attributes:
        deepstack: levels of DeepStack features (Qwen3-VL) that join after early layers, ``"all"`` or ``"first"``.
        empty_frames: what becomes of the text around a video frame (timestamp, start and end of vision) of which the
            selection leaves no token: ``"keep"`` or ``"drop"``.
    """

    point: ClassVar[str] = "llm_input"

    deepstack: str = field(default="all", kw_only=True)
    empty_frames: str = field(default="keep", kw_only=True)


@dataclass(frozen=True)
class InsideDecoder(TokenStage):
    """Selects among the tokens that a decoder layer works on.

    Attributes:
        scope: what is selected from together: each ``"image"`` (or video) by itself, or all of a ``"sample"``, with
            their views in one layout. Under ``"sample"`` and ``newlines="compete"`` a selection has an index and scores
            only.
    """

    scope: str = field(default="image", kw_only=True)

    @property
    def label(self) -> str:
        return f"{self.point}({self.layer})"


@dataclass(frozen=True)
class BeforeLayer(InsideDecoder):
    """Before decoder layer ``layer``, in prefill: the index runs over the tokens that are still there.

    Attributes:
        evict: tokens that go leave the caches of the earlier layers as well, once the prompt is through.
    """

    point: ClassVar[str] = "llm_layer"

    evict: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class InCache(InsideDecoder):
    """In the cache of decoder layer ``layer``, once the prompt is through.

    Keys and values of tokens that are not selected are zeroed in that layer, and nothing else.
    """

    point: ClassVar[str] = "llm_cache"


@dataclass(frozen=True)
class InMLP(Stage):
    """Inside the MLP of decoder layer ``layer``: ``select(**signals) -> (B, F)`` bool, the neurons that run in decode.

    Attributes:
        refresh: several tokens after a filled cache are a new prompt, read in full, and give a new set; otherwise they
            continue the answer with the set there is.
    """

    point: ClassVar[str] = "llm_mlp"

    refresh: bool = field(default=True, kw_only=True)

    @property
    def label(self) -> str:
        return f"{self.point}({self.layer})"
