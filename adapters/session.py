"""``foveate.attach``: put a pruner on a model, watch what it does, take it off again."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from foveate.adapters import compat
from foveate.adapters.engine.prefill import Item, Prefill
from foveate.adapters.families.base import Adapter, CallContents, Modality, adapter_for, bind, family_of
from foveate.adapters.taps import DecoderTap, Replaced, Values
from foveate.adapters.towers.base import BlockMerger, MergeTrace, Tower, tower_for
from foveate.adapters.towers.merging import TowerMerging
from foveate.adapters.trace import Trace
from foveate.errors import (
    AttachError,
    FoveateError,
    InputError,
    MissingSignalError,
    ParameterError,
    UnsupportedModelError,
)
from foveate.pruners.core.method import PRUNERS, ModelInfo, Pruner, create
from foveate.pruners.core.preset import Preset, is_preset
from foveate.pruners.core.signals import PatchPixels
from foveate.pruners.core.stages import AtEntry, AtPixels, BeforeLayer, InCache, InMLP, InTower, Stage

POSITIONS, SEPARATORS = ("auto", "keep", "compact"), ("auto", "keep", "drop")
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]] = weakref.WeakKeyDictionary()
Self = TypeVar("Self", bound="Attachment")


def attach(
    model: nn.Module,
    pruner: str | Pruner | type[Pruner],
    *,
    positions: str = "auto",
    separators: str = "auto",
    **params: Any,
) -> Session | VitSession:
    """Put a pruner on a model. It acts from now on in ``model(...)``, ``model.generate(...)`` and pipelines.

    Args:
        model: a ``transformers`` vision-language model of a known family, or, for methods that merge inside a vision
            tower, a vision model of timm, open_clip or transformers. Weights, dtype, device, attention
            implementation and generation config stay as they are.
        pruner: a method's name (``foveate list``), class or instance, or a preset that ``foveate tune`` wrote
            (``"preset.yaml"``).
        positions: ``"keep"`` lets surviving tokens keep the positions they had, ``"compact"`` closes the gaps,
            ``"auto"`` follows the preset, or the method's specification for the family.
        separators: ``"keep"`` all newline embeddings of a pruned AnyRes picture, as vLLM has to where the method's
            number of them depends on the content, or ``"drop"`` them; ``"auto"`` follows the method's specification.
        **params: the method's parameters (``foveate show NAME``).

    Returns:
        A :class:`Session`, on a vision model a :class:`VitSession`; use it in a ``with`` block, or call its
        ``detach()`` when done.

    Raises:
        UnsupportedModelError: unknown family.
        MissingSignalError: the method reads what the model cannot provide.
        UnknownNameError, ParameterError, BudgetError: bad names or values.
        AttachError: a pruner is attached already.
    """
    if isinstance(pruner, nn.Module):
        raise ParameterError(
            f"the model comes first: foveate.attach(model, pruner), not {type(pruner).__name__} second"
        )
    if not isinstance(pruner, Pruner) and is_preset(pruner):
        preset = Preset.read(pruner, **params)
        method, positions = preset.pruner, preset.positions if positions == "auto" else positions
    else:
        method = create(pruner, **params)
    tower = None if family_of(model) else tower_for(model)
    if tower is not None:
        return VitSession(model, method, tower)
    return Session(model, method, positions, separators)


def attached_to(root: nn.Module) -> Attachment | None:
    """The session that acts on ``root``, if any."""
    return _ATTACHED.get(root, lambda: None)()


def session_of(model: nn.Module) -> Session | None:
    """The session that is attached to the model, if any."""
    inner = getattr(model, "model", model)
    found = attached_to(inner if hasattr(inner, "language_model") else model)
    return found if isinstance(found, Session) else None


class Attachment:
    """An attached pruner: one method on one model, to be taken off again.

    Attributes:
        model: what it was attached to.
        pruner: what was attached.
    """

    def __init__(self, model: nn.Module, pruner: Pruner, root: nn.Module) -> None:
        """``root``: the module that only one pruner may act on at a time.

        Raises:
            AttachError: one acts on it already.
        """
        self.model, self.pruner, self._root = model, pruner, root
        self._undo = ExitStack()
        attached = attached_to(root)
        if attached is not None:
            raise AttachError(
                f"{type(model).__name__} already has {attached.pruner.name!r} attached; call detach() on that "
                "session first, "
                "or combine methods with foveate.Then"
            )

    def detach(self) -> None:
        """Take the pruner off; the model is what it was. Calling it again does nothing."""
        self._undo.close()
        if self.attached:
            del _ATTACHED[self._root]

    @property
    def attached(self) -> bool:
        """Whether the pruner still acts on the model."""
        return attached_to(self._root) is self

    def __enter__(self: Self) -> Self:
        if not self.attached:
            raise AttachError("this session was detached; call foveate.attach again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached to" if self.attached else "detached from"
        return f"<foveate.{type(self).__name__} {self.pruner} {state} {type(self.model).__name__}>"


class _Running(threading.local):
    """What runs in this thread.

    Attributes:
        call: begun by its pictures or its prompt.
        encoder: where signals of the vision side are kept; None while none are read.
        prompt: where signals of the decoder are kept; None while none are read.
    """

    call: Prefill | None = None
    encoder: Values | None = None
    prompt: Values | None = None


class Session(Attachment):
    """A pruner attached to a vision-language model.

    Attributes:
        model: what it was attached to.
        pruner: what was attached.
        positions: the policy asked for.
        separators: the policy asked for.
        trace: what happened in the last call that brought visual tokens, None before. A call whose ``inputs_embeds``
            already hold picture features brings none that can be told from text: it runs unpruned.
        sample_ids: set to one number per image before a call to fix what random methods draw for it; by default
            images are numbered as they come, from 0.
        frame_scores: set to one sequence of scores per video, one score per sampled frame, before a call whose
            method reads them (``quota``); the call uses them up, for they belong to its question.
    """

    def __init__(self, model: nn.Module, pruner: Pruner, positions: str = "auto", separators: str = "auto") -> None:
        for name, value, known in (("positions", positions, POSITIONS), ("separators", separators, SEPARATORS)):
            if value not in known:
                raise ParameterError(f"{name}={value!r} is not one of {', '.join(map(repr, known))}")
        self.adapter: Adapter = adapter_for(model)
        super().__init__(model, pruner, self.adapter.inner)
        self.positions, self.separators = positions, separators
        self.trace: Trace | None = None
        self.sample_ids: Sequence[int] | None = None
        self.frame_scores: Sequence[Sequence[float] | Tensor] | None = None
        try:
            self.stages = self._checked(pruner)
        except MissingSignalError as error:
            raise MissingSignalError(f"{error}; methods that work here: {', '.join(self._usable())}") from None
        self.entry_stage = next((stage for stage in self.stages if isinstance(stage, AtEntry)), None)
        self.layer_stages: dict[int, BeforeLayer] = self.by_layer(BeforeLayer)
        self.mlp_stages: dict[int, InMLP] = self.by_layer(InMLP)
        self.cache_stages: dict[int, InCache] = self.by_layer(InCache)
        self.merging: TowerMerging | None = None
        self._pauses = 0
        self._seen = 0
        self._local = _Running()
        with self._undo:  # what is on the model comes off again if the rest fails
            self._install()
            self._undo = self._undo.pop_all()
        _ATTACHED[self._root] = weakref.ref(self)

    # ------------------------------------------------------------------------------------------------- user's verbs

    def detach(self) -> None:
        super().detach()
        self._local = _Running()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """In this block the model runs unpruned, and the session notes nothing, as if it were detached."""
        self._pause(1)
        try:
            yield
        finally:
            self._pause(-1)

    def _pause(self, step: int) -> None:
        self._pauses += step
        if self.merging is not None:
            self.merging.active = not self._pauses

    # ----------------------------------------------------------------------------------------------------- assembly

    def _usable(self) -> list[str]:
        """Names of the registered methods that, at their defaults, find all they read in this model."""
        names = []
        for name in PRUNERS:
            with contextlib.suppress(FoveateError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._checked(create(name))
                names.append(name)
        return names

    def _checked(self, pruner: Pruner) -> tuple[Stage, ...]:
        """The method's stages on this model, if the model can serve them."""
        stages = pruner.stages(self.adapter.info)
        depth = self.adapter.info.decoder_layers
        for stage in stages:
            if isinstance(stage, (InMLP, InCache)) and not 0 <= stage.layer < depth:
                raise ParameterError(
                    f"{pruner.name} acts in decoder layer {stage.layer}, but there are 0 .. {depth - 1}"
                )
            if isinstance(stage, BeforeLayer) and not 1 <= stage.layer < depth:
                raise ParameterError(
                    f"{pruner.name} acts before decoder layer {stage.layer}, but {type(self.model).__name__} "
                    f"has {depth} layers (1 .. {depth - 1} are possible)"
                )
            for signal in () if isinstance(stage, InTower) else stage.signals.values():
                self.adapter.check(signal)
        blocks = [stage for stage in stages if isinstance(stage, InTower)]
        if blocks:
            self.adapter.block_tower().check(blocks)
        places = [(stage.point, stage.layer) for stage in stages]
        if len(set(places)) < len(places):
            raise ParameterError(f"{pruner.name} has two stages at one hook point: {places}")
        return stages

    def by_layer(self, kind: type[Stage]) -> dict[int, Any]:
        """The stages of one type, by layer."""
        return {stage.layer: stage for stage in self.stages if isinstance(stage, kind)}

    def _install(self) -> None:
        adapter, put = self.adapter, self._undo.callback
        blocks = [stage for stage in self.stages if isinstance(stage, InTower)]
        read = dict.fromkeys(s for stage in self.stages if stage not in blocks for s in stage.signals.values())
        inside = [signal for signal in read if signal.in_decoder]
        if inside:
            layers = adapter.text_model.layers
            self.decoder_tap = DecoderTap(layers, inside, lambda: self._local.prompt, lambda: self._local.call)
            put(self.decoder_tap.remove)
        self._watch = adapter.prompt_watch(adapter)
        put(self._watch.remove)
        self.decoder = adapter.decoder_hooks(adapter.text_model, self, mrope=adapter.info.mrope)
        put(self.decoder.remove)
        tower = [signal for signal in read if not (signal.in_decoder or isinstance(signal, PatchPixels))]
        if tower:
            put(adapter.tap(tower, lambda: self._local.encoder).remove)
        self._pixels = next((signal for signal in read if isinstance(signal, PatchPixels)), None)
        if blocks:
            self.merging = TowerMerging(adapter, self.pruner, blocks)
            put(self.merging.remove)
        for modality in adapter.modalities:  # generate() calls the encoder as a method, out of any hook's reach
            encode = getattr(adapter.inner, modality.encoder, None)
            if encode is None:
                raise compat.not_understood(f"{type(adapter.inner).__name__} has no method {modality.encoder}")
            watched = functools.wraps(encode)(functools.partial(self._encode, encode, modality))
            put(Replaced(adapter.inner, modality.encoder, watched).remove)

    # ------------------------------------------------------------------------------------------------- the vision side

    @property
    def call(self) -> Prefill:
        """The call that runs in this thread."""
        if self._local.call is None:
            self._local.call = Prefill(self, Trace(self.pruner.name, self.pruner.parameters()))
        return self._local.call

    def _encode(self, encode: Any, modality: Modality, /, *args: Any, **kwargs: Any) -> Any:
        """The model's encoder method, with signals collected on the way."""
        if self._pauses or self._local.encoder is not None:  # Qwen3-VL encodes videos through its image encoder
            return encode(*args, **kwargs)
        given, prefill = bind(encode, args, kwargs), self.call
        # older LLaVA-OneVision code says pixel_values for videos too
        name = modality.pixels if modality.pixels in given else "pixel_values"
        pixels = given[name]
        if not bool(torch.isfinite(pixels).all()):
            raise InputError(f"{modality.pixels} holds NaN or infinite values; check the image and its preprocessing")
        smaller = pixels
        for stage in self.by_layer(AtPixels).values():
            smaller = stage.select(pixels)
        shrunk = smaller.shape != pixels.shape
        if shrunk:
            given = {**given, name: smaller, compat.RESIZE_POSITIONS: True}
        signals: Values = {}
        self._local.encoder = signals
        try:
            with prefill.timed("encoder", pixels.device):
                output = encode(**given)
        finally:
            self._local.encoder = None
        if shrunk and getattr(output, compat.FEATURES, None) is not None:
            setattr(output, compat.FEATURES, self._padded(modality, given, output))
        if self.merging is not None:
            signals = self.merging.signals(signals)
        encoded = self.adapter.encoded(modality.kind, output, given, signals)
        if encoded is None:
            return output
        prefill.numbers = {}
        if self.merging is not None:
            encoded.survivors = self.merging.survivors(modality.kind, given, encoded.layouts)
        if self._pixels is not None:
            encoded.signals[self._pixels] = self.adapter.pixels(modality.kind, given, pixels, encoded.layouts)
        prefill.encoded[modality.kind] = encoded
        return output

    def _padded(self, modality: Modality, given: dict[str, Any], output: Any) -> list[Tensor]:
        """A smaller picture gives fewer tokens than the prompt has places: they come first, zeros fill up."""
        layouts = self.adapter.layouts(modality.kind, given, output)
        return [
            torch.cat([few, few.new_zeros(layout.length - len(few), few.shape[-1])])
            for few, layout in zip(getattr(output, compat.FEATURES), layouts)
        ]

    # ------------------------------------------------------------------------------------------- what the decoder asks

    def begin(self, embeds: Tensor, mask: Tensor | None, past: int, cache: Any) -> Prefill | None:
        """A call of the decoder starts: the prefill that it is, None where it continues an answer or runs unpruned."""
        if self._pauses:
            self._watch.forget()
            return None
        brought, prefill = self._watch.take(embeds), self.call
        prefill.cache = cache
        shows = prefill.enter(brought, embeds, mask, past)
        if not shows and brought.ids is not None:  # None: embeddings that the caller made
            self._check_nothing_arrived(brought, embeds)
        if shows or any(past == 0 or (stage.refresh and embeds.shape[1] > 1) for stage in self.mlp_stages.values()):
            if self.model.training and torch.is_grad_enabled():
                self._refuse_checkpointing()
            self._local.prompt = prefill.values
            return prefill
        return None

    def forget(self) -> None:
        """A call of the decoder is over, well or not: let go of its tensors."""
        if self._pauses:
            return
        prefill, self._local.call, self._local.prompt = self._local.call, None, None
        if prefill is not None and prefill.again:  # the encoded pictures are needed once more
            again = self.call
            again.encoded, again.numbers, again.frame_scores = prefill.encoded, prefill.numbers, prefill.frame_scores

    def numbers_of(self, items: Sequence[Item]) -> dict[tuple[str, int], int]:
        """An id for each encoded picture; beams share that of the first."""
        ids = range(self._seen, self._seen + len(items)) if self.sample_ids is None else list(self.sample_ids)
        if len(ids) != len(items):
            raise ParameterError(f"sample_ids names {len(ids)} images, the call brings {len(items)}")
        self._seen, self.sample_ids = self._seen + len(items), None
        return {(item.kind, item.number): i for item, i in zip(items, ids)}

    def scores_of(self, videos: Sequence[Item]) -> dict[int, Any]:
        """The given frame scores by number of the encoded video."""
        given, self.frame_scores = self.frame_scores, None
        if given is None:
            return {}
        if len(given) != len(videos):
            raise ParameterError(
                f"frame_scores has {len(given)} entries, the call brings {len(videos)} videos; give one sequence per "
                "video"
            )
        return {item.number: scores for item, scores in zip(videos, given)}

    def _check_nothing_arrived(self, brought: CallContents, embeds: Tensor) -> None:
        """Raise if features of pictures stand in ``embeds`` that would go unpruned, for they came unnoticed.

        Raises:
            InputError: the prompt has been lengthened.
            NotUnderstoodError: they came under a name that is not known.
        """
        ids = brought.ids
        if ids.shape != embeds.shape[:2]:
            if brought.modalities:
                raise InputError(
                    f"{tuple(ids.shape)} token ids became {tuple(embeds.shape[:2])} embeddings, so it is not known "
                    "where the "
                    "pictures are; soft prompts cannot be pruned"
                )
            return
        if ids.shape[1] == 1 or not (self.call.encoded or compat.untested()):
            return
        for modality in self.adapter.modalities:
            here = ids == modality.token_id
            token = torch.tensor(modality.token_id, device=ids.device)
            if bool(here.any()) and not bool((embeds[here] == self.adapter.inner.get_input_embeddings()(token)).all()):
                raise compat.not_understood(
                    f"features stand in {int(here.sum())} places of {modality.kind}s, and "
                    f"{type(self.adapter.inner).__name__} was called without pixels or features under a name that is "
                    "known"
                )

    def _refuse_checkpointing(self) -> None:
        """Layers that transformers before 5.23 checkpoints run their hooks again in the backward pass, after the
        prompt.
        """
        if compat.installed() < (5, 23) and any(map(compat.checkpoints, self.adapter.text_model.layers)):
            raise AttachError(
                f"{self.pruner.name} cannot act under the gradient checkpointing of transformers before 5.23, which "
                "runs "
                "hooks twice; switch it off, or install a newer transformers"
            )


