"""One call under a pruner: made when its pictures are encoded or its prompt enters, gone when it leaves the decoder.

A :class:`Prefill` knows the pictures of the prompt (:class:`Item`) and where their tokens are, holds what was read
for the stages, runs these one after the other and says what each one keeps, and writes the call's trace.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.adapters.engine.decoder import Kept, Span, take, visual_rows
from foveate.adapters.trace import ImageTrace, StageTrace, Trace
from foveate.errors import InputError, ParameterError
from foveate.pruners.core.method import ModelInfo, Pruner
from foveate.pruners.core.signals import Columns, LayerAttention, Signal
from foveate.pruners.core.stages import AtEntry, InCache, InsideDecoder, InTower, Stage, TokenStage
from foveate.pruners.core.tokens import Layout, Selection, Tokens, View

if TYPE_CHECKING:
    from foveate.adapters.families.base import CallContents, Encoded
    from foveate.adapters.session import Session

_TOWER = InTower(lambda tokens: tokens)  # stands for all that happens inside the tower, where the sequence enters


# -------------------------------------------------------------------------------------------------------- the stage
# runner


def run_stage(
    stage: TokenStage, tokens: Tokens, signals: dict[str, Tensor], pruner: Pruner, info: ModelInfo | None = None
) -> list[Selection]:
    """Run a stage in full precision whatever autocast says; one selection per picture, without a batch axis.

    Rows may be padded where the method's content decides how many tokens stay.

    Raises:
        ParameterError: it returns something else than it should; the message names the method.
    """
    with torch.autocast(tokens.embeds.device.type, enabled=False):
        chosen = stage.select(tokens, **signals)
    if not isinstance(chosen, Selection):
        raise ParameterError(f"{pruner.name} returned {chosen!r} at {stage.point}; return a Selection")
    decides = isinstance(stage, InCache) or pruner.count(tokens.layout, info) is None
    chosen.check(pruner.name, *tokens.embeds.shape[:2], padded=decides)
    fields = {name: value for name, value in vars(chosen).items() if value is not None}
    rows = range(len(chosen.index))
    return [replace(Selection(chosen.index[b]), **{n: v[b] for n, v in fields.items()}) for b in rows]


def separators_left(layout: Layout, newlines: str, chosen: Tensor, ordered: bool) -> Tensor:
    """Which separators of a picture stay with the tokens ``chosen (K,)``, ``(S,)`` bool, as the policy ``newlines``
    has it.
    """
    count = len(layout.newlines)
    if ordered or newlines == "drop":  # tokens in an order of their own have no rows
        return chosen.new_zeros(count, dtype=torch.bool)
    if newlines == "rows":
        return layout.rows_left(chosen)
    return chosen.new_ones(count, dtype=torch.bool)


# ----------------------------------------------------------------------------------------------------------- the
# pictures


@dataclass
class Item:
    """One image or video of the prompt (one per beam).

    Attributes:
        kind: ``"image"`` or ``"video"``.
        number: which of the encoded ones.
        sample: row of the batch.
        layout: of the unpruned picture.
        places: in the sequence, separators included, ``(length,)``.
        tokens: places of the tokens alone, ``(N,)``.
        alive: token numbers still there, ascending, ``(K,)``.
        width: places still taken, separators included.
        trace: None for beams after the first.
        id: seeds what is drawn for it.
        text_gone: places of text that went with empty frames.
        entered: into the decoder: tokens, and places with separators.
    """

    kind: str
    number: int
    sample: int
    layout: Layout
    places: Tensor
    tokens: Tensor
    alive: Tensor
    width: int
    trace: ImageTrace | None
    id: int = 0
    text_gone: int = 0
    entered: tuple[int, int] = (0, 0)

    @property
    def newline_places(self) -> Tensor:
        """Places of the picture's separators in the sequence."""
        return self.places[self.layout.separators(self.places.device)]

    def left(self, values: Tensor) -> Tensor:
        """What is known of the tokens ``(N, …)``, of those that are left; of the views ``(V, …)``, all."""
        full = self.layout.size
        return values if len(self.alive) == full or len(values) != full else values[self.alive.to(values.device)]


