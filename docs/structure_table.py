"""How much there is to read between `attach` and an answer: functions and files entered, lengths of files.

    python docs/structure_table.py                 # this checkout
    python docs/structure_table.py --before 3de8ede   # and a commit beside it

Counted are functions with a name of their own (no lambdas, no comprehensions, nothing that dataclasses write) that a
tiny LLaVA runs through from `foveate.attach(model, HiPrune())` to the second token of an answer: attach, one picture
and a question, two tokens. Lines are those of all Python files that `pip install` installs.
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("hiprune", "transprune")
WALK = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import foveate, torch, transformers
from foveate.eval_suites.tiny import inputs, picture, tiny
foveate.attach
root = os.path.dirname(os.path.dirname(os.path.abspath(foveate.__file__)))
found = {}
for method in sys.argv[1:]:
    model, given = tiny("llava"), inputs("llava", [[3, picture("llava", 1), 8]])
    entered, pruner = set(), foveate.find(method)()

    def note(frame, event, argument):
        code = frame.f_code
        ours = code.co_filename.startswith(root) and "site-packages" not in code.co_filename
        if event == "call" and ours and not code.co_name.startswith("<"):
            entered.add((os.path.relpath(code.co_filename, root), code.co_name, code.co_firstlineno))

    sys.setprofile(note)
    session = foveate.attach(model, pruner)
    with torch.no_grad():
        model.generate(**given, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    sys.setprofile(None)
    session.detach()
    entered = [one for one in entered if "/tiny.py" not in one[0]]
    found[method] = {"functions": len(entered), "files": sorted({file for file, *_ in entered})}
print(json.dumps(found))
"""


def measure(root: Path) -> dict[str, Any]:
    """The numbers of one checkout, by name."""
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    walked = subprocess.run(
        [sys.executable, "-c", WALK, *METHODS], env=env, cwd=root, capture_output=True, text=True, check=True
    )
    rows: dict[str, Any] = {}
    for method, found in json.loads(walked.stdout.splitlines()[-1]).items():
        rows[f"{method}: functions entered"] = found["functions"]
        rows[f"{method}: files entered"] = len(found["files"])
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    folders = [line.split("=")[1].strip() for line in setup["options"]["package_dir"].strip().splitlines()]
    installed = [file for folder in folders for file in sorted((root / folder).glob("*.py"))]
    methods = {file: lines(file) for file in (root / "pruners").glob("*.py") if "\n@register(" in file.read_text()}
    scoring = [n for file, n in methods.items() if re.search(r"^class \w+\(Scorer\)", file.read_text(), re.MULTILINE)]
    rows["method files: median lines"] = int(statistics.median(methods.values()))
    rows["method files: largest"] = max(methods.values())
    rows["method files: smallest that only scores"] = min(scoring, default=None)
    rows["families: lines each"] = ", ".join(
        f"{file.stem} {lines(file)}"
        for file in sorted((root / "adapters" / "families").glob("*.py"))
        if lines(file) > 1
    )
    for room in ("foveate", "pruners", "adapters", "cuda", "eval_suites", "demo"):
        rows[f"installed lines: {room}"] = sum(
            lines(file) for file in installed if file.relative_to(root).parts[0] == room
        )
    rows["installed lines"] = sum(map(lines, installed))
    return rows


def lines(file: Path) -> int:
    """Lines of a file."""
    return len(file.read_text(encoding="utf-8").splitlines())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", metavar="COMMIT", help="measure this commit too")
    args = parser.parse_args()
    after = measure(ROOT)
    if args.before is None:
        print("| | now |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in after.items()), sep="\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(tree), args.before], check=True
        )
        try:
            before = measure(tree)
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)
    print("| | before | after |", "| --- | --- | --- |", sep="\n")
    for name, value in after.items():
        print(f"| {name} | {before[name] if before[name] not in ('', None) else 'none'} | {value} |")


if __name__ == "__main__":
    main()
