"""What a prefill costs by arithmetic: FLOPs and KV cache of a decoder whose layers see different numbers of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["DecoderShape"]


@dataclass(frozen=True)
class DecoderShape:
    """The sizes that decide: of a decoder of equal layers with a gated MLP, as in Llama and Qwen.

    Attributes:
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary: as in the model's configuration.
        item_bytes: size of a number in the KV cache.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    item_bytes: int

    @classmethod
    def of(cls, config: Any, item_bytes: int) -> DecoderShape | None:
        """Read off a ``transformers`` text configuration; None for decoders of another kind (experts, no gate, …)."""
        try:
            if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
                return None
            heads = config.num_attention_heads
            return cls(
                config.num_hidden_layers,
                config.hidden_size,
                config.intermediate_size,
                heads,
                getattr(config, "num_key_value_heads", None) or heads,
                getattr(config, "head_dim", None) or config.hidden_size // heads,
                config.vocab_size,
                item_bytes,
            )
        except AttributeError:
            return None

    @classmethod
    def read(cls, plain: Mapping[str, Any] | None) -> DecoderShape | None:
        """What :meth:`as_json` gave."""
        return None if plain is None else cls(**{f.name: plain[f.name] for f in fields(cls)})

    def as_json(self) -> dict[str, int]:
        """All sizes by name."""
        return asdict(self)

    def prefill_flops(self, lengths: Sequence[float]) -> float:
        """Multiplications and additions of a prefill whose layer i works on ``lengths[i]`` tokens, text included.

        Matrix products and attention (all pairs, as SDPA computes them without a causal kernel), and the last token's
        logits.
        """
        inner, outer = self.heads * self.head_dim, self.kv_heads * self.head_dim
        per_token = 2 * self.hidden * (2 * inner + 2 * outer + 3 * self.intermediate)
        return sum(n * per_token + 4 * n * n * inner for n in lengths) + 2 * self.hidden * self.vocabulary

    def cache_bytes(self, lengths: Sequence[float]) -> float:
        """KV cache after a prefill."""
        return sum(lengths) * 2 * self.kv_heads * self.head_dim * self.item_bytes
