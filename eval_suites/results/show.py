"""``foveate leaderboard``: show result files as a table, as one web page, or as Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from foveate.errors import ParameterError, UnknownNameError, nearest
from foveate.eval_suites.results import export
from foveate.eval_suites.results.leaderboard import Leaderboard
from foveate.eval_suites.terminal import write

__all__ = ["add_arguments", "main", "save"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foveate leaderboard``."""
    add = parser.add_argument
    add("files", metavar="FILE", nargs="+", help="result files, or JSON exports of them")
    add("--model", metavar="NAME", help="this model only")
    add("--suite", metavar="NAME", help="this suite only")
    add("--keep", metavar="BUDGETS", help="these budgets only, like 0.25,1/9,64")
    add("--html", metavar="PATH", help="write one web page that needs nothing else")
    add("--markdown", metavar="PATH", help="write Markdown tables; '-' prints them")


def main(args: argparse.Namespace) -> int:
    """Run ``foveate leaderboard``.

    Raises:
        FoveateError: a file cannot be read, or holds nothing of what was asked for.
    """
    boards = [board for path in args.files for board in export.boards(path)]
    for name in ("model", "suite"):
        wanted, known = getattr(args, name), [board.environment[name] for board in boards]
        if wanted is not None and wanted not in known:
            raise UnknownNameError(f"no results of {name} {wanted!r}; {nearest(wanted, set(known))}")
        boards = [board for board in boards if wanted in (None, board.environment[name])]
    if args.keep is not None:
        from foveate.eval_suites.running.budgets import parse_keep

        boards = [board.only(parse_keep(args.keep)) for board in boards]
    if not boards:
        raise ParameterError(f"no results in {', '.join(args.files)} fit; see `foveate results export FILE --csv -`")
    save(boards, args.html, args.markdown)
    if args.html:
        print(f"wrote {args.html}")
    if not args.html and not args.markdown:
        for board in boards:
            board.print()
    return 0


def save(boards: Sequence[Leaderboard], html: str | None, markdown: str | None) -> None:
    """Write the web page and the Markdown tables that were asked for."""
    if html:
        from foveate.eval_suites.results.page import page

        Path(html).write_text(page(boards), encoding="utf-8")
    if markdown:
        write(markdown, "\n".join(board.markdown() for board in boards))
