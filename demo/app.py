"""The app: three tabs, built from the engines, the views and the result store."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData
from gradio.processing_utils import save_bytes_to_cache

from foveate.adapters.trace import ImageTrace
from foveate.demo import board, views
from foveate.demo.engine import AROUND, MAX_MORE, MAX_QUESTION, Answer, Engine, Engines
from foveate.demo.examples import FOR_CLIPS, Example, examples
from foveate.demo.export import snippet
from foveate.demo.media import VIDEOS, Clip, Media, frames_of, key, open_media
from foveate.errors import FoveateError, InputError, ParameterError
from foveate.pruners import Pruner

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
MOST_COMPARED = 6
PERCENT, TOKENS = "percent", "tokens"

_FIRST = "visionzip"
_COMPARED = ("random", "grid", "divprune", "visionzip", "hiprune", "fastv")
_VIEWS = {"kept": "Kept", "scores": "Scores", "groups": "Groups"}
_INNER = {"pospad": "Tokens chosen by", "random@": "As many tokens as"}
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


@dataclass(frozen=True, eq=False)
class Result:
    """What a session sees: a picture or clip, a question, and a model's answers with and without a method."""

    model: str
    media: Media
    question: str
    pruner: Pruner
    positions: str
    unpruned: Answer
    pruned: Answer

    @property
    def trace(self) -> ImageTrace:
        """What became of the picture."""
        return self.pruned.trace.images[0]


