"""What every method is made of: budgets, visual tokens and their layout, signals, stages and selections.

A method is a frozen dataclass of its paper's parameters. ``stages(model)`` returns where it acts (:class:`Hook`), what
it wants to read (:class:`Signal`) and the function that turns visual tokens into a :class:`Selection`. Nothing here
knows a model.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.errors import BudgetError, FoveateError, MissingSignalError, ParameterError

if TYPE_CHECKING:
    from PIL.Image import Image

Keep = int | float


class Hook(str, Enum):
    """Where a stage acts."""

    PIXELS = "pixels"  # in front of the vision tower
    VIT_BLOCK = "vit_block"  # inside one block of the vision tower, between attention and MLP
    LLM_INPUT = "llm_input"  # where the sequence enters the decoder
    LLM_LAYER = "llm_layer"  # in front of one decoder layer, in prefill
    LLM_MLP = "llm_mlp"  # inside one decoder layer's MLP: read in prefill, run in part in decode
    LLM_CACHE = "llm_cache"  # one decoder layer's keys and values, once the prompt is through


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

    def places(self, device: torch.device | str | None = None) -> Tensor:
        """Place of every token among the image's places, ``(N,)`` int64."""
        return _places(self, str(device or "cpu"))

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
    token[torch.tensor([n.place for n in layout.newlines], dtype=torch.long)] = False
    return token.nonzero().squeeze(1).to(device)


@dataclass
class Tokens:
    """The visual tokens of B images of equal layout at one hook point.

    Attributes:
        embeds: ``(B, N, D)`` what the decoder would see (projected embeddings, or hidden states at ``llm_layer``).
        layout: the tokens' layout; at ``llm_layer`` that of the *unpruned* image.
        sample_ids: one number per image, stable under batching; seeds everything random.
        instruction: ``(B, T, D)`` embeddings of the text behind the first picture, zero where ``instruction_mask`` is False;
            None unless the stage says that it reads text, or where there is none.
        instruction_mask: ``(B, T)`` bool.
        instruction_ids: ``(B, T)`` token ids, -1 where masked.
        embed: the decoder's input embedding, token ids ``(…)`` to ``(…, D)``; None without a model.
        project: maps encoder features ``(..., C)`` to decoder embeddings ``(..., D)``; None where there is no projector.
        frame_scores: ``B`` sequences, one score per sampled frame of each video; None for pictures, where nobody gave any,
            and unless the stage reads them.
        entered: at ``llm_layer``: how many of the tokens entered the decoder; None elsewhere.
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
        resample: B functions ``(N, C) -> (K, C)``, how other features of the tokens (DeepStack levels) become those of the
            survivors where ``values`` are mixtures; None: each survivor keeps its own.
        markers: ``(B, N)`` bool: survivors that only stand for dropped tokens; for people to look at.
        breaks: ``(B, S)`` ascending: separator s enters behind ``breaks[b, s]`` tokens; where the picture has fewer than S, places
            of dropped tokens carry the rest. None: the stage's policy.
    """

    index: Tensor
    values: Tensor | None = None
    owner: Tensor | None = None
    scores: Tensor | None = None
    order: Tensor | None = None
    resample: Sequence[Callable[[Tensor], Tensor]] | None = None
    breaks: Tensor | None = None
    markers: Tensor | None = None

    def check(self, method: str, batch: int, count: int, padded: bool) -> None:
        """Hold ``index`` to what is said above, for ``batch`` pictures of ``count`` tokens; ``padded``: -1 may stand there.

        Raises:
            ParameterError: it is something else; the message names the ``method``.
        """
        index = self.index
        if index.ndim != 2 or len(index) != batch or index.dtype is not torch.int64:
            raise ParameterError(
                f"{method} returned an index {tuple(index.shape)} of {index.dtype}; give (B, K) int64 with B = {batch}"
            )
        token = (index >= 0) & (index < count)
        rising = index[:, 1:] > index[:, :-1]
        if padded:
            gone = index == -1
            token, rising = token | gone, (rising & ~gone[:, :-1]) | gone[:, 1:]
        if not bool(token.all() & rising.all()):
            wrong = (~token.all(dim=1) | ~rising.all(dim=1)).nonzero()[0, 0]
            raise ParameterError(
                f"{method} chose {index[wrong].tolist()}; give unique, ascending token numbers 0 .. {count - 1}"
            )


