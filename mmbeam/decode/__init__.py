"""Decoding of samples: bytes to uint8 pixels, float waveforms and strings, with limits.

Shards are untrusted: any bytes yield a value or a SampleError, in time and memory bounded by the limits. The
only other exception is MemoryError, a fault of the environment. Decoding is thread-safe, and codecs release
the GIL.
"""

from collections.abc import Callable
from typing import Any

from mmbeam.clean import clean_text, where_needs
from mmbeam.config import Reading
from mmbeam.decode.audio import audio_seconds, decode_audio
from mmbeam.decode.image import decode_image, image_size
from mmbeam.decode.text import decode_metadata, decode_text
from mmbeam.errors import FlowError, SampleError
from mmbeam.names import KINDS, MODALITIES, Kind
from mmbeam.types import Audio, Damage, Failure, Needs, RawSample, Sample

__all__ = [
    "audio_seconds",
    "decode_audio",
    "decode_image",
    "decode_metadata",
    "decode_sample",
    "decode_text",
    "image_size",
    "wanted_fields",
]


def wanted_fields(reading: Reading, needs: Needs) -> Callable[[str], bool]:
    """Return a predicate: whether the bytes of a field (lower case) are needed. Text and metadata always are."""
    kinds = _wanted_kinds(reading, needs)
    return lambda name: reading.fields.kind(name) in kinds


def _wanted_kinds(reading: Reading, needs: Needs) -> frozenset[Kind]:
    always: frozenset[Kind] = frozenset({"text", "metadata"})
    return always.union(needs.modalities, *map(where_needs, reading.cleaning.where))


def decode_sample(raw: RawSample, reading: Reading, needs: Needs) -> tuple[Sample, tuple[Failure, ...]]:
    """Return the sample with the values that could be decoded, and a Failure for each that could not.

    Images and audio that no stage needs are not decoded. If a `where` expression uses their size or length,
    only their header is read (an Audio without waves). A truncated sample, or one with a damaged header inside,
    is not decoded, since the extent of the loss is unknown: it gets one Failure for the whole sample (modality "").
    """
    chosen = reading.fields.choose(raw.fields)
    values: dict[str, Any] = {"present": frozenset(kind for kind in MODALITIES if kind in chosen)}
    failures = _whole_sample_failures(raw)
    if not failures:
        damages = {damage.field: damage for damage in raw.damages}
        for kind in sorted(_wanted_kinds(reading, needs) & chosen.keys(), key=KINDS.index):
            name = chosen[kind]
            if name in damages:
                failures.append(_read_failure(raw, kind, damages[name]))
                continue
            try:
                values |= _decode(kind, _member(raw, name), reading, needs)
            except SampleError as error:
                failures.append(Failure.of(raw, "decode", error, modality=kind))
    return Sample(key=raw.key, shard=raw.shard, offset=raw.offset, **values), tuple(failures)


def _whole_sample_failures(raw: RawSample) -> list[Failure]:
    failures = [_read_failure(raw, "", damage) for damage in raw.damages if damage.field == ""]
    if raw.truncated and not failures:
        message = f"the shard ends inside this sample, after {', '.join(raw.fields) or 'its first header'}"
        failures.append(Failure.of(raw, "read", "DecodeError", message))
    return failures[:1]


def _read_failure(raw: RawSample, modality: str, damage: Damage) -> Failure:
    message = f"at byte {damage.offset:,}: {damage.message}"
    return Failure.of(raw, "read", damage.error, message, modality=modality)


def _member(raw: RawSample, name: str) -> bytes:
    if name not in raw.members:
        raise FlowError(f"{raw.shard}: {raw.key}.{name} is needed but was not read, and no damage was recorded")
    return raw.members[name]


def _decode(kind: Kind, data: bytes, reading: Reading, needs: Needs) -> dict[str, Any]:
    """The values of a Sample that come from the member of one kind."""
    limits = reading.limits
    if kind == "image":
        return _decode_image(data, reading, needs)
    if kind == "audio":
        if kind in needs.modalities:
            return {"audio": decode_audio(data, limits, needs.sampling_rates)}
        return {"audio": Audio(waves={}, seconds=audio_seconds(data, limits))}
    if kind == "metadata":
        return {"metadata": decode_metadata(data, limits)}
    text, steps = decode_text(data, limits), reading.cleaning.text
    return {"text": text, "text_clean": clean_text(text, steps) if steps else None}


def _decode_image(data: bytes, reading: Reading, needs: Needs) -> dict[str, Any]:
    if "image" not in needs.modalities:
        return {"image_size": image_size(data, reading.limits)}
    image, size = decode_image(data, reading.limits, reading.background, needs.image_side, reading.draft)
    return {"image": image, "image_size": size}
