"""``foveate.attach``: put a pruner on a model, watch what it does, take it off again."""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapters.attachment import Attachment, attached_to
from foveate.adapters.base import Adapter, Encoded, Modality, adapter_for, bind
from foveate.adapters.decoder import Call, Choice, Decoder, Span
from foveate.adapters.signals import DECODER, DecoderTap, Present, Tap
from foveate.adapters.tower_merging import TowerMerging, remaining
from foveate.adapters.trace import ImageTrace, StageTrace, Trace
from foveate.adapters.vit import block_stages, tower_for
from foveate.adapters.vit_session import VitSession
from foveate.errors import FoveateError, InputError, MissingSignalError, ParameterError
from foveate.pruners.base import (
    CrossModalAttention,
    Hook,
    InstructionAttention,
    Layout,
    PatchPixels,
    Pruner,
    Selection,
    Signal,
    Stage,
    Tokens,
    keep_all,
    one_of,
)
from foveate.pruners.registry import PRUNERS, create

# stands for all that happens inside the tower, where the sequence enters the decoder
_TOWER = Stage(Hook.VIT_BLOCK, keep_all)


def attach(
    model: nn.Module, pruner: str | Pruner | type[Pruner], *, positions: str = "auto", **params: Any
) -> Session | VitSession:
    """Put a pruner on a model. It acts from now on in ``model(...)``, ``model.generate(...)`` and pipelines.

    Args:
        model: a ``transformers`` vision-language model of a known family, or, for methods that merge inside a vision
            tower, a vision model of timm, open_clip or transformers. Weights, dtype, device, attention implementation and
            generation config stay as they are.
        pruner: a method's name (``foveate list``), class or instance.
        positions: ``"keep"`` lets surviving tokens keep the positions they had, ``"compact"`` closes the gaps,
            ``"auto"`` follows the method's specification for the family.
        **params: the method's parameters (``foveate show NAME``).

    Returns:
        A :class:`Session`, on a vision model a :class:`VitSession`; use it in a ``with`` block, or call its ``detach()``
        when done.

    Raises:
        UnsupportedModelError: unknown family. MissingSignalError: the method reads what the model cannot provide.
        UnknownNameError, ParameterError, BudgetError: bad names or values. AttachError: a pruner is attached already.
    """
    if isinstance(pruner, nn.Module):
        raise ParameterError(
            f"the model comes first: foveate.attach(model, pruner), not {type(pruner).__name__} second"
        )
    method = create(pruner, **params)
    tower = tower_for(model)
    if tower is not None:
        return VitSession(model, method, tower)
    return Session(model, method, positions)


@dataclass
class _Item:
    """One image or video of the running prompt (one per beam)."""

    kind: str
    number: int  # which of the encoded ones
    id: int  # seeds what is drawn for it
    sample: int
    layout: Layout
    places: Tensor  # (length,) places in the sequence, separators included
    tokens: Tensor  # (N,) places of the tokens alone
    alive: Tensor  # (K,) token numbers still there, ascending
    width: int  # places still taken, separators included
    trace: ImageTrace | None  # None for beams behind the first
    text_gone: int = 0  # places of text that went with empty frames
    entered: tuple[int, int] = (0, 0)  # into the decoder: tokens, and places with separators

    @property
    def numbers(self) -> Tensor:
        """``(length,)`` token number of every place of the picture, -1 for separators."""
        count = torch.arange(self.layout.size, device=self.places.device)
        blank = torch.full_like(self.places, -1)
        return blank.index_copy(0, self.layout.places(self.places.device), count)


@dataclass(eq=False)
class _Pool:
    """Visual tokens of one sample that a stage in front of a decoder layer selects from together.

    ``places (K,)`` of the sequence; ``sizes``: how many of them belong to each of the ``items``.
    """

    items: list[_Item]
    places: Tensor
    sizes: list[int]
    layout: Layout
    entered: int

    @property
    def sample(self) -> int:
        return self.items[0].sample

    @property
    def key(self) -> tuple[Layout, int, int]:
        """Pools of one key can be stacked."""
        return self.layout, len(self.places), self.entered


@dataclass
class _Result:
    """What a stage selected of one picture; ``separators``: places that stay, None if the stage's policy decides."""

    selection: Selection
    separators: Tensor | None = None


