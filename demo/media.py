"""What visitors show: a picture, or a clip of a few frames. Files that are too large are refused before decoding."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from foveate.adapters import read_video
from foveate.adapters.video.reading import Limits
from foveate.errors import InputError

MAX_BYTES = 10 * 2**20  # of a picture
MAX_PIXELS = 20_000_000
MAX_VIDEO_BYTES = 25 * 2**20
VIDEO_LIMITS = Limits(seconds=120, frames=3600, pixels=1920 * 1088)  # codecs round 1080 rows up
MAX_ANIMATION = 100_000_000  # pixels of all its frames together
FRAMES, SIDE = 16, 512  # of a clip: what is taken from a video, and its longer side

PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a video, all of one size; ``fps``: how many of them there are to a second."""

    frames: tuple[Image.Image, ...]
    fps: float

    @property
    def array(self) -> np.ndarray:
        """``(T, H, W, 3)`` uint8 RGB."""
        return np.stack([np.asarray(frame) for frame in self.frames])

    @property
    def metadata(self) -> dict[str, Any]:
        """What ``transformers`` processors take as ``video_metadata``."""
        count = len(self.frames)
        return {
            "total_num_frames": count,
            "fps": self.fps,
            "duration": count / self.fps,
            "frames_indices": list(range(count)),
        }

    def webp(self, milliseconds: int | None = None) -> bytes:
        """The clip as an animated picture from which :func:`open_media` reads the same pixels.

        Args:
            milliseconds: how long each frame shows; None: as long as it lasts.
        """
        file = io.BytesIO()
        first, *others = self.frames
        shown = milliseconds or max(1, round(1000 / self.fps))
        first.save(
            file, "WEBP", save_all=True, append_images=others, duration=shown,
            loop=0, lossless=True, exact=True, method=1,
            minimize_size=False, allow_mixed=False,
        )  # fmt: skip
        return file.getvalue()


Media = Image.Image | Clip


def frames_of(media: Media) -> Image.Image | Sequence[Image.Image]:
    """What ``session.trace.show`` takes: the picture, or the frames."""
    return media.frames if isinstance(media, Clip) else media


def key(media: Media) -> tuple[Any, ...]:
    """Tells pictures and clips apart by their pixels."""
    pictures = media.frames if isinstance(media, Clip) else (media,)
    return type(media).__name__, *((picture.size, hash(picture.tobytes())) for picture in pictures)


def open_media(path: str | os.PathLike[str] | None) -> Media:
    """The picture in a file, RGB and upright; of an animated one and of a video file a :class:`Clip`.

    A clip has up to ``FRAMES`` frames, evenly from the first to the last, made smaller where they are longer than
    ``SIDE``.

    Raises:
        InputError: none, too many bytes, pixels, frames or seconds, or nothing that can be read; nothing is decoded
            before that is known.
        FoveateError: a video file, and PyAV is not installed.
    """
    if not path:
        raise InputError("there is no picture yet; upload one or choose an example")
    path = Path(path)
    if path.suffix.lower() in VIDEOS:
        return _video(path)
    _check_bytes(path, MAX_BYTES, "picture")
    with _readable():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            opened = Image.open(path, formats=PICTURES)
        with opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise InputError(
                    f"the picture has {width} x {height} pixels; at most {MAX_PIXELS // 10**6} million are accepted, "
                    "make it smaller"
                )
            if getattr(opened, "is_animated", False):
                return _animation(opened)
            return ImageOps.exif_transpose(opened).convert("RGB")


@contextmanager
def _readable() -> Iterator[None]:
    """What PIL raises at bad files, in our words."""
    try:
        yield
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(
            f"the picture has far more than {MAX_PIXELS // 10**6} million pixels; make it smaller"
        ) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError):
        raise InputError(f"the file cannot be read as a picture ({', '.join(PICTURES)})") from None


def _check_bytes(path: Path, most: int, what: str) -> None:
    if path.stat().st_size > most:
        raise InputError(f"the file is larger than {most // 2**20} MB; make the {what} smaller")


def _animation(opened: Image.Image) -> Clip:
    count, (width, height) = opened.n_frames, opened.size
    if count * width * height > MAX_ANIMATION:
        raise InputError(
            f"the animation has {count} frames of {width} x {height} pixels; at most {MAX_ANIMATION // 10**6} million "
            "pixels are accepted in all, make it shorter or smaller"
        )
    wanted = set(_spread(count))
    frames, milliseconds = [], 0.0
    for number, frame in enumerate(ImageSequence.Iterator(opened)):
        if number in wanted:
            frames.append(_small(frame.convert("RGB")))
        milliseconds += frame.info.get("duration") or 100  # browsers show frames without a time that long
    return Clip(tuple(frames), len(frames) * 1000 / milliseconds)


def _video(path: Path) -> Clip:
    _check_bytes(path, MAX_VIDEO_BYTES, "video")
    try:
        video = read_video(path, base=FRAMES, per_hour=0, limits=VIDEO_LIMITS)
    except InputError as error:  # a visitor need not know where the server put the upload
        raise InputError(str(error).replace(os.fspath(path), "the file")) from None
    _, first = np.unique(video.indices, return_index=True)  # short videos come with frames repeated
    frames = tuple(_small(Image.fromarray(video.frames[i])) for i in first)
    return Clip(frames, len(frames) / video.duration if video.duration else 1.0)


def _spread(count: int) -> list[int]:
    """Up to ``FRAMES`` numbers below ``count``, evenly from the first to the last."""
    return sorted(set(np.linspace(0, count - 1, FRAMES).astype(int).tolist()))


def _small(picture: Image.Image) -> Image.Image:
    if max(picture.size) > SIDE:
        picture = picture.copy()
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return picture
