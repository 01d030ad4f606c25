"""The Python code that repeats what is on the screen."""

from __future__ import annotations

import dataclasses

from foveate.eval_suites.running.models import EMBEDDED
from foveate.pruners import Pruner, Then


def snippet(
    *,
    model: str,
    prompt: str,
    question: str,
    pruner: Pruner,
    positions: str,
    max_new_tokens: int,
    example: str | None = None,
    video: bool = False,
    metadata: bool = False,
    prepares: bool = False,
    scores: bool = False,
) -> str:
    """Code that asks ``model`` the same question with the same method.

    Args:
        model: its name for :func:`foveate.eval_suites.running.models.load`; prompt: the full text for the processor.
        question: what the prompt asks, for methods that score frames by it.
        example: the picture or clip is the example of this name; None: a file that the reader puts in place.
        video: it is a clip; metadata: the model is told when its frames were taken.
        prepares: the method makes the picture smaller before the processor sees it.
        scores: the method reads how much each frame helps.
    """
    what = "clip" if video else "image"
    file = "clip.mp4" if video else "picture.png"
    drawn = f"{what}.frames" if video else what
    imports, found = ["from foveate.demo.media import open_media"], f'open_media("{file}")  # the file on the screen'
    if example is not None:
        imports, found = ["from foveate.demo.examples import example"], f"example({example!r})"
    own = model in EMBEDDED
    if scores and own:
        imports.append("from foveate.eval_suites.suites import find")
    if video and prepares:
        imports.append("from foveate.demo.media import Clip")
    smaller = "Clip(tuple(map(method.prepare, clip.frames)), clip.fps)" if video else "method.prepare(image)"
    shown = "images=image, text="
    if video:
        told = "video_metadata=[clip.metadata], " if metadata else ""
        shown = f"videos=[clip.array], do_sample_frames=False, {told}text="
    asked = f"[{prompt!r}]" if video else repr(prompt)
    scorer = "scorer = foveate.FrameScorer(loaded.model, loaded.processor)"
    if own:
        scorer = (
            'prompts = find("clips").frame_prompts\n'
            "scorer = foveate.FrameScorer(loaded.model, loaded.processor, prompts=prompts, decouple=False)"
        )
    lines = [
        "import foveate",
        *sorted(["from foveate.eval_suites.running.models import load", *imports]),
        "",
        f"loaded = load({model!r})",
        f"method = {call(pruner)}",
        f"{what} = {found}",
        *([f"{what} = {smaller}"] if prepares else []),
        f"inputs = loaded.processor({shown}{asked}, return_tensors='pt')",
        "inputs = inputs.to(loaded.model.device, loaded.model.dtype)",
        *([scorer] if scores else []),
        f"with foveate.attach(loaded.model, method, positions={positions!r}) as session:",
        *([f"    session.frame_scores = [scorer.score(clip.frames, {question!r})]"] if scores else []),
        f"    output = loaded.model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=False)",
        "",
        "print(loaded.processor.decode(output[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True))",
        "print(session.trace)",
        f'session.trace.save_image("overlay.png", image={drawn})',
    ]
    code = "\n".join(lines)
    return code if "'" in prompt or '"' in prompt else code.replace("'", '"')


def call(pruner: Pruner) -> str:
    """``foveate.VisionZip(keep=36)``: the parameters that are not the default, methods inside methods alike."""
    if isinstance(pruner, Then):
        return f"foveate.Then({', '.join(map(call, pruner.pruners))})"
    within = any(isinstance(getattr(pruner, f.name), Pruner) for f in dataclasses.fields(pruner))
    given = []
    for f in dataclasses.fields(pruner):
        value = getattr(pruner, f.name)
        if f.init and value != f.default and not (within and f.name == "keep"):  # the inner method's own
            given.append(f"{f.name}={call(value) if isinstance(value, Pruner) else repr(value)}")
    return f"foveate.{type(pruner).__name__}({', '.join(given)})"
