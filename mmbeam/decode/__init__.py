"""Decoding of samples: bytes to uint8 pixels, float waveforms and strings, with limits.

Shards are untrusted: any bytes yield a value or a SampleError, in time and memory bounded by the limits. The
only other exception is MemoryError, a fault of the environment. Decoding is thread-safe, and codecs release
the GIL.

`decode_apart` does the same in a child process, where a codec that crashes ends nothing else.
"""

import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mmbeam.clean.text import clean_text
from mmbeam.clean.where import where_needs
from mmbeam.config import Reading
from mmbeam.decode.audio import audio_seconds, decode_audio
from mmbeam.decode.common import LargeValueError
from mmbeam.decode.image import decode_image, image_size
from mmbeam.decode.text import decode_metadata, decode_text
from mmbeam.decode.video import decode_video, has_sound, video_header
from mmbeam.errors import FlowError, SampleError
from mmbeam.names import KINDS, MODALITIES, Kind
from mmbeam.process import on_reset
from mmbeam.types import Audio, Damage, Failure, Needs, RawSample, Sample

_SERVE = "import sys; from mmbeam.decode import serve; serve(int(sys.argv[1]))"


def wanted_fields(reading: Reading, needs: Needs) -> Callable[[str], bool]:
    """Return a predicate: whether the bytes of a field (lower case) are needed. Text and metadata always are."""
    kinds = _wanted_kinds(reading, needs)
    return lambda name: reading.fields.kind(name) in kinds


def _wanted_kinds(reading: Reading, needs: Needs) -> frozenset[Kind]:
    always: frozenset[Kind] = frozenset({"text", "metadata"})
    wanted = always.union(needs.modalities, *map(where_needs, reading.cleaning.where))
    return wanted | {"video"} if "audio" in wanted else wanted  # for its sound track


def decode_sample(
    raw: RawSample, reading: Reading, needs: Needs, crash: str | None = None, max_bytes: int | None = None
) -> tuple[Sample, tuple[Failure, ...]]:
    """Return the sample with the values that could be decoded, and a Failure for each that could not.

    Images, audio and videos that no stage needs are not decoded. If a `where` expression uses their size or length,
    only their header is read (an Audio without waves, a Video without frames). The audio of a sample without an audio
    field is the sound track of its video, if it has one. A truncated sample, or one with a damaged header inside,
    is not decoded, since the extent of the loss is unknown: it gets one Failure for the whole sample (modality "").
    Nor is one that ended a process before; `crash` states how.
    Raises LargeValueError if decoding one of its members takes more than `max_bytes` of memory.
    Damage to a field that is not needed is a Failure that costs nothing.
    """
    chosen = reading.fields.choose(raw.fields)
    present = {kind for kind in MODALITIES if kind in chosen}
    sample = partial(Sample, key=raw.key, shard=raw.shard, offset=raw.offset, present=frozenset(present))
    if crash is not None:
        return sample(), (Failure.of(raw, "crash", "CrashError", crash),)
    for damage in raw.damages:
        if damage.field == "":
            return sample(), (_damage_failure(raw, damage),)
    if raw.truncated:
        message = f"the shard ends inside this sample, after {', '.join(raw.fields) or 'its first header'}"
        message += "".join(f"; {damage.message}" for damage in raw.damages[-1:])
        return sample(), (Failure.of(raw, "read", "DecodeError", message),)
    damages = {damage.field: damage for damage in raw.damages}
    values: dict[str, Any] = {}
    failures: list[Failure] = []
    wanted = _wanted_kinds(reading, needs)
    sources: dict[Kind, str] = {kind: chosen[kind] for kind in wanted & chosen.keys()}
    if "audio" in wanted and "audio" not in chosen and "video" in chosen:
        sources["audio"] = chosen["video"]
    if "video" not in needs.modalities.union(*map(where_needs, reading.cleaning.where)):
        sources.pop("video", None)  # read for its sound track alone
    for kind, name in sorted(sources.items(), key=lambda source: KINDS.index(source[0])):
        is_track = kind == "audio" and name == chosen.get("video")
        if is_track:
            # If the container cannot be read, the one failure is the video's, or else, if no video is needed, the
            # sound's.
            if _has_track(raw, name, reading, default="video" not in sources):
                present.add("audio")
            else:
                continue
        if name in damages:
            failures.append(_damage_failure(raw, damages[name], kind))
            continue
        if name not in raw.members:
            raise FlowError(f"{raw.shard}: {raw.key}.{name} is needed but was not read, and no damage was recorded")
        try:
            values |= _decode(kind, raw.members[name], reading, needs, max_bytes)
        except SampleError as error:
            failures.append(Failure.of(raw, "decode", error, modality=kind))
    for damage in raw.damages:
        if damage.error == "DecodeError" and damage.field not in sources.values():
            failures.append(_damage_failure(raw, damage, reading.fields.kind(damage.field) or damage.field))
    return sample(**values, present=frozenset(present)), tuple(failures)


