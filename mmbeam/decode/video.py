"""Bytes to uint8 RGB frames at chosen times, by FFmpeg (PyAV). The sound track is decoded by `decode.audio`.

The video is decoded in order from its first frame to the last chosen one, by one thread, so that a frame is the same
whatever frames are chosen. A chosen time is answered by the frame that is shown then: with a variable frame rate too.
The rotation and mirroring that the container asks for are applied. Pixels are taken as square, and frames as
progressive. Frames that an edit list hides are not shown.
"""

import math
import struct
from collections.abc import Iterator
from fractions import Fraction
from itertools import count
from typing import Any

import numpy as np

from mmbeam.config import Limits
from mmbeam.decode.common import check_memory, codec_errors
from mmbeam.decode.container import (
    DECODER_OPTIONS,
    container_kind,
    open_container,
    packets_of,
    video_stream,
)
from mmbeam.errors import DecodeError, LimitError
from mmbeam.types import ImageHWC, Video

DEFAULT_FRAMES = 8  # of a video, evenly, unless an option or a model decides
_WORK_FACTOR = 1000  # a video may hold this multiple of Limits.pixels, over all the frames that are decoded
_MAX_GROWTH = 4  # by which a frame may be larger than the header states, in pixels
_LEAST_PIXELS = 1 << 20  # that a frame may have whatever the header states
_HELD_FRAMES = 20  # by a decoder, for reference, besides those that are chosen


def decode_video(
    data: bytes,
    limits: Limits,
    frames: int | None = None,
    fps: float | None = None,
    max_bytes: int | None = None,
) -> Video:
    """Return `frames` frames, each from the middle of an equal share of the video's time, or `fps` per second.

    With fewer frames in the video than asked for, frames repeat. Raises DecodeError for data that is not a whole video,
    has no video stream or no frame; LimitError if it is too long, has too many frames, pixels or streams, or takes too
    much memory; LargeValueError if decoding takes more than `max_bytes` of memory.
    """
    kind = container_kind(data) or "video"
    with codec_errors(kind, len(data)), open_container(data, limits) as container:
        stream = _stream(container, kind, limits)
        packets: list[Any] = []
        for packet in packets_of(container, stream, len(data)):
            packets.append(packet)
            if len(packets) > limits.frames:
                raise LimitError(f"video of more than {limits.frames:,} frames (--max-frames)")
        start, end = _span(stream, packets)
        seconds = float((end - start) * stream.time_base)
        _check_seconds(seconds, limits)
        context = stream.codec_context
        width, height = context.width, context.height
        if len(packets) * width * height > _WORK_FACTOR * limits.pixels:
            raise LimitError(
                f"video of {len(packets):,} frames of {width:,} x {height:,} pixels, at most "
                f"{_WORK_FACTOR:,} times {limits.pixels:,} pixels are decoded (--max-pixels)"
            )
        targets = _targets(start, end, stream.time_base, frames or DEFAULT_FRAMES, fps)
        sample_bytes = 2 if _bits(context) > 8 else 1
        kept = min(targets.count, len(packets))
        nbytes = 2 * len(data) + width * height * (3 * kept + 2 * sample_bytes * _HELD_FRAMES)
        check_memory(
            f"video of {kept:,} frames of {width:,} x {height:,} pixels", nbytes, limits.decode_bytes, max_bytes
        )
        allowed = min(limits.pixels, max(_MAX_GROWTH * width * height, _LEAST_PIXELS))
        context.options = {**DECODER_OPTIONS, "max_pixels": str(allowed)}
        chosen, times, size = _choose(_decoded(context, packets), targets, start, stream.time_base, allowed, limits)
    return Video(frames=chosen, times=times, seconds=seconds, size=size)


def video_header(data: bytes, limits: Limits) -> Video:
    """Return the length and the size of a video, without frames, from the index and the first frame.

    Raises the errors of `decode_video` that these can cause.
    """
    kind = container_kind(data) or "video"
    with codec_errors(kind, len(data)), open_container(data, limits) as container:
        stream = _stream(container, kind, limits)
        packets = list(packets_of(container, stream, len(data)))
        start, end = _span(stream, packets)
        seconds = float((end - start) * stream.time_base)
        _check_seconds(seconds, limits)
        context = stream.codec_context
        context.options = {**DECODER_OPTIONS, "max_pixels": str(limits.pixels)}
        frame = next(_decoded(context, packets), None)
        if frame is None:
            raise DecodeError("video of 0 frames")
        size = frame.width, frame.height
        if _is_transposed(_display_matrix(frame)):
            size = size[::-1]
    return Video(frames=(), times=(), seconds=seconds, size=size)


def has_sound(data: bytes, limits: Limits) -> bool:
    """Return whether a video has a sound track. Raises the errors of `open_container`."""
    with codec_errors(container_kind(data) or "video", len(data)), open_container(data, limits) as container:
        return bool(container.streams.audio)