@dataclass(frozen=True)
class Shelf:
    """The examples of a model, as files, since all users are served the same ones; ``names`` by :func:`media.key`."""

    examples: tuple[Example, ...]
    files: tuple[str, ...]
    names: dict[Any, str]


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
    """What the events do; ``blocks`` is the page, ``results`` the file behind the leaderboard.

    The page opens with the first of the ``engines``, which is ``engine``.
    """

    def __init__(self, engines: Engines, results: str | None = None) -> None:
        self.engines, self.results = engines, results
        self._folder = TemporaryDirectory(prefix="foveate-examples-")
        self._shelves: dict[str, Shelf] = {}
        self.engine = engine = engines[engines.names[0]]
        self.first = _FIRST if _FIRST in engine.methods else engine.methods[0]
        example = self.shelf(engine).examples[0]
        media = example.make()
        engine.warm_up(media)
        self.start = self._ask(engine, media, example.question, self.first, PERCENT, 25, "", engine.positions)
        self.blocks = self._page()

    def shelf(self, engine: Engine) -> Shelf:
        """What there is to try with a model."""
        if engine.name not in self._shelves:
            known, files, names = examples(engine.name, engine.takes_video), [], {}
            for number, example in enumerate(known):
                media = example.make()
                names[key(media)] = example.name
                path = Path(self._folder.name, f"{self.engines.names.index(engine.name)}-{number}")
                if isinstance(media, Clip):
                    path = path.with_suffix(".webp")
                    path.write_bytes(media.webp(milliseconds=200))  # slowly enough to be looked at
                else:
                    path = path.with_suffix(".png")
                    media.save(path)
                files.append(str(path))
            self._shelves[engine.name] = Shelf(known, tuple(files), names)
        return self._shelves[engine.name]

    # ------------------------------------------------------------------------------------------------------- answers

    def _ask(
        self,
        engine: Engine,
        media: Media,
        question: str,
        name: str,
        unit: str,
        budget: float,
        more: str,
        positions: str,
    ) -> Result:
        pruner = engine.method(name, int(budget) if unit == TOKENS else budget / 100, more)
        unpruned = engine.unpruned(media, question)
        pruned = engine.pruned(media, question, pruner, positions)
        return Result(engine.name, media, question.strip(), pruner, positions, unpruned, pruned)

    def inspect(
        self,
        model: str,
        path: str | None,
        question: str,
        name: str,
        inner: str | None,
        unit: str,
        budget: float,
        more: str,
        positions: str,
        show: str,
    ) -> list[Any]:
        """Answer with and without the method: new values of all that shows a result."""
        with readable():
            asked = question or "", composed(name, inner), unit, budget, more or "", positions
            return self._shown(self._ask(self.engines[model], open_media(path), *asked), show, unit, budget)

    def outdate(self, result: Result, path: str | None) -> str:
        """The answers again, marked where the picture is not that of the result any more."""
        with readable():
            try:
                outdated = key(open_media(path)) != key(result.media)
            except InputError:  # told when it is asked about
                outdated = True
            return views.answers(result.unpruned, result.pruned, result.pruner, outdated)

    def _shown(self, result: Result, show: str, unit: str, budget: float) -> list[Any]:
        trace = result.trace
        possible, layer, depth = views.views(trace), views.start_layer(trace), len(trace.tokens_per_layer)
        show = show if show in possible else "kept"
        most = trace.layout.size
        return [
            result,
            views.answers(result.unpruned, result.pruned, result.pruner),
            views.figure(trace, result.media, show, layer),
            gr.Radio([(_VIEWS[view], view) for view in possible], value=show),
            gr.Slider(0, depth - 1, layer, visible=views.progressive(trace)),
            gr.Slider(1, most, min(budget, most)) if unit == TOKENS else gr.Slider(1, 100, budget),
            self._snippet(result),
        ]

    def redraw(self, result: Result, show: str, layer: int) -> str:
        """The same result, looked at in another way."""
        with readable():
            return views.figure(result.trace, result.media, show, int(layer))

    def convert(self, result: Result, unit: str, budget: float) -> gr.Slider:
        """The budget in the other unit."""
        most = result.trace.layout.size
        if unit == TOKENS:
            return gr.Slider(1, most, max(1, round(budget * most / 100)), step=1, label="Budget in tokens")
        return gr.Slider(1, 100, max(1, round(100 * budget / most)), step=1, label="Budget in percent")

    def choose(self, model: str, name: str, inner: str | None) -> list[Any]:
        """Tell about a method, and offer others to put inside; without a budget of its own the slider rests."""
        with readable():
            engine = self.engines[model]
            inside = engine.inner.get(name, [])
            inner = inner if inner in inside else next(iter(inside), None)
            whole = composed(name, inner)
            return [
                views.about(name if name in engine.methods else whole),
                gr.Dropdown(inside, value=inner, visible=bool(inside), label=_INNER.get(name, "Inner method")),
                gr.Slider(interactive=engine.budget_parameter(whole) is not None),
            ]

    def switch(self, model: str, name: str) -> list[Any]:
        """Another model: its examples, methods and positions."""
        with readable():
            engine = self.engines[model]
            shelf, offered = self.shelf(engine), offer(engine)
            return [
                views.examples(shelf.examples),
                shelf.files[0],
                shelf.examples[0].question,
                gr.Dropdown(offered, value=name if name in [value for _, value in offered] else engine.methods[0]),
                engine.positions,
                views.refused(engine.refused),
                views.model_note(model),
                gr.Dropdown(offer_whole(engine), value=_compared(engine), multiselect=True),
            ]

    def example(self, model: str, event: gr.EventData) -> tuple[str, str]:
        """Put an example in place."""
        with readable():
            shelf = self.shelf(self.engines[model])
            if event.index not in range(len(shelf.examples)):
                raise InputError("there is no such example; choose another")
            return shelf.files[event.index], shelf.examples[event.index].question

    def video(self, model: str, path: str | None) -> str:
        """Turn an uploaded video into an animated picture of the frames that the model is going to see."""
        with readable():
            if not self.engines[model].takes_video:
                raise InputError(f"{model} takes pictures and no video; under Model choose {FOR_CLIPS}")
            clip = open_media(path)
            if not isinstance(clip, Clip):
                raise InputError(f"that is not a video; upload a file like {', '.join(VIDEOS)}")
            return save_bytes_to_cache(clip.webp(), "clip.webp", self._cache)

    def compare(
        self, model: str, path: str | None, question: str, names: list[str], budget: float, positions: str
    ) -> str:
        """Several methods on one picture."""
        with readable():
            if not names:
                raise ParameterError("no method is chosen; choose up to six to compare")
            engine, media, question = self.engines[model], open_media(path), question or ""
            unpruned = engine.unpruned(media, question)
            rows = []
            for name in names[:MOST_COMPARED]:
                pruner = engine.method(name, budget / 100)
                rows.append((pruner, engine.pruned(media, question, pruner, positions)))
            return views.comparison(media, unpruned, rows)

    # -------------------------------------------------------------------------------------------------------- export

    def _snippet(self, result: Result) -> str:
        engine, video = self.engines[result.model], isinstance(result.media, Clip)
        return snippet(
            model=engine.name,
            prompt=engine.prompt(result.question, video),
            question=result.question,
            pruner=result.pruner,
            positions=result.positions,
            max_new_tokens=engine.max_new_tokens,
            example=self.shelf(engine).names.get(key(result.media)),
            video=video,
            metadata=engine.tells_time,
            prepares=engine.prepares(result.pruner),
            scores=engine.reads_frame_scores(result.pruner, result.media),
        )

    def as_png(self, result: Result, show: str, layer: int) -> str:
        """File name and content of the drawing."""
        with readable():
            drawing = result.pruned.trace.show(frames_of(result.media), show=show, layer=int(layer), width=1024)
            return f"{_file(result)}-{show}.png|{views.data_url(drawing)}"

    def as_json(self, result: Result) -> str:
        """File name and content of the trace, with what was asked."""
        with readable():
            told = {"model": result.model, "question": result.question, "answer": result.pruned.text}
            told |= {"unpruned_answer": result.unpruned.text, "trace": result.pruned.trace.as_json()}
            return f"{_file(result)}.json|{views.text_url(json.dumps(told, indent=1), 'application/json')}"

    # ---------------------------------------------------------------------------------------------------------- page

    def _page(self) -> gr.Blocks:
        with gr.Blocks(title="foveate", analytics_enabled=False, delete_cache=(1800, 7200)) as page:
            gr.HTML(
                '<div class="fv-head"><h1>foveate</h1><p>What does a vision-language model still need to see? '
                "Ask about a picture, keep only some of its visual tokens, and compare the answers.</p></div>"
            )
            # made here, so that the tabs can refer to it; drawn where it belongs
            names = self.engines.names
            model = gr.Dropdown(
                list(names), value=names[0], label="Model", visible=len(names) > 1, elem_id="fv-model", render=False
            )
            compared = gr.Dropdown(
                offer_whole(self.engine),
                value=_compared(self.engine),
                label=f"Methods (up to {MOST_COMPARED})",
                multiselect=True,
                max_choices=MOST_COMPARED,
                scale=3,
                min_width=300,
                elem_id="fv-compared",
                render=False,
            )
            with gr.Tab("Inspect", id="inspect"):
                picture, question, positions = self._inspect_tab(model, compared)
            with gr.Tab("Compare", id="compare") as tab:
                self._compare_tab(tab, compared, [model, picture, question], positions)
            with gr.Tab("Leaderboard", id="leaderboard"):
                board.tab(self.results)
        return page

    def _inspect_tab(self, model: gr.Dropdown, compared: gr.Dropdown) -> tuple[gr.Image, gr.Textbox, gr.Radio]:
        engine, start = self.engine, self.start
        state = gr.State(start, time_to_live=7200)
        trace, shelf = start.trace, self.shelf(engine)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                model.render()
                picture = gr.Image(
                    shelf.files[0],
                    label="Picture or clip",
                    type="filepath",
                    image_mode=None,  # nothing is decoded before its size is known
                    format="png",
                    sources=["upload", "webcam", "clipboard"],
                    height=240,
                    elem_id="fv-picture",
                )
                picture.preprocess = uploaded
                self._cache = picture.GRADIO_CACHE
                video = gr.UploadButton("Upload a video", file_types=list(VIDEOS), size="sm", elem_id="fv-video")
                known = gr.HTML(views.examples(shelf.examples), js_on_load=_PICK, elem_id="fv-examples")
                question = gr.Textbox(
                    start.question,
                    label="Question",
                    max_length=MAX_QUESTION,
                    lines=1,
                    max_lines=4,
                    elem_id="fv-question",
                )
                method = gr.Dropdown(offer(engine), value=self.first, label="Method", elem_id="fv-method")
                inner = gr.Dropdown([], label="Inner method", visible=False, elem_id="fv-inner")
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
                        elem_id="fv-positions",
                    )
                    more = gr.Textbox(
                        label="Further parameters",
                        placeholder="as in Python: layer=2, strategy='row'",
                        info="`foveate show METHOD` lists them",
                        max_length=MAX_MORE,
                    )
                    refused = gr.HTML(views.refused(engine.refused))
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
                    views.figure(trace, start.media, "kept", views.start_layer(trace)),
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
                        wrap_lines=True,
                        label="Python code that repeats this",
                        elem_id="fv-code",
                    )
        note = gr.HTML(views.model_note(engine.name))

        asked = [model, picture, question, method, inner, unit, budget, more, positions, show]
        shown = [state, answers, figure, show, layer, budget, code]
        ask = {"fn": self.inspect, "inputs": asked, "outputs": shown, "show_progress_on": [answers], **_MODEL}
        chosen = {"fn": self.choose, "inputs": [model, method, inner], "outputs": [about, inner, budget]}
        chosen |= {"show_progress": "hidden"}
        anew = [run.click, question.submit, budget.release, positions.input, inner.input, picture.upload]
        gr.on(anew, trigger_mode="always_last", **ask)
        # in the queue of the answers, so that none can arrive between what is read here and what is written
        picture.change(self.outdate, [state, picture], answers, show_progress="hidden", **_MODEL)
        method.input(**chosen).then(**ask)
        unit.input(self.convert, [state, unit, budget], budget, show_progress="hidden")
        known.select(self.example, model, [picture, question], show_progress="hidden").then(**ask)
        video.upload(self.video, [model, video], picture, **_MODEL).success(**ask)
        of_model = [known, picture, question, method, positions, refused, note, compared]
        model.input(self.switch, [model, method], of_model, **_MODEL).success(**chosen).success(**ask)
        redrawn = {"fn": self.redraw, "inputs": [state, show, layer], "outputs": figure, "show_progress": "hidden"}
        gr.on([show.input, layer.input], trigger_mode="always_last", **redrawn)
        for button, export, inputs in ((png, self.as_png, [state, show, layer]), (trace_json, self.as_json, [state])):
            button.click(export, inputs, file, show_progress="hidden").success(None, file, None, js=_DOWNLOAD)
        return picture, question, positions

    def _compare_tab(self, tab: gr.Tab, names: gr.Dropdown, subject: list[Any], positions: gr.Radio) -> None:
        gr.HTML('<p class="fv-note">Model, picture and question are those of the Inspect tab.</p>')
        with gr.Row(equal_height=True):
            names.render()
            budget = gr.Slider(1, 100, 25, step=1, label="Budget in percent", scale=2, min_width=240)
        run = gr.Button("Compare", variant="primary", elem_id="fv-compare-run", elem_classes="fv-run")
        table = gr.HTML(min_height=320, elem_id="fv-comparison")
        gr.on(
            [run.click, budget.release, tab.select],
            self.compare,
            [*subject, names, budget, positions],
            table,
            trigger_mode="always_last",
            **_MODEL,
        )