@dataclass
class _Prompt:
    """Where things are among the new places of the running call; masks are ``(B, L)`` bool."""

    decoder: Decoder
    ids: Tensor | None
    embeds: Tensor
    attended: Tensor
    visual: Tensor
    trace: Trace | None = None
    _text: dict[int | None, Tensor] = field(default_factory=dict)

    def text(self, system_tokens: int | None) -> Tensor:
        """Attended, not visual, and behind the system prompt (None: behind the first picture)."""
        if system_tokens not in self._text:
            if system_tokens is None:
                behind = self.visual.long().cumsum(1) > 0
            else:
                behind = self.attended.long().cumsum(1) > system_tokens
            self._text[system_tokens] = behind & self.attended & ~self.visual
        return self._text[system_tokens]

    @property
    def instruction(self) -> Tensor:
        """Text behind the last picture."""
        ahead = self.visual.flip(1).long().cumsum(1).flip(1) > 0  # here or further on is a picture
        return self.text(None) & ~ahead

    def present(self, device: torch.device) -> Present:
        """What the decoder's layers work on now."""
        span = self.decoder.frame.span
        return Present(span.mask.to(device), span.past, span.index.to(device), span.alive.shape[1])

    def timed(self, name: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Count the body's time in the trace, if there is one."""
        return contextlib.nullcontext() if self.trace is None else self.trace.timed(name, device)


class Session(Attachment):
    """A pruner attached to a vision-language model.

    Attributes:
        model, pruner: what was attached to what; positions: the policy asked for.
        trace: what happened in the last call that brought visual tokens, None before. A call whose ``inputs_embeds`` already
            hold picture features brings none that can be told from text: it runs unpruned.
        sample_ids: set to one number per image before a call to fix what random methods draw for it; by default images are
            numbered as they come, from 0.
        frame_scores: set to one sequence of scores per video, one score per sampled frame, before a call whose method reads
            them (``quota``); the call uses them up, for they belong to its question.
    """

    def __init__(self, model: nn.Module, pruner: Pruner, positions: str = "auto") -> None:
        one_of("positions", positions, ("auto", "keep", "compact"))
        self._adapter: Adapter = adapter_for(model)
        inner = self._adapter.inner
        super().__init__(model, pruner, inner)
        self.positions = positions
        self.trace: Trace | None = None
        self.sample_ids: Sequence[int] | None = None
        self.frame_scores: Sequence[Sequence[float] | Tensor] | None = None
        try:
            self._stages = self._checked(pruner)
        except MissingSignalError as error:
            raise MissingSignalError(f"{error}; methods that work here: {', '.join(self._usable())}") from None
        self.layers = frozenset(stage.layer for stage in self._stages if stage.hook is Hook.LLM_LAYER)
        self.neuron_layers = frozenset(stage.layer for stage in self._stages if stage.hook is Hook.LLM_MLP)
        self._pauses = 0
        self._pending: Trace | None = None  # of an encoder call that no prompt has followed yet
        self._running: Trace | None = None
        self._encoded: dict[str, Encoded] = {}
        self._items: list[_Item] = []
        self._seen = 0
        self._input_ids: Tensor | None = None
        self._brought: list[Modality] = []
        self._again = False  # generate() without a cache brings the same features with every token
        self._known: dict[tuple[str, int], int] = {}  # ids of the encoded pictures
        self._scored: dict[int, Sequence[float]] = {}  # frame scores of the encoded videos
        self._prompt: _Prompt | None = None
        self._install(inner)
        self._claim()

    # ------------------------------------------------------------------------------------------------- user's verbs

    def detach(self) -> None:
        for tap in (self._tower_tap, self._decoder_tap):
            tap.remove()
        if self._inside is not None:
            self._inside.remove()
        self._decoder.remove()
        self._handle.remove()
        inner = self._adapter.inner
        for modality in self._adapter.modalities:
            watched = vars(inner).pop(modality.encoder, None)
            if watched is not None and modality.encoder in self._own:
                setattr(inner, modality.encoder, self._own[modality.encoder])
        self._release()
        self.forget()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """In this block the model runs unpruned, and the session notes nothing, as if it were detached."""
        self._pauses += 1
        if self._inside is not None:
            self._inside.active = False
        try:
            yield
        finally:
            self._pauses -= 1
            if self._inside is not None:
                self._inside.active = not self._pauses

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
        stages = pruner.stages(self._adapter.info)
        depth = self._adapter.info.decoder_layers
        for stage in stages:
            if stage.hook in (Hook.LLM_MLP, Hook.LLM_CACHE) and not 0 <= stage.layer < depth:
                raise ParameterError(
                    f"{pruner.name} acts in decoder layer {stage.layer}, but there are 0 .. {depth - 1}"
                )
            if stage.hook is Hook.LLM_LAYER and not 1 <= stage.layer < depth:
                raise ParameterError(
                    f"{pruner.name} acts in front of decoder layer {stage.layer}, but {type(self.model).__name__} "
                    f"has {depth} layers (1 .. {depth - 1} are possible)"
                )
            for signal in () if stage.hook is Hook.VIT_BLOCK else stage.signals.values():
                self._adapter.check(signal)
        if block_stages(stages):
            self._adapter.block_tower().check(block_stages(stages))
        places = [(stage.hook, stage.layer) for stage in stages]
        if len(set(places)) < len(places):
            raise ParameterError(f"{pruner.name} has two stages at one hook point: {places}")
        return stages

    def _install(self, inner: nn.Module) -> None:
        inside = block_stages(self._stages)
        signals = {signal for stage in self._stages if stage not in inside for signal in stage.signals.values()}
        self._pixels = next((signal for signal in signals if isinstance(signal, PatchPixels)), None)
        tapped = [s for s in signals if not isinstance(s, (*DECODER, PatchPixels))]
        self._tower_tap: Tap = self._adapter.tap(tapped)
        layers = self._adapter.text_model.layers
        self._decoder_tap = DecoderTap(layers, [s for s in signals if isinstance(s, DECODER)], lambda: self._prompt)
        self._inside = TowerMerging(self._adapter, self.pruner, inside) if inside else None
        self._handle = inner.register_forward_pre_hook(self._note_ids, with_kwargs=True)
        self._decoder = Decoder(self._adapter.text_model, self, mrope=self._adapter.info.mrope)
        self._own = {m.encoder: vars(inner)[m.encoder] for m in self._adapter.modalities if m.encoder in vars(inner)}
        for modality in self._adapter.modalities:
            # generate() calls the encoder as a method, out of any hook's reach
            setattr(inner, modality.encoder, self._watched(getattr(inner, modality.encoder), modality))

    def _watched(self, encode: Any, modality: Modality) -> Any:
        """The model's encoder method, with signals collected on the way."""
        session = weakref.proxy(self)

        @functools.wraps(encode)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if session._pauses or session._tower_tap.open:  # Qwen3-VL encodes videos through its image encoder
                return encode(*args, **kwargs)
            call = bind(encode, args, kwargs)
            pixels = call[_pixel_argument(modality, call)]
            if not bool(torch.isfinite(pixels).all()):
                raise InputError(
                    f"{modality.pixels} holds NaN or infinite values; check the image and its preprocessing"
                )
            return session._encode(encode, modality, call)

        return watched

    def _encode(self, encode: Any, modality: Modality, call: dict[str, Any]) -> Any:
        self._pending = self._pending or Trace(self.pruner.name, self.pruner.parameters())
        name = _pixel_argument(modality, call)
        pixels = call[name]
        smaller = next((stage.select(pixels) for stage in self._stages if stage.hook is Hook.PIXELS), pixels)
        shrunk = smaller.shape != pixels.shape
        if shrunk:
            call = {**call, name: smaller, "interpolate_pos_encoding": True}
        self._tower_tap.open = True
        try:
            with self._pending.timed("encoder", pixels.device):
                output = encode(**call)
        finally:
            signals = self._tower_tap.close()
        if not hasattr(output, "pooler_output"):
            return output  # asked for as a tuple: not on the way into the decoder
        if shrunk:
            output.pooler_output = self._padded(modality, call, output)
        self._known = {}
        if self._inside is not None:
            signals = self._inside.signals(signals)
        encoded = self._adapter.encoded(modality.kind, output, call, signals)
        if self._inside is not None:
            encoded.survivors = self._inside.survivors(modality.kind, call, encoded.layouts)
        if self._pixels is not None:
            encoded.signals[self._pixels] = self._adapter.pixels(modality.kind, call, pixels, encoded.layouts)
        self._encoded[modality.kind] = encoded
        return output

    def _padded(self, modality: Modality, call: dict[str, Any], output: Any) -> list[Tensor]:
        """A smaller picture gives fewer tokens than the prompt has places: they come first, zeros fill up."""
        layouts = self._adapter.layouts(modality.kind, call, output)
        return [
            torch.cat([few, few.new_zeros(layout.length - len(few), few.shape[-1])])
            for few, layout in zip(output.pooler_output, layouts)
        ]

    def _note_ids(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._pauses:
            return
        call = bind(module.forward, args, kwargs) if args else kwargs
        encoded = call.get("mm_encoder_outputs") or {}
        self._again = bool(encoded) and not call.get("use_cache", True)
        # placeholder tokens that come without features (a model may generate one) are ordinary text
        self._brought = [
            modality
            for modality in self._adapter.modalities
            if call.get(modality.pixels) is not None or encoded.get(modality.kind) is not None
        ]
        ids = call.get("input_ids")
        if ids is None and call.get("inputs_embeds") is not None:
            embed, embeds = module.get_input_embeddings(), call["inputs_embeds"]
            ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
            for modality in self._brought:
                placeholder = embed(torch.tensor(modality.token_id, device=embeds.device))
                ids = ids.masked_fill((embeds == placeholder).all(-1), modality.token_id)
        self._input_ids = ids

    # ----------------------------------------------------------------------------------- answers to the decoder hooks

    def begin(self, embeds: Tensor, mask: Tensor | None, past: int) -> Call:
        """Find the visual tokens of a call, and whether it is to be read."""
        if self._pauses:
            return Call.CONTINUATION
        self._decoder_tap.close()
        ids, self._input_ids = self._input_ids, None
        self._items = []
        if self._bring(ids, embeds, mask, past):
            self._decoder_tap.open = True
            return Call.PROMPT
        if not any(
            past == 0 or (stage.refresh and embeds.shape[1] > 1) for stage in self._stages if stage.hook is Hook.LLM_MLP
        ):
            return Call.CONTINUATION
        nothing = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        attended = ~nothing if mask is None or mask.ndim != 2 else mask[:, past:].bool().to(embeds.device)
        self._prompt = _Prompt(self._decoder, None, embeds, attended, nothing)
        self._decoder_tap.open = True
        return Call.TEXT_PROMPT

    def _bring(self, ids: Tensor | None, embeds: Tensor, mask: Tensor | None, past: int) -> bool:
        """Does the call bring visual tokens? They become the running call's items."""
        if ids is None or not self._brought or ids.shape != embeds.shape[:2]:
            self._encoded, self._pending = {}, None
            return False
        visual = torch.zeros_like(ids, dtype=torch.bool)
        for modality in self._brought:
            here = ids == modality.token_id
            if bool(here.any()):
                self._items += self._find(modality, here)
                visual |= here
        if not self._items:
            return False
        self._number()
        attended = (
            torch.ones_like(visual) if mask is None or mask.ndim != 2 else mask[:, past:].bool().to(visual.device)
        )
        self._running, self._pending = self._pending or Trace(self.pruner.name, self.pruner.parameters()), None
        self._prompt = _Prompt(self._decoder, ids, embeds, attended, visual, self._running)
        self._running.length = embeds.shape[1]
        self._running.decoder_layers = self._adapter.info.decoder_layers
        self._running.images = [item.trace for item in self._items if item.trace is not None]
        return True

    def _find(self, modality: Modality, here: Tensor) -> list[_Item]:
        """Match placeholder tokens ``here (B, L)`` with the encoded pictures, which beams may have multiplied."""
        encoded = self._encoded.get(modality.kind)
        counts = here.sum(dim=1).tolist()
        lengths = [layout.length for layout in encoded.layouts] if encoded else []
        beams, rest = divmod(sum(counts), sum(lengths)) if lengths else (0, 1)
        if rest or len(counts) % max(beams, 1):
            raise InputError(
                f"the prompt has {sum(counts)} {modality.kind} tokens in this call, the vision side encoded {sum(lengths)}; "
                "chunked prefill and features that were encoded before attaching cannot be pruned"
            )
        places = here.nonzero()[:, 1].split(counts)
        items, first = [], 0
        for row in range(0, len(counts), beams):
            stop, total = first, 0
            while total < counts[row] and stop < len(lengths):
                total += lengths[stop]
                stop += 1
            for sample in range(row, row + beams):
                parts = places[sample].split(lengths[first:stop]) if total == counts[sample] else None
                if parts is None:
                    raise InputError(
                        f"row {sample} has {counts[sample]} {modality.kind} tokens, which is no whole number of pictures"
                    )
                for number, where in zip(range(first, stop), parts):
                    items.append(
                        self._item(modality.kind, number, sample, encoded.layouts[number], where, sample == row)
                    )
            first = stop
        return items

    def _item(self, kind: str, number: int, sample: int, layout: Layout, places: Tensor, first: bool) -> _Item:
        tokens = places[layout.places(places.device)]
        everything = torch.arange(layout.size, device=places.device)
        trace = ImageTrace(sample, kind, layout, centre_crop=self._adapter.centre_crop) if first else None
        return _Item(kind, number, 0, sample, layout, places, tokens, everything, layout.length, trace)

    def _number(self) -> None:
        """Put the pictures in prompt order and give each its id; beams share that of the first."""
        if len(self._brought) > 1:  # pictures and videos may take turns
            self._items.sort(key=lambda item: (item.sample, int(item.places[0])))
        unique = [item for item in self._items if item.trace is not None]
        if self._known:  # encoded once, here again
            for item in self._items:
                item.id = self._known[item.kind, item.number]
            return
        ids = range(self._seen, self._seen + len(unique)) if self.sample_ids is None else list(self.sample_ids)
        if len(ids) != len(unique):
            raise ParameterError(f"sample_ids names {len(ids)} images, the call brings {len(unique)}")
        self._seen, self.sample_ids = self._seen + len(unique), None
        self._known = {(item.kind, item.number): i for item, i in zip(unique, ids)}
        for item in self._items:
            item.id = self._known[item.kind, item.number]
        self._scored = self._scores([item for item in unique if item.kind == "video"])

    def _scores(self, videos: list[_Item]) -> dict[int, Sequence[float]]:
        """The given frame scores by number of the encoded video."""
        given, self.frame_scores = self.frame_scores, None
        if given is None:
            return {}
        if len(given) != len(videos):
            raise ParameterError(
                f"frame_scores has {len(given)} entries, the call brings {len(videos)} videos; give one sequence per video"
            )
        return {item.number: scores for item, scores in zip(videos, given)}

    def at_input(self, embeds: Tensor) -> Choice | None:
        """Run the stage at ``llm_input``, once per encoded picture."""
        stage = next((s for s in self._stages if s.hook is Hook.LLM_INPUT), None)
        self._count(0)
        merged = None
        if self._inside is not None:
            survivors = [self._encoded[item.kind].survivors[item.number] for item in self._items]
            merged = self._choice(_TOWER, [_Result(selection) for selection in survivors], 0)
        if stage is None:
            self._enter()
            return merged
        unique = [item for item in self._items if item.trace is not None]
        left = {id(item): remaining(item.layout, item.alive) for item in unique}
        results: dict[tuple[str, int], Selection] = {}
        with self._timed(stage, embeds.device):
            for layout in dict.fromkeys(left.values()):
                items = [item for item in unique if left[id(item)] == layout]
                features = torch.stack([_left(self._encoded[item.kind].features[item.number], item) for item in items])
                signals = {
                    name: torch.stack(
                        [_left(self._encoded[item.kind].signals[signal][item.number], item) for item in items]
                    )
                    for name, signal in stage.signals.items()
                }
                tokens = self._tokens(stage, features, layout, items)
                for item, row in zip(items, _select(stage, tokens, signals)):
                    results[item.kind, item.number] = row
        rows = [_Result(results[item.kind, item.number]) for item in self._items]
        choice = self._choice(stage, rows, 0, before=None if merged is None else merged.alive)
        self._enter()
        return merged if choice is None else choice

    def _enter(self) -> None:
        """Remember what of each picture enters the decoder."""
        for item in self._items:
            item.entered = len(item.alive), item.width

    def at_layer(self, layer: int, hidden: Tensor, span: Span, cache: Any) -> Choice | None:
        """Run the stage in front of decoder layer ``layer``, beams included."""
        stage = next(s for s in self._stages if s.hook is Hook.LLM_LAYER and s.layer == layer)
        with self._timed(stage, hidden.device):
            for signal in stage.signals.values():
                if isinstance(signal, InstructionAttention):
                    paid = self._decoder_tap.ahead(signal, hidden, self._decoder.rotary(hidden), cache)
                    self._decoder_tap.values[signal] = paid
            results: list[_Result] = []
            for pool, selection in self._selected(stage, hidden, span):
                results += self._by_item(stage, pool, selection)
        choice = self._choice(stage, results, layer, span)
        if choice is not None:
            choice.evict = stage.evict
        if choice is not None and choice.values is None:
            choice.follow = functools.partial(self._decoder_tap.follow, layer)
        elif choice is not None:
            self._decoder_tap.forsake(layer)  # what enters is not what was looked at
        return choice

    def _selected(self, stage: Stage, hidden: Tensor, span: Span) -> list[tuple[_Pool, Selection]]:
        """Run a stage on the living tokens in ``hidden (B, K, D)``; pools of one form as one batch."""
        pools = self._pools(stage, span)
        done: list[tuple[_Pool, Selection]] = []
        for key in dict.fromkeys(pool.key for pool in pools):
            alike = [pool for pool in pools if pool.key == key]
            columns = [span.column[pool.sample, pool.places].to(hidden.device) for pool in alike]
            states = torch.stack([hidden[pool.sample, where] for pool, where in zip(alike, columns)])
            signals = {
                name: torch.stack([self._decoder_signal(signal, pool) for pool in alike]).to(hidden.device)
                for name, signal in stage.signals.items()
            }
            tokens = self._tokens(stage, states, alike[0].layout, [pool.items[0] for pool in alike])
            tokens.entered = alike[0].entered
            done += zip(alike, _select(stage, tokens, signals))
        return sorted(done, key=lambda pair: pools.index(pair[0]))

    def neurons(self) -> dict[int, Tensor]:
        """What the MLPs run from now on."""
        values = self._decoder_tap.values
        return {
            stage.layer: stage.select(**{name: values[signal] for name, signal in stage.signals.items()})
            for stage in self._stages
            if stage.hook is Hook.LLM_MLP
        }

    def erased(self, hidden: Tensor, span: Span) -> dict[int, Tensor]:
        """Which places lose their keys and values in which layers."""
        gone = {}
        for stage in self._stages:
            if stage.hook is Hook.LLM_CACHE:
                gone[stage.layer] = torch.zeros_like(self._prompt.visual)
                with self._timed(stage, hidden.device):
                    for pool, selection in self._selected(stage, hidden, span):
                        index = selection.index[selection.index >= 0].to(pool.places.device)
                        gone[stage.layer][pool.sample, pool.places] = True
                        gone[stage.layer][pool.sample, pool.places[index]] = False
        return gone

    def _pools(self, stage: Stage, span: Span) -> list[_Pool]:
        """What the stage selects from together, in the order of the items."""
        compete = stage.newlines == "compete"
        pools: list[_Pool] = []
        for item in self._items:
            places = item.tokens[item.alive]
            if compete and item.layout.newlines:
                places = item.places[span.alive[item.sample, item.places]]
            if stage.scope == "sample" and pools and pools[-1].sample == item.sample:
                pool = pools[-1]
                pool.items.append(item)
                pool.places = torch.cat([pool.places, places])
            else:
                pool = _Pool([item], places, [], item.layout, 0)
                pools.append(pool)
            pool.sizes.append(len(places))
            pool.entered += item.entered[compete]
        for pool in pools:
            if len(pool.items) > 1:
                pool.layout = Layout.joined([item.layout for item in pool.items])
        return pools

    @staticmethod
    def _by_item(stage: Stage, pool: _Pool, selection: Selection) -> list[_Result]:
        """A pool's selection, picture by picture, in numbers of each picture's living tokens."""
        compete = stage.newlines == "compete"
        if len(pool.items) == 1 and not (compete and pool.layout.newlines):
            return [_Result(selection)]
        chosen = torch.zeros_like(pool.places, dtype=torch.bool)
        chosen[selection.index[selection.index >= 0].to(chosen.device)] = True
        scores = [None] * len(pool.items) if selection.scores is None else selection.scores.split(pool.sizes)
        results = []
        for item, places, kept, score in zip(
            pool.items, pool.places.split(pool.sizes), chosen.split(pool.sizes), scores
        ):
            number = item.numbers[torch.searchsorted(item.places, places)]
            token = number >= 0
            index = kept[token].nonzero().squeeze(1)
            score = None if score is None else score[token.to(score.device)]
            results.append(_Result(Selection(index, scores=score), places[kept & ~token] if compete else None))
        return results

    def finish(self, cache_lengths: list[int] | None) -> None:
        """The prompt went through all layers."""
        self._running.cache_lengths = cache_lengths
        self.trace = self._running

    # ------------------------------------------------------------------------------------------------------ helpers

    def forget(self) -> None:
        """Let go of the call's tensors."""
        if self._pauses:
            return
        self._decoder_tap.close()
        self._items, self._running = [], None
        if not self._again:
            self._encoded, self._known, self._scored = {}, {}, {}
        self._prompt = None

    def _timed(self, stage: Stage, device: torch.device) -> Any:
        at = stage.hook.value if stage.hook in (Hook.PIXELS, Hook.LLM_INPUT) else f"{stage.hook.value}({stage.layer})"
        return self._running.timed(at, device)

    def _tokens(self, stage: Stage, embeds: Tensor, layout: Layout, items: list[_Item]) -> Tokens:
        tokens = Tokens(embeds, layout, tuple(item.id for item in items), project=self._adapter.exact_project)
        tokens.embed = self._adapter.inner.get_input_embeddings()
        if stage.reads_frame_scores and self._scored and items[0].kind == "video":
            tokens.frame_scores = [self._scored[item.number] for item in items]
        if not stage.reads_text:
            return tokens
        prompt, rows = self._prompt, [item.sample for item in items]
        text = prompt.text(None)[rows]
        width = int(text.sum(dim=1).amax())
        if width:
            order = text.long().argsort(dim=1, descending=True, stable=True)[:, :width]
            valid = text.gather(1, order)
            words = prompt.embeds[rows].gather(1, order[..., None].expand(-1, -1, prompt.embeds.shape[-1]))
            tokens.instruction, tokens.instruction_mask = words * valid[..., None], valid
            tokens.instruction_ids = prompt.ids[rows].gather(1, order).masked_fill(~valid, -1)
        return tokens

    def _decoder_signal(self, signal: Signal, pool: _Pool) -> Tensor:
        values = self._decoder_tap.values[signal][pool.sample]
        return values if isinstance(signal, CrossModalAttention) else values[pool.places.to(values.device)]

    def _choice(
        self,
        stage: Stage,
        results: Sequence[_Result],
        layer: int,
        span: Span | None = None,
        before: Tensor | None = None,
    ) -> Choice | None:
        """Write the pictures' selections into the sequence; None if every token stays as it is.

        ``before (B, L)`` bool: places still there, where it is not for the span to say.
        """
        policy = self.positions if self.positions != "auto" else stage.positions
        policy = policy or ("keep" if self._adapter.info.mrope else "compact")
        if before is None:
            before = torch.ones_like(self._prompt.visual) if span is None else span.alive
        alive, rank, changed, mixtures = before.clone(), None, [], []
        widths = [item.width for item in self._items]
        for item, one in zip(self._items, results):
            result = one.selection
            index = (result.index[result.index >= 0] if self.pruner.adaptive else result.index).to(item.alive.device)
            chosen = item.alive[index]  # token numbers
            everything = len(index) == len(item.alive) and result.breaks is None
            self._record(item, stage, result, chosen)
            places = item.tokens[chosen]
            breaks = None
            if not everything or one.separators is not None:
                if one.separators is not None:
                    alive[item.sample, item.places] = False
                    alive[item.sample, one.separators] = True
                alive[item.sample, item.tokens] = False
                alive[item.sample, places] = True
                if result.breaks is not None and item.layout.newlines:
                    breaks = self._breaks(item, len(result.breaks), alive, self._prompt.embeds)
                    changed.append(breaks)
                    item.width = len(breaks[1]) + len(chosen)
                elif one.separators is not None:
                    item.width = len(one.separators) + len(chosen)
                else:
                    separators = "drop" if result.order is not None else stage.newlines
                    item.width = self._separators(item, separators, chosen, alive) + len(chosen)
                if stage.empty_frames == "drop":
                    item.text_gone += self._drop_frame_text(item, chosen, alive)
            if result.resample is not None:
                mixtures.append((item.sample, item.tokens[item.alive], item.tokens[chosen], result.resample))
            if result.values is not None:
                changed.append((torch.full_like(places, item.sample), places, result.values[: len(places)]))
            if result.order is not None or breaks is not None:
                rank = (
                    torch.arange(alive.shape[1], device=alive.device).expand_as(alive).clone() if rank is None else rank
                )
                entering = places if result.order is None else places[result.order[result.order < len(places)]]
                if breaks is not None:
                    entering = _interleave(entering, breaks[1], result.breaks)
                rank[item.sample, entering] = entering.sort().values
            item.alive = chosen
        self._count(layer, stage.evict)
        self._running.positions[stage.hook.value] = policy
        taken = [0] * len(alive)
        for item in self._items:
            taken[item.sample] += item.width - item.layout.length - item.text_gone
        width = alive.shape[1] + max(taken)
        untouched = widths == [item.width for item in self._items]
        if untouched and not changed and rank is None:
            return None
        values = tuple(torch.cat(parts) for parts in zip(*changed)) if changed else None
        return Choice(alive, width, policy, rank, values, mixtures=mixtures, deepstack=stage.deepstack)

    def _drop_frame_text(self, item: _Item, chosen: Tensor, alive: Tensor) -> int:
        """Take the text around frames without a token out of ``alive``; returns how many places that frees."""
        views = item.layout.views
        if views[0].kind != "frame" or not self._adapter.writes_frame_text:
            return 0
        bounds = torch.tensor([view.start for view in views] + [item.layout.size], device=chosen.device)
        kept = torch.searchsorted(chosen, bounds).diff().tolist()
        places = item.tokens.tolist()
        frames = [(places[view.start], places[view.start + view.size - 1]) for view in views]
        around = self._adapter.frame_text(self._prompt.ids[item.sample].tolist(), frames)
        gone = [p for places, k in zip(around, kept) if k == 0 for p in places]
        gone = torch.tensor(gone, dtype=torch.long, device=alive.device)
        freed = int(alive[item.sample, gone].sum())
        alive[item.sample, gone] = False
        return freed

    @staticmethod
    def _breaks(item: _Item, count: int, alive: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give ``count`` separators places, of dropped tokens where the picture has too few: rows, places, embeddings."""
        own = item.places[torch.tensor([n.place for n in item.layout.newlines], device=item.places.device)]
        alive[item.sample, own] = False
        free = item.places[~alive[item.sample, item.places]]
        if count > len(free):
            raise InputError(f"{count} separators do not fit into the {len(free)} places that a picture leaves free")
        borrowed = free[~torch.isin(free, own)]
        places = torch.cat([own, borrowed])[:count]
        alive[item.sample, places] = True
        rows = torch.full_like(places, item.sample)
        return rows, places, embeds[item.sample, own[:1].to(embeds.device)].expand(count, -1)

    @staticmethod
    def _separators(item: _Item, policy: str, chosen: Tensor, alive: Tensor) -> int:
        """Decide on the picture's separators in ``alive``; returns how many stay."""
        if not item.layout.newlines:
            return 0
        where = item.places[torch.tensor([n.place for n in item.layout.newlines], device=item.places.device)]
        stay = alive[item.sample, where]
        if policy == "drop":
            stay = torch.zeros_like(stay)
        elif policy == "rows":
            kept = torch.zeros(item.layout.size + 1, dtype=torch.long, device=chosen.device)
            upto = kept.index_fill(0, chosen + 1, 1).cumsum(0)
            edges = torch.tensor([(n.first, n.last) for n in item.layout.newlines], device=chosen.device)
            stay = stay & (upto[edges[:, 1]] > upto[edges[:, 0]])
        alive[item.sample, where] = stay
        return int(stay.sum())

    def _record(self, item: _Item, stage: Stage, result: Selection, chosen: Tensor) -> None:
        if item.trace is None:
            return
        full = item.layout.size
        scores = owner = None
        if result.scores is not None:
            scores = torch.full((full,), float("nan"), device=chosen.device)
            scores[item.alive] = result.scores.detach().float()
        if result.owner is not None:
            owner = torch.full((full,), -1, dtype=torch.long, device=chosen.device)
            owner[item.alive] = torch.where(result.owner >= 0, item.alive[result.owner.clamp(min=0)], -1)
        markers = None if result.markers is None else item.alive[result.markers]
        item.trace.stages.append(StageTrace(stage.hook.value, stage.layer, chosen, owner, scores, markers))

    def _count(self, layer: int, evict: bool = False) -> None:
        """From ``layer`` on, the decoder sees what is left now; with ``evict``, no cache keeps more."""
        depth = self._adapter.info.decoder_layers
        for item in self._items:
            if item.trace is not None:
                item.trace.tokens_per_layer[layer:] = [item.width] * (depth - layer)
                item.trace.cached_per_layer[0 if evict else layer :] = [item.width] * (depth - (0 if evict else layer))
                item.trace.text_gone_per_layer[layer:] = [item.text_gone] * (depth - layer)


def session_of(model: nn.Module) -> Session | None:
    """The session that is attached to the model, if any."""
    inner = getattr(model, "model", model)
    return attached_to(inner if hasattr(inner, "language_model") else model)


def _select(stage: Stage, tokens: Tokens, signals: dict[str, Tensor]) -> list[Selection]:
    """Run a stage in full precision whatever autocast says; one selection per picture."""
    with torch.autocast(tokens.embeds.device.type, enabled=False):
        return _rows(stage.select(tokens, **signals))


def _interleave(tokens: Tensor, separators: Tensor, breaks: Tensor) -> Tensor:
    """``tokens (K,)`` and ``separators (S,)``, of which number s stands behind ``breaks[s]`` tokens: ``(K + S,)``."""
    entering = tokens.new_empty(len(tokens) + len(separators))
    here = breaks + torch.arange(len(breaks), device=breaks.device)
    is_token = torch.ones_like(entering, dtype=torch.bool).index_fill(0, here, False)
    entering[here], entering[is_token] = separators, tokens
    return entering


def _left(values: Tensor, item: _Item) -> Tensor:
    """What is known of a picture's tokens ``(N, …)``, of those that are left; of its views ``(V, …)``, all."""
    full = item.layout.size
    return values if len(item.alive) == full or len(values) != full else values[item.alive.to(values.device)]


def _pixel_argument(modality: Modality, call: dict[str, Any]) -> str:
    """What the encoder calls its pixels: older LLaVA-OneVision code says ``pixel_values`` for videos too."""
    return modality.pixels if modality.pixels in call else "pixel_values"


def _rows(selection: Selection) -> list[Selection]:
    """Take a batch apart."""
    fields = {name: value for name, value in vars(selection).items() if value is not None}
    return [
        replace(Selection(selection.index[b]), **{n: v[b] for n, v in fields.items()})
        for b in range(len(selection.index))
    ]
