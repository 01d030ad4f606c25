"""``make types``: pyright over everything that is imported as ``foveate``, as pyproject.toml sets it up.

The folders stand at the repository root and are installed below ``foveate`` (setup.cfg), which no setting of pyright
says. So it reads links to the files, in build/typed, that lie as an installation would. What it prints names the files
themselves.
"""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKS = ROOT / "build" / "typed"


def folders() -> dict[str, str]:
    """Folder at the root -> where it is installed, as a path: ``foveate`` and what lies directly below it."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["package_dir"].strip().splitlines()
    mapped = [(folder.strip(), name.strip()) for name, folder in (line.split("=") for line in lines)]
    return {folder: name.replace(".", "/") for folder, name in mapped if "/" not in folder}


def link() -> None:
    """Make the links anew, so that none is left of a file that is gone."""
    shutil.rmtree(LINKS, ignore_errors=True)
    for folder, installed in folders().items():
        shutil.copytree(
            ROOT / folder,
            LINKS / installed,
            copy_function=os.symlink,
            ignore=shutil.ignore_patterns("__pycache__"),
            dirs_exist_ok=True,
        )


def main() -> int:
    link()
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, *sys.argv[1:]],
        cwd=ROOT,
        env=os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},  # of newer releases: setup.cfg pins one
        stdout=subprocess.PIPE,
        text=True,
    )
    said = done.stdout
    for folder, installed in sorted(folders().items(), key=lambda pair: -len(pair[1])):
        said = said.replace(f"{LINKS / installed}{os.sep}", f"{folder}/")
    print(said, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
