"""What a model family tells the rest: where its parts are, how its visual tokens lie, which signals can be read."""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.adapters import compat
from foveate.adapters.engine.decoder import Decoder
from foveate.adapters.engine.mlp import check_gated
from foveate.adapters.taps import Tap, Values
from foveate.adapters.towers.base import Tower
from foveate.errors import MissingSignalError, ParameterError, UnsupportedModelError
from foveate.pruners.core import ModelInfo
from foveate.pruners.core.signals import CoreMatches, CoreNeurons, LayerNeurons, Signal, UnpooledFrames
from foveate.pruners.core.tokens import Layout, Selection

FAMILIES: list[type[Adapter]] = []


@dataclass
class Encoded:
    """What one call of the vision side produced, one entry per image or video in prompt order.

    Attributes:
        layouts: of the pictures.
        features: projected embeddings, separators left out, ``(N, D)`` each.
        signals: ``signal -> [(N, …)]`` (``[(V, C)]`` for one per view).
        survivors: tokens left by merging inside the tower, selections without a batch axis; None where nothing
            merges there.
    """

    layouts: list[Layout]
    features: list[Tensor]
    signals: dict[Signal, list[Tensor]] = field(default_factory=dict)
    survivors: list[Selection] | None = None


@dataclass(frozen=True)
class Modality:
    """One kind of visual input.

    Attributes:
        kind: ``"image"`` or ``"video"``.
        encoder: the method that encodes it.
        pixels: that method's pixel argument.
        token_id: its placeholder in prompts.
    """

    kind: str
    encoder: str
    pixels: str
    token_id: int


@dataclass(frozen=True)
class CallContents:
    """What a call brings into the decoder.

    Attributes:
        ids: ``(B, L)`` token ids, a modality's own where its pictures are; None where they cannot be told.
        modalities: the kinds of pictures whose features come along.
        again: the same features come again with every further token, as in ``generate()`` without a cache.
    """

    ids: Tensor | None = None
    modalities: tuple[Modality, ...] = ()
    again: bool = False


class PromptWatch:
    """Notes what calls of a model bring: here, placeholder tokens in ``input_ids`` and their pixels or features."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._call: dict[str, Any] | None = None
        self._handle = adapter.inner.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._call = bind(module.forward, args, kwargs) if args else kwargs

    def take(self, embeds: Tensor) -> CallContents:
        """What the running call brings, which has become ``embeds (B, L, D)``; it is forgotten then."""
        call, self._call = self._call, None
        if call is None:
            return CallContents()
        encoded = call.get(compat.EARLY_FEATURES) or {}
        # placeholder tokens that come without features (a model may generate one) are ordinary text
        brought = tuple(
            modality
            for modality in self.adapter.modalities
            if call.get(modality.pixels) is not None or encoded.get(modality.kind) is not None
        )
        ids = call.get("input_ids")
        if ids is None and call.get("inputs_embeds") is not None:
            ids = self._recognised(call["inputs_embeds"], brought)
        return CallContents(ids, brought, again=bool(encoded) and not call.get("use_cache", True))

    def _recognised(self, embeds: Tensor, modalities: tuple[Modality, ...]) -> Tensor:
        """Ids of the placeholders among embeddings, -1 elsewhere."""
        embed = self.adapter.inner.get_input_embeddings()
        ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
        for modality in modalities:
            placeholder = embed(torch.tensor(modality.token_id, device=embeds.device))
            ids = ids.masked_fill((embeds == placeholder).all(-1), modality.token_id)
        return ids

    def forget(self) -> None:
        """Let go of the call's tensors."""
        self._call = None

    def remove(self) -> None:
        """Watch no longer."""
        self._handle.remove()
        self.forget()


