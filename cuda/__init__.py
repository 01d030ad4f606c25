"""Similarity and attention statistics: one public function per operation, with the same result on every device."""

from __future__ import annotations

import importlib
from typing import Any

# When the repository root is on sys.path, torch and CuPy find this folder first as they look for NVIDIA's `cuda`
# namespace package. So it lends them its path, and imports nothing of its own before it is asked to.
__path__ = __import__("pkgutil").extend_path(__path__, __name__)

_HOME = {
    "best_match": "merging",
    "class_attention": "attention",
    "conditional_dpp": "selection",
    "core_neurons": "neurons",
    "diverse_subset": "selection",
    "gather_tokens": "gather",
    "given_attention": "attention",
    "match_counts": "neurons",
    "merge_tokens": "merging",
    "neuron_counts": "neurons",
    "received_attention": "attention",
    "rows_to_columns_attention": "attention",
    "run_mean": "gather",
    "similarity_energy": "merging",
    "transition_score": "transitions",
    "warmup": "preload",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"foveate.cuda.{_HOME[name]}"), name)
