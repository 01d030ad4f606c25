"""The table of docs/pospad.md, from two result files of the same questions.

python docs/pospad_table.py compact.db keep.db
"""

from __future__ import annotations

import sys

from foveate.eval_suites.leaderboard import Line
from foveate.eval_suites.store import Store


def lines(path: str) -> dict[tuple[str, str], Line]:
    """All measured lines of a file's only bench, by budget and method."""
    with Store(path, create=False) as store:
        (board,) = store.boards()
    return {(s.title, line.first.label): line for s in board.sections for line in s.lines if line.measured}


def main(compact: str, keep: str) -> None:
    closed, kept = lines(compact), lines(keep)
    print(
        "| budget | tokens chosen by | dropped, positions closed up | dropped, positions kept | PosPad | tokens, PosPad |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for title, method in kept:
        padded = kept.get((title, f"pospad:{method}"))
        if padded is not None:
            cells = [closed[title, method].accuracy, kept[title, method].accuracy, padded.accuracy]
            print(f"| {title} | `{method}` | {' | '.join(cells)} | {padded.mean('tokens_mean'):.1f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