def bind(method: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, defaults and extra keywords included."""
    bound = inspect.signature(method).bind(*args, **kwargs)
    bound.apply_defaults()
    call = dict(bound.arguments)
    for parameter in inspect.signature(method).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            call.update(call.pop(parameter.name, {}))
    return call


class Adapter(ABC):
    """One attached model of one family. Subclasses fill in what differs; nothing here knows a pruner.

    Attributes:
        model: what was attached to.
        inner: the module whose methods encode pictures.
        text_model: the decoder that takes them in.
        tower: the vision tower.
        modalities: the kinds of visual input that the model takes.
        project: per-token map from encoder features to decoder embeddings; None if tokens are merged on the way.
        projector: the module that maps rows of the tower to decoder embeddings, row by row; None if none does.
        centre_crop: whether the family's processor cuts the centre square out of a picture (for drawings only).
        info: what methods may know about the model.
    """

    family: ClassVar[str] = ""
    classes: ClassVar[tuple[str, ...]] = ()
    """Names of the ``transformers`` classes that the family serves."""
    transformers: ClassVar[tuple[tuple[compat.Version, compat.Version], ...]] = compat.SUPPORTED
    """Versions of transformers that the family is served under, from and up to."""
    pixel_mean: ClassVar[tuple[float, float, float]] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    pixel_std: ClassVar[tuple[float, float, float]] = (0.26862954, 0.26130258, 0.27577711)
    """What the family's published processors normalise pictures with."""
    packed: ClassVar[bool] = False
    """Whether the tower works on one packed sequence ``(S, …)`` instead of batches of views ``(V, n, …)``."""
    writes_frame_text: ClassVar[bool] = False
    """Whether prompts hold text around every frame of a video: a timestamp, start and end of vision."""

    decoder_hooks: ClassVar[type[Decoder]] = Decoder
    """The hooks that apply what a session keeps to the text model."""
    prompt_watch: ClassVar[type[PromptWatch]] = PromptWatch
    """Knows what calls bring into the decoder."""

    inner: Any
    text_model: Any
    tower: Any
    modalities: tuple[Modality, ...]
    project: Callable[[Tensor], Tensor] | None = None
    projector: nn.Module | None = None
    centre_crop: bool = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inner, self.text_model = self.parts(model)
        info = self.describe()
        self.info = replace(info, token_ids=self._token_ids(), find_file=self._find_file)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.family:
            FAMILIES.append(cls)

    @staticmethod
    def parts(model: Any) -> tuple[Any, Any]:
        """The module whose methods encode pictures, and the decoder that takes them in."""
        inner = getattr(model, "model", model)
        inner = inner if hasattr(inner, "language_model") else model
        return inner, inner.language_model

    # ------------------------------------------------------------------------------------- what a family must answer

    @abstractmethod
    def describe(self) -> ModelInfo:
        """Find the parts (:attr:`tower`, :attr:`modalities`, …), and say what methods may know about the model.

        Raises:
            UnsupportedModelError: a part of the model is of a kind that the family does not know.
        """

    @abstractmethod
    def tap(self, signals: Iterable[Signal], values: Callable[[], Values | None]) -> Tap:
        """A tap on the vision tower that collects ``signals`` wherever ``values()`` says, see :class:`Tap`."""

    @abstractmethod
    def layouts(self, kind: str, call: dict[str, Any], output: Any) -> list[Layout]:
        """Layout of every image or video of an encoder call with arguments ``call``."""

    @abstractmethod
    def arrange(self, kind: str, values: Tensor, layouts: list[Layout], call: dict[str, Any]) -> list[Tensor]:
        """Bring tower values (one row per patch) to the layouts: ``[(N, C)]``, separators left out."""

    def patch_pixels(self, pixels: Tensor, layouts: list[Layout], kind: str, call: dict[str, Any]) -> list[Tensor]:
        """Preprocessed pixels under each token, ``[(N, 3, T, h, w)]``; see :class:`~foveate.pruners.core.PatchPixels`.

        Raises:
            MissingSignalError: the family cannot tell pixels apart by token.
        """
        raise MissingSignalError(f"no pixels can be told apart by token in {type(self.model).__name__}")

    def block_tower(self) -> Tower:
        """The blocks of the vision tower, for methods that merge tokens inside it.

        Raises:
            UnsupportedModelError: rows cannot leave this tower.
        """
        raise UnsupportedModelError(
            f"tokens cannot be merged inside the {self.info.tower} tower of {type(self.model).__name__}, which joins "
            "neighbouring patches after its blocks; use a method that acts at the decoder's entry"
        )

    def frame_text(self, ids: list[int], frames: list[tuple[int, int]]) -> list[list[int]]:
        """Places of the text around each frame of a video; ``ids`` is the row, ``frames`` each one's first and last
        place.
        """
        return [[] for _ in frames]

    # ------------------------------------------------------------------------------------------------------- shared

    def _token_ids(self) -> dict[str, tuple[int, ...]]:
        """Ids of special tokens by name, from the configuration of the model, its decoder and its generation."""
        ids: dict[str, set[int]] = {}
        configs = (self.inner.config, self.text_model.config, getattr(self.model, "generation_config", None))
        for config in filter(None, configs):
            for name, value in vars(config).items():
                if name.endswith("_token_id") and value is not None:
                    ids.setdefault(name.removesuffix("_token_id"), set()).update(
                        value if isinstance(value, (list, tuple)) else [value]
                    )
        return {name: tuple(sorted(values)) for name, values in ids.items()}

    def _find_file(self, name: str) -> str | None:
        return compat.find_file(self.inner.config, name)

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel of the processor beside the weights, else of the family's
        published ones.
        """
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (path := self.info.find_file(name)) is not None:
                given = json.loads(Path(path).read_text())
                given = given.get("image_processor", given)
                if given.get("do_normalize", True) and "image_mean" in given and "image_std" in given:
                    return tuple(given["image_mean"]), tuple(given["image_std"])
        return self.pixel_mean, self.pixel_std

    def pixels(self, kind: str, call: dict[str, Any], pixels: Tensor, layouts: list[Layout]) -> list[Tensor]:
        """Pixels in [0, 1] under each token, one ``(N, 3, T, h, w)`` per image or video."""
        parts = self.patch_pixels(pixels, layouts, kind, call)
        mean, std = (parts[0].new_tensor(x).view(3, 1, 1, 1) for x in self.normalisation())
        return [part * std + mean for part in parts]

    def check(self, signal: Signal) -> None:
        """Raise :class:`MissingSignalError` if the model cannot provide ``signal``, ParameterError if it would be of
        no neuron.
        """
        info = self.info
        if signal.needs_class_token and not info.class_token:
            raise MissingSignalError(
                f"{signal} needs a class token, and the {info.tower} tower of {type(self.model).__name__} has none"
            )
        if isinstance(signal, UnpooledFrames) and not info.pools_frames:
            raise MissingSignalError(f"{type(self.model).__name__} does not pool video frames after its projector")
        depth = info.decoder_layers if signal.in_decoder else info.encoder_layers
        if not 0 <= signal.layer < depth:
            part = "decoder" if signal.in_decoder else f"vision tower {info.tower}"
            raise MissingSignalError(
                f"{signal} asks for layer {signal.layer}, but the {part} has {depth} (0 .. {depth - 1})"
            )
        if isinstance(signal, LayerNeurons):
            mlp = self.text_model.layers[signal.layer].mlp
            check_gated(mlp, f"the MLP of decoder layer {signal.layer}")
            neurons = mlp.down_proj.in_features
            if isinstance(signal, (CoreNeurons, CoreMatches)) and int(signal.beta * neurons) < 1:
                raise ParameterError(
                    f"beta={signal.beta} of the {neurons} neurons of decoder layer {signal.layer} is none; give at "
                    f"least {1 / neurons:.2g}"
                )

    def encoded(self, kind: str, output: Any, call: dict[str, Any], signals: dict[Signal, Tensor]) -> Encoded | None:
        """Sort an encoder call's results by image; None if they are not on their way into the decoder.

        Raises:
            UnsupportedModelError: the model returned other numbers of tokens than the layouts have.
        """
        features = getattr(output, compat.FEATURES, None)
        if features is None:
            return None  # asked for as a tuple
        layouts = self.layouts(kind, call, output)
        features = [f.flatten(0, -2) for f in features]
        for layout, feature in zip(layouts, features, strict=True):
            if len(feature) not in (layout.length, layout.size):
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} returned {len(feature)} visual tokens where its layout "
                    f"{[view.grid for view in layout.views]} with {len(layout.newlines)} separators has {layout.length}"
                )
        tokens = [
            feature if len(feature) == layout.size else feature[layout.places(feature.device)]
            for layout, feature in zip(layouts, features)
        ]
        views = [len(layout.views) for layout in layouts]
        sorted_by_picture = {
            signal: list(values.split(views)) if signal.per_view else self._arranged(kind, values, layouts, call)
            for signal, values in signals.items()
        }
        return Encoded(layouts, tokens, sorted_by_picture)

    def _arranged(self, kind: str, values: Tensor, layouts: list[Layout], call: dict[str, Any]) -> list[Tensor]:
        scalar = values.ndim == (1 if self.packed else 2)
        arranged = self.arrange(kind, values[..., None] if scalar else values, layouts, call)
        return [x.squeeze(-1) for x in arranged] if scalar else arranged


def _wrapped(model: nn.Module) -> nn.Module | None:
    """The model inside what torch.compile, data parallelism or PEFT made of it."""
    peft = getattr(model, "get_base_model", None)
    inner = (getattr(model, "_orig_mod", None), getattr(model, "module", None), peft() if callable(peft) else None)
    return next((x for x in inner if isinstance(x, nn.Module)), None)


def family_of(model: nn.Module) -> type[Adapter] | None:
    """The family that knows the nearest of a model's classes; None if none does."""
    for cls in type(model).__mro__:
        for family in FAMILIES:
            if cls.__name__ in family.classes:
                return family
    return None


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model's family.

    Raises:
        UnsupportedModelError: no family knows the model; the message lists the known ones.
    """
    found = family_of(model)
    if found is not None:
        compat.check_version(type(model).__name__, found.transformers)
        return found(model)
    known = ", ".join(family.classes[0] for family in FAMILIES)
    inner = _wrapped(model)
    if inner is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} wraps {type(inner).__name__}; attach to the model itself, not to what was made "
            "of it"
        )
    reason = "" if hasattr(model, "forward") else " (and it is not a torch module)"
    if not any("vision" in name or "visual" in name for name, _ in getattr(model, "named_children", list)()):
        reason += "; it has no vision tower, so there are no visual tokens to prune" if reason == "" else ""
    raise UnsupportedModelError(f"no adapter for {type(model).__name__}{reason}; known families: {known}")
