"""The table of merging speed in docs/vision-transformers.md, from what `foveate speed vit … --out FILE` wrote.

python docs/vit_speed_table.py eval_suites/results/speed_vit.json [BATCH]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from foveate.eval_suites.terminal import markdown_table, versions


def main(path: str, batch: str = "8") -> None:
    """Print factor and share of the ceiling per model and method."""
    factors: dict[str, dict[str, str]] = {}
    results = json.loads(Path(path).read_text(encoding="utf-8"))
    shown = [result for result in results if any(line["batch"] == int(batch) for line in result["lines"])]
    for result in shown:
        for line in result["lines"]:
            if line["batch"] == int(batch) and line["method"] != "unmodified":
                found = factors.setdefault(line["model"], {})
                found[line["method"]] = f"{line['factor']:.2f}x, {line['of_ceiling']:.0%}"
    methods = list(dict.fromkeys(method for found in factors.values() for method in found))
    rows = [[model, *(found.get(method, "") for method in methods)] for model, found in factors.items()]
    print(markdown_table(["model", *methods], rows))
    packages = versions(*(result["environment"] for result in shown), names=("torch", "transformers", "timm"))
    print(f"\nMeasured with {packages}.")


if __name__ == "__main__":
    main(*sys.argv[1:])
