"""What a stage can ask to read: attention, features and neurons by meaning, whichever module of a model they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Signal:
    """Something a stage wants to read. Tensors arrive per visual token, equal layouts stacked: ``(B, N, …)``.

    ``layer`` is a 0-based block of the vision encoder, or of the decoder for the ``Decoder…`` signals; ``from_text`` says
    that the signal depends on the question.
    """

    from_text: ClassVar[bool] = False

    layer: int


@dataclass(frozen=True)
class ReceivedAttention(Signal):
    """``(B, N)`` attention received by each token: mean over heads and query rows of the softmax (or of the logits).

    ``queries="all"`` averages over class and register rows too, ``"patches"`` over the patch rows only. Prefix columns
    are dropped afterwards, nothing is renormalised.
    """

    queries: str = "all"
    logits: bool = False


@dataclass(frozen=True)
class GivenAttention(Signal):
    """``(B, N)`` attention each patch gives: mean over heads and the patch columns of its softmax row (or of the logits)."""

    logits: bool = False


@dataclass(frozen=True)
class ClassAttention(Signal):
    """``(B, N)`` attention that the class token pays to each patch, mean over heads of the softmax row (or of the logits)."""

    logits: bool = False


@dataclass(frozen=True)
class EncoderKeys(Signal):
    """``(B, N, d)`` attention keys, bias included, unscaled, mean over heads.

    On Qwen towers they are read behind the rotary embedding and averaged over each 2 x 2 unit that becomes one token.
    """


@dataclass(frozen=True)
class EncoderFeatures(Signal):
    """``(B, N, C)`` output of the block."""


@dataclass(frozen=True)
class ClassFeatures(Signal):
    """``(B, V, C)`` class token of the block's output, one per view of the layout."""


@dataclass(frozen=True)
class UnpooledFrames(Signal):
    """``(B, V * n, D)`` projected tokens of a video's frames in front of the pooling that the model does behind its projector.

    Only where :attr:`ModelInfo.pools_frames`; for pictures the embeddings themselves. ``layer`` means nothing here.
    """


@dataclass(frozen=True)
class PatchPixels(Signal):
    """``(B, N, 3, T, h, w)`` RGB in [0, 1] under each token: of T frames, in no set order inside a token."""

    layer: int = 0


@dataclass(frozen=True)
class LastTokenAttention(Signal):
    """``(B, N)`` attention that the last prompt token pays to each present visual token in decoder layer ``layer``."""

    from_text = True


@dataclass(frozen=True)
class CrossModalAttention(Signal):
    """``(B, 2)`` shares of attention text -> visual and visual -> text in decoder layer ``layer`` (whole sample).

    Text are all non-visual tokens but the first ``system_tokens`` of the prompt (None: all in front of the first image).
    """

    from_text = True

    system_tokens: int | None = None


@dataclass(frozen=True)
class InstructionAttention(Signal):
    """``(B, N)`` attention that decoder layer ``layer`` would pay from the instruction to each present visual token.

    Mean over heads and over the text rows behind the last picture of softmax rows over the whole sequence. It is computed in
    front of that layer, from the tokens that have not been pruned there yet; zero where no text follows.
    """

    from_text = True


@dataclass(frozen=True)
class TransitionVariation(Signal):
    """``(B, N)`` how much decoder layer ``layer`` changed each token: its attention and its MLP, residuals left out.

    Of both, :func:`foveate.cuda.transition_score` over its sum. ``softmax_scope`` says over which present tokens that sum
    runs: ``"sequence"`` text and all, ``"image"`` the visual ones.
    """

    direction: str = "signed"
    softmax_scope: str = "sequence"


@dataclass(frozen=True)
class CoreNeurons(Signal):
    """``(B, F)`` bool, which neurons of decoder layer ``layer``'s gated MLP the prompt uses most.

    Of :func:`foveate.cuda.neuron_counts` over all present tokens of a sample, text and all, the :func:`foveate.cuda.core_neurons`.
    ``shared``: one set from the counts of the whole batch.
    """

    from_text = True

    rho: float = 0.2
    beta: float = 0.4
    topk: str = "mean"
    shared: bool = False


@dataclass(frozen=True)
class CoreMatches(Signal):
    """``(B, N)`` int64, how many of the sample's :class:`CoreNeurons` of that layer are active on each visual token."""

    from_text = True

    rho: float = 0.2
    beta: float = 0.4
    topk: str = "mean"


@dataclass(frozen=True)
class RowMatches(Signal):
    """``(B, N)`` int64, how many neurons of decoder layer ``layer``'s gated MLP are active on each visual token and on a text one.

    ``row`` counts that token from the end of the prompt, -1 is the last.
    """

    from_text = True

    row: int = -1
