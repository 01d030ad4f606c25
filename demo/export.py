"""The Python code that repeats what is on the screen."""

from __future__ import annotations

import dataclasses

from foveate.pruners import Pruner


def snippet(
    *,
    model: str,
    prompt: str,
    pruner: Pruner,
    positions: str,
    max_new_tokens: int,
    example: str | None = None,
    prepares: bool = False,
) -> str:
    """Code that asks ``model`` the same question with the same method.

    Args:
        model: its name for :func:`foveate.eval_suites.models.load`; prompt: the full text for the processor.
        example: the picture is the example of this name; None: a file that the reader puts in place.
        prepares: the method makes the picture smaller before the processor sees it.
    """
    if example is None:
        imports, image = (
            ["from PIL import Image"],
            'Image.open("picture.png").convert("RGB")  # the picture on the screen',
        )
    else:
        imports, image = ["from foveate.demo.examples import picture"], f"picture({example!r})"
    lines = [
        "import foveate",
        *sorted(["from foveate.eval_suites.models import load", *imports]),
        "",
        f"loaded = load({model!r})",
        f"method = {_call(pruner)}",
        f"image = {image}",
        *(["image = method.prepare(image)"] if prepares else []),
        f"inputs = loaded.processor(images=image, text={prompt!r}, return_tensors='pt')",
        "inputs = inputs.to(loaded.model.device, loaded.model.dtype)",
        f"with foveate.attach(loaded.model, method, positions={positions!r}) as session:",
        f"    output = loaded.model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=False)",
        "",
        "print(loaded.processor.decode(output[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True))",
        "print(session.trace)",
        'session.trace.save_image("overlay.png", image=image)',
    ]
    return "\n".join(lines).replace("'", '"') if "'" not in prompt and '"' not in prompt else "\n".join(lines)


def _call(pruner: Pruner) -> str:
    """``foveate.VisionZip(keep=36)``: the parameters that are not the default."""
    given = ", ".join(
        f"{f.name}={getattr(pruner, f.name)!r}"
        for f in dataclasses.fields(pruner)
        if f.init and getattr(pruner, f.name) != f.default
    )
    return f"foveate.{type(pruner).__name__}({given})"
