"""Vision models by themselves: what merging tokens does to features, zero-shot accuracy and image-text retrieval.

``foveate bench`` comes here for models that are not language models (``timm/NAME``, ``open_clip/NAME:WEIGHTS``,
``hf/OWNER/NAME``, folders) and for `shapes-clip`, a CLIP of ``transformers`` trained on captions of the shapes suite's
scenes (`MODEL_PATH`; its data card is the README beside the weights). Importing this module loads neither torch nor
transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["EMBEDDED", "MODEL_PATH", "is_vision_model"]

MODEL_PATH = Path(__file__).parent / "shapes-clip"
EMBEDDED = ("shapes-clip", "shapes-clip:open_clip", "shapes-clip:timm")
"""One set of weights in the forms of three libraries."""
HELD_OUT_SEED = 20_261

_LIBRARIES = ("timm/", "open_clip/", "hf/")
_TYPES = ("clip", "siglip", "vit", "dinov2", "dinov2_with_registers")


def is_vision_model(name: str) -> bool:
    """Whether ``name`` stands for a model that this package measures: a library's, an embedded one, or a folder."""
    if name.startswith(_LIBRARIES) or name in EMBEDDED:
        return True
    try:
        return json.loads((Path(name) / "config.json").read_text(encoding="utf-8")).get("model_type") in _TYPES
    except (OSError, ValueError):
        return False  # whoever loads it will say so
