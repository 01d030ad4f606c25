"""A method on a served model: may it run there, how many places will a picture take, and what enters the decoder.

Nothing here needs vLLM. The front-end process asks :meth:`ServedMethod.length` before any encoder runs, the worker
calls :meth:`ServedMethod.select` on the features; both reach the same number from the same layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapters import compat
from foveate.adapters.engine.decoder import Kept
from foveate.adapters.engine.prefill import deepstack_levels, entering, mixed, run_stage
from foveate.adapters.families.base import Adapter, adapter_for
from foveate.adapters.vllm_plugin import ARCHITECTURES, TESTED
from foveate.adapters.vllm_plugin.settings import Entry, Settings, canonical, merged, parse
from foveate.errors import FoveateError, ParameterError, UnsupportedModelError
from foveate.pruners.core import (
    AtEntry,
    AtPixels,
    BeforeLayer,
    InCache,
    InMLP,
    InTower,
    Layout,
    PatchPixels,
    Pruner,
    Selection,
    Signal,
    Stage,
    Tokens,
    UnpooledFrames,
    create,
)
from foveate.pruners.core.method import PRUNERS

_WIDTH = 8  # channels of made-up features
_REHEARSED = 8192  # tokens of the largest picture that is rehearsed
_WHY_NOT: dict[type[Stage], str] = {
    AtPixels: "changes the pictures; resize them before you send them",
    InTower: "merges inside the vision tower, and vLLM's towers keep all rows",
    BeforeLayer: "drops tokens inside the decoder, and vLLM keeps one list of cache blocks for all layers of a prompt",
    InMLP: "runs parts of the decoder's MLPs, which vLLM has fused",
    InCache: "erases parts of the cache, which sequences with a common prefix share",
}
_COUNTS_LATE = "lets a picture's content decide how many tokens stay, and vLLM counts before it looks"


# ------------------------------------------------------------------------------------------------- the family's adapter


def skeleton(config: Any) -> Adapter:
    """The adapter of the ``transformers`` model that ``config`` describes, without weights; it knows all layouts."""
    return _skeleton(type(config), config.to_json_string(use_diff=False))


@lru_cache(maxsize=4)
def _skeleton(kind: type, text: str) -> Adapter:
    from transformers import AutoModelForImageTextToText

    config = kind.from_dict(json.loads(text))
    with torch.device("meta"):
        return adapter_for(AutoModelForImageTextToText.from_config(config))


def layouts_of(adapter: Adapter, facts: Mapping[str, Any], count: int) -> list[Layout]:
    """Layouts of ``count`` pictures from what the processor says of them (``image_grid_thw``, ``image_sizes``)."""
    return adapter.layouts("image", dict(facts), compat.as_output([None] * count))


# ------------------------------------------------------------------------------------------------- what can be refused


def check_version() -> None:
    """Raise :class:`UnsupportedModelError` unless vLLM is of a minor version that the plugin knows from inside."""
    import vllm

    if not vllm.__version__.startswith(tuple(f"{minor}." for minor in TESTED)):
        raise UnsupportedModelError(
            f"foveate prunes inside vLLM {' and '.join(TESTED)}, and this is vLLM {vllm.__version__}: "
            "pip install 'foveate[vllm]'"
        )


def check_front_end() -> None:
    """Raise :class:`UnsupportedModelError` where vLLM is told to use its front end in Rust.

    That one counts a picture's tokens by itself and loads no plugin, so the engine would serve every picture unpruned.
    From vLLM 0.33 on ``vllm-rs serve`` sets the variable for the engine that it starts.
    """
    given = os.environ.get("VLLM_USE_RUST_FRONTEND", "0")
    if given.strip() != "0":  # vLLM itself stops at what is not a number
        raise UnsupportedModelError(
            f"VLLM_USE_RUST_FRONTEND={given}: vLLM's front end in Rust loads no plugin, and pictures would not be "
            "pruned; unset it (and start `vllm serve`, not `vllm-rs serve`), or remove the foveate entry"
        )


def check_start(architectures: str | Sequence[str], config: Any, engine: Any, implementation: str = "auto") -> None:
    """Raise if an engine with this ``foveate`` entry cannot start.

    Raises:
        UnsupportedModelError: another family.
        FoveateError: bad settings, or a method that cannot be served on this model.
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
        served(skeleton(config), entry)


def deepest_block(adapter: Adapter, engine: Any) -> int:
    """The last block of the vision tower that an engine loads: the projector's, or one that its method reads."""
    entry = merged(engine)
    read = () if entry is None else served(adapter, entry).signals
    return max([adapter.info.feature_layer, *(signal.layer for signal in read)])


def check_request(adapter: Adapter, engine: Any, entry: Entry) -> ServedMethod:
    """The method of a request's entry on a running engine.

    Raises:
        FoveateError: see :class:`ServedMethod`; or the method reads a block that the engine has not loaded.
    """
    method, loaded = served(adapter, entry), deepest_block(adapter, engine)
    for signal in method.signals:
        if signal.layer > loaded:
            raise ParameterError(
                f"{method.pruner.name} reads block {signal.layer} of the vision tower, and this engine has loaded 0 .. "
                f"{loaded}; start it with this method in --hf-overrides"
            )
    return method


