"""What shards hold, from their first samples: for `mmbeam inspect` and for the probe before a job."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mmbeam.config import FieldMap, Limits
from mmbeam.decode.text import decode_metadata
from mmbeam.errors import SampleError, ShardError
from mmbeam.names import MODALITIES, Modality
from mmbeam.readers.listing import list_shards
from mmbeam.readers.stream import open_shard
from mmbeam.readers.tar import TarReader
from mmbeam.types import RawSample, Sample, Shard

PROBED_SHARDS, PROBED_SAMPLES = 3, 32  # enough to see what a corpus is made of, little enough to be quick


@dataclass
class Probe:
    """What the first samples of the first shards hold."""

    samples: int = 0
    fields: Counter[str] = field(default_factory=Counter)  # samples that hold a field
    kinds: dict[str, str] = field(default_factory=dict)  # what is made of a field
    keys: list[str] = field(default_factory=list)
    first: list[Sample] = field(default_factory=list)  # their metadata, and whether they have a text; if asked for
    whole: bool = True  # whether that was all there is

    @property
    def modalities(self) -> frozenset[Modality]:
        return frozenset(modality for modality in MODALITIES if modality in self.kinds.values())


def probe(shards: Sequence[Shard], fields: FieldMap, limits: Limits | None = None, metadata: bool = False) -> Probe:
    """Read the headers of the first samples, and their metadata if that is asked for.

    A shard that cannot be read is its unit's affair; ShardError is raised if there is no other.
    """
    found = Probe(whole=len(shards) <= PROBED_SHARDS)
    broken: list[ShardError] = []
    for shard in shards[:PROBED_SHARDS]:
        try:
            _look_into(shard, found, fields, limits or Limits(), metadata)
        except ShardError as error:
            broken.append(error)
    if len(broken) == len(shards):
        raise broken[0]
    return found


def _look_into(shard: Shard, found: Probe, fields: FieldMap, limits: Limits, metadata: bool) -> None:
    def wanted(name: str) -> bool:
        return metadata and fields.kind(name) == "metadata"

    with open_shard(shard) as stream:
        for count, raw in enumerate(TarReader(stream, shard.path, wanted, limits), 1):
            found.samples += 1
            found.keys.append(raw.key)
            found.fields.update(raw.fields)
            found.kinds |= {name: kind for kind, name in fields.choose(raw.fields).items()}
            if metadata:
                found.first.append(_sketch(raw, fields, limits))
            if count == PROBED_SAMPLES:
                found.whole = False
                break


def _sketch(raw: RawSample, fields: FieldMap, limits: Limits) -> Sample:
    """The sample with its metadata, if they are whole, and with an empty text if it has one."""
    chosen = fields.choose(raw.fields)
    try:
        data = raw.members.get(chosen.get("metadata", ""))
        metadata = None if data is None else decode_metadata(data, limits)
    except SampleError:
        metadata = None
    text = "" if "text" in chosen else None
    return Sample(key=raw.key, shard=raw.shard, offset=raw.offset, text=text, metadata=metadata)


def inspect_text(patterns: Sequence[str], fields: FieldMap) -> Iterator[str]:
    """Lines that say how many shards there are and what their first samples hold."""
    shards = list_shards(patterns)
    sizes = [shard.size for shard in shards if shard.size is not None]
    known = "" if len(sizes) == len(shards) else f" ({len(shards) - len(sizes):,} of unknown size)"
    yield f"shards: {len(shards):,}, {sum(sizes) / 1e6:,.1f} MB{known}"
    found = probe(shards, fields)
    if not found.samples:
        yield "no samples in them"
        return
    yield f"keys: {', '.join(found.keys[:3])}, ..."
    yield f"fields, of {'all' if found.whole else 'the first'} {found.samples:,} samples:"
    for name, count in found.fields.most_common():
        yield f"  {name:<20} in {count:>4}  {found.kinds.get(name, '-')}"
    yield "modalities: " + (", ".join(sorted(found.modalities)) or "none")
