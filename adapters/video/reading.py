"""Read video files: decode with PyAV, sample frames as QuoTA does, fail clearly on files that are cut short or
empty.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.errors import FoveateError, InputError, ParameterError
from foveate.pruners.core.allocation import sampled_frames

_MICROSECONDS = 1_000_000
# for FFmpeg: what a file may be, and that it may name no other one
_GUARDED = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
    "protocol_whitelist": "file",
}
_SLACK = 1.5  # frames by which headers may round up the duration


@dataclass(frozen=True)
class Video:
    """Frames sampled from a video.

    Attributes:
        frames: ``(T, H, W, 3)`` uint8 RGB.
        indices: ``(T,)`` which frames of the file they are.
        timestamps: ``(T,)`` seconds.
        total: frames in the file.
        fps: its average rate.
        duration: in seconds.
    """

    frames: NDArray[np.uint8]
    indices: NDArray[np.int64]
    timestamps: NDArray[np.float64]
    total: int
    fps: float
    duration: float

    @property
    def metadata(self) -> dict[str, Any]:
        """What ``transformers`` processors take as ``video_metadata``, beside ``do_sample_frames=False``."""
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "duration": self.duration,
            "frames_indices": self.indices.tolist(),
        }


@dataclass(frozen=True)
class Limits:
    """The most that a file from strangers may be: ``seconds`` long, with ``frames`` of ``pixels`` each.

    What its header says is checked before anything is decoded, and every frame for itself, since headers can lie.
    Only the containers MP4, MOV, Matroska, WebM and AVI are read: playlists would have other files and addresses
    opened.
    """

    seconds: float
    frames: int
    pixels: int

    def check(self, *, seconds: float = 0, frames: int = 0, width: int = 0, height: int = 0) -> None:
        """Raise :class:`InputError` where something is too large."""
        if seconds > self.seconds:
            raise InputError(
                f"the video is {seconds:.0f} s long; at most {self.seconds:.0f} s are accepted, cut it shorter"
            )
        if frames > self.frames:
            raise InputError(f"the video has {frames} frames; at most {self.frames} are accepted, cut it shorter")
        if width * height > self.pixels:
            raise InputError(
                f"the video has {width} x {height} pixels; at most {self.pixels / 1e6:.1f} million are accepted, "
                "make it smaller"
            )


def read_video(
    path: str | os.PathLike[str],
    indices: Sequence[int] | None = None,
    *,
    base: int = 96,
    per_hour: float = 64,
    limits: Limits | None = None,
) -> Video:
    """Decode the frames of a video file that QuoTA's sampler takes, ``base`` and ``per_hour`` more for every hour.

    Args:
        indices: take these frames of the file instead, ascending.
        limits: the most that the file may be; None: anything.

    Raises:
        InputError: no such file, no video in it, no frame, cut short, beyond the limits, or an index beyond its end.
        ParameterError: no frame is asked for.
        FoveateError: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise FoveateError('reading video files needs PyAV: pip install "foveate[video]"') from None
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise InputError(f"no video file {path}")
    if base < 1 or per_hour < 0:
        raise ParameterError(f"base={base}, per_hour={per_hour}: give at least one frame, and no negative rate")
    options = {} if limits is None else _GUARDED
    try:
        with av.open(path, options=options) as container:
            if not container.streams.video:
                raise InputError(f"{path} holds no video stream, so there are no frames to read")
            if limits is not None:
                _check_header(container, limits)
            packets, complete = _counted(container)
            total = container.streams.video[0].frames or packets
        if not packets:
            raise InputError(f"{path} has a video stream without a single frame")
        if not complete:
            raise InputError(f"{path} is cut short: it ends after {packets} frames; copy or download it again")
        if limits is not None:
            limits.check(frames=max(packets, total))
        with av.open(path, options=options) as container:
            return _decoded(container, path, total, indices, base, per_hour, limits)
    except av.error.FFmpegError as error:
        raise InputError(f"{path} cannot be decoded, it is cut short or no video file: {error.strerror}") from error


def _counted(container: Any) -> tuple[int, bool]:
    """Packets of the video stream, one per frame, and whether the file is all there as far as its header tells."""
    first = container.streams.video[0]
    count, end, whole = 0, 0.0, True
    for packet in container.demux():
        if packet.size:
            count += packet.stream.index == first.index
            whole &= not packet.is_corrupt
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    start, announced = (container.start_time or 0) / _MICROSECONDS, (container.duration or 0) / _MICROSECONDS
    return count, whole and end - start >= announced - _SLACK / float(first.average_rate or 1)


def _check_header(container: Any, limits: Limits) -> None:
    stream = container.streams.video[0]
    lasting = [(container.duration or 0) / _MICROSECONDS]
    if stream.duration and stream.time_base:
        lasting.append(float(stream.duration * stream.time_base))
    limits.check(
        seconds=max(lasting), frames=stream.frames, width=stream.codec_context.width, height=stream.codec_context.height
    )


def _decoded(
    container: Any,
    path: str,
    total: int,
    indices: Sequence[int] | None,
    base: int,
    per_hour: float,
    limits: Limits | None,
) -> Video:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    if limits is not None:
        stream.codec_context.options = {"max_pixels": str(limits.pixels)}
    fps = float(stream.average_rate or 0)
    duration = total / fps if fps else float((container.duration or 0) / _MICROSECONDS)
    wanted = sampled_frames(duration, total, base, per_hour) if indices is None else np.asarray(indices, dtype=np.int64)
    if wanted.ndim != 1 or not len(wanted) or wanted.min() < 0 or wanted.max() >= total or (np.diff(wanted) < 0).any():
        raise InputError(f"indices {wanted.tolist()}: give ascending frame numbers 0 .. {total - 1} of {path}")
    pictures, times, seen, size = {}, {}, 0, None
    chosen = set(wanted.tolist())
    for frame in container.decode(stream):
        if limits is not None:
            limits.check(frames=seen + 1, width=frame.width, height=frame.height)
        size = size or (frame.width, frame.height)
        if (frame.width, frame.height) != size:
            raise InputError(
                f"{path} goes from {'{} x {}'.format(*size)} to {frame.width} x {frame.height} pixels on the way; "
                "convert it to one size"
            )
        if seen in chosen:
            pictures[seen] = frame.to_ndarray(format="rgb24")
            times[seen] = frame.time if frame.time is not None else seen / fps if fps else float(seen)
        seen += 1
    if seen < total:
        raise InputError(f"{path} is cut short: {seen} of its {total} frames can be decoded; copy or download it again")
    return Video(
        np.stack([pictures[i] for i in wanted.tolist()]),
        wanted,
        np.array([times[i] for i in wanted.tolist()]),
        total,
        fps,
        duration,
    )