# --------------------------------------------------------------------------------------------------------- signals


@dataclass(frozen=True)
class Signal:
    """Something a stage wants to read. Tensors arrive per visual token, equal layouts stacked: ``(B, N, …)``.

    ``layer`` is a 0-based block of the vision encoder, or of the decoder for the ``Decoder…`` signals; ``from_text`` says
    that the signal depends on the question.
    """

    from_text: ClassVar[bool] = False

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
    """``(B, N)`` attention that the class token pays to each patch, mean over heads of the softmax row (or of the logits)."""

    logits: bool = False


@dataclass(frozen=True)
class EncoderKeys(Signal):
    """``(B, N, d)`` attention keys, bias included, unscaled, mean over heads.

    On Qwen towers they are read behind the rotary embedding and averaged over each 2 x 2 unit that becomes one token.
    """


@dataclass(frozen=True)
class EncoderFeatures(Signal):
    """``(B, N, C)`` output of the block."""


@dataclass(frozen=True)
class ClassFeatures(Signal):
    """``(B, V, C)`` class token of the block's output, one per view of the layout."""


@dataclass(frozen=True)
class UnpooledFrames(Signal):
    """``(B, V * n, D)`` projected tokens of a video's frames in front of the pooling that the model does behind its projector.

    Only where :attr:`ModelInfo.pools_frames`; for pictures the embeddings themselves. ``layer`` means nothing here.
    """


@dataclass(frozen=True)
class PatchPixels(Signal):
    """``(B, N, 3, T, h, w)`` RGB in [0, 1] under each token: of T frames, in no set order inside a token."""

    layer: int = 0


@dataclass(frozen=True)
class LastTokenAttention(Signal):
    """``(B, N)`` attention that the last prompt token pays to each present visual token in decoder layer ``layer``."""

    from_text = True


@dataclass(frozen=True)
class CrossModalAttention(Signal):
    """``(B, 2)`` shares of attention text -> visual and visual -> text in decoder layer ``layer`` (whole sample).

    Text are all non-visual tokens but the first ``system_tokens`` of the prompt (None: all in front of the first image).
    """

    from_text = True

    system_tokens: int | None = None


@dataclass(frozen=True)
class InstructionAttention(Signal):
    """``(B, N)`` attention that decoder layer ``layer`` would pay from the instruction to each present visual token.

    Mean over heads and over the text rows behind the last picture of softmax rows over the whole sequence. It is computed in
    front of that layer, from the tokens that have not been pruned there yet; zero where no text follows.
    """

    from_text = True


@dataclass(frozen=True)
class TransitionVariation(Signal):
    """``(B, N)`` how much decoder layer ``layer`` changed each token: its attention and its MLP, residuals left out.

    Of both, :func:`foveate.cuda.transition_score` over its sum. ``softmax_scope`` says over which present tokens that sum
    runs: ``"sequence"`` text and all, ``"image"`` the visual ones.
    """

    direction: str = "signed"
    softmax_scope: str = "sequence"


@dataclass(frozen=True)
class CoreNeurons(Signal):
    """``(B, F)`` bool, which neurons of decoder layer ``layer``'s gated MLP the prompt uses most.

    Of :func:`foveate.cuda.neuron_counts` over all present tokens of a sample, text and all, the :func:`foveate.cuda.core_neurons`.
    ``shared``: one set from the counts of the whole batch.
    """

    from_text = True

    rho: float = 0.2
    beta: float = 0.4
    topk: str = "mean"
    shared: bool = False


@dataclass(frozen=True)
class CoreMatches(Signal):
    """``(B, N)`` int64, how many of the sample's :class:`CoreNeurons` of that layer are active on each visual token."""

    from_text = True

    rho: float = 0.2
    beta: float = 0.4
    topk: str = "mean"


