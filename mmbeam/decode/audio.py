"""Bytes to mono float32 waveforms, by libsndfile and soxr. Not features: those are made on the device.

Read: WAV (PCM of 8 to 32 bits, float, A-law, mu-law, ADPCM), FLAC, MP3, Ogg Vorbis and Opus. Channels
are averaged. A sound that ends before its own header says is refused: a WAV by its data chunk, an MP3
by its Xing header, a FLAC by libsndfile, an Ogg if it breaks off inside a page. An MP3 without a Xing
header, or an Ogg cut between two pages, cannot be told from a whole one.
"""

import io
import struct
from collections.abc import Iterator, Set
from contextlib import contextmanager

import numpy as np
import soundfile
import soxr

from mmbeam.config import Limits
from mmbeam.decode.common import codec_errors, first_bytes
from mmbeam.errors import DecodeError, LimitError
from mmbeam.types import Audio, Waveform

_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "MP3", "OGG")  # of what libsndfile opens, what is let in
_READABLE = "WAV, FLAC, MP3, Ogg Vorbis and Opus can be read"
_RATES = (100, 384_000)  # Hz; outside of it memory would not be bounded by a limit in seconds
_BLOCK_SAMPLES = 1 << 17  # decoded at a time, over all channels: 512 KB
_MP3_SLACK = 2 * 1152  # frames by which encoders' Xing headers differ from what is decoded
_UNKNOWN_FRAMES = 1 << 60  # libsndfile's count for a FLAC that was written to a pipe is near 2**63
_UNKNOWN_SIZE = 0x7FFF0000  # from here on a size is what a program writes that cannot seek back (sox, ffmpeg)


def decode_audio(data: bytes, limits: Limits, rates: Set[int]) -> Audio:
    """The sound in mono at each of `rates` in Hz (soxr, HQ), at its own if there are none.

    Raises DecodeError for what is no whole sound, has no frames or samples that are not finite;
    LimitError if it is longer than the limit, by its header or in fact.
    """
    kind = _check(data)
    with codec_errors(kind, len(data)), _opened(data, kind, limits) as sound:
        own_rate, wave = sound.samplerate, _decode(sound, kind, limits)
    waves = {rate: _resample(wave, own_rate, rate) for rate in sorted(rates or {own_rate})}
    return Audio(waves=waves, seconds=len(wave) / own_rate)


def audio_seconds(data: bytes, limits: Limits) -> float:
    """The length in seconds as the header gives it; the errors of `decode_audio`, as far as a header tells."""
    kind = _check(data)
    with codec_errors(kind, len(data)), _opened(data, kind, limits) as sound:
        frames = len(_decode(sound, kind, limits)) if sound.frames >= _UNKNOWN_FRAMES else sound.frames
        return float(frames / sound.samplerate)


def _check(data: bytes) -> str:
    """The kind of sound by its first bytes, which are all there as far as the container tells."""
    kind = _kind(data)
    if kind == "WAV":
        _check_wav_is_whole(data)
    if kind == "Ogg":
        _check_ogg_is_whole(data)
    return kind


def _kind(data: bytes) -> str:
    if data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE":
        return "WAV"
    if data[:4] == b"fLaC":
        return "FLAC"
    if data[:4] == b"OggS":
        return "Ogg"
    if data[:3] == b"ID3" or (len(data) > 1 and data[0] == 0xFF and data[1] >= 0xE0):
        return "MP3"
    if data[4:8] == b"ftyp":
        raise DecodeError(f"MP4 audio (m4a, AAC) cannot be read here; {_READABLE}")
    raise DecodeError(f"no sound of a known format ({_READABLE}): {first_bytes(data)}")


def _check_wav_is_whole(data: bytes) -> None:
    """Refuse a WAV whose data chunk is shorter than its header says: libsndfile would read what is there."""
    position, long_size = 12, None
    while position + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, position)
        position += 8
        if name == b"ds64" and position + 16 <= len(data):  # RF64: sizes of the file and of its data
            long_size = struct.unpack_from("<Q", data, position + 8)[0]
        if name == b"data":
            expected, found = long_size or size, len(data) - position
            if found < expected and (long_size or size < _UNKNOWN_SIZE):
                raise DecodeError(f"truncated WAV (expected {expected:,} bytes of sound, found {found:,})")
            return
        position += size + size % 2
    raise DecodeError(f"truncated WAV ({len(data):,} bytes, no data chunk)")