def obstacle(adapter: Adapter, pruner: Pruner, stages: Sequence[Stage]) -> str | None:
    """Why vLLM cannot serve a method with these stages, as the end of a sentence that begins with it; None if it can.

    Raises:
        FoveateError: the model lacks a signal.
    """
    for stage in stages:
        if not isinstance(stage, AtEntry):
            return _WHY_NOT[type(stage)]
        if stage.text_guided:
            return "reads the question, but vLLM encodes a picture once for all prompts that hold it"
    if not stages:
        return "does nothing inside this model; prepare the pictures before you send them"
    if not pruner.content_free and pruner.count(_large_picture(adapter), adapter.info) is None:
        return _COUNTS_LATE
    (stage,) = stages
    for signal in stage.signals.values():
        if isinstance(signal, (PatchPixels, UnpooledFrames)):
            return "reads the pictures' pixels, which vLLM's towers have packed by then"
        adapter.check(signal)
    here = "keep" if adapter.info.mrope else "compact"
    if stage.positions not in (None, here):
        needs, gets = ("positions without gaps", "with") if here == "keep" else ("gaps between positions", "without")
        return f"needs {needs}, and vLLM numbers the tokens of {adapter.info.family} models {gets} gaps"
    return None


def _large_picture(adapter: Adapter) -> Layout:
    """The layout of a picture that families with crops would cut into some."""
    facts = {"image_sizes": torch.tensor([[2048, 2048]]), "image_grid_thw": torch.tensor([[1, 48, 48]])}
    return layouts_of(adapter, facts, 1)[0]


