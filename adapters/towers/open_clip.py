"""open_clip 3.x: its own vision transformer, alone or inside CLIP, and timm trunks that it wraps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from foveate.adapters.towers.base import BlockMerger, OpenBlock, Tower, lineage
from foveate.adapters.towers.timm import TimmTower
from foveate.errors import AttachError, UnsupportedModelError
from foveate.pruners.core import InTower


class OpenClipOpenBlock(OpenBlock):
    """``nn.MultiheadAttention`` gives no keys and its fast path takes no bias, so its own weights run through SDPA
    here.
    """

    classes = ("ResidualAttentionBlock",)

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self._tell: Callable[[Tensor, int], None] | None = None

    def listen(self, tell: Callable[[Tensor, int], None]) -> Any:
        self._tell = tell
        return self

    def remove(self) -> None:
        """Stop telling."""
        self._tell = None

    def attend(
        self,
        x: Tensor,
        bias: Tensor | None,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        block = self.block
        if k_x is not None or v_x is not None or attn_mask is not None:
            raise AttachError("a vision block whose tokens merge attends to its own rows only, without a mask")
        attention = block.attn
        qkv = linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = (y.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for y in qkv.chunk(3, dim=-1))
        if self._tell is not None:
            self._tell(k, 1)
        dropout = attention.dropout if attention.training else 0.0
        attended = scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return x + block.ls_1(attention.out_proj(attended.transpose(1, 2).flatten(2)))

    def feed(self, x: Tensor) -> Tensor:
        return x + self.block.ls_2(self.block.mlp(self.block.ln_2(x)))


class OpenClipTower(Tower):
    """The image side of ``open_clip``'s CLIP and CoCa models, or their ``VisionTransformer`` itself."""

    family: ClassVar[str] = "open_clip"

    @classmethod
    def find(cls, model: nn.Module) -> Tower | None:
        if not lineage(model, "open_clip"):
            return None
        visual = getattr(model, "visual", model)
        kind = type(visual).__name__
        if kind == "VisionTransformer":
            return cls(model, visual)
        if kind == "TimmModel":
            return TimmTower.find(visual.trunk)
        raise UnsupportedModelError(
            f"tokens cannot be merged in {kind}, the image side of {type(model).__name__}: it is not a plain vision "
            "transformer"
        )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.trunk.transformer.resblocks

    @property
    def prefix(self) -> int:
        return 1

    @property
    def checkpointing(self) -> bool:
        return bool(self.trunk.transformer.grad_checkpointing)

    def open_block(self, block: nn.Module) -> OpenBlock:
        if type(block).__name__ not in OpenClipOpenBlock.classes:
            raise self.refuse(block, f"only {', '.join(OpenClipOpenBlock.classes)} is known")
        return OpenClipOpenBlock(block)

    def check(self, stages: Sequence[InTower]) -> None:
        if not self.trunk.transformer.batch_first:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} runs its blocks with the sequence first; build it with batch_first=True"
            )

    def pooled(self, merger: BlockMerger) -> None:
        trunk = self.trunk
        if trunk.attn_pool is not None:
            pools = [trunk.attn_pool]
            if trunk.attn_pool_contrastive is not None and trunk.attn_pool_type == "parallel":
                pools.append(trunk.attn_pool_contrastive)
            for pool in pools:
                merger.weigh_attention(pool.attn)
        elif trunk.pool_type == "avg":
            merger.replace(trunk, "_global_pool", lambda x: (merger.mean(x, 1), x[:, 1:]))
        merger.refuse_intermediates("session.unmerge")
