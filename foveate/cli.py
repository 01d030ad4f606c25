"""The ``foveate`` command: ``list`` and ``show`` the methods, ``bench`` them, ``demo`` them in a browser.

Exit codes: 0 all went well, 1 a run finished but failed, 2 bad input (a line on stderr says what and what to do).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

import foveate
from foveate.errors import FoveateError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: that of the process) and return the exit code.

    Raises:
        SystemExit: argparse's own, with code 2 for bad usage and 0 after ``--help`` and ``--version``.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with _warnings_in_one_line():
            parser = _parser(argv[0] if argv else "")
            args, args.rest = parser.parse_known_args(argv)
            if args.rest and not getattr(args, "takes_rest", False):
                parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
            code = args.run(args)
            sys.stdout.flush()
            return code
    except FoveateError as error:
        return _fail(error)
    except BrokenPipeError:  # `foveate list | head`; what is left in the buffer has nowhere to go
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a path that cannot be read or written, a model that cannot be found
        return _fail(error)
    except KeyboardInterrupt:
        print("foveate: stopped", file=sys.stderr)
        return 130


def _fail(error: Exception | str) -> int:
    print(f"foveate: error: {error}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Warnings as a user wants them: without the line of code, and once."""
    told: set[str] = set()

    def show(message: Warning | str, *where: object) -> None:
        if str(message) not in told:
            told.add(str(message))
            print(f"foveate: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{message}; see `{self.prog} --help`"))


def _parser(command: str) -> argparse.ArgumentParser:
    parser = _Parser(prog="foveate", description="Interchangeable visual-token pruners.")
    parser.add_argument("--version", action="version", version=f"foveate {foveate.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    lists = commands.add_parser("list", help="all methods, one a line", description="All methods, one a line.")
    form = lists.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table, with papers")
    lists.set_defaults(run=_list)

    shows = commands.add_parser(
        "show",
        help="one method: paper, parameters, hook points, signals, families, cost",
        description="One method: its paper, parameters, hook points, signals, families and cost.",
    )
    shows.add_argument("method", help="a name that `foveate list` prints")
    shows.add_argument("--json", action="store_true", help="print JSON instead of text")
    shows.set_defaults(run=_show)

    for name, (module, help_) in _ELSEWHERE.items():
        its = commands.add_parser(name, help=help_, description=f"{help_[0].upper()}{help_[1:]}.")
        if command == name:  # only who asks for a command pays for what it imports
            home = importlib.import_module(module)
            home.add_arguments(its)
            its.set_defaults(run=home.main)
    return parser


_ELSEWHERE = {
    "bench": ("foveate.eval_suites.running.runner", "run methods over a suite and compare accuracy, tokens and time"),
    "speed": ("foveate.eval_suites.speed.decoder", "time methods on models of any size with random weights"),
    "demo": ("foveate.demo.launch", "see in a browser what a model keeps of your picture"),
    "serve": ("foveate.adapters.vllm_plugin.front", "serve a model with vLLM, pictures pruned"),
    "doctor": ("foveate.eval_suites.doctor", "say what this machine has and what works on it"),
    "leaderboard": ("foveate.eval_suites.results.show", "show result files as a table, a web page or Markdown"),
    "tune": ("foveate.eval_suites.running.tune", "find how far a model can be pruned at an accuracy that you name"),
    "results": ("foveate.eval_suites.results.export", "export, import and compare result files"),
    "suites": ("foveate.eval_suites.lmms.tasks", "list the suites, or export them as tasks for lmms-eval"),
    "reproduce": ("foveate.eval_suites.recipes", "run a published setting and print our numbers beside the paper's"),
}
"""Commands that live in a module of their own, which has ``add_arguments(parser)`` and ``main(args)``."""


def _list(args: argparse.Namespace) -> int:
    from foveate import registry_view as view

    cards = view.cards()
    if args.json:
        print(json.dumps([card.as_json() for card in cards], indent=2))
    elif args.markdown:
        print(view.markdown_table(cards))
    else:
        view.print_table(cards)
    return 0


def _show(args: argparse.Namespace) -> int:
    from foveate import registry_view as view

    card = view.card(args.method)
    if args.json:
        print(json.dumps(card.as_json(), indent=2))
    else:
        view.print_card(card)
    return 0


if __name__ == "__main__":
    sys.exit(main())
