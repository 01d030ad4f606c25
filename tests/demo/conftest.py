"""One app on the embedded model for all tests of the demo."""

from __future__ import annotations

import pytest

pytest.importorskip("gradio", reason="gradio is not installed (extras demo and dev)")

from foveate.demo import launch


@pytest.fixture(scope="session")
def app():
    return launch.create()


@pytest.fixture(scope="session")
def address(app):
    """Where the app is served."""
    yield launch.serve(app, block=False)
    app.blocks.close(verbose=False)
