"""Statement: a transformers unlike any known one raises; nobody gets a wrong answer, or an unpruned one.

Each test changes one thing that a later release might change, on a model that works.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import foveate
from foveate.adapters import compat
from foveate.errors import NotUnderstoodError, UnsupportedModelError
from foveate.tested import TESTED, minor
from tests.models import FAMILIES, IMAGE, cache_of, cached, inputs, picture, tiny
from tests.pruners.synthetic import TopNorm

ENTRY, LAYER = TopNorm(at_input=0.5), TopNorm(at_layer=((2, 0.5),))
METHODS = pytest.mark.parametrize("pruner", [ENTRY, LAYER], ids=["entry", "layer"])
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
NAMES = ("cache", "past_key_values")


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def scene(family: str = "llava") -> dict[str, Tensor]:
    return inputs(family, [[3, picture(family, 1), 6]])


def renamed(kwargs: dict[str, Any], old: tuple[str, ...], new: str) -> dict[str, Any]:
    return {new if name in old else name: value for name, value in kwargs.items()}


def hidden_from_hooks(module: nn.Module, there: Callable[[dict], dict], back: Callable[[dict], dict]) -> None:
    """Let later hooks of ``module`` see the arguments that ``there`` makes, and its forward the usual ones."""
    forward = module.forward

    def usual(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **back(kwargs))

    usual.__signature__ = inspect.signature(forward)
    module.forward = usual
    module.register_forward_pre_hook(lambda module, args, kwargs: (args, there(kwargs)), with_kwargs=True)


@dataclass
class Record:
    """What an argument may keep its tensors in."""

    values: Tensor


# ----------------------------------------------------------------------------------------------- the cache, renamed


@METHODS
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_under_a_third_name_raises(family: str, pruner: foveate.Pruner) -> None:
    model, given = tiny(family), scene(family)
    name = next(iter(cached(model.model.language_model, None)))
    hidden_from_hooks(
        model.model.language_model,
        lambda kwargs: renamed(kwargs, NAMES, "memory"),
        lambda kwargs: renamed(kwargs, ("memory",), name),
    )
    with (
        foveate.attach(model, pruner),
        pytest.raises(NotUnderstoodError, match="this transformers is not understood: a DynamicCache is an argument"),
    ):
        model.generate(**given, **GREEDY)


@METHODS
def test_a_cache_that_comes_back_under_a_third_name_raises(pruner: foveate.Pruner) -> None:
    model, given = tiny("llava"), scene()

    def rename(module: nn.Module, args: Any, output: Any) -> None:
        output.__dict__["memory"] = cache_of(output)
        for name in NAMES:
            output.__dict__.pop(name, None)

    model.model.language_model.register_forward_hook(rename)
    with foveate.attach(model, pruner), pytest.raises(NotUnderstoodError, match="an output called 'memory'"):
        model(**given, use_cache=True)


@METHODS
def test_a_cache_that_no_hook_sees_raises_when_decoding_goes_on(pruner: foveate.Pruner) -> None:
    model, given, kept = tiny("llava"), scene(), []

    def take(kwargs: dict[str, Any]) -> dict[str, Any]:
        kept[:] = [(name, kwargs[name]) for name in NAMES if name in kwargs]
        assert kept
        return {name: value for name, value in kwargs.items() if name not in NAMES}

    hidden_from_hooks(model.model.language_model, take, lambda kwargs: {**kwargs, **dict(kept)})
    with foveate.attach(model, pruner), pytest.raises(NotUnderstoodError, match="brings 0 of them in a cache"):
        model.generate(**given, **GREEDY)


@METHODS
def test_a_cache_that_is_asked_for_and_not_returned_raises(pruner: foveate.Pruner) -> None:
    model, given = tiny("llava"), scene()

    def lose(module: nn.Module, args: Any, output: Any) -> None:
        for name in NAMES:
            output.__dict__.pop(name, None)

    model.model.language_model.register_forward_hook(lose)
    with (
        foveate.attach(model, pruner),
        pytest.raises(NotUnderstoodError, match="was to fill a cache and returned none"),
    ):
        model(**given, use_cache=True)


@METHODS
def test_a_cache_that_holds_other_places_than_its_layer_saw_raises(pruner: foveate.Pruner) -> None:
    model, given = tiny("llava"), scene()

    def grow(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        cache = compat.cache_among(kwargs)
        keys, values = compat.layer_states(cache, 3)
        compat.set_layer_states(cache, 3, *(torch.cat([x, x[:, :, :1]], dim=2) for x in (keys, values)))

    model.model.language_model.layers[3].register_forward_hook(grow, with_kwargs=True)
    with (
        foveate.attach(model, pruner),
        pytest.raises(NotUnderstoodError, match=r"decoder layer 3 saw .* its cache holds"),
    ):
        model(**given, use_cache=True)


@METHODS
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("how", ["layers", "tensors"])
def test_a_pruned_cache_that_comes_back_as_another_raises(family: str, how: str, pruner: foveate.Pruner) -> None:
    """As if generate() wrapped the cache anew between two steps: with its layers, or with copies of what they hold."""
    if (family, how) == ("qwen3_vl", "tensors"):
        pytest.skip("positions of three axes need not reach the number of places, so nothing tells")
    model, given = tiny(family), scene(family)
    update = model._update_model_kwargs_for_generation

    def wrapped(outputs: Any, kwargs: dict[str, Any], *args: Any, **more: Any) -> dict[str, Any]:
        kwargs = update(outputs, kwargs, *args, **more)
        name = next(name for name in NAMES if kwargs.get(name) is not None)
        new = transformers.DynamicCache()
        if how == "layers":
            new.layers = kwargs[name].layers
        else:
            for i in range(len(kwargs[name].layers)):
                new.update(*compat.layer_states(kwargs[name], i), i)
        return {**kwargs, name: new}

    model._update_model_kwargs_for_generation = wrapped
    said = "came back in another" if how == "layers" else "in a cache that is known as one|not known as pruned"
    with foveate.attach(model, pruner), pytest.raises(NotUnderstoodError, match=said):
        model.generate(**given, **GREEDY)


@METHODS
def test_a_cache_inside_another_argument_raises_when_decoding_goes_on(pruner: foveate.Pruner) -> None:
    model, given = tiny("llava"), scene()
    name = next(iter(cached(model.model.language_model, None)))
    hidden_from_hooks(
        model.model.language_model,
        lambda kwargs: {**{k: v for k, v in kwargs.items() if k != name}, "state": {"kv": kwargs.get(name)}},
        lambda kwargs: {**{k: v for k, v in kwargs.items() if k != "state"}, name: kwargs["state"]["kv"]},
    )
    with foveate.attach(model, pruner):
        cache = cache_of(model(**given, use_cache=True))
        with pytest.raises(NotUnderstoodError, match="uses a cache that its call did not bring"):
            model(input_ids=torch.tensor([[5]]), **cached(model, cache))


def test_another_cache_than_was_given_raises() -> None:
    model, given = tiny("llava"), scene()

    def other(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        for name in NAMES:
            if name in output.__dict__:
                output.__dict__[name] = transformers.DynamicCache()

    model.model.language_model.register_forward_hook(other, with_kwargs=True)
    with foveate.attach(model, ENTRY), pytest.raises(NotUnderstoodError, match="returned another DynamicCache"):
        model(**given, **cached(model, transformers.DynamicCache()), use_cache=True)


# ------------------------------------------------------------------------------------- arguments along the sequence


@METHODS
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["rows", "row", "states", "heads", "listed", "flat", "array", "numbers", "record"])
def test_an_unknown_argument_along_the_sequence_raises(family: str, pruner: foveate.Pruner, form: str) -> None:
    model, given = tiny(family), scene(family)
    given = {name: torch.cat([value, value]) if form == "flat" else value for name, value in given.items()}
    batch, length = given["input_ids"].shape
    made = {
        "rows": torch.zeros(batch, length),
        "row": torch.zeros(length),
        "states": torch.zeros(batch, length, 7),
        "heads": torch.zeros(batch, 4, length, 7),
        "listed": {"first": [torch.zeros(3, batch, length)]},
        "flat": torch.zeros(batch * length, 7),
        "array": np.zeros((batch, length)),
        "numbers": [0] * length,
        "record": Record(torch.zeros(batch, length)),
    }
    new = {"segment_ids": made[form]}
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, **new}), with_kwargs=True
    )
    with foveate.attach(model, pruner), pytest.raises(NotUnderstoodError, match="'segment_ids' of shape"):
        model.generate(**given, **GREEDY)


def test_packed_sequences_are_refused() -> None:
    model, given = tiny("llava"), scene()
    bounds = torch.tensor([0, 10, given["input_ids"].shape[1]], dtype=torch.int32)
    with foveate.attach(model, LAYER), pytest.raises(foveate.InputError, match="packs several sequences"):
        model(**given, cu_seq_lens_q=bounds)


@pytest.mark.filterwarnings("ignore:transformers .* is newer")
@METHODS
def test_any_unknown_argument_raises_under_a_later_version(pruner: foveate.Pruner, later: str) -> None:
    """In the prompt, and at the first step after it."""
    model, given = tiny("llava"), scene()
    with foveate.attach(model, pruner):
        with pytest.raises(NotUnderstoodError, match=r"takes 'blocks' \(Tensor\)"):
            model(**given, blocks=torch.ones(3))
        cache = cache_of(model(**given, use_cache=True))
        with pytest.raises(NotUnderstoodError, match=r"takes 'blocks' \(Tensor\)"):
            model(input_ids=torch.tensor([[5]]), **cached(model, cache), blocks=torch.ones(3))


def test_deepstack_places_without_levels_raise() -> None:
    model, given = tiny("qwen3_vl"), scene("qwen3_vl")
    hidden_from_hooks(
        model.model.language_model,
        lambda kwargs: renamed(kwargs, ("deepstack_visual_embeds",), "levels"),
        lambda kwargs: renamed(kwargs, ("levels",), "deepstack_visual_embeds"),
    )
    for method in (ENTRY, LAYER, foveate.PosPad(foveate.Random(keep=0.5))):
        with foveate.attach(model, method), pytest.raises(NotUnderstoodError, match="do not come together"):
            model(**given)


@METHODS
def test_deepstack_levels_that_another_method_adds_raise(
    pruner: foveate.Pruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = tiny("qwen3_vl"), scene("qwen3_vl")
    text = model.model.language_model
    monkeypatch.setattr(compat, "_DEEPSTACK", "another_name")
    with foveate.attach(model, pruner), pytest.raises(NotUnderstoodError, match="no method that adds DeepStack"):
        model(**given)
    type(text).another_name = lambda self, *args: None  # there, and not called
    try:
        with foveate.attach(model, pruner), pytest.raises((NotUnderstoodError, IndexError)):
            model(**given)
    finally:
        del type(text).another_name


def test_layers_that_run_past_their_hooks_raise() -> None:
    model, given = tiny("llava"), scene()
    layer = model.model.language_model.layers[2]
    layer._call_impl = lambda *args, **kwargs: layer.forward(*args, **kwargs)
    with foveate.attach(model, LAYER), pytest.raises(NotUnderstoodError, match=r"past the hooks of its layers \[2\]"):
        model(**given)


def test_an_unknown_argument_that_is_not_along_the_sequence_is_none_of_our_business() -> None:
    model, given = tiny("llava"), scene()
    with foveate.attach(model, LAYER):
        expected = model(**given).logits
        assert torch.equal(model(**given, temperature_of_something=torch.ones(5)).logits, expected)


@METHODS
def test_arguments_without_names_raise_or_are_found(pruner: foveate.Pruner) -> None:
    """Of the text model, by its signature; of a layer they raise, for it is not known which of them was cut."""
    model, given = tiny("llava"), scene()
    text = model.model.language_model
    with foveate.attach(model, pruner):
        expected = model(**given).logits
    first = text.register_forward_pre_hook(
        lambda module, args, kwargs: (
            (None, kwargs["attention_mask"], kwargs["position_ids"]),
            {k: v for k, v in kwargs.items() if k not in ("input_ids", "attention_mask", "position_ids")},
        ),
        with_kwargs=True,
    )
    with foveate.attach(model, pruner):
        assert torch.equal(model(**given).logits, expected)
    first.remove()
    text.layers[2].register_forward_pre_hook(
        lambda module, args, kwargs: (
            (*args, kwargs["attention_mask"]),
            {k: v for k, v in kwargs.items() if k != "attention_mask"},
        ),
        with_kwargs=True,
    )
    with foveate.attach(model, pruner), pytest.raises(NotUnderstoodError, match=r"arguments without names"):
        model(**given)


def test_layers_that_get_masks_or_positions_under_other_names_raise() -> None:
    model, given = tiny("llava"), scene()
    layer = model.model.language_model.layers[2]
    for name in ("attention_mask", "position_embeddings"):
        hook = layer.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: (args, renamed(kwargs, (name,), "other")), with_kwargs=True
        )
        with foveate.attach(model, LAYER), pytest.raises(NotUnderstoodError, match=f"called without {name}|'other'"):
            model(**given)
        hook.remove()


def test_hidden_states_of_another_length_raise() -> None:
    """As of a model that computes late layers for its last tokens alone."""
    model, given = tiny("llava"), scene()
    model.model.language_model.layers[3].register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0][:, -1:],), kwargs), with_kwargs=True
    )
    with foveate.attach(model, ENTRY), pytest.raises(NotUnderstoodError, match="1 places reach LlamaDecoderLayer 3"):
        model(**given)


# ------------------------------------------------------------------------------------------------------- signatures


def takes(function: Callable[..., Any], old: tuple[str, ...], new: str) -> Callable[..., Any]:
    """``function`` with one parameter under another name."""
    own = inspect.signature(function)

    def changed(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **renamed(kwargs, (new,), next(name for name in old if name in own.parameters)))

    changed.__qualname__ = function.__qualname__
    changed.__signature__ = own.replace(
        parameters=[p.replace(name=new) if p.name in old else p for p in own.parameters.values()]
    )
    return changed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("where", "old"),
    [
        ("text", NAMES),
        ("text", ("inputs_embeds",)),
        ("text", ("position_ids",)),
        ("layer", NAMES),
        ("layer", ("attention_mask",)),
        ("layer", ("position_embeddings",)),
    ],
)
def test_a_changed_signature_raises_on_attaching_and_leaves_nothing(
    family: str, where: str, old: tuple[str, ...]
) -> None:
    model, given = tiny(family), scene(family)
    before, text = model(**given).logits, model.model.language_model
    module = text if where == "text" else text.layers[1]
    module.forward = takes(module.forward, old, "renamed")
    hooks = hooks_of(model)
    with pytest.raises(NotUnderstoodError, match=f"takes no {' or '.join(old)}, but .*renamed"):
        foveate.attach(model, LAYER)
    assert hooks_of(model) == hooks
    del module.forward
    assert torch.equal(model(**given).logits, before)


@pytest.mark.parametrize("change", ["renamed", "more"])
def test_a_changed_mask_function_raises_on_attaching(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    own = masking_utils.create_causal_mask
    changed = takes(own, NAMES, "memory")
    if change == "more":
        parameters = list(inspect.signature(own).parameters.values())
        extra = inspect.Parameter("window", inspect.Parameter.KEYWORD_ONLY)
        changed.__signature__ = inspect.Signature([*parameters, extra])
    monkeypatch.setattr(masking_utils, "create_causal_mask", changed)
    with pytest.raises(NotUnderstoodError, match=r"create_causal_mask (takes no|also wants window)"):
        foveate.attach(tiny("llava"), LAYER)


def test_pictures_whose_features_arrive_unnoticed_raise() -> None:
    """As where generate() hands encoded pictures over under another name: nothing would be pruned, without a word."""
    model, given = tiny("llava"), scene()
    names = ("mm_encoder_outputs", "pixel_values")  # from 5.18 on; before

    def away(kwargs: dict[str, Any]) -> dict[str, Any]:
        return {f"early_{k}" if k in names else k: v for k, v in kwargs.items()}

    hidden_from_hooks(model.model, away, lambda kwargs: {k.removeprefix("early_"): v for k, v in kwargs.items()})
    for options in ({}, {"num_beams": 2}):
        with (
            foveate.attach(model, ENTRY),
            pytest.raises(NotUnderstoodError, match=f"features stand in {16 * len(options) + 16} places of images"),
        ):
            model.generate(**given, **GREEDY, **options)


@pytest.mark.filterwarnings("ignore:transformers .* is newer")
def test_features_that_nobody_saw_being_encoded_raise_under_a_later_version(later: str) -> None:
    model, given = tiny("llava"), scene()
    own = model.model.get_image_features
    features = getattr(own(given.pop("pixel_values")), compat.FEATURES)[0]

    def put(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs["inputs_embeds"].clone()
        embeds[given["input_ids"] == IMAGE] = features
        return args, {**kwargs, "inputs_embeds": embeds}

    model.model.language_model.register_forward_pre_hook(put, with_kwargs=True)
    with foveate.attach(model, ENTRY), pytest.raises(NotUnderstoodError, match="features stand in 16 places"):
        model(**given)


def test_placeholders_without_features_are_text() -> None:
    """Also where somebody encoded a picture by hand before."""
    model, given = tiny("llava"), scene()
    pixels = given.pop("pixel_values")
    expected = model(**given).logits
    with foveate.attach(model, ENTRY) as session:
        model.model.get_image_features(pixels)
        assert torch.equal(model(**given).logits, expected)
        assert session.trace is None


def test_a_lengthened_prompt_is_refused() -> None:
    """As soft prompts make it: it is not known any more where the pictures are."""
    model, given = tiny("llava"), scene()

    def more(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = torch.nn.functional.pad(kwargs["inputs_embeds"], (0, 0, 2, 0))
        return args, {**kwargs, "inputs_embeds": embeds, "attention_mask": None, "position_ids": None}

    model.model.language_model.register_forward_pre_hook(more, with_kwargs=True)
    with foveate.attach(model, ENTRY), pytest.raises(foveate.InputError, match="soft prompts cannot be pruned"):
        model(**given)


def test_an_encoder_method_of_another_name_raises_on_attaching(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llava")
    monkeypatch.delattr(type(model.model), "get_image_features")
    with pytest.raises(NotUnderstoodError, match="LlavaModel has no method get_image_features"):
        foveate.attach(model, ENTRY)


# --------------------------------------------------------------------------------------------------------- versions


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> str:
    """A minor version that nobody has tested."""
    major, minor = TESTED["transformers"].minors[-1]
    release = f"{major}.{minor + 1}"
    monkeypatch.setattr(compat, "installed", lambda: (major, minor + 1))
    compat._warn_untested.cache_clear()
    return release


def test_this_transformers_is_one_of_those_tested() -> None:
    assert compat.installed() == minor(transformers.__version__)
    assert compat.installed() in TESTED["transformers"].minors


def test_a_later_version_gives_one_warning_that_names_it_and_what_was_tested(later: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            foveate.attach(tiny("llava"), ENTRY).detach()
    known = TESTED["transformers"]
    (said,) = (str(one.message) for one in caught if "transformers" in str(one.message))
    assert f"transformers {later} " in said
    assert f"({known.oldest} to {known.newest})" in said
    assert caught[-1].filename == __file__


def test_another_major_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed", lambda: (6, 0))
    with pytest.raises(
        UnsupportedModelError, match=r"transformers 6.0 is not supported; install transformers >= 5.16, < 6.0"
    ):
        foveate.attach(tiny("llava"), ENTRY)


@METHODS
@pytest.mark.filterwarnings("ignore:transformers .* is newer")
@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_version_that_changes_nothing_answers(
    family: str, positions: str, pruner: foveate.Pruner, later: str
) -> None:
    """The checks of every prompt let right ones pass: padded batches, beams, several turns."""
    model = tiny(family)
    other = None if family == "llava" else ((2, 3) if "qwen" in family else (30, 60))
    given = inputs(family, [[2, picture(family, 1), 4], [5, picture(family, 2, other), 9]])
    with foveate.attach(model, pruner, positions=positions) as session:
        found = [model.generate(**given, use_cache=use, **GREEDY) for use in (True, False)]
        assert torch.equal(*found)
        assert model.generate(**given, **GREEDY, num_beams=2).shape == found[0].shape
        assert session.trace.images[0].tokens_per_layer[-1] < session.trace.images[0].layout.length


@METHODS
@pytest.mark.filterwarnings("ignore:transformers .* is newer")
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_decoding_that_goes_on_at_another_position_raises_under_a_later_version(
    positions: str, pruner: foveate.Pruner, later: str
) -> None:
    model, given = tiny("llava"), scene()
    length = given["input_ids"].shape[1]
    call = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, length + 1)}
    with foveate.attach(model, pruner, positions=positions):
        cache = cache_of(model(**given, use_cache=True))
        model(**call, **cached(model, cache), position_ids=torch.tensor([[length]]))  # right
        cache = cache_of(model(**given, use_cache=True))
        with pytest.raises(NotUnderstoodError, match=r"decoding goes on at position .* after a prompt that ended at"):
            model(**call, **cached(model, cache), position_ids=torch.tensor([[length - 4]]))


@pytest.mark.filterwarnings("ignore:transformers .* is newer")
@pytest.mark.parametrize(("pruner", "layer"), [(ENTRY, 0), (LAYER, 0), (LAYER, 2)])
@pytest.mark.parametrize("what", ["positions", "mask"])
def test_a_model_that_works_at_other_positions_or_masks_raises_under_a_later_version(
    what: str, pruner: foveate.Pruner, layer: int, later: str
) -> None:
    """Also where one layer alone does: whoever cuts its mask later on has to know how that was made."""
    model, given = tiny("llava"), scene()
    text = model.model.language_model

    def other(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        width = args[0].shape[1]
        made = {
            "positions": {"position_embeddings": text.rotary_emb(args[0], torch.arange(width)[None] + 1)},
            "mask": {"attention_mask": torch.ones(1, 1, width, width, dtype=torch.bool)},
        }
        return args, {**kwargs, **made[what]}

    text.layers[layer].register_forward_pre_hook(other, with_kwargs=True)
    said = {"positions": "works at other positions", "mask": "works with another mask"}[what]
    with foveate.attach(model, pruner), pytest.raises(NotUnderstoodError, match=f"LlamaDecoderLayer {layer} {said}"):
        model(**given)


@pytest.mark.filterwarnings("ignore:transformers .* is newer")
def test_signals_of_other_keys_than_the_layer_makes_raise_under_a_later_version(
    later: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where an attention normalises its keys in a part of another name: a method would rank by the wrong ones."""
    model, given = tiny("qwen3_vl"), scene("qwen3_vl")
    for layer in model.model.language_model.layers:
        layer.self_attn.k_norm.weight.mul_(torch.linspace(0.2, 3, len(layer.self_attn.k_norm.weight)))
    with foveate.attach(model, "fastv", k=2, keep=0.5):
        model(**given, use_cache=True)
    monkeypatch.setattr(compat, "key_source", lambda attention: attention.k_proj)
    with (
        foveate.attach(model, "fastv", k=2, keep=0.5),
        pytest.raises(NotUnderstoodError, match="makes other keys than were read"),
    ):
        model(**given, use_cache=True)


