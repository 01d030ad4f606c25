"""Does `foveate tune` keep its promise on samples that it has not seen? Halve recorded answers at random, again and again.

    foveate bench --model shapes-llava --suite shapes --pruners all --keep 0.9,0.5 --limit 2000 --seeds 1 --no-timing \\
        --positions keep --out splits.db
    python -m foveate.eval_suites.tune_splits splits.db --out tune_splits.json

For every split the settings are searched on one half as `foveate tune --by tokens` does it, and the chosen one is held against
the target on the other half.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foveate.errors import ParameterError
from foveate.eval_suites.certify import relative_accuracy
from foveate.eval_suites.results import opened
from foveate.eval_suites.rows import Row, Status
from foveate.eval_suites.tune import Chain, Setting, search
from foveate.pruners import create

__all__ = ["main", "splits"]

TARGETS = (0.9, 0.95, 0.98)


def splits(rows: Sequence[Row], target: float, confidence: float, count: int, seed: int = 0) -> dict[str, Any]:
    """Search ``count`` random halves of the rows' samples, and check what was chosen on the other half.

    Args:
        rows: of one bench; those that were measured whole are searched, ordered by budget within a method.
    """
    whole = np.asarray(next(row for row in rows if row.method == "unpruned").scores)
    measured = [row for row in rows if row.status is Status.OK and row.keep is not None and not row.seed]
    scores = {(row.label, row.keep): np.asarray(row.scores) for row in measured}
    tokens = {(row.label, row.keep): row.tokens_mean for row in measured}
    truth = {key: relative_accuracy(found, whole) for key, found in scores.items()}
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        order = rng.permutation(len(whole))
        here, there = order[: len(order) // 2], order[len(order) // 2 :]
        chains = _chains(measured)
        search(chains, lambda s, here=here: scores[s.label, s.keep][here], whole[here], target, 1 - confidence)
        certified = [(s.label, s.keep) for chain in chains for s in chain.settings if s.certified]
        chosen = min(certified, key=tokens.__getitem__, default=None)
        unseen = None if chosen is None else relative_accuracy(scores[chosen][there], whole[there])
        found.append({
            "chosen": None if chosen is None else f"{chosen[0]} {chosen[1]:g}",
            "certified": len(certified),
            "unseen": unseen,
            "held": unseen is not None and unseen >= target,
            "false": sum(truth[key] < target for key in certified),
        })  # fmt: skip
    chosen = [split for split in found if split["chosen"] is not None]
    return {
        "target": target,
        "confidence": confidence,
        "splits": count,
        "samples": len(whole),
        "settings": {f"{label} {keep:g}": round(value, 4) for (label, keep), value in truth.items()},
        "chosen": len(chosen),
        "held": sum(split["held"] for split in chosen),
        "with_a_false_certificate": sum(split["false"] > 0 for split in found),
        "lowest_unseen": min((split["unseen"] for split in chosen), default=None),
        "each": found if count <= 100 else None,
    }


def _chains(rows: Sequence[Row]) -> list[Chain]:
    """One chain per label, largest budget first."""
    by_label: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: -row.keep):
        by_label.setdefault(row.label, []).append(row)
    return [
        Chain(
            [Setting(label, create("grid", keep=row.keep), "keep") for row in group]
        )  # the method itself does not run
        for label, group in by_label.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line per target, and write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a result file with one bench")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--many", type=int, default=2000, help="splits for the second line of every target")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args(argv)
    with opened(options.file) as store:
        boards = store.boards()
    if len(boards) != 1:
        raise ParameterError(f"{options.file} holds {len(boards)} benches; give a file with one")
    tables = [splits(boards[0].rows, t, options.confidence, n) for t in TARGETS for n in (20, options.many)]
    print(
        "| target | splits | something chosen | held on the unseen half | splits with a false certificate | promised at most |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for table in tables:
        held = f"{table['held']} ({100 * table['held'] / table['chosen']:.1f} %)" if table["chosen"] else "-"
        print(
            f"| {table['target']} | {table['splits']} | {table['chosen']} | {held} | {table['with_a_false_certificate']} | "
            f"{(1 - options.confidence) * table['splits']:g} |"
        )
    if options.out:
        names = (
            "model",
            "suite",
            "limit",
            "suite_seed",
            "positions",
            "foveate",
            "commit",
            "torch",
            "transformers",
            "hardware",
        )
        facts = {name: boards[0].environment.get(name) for name in names}
        options.out.write_text(json.dumps({"environment": facts, "tables": tables}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
