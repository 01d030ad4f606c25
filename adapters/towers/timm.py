"""timm 1.x: plain vision transformers (``vit_*``, ``deit_*``, DINOv2, …) and the EVA family (EVA-02, DINOv3, rotary
ViTs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.adapters.towers.base import BlockMerger, OpenBlock, Tower, lineage
from foveate.errors import UnsupportedModelError
from foveate.pruners.core import InTower

_ATTENTION = ("Attention", "EvaAttention", "AttentionRope")
_MODELS = ("VisionTransformer", "Eva")


class _TimmOpenBlock(OpenBlock):
    """Keys are heard after their norm and before any rotation, so that they are comparable between positions."""

    def listen(self, tell: Callable[[Tensor, int], None]) -> Any:
        return self.block.attn.k_norm.register_forward_hook(lambda module, args, output: tell(output, 1))


def _added(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The caller's attention mask with the bias on top."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=bias.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask + bias


class PlainOpenBlock(_TimmOpenBlock):
    """Pre-norm blocks with LayerScale and drop path."""

    classes = ("Block",)

    def attend(
        self, x: Tensor, bias: Tensor | None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        block = self.block
        mask = _added(bias, attn_mask)
        return x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=mask, is_causal=is_causal)))

    def feed(self, x: Tensor) -> Tensor:
        block = self.block
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


class ResPostOpenBlock(_TimmOpenBlock):
    """Blocks that normalise each branch's output."""

    classes = ("ResPostBlock",)

    def attend(
        self, x: Tensor, bias: Tensor | None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        block = self.block
        mask = _added(bias, attn_mask)
        return x + block.drop_path1(block.norm1(block.attn(x, attn_mask=mask, is_causal=is_causal)))

    def feed(self, x: Tensor) -> Tensor:
        return x + self.block.drop_path2(self.block.norm2(self.block.mlp(x)))


class EvaOpenBlock(_TimmOpenBlock):
    """EVA blocks: LayerScale is called gamma, positions may be rotary."""

    classes = ("EvaBlock",)

    def attend(
        self,
        x: Tensor,
        bias: Tensor | None,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        block = self.block
        mask = _added(bias, attn_mask)
        branch = block.attn(block.norm1(x), rope=rope, attn_mask=mask, is_causal=is_causal)
        return x + block.drop_path1(branch if block.gamma_1 is None else block.gamma_1 * branch)

    def feed(self, x: Tensor) -> Tensor:
        block = self.block
        branch = block.mlp(block.norm2(x))
        return x + block.drop_path2(branch if block.gamma_2 is None else block.gamma_2 * branch)


class EvaPostNormOpenBlock(ResPostOpenBlock):
    """EVA blocks that normalise each branch's output."""

    classes = ("EvaBlockPostNorm",)

    def attend(
        self,
        x: Tensor,
        bias: Tensor | None,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        block = self.block
        branch = block.attn(x, rope=rope, attn_mask=_added(bias, attn_mask), is_causal=is_causal)
        return x + block.drop_path1(block.norm1(branch))


_OPEN_BLOCKS = {
    name: kind
    for kind in (PlainOpenBlock, ResPostOpenBlock, EvaOpenBlock, EvaPostNormOpenBlock)
    for name in kind.classes
}


class TimmTower(Tower):
    """timm's ``VisionTransformer`` and ``Eva``."""

    family: ClassVar[str] = "timm"

    @classmethod
    def find(cls, model: nn.Module) -> TimmTower | None:
        names = lineage(model, "timm")
        if not names:
            return None
        if not names & set(_MODELS):
            raise UnsupportedModelError(
                f"tokens cannot be merged in {type(model).__name__} of timm: it is not a plain vision transformer, "
                "or its attention "
                "needs to know every token's place (windows, stages, tables of relative positions, packed "
                "sequences); known are "
                f"{' and '.join(_MODELS)} and what derives from them"
            )
        return cls(model, model)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.trunk.blocks

    @property
    def prefix(self) -> int:
        return self.trunk.num_prefix_tokens

    @property
    def checkpointing(self) -> bool:
        return bool(self.trunk.grad_checkpointing)

    def open_block(self, block: nn.Module) -> OpenBlock:
        name, attention = type(block).__name__, type(getattr(block, "attn", None)).__name__
        if name not in _OPEN_BLOCKS:
            raise self.refuse(
                block, f"its attention and MLP cannot be told apart; known blocks: {', '.join(_OPEN_BLOCKS)}"
            )
        if attention not in _ATTENTION:
            raise self.refuse(block, f"its attention is {attention}; known: {', '.join(_ATTENTION)}")
        return _OPEN_BLOCKS[name](block)

    def check(self, stages: Sequence[InTower]) -> None:
        pool = getattr(self.trunk, "attn_pool", None)
        if pool is not None and (type(pool).__name__ != "AttentionPoolLatent" or pool.pos_embed is not None):
            raise UnsupportedModelError(
                f"{type(pool).__name__} of {type(self.model).__name__} pools tokens by their place, which merging "
                "changes"
            )

    def pooled(self, merger: BlockMerger) -> None:
        trunk = self.trunk
        original, pool = trunk.pool, getattr(trunk, "attn_pool", None)
        by_default = pool is not None and "Eva" in lineage(trunk, "timm")
        first = 0 if getattr(trunk, "pool_include_prefix", by_default) else trunk.num_prefix_tokens

        def weighted(x: Tensor, pool_type: str | None = None) -> Tensor:
            kind = trunk.global_pool if pool_type is None else pool_type
            if merger.sizes is None or pool is not None or kind not in ("avg", "avgmax"):
                return original(x, pool_type)
            mean = merger.mean(x, first)
            return mean if kind == "avg" else 0.5 * (x[:, first:].amax(dim=1) + mean)

        def biased(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "attn_mask": _added(merger.key_bias(args[0].dtype, first), kwargs.get("attn_mask"))}

        merger.replace(trunk, "pool", weighted)
        merger.refuse_intermediates("session.unmerge(model.forward_features(x))")
        if pool is not None:
            merger.hook(pool.register_forward_pre_hook(biased, with_kwargs=True))
