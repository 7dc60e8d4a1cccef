"""Containers of moving pictures and sound, opened from memory by FFmpeg (PyAV).

Formats: MP4 and QuickTime (mp4, m4v, mov, m4a), Matroska and WebM (mkv, webm), AVI, and AAC without a container (ADTS).
The format is decided by the first bytes and given to FFmpeg, which therefore never guesses one: a playlist is not a
video. Formats and codecs are on allow-lists. FFmpeg opens no other file and no URL that a container names.

A file that is cut is an error: by the sizes of MP4 boxes and samples, of Matroska's segment and clusters, of AVI's
chunks and of the last ADTS frame. A cut between two fragments or clusters of unknown length cannot be detected.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import av
import av.error
import numpy as np

from mmbeam.config import Limits
from mmbeam.decode.common import first_bytes
from mmbeam.errors import DecodeError, LimitError
from mmbeam.types import Waveform

_DEMUXERS = {"MP4": "mov", "Matroska": "matroska", "AVI": "avi", "AAC": "aac"}  # FFmpeg's names
_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
_MAX_BOXES = 100_000
_VIDEO_CODECS = (
    *("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg", "ffv1", "prores"),
    *("dnxhd", "msmpeg4", "msmpeg4v2", "h263", "theora", "rawvideo", "huffyuv", "utvideo"),
)
_SOUND_CODECS = (
    *("aac", "mp3", "mp3float", "mp2", "mp2float", "opus", "libopus", "vorbis", "libvorbis", "flac", "alac", "ac3"),
    *("eac3", "adpcm_ms", "adpcm_ima_wav", "pcm_u8", "pcm_s8", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be"),
    *("pcm_s32le", "pcm_s32be", "pcm_f32le", "pcm_f32be", "pcm_f64le", "pcm_f64be", "pcm_alaw", "pcm_mulaw"),
)
# Of FFmpeg's decoders: a damaged picture is an error, and not concealed. One thread per decoder: samples are decoded
# in parallel.
DECODER_OPTIONS = {"err_detect": "crccheck+bitstream+buffer+explode"}
_INTEGER_SCALES = {"u8": 128.0, "s16": 32768.0, "s32": 2147483648.0}  # of FFmpeg's sample formats


def container_kind(data: bytes) -> str | None:
    """Return "MP4", "Matroska", "AVI" or "AAC" by the first bytes; None for another format."""
    if data[4:8] in _FIRST_BOXES:
        return "MP4"
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "Matroska"
    if data.startswith(b"RIFF") and data[8:12] == b"AVI ":
        return "AVI"
    return "AAC" if int.from_bytes(data[:2], "big") & 0xFFF6 == 0xFFF0 else None


@contextmanager
def open_container(data: bytes, limits: Limits) -> Iterator[Any]:
    """Open a container for reading, as av.container.InputContainer.

    Raises DecodeError for an unknown format, for a file that is cut, and for any error of FFmpeg while it is open,
    LimitError for too many streams.
    """
    kind = container_kind(data)
    if kind is None:
        raise DecodeError(f"not a video of a known format (MP4, QuickTime, WebM, Matroska, AVI): {first_bytes(data)}")
    {"MP4": _check_boxes, "Matroska": _check_matroska, "AVI": _check_riff, "AAC": _check_adts}[kind](data)
    options = {
        "codec_whitelist": ",".join((*_VIDEO_CODECS, *_SOUND_CODECS)),
        "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2" if kind == "MP4" else _whitelisted(kind),
        "protocol_whitelist": "",
        "max_streams": str(limits.streams + 1),
        "max_pixels": str(limits.pixels),
        "threads": "1",
    }
    if kind == "MP4":
        options |= {"enable_drefs": "0", "use_absolute_path": "0"}
    try:
        with av.open(
            io.BytesIO(data), "r", format=_DEMUXERS[kind], options=options, io_open=_refuse, metadata_errors="replace"
        ) as container:
            if len(container.streams) > limits.streams:
                raise LimitError(
                    f"{kind} of more than {limits.streams:,} streams, at most that many are read (--max-streams)"
                )
            yield container
    except av.error.FFmpegError as error:  # a MemoryError too: of a size in the file, which is refused
        raise DecodeError(f"damaged {kind} ({len(data):,} bytes): {error.strerror}") from error


def _whitelisted(kind: str) -> str:
    return "matroska,webm" if kind == "Matroska" else _DEMUXERS[kind]


def _refuse(*_: object) -> Any:
    raise DecodeError("the container names another file, which is not opened")


def video_stream(container: Any) -> Any:
    """Return the first video stream that is not a cover picture; None if the container has none."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return _checked(stream, _VIDEO_CODECS)
    return None


def sound_track(container: Any) -> Any:
    """Return the first audio stream; None if the container has none."""
    return _checked(container.streams.audio[0], _SOUND_CODECS) if container.streams.audio else None


def _checked(stream: Any, codecs: Sequence[str]) -> Any:
    context = stream.codec_context
    if context is None or context.codec.name not in codecs:
        name = "unknown" if context is None else context.codec.name
        raise DecodeError(f"the codec {name} is not supported; expected one of {', '.join(codecs)}")
    context.thread_type, context.thread_count = "NONE", 1
    return stream


