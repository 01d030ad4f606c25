"""What a stage can ask to read, and how it comes out of the tensors of the module that it is about.

A signal says where it is read by its base class (:class:`TowerAttention`, :class:`TowerOutput`,
:class:`LayerAttention`, :class:`LayerUpdate`, :class:`LayerNeurons`), and how by ``reduce``. Adapters bring the
tensors; nothing here knows a model. A new signal is one class. :class:`UnpooledFrames` and :class:`PatchPixels` are
read before any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.cuda import (
    class_attention,
    core_neurons,
    given_attention,
    match_counts,
    neuron_counts,
    received_attention,
    transition_score,
)


@dataclass(frozen=True)
class Signal:
    """Something a stage wants to read. Tensors arrive per visual token, equal layouts stacked: ``(B, N, …)``.

    Attributes:
        layer: 0-based block of the vision tower, or decoder layer.
    """

    from_text: ClassVar[bool] = False
    """Whether it depends on the question."""
    in_decoder: ClassVar[bool] = False
    """Whether ``layer`` is one of the decoder's."""
    needs_class_token: ClassVar[bool] = False
    channels: ClassVar[bool] = False
    """Whether there is a vector, not a number, per token."""
    per_view: ClassVar[bool] = False
    """Whether there is one per view ``(B, V, …)``, not one per token."""
    per_sample: ClassVar[bool] = False
    """Whether there is one per sample ``(B, …)``, not one per token."""

    layer: int

    def reduce(self, *tensors: Any) -> Tensor:
        """The signal; what it is made of is for the base class to say."""
        raise NotImplementedError(f"{type(self).__name__} does not implement reduce()")


# ------------------------------------------------------------------------------------------------- of the vision tower


@dataclass(frozen=True)
class TowerAttention(Signal):
    """Read from the queries and keys of a block: ``reduce(q, k, scale, prefix) -> (V, n[, d])``.

    ``q, k (V, H, L, d)``, of whose rows the first ``prefix`` are not patches.
    """


@dataclass(frozen=True)
class ReceivedAttention(TowerAttention):
    """``(B, N)`` attention received by each token: mean over heads and query rows of the softmax (or of the logits).

    ``queries="all"`` averages over class and register rows too, ``"patches"`` over the patch rows only. Prefix columns
    are dropped afterwards, nothing is renormalised.
    """

    queries: str = "all"
    logits: bool = False

    def reduce(self, q: Tensor, k: Tensor, scale: float, prefix: int) -> Tensor:
        first = prefix if self.queries == "patches" else 0
        return received_attention(q, k, scale=scale, first_query=first, logits=self.logits)[:, prefix:]


@dataclass(frozen=True)
class GivenAttention(TowerAttention):
    """``(B, N)`` attention each patch gives: mean over heads and patch columns of its softmax row (or the logits)."""

    logits: bool = False

    def reduce(self, q: Tensor, k: Tensor, scale: float, prefix: int) -> Tensor:
        return given_attention(q, k, scale=scale, first=prefix, logits=self.logits)


@dataclass(frozen=True)
class ClassAttention(TowerAttention):
    """``(B, N)`` attention that the class token pays each patch: mean over heads of softmax rows (or of the logits)."""

    needs_class_token = True
    logits: bool = False

    def reduce(self, q: Tensor, k: Tensor, scale: float, prefix: int) -> Tensor:
        if self.logits:
            return received_attention(q[:, :, :1], k, scale=scale, logits=True)[:, prefix:]
        return class_attention(q, k, scale=scale)[:, prefix:]


@dataclass(frozen=True)
class EncoderKeys(TowerAttention):
    """``(B, N, d)`` attention keys, bias included, unscaled, mean over heads.

    On Qwen towers they are read after the rotary embedding and averaged over each 2 x 2 unit that becomes one token.
    """

    channels = True

    def reduce(self, q: Tensor, k: Tensor, scale: float, prefix: int) -> Tensor:
        return k.float().mean(dim=1)[:, prefix:]


@dataclass(frozen=True)
class TowerOutput(Signal):
    """Read from what a block returns: ``reduce(hidden, prefix)``.

    ``hidden (V, L, C)``, of whose rows the first ``prefix`` are not patches.
    """

    channels = True


