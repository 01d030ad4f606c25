"""What transformers calls things: every name of it that may change, once, and a loud error where one has changed.

A renamed thing is read under all its names. What is found under none of them raises :class:`NotUnderstoodError`: a
hook that reads an argument's old name finds nothing, and a model that was cut in one place and not in another
answers with wrong tokens. So nothing else in foveate spells these names, a test sees to that, and what was cut is
compared with what the model really holds.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import InputError, MissingSignalError, NotUnderstoodError, UnsupportedModelError
from foveate.tested import TESTED

Version = tuple[int, int]
SUPPORTED: tuple[tuple[Version, Version], ...] = (((5, 16), (6, 0)),)
"""Versions of transformers that models are served under, from and up to; ``foveate.tested`` has those that were
tested.
"""

# ------------------------------------------------------------------------------------------------------------- versions


_LAST = max(TESTED["transformers"].minors)


def installed() -> Version:
    """Major and minor version of the transformers at hand."""
    from transformers import __version__

    major, minor = __version__.split(".")[:2]
    return int(major), int(minor)


def untested() -> bool:
    """Is this transformers newer than any that foveate was tested with?"""
    return installed() > _LAST


def check_version(name: str, supported: Iterable[tuple[Version, Version]] = SUPPORTED) -> None:
    """May a model of class ``name`` be served under the transformers at hand?

    A newer minor version than was tested is served after one warning.

    Raises:
        UnsupportedModelError: it is outside of what is supported.
    """
    found = installed()
    if not any(first <= found < end for first, end in supported):
        known = " or ".join(f">= {a}.{b}, < {c}.{d}" for (a, b), (c, d) in supported)
        raise UnsupportedModelError(
            f"{name} under transformers {found[0]}.{found[1]} is not supported; install transformers {known}"
        )
    if untested():
        _warn_untested(found)


@lru_cache
def _warn_untested(found: Version) -> None:
    warnings.warn(
        f"transformers {found[0]}.{found[1]} is newer than what foveate was tested with ({_tested()}); every prompt "
        "is checked while it "
        "runs, and an error is raised where something is not understood",
        stacklevel=6,  # whoever called attach()
    )


def _tested() -> str:
    known = TESTED["transformers"]
    return f"{known.oldest} to {known.newest}"


def not_understood(what: str) -> NotUnderstoodError:
    """The error for something that transformers does otherwise than any version that is known."""
    return NotUnderstoodError(
        f"this transformers is not understood: {what}. It is version {installed()[0]}.{installed()[1]}, foveate was "
        f"tested with {_tested()}; "
        "install one of these, or detach and run the model unpruned"
    )


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """A function's parameters by name; None if it takes anything, as a wrapper does."""
    parameters = inspect.signature(function).parameters
    anything = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return None if anything <= {p.kind for p in parameters.values()} else dict(parameters)


def _require(function: Callable[..., Any], where: str, *wanted: tuple[str, ...]) -> None:
    """Raise :class:`NotUnderstoodError` unless ``function`` has a parameter for each of ``wanted``, under one of its
    names.
    """
    parameters = _parameters(function)
    for names in wanted if parameters is not None else ():
        if not set(names) & set(parameters):
            raise not_understood(f"{where} takes no {' or '.join(names)}, but {', '.join(parameters)}")


# --------------------------------------------------------------------------------------------------------------- caches

_CACHE = ("cache", "past_key_values")  # from 5.24 on; before


def mark(cache: Any, state: Any, answer: Callable[..., int]) -> None:
    """Note on a cache, and on its first layer, which another cache may take over, what pruning left in it.

    From then on ``answer(cache, layer)`` is what the cache says of its length.
    """
    cache.foveate = state
    cache.layers[0].foveate = state
    cache.get_seq_length = types.MethodType(answer, cache)


def marked(cache: Any) -> Any:
    """The note on a cache; None where nothing was pruned.

    Raises:
        NotUnderstoodError: the layers of a pruned cache stand in one that knows nothing of it.
    """
    state = getattr(cache, "foveate", None)
    layers = getattr(cache, "layers", None)
    if state is None and layers and getattr(layers[0], "foveate", None) is not None:
        raise not_understood(f"the layers of a pruned cache came back in another {type(cache).__name__}")
    return state