def find_items(kind: str, here: Tensor, layouts: Sequence[Layout], centre_crop: bool) -> list[Item]:
    """Match placeholder tokens ``here (B, L)`` with the encoded pictures, which beams may have multiplied.

    The first beam's items get a trace; ``centre_crop`` is noted there.

    Raises:
        InputError: the prompt's tokens are not a whole number of pictures.
    """
    counts = here.sum(dim=1).tolist()
    lengths = [layout.length for layout in layouts]
    beams, rest = divmod(sum(counts), sum(lengths)) if lengths else (0, 1)
    if rest or len(counts) % max(beams, 1):
        raise InputError(
            f"the prompt has {sum(counts)} {kind} tokens in this call, the vision side encoded {sum(lengths)}; "
            "chunked prefill, prompts that were cut short and features that were encoded before attaching cannot be "
            "pruned"
        )
    places = here.nonzero()[:, 1].split(counts)
    items, first = [], 0
    for row in range(0, len(counts), beams):
        stop, total = first, 0
        while total < counts[row] and stop < len(lengths):
            total += lengths[stop]
            stop += 1
        for sample in range(row, row + beams):
            if total != counts[sample]:
                raise InputError(
                    f"row {sample} has {counts[sample]} {kind} tokens, which is not a whole number of pictures"
                )
            for number, where in zip(range(first, stop), places[sample].split(lengths[first:stop])):
                layout, device = layouts[number], where.device
                tokens, everything = where[layout.places(device)], torch.arange(layout.size, device=device)
                trace = ImageTrace(sample, kind, layout, centre_crop=centre_crop) if sample == row else None
                items.append(Item(kind, number, sample, layout, where, tokens, everything, layout.length, trace))
        first = stop
    return items


def layout_left(layout: Layout, alive: Tensor) -> Layout:
    """The layout of the tokens ``alive (K,)`` of a picture, one row per view; crops on one canvas share a row."""
    if len(alive) == layout.size:
        return layout
    canvas = [view.start for view in layout.views if view.stride][:1]
    edges = sorted({view.start for view in layout.views if not view.stride} | {*canvas, layout.size})
    bounds = torch.searchsorted(alive, torch.tensor(edges, device=alive.device)).tolist()
    kinds = {view.start: view.kind for view in reversed(layout.views)}
    return Layout(tuple(View(1, b - a, start=a, kind=kinds[start]) for start, a, b in zip(edges, bounds, bounds[1:])))


@dataclass(eq=False)
class Candidates:
    """Visual tokens of one sample that a stage inside the decoder selects from together.

    Attributes:
        items: their pictures.
        places: in the sequence, ``(K,)``.
        sizes: how many of them belong to each picture.
        layout: of the unpruned pictures, as one.
        entered: how many there were when the sequence entered the decoder.
    """

    items: list[Item]
    places: Tensor
    sizes: list[int]
    layout: Layout
    entered: int

    @property
    def sample(self) -> int:
        """Row of the batch."""
        return self.items[0].sample

    def by_item(self, selection: Selection, compete: bool) -> list[tuple[Selection, Tensor | None]]:
        """A selection picture by picture, in numbers of each one's living tokens, and its separators' places if any
        compete.
        """
        if len(self.items) == 1 and not (compete and self.layout.newlines):
            return [(selection, None)]
        chosen = torch.zeros_like(self.places, dtype=torch.bool)
        chosen[selection.index[selection.index >= 0].to(chosen.device)] = True
        scores = [None] * len(self.items) if selection.scores is None else selection.scores.split(self.sizes)
        results: list[tuple[Selection, Tensor | None]] = []
        for item, places, kept, score in zip(
            self.items, self.places.split(self.sizes), chosen.split(self.sizes), scores, strict=True
        ):
            token = torch.isin(places, item.tokens)
            score = None if score is None else score[token.to(score.device)]
            own = Selection(kept[token].nonzero().squeeze(1), scores=score)
            results.append((own, places[kept & ~token] if compete else None))
        return results


# --------------------------------------------------------------------------------------------------------------- the
# call