class VitSession(Attachment):
    """A merger on a vision model that stands by itself. It acts in every call of the model until :meth:`detach`.

    Numbers of tokens follow from the input's shape, so ``torch.compile`` makes no graph break. Attach to the model
    itself, not to what ``torch.compile`` returned.
    """

    def __init__(self, model: nn.Module, pruner: Pruner, tower: Tower) -> None:
        super().__init__(model, pruner, tower.trunk)
        stages = pruner.stages(tower.info)
        inside = [stage for stage in stages if isinstance(stage, InTower)]
        if not inside or len(inside) < len(stages):
            raise UnsupportedModelError(
                f"{pruner.name} also acts outside of the vision tower, and {type(model).__name__} is nothing but "
                "one; methods "
                "that work here: pitome, tome"
            )
        self._tower = tower
        self._merger = BlockMerger(tower, pruner, inside)
        self._merger.holder = self  # the model keeps the merger, so it keeps the session
        self._undo.callback(self._merger.remove)
        _ATTACHED[self._root] = weakref.ref(self)

    @property
    def info(self) -> ModelInfo:
        """What the method knows of the model; ``pruner.counts(n_patches, session.info)`` announces the rows of every
        block.
        """
        return self._tower.info

    @property
    def trace(self) -> MergeTrace | None:
        """What merged in the last call, None before."""
        return self._merger.trace

    @property
    def sizes(self) -> Tensor | None:
        """Patches in each row at the end of the last call, ``(B, K)``; None where none merged."""
        return self._merger.sizes

    def unmerge(self, features: Tensor) -> Tensor:
        """Rows at the end of the tower back at every original row: ``(B, K, C) -> (B, N, C)``; see
        :meth:`MergeTrace.unmerge`.

        Raises:
            AttachError: no call has run.
        """
        if self.trace is None:
            raise AttachError("nothing to unmerge: the model has not been called since the pruner was attached")
        return self.trace.unmerge(features)
