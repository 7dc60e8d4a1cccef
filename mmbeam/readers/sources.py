"""Open an input of any form: a tar, a zip archive, or a folder of media files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from mmbeam.config import Reading
from mmbeam.readers.folder import FolderReader
from mmbeam.readers.paths import is_zip
from mmbeam.readers.stream import open_shard
from mmbeam.readers.tar import TarReader, part_origin
from mmbeam.readers.zip import ZipReader
from mmbeam.types import Input, SourceReader


class Counted(Protocol):
    """Something that counts the bytes it reads."""

    @property
    def bytes_read(self) -> int:
        """Bytes read from the store so far."""


@contextmanager
def open_samples(
    source: Input, want: Callable[[str], bool], reading: Reading
) -> Iterator[tuple[TarReader | SourceReader, Counted]]:
    """Open an input; yield the reader of its samples, and what counts the bytes.

    `want(field)` states whether the bytes of a field are needed. Raises ShardError, here or while reading.
    """
    shard, limits = source.shard, reading.limits
    if shard.samples:
        folder = FolderReader(source, want, limits, reading.fields.metadata, open_shard)
        yield folder, folder
        return
    if is_zip(shard.path):
        with open_shard(shard) as stream:
            yield ZipReader(stream, source, want, limits, reading.fields), stream
        return
    with open_shard(shard, part_origin(source.begin)) as stream:
        yield TarReader(stream, shard.path, want, limits, source.begin, source.end), stream
