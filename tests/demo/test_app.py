"""What the app does without a browser: uploads are checked, users do not meet, failures harm nobody, exports repeat it."""

from __future__ import annotations

import base64
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from html import unescape

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image

import foveate
from foveate.demo import app as module
from foveate.demo import views
from foveate.demo.app import open_picture
from foveate.demo.examples import EXAMPLES, invoice, moving, picture
from foveate.demo.export import snippet
from foveate.errors import InputError, ParameterError
from foveate.eval_suites import models

PICTURE, QUESTION = EXAMPLES[0].picture(), EXAMPLES[0].question


def tokens_of(figure: str) -> dict:
    """What a drawing tells the browser about its tokens."""
    return json.loads(unescape(re.search(r'data-tokens="([^"]*)"', figure)[1]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("upload") / "picture.png"
    PICTURE.save(path)
    return str(path)


# ----------------------------------------------------------------------------------------------------------- uploads


def test_a_picture_is_opened_upright_and_in_colour(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    Image.new("L", (30, 20), 200).save(tmp_path / "a.jpg", exif=exif)
    opened = open_picture(str(tmp_path / "a.jpg"))
    assert (opened.mode, opened.size) == ("RGB", (20, 30))


@pytest.mark.parametrize("side", [5000, 20000])
def test_too_many_pixels_are_refused_before_they_are_decoded(side, tmp_path, monkeypatch):
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *args: pytest.fail("decoded"))
    with pytest.raises(InputError, match="million"):
        open_picture(str(tmp_path / "bomb.png"))


def test_large_files_and_files_that_are_no_picture_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("no picture")
    (tmp_path / "a.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    PICTURE.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    for name in ("a.png", "a.svg", "cut.png"):
        with pytest.raises(InputError, match="cannot be read as a picture"):
            open_picture(str(tmp_path / name))
    with pytest.raises(InputError, match="no picture yet"):
        open_picture(None)
    monkeypatch.setattr(module, "MAX_BYTES", 2**20)
    (tmp_path / "large.png").write_bytes(bytes(2**20 + 1))
    with pytest.raises(InputError, match="larger than 1 MB"):
        open_picture(str(tmp_path / "large.png"))


def test_the_server_opens_no_path_that_a_client_names(address, tmp_path):
    """Neither as a download nor as an upload that was none."""
    secret = tmp_path / "secret.png"
    PICTURE.save(secret)
    assert httpx.get(f"{address}gradio_api/file={secret}").status_code in (403, 404)
    named = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    data = [named, QUESTION, "random", "percent", 50, "", "auto", "kept"]
    asked = httpx.post(f"{address}gradio_api/call/inspect", json={"data": data}).json()
    with httpx.stream("GET", f"{address}gradio_api/call/inspect/{asked['event_id']}", timeout=60) as answer:
        said = "".join(answer.iter_text())
    assert "event: error" in said
    assert "event: complete" not in said


def test_it_serves_this_machine_only_and_sends_no_telemetry(app, address):
    assert address.startswith("http://127.0.0.1:")
    config = httpx.get(f"{address}config").json()
    assert config["analytics_enabled"] is False
    assert app.blocks.share is False
    assert app.blocks.allowed_paths == []
    assert not re.findall(r"https?://fonts", httpx.get(f"{address}theme.css").text)


# ----------------------------------------------------------------------------------------------------------- answers


def test_answers_are_those_of_plain_calls(app):
    loaded = models.load("shapes-llava")
    inputs = loaded.processor(images=PICTURE, text=app.engine.prompt(QUESTION), return_tensors="pt")
    plain = loaded.model.generate(**inputs, max_new_tokens=32, do_sample=False)
    said = loaded.processor.decode(plain[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert app.engine.unpruned(PICTURE, QUESTION).text == said.strip() == "yellow"
    with foveate.attach(loaded.model, "hiprune", keep=0.25, positions="keep") as session:
        loaded.model.generate(**inputs, max_new_tokens=32, do_sample=False)
    pruned = app.engine.pruned(PICTURE, QUESTION, foveate.HiPrune(keep=0.25), "keep")
    assert pruned.trace.images[0].kept.equal(session.trace.images[0].kept)
    assert pruned.tokens == session.trace.tokens_per_layer


def test_the_app_lists_what_the_model_can_serve(app):
    assert set(app.engine.methods) | set(app.engine.refused) == set(foveate.PRUNERS)
    assert {"random", "divprune", "visionzip", "fastv"} <= set(app.engine.methods)


def test_eight_users_at_once_get_each_their_own(app):
    wanted = [(name, keep) for keep in (20, 50) for name in ("random", "divprune", "visionzip", "fastv")]
    pictures = [example.picture() for example in EXAMPLES[:4]] * 2

    def ask(user: int) -> views.Answer:
        name, keep = wanted[user]
        return app.engine.pruned(pictures[user], f"What is here, {user}?", app.engine.method(name, keep), "keep")

    alone = [ask(user) for user in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))
    for user, (one, other) in enumerate(zip(alone, together)):
        assert other.text == one.text
        assert other.trace.method == wanted[user][0]
        assert len(other.trace.images[0].kept) == wanted[user][1]
        assert other.trace.images[0].kept.equal(one.trace.images[0].kept)


def test_eight_sessions_at_once_keep_their_own_results(app, address, saved):
    """Over the network: each session's trace is its own, asked for after all others have got theirs."""
    wanted = [(name, keep) for keep in (20, 50) for name in ("random", "divprune", "visionzip", "fastv")]
    together = threading.Barrier(8, timeout=120)

    def visit(user: int) -> dict:
        client = Client(address, verbose=False)
        together.wait()
        name, keep = wanted[user]
        asked = [handle_file(saved), QUESTION, name, "tokens", keep, "", "keep", "kept"]
        client.predict(*asked, api_name="/inspect")
        together.wait()
        told = client.predict(api_name="/as_json")
        return json.loads(base64.b64decode(told.partition("base64,")[2]))["trace"]

    with ThreadPoolExecutor(8) as pool:
        traces = list(pool.map(visit, range(8)))
    for (name, keep), trace in zip(wanted, traces):
        alone = app.engine.pruned(PICTURE, QUESTION, app.engine.method(name, keep), "keep").trace
        assert (trace["method"], trace["parameters"]["keep"]) == (name, keep)
        assert trace["images"][0]["stages"][-1]["kept"] == alone.images[0].kept.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "  "}, "question is empty"),
        ({"question": "x" * 501}, "at most 500"),
        ({"more": "layer=99"}, "has no parameter|layer=99"),
        ({"more": "keep=__import__('os')"}, "cannot be read"),
        ({"path": None}, "no picture yet"),
    ],
)
def test_a_bad_request_is_told_and_harms_nobody(app, saved, change, message):
    before = app.engine.pruned(PICTURE, QUESTION, foveate.DivPrune(keep=20), "keep")
    asked = {"path": saved, "question": QUESTION, "name": "visionzip", "unit": "percent", "budget": 25}
    asked |= {"more": "", "positions": "keep", "show": "kept", **change}
    with pytest.raises(gr.Error) as told:
        app.inspect(**asked)
    assert re.search(message, told.value.message)
    after = app.engine.pruned(PICTURE, QUESTION, foveate.DivPrune(keep=20), "keep")
    assert (after.text, after.trace.images[0].kept.tolist()) == (before.text, before.trace.images[0].kept.tolist())