def _can_serve(adapter: Adapter, made: Callable[[], Pruner]) -> bool:
    with contextlib.suppress(FoveateError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = made()
        return obstacle(adapter, pruner, pruner.stages(adapter.info)) is None
    return False


def servable(adapter: Adapter) -> list[str]:
    """Names of the methods that can be served on the model with their defaults."""
    return [name for name in PRUNERS if _can_serve(adapter, lambda name=name: create(name))]


def helpful_changes(adapter: Adapter, pruner: Pruner) -> dict[str, Any]:
    """Parameters of which one, set to this value, lets the method be served: a switch turned, or a default."""
    changes = {}
    for parameter in dataclasses.fields(pruner):
        given = getattr(pruner, parameter.name)
        other = not given if isinstance(given, bool) else parameter.default
        if not isinstance(other, (bool, int, float, str, type(None))) or other == given:
            continue
        if _can_serve(adapter, lambda change={parameter.name: other}: dataclasses.replace(pruner, **change)):
            changes[parameter.name] = other
    return changes


# ------------------------------------------------------------------------------------------------------- the method


class ServedMethod:
    """A method on a model family, as vLLM runs it.

    Attributes:
        adapter: of the family.
        pruner: the method.
        stage: the one point where it acts.
        newlines: the policy for separators; ``"rows"`` only where the layout alone tells which stay.

    Raises:
        FoveateError: the method cannot be served on the model; the message says why and what can.
    """

    def __init__(self, adapter: Adapter, settings: Settings) -> None:
        self.adapter, self.pruner = adapter, settings.pruner
        stages = self.pruner.stages(adapter.info)
        why = obstacle(adapter, self.pruner, stages)
        if why is not None:
            raise self._refusal(why)
        (self.stage,) = stages
        wanted = settings.separators or self.stage.newlines
        self.newlines = "keep" if wanted == "rows" and not self.pruner.content_free else wanted

    def _refusal(self, why: str) -> UnsupportedModelError:
        changes = helpful_changes(self.adapter, self.pruner).items()
        hint = "".join(f"add {json.dumps(name)}: {json.dumps(value)}; or: " for name, value in changes)
        others = ", ".join(servable(self.adapter))
        return UnsupportedModelError(
            f"{self.pruner.name} cannot be served by vLLM: it {why}; {hint}{others} can be served"
        )

    @property
    def signals(self) -> tuple[Signal, ...]:
        """What the method reads of the vision tower."""
        return tuple(self.stage.signals.values())

    def length(self, layout: Layout) -> int:
        """Places that a picture of this layout takes, separators counted.

        The method runs once on made-up features, so that what it would refuse it refuses here and not in the worker;
        only for very large pictures without separators its own count is believed.

        Raises:
            FoveateError: the method cannot meet its budget on this layout, or content decides how many tokens stay.
        """
        count = self.pruner.count(layout, self.adapter.info)
        if count is None and not self.pruner.content_free:
            raise self._refusal(_COUNTS_LATE)
        if count is not None and layout.size > _REHEARSED and not layout.newlines:
            return count
        (selection,) = self._run(*self._made_up(layout))
        kept = selection.index[selection.index >= 0]
        if count is not None and len(kept) != count:
            raise ParameterError(
                f"{self.pruner.name} announces {count} tokens for a picture of {layout.size} and keeps {len(kept)}; "
                "vLLM needs both to be equal: mend the method's count()"
            )
        return len(entering(layout, kept, self.newlines, selection.order))

    def _made_up(self, layout: Layout) -> tuple[Tokens, dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.rand(1, *shape, generator=draw)

        signals = {}
        for name, signal in self.stage.signals.items():
            channels = (_WIDTH,) if signal.channels else ()
            signals[name] = noise(len(layout.views) if signal.per_view else layout.size, *channels)
        tokens = Tokens(noise(layout.size, _WIDTH), layout, (0,), embed=_EmbedsAnything(1, _WIDTH))
        tokens.project = None if self.adapter.project is None else lambda features: features
        return tokens, signals

    def select(
        self,
        rows: Sequence[Tensor],
        layout: Layout,
        signals: Mapping[Signal, Sequence[Tensor]],
        *,
        project: Callable[[Tensor], Tensor] | None = None,
        embed: nn.Module | None = None,
    ) -> list[Kept]:
        """What enters of pictures of one layout; ``rows`` are ``(length, D)`` each, ``signals`` ``(N, …)`` each.

        A picture is encoded once for all prompts, so it has no number: what is drawn depends on its layout alone.
        """
        embeds = torch.stack(list(rows))[:, layout.places(rows[0].device)]
        tokens = Tokens(embeds, layout, (0,) * len(rows), project=project, embed=embed)
        read = {name: torch.stack(list(signals[signal])) for name, signal in self.stage.signals.items()}
        chosen = self._run(tokens, read)
        return [kept_of(one, layout, self.newlines, row, self.stage.deepstack) for one, row in zip(chosen, rows)]

    def _run(self, tokens: Tokens, signals: dict[str, Tensor]) -> list[Selection]:
        chosen = run_stage(self.stage, tokens, signals, self.pruner, self.adapter.info)
        if any(one.order is not None and bool((one.order < 0).any()) for one in chosen):
            raise ParameterError(
                f"{self.pruner.name}: separators of its own placing cannot be served; use the default order"
            )
        return chosen


class _EmbedsAnything(nn.Embedding):
    """An embedding table of one row, which is any token's."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.zeros_like(ids))


def served(adapter: Adapter, entry: Entry) -> ServedMethod:
    """The method of an entry; one object for equal entries.

    Raises:
        FoveateError: bad settings, or see :class:`ServedMethod`.
    """
    return _served(adapter, canonical(entry))


@lru_cache(maxsize=256)
def _served(adapter: Adapter, text: str) -> ServedMethod:
    return ServedMethod(adapter, parse(json.loads(text)))


def places_taken(adapter: Adapter, entry: Entry | None, layout: Layout) -> int:
    """:meth:`ServedMethod.length`, remembered; the unpruned length without an entry."""
    return layout.length if entry is None else _length(adapter, canonical(entry), layout)


@lru_cache(maxsize=4096)
def _length(adapter: Adapter, text: str, layout: Layout) -> int:
    return _served(adapter, text).length(layout)


# ------------------------------------------------------------------------------------------------------ what enters


def whole(layout: Layout) -> Kept:
    """Everything as it is."""
    return Kept(torch.arange(layout.length)[None])


def kept_of(selection: Selection, layout: Layout, newlines: str, rows: Tensor, deepstack: str = "all") -> Kept:
    """What enters of one picture, by its ``selection`` without a batch axis.

    Args:
        newlines: the policy for separators.
        rows: the unpruned picture's embeddings, separators included, ``(length, D)``.
        deepstack: which levels join, as a stage says.
    """
    index = selection.index[selection.index >= 0]
    tokens = layout.places(index.device)
    kept = Kept(entering(layout, index, newlines, selection.order)[None])
    if selection.values is not None:
        carried = rows.clone()
        carried[tokens[index].to(rows.device)] = selection.values[: len(index)].to(rows)
        kept.embeds = carried[kept.index.to(rows.device)]
    mixtures = [] if selection.resample is None else [(0, tokens, tokens[index], selection.resample)]
    if mixtures or deepstack != "all":
        kept.levels = lambda visual, levels: [
            mixed(mixtures, visual, level) for level in deepstack_levels(levels, deepstack)
        ]
    return kept


def applied(kept: Kept, rows: Tensor, width: int) -> Tensor:
    """What ``kept`` leaves of an unpruned picture's ``rows (length, width + levels)``: ``(R, width + levels)``.

    ``width`` channels are the embeddings; after them come DeepStack levels of ``width`` channels each, if any.
    """
    index = kept.index[0].to(rows.device)
    embeds, *levels = rows.split(width, dim=1)
    if levels and kept.levels is not None:
        levels = kept.levels(torch.ones(1, len(rows), dtype=torch.bool, device=rows.device), levels)
    entered = embeds[index] if kept.embeds is None else kept.embeds[0].to(rows)
    entered = torch.cat([entered, *(level[index] for level in levels)], dim=1)
    return nn.functional.pad(entered, (0, rows.shape[1] - entered.shape[1]))  # a level that does not join adds zeros
