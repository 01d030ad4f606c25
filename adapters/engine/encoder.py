"""Watch a model's encoder methods: what the vision side computed stays at hand until the decoder takes it in."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.adapters import compat
from foveate.adapters.attachment import Replaced, undone_on_failure
from foveate.adapters.families.base import Adapter, Encoded, Modality, bind
from foveate.adapters.towers.base import block_stages
from foveate.adapters.towers.merging import TowerMerging
from foveate.adapters.trace import Trace
from foveate.errors import InputError
from foveate.pruners.core.method import Hook, PatchPixels, Pruner, Signal, Stage


class EncoderWatch:
    """The encoder methods of an attached model.

    Attributes:
        encoded: the last call's features, layouts and signals by kind of picture, until :meth:`forget`.
        numbers: of each encoded picture ``(kind, its number in the call)`` the id that a prompt gave it.
        merging: the method's work inside the tower, if any; active: whether calls are watched.
    """

    def __init__(self, adapter: Adapter, pruner: Pruner, stages: Sequence[Stage], signals: set[Signal]) -> None:
        self.adapter, self.pruner = adapter, pruner
        self.encoded: dict[str, Encoded] = {}
        self.numbers: dict[tuple[str, int], int] = {}
        self._active = True
        self._trace: Trace | None = None  # of a call that no prompt has followed yet
        self._shrink = next((stage.select for stage in stages if stage.hook is Hook.PIXELS), None)
        self._pixels = next((signal for signal in signals if isinstance(signal, PatchPixels)), None)
        self.merging: TowerMerging | None = None
        self._methods: list[Replaced] = []
        self._tap = adapter.tap([signal for signal in signals if not isinstance(signal, PatchPixels)])
        with undone_on_failure(self.remove):
            self._install(block_stages(stages))

    def _install(self, inside: Sequence[Stage]) -> None:
        adapter = self.adapter
        if inside:
            self.merging = TowerMerging(adapter, self.pruner, inside)
        for modality in adapter.modalities:  # generate() calls the encoder as a method, out of any hook's reach
            encode = compat.encoder_method(adapter.inner, modality.encoder)
            self._methods.append(Replaced(adapter.inner, modality.encoder, self._watched(encode, modality)))

    @property
    def active(self) -> bool:
        """Whether calls are watched; switched off, the model runs as its own."""
        return self._active

    @active.setter
    def active(self, active: bool) -> None:
        self._active = active
        if self.merging is not None:
            self.merging.active = active

    def remove(self) -> None:
        """Give the model its methods back."""
        self._tap.remove()
        if self.merging is not None:
            self.merging.remove()
        for method in self._methods:
            method.remove()

    def forget(self) -> None:
        """Let go of the call's tensors, and of a trace that no prompt took."""
        self.encoded, self.numbers, self._trace = {}, {}, None

    def take_trace(self) -> Trace:
        """The trace that an encoder call began, or a new one."""
        trace, self._trace = self._trace, None
        return trace or self._new_trace()

    def _new_trace(self) -> Trace:
        return Trace(self.pruner.name, self.pruner.parameters())

    def _watched(self, encode: Any, modality: Modality) -> Any:
        """The model's encoder method, with signals collected on the way."""
        watch = weakref.proxy(self)

        @functools.wraps(encode)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not watch.active or watch._tap.open:  # Qwen3-VL encodes videos through its image encoder
                return encode(*args, **kwargs)
            call = bind(encode, args, kwargs)
            pixels = call[compat.pixel_argument(call, modality.pixels)]
            if not bool(torch.isfinite(pixels).all()):
                raise InputError(
                    f"{modality.pixels} holds NaN or infinite values; check the image and its preprocessing"
                )
            return watch._encode(encode, modality, call)

        return watched

    def _encode(self, encode: Any, modality: Modality, call: dict[str, Any]) -> Any:
        self._trace = self._trace or self._new_trace()
        name = compat.pixel_argument(call, modality.pixels)
        pixels = call[name]
        smaller = pixels if self._shrink is None else self._shrink(pixels)
        shrunk = smaller.shape != pixels.shape
        if shrunk:
            call = {**call, name: smaller, compat.RESIZE_POSITIONS: True}
        self._tap.open = True
        try:
            with self._trace.timed("encoder", pixels.device):
                output = encode(**call)
        finally:
            signals = self._tap.close()
        if shrunk and compat.features(output) is not None:
            compat.set_features(output, self._padded(modality, call, output))
        if self.merging is not None:
            signals = self.merging.signals(signals)
        encoded = self.adapter.encoded(modality.kind, output, call, signals)
        if encoded is None:
            return output
        self.numbers = {}
        if self.merging is not None:
            encoded.survivors = self.merging.survivors(modality.kind, call, encoded.layouts)
        if self._pixels is not None:
            encoded.signals[self._pixels] = self.adapter.pixels(modality.kind, call, pixels, encoded.layouts)
        self.encoded[modality.kind] = encoded
        return output

    def _padded(self, modality: Modality, call: dict[str, Any], output: Any) -> list[Tensor]:
        """A smaller picture gives fewer tokens than the prompt has places: they come first, zeros fill up."""
        layouts = self.adapter.layouts(modality.kind, call, output)
        return [
            torch.cat([few, few.new_zeros(layout.length - len(few), few.shape[-1])])
            for few, layout in zip(compat.features(output), layouts)
        ]
