"""Bytes to mono float32 waveforms, by libsndfile, FFmpeg and soxr. Features are computed on the device.

Supported: WAV (PCM of 8 to 32 bits, float, A-law, mu-law, ADPCM), FLAC, MP3, Ogg Vorbis and Opus by libsndfile; MP4
(m4a), AAC, and the first sound track of a video (MP4, WebM, Matroska, AVI) by FFmpeg. Channels are averaged. Sound is
decoded and resampled in blocks, so that memory depends on the output alone. Tags (ID3v1, ID3v2, APEv2) are skipped.
Streams that follow each other in one file, a chained Ogg or joined MP3s, are decoded to the last.

A truncated file is an error. Truncation is detected by the size in the header (WAV, MP3 with a Xing header), by
libsndfile (FLAC), or by an incomplete last page (Ogg). It cannot be detected in an MP3 without a Xing header, nor in
an Ogg that ends between two pages.
"""

import io
import re
import struct
from collections.abc import Iterator, Set
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr

from mmbeam.config import Limits
from mmbeam.decode.common import check_memory, codec_errors, first_bytes
from mmbeam.decode.container import container_kind, open_container, sound_blocks, sound_track
from mmbeam.errors import DecodeError, LimitError
from mmbeam.types import Audio, Waveform

_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "MP3", "OGG")  # libsndfile reads more; these are accepted
_SUPPORTED = "WAV, FLAC, MP3, Ogg Vorbis, Opus, MP4 (m4a) and AAC are supported"
_CONTAINERS = ("MP4", "Matroska", "AVI", "AAC")  # by FFmpeg
_RATES = (100, 384_000)  # Hz
_MAX_NATIVE_RATE = 48_000  # Hz: a sound that is not resampled for a model is stored at this rate at most
# The limit in seconds is for this many samples per second over all channels (8 channels at 48 kHz); a sound of more is
# limited in proportion, so that decoding takes a bounded time.
_SAMPLES_PER_SECOND = 384_000
_BLOCK_SAMPLES = 1 << 17  # decoded at a time, over all channels: 512 KiB
_MP3_SLACK = 2 * 1152  # frames by which encoders' Xing headers differ from what is decoded
_MP3_SAME_STREAM = 0xFFFE0C00  # bits of a frame header that are equal throughout a stream: sync, version, layer, rate
# Bytes. Data after the first MP3 of a file that has no Xing header of its own counts as another MP3 only if it # has at
# least this many bytes. A shorter rest can come from encoders that compute the stream size differently.
_MIN_BARE_MP3 = 8192
_UNKNOWN_FRAMES = 1 << 60  # libsndfile's count for a FLAC that was written to a pipe is near 2**63
# A data size of at least this means unknown: programs that write to a pipe (sox, ffmpeg) cannot fill in the real size.
_UNKNOWN_SIZE = 0x7FFF0000
_MAX_TAGS = 100
_MAX_CHUNKS = 100_000  # of a WAV
_MAX_STREAMS = 1000
_ZEROS = re.compile(rb"\0*")
_OGG_FIRST_PAGE = re.compile(rb"OggS\0[\x02\x03\x06\x07]")  # the flag of the first page of a logical stream is set


