"""Is there a newer release of a dependency than the tests were run with? ``make check-releases`` prints a table.

Exit code 0: all tested releases are the newest; 1: something newer is out; 2: of something the newest release could not
be found out, whatever else is newer. (make ends with 2 either way, and prints "Error 1" or "Error 2"; for the code
itself run ``python -m tests.check_releases``.) Needs pip and the standard library only. pip shows what the index it is
set up for holds for this Python and this platform, so run it on Linux with the Python that the tests are run with.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from foveate.tested import TESTED, Tested, release

TIMEOUT = 120  # seconds for one package
STABLE = re.compile(r"\d+(\.\d+)*(\.post\d+)?(\+[\w.]+)?")
UNSTABLE = re.compile(r"\d+(\.\d+)*(\.?(a|b|rc|dev|post)\d+)+(\+[\w.]+)?")


class Unknown(Exception):
    """The newest release of a package could not be found out; the message says why."""


@dataclass(frozen=True)
class Line:
    """What the table says of one package: ``newest`` is None if it could not be found out; ``verdict`` says why."""

    name: str
    tested: str
    newest: str | None
    verdict: str
    code: int


def ask_pip(name: str) -> str:
    """What ``pip index versions`` prints of a package; its own settings say which index that is."""
    command = [sys.executable, "-m", "pip", "index", "versions", "--disable-pip-version-check", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise Unknown(f"pip gave no answer within {TIMEOUT} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise Unknown(said[-1] if said else f"pip ended with exit code {done.returncode} and said nothing")
    return done.stdout


def newest_stable(printed: str) -> str:
    """The newest release that pip printed, pre-releases aside."""
    listed = re.search(r"^Available versions:(.*)$", printed, re.MULTILINE)
    if listed is None:
        raise Unknown("pip printed no line 'Available versions:'; read `pip index versions` of this pip")
    versions = [version.strip() for version in listed[1].split(",") if version.strip()]
    stable = [version for version in versions if STABLE.fullmatch(version)]
    odd = [version for version in versions if version not in stable and not UNSTABLE.fullmatch(version)]
    if odd:
        raise Unknown(f"pip listed {odd[0]!r}, which does not look like a version")
    if not stable:
        raise Unknown(f"pip listed no stable release, only {len(versions)} others")
    return max(stable, key=release)


def look(name: str, tested: Tested) -> Line:
    """What pip knows of one package, beside what was tested."""
    try:
        newest = newest_stable(ask_pip(name))
    except Unknown as reason:
        return Line(name, tested.newest, None, f"unknown: {reason}", 2)
    verdict, code = "", 0
    if release(newest) > release(tested.newest):
        verdict, code = "newer: test it", 1
    elif release(newest) < release(tested.newest):
        verdict, code = "unknown: older than tested; the index is behind, or this Python too old", 2
    return Line(name, tested.newest, newest, verdict, code)


def table(lines: list[Line]) -> str:
    """The lines in columns, under a head."""
    cells = [("package", "tested", "newest", "")]
    cells += [(line.name, line.tested, line.newest or "?", line.verdict) for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)


def main(tested: Mapping[str, Tested] = TESTED) -> int:
    with ThreadPoolExecutor(4) as pool:
        lines = list(pool.map(look, tested, tested.values()))
    print(f"Newest stable releases for Python {platform.python_version()} on {platform.system()}:\n\n{table(lines)}\n")
    newer = [line.name for line in lines if line.code == 1]
    unknown = [line.name for line in lines if line.code == 2]
    if newer:
        print(
            f"Newer than tested: {', '.join(newer)}. Run the tests with it, then raise `newest` in foveate/tested.py."
        )
    if unknown:
        print(f"Not found out: {', '.join(unknown)}. See the reason in the table, and look again.")
    if not newer and not unknown:
        print("The newest releases are those tested.")
    return max((line.code for line in lines), default=2)


if __name__ == "__main__":
    sys.exit(main())
