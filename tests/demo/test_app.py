"""The app without a browser: uploads are checked, users do not meet, failures harm nobody, exports repeat it."""

from __future__ import annotations

import base64
import dataclasses
import inspect
import json
import os
import re
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import foveate
from foveate.demo import launch, media, views
from foveate.demo.engine import Engine, Engines
from foveate.demo.examples import BY_MODEL, EVERYWHERE, example, examples, invoice, moving
from foveate.demo.media import Clip, key, open_media
from foveate.errors import FoveateError, InputError, ParameterError
from foveate.eval_suites.running import models

EXAMPLES = BY_MODEL["shapes-llava"]
PICTURE, QUESTION = EXAMPLES[0].make(), EXAMPLES[0].question
DEFAULTS = {
    "model": "shapes-llava",
    "question": QUESTION,
    "name": "visionzip",
    "inner": None,
    "unit": "percent",
    "budget": 25,
    "more": "",
    "positions": "keep",
    "show": "kept",
}


def tokens_of(figure: str) -> dict:
    """What a drawing tells the browser about its tokens."""
    return json.loads(unescape(re.search(r'data-tokens="([^"]*)"', figure)[1]))


def write_video(path: str | Path, frames: int = 40, size: tuple[int, int] = (96, 64), rate: int = 10) -> None:
    """A grey video whose frame i has brightness 6 i."""
    av = pytest.importorskip("av", reason="PyAV is not installed (extras demo and dev)")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            grey = np.full((size[1], size[0], 3), 6 * i % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())


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
    opened = open_media(str(tmp_path / "a.jpg"))
    assert (opened.mode, opened.size) == ("RGB", (20, 30))


@pytest.mark.parametrize("side", [5000, 20000])
def test_too_many_pixels_are_refused_before_they_are_decoded(side, tmp_path, monkeypatch):
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *args: pytest.fail("decoded"))
    with pytest.raises(InputError, match="million"):
        open_media(str(tmp_path / "bomb.png"))


