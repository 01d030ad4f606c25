"""The arithmetic of a prefill agrees with what PyTorch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.eval_suites.running.cost import DecoderShape
from tests.models import IMAGE, cache_of, inputs, picture, tiny


def counted(model: torch.nn.Module, call: dict[str, torch.Tensor]) -> int:
    """FLOPs of the decoder and of the last token's logits, without the angles of positions (a matrix product)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**call, logits_to_keep=1)
    found = counter.get_flop_counts()
    decoder = next(name for name in found if name.endswith("model.language_model"))
    head = next(name for name in found if name.endswith("lm_head"))
    angles = sum(sum(found[name].values()) for name in found if name.endswith("language_model.rotary_emb"))
    return sum(found[decoder].values()) - angles + sum(found[head].values())


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("method", [None, foveate.DivPrune(keep=0.25), foveate.FastV(keep=0.5, k=2)])
def test_flops_and_cache_are_those_of_the_tokens_that_each_layer_saw(family, method):
    model = tiny(family)
    call = inputs(family, [[3, picture(family, 0), 5, 6]])
    shape = DecoderShape.of(model.config.text_config, item_bytes=4)
    visual = int(torch.isin(call["input_ids"], torch.tensor([IMAGE])).sum())
    text = call["input_ids"].shape[1] - visual
    if method is None:
        lengths, found = [text + visual] * shape.layers, counted(model, call)
        cache = cache_of(model(**call, use_cache=True))
    else:
        with foveate.attach(model, method, positions="keep") as session:
            found = counted(model, call)
            cache = cache_of(model(**call, use_cache=True))
        lengths = [text + n for n in session.trace.tokens_per_layer]
        assert sum(lengths) < shape.layers * (text + visual)
    # what choosing the tokens costs is counted by PyTorch, too, and is no part of the decoder's prefill
    assert shape.prefill_flops(lengths) <= found
    assert shape.prefill_flops(lengths) == pytest.approx(found, rel=0.02 if method else 1e-9)
    assert shape.cache_bytes(lengths) == sum(4 * (c.keys.numel() + c.values.numel()) for c in cache.layers)


def test_other_kinds_of_decoders_have_no_arithmetic():
    config = tiny("llava").config.text_config
    config.num_experts = 8
    assert DecoderShape.of(config, 4) is None
    assert DecoderShape.of(object(), 4) is None


def test_a_shape_is_read_back():
    shape = DecoderShape(2, 8, 16, 4, 2, 2, 100, 2)
    assert DecoderShape.read(shape.as_json()) == shape
    assert DecoderShape.read(None) is None
