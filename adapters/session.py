"""``foveate.attach``: put a pruner on a model, watch what it does, take it off again."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapters import compat
from foveate.adapters.attachment import Attachment, attached_to, undone_on_failure
from foveate.adapters.engine.decoder_signals import DecoderTap
from foveate.adapters.engine.encoder import EncoderWatch
from foveate.adapters.engine.prompt import Item, Pool, Prompt, Result, by_item, find_items, pools_of
from foveate.adapters.engine.sequence import SequenceWriter
from foveate.adapters.engine.spans import Call, Choice, Span
from foveate.adapters.families.base import Adapter, Brought, adapter_for
from foveate.adapters.towers.base import block_stages, tower_for
from foveate.adapters.towers.merging import remaining
from foveate.adapters.towers.session import VitSession
from foveate.adapters.towers.taps import DECODER
from foveate.adapters.trace import Trace
from foveate.errors import AttachError, FoveateError, InputError, MissingSignalError, ParameterError
from foveate.pruners.core.method import (
    CrossModalAttention,
    Hook,
    InstructionAttention,
    Layout,
    Pruner,
    Selection,
    Signal,
    Stage,
    Tokens,
    keep_all,
    one_of,
)
from foveate.pruners.core.preset import Preset, is_preset
from foveate.pruners.core.registry import PRUNERS, create

# stands for all that happens inside the tower, where the sequence enters the decoder
_TOWER = Stage(Hook.VIT_BLOCK, keep_all)


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
            tower, a vision model of timm, open_clip or transformers. Weights, dtype, device, attention implementation and
            generation config stay as they are.
        pruner: a method's name (``foveate list``), class or instance, or a preset that ``foveate tune`` wrote
            (``"preset.yaml"``).
        positions: ``"keep"`` lets surviving tokens keep the positions they had, ``"compact"`` closes the gaps,
            ``"auto"`` follows the preset, or the method's specification for the family.
        separators: ``"keep"`` all newline embeddings of a pruned AnyRes picture, as vLLM has to where the method's number of
            them depends on the content, or ``"drop"`` them; ``"auto"`` follows the method's specification.
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
    if is_preset(pruner):
        preset = Preset.read(pruner, **params)
        method, positions = preset.pruner, preset.positions if positions == "auto" else positions
    else:
        method = create(pruner, **params)
    tower = tower_for(model)
    if tower is not None:
        return VitSession(model, method, tower)
    return Session(model, method, positions, separators)


class Session(Attachment):
    """A pruner attached to a vision-language model.

    Attributes:
        model, pruner: what was attached to what; positions, separators: the policies asked for.
        trace: what happened in the last call that brought visual tokens, None before. A call whose ``inputs_embeds`` already
            hold picture features brings none that can be told from text: it runs unpruned.
        sample_ids: set to one number per image before a call to fix what random methods draw for it; by default images are
            numbered as they come, from 0.
        frame_scores: set to one sequence of scores per video, one score per sampled frame, before a call whose method reads
            them (``quota``); the call uses them up, for they belong to its question.
    """

    def __init__(self, model: nn.Module, pruner: Pruner, positions: str = "auto", separators: str = "auto") -> None:
        one_of("positions", positions, ("auto", "keep", "compact"))
        one_of("separators", separators, ("auto", "keep", "drop"))
        self._adapter: Adapter = adapter_for(model)
        super().__init__(model, pruner, self._adapter.inner)
        self.positions, self.separators = positions, separators
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
        self._seen = 0
        self._again = False  # the encoded pictures are needed once more
        self._scored: dict[int, Sequence[float]] = {}  # frame scores of the encoded videos
        self._prompt: Prompt | None = None
        self._writer = SequenceWriter(self._adapter, positions, separators, pruner.adaptive)
        self._parts: list[Any] = []  # what is on the model
        with undone_on_failure(self._take_off):
            self._install()
            self._claim()

    # ------------------------------------------------------------------------------------------------- user's verbs

    def detach(self) -> None:
        self._take_off()
        self.forget()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """In this block the model runs unpruned, and the session notes nothing, as if it were detached."""
        self._pauses += 1
        self._encoder.active = False
        try:
            yield
        finally:
            self._pauses -= 1
            self._encoder.active = not self._pauses

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

    def _take_off(self) -> None:
        for part in reversed(self._parts):
            part.remove()
        self._release()

    def _install(self) -> None:
        inside = block_stages(self._stages)
        signals = {signal for stage in self._stages if stage not in inside for signal in stage.signals.values()}
        inner_signals = [signal for signal in signals if isinstance(signal, DECODER)]
        layers, put = self._adapter.text_model.layers, self._parts.append
        self._decoder_tap = DecoderTap(layers, inner_signals, lambda: self._prompt)
        put(self._decoder_tap)
        self._prompt_watch = self._adapter.watch_prompt()
        put(self._prompt_watch)
        self._decoder = self._adapter.decoder(self)
        put(self._decoder)
        self._encoder = EncoderWatch(self._adapter, self.pruner, self._stages, signals.difference(inner_signals))
        put(self._encoder)

    # ----------------------------------------------------------------------------------- answers to the decoder hooks

    def begin(self, embeds: Tensor, mask: Tensor | None, past: int) -> Call:
        """Find the visual tokens of a call, and whether it is to be read."""
        if self._pauses:
            self._prompt_watch.forget()
            return Call.CONTINUATION
        self._decoder_tap.close()
        brought = self._prompt_watch.take(embeds)
        self._again = brought.again
        if self._bring(brought, embeds, mask, past):
            self._refuse_checkpointing()
            self._decoder_tap.open = True
            return Call.PROMPT
        if not any(
            past == 0 or (stage.refresh and embeds.shape[1] > 1) for stage in self._stages if stage.hook is Hook.LLM_MLP
        ):
            return Call.CONTINUATION
        self._refuse_checkpointing()
        nothing = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        attended = ~nothing if mask is None or mask.ndim != 2 else mask[:, past:].bool().to(embeds.device)
        self._prompt = Prompt(self._decoder, None, embeds, attended, nothing)
        self._decoder_tap.open = True
        return Call.TEXT_PROMPT

    def _bring(self, brought: Brought, embeds: Tensor, mask: Tensor | None, past: int) -> bool:
        """Does the call bring visual tokens? They become the running call's items."""
        ids = brought.ids
        if ids is None or not brought.modalities or ids.shape != embeds.shape[:2]:
            self._check_nothing_arrived(brought, embeds)
            self._encoder.forget()
            return False
        visual = torch.zeros_like(ids, dtype=torch.bool)
        items: list[Item] = []
        for modality in brought.modalities:
            here = ids == modality.token_id
            if bool(here.any()):
                encoded = self._encoder.encoded.get(modality.kind)
                layouts = encoded.layouts if encoded else []
                items += find_items(modality.kind, here, layouts, self._adapter.centre_crop)
                visual |= here
        if not items:
            return False
        if len(brought.modalities) > 1:  # pictures and videos may take turns
            items.sort(key=lambda item: (item.sample, int(item.places[0])))
        self._number(items)
        attended = (
            torch.ones_like(visual) if mask is None or mask.ndim != 2 else mask[:, past:].bool().to(visual.device)
        )
        trace = self._encoder.take_trace()
        trace.length, trace.decoder_layers = embeds.shape[1], self._adapter.info.decoder_layers
        trace.images = [item.trace for item in items if item.trace is not None]
        self._prompt = Prompt(self._decoder, ids, embeds, attended, visual, items, trace)
        return True

    def _check_nothing_arrived(self, brought: Brought, embeds: Tensor) -> None:
        """Raise if features of pictures stand in ``embeds`` that would go unpruned, for they came unnoticed.

        Raises:
            InputError: the prompt has been lengthened. NotUnderstoodError: they came under a name that is not known.
        """
        ids = brought.ids
        if ids is None:
            return  # embeddings that the caller made
        if ids.shape != embeds.shape[:2]:
            if brought.modalities:
                raise InputError(
                    f"{tuple(ids.shape)} token ids became {tuple(embeds.shape[:2])} embeddings, so it is not known where the "
                    "pictures are; soft prompts cannot be pruned"
                )
            return
        if ids.shape[1] == 1 or not (self._encoder.encoded or compat.untested()):
            return
        for modality in self._adapter.modalities:
            here = ids == modality.token_id
            token = torch.tensor(modality.token_id, device=ids.device)
            if bool(here.any()) and not bool((embeds[here] == self._adapter.inner.get_input_embeddings()(token)).all()):
                raise compat.not_understood(
                    f"features stand in {int(here.sum())} places of {modality.kind}s, and "
                    f"{type(self._adapter.inner).__name__} was called without pixels or features under a name that is known"
                )

    def _refuse_checkpointing(self) -> None:
        """Layers that transformers before 5.23 checkpoints run their hooks again in the backward pass, after the prompt."""
        checkpointed = self.model.training and torch.is_grad_enabled() and compat.installed() < (5, 23)
        if checkpointed and any(map(compat.checkpoints, self._adapter.text_model.layers)):
            raise AttachError(
                f"{self.pruner.name} cannot act under the gradient checkpointing of transformers before 5.23, which runs "
                "hooks twice; switch it off, or install a newer transformers"
            )

    def _number(self, items: list[Item]) -> None:
        """Give each picture its id; beams share that of the first."""
        numbers = self._encoder.numbers
        if not numbers:
            unique = [item for item in items if item.trace is not None]
            ids = range(self._seen, self._seen + len(unique)) if self.sample_ids is None else list(self.sample_ids)
            if len(ids) != len(unique):
                raise ParameterError(f"sample_ids names {len(ids)} images, the call brings {len(unique)}")
            self._seen, self.sample_ids = self._seen + len(unique), None
            numbers.update({(item.kind, item.number): i for item, i in zip(unique, ids)})
            self._scored = self._scores([item for item in unique if item.kind == "video"])
        for item in items:
            item.id = numbers[item.kind, item.number]

    def _scores(self, videos: list[Item]) -> dict[int, Sequence[float]]:
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
        prompt, encoded = self._prompt, self._encoder.encoded
        self._writer.count(prompt, 0)
        merged = None
        if self._encoder.merging is not None:
            survivors = [Result(encoded[item.kind].survivors[item.number]) for item in prompt.items]
            merged = self._writer.write(prompt, _TOWER, survivors, 0)
        choice = None
        if stage is not None:
            selected = self._selected_at_input(stage, embeds.device)
            results = [Result(selected[item.kind, item.number]) for item in prompt.items]
            choice = self._writer.write(prompt, stage, results, 0, before=None if merged is None else merged.alive)
        for item in prompt.items:
            item.entered = len(item.alive), item.width
        return merged if choice is None else choice

    def _selected_at_input(self, stage: Stage, device: torch.device) -> dict[tuple[str, int], Selection]:
        """Run the stage on the encoded pictures; those of one layout as one batch."""
        unique = [item for item in self._prompt.items if item.trace is not None]
        left = {id(item): remaining(item.layout, item.alive) for item in unique}
        selected: dict[tuple[str, int], Selection] = {}
        with self._timed(stage, device):
            for layout in dict.fromkeys(left.values()):
                items = [item for item in unique if left[id(item)] == layout]
                encoded = [self._encoder.encoded[item.kind] for item in items]
                features = torch.stack([item.left(one.features[item.number]) for item, one in zip(items, encoded)])
                signals = {
                    name: torch.stack(
                        [item.left(one.signals[signal][item.number]) for item, one in zip(items, encoded)]
                    )
                    for name, signal in stage.signals.items()
                }
                tokens = self._tokens(stage, features, layout, items)
                for item, row in zip(items, self._select(stage, tokens, signals)):
                    selected[item.kind, item.number] = row
        return selected

    def at_layer(self, layer: int, hidden: Tensor, span: Span, cache: Any) -> Choice | None:
        """Run the stage in front of decoder layer ``layer``, beams included."""
        stage = next(s for s in self._stages if s.hook is Hook.LLM_LAYER and s.layer == layer)
        with self._timed(stage, hidden.device):
            for signal in stage.signals.values():
                if isinstance(signal, InstructionAttention):
                    paid = self._decoder_tap.ahead(signal, hidden, self._decoder.rotary(hidden), cache)
                    self._decoder_tap.values[signal] = paid
            results: list[Result] = []
            for pool, selection in self._selected(stage, hidden, span):
                results += by_item(stage, pool, selection)
        choice = self._writer.write(self._prompt, stage, results, layer, before=span.alive)
        if choice is not None:
            choice.evict = stage.evict
        if choice is not None and choice.values is None:
            choice.follow = functools.partial(self._decoder_tap.follow, layer)
        elif choice is not None:
            self._decoder_tap.forsake(layer)  # what enters is not what was looked at
        return choice

    def _selected(self, stage: Stage, hidden: Tensor, span: Span) -> list[tuple[Pool, Selection]]:
        """Run a stage on the living tokens in ``hidden (B, K, D)``; pools of one form as one batch."""
        pools = pools_of(self._prompt.items, stage, span)
        done: list[tuple[Pool, Selection]] = []
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
            done += zip(alike, self._select(stage, tokens, signals))
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

    def finish(self, cache_lengths: list[int] | None) -> None:
        """The prompt went through all layers."""
        self.trace = self._prompt.trace
        self.trace.cache_lengths = cache_lengths

    # ------------------------------------------------------------------------------------------------------ helpers

    def forget(self) -> None:
        """Let go of the call's tensors."""
        if self._pauses:
            return
        self._decoder_tap.close()
        self._prompt = None
        if not self._again:
            self._encoder.forget()
            self._scored = {}

    def _timed(self, stage: Stage, device: torch.device) -> Any:
        at = stage.hook.value if stage.hook in (Hook.PIXELS, Hook.LLM_INPUT) else f"{stage.hook.value}({stage.layer})"
        return self._prompt.timed(at, device)

    def _tokens(self, stage: Stage, embeds: Tensor, layout: Layout, items: list[Item]) -> Tokens:
        tokens = Tokens(embeds, layout, tuple(item.id for item in items), project=self._adapter.exact_project)
        tokens.embed = self._adapter.inner.get_input_embeddings()
        if stage.reads_frame_scores and self._scored and items[0].kind == "video":
            tokens.frame_scores = [self._scored[item.number] for item in items]
        if not stage.reads_text:
            return tokens
        words = self._prompt.words([item.sample for item in items])
        if words is not None:
            tokens.instruction, tokens.instruction_mask, tokens.instruction_ids = words
        return tokens

    def _select(self, stage: Stage, tokens: Tokens, signals: dict[str, Tensor]) -> list[Selection]:
        """Run a stage in full precision whatever autocast says; one selection per picture."""
        with torch.autocast(tokens.embeds.device.type, enabled=False):
            selection = stage.select(tokens, **signals)
        if not isinstance(selection, Selection):
            raise ParameterError(f"{self.pruner.name} returned {selection!r} at {stage.hook.value}; return a Selection")
        selection.check(self.pruner.name, *tokens.embeds.shape[:2], padded=self.pruner.adaptive)
        return _rows(selection)

    def _decoder_signal(self, signal: Signal, pool: Pool) -> Tensor:
        values = self._decoder_tap.values[signal][pool.sample]
        return values if isinstance(signal, CrossModalAttention) else values[pool.places.to(values.device)]


def session_of(model: nn.Module) -> Session | None:
    """The session that is attached to the model, if any."""
    inner = getattr(model, "model", model)
    return attached_to(inner if hasattr(inner, "language_model") else model)


def _rows(selection: Selection) -> list[Selection]:
    """Take a batch apart."""
    fields = {name: value for name, value in vars(selection).items() if value is not None}
    return [
        replace(Selection(selection.index[b]), **{n: v[b] for n, v in fields.items()})
        for b in range(len(selection.index))
    ]
