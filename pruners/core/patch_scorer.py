"""FocusUI's patch scorer: how relevant is each visual token to the instruction?

Section 3 of "FocusUI", arXiv 2601.03928 (CVPR 2026). One enhancer per modality (self-attention and an MLP), unit
vectors on both sides, and the mean or largest cosine of a visual token with the instruction's tokens. The loss it is
trained with stands here, the labels in :mod:`foveate.pruners.core.ui_graph`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import kl_div, normalize

from foveate.errors import ParameterError
from foveate.pruners.core.parameters import check_choice as one_of


class Enhancer(nn.Module):
    """Self-attention without positions, then an MLP without residual: ``(B, L, D)`` to unit vectors ``(B, L, D)``."""

    def __init__(self, width: int, heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.layer_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask (B, L)`` bool: False rows are not attended to (their own outputs mean nothing)."""
        ignored = None if mask is None else ~mask
        attended, _ = self.attn(x, x, x, key_padding_mask=ignored, need_weights=False)
        return normalize(self.mlp(self.layer_norm(x + attended)).tanh(), dim=-1, eps=1e-12)


class PatchScorer(nn.Module):
    """Scores of visual tokens for an instruction.

    Args:
        width: D of the decoder's embeddings.
        heads: of the attention, dividing D.
        dropout: of the attention, in training.
        pooling: over the instruction's tokens, ``"mean"`` or ``"max"``.

    Raises:
        ParameterError: ``width`` is not a multiple of ``heads``.
    """

    def __init__(self, width: int, heads: int = 8, dropout: float = 0.1, pooling: str = "mean") -> None:
        super().__init__()
        one_of("pooling", pooling, ("mean", "max"))
        if width % heads:
            raise ParameterError(f"the patch scorer's width {width} is not a multiple of its {heads} heads")
        self.width, self.pooling = width, pooling
        self.vision_enhancer = Enhancer(width, heads, dropout)
        self.text_enhancer = Enhancer(width, heads, dropout)

    def forward(
        self, image_embeds: Tensor, text_embeds: Tensor, text_mask: Tensor | None = None, pooling: str | None = None
    ) -> Tensor:
        """Relevance in (-1, 1).

        Args:
            image_embeds: ``(B, M, D)`` visual tokens as they enter the decoder.
            text_embeds: ``(B, N, D)`` the decoder's embeddings of the instruction.
            text_mask: ``(B, N)`` bool, False where the instruction is padded.
            pooling: other than the module's own.

        Returns:
            ``(B, M)`` float32. Mean pooling never forms the M x N matrix.
        """
        dtype = self.vision_enhancer.layer_norm.weight.dtype
        image = self.vision_enhancer(image_embeds.to(dtype)).float()  # (B, M, D)
        text = self.text_enhancer(text_embeds.to(dtype), text_mask).float()  # (B, N, D)
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if text_mask is None else text_mask
        if (pooling or self.pooling) == "mean":
            text = (text * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
            return (image @ text[..., None]).squeeze(-1)
        return (image @ text.mT).masked_fill(~mask[:, None], -torch.inf).amax(dim=-1)


def scorer_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """``KL(softmax(labels) || softmax(scores))`` over the tokens of each picture, mean over pictures: ``(B, M)`` twice
    -> ``()``.

    Tokens that only fill up a batch carry ``-inf`` in both.
    """
    target = labels.float().softmax(dim=-1).clamp(min=1e-12)
    predicted = scores.float().log_softmax(dim=-1)
    absent = labels == -torch.inf
    return kl_div(predicted.masked_fill(absent, 0), target.masked_fill(absent, 0), reduction="batchmean")


def load_scorer(path: str | Path, *, heads: int = 8, pooling: str = "mean") -> PatchScorer:
    """A scorer in eval mode and in the file's dtype, on the CPU.

    Args:
        path: a ``.safetensors`` file, one written by ``torch.save``, or a folder with the checkpoint of a whole model.
            Names are those of the published code, after ``patch_scorer.`` and ``module.`` or neither; of a whole model
            only the scorer is read.

    Raises:
        ParameterError: no such file, no scorer in it, or names and shapes that do not fit: nothing is loaded in part.
    """
    path = Path(path)
    found = _tensors(path)
    key = "vision_enhancer.attn.in_proj_weight"
    if key not in found:
        some = ", ".join(sorted(found)[:4]) or "nothing"
        raise ParameterError(f"{path} holds no patch scorer: there is no {key!r}, but {some}")
    scorer = PatchScorer(found[key].shape[1], heads, pooling=pooling).to(found[key].dtype)
    expected = {name: tuple(tensor.shape) for name, tensor in scorer.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wrong = [
        *(f"{name} is missing" for name in expected if name not in shapes),
        *(f"{name} is unknown" for name in shapes if name not in expected),
        *(
            f"{name} is {shapes[name]}, not {shape}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ParameterError(
            f"{path} does not fit a patch scorer of width {scorer.width}: {'; '.join(wrong[:4])}{more}"
        )
    scorer.load_state_dict(found)
    return scorer.eval().requires_grad_(False)


def save_scorer(scorer: PatchScorer, path: str | Path) -> None:
    """Write what :func:`load_scorer` reads, as safetensors."""
    save_file({name: tensor.contiguous().cpu() for name, tensor in scorer.state_dict().items()}, path)


def _tensors(path: Path) -> dict[str, Tensor]:
    """The scorer's tensors by name without prefixes."""
    index = path / "model.safetensors.index.json"
    if index.is_file():  # a sharded model: open only the shards that hold something of it
        places = json.loads(index.read_text())["weight_map"]
        files = sorted({path / file for name, file in places.items() if "patch_scorer." in name})
    elif path.is_dir():
        files = [file for name in ("patch_scorer.safetensors", "model.safetensors") if (file := path / name).is_file()][
            :1
        ]
    else:
        files = [path]
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= _read(file)
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise ParameterError(f"the patch scorer cannot be read from {file}: {error}") from None
    return tensors


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            wanted = _wanted(opened.keys())
            return {name: opened.get_tensor(key) for key, name in wanted.items()}
    saved = torch.load(file, map_location="cpu", weights_only=True)
    saved = saved.get("state_dict", saved)
    return {name: saved[key] for key, name in _wanted(saved).items()}


def _wanted(keys: Iterable[str]) -> dict[str, str]:
    """Key in the file -> name in the scorer, without the prefixes of data-parallel training and of a whole model."""
    keys = list(keys)
    inside = [key for key in keys if "patch_scorer." in key]
    return {key: key.rpartition("patch_scorer.")[2].removeprefix("module.") for key in inside or keys}