@dataclass(frozen=True)
class EncoderFeatures(TowerOutput):
    """``(B, N, C)`` output of the block."""

    def reduce(self, hidden: Tensor, prefix: int) -> Tensor:
        return hidden[:, prefix:]


@dataclass(frozen=True)
class ClassFeatures(TowerOutput):
    """``(B, V, C)`` class token of the block's output, one per view of the layout."""

    needs_class_token = True
    per_view = True

    def reduce(self, hidden: Tensor, prefix: int) -> Tensor:
        return hidden[:, 0]


@dataclass(frozen=True)
class UnpooledFrames(Signal):
    """``(B, V * n, D)`` projected tokens of a video's frames before the pooling that the model does after its
    projector.

    Only where :attr:`ModelInfo.pools_frames`; for pictures the embeddings themselves. ``layer`` means nothing here.
    """

    channels = True
    layer: int = 0


@dataclass(frozen=True)
class PatchPixels(Signal):
    """``(B, N, 3, T, h, w)`` RGB in [0, 1] under each token: of T frames, in no set order inside a token."""

    channels = True
    layer: int = 0


# ------------------------------------------------------------------------------------------------------ of the decoder


@dataclass
class Columns:
    """The sequence that a decoder layer works on, as its signals see it: P cached places, then K columns.

    Attributes:
        mask: what may be attended, ``(B, P + K)`` bool.
        visual: which columns are visual tokens, ``(B, K)`` bool.
        instruction: which are text after the last picture, ``(B, K)`` bool.
        text: ``text(n)``: which are text after the first n tokens (None: after the first picture), ``(B, K)`` bool.
    """

    mask: Tensor
    visual: Tensor
    instruction: Tensor
    text: Callable[[int | None], Tensor]
    _made: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @property
    def valid(self) -> Tensor:
        """``(B, K)`` bool: columns that are not padding."""
        return self.mask[:, self.mask.shape[1] - self.visual.shape[1] :]

    def once(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """``make()``, which several signals share by ``key``."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


Pay = Callable[[Tensor, "Tensor | None"], Tensor]
"""``pay(rows (B, R), counted (B, R) bool or None) -> (B, K)``: the attention that these query columns pay to each
column, mean over heads and over the rows that count, softmax over the whole sequence.
"""


@dataclass(frozen=True)
class LayerAttention(Signal):
    """Read from the attention of a decoder layer, without ever holding a map of it: ``reduce(pay, columns)``.

    It gives ``(B, K)`` per column, or ``(B, …)`` where :attr:`per_sample`.
    """

    from_text = True
    in_decoder = True
    ahead: ClassVar[bool] = False
    """Whether the layer's attention is computed before the layer, on what would enter it."""


@dataclass(frozen=True)
class LastTokenAttention(LayerAttention):
    """``(B, N)`` attention that the last prompt token pays to each present visual token in decoder layer ``layer``."""

    def reduce(self, pay: Pay, columns: Columns) -> Tensor:
        number = torch.arange(columns.valid.shape[1], device=columns.mask.device)
        return pay(torch.where(columns.valid, number, -1).amax(dim=1, keepdim=True), None)


@dataclass(frozen=True)
class CrossModalAttention(LayerAttention):
    """``(B, 2)`` shares of attention text -> visual and visual -> text in decoder layer ``layer`` (whole sample).

    Text are all non-visual tokens but the first ``system_tokens`` of the prompt (None: all before the first image).
    """

    per_sample = True
    system_tokens: int | None = None

    def reduce(self, pay: Pay, columns: Columns) -> Tensor:
        text, visual = columns.text(self.system_tokens), columns.visual
        to_visual, to_text = pay(*listed(text)), pay(*listed(visual))
        return torch.stack([(to_visual * visual).sum(-1), (to_text * text).sum(-1)], dim=-1)


@dataclass(frozen=True)
class InstructionAttention(LayerAttention):
    """``(B, N)`` attention that decoder layer ``layer`` would pay from the instruction to each present visual token.

    Mean over heads and over the text rows after the last picture of softmax rows over the whole sequence. It is
    computed before that layer, from the tokens that have not been pruned there yet; zero where no text follows.
    """

    ahead = True

    def reduce(self, pay: Pay, columns: Columns) -> Tensor:
        return pay(*listed(columns.instruction))


@dataclass(frozen=True)
class LayerUpdate(Signal):
    """Read from what a decoder layer's attention, and then its MLP, do to the states that enter them; both are summed.

    ``reduce(before, after, columns) -> (B, K)``, with ``before, after (B, K, D)``: what entered the part, what it
    returned.
    """

    in_decoder = True


@dataclass(frozen=True)
class TransitionVariation(LayerUpdate):
    """``(B, N)`` how much decoder layer ``layer`` changed each token: its attention and its MLP, residuals left out.

    Of both, :func:`foveate.cuda.transition_score` over its sum. ``softmax_scope`` says over which present tokens that
    sum runs: ``"sequence"`` text and all, ``"image"`` the visual ones.
    """

    direction: str = "signed"
    softmax_scope: str = "sequence"

    def reduce(self, before: Tensor, after: Tensor, columns: Columns) -> Tensor:
        counted = columns.visual if self.softmax_scope == "image" else columns.valid
        score, turn = transition_score(before, after, direction=self.direction)
        total = (turn * counted).sum(dim=1, keepdim=True)
        return score / total.clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class LayerNeurons(Signal):
    """Read from the activations ``act(gate) * up`` of a decoder layer's gated MLP: ``reduce(hidden, columns)``.

    ``hidden (B, K, F)``; it gives ``(B, K)`` per column, or ``(B, …)`` where :attr:`per_sample`.
    """

    from_text = True
    in_decoder = True


@dataclass(frozen=True)
class CoreNeurons(LayerNeurons):
    """``(B, F)`` bool, which neurons of decoder layer ``layer``'s gated MLP the prompt uses most.

    Of :func:`foveate.cuda.neuron_counts` over all present tokens of a sample, text and all, the
    :func:`foveate.cuda.core_neurons`. ``shared``: one set from the counts of the whole batch.
    """

    per_sample = True
    rho: float = 0.2
    beta: float = 0.4
    topk: str = "mean"
    shared: bool = False

    def reduce(self, hidden: Tensor, columns: Columns) -> Tensor:
        counts = _counts(self, hidden, columns)
        if self.shared:
            return core_neurons(counts.sum(0, True), self.beta).expand(len(hidden), -1)
        return core_neurons(counts, self.beta)


@dataclass(frozen=True)
class CoreMatches(LayerNeurons):
    """``(B, N)`` int64, how many of the sample's :class:`CoreNeurons` of that layer are active on each visual token."""

    rho: float = 0.2
    beta: float = 0.4
    topk: str = "mean"

    def reduce(self, hidden: Tensor, columns: Columns) -> Tensor:
        return match_counts(hidden, core_neurons(_counts(self, hidden, columns), self.beta))


@dataclass(frozen=True)
class RowMatches(LayerNeurons):
    """``(B, N)`` int64, how many neurons of a gated MLP are active on each visual token and on a text token too.

    ``row`` counts that token from the end of the prompt, -1 is the last; the first one where the prompt is shorter.
    """

    row: int = -1

    def reduce(self, hidden: Tensor, columns: Columns) -> Tensor:
        valid = columns.valid
        left = valid.flip(1).long().cumsum(1).flip(1)  # valid columns from here to the end
        wanted = left.amax(dim=1).clamp(max=-self.row)
        place = ((left == wanted[:, None]) & valid).long().argmax(dim=1)
        return match_counts(hidden, hidden[torch.arange(len(hidden), device=hidden.device), place] > 0)


def _counts(signal: CoreNeurons | CoreMatches, hidden: Tensor, columns: Columns) -> Tensor:
    key = "counts", signal.layer, signal.rho, signal.topk
    return columns.once(key, lambda: neuron_counts(hidden, signal.rho, valid=columns.valid, topk=signal.topk))


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Columns where ``chosen (B, K)`` holds, ``(B, R)``, and which of these count; R: those of the fullest row."""
    width = int(chosen.sum(dim=1).amax())
    order = chosen.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    return order, chosen.gather(1, order)
