"""Compile the ``.cu`` files of this folder through CuPy and launch them on torch tensors.

CuPy only compiles, caches on disk (``CUPY_CACHE_DIR``, by default ``~/.cupy/kernel_cache``) and launches. All memory is
torch's, the stream and device are torch's current ones, and nothing here waits for the GPU, so a launch may be captured
in a CUDA graph once its kernel is loaded (:func:`foveate.cuda.warmup` loads them).
"""

from __future__ import annotations

import collections
import functools
import pathlib
import re
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from foveate.cuda.dispatch import KernelUnavailable, NoKernels
from foveate.errors import AttachError

Argument: TypeAlias = "Tensor | np.generic | np.ndarray | None"

FOLDER = pathlib.Path(__file__).parent
TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
MOST_SHARED = 96 << 10  # bytes of shared memory that a block may ask for on every supported architecture, some to spare
_ALIGNMENT = 16  # bytes that kernels move at a time

launched: collections.deque[str] = collections.deque(maxlen=64)
"""The kernels launched last, for who wants to know what really ran."""


def launch(
    file: str,
    kernel: str,
    grid: tuple[int, int, int],
    threads: int,
    args: tuple[Argument, ...],
    *,
    device: torch.device,
    shared: int = 0,
) -> None:
    """Launch ``kernel``, a name or template instance of ``file``.

    Args:
        args: tensors and None go as pointers, NumPy scalars and structures by value. Their types must be the kernel's:
            ``np.int32`` for int, ``np.int64`` for long long, ``np.float32`` for float.
        shared: bytes of dynamic shared memory.
    """
    if 0 in grid:
        return  # CuPy would launch one block on nothing
    if shared > MOST_SHARED:
        raise KernelUnavailable(f"{kernel} would need {shared} bytes of shared memory, more than {MOST_SHARED}")
    _execute(file, kernel, grid, threads, tuple(_value(arg) for arg in args), shared, device)


def rows(x: Tensor) -> Tensor:
    """``x`` as kernels read it: float32, float16 or bfloat16, and :func:`aligned`."""
    return aligned(x if x.dtype in TYPES else x.float())


def aligned(x: Tensor) -> Tensor:
    """``x`` with rows contiguous and starting at multiples of 16 bytes.

    A copy only where it is not so. The rows of a copy are as long as before, but padded in memory.
    """
    step = _ALIGNMENT // x.itemsize
    if x.stride(-1) == 1 and x.data_ptr() % _ALIGNMENT == 0 and all(s % step == 0 for s in x.stride()[:-1]):
        return x
    width = x.shape[-1]
    padded = x.new_empty(*x.shape[:-1], -(-width // step) * step)[..., :width]
    return padded.copy_(x)


def pointer(x: Tensor | None) -> int:
    """For structures; a plain argument may be the tensor itself."""
    return 0 if x is None else x.data_ptr()


def _value(arg: Argument) -> np.generic | np.ndarray:
    if isinstance(arg, Tensor) or arg is None:
        return np.uint64(pointer(arg))
    if not isinstance(arg, (np.generic, np.ndarray)):
        raise TypeError(f"a kernel's argument is {arg!r}; give its width, as in np.int32({arg!r})")
    return arg


class _Stream:
    """All that CuPy reads of a stream; building its own class costs more than the launch."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


def _execute(
    file: str,
    kernel: str,
    grid: tuple[int, int, int],
    threads: int,
    values: tuple[np.generic | np.ndarray, ...],
    shared: int,
    device: torch.device,
) -> None:
    with torch.cuda.device(device):
        function = _function(file, kernel, device.index)
        if isinstance(function, str):
            raise NoKernels(function)  # a new one each time: one that is kept would keep every caller's tensors
        stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
        function(grid, (threads, 1, 1), values, shared, stream)
        launched.append(kernel)


@functools.cache
def _function(file: str, kernel: str, device: int) -> Any:
    """The loaded kernel, or the reason why there is none, so that a failed compilation is not tried again."""
    if torch.cuda.is_current_stream_capturing():
        raise AttachError(
            f"{kernel} would have to be compiled during CUDA-graph capture; call foveate.cuda.warmup() before"
        )
    try:
        import cupy
    except ImportError as error:
        return f"CuPy is not installed ({error}); pip install 'foveate[cuda13]' or [cuda12]"
    try:
        module = cupy.RawModule(code=source(file), options=("-std=c++17",), name_expressions=(kernel,))
        function = module.get_function(kernel)
        function.max_dynamic_shared_size_bytes = MOST_SHARED  # permission; a launch takes what it needs
        return function.kernel
    # whatever a compiler or driver may raise: every reason is reported by dispatch, none changes results
    except Exception as error:
        return f"{kernel} of {file} does not load: {type(error).__name__}: {error}"


@functools.cache
def source(file: str) -> str:
    """A ``.cu`` file with our own headers put in place: CuPy's disk cache is keyed by the text it is given."""
    return _flatten(FOLDER / file, set())


def _flatten(path: pathlib.Path, seen: set[pathlib.Path]) -> str:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        included = re.match(r'#include "(.+)"', line)
        if included is None:
            lines += [line] if line != "#pragma once" else []
        elif (header := FOLDER / included[1]) not in seen:
            seen.add(header)
            lines.append(_flatten(header, seen))
    return "\n".join(lines) + "\n"
