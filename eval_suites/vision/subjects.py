"""Models of three libraries, read in one way: pixels in, the features a user reads out, and words if there are any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from foveate.adapters import compat
from foveate.errors import FoveateError, ParameterError
from foveate.eval_suites.terminal import one_line
from foveate.eval_suites.vision import EMBEDDED, MODEL_PATH


@dataclass(frozen=True)
class Subject:
    """A vision model.

    Attributes:
        name: as the user gave it.
        model: what a method is attached to.
        prepare: pictures to pixels ``(B, 3, H, W)``, as the model was trained to see them.
        final: pixels to what a user reads of a picture, ``(B, C)``: features, or logits where ``classifies``.
        rows: the module whose output are the tower's last rows ``(B, N, C)``.
        encode: texts to features ``(M, C)`` that compare with ``final``'s by cosine; None without a text encoder.
        labels: for every logit the names that its class goes by; empty if the model does not say.
    """

    name: str
    model: nn.Module
    prepare: Callable[[Sequence[Image.Image]], Tensor]
    final: Callable[[Tensor], Tensor]
    rows: nn.Module
    encode: Callable[[Sequence[str]], Tensor] | None = None
    classifies: bool = False
    labels: Sequence[Sequence[str]] = ()


def load(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Subject:
    """Load a model by name.

    Args:
        name: one of :data:`EMBEDDED`, ``timm/NAME[:WEIGHTS]``, ``open_clip/NAME:WEIGHTS``, ``hf/OWNER/NAME`` or a
            folder in the ``transformers`` format. WEIGHTS is a tag that the library knows, a checkpoint file, or
            ``random``; timm's own pre-trained weights are the default.

    Raises:
        FoveateError: the library is not installed, or knows no such model or weights.
    """
    library, _, rest = name.partition("/")
    try:
        if name in EMBEDDED:
            return _embedded(name, device, dtype)
        if library == "timm":
            return _timm(name, rest, device, dtype)
        if library == "open_clip":
            return _open_clip(name, rest, device, dtype)
        return _transformers(name, rest if library == "hf" else name, device, dtype)
    except FoveateError:
        raise
    except ImportError as error:
        raise FoveateError(f"model {name!r} needs {error.name}: pip install 'foveate[vit]'") from error
    except Exception as error:  # each library has errors of its own for names, networks and files
        raise FoveateError(f"model {name!r} cannot be loaded: {one_line(error)}") from error


def _embedded(name: str, device: torch.device, dtype: torch.dtype) -> Subject:
    subject = _transformers(name, str(MODEL_PATH), device, dtype)
    if name == "shapes-clip":
        return subject
    from foveate.eval_suites.vision import formats

    clip = subject.model
    if name.endswith("timm"):
        model = formats.to_timm(clip)  # its text encoder stays a module of transformers
        return Subject(name, model, subject.prepare, model, model.norm, subject.encode)
    model = formats.to_open_clip(clip)
    tokenizer, length = _tokenizer(MODEL_PATH), clip.config.text_config.max_position_embeddings

    def encode(texts: Sequence[str]) -> Tensor:
        ids = tokenizer(list(texts), padding="max_length", max_length=length, return_tensors="pt")["input_ids"]
        return model.encode_text(ids.to(device))

    return Subject(name, model, subject.prepare, model.encode_image, model.visual.transformer, encode)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _timm(name: str, rest: str, device: torch.device, dtype: torch.dtype) -> Subject:
    import timm

    which, _, weights = rest.partition(":")
    file = weights if weights not in ("", "pretrained", "random") else ""
    model = timm.create_model(which, pretrained=not file and weights != "random", checkpoint_path=file)
    model = model.to(device, dtype).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    prepare = _stacked(transform, device, dtype)
    rows = getattr(model, "norm", None)
    subset = None if file else timm.data.infer_imagenet_subset(model)  # a file's classes are anybody's
    labels: list[tuple[str, str]] = []
    if subset is not None:
        info = timm.data.ImageNetInfo(subset)
        labels = list(zip(info.label_names(), info.label_descriptions()))
    classifies = bool(model.num_classes)
    return Subject(name, model, prepare, model, rows or model, classifies=classifies, labels=labels)


def _open_clip(name: str, rest: str, device: torch.device, dtype: torch.dtype) -> Subject:
    import open_clip

    which, _, weights = rest.partition(":")
    if not weights:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(which)) or "none"
        raise ParameterError(f"{name}: say which weights, as in {name}:TAG (known: {tags}; or a file, or random)")
    given = None if weights == "random" else weights
    model, _, transform = open_clip.create_model_and_transforms(which, pretrained=given)
    model, tokenizer = model.to(device, dtype).eval(), open_clip.get_tokenizer(which)
    visual = model.visual
    rows = visual.transformer if hasattr(visual, "transformer") else getattr(visual.trunk, "norm", visual.trunk)

    def encode(texts: Sequence[str]) -> Tensor:
        return model.encode_text(tokenizer(list(texts)).to(device))

    return Subject(name, model, _stacked(transform, device, dtype), model.encode_image, rows, encode)


def _stacked(transform: Callable[[Image.Image], Tensor], device: torch.device, dtype: torch.dtype) -> Any:
    return lambda pictures: torch.stack([transform(picture) for picture in pictures]).to(device, dtype)


def _transformers(name: str, source: str, device: torch.device, dtype: torch.dtype) -> Subject:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

    classifies = any(
        "ForImageClassification" in kind for kind in AutoConfig.from_pretrained(source).architectures or ()
    )
    auto = AutoModelForImageClassification if classifies else AutoModel
    model, report = auto.from_pretrained(source, dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:  # they would be random numbers
        raise FoveateError(f"model {name!r}: its weights lack {len(report['missing_keys'])} tensors; download it again")
    model, processor = model.to(device).eval(), AutoImageProcessor.from_pretrained(source)
    tower = model.vision_model if hasattr(model, "vision_model") else getattr(model, "vit", model)
    holder = getattr(tower, "encoder", tower)
    rows = getattr(tower, "layernorm", None) or (holder.layer if hasattr(holder, "layer") else holder.layers)[-1]

    def prepare(pictures: Sequence[Image.Image]) -> Tensor:
        return processor(list(pictures), return_tensors="pt")["pixel_values"].to(device, dtype)

    def final(pixels: Tensor) -> Tensor:
        if classifies:
            return model(pixels).logits
        pooled = model.get_image_features(pixels) if hasattr(model, "text_model") else model(pixels)
        return pooled if isinstance(pooled, Tensor) else getattr(pooled, compat.FEATURES)

    encode: Callable[[Sequence[str]], Tensor] | None = None
    if hasattr(model, "text_model"):
        tokenizer = _tokenizer(source)
        padding = "max_length" if model.config.model_type == "siglip" else True  # as SigLIP was trained

        def encoded(texts: Sequence[str]) -> Tensor:
            ids = tokenizer(list(texts), padding=padding, truncation=True, return_tensors="pt").to(device)
            found = model.get_text_features(**ids)
            return found if isinstance(found, Tensor) else getattr(found, compat.FEATURES)

        encode = encoded

    named = model.config.id2label if classifies else {}
    return Subject(name, model, prepare, final, rows, encode, classifies, [(named[i],) for i in range(len(named))])
