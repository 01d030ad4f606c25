"""FocusUI: keep the parts of a screenshot that the instruction speaks of.

Ouyang, Lin, Shou, Ng, "FocusUI: Efficient UI Grounding via Position-Preserving Visual Token Selection", arXiv
2601.03928 (CVPR 2026). A small trained scorer gives every visual token its relevance to the instruction, and the best
are kept. Headline: FocusUI-7B reaches 45.1 on ScreenSpot-Pro with 30 % of the tokens, 48.3 with all. Everything
published is with the whole model fine-tuned, and with a marker in place of every dropped run: ``PosPad(FocusUI())``
(``pospad:focusui``).

Acts at the decoder's entry, positions kept; reads the projected tokens and the embeddings of the instruction, no
attention. The instruction is the text after the first picture up to the end of the turn. A scorer fits the one model it
was trained with. Without any, the UI graph that the scorer is trained on ranks by itself: tokens of large uniform areas
go first. It reads the pixels, no text.

Differences from the released code: equal scores go to the earlier token, not to a random one; padded text is not
pooled; pictures of a prompt have each their own budget; videos are pruned, too, the frames in one pool. Cost:
self-attention over the visual tokens and two MLPs, 12 N D^2 + 4 N^2 D; the UI graph costs one pass over the pixels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.errors import InputError, MissingSignalError
from foveate.pruners.core import AtEntry, Keep, ModelInfo, Scorer, Stage, Tokens, budget, register
from foveate.pruners.core.parameters import check_number, choice, integer, number, parameter
from foveate.pruners.core.patch_scorer import PatchScorer, load_scorer
from foveate.pruners.core.signals import PatchPixels
from foveate.pruners.core.ui_graph import MODES, ui_graph

SCORER_FILE = "patch_scorer.safetensors"


def _distance(name: str, value: Any) -> Any:
    """Positive; infinity joins all patches."""
    return (
        value if value == math.inf else check_number(name, value, "distance within which patches join", 0, above=True)
    )


@register("focusui")
@dataclass(frozen=True)
class FocusUI(Scorer):
    """FocusUI: query-guided selection of visual tokens.

    Attributes:
        keep: fraction, rounded down, or number of tokens of the picture.
        scorer: a :class:`~foveate.pruners.core.patch_scorer.PatchScorer`, the file or checkpoint folder it is in, or
            ``"uigraph"``. None: ``patch_scorer.safetensors`` beside the model's weights, else the UI graph, with a
            warning.
        reduct: fraction dropped, with the rounding of the released code; overrides ``keep``. 0 or less drops nothing.
        min_keep: tokens that any budget leaves.
        pooling: over the instruction's tokens, ``"mean"`` or ``"max"``; None: as the scorer has it (mean).
        heads: attention heads of a scorer that is loaded.
        threshold: the UI graph joins neighbours that differ by less.
        mode: weight of a component of c tokens in the UI graph: ``"log"``, ``"inverse"`` or ``"sqrt"``.
        deepstack: Qwen3-VL's DeepStack levels of kept tokens, ``"all"``, or ``"first"`` as the released code has it by
            mistake.
    """

    title: ClassVar[str] = "Tokens relevant to the instruction, by a trained scorer or the UI graph"
    paper: ClassVar[str] = "arXiv 2601.03928 (CVPR 2026)"
    cost: ClassVar[str] = "self-attention and an MLP over the visual tokens; UI graph: one pass over the pixels"
    pooled: ClassVar[bool] = True

    keep: Keep = 0.5
    scorer: PatchScorer | str | Path | None = field(default=None, compare=False)
    reduct: float | None = number(None, "share of tokens to drop", high=1)
    min_keep: int = integer(1, "number of tokens", 0)
    pooling: str | None = choice(None, "mean", "max")
    heads: int = integer(8, "number of heads", 1)
    threshold: float = parameter(2.0, _distance)
    mode: str = choice("log", *MODES)
    deepstack: str = choice("all", "all", "first")

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        scorer = self._scorer(model)
        how = {"positions": "keep", "deepstack": self.deepstack}
        if scorer is None:
            return (AtEntry(self.select, {"pixels": PatchPixels()}, **how),)
        return (AtEntry(partial(self.select, scorer=scorer, token_ids=model.token_ids), reads_text=True, **how),)

    def _scorer(self, model: ModelInfo) -> PatchScorer | None:
        """The scorer to use on this model, None for the UI graph."""
        if isinstance(self.scorer, PatchScorer) or self.scorer == "uigraph":
            return self.scorer if isinstance(self.scorer, PatchScorer) else None
        path = self.scorer or model.find_file(SCORER_FILE)
        if path is not None:
            return _loaded(Path(path), self.heads)
        if model.family != "none" and model.token_ids:
            warnings.warn(
                f"focusui: this {model.family} model comes without a patch scorer ({SCORER_FILE}), so the UI graph "
                "ranks its tokens; pass scorer=<file>, or scorer='uigraph' to say that this is meant",
                stacklevel=4,
            )
        return None

    def total(self, n: int) -> int:
        if self.reduct is not None:
            kept = n if self.reduct <= 0 else int(n * (1 - self.reduct))
        else:
            kept = budget(self.keep, n) if isinstance(self.keep, int) else math.floor(self.keep * n + 1e-6)
        return min(n, max(kept, self.min_keep))

    def score(
        self,
        tokens: Tokens,
        pixels: Tensor | None = None,
        scorer: PatchScorer | None = None,
        token_ids: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Tensor:
        """Relevance by a ``scorer``, or weights in the UI graph of ``pixels``."""
        if scorer is None:
            return ui_graph(pixels, tokens.layout, self.threshold, self.mode)
        return relevance(scorer, tokens, token_ids or {}, self.pooling)


@lru_cache(maxsize=4)
def _loaded(path: Path, heads: int) -> PatchScorer:
    return load_scorer(path, heads=heads)


@torch.no_grad()
def relevance(
    scorer: PatchScorer, tokens: Tokens, token_ids: Mapping[str, tuple[int, ...]], pooling: str | None = None
) -> Tensor:
    """The scorer's judgement of every token for the prompt's instruction: ``(B, N)`` float32.

    Raises:
        InputError: the prompt has no text after its first picture.
        MissingSignalError: the scorer has another width.
    """
    if tokens.embeds.shape[-1] != scorer.width:
        raise MissingSignalError(
            f"focusui: the patch scorer reads embeddings of {scorer.width} channels, this model's have "
            f"{tokens.embeds.shape[-1]}; a scorer fits only the model that it was trained with"
        )
    words = None if tokens.instruction is None else instruction_words(tokens, token_ids)
    if words is None or not bool(words.any(dim=1).all()):
        raise InputError(
            "focusui: a prompt has no instruction after its first picture, and the scorer needs one; put the question "
            "after the picture, or use scorer='uigraph'"
        )
    where = next(scorer.parameters()).device
    image, text, words = (x.to(where) for x in (tokens.embeds, tokens.instruction, words))
    return scorer(image, text, words, pooling=pooling).to(tokens.embeds.device)


def instruction_words(tokens: Tokens, token_ids: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Which of the text after the picture is the instruction: ``(B, T)`` bool. Special tokens are not, nor what follows
    the first end of a turn (the chat template's opening of the answer).
    """
    ids, mask = tokens.instruction_ids, tokens.instruction_mask
    ends = torch.isin(ids, ids.new_tensor(token_ids.get("eos", ())))
    special = torch.isin(ids, ids.new_tensor(sorted({i for many in token_ids.values() for i in many})))
    words = mask & ~special
    first = words.long().cumsum(dim=1) > 0  # an end before any word ends nothing
    return words & ~((ends & first).long().cumsum(dim=1) > 0)
