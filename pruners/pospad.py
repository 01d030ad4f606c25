"""PosPad: where tokens are dropped, one marker for each run of them keeps the place.

Section 3 of "FocusUI", arXiv 2601.03928 (CVPR 2026). Every maximal run of dropped tokens in sequence order becomes a single
marker that stands where the run ends and has the position of that place, one-axis or m-RoPE alike. Nothing is renumbered,
so the model still sees how far apart the survivors are. Runs never cross text, a newline, or from one picture, frame or
crop into the next. With the markers that this package adds (``run_mean``, ``last``) it works behind any selector on any
model; **published are only models that were fine-tuned together with a marker of their own**. Headline, from the paper's
ablation on ScreenSpot-Pro with half the tokens: 42.3 instead of 29.2 for dropping them directly.

Acts where the inner method acts, the decoder's entry. Markers are tokens, too: behind a scattered selection there are
nearly as many as survivors, so the budget counts them unless ``count_markers=False``, as published. Inside the decoder
(FastV) only ``marker="last"`` means something. Qwen3-VL's DeepStack features: all levels of survivors; for markers the
run's mean or the last token's own where the marker is made of these, else nothing.
Cost: one pass over the kept mask and one gather; counted markers ask the inner method about 10 times (FocusUI once).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.cuda import gather_tokens, run_mean
from foveate.errors import BudgetError, MissingSignalError, ParameterError
from foveate.pruners.core import (
    BeforeLayer,
    Keep,
    Layout,
    ModelInfo,
    Pruner,
    Selection,
    Stage,
    Tokens,
    budget,
    create,
    kept_tokens,
    ranked,
    register,
    top_k,
)
from foveate.pruners.core.parameters import check_choice as one_of
from foveate.pruners.core.parameters import check_integer as integer
from foveate.pruners.core.runs import Runs, runs, stretch_ends

MARKERS = ("trained", "run_mean", "last", "mean_vocab", "pad")
PLACEMENTS = ("end", "first", "middle", "full", "none")
_TOKEN = {"trained": ("image_drop_end",), "pad": ("pad", "bos")}  # whose embedding the marker is


@register("pospad")
@dataclass(frozen=True)
class PosPad(Pruner):
    """PosPad: position-preserving markers behind any selector.

    Attributes:
        inner: the selector, a method or its name (``pospad:random`` on the command line).
        keep: the inner method's budget; ``"inner"``: as that is configured.
        marker: ``"trained"`` (embedding of the checkpoint's own marker token), ``"run_mean"`` (mean of the run),
            ``"last"`` (the run's last token as it is), ``"mean_vocab"`` (mean input embedding), ``"pad"`` (of the padding token,
            else of the token that begins a text) or a tensor ``(D,)``. None: trained if the model has it, else the mean.
        placement: the marker's place in the run: ``"end"``, ``"first"``, ``"middle"``; ``"full"`` is one for each dropped token,
            ``"none"`` drops them directly.
        count_markers: survivors and markers together obey the budget; False: markers come on top, as published.
        vocab: number of real tokens for ``"mean_vocab"``; None: all rows of the table.
    """

    title: ClassVar[str] = "A marker for every run of dropped tokens, behind any selector"
    paper: ClassVar[str] = "arXiv 2601.03928 (CVPR 2026)"
    cost: ClassVar[str] = "one gather; counted markers repeat the selection about 10 times"

    inner: Pruner | str = "focusui"
    keep: Keep | str = "inner"
    marker: str | Tensor | None = field(default=None, compare=False)
    placement: str = "end"
    count_markers: bool = True
    vocab: int | None = None

    def __post_init__(self) -> None:
        inner = create(self.inner)
        budgeted = "keep" in {f.name for f in dataclasses.fields(inner)}
        if self.keep != "inner":
            if not budgeted:
                raise ParameterError(f"keep={self.keep!r}: {inner.name} has no budget of its own; configure it instead")
            inner = replace(inner, keep=self.keep)
        if self.count_markers and not budgeted:
            raise ParameterError(f"{inner.name} has no budget that markers could count in; pass count_markers=False")
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "keep", getattr(inner, "keep", None))
        object.__setattr__(self, "name", f"pospad:{inner.name}")
        if isinstance(self.marker, str):
            one_of("marker", self.marker, MARKERS)
        elif self.marker is not None and not isinstance(self.marker, Tensor):
            raise ParameterError(
                f"marker={self.marker!r} is no embedding; give a tensor (D,) or one of {', '.join(MARKERS)}"
            )
        elif self.marker is not None and self.marker.ndim != 1:
            raise ParameterError(
                f"a marker of shape {tuple(self.marker.shape)} is no embedding; give one of shape (D,)"
            )
        one_of("placement", self.placement, PLACEMENTS)
        if self.vocab is not None:
            integer("vocab", self.vocab, "number of token ids", 1)
        if self.placement == "full" and self.count_markers:
            raise ParameterError(
                "placement='full' drops nothing that could make room for markers; pass count_markers=False"
            )

    @property
    def content_free(self) -> bool:
        return self.inner.content_free

    # --------------------------------------------------------------------------------------------------- on a model

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        stages = self.inner.stages(model)
        if self.inner.regrids or len(stages) != 1:
            why = "makes another picture of them" if self.inner.regrids else f"acts at {len(stages)} points"
            raise ParameterError(
                f"pospad marks tokens that one selection drops where they stand; {self.inner.name} {why}"
            )
        (stage,) = stages
        marker = self._marker(model)
        if isinstance(stage, BeforeLayer) and not _is(marker, "last"):
            raise ParameterError(
                f"{self.name} acts inside the decoder, where an input embedding means nothing; pass marker='last'"
            )

        def select(tokens: Tokens, **signals: Tensor) -> Selection:
            chosen = stage.select(tokens, **signals)
            if self.count_markers and self.placement != "none" and not bool(_mask(chosen, tokens).all()):
                chosen = self._within_budget(tokens, chosen, signals, model)
            return self.padded(tokens, chosen, marker, model.token_ids)

        return (replace(stage, select=select, positions="keep", newlines="keep"),)

    def _marker(self, model: ModelInfo) -> str | Tensor:
        """The marker on this model."""
        trained = "image_drop_end" in model.token_ids
        marker = self.marker if self.marker is not None else "trained" if trained else "run_mean"
        names = _TOKEN.get(marker, ()) if isinstance(marker, str) else ()
        if names and model.token_ids and not any(map(model.token_ids.get, names)):
            missing = " and no ".join(f"{name}_token_id" for name in names)
            raise MissingSignalError(
                f"marker={marker!r}: the configuration of this {model.family} model has no {missing}; use 'run_mean' or 'last'"
            )
        if model.token_ids and not _is(marker, "trained") and self.placement != "none":
            warnings.warn(
                f"pospad: this {model.family} model was not trained with a marker; what is published of PosPad need not hold",
                stacklevel=4,
            )
        return marker

    # ------------------------------------------------------------------------------------------------------- budgets

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        return None  # what is kept decides how many runs there are to mark

    def _asked(self, layout: Layout) -> int:
        """What the inner method is asked for."""
        known = self.inner.count(layout)
        return budget(self.inner.keep, layout.size) if known is None else known

    def budgets(self, layout: Layout) -> tuple[int, ...]:
        """One number, the most that survivors and markers may be together."""
        kept, n = self._asked(layout), layout.size
        if self.placement == "none" or self.count_markers:
            return (kept,)
        most = n - kept if self.placement == "full" else min(kept + int(stretch_ends(layout).sum()), n - kept)
        return (kept + most,)

    def _within_budget(
        self, tokens: Tokens, chosen: Selection, signals: dict[str, Tensor], model: ModelInfo
    ) -> Selection:
        """The largest selections of the inner method that leave room for their markers, image by image.

        Every further token of a ranking adds 0, 1 or 2 to the total, so bisection finds the most that fit.
        """
        total, stretches = self._asked(tokens.layout), int(stretch_ends(tokens.layout).sum())
        if stretches > total:
            raise BudgetError(
                f"{self.name}: a picture of {stretches} separate stretches (rows, frames, crops) needs a token in each, and "
                f"the budget is {total}; use a larger keep, or count_markers=False"
            )

        def fits(kept: Tensor) -> Tensor:
            return kept.sum(dim=1) + runs(~kept, tokens.layout).counts <= total

        batch, device = len(tokens.embeds), tokens.embeds.device
        if _is_top_k(chosen):
            place = ranked(chosen.scores).argsort(dim=1)
            most = _largest(total, batch, device, lambda k, rows: fits(place[rows] < k[:, None]))
            return replace(chosen, index=kept_tokens(place < most[:, None]))

        def ask(k: int, rows: Tensor) -> Selection:
            if k == 0:
                return Selection(rows.new_zeros(len(rows), 0))
            (stage,) = replace(self.inner, keep=k).stages(model)
            return stage.select(_images(tokens, rows), **{name: x[rows] for name, x in signals.items()})

        def enough(k: Tensor, rows: Tensor) -> Tensor:
            good = torch.zeros_like(k, dtype=torch.bool)
            for count in k.unique().tolist():
                good[k == count] = fits(_mask(ask(count, rows[k == count]), tokens))
            return good

        most = _largest(total, batch, device, enough)
        return _joined({k: (most == k).nonzero()[:, 0] for k in most.unique().tolist()}, ask, batch)

    # ------------------------------------------------------------------------------------------------------- markers

    def padded(
        self, tokens: Tokens, chosen: Selection, marker: str | Tensor, token_ids: Mapping[str, tuple[int, ...]]
    ) -> Selection:
        """``chosen`` with markers in place of the runs that it drops.

        Args:
            marker: what the markers are, as resolved for the model (never None); a tensor is an embedding ``(D,)``.
            token_ids: ids of the model's special tokens, of which some markers are the embedding.
        """
        kept = _mask(chosen, tokens)
        if bool(kept.all()) or self.placement == "none":
            return replace(chosen, order=None)
        gone = runs(~kept, tokens.layout)
        seat = gone.seats(self.placement)
        itself = torch.arange(tokens.count, device=seat.device).expand_as(seat)
        markers = gone.dropped & (seat == itself)
        index = kept_tokens(kept | markers)
        merged = _is(marker, "run_mean")
        owner = chosen.owner
        if merged:  # a mean speaks for its run, but for what the inner method has merged into a survivor
            absorbed = torch.full_like(seat, -1) if owner is None else owner
            owner = torch.where(kept, itself, torch.where(absorbed >= 0, absorbed, seat))
        if owner is not None:
            owner = torch.where(markers, itself, owner)
        survivors = Selection(index, owner=owner, scores=chosen.scores, markers=markers)
        if _is(marker, "last") and chosen.values is None:
            return survivors
        own = tokens.embeds if chosen.values is None else _written(tokens.embeds, chosen)
        if _is(marker, "last"):
            survivors.values = gather_tokens(own, index)
            return survivors
        vector = None if merged else self._vector(marker, tokens, token_ids)
        survivors.values = _marked(own, index, markers, gone, vector)
        survivors.resample = [
            partial(_deepstack, index[b], markers[b], _row(gone, b), merged) for b in range(len(index))
        ]
        return survivors

    def _vector(self, marker: str | Tensor, tokens: Tokens, token_ids: Mapping[str, tuple[int, ...]]) -> Tensor:
        """The embedding ``(D,)`` that all markers share."""
        if isinstance(marker, Tensor):
            if len(marker) != tokens.embeds.shape[-1]:
                raise ParameterError(
                    f"the marker has {len(marker)} channels, the tokens have {tokens.embeds.shape[-1]}"
                )
            return marker
        if tokens.embed is None:
            raise MissingSignalError(f"marker={marker!r} is an embedding of the decoder's, and none is at hand")
        if marker == "mean_vocab":
            return _mean_embedding(tokens.embed, self.vocab or tokens.embed.num_embeddings)
        return tokens.embed(torch.tensor(marker_token(marker, token_ids), device=tokens.embeds.device))

    def parameters(self) -> dict[str, Any]:
        marker = f"tensor of {len(self.marker)}" if isinstance(self.marker, Tensor) else self.marker
        inner = {"method": self.inner.name, **self.inner.parameters()}
        return {**super().parameters(), "inner": inner, "marker": marker}


def marker_token(marker: str, token_ids: Mapping[str, tuple[int, ...]]) -> int:
    """Id of the token whose embedding the marker ``"trained"`` or ``"pad"`` is."""
    return next(token_ids[name][0] for name in _TOKEN[marker] if token_ids.get(name))


def _is(marker: str | Tensor, name: str) -> bool:
    return isinstance(marker, str) and marker == name


def _mask(chosen: Selection, tokens: Tokens) -> Tensor:
    """``(B, N)`` bool: what the selection keeps."""
    mask = torch.zeros(len(chosen.index), tokens.count + 1, dtype=torch.bool, device=chosen.index.device)
    return mask.scatter(1, chosen.index.where(chosen.index >= 0, tokens.count), True)[:, :-1]


def _written(embeds: Tensor, chosen: Selection) -> Tensor:
    """``embeds (B, N, D)`` with the survivors' new values in their places."""
    wide = torch.cat([embeds, embeds[:, :1]], dim=1)  # absent survivors write behind the end
    where = chosen.index.where(chosen.index >= 0, embeds.shape[1])[..., None].expand_as(chosen.values)
    return wide.scatter(1, where, chosen.values.to(embeds.dtype))[:, :-1]


def _marked(x: Tensor, index: Tensor, markers: Tensor, gone: Runs, vector: Tensor | None) -> Tensor:
    """Rows ``index (B, K)`` of ``x (B, N, D)``, markers' rows being ``vector``, or None: the mean of their run."""
    slot = index.clamp(min=0)
    marked = markers.gather(1, slot) & (index >= 0)
    if vector is None:
        means = run_mean(x, gone.number, int(gone.counts.max()))
        vector = gather_tokens(means, gone.number.gather(1, slot))
    return gather_tokens(x, index, marked=marked, marker=vector)


def _deepstack(index: Tensor, markers: Tensor, gone: Runs, merged: bool, x: Tensor) -> Tensor:
    """Other features of one picture's tokens, ``(N, C)``, for its survivors: markers have their run's mean, or nothing."""
    present = index[index >= 0][None]
    return _marked(x[None], present, markers[None], gone, None if merged else x.new_zeros(x.shape[1]))[0]


def _row(gone: Runs, b: int) -> Runs:
    return Runs(*(x[b : b + 1] for x in (gone.dropped, gone.first, gone.last, gone.number)))


# ------------------------------------------------------------------------------------------------ search for a budget


def _is_top_k(chosen: Selection) -> bool:
    """Whether the selection is just the best of its scores."""
    if chosen.scores is None or chosen.values is not None or bool((chosen.index < 0).any()):
        return False
    return torch.equal(top_k(chosen.scores, chosen.index.shape[1]), chosen.index)


def _largest(most: int, batch: int, device: torch.device, good: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The largest k in 0 .. ``most`` of every image, ``(B,)``, for which ``good(k (M,), rows (M,))`` holds, by bisection."""
    low, high = (torch.full((batch,), k, device=device) for k in (0, most))
    while len(rows := (low < high).nonzero()[:, 0]):
        middle = (low[rows] + high[rows] + 1) // 2
        found = good(middle, rows)
        low[rows] = torch.where(found, middle, low[rows])
        high[rows] = torch.where(found, high[rows], middle - 1)
    return low


def _images(tokens: Tokens, rows: Tensor) -> Tokens:
    """Some images of a batch."""
    ids = tokens.sample_ids or tuple(range(len(tokens.embeds)))
    some = {f.name: getattr(tokens, f.name) for f in dataclasses.fields(tokens)}
    some = {name: value[rows] for name, value in some.items() if isinstance(value, Tensor)}
    scores = None if tokens.frame_scores is None else [tokens.frame_scores[b] for b in rows.tolist()]
    return replace(tokens, **some, sample_ids=tuple(ids[b] for b in rows.tolist()), frame_scores=scores)


def _joined(images: dict[int, Tensor], ask: Callable[[int, Tensor], Selection], batch: int) -> Selection:
    """One selection from those of the images that keep k tokens, for every k."""
    parts = [(rows, ask(k, rows)) for k, rows in images.items()]
    width = max(chosen.index.shape[1] for _, chosen in parts)
    whole: dict[str, Tensor] = {}
    for name, filling in (("index", -1), ("values", 0), ("owner", -1), ("scores", 0)):
        for rows, chosen in parts:
            x = getattr(chosen, name)
            if x is not None:
                shape = (batch, width if name in ("index", "values") else x.shape[1], *x.shape[2:])
                whole.setdefault(name, x.new_full(shape, filling))[rows, : x.shape[1]] = x
    return Selection(**whole)


@torch.no_grad()
def _mean_embedding(embed: nn.Module, count: int, at_once: int = 8192) -> Tensor:
    """Mean output ``(D,)`` of the input embedding over its first ``count`` tokens, in float32."""
    device = next(embed.parameters()).device
    parts = [embed(ids).float().sum(dim=0) for ids in torch.arange(count, device=device).split(at_once)]
    return torch.stack(parts).sum(dim=0) / count
