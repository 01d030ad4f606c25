"""The bench on videos: a tiny random Qwen2.5-VL and Qwen3-VL over the clips suite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from foveate.eval_suites import suites
from foveate.eval_suites.results.rows import Status
from foveate.eval_suites.running.meter import FrameScorer, Meter, MethodRun
from foveate.eval_suites.running.models import Loaded
from foveate.eval_suites.running.runner import bench
from foveate.pruners import QuoTA, Random
from tests.models import qwen_processor, tiny

LIMIT = 3


def loaded(family: str = "qwen2_5_vl") -> Loaded:
    return Loaded(tiny(family), qwen_processor(family), f"tiny {family}")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_videos_are_benched_like_pictures(family: str) -> None:
    """Statement: random, grid, quota and a smaller video run over clips, blind and sighted, each within its budget."""
    board = bench(
        loaded(family), "clips", "random,grid,quota", [0.5, 0.25], LIMIT, seeds=1, batch_size=2, progress=False
    )
    rows = {(row.label, row.keep): row for row in board.rows}
    assert all(row.status is Status.OK for row in rows.values()), [row.reason for row in rows.values()]
    assert all(row.n == LIMIT for row in rows.values())
    whole = rows["unpruned", None].tokens_last
    assert whole == 8 * 4 * 4  # pairs of frames, 64 x 64 pixels, 16 x 16 a token
    for keep in (0.5, 0.25):
        assert rows["random", keep].tokens_last == keep * whole
        assert 0 < rows["quota", keep].tokens_last <= keep * whole
        assert rows["quota", keep].adaptive
        assert abs(rows["downsample", keep].tokens_last - keep * whole) < 0.3 * whole


def test_only_methods_that_read_frame_scores_pay_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statement: the attached model scores the frames of every video once per run, and for nobody who does not ask."""
    asked = []
    score = FrameScorer.score
    monkeypatch.setattr(
        FrameScorer, "score", lambda self, video, question: asked.append(question) or score(self, video, question)
    )
    suite = suites.find("clips")
    samples = list(suite.samples(LIMIT, suite.seed))
    meter = Meter(loaded(), suite, samples, LIMIT, "auto")
    answered(meter, MethodRun("random", Random(keep=0.5)))
    assert not asked
    answered(meter, MethodRun("quota", QuoTA(keep=0.5)))
    assert asked == 2 * [sample.question for sample in samples]  # the first batch of a method runs twice
    assert meter.frame_scorer.prompts.yes is None


def test_a_processor_without_chat_template_shows_frames_as_pictures() -> None:
    """Statement: without a template the suite's own prompt serves, its video marker exchanged for that of a picture."""
    model = loaded()
    model.processor.chat_template = None
    suite = suites.find("clips")
    suite = replace(suite, prompt=lambda q: f"<|vision_start|><|video_pad|><|vision_end|>{q}")
    samples = list(suite.samples(LIMIT, suite.seed))
    answers = answered(Meter(model, suite, samples, LIMIT, "auto"), MethodRun("quota", QuoTA(keep=0.5)))
    assert [answer.error for answer in answers] == [None] * LIMIT


def answered(meter: Meter, run: MethodRun) -> list[Any]:
    return [answer for answers, _ in meter.measure(run, [0]) for answer in answers]