@dataclass(eq=False)
class Prefill:
    """One call's state; masks are ``(B, L)`` bool over its new places.

    Attributes:
        session: of the attached method.
        trace: what is written about the call.
        encoded: what the vision side computed, by kind of picture.
        numbers: the id of each encoded picture ``(kind, its number in the call)``.
        frame_scores: of encoded videos, by number.
        again: the same features come again with every further token, as in ``generate()`` without a cache.
        ids: token ids of the prompt, ``(B, L)``; None where they cannot be told.
        embeds: the prompt as it came, ``(B, L, D)``.
        attended: what is not padding.
        visual: places of pictures.
        present: places that are still there.
        items: the prompt's pictures; none in a call that brings text alone.
        values: what was read for the stages inside the decoder.
        span: what the decoder works on now.
        cache: the KV cache that the call was given, None without one.
    """

    session: Session
    trace: Trace
    encoded: dict[str, Encoded] = field(default_factory=dict)
    numbers: dict[tuple[str, int], int] = field(default_factory=dict)
    frame_scores: dict[int, Sequence[float]] = field(default_factory=dict)
    again: bool = False
    ids: Tensor | None = None
    embeds: Tensor | None = None
    attended: Tensor | None = None
    visual: Tensor | None = None
    present: Tensor | None = None
    items: list[Item] = field(default_factory=list)
    values: dict[Signal, Tensor] = field(default_factory=dict)
    span: Span | None = None
    cache: Any = None
    _order: Tensor | None = None  # (B, L) order of entry where it is not that of the places
    _changed: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # rows, places, what they carry now
    _mixtures: list[tuple[int, Tensor, Tensor, Callable]] = field(default_factory=list)
    _columns: tuple[Any, Columns] | None = None

    def enter(self, brought: CallContents, embeds: Tensor, mask: Tensor | None, past: int) -> bool:
        """Take a call in that becomes ``embeds (B, L, D)``; False if it brings no pictures.

        ``mask``: ``(B, past + L)``, what may be attended; None: everything.
        """
        self.again, self.ids, self.embeds = brought.again, brought.ids, embeds
        self.items, self.values, self._order, self._columns = [], {}, None, None
        self.visual = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        self.attended = ~self.visual if mask is None or mask.ndim != 2 else mask[:, past:].bool().to(embeds.device)
        self.present = torch.ones_like(self.visual)
        if brought.ids is None or brought.ids.shape != embeds.shape[:2]:
            return False
        adapter = self.session.adapter
        for modality in brought.modalities:
            here = (brought.ids == modality.token_id).to(embeds.device)
            if bool(here.any()):
                encoded = self.encoded.get(modality.kind)
                layouts = encoded.layouts if encoded else []
                self.items += find_items(modality.kind, here, layouts, adapter.centre_crop)
                self.visual = self.visual | here
        if len(brought.modalities) > 1:  # pictures and videos may take turns
            self.items.sort(key=lambda item: (item.sample, int(item.places[0])))
        unique = [item for item in self.items if item.trace is not None]
        if self.items and not self.numbers:
            self.numbers = self.session.numbers_of(unique)
            videos = [item for item in unique if item.kind == "video"]
            self.frame_scores = self.session.scores_of(videos) if videos or self.session.frame_scores else {}
        for item in self.items:
            item.id = self.numbers[item.kind, item.number]
        self.trace.length, self.trace.decoder_layers = embeds.shape[1], adapter.info.decoder_layers
        self.trace.images = [item.trace for item in unique]
        return bool(self.items)

    # ------------------------------------------------------------------------------------------- what the stages keep

    def at_entry(self, embeds: Tensor) -> Kept | None:
        """What enters the decoder of ``embeds (B, L, D)``; None: everything as it is."""
        stage = self.session.entry_stage
        self._count(0)
        changed, positions = False, "keep"
        if self.session.merging is not None:
            merged = [(self.encoded[item.kind].survivors[item.number], None) for item in self.items]
            changed, positions = self._take(_TOWER, merged, 0)
        if stage is not None:
            selected = self._select_at_entry(stage, embeds.device)
            more, positions = self._take(stage, [(selected[item.kind, item.number], None) for item in self.items], 0)
            changed = changed or more
        for item in self.items:
            item.entered = len(item.alive), item.width
        return self._kept(stage, positions, embeds) if changed else None

    def _select_at_entry(self, stage: AtEntry, device: torch.device) -> dict[tuple[str, int], Selection]:
        """Run the stage on the encoded pictures; those of one layout as one batch."""
        unique = [item for item in self.items if item.trace is not None]
        left = {id(item): layout_left(item.layout, item.alive) for item in unique}
        selected: dict[tuple[str, int], Selection] = {}
        with self.timed(stage.point, device):
            for layout in dict.fromkeys(left.values()):
                items = [item for item in unique if left[id(item)] == layout]

                def stacked(of: Callable[[Encoded], list[Tensor]], items: list[Item] = items) -> Tensor:
                    return torch.stack([item.left(of(self.encoded[item.kind])[item.number]) for item in items])

                tokens = self._tokens(stage, stacked(lambda one: one.features), layout, items)
                signals = {n: stacked(lambda one, s=signal: one.signals[s]) for n, signal in stage.signals.items()}
                rows = run_stage(stage, tokens, signals, self.session.pruner, self.session.adapter.info)
                selected |= {(item.kind, item.number): row for item, row in zip(items, rows)}
        return selected

    def before_layer(self, layer: int, hidden: Tensor, span: Span) -> Kept | None:
        """What goes on into decoder layer ``layer`` of ``hidden (B, K, D)``, beams included; None: everything as it
        is.
        """
        stage = self.session.layer_stages[layer]
        with self.timed(f"{stage.point}({stage.layer})", hidden.device):
            for signal in stage.signals.values():
                if isinstance(signal, LayerAttention) and signal.ahead:
                    self.values[signal] = self.session.decoder_tap.ahead(signal, hidden)
            results = [
                one
                for candidates, selection in self._select_inside(stage, hidden)
                for one in candidates.by_item(selection, stage.newlines == "compete")
            ]
        changed, positions = self._take(stage, results, layer)
        return self._kept(stage, positions, hidden) if changed else None

    def _select_inside(self, stage: InsideDecoder, hidden: Tensor) -> list[tuple[Candidates, Selection]]:
        """Run a stage on the living tokens in ``hidden (B, K, D)``; what has one form as one batch."""
        every = self._candidates(stage)
        done: dict[int, Selection] = {}
        form = {id(c): (c.layout, len(c.places), c.entered) for c in every}
        for one in dict.fromkeys(form.values()):
            alike = [c for c in every if form[id(c)] == one]
            columns = [self.span.column[c.sample, c.places].to(hidden.device) for c in alike]
            states = torch.stack([hidden[c.sample, where] for c, where in zip(alike, columns)])
            signals = {
                name: torch.stack([self._value(signal, c) for c in alike]).to(hidden.device)
                for name, signal in stage.signals.items()
            }
            tokens = self._tokens(stage, states, alike[0].layout, [c.items[0] for c in alike])
            tokens.entered = alike[0].entered
            rows = run_stage(stage, tokens, signals, self.session.pruner, self.session.adapter.info)
            done |= {id(c): row for c, row in zip(alike, rows)}
        return [(c, done[id(c)]) for c in every]

    def _candidates(self, stage: InsideDecoder) -> list[Candidates]:
        """What the stage selects from together, in the order of the items."""
        compete = stage.newlines == "compete"
        every: list[Candidates] = []
        for item in self.items:
            places = item.tokens[item.alive]
            if compete and item.layout.newlines:
                places = item.places[self.present[item.sample, item.places]]
            if stage.scope == "sample" and every and every[-1].sample == item.sample:
                every[-1].items.append(item)
                every[-1].places = torch.cat([every[-1].places, places])
            else:
                every.append(Candidates([item], places, [], item.layout, 0))
            every[-1].sizes.append(len(places))
            every[-1].entered += item.entered[compete]
        for candidates in every:
            if len(candidates.items) > 1:
                candidates.layout = Layout.joined([item.layout for item in candidates.items])
        return every

    def _value(self, signal: Signal, candidates: Candidates) -> Tensor:
        values = self.values[signal][candidates.sample]
        return values if signal.per_sample else values[candidates.places.to(values.device)]

    def _tokens(self, stage: TokenStage, embeds: Tensor, layout: Layout, items: list[Item]) -> Tokens:
        adapter = self.session.adapter
        project, dtype = adapter.project, adapter.inner.dtype  # features may be of any float type, autocast is off
        tokens = Tokens(embeds, layout, tuple(item.id for item in items))
        if project is not None:
            tokens.project = lambda features: project(features.to(dtype))
        tokens.embed = adapter.inner.get_input_embeddings()
        if stage.reads_frame_scores and self.frame_scores and items[0].kind == "video":
            tokens.frame_scores = [self.frame_scores[item.number] for item in items]
        if stage.reads_text:
            words = self._words([item.sample for item in items])
            if words is not None:
                tokens.instruction, tokens.instruction_mask, tokens.instruction_ids = words
        return tokens

    def neurons(self) -> dict[int, Tensor]:
        """By layer, the neurons that run from now on, ``(B, F)`` bool."""
        return {
            layer: stage.select(**{name: self.values[signal] for name, signal in stage.signals.items()})
            for layer, stage in self.session.mlp_stages.items()
        }

    def erased(self, hidden: Tensor, span: Span) -> dict[int, Tensor]:
        """By layer, places whose keys and values are zeroed, ``(B, L)`` bool; ``hidden`` left the last layer."""
        gone = {}
        for layer, stage in self.session.cache_stages.items():
            gone[layer] = torch.zeros_like(self.visual)
            with self.timed(f"{stage.point}({stage.layer})", hidden.device):
                for candidates, selection in self._select_inside(stage, hidden):
                    index = selection.index[selection.index >= 0].to(candidates.places.device)
                    gone[layer][candidates.sample, candidates.places] = True
                    gone[layer][candidates.sample, candidates.places[index]] = False
        return gone

    # -------------------------------------------------------------------------------------- from selections to places

    def _take(self, stage: Stage, results: Sequence[tuple[Selection, Tensor | None]], layer: int) -> tuple[bool, str]:
        """Take in one selection per item, and the separators' places that stay (None: the stage's policy decides).

        Returns whether anything is to change in the decoder, and the policy for positions.
        """
        changed = False
        for item, (selection, separators) in zip(self.items, results, strict=True):
            index = selection.index[selection.index >= 0].to(item.alive.device)
            chosen = item.alive[index]  # token numbers
            record(item, stage, selection, chosen)
            before = item.width
            if len(index) < len(item.alive) or selection.order is not None or separators is not None:
                self._thin(item, stage, selection, chosen, separators)
            places = item.tokens[chosen]
            if selection.resample is not None:
                self._mixtures.append((item.sample, item.tokens[item.alive], places, selection.resample))
            if selection.values is not None:
                row = torch.full_like(places, item.sample)
                self._changed.append((row, places, selection.values[: len(places)]))
            changed |= item.width != before or selection.values is not None or selection.order is not None
            item.alive = chosen
        self._count(layer, getattr(stage, "evict", False))
        policy = self.session.positions if self.session.positions != "auto" else getattr(stage, "positions", None)
        policy = policy or ("keep" if self.session.adapter.info.mrope else "compact")
        self.trace.positions[stage.point] = policy
        return changed, policy

    def _thin(self, item: Item, stage: Stage, selection: Selection, chosen: Tensor, separators: Tensor | None) -> None:
        """Leave the item's ``chosen`` tokens, and the separators that go with them, in :attr:`present`."""
        own, order = item.newline_places, selection.order
        wanted = 0
        if order is not None:
            order = order[order < len(chosen)].to(chosen.device)
            wanted = int((order < 0).sum()) if own.numel() else 0
            order = order if wanted else order[order >= 0]
        if wanted:
            separators = self._separators(item, item.tokens[chosen], wanted)
        elif separators is None:
            policy = getattr(stage, "newlines", "rows")
            policy = policy if self.session.separators == "auto" else self.session.separators
            stays = separators_left(item.layout, policy, chosen, order is not None)
            separators = own[stays & self.present[item.sample, own]]
        here = self.present[item.sample]
        here[item.places] = False
        here[item.tokens[chosen]] = True
        here[separators] = True
        item.width = len(chosen) + len(separators)
        if order is not None:
            entering = item.tokens[chosen][order]
            entering[order < 0] = separators[: int((order < 0).sum())]
            if self._order is None:
                self._order = torch.arange(here.shape[0], device=here.device).repeat(len(self.present), 1)
            self._order[item.sample, entering] = entering.sort().values
        if getattr(stage, "empty_frames", "keep") == "drop":
            item.text_gone += self._drop_frame_text(item, chosen)

    def _separators(self, item: Item, kept: Tensor, count: int) -> Tensor:
        """Places for ``count`` separators: the picture's own ones, then those of tokens that are dropped."""
        own = item.newline_places
        free = item.places[~torch.isin(item.places, torch.cat([kept, own]))]
        if count > len(own) + len(free):
            raise InputError(
                f"{count} separators do not fit into the {len(own) + len(free)} places that a picture leaves"
            )
        places = torch.cat([own, free])[:count]
        newline = self.embeds[item.sample, own[:1].to(self.embeds.device)].expand(count, -1)
        self._changed.append((torch.full_like(places, item.sample), places, newline))
        return places

    def _drop_frame_text(self, item: Item, chosen: Tensor) -> int:
        """Take the text around frames without a token away; returns how many places that frees."""
        views, adapter = item.layout.views, self.session.adapter
        if views[0].kind != "frame" or not adapter.writes_frame_text:
            return 0
        bounds = torch.tensor([view.start for view in views] + [item.layout.size], device=chosen.device)
        kept = torch.searchsorted(chosen, bounds).diff().tolist()
        places = item.tokens.tolist()
        frames = [(places[view.start], places[view.start + view.size - 1]) for view in views]
        around = adapter.frame_text(self.ids[item.sample].tolist(), frames)
        gone = [p for places, k in zip(around, kept) if k == 0 for p in places]
        gone = torch.tensor(gone, dtype=torch.long, device=self.present.device)
        freed = int(self.present[item.sample, gone].sum())
        self.present[item.sample, gone] = False
        return freed

    def _kept(self, stage: TokenStage | None, positions: str, hidden: Tensor) -> Kept:
        """What is present now, of ``hidden (B, K, D)``."""
        taken = [0] * len(self.present)
        for item in self.items:
            taken[item.sample] += item.width - item.layout.length - item.text_gone
        length = self.present.shape[1]
        place = torch.arange(length, device=self.present.device).expand_as(self.present)
        key = torch.where(self.present, place if self._order is None else self._order, -1)
        key, index = key.sort(dim=1)  # places that go sort to the front, so rows with fewer are padded on the left
        index = torch.where(key >= 0, index, length)[:, -max(taken) :]
        kept = Kept(index, positions=positions, evict=getattr(stage, "evict", False))
        if self._changed:
            rows, places, values = (torch.cat(parts).to(hidden.device) for parts in zip(*self._changed))
            column = self.span.column.to(hidden.device)
            hidden = hidden.index_put((rows, column[rows, places]), values.to(hidden.dtype))
            kept.embeds = take(hidden, column.gather(1, index.to(hidden.device)).clamp(min=0))
        which = getattr(stage, "deepstack", "all")
        if self._mixtures or which != "all":
            mixtures = self._mixtures
            kept.levels = lambda visual, levels: [
                mixed(mixtures, visual, level) for level in deepstack_levels(levels, which)
            ]
        self._changed, self._mixtures, self._columns = [], [], None
        return kept

    def _count(self, layer: int, evict: bool = False) -> None:
        """From ``layer`` on, the decoder sees what is left now; with ``evict``, no cache keeps more."""
        depth = self.session.adapter.info.decoder_layers
        cached = 0 if evict else layer
        for item in self.items:
            if item.trace is not None:
                item.trace.tokens_per_layer[layer:] = [item.width] * (depth - layer)
                item.trace.cached_per_layer[cached:] = [item.width] * (depth - cached)
                item.trace.text_gone_per_layer[layer:] = [item.text_gone] * (depth - layer)

    # --------------------------------------------------------------------------------------------- what signals ask for

    def columns(self, device: torch.device) -> Columns:
        """The sequence that the decoder's layers work on now."""
        if self._columns is None or self._columns[0] is not self.span or self._columns[1].mask.device != device:
            span = self.span

            def only(places: Tensor) -> Tensor:
                here = places.to(span.index.device).gather(1, span.index.clamp(max=span.length - 1))
                return (here & span.valid).to(device)

            columns = Columns(span.mask.to(device), only(self.visual), None, lambda n: only(self.text(n)))
            ahead = self.visual.flip(1).long().cumsum(1).flip(1) > 0  # here or further on is a picture
            columns.instruction = only(self.text(None) & ~ahead)
            self._columns = span, columns
        return self._columns[1]

    def text(self, system_tokens: int | None) -> Tensor:
        """Attended, not visual, and after the system prompt (None: after the first picture)."""
        if system_tokens is None:
            later = self.visual.long().cumsum(1) > 0
        else:
            later = self.attended.long().cumsum(1) > system_tokens
        return later & self.attended & ~self.visual

    def by_place(self, signal: Signal, values: Tensor) -> Tensor:
        """``(B, K)`` values of columns as ``(B, L)`` values of places, 0 where there is none; values per sample as
        they are.
        """
        if signal.per_sample:
            return values
        spread = values.new_zeros(len(values), self.span.length + 1)
        return spread.scatter(1, self.span.index.to(values.device), values)[:, : self.span.length]

    def rotary(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``(B, K, d)`` of what the decoder works on now."""
        return self.session.decoder.rotary(hidden)

    def _words(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor] | None:
        """The text after the first picture of some rows: embeddings ``(R, T, D)``, valid ``(R, T)``, ids (-1: padding).

        None if there is none.
        """
        text = self.text(None)[rows]
        width = int(text.sum(dim=1).amax())
        if not width:
            return None
        order = text.long().argsort(dim=1, descending=True, stable=True)[:, :width]
        valid = text.gather(1, order)
        words = self.embeds[rows].gather(1, order[..., None].expand(-1, -1, self.embeds.shape[-1]))
        return words * valid[..., None], valid, self.ids[rows].gather(1, order).masked_fill(~valid, -1)

    @contextlib.contextmanager
    def timed(self, name: str, device: torch.device) -> Iterator[None]:
        """Count the body's time in the trace under ``name`` (GPU work by events, without synchronising)."""
        spans = self.trace.spans.setdefault(name, [])
        if device.type == "cuda":
            with torch.cuda.device(device):
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                yield
                stop.record()
            spans.append(lambda: (stop.synchronize(), start.elapsed_time(stop) / 1e3)[1])
        else:
            began = time.perf_counter()
            yield
            elapsed = time.perf_counter() - began
            spans.append(lambda: elapsed)


def record(item: Item, stage: Stage, selection: Selection, chosen: Tensor) -> None:
    """Note the stage in the item's trace, by token numbers of the whole picture."""
    if item.trace is None:
        return
    full = item.layout.size
    scores = owner = None
    if selection.scores is not None:
        scores = torch.full((full,), float("nan"), device=chosen.device)
        scores[item.alive] = selection.scores.detach().float()
    if selection.owner is not None:
        owner = torch.full((full,), -1, dtype=torch.long, device=chosen.device)
        owner[item.alive] = torch.where(selection.owner >= 0, item.alive[selection.owner.clamp(min=0)], -1)
    markers = None if selection.markers is None else item.alive[selection.markers]
    item.trace.stages.append(StageTrace(stage.point, stage.layer, chosen, owner, scores, markers))


def deepstack_levels(levels: Sequence[Tensor], which: str) -> Sequence[Tensor]:
    """The DeepStack levels that join after early layers: ``"all"`` or the ``"first"``."""
    return levels[:1] if which == "first" else levels


def mixed(mixtures: list[tuple[int, Tensor, Tensor, Callable]], visual: Tensor, level: Tensor) -> Tensor:
    """A DeepStack level ``(number of visual places, D)`` whose surviving rows are mixed as the embeddings were."""
    rows, level = visual_rows(visual).to(level.device), level.clone()
    source = level.clone()
    for sample, places, survivors, resample in mixtures:
        mine = source[rows[sample, places.to(level.device)]]
        level[rows[sample, survivors.to(level.device)]] = resample(mine).to(level.dtype)
    return level


# ---------------------------------------------------------------------------------------------------- one whole picture


def entering(layout: Layout, chosen: Tensor, newlines: str, order: Tensor | None = None) -> Tensor:
    """Which of a picture's places go on, in order of entry, ``(R,)``: those of tokens, and of separators that stay.

    Args:
        layout: of the picture.
        chosen: its surviving tokens, ascending, ``(K,)``.
        newlines: the policy for separators, as for :func:`separators_left`; where all tokens stay, all separators do.
        order: of a selection; columns beyond its own survivors are passed over, and it may name no separators.
    """
    tokens = layout.places(chosen.device)[chosen]
    if order is not None:
        return tokens[order[(order >= 0) & (order < len(chosen))].to(chosen.device)]
    separators = layout.separators(chosen.device)
    if len(chosen) < layout.size:
        separators = separators[separators_left(layout, newlines, chosen, False)]
    return torch.cat([tokens, separators]).sort().values
