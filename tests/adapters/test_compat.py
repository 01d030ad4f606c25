"""Statement: a transformers that does otherwise than any that is known raises; none gets a wrong answer, or an unpruned one.

Each test changes one thing that a later release might change, on a model that works.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import foveate
from foveate.adapters import compat
from foveate.errors import NotUnderstoodError, UnsupportedModelError
from foveate.tested import TESTED, minor
from tests.models import FAMILIES, cache_of, cached, inputs, picture, tiny
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
    """Let hooks of ``module`` that are put on afterwards see the arguments that ``there`` makes, and its forward the usual ones."""
    forward = module.forward

    def usual(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **back(kwargs))

    usual.__signature__ = inspect.signature(forward)
    module.forward = usual
    module.register_forward_pre_hook(lambda module, args, kwargs: (args, there(kwargs)), with_kwargs=True)


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
    with foveate.attach(model, pruner), pytest.raises(NotUnderstoodError, match="no cache that is known as one"):
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
        cache = compat.passed_cache(kwargs)
        keys, values = compat.layer_states(cache, 3)
        compat.set_layer_states(cache, 3, *(torch.cat([x, x[:, :, :1]], dim=2) for x in (keys, values)))

    model.model.language_model.layers[3].register_forward_hook(grow, with_kwargs=True)
    with (
        foveate.attach(model, pruner),
        pytest.raises(NotUnderstoodError, match=r"decoder layer 3 saw .* its cache holds"),
    ):
        model(**given, use_cache=True)


# ------------------------------------------------------------------------------------- arguments along the sequence


@METHODS
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["rows", "states", "listed"])
def test_an_unknown_argument_along_the_sequence_raises(family: str, pruner: foveate.Pruner, form: str) -> None:
    model, given = tiny(family), scene(family)
    batch, length = given["input_ids"].shape
    made = {
        "rows": torch.zeros(batch, length),
        "states": torch.zeros(batch, length, 7),
        "listed": {"first": [torch.zeros(3, batch, length)]},
    }
    new = {"segment_ids": made[form]}
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, **new}), with_kwargs=True
    )
    with foveate.attach(model, pruner), pytest.raises(NotUnderstoodError, match="'segment_ids' of shape"):
        model.generate(**given, **GREEDY)


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
    inner = model.model
    hidden_from_hooks(
        inner,
        lambda kwargs: renamed(kwargs, ("mm_encoder_outputs",), "early"),
        lambda kwargs: renamed(kwargs, ("early",), "mm_encoder_outputs"),
    )
    with foveate.attach(model, ENTRY), pytest.raises(NotUnderstoodError, match="16 image tokens were encoded"):
        model.generate(**given, **GREEDY)


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
    release = f"{major}.{minor + 1}.0"
    monkeypatch.setattr(compat, "_release", lambda: release)
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
    monkeypatch.setattr(compat, "_release", lambda: "6.0.0")
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
def test_a_model_that_works_at_other_positions_raises_under_a_later_version(later: str) -> None:
    model, given = tiny("llava"), scene()
    text = model.model.language_model
    text.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: (
            args,
            {**kwargs, "position_embeddings": text.rotary_emb(args[0], torch.arange(args[0].shape[1])[None] + 1)},
        ),
        with_kwargs=True,
    )
    with foveate.attach(model, ENTRY), pytest.raises(NotUnderstoodError, match="works at other positions"):
        model(**given)


# ----------------------------------------------------------------------------------------------- attaching, half-way


def hooks_of(model: nn.Module) -> dict[str, Any]:
    """Every hook of a model, and every attribute of its modules that is a function: what a failed attach must leave alone."""
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
    monkeypatch.setattr("foveate.adapters.attachment.Replaced.__init__", failing(foveate_replaced()))
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
    from foveate.adapters.attachment import Replaced

    return Replaced.__init__