def _stream(container: Any, kind: str, limits: Limits) -> Any:
    stream = video_stream(container)
    if stream is None:
        raise DecodeError(f"{kind} without a video stream")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > limits.pixels:
        raise LimitError(
            f"video of {width:,} x {height:,} pixels, at most {limits.pixels:,} are decoded (--max-pixels)"
        )
    return stream


def _check_seconds(seconds: float, limits: Limits) -> None:
    if seconds > limits.seconds:
        raise LimitError(f"video of {seconds:,.1f} seconds, at most {limits.seconds:,.1f} are decoded (--max-seconds)")


def _bits(context: Any) -> int:
    return max((component.bits for component in context.format.components), default=8) if context.format else 8


def _span(stream: Any, packets: list[Any]) -> tuple[int, int]:
    """Return where the frames that are shown begin and end, in units of the time base. Raises DecodeError for none."""
    shown = [packet for packet in packets if not packet.is_discard]
    times = [packet.dts if packet.pts is None else packet.pts for packet in shown]
    if not shown:
        raise DecodeError("video of 0 frames")
    if any(time is None for time in times):
        return 0, max(1, round(len(shown) * _frame_ticks(stream)))
    start, last = min(times), max(times)
    duration = max(packet.duration or 0 for packet, time in zip(shown, times, strict=True) if time == last)
    return start, last + (duration or max(1, round(_frame_ticks(stream))))


def _frame_ticks(stream: Any) -> Fraction:
    """Return the mean duration of a frame, in units of the time base."""
    rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
    return 1 / (rate * Fraction(stream.time_base))


class _Targets:
    """The times at which frames are chosen, in units of the time base, in order."""

    def __init__(self, first: Fraction, step: Fraction, number: int) -> None:
        self.first, self.step, self.count = first, step, number

    def __getitem__(self, index: int) -> Fraction:
        return self.first + index * self.step


def _targets(start: int, end: int, time_base: Fraction, frames: int, fps: float | None) -> _Targets:
    if fps is None:
        step = Fraction(end - start, frames)
        return _Targets(start + step / 2, step, frames)
    step = 1 / (Fraction(fps) * time_base)
    return _Targets(Fraction(start), step, max(1, math.ceil((end - start) / step)))


def _decoded(context: Any, packets: list[Any]) -> Iterator[Any]:
    for packet in (*packets, None):
        yield from context.decode(packet)


def _choose(
    decoded: Iterator[Any], targets: _Targets, start: int, time_base: Fraction, allowed: int, limits: Limits
) -> tuple[tuple[ImageHWC, ...], tuple[float, ...], tuple[int, int]]:
    """Return the frame that is shown at each target, the seconds at which it begins, and the size of the first."""
    chosen: list[ImageHWC] = []
    times: list[float] = []
    shown: tuple[Any, int] | None = None  # the latest frame, and when it begins
    pixels: ImageHWC | None = None  # of `shown`, once it was chosen

    def take() -> None:
        nonlocal pixels
        assert shown is not None
        frame, begin = shown
        if pixels is None:
            if frame.width * frame.height > allowed:
                raise LimitError(f"video with a frame of {frame.width:,} x {frame.height:,} pixels (--max-pixels)")
            pixels = _to_rgb(frame)
            check_memory("video", sum(image.nbytes for image in (*chosen, pixels)), limits.decode_bytes, None)
        chosen.append(pixels)
        times.append(float((begin - start) * time_base))

    for number in count():
        frame = next(decoded, None)
        if frame is None:
            break
        if frame.is_corrupt:
            raise DecodeError(f"damaged video (frame {number:,} cannot be decoded completely)")
        time = frame.dts if frame.pts is None else frame.pts
        if time is None:
            time = start if shown is None else shown[1] + 1
        while shown is not None and len(chosen) < targets.count and targets[len(chosen)] < time:
            take()
        if len(chosen) == targets.count:
            break
        shown, pixels = (frame, time), None
    if shown is None:
        raise DecodeError("video of 0 frames")
    while len(chosen) < targets.count:
        take()
    height, width = chosen[0].shape[:2]
    return tuple(chosen), tuple(times), (width, height)


def _to_rgb(frame: Any) -> ImageHWC:
    """Return the pixels [height, width, 3] as shown."""
    pixels: ImageHWC = frame.to_ndarray(format="rgb24")
    a, b, c, d = matrix = _display_matrix(frame)
    if _is_transposed(matrix):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """Return a, b, c, d: the frame is shown with x mapped to a, b and y to c, d, in fixed point."""
    data = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
    return a, b, c, d


def _is_transposed(matrix: tuple[int, int, int, int]) -> bool:
    """Return whether a matrix turns by 90 or 270 degrees. Others are rounded to a multiple of 90."""
    return abs(matrix[1]) > abs(matrix[0])