@dataclass(frozen=True)
class RowMatches(Signal):
    """``(B, N)`` int64, how many neurons of decoder layer ``layer``'s gated MLP are active on each visual token and on a text one.

    ``row`` counts that token from the end of the prompt, -1 is the last.
    """

    from_text = True

    row: int = -1


# ---------------------------------------------------------------------------------------------------------- method


@dataclass(frozen=True)
class ModelInfo:
    """What a method may know about the model it is attached to.

    Attributes:
        family: adapter name (``"llava"``, ``"qwen2_5_vl"``, …); tower: class name of the vision tower.
        encoder_layers: number of encoder blocks; feature_layer: the 0-based block whose output feeds the projector.
        class_token: whether the tower has one; prefix_tokens: rows in front of the patches (class, distillation, registers),
            None: the class token alone, where there is one.
        decoder_layers: number of decoder layers; mrope: three-axis positions.
        full_attention: encoder blocks without windows (None: all of them, as in most towers).
        patch_size: side of a patch in pixels.
        token_ids: ids of special tokens by what the model's configuration calls them: ``"pad"``, ``"eos"``, ``"vision_end"``, …
        find_file: path of a file of this name that lies beside the model's weights, or None; never asks the network.
        frames_per_view: video frames that the vision encoder fuses into one view.
        pools_frames: video frames are pooled behind the projector, so that :class:`UnpooledFrames` can be read.
    """

    family: str = "none"
    tower: str = "none"
    encoder_layers: int = 24
    feature_layer: int = 22
    class_token: bool = True
    decoder_layers: int = 32
    mrope: bool = False
    full_attention: tuple[int, ...] | None = None
    patch_size: int = 14
    token_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    find_file: Callable[[str], str | None] = field(default=lambda name: None, repr=False, compare=False)
    frames_per_view: int = 1
    pools_frames: bool = False
    prefix_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.prefix_tokens is None:
            object.__setattr__(self, "prefix_tokens", int(self.class_token))

    def block(self, name: str, layer: int | None) -> int:
        """The 0-based encoder block that parameter ``name`` means: None is the feature layer, negative counts from the end.

        Raises:
            ParameterError: no such block, or its attention stays inside windows.
        """
        layer = self.feature_layer if layer is None else layer
        block = layer + self.encoder_layers if layer < 0 else layer
        if not 0 <= block < self.encoder_layers:
            raise ParameterError(f"{name}={layer}: the {self.tower} tower has blocks 0 .. {self.encoder_layers - 1}")
        if self.full_attention is not None and block not in self.full_attention:
            raise ParameterError(
                f"{name}={layer}: block {block} of the {self.tower} tower attends inside windows only; blocks with full "
                f"attention: {', '.join(map(str, self.full_attention))}"
            )
        return block

    def decoder_layer(self, name: str, layer: int) -> int:
        """``layer`` if the decoder has it and a layer in front of it.

        Raises:
            ParameterError: it has not.
        """
        if not 1 <= layer < self.decoder_layers:
            raise ParameterError(
                f"{name}={layer}: the decoder has {self.decoder_layers} layers, so tokens can leave it in front of "
                f"layers 1 .. {self.decoder_layers - 1}"
            )
        return layer

    def require_class_token(self, what: str, instead: str) -> None:
        """Raise :class:`MissingSignalError` if the tower has no class token for ``what``; ``instead``: what would work."""
        if not self.class_token:
            raise MissingSignalError(
                f"{what} reads the attention of the class token, and the {self.tower} tower of this {self.family} model "
                f"has none; use {instead}"
            )