def _has_track(raw: RawSample, name: str, reading: Reading, default: bool) -> bool:
    """Return whether a video has a sound track, `default` if it cannot be read."""
    try:
        return has_sound(raw.members[name], reading.limits)
    except (SampleError, KeyError):
        return default


def _damage_failure(raw: RawSample, damage: Damage, modality: str = "") -> Failure:
    where = "" if damage.offset is None else f"byte {damage.offset:,}"
    message = damage.message if where in damage.message else f"at {where}: {damage.message}"
    return Failure.of(raw, "read", damage.error, message, modality=modality)


def _decode(kind: Kind, data: bytes, reading: Reading, needs: Needs, max_bytes: int | None) -> dict[str, Any]:
    """Return the fields of a Sample for the member of one kind."""
    limits = reading.limits
    match kind:
        case "image" if kind not in needs.modalities:
            return {"image_size": image_size(data, limits)}
        case "image":
            image, size = decode_image(data, limits, reading.background, needs.image_side, reading.draft, max_bytes)
            return {"image": image, "image_size": size}
        case "audio" if kind not in needs.modalities:
            return {"audio": Audio(waves={}, seconds=audio_seconds(data, limits))}
        case "audio":
            return {"audio": decode_audio(data, limits, needs.sampling_rates, max_bytes)}
        case "video" if kind not in needs.modalities:
            return {"video": video_header(data, limits)}
        case "video":
            frames = reading.frames or max(needs.frames, default=None)
            return {"video": decode_video(data, limits, frames, reading.fps, max_bytes)}
        case "metadata":
            return {"metadata": decode_metadata(data, limits)}
    text, steps = decode_text(data, limits), reading.cleaning.text
    return {"text": text, "text_clean": clean_text(text, steps) if steps else None}


# In child processes


class _Child:
    """A process that decodes one sample at a time."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        command = [sys.executable, "-W", "ignore", "-c", _SERVE, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()])

    def end(self) -> str:
        """End the process, and return how it ended."""
        self.connection.close()
        status = self._process.wait()
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


_idle: list[_Child] = []


@on_reset
def _end_children() -> None:
    while _idle:
        _idle.pop().end()


def decode_apart(
    raw: RawSample, reading: Reading, needs: Needs, crash: str | None = None, max_bytes: int | None = None
) -> tuple[Sample, tuple[Failure, ...]]:
    """Return what `decode_sample` returns, computed in a child process that is idle or new.

    A sample that ends two of them becomes a Failure with the step "crash"; one end may be chance.
    """
    for _ in range(2):
        try:
            child = _idle.pop()
        except IndexError:
            child = _Child()
        try:
            child.connection.send((raw, reading, needs, crash, max_bytes))
            answer = child.connection.recv()
        except (EOFError, OSError):
            how = f"its process {child.end()} in the step decode, twice with this sample alone"
            continue
        _idle.append(child)
        if isinstance(answer, int):
            raise LargeValueError(answer)
        if isinstance(answer, Exception):
            raise answer
        decoded: tuple[Sample, tuple[Failure, ...]] = answer
        return decoded
    return decode_sample(raw, reading, needs, how)


def serve(descriptor: int) -> None:
    """Decode what the parent process sends until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    with suppress(OSError):  # if memory is short, the kernel shall kill this process, and not its parent
        Path("/proc/self/oom_score_adj").write_text("1000")
    parent = Connection(descriptor)
    answer: object
    with suppress(EOFError, OSError):
        while True:
            arguments = parent.recv()
            try:
                answer = decode_sample(*arguments)
            except LargeValueError as error:
                answer = error.nbytes
            except Exception as error:
                answer = error
            parent.send(answer)
