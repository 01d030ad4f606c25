"""Statement: for any pictures, prompts, budgets and precisions, a pruned model's numbers are finite, its counts exact.

Selections without a model are fuzzed in tests/pruners/test_properties.py; here the whole way through tiny models.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import foveate
from foveate.errors import FoveateError
from foveate.pruners import PRUNERS, create
from foveate.pruners.core.merging import Merger
from tests.models import FAMILIES, inputs, picture, single_view, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens")

# tiny models have four decoder layers, published schedules more
SHALLOW: dict[str, dict[str, Any]] = {"fastv": {"k": 2}, "transprune": {"prune_layers": (1, 2), "ratios": (0.7, 0.4)}}
NAMES = sorted(PRUNERS)
TEXT = st.integers(1, 7)


@cache
def model(family: str, dtype: torch.dtype) -> torch.nn.Module:
    return tiny(family).to(dtype)


@st.composite
def samples(draw: st.DrawFn, family: str) -> list[list[Any]]:
    """One to three prompts with pictures of all sizes and texts between them."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(1, 2))
        row: list[Any] = [draw(TEXT)]
        for _ in range(count):
            seed = draw(st.integers(0, 99))
            if family == "llava_onevision" and count > 1:
                row.append(single_view(seed))
            elif family.startswith("qwen"):
                row.append(picture(family, seed, (draw(st.integers(1, 4)), draw(st.integers(1, 4)))))
            elif family == "llava":
                row.append(picture(family, seed))
            else:
                row.append(picture(family, seed, (draw(st.integers(20, 90)), draw(st.integers(20, 90)))))
            row.append(draw(TEXT))
        rows.append(row)
    return rows


def configured(name: str, keep: int | float) -> foveate.Pruner:
    """The method at a budget, where it takes one."""
    more = SHALLOW.get(name, {})
    if not issubclass(PRUNERS[name], Merger) and hasattr(PRUNERS[name], "keep"):
        more = {**more, "keep": keep}
    return create(name, **more)


def says_why(error: FoveateError) -> None:
    assert len(str(error)) > 30


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_request_is_answered_or_refused(name, data):
    """Finite logits of the full length, counts as announced, tokens unique and ascending, the same when asked again."""
    family = data.draw(st.sampled_from(FAMILIES), "family")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "dtype")
    keep = data.draw(st.one_of(st.integers(1, 30), st.floats(0.02, 1.0)), "keep")
    rows = data.draw(samples(family), "samples")
    asked = inputs(family, rows, pad_left=data.draw(st.booleans(), "pad_left"))
    asked["pixel_values"] = asked["pixel_values"].to(dtype)
    pruner, here = configured(name, keep), model(family, dtype)
    try:
        session = foveate.attach(here, pruner, positions=data.draw(st.sampled_from(["keep", "compact"]), "positions"))
    except FoveateError as error:
        says_why(error)
        return
    with session, torch.inference_mode():
        try:
            first = here(**asked).logits
        except FoveateError as error:
            says_why(error)
            return
        kept = [image.kept for image in session.trace.images]
        session._seen = 0  # the same numbers for the same pictures
        again = here(**asked).logits
    assert first.shape[:2] == asked["input_ids"].shape
    assert torch.isfinite(first[asked["attention_mask"].bool()]).all()
    assert torch.equal(first, again)
    for image, numbers in zip(session.trace.images, kept, strict=True):
        assert (numbers.diff() > 0).all()
        assert ((numbers >= 0) & (numbers < image.layout.size)).all()
        stages = pruner.stages(session.adapter.info)
        alone = all(
            getattr(stage, "scope", "image") == "image" for stage in stages
        )  # else the pictures of a prompt share one budget
        count = pruner.count(image.layout, session.adapter.info)
        if count is not None and stages and alone and not isinstance(pruner, Merger):
            assert len(numbers) == count


# ------------------------------------------------------------------------------------------------- a corpus of pictures


def saved(picture: Image.Image, form: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **more)
    return buffer.getvalue()


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.effect_noise(size, 90).convert("RGB")


def turned() -> bytes:
    """A picture of 40 x 20 that its EXIF data turns upright: 20 x 40."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(noise((40, 20)), "JPEG", exif=exif)


def bomb() -> bytes:
    """A few bytes that announce 50,000 x 50,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    body = b"IDAT" + zlib.compress(b"\0")
    return b"\x89PNG\r\n\x1a\n" + chunks + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


ODD: dict[str, tuple[bytes, tuple[int, int]]] = {
    "one pixel": (saved(noise((1, 1)), "PNG"), (1, 1)),
    "a line": (saved(noise((4000, 1)), "PNG"), (4000, 1)),
    "a column": (saved(noise((1, 4000)), "PNG"), (1, 4000)),
    "palette": (saved(noise((30, 20)).convert("P"), "PNG"), (30, 20)),
    "palette with transparency": (saved(noise((30, 20)).convert("P"), "GIF", transparency=3), (30, 20)),
    "one bit": (saved(noise((30, 20)).convert("1"), "PNG"), (30, 20)),
    "transparent": (saved(noise((30, 20)).convert("RGBA"), "PNG"), (30, 20)),
    "CMYK": (saved(noise((30, 20)).convert("CMYK"), "JPEG"), (30, 20)),
    "sixteen bits": (saved(Image.new("I;16", (30, 20), 40_000), "PNG"), (30, 20)),
    "turned by EXIF": (turned(), (20, 40)),
}
BAD = {
    "empty": b"",
    "text": b"this is no picture " * 9,
    "cut short": saved(noise((300, 200)), "PNG")[:900],
    "a bomb": bomb(),
}


@cache
def shipped() -> tuple[Any, Any]:
    from foveate.eval_suites.running import models

    loaded = models.load("shapes-llava")
    return loaded.model, loaded.processor


@pytest.mark.parametrize("kind", ODD)
def test_odd_pictures_are_read_and_pruned(kind, tmp_path):
    pytest.importorskip("gradio", reason="pictures are opened by the demo")
    from foveate.demo.media import open_media

    content, size = ODD[kind]
    path = tmp_path / "odd"
    path.write_bytes(content)
    opened = open_media(str(path))
    assert (opened.mode, opened.size) == ("RGB", size)
    here, processor = shipped()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = processor(images=opened, text="USER: <image>\nwhat is it ASSISTANT:", return_tensors="pt")
    with foveate.attach(here, "divprune", keep=9) as session, torch.inference_mode():
        logits = here(**asked).logits
    assert torch.isfinite(logits).all()
    assert len(session.trace.images[0].kept) == 9
    assert session.trace.images[0].layout.size == 144


def test_animated_pictures_become_clips(tmp_path):
    pytest.importorskip("gradio", reason="pictures are opened by the demo")
    from foveate.demo.media import Clip, open_media

    path = tmp_path / "film"
    path.write_bytes(saved(noise((30, 20)), "GIF", save_all=True, append_images=[noise((30, 20))]))
    opened = open_media(path)
    assert isinstance(opened, Clip)
    assert len(opened.frames) == 2


@pytest.mark.parametrize("kind", BAD)
def test_bad_pictures_are_refused_in_one_line(kind, tmp_path):
    pytest.importorskip("gradio", reason="pictures are opened by the demo")
    from foveate.demo.media import open_media

    path = tmp_path / "bad"
    Path(path).write_bytes(BAD[kind])
    with pytest.raises(foveate.InputError) as caught:
        open_media(str(path))
    assert "\n" not in str(caught.value)