def test_an_unexpected_failure_hides_its_insides_and_leaves_the_model_free(app, saved, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a secret of the server")

    with monkeypatch.context() as patch:
        patch.setattr(app.engine.model, "generate", broken)
        with pytest.raises(gr.Error) as told:
            app.inspect(saved, QUESTION, "random", "percent", 25, "", "keep", "kept")
    assert "secret" not in told.value.message
    assert app.engine.pruned(PICTURE, QUESTION, foveate.Random(keep=20), "keep").trace.method == "random"


def test_the_budget_counts_in_percent_or_in_tokens(app, saved):
    for unit, budget in (("percent", 25), ("tokens", 36)):
        result = app.inspect(saved, QUESTION, "divprune", unit, budget, "", "keep", "kept")[0]
        assert len(result.trace.kept) == 36
    assert app.convert(result, "tokens", 50).value == 72
    assert app.convert(result, "percent", 36).value == 25


# ------------------------------------------------------------------------------------------------------------- views


def test_the_drawing_tells_the_browser_what_the_trace_says(app):
    result = app.start
    told = tokens_of(views.figure(result.trace, PICTURE, "kept", 0))
    kept = result.trace.kept.tolist()
    assert [i for i, left in enumerate(told["left"]) if left < 0] == kept
    assert told["owner"] == result.trace.owner.tolist()
    assert np.allclose([s for s in told["scores"] if s is not None], result.trace.scores.numpy(), rtol=1e-3)
    (panel,) = told["panels"]
    assert (panel["rows"], panel["cols"]) == result.trace.grid


def test_views_follow_what_a_method_provides(app):
    for name, expected in (
        ("random", ["kept"]),
        ("visionzip", ["kept", "scores", "groups"]),
        ("avgpool", ["kept", "groups"]),
    ):
        answer = app.engine.pruned(PICTURE, QUESTION, app.engine.method(name, 0.25), "keep")
        assert set(views.views(answer.trace.images[0])) - {"scores"} == set(expected) - {"scores"}


def test_a_method_that_drops_on_the_way_has_layers_to_look_at(app, saved):
    shown = app.inspect(saved, QUESTION, "fastv", "percent", 25, "", "keep", "kept")
    result, slider = shown[0], shown[4]
    assert slider.visible
    assert slider.value == result.trace.stages[0].layer > 0
    first, later = (app.redraw(result, "kept", layer) for layer in (0, slider.value))
    assert "144 of 144" in first
    assert "36 of 144" in later


def test_what_a_model_says_is_shown_as_text():
    answer = views.Answer("<img src=x onerror=alert(1)>", 0.1, [4])
    assert "<img" not in views.answers(answer, answer, foveate.Random(keep=4)).replace("<i style", "")


def test_overlap_is_intersection_over_union(app):
    rows = [
        (pruner, app.engine.pruned(PICTURE, QUESTION, pruner, "keep"))
        for pruner in (foveate.Random(keep=36), foveate.Random(keep=36, seed=1), foveate.Grid(keep=144))
    ]
    table = views.overlap(rows)
    a, b = (set(answer.trace.images[0].kept.tolist()) for _, answer in rows[:2])
    assert table[0, 1] == table[1, 0] == pytest.approx(len(a & b) / len(a | b))
    assert table[0, 2] == pytest.approx(0.25)
    assert np.diag(table).tolist() == [1, 1, 1]


def test_compare_shows_each_method_and_refuses_none(app, saved):
    shown = app.compare(saved, QUESTION, ["random", "visionzip", "fastv"], 25, "keep")
    assert shown.count("<article") == 3
    assert shown.count('<th scope="row">') == 3
    with pytest.raises(gr.Error, match="no method is chosen"):
        app.compare(saved, QUESTION, [], 25, "keep")


# ------------------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize(
    ("name", "more", "own"), [("visionzip", "", False), ("random", "seed=3", True), ("fastv", "", True)]
)
def test_the_snippet_repeats_what_is_on_the_screen(app, name, more, own, tmp_path, monkeypatch, capsys):
    image = invoice().rotate(3) if own else picture("code")
    pruner = app.engine.method(name, 0.3, more)
    question = 'What\'s "here"?' if own else EXAMPLES[1].question
    seen = app.engine.pruned(image, question, pruner, "keep")
    code = snippet(
        model=app.engine.name,
        prompt=app.engine.prompt(question),
        pruner=pruner,
        positions="keep",
        max_new_tokens=32,
        example=None if own else "code",
    )
    monkeypatch.chdir(tmp_path)
    image.save("picture.png")
    ran: dict = {}
    exec(compile(code, "snippet", "exec"), ran)
    assert torch.equal(ran["session"].trace.images[0].kept, seen.trace.images[0].kept)
    assert capsys.readouterr().out.startswith(seen.text)
    assert Image.open("overlay.png").size[0] > 100


