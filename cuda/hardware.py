"""What things run on, for results that are kept."""

from __future__ import annotations

import pathlib
import platform
import re


def processor() -> str:
    """The CPU's model as the system names it, else its architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
