"""What to ask a scoring model about every frame of a video: QuoTA's decoupled questions (arXiv 2503.08689, figure 4).

A language model first says which things the question is about; each frame is then asked whether it shows any of them.
Without such things it is asked whether it helps to answer the question at all.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

DECOUPLE = """\
Question: {question}

Find out what must be seen in a video to answer the question above. Work in three steps and write each on its own line.
Step 1: does the answer depend on seeing particular things? Write yes or no.
Step 2: if yes, list these things as a Python list of strings.
Step 3: take out whatever is not a physical thing, such as "video", a colour alone or a corner of the picture, and \
write the
list again; write null if nothing is left.

Example 1. Question: What does the woman put on the long table, candles or blue balloons?
Step 1: yes
Step 2: ["woman", "long table", "candles", "blue balloons"]
Step 3: ["woman", "long table", "candles", "blue balloons"]

Example 2. Question: What is written in red at the top left of the video when the dog appears?
Step 1: yes
Step 2: ["red", "top left", "video", "dog"]
Step 3: ["dog"]

Example 3. Question: How does the mood of the story change?
Step 1: no
Step 2: null
Step 3: null

Now the question above.
"""
OBJECTS = "Does this image show any of the following: {objects}?"
INFORMATION = "{question}\nDoes this image hold enough information to answer the question above?"
CHOICE = "\nA. yes\nB. no\nAnswer with the letter only."


@dataclass(frozen=True)
class FramePrompts:
    """The prompts. ``decouple`` and ``information`` have a place ``{question}``, ``objects`` has ``{objects}``.

    ``yes`` is the answer, a single token, whose probability scores a frame. None: the likeliest token's, so how sure
    the answer is, for models that cannot be asked yes-or-no questions.
    """

    decouple: str = DECOUPLE
    objects: str = OBJECTS + CHOICE
    information: str = INFORMATION + CHOICE
    yes: str | None = "A"

    def about(self, question: str, objects: list[str]) -> str:
        """What each frame is asked; without objects, about the question itself."""
        if objects:
            return self.objects.replace("{objects}", ", ".join(objects))
        return self.information.replace("{question}", question)


def parsed_objects(reply: str) -> list[str]:
    """The objects that a reply to the decoupling prompt names, lower case; empty where it names none or cannot be read.

    Counts what follows the first "step 1: yes" and the first "step 3: [...]"; the list is read as literals, never run.
    """
    reply = reply.lower()
    first = re.search(r"step 1: (yes|no)", reply)
    listed = re.search(r"step 3: (\[.*?\])", reply, re.DOTALL)
    if first is None or first[1] != "yes" or listed is None:
        return []
    try:
        objects = ast.literal_eval(listed[1])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return objects if all(isinstance(o, str) for o in objects) else []
