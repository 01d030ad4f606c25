"""The clips suite: seeded videos, answers right by construction and shown in few frames only."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from foveate.eval_suites import suites
from foveate.eval_suites.running import models
from foveate.eval_suites.suites import clips
from foveate.eval_suites.suites.clips import scenes
from foveate.eval_suites.training import evaluate

FLOOR = 0.90  # 0.96 on 400 questions


def drawn(count: int, held_out: bool, seed: int = 3) -> list[scenes.Clip]:
    rng = np.random.default_rng(seed)
    return [scenes.draw_clip(rng, held_out) for _ in range(count)]


def truth(clip: scenes.Clip, question: str) -> tuple[str, range]:
    """Answer and frames read off a clip's own description, independently of how questions are drawn."""
    words = re.findall(r"\w+", question)
    signs = "sign" in words
    events = [e for e in clip.events if (len(e.what) == 1) == signs]
    (event,) = [e for e in events if (e.what if words[1] == "colour" else e.colour) in words[2:]]
    return (event.colour if words[1] == "colour" else event.what), event.frames()


def test_samples_are_videos():
    for sample in clips.samples(7):
        assert (sample.video.shape, sample.video.dtype) == ((16, 64, 64, 3), np.uint8)


def test_answers_follow_from_the_clip():
    rng = np.random.default_rng(0)
    for clip in drawn(200, held_out=False):
        for task in clips.TASKS:
            question = scenes.ask(clip, task, rng)
            answer, frames = truth(clip, question.text)
            assert (question.answer, question.frames) == (answer, tuple(frames))


def test_events_happen_one_after_the_other_inside_the_picture_and_briefly():
    for clip in drawn(300, held_out=True):
        shown = [frame for event in clip.events for frame in event.frames()]
        assert len(shown) == len(set(shown))
        assert min(shown) >= 0
        assert max(shown) < scenes.FRAMES
        for event in clip.events:
            assert 2 <= event.length <= 3
            for frame in event.frames():
                left, top, right, bottom = event.box(frame)
                assert left >= 0
                assert top >= 0
                assert right <= scenes.SIZE
                assert bottom <= scenes.SIZE


def test_events_are_painted_in_their_frames_and_colours_only():
    """The frames that hold an event differ from those around it where its box is, and show its colour there."""
    rng = np.random.default_rng(1)
    for clip in drawn(30, held_out=True):
        video = scenes.render(clip, rng).astype(float)
        quiet = np.median(video, axis=0)
        busy = {frame for event in clip.events for frame in event.frames()}
        for frame in set(range(scenes.FRAMES)) - busy:
            assert (np.abs(video[frame] - quiet).mean(-1) > 60).mean() < 0.02
        for event in clip.events:
            for frame in event.frames():
                left, top, right, bottom = event.box(frame)
                region, still = video[frame, top:bottom, left:right], quiet[top:bottom, left:right]
                painted = np.abs(region - still).max(-1) > 60
                assert painted.mean() > 0.1
                tone = np.median(region[painted], axis=0)
                hue = tone / tone.max()
                names = scenes.COLOURS
                nearest = min(names, key=lambda name: np.abs(np.array(names[name]) / max(names[name]) - hue).sum())
                assert nearest == event.colour


def test_answers_are_balanced():
    rng = np.random.default_rng(2)
    answers = {task: Counter() for task in clips.TASKS}
    for clip in drawn(3000, held_out=True):
        for task in clips.TASKS:
            answers[task][scenes.ask(clip, task, rng).answer] += 1
    for task, counts in answers.items():
        expected = sum(counts.values()) * clips.CHANCE[task]
        assert len(counts) == round(1 / clips.CHANCE[task])
        assert all(abs(count - expected) < 5 * np.sqrt(expected) for count in counts.values())


def test_score_is_exact_after_normalisation():
    sample = clips.Sample("0", "letter", None, "", "K", ())
    assert clips.score(sample, " k.")
    assert not clips.score(sample, "kk")
    assert not clips.score(sample, "")


# ------------------------------------------------------------------------------------------------- the model that ships


@pytest.fixture(scope="module")
def shipped() -> models.Loaded:
    pytest.importorskip("torchvision", reason="the video processor needs it")
    return models.load("shapes-qwen", "cpu", "float32")


def test_the_processor_expands_the_video_marker_and_resizes_nothing(shipped):
    (sample,) = clips.samples(1)
    inputs = shipped.processor(videos=[sample.video], text=clips.prompt(sample.question), return_tensors="pt")
    assert int((inputs["input_ids"] == shipped.model.config.video_token_id).sum()) == 128
    assert inputs["video_grid_thw"].tolist() == [[scenes.FRAMES // 2, scenes.SIZE // 8, scenes.SIZE // 8]]
    assert shipped.processor.tokenizer.unk_token_id not in inputs["input_ids"]
    content = [{"type": "video"}, {"type": "text", "text": sample.question}]
    chat = shipped.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert chat == clips.prompt(sample.question)


def test_the_model_sees(shipped):
    suite = suites.find("clips")
    seen = evaluate.accuracy(shipped.model, shipped.processor, suite, clips.samples(120))
    assert seen["overall"] >= FLOOR
    blind = evaluate.accuracy(shipped.model, shipped.processor, suite, clips.samples(120), blanked=True)
    assert blind["overall"] <= np.mean(list(clips.CHANCE.values())) + 0.10
