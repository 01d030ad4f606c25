"""CoreMatching: core neurons say which visual tokens matter, and are all that runs while the answer is written.

Wang et al., "CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for Comprehensive
Acceleration of Vision-Language Models", arXiv 2505.19235 (ICML 2025). A neuron of a gated MLP is active on a token
where ``act(gate) * up`` is positive. Core neurons of a layer are those most often among the strongest of the prompt's
tokens; core tokens are the visual tokens on which most core neurons of an early layer are active, cut at the knee of
the sorted counts. Later layers see core tokens only, the cache keeps core tokens only, and decoding runs core neurons
only. The headline, ten times faster on a 12 GB card, compares with a model that does not fit that card; on a device
that holds the model the weights that decoding reads allow about 1.6 times. The share of tokens kept is not that of the
prefill's work: layers up to the one that chooses see all tokens, and without ``kv_evict`` their caches keep all as
well.

The released repository contains neither neuron sparsity nor token removal: it zeroes cache rows of layers 5 .. 18,
which ``mode="released"`` repeats, for comparison only. The rest follows the paper and the authors' earlier CoreInfer
(arXiv 2410.18311). Layers are numbered from 0. Cost: one pass over the MLP activations per layer in prefill; a copy of
the core neurons' weights per prompt. Batches of more than two different prompts decode densely, where gathering would
cost more than it saves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from foveate.errors import BudgetError, ParameterError
from foveate.pruners.core import BeforeLayer, InCache, InMLP, Keep, Layout, ModelInfo, Pruner, Stage, Tokens, register
from foveate.pruners.core.parameters import choice, integer, layers, number
from foveate.pruners.core.selection import Selection, budget, keep_all, kept_tokens, ranked, top_k
from foveate.pruners.core.signals import CoreMatches, CoreNeurons, RowMatches

RELEASED_LAYERS, RELEASED_ROW = range(5, 19), -5


@register("corematching")
@dataclass(frozen=True)
class CoreMatching(Pruner):
    """CoreMatching: token and neuron sparsity from one signal.

    Attributes:
        rho: share of its active neurons that each token contributes, the strongest first.
        beta: share of a layer's neurons kept as core; the paper's default costs accuracy on text-rich questions.
        topk: do tokens contribute equally many neurons (``"mean"``) or their own share each (``"per_token"``)?
        select_layer: the layer whose neurons choose the tokens that enter the next one. None: keep all tokens.
        neuron_layers: layers whose MLP runs core neurons only in decode. None: all; CoreInfer takes 6 .. 26 of 32.
        budget: fraction or number of visual tokens to keep, those of largest count (ours). None: the knee decides. Not
            where no token goes: without ``select_layer``, and in mode ``"released"``.
        threshold: are tokens at the knee kept (``">="``) or not (``">"``)?
        min_keep: least tokens that the knee may leave (ours).
        max_keep: most tokens that the knee may leave (ours). None: no bound.
        kv_evict: remove dropped tokens from the caches of the layers up to ``select_layer`` too.
        per_image: one knee (or budget) per picture of a prompt, instead of one for all of them.
        shared: one set of neurons for a whole batch, so that any batch decodes sparsely, but not as its samples do
            alone (ours).
        refresh: count again when a later turn brings new text.
        mode: ``"paper"``, or ``"released"`` for what the repository does.
    """

    title: ClassVar[str] = "Core tokens by core neurons, which alone run in decode"
    paper: ClassVar[str] = "arXiv 2505.19235 (ICML 2025)"
    cost: ClassVar[str] = (
        "O(T F) comparisons per layer in prefill, O(F) memory; the core neurons' weights are copied once per prompt"
    )
    budget_parameter: ClassVar[str] = "budget"

    rho: float = number(0.2, "share of the neurons", 0, 1, above=True)
    beta: float = number(0.4, "share of the neurons", 0, 1, above=True)
    topk: str = choice("mean", "mean", "per_token")
    select_layer: int | None = integer(1, "layer's number", 0)
    neuron_layers: tuple[int, ...] | None = layers(None)
    budget: Keep | None = None
    threshold: str = choice(">=", ">=", ">")
    min_keep: int = integer(1, "number of tokens", 0, error=BudgetError)
    max_keep: int | None = integer(None, "number of tokens", 1, error=BudgetError)
    kv_evict: bool = True
    per_image: bool = False
    shared: bool = False
    refresh: bool = True
    mode: str = choice("paper", "paper", "released")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and (self.select_layer is None or self.mode == "released"):
            reason = "mode='released'" if self.mode == "released" else "select_layer=None"
            raise ParameterError(
                f"budget={self.budget}: {reason} keeps all tokens; leave the budget out, or let a layer choose tokens"
            )
        if self.max_keep is not None and self.max_keep < self.min_keep:
            raise BudgetError(f"min_keep={self.min_keep} exceeds max_keep={self.max_keep}; give at most that")

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        depth = model.decoder_layers
        how = {"newlines": "compete", "scope": "image" if self.per_image else "sample"}
        if self.mode == "released":
            if depth <= RELEASED_LAYERS[0]:
                first, last = RELEASED_LAYERS[0], RELEASED_LAYERS[-1]
                raise ParameterError(
                    f"mode='released' acts in decoder layers {first} .. {last}, this decoder has {depth}"
                )
            select = replace(self, threshold=">", min_keep=0, max_keep=None).core_tokens
            acting = [n for n in RELEASED_LAYERS if n < depth]
            return tuple(InCache(select, {"matches": RowMatches(n, RELEASED_ROW)}, layer=n, **how) for n in acting)
        counted = (self.rho, self.beta, self.topk)
        stages: list[Stage] = []
        if self.select_layer is not None:
            layer = model.decoder_layer("select_layer + 1", self.select_layer + 1)
            how |= {"positions": "keep", "evict": self.kv_evict}
            read = {"matches": CoreMatches(self.select_layer, *counted)}
            stages.append(BeforeLayer(self.core_tokens, read, layer=layer, **how))
        for n in range(depth) if self.neuron_layers is None else self.neuron_layers:
            if not 0 <= n < depth:
                raise ParameterError(f"neuron_layers={n}: the decoder has layers 0 .. {depth - 1}")
            read = {"core": CoreNeurons(n, *counted, self.shared)}
            stages.append(InMLP(lambda core: core, read, layer=n, refresh=self.refresh))
        return tuple(stages)

    def count(self, layout: Layout, model: ModelInfo | None = None) -> int | None:
        if self.select_layer is None or self.mode == "released":
            return layout.length
        return None if self.budget is None else budget(self.budget, layout.length)  # separators count as tokens

    def core_tokens(self, tokens: Tokens, matches: Tensor) -> Selection:
        """The tokens whose count of matching neurons, ``matches (B, N)``, passes the knee, or the ``budget`` best."""
        n = tokens.count
        if self.budget is not None:
            keep = budget(self.budget, tokens.entered)
            return keep_all(tokens) if keep >= n else Selection(top_k(matches, keep), scores=matches)
        kept = above_knee(matches, self.threshold)
        most = n if self.max_keep is None else min(self.max_keep, n)
        least = min(self.min_keep, n)
        if least > 0 or most < n:
            rank = ranked(matches).argsort(dim=1)
            kept = (kept | (rank < least)) & (rank < most)
        return Selection(kept_tokens(kept, n), scores=matches)


def above_knee(counts: Tensor, threshold: str = ">=") -> Tensor:
    """Which counts pass the knee of their sorted curve: ``(B, N) -> (B, N)`` bool. A single token always does."""
    if counts.shape[1] < 2:
        return torch.ones_like(counts, dtype=torch.bool)
    _, value = knee(counts)
    return counts >= value[:, None] if threshold == ">=" else counts > value[:, None]


def knee(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The first point of the descending curve of counts that is farthest from the chord between its ends.

    Distances are compared as integers, which is exact.

    Returns:
        Its place in the curve and its count, both ``(B,)`` int64, for ``counts (B, N)`` int64.
    """
    curve = counts.sort(dim=1, descending=True).values
    last = counts.shape[1] - 1
    step = torch.arange(last + 1, device=counts.device)
    distance = (last * (curve - curve[:, :1]) - step * (curve[:, -1:] - curve[:, :1])).abs()
    place = distance.argmax(dim=1)
    return place, curve.gather(1, place[:, None]).squeeze(1)
