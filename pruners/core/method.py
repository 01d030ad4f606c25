"""What every method is made of: where it acts, what it may know of a model, and the base class itself.

A method is a frozen dataclass of its paper's parameters. ``stages(model)`` returns where it acts (:class:`Hook`), what
it wants to read (:class:`Signal`) and the function that turns visual tokens into a :class:`Selection`. Nothing here
knows a model.

Methods and adapters import all they need from here; it lives in ``tokens.py`` (tokens, layouts, selections), ``signals.py``,
``parameters.py`` (checks) and ``selecting.py`` (budgets, rankings, one view at a time).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from foveate.errors import MissingSignalError, ParameterError
from foveate.pruners.core.parameters import Keep, check_keep, integer, layers, many, number, one_of
from foveate.pruners.core.selection import (
    among_top,
    budget,
    floor,
    gather,
    keep_all,
    kept_tokens,
    per_view,
    ranked,
    seeded,
    split_budget,
    top_k,
    view_budgets,
    view_id,
)
from foveate.pruners.core.signals import (
    ClassAttention,
    ClassFeatures,
    CoreMatches,
    CoreNeurons,
    CrossModalAttention,
    EncoderFeatures,
    EncoderKeys,
    GivenAttention,
    InstructionAttention,
    LastTokenAttention,
    PatchPixels,
    ReceivedAttention,
    RowMatches,
    Signal,
    TransitionVariation,
    UnpooledFrames,
)
from foveate.pruners.core.tokens import Layout, Newline, Selection, Tokens, View

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ClassAttention",
    "ClassFeatures",
    "CoreMatches",
    "CoreNeurons",
    "CrossModalAttention",
    "EncoderFeatures",
    "EncoderKeys",
    "GivenAttention",
    "Hook",
    "InstructionAttention",
    "Keep",
    "LastTokenAttention",
    "Layout",
    "ModelInfo",
    "Newline",
    "PatchPixels",
    "Pruner",
    "ReceivedAttention",
    "RowMatches",
    "Selection",
    "Signal",
    "Stage",
    "Tokens",
    "TransitionVariation",
    "UnpooledFrames",
    "View",
    "among_top",
    "budget",
    "check_keep",
    "floor",
    "gather",
    "integer",
    "keep_all",
    "kept_tokens",
    "layers",
    "many",
    "number",
    "one_of",
    "per_view",
    "ranked",
    "seeded",
    "split_budget",
    "top_k",
    "view_budgets",
    "view_id",
]


class Hook(str, Enum):
    """Where a stage acts."""

    PIXELS = "pixels"  # in front of the vision tower
    VIT_BLOCK = "vit_block"  # inside one block of the vision tower, between attention and MLP
    LLM_INPUT = "llm_input"  # where the sequence enters the decoder
    LLM_LAYER = "llm_layer"  # in front of one decoder layer, in prefill
    LLM_MLP = "llm_mlp"  # inside one decoder layer's MLP: read in prefill, run in part in decode
    LLM_CACHE = "llm_cache"  # one decoder layer's keys and values, once the prompt is through


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
