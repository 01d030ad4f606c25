"""These tests need an environment with vLLM: `make test-vllm` builds one. Elsewhere none is collected."""

from __future__ import annotations

import importlib.metadata

try:
    importlib.metadata.version("vllm")  # not an import: this folder has the same name
except importlib.metadata.PackageNotFoundError:
    collect_ignore_glob = ["test_*.py"]
