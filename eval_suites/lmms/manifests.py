"""What the entry point group ``lmms_eval.models`` announces: names of models, and where their classes are.

lmms-eval reads it at every start, so nothing heavy is imported here.
"""

from __future__ import annotations

from typing import Any

__all__ = ["CLASSES", "MODELS", "manifests"]

CLASSES = {
    "foveate_llava_hf": {"chat": "LlavaHfChat", "simple": "LlavaHf"},
    "foveate_llava_onevision": {"chat": "LlavaOnevisionChat", "simple": "LlavaOnevision"},
    "foveate_qwen2_5_vl": {"chat": "Qwen25VLChat"},
    "foveate_qwen3_vl": {"chat": "Qwen3VLChat"},
}
"""Name -> classes of :mod:`foveate.eval_suites.lmms.models`; without Qwen's simple class, which re-encodes as JPEG."""

MODELS = {
    "llava": "foveate_llava_hf",
    "llava_next": "foveate_llava_hf",
    "llava_onevision": "foveate_llava_onevision",
    "qwen2_5_vl": "foveate_qwen2_5_vl",
    "qwen3_vl": "foveate_qwen3_vl",
}
"""``model_type`` of a checkpoint's configuration -> name of the model in lmms-eval."""


def manifests() -> list[Any]:
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    home = "foveate.eval_suites.lmms.models"
    return [
        ModelManifest(model_id=name, **{f"{kind}_class_path": f"{home}.{cls}" for kind, cls in classes.items()})
        for name, classes in CLASSES.items()
    ]
