"""The contents of shards, from their first samples: for `mmbeam inspect`, and to check a job's options."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mmbeam.clean.where import SampleValues
from mmbeam.config import FieldMap, Limits, Reading
from mmbeam.decode.text import decode_metadata
from mmbeam.errors import SampleError, ShardError, printable
from mmbeam.names import MODALITIES, Modality
from mmbeam.readers.listing import list_shards
from mmbeam.readers.paths import is_local
from mmbeam.readers.samples import open_samples
from mmbeam.readers.units import limited_unit
from mmbeam.types import Input, RawSample, Sample, Shard

PROBED_SHARDS, PROBED_SAMPLES = 3, 32  # representative of most corpora, and read in a second
WALK_SECONDS = 5.0  # for which `inspect` looks for bad shards; then it reads no further shard
EXAMPLE_CHARS = 80  # shown of an entry of the JSON


@dataclass
class Probe:
    """The contents of the first samples of the first shards."""

    samples: int = 0
    fields: Counter[str] = field(default_factory=Counter)  # samples, by field
    kinds: dict[str, str] = field(default_factory=dict)  # kind, by field that a job would read
    keys: list[str] = field(default_factory=list)
    first: list[Sample] = field(default_factory=list)  # if requested: with metadata, and "" for any text
    whole: bool = True  # whether these samples are the whole input

    @property
    def modalities(self) -> frozenset[Modality]:
        """The modalities that any of the samples has, with the sound that a video may have."""
        modalities = frozenset(modality for modality in MODALITIES if modality in self.kinds.values())
        return modalities | {"audio"} if "video" in modalities else modalities


def probe(
    shards: Sequence[Shard],
    reading: Reading,
    metadata: bool = False,
    samples: int = PROBED_SAMPLES,
) -> Probe:
    """Read the headers of the first `samples` of each of the first shards, and with `metadata` their JSON.

    A shard that cannot be read is skipped: its unit will fail. Raise ShardError if no shard can be read.
    """
    result = Probe(whole=len(shards) <= PROBED_SHARDS)
    broken: list[ShardError] = []
    for shard in shards[:PROBED_SHARDS]:
        try:
            _probe_shard(shard, result, reading, metadata, samples)
        except ShardError as error:
            broken.append(error)
    if len(broken) == len(shards):
        raise broken[0]
    return result


def _probe_shard(shard: Shard, result: Probe, reading: Reading, metadata: bool, samples: int) -> None:
    fields, limits = reading.fields, reading.limits

    def wanted(name: str) -> bool:
        return metadata and fields.kind(name) == "metadata"

    [source] = limited_unit([shard], samples + 1).inputs
    with open_samples(source, wanted, reading) as (reader, _):
        for count, raw in enumerate(reader, 1):
            result.samples += 1
            result.keys.append(raw.key)
            result.fields.update(raw.fields)
            result.kinds |= {name: kind for kind, name in fields.choose(raw.fields).items()}
            if metadata:
                result.first.append(_without_media(raw, fields, limits))
            if count == samples:
                result.whole = False
                break


def _without_media(raw: RawSample, fields: FieldMap, limits: Limits) -> Sample:
    """Return the sample with its metadata, if valid, and an empty text if it has a text."""
    chosen = fields.choose(raw.fields)
    try:
        data = raw.members.get(chosen.get("metadata", ""))
        metadata = None if data is None else decode_metadata(data, limits)
    except SampleError:
        metadata = None
    text = "" if "text" in chosen else None
    return Sample(key=raw.key, shard=raw.shard, offset=raw.offset, text=text, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `mmbeam inspect` shows, as JSON values."""

    shards: int
    bytes: int  # of the shards whose size is known
    unknown_sizes: int
    samples: int | None  # estimated from the shards read to their end; exact if `whole`; None if none was
    whole: bool  # every shard was read to its end
    bad: Mapping[str, str]  # reason, by path
    sampled: int  # samples that the following describe
    keys: tuple[str, ...]
    fields: Mapping[str, int]  # samples, by field
    kinds: Mapping[str, str]  # kind, by field that a job would read
    metadata: Mapping[str, str]  # an example as JSON, by entry of the JSON


