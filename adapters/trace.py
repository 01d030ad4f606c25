"""What a pruner did in one call, for people and for the leaderboard."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.adapters.drawing import Picture, draw, on_white
from foveate.errors import ParameterError
from foveate.pruners.core import Layout

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class StageTrace:
    """One stage's work on one image. Token numbers are those of the unpruned image, row-major per view.

    Attributes:
        hook: ``"llm_input"`` or ``"llm_layer"``.
        layer: the decoder layer that it acts before.
        kept: ``(K,)`` int64 tokens that survive it, ascending.
        owner: ``(N,)`` the surviving token that speaks for each token, -1 if none; None for pure pruners.
        scores: ``(N,)`` float, NaN for tokens that were gone before; None where the method ranks nothing.
        markers: ``(M,)`` those of ``kept`` that only mark dropped tokens (PosPad); None where the method marks nothing.
    """

    hook: str
    layer: int
    kept: Tensor
    owner: Tensor | None = None
    scores: Tensor | None = None
    markers: Tensor | None = None


@dataclass
class ImageTrace:
    """What became of one image or video.

    Attributes:
        sample: row of the batch.
        kind: ``"image"`` or ``"video"``.
        layout: its views and separators.
        centre_crop: whether the model's processor shows it the picture's centre square only.
        stages: in order of depth.
        tokens_per_layer: visual tokens (separators counted) that each decoder layer saw.
        cached_per_layer: how many of them each layer's KV cache holds when the prompt is through.
        text_gone_per_layer: text tokens (timestamps, start and end of vision) that each layer did not see, since
            their video frame has no token left.
    """

    sample: int
    kind: str
    layout: Layout
    stages: list[StageTrace] = field(default_factory=list)
    tokens_per_layer: list[int] = field(default_factory=list)
    centre_crop: bool = False
    cached_per_layer: list[int] = field(default_factory=list)
    text_gone_per_layer: list[int] = field(default_factory=list)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the first view."""
        return self.layout.views[0].grid

    def reached(self, layer: int) -> list[StageTrace]:
        """Stages that have acted before decoder layer ``layer`` runs."""
        return [stage for stage in self.stages if stage.layer <= layer]

    def kept_at(self, layer: int) -> Tensor:
        """Tokens that decoder layer ``layer`` sees, ``(K,)`` int64 ascending."""
        reached = self.reached(layer)
        device = self.stages[0].kept.device if self.stages else None
        return reached[-1].kept if reached else torch.arange(self.layout.size, device=device)

    @property
    def kept(self) -> Tensor:
        """Tokens that survive all stages, ``(K,)`` int64 ascending."""
        return self.kept_at(len(self.tokens_per_layer))

    @property
    def owner(self) -> Tensor | None:
        """Owner map of the last stage that merged, ``(N,)``."""
        return next((s.owner for s in reversed(self.stages) if s.owner is not None), None)

    @property
    def markers(self) -> Tensor | None:
        """Markers among the survivors of the last stage that set any, ``(M,)``."""
        return next((s.markers for s in reversed(self.stages) if s.markers is not None), None)

    @property
    def scores(self) -> Tensor | None:
        """Scores of the first stage that ranked, ``(N,)``."""
        return next((s.scores for s in self.stages if s.scores is not None), None)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain lists and numbers; scores that are no number are None."""
        return {
            "sample": self.sample,
            "kind": self.kind,
            "tokens": self.layout.size,
            "views": [dataclasses.asdict(view) for view in self.layout.views],
            "newlines": [dataclasses.asdict(newline) for newline in self.layout.newlines],
            "tokens_per_layer": list(self.tokens_per_layer),
            "cached_per_layer": list(self.cached_per_layer),
            "stages": [
                {
                    "hook": stage.hook,
                    "layer": stage.layer,
                    "kept": stage.kept.tolist(),
                    "owner": None if stage.owner is None else stage.owner.tolist(),
                    "scores": None if stage.scores is None else [_number(x) for x in stage.scores.tolist()],
                    "markers": None if stage.markers is None else stage.markers.tolist(),
                }
                for stage in self.stages
            ],
        }


@dataclass
class Trace:
    """One prefill under a pruner.

    Attributes:
        method: registry name.
        parameters: the method's.
        positions: policy at each stage.
        images: one entry per image and video, in prompt order (for beams: of the first beam).
        length: tokens of the unpruned prompt.
        decoder_layers: depth.
        spans: functions that give the seconds of each stage and of the encoder, by name; see :attr:`seconds`.
        cache_lengths: entries of each layer's KV cache when the prompt is through, text, padding and what was there
            before counted; None without a cache.
    """

    method: str
    parameters: dict[str, Any]
    length: int = 0
    decoder_layers: int = 0
    positions: dict[str, str] = field(default_factory=dict)
    images: list[ImageTrace] = field(default_factory=list)
    cache_lengths: list[int] | None = None
    spans: dict[str, list[Callable[[], float]]] = field(default_factory=dict, repr=False)

    @property
    def tokens_per_layer(self) -> list[int]:
        """Visual tokens seen by each decoder layer, all images together."""
        return [sum(column) for column in zip(*(image.tokens_per_layer for image in self.images))]

    @property
    def cached_per_layer(self) -> list[int]:
        """Visual tokens in each layer's KV cache when the prompt is through, all images together."""
        return [sum(column) for column in zip(*(image.cached_per_layer for image in self.images))]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent in each stage and in the encoder. On a GPU, reading this waits for the device."""
        return {name: sum(span() for span in spans) for name, spans in self.spans.items()}

    def cpu(self) -> Trace:
        """A copy that holds no memory of the device."""

        def moved(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x.cpu()
            if isinstance(x, list):
                return [moved(item) for item in x]
            if isinstance(x, (ImageTrace, StageTrace)):
                return dataclasses.replace(x, **{f.name: moved(getattr(x, f.name)) for f in dataclasses.fields(x)})
            return x

        spans = {name: [partial(float, seconds)] for name, seconds in self.seconds.items()}
        return dataclasses.replace(self, images=moved(self.images), spans=spans)

    def show(
        self, image: Picture | Sequence[Picture] | None = None, number: int = 0, show: str = "kept", **options: Any
    ) -> Image:
        """What became of picture ``number``, drawn on ``image``: a PIL picture, which a notebook displays by itself.

        Args:
            image: the picture that was given to the processor, of PIL or ``(H, W, 3)`` uint8 (of a video: its
                frames); None draws on grey.
            number: which of the prompt's pictures and videos.
            show: ``"kept"``, ``"scores"`` or ``"groups"``; **options: ``layer`` and ``width``, see
                :func:`foveate.adapters.drawing.draw`.

        Raises:
            ParameterError: the call had no such picture, or there is nothing of the kind to show.
        """
        if not 0 <= number < len(self.images):
            raise ParameterError(f"number={number}: the prompt had {len(self.images)} pictures, counted from 0")
        return draw(self.images[number], image, show=show, **options)

    def save_image(
        self, path: str | os.PathLike[str], image: Picture | Sequence[Picture] | None = None, **options: Any
    ) -> None:
        """Write :meth:`show` to a file; the name's ending decides on the format."""
        picture = self.show(image, **options)
        if os.fspath(path).lower().endswith((".jpg", ".jpeg", ".bmp")):  # formats without transparency
            picture = on_white(picture)
        picture.save(path)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain lists and numbers, ready for ``json.dumps``."""
        return {
            "method": self.method,
            "parameters": json.loads(json.dumps(self.parameters, default=str)),
            "positions": dict(self.positions),
            "length": self.length,
            "decoder_layers": self.decoder_layers,
            "cache_lengths": self.cache_lengths,
            "seconds": self.seconds,
            "images": [image.as_json() for image in self.images],
        }

    def __str__(self) -> str:
        lines = [f"{self.method}({', '.join(f'{k}={v!r}' for k, v in self.parameters.items())})"]
        for n, image in enumerate(self.images):
            seen = _runs(image.tokens_per_layer)
            if image.cached_per_layer != image.tokens_per_layer:
                seen += f"; cached: {_runs(image.cached_per_layer)}"
            grids = " + ".join("x".join(map(str, view.grid)) for view in image.layout.views)
            marked = "" if image.markers is None else f", {len(image.markers)} of them markers"
            lines.append(
                f"  {image.kind} {n} (row {image.sample}): {image.layout.size} tokens ({grids}); seen: {seen}{marked}"
            )
        if self.cache_lengths:
            lines.append(f"  KV cache, text included: {_runs(self.cache_lengths)}")
        lines += [f"  {name}: {seconds * 1e3:.2f} ms" for name, seconds in self.seconds.items()]
        return "\n".join(lines)


def _runs(counts: list[int]) -> str:
    """``"576 from layer 0, 72 from layer 12"``."""
    starts = [i for i in range(len(counts)) if i == 0 or counts[i] != counts[i - 1]]
    return ", ".join(f"{counts[i]} from layer {i}" for i in starts)


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None
