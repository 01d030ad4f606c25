"""What a scoring model is asked, and how its replies are read."""

from __future__ import annotations

import pytest

from foveate.pruners.core.frame_questions import FramePrompts, parsed_objects


@pytest.mark.parametrize(
    ("reply", "objects"),
    [
        ('Step 1: Yes\nStep 2: ["A"]\nStep 3: ["Red Car", "dog"]', ["red car", "dog"]),
        ('step 1: yes\nstep 3: [\n "a",\n "b"\n]', ["a", "b"]),
        ('step 1: no\nstep 3: ["a"]', []),
        ("step 1: yes\nstep 3: null", []),
        ("step 1: yes\nstep 3: [1, 2]", []),
        ("step 1: yes\nstep 3: [__import__('os').getcwd()]", []),
        ("step 1: yes\nstep 3: [open('x')]", []),
        ('step 1: maybe\nstep 1: yes\nstep 3: ["a"]', ["a"]),
        ('step 1: yes\nstep 3: ["a"', []),
        ("step 1: yes\nstep 3: [" + "(" * 5000 + "]", []),
        ("", []),
        ("\0 junk", []),
    ],
)
def test_replies_are_read_as_literals(reply: str, objects: list[str]) -> None:
    """Statement: only a list of strings behind step 3 counts, after a yes; nothing in a reply is ever run."""
    assert parsed_objects(reply) == objects


def test_every_frame_is_asked_about_the_objects_or_the_question() -> None:
    """Statement: with objects the prompt names them, without it quotes the question; braces in one do no harm."""
    prompts = FramePrompts()
    assert "red car, dog" in prompts.about("Who?", ["red car", "dog"])
    assert "Who {is} it?" in prompts.about("Who {is} it?", [])
    assert "Who" not in prompts.about("Who?", ["dog"])
