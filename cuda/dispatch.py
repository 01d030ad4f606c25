"""From an operation's public function to the code that runs it.

Every operation is one torch operator, ``torch.ops.foveate.<name>``, with the same meaning on every device, a fake
implementation for ``torch.compile``, and two bodies: a torch reference for any device and CuPy kernels for CUDA.

The environment variable ``FOVEATE_KERNELS`` chooses the body, call by call:

- ``auto`` (default): kernels on CUDA tensors. Where there are none (no CuPy, an old GPU, a geometry they were not
  written for) the reference answers, after one warning per reason, and one in all if kernels cannot be loaded;
- ``torch``: the reference;
- ``cupy``: kernels, or :class:`~foveate.errors.ParameterError`.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.errors import ParameterError

_MODES = ("auto", "cupy", "torch")
_LIBRARY = torch.library.Library("foveate", "DEF")
_reported: set[str] = set()

# 32 MiB of float32. glibc takes blocks of at least this size from the system and gives them back. Smaller blocks of a
# loop may be laid one after the other, so that all of them together stay in memory.
_BLOCK_ELEMENTS = 1 << 23


def rows_at_once(elements: int) -> int:
    """Rows of ``elements`` float32 values that fill one block: how much of a map of pairs a reference holds at once."""
    return -(-_BLOCK_ELEMENTS // max(1, elements))


class KernelUnavailable(Exception):
    """There is no kernel for this call; the message says why. Never leaves foveate.cuda."""


class NoKernels(KernelUnavailable):
    """Kernels cannot be compiled or loaded: no CuPy, compiler or fitting driver. What stops one mostly stops all."""


def operation(
    schema: str, *, kernel: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Callable[..., Any]]:
    """Decorate a torch reference: make it the operator ``foveate::<schema>`` and return what calls that.

    Args:
        schema: as for ``torch.library.define``, all arguments positional and without defaults, the first a tensor.
        kernel: same arguments and results as the reference, for CUDA tensors; may raise :class:`KernelUnavailable`.
        fake: same arguments; returns empty tensors of the right shape, dtype and device.

    The reference runs in full precision: without autocast, and without TF32 on a GPU. Inputs that need a gradient go
    straight to it, since torch can differentiate it.
    """

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        reference = full_precision(reference)

        def run(*args: Any) -> Any:
            device = args[0].device
            forced = _wanted(device)
            if forced is None:
                return reference(*args)
            others = [arg.device for arg in args[1:] if isinstance(arg, Tensor)]
            if any(other != device for other in others):  # a kernel would read there what is here
                raise ParameterError(f"{name} got tensors on {device} and {others}; move them to one device")
            try:
                return kernel(*args)
            except KernelUnavailable as reason:
                if forced:
                    raise ParameterError(
                        f"FOVEATE_KERNELS=cupy, but {name} has no kernel here: {reason}; set FOVEATE_KERNELS=auto"
                    ) from reason
                _report(reason)
                return reference(*args)

        _LIBRARY.define(schema)
        # one body for all devices: where to run is decided inside, so that it can change from call to call
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"foveate::{name}", fake, lib=_LIBRARY)
        operator = getattr(torch.ops.foveate, name).default

        def call(*args: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
                return reference(*args)
            if args[0].device.type != "cpu" or torch.compiler.is_compiling():
                return operator(*args)
            return run(*args)  # the way through torch's dispatcher takes longer than a small operation

        return call

    return register


def full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``function`` without autocast, and on a GPU without TF32.

    Its arguments are positional, and the first is a tensor.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        device = args[0].device.type
        if device != "cuda":
            if not torch.is_autocast_enabled(device):  # leaving it takes longer than many a statistic
                return function(*args)
            with torch.autocast(device, enabled=False):
                return function(*args)
        products = torch.backends.cuda.matmul
        # where torch has the newer of its two settings, reading the older one may fail
        setting, exact = ("fp32_precision", "ieee") if hasattr(products, "fp32_precision") else ("allow_tf32", False)
        before = getattr(products, setting)
        setattr(products, setting, exact)
        try:
            with torch.autocast(device, enabled=False):
                return function(*args)
        finally:
            setattr(products, setting, before)

    return run


def _wanted(device: torch.device) -> bool | None:
    """None: the reference; True: kernels and nothing else; False: kernels if there are any."""
    mode = os.environ.get("FOVEATE_KERNELS", "auto")
    if mode not in _MODES:
        raise ParameterError(f"FOVEATE_KERNELS={mode!r} is unknown; use one of {', '.join(_MODES)}")
    if mode == "torch":
        return None
    if _has_kernels(device):
        return mode == "cupy"
    if mode == "cupy":
        raise ParameterError(
            f"FOVEATE_KERNELS=cupy, but the tensors are on {device.type}, where no CuPy kernel runs; move them to an "
            "NVIDIA GPU or set FOVEATE_KERNELS=auto"
        )
    return None


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _report(reason: KernelUnavailable) -> None:
    what = NoKernels.__name__ if isinstance(reason, NoKernels) else str(reason)
    if what not in _reported:
        _reported.add(what)
        warnings.warn(f"foveate runs on plain torch, slower, with the same results: {reason}", stacklevel=2)