@dataclass(frozen=True)
class Stage:
    """One place where a method acts.

    Attributes:
        hook: the hook point; layer: which decoder layer, for the ``llm_`` points but ``llm_input``.
        select: ``select(tokens, **signals) -> Selection``; at ``llm_layer`` the index runs over the tokens still there.
            At ``llm_cache`` the keys and values of tokens that are not selected are zeroed in that layer, and nothing else.
            At ``llm_mlp`` it is ``select(**signals) -> (B, F)`` bool, the neurons that run when the answer is decoded.
            At ``Hook.PIXELS`` it is ``select(pixel_values) -> pixel_values``; the fewer features of smaller pictures then
            come first among the tokens at ``llm_input``, zeros fill up.
        signals: argument name -> what to read.
        positions: ``"keep"`` or ``"compact"`` where the method's specification demands one; None = the family's custom
            (compact for one-axis positions, keep for m-RoPE).
        newlines: what becomes of separators: ``"rows"`` keeps those whose row keeps a token, ``"drop"`` none, ``"keep"`` all,
            ``"compete"`` selects among them as among tokens (at ``llm_layer``; they count in :class:`Tokens`).
            A selection with an ``order`` of its own has no rows and loses them.
        scope: what is selected from together: each ``"image"`` (or video) by itself, or, at ``llm_layer``, all of a ``"sample"``,
            with their views in one layout. Under ``"sample"`` and ``"compete"`` a selection has an index and scores only.
        evict: at ``llm_layer``: tokens that go leave the caches of the earlier layers as well, once the prompt is through.
        refresh: at ``llm_mlp``: several tokens behind a filled cache are a new prompt, read in full, and give a new set; otherwise
            they continue the answer with the set there is.
        deepstack: levels of DeepStack features (Qwen3-VL) that join behind early layers, ``"all"`` or ``"first"``.
        reads_text: fill in the instruction of :class:`Tokens`; reads_frame_scores: fill in its frame scores.
        empty_frames: what becomes of the text that frames a video frame (timestamp, start and end of vision) where the family
            writes any and the stage leaves the frame no token: ``"keep"`` or ``"drop"``.
    """

    hook: Hook
    select: Callable[..., Any]
    signals: Mapping[str, Signal] = field(default_factory=dict)
    layer: int = 0
    positions: str | None = None
    newlines: str = "rows"
    scope: str = "image"
    evict: bool = False
    refresh: bool = True
    reads_text: bool = False
    deepstack: str = "all"
    reads_frame_scores: bool = False
    empty_frames: str = "keep"

    @property
    def text_guided(self) -> bool:
        """Whether what the stage chooses depends on the question."""
        return (
            self.reads_text
            or self.reads_frame_scores
            or any(getattr(s, "from_text", False) for s in self.signals.values())
        )


@dataclass(frozen=True)
class Pruner:
    """Base of all methods. Subclasses are frozen dataclasses whose fields are the paper's parameters.

    Class attributes (for ``foveate list`` and ``foveate show``): ``name`` is set by :func:`register`; ``title``, ``paper``,
    ``cost`` and ``families`` describe the method; ``adaptive`` is True when the number of kept tokens depends on content,
    ``needs_grid`` when it depends on the shape of the grid; ``regrids`` when survivors stand for a resampled picture, none
    of them where a token was; ``content_free`` when the layout and the picture's id alone decide which tokens survive;
    ``budget_parameter`` names the parameter that is a :data:`Keep`, which other parameters may rule out: ``takes_budget`` is False then;
    ``counted`` names the parameters, with their values, under which an adaptive method keeps a count that is known beforehand.
    Any may be a property: ask a method, not its class.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    families: ClassVar[tuple[str, ...]] = ("all",)
    adaptive: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    budget_parameter: ClassVar[str] = "keep"
    takes_budget: ClassVar[bool] = True
    regrids: ClassVar[bool] = False
    content_free: ClassVar[bool] = False
    counted: ClassVar[Mapping[str, Any]] = {}

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        """Where the method acts on this model.

        Raises:
            MissingSignalError: the model cannot provide what the method reads.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement stages()")

    def budgets(self, layout: Layout) -> tuple[int, ...]:
        """How many tokens of each view of ``layout`` survive; methods that pool the views return a single number."""
        raise NotImplementedError(f"{type(self).__name__} does not implement budgets()")

    def kept_in(self, layout: Layout) -> int:
        """How many visual tokens of an image or video of this layout survive (the last stage that prunes)."""
        return sum(self.budgets(layout))

    def kept_on(self, model: ModelInfo, layout: Layout) -> int:
        """:meth:`kept_in` for methods whose count also depends on the model (on the depth of its tower)."""
        return self.kept_in(layout)

    def kept(self, n_tokens: int, grid: tuple[int, int] | None = None) -> int:
        """How many of ``n_tokens`` visual tokens of a single picture survive; for crops and videos see :meth:`kept_in`.

        Raises:
            ParameterError: the grid does not have ``n_tokens`` tokens, or is missing where the count depends on it.
        """
        if grid is None and self.needs_grid:
            raise ParameterError(f"{self.name}: the number of kept tokens depends on the grid; pass grid=(rows, cols)")
        rows, cols = grid or (1, n_tokens)
        if rows * cols != n_tokens:
            raise ParameterError(f"a grid of {rows} x {cols} does not hold {n_tokens} tokens")
        return self.kept_in(Layout.grid(rows, cols))

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
    return min(n_tokens, max(1, int(rounding(keep * n_tokens))))


