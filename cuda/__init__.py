"""Similarity and attention statistics: one public function per operation, with the same result on every device."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.cuda.attention import class_attention as class_attention
    from foveate.cuda.attention import given_attention as given_attention
    from foveate.cuda.attention import received_attention as received_attention
    from foveate.cuda.attention import rows_to_columns_attention as rows_to_columns_attention
    from foveate.cuda.gather import gather_tokens as gather_tokens
    from foveate.cuda.gather import run_mean as run_mean
    from foveate.cuda.merging import best_match as best_match
    from foveate.cuda.merging import merge_tokens as merge_tokens
    from foveate.cuda.merging import similarity_energy as similarity_energy
    from foveate.cuda.neurons import core_neurons as core_neurons
    from foveate.cuda.neurons import match_counts as match_counts
    from foveate.cuda.neurons import neuron_counts as neuron_counts
    from foveate.cuda.preload import warmup as warmup
    from foveate.cuda.selection import conditional_dpp as conditional_dpp
    from foveate.cuda.selection import diverse_subset as diverse_subset
    from foveate.cuda.transitions import transition_score as transition_score

# When the repository root is on sys.path, torch and CuPy find this folder first when they look for NVIDIA's `cuda`
# namespace package. So its path includes theirs, and it imports nothing of its own before it is asked to.
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
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]  # the imports above tell type checkers


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"foveate.cuda.{_HOME[name]}"), name)
