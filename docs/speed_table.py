"""The tables of eval_suites/results/speed_decoder.md, from what `foveate speed decoder … --json PATH` wrote.

python docs/speed_table.py PATH …
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from foveate.eval_suites.speed.decoder import COLUMNS, Timing, cells
from foveate.eval_suites.terminal import versions


def table(run: dict[str, Any]) -> None:
    facts, timings = run["environment"], [Timing(**row) for row in run["rows"]]
    whole, shape = timings[0], facts["geometry"]
    print(
        f"{shape['layers']} layers × {shape['width']}, MLP {shape['intermediate']}, {shape['visual']} visual and "
        f"{shape['text']} text tokens, {len(whole.prefill)} turns; {versions(facts)}. "
        f"The unpruned model's MLPs take {whole.mlp_prefill:.0%} of its prefill and {whole.mlp_decode:.0%} of its "
        "decode time.\n"
    )
    print(f"| {' | '.join(COLUMNS)} |".replace("|  |", "| |"))
    print(f"| --- |{' ---: |' * (len(COLUMNS) - 1)}")
    for row in cells(timings):
        print(f"| {' | '.join(row)} |")
    print()


if __name__ == "__main__":
    for path in sys.argv[1:]:
        found = json.loads(Path(path).read_text())
        for run in found if isinstance(found, list) else [found]:
            table(run)
