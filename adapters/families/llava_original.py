"""The original LLaVA package (``llava-torch``): no placeholder tokens, features enter where its own method splices
them.

Nothing here imports that package: a model of one of its classes brings it along.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.adapters import compat
from foveate.adapters.engine.decoder import Decoder
from foveate.adapters.families.anyres import canvas_layout, single_view
from foveate.adapters.families.base import CallContents, Encoded, Modality, PromptWatch, bind
from foveate.adapters.families.llava import LlavaAdapter
from foveate.adapters.taps import Replaced
from foveate.adapters.towers.transformers import HFTower
from foveate.errors import InputError, UnsupportedModelError
from foveate.pruners.core import ClassFeatures, Layout, ModelInfo, Signal, View

_SPLICE = "prepare_inputs_labels_for_multimodal"
_ARGUMENTS = "input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes"


@dataclass(frozen=True)
class SplicedPicture:
    """One picture of a prompt on its way into the decoder.

    Attributes:
        first, stop: its views among the rows of the encoder call.
        layout: how its tokens lie in the sequence.
        source: ``(N,)`` where each token stands among all patches of the encoder call, view after view.
    """

    first: int
    stop: int
    layout: Layout
    source: Tensor


class LlavaOriginalAdapter(LlavaAdapter):
    """``LlavaLlamaForCausalLM`` of llava-torch 1.2.2."""

    family = "llava_original"
    classes: ClassVar = ("LlavaLlamaForCausalLM",)
    transformers: ClassVar = (((4, 36), (4, 38)), ((5, 16), (6, 0)))

    def __init__(self, model: nn.Module) -> None:
        self.pictures: list[SplicedPicture] = []  # of the running call of the splicing method
        super().__init__(model)

    @staticmethod
    def parts(model: Any) -> tuple[Any, Any]:
        return model, model.model

    @property
    def package(self) -> ModuleType:
        """The package's module that splices features into prompts."""
        return sys.modules[getattr(type(self.model), _SPLICE).__module__]

    def block_tower(self) -> HFTower:
        if compat.installed() < (5, 0):
            raise UnsupportedModelError(
                "tokens cannot be merged inside the vision tower under transformers 4; use transformers 5, or a "
                "method that "
                "acts at the decoder's entry"
            )
        return HFTower(self.tower, self.encoder)

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        processor = self.model.get_vision_tower().image_processor
        return tuple(processor.image_mean), tuple(processor.image_std)

    def describe(self) -> ModelInfo:
        holder, name = self.model.get_vision_tower(), type(self.model).__name__
        found = ", ".join(inspect.signature(getattr(type(self.model), _SPLICE)).parameters).removeprefix("self, ")
        if found != _ARGUMENTS:
            raise UnsupportedModelError(
                f"{name} comes from {self.package.__name__}, whose {_SPLICE} takes ({found}); only that of "
                "llava-torch 1.2.2 "
                f"is known: ({_ARGUMENTS})"
            )
        if type(holder).__name__ != "CLIPVisionTower":
            raise UnsupportedModelError(f"vision tower {type(holder).__name__} of {name} is not CLIPVisionTower")
        if not holder.is_loaded:
            raise UnsupportedModelError(
                f"the vision tower of {name} is not loaded; call model.get_vision_tower().load_model() first"
            )
        if holder.select_feature != "patch":
            raise UnsupportedModelError(
                f"mm_vision_select_feature={holder.select_feature!r} makes the class token a visual token; "
                "this layout is not supported"
            )
        self.tower, self.projector = holder.vision_tower, self.model.get_model().mm_projector
        self.project = self.projector
        self.modalities = (Modality("image", "encode_images", "images", self.package.IMAGE_TOKEN_INDEX),)
        info = self.of_tower(self.tower.config, holder.select_layer)
        self.centre_crop = getattr(self.inner.config, "image_aspect_ratio", None) not in ("pad", "anyres")
        return info

    @property
    def decoder_hooks(self) -> type[Decoder]:
        if compat.installed() < (5, 0):
            from foveate.adapters.engine.legacy_decoder import LegacyDecoder

            return LegacyDecoder
        return Decoder

    @property
    def prompt_watch(self) -> type[PromptWatch]:
        return SplicedPrompts

    # ---------------------------------------------------------------------------------------- pictures in the prompt

    def find_pictures(self, call: dict[str, Any], attended: Tensor) -> list[SplicedPicture]:
        """The pictures that a call of the splicing method shows, in order.

        Raises:
            InputError: the prompt shows more than the call brings.
        """
        images = call["images"]
        merged = isinstance(images, list) or images.ndim == 5  # may have several views; the configuration lays them out
        views = [len(image) if image.ndim == 4 else 1 for image in images] if merged else [1] * len(images)
        shown = ((call["input_ids"] == self.package.IMAGE_TOKEN_INDEX) & attended).sum(dim=1).tolist()
        # a row of text alone uses a picture up without showing it
        turns = [show for count in shown for show in ([True] * count or [False])]
        if len(turns) > len(views):
            raise InputError(
                f"the prompt has {sum(shown)} image tokens and {shown.count(0)} rows without, each of which takes a "
                "picture; "
                f"images has {len(views)}"
            )
        pictures, patches = [], self.side**2
        for number, (first, show) in enumerate(zip(itertools.accumulate([0, *views]), turns)):
            if show:
                layout, source = self._laid_out(views[number], call, number) if merged else self._raw(1)
                pictures.append(SplicedPicture(first, first + views[number], layout, source + first * patches))
        return pictures

    def _laid_out(self, views: int, call: dict[str, Any], number: int) -> tuple[Layout, Tensor]:
        """Layout and source of a picture that may have been cut into views."""
        how = getattr(self.inner.config, "mm_patch_merge_type", "flat")
        if how == "flat":
            return self._raw(views)
        if views == 1:
            return (single_view(self.side), self._raw(1)[1]) if "unpad" in how else self._raw(1)
        if call["image_sizes"] is None:
            raise InputError(f"picture {number} has {views} views; pass image_sizes, (width, height) of every picture")
        size, pinpoints, side = call["image_sizes"][number], self.inner.config.image_grid_pinpoints, self.side
        across, down = self.package.get_anyres_image_grid_shape(size, pinpoints, self.tower.config.image_size)
        canvas = torch.arange(down * side * across * side).view(down * side, across * side)
        left = self.package.unpad_image(canvas[None], size)[0] if "unpad" in how else canvas
        row, col = left // (across * side), left % (across * side)
        crop = row // side * across + col // side
        source = (crop + 1) * side**2 + row % side * side + col % side
        layout = canvas_layout(left, side, down, across, newlines="unpad" in how)
        return layout, torch.cat([torch.arange(side**2), source.flatten()])

    def _raw(self, views: int) -> tuple[Layout, Tensor]:
        """One view after the other, nothing taken away."""
        side, anyres = self.side, getattr(self.inner.config, "image_aspect_ratio", None) == "anyres"
        size = side**2
        if views == 1:
            return Layout.grid(side, side), torch.arange(size)
        kinds = ["thumbnail" if anyres else "crop"] + ["crop"] * (views - 1)
        layout = Layout(tuple(View(side, side, start=i * size, kind=kind) for i, kind in enumerate(kinds)))
        return layout, torch.arange(views * size)

    # --------------------------------------------------------------------------------------------- the encoder's call

    def layouts(self, kind: str, call: dict[str, Any], output: Any) -> list[Layout]:
        return [picture.layout for picture in self.pictures]

    def arrange(self, kind: str, values: Tensor, layouts: list[Layout], call: dict[str, Any]) -> list[Tensor]:
        rows = values.flatten(0, 1)
        return [rows[picture.source.to(rows.device)] for picture in self.pictures]

    def encoded(self, kind: str, output: Tensor, call: dict[str, Any], signals: dict[Signal, Tensor]) -> Encoded | None:
        if not self.pictures:
            return None  # called by itself
        layouts = self.layouts(kind, call, output)
        sorted_by_picture = {
            signal: [values[picture.first : picture.stop] for picture in self.pictures]
            if isinstance(signal, ClassFeatures)
            else self._arranged(kind, values, layouts, call)
            for signal, values in signals.items()
        }
        return Encoded(layouts, self.arrange(kind, output, layouts, call), sorted_by_picture)


