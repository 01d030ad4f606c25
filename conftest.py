"""Options of the test suite that must be known before collection."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default="",
        metavar="METHODS",
        help="comma-separated golden files (by method) that must be present and run; without it unknown ones are skipped",
    )
