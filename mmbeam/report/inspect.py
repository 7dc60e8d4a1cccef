"""The contents of shards, from their first samples: for `mmbeam inspect`, and to check a job's options."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mmbeam.config import FieldMap, Limits, Reading
from mmbeam.decode.text import decode_metadata
from mmbeam.errors import SampleError, ShardError
from mmbeam.names import MODALITIES, Modality
from mmbeam.readers.listing import list_shards
from mmbeam.readers.sources import open_samples
from mmbeam.readers.units import limited_unit
from mmbeam.types import RawSample, Sample, Shard

PROBED_SHARDS, PROBED_SAMPLES = 3, 32  # representative of most corpora, and read in a second


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
        """The modalities that any of the samples has."""
        return frozenset(modality for modality in MODALITIES if modality in self.kinds.values())


def probe(
    shards: Sequence[Shard],
    fields: FieldMap,
    limits: Limits | None = None,
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
            _probe_shard(shard, result, fields, limits or Limits(), metadata, samples)
        except ShardError as error:
            broken.append(error)
    if len(broken) == len(shards):
        raise broken[0]
    return result


def _probe_shard(shard: Shard, result: Probe, fields: FieldMap, limits: Limits, metadata: bool, samples: int) -> None:
    def wanted(name: str) -> bool:
        return metadata and fields.kind(name) == "metadata"

    [source] = limited_unit([shard], samples + 1).inputs
    with open_samples(source, wanted, Reading(fields=fields, limits=limits)) as (reader, _):
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


def inspect_text(
    patterns: Sequence[str], fields: FieldMap, strict: bool = False, allow_local_paths: bool = False
) -> Iterator[str]:
    """Yield lines on the number of shards and the contents of their first samples. The flags are `list_shards`'s."""
    shards = list_shards(patterns, strict, allow_local_paths, fields)
    sizes = [shard.size for shard in shards if shard.size is not None]
    known = "" if len(sizes) == len(shards) else f" ({len(shards) - len(sizes):,} of unknown size)"
    yield f"shards: {len(shards):,}, {sum(sizes) / 1e6:,.1f} MB{known}"
    contents = probe(shards, fields)
    if not contents.samples:
        yield "no samples"
        return
    yield f"keys: {', '.join(contents.keys[:3])}, ..."
    yield f"fields of {'all' if contents.whole else 'the first'} {contents.samples:,} samples:"
    for name, count in contents.fields.most_common():
        yield f"  {name:<20} in {count:>4}  {contents.kinds.get(name, '-')}"
    yield "modalities: " + (", ".join(sorted(contents.modalities)) or "none")
