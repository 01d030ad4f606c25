"""Decoders of transformers 4.36 and 4.37, which the original LLaVA package was written for.

There every attention module looks positions up in a table as long as its own cache, layers take other arguments, and
caches cross steps as tuples of keys and values.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import DynamicCache

from foveate.adapters.engine.decoder import Decoder
from foveate.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from foveate.adapters.session import Session


class LayeredCache(DynamicCache):
    """A cache whose layers are read and written as in transformers 5."""

    @property
    def layers(self) -> list[CachedLayer]:
        return [CachedLayer(self, i) for i in range(len(self.key_cache))]


class CachedLayer:
    """Keys and values of one layer, ``(B, H, P, d)``."""

    def __init__(self, cache: DynamicCache, layer: int) -> None:
        self._cache, self._layer = cache, layer

    @property
    def keys(self) -> Tensor:
        return self._cache.key_cache[self._layer]

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        self._cache.key_cache[self._layer] = keys

    @property
    def values(self) -> Tensor:
        return self._cache.value_cache[self._layer]

    @values.setter
    def values(self, values: Tensor) -> None:
        self._cache.value_cache[self._layer] = values


class LegacyDecoder(Decoder):
    """The same hooks, in the old dialect. While they sit, caches come out as objects instead of tuples."""

    def __init__(self, text_model: Any, session: Session, *, mrope: bool) -> None:
        if getattr(text_model.config, "pretraining_tp", 1) > 1:
            raise UnsupportedModelError(
                f"pretraining_tp={text_model.config.pretraining_tp} slices the projections of "
                f"{type(text_model).__name__}, out "
                "of reach for hooks; set it to 1"
            )
        super().__init__(text_model, session, mrope=mrope)

    def _install(self, undo: ExitStack) -> None:
        super()._install(undo)
        for layer in self.text_model.layers:
            undo.callback(layer.self_attn.rotary_emb.register_forward_pre_hook(self._reach, with_kwargs=True).remove)

    def rotary(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        positions = self.running.frame.span.positions.to(hidden.device)
        tables = self.text_model.layers[0].self_attn.rotary_emb(hidden, seq_len=0)  # as long as _reach makes them
        return tuple(table.to(hidden.device)[positions] for table in tables)

    def _reach(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Let the table of positions reach as far as in the unpruned model."""
        if self.running.frame is None:
            return None
        return args, {**kwargs, "seq_len": max(kwargs["seq_len"], self.running.frame.past + self.running.frame.length)}

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = {**kwargs, "return_dict": True}
        use_cache, cache = kwargs.get("use_cache"), kwargs.get("past_key_values")
        if (module.config.use_cache if use_cache is None else use_cache) and not isinstance(cache, LayeredCache):
            if isinstance(cache, DynamicCache):
                cache = cache.to_legacy_cache()
            kwargs["past_key_values"] = LayeredCache.from_legacy_cache(cache)
        return super()._enter(module, args, kwargs) or (args, kwargs)

    def _before_layer(self, i: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self.running.frame is not None and len(args) > 1:
            raise InputError("gradient checkpointing under transformers 4 hides a layer's arguments; switch it off")
        return super()._before_layer(i, args, kwargs)

    def _layer_kwargs(self, i: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        from transformers import modeling_attn_mask_utils as masks

        span, model = self.running.frame.span, self.text_model
        if span.layer_kwargs is None:
            mask = span.mask.to(hidden.device).long()
            if not getattr(model, "_use_flash_attention_2", False):
                by_sdpa = getattr(model, "_use_sdpa", False) and not kwargs["output_attentions"]
                make = masks._prepare_4d_causal_attention_mask
                if by_sdpa:
                    make = masks._prepare_4d_causal_attention_mask_for_sdpa
                mask = make(mask, tuple(hidden.shape[:2]), hidden, span.past)
            elif bool(mask.all()):
                mask = None
            span.layer_kwargs = {"attention_mask": mask, "position_ids": span.positions.to(hidden.device)}
        return span.layer_kwargs

    def _exit(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        changed = super()._exit(module, args, kwargs, output)
        state = getattr(output.past_key_values, "foveate", None)
        if state is not None:
            output.past_key_values.seen_tokens = state.length  # generate() cuts new tokens off by it
        return changed