def test_exports_hold_the_drawing_and_the_trace(app):
    result = app.start
    name, _, url = app.as_png(result, "scores", 0).partition("|")
    assert name == f"foveate-{result.pruner.name}-scores.png"
    assert base64.b64decode(url.partition(",")[2]).startswith(b"\x89PNG")
    name, _, url = app.as_json(result).partition("|")
    told = json.loads(base64.b64decode(url.partition(",")[2]))
    assert told["trace"]["images"][0]["stages"][0]["kept"] == result.trace.kept.tolist()
    assert (told["question"], told["answer"]) == (result.question, result.pruned.text)


def test_examples_are_the_same_every_time():
    for example in EXAMPLES:
        assert picture(example.name).tobytes() == example.picture().tobytes()
    assert len({frame.tobytes() for frame in moving()}) == 8


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--port", "0"], "--port 0"), (["--max-new-tokens", "0"], "at least 1"), (["--model", "nn"], "no model 'nn'")],
)
def test_bad_arguments_end_in_one_line(args, message, capsys):
    from foveate.cli import main

    assert main(["demo", *args]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_method_without_parameters_is_refused_clearly(app):
    with pytest.raises((ParameterError, LookupError), match="no parameter"):
        app.engine.method("random", 0.5, "nonsense=1")