def decode_audio(data: bytes, limits: Limits, rates: Set[int], max_bytes: int | None = None) -> Audio:
    """Return the mono waveform at each of `rates` in Hz (soxr, HQ).

    Without `rates`, the waveform keeps its native rate, limited to 48 kHz. Raises DecodeError for data that is not a
    whole sound, has no frames, or has samples that are not finite; LimitError if it is longer than the limit, according
    to its header or once decoded, or has too many channels; LargeValueError if decoding takes more than `max_bytes` of
    memory.
    """
    kind, streams = _split(data)
    outputs: list[_Resampled] = []
    length = _Length(limits)
    if kind in _CONTAINERS:
        [data] = streams
        with codec_errors(kind, len(data)), open_container(data, limits) as container:
            track, seconds = _header_of_track(container, kind, length)
            for block, rate, channels in sound_blocks(container, track, len(data)):
                if channels > limits.channels or not _RATES[0] <= rate <= _RATES[1]:
                    raise LimitError(f"{kind} of {channels:,} channels at {rate:,} Hz (--max-channels)")
                targets = [output.rate for output in outputs] or sorted(rates or {min(rate, _MAX_NATIVE_RATE)})
                length.extend(length.seconds, len(block), _Format(rate, channels))
                nbytes = 2 * len(data) + round(4 * sum(targets) * max(seconds, length.seconds))
                check_memory(kind, nbytes, limits.decode_bytes, max_bytes)
                outputs = outputs or [_Resampled(target, round(seconds * target)) for target in targets]
                for output in outputs:
                    output.write(block, rate)
        streams = []
    for stream in streams:
        with codec_errors(kind, len(data)), _opened(stream, kind, length) as sound:
            targets = [output.rate for output in outputs] or sorted(rates or {min(sound.samplerate, _MAX_NATIVE_RATE)})
            seconds = length.seconds + sound.frames / sound.samplerate if _has_known_length(sound) else 0.0
            for block in _blocks(sound, kind, length):
                nbytes = len(data) + round(4 * sum(targets) * max(seconds, length.seconds))
                check_memory(kind, nbytes, limits.decode_bytes, max_bytes)
                outputs = outputs or [_Resampled(rate, round(seconds * rate)) for rate in targets]
                for output in outputs:
                    output.write(block, sound.samplerate)
    if not outputs:
        raise DecodeError(f"{kind} of 0 frames")
    return Audio(waves={output.rate: output.finish() for output in outputs}, seconds=length.seconds)


def audio_seconds(data: bytes, limits: Limits) -> float:
    """Return the length in seconds, from the header. Raises the errors of `decode_audio` that a header can cause."""
    kind, streams = _split(data)
    length = _Length(limits)
    if kind in _CONTAINERS:
        [data] = streams
        with codec_errors(kind, len(data)), open_container(data, limits) as container:
            return _header_of_track(container, kind, length)[1]
    for stream in streams:
        with codec_errors(kind, len(data)), _opened(stream, kind, length) as sound:
            if _has_known_length(sound):
                length.extend(length.seconds, sound.frames, sound)
            else:
                for _ in _blocks(sound, kind, length):
                    pass
    return length.seconds


class _Format(NamedTuple):
    """The format of a block of sound."""

    samplerate: int  # Hz
    channels: int


def _header_of_track(container: Any, kind: str, length: "_Length") -> tuple[Any, float]:
    """Return the sound track of a container, and its seconds, 0 if the header does not state them."""
    track = sound_track(container)
    if track is None:
        raise DecodeError(f"{kind} without a sound track")
    context = track.codec_context
    if context.channels > length.limits.channels:
        raise LimitError(
            f"{kind} of {context.channels:,} channels, at most {length.limits.channels:,} are decoded (--max-channels)"
        )
    if track.duration is not None:
        seconds = float(track.duration * track.time_base)
    else:
        seconds = (container.duration or 0) / 1e6
    if seconds and context.sample_rate:
        length.extend(0.0, round(seconds * context.sample_rate), _Format(context.sample_rate, max(1, context.channels)))
        length.seconds = 0.0
    return track, max(0.0, seconds)


class _Length:
    """The length of the streams decoded so far. Raises LimitError beyond the limit in seconds."""

    def __init__(self, limits: Limits) -> None:
        self.seconds = 0.0
        self.limits = limits

    def extend(self, begin: float, frames: int, sound: "_Stream | _Format") -> None:
        """Set the length to `begin` seconds and `frames` of `sound`."""
        share = min(1.0, _SAMPLES_PER_SECOND / (sound.samplerate * sound.channels))
        seconds = begin + frames / sound.samplerate
        if seconds > self.limits.seconds * share:
            unit = "" if share == 1 else f" of {sound.channels} channels at {sound.samplerate:,} Hz"
            allowed = self.limits.seconds * share
            raise LimitError(
                f"sound of {seconds:,.1f} seconds or more{unit}, at most {allowed:,.1f} are decoded (--max-seconds)"
            )
        self.seconds = seconds


