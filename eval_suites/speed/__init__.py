"""Time methods: inside decoders and vision towers, behind a server, kernel by kernel (``foveate speed PART``)."""

from __future__ import annotations

import argparse
import importlib

PARTS = {
    "decoder": "methods inside the decoder beside the unpruned model and random choice of as many tokens per layer",
    "vit": "methods inside vision towers beside the unmodified timm model and the ceiling of their token counts",
    "serving": "a vLLM engine with a method against vLLM as it comes, at several numbers of users",
    "kernels": "every operation against its plain torch forms and against what the hardware allows",
}
"""Module of this package -> what it times. It has ``add_arguments(parser)`` and ``main(args)``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foveate speed``: a sub-command per part."""
    parts = parser.add_subparsers(metavar="PART", required=True)
    for name, what in PARTS.items():
        module = importlib.import_module(f"{__name__}.{name}")
        part = parts.add_parser(name, help=what, description=f"Time {what}.")
        module.add_arguments(part)
        part.set_defaults(time_part=module.main)


def main(args: argparse.Namespace) -> int:
    """Run ``foveate speed``; 0.

    Raises:
        FoveateError: bad input, before anything has run.
    """
    return args.time_part(args)
