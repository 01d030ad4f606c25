"""Options of the test suite that must be known before collection."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default="",
        metavar="METHODS",
        help="golden files (by method, comma-separated) that must be present and run; else unknown ones are skipped",
    )
