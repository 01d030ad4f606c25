"""A method on a served model: may it run there, how many places will a picture take, and which rows fill them.

Nothing here needs vLLM. The front-end process asks :meth:`Serving.length` before any encoder runs, the worker calls
:meth:`Serving.select` on the features; both reach the same numbers from the same layout.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapters import compat
from foveate.adapters.families.base import Adapter, adapter_for
from foveate.adapters.vllm_plugin import ARCHITECTURES, TESTED
from foveate.adapters.vllm_plugin.settings import Entry, Settings, canonical, merged, parse
from foveate.errors import FoveateError, ParameterError, UnsupportedModelError

# HOOK
from foveate.pruners.core import (
    ClassFeatures,
    EncoderFeatures,
    EncoderKeys,
    Layout,
    PatchPixels,
    Pruner,
    Selection,
    Signal,
    Stage,
    Tokens,
    UnpooledFrames,
    create,
    keep_all,
)
from foveate.pruners.core.method import PRUNERS

_WIDTH = 8  # channels of made-up features
_REHEARSED = 8192  # tokens of the largest picture that is rehearsed
_WHY_NOT = {
    Hook.PIXELS: "changes the pictures; resize them before you send them",
    Hook.VIT_BLOCK: "merges inside the vision tower, and vLLM's towers keep all rows",
    Hook.LLM_LAYER: "drops tokens inside the decoder, and vLLM keeps one list of cache blocks for all layers of a sequence",
    Hook.LLM_MLP: "runs parts of the decoder's MLPs, which vLLM has fused",
    Hook.LLM_CACHE: "erases parts of the cache, which sequences with a common prefix share",
}


# -------------------------------------------------------------------------------------------------- model and method


def skeleton(config: Any) -> Adapter:
    """The adapter of the ``transformers`` model that ``config`` describes, without weights: what it says of layouts holds."""
    return _skeleton(type(config), config.to_json_string(use_diff=False))


@lru_cache(maxsize=4)
def _skeleton(kind: type, text: str) -> Adapter:
    from transformers import AutoModelForImageTextToText

    config = kind.from_dict(json.loads(text))
    with torch.device("meta"):
        return adapter_for(AutoModelForImageTextToText.from_config(config))


def check_version() -> None:
    """Raise :class:`UnsupportedModelError` unless vLLM is of a minor version that the plugin knows from inside."""
    import vllm

    if not vllm.__version__.startswith(tuple(f"{minor}." for minor in TESTED)):
        raise UnsupportedModelError(
            f"foveate prunes inside vLLM {' and '.join(TESTED)}, and this is vLLM {vllm.__version__}: pip install "
            "'foveate[vllm]'"
        )


def check_front_end() -> None:
    """Raise :class:`UnsupportedModelError` where vLLM is told to use its front end in Rust.

    That one counts a picture's tokens by itself and loads no plugin, so the engine would serve every picture unpruned.
    From vLLM 0.33 on ``vllm-rs serve`` sets the variable for the engine that it starts.
    """
    given = os.environ.get("VLLM_USE_RUST_FRONTEND", "0")
    try:
        wanted = bool(int(given))  # as vLLM reads it
    except ValueError:
        wanted = True  # vLLM itself stops at it
    if wanted:
        raise UnsupportedModelError(
            f"VLLM_USE_RUST_FRONTEND={given}: vLLM's front end in Rust loads no plugin, and pictures would not be pruned; unset "
            "it (and start `vllm serve`, not `vllm-rs serve`), or remove the foveate entry to serve the model unpruned"
        )


def check_start(architectures: str | Sequence[str], config: Any, engine: Any, implementation: str = "auto") -> None:
    """Raise if an engine with this ``foveate`` entry cannot start.

    Raises:
        UnsupportedModelError: another family. FoveateError: bad settings, or a method that cannot be served on this model.
    """
    names = [architectures] if isinstance(architectures, str) else list(architectures)
    if not set(names) & set(ARCHITECTURES):
        raise UnsupportedModelError(
            f"foveate cannot prune {', '.join(names)} inside vLLM; it can prune {', '.join(ARCHITECTURES)}. Remove "
            "the foveate entry to serve the model unpruned"
        )
    if implementation == "transformers":
        raise UnsupportedModelError("foveate prunes vLLM's own models: leave out --model-impl transformers")
    entry = merged(engine)
    if entry is not None:
        Serving(skeleton(config), parse(entry))


def deepest_block(adapter: Adapter, engine: Any) -> int:
    """The last block of the vision tower that has to be there: the one that feeds the projector, or one that is read."""
    entry = merged(engine)
    read = [] if entry is None else [signal.layer for signal in Serving(adapter, parse(entry)).signals]
    return max([adapter.info.feature_layer, *read])


def check_request(adapter: Adapter, engine: Any, entry: Entry) -> Serving:
    """The serving of a request's entry on a running engine.

    Raises:
        FoveateError: see :class:`Serving`; or the method reads a block that the engine has not loaded.
    """
    return _checked(adapter, canonical(engine), canonical(entry))


@lru_cache(maxsize=256)
def _checked(adapter: Adapter, engine: str, entry: str) -> Serving:
    serving = Serving(adapter, parse(json.loads(entry)))
    loaded = deepest_block(adapter, json.loads(engine))
    for signal in serving.signals:
        if signal.layer > loaded:
            raise ParameterError(
                f"{serving.pruner.name} reads block {signal.layer} of the vision tower, and this engine has loaded 0 .. "
                f"{loaded}; start it with this method in --hf-overrides"
            )
    return serving


def obstacle(adapter: Adapter, pruner: Pruner, stages: Sequence[Stage]) -> str | None:
    """Why vLLM cannot serve a method with these stages, as the end of a sentence that begins with it; None if it can.

    Raises:
        FoveateError: the model lacks a signal.
    """
    for stage in stages:
        if stage.hook is not Hook.LLM_INPUT:
            return _WHY_NOT[stage.hook]
        if stage.text_guided:
            return "reads the question, but vLLM encodes a picture once for all prompts that hold it"
    if not stages:
        return "does nothing inside this model; prepare the pictures before you send them"
    if pruner.adaptive and not pruner.content_free:
        return "lets a picture's content decide how many tokens stay, and vLLM counts before it looks"
    (stage,) = stages
    for signal in stage.signals.values():
        if isinstance(signal, (PatchPixels, UnpooledFrames)):
            return "reads the pictures' pixels, which vLLM's towers have packed by then"
        adapter.check(signal)
    policy = stage.positions or ("keep" if adapter.info.mrope else "compact")
    if (policy == "keep") != adapter.info.mrope:
        return (
            f"needs {'gaps between positions' if policy == 'keep' else 'positions without gaps'}, and vLLM numbers the "
            f"tokens of {adapter.info.family} models {'with' if adapter.info.mrope else 'without'} gaps"
        )
    return None


def servable(adapter: Adapter) -> list[str]:
    """Names of the methods that can be served on the model with their defaults."""
    names = []
    for name in PRUNERS:
        with contextlib.suppress(FoveateError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = create(name)
            if obstacle(adapter, pruner, pruner.stages(adapter.info)) is None:
                names.append(name)
    return names


class Serving:
    """A method on a model family, as vLLM runs it.

    Raises:
        FoveateError: the method cannot be served on the model; the message says why and what can.
    """

    def __init__(self, adapter: Adapter, settings: Settings) -> None:
        self.adapter, self.pruner, self.separators = adapter, settings.pruner, settings.separators
        stages = self.pruner.stages(adapter.info)
        why = obstacle(adapter, self.pruner, stages)
        if why is not None:
            hint = "".join(
                f"add {json.dumps(name)}: {json.dumps(value)}; or: " for name, value in self.pruner.counted.items()
            )
            raise UnsupportedModelError(
                f"{self.pruner.name} cannot be served by vLLM: it {why}; {hint}{', '.join(servable(adapter))} can be served"
            )
        (self.stage,) = stages

    @property
    def signals(self) -> tuple[Signal, ...]:
        """What the method reads of the vision tower."""
        return tuple(self.stage.signals.values())

    @property
    def newlines(self) -> str:
        """What becomes of separators: ``"keep"``, ``"drop"``, or ``"rows"`` where the layout alone tells which rows stay."""
        wanted = self.separators or self.stage.newlines
        return "keep" if wanted == "rows" and not self.pruner.content_free else wanted

    # ---------------------------------------------------------------------------------------------- front-end process

    def length(self, layout: Layout) -> int:
        """Places that a picture of this layout takes, separators counted.

        The method runs once on made-up features, so that what it would refuse it refuses here and not in the worker; only
        for very large pictures without separators its own count is believed.

        Raises:
            FoveateError: the method cannot meet its budget on this layout.
        """
        if self.pruner.content_free:
            return len(self._rehearsed(layout).places)
        count = self.pruner.kept_on(self.adapter.info, layout)
        if layout.size > _REHEARSED and not layout.newlines:
            return count
        rehearsed = self._rehearsed(layout)
        kept = int((rehearsed.source >= 0).sum())
        if kept != count:
            raise ParameterError(
                f"{self.pruner.name} announces {count} tokens for a picture of {layout.size} and keeps {kept}; vLLM needs both "
                "to be equal: mend the method's kept_in() or kept_on()"
            )
        return len(rehearsed.places)

    def _rehearsed(self, layout: Layout) -> Emission:
        draw = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.rand(1, *shape, generator=draw)

        signals = {
            name: noise(len(layout.views), _WIDTH)
            if isinstance(signal, ClassFeatures)
            else noise(layout.size, *((_WIDTH,) if isinstance(signal, (EncoderFeatures, EncoderKeys)) else ()))
            for name, signal in self.stage.signals.items()
        }
        tokens = Tokens(noise(layout.size, _WIDTH), layout, (0,), embed=_AnyToken(1, _WIDTH))
        if self.adapter.project is not None:
            tokens.project = lambda features: features
        (row,) = self._run(tokens, signals)
        return emitted(row, layout, self.newlines)

    # --------------------------------------------------------------------------------------------------------- worker

    def select(
        self,
        features: Sequence[Tensor],
        layout: Layout,
        signals: Mapping[Signal, Sequence[Tensor]],
        *,
        project: Callable[[Tensor], Tensor] | None = None,
        embed: nn.Module | None = None,
    ) -> list[Emission]:
        """Choose from pictures of one layout: ``features`` are ``(N, D)`` each, ``signals`` ``(N, …)`` each.

        A picture is encoded once for all prompts, so it has no number: what is drawn at random depends on its layout alone.
        """
        tokens = Tokens(torch.stack(list(features)), layout, (0,) * len(features), project=project, embed=embed)
        read = {name: torch.stack(list(signals[signal])) for name, signal in self.stage.signals.items()}
        return [emitted(row, layout, self.newlines) for row in self._run(tokens, read)]

    def _run(self, tokens: Tokens, signals: dict[str, Tensor]) -> list[Selection]:
        chosen = self.stage.select(tokens, **signals)
        if chosen.breaks is not None:
            raise ParameterError(
                f"{self.pruner.name}: separators of its own placing cannot be served; use the default order"
            )
        fields = {name: value for name, value in vars(chosen).items() if value is not None}
        return [Selection(**{name: value[b] for name, value in fields.items()}) for b in range(len(chosen.index))]


class _AnyToken(nn.Embedding):
    """An embedding that knows every token."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.zeros_like(ids))


