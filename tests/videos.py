"""Small videos for tests, encoded by PyAV. The red of frame i is 8 * i, so that a decoded frame tells its number."""

import io
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import av
import numpy as np

TICKS = 1000  # per second: the time base of all frames


@lru_cache
def video(
    fmt: str = "mp4",
    codec: str = "libx264",
    *,
    count: int = 30,
    size: tuple[int, int] = (64, 48),
    rate: int = 10,
    pixels: str = "yuv420p",
    sound: str | None = None,
    seconds: float | None = None,
    times: tuple[int, ...] | None = None,
    options: tuple[tuple[str, str], ...] = (),
    muxer: tuple[tuple[str, str], ...] = (),
    first_red: int = 0,
) -> bytes:
    """Return a video of `count` frames at `rate`, or at `times` in milliseconds, with a `sound` track of that codec.

    The sound is a tone of 440 Hz in two channels, as long as the video or of `seconds`. A video of 0 frames has no
    video stream.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=fmt, options=dict(muxer)) as container:
        stream: Any = None
        if count:
            stream = container.add_stream(codec, rate=rate, options={"threads": "1", **dict(options)})
            stream.width, stream.height, stream.pix_fmt = *size, pixels
            stream.codec_context.time_base = Fraction(1, TICKS)
            stream.time_base = Fraction(1, TICKS)
        track: Any = None if sound is None else container.add_stream(sound, rate=48_000, layout="stereo")
        times = times or tuple(TICKS * number // rate for number in range(count))
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number, size, first_red), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, TICKS)
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode())
        if track is not None:
            length = round(48_000 * (seconds if seconds is not None else count / rate))
            wave = (0.3 * np.sin(2 * np.pi * 440 * np.arange(length) / 48_000)).astype(np.float32)
            samples = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
            samples.sample_rate = 48_000
            container.mux(track.encode(samples))
            container.mux(track.encode())
    return buffer.getvalue()


def picture(number: int, size: tuple[int, int] = (64, 48), first_red: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return frame `number`: its red states the number, its left half has some green, its upper half some blue."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = (first_red + 8 * number) % 256
    pixels[:, : width // 2, 1] = 120
    pixels[: height // 2, :, 2] = 120
    return pixels


def numbers(frames: Sequence[np.ndarray[Any, Any]]) -> list[int]:
    """Return the number of each frame of a video of at most 32, by its red."""
    return [round(float(frame[..., 0].mean()) / 8) for frame in frames]


def box(data: bytes, path: Sequence[bytes]) -> int:
    """Return where the first box of an MP4 at `path` begins."""
    position = 0
    for name in path:
        position = data.index(name, position) - 4
    return position


def rotated(data: bytes, matrix: Sequence[int]) -> bytes:
    """Return an MP4 whose video track asks for the display `matrix`: a, b, c, d, each -1, 0 or 1."""
    at = box(data, [b"tkhd"]) + 8 + 4 + 36
    values = [matrix[0] << 16, matrix[1] << 16, 0, matrix[2] << 16, matrix[3] << 16, 0, 0, 0, 1 << 30]
    raw = b"".join((value & 0xFFFFFFFF).to_bytes(4, "big") for value in values)
    return data[:at] + raw + data[at + 36 :]
