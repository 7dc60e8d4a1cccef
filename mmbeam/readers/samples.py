"""Single samples of a shard, read again by their offset. Rows and failure records name the shard and the offset."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial

from mmbeam.config import Limits
from mmbeam.errors import ShardError
from mmbeam.readers.folder import FolderReader
from mmbeam.readers.paths import is_zip, public_path
from mmbeam.readers.stream import open_shard
from mmbeam.readers.tar import BLOCK, TarReader, is_header_or_end
from mmbeam.readers.zip import ZipReader
from mmbeam.types import Input, RawSample, Shard


def read_sample(shard: str, offset: int, limits: Limits | None = None) -> RawSample:
    """Return the sample that begins at byte `offset` of a shard, as the columns `shard` and `offset` of a row name it.

    `shard` is a path or URL. An uncompressed tar is read from that byte on, a compressed one from its beginning. Raises
    ShardError if the shard cannot be read, or if no sample begins at that byte. A folder is not read: its offsets
    number the samples in the plan of a run.
    """
    path = public_path(shard)
    for raw in read_samples(Input(shard=Shard(path=path, url=shard)), (offset,), limits=limits):
        return raw
    raise ShardError(f"{path}: no sample begins at byte {offset:,}; the shard is another one, or has changed")


def read_samples(
    source: Input,
    offsets: Collection[int],
    want: Callable[[str], bool] = lambda field: True,
    limits: Limits | None = None,
    waits: Sequence[float] | None = None,
    metadata_field: str | None = None,
) -> Iterator[RawSample]:
    """Yield the samples that begin at these bytes of a shard, or have these numbers in a folder, in one pass, in order.

    Of a tar in parts, any part will do; of a folder, `source` holds the samples to choose from, and `metadata_field` is
    that of `FieldMap`. Members of a field that `want` rejects are not read. An offset at which no member begins is left
    out. A pax global header, which holds for all later members of an uncompressed tar, is not applied. `waits` are
    those of `open_shard`. Raises ShardError if the shard cannot be read, or is not the one that was listed.
    """
    limits, shard = limits or Limits(), source.shard
    if shard.samples:
        places = [offset for offset in sorted(set(offsets)) if 0 <= offset - source.begin < len(shard.samples)]
        chosen = shard.with_samples([shard.samples[offset - source.begin] for offset in places])
        folder = FolderReader(Input(shard=chosen), want, limits, metadata_field, partial(open_shard, waits=waits))
        for sample, offset in zip(folder, places, strict=True):
            yield replace(sample, offset=offset)
        return
    if is_zip(shard.path):
        with open_shard(shard, waits=waits) as stream:
            yield from ZipReader(stream, Input(shard=shard), want, limits, offsets=set(offsets))
        return
    with open_shard(shard, waits=waits) as stream:
        if is_header_or_end(stream.read(BLOCK)) and stream.seekable():
            for offset in sorted(set(offsets)):
                stream.seek(offset)
                block = stream.read(BLOCK)
                if block.strip(b"\0") and is_header_or_end(block):
                    stream.seek(offset)
                    raw = next(iter(TarReader(stream, shard.path, want, limits, origin=offset)), None)
                    if raw is not None and raw.offset == offset:
                        yield raw
            return
    wanted = set(offsets)
    with open_shard(shard, waits=waits) as stream:
        for raw in TarReader(stream, shard.path, want, limits):
            if raw.offset in wanted:
                wanted.remove(raw.offset)
                yield raw
            if not wanted:
                return