def test_large_files_and_files_that_are_no_picture_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("no picture")
    (tmp_path / "a.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    PICTURE.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    for name in ("a.png", "a.svg", "cut.png"):
        with pytest.raises(InputError, match="cannot be read as a picture"):
            open_media(str(tmp_path / name))
    with pytest.raises(InputError, match="no picture yet"):
        open_media(None)
    monkeypatch.setattr(media, "MAX_BYTES", 2**20)
    (tmp_path / "large.png").write_bytes(bytes(2**20 + 1))
    with pytest.raises(InputError, match="larger than 1 MB"):
        open_media(str(tmp_path / "large.png"))


def test_a_clip_written_as_an_animated_picture_is_read_back_pixel_by_pixel(tmp_path):
    clip = next(known for known in BY_MODEL["shapes-qwen"] if known.name.startswith("clip")).make()
    (tmp_path / "a.webp").write_bytes(clip.webp())
    again = open_media(tmp_path / "a.webp")
    assert key(again) == key(clip)
    assert again.fps == pytest.approx(clip.fps, rel=0.02)  # whole milliseconds
    assert open_media(app_gif(tmp_path)).array.shape == (3, 20, 30, 3)


def app_gif(folder: Path) -> Path:
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green", "blue")]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:], duration=50)
    return folder / "a.gif"


def test_a_video_file_becomes_a_clip_of_few_frames(tmp_path):
    write_video(tmp_path / "a.mp4", frames=40, size=(1024, 64))
    clip = open_media(tmp_path / "a.mp4")
    assert clip.array.shape == (media.FRAMES, 32, media.SIDE, 3)
    assert np.diff(clip.array.mean(axis=(1, 2, 3))).min() > 8  # in order, from the first to the last
    assert clip.fps == pytest.approx(media.FRAMES / 4.0)
    write_video(tmp_path / "b.mp4", frames=5)
    assert len(open_media(tmp_path / "b.mp4").frames) == 5


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"seconds": 3.0}, "4 s long; at most 3 s"),
        ({"frames": 39}, "40 frames; at most 39"),
        ({"pixels": 96 * 64 - 1}, "96 x 64 pixels; at most"),
    ],
)
def test_videos_beyond_the_limits_are_refused_before_they_are_decoded(limits, message, tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4")
    monkeypatch.setattr(media, "VIDEO_LIMITS", dataclasses.replace(media.VIDEO_LIMITS, **limits))
    monkeypatch.setattr("foveate.adapters.video.reading._decoded", lambda *args: pytest.fail("decoded"))
    with pytest.raises(InputError, match=message):
        open_media(tmp_path / "a.mp4")


def test_large_videos_and_long_animations_are_refused(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4")
    monkeypatch.setattr(media, "MAX_VIDEO_BYTES", 1000)
    with pytest.raises(InputError, match="larger than"):
        open_media(tmp_path / "a.mp4")
    gif = app_gif(tmp_path)
    monkeypatch.setattr(media, "MAX_ANIMATION", 3 * 30 * 20 - 1)
    with pytest.raises(InputError, match="3 frames of 30 x 20 pixels"):
        open_media(gif)


def test_a_playlist_that_poses_as_a_video_opens_no_other_file(tmp_path):
    """FFmpeg would follow it to any file or address."""
    write_video(tmp_path / "secret.mp4")
    listed = f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{tmp_path / 'secret.mp4'}\n#EXT-X-ENDLIST\n"
    (tmp_path / "a.mp4").write_text(listed)
    (tmp_path / "b.mp4").write_text(f"ffconcat version 1.0\nfile '{tmp_path / 'secret.mp4'}'\n")
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(InputError, match="cannot be decoded"):
            open_media(tmp_path / name)


def test_video_where_the_model_takes_none_or_nothing_reads_it_is_told(app, tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4")
    with pytest.raises(gr.Error, match="shapes-llava takes pictures and no video; under Model choose shapes-qwen"):
        app.video("shapes-llava", str(tmp_path / "a.mp4"))
    clip = app.shelf(app.engines["shapes-qwen"]).files[3]
    with pytest.raises(gr.Error, match="takes pictures and no video"):
        app.inspect(**{**DEFAULTS, "path": clip})
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(gr.Error, match="needs PyAV"):
        app.video("shapes-qwen", str(tmp_path / "a.mp4"))


def test_an_uploaded_video_is_shown_as_the_frames_that_the_model_sees(app, tmp_path):
    write_video(tmp_path / "a.mp4")
    assert key(open_media(app.video("shapes-qwen", str(tmp_path / "a.mp4")))) == key(open_media(tmp_path / "a.mp4"))


def test_the_server_opens_no_path_that_a_client_names(address, tmp_path):
    """Neither as a download nor as an upload that was none."""
    secret = tmp_path / "secret.png"
    PICTURE.save(secret)
    assert httpx.get(f"{address}gradio_api/file={secret}").status_code in (403, 404)
    named = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    data = ["shapes-llava", named, QUESTION, "random", None, "percent", 50, "", "auto", "kept"]
    asked = httpx.post(f"{address}gradio_api/call/inspect", json={"data": data}).json()
    with httpx.stream("GET", f"{address}gradio_api/call/inspect/{asked['event_id']}", timeout=60) as answer:
        said = "".join(answer.iter_text())
    assert "event: error" in said
    assert "event: complete" not in said


def test_a_broken_upload_is_told_in_one_sentence_without_paths(address, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    asked = [
        "shapes-llava",
        handle_file(tmp_path / "bad.png"),
        QUESTION,
        "random",
        None,
        "percent",
        50,
        "",
        "keep",
        "kept",
    ]
    with pytest.raises(AppError) as told:
        Client(address, verbose=False).predict(*asked, api_name="/inspect")
    assert str(told.value) == "the file cannot be read as a picture (PNG, JPEG, WEBP, GIF, BMP)"


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
    pictures = [known.make() for known in EXAMPLES[:4]] * 2

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
        asked = ["shapes-llava", handle_file(saved), QUESTION, name, None, "tokens", keep, "", "keep", "kept"]
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
        ({"name": "random,grid"}, "not one method|cannot be read"),
        ({"name": "x" * 1000}, "may have 80 characters"),
        ({"name": "hyprune"}, "hiprune"),
        ({"model": "../../etc"}, "no model"),
    ],
)
def test_a_bad_request_is_told_and_harms_nobody(app, saved, change, message):
    before = app.engine.pruned(PICTURE, QUESTION, foveate.DivPrune(keep=20), "keep")
    with pytest.raises(gr.Error) as told:
        app.inspect(**{**DEFAULTS, "path": saved, **change})
    assert re.search(message, told.value.message)
    after = app.engine.pruned(PICTURE, QUESTION, foveate.DivPrune(keep=20), "keep")
    assert (after.text, after.trace.images[0].kept.tolist()) == (before.text, before.trace.images[0].kept.tolist())


def test_an_unexpected_failure_hides_its_insides_and_leaves_the_model_free(app, saved, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a secret of the server")

    with monkeypatch.context() as patch:
        patch.setattr(app.engine.model, "generate", broken)
        with pytest.raises(gr.Error) as told:
            app.inspect(**{**DEFAULTS, "path": saved, "name": "random"})
    assert "secret" not in told.value.message
    assert app.engine.pruned(PICTURE, QUESTION, foveate.Random(keep=20), "keep").trace.method == "random"


def test_a_result_is_marked_while_it_is_not_of_the_picture_that_is_there(app, saved, tmp_path):
    result = app.inspect(**{**DEFAULTS, "path": saved})[0]
    (tmp_path / "bad.png").write_text("no picture")
    invoice().save(tmp_path / "other.png")
    marked = [
        "fv-outdated" in app.outdate(result, path)
        for path in (saved, None, str(tmp_path / "bad.png"), str(tmp_path / "other.png"))
    ]
    assert marked == [False, True, True, True]


def test_the_budget_counts_in_percent_or_in_tokens(app, saved):
    for unit, budget in (("percent", 25), ("tokens", 36)):
        result = app.inspect(**{**DEFAULTS, "path": saved, "name": "divprune", "unit": unit, "budget": budget})[0]
        assert len(result.trace.kept) == 36
    assert app.convert(result, "tokens", 50).value == 72
    assert app.convert(result, "percent", 36).value == 25


# ------------------------------------------------------------------------------------------------------------ models


def test_each_model_comes_with_its_examples_methods_and_note(app):
    for model, known in BY_MODEL.items():
        buttons, file, question, method, positions, refused, note, compared = app.switch(model, "visionzip")
        engine = app.engines[model]
        assert [known.name in buttons for known in known] == [True] * len(known)
        assert (key(open_media(file)), question) == (key(known[0].make()), known[0].question)
        assert [value for _, value in method.choices if value != "random@"] == engine.methods
        assert (method.value, positions) == ("visionzip", "keep")
        assert all(name in refused for name in engine.refused)
        assert model in note
        assert set(compared.value) <= set(engine.methods)


def test_anyres_pictures_have_their_thumbnail_and_crops_in_the_drawing(app):
    shelf = app.shelf(app.engines["shapes-next"])
    asked = {"model": "shapes-next", "path": shelf.files[0], "question": shelf.examples[0].question}
    result, _, figure, *_ = app.inspect(**{**DEFAULTS, **asked})
    told = tokens_of(figure)
    assert [panel["title"] for panel in told["panels"]] == ["thumbnail", "crops"]
    assert (
        sum(panel["rows"] * panel["cols"] for panel in told["panels"]) == result.trace.layout.size == len(told["left"])
    )
    thumbnail, crops = told["panels"]
    assert thumbnail["x"] + thumbnail["cols"] * thumbnail["cell"] < crops["x"]
    assert result.unpruned.text == "yellow"


@pytest.mark.parametrize("name", ["quota", "grid", "random"])
def test_a_clip_is_drawn_as_a_strip_with_the_tokens_of_each_frame(app, name):
    shelf = app.shelf(app.engines["shapes-qwen"])
    asked = {"model": "shapes-qwen", "path": shelf.files[3], "question": shelf.examples[3].question, "name": name}
    result, cards, figure, *_ = app.inspect(**{**DEFAULTS, **asked})
    told = tokens_of(figure)
    assert [panel["title"] for panel in told["panels"]] == [f"frames {2 * i}-{2 * i + 1}" for i in range(8)]
    kept = [i for i, left in enumerate(told["left"]) if left < 0]
    assert kept == result.trace.kept.tolist()
    assert 0 < len(kept) <= round(0.25 * result.trace.layout.size)
    assert ("scores of the frames" in cards) == (name == "quota") == (result.pruned.scoring > 0)
    counts = np.histogram(kept, [panel["first"] for panel in told["panels"]] + [result.trace.layout.size])[0]
    assert (len(set(counts)) > 1) == (name == "quota")  # the baselines treat all frames alike


def test_methods_around_others_offer_what_may_be_inside(app):
    about, inner, budget = app.choose("shapes-llava", "pospad", None)
    assert inner.visible
    assert {"random", "focusui", "hiprune"} <= {value for _, value in inner.choices}
    assert "fastv" not in {value for _, value in inner.choices}  # needs another marker
    assert budget.interactive
    assert "marker" in about
    _, inner, _ = app.choose("shapes-llava", "random@", "fastv")
    assert inner.value == "fastv"
    assert {value for _, value in inner.choices} == {"fastv", "todre", "transprune", "corematching"}
    assert not app.choose("shapes-llava", "hiprune", "fastv")[1].visible
    assert not app.choose("shapes-llava", "transprune", None)[2].interactive  # has no budget


def test_composed_methods_run(app, saved):
    for name, inner, expected in (("pospad", "random", "pospad:random"), ("random@", "fastv", "random@fastv")):
        result = app.inspect(**{**DEFAULTS, "path": saved, "name": name, "inner": inner})[0]
        assert result.pruned.trace.method == expected
    shown = app.compare("shapes-llava", saved, QUESTION, ["pospad:hiprune", "random@fastv"], 25, "keep")
    assert "pospad:hiprune" in shown
    assert "random@fastv" in shown


def test_a_model_that_cannot_be_loaded_is_told_and_asked_for_again(monkeypatch):
    asked = []

    def make(name: str) -> Engine:
        asked.append(name)
        raise FoveateError("model 'shapes-qwen' needs the Torchvision library")

    engines = Engines(["shapes-qwen"], make)
    for _ in range(2):
        with pytest.raises(FoveateError, match="Torchvision"):
            engines["shapes-qwen"]
    assert len(asked) == 2


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
    shown = app.inspect(**{**DEFAULTS, "path": saved, "name": "fastv"})
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
    shown = app.compare("shapes-llava", saved, QUESTION, ["random", "visionzip", "fastv"], 25, "keep")
    assert shown.count("<article") == 3
    assert shown.count('<th scope="row">') == 3
    inspected = app.inspect(**{**DEFAULTS, "path": saved, "name": "fastv"})[1]
    count = re.findall(r"<b>[\d.]+</b> visual tokens per layer \(\d+%\)", inspected)[1]
    assert count in shown  # one quantity in both tabs
    assert len(re.findall("visual tokens per layer", shown)) == 4
    with pytest.raises(gr.Error, match="no method is chosen"):
        app.compare("shapes-llava", saved, QUESTION, [], 25, "keep")


# ------------------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize(
    ("model", "name", "more", "number"),
    [
        ("shapes-llava", "visionzip", "", 1),
        ("shapes-llava", "random", "seed=3", None),
        ("shapes-llava", "downsample", "", None),
        ("shapes-llava", "pospad:random", "seed=2, placement='middle'", 0),
        ("shapes-llava", "random@fastv", "", 0),
        ("shapes-llava", "then:avgpool+fastv", "", 0),
        ("shapes-llava", "corematching", "", 0),
        ("shapes-next", "globalcom2", "", 0),
        ("shapes-qwen", "focusui", "", 0),
        ("shapes-qwen", "quota", "", 3),
        ("shapes-qwen", "grid", "", None),
    ],
)
def test_the_snippet_repeats_what_is_on_the_screen(app, model, name, more, number, tmp_path, monkeypatch, capsys):
    """For an example, and for a file of the visitor's own; the code runs as it is."""
    engine = app.engines[model]
    question = 'What\'s "here"?'
    monkeypatch.chdir(tmp_path)
    if number is not None:
        known = app.shelf(engine).examples[number]
        path, question = app.shelf(engine).files[number], known.question
    elif model == "shapes-qwen":
        path = "clip.mp4"
        write_video(path)
    else:
        path = "picture.png"
        invoice().rotate(3).save(path)
    asked = {**DEFAULTS, "model": model, "path": path, "question": question, "name": name, "more": more, "budget": 30}
    shown = app.inspect(**asked)
    result, code = shown[0], shown[-1]
    ran: dict = {}
    exec(compile(code, "snippet", "exec"), ran)
    trace = ran["session"].trace
    assert ran["method"] == result.pruner
    assert trace.tokens_per_layer == result.pruned.tokens
    assert torch.equal(trace.images[0].kept, result.trace.kept)
    assert capsys.readouterr().out.startswith(result.pruned.text)
    with Image.open("overlay.png") as drawn:
        assert drawn.size[0] > 100


def test_exports_hold_the_drawing_and_the_trace(app):
    result = app.start
    name, _, url = app.as_png(result, "scores", 0).partition("|")
    assert name == f"foveate-{result.pruner.name}-scores.png"
    assert base64.b64decode(url.partition(",")[2]).startswith(b"\x89PNG")
    name, _, url = app.as_json(result).partition("|")
    told = json.loads(base64.b64decode(url.partition(",")[2]))
    assert told["trace"]["images"][0]["stages"][0]["kept"] == result.trace.kept.tolist()
    assert (told["question"], told["answer"]) == (result.question, result.pruned.text)


def test_examples_are_the_same_every_time_and_have_names_of_their_own():
    every = {known.name: known for known in (*EVERYWHERE, *(known for each in BY_MODEL.values() for known in each))}
    for name, known in every.items():
        assert key(example(name)) == key(known.make())
    assert len({key(known.make()) for known in every.values()}) == len(every)
    assert len({frame.tobytes() for frame in moving().frames}) == 8
    assert isinstance(examples("owner/large", takes_video=True)[-1].make(), Clip)
    assert not any(isinstance(known.make(), Clip) for known in examples("owner/large"))


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--port", "0"], "--port 0"), (["--max-new-tokens", "0"], "at least 1"), (["--model", "nn"], "no model 'nn'")],
)
def test_bad_arguments_end_in_one_line(args, message, capsys):
    from foveate.cli import main

    assert main(["demo", *args]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_command_says_what_it_loads_and_then_where_it_serves(monkeypatch, capsys):
    from foveate.cli import main

    with gr.Blocks() as page:
        gr.Markdown("here")
    said = []

    def create(*args) -> SimpleNamespace:
        said.append(capsys.readouterr().out)
        return SimpleNamespace(blocks=page)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(launch, "create", create)
    monkeypatch.setattr(page, "block_thread", lambda: said.append(capsys.readouterr().out))
    assert main(["demo", "--port", str(port)]) == 0
    page.close(verbose=False)
    assert said == ["loading shapes-llava …\n", f"open http://127.0.0.1:{port}/ in a browser; Ctrl-C ends it\n"]


def test_oblong_pictures_say_what_of_them_is_seen(app):
    """CLIP's processor crops the centre, AnyRes shows all of a picture."""
    told = "only the middle square"
    oblong, question = Image.new("RGB", (300, 200), "teal"), "What is here?"
    for model, crops in (("shapes-llava", True), ("shapes-next", False)):
        engine = app.engines[model]
        trace = engine.pruned(oblong, question, foveate.Random(keep=0.5), "keep").trace.images[0]
        assert (told in views.figure(trace, oblong, "kept", 0)) == crops == trace.centre_crop
    assert told not in views.figure(app.start.trace, PICTURE, "kept", 0)


def test_a_method_without_parameters_is_refused_clearly(app):
    with pytest.raises((ParameterError, LookupError), match="no parameter"):
        app.engine.method("random", 0.5, "nonsense=1")


def test_gradio_writes_no_stub_files_while_the_demo_imports_it():
    """It cannot find its own sources then, others can find theirs, and afterwards all is as it was."""
    with launch._no_stub_files():
        with pytest.raises(OSError, match="not needed"):
            inspect.getfile(gr.Image)
        assert inspect.getfile(Image.Image).endswith("Image.py")
    assert inspect.getfile(gr.Image).endswith("image.py")


NO_NETWORK = """
import socket, sys

def guarded(connect):
    def refuse(self, address, *rest):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            print("asked for", address, file=sys.stderr)
            raise OSError("no network here")
        return connect(self, address, *rest)
    return refuse

def resolve(host, *rest, known=socket.getaddrinfo, **more):
    if host not in ("127.0.0.1", "::1", "localhost", None):
        print("asked for", host, file=sys.stderr)
        raise OSError("no network here")
    return known(host, *rest, **more)

socket.socket.connect = guarded(socket.socket.connect)
socket.socket.connect_ex = guarded(socket.socket.connect_ex)
socket.getaddrinfo = resolve
from foveate.demo import launch
address = launch.serve(launch.create(), block=False)
import urllib.request
print(address, urllib.request.urlopen(address).status)
"""


def test_starting_up_does_not_touch_the_network():
    """In a process of its own, with every address but this machine's out of reach."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "GRADIO_", "TRANSFORMERS_"))}
    ran = subprocess.run([sys.executable, "-c", NO_NETWORK], capture_output=True, text=True, timeout=300, env=plain)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("http://127.0.0.1:")
    assert ran.stdout.split()[1] == "200"
    assert "asked for" not in ran.stderr
