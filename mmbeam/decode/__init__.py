"""Decoding of samples: bytes to uint8 pixels, float waveforms and strings, with limits.

Shards are untrusted: any bytes yield a value or a SampleError, in time and memory bounded by the limits. The
only other exception is MemoryError, a fault of the environment. Decoding is thread-safe, and codecs release
the GIL.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from mmbeam.clean.text import clean_text
from mmbeam.clean.where import where_needs
from mmbeam.config import Reading
from mmbeam.decode.audio import audio_seconds, decode_audio
from mmbeam.decode.image import decode_image, image_size
from mmbeam.decode.text import decode_metadata, decode_text
from mmbeam.errors import FlowError, SampleError
from mmbeam.names import KINDS, MODALITIES, Kind
from mmbeam.types import Audio, Damage, Failure, Needs, RawSample, Sample


def wanted_fields(reading: Reading, needs: Needs) -> Callable[[str], bool]:
    """Return a predicate: whether the bytes of a field (lower case) are needed. Text and metadata always are."""
    kinds = _wanted_kinds(reading, needs)
    return lambda name: reading.fields.kind(name) in kinds


def _wanted_kinds(reading: Reading, needs: Needs) -> frozenset[Kind]:
    always: frozenset[Kind] = frozenset({"text", "metadata"})
    return always.union(needs.modalities, *map(where_needs, reading.cleaning.where))


def decode_sample(
    raw: RawSample, reading: Reading, needs: Needs, crash: str | None = None, max_bytes: int | None = None
) -> tuple[Sample, tuple[Failure, ...]]:
    """Return the sample with the values that could be decoded, and a Failure for each that could not.

    Images and audio that no stage needs are not decoded. If a `where` expression uses their size or length,
    only their header is read (an Audio without waves). A truncated sample, or one with a damaged header inside,
    is not decoded, since the extent of the loss is unknown: it gets one Failure for the whole sample (modality "").
    Nor is one that ended a process before; `crash` states how.
    Raises LargeValueError if decoding one of its members takes more than `max_bytes` of memory.
    Damage to a field that is not needed is a Failure that costs nothing.
    """
    chosen = reading.fields.choose(raw.fields)
    present = frozenset(kind for kind in MODALITIES if kind in chosen)
    sample = partial(Sample, key=raw.key, shard=raw.shard, offset=raw.offset, present=present)
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
    for kind in sorted(wanted & chosen.keys(), key=KINDS.index):
        name = chosen[kind]
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
        if damage.error == "DecodeError" and damage.field not in {chosen[kind] for kind in wanted if kind in chosen}:
            failures.append(_damage_failure(raw, damage, reading.fields.kind(damage.field) or damage.field))
    return sample(**values), tuple(failures)


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
        case "metadata":
            return {"metadata": decode_metadata(data, limits)}
    text, steps = decode_text(data, limits), reading.cleaning.text
    return {"text": text, "text_clean": clean_text(text, steps) if steps else None}
