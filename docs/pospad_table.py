"""The table of docs/pospad.md, from two result files of the same questions.

python docs/pospad_table.py compact.db keep.db
"""

from __future__ import annotations

import sys

from foveate.eval_suites.results.leaderboard import Leaderboard, Line
from foveate.eval_suites.results.store import Store
from foveate.eval_suites.terminal import versions


def read(path: str) -> Leaderboard:
    """A file's only bench."""
    with Store(path, create=False) as store:
        (board,) = store.boards()
    return board


def lines(board: Leaderboard) -> dict[tuple[str, str], Line]:
    """All measured lines, by budget and method."""
    return {(s.title, line.first.label): line for s in board.sections for line in s.lines if line.measured}


def main(compact: str, keep: str) -> None:
    boards = read(compact), read(keep)
    closed, kept = map(lines, boards)
    print(
        "| budget | tokens chosen by | dropped, positions closed up | dropped, positions kept "
        "| PosPad | tokens, PosPad |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for title, method in kept:
        padded = kept.get((title, f"pospad:{method}"))
        if padded is not None:
            cells = [closed[title, method].accuracy, kept[title, method].accuracy, padded.accuracy]
            print(f"| {title} | `{method}` | {' | '.join(cells)} | {padded.mean('tokens_mean'):.1f} |")
    print(f"\nMeasured with {versions(*(board.environment for board in boards))}.")


if __name__ == "__main__":
    main(*sys.argv[1:])