def uploaded(payload: ImageData | None) -> str | None:
    """Where the server keeps an upload, unopened: Gradio would open it, and tell the path of what it cannot read."""
    return payload.path if payload else None


def composed(name: str, inner: str | None) -> str:
    """The name of a method, around another one where it goes around any."""
    return f"{AROUND[name]}{inner}" if name in AROUND and inner else name


def offer(engine: Engine) -> list[tuple[str, str]]:
    """Choices of the method box; an inner method has a box of its own."""
    chance = [("random, as many tokens as …", "random@")] if "random@" in engine.inner else []
    return [*((name, name) for name in engine.methods), *chance]


def offer_whole(engine: Engine) -> list[str]:
    """All names, composed ones after the others."""
    return [*engine.methods, *(composed(name, inner) for name, inside in engine.inner.items() for inner in inside)]


def _compared(engine: Engine) -> list[str]:
    """What the Compare tab starts with."""
    return [name for name in _COMPARED if name in engine.methods]


def _file(result: Result) -> str:
    """What a download is called, without ending."""
    return "foveate-" + re.sub(r"[^\w.@+-]", "-", result.pruner.name)


def theme() -> Any:
    """Quiet colours and the system's own fonts: nothing is fetched from anywhere."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    base: Any = gr.themes.Base  # pyright: ignore[reportPrivateImportUsage]
    return base(primary_hue="blue", neutral_hue="slate", radius_size="md", font=fonts, font_mono=mono).set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300"
    )
