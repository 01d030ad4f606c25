"""Load the model to be measured: the embedded one, a folder, or a name on the hub."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foveate.errors import FoveateError, ParameterError, nearest
from foveate.eval_suites import suites
from foveate.eval_suites.terminal import one_line

__all__ = ["EMBEDDED", "Loaded", "add_arguments", "check_folder", "digest", "load", "source"]

EMBEDDED = {"shapes-llava": "shapes", "shapes-next": "shapes", "shapes-qwen": "screens"}
"""Name -> the suite it was trained on, in whose folder it lies."""
DTYPES = ("float32", "bfloat16", "float16")

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PROCESSOR = ("processor_config.json", "preprocessor_config.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with its processor, which pads on the left.

    Attributes:
        name: as the user gave it.
        weights_sha256: of the weights file (of all, one after the other, where there are several); None if not read
            from files.
    """

    model: Any
    processor: Any
    name: str
    weights_sha256: str | None = None


def load(name: str | os.PathLike[str], device: str | None = None, dtype: str | None = None) -> Loaded:
    """Load a model and its processor.

    Args:
        name: one of ``EMBEDDED``, a folder in the ``transformers`` format, or the name of a model on the hub.
        device: a torch device; default: CUDA where there is one.
        dtype: one of ``DTYPES``; default: float32 on a CPU, that of the checkpoint elsewhere.

    Raises:
        ParameterError: unusable ``device`` or ``dtype``.
        FoveateError: no such model, or a folder that is incomplete or damaged; the message says what is missing.
    """
    if dtype not in (None, *DTYPES):
        raise ParameterError(f"unknown dtype {dtype!r}; {nearest(dtype, DTYPES)}")
    where = find_device(device)
    number_type = getattr(torch, dtype) if dtype else torch.float32 if where.type == "cpu" else "auto"
    name = os.fspath(name)
    folder = source(name)
    if os.path.isdir(folder):
        check_folder(folder)
    model, processor = _from_pretrained(name, folder, number_type)
    return Loaded(model.to(where).eval(), processor, name, digest(name))


def digest(name: str) -> str | None:
    """SHA-256 of the weights of the model called ``name``; None if there are no files."""
    digest, files = hashlib.sha256(), _weight_files(source(name))
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() if files else None


def source(name: str) -> str:
    """The folder that ``name`` stands for, or ``name`` itself where it can only be a name on the hub.

    Raises:
        FoveateError: neither, a file, or an embedded model that is not there.
    """
    if name in EMBEDDED:
        folder = str(Path(suites.__file__).parent / EMBEDDED[name] / name)
        if not os.path.isdir(folder):
            raise FoveateError(
                f"the embedded model {name!r} is not at {folder}; install foveate again, or train it in a checkout "
                f"with `python -m foveate.eval_suites.training.{name.replace('-', '_')} --out {folder}`"
            )
        return folder
    if os.path.isdir(name):
        return name
    if os.path.exists(name):
        raise FoveateError(f"model {name!r} is a file; give the folder that holds config.json and the weights")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise FoveateError(
        f"no model {name!r}: there is no such folder, and a name on the hub has the form OWNER/NAME; "
        f"{nearest(name, EMBEDDED)}"
    )


def _from_pretrained(name: str, source: str, dtype: torch.dtype | str) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, output_loading_info=True)
        model, report = loaded
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError, … alike
        raise FoveateError(
            f"model {name!r} cannot be loaded: {one_line(error)}; check the name or the folder, and that it is a "
            "vision-language model which transformers knows"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise FoveateError(
            f"model {name!r}: its weights lack {len(missing)} tensors that its config.json asks for (first: "
            f"{missing[0]}); download it again"
        )
    if not hasattr(processor, "tokenizer"):
        raise FoveateError(
            f"model {name!r} comes with a {type(processor).__name__}, which does not process pictures and text "
            "together; add the processor's files to the folder"
        )
    processor.tokenizer.padding_side = "left"
    return model, processor


# ---------------------------------------------------------------------------------------------------- what is on disk


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Look whether a checkpoint folder is complete, without loading it.

    Raises:
        FoveateError: a file is missing or cut short; the message names it.
    """
    folder = Path(folder)
    _json(folder / "config.json")
    for what, names in (("the processor's configuration", _PROCESSOR), ("the tokenizer", _TOKENIZER)):
        if not any((folder / name).is_file() for name in names):
            raise _incomplete(folder, f"{what} is missing ({' or '.join(names)})")
    if (folder / _INDEX).is_file():
        for shard in sorted(set(_json(folder / _INDEX).get("weight_map", {}).values())):
            _check_safetensors(folder / shard)
    elif (folder / _WEIGHTS).is_file():
        _check_safetensors(folder / _WEIGHTS)
    elif not any(folder.glob("*.bin")):
        raise _incomplete(folder, f"the weights are missing ({_WEIGHTS} or {_INDEX})")


def _incomplete(folder: Path, what: str) -> FoveateError:
    return FoveateError(f"checkpoint folder {folder}: {what}; copy or download the folder again")


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _incomplete(path.parent, f"{path.name} is missing") from None
    except ValueError:
        raise _incomplete(path.parent, f"{path.name} is cut short or damaged") from None


def _check_safetensors(path: Path) -> None:
    """Read the header, whose places of tensors have to cover the rest of the file exactly."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise _incomplete(path.parent, f"{path.name} is missing")
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        said = f"{path.name} ({path.stat().st_size} bytes) is cut short or is not a safetensors file ({error})"
        raise _incomplete(path.parent, said) from None


def _weight_files(source: str) -> list[Path]:
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(source, "config.json")
        if not isinstance(config, str):
            return []
        folder = Path(config).parent
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


# -------------------------------------------------------------------------------------------------------- parameters


def find_device(device: str | None) -> torch.device:
    """The device called so; None: CUDA where there is one.

    Raises:
        ParameterError: it cannot be used here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ParameterError(f"device={device!r} cannot be used here ({reason}); try 'cpu'") from None
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of commands that load a model: ``device`` and ``dtype`` of :func:`load`."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    help_ = "default: float32 on a CPU, that of the checkpoint elsewhere"
    parser.add_argument("--dtype", choices=DTYPES, help=help_)