class _Resampled:
    """A waveform at `rate` Hz, written in blocks of any rate.

    The result is the same as resampling each run of blocks of one rate in one piece.
    """

    def __init__(self, rate: int, expected: int) -> None:
        self.rate = rate
        self._wave: Waveform = np.empty(expected + rate, np.float32)  # pages that are not written take no memory
        self._size = 0
        self._input_rate = rate
        self._stream: soxr.ResampleStream | None = None
        self._run = 0, 0  # frames read since the input rate last changed, and the output size at that point

    def write(self, block: Waveform, input_rate: int) -> None:
        """Append a block at `input_rate` Hz."""
        if input_rate != self._input_rate:
            self._end_run()
            self._input_rate, self._run = input_rate, (0, self._size)
            if input_rate != self.rate:
                self._stream = soxr.ResampleStream(input_rate, self.rate, 1, dtype="float32", quality="HQ")
        self._run = self._run[0] + len(block), self._run[1]
        self._append(block if self._stream is None else self._stream.resample_chunk(block))

    def finish(self) -> Waveform:
        """Return the waveform. Raises DecodeError if a stream is too short to be resampled."""
        self._end_run()
        self._wave.resize(self._size, refcheck=False)
        return self._wave

    def _end_run(self) -> None:
        if self._stream is not None:
            self._append(self._stream.resample_chunk(np.empty(0, np.float32), last=True))
            self._stream = None
            if self._size == self._run[1]:
                raise DecodeError(f"sound too short to resample: {self._run[0]} frames at {self._input_rate:,} Hz")

    def _append(self, block: Waveform) -> None:
        end = self._size + len(block)
        if end > len(self._wave):
            self._wave.resize(end + end // 4, refcheck=False)  # in place if large: no second copy
        self._wave[self._size : end] = block
        self._size = end


def _split(data: bytes) -> tuple[str, list[bytes]]:
    """Return the format by its first bytes, and the streams in the file, without tags.

    Raises DecodeError if the container shows that bytes are missing.
    """
    start = _skip_tags(data, 0)
    kind = _kind(data, start)
    if kind is None:
        kind = container_kind(data[start : start + 16])
        if kind is not None:
            return kind, [data[start:]]
        raise DecodeError(f"not audio of a known format ({_SUPPORTED}): {first_bytes(data[start : start + 16])}")
    data = data[start:]
    match kind:
        case "WAV":
            _check_wav_is_whole(data)
        case "FLAC":  # libsndfile fails on tags after it
            data = data[: _end_without_tags(data)]
        case "Ogg":
            return kind, _split_ogg(data)
        case "MP3":
            return kind, _split_mp3(data)
    return kind, [data]


def _kind(data: bytes, start: int) -> str | None:
    if data[start : start + 4] in (b"RIFF", b"RF64") and data[start + 8 : start + 12] == b"WAVE":
        return "WAV"
    if data.startswith(b"fLaC", start):
        return "FLAC"
    if data.startswith(b"OggS", start):
        return "Ogg"
    header = int.from_bytes(data[start : start + 2], "big")
    return "MP3" if header >= 0xFFE0 and header & 0x06 else None  # layer 0 is AAC


def _skip_tags(data: bytes, start: int) -> int:
    """Return where the audio begins after ID3v2, ID3v1 and APEv2 tags (https://id3.org/id3v2.4.0-structure)."""
    for _ in range(_MAX_TAGS):
        if data.startswith(b"ID3", start):
            header = data[start : start + 10].ljust(10, b"\0")
            footer = 10 if header[5] & 0x10 else 0
            syncsafe = sum(byte << shift for byte, shift in zip(header[6:], (21, 14, 7, 0), strict=True))
            ends = [start + 10 + size + footer for size in (syncsafe, int.from_bytes(header[6:], "big"))]
            ends += [_ZEROS.match(data, end).end() for end in ends]  # type: ignore[union-attr]  # it matches anywhere
            # Some programs write the size as a plain integer, or zeros after the tag.
            known = (end for end in ends if _kind(data, end) or data[end : end + 3] in (b"ID3", b"TAG", b"APE"))
            end = next(known, ends[0])
            name = "ID3v2"
        elif data.startswith(b"APETAGEX", start):
            end, name = start + 32 + int.from_bytes(data[start + 12 : start + 16], "little"), "APEv2"
        elif data.startswith(b"TAG", start):
            end, name = start + 128, "ID3v1"
        else:
            return start
        if end > len(data):
            raise DecodeError(f"truncated {name} tag (expected {end - start:,} bytes, found {len(data) - start:,})")
        start = end
    raise DecodeError(f"more than {_MAX_TAGS} tags")


def _end_without_tags(data: bytes) -> int:
    """Return where the audio ends before ID3v1 and APEv2 tags."""
    end = len(data)
    for _ in range(_MAX_TAGS):
        id3v1, ape = data[max(0, end - 128) : end], data[max(0, end - 32) : end]
        if len(id3v1) == 128 and id3v1.startswith(b"TAG") and not any(0 < byte < 32 for byte in id3v1[3:125]):
            end -= 128  # all of it but the track number and the genre is text
        elif ape.startswith(b"APETAGEX") and 32 <= (size := int.from_bytes(ape[12:16], "little")) <= end:
            end -= size + (32 if ape[23] & 0x80 else 0)  # the size leaves out a header
        else:
            break
    return end


def _check_wav_is_whole(data: bytes) -> None:
    """Raise DecodeError for a WAV whose data chunk is cut short; libsndfile would read it without an error."""
    position, long_size, count = 12, None, 0
    while position + 8 <= len(data):
        count += 1
        if count > _MAX_CHUNKS:
            raise LimitError(f"WAV of more than {_MAX_CHUNKS:,} chunks")
        name, size = struct.unpack_from("<4sI", data, position)
        position += 8
        if name == b"ds64" and position + 16 <= len(data):  # RF64: 64-bit sizes of the file and of its data
            long_size = struct.unpack_from("<Q", data, position + 8)[0]
        if name == b"data":
            expected, found = long_size or size, len(data) - position
            if found < expected and (long_size or size < _UNKNOWN_SIZE):
                raise DecodeError(f"truncated WAV (expected {expected:,} bytes of audio, found {found:,})")
            return
        position += size + size % 2
    raise DecodeError(f"truncated WAV ({len(data):,} bytes, no data chunk)")


def _split_ogg(data: bytes) -> list[bytes]:
    """Split a chained Ogg (RFC 3533, section 4) into its streams, of which libsndfile reads the first alone.

    Raises DecodeError if the data ends inside a page, which libsndfile would leave out.
    """
    starts, header_end = [], -1
    for match in _OGG_FIRST_PAGE.finditer(data):
        if match.start() != header_end:  # first pages in a row belong to streams that are multiplexed
            starts.append(match.start())
        header_end = _page_end(data, match.start())
        if len(starts) > _MAX_STREAMS:
            raise LimitError(f"Ogg of more than {_MAX_STREAMS:,} streams")
    streams = [data[start:end] for start, end in pairwise([0, *starts[1:], len(data)])]
    for stream in streams:
        end = _page_end(stream, stream.rfind(b"OggS"))
        if len(stream) < end:
            raise DecodeError(f"truncated Ogg (its last page ends at byte {end:,}, found {len(stream):,} bytes)")
    return streams


def _page_end(data: bytes, page: int) -> int:
    segments = data[page + 26] if page + 26 < len(data) else 0
    return page + 27 + segments + sum(data[page + 27 : page + 27 + segments])


def _split_mp3(data: bytes) -> list[bytes]:
    """Split joined MP3s: libsndfile stops where the first one's Xing header ends the stream."""
    starts = [0]
    while (start := _next_mp3(data, starts[-1])) is not None:
        starts.append(start)
        if len(starts) > _MAX_STREAMS:
            raise LimitError(f"more than {_MAX_STREAMS:,} joined MP3s")
    return [data[start:end] for start, end in pairwise([*starts, len(data)])]


def _next_mp3(data: bytes, start: int) -> int | None:
    """Return where the MP3 after the one at `start` begins; None without one, or if no Xing header states the size."""
    xing = _xing(data, start)
    has_size = xing >= 0 and int.from_bytes(data[xing + 4 : xing + 8], "big") & 3 == 3
    size = int.from_bytes(data[xing + 12 : xing + 16], "big") if has_size else 0
    if not 0 < size < len(data) - start:
        return None
    try:
        after = _skip_tags(data, start + size)
    except DecodeError:  # junk that begins like a tag
        return None
    if _kind(data, after) != "MP3":
        return None
    first, second = (int.from_bytes(data[at : at + 4], "big") for at in (start, after))
    has_same_format = (first ^ second) & _MP3_SAME_STREAM == 0
    is_bare_mp3 = has_same_format and len(data) - after >= _MIN_BARE_MP3
    return after if _xing(data, after) >= 0 or is_bare_mp3 else None


def _xing(data: bytes, frame: int) -> int:
    """Return where the frame of an MP3 has its Xing header, -1 if it has none."""
    return max(data.find(name, frame, frame + 64) for name in (b"Xing", b"Info"))


@contextmanager
def _opened(data: bytes, kind: str, length: _Length) -> Iterator["_Stream"]:
    with _Stream(_HiddenLength(data) if kind == "MP3" else io.BytesIO(data)) as sound:
        if sound.format not in _FORMATS:
            raise DecodeError(f"{sound.format_info} is not supported; {_SUPPORTED}")
        if not _RATES[0] <= sound.samplerate <= _RATES[1]:
            raise DecodeError(f"{kind} of {sound.samplerate:,} Hz; {_RATES[0]} to {_RATES[1]:,} Hz are supported")
        if sound.channels > length.limits.channels:
            raise LimitError(
                f"{kind} of {sound.channels:,} channels, at most {length.limits.channels:,} are decoded "
                "(--max-channels)"
            )
        if _has_known_length(sound):
            begin = length.seconds
            length.extend(begin, sound.frames, sound)
            length.seconds = begin
        yield sound


class _Stream(soundfile.SoundFile):  # type: ignore[misc]
    """A sound that is read from its beginning to its end.

    soundfile (0.14) seeks after each read, to where it already is. Seeking makes an MP3 decoder drop bits
    that the next frame needs, so that samples depend on the size of the blocks, and fails in a FLAC of
    unknown length. It does not seek in a file that is not seekable.
    """

    def seekable(self) -> bool:
        return False


class _HiddenLength(io.BytesIO):
    """A file of length 0 until it is read, for MP3s.

    libsndfile (1.2.2, mpeg_decode.c) trusts the number of frames that mpg123 extrapolates from the length of
    a file without a Xing header, and cuts the sound there. Without a length it has mpg123 count the frames.
    """

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return super().seek(0) if whence == io.SEEK_END else super().seek(offset, whence)


def _has_known_length(sound: _Stream) -> bool:
    return bool(sound.frames < _UNKNOWN_FRAMES)


def _blocks(sound: _Stream, kind: str, length: _Length) -> Iterator[Waveform]:
    """Yield all frames, averaged over the channels, and add them to `length`."""
    begin, frames = length.seconds, 0
    size = max(1, _BLOCK_SAMPLES // sound.channels)
    while len(block := sound.read(size, dtype="float32", always_2d=True)):
        with np.errstate(over="ignore", invalid="ignore"):  # adding columns is 30 times as fast as mean(axis=1)
            total: Waveform = sum((block[:, channel] for channel in range(1, sound.channels)), start=block[:, 0])
            mono = total / np.float32(sound.channels)
        if not np.isfinite(mono).all():
            raise DecodeError(f"{kind} with samples that are not finite (NaN or infinite)")
        frames += len(block)
        length.extend(begin, frames, sound)
        yield mono
    if frames < sound.frames - (_MP3_SLACK if kind == "MP3" else 0) and _has_known_length(sound):
        raise DecodeError(f"truncated {kind} (expected {sound.frames:,} frames, found {frames:,})")