# ----------------------------------------------------------------------------------------------- attaching, half-way


def hooks_of(model: nn.Module) -> dict[str, Any]:
    """Every hook of a model and every function among its modules' attributes: a failed attach leaves them alone."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict) and "_hooks" in key:
                found[name, key] = list(value)
            elif callable(value) and not isinstance(value, type):
                found[name, key] = value
    return found


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen3_vl"])
@pytest.mark.parametrize("name", ["hiprune", "corematching", "transprune", "quota", "tome"])
def test_a_failed_attach_leaves_nothing(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it fails: at the first hook, at the second, … and at every replaced method."""
    if (family, name) == ("qwen3_vl", "tome"):
        pytest.skip("refused before anything is put on the model")
    model, given = tiny(family), scene(family)
    before, hooks = model(**given).logits, hooks_of(model)
    parameters = {"tome": {"r": 2}, "quota": {"keep": 0.5, "assigner": "tome"}}.get(name, {})
    steps = 0

    class Failed(Exception):
        pass

    def failing(own: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps -= 1
            if steps < 0:
                raise Failed
            return own(*args, **kwargs)

        return step

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", failing(nn.Module.register_forward_pre_hook))
    monkeypatch.setattr(nn.Module, "register_forward_hook", failing(nn.Module.register_forward_hook))
    monkeypatch.setattr("foveate.adapters.taps.Replaced.__init__", failing(foveate_replaced()))
    for reached in range(100):
        steps = reached
        try:
            session = foveate.attach(model, name, **parameters)
        except Failed:
            assert hooks_of(model) == hooks, f"after {reached} steps something stays"
            assert torch.equal(model(**given).logits, before)
            continue
        break
    assert reached > 5, "attaching takes more than five steps"
    steps = 1000
    session.detach()
    assert hooks_of(model) == hooks
    foveate.attach(model, name, **parameters).detach()  # and nothing thinks that a method is attached still
    assert torch.equal(model(**given).logits, before)


def foveate_replaced() -> Callable[..., None]:
    from foveate.adapters.taps import Replaced

    return Replaced.__init__
