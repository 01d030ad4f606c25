"""``python -m foveate.eval_suites.speed PART …`` is ``foveate speed PART …``."""

from __future__ import annotations

import sys


def main(*part: str) -> int:
    """Run the command; ``part`` where the module that was started says it."""
    from foveate.cli import main as command

    return command(["speed", *part, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
