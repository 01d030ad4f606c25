"""Does `foveate tune` keep its promise on unseen samples? Halve recorded answers at random, again and again.

    foveate bench --model shapes-llava --suite shapes --pruners all --keep 0.9,0.5 --limit 2000 --seeds 1 --no-timing \\
        --positions keep --out splits.db
    python docs/tune_splits.py splits.db [MORE] --out tune_splits.json

``MORE`` are files of the same questions under other settings: ``--positions compact``, say, or other budgets. For every
split the settings are searched on one half as `foveate tune --by tokens` does it, and the chosen one is held against
the target on the other half.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from foveate.errors import ParameterError
from foveate.eval_suites.results.export import opened
from foveate.eval_suites.results.leaderboard import Leaderboard
from foveate.eval_suites.results.rows import Row, Status
from foveate.eval_suites.running.certify import relative_accuracy
from foveate.eval_suites.running.tune import Chain, Setting, search
from foveate.eval_suites.terminal import versions
from foveate.pruners import create

__all__ = ["Key", "main", "recorded", "splits"]

Key = tuple[str, float, str]
"""A setting: label, budget, position policy."""

TARGETS = (0.9, 0.95, 0.98)


def recorded(boards: Sequence[Leaderboard]) -> tuple[np.ndarray, dict[Key, Row]]:
    """The unpruned model's scores, and the rows that were measured whole by what a user would choose them by.

    Raises:
        ParameterError: other questions or another model in one of the files, or other answers of the unpruned model.
    """
    first, *others = boards
    unpruned = [next(row for row in board.rows if row.method == "unpruned") for board in boards]
    for board, whole in zip(others, unpruned[1:]):
        for name in ("model", "weights_sha256", "suite", "samples_sha256"):
            if board.environment.get(name) != first.environment.get(name):
                raise ParameterError(f"the files differ in {name}; give files of the same model and questions")
        if whole.answers != unpruned[0].answers:
            raise ParameterError("the unpruned model answers otherwise in the files; make them with the same versions")
    rows: dict[Key, Row] = {}
    for board in boards:
        for row in board.rows:
            if row.status is Status.OK and row.keep is not None and not row.seed:
                rows.setdefault((row.label, row.keep, str(board.environment.get("positions"))), row)
    return np.asarray(unpruned[0].scores), rows


def splits(
    whole: np.ndarray, rows: Mapping[Key, Row], target: float, confidence: float, count: int, seed: int = 0
) -> dict[str, Any]:
    """Search ``count`` random halves of the samples, and check what was chosen on the other half.

    Args:
        whole, rows: of :func:`recorded`; budgets of a method under a policy are a chain.
    """
    scores = {key: np.asarray(row.scores) for key, row in rows.items()}
    truth = {key: relative_accuracy(found, whole) for key, found in scores.items()}
    declared = _chains(rows)
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        order = rng.permutation(len(whole))
        here, there = order[: len(order) // 2], order[len(order) // 2 :]
        chains = [Chain([replace(setting) for setting in chain.settings]) for chain in declared]
        search(chains, lambda s, here=here: scores[_key(s)][here], whole[here], target, 1 - confidence)
        certified = [_key(s) for chain in chains for s in chain.settings if s.certified]
        chosen = min(certified, key=lambda key: rows[key].tokens_mean, default=None)
        unseen = None if chosen is None else relative_accuracy(scores[chosen][there], whole[there])
        found.append({
            "chosen": None if chosen is None else _name(chosen),
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
        "settings": {_name(key): round(value, 4) for key, value in truth.items()},
        "chosen": len(chosen),
        "held": sum(split["held"] for split in chosen),
        "with_a_false_certificate": sum(split["false"] > 0 for split in found),
        "lowest_unseen": min((split["unseen"] for split in chosen), default=None),
        "each": found if count <= 100 else None,
    }


def _chains(keys: Iterable[Key]) -> list[Chain]:
    """One chain per label and policy, largest budget first; the methods themselves do not run."""
    chains: dict[tuple[str, str], list[Setting]] = {}
    for label, keep, positions in sorted(keys, key=lambda key: -key[1]):
        chains.setdefault((label, positions), []).append(Setting(label, create("grid", keep=keep), positions))
    return [Chain(settings) for settings in chains.values()]


def _key(setting: Setting) -> Key:
    return setting.label, setting.keep, setting.positions


def _name(key: Key) -> str:
    return f"{key[0]} {key[1]:g} {key[2]}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line per target, and write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="result files, each of one bench of the same questions"
    )
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--many", type=int, default=2000, help="splits for the second line of every target")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args(argv)
    boards = []
    for path in options.files:
        with opened(path) as store:
            boards += store.boards()
    whole, rows = recorded(boards)
    tables = [splits(whole, rows, t, options.confidence, n) for t in TARGETS for n in (20, options.many)]
    print(
        "| target | splits | something chosen | held on the unseen half "
        "| splits with a false certificate | promised at most |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for table in tables:
        held = f"{table['held']} ({100 * table['held'] / table['chosen']:.1f} %)" if table["chosen"] else "-"
        print(
            f"| {table['target']} | {table['splits']} | {table['chosen']} | {held} "
            f"| {table['with_a_false_certificate']} | {(1 - options.confidence) * table['splits']:g} |"
        )
    print(f"\nMeasured with {versions(*(board.environment for board in boards))}.")
    if options.out:
        names = (
            "model",
            "suite",
            "limit",
            "suite_seed",
            "foveate",
            "commit",
            "torch",
            "transformers",
            "hardware",
        )
        facts = {name: sorted({str(board.environment.get(name)) for board in boards}) for name in names}
        options.out.write_text(json.dumps({"environment": facts, "tables": tables}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
