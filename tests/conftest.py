"""Settings of every test: nothing is ever fetched, and nothing of ours uses what its makers are about to take away."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


class _Deprecations(logging.Handler):
    """What transformers' own log says is going away. It says so once a process: a single test fails for it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message.lower():
            self.said.append(message)


@pytest.fixture(autouse=True)
def _nothing_deprecated() -> Iterator[None]:
    """A user must not read that foveate uses an old name. Python's own warnings: ``filterwarnings`` in pyproject.toml."""
    heard, log = _Deprecations(), logging.getLogger("transformers")
    log.addHandler(heard)
    yield
    log.removeHandler(heard)
    assert not heard.said, heard.said
