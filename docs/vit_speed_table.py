"""The table of merging speed in docs/vision-transformers.md, from what `foveate speed vit … --out FILE` wrote.

python docs/vit_speed_table.py eval_suites/results/speed_vit.json [BATCH]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(path: str, batch: str = "8") -> None:
    """Print factor and share of the ceiling per model and method."""
    factors: dict[str, dict[str, str]] = {}
    for result in json.loads(Path(path).read_text(encoding="utf-8")):
        for line in result["lines"]:
            if line["batch"] == int(batch) and line["method"] != "unmodified":
                found = factors.setdefault(line["model"], {})
                found[line["method"]] = f"{line['factor']:.2f}x, {line['of_ceiling']:.0%}"
    methods = list(dict.fromkeys(method for found in factors.values() for method in found))
    rows = [[model, *(found.get(method, "") for method in methods)] for model, found in factors.items()]
    for row in (["model", *methods], ["---"] * (len(methods) + 1), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