def floor(x: float) -> int:
    """``math.floor`` that forgives the last bit, so that 0.29 * 100 counts as 29."""
    return math.floor(x + 1e-9)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise :class:`ParameterError` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ParameterError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def number(
    name: str, value: float, what: str, low: float = -math.inf, high: float = math.inf, above: bool = False
) -> float:
    """Return ``value`` if it is a finite number from ``low`` (``above``: not ``low`` itself) to ``high``; ``what`` it is of.

    Raises:
        ParameterError: it is not; the message names the parameter and the bounds.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        fits = False
    else:
        fits = (low < value if above else low <= value) and value <= high
    if not fits:
        raise ParameterError(f"{name}={value!r} is no {what}; give a number{_bounds(low, high, above)}")
    return value


def integer(
    name: str, value: int, what: str, low: int | None = None, error: type[FoveateError] = ParameterError
) -> int:
    """Return ``value`` if it is an int, at least ``low``; ``what`` it counts.

    Raises:
        ParameterError: (or the given ``error``) it is not.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or (low is not None and value < low):
        raise error(f"{name}={value!r} is no {what}; give an int{'' if low is None else f' >= {low}'}")
    return value


def many(name: str, values: Iterable[Any], one: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Return ``values`` as a tuple if they are a sequence of what ``one`` accepts.

    Raises:
        ParameterError: they are not.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ParameterError(f"{name}={values!r} is no sequence of numbers; put a single one in brackets")
    return tuple(one(value) for value in values)


def layers(name: str, values: Iterable[int]) -> tuple[int, ...]:
    """Return ``values`` as a tuple if they are different ints; whether a model has such layers is for ``stages`` to say.

    Raises:
        ParameterError: they are not.
    """
    found = many(name, values, lambda value: integer(name, value, "layer's number"))
    if len(set(found)) < len(found):
        raise ParameterError(f"{name}={found} names a layer twice; name each once")
    return found


def _bounds(low: float, high: float, above: bool) -> str:
    parts = (
        []
        if low == -math.inf
        else [f"above {low:g}" if above else f"from {low:g}" if high < math.inf else f">= {low:g}"]
    )
    parts += [] if high == math.inf else [f"{'at most' if above or not parts else 'to'} {high:g}"]
    return " " + (", " if above else " ").join(parts) if parts else ""


# -------------------------------------------------------------------------------------------------------- selecting


def ranked(scores: Tensor) -> Tensor:
    """Indices from the largest to the smallest score along the last axis: ``(…, N) -> (…, N)`` int64.

    Ties go to the lower index, NaN counts as lowest; arithmetic in float32.
    """
    scores = scores.float().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    return scores.argsort(dim=-1, descending=True, stable=True)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest scores along the last axis, :func:`ranked`, but ascending: ``(…, N) -> (…, k)`` int64."""
    return ranked(scores)[..., :k].sort(dim=-1).values


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
