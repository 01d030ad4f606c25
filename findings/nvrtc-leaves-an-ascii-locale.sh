#!/usr/bin/env bash
# NVRTC 12.4 (nvidia-cuda-nvrtc-cu12 12.4.127, Linux x86-64): compiling a kernel leaves the calling thread with an ASCII locale.
#
# One would guess that a compiler in a library gives the caller's locale back. Really the thread stays in the C locale, while
# setlocale() still answers what the process had: whatever opens a text file afterwards without saying how it is encoded reads
# and writes ASCII. No GPU is needed to see it. NVRTC 12.6.77 does not do it.
#
# Prints the versions and what was seen; fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
cat > "$folder/see.py" <<'PYTHON'
import ctypes
import locale
import pathlib
import sys

locale.setlocale(locale.LC_ALL, "C.UTF-8")
library = ctypes.CDLL(str(next(pathlib.Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so*"))))
major, minor = ctypes.c_int(), ctypes.c_int()
library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
before = locale.nl_langinfo(locale.CODESET)
program = ctypes.c_void_p()
kernel = b'extern "C" __global__ void one(float* x) { x[0] = 1; }'
assert library.nvrtcCreateProgram(ctypes.byref(program), kernel, b"one.cu", 0, None, None) == 0
options = (ctypes.c_char_p * 1)(b"--gpu-architecture=compute_80")
assert library.nvrtcCompileProgram(program, 1, options) == 0
after = locale.nl_langinfo(locale.CODESET)
print(f"NVRTC {major.value}.{minor.value}: text is {before} before compiling, {after} afterwards;", end=" ")
print("setlocale() says", locale.setlocale(locale.LC_ALL))
sys.exit(after != sys.argv[1])
PYTHON
for pair in 12.4.127=ANSI_X3.4-1968 12.6.77=UTF-8; do
  "$folder/env/bin/python" -m pip install --quiet --no-deps "nvidia-cuda-nvrtc-cu12==${pair%=*}"
  "$folder/env/bin/python" "$folder/see.py" "${pair#*=}"
done
