"""The samples of a zip archive, read in place through its central directory by the standard library's `zipfile`.

Members of a key need not be adjacent. A sample's offset is that of the local header of its first member in the
directory. An archive is cut at bytes: a sample belongs to the part that holds its offset, so each part finds its
samples in the directory alone.
"""

import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import BinaryIO

from mmbeam.config import MIB, SAMPLE_BYTES_FACTOR, FieldMap, Limits
from mmbeam.errors import ShardError, printable
from mmbeam.names import MODALITIES
from mmbeam.readers.paths import is_hidden, split_name
from mmbeam.types import Damage, Input, RawSample, SourceReader

KINDS_COUNTED = 50  # kinds of members that belong to no sample
EXPANDED_BYTES = 1024 * MIB  # may always be decompressed; beyond this, Limits.expansion applies
_ENCRYPTED = 0x1  # general purpose flag
_INVALID = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    IndexError,
    OverflowError,
    ValueError,
    struct.error,
    zlib.error,
)


class ZipReader(SourceReader):
    """The samples of a zip archive in the order of its central directory. Iterate once.

    `want(field)` states whether the bytes of a member are needed. A key that has no field of a modality (see
    `fields`) is not a sample; its members are counted. Without `fields`, each key is a sample. A field that repeats
    within a key begins another sample. A member that is encrypted, damaged, too large, or compressed by another method
    than deflate is damage to its sample. Names are keys only, never paths. With `offsets`, only the samples at these
    offsets are read.

    Raises ShardError if the archive has no readable central directory.
    """

    def __init__(
        self,
        stream: BinaryIO,
        source: Input,
        want: Callable[[str], bool],
        limits: Limits,
        fields: FieldMap | None = None,
        offsets: Collection[int] | None = None,
    ) -> None:
        super().__init__()
        self._offsets = offsets
        self._stream = stream
        self._source = source
        self._shard = source.shard.path
        self._want = want
        self._limits = limits
        self._fields = fields
        self._size = 0  # of the archive
        self._budget = 0.0  # bytes that may still be decompressed

    def __iter__(self) -> Iterator[RawSample]:
        if not self._stream.seekable():
            raise ShardError(
                f"{self._shard}: expected a server with range requests, as a zip archive needs; copy it to this machine"
            )
        size = self._size = self._stream.seek(0, 2)
        self._budget = EXPANDED_BYTES + self._limits.expansion * size
        try:
            archive = zipfile.ZipFile(self._stream)
        except _INVALID as error:
            raise ShardError(
                f"{self._shard}: not a zip archive, or its central directory is damaged or cut off ({error})"
            ) from None
        with archive:
            self.is_empty = not archive.filelist
            groups = self._groups(archive.filelist)
            known: set[int] = set()
            keys: set[str] = set()
            for number, (key, members) in enumerate(groups):
                offset = next(iter(members.values())).header_offset
                is_shared = offset in known
                if is_shared:  # only in a malicious archive: an offset past its end keeps the sample's id unique
                    offset = size + number
                known.add(offset)
                is_repeated = key in keys
                keys.add(key)
                is_inside = offset >= self._source.begin and (self._source.end is None or offset < self._source.end)
                if is_inside and (self._offsets is None or offset in self._offsets):
                    yield self._read(archive, key, members, offset, is_repeated, is_shared)

    def _groups(self, infos: list[zipfile.ZipInfo]) -> list[tuple[str, dict[str, zipfile.ZipInfo]]]:
        """Return the key and members of each sample. The first part counts the members that belong to none."""
        groups: list[tuple[str, dict[str, zipfile.ZipInfo]]] = []
        last: dict[str, dict[str, zipfile.ZipInfo]] = {}  # by key
        for info in infos:
            mode = info.external_attr >> 16
            names = split_name(info.filename)
            if info.filename.endswith("/"):
                self._count("directory")
            elif mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                self._count("link" if stat.S_ISLNK(mode) else "special file")
            elif names is None or is_hidden(info.filename):
                name = info.filename.rpartition("/")[2]
                self._count("hidden or reserved file" if "." in name else "file without an extension")
            else:
                key, field = names
                if key not in last or field in last[key]:
                    last[key] = {}
                    groups.append((key, last[key]))
                last[key][field] = info
        samples = []
        for key, members in groups:
            if self._fields is None or any(self._fields.kind(field) in MODALITIES for field in members):
                samples.append((key, members))
                continue
            for field in members:
                self._count(printable("." + field.rpartition(".")[2]))
        return samples

    def _count(self, kind: str) -> None:
        if self._source.begin == 0:
            self.members[kind if kind in self.members or len(self.members) < KINDS_COUNTED else "other"] += 1

    def _read(
        self,
        archive: zipfile.ZipFile,
        key: str,
        infos: dict[str, zipfile.ZipInfo],
        offset: int,
        is_repeated: bool,
        is_shared: bool,
    ) -> RawSample:
        members: dict[str, bytes] = {}
        damages: list[Damage] = []
        if is_shared:
            message = "the central directory names one member for several samples"
            damages.append(Damage(field="", offset=offset, error="DecodeError", message=message))
        held = 0
        for field, info in infos.items():
            if is_shared or not self._want(field):
                continue
            fault = self._fault(info, held)
            if fault is None:
                try:
                    with archive.open(info) as file:
                        data = file.read(info.file_size)
                    self._budget -= len(data)
                    if len(data) == info.file_size:
                        members[field] = data
                        held += len(data)
                        continue
                    fault = "DecodeError", f"expected {info.file_size:,} bytes, found {len(data):,}"
                except _INVALID as error:
                    fault = "DecodeError", f"cannot be read: {error or type(error).__name__}"
            where = f"member {printable(info.filename)} at byte {info.header_offset:,}: {fault[1]}"
            damages.append(Damage(field=field, offset=info.header_offset, error=fault[0], message=where))
        return RawSample(
            key=key,
            shard=self._shard,
            offset=offset,
            members=members,
            fields=tuple(infos),
            damages=tuple(damages),
            repeated=is_repeated,
        )

    def _fault(self, info: zipfile.ZipInfo, held: int) -> tuple[str, str] | None:
        """Return the class and message of the error if a member must not be read."""
        allowed = self._limits.member_bytes
        if not 0 <= info.header_offset < self._size:
            return "DecodeError", f"lies outside the archive, which has {self._size:,} bytes"
        if info.flag_bits & _ENCRYPTED:
            return "DecodeError", "is encrypted; pack it without a password"
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return "DecodeError", f"is compressed by method {info.compress_type}; expected stored (0) or deflated (8)"
        if info.file_size > allowed:
            return "LimitError", f"has {info.file_size:,} bytes; {allowed:,} are allowed (--max-member-bytes)"
        if held + info.file_size > SAMPLE_BYTES_FACTOR * allowed:
            whole = f"{held + info.file_size:,} bytes; {SAMPLE_BYTES_FACTOR} times {allowed:,} are allowed"
            return "LimitError", f"would raise its sample to {whole} (--max-member-bytes)"
        if info.file_size > self._budget:
            return "LimitError", "the archive expands beyond its limit (--max-expansion), as a zip bomb does"
        return None
