"""Run the CUDA kernels of foveate.cuda on the CPU: the launcher's last step, replaced by a host compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import pathlib
import platform
import shutil
import subprocess
import tempfile

import numpy as np
import torch

from foveate.cuda import launch

HEADER = pathlib.Path(__file__).with_name("cuda_on_cpu.h")
MISSING = (
    "needs g++ to compile kernels for the CPU"
    if shutil.which("g++") is None
    else "the shim's fibers are written for x86-64"
    if platform.machine() not in ("x86_64", "AMD64")
    else None
)
FLAGS = ("-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-w")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="foveate-kernels-")


@functools.cache
def library(file: str, kernel: str) -> ctypes.CDLL:
    """One kernel, compiled for the host."""
    text = f'#include "{HEADER}"\n{launch.source(file)}\nCUDA_ON_CPU_KERNEL({kernel})\n'
    stem = pathlib.Path(_folder().name) / hashlib.sha256(text.encode()).hexdigest()[:16]
    stem.with_suffix(".cpp").write_text(text, encoding="utf-8")
    command = ["g++", *FLAGS, "-o", f"{stem}.so", f"{stem}.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(f"{stem}.so")
    loaded.launch.restype = ctypes.c_char_p
    return loaded


def execute(
    file: str,
    kernel: str,
    grid: tuple[int, int, int],
    threads: int,
    values: tuple[np.generic | np.ndarray, ...],
    shared: int,
    device: torch.device,
) -> None:
    """Stands in for ``foveate.cuda.launch._execute``."""
    held = [np.ascontiguousarray(value) for value in values]
    args = (ctypes.c_void_p * len(held))(*(value.ctypes.data for value in held))
    sizes = (ctypes.c_size_t * len(held))(*(value.nbytes for value in held))
    failure = library(file, kernel).launch(
        (ctypes.c_uint * 3)(*grid), ctypes.c_uint(threads), ctypes.c_uint(shared), args, sizes, len(held)
    )
    assert failure is None, f"{kernel}: {failure.decode()}"
