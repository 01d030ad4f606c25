"""What every method is: a frozen dataclass of its paper's parameters that says where it acts and what it keeps there.

Three rungs. A :class:`Scorer` only scores tokens, ``score(tokens, **signals) -> (B, N)``. A :class:`ByView` chooses
among the tokens of one view at a time, ``choose(tokens, k, **signals) -> Selection``. Both inherit budgets, views and
where to act. A :class:`Pruner` says in ``stages`` where it acts and returns a ``Selection`` itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from foveate.errors import FoveateError, MissingSignalError, ParameterError, UnknownNameError, nearest
from foveate.pruners.core.parameters import Keep, check
from foveate.pruners.core.selection import best, budget, keep_all, per_view, split_budget
from foveate.pruners.core.signals import Signal
from foveate.pruners.core.stages import AtEntry, Stage
from foveate.pruners.core.tokens import Layout, Selection, Tokens, View

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ModelInfo:
    """What a method may know about the model it is attached to.

    Attributes:
        family: adapter name (``"llava"``, ``"qwen2_5_vl"``, …).
        tower: class name of the vision tower.
        encoder_layers: number of encoder blocks.
        feature_layer: the 0-based block whose output feeds the projector.
        class_token: whether the tower has one.
        decoder_layers: number of decoder layers.
        mrope: three-axis positions.
        full_attention: encoder blocks without windows (None: all of them, as in most towers).
        patch_size: side of a patch in pixels.
        token_ids: ids of special tokens by what the model's configuration calls them: ``"pad"``, ``"eos"``, …
        find_file: path of a file of this name that lies beside the model's weights, or None; never asks the network.
        frames_per_view: video frames that the vision encoder fuses into one view.
        pools_frames: video frames are pooled after the projector, so that ``UnpooledFrames`` can be read.
        prefix_tokens: rows before the patches (class, distillation, registers), None: the class token alone, if any.
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
        """The 0-based encoder block that parameter ``name`` means: None is the feature layer, negative counts from the
        end.

        Raises:
            ParameterError: no such block, or its attention stays inside windows.
        """
        layer = self.feature_layer if layer is None else layer
        block = layer + self.encoder_layers if layer < 0 else layer
        if not 0 <= block < self.encoder_layers:
            raise ParameterError(f"{name}={layer}: the {self.tower} tower has blocks 0 .. {self.encoder_layers - 1}")
        if self.full_attention is not None and block not in self.full_attention:
            raise ParameterError(
                f"{name}={layer}: block {block} of the {self.tower} tower attends inside windows only; blocks with "
                f"full attention: {', '.join(map(str, self.full_attention))}"
            )
        return block

    def decoder_layer(self, name: str, layer: int) -> int:
        """``layer`` if the decoder has it and a layer before it.

        Raises:
            ParameterError: it has not.
        """
        if not 1 <= layer < self.decoder_layers:
            raise ParameterError(
                f"{name}={layer}: the decoder has {self.decoder_layers} layers, so tokens can leave it before layers "
                f"1 .. {self.decoder_layers - 1}"
            )
        return layer

    def require_class_token(self, what: str, instead: str) -> None:
        """Raise :class:`MissingSignalError` if the tower has no class token for ``what``; ``instead`` would work."""
        if not self.class_token:
            raise MissingSignalError(
                f"{what} reads the attention of the class token, and the {self.tower} tower of this {self.family} "
                f"model has none; use {instead}"
            )


@dataclass(frozen=True)
class Pruner:
    """Base of all methods. Subclasses are frozen dataclasses whose fields are the paper's parameters.

    Class attributes describe a method for ``foveate list`` and ``foveate show``; any may be a property.
    """

    name: ClassVar[str] = ""
    """Set by :func:`register`."""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    families: ClassVar[tuple[str, ...]] = ("all",)
    budget_parameter: ClassVar[str] = "keep"
    """The parameter that is a :data:`Keep`."""
    regrids: ClassVar[bool] = False
    """Survivors stand for a resampled picture, none of them where a token was."""
    content_free: ClassVar[bool] = False
    """The layout and the picture's id alone decide which tokens survive."""

    def __post_init__(self) -> None:
        check(self)

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        """Where the method acts on this model.

        Raises:
            MissingSignalError: the model cannot provide what the method reads.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement stages()")

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        """How many visual tokens of a picture or video of this layout survive the method's last stage.

        None: its content decides. Everything else about numbers follows from this one answer.
        """
        return None

    def prepare(self, image: Image) -> Image:
        """What to do to a picture before the processor sees it; the identity for all methods that act in the model."""
        return image

    def parameters(self) -> dict[str, Any]:
        """The method's parameters by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclass(frozen=True)
class ByView(Pruner):
    """A method that chooses in every view of a picture by itself: implement :meth:`choose`, and :meth:`reads` for
    signals.

    Attributes:
        keep: fraction or number of tokens of the image, shared among its views in proportion to their sizes.
    """

    pooled: ClassVar[bool] = False
    """All views of a picture compete for one budget, instead of each view for its share."""

    by_view: ClassVar[tuple[str, ...]] = ()
    """Signals that have one row per view, not one per token."""

    keep: Keep = 0.25

    def choose(self, tokens: Tokens, k: int, **signals: Tensor) -> Selection:
        """``k`` of ``tokens``, which are more: those of one view, or of the picture where views are :attr:`pooled`."""
        raise NotImplementedError(f"{type(self).__name__} does not implement choose()")

    def reads(self, model: ModelInfo) -> Mapping[str, Signal]:
        """The signals that the method reads, by argument."""
        return {}

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        return (AtEntry(self.select, self.reads(model)),)

    def total(self, n: int) -> int:
        """Tokens that survive of ``n``."""
        return budget(self.keep, n)

    def budgets(self, layout: Layout) -> tuple[int, ...]:
        """Tokens of each view that survive, a single number where they are :attr:`pooled`."""
        total = self.total(layout.size)
        return (total,) if self.pooled else split_budget(total, layout.sizes)

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        return sum(self.budgets(layout))

    def select(self, tokens: Tokens, **signals: Tensor) -> Selection:
        """What :meth:`choose` keeps; everything where the budget has room for it."""
        if not self.pooled:
            return per_view(tokens, self.budgets(tokens.layout), self.choose, self.by_view, **signals)
        k = self.total(tokens.count)  # of those that are there: inside the decoder some are gone
        return keep_all(tokens) if k >= tokens.count else self.choose(tokens, k, **signals)