def packets_of(container: Any, stream: Any, size: int) -> Iterator[Any]:
    """Yield the packets of a stream in order of decoding. `size` is that of the container in bytes.

    Raises DecodeError if the index of an MP4 names bytes beyond the end, or a packet is incomplete.
    """
    if container.format.name.startswith("mov"):
        for entry in stream.index_entries:
            if entry.pos + entry.size > size:
                raise DecodeError(f"truncated MP4 (a frame ends at byte {entry.pos + entry.size:,}, found {size:,})")
    for packet in container.demux(stream):
        if packet.size:
            if packet.is_corrupt:
                raise DecodeError("damaged or truncated: a packet is incomplete")
            yield packet


def sound_blocks(container: Any, track: Any, size: int) -> Iterator[tuple[Waveform, int, int]]:
    """Yield the frames of a sound track, averaged over the channels, with the sampling rate in Hz and the channels."""
    context = track.codec_context
    context.options = dict(DECODER_OPTIONS)
    for packet in (*packets_of(container, track, size), None):
        for frame in context.decode(packet):
            channels, kind = frame.layout.nb_channels, frame.format.name.removesuffix("p")
            samples = frame.to_ndarray()
            if not frame.format.is_planar:
                samples = samples.reshape(-1, channels).T
            values = samples.astype(np.float32)
            if kind in _INTEGER_SCALES:
                values = (values - 128 if kind == "u8" else values) / np.float32(_INTEGER_SCALES[kind])
            with np.errstate(over="ignore", invalid="ignore"):
                mono: Waveform = values.sum(axis=0, dtype=np.float32) / np.float32(channels)
            if not np.isfinite(mono).all():
                raise DecodeError("sound with samples that are not finite (NaN or infinite)")
            yield mono, frame.sample_rate, channels


def _check_boxes(data: bytes) -> None:
    """Raise DecodeError unless the boxes of an MP4 (ISO 14496-12) end within `data` and one of them is the index."""
    position = count = 0
    names = set()
    while position + 8 <= len(data):
        count += 1
        if count > _MAX_BOXES:
            raise LimitError(f"MP4 of more than {_MAX_BOXES:,} boxes")
        size, name = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        header = 8
        if size == 1:
            size, header = int.from_bytes(data[position + 8 : position + 16], "big"), 16
        if size == 0:  # to the end
            names.add(name)
            break
        if size < header:
            raise DecodeError(f"damaged MP4 (a box of {size} bytes at byte {position:,})")
        if position + size > len(data):
            raise DecodeError(f"truncated MP4 (a box ends at byte {position + size:,}, found {len(data):,} bytes)")
        names.add(name)
        position += size
    if b"moov" not in names:
        raise DecodeError(f"truncated or damaged MP4 ({len(data):,} bytes, no index: the box moov)")


def _element(data: bytes, position: int) -> tuple[bytes, int | None, int]:
    """Return the id of an EBML element (RFC 8794), the size of its data (None: unknown), and where its data begins."""
    values = []
    for keep_marker in (True, False):
        first = data[position] if position < len(data) else 0
        length = 9 - first.bit_length() if first else 9
        if length > (4 if keep_marker else 8) or position + length > len(data):
            raise DecodeError(f"truncated or damaged Matroska (at byte {position:,}, found {len(data):,} bytes)")
        values.append(data[position : position + length])
        position += length
    marker = 1 << 7 * len(values[1])
    size = int.from_bytes(values[1], "big") & (marker - 1)
    return values[0], None if size == marker - 1 else size, position


def _check_matroska(data: bytes) -> None:
    """Raise DecodeError unless the segment of a Matroska, or the elements of one of unknown size, end within `data`."""
    position = count = 0
    while position < len(data):
        count += 1
        if count > _MAX_BOXES:
            raise LimitError(f"Matroska of more than {_MAX_BOXES:,} elements")
        name, size, begin = _element(data, position)
        if size is None:  # a live segment, or a cluster of it: look at what it contains
            position = begin
            continue
        if begin + size > len(data):
            raise DecodeError(f"truncated Matroska (it ends at byte {begin + size:,}, found {len(data):,} bytes)")
        position = begin + size
        if name == b"\x18\x53\x80\x67":  # what follows the segment is not read
            return


def _check_riff(data: bytes) -> None:
    """Raise DecodeError if an AVI is shorter than its header states; of OpenDML, its first part."""
    size = int.from_bytes(data[4:8], "little") + 8
    if size > len(data):
        raise DecodeError(f"truncated AVI (expected {size:,} bytes, found {len(data):,})")


def _check_adts(data: bytes) -> None:
    """Raise DecodeError if the last frame of an AAC stream (ISO 13818-7) is not whole."""
    position = 0
    while position + 7 <= len(data) and int.from_bytes(data[position : position + 2], "big") & 0xFFF6 == 0xFFF0:
        size = int.from_bytes(data[position + 3 : position + 6], "big") >> 5 & 0x1FFF
        if size < 7:
            raise DecodeError(f"damaged AAC (a frame of {size} bytes at byte {position:,})")
        position += size
    rest = data[position : position + 3]
    if position > len(data) or (rest and rest not in (b"TAG", b"APE")):
        raise DecodeError(f"truncated or damaged AAC (its frames end at byte {position:,}, found {len(data):,} bytes)")