def everything(layout: Layout) -> Emission:
    """All rows as they are."""
    tokens = torch.empty(1, layout.size, 1)
    return emitted(Selection(keep_all(Tokens(tokens, layout)).index[0]), layout, "keep")


# ------------------------------------------------------------------------------------------------------ what enters


@dataclass(frozen=True)
class Emission:
    """Which rows of an unpruned picture enter the decoder, in order, and what they carry.

    Attributes:
        places: ``(R,)`` row numbers among the picture's ``layout.length`` places; separators are rows like others.
        source: ``(R,)`` which survivor each row is, in the order of the selection's ``values``; -1 for separators.
        selection: the selection, for its values.
    """

    places: Tensor
    source: Tensor
    selection: Selection

    def apply(self, rows: Tensor, width: int) -> Tensor:
        """``rows (length, width + levels)`` of the unpruned picture -> ``(R, width + levels)``.

        ``width`` channels are the embeddings; behind them come DeepStack levels of ``width`` channels each, if any.
        """
        where = self.places.to(rows.device)
        entering = rows[where]
        values, resample = self.selection.values, self.selection.resample
        if values is None and resample is None:
            return entering
        token = self.source.to(rows.device) >= 0
        source = self.source.to(rows.device)[token]
        entering = entering.clone()
        if values is not None:
            entering[token, :width] = values.to(rows)[source]
        if resample is not None and rows.shape[1] > width:  # families with levels have no separators
            entering[token, width:] = resample(rows[:, width:]).to(rows)[source]
        return entering