@dataclass(frozen=True)
class Scorer(ByView):
    """A method that keeps the tokens of highest score: implement :meth:`score`, and :meth:`reads` for signals."""

    def score(self, tokens: Tokens, **signals: Tensor) -> Tensor:
        """How much each token of a picture is worth keeping, ``(B, N)`` float."""
        raise NotImplementedError(f"{type(self).__name__} does not implement score()")

    def choose(self, tokens: Tokens, k: int, scores: Tensor) -> Selection:
        """The tokens of highest ``scores (B, N)``, ties to the lower number."""
        return best(tokens, k, scores)

    def select(self, tokens: Tokens, **signals: Tensor) -> Selection:
        kept = self.total(tokens.count) if self.pooled else sum(self.budgets(tokens.layout))
        if kept >= tokens.count:
            return keep_all(tokens)
        return super().select(tokens, scores=self.score(tokens, **signals))


def content_decides(pruner: Pruner) -> bool:
    """Whether a picture's content may decide how many tokens the method keeps: of a plain one, or of one with crops."""
    crops = tuple(View(24, 24, 576 + 24 * i, 48, kind="crop") for i in range(2))
    for layout in (Layout.grid(24, 24), Layout((View(24, 24, kind="thumbnail"), *crops))):
        with contextlib.suppress(FoveateError):  # a layout that it does not take
            if pruner.count(layout) is None:
                return True
    return False


# ------------------------------------------------------------------------------------------------------------ by name

PRUNERS: dict[str, type[Pruner]] = {}
P = TypeVar("P", bound=type[Pruner])


def register(name: str) -> Callable[[P], P]:
    """Class decorator: make a method known under ``name``."""

    def add(cls: P) -> P:
        if name in PRUNERS:
            raise ParameterError(f"the method name {name!r} is already taken by {PRUNERS[name].__qualname__}")
        cls.name = name
        PRUNERS[name] = cls
        return cls

    return add


def find(name: str) -> type[Pruner]:
    """The method called ``name``.

    Raises:
        UnknownNameError: there is none; the message suggests the nearest.
    """
    if name not in PRUNERS:
        raise UnknownNameError(f"unknown method {name!r}; {nearest(name, PRUNERS)}")
    return PRUNERS[name]


def create(method: str | Pruner | type[Pruner], **params: Any) -> Pruner:
    """Turn a name, a class or a ready method into a method with parameters ``params``.

    Names may compose: ``"pospad:random"`` is PosPad around Random, each taking the parameters it knows, the outer one
    first; ``"then:divprune+fastv"`` is one after the other; ``"random@fastv"`` is FastV's control (``RandomLike``).

    Raises:
        UnknownNameError: no such method or parameter.
        ParameterError: parameters given beside a ready method, or a method around another that goes around none.
    """
    if isinstance(method, str) and method.startswith("random@"):
        from foveate.pruners.core.control import RandomLike

        return RandomLike(create(method.removeprefix("random@"), **params))
    if isinstance(method, str) and ":" in method:
        return _composed(*method.split(":", 1), params)
    if isinstance(method, Pruner):
        if params:
            raise ParameterError(f"{method} is configured already; drop {', '.join(params)} or use dataclasses.replace")
        return method
    cls = find(method) if isinstance(method, str) else method
    if not (isinstance(cls, type) and issubclass(cls, Pruner)):
        raise ParameterError(f"{method!r} is not a method: give a name (see `foveate list`) or a Pruner")
    known = [f.name for f in dataclasses.fields(cls)]
    for name in params:
        if name not in known:
            own = "it has a schedule of its own in place of a budget; " if name == "keep" else ""
            raise UnknownNameError(f"{cls.name} has no parameter {name!r}; {own}{nearest(name, known)}")
    try:
        return cls(**params)
    except TypeError as error:  # a value that cannot even be compared
        given = ", ".join(f"{name}={value!r}" for name, value in params.items())
        raise ParameterError(
            f"{cls.name} cannot be built with {given}: {error}; see `foveate show {cls.name}`"
        ) from None


def _composed(outer: str, inner: str, params: dict[str, Any]) -> Pruner:
    """The method of a name such as ``outer:inner``."""
    if outer == "then":
        from foveate.pruners.core.compose import Then

        if params:
            raise ParameterError(f"then:{inner} takes no parameters; build Then(...) from configured methods instead")
        return Then(*(create(name) for name in inner.split("+")))
    cls = find(outer)
    known = {f.name for f in dataclasses.fields(cls)} - {"inner"}
    if not hasattr(cls, "inner"):
        raise ParameterError(f"{outer}:{inner}: {outer} goes around no other method; methods that do: pospad, then")
    own = {name: value for name, value in params.items() if name in known}
    rest = {name: value for name, value in params.items() if name not in known}
    return create(outer, inner=create(inner, **rest), **own)