def _check_ogg_is_whole(data: bytes) -> None:
    """Refuse an Ogg that ends inside a page (RFC 3533): libsndfile would leave the page out."""
    page = data.rfind(b"OggS")
    segments = data[page + 26] if page + 26 < len(data) else 0
    end = page + 27 + segments + sum(data[page + 27 : page + 27 + segments])
    if len(data) < end:
        raise DecodeError(f"truncated Ogg (its last page ends at byte {end:,}, found {len(data):,} bytes)")


@contextmanager
def _opened(data: bytes, kind: str, limits: Limits) -> Iterator["_Sound"]:
    with _Sound(_Memory(data, hide_length=kind == "MP3")) as sound:
        if sound.format not in _FORMATS:
            raise DecodeError(f"{sound.format_info} is not accepted; {_READABLE}")
        if not _RATES[0] <= sound.samplerate <= _RATES[1]:
            raise DecodeError(f"{kind} of {sound.samplerate:,} Hz; {_RATES[0]} to {_RATES[1]:,} Hz are accepted")
        if sound.frames < _UNKNOWN_FRAMES:
            _check_length(sound.frames, sound, limits)
        yield sound


class _Sound(soundfile.SoundFile):  # type: ignore[misc]
    """A sound that is read from its beginning to its end.

    soundfile seeks after each read, to where it is. That makes an MP3 forget bits that its next frame
    needs, so that the samples depend on the size of the blocks, and fails in a FLAC of unknown length.
    """

    def seekable(self) -> bool:
        return False


class _Memory(io.BytesIO):
    """Bytes as a file for libsndfile, which with `hide_length` says that it is 0 bytes long.

    libsndfile then has an MP3 without a Xing header scanned for its true number of frames, where it
    would extrapolate from the first one and cut the sound off.
    """

    def __init__(self, data: bytes, hide_length: bool) -> None:
        super().__init__(data)
        self._hide_length = hide_length

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._hide_length:
            return super().seek(0)
        return super().seek(offset, whence)


def _decode(sound: _Sound, kind: str, limits: Limits) -> Waveform:
    """All frames, averaged over the channels."""
    blocks, frames = [], 0
    size = max(1, _BLOCK_SAMPLES // sound.channels)
    while len(block := sound.read(size, dtype="float32", always_2d=True)):
        blocks.append(_mono(block))
        frames += len(block)
        _check_length(frames, sound, limits)
    if frames == 0:
        raise DecodeError(f"{kind} without any sound: 0 frames")
    if frames < sound.frames - (_MP3_SLACK if kind == "MP3" else 0) and sound.frames < _UNKNOWN_FRAMES:
        raise DecodeError(f"truncated {kind} (expected {sound.frames:,} frames, found {frames:,})")
    wave = np.concatenate(blocks)
    if not np.isfinite(wave).all():
        raise DecodeError(f"{kind} with samples that are not finite (NaN or infinite)")
    return wave


def _mono(block: np.ndarray) -> Waveform:
    """[frames, channels] to [frames]; by columns, 30 times as fast as `mean(axis=1)`."""
    channels = block.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):
        wave: Waveform = sum((block[:, channel] for channel in range(1, channels)), start=block[:, 0])
        return wave / np.float32(channels)


def _check_length(frames: int, sound: _Sound, limits: Limits) -> None:
    if frames > limits.seconds * sound.samplerate:
        seconds = frames / sound.samplerate
        raise LimitError(f"sound of {seconds:,.1f} seconds or more, at most {limits.seconds:,.1f} are decoded")


def _resample(wave: Waveform, own_rate: int, rate: int) -> Waveform:
    if rate == own_rate:
        return wave
    resampled: Waveform = soxr.resample(wave, own_rate, rate, quality="HQ")
    if len(resampled) == 0:
        raise DecodeError(f"sound too short to resample: {len(wave)} frames at {own_rate:,} Hz")
    return resampled
