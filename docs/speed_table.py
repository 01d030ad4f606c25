"""The tables of eval_suites/results/speed_decoder.md, from what `foveate speed decoder … --json PATH` wrote.

python docs/speed_table.py PATH …
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any


def spread(values: Sequence[float], form: str) -> str:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4)
    return f"{median(values):{form}} ({low:{form}} … {high:{form}})"


def table(run: dict[str, Any]) -> None:
    facts, rows = run["environment"], {row["label"]: row for row in run["rows"]}
    whole, shape = rows["unpruned"], facts["geometry"]
    print(
        f"{shape['layers']} layers × {shape['width']}, MLP {shape['intermediate']}, {shape['visual']} visual and {shape['text']} text "
        f"tokens, {len(whole['prefill'])} turns. The unpruned model's MLPs take {whole['mlp_prefill']:.0%} of its prefill and "
        f"{whole['mlp_decode']:.0%} of its decode time.\n"
    )
    print("| | tokens | cached | prefill s | x | own | first ms | decode ms | x |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for label, row in rows.items():
        twin = rows.get(f"random like {label}")
        own = ""
        if twin is not None:
            own = spread([a / b - 1 for a, b in zip(row["prefill"], twin["prefill"])], "+.1%")
        cells = [
            label,
            f"{fmean(row['tokens_per_layer']):.0f}",
            f"{fmean(row['cached_per_layer']):.0f}",
            f"{median(row['prefill']):.3f}",
            f"{median(a / b for a, b in zip(whole['prefill'], row['prefill'])):.2f}",
            own,
            f"{median(row['first']) * 1e3:.0f}",
            f"{median(row['decode']) * 1e3:.1f}",
            spread([a / b for a, b in zip(whole["decode"], row["decode"])], ".2f") if row is not whole else "1.00",
        ]
        print(f"| {' | '.join(cells)} |")
    print()


if __name__ == "__main__":
    for path in sys.argv[1:]:
        found = json.loads(Path(path).read_text())
        for run in found if isinstance(found, list) else [found]:
            table(run)