def inspect(
    patterns: Sequence[str], fields: FieldMap, strict: bool = False, allow_local_paths: bool = False
) -> Inspection:
    """Read the headers of shards for WALK_SECONDS, and the JSON of the first samples. The flags are `list_shards`'s.

    Uncompressed files of this machine are read to their end, the others as far as their first samples. Raises
    NoShardsError and UsageError.
    """
    shards = list_shards(patterns, strict, allow_local_paths, fields)
    bad: dict[str, str] = {}
    walked_samples = walked_bytes = walked = 0
    reading, stop = Reading(fields=fields), time.monotonic() + WALK_SECONDS
    for shard in shards:
        if time.monotonic() > stop:
            break
        to_the_end = is_local(shard.path) and not shard.path.lower().endswith((".gz", ".tgz", ".zst"))
        count = 0
        try:
            with open_samples(Input(shard=shard), lambda name: False, reading) as (reader, _):
                for raw in reader:
                    count += 1
                    if raw.truncated:
                        size = "its end" if shard.size is None else f"byte {shard.size:,}"
                        bad[shard.path] = f"cut off at {size}, inside the sample {printable(raw.key)}"
                    if not to_the_end and count == PROBED_SAMPLES:
                        break
                else:
                    walked, walked_samples = walked + 1, walked_samples + count
                    walked_bytes += shard.size or 0
        except ShardError as error:
            bad[shard.path] = str(error).removeprefix(f"{shard.path}: ")
    good = [shard for shard in shards if shard.path not in bad]
    contents = probe(good, reading, metadata=True) if good else Probe()
    examples: dict[str, str] = {}
    for sample in contents.first:
        entries = SampleValues(sample)["metadata"]
        for name, value in entries.items() if isinstance(entries, dict) else ():
            examples.setdefault(name, printable(json.dumps(value, ensure_ascii=False)))
    total = sum(shard.size or 0 for shard in shards)
    estimated = round(walked_samples * total / walked_bytes) if walked_bytes else None
    return Inspection(
        shards=len(shards),
        bytes=total,
        unknown_sizes=sum(shard.size is None for shard in shards),
        samples=walked_samples if walked == len(shards) else estimated,
        whole=walked == len(shards),
        bad=bad,
        sampled=contents.samples,
        keys=tuple(contents.keys[:3]),
        fields=dict(contents.fields.most_common()),
        kinds=contents.kinds,
        metadata=examples,
    )


def inspect_text(contents: Inspection) -> Iterator[str]:
    """Yield lines on the number of shards, the bad ones, and the contents of the first samples."""
    known = f" ({contents.unknown_sizes:,} of unknown size)" if contents.unknown_sizes else ""
    yield f"shards: {contents.shards:,}, {contents.bytes / 1e6:,.1f} MB{known}"
    if contents.samples is not None:
        yield f"samples: {'' if contents.whole else 'about '}{contents.samples:,}"
    for path, reason in contents.bad.items():
        yield f"BAD {path}: {reason}"
    if not contents.sampled:
        yield "no samples"
        return
    yield f"keys: {', '.join(contents.keys)}, ..."
    complete = contents.whole and contents.sampled == contents.samples
    yield f"fields of {'all' if complete else 'the first'} {contents.sampled:,} samples:"
    for name, count in contents.fields.items():
        yield f"  {name:<20} in {count:>4}  {contents.kinds.get(name, '- (of no known kind)')}"
    yield "modalities: " + (", ".join(sorted(set(contents.kinds.values()) & set(MODALITIES))) or "none")
    if contents.metadata:
        yield "entries of the JSON, with an example of each:"
        for name, example in contents.metadata.items():
            yield f"  {name:<20} {example if len(example) <= EXAMPLE_CHARS else example[:EXAMPLE_CHARS] + '...'}"
