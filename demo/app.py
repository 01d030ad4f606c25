"""The app: three tabs, built from the engine, the views and the result store."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from PIL import Image, ImageOps, UnidentifiedImageError

from foveate.adapters.trace import ImageTrace
from foveate.demo import board, views
from foveate.demo.engine import MAX_QUESTION, Answer, Engine
from foveate.demo.examples import EXAMPLES
from foveate.demo.export import snippet
from foveate.errors import FoveateError, InputError, ParameterError
from foveate.eval_suites.models import EMBEDDED
from foveate.pruners import Pruner

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
MAX_BYTES = 10 * 2**20
MAX_PIXELS = 20_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MOST_COMPARED = 6
PERCENT, TOKENS = "percent", "tokens"

_FIRST = "visionzip"
_COMPARED = ("random", "grid", "divprune", "visionzip", "hiprune", "fastv")
_VIEWS = {"kept": "Kept", "scores": "Scores", "groups": "Groups"}
_MODEL = {"concurrency_id": "model", "concurrency_limit": 1}  # everything that runs the model waits in one queue
_PICK = """element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("select", { index: Number(button.dataset.index) });
});"""
_DOWNLOAD = """(file) => {
  if (!file) return;
  const link = document.createElement("a");
  [link.download, link.href] = [file.slice(0, file.indexOf("|")), file.slice(file.indexOf("|") + 1)];
  link.click();
}"""


@dataclass(frozen=True)
class Result:
    """What a session sees: a picture, a question and both answers."""

    image: Image.Image
    question: str
    pruner: Pruner
    positions: str
    unpruned: Answer
    pruned: Answer

    @property
    def trace(self) -> ImageTrace:
        return self.pruned.trace.images[0]


def open_picture(path: str | None) -> Image.Image:
    """An uploaded picture, RGB and upright.

    Raises:
        InputError: none, too many bytes or pixels, or no picture; nothing is decoded before that is known.
    """
    if not path:
        raise InputError("there is no picture yet; upload one or choose an example")
    if Path(path).stat().st_size > MAX_BYTES:
        raise InputError(f"the file is larger than {MAX_BYTES // 2**20} MB; make the picture smaller")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            opened = Image.open(path, formats=FORMATS)
        with opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise InputError(
                    f"the picture has {width} x {height} pixels; at most {MAX_PIXELS // 10**6} million are accepted, make it smaller"
                )
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Image.DecompressionBombError:
        raise InputError(
            f"the picture has far more than {MAX_PIXELS // 10**6} million pixels; make it smaller"
        ) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the file cannot be read as a picture ({', '.join(FORMATS)})") from None


@contextmanager
def readable() -> Iterator[None]:
    """Turn failures into a notice in the browser: ours in their own words, all others without their insides."""
    try:
        yield
    except FoveateError as error:
        raise gr.Error(escape(str(error)), title="That did not work", duration=12, print_exception=False) from None
    except Exception:
        logger.exception("a request failed")
        raise gr.Error(
            "Something failed while answering; the server's log says what. Other users are not affected.",
            title="That did not work",
            print_exception=False,
        ) from None


class App:
    """What the events do; ``blocks`` is the page, ``results`` the file behind the leaderboard."""

    def __init__(self, engine: Engine, results: str | None = None) -> None:
        self.engine, self.results = engine, results
        self.known = {_key(example.picture()): example.name for example in EXAMPLES}
        # written once, since all users are served the same files
        self._folder = TemporaryDirectory(prefix="foveate-examples-")
        self.files = []
        for number, example in enumerate(EXAMPLES):
            self.files.append(f"{self._folder.name}/{number}.png")
            example.picture().save(self.files[-1])
        self.first = _FIRST if _FIRST in engine.methods else engine.methods[0]
        example = EXAMPLES[0]
        engine.unpruned(example.picture(), "warm up")
        self.start = self._ask(example.picture(), example.question, self.first, PERCENT, 25, "", engine.positions)
        self.blocks = self._page()

    # ------------------------------------------------------------------------------------------------------- answers

    def _ask(
        self, image: Image.Image, question: str, name: str, unit: str, budget: float, more: str, positions: str
    ) -> Result:
        pruner = self.engine.method(name, int(budget) if unit == TOKENS else budget / 100, more)
        unpruned = self.engine.unpruned(image, question)
        return Result(
            image, question, pruner, positions, unpruned, self.engine.pruned(image, question, pruner, positions)
        )

    def inspect(
        self, path: str | None, question: str, name: str, unit: str, budget: float, more: str, positions: str, show: str
    ) -> list[Any]:
        """Answer with and without the method; new values of everything in ``self.shown``."""
        with readable():
            result = self._ask(open_picture(path), question or "", name, unit, budget, more or "", positions)
            return self._shown(result, show, unit, budget)

    def _shown(self, result: Result, show: str, unit: str, budget: float) -> list[Any]:
        trace = result.trace
        possible, layer, depth = views.views(trace), views.start_layer(trace), len(trace.tokens_per_layer)
        show = show if show in possible else "kept"
        most = trace.layout.size
        return [
            result,
            views.answers(result.unpruned, result.pruned, result.pruner),
            views.figure(trace, result.image, show, layer),
            gr.Radio([(_VIEWS[view], view) for view in possible], value=show),
            gr.Slider(0, depth - 1, layer, visible=views.progressive(trace)),
            gr.Slider(1, most, min(budget, most)) if unit == TOKENS else gr.Slider(1, 100, budget),
            self._snippet(result),
        ]

    def redraw(self, result: Result, show: str, layer: int) -> str:
        """The same result, looked at in another way."""
        with readable():
            return views.figure(result.trace, result.image, show, int(layer))

    def convert(self, result: Result, unit: str, budget: float) -> gr.Slider:
        """The budget in the other unit."""
        most = result.trace.layout.size
        if unit == TOKENS:
            return gr.Slider(1, most, max(1, round(budget * most / 100)), step=1, label="Budget in tokens")
        return gr.Slider(1, 100, max(1, round(100 * budget / most)), step=1, label="Budget in percent")

    def choose(self, name: str) -> tuple[str, gr.Slider]:
        """Tell about a method; without a budget of its own the slider rests."""
        return views.about(name), gr.Slider(interactive=self.engine.has_budget(name))

    def example(self, event: gr.EventData) -> tuple[str, str]:
        """Put an example in place."""
        number = event.index
        if number not in range(len(EXAMPLES)):
            raise gr.Error("There is no such example.", print_exception=False)
        return self.files[number], EXAMPLES[number].question

    def compare(self, path: str | None, question: str, names: list[str], budget: float, positions: str) -> str:
        """Several methods on one picture."""
        with readable():
            if not names:
                raise ParameterError("no method is chosen; choose up to six to compare")
            image, question = open_picture(path), question or ""
            unpruned = self.engine.unpruned(image, question)
            rows = []
            for name in names[:MOST_COMPARED]:
                pruner = self.engine.method(name, budget / 100)
                rows.append((pruner, self.engine.pruned(image, question, pruner, positions)))
            return views.comparison(image, unpruned, rows)

    # -------------------------------------------------------------------------------------------------------- export

    def _snippet(self, result: Result) -> str:
        return snippet(
            model=self.engine.name,
            prompt=self.engine.prompt(result.question),
            pruner=result.pruner,
            positions=result.positions,
            max_new_tokens=self.engine.max_new_tokens,
            example=self.known.get(_key(result.image)),
            prepares=self.engine.prepares(result.pruner),
        )

    def as_png(self, result: Result, show: str, layer: int) -> str:
        """File name and content of the drawing."""
        with readable():
            drawing = result.pruned.trace.show(result.image, show=show, layer=int(layer), width=1024)
            return f"foveate-{result.pruner.name}-{show}.png|{views.data_url(drawing)}"

    def as_json(self, result: Result) -> str:
        """File name and content of the trace, with what was asked."""
        with readable():
            told = {"model": self.engine.name, "question": result.question, "answer": result.pruned.text}
            told |= {"unpruned_answer": result.unpruned.text, "trace": result.pruned.trace.as_json()}
            return f"foveate-{result.pruner.name}.json|{views.text_url(json.dumps(told, indent=1), 'application/json')}"

    # ---------------------------------------------------------------------------------------------------------- page

    def _page(self) -> gr.Blocks:
        with gr.Blocks(title="foveate", analytics_enabled=False, delete_cache=(1800, 7200)) as page:
            gr.HTML(
                '<div class="fv-head"><h1>foveate</h1><p>What does a vision-language model still need to see? '
                "Ask about a picture, keep only some of its visual tokens, and compare the answers.</p></div>"
            )
            with gr.Tab("Inspect", id="inspect"):
                picture, question, positions = self._inspect_tab()
            with gr.Tab("Compare", id="compare") as tab:
                self._compare_tab(tab, picture, question, positions)
            with gr.Tab("Leaderboard", id="leaderboard"):
                board.tab(self.results)
        return page

    def _inspect_tab(self) -> tuple[gr.Image, gr.Textbox, gr.Radio]:
        engine, start = self.engine, self.start
        state = gr.State(start, time_to_live=7200)
        trace = start.trace
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = gr.Image(
                    self.files[0],
                    label="Picture",
                    type="filepath",
                    image_mode=None,  # nothing is decoded before its size is known
                    format="png",
                    sources=["upload", "webcam", "clipboard"],
                    height=260,
                    elem_id="fv-picture",
                )
                examples = gr.HTML(views.examples(EXAMPLES), js_on_load=_PICK, elem_id="fv-examples")
                question = gr.Textbox(
                    start.question,
                    label="Question",
                    max_length=MAX_QUESTION,
                    lines=1,
                    max_lines=4,
                    elem_id="fv-question",
                )
                method = gr.Dropdown(engine.methods, value=self.first, label="Method", elem_id="fv-method")
                about = gr.HTML(views.about(self.first))
                with gr.Group():
                    unit = gr.Radio([PERCENT, TOKENS], value=PERCENT, label="Budget counted in", elem_id="fv-unit")
                    budget = gr.Slider(1, 100, 25, step=1, label="Budget in percent", elem_id="fv-budget")
                run = gr.Button("Run", variant="primary", elem_id="fv-run", elem_classes="fv-run")
                with gr.Accordion("More options", open=False):
                    positions = gr.Radio(
                        ["auto", "keep", "compact"],
                        value=engine.positions,
                        label="Positions of kept tokens",
                        info="keep: as they were; compact: gaps are closed; auto: as the method's paper has it",
                    )
                    more = gr.Textbox(
                        label="Further parameters",
                        placeholder="as in Python: layer=2, strategy='row'",
                        info="`foveate show METHOD` lists them",
                        max_length=200,
                    )
                    if engine.refused:
                        names = ", ".join(f"{escape(name)}: {escape(why)}" for name, why in engine.refused.items())
                        gr.HTML(f'<p class="fv-note">Not on this model: {names}</p>')
            with gr.Column(scale=3, min_width=320):
                answers = gr.HTML(views.answers(start.unpruned, start.pruned, start.pruner), elem_id="fv-answers")
                show = gr.Radio(
                    [(_VIEWS[view], view) for view in views.views(trace)], value="kept", label="Show", elem_id="fv-show"
                )
                layer = gr.Slider(
                    0,
                    len(trace.tokens_per_layer) - 1,
                    views.start_layer(trace),
                    step=1,
                    label="Decoder layer",
                    info="this method lets tokens go on the way: move to see what each layer still has",
                    visible=views.progressive(trace),
                    elem_id="fv-layer",
                )
                figure = gr.HTML(
                    views.figure(trace, start.image, "kept", views.start_layer(trace)),
                    js_on_load=(HERE / "tokens.js").read_text(encoding="utf-8"),
                    elem_id="fv-figure",
                )
                with gr.Accordion("Export", open=False):
                    with gr.Row():
                        png = gr.Button("Picture (PNG)", size="sm", elem_id="fv-png")
                        trace_json = gr.Button("Trace (JSON)", size="sm", elem_id="fv-json")
                    file = gr.Textbox(visible="hidden")
                    code = gr.Code(
                        self._snippet(start),
                        language="python",
                        label="Python code that repeats this",
                        elem_id="fv-code",
                    )
        gr.HTML(f'<p class="fv-note">{_model_note(engine.name)}</p>')

        asked = [picture, question, method, unit, budget, more, positions, show]
        shown = [state, answers, figure, show, layer, budget, code]
        ask = {"fn": self.inspect, "inputs": asked, "outputs": shown, "trigger_mode": "always_last", **_MODEL}
        gr.on([run.click, question.submit, budget.release, positions.input], show_progress_on=[answers], **ask)
        method.input(self.choose, method, [about, budget], show_progress="hidden").then(
            show_progress_on=[answers], **{k: v for k, v in ask.items() if k != "trigger_mode"}
        )
        unit.input(self.convert, [state, unit, budget], budget, show_progress="hidden")
        examples.select(self.example, None, [picture, question], show_progress="hidden").then(
            show_progress_on=[answers], **{k: v for k, v in ask.items() if k != "trigger_mode"}
        )
        gr.on(
            [show.input, layer.input],
            self.redraw,
            [state, show, layer],
            figure,
            show_progress="hidden",
            trigger_mode="always_last",
        )
        png.click(self.as_png, [state, show, layer], file, show_progress="hidden").success(
            None, file, None, js=_DOWNLOAD
        )
        trace_json.click(self.as_json, state, file, show_progress="hidden").success(None, file, None, js=_DOWNLOAD)
        return picture, question, positions

    def _compare_tab(self, tab: gr.Tab, picture: gr.Image, question: gr.Textbox, positions: gr.Radio) -> None:
        gr.HTML('<p class="fv-note">Picture and question are those of the Inspect tab.</p>')
        with gr.Row(equal_height=True):
            names = gr.Dropdown(
                self.engine.methods,
                value=[name for name in _COMPARED if name in self.engine.methods],
                label=f"Methods (up to {MOST_COMPARED})",
                multiselect=True,
                max_choices=MOST_COMPARED,
                scale=3,
                min_width=300,
                elem_id="fv-compared",
            )
            budget = gr.Slider(1, 100, 25, step=1, label="Budget in percent", scale=2, min_width=240)
        run = gr.Button("Compare", variant="primary", elem_id="fv-compare-run", elem_classes="fv-run")
        table = gr.HTML(min_height=320, elem_id="fv-comparison")
        gr.on(
            [run.click, budget.release, tab.select],
            self.compare,
            [picture, question, names, budget, positions],
            table,
            trigger_mode="always_last",
            **_MODEL,
        )


def _key(image: Image.Image) -> tuple[Any, ...]:
    return image.size, hash(image.tobytes())


def _model_note(name: str) -> str:
    if name not in EMBEDDED:
        return f"Model: {escape(name)}."
    return (
        f"Model: {escape(name)}, which is very small and knows only coloured shapes and two-letter codes, by six kinds of "
        "question. On other pictures see which tokens a method keeps, and expect no sensible answer; "
        "<code>foveate demo --model NAME</code> takes a larger model."
    )


def theme() -> gr.themes.Base:
    """Quiet colours and the system's own fonts: nothing is fetched from anywhere."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    return gr.themes.Base(primary_hue="blue", neutral_hue="slate", radius_size="md", font=fonts, font_mono=mono).set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300"
    )