def emitted(selection: Selection, layout: Layout, newlines: str) -> Emission:
    """Rows of one picture's ``selection`` (no batch axis), with separators as ``newlines`` says; all stay if all tokens do."""
    device = selection.index.device
    index = selection.index[selection.index >= 0]
    tokens = layout.places(device)[index]  # ascending
    policy = newlines if selection.order is None else "drop"
    separators = layout.separators(device)
    if policy != "keep" and len(index) < layout.size:
        separators = separators[:0] if policy == "drop" else separators[layout.rows_left(index)]
    places, perm = torch.cat([tokens, separators]).sort()
    source = torch.where(perm < len(index), perm, -1)
    if selection.order is not None:
        entering = selection.order[selection.order < len(index)]
        is_token = source >= 0
        places, source = places.clone(), source.clone()
        places[is_token], source[is_token] = tokens[entering], entering
    return Emission(places, source, selection)


# ----------------------------------------------------------------------------------------------------- over the wire


def layouts_of(adapter: Adapter, facts: Mapping[str, Any], count: int) -> list[Layout]:
    """Layouts of ``count`` pictures from what the processor says of them (``image_grid_thw``, ``image_sizes``)."""
    return adapter.layouts("image", dict(facts), compat.as_output([None] * count))


@lru_cache(maxsize=4096)
def _length(adapter: Adapter, text: str, layout: Layout) -> int:
    return Serving(adapter, parse(json.loads(text))).length(layout)


def announced(adapter: Adapter, entry: Entry | None, layout: Layout) -> int:
    """:meth:`Serving.length`, remembered; the unpruned length without an entry."""
    return layout.length if entry is None else _length(adapter, canonical(entry), layout)
