"""Scoring the frames of a video with a model, on tiny random ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate import FrameScorer
from foveate.errors import InputError, ParameterError
from foveate.pruners.core.frame_questions import FramePrompts
from tests.models import qwen_processor, tiny

QUESTION = "Which colour is the car?"
REPLY = 'Step 1: yes\nStep 2: ["car", "video"]\nStep 3: ["Car"]'


@pytest.fixture(scope="module")
def pair() -> tuple[torch.nn.Module, Any]:
    return tiny("qwen2_5_vl"), qwen_processor()


def frames(count: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 32, 48, 3), dtype=np.uint8)


def scorer(pair: tuple[torch.nn.Module, Any], **options: Any) -> FrameScorer:
    return FrameScorer(*pair, **{"decouple": False, **options})


def alone(pair: tuple[torch.nn.Module, Any], frame: np.ndarray, prompt: str) -> float:
    """P("A") behind the prompt of one frame, by the model's own call."""
    model, processor = pair
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[frame], text=[text], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    return float(logits.float().softmax(-1)[processor.tokenizer.convert_tokens_to_ids("A")])


def test_scores_are_the_probability_of_the_letter_over_the_whole_vocabulary(pair: tuple) -> None:
    """Statement: a batch of frames scores as each does alone, by the softmax at the last prompt token."""
    pixels = frames()
    found = scorer(pair, batch_size=2).score(pixels, QUESTION)
    assert found.plain
    assert QUESTION in found.prompt
    expected = [alone(pair, frame, found.prompt) for frame in pixels]
    assert np.std(expected) > 1e-5, "the case is trivial"
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_frames_of_different_size_and_either_padding(pair: tuple, side: str) -> None:
    """Statement: the logits are those of the last real token wherever the processor pads."""
    model, processor = pair[0], qwen_processor()
    processor.tokenizer.padding_side = side
    pictures = [Image.fromarray(frames()[0]), Image.fromarray(frames()[1]).resize((32, 32))]
    found = FrameScorer(model, processor, decouple=False).score(pictures, QUESTION)
    np.testing.assert_allclose(found, [alone(pair, np.asarray(p), found.prompt) for p in pictures], rtol=1e-4)


def test_objects_come_from_the_language_model(pair: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statement: the parsed objects are asked for, the record says so, and the reply is asked for once per question."""
    asked = []
    monkeypatch.setattr(FrameScorer, "_reply", lambda self, question: asked.append(question) or REPLY)
    judge = scorer(pair, decouple=True)
    found = judge.score(frames(), QUESTION)
    judge.score(frames(seed=1), QUESTION)
    assert asked == [QUESTION]
    assert (found.objects, found.reply, found.plain) == (("car",), REPLY, False)
    assert "following: car?" in found.prompt
    assert QUESTION not in found.prompt


def test_a_reply_without_objects_is_said_and_recorded(pair: tuple) -> None:
    """Statement: the fall back to the plain question is never silent (a random model replies junk)."""
    with pytest.warns(UserWarning, match="plain"):
        found = scorer(pair, decouple=True, max_new_tokens=4).score(frames(), QUESTION)
    assert found.plain
    assert found.reply
    assert QUESTION in found.prompt


def test_a_reply_is_never_run(pair: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Statement: code in a model's reply has no effect."""
    harm = tmp_path / "harm"
    reply = f"Step 1: yes\nStep 3: [open('{harm}', 'w').name]"
    monkeypatch.setattr(FrameScorer, "_reply", lambda self, question: reply)
    with pytest.warns(UserWarning, match="plain"):
        assert scorer(pair, decouple=True).score(frames(), QUESTION).plain
    assert not harm.exists()


def test_scores_are_remembered_per_video_and_question(pair: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statement: one run per video and question, as long as the bounded memory holds it."""
    runs = []
    score = FrameScorer._probabilities
    monkeypatch.setattr(FrameScorer, "_probabilities", lambda self, *args: runs.append(1) or score(self, *args))
    judge = scorer(pair, cache_size=2)
    first = judge.score(frames(), QUESTION)
    assert judge.score(list(frames()), QUESTION) is first
    assert len(runs) == 1
    judge.score(frames(), "Another?")
    judge.score(frames(seed=1), QUESTION)
    assert len(runs) == 3
    judge.score(frames(), QUESTION)  # forgotten meanwhile
    assert len(runs) == 4


def test_an_attached_model_scores_unpruned(pair: tuple) -> None:
    """Statement: a pruner on the scoring model changes no score, and the scores serve the next call."""
    model, processor = pair
    expected = scorer(pair).score(frames(6), QUESTION)
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(videos=[frames(6)], text=[text], return_tensors="pt", do_sample_frames=False)
    with foveate.attach(model, foveate.QuoTA(keep=0.5)) as session, torch.no_grad():
        session.frame_scores = [scorer(pair).score(frames(6), QUESTION)]
        assert list(session.frame_scores[0]) == list(expected)
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert 0 < len(session.trace.images[0].kept) <= 9


def test_another_answer_may_be_asked_for(pair: tuple) -> None:
    """Statement: the caller chooses prompts and the token that means yes; an answer of several tokens is refused."""
    judge = scorer(pair, prompts=FramePrompts(information="{question}", yes="y"))
    found = judge.score(frames(), QUESTION)
    assert found.prompt == QUESTION
    assert judge.yes == pair[1].tokenizer.convert_tokens_to_ids("y")
    with pytest.raises(ParameterError, match="no single token for the answer 'yes'"):
        scorer(pair, prompts=FramePrompts(yes="yes"))


def test_a_processor_without_chat_template_needs_a_turn(pair: tuple) -> None:
    """Statement: the full prompt is built by the caller's function where the processor has no template."""
    processor = qwen_processor()
    processor.chat_template = None
    with pytest.raises(ParameterError, match="turn"):
        FrameScorer(pair[0], processor, decouple=False).score(frames(), QUESTION)
    marker = "<|vision_start|><|image_pad|><|vision_end|>"
    judge = FrameScorer(pair[0], processor, decouple=False, turn=lambda prompt: f"{marker}{prompt}")
    assert len(judge.score(frames(), QUESTION)) == 5


def test_nothing_to_score_is_refused(pair: tuple) -> None:
    """Statement: no frames, an empty question and impossible sizes are errors."""
    for pixels, question in (([], QUESTION), (frames(), " ")):
        with pytest.raises(InputError, match="nothing to score"):
            scorer(pair).score(pixels, question)
    with pytest.raises(ParameterError, match="batch_size=0"):
        scorer(pair, batch_size=0)


def test_the_attached_model_may_stand_in_for_one_that_cannot_be_loaded(pair: tuple, tmp_path: Any) -> None:
    """Statement: a scoring model that cannot be loaded is an error, or a warning where there is a fallback."""
    missing = str(tmp_path / "nothing")
    with pytest.raises(InputError, match="cannot be loaded"):
        FrameScorer.load(missing)
    with pytest.warns(UserWarning, match="scores instead"):
        judge = FrameScorer.load(missing, fallback=pair, decouple=False)
    assert judge.model is pair[0]