class RenamedCache:
    """Lets ``generate()`` of a transformers that calls the KV cache by another name reach the package's model.

    From 5.24 on the package's own methods know neither the name that they are called with nor the one that they
    should pass on. These here do the same under today's name, until :meth:`remove`; where the names agree, nothing
    is replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._undo = model, ExitStack()
        owner = next(cls for cls in type(model).__mro__ if "prepare_inputs_for_generation" in vars(cls))
        self._llama = super(owner, model)  # the model without the package's two methods
        self._name = compat.cache_name(self._llama.forward)
        self._own_name = compat.cache_name(model.forward)
        if self._name != self._own_name:
            for name, method in (("forward", self._forward), ("prepare_inputs_for_generation", self._prepare)):
                own = getattr(model, name)
                renamed = Replaced(model, name, functools.wraps(own)(functools.partial(method, own)))
                self._undo.callback(renamed.remove)

    def remove(self) -> None:
        """Give the model its methods back."""
        self._undo.close()

    def _forward(self, own: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.pop(self._name, None)
        call = bind(own, args, kwargs)
        cache = call.pop(self._own_name) if cache is None else cache
        images, sizes = call.pop("images"), call.pop("image_sizes")
        if call["inputs_embeds"] is None:
            ids, positions, mask, cache, embeds, labels = getattr(self._model, _SPLICE)(
                call["input_ids"], call["position_ids"], call["attention_mask"], cache, call["labels"], images, sizes
            )
            call |= {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
            call |= {"inputs_embeds": embeds, "labels": labels}
        given = {name: value for name, value in call.items() if value is not None}
        return self._llama.forward(**given, **{self._name: cache})

    def _prepare(self, own: Callable[..., Any], /, *args: Any, **kwargs: Any) -> dict[str, Any]:
        pictures = {name: kwargs.pop(name) for name in ("images", "image_sizes") if name in kwargs}
        kwargs.pop(self._own_name, None)
        prepared = self._llama.prepare_inputs_for_generation(*args, **kwargs)
        return prepared | {name: value for name, value in pictures.items() if value is not None}


class SplicedPrompts(PromptWatch):
    """Learns from the package's splicing method itself where features, text and padding go.

    The method carries one label per token to the token's new place. While it runs, the labels are the tokens' numbers;
    the caller's own labels are put back afterwards.
    """

    def __init__(self, adapter: LlavaOriginalAdapter) -> None:
        self.adapter = adapter
        self._prompt: tuple[Tensor, Tensor] | None = None  # ids and embeddings, between the method and the decoder
        splice = getattr(adapter.model, _SPLICE)

        @functools.wraps(splice)
        def watched(*args: Any, **kwargs: Any) -> tuple:
            return self._splice(splice, bind(splice, args, kwargs))

        with ExitStack() as undo:
            undo.callback(Replaced(adapter.model, _SPLICE, watched).remove)
            undo.callback(RenamedCache(adapter.model).remove)
            undo.callback(adapter.text_model.register_forward_pre_hook(self._embed, with_kwargs=True).remove)
            self._undo = undo.pop_all()

    def take(self, embeds: Tensor) -> CallContents:
        prompt, self._prompt = self._prompt, None
        if prompt is None:
            return CallContents()
        ids, spliced = prompt
        beams, rest = divmod(len(embeds), len(spliced))
        spliced = spliced.repeat_interleave(max(beams, 1), 0).to(embeds.device)
        if rest or spliced.shape != embeds.shape or not spliced.allclose(embeds, rtol=0, atol=0, equal_nan=True):
            raise InputError(
                f"the decoder was given a prompt of shape {tuple(embeds.shape)} where one of {tuple(spliced.shape)} "
                "with "
                "pictures had been prepared; chunked prefill cannot be pruned, nor can embeddings that were changed "
                "on the way"
            )
        return CallContents(ids.repeat_interleave(beams, 0), self.adapter.modalities)

    def forget(self) -> None:
        self._prompt = None

    def remove(self) -> None:
        self._undo.close()
        self.forget()

    def _splice(self, splice: Callable[..., tuple], call: dict[str, Any]) -> tuple:
        self.forget()
        ids, mask, labels = call["input_ids"], call["attention_mask"], call["labels"]
        if self.adapter.model.get_vision_tower() is None or call["images"] is None or ids.shape[1] == 1:
            return splice(**call)  # text alone, or a further token
        attended = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        numbers = torch.arange(ids.numel(), device=ids.device).view_as(ids)
        self.adapter.pictures = self.adapter.find_pictures(call, attended)
        try:
            out = splice(**{**call, "attention_mask": attended, "labels": numbers})
        finally:
            self.adapter.pictures = []
        none, positions, attended, cache, embeds, number = out
        package, text = self.adapter.package, number >= 0
        spliced_ids = torch.where(text, ids.flatten()[number.clamp(min=0)], -1)
        self._prompt = spliced_ids.masked_fill(~text & attended, package.IMAGE_TOKEN_INDEX), embeds
        if labels is not None:
            labels = torch.where(text, labels.flatten()[number.clamp(min=0)], package.IGNORE_INDEX)
        elif not bool(attended[:, -1].all()):
            warnings.warn(
                "this batch is padded on the right, where generate() goes on: shorter rows get wrong answers, pruned "
                "or not; "
                'set model.config.tokenizer_padding_side = "left"',
                stacklevel=4,
            )
        return none, positions, None if mask is None else attended.to(mask.dtype), cache, embeds, labels

    def _embed(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Further tokens come as ids: the decoder's hooks read embeddings."""
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            return None
        embeds = {"inputs_embeds": module.get_input_embeddings()(ids)}
        return ((None, *args[1:]), {**kwargs, **embeds}) if args else ((), {**kwargs, "input_ids": None, **embeds})