def is_cache(value: Any) -> bool:
    """Is this a KV cache, whatever its class?"""
    return callable(getattr(value, "get_seq_length", None)) and not isinstance(value, nn.Module)


def cache_among(named: Mapping[str, Any] | None, what: str = "an argument") -> Any:
    """The KV cache among a call's arguments, or (``what``: ``"an output"``) among a model's outputs; None without one.

    Raises:
        NotUnderstoodError: there is one under an unknown name.
    """
    for name in _CACHE if named else ():
        if named.get(name) is not None:
            return named[name]
    for name, value in (named or {}).items():
        if is_cache(value):
            raise not_understood(f"a {type(value).__name__} is {what} called {name!r}, not {' or '.join(_CACHE)}")
    return None


def returned_cache(output: Any) -> Any:
    """The KV cache of a model's output; None without one."""
    return cache_among(vars(output), "an output") if output is not None else None  # deprecated names are properties


def cache_argument(function: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """``cache`` as keyword argument of a function of transformers, under the name that the function has for it.

    Raises:
        NotUnderstoodError: it has none.
    """
    return {cache_name(function): cache}


def cache_name(function: Callable[..., Any]) -> str:
    """What a function of transformers, or a method of a model, calls its KV cache.

    Raises:
        NotUnderstoodError: nothing that is known.
    """
    function = getattr(function, "__func__", function)
    # what is remembered is kept alive: only what stands in a module or a class
    find = _remembered_cache_name if isinstance(function, types.FunctionType) else _cache_name
    return find(function)


def handed_on(model: nn.Module, output: Any) -> dict[str, Any]:
    """The cache of a model's output, as argument of its next call."""
    return cache_argument(model.forward, returned_cache(output))


def _cache_name(function: Callable[..., Any]) -> str:
    _require(function, getattr(function, "__qualname__", repr(function)), _CACHE)
    parameters = inspect.signature(function).parameters
    return next((name for name in _CACHE if name in parameters), _CACHE[0])


_remembered_cache_name = lru_cache(_cache_name)


def cached_length(cache: Any, layer: int = 0) -> int:
    """Places that the cache of a layer really holds, whatever :func:`mark` makes it say."""
    keys = layer_states(cache, layer)[0] if layer < len(getattr(cache, "layers", ())) else None
    if isinstance(keys, Tensor) and keys.ndim == 4 and type(cache.layers[layer]).__name__ == "DynamicLayer":
        return keys.shape[2]  # others keep a part elsewhere, and count
    return int(type(cache).get_seq_length(cache, layer))


def told_length(cache: Any) -> int:
    """Places that the cache says it has seen."""
    return int(cache.get_seq_length())


def one_length_for_all(cache: Any) -> bool:
    """Is this a static cache, all of whose layers have one length?"""
    return bool(getattr(cache, "is_compileable", False))


def layer_states(cache: Any, layer: int) -> tuple[Any, Any]:
    """What a layer's cache keeps as keys and values; None where it keeps none under these names."""
    entry = cache.layers[layer]
    return getattr(entry, "keys", None), getattr(entry, "values", None)


def set_layer_states(cache: Any, layer: int, keys: Tensor, values: Tensor) -> None:
    """Put other keys and values into a layer's cache."""
    entry = cache.layers[layer]
    entry.keys, entry.values = keys, values


# ------------------------------------------------------------------------------------------------------- the text model

_CUT = ("inputs_embeds", "attention_mask", "position_ids", "visual_pos_masks", "deepstack_visual_embeds")
_LAYER_CUT = ("hidden_states", "attention_mask", "position_embeddings", "position_ids")
# arguments that may come along and that no text model of a known family reads, unless its signature names them
_UNREAD = ("mm_token_type_ids", "token_type_ids", "cache_position", "labels", "shift_labels")
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k")  # bounds of several sequences in one row
_DEEPSTACK = "_deepstack_process"


def check_text_model(text_model: Any) -> None:
    """Raise :class:`NotUnderstoodError` unless a text model, its layers and its masks take the arguments that are
    cut.
    """
    if installed() < (5, 0):
        return  # these versions are not going to change
    names = ("inputs_embeds",), ("attention_mask",), ("position_ids",), _CACHE
    _require(text_model.forward, f"{type(text_model).__name__}.forward", *names)
    names = ("hidden_states",), ("attention_mask",), ("position_embeddings",), _CACHE
    forwards = {getattr(layer.forward, "__func__", layer.forward): type(layer).__name__ for layer in text_model.layers}
    for forward, layer in forwards.items():
        _require(forward, f"{layer}.forward", *names)
    from transformers.masking_utils import create_causal_mask

    given = ("config", "inputs_embeds", "attention_mask", "position_ids", "layer_idx")
    _require(create_causal_mask, "create_causal_mask", *((name,) for name in given), _CACHE)
    for name, parameter in (_parameters(create_causal_mask) or {}).items():
        if parameter.default is parameter.empty and name not in (*given, *_CACHE):
            raise not_understood(f"create_causal_mask also wants {name}")


def by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A module's call with all arguments by name."""
    return {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs} if args else kwargs


def check_cut(
    module: nn.Module, kwargs: Mapping[str, Any], batch: int, lengths: Iterable[int], *, strict: bool = False
) -> None:
    """Raise :class:`NotUnderstoodError` if an unknown argument of the text model or of a layer runs along the sequence.

    ``lengths`` are those of the sequence that the call may have brought, ``batch`` the number of its rows;
    ``strict``: an argument that is neither known nor a plain setting is one too many, whatever its shape.

    Raises:
        InputError: the call packs several sequences into a row.
    """
    packed = [name for name in _PACKED if kwargs.get(name) is not None]
    if packed:
        raise InputError(f"{packed[0]} packs several sequences into one row, which cannot be pruned; pad them instead")
    read = _parameters(module.forward) or {}
    known = {*_CUT, *_LAYER_CUT, *_CACHE, *(name for name in _UNREAD if name not in read)}
    sizes = {size for length in lengths if length > 1 for size in (length, batch * length)}
    for name in kwargs.keys() - known:
        value = kwargs[name]
        shapes = [shape for shape in _shapes(value) if sizes & set(shape)]
        plain = value is None or isinstance(value, (bool, int, float, str))
        if shapes or (strict and not plain):
            form = f"of shape {shapes[0]}, which runs along the sequence" if shapes else f"({type(value).__name__})"
            raise not_understood(
                f"{type(module).__name__} takes {name!r} {form}, and nobody knows how it is shortened with the sequence"
            )


def _shapes(value: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of all arrays in an argument; a list of numbers is one, too."""
    if isinstance(getattr(value, "shape", None), tuple):  # torch.Size is one
        yield tuple(value.shape)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _shapes(vars(value))
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _shapes(one)
    elif isinstance(value, (list, tuple)):
        if value and isinstance(value[0], (bool, int, float)):
            yield (len(value),)
        for one in value:
            yield from _shapes(one)


def deepstack(kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Which places ``(B, L)`` take DeepStack features, and the levels ``(places, D)`` that join after early layers.

    Raises:
        NotUnderstoodError: one came without the other.
    """
    places, levels = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
    if (places is None) != (levels is None):
        raise not_understood("visual_pos_masks and deepstack_visual_embeds do not come together")
    return None if levels is None else (places, levels)


def deepstack_argument(levels: Sequence[Tensor]) -> dict[str, Any]:
    """DeepStack levels as argument of the text model."""
    return {"deepstack_visual_embeds": levels}


def deepstack_method(text_model: nn.Module) -> tuple[str, Callable[..., Tensor]] | None:
    """The method ``(hidden, places, level)`` of a text model that adds a DeepStack level, by name; None if there is
    none.
    """
    return (_DEEPSTACK, getattr(text_model, _DEEPSTACK)) if hasattr(text_model, _DEEPSTACK) else None


def causal_mask(config: Any, hidden: Tensor, mask: Tensor, cache: Any, layer: int) -> Any:
    """The mask of decoder layer ``layer`` for ``hidden (B, K, D)`` after what its cache holds; ``mask (B, P + K)``
    int64.
    """
    from transformers.masking_utils import create_causal_mask

    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=mask,
        position_ids=None,
        layer_idx=layer,
        **cache_argument(create_causal_mask, cache),
    )


def layer_arguments(
    kwargs: Mapping[str, Any], mask: Any, rotary: tuple[Tensor, Tensor], positions: Tensor
) -> dict[str, Any]:
    """What a decoder layer gets in place of the model's own ``kwargs``.

    Raises:
        NotUnderstoodError: the model passes these under other names.
    """
    made = {"attention_mask": mask, "position_embeddings": rotary}
    if "attention_mask" not in kwargs or kwargs.get("position_embeddings") is None:
        raise not_understood(f"decoder layers are called without {' or '.join(made)}: {', '.join(kwargs)}")
    if kwargs.get("position_ids") is not None:
        made["position_ids"] = positions
    return made


def checkpoints(layer: nn.Module) -> bool:
    """Does a layer of a model in training run once more in the backward pass?"""
    return bool(getattr(layer, "gradient_checkpointing", False))


def entering_states(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that enter a decoder layer.

    Raises:
        NotUnderstoodError: there are none, or what else the layer gets has no names.
    """
    if len(args) > 1 or not (args or "hidden_states" in kwargs):
        raise not_understood(
            f"a decoder layer is called with {len(args)} arguments without names and {', '.join(kwargs)}"
        )
    return args[0] if args else kwargs["hidden_states"]


def with_states(args: tuple, kwargs: dict[str, Any], hidden: Tensor) -> tuple[tuple, dict[str, Any]]:
    """A decoder layer's call with other hidden states."""
    return ((hidden,), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def own_arguments(kwargs: Mapping[str, Any]) -> tuple[Any, tuple[Tensor, Tensor] | None]:
    """The mask that a model passes to a decoder layer, and the cosines and sines."""
    return kwargs.get("attention_mask"), kwargs.get("position_embeddings")


# ---------------------------------------------------------------------------------------------- attention of the
# decoder


def query_source(attention: nn.Module) -> nn.Module:
    """The module whose output are an attention's queries before they are turned: Qwen3 normalises them after
    projecting.
    """
    return _part(attention, "q_norm", "q_proj")


def key_source(attention: nn.Module) -> nn.Module:
    """The same for its keys."""
    return _part(attention, "k_norm", "k_proj")


def normalised(attention: nn.Module, which: str, x: Tensor) -> Tensor:
    """Queries (``"q"``) or keys (``"k"``) ``(B, K, H, d)`` as the attention normalises them, if it does."""
    norm = getattr(attention, f"{which}_norm", None)
    return x if norm is None else norm(x)


def _part(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise MissingSignalError(
        f"{type(module).__name__} has no {' or '.join(names)}; its queries and keys cannot be read"
    )


def scale(attention: Any) -> float:
    """What an attention multiplies logits by."""
    for name in ("scaling", "scale"):
        if hasattr(attention, name):
            return getattr(attention, name)
    if installed() >= (5, 0):
        raise MissingSignalError(f"what {type(attention).__name__} multiplies logits by is not known")
    return attention.head_dim**-0.5  # transformers 4.37 has no name for it


def rotation(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """``rotate(q, k, cos, sin)`` as a decoder's attention module itself does it.

    Raises:
        MissingSignalError: it is not known how.
    """
    home = sys.modules[type(attention).__module__]
    if not hasattr(home, "apply_rotary_pos_emb"):
        return _mrope_rotation(attention, home)
    rotate = home.apply_rotary_pos_emb
    place = inspect.signature(rotate).parameters.get("position_ids")
    by_table = place is not None and place.default is place.empty
    return partial(_rotated_by_table, rotate) if by_table else rotate


def _mrope_rotation(attention: nn.Module, home: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Qwen2-VL and Qwen2.5-VL before transformers 5.20."""
    if not hasattr(home, "apply_multimodal_rotary_pos_emb"):
        raise MissingSignalError(f"how {type(attention).__name__} turns queries and keys by position is not known")
    sections = attention.config.rope_parameters["mrope_section"]
    return partial(home.apply_multimodal_rotary_pos_emb, mrope_section=sections)


def _rotated_by_table(rotate: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """``rotate`` of transformers 4.37, which looks cosines and sines up in a table of positions."""
    places = torch.arange(cos.shape[:2].numel(), device=cos.device).view(cos.shape[:2])
    return rotate(q, k, cos.flatten(0, 1), sin.flatten(0, 1), places)


# ------------------------------------------------------------------------------------------------------ the vision side

HEADS = "num_heads"
"""Number of query heads of a vision tower's attention."""
EARLY_FEATURES = "mm_encoder_outputs"
"""The argument with outputs of the encoder methods by kind of picture, where ``generate()`` calls these before the
model.
"""
FEATURES = "pooler_output"
"""What an encoder method's output calls the features on their way into the decoder; it has none where it is a tuple."""

CLIP_BLOCKS = ("CLIPEncoderLayer", "SiglipEncoderLayer")
VIT_BLOCKS = ("ViTLayer",)
DINOV2_BLOCKS = ("Dinov2Layer", "Dinov2WithRegistersLayer")
"""Class names of vision transformers' blocks, by how attention and MLP are told apart in them."""

RESIZE_POSITIONS = "interpolate_pos_encoding"
"""The argument that lets a vision tower take pictures of another size than it was trained on."""


IMAGE_ENCODER, VIDEO_ENCODER = "get_image_features", "get_video_features"


def as_output(values: Any) -> Any:
    """An encoder method's output that holds nothing but features."""
    return types.SimpleNamespace(pooler_output=values)


def packed(model: nn.Module, views: Sequence[Tensor], sizes: Any, newline: Tensor, **how: Any) -> list[Tensor]:
    """LLaVA's own layout of AnyRes features ``[(V, n, C)] -> [(length, C)]``; ``how``: the family's further
    arguments.
    """
    return model.pack_image_features(views, sizes, image_newline=newline, **how)[0]


def pooled_frames(model: nn.Module, frames: Tensor) -> Tensor:
    """LLaVA-OneVision's smaller grid of video frames: ``(F, n, C) -> (F, m, C)``."""
    return model.apply_pooling(frames)


def anyres_canvas(
    height: int, width: int, pinpoints: Sequence[Sequence[int]], view: int, side: int
) -> tuple[Tensor, int, int]:
    """Where the rows of an unpadded AnyRes picture are on its canvas of crops, and how many crops that has.

    Returns:
        ``(rows, cols)`` places, row-major on the canvas of ``down side x across side`` patches; down; across.
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    down, across = get_anyres_image_grid_shape((height, width), [list(p) for p in pinpoints], view)
    canvas = torch.arange(down * side * across * side).view(1, down * side, across * side)
    return unpad_image(canvas, (height, width))[0], down, across


def window_order(tower: nn.Module, grid_thw: Tensor) -> Tensor:
    """Qwen2.5-VL's permutation: position p of the tower's sequence holds merge unit ``order[p]``."""
    from transformers.vision_utils import get_vision_window_index

    return get_vision_window_index(
        grid_thw,
        spatial_merge_size=tower.spatial_merge_size,
        window_size=tower.window_size,
        patch_size=tower.patch_size,
        kwargs={},
    )[0]


def tower_rotation(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """``rotate(q, k, cos, sin)`` of a Qwen vision tower.

    Raises:
        MissingSignalError: its module has none.
    """
    home = sys.modules[type(attention).__module__]
    if not hasattr(home, "apply_rotary_pos_emb_vision"):
        raise MissingSignalError(f"how {type(attention).__name__} turns queries and keys by position is not known")
    return home.apply_rotary_pos_emb_vision


def segments(kwargs: Mapping[str, Any]) -> list[int]:
    """Bounds of the pictures (or windows) in a packed vision tower's sequence."""
    return _argument(kwargs, "cu_seqlens").tolist()


def tower_rotary(kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The cosines and sines that a block of a Qwen vision tower gets."""
    return _argument(kwargs, "position_embeddings")


def _argument(kwargs: Mapping[str, Any], name: str) -> Any:
    if kwargs.get(name) is None:
        raise not_understood(f"attention in the vision tower is called without {name}: {', '.join(kwargs)}")
    return kwargs[name]


# --------------------------------------------------------------------------------------------------- loading and
# settings


def attention_kind(config: Any) -> str | None:
    """The attention implementation that a configuration asks for."""
    return getattr(config, "_attn_implementation", None)


def set_attention_kind(config: Any, kind: str) -> None:
    """Ask for an attention implementation, of a model that has not been built."""
    config._attn_implementation = kind


def find_file(config: Any, name: str) -> str | None:
    """Path of a file beside the weights that a configuration was loaded with; None if it is neither there nor
    cached.
    """
    from transformers.utils import cached_file  # pyright: ignore[reportPrivateImportUsage]

    source = getattr(config, "_name_or_path", "")
    try:
        return cached_file(source, name, local_files_only=True) if source else None
    except OSError:
        return None
