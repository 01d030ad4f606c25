"""What a result needs beside it to be repeated, and its times to be judged."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib
import importlib.metadata
import os
import platform
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import foveate
from foveate.adapters import compat
from foveate.cuda.hardware import processor

__all__ = ["environment", "machine", "version_of"]


def environment(model: torch.nn.Module) -> dict[str, Any]:
    """Versions, commit, hardware, and how ``model`` was loaded."""
    return {
        **machine(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "model_class": type(model).__name__,
        "revision": getattr(model.config, "_commit_hash", None),
        "attention": compat.attention_kind(model.config),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Versions, commit and hardware."""
    cpu, threads = processor(), torch.get_num_threads()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "foveate": foveate.__version__,
        **_commit(),
        "source_sha256": _source(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "hardware": gpu or f"{cpu}, {threads} thread{'s' * (threads != 1)}",
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "gpu": gpu,
        "device": device.type,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def version_of(package: str) -> str | None:
    """The installed version of a package (by its name in the index); None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source() -> str:
    """Digest of the code that decides about results (recipes of training do not), so that a changed checkout shows."""
    digest = hashlib.sha256()
    for part in ("adapters", "cuda", "eval_suites", "pruners"):
        folder = Path(importlib.import_module(f"foveate.{part}").__file__).parent
        sources = (path for path in folder.rglob("*") if path.suffix in (".py", ".cu", ".cuh"))
        for path in sorted(path for path in sources if "training" not in path.relative_to(folder).parts):
            digest.update(f"{part}/{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _commit() -> dict[str, Any]:
    """The commit of a source checkout, and whether files differ from it; None where foveate is installed otherwise."""
    root = Path(foveate.__file__).resolve().parent.parent
    commands = (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if (root / ".git").exists():
            git = partial(subprocess.run, capture_output=True, text=True, check=True)
            head, changes = (git(["git", "-C", str(root), *command]).stdout.strip() for command in commands)
            return {"commit": head, "modified": bool(changes)}
    return {"commit": None, "modified": None}
