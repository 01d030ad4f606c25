"""``foveate demo``: its arguments, and the server."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from foveate.errors import FoveateError, ParameterError

if TYPE_CHECKING:
    from foveate.demo.app import App


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foveate demo``."""
    add = parser.add_argument
    help_ = "shapes-llava, shapes-next or shapes-qwen (embedded; the page offers all), a folder, or a name on the hub"
    add("--model", metavar="NAME", default="shapes-llava", help=help_)
    add("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    add("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, that of the checkpoint elsewhere)")
    add("--max-new-tokens", metavar="N", type=int, default=32, help="longest answer (default: 32)")
    add("--results", metavar="PATH", help="a result file of `foveate bench --out`, for the leaderboard")
    add("--port", metavar="N", type=int, default=7860, help="where to serve (default: 7860)")
    add("--host", default="127.0.0.1", help="address to serve on (default: 127.0.0.1, this machine only)")
    add("--share", action="store_true", help="also serve through Gradio's public relay, to anybody with the link")


def main(args: argparse.Namespace) -> int:
    """Serve until interrupted.

    Raises:
        FoveateError: Gradio is missing, the model cannot be loaded, or the port is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise FoveateError('the demo needs Gradio, which is not installed; pip install "foveate[demo]" brings it')
    if not 0 < args.port < 65536:
        raise ParameterError(f"--port {args.port}: give a number from 1 to 65535")
    if args.max_new_tokens < 1:
        raise ParameterError(f"--max-new-tokens {args.max_new_tokens}: give at least 1")
    print(f"loading {args.model} …", flush=True)
    app = create(args.model, args.device, args.dtype, args.max_new_tokens, args.results)
    try:
        serve(app, host=args.host, port=args.port, share=args.share)
    except OSError as error:
        if "port" not in str(error):
            raise
        raise FoveateError(f"port {args.port} on {args.host} is taken; give another with --port") from None
    return 0


def create(
    model: str = "shapes-llava",
    device: str | None = None,
    dtype: str | None = None,
    max_new_tokens: int = 32,
    results: str | None = None,
) -> App:
    """Load a model and build the app, :class:`foveate.demo.app.App`; the embedded models can be chosen in it, too."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    from transformers.utils import logging

    with _no_stub_files():
        from foveate.demo.app import App
    from foveate.demo.engine import Engine, Engines
    from foveate.demo.examples import BY_MODEL
    from foveate.eval_suites.running import models

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def engine(name: str) -> Engine:
        return Engine(models.load(name, device, dtype), max_new_tokens)

    return App(Engines([model, *(name for name in BY_MODEL if name != model)], engine), results)


@contextmanager
def _no_stub_files() -> Iterator[None]:
    """Here Gradio cannot find the sources of its components.

    While it is imported it parses them all and writes type stubs beside them: a fifth of the time that the demo takes
    to start, and a write into the installation. Without sources it leaves that out.
    """
    find = inspect.getfile

    def hidden(what: Any) -> str:
        if isinstance(what, type) and what.__module__.startswith("gradio."):
            raise OSError(f"the source of {what.__qualname__} is not needed")
        return find(what)

    inspect.getfile = hidden
    try:
        yield
    finally:
        inspect.getfile = find


def serve(app: App, host: str = "127.0.0.1", port: int | None = None, share: bool = False, block: bool = True) -> str:
    """Start the server and return its address; with ``block`` print that and serve until interrupted."""
    from foveate.demo.app import HERE, theme
    from foveate.demo.media import MAX_VIDEO_BYTES

    _, address, _ = app.blocks.queue(max_size=128, default_concurrency_limit=8).launch(
        server_name=host,
        server_port=port,
        share=share,
        inbrowser=False,
        prevent_thread_lock=True,
        show_error=True,
        max_file_size=MAX_VIDEO_BYTES,
        footer_links=["settings"],
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css_paths=[HERE / "style.css"],
        quiet=True,
    )
    if block:
        print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
        app.blocks.block_thread()
    return address
