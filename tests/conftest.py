"""Settings of every test: nothing is ever fetched, and nothing of ours uses what its makers are about to take away."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slow import mark_slow

os.environ["HF_HUB_OFFLINE"] = "1"


ROOT = Path(__file__).parents[1]


@pytest.hookimpl(tryfirst=True)  # before -m chooses by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_slow(items)


class _Deprecations(logging.Handler):
    """What transformers' log calls deprecated and our code asked for. Said once a process, so one test fails."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message.lower() and self._ours():
            self.said.append(message)

    @staticmethod
    def _ours() -> bool:
        """Is the nearest caller outside of installed packages a file of foveate, and not a test?"""
        callers = [Path(frame.filename) for frame in traceback.extract_stack()]
        own = [path for path in callers if path.is_relative_to(ROOT) and "site-packages" not in path.parts]
        own = [path for path in own if path != Path(__file__)]
        return bool(own) and not own[-1].is_relative_to(ROOT / "tests")


@pytest.fixture(autouse=True)
def _nothing_deprecated() -> Iterator[None]:
    """No user reads that foveate uses an old name. Python's own warnings: ``filterwarnings`` in pyproject.toml."""
    heard, log = _Deprecations(), logging.getLogger("transformers")
    log.addHandler(heard)
    yield
    log.removeHandler(heard)
    assert not heard.said, heard.said
