"""Statements about long-lived and unusual processes: nothing grows, and pruned models work where others do."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import foveate
from foveate.adapters import compat
from tests.models import IMAGE, inputs, picture, tiny

METHODS: dict[str, dict[str, Any]] = {
    "hiprune": {"keep": 0.5},
    "fopru": {"keep": 0.5},
    "visionzip": {"keep": 0.5},
    "fastv": {"k": 2, "keep": 0.5},
    "transprune": {"prune_layers": (2,), "ratios": (0.5,)},
    "todre": {"keep": 0.5},
    "corematching": {"select_layer": 2, "neuron_layers": (3,)},
    "tome": {"r": 2},
}
some_methods = pytest.mark.parametrize("name", METHODS)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(vars(m)) for m in model.modules())


def request(**more: Any) -> dict[str, Any]:
    return inputs("llava", [[4, picture("llava", 1), 6]]) | more


@torch.inference_mode()
def answer(model: nn.Module, name: str) -> torch.Tensor:
    with foveate.attach(model, name, **METHODS[name]):
        return model(**request()).logits


def test_a_thousand_attachments_leave_nothing_behind():
    """Neither hooks nor attributes nor objects grow with the number of cycles."""
    model, good = tiny("llava"), request()
    names = list(METHODS)

    def cycles(count: int) -> tuple[int, int]:
        for i in range(count):
            with foveate.attach(model, names[i % len(names)], **METHODS[names[i % len(names)]]) as session:
                if i % 10 < len(names):
                    model.generate(**good, max_new_tokens=2, do_sample=False)
            assert not session.attached
        del session
        gc.collect()
        return hooks(model), len(gc.get_objects())

    before, objects = cycles(100)
    after, more = cycles(900)
    assert after == before
    assert more - objects < 450, "fewer than one object for two cycles"


def test_one_session_serves_a_thousand_calls_with_what_it_started_with():
    model, good = tiny("llava"), request()
    with foveate.attach(model, "hiprune", keep=0.5), torch.inference_mode():
        counts = []
        for _ in range(2):
            for _ in range(250):
                model(**good)
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert counts[1] - counts[0] < 125, "fewer than one object for two calls"


# ------------------------------------------------------------------------------------------------------------- training


@some_methods
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    model = tiny("llava").train()
    good = request(use_cache=False)
    good["labels"] = good["input_ids"].masked_fill(good["input_ids"] == IMAGE, -100)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with foveate.attach(model, name, **METHODS[name]):
            model(**good).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.24 on
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    if name == "tome" or compat.installed() < (5, 23):  # blocks cannot run twice, nor can hooks
        with pytest.raises(foveate.AttachError, match="gradient checkpointing"):
            gradients()
        return
    checkpointed = gradients()
    assert checkpointed.keys() == plain.keys()
    for name_, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name_], gradient, msg=name_)


def test_a_training_step_lowers_the_loss():
    model = tiny("llava").train()
    good = request(use_cache=False)
    good["labels"] = good["input_ids"].masked_fill(good["input_ids"] == IMAGE, -100)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with foveate.attach(model, "fastv", k=2, keep=0.5):
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**good).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[2] < losses[0]


# ------------------------------------------------------------------------------------------------ other kinds of layers


class Int8Linear(nn.Module):
    """What quantised layers have in common: no float ``weight``, their own forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, (self.packed * self.scale).to(x.dtype), self.bias)


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with other linear layers in tower and decoder, as quantisers leave it."""
    for part in (model.model.vision_tower, model.model.language_model):
        for parent in list(part.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, make(child))
    return model


class Rounded(nn.Linear):
    """The same rounding with a float weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        packed = Int8Linear(linear)
        self.weight = nn.Parameter(packed.packed * packed.scale)
        self.bias = linear.bias


@pytest.mark.parametrize("name", [name for name in METHODS if name != "corematching"])
def test_quantised_layers_give_the_signals_of_their_rounded_weights(name):
    quantised, rounded = replaced(tiny("llava"), Int8Linear), replaced(tiny("llava"), Rounded)
    torch.testing.assert_close(answer(quantised, name), answer(rounded, name))


def test_neurons_of_quantised_layers_are_refused():
    """CoreMatching cuts rows out of weights, which packed weights do not allow."""
    model = replaced(tiny("llava"), Int8Linear)
    with pytest.raises(foveate.FoveateError, match="MLP"):
        answer(model, "corematching")


@some_methods
def test_a_model_spread_over_devices_answers_as_one(name, tmp_path):
    """accelerate's hooks move every layer's inputs; the decoder's second half is offloaded and loaded when it runs."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny("llava")
    expected = answer(model, name)
    device_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    language = "model.language_model"
    device_map |= {
        f"{language}.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1")
    }
    device_map |= {f"{language}.layers.{i}": "disk" for i in (2, 3)}
    spread = accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    if name == "corematching":  # weights that are not there cannot be cut
        with pytest.raises(foveate.FoveateError, match="offload"):
            answer(spread, name)
    else:
        torch.testing.assert_close(answer(spread, name), expected)


# --------------------------------------------------------------------------------------------------------- data loaders


class Pictures(Dataset):
    """Inputs that workers make."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return inputs("llava", [[4, picture("llava", i), 6]])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loaders_work_beside_an_attached_model(method):
    model = tiny("llava")
    expected = []
    with foveate.attach(model, "hiprune", keep=0.5), torch.inference_mode():
        expected = [model(**Pictures()[i]).logits for i in range(4)]
        loader = DataLoader(Pictures(), batch_size=None, num_workers=1, multiprocessing_context=method)
        got = [model(**batch).logits for batch in loader]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@some_methods
def test_inference_mode_no_grad_and_plain_calls_agree(name):
    model = tiny("llava")
    with foveate.attach(model, name, **METHODS[name]):
        with torch.inference_mode():
            first = model(**request()).logits
        with torch.no_grad():
            second = model(**request()).logits
        third = model(**request()).logits
    assert torch.equal(first, second)
    torch.testing.assert_close(first, third.detach())  # with gradients torch may take other kernels
