"""Open an input of any form: a tar, a zip archive, a folder, a table. Read single samples again by their offset."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Protocol

from mmbeam.config import Limits, Reading
from mmbeam.errors import ShardError
from mmbeam.readers.fetch import fetch
from mmbeam.readers.folder import FolderReader
from mmbeam.readers.paths import is_table, is_zip, public_path
from mmbeam.readers.stream import open_shard
from mmbeam.readers.table import TableReader, count_rows
from mmbeam.readers.tar import BLOCK, TarReader, is_header_or_end, part_origin
from mmbeam.readers.zip import ZipReader
from mmbeam.types import Input, RawSample, Shard, SourceReader


class Counted(Protocol):
    """Something that counts the bytes it reads."""

    @property
    def bytes_read(self) -> int:
        """Bytes read from the store so far."""


@contextmanager
def open_samples(
    source: Input, want: Callable[[str], bool], reading: Reading
) -> Iterator[tuple[TarReader | SourceReader, Counted]]:
    """Open an input; yield the reader of its samples, and the object that counts its bytes.

    `want(field)` states whether the bytes of a field are needed. Raises ShardError, here or while reading.
    """
    shard, limits = source.shard, reading.limits
    if shard.samples:
        folder = FolderReader(source, want, limits, reading.fields.metadata, open_shard)
        yield folder, folder
        return
    if is_table(shard.path):
        with open_shard(shard) as stream:
            table = TableReader(stream, source, want, reading, open_shard, fetch)
            yield table, table
        return
    if is_zip(shard.path):
        with open_shard(shard) as stream:
            yield ZipReader(stream, source, want, limits, reading.fields), stream
        return
    with open_shard(shard, part_origin(source.begin)) as stream:
        yield TarReader(stream, shard.path, want, limits, source.begin, source.end), stream


def with_rows(shards: Sequence[Shard]) -> list[Shard]:
    """Return the shards, tables with the number of their rows, by which they are cut; unknown for one without."""
    counted: list[Shard] = []
    for shard in shards:
        rows = None
        if is_table(shard.path):
            with suppress(ShardError), open_shard(shard) as stream:
                rows = count_rows(shard.path, stream)
        counted.append(shard if rows is None else replace(shard, rows=rows))
    return counted


def read_sample(shard: str, offset: int, limits: Limits | None = None) -> RawSample:
    """Return the sample that begins at byte `offset` of a shard.

    `shard` and `offset` are the values of these columns in a row; `shard` is a path or URL. An uncompressed tar is read
    from that byte on, a compressed one from its beginning. Raises ShardError if the shard cannot be read, or if no
    sample begins at that byte. A folder is not read: its offsets number the samples in the plan of a run.
    """
    path = public_path(shard)
    reading = Reading(limits=limits or Limits())
    for raw in read_samples(Input(shard=Shard(path=path, url=shard)), (offset,), reading=reading):
        return raw
    raise ShardError(f"{path}: no sample begins at byte {offset:,}; the shard is another one, or has changed")


def read_samples(
    source: Input,
    offsets: Collection[int],
    want: Callable[[str], bool] = lambda field: True,
    reading: Reading | None = None,
    waits: Sequence[float] | None = None,
) -> Iterator[RawSample]:
    """Yield the samples that begin at these bytes of a shard, or have these numbers in a folder or a table, in order.

    For a tar or a table that is cut, `source` may be any of its parts. For a folder, it must hold the samples to read.
    Members of a field that `want` rejects are not read. An offset at which no member begins is left out. A pax global
    header, which holds for all later members of an uncompressed tar, is not applied. `waits` are those of `open_shard`.
    Raises ShardError if the shard cannot be read, or is not the one that was listed.
    """
    reading, shard = reading or Reading(), source.shard
    limits = reading.limits
    if shard.samples:
        places = [offset for offset in sorted(set(offsets)) if 0 <= offset - source.begin < len(shard.samples)]
        chosen = shard.with_samples([shard.samples[offset - source.begin] for offset in places])
        opened = partial(open_shard, waits=waits)
        folder = FolderReader(Input(shard=chosen), want, limits, reading.fields.metadata, opened)
        for sample, offset in zip(folder, places, strict=True):
            yield replace(sample, offset=offset)
        return
    if is_table(shard.path):
        with open_shard(shard, waits=waits) as stream:
            opened = partial(open_shard, waits=waits)
            yield from TableReader(stream, Input(shard=shard), want, reading, opened, fetch, set(offsets))
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
