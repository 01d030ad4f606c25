"""Reading video files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from foveate import read_video
from foveate.errors import FoveateError, InputError, ParameterError

av = pytest.importorskip("av")

FRAMES, RATE, SIDE = 20, 10, 64


def write(path: Path, frames: int = FRAMES, **options: str) -> Path:
    """A video whose frame i is a flat grey of brightness 12 i."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, RATE)
        container.start_encoding()
        for i in range(frames):
            picture = np.full((SIDE, SIDE, 3), 12 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_frames_and_timestamps_of_a_real_file(tmp_path: Path) -> None:
    """Statement: the frames the sampler names come out, with their times, in RGB."""
    video = read_video(write(tmp_path / "a.mp4"), base=5)
    assert video.indices.tolist() == [0, 4, 9, 14, 19]
    assert video.frames.shape == (5, SIDE, SIDE, 3)
    assert video.frames.dtype == np.uint8
    np.testing.assert_allclose(video.frames.mean(axis=(1, 2, 3)), 12 * video.indices, atol=4)
    np.testing.assert_allclose(video.timestamps, video.indices / RATE)
    assert (video.total, video.fps, video.duration) == (FRAMES, RATE, FRAMES / RATE)
    assert video.metadata["frames_indices"] == [0, 4, 9, 14, 19]


def test_frames_can_be_named(tmp_path: Path) -> None:
    """Statement: given indices are read, repeated ones too; others than the file's ascending ones are refused."""
    path = write(tmp_path / "a.mp4")
    assert read_video(path, [3, 3, 7]).indices.tolist() == [3, 3, 7]
    for wrong in ([20], [-1], [4, 3], []):
        with pytest.raises(InputError, match="ascending frame numbers"):
            read_video(path, wrong)


@pytest.mark.parametrize(("name", "options"), [("a.mp4", {}), ("b.mp4", {"movflags": "faststart"}), ("c.mkv", {})])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.8])
def test_a_truncated_file_is_an_error(tmp_path: Path, name: str, options: dict[str, str], share: float) -> None:
    """Statement: a file that is cut short never gives fewer frames in silence, whatever its container."""
    path = write(tmp_path / name, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=r"cut short|no video stream|without a single frame"):
        read_video(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_file_without_frames_is_an_error(tmp_path: Path, name: str) -> None:
    """Statement: a container that holds no frame says so."""
    with pytest.raises(InputError, match=r"without a single frame|no video stream|cannot be decoded"):
        read_video(write(tmp_path / name, frames=0))


def test_what_is_no_video_is_an_error(tmp_path: Path) -> None:
    """Statement: missing files, text files, sound without pictures and empty requests are refused by name."""
    with pytest.raises(InputError, match=r"no video file .*missing\.mp4"):
        read_video(tmp_path / "missing.mp4")
    text = tmp_path / "text.mp4"
    text.write_text("no film today")
    with pytest.raises(InputError, match=r"text\.mp4"):
        read_video(text)
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(InputError, match="no video stream"):
        read_video(sound)
    with pytest.raises(ParameterError, match="base=0"):
        read_video(write(tmp_path / "a.mp4"), base=0)


def test_without_pyav_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statement: PyAV is asked for by the name of the extra."""
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(FoveateError, match=r"foveate\[video\]"):
        read_video(tmp_path / "a.mp4")
