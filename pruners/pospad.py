"""PosPad: where tokens are dropped, one marker for each run of them keeps the place.

Section 3 of "FocusUI", arXiv 2601.03928 (CVPR 2026). Every maximal run of dropped tokens in sequence order becomes a
single marker that stands where the run ends and has the position of that place, one-axis or m-RoPE alike. Nothing is
renumbered, so the model still sees how far apart the survivors are. Runs never cross text, a newline, or from one
picture, frame or crop into the next. With the markers that this package adds (``run_mean``, ``last``) it works after
any selector on any model; **published are only models that were fine-tuned together with a marker of their own**.
Headline, from the paper's ablation on ScreenSpot-Pro with half the tokens: 42.3, and 29.2 for dropping them directly.

Acts where the inner method acts, the decoder's entry. Markers are tokens, too: after a scattered selection there are
nearly as many as survivors, so the budget counts them unless ``count_markers=False``, as published. Inside the decoder
(FastV) only ``marker="last"`` means something. DeepStack features: all levels of survivors; for markers the run's mean
or the last token's own where the marker is made of these, else nothing. Cost: one gather; counted markers ask the inner
method about 10 times (FocusUI once).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.cuda import gather_tokens
from foveate.errors import BudgetError, MissingSignalError, ParameterError
from foveate.pruners.core import BeforeLayer, Layout, ModelInfo, Pruner, Selection, Stage, Tokens, create, register
from foveate.pruners.core.parameters import Keep, check_choice, choice, integer, parameter
from foveate.pruners.core.runs import features_with_markers, mean_embedding, runs, stretch_ends, with_markers
from foveate.pruners.core.selection import budget, kept_tokens, largest_fitting, ranked, stacked, top_k

MARKERS = ("trained", "run_mean", "last", "mean_vocab", "pad")
TOKEN_OF = {"trained": ("image_drop_end",), "pad": ("pad", "bos")}
"""Marker -> names of the special tokens whose embedding it is, the first that a model has."""


def _marker(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return check_choice(name, value, MARKERS)
    if not isinstance(value, Tensor):
        raise ParameterError(f"{name}={value!r} is not an embedding; give a tensor (D,) or one of {', '.join(MARKERS)}")
    if value.ndim != 1:
        raise ParameterError(f"a {name} of shape {tuple(value.shape)} is not an embedding; give one of shape (D,)")
    return value


@register("pospad")
@dataclass(frozen=True)
class PosPad(Pruner):
    """PosPad: position-preserving markers after any selector.

    Attributes:
        inner: the selector, a method or its name (``pospad:random`` on the command line).
        keep: the inner method's budget; ``"inner"``: as that is configured.
        marker: ``"trained"`` (embedding of the checkpoint's own marker token), ``"run_mean"`` (mean of the run),
            ``"last"`` (the run's last token as it is), ``"mean_vocab"`` (mean input embedding), ``"pad"`` (of the
            padding token, else of the token that begins a text) or a tensor ``(D,)``. None: trained if the model has
            it, else the mean.
        placement: the marker's place in the run: ``"end"``, ``"first"``, ``"middle"``; ``"full"`` is one for each
            dropped token, ``"none"`` drops them directly.
        count_markers: survivors and markers together obey the budget; False: markers come on top, as published.
        vocab: number of real tokens for ``"mean_vocab"``; None: all rows of the table.
    """

    title: ClassVar[str] = "A marker for every run of dropped tokens, after any selector"
    paper: ClassVar[str] = "arXiv 2601.03928 (CVPR 2026)"
    cost: ClassVar[str] = "one gather; counted markers repeat the selection about 10 times"

    inner: Pruner | str = "focusui"
    keep: str | Keep = "inner"
    marker: str | Tensor | None = parameter(None, _marker, compare=False)
    placement: str = choice("end", "end", "first", "middle", "full", "none")
    count_markers: bool = True
    vocab: int | None = integer(None, "number of token ids", 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = create(self.inner)
        budgeted = "keep" in {f.name for f in dataclasses.fields(inner)}
        if self.keep != "inner" and not budgeted:
            raise ParameterError(f"keep={self.keep!r}: {inner.name} has no budget of its own; configure it instead")
        if self.count_markers and not budgeted:
            raise ParameterError(f"{inner.name} has no budget that markers could count in; pass count_markers=False")
        if self.count_markers and self.placement == "full":
            raise ParameterError("placement='full' leaves no room that markers could take; pass count_markers=False")
        inner = inner if self.keep == "inner" else replace(inner, keep=self.keep)
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "keep", getattr(inner, "keep", None))
        object.__setattr__(self, "name", f"pospad:{inner.name}")

    @property
    def content_free(self) -> bool:
        return self.inner.content_free

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
            if self.count_markers and self.placement != "none" and not bool(chosen.kept(tokens.count).all()):
                chosen = self._within_budget(tokens, chosen, signals, model)
            return self.padded(tokens, chosen, marker, model.token_ids)

        return (replace(stage, select=select, positions="keep", newlines="keep"),)

    def _marker(self, model: ModelInfo) -> str | Tensor:
        """The marker on this model."""
        trained = "image_drop_end" in model.token_ids
        marker = self.marker if self.marker is not None else "trained" if trained else "run_mean"
        names = TOKEN_OF.get(marker, ()) if isinstance(marker, str) else ()
        if names and model.token_ids and not any(map(model.token_ids.get, names)):
            missing = " and no ".join(f"{name}_token_id" for name in names)
            raise MissingSignalError(
                f"marker={marker!r}: the configuration of this {model.family} model has no {missing}; "
                "use 'run_mean' or 'last'"
            )
        if model.token_ids and not _is(marker, "trained") and self.placement != "none":
            warnings.warn(
                f"pospad: this {model.family} model was not trained with a marker; what is published need not hold",
                stacklevel=4,
            )
        return marker

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        # what is kept decides how many runs there are to mark
        return self.inner.count(layout, model) if self.placement == "none" else None

    def total(self, layout: Layout) -> int:
        """What the inner method is asked for, and survivors and markers share where markers count."""
        known = self.inner.count(layout)
        return budget(self.inner.keep, layout.size) if known is None else known

    def _within_budget(
        self, tokens: Tokens, chosen: Selection, signals: dict[str, Tensor], model: ModelInfo
    ) -> Selection:
        """The largest selections of the inner method that leave room for their markers, image by image.

        Every further token of a ranking adds 0, 1 or 2 to the total, so bisection finds the most that fit.
        """
        total, stretches = self.total(tokens.layout), int(stretch_ends(tokens.layout).sum())
        if stretches > total:
            raise BudgetError(
                f"{self.name}: a picture of {stretches} separate stretches (rows, frames, crops) needs a token in "
                f"each, and the budget is {total}; use a larger keep, or count_markers=False"
            )
        images = torch.arange(len(tokens.embeds), device=tokens.embeds.device)

        def fits(kept: Tensor) -> Tensor:
            return kept.sum(dim=1) + runs(~kept, tokens.layout).counts <= total

        if _is_top_k(chosen):
            place = ranked(chosen.scores).argsort(dim=1)
            most = largest_fitting(total, images, lambda k, rows: fits(place[rows] < k[:, None]))
            return replace(chosen, index=kept_tokens(place < most[:, None]))

        def ask(k: int, rows: Tensor) -> Selection:
            if k == 0:
                return Selection(rows.new_zeros(len(rows), 0))
            (stage,) = replace(self.inner, keep=k).stages(model)
            return stage.select(tokens.images(rows), **{name: x[rows] for name, x in signals.items()})

        def enough(k: Tensor, rows: Tensor) -> Tensor:
            good = torch.zeros_like(k, dtype=torch.bool)
            for count in k.unique().tolist():
                good[k == count] = fits(ask(count, rows[k == count]).kept(tokens.count))
            return good

        most = largest_fitting(total, images, enough)
        return stacked([ask(k, row) for k, row in zip(most.tolist(), images.split(1))])

    def padded(
        self, tokens: Tokens, chosen: Selection, marker: str | Tensor, token_ids: Mapping[str, tuple[int, ...]]
    ) -> Selection:
        """``chosen`` with markers in place of the runs that it drops.

        Args:
            marker: what the markers are, as resolved for the model (never None); a tensor is an embedding ``(D,)``.
            token_ids: ids of the model's special tokens, of which some markers are the embedding.
        """
        kept = chosen.kept(tokens.count)
        if bool(kept.all()) or self.placement == "none":
            return replace(chosen, order=None)
        gone = runs(~kept, tokens.layout)
        place = gone.marker_places(self.placement)
        itself = torch.arange(tokens.count, device=place.device).expand_as(place)
        markers = gone.dropped & (place == itself)
        index, owner, mean = kept_tokens(kept | markers), chosen.owner, _is(marker, "run_mean")
        if mean:  # it speaks for its run, but for what the inner method has merged into a survivor
            absorbed = torch.full_like(place, -1) if owner is None else owner
            owner = torch.where(kept, itself, torch.where(absorbed >= 0, absorbed, place))
        owner = None if owner is None else torch.where(markers, itself, owner)
        survivors = Selection(index, owner=owner, scores=chosen.scores, markers=markers)
        if _is(marker, "last"):
            survivors.values = None if chosen.values is None else gather_tokens(chosen.written(tokens.embeds), index)
            return survivors
        vector = None if mean else self._vector(marker, tokens, token_ids)
        survivors.values = with_markers(chosen.written(tokens.embeds), index, markers, gone, vector)
        images = range(len(index))
        survivors.resample = [partial(features_with_markers, index[b], markers[b], gone.image(b), mean) for b in images]
        return survivors

    def _vector(self, marker: str | Tensor, tokens: Tokens, token_ids: Mapping[str, tuple[int, ...]]) -> Tensor:
        """The embedding ``(D,)`` that all markers share."""
        width = tokens.embeds.shape[-1]
        if isinstance(marker, Tensor) and len(marker) != width:
            raise ParameterError(f"the marker has {len(marker)} channels, the tokens have {width}")
        if isinstance(marker, Tensor):
            return marker
        if tokens.embed is None:
            raise MissingSignalError(f"marker={marker!r} is an embedding of the decoder's, and none is at hand")
        if marker == "mean_vocab":
            return mean_embedding(tokens.embed, self.vocab or tokens.embed.num_embeddings)
        return tokens.embed(torch.tensor(marker_token(marker, token_ids), device=tokens.embeds.device))

    def parameters(self) -> dict[str, Any]:
        marker = f"tensor of {len(self.marker)}" if isinstance(self.marker, Tensor) else self.marker
        inner = {"method": self.inner.name, **self.inner.parameters()}
        return {**super().parameters(), "inner": inner, "marker": marker}


def marker_token(marker: str, token_ids: Mapping[str, tuple[int, ...]]) -> int:
    """Id of the token whose embedding the marker ``"trained"`` or ``"pad"`` is."""
    return next(token_ids[name][0] for name in TOKEN_OF[marker] if token_ids.get(name))


def _is(marker: str | Tensor, name: str) -> bool:
    return isinstance(marker, str) and marker == name


def _is_top_k(chosen: Selection) -> bool:
    """Whether the selection is just the best of its scores."""
    if chosen.scores is None or chosen.values is not None or bool((chosen.index < 0).any()):
        return False
    return torch.equal(top_k(chosen.scores, chosen.index.shape[1]), chosen.index)
