"""The samples of a tar by WebDataset's rules, read forward only and no byte twice.

Read from the bottom up: `TarReader` groups members into samples, `Members` parses headers (ustar, pax, GNU, v7) and
continues after damage, `ByteReader` reads and skips bytes. A header is parsed by the standard library's
`TarInfo.frombuf`; the rest follows `tarfile`. Whatever the bytes are, the reader
raises only ShardError, and its memory is bounded by `Limits`; errors of the stream itself pass through.

An uncompressed tar can be split into parts at any bytes. Take the first member that begins at or after a split,
counting its pax and GNU headers. This member, and the members directly after it with the same key, belong to the part
before the split. The next part begins with the next key. So both readers compute the boundary independently. The
reader of the later part finds its first header by magic and checksum. A member that is itself a tar contains such
headers and can mislead it. Therefore each part reports the byte of its own first sample and the byte of the first
sample after its end, and the run compares them (runs/plan.py).
"""

import io
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from mmbeam.config import MIB, Limits
from mmbeam.errors import ShardError
from mmbeam.readers.decompress import Decompressed, is_compressed
from mmbeam.types import Damage, InputRead, RawSample

BLOCK = 512
LOOK_BACK = 4096  # bytes read before a part's cut, to find the extended header of a member directly after the cut
EXTENSION_BYTES = MIB  # limit of a pax or GNU header; Linux limits paths to 4 KiB
READ_BYTES = MIB  # per read of decompressed or skipped data
TRAILING_BYTES = 64 << 10  # examined after the end-of-archive marker, for more members; tar pads to 10 KiB
SAMPLE_MEMBERS = 4  # a sample may hold this multiple of Limits.member_bytes: image, audio, text, metadata
FIELD_COST = 128  # bytes counted per field beyond its name, so that members without data are bounded too
DAMAGES_KEPT = 100  # per sample
META_NAME = re.compile(r"__[^/]*__($|/)")  # names that webdataset reserves

EXTENSION_TYPES = (b"x", b"X", b"g", b"L", b"K")  # pax, Solaris pax, pax global, GNU long name, GNU long link
BARE_TYPES = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


@dataclass(slots=True)
class Member:
    """A member as its headers describe it."""

    name: str  # "" if unknown; `problem` states why
    size: int  # of its data as stored
    offset: int  # of its first header, prefixes included
    data_offset: int
    regular: bool  # a file, not a link or directory
    sparse: bool = False
    problem: str = ""

    @property
    def end(self) -> int:
        """The byte at which the next header begins."""
        return self.data_offset + _padded(self.size)


@dataclass(slots=True)
class Break:
    """Damage at `offset`; `truncated` if nothing after it can be read."""

    offset: int
    error: str  # class of error
    message: str
    truncated: bool
    member: Member | None = None  # the member whose data is cut off


class _BadHeaderError(Exception):
    """A block that is not a header, or a cut-off extension."""


class ByteReader:
    """Exact reads and skips over a stream, and its position in the tar."""

    def __init__(self, stream: BinaryIO, decompressed: Decompressed | None = None, position: int = 0) -> None:
        self.stream = stream if decompressed is None else io.BufferedReader(decompressed, READ_BYTES)
        self.position = position  # in the tar, of the stream's next byte
        self._decompressed = decompressed
        self._origin = self._size = 0
        if self.stream.seekable():
            self._origin = self.stream.tell() - position
            self._size = self.stream.seek(0, io.SEEK_END) - self._origin
            self.stream.seek(self._origin + position)

    def read(self, size: int) -> bytes:
        """Return `size` bytes, or fewer at the end."""
        data = self.stream.read(size)
        while len(data) < size and (more := self.stream.read(size - len(data))):
            data += more
        self.position += len(data)
        return data

    def skip(self, size: int) -> None:
        """Skip `size` bytes, or fewer at the end. A seekable stream does not read them."""
        if size > BLOCK and self.stream.seekable():
            self.position = min(self.position + size, self._size)
            self.stream.seek(self._origin + self.position)
            return
        while size > 0 and (data := self.read(min(size, READ_BYTES))):
            size -= len(data)

    @property
    def fault(self) -> tuple[str, str] | None:
        """The class and message of the error that ended decompression early."""
        return None if self._decompressed is None else self._decompressed.fault

    def end(self) -> tuple[str, str]:
        """Return the class and message of the error for a read past the end."""
        return self.fault or ("DecodeError", f"the shard ends at byte {self.position:,}")


class Members:
    """The members of a tar in order, and the breaks between them.

    Between two steps the consumer may read the member's data from `source`; the rest is skipped.
    """

    def __init__(self, source: ByteReader, first: bytes) -> None:
        self.unterminated = False
        self.trailing_data = False
        self._source = source
        self._block = first  # the next header
        self._global_pax: dict[str, str] = {}

    @property
    def global_pax(self) -> bool:
        """Whether a pax global header has occurred. It applies to every later member."""
        return bool(self._global_pax)

    def __iter__(self) -> Iterator[Member | Break]:
        while self._block or self._source.fault is not None:
            pax, prefix, problem = dict(self._global_pax), None, ""
            try:
                info = parse(self._block)
                while info is not None and info.type in EXTENSION_TYPES:
                    if prefix is None and info.type != b"g":
                        prefix = self._source.position - BLOCK
                    try:
                        self._extend(info, pax)
                    except ValueError as error:
                        problem = str(error)
                    self._block = self._source.read(BLOCK)
                    info = parse(self._block)
                if info is None:  # the end-of-archive marker
                    self.trailing_data = self._source.read(TRAILING_BYTES).strip(b"\0") != b""
                    return
                begin = self._source.position - BLOCK if prefix is None else prefix
                if info.type == tarfile.GNUTYPE_SPARSE:
                    self._pass_sparse_map()
            except _BadHeaderError as error:
                damage = self._resynchronise(str(error))
                yield damage
                if damage.truncated:
                    return
                continue
            member = _member(info, pax, begin, self._source.position, problem)
            yield member
            self._source.skip(member.end - self._source.position)
            if (cut := self._cut(member)) is not None:
                yield cut
                return
            self._block = self._source.read(BLOCK)
            if len(self._block) < BLOCK and not self._block.strip(b"\0"):
                self._block = b""  # half an end-of-archive marker: unterminated, but not damage
        self.unterminated = True

    def _extend(self, info: tarfile.TarInfo, pax: dict[str, str]) -> None:
        """Read an extension header into `pax`. Raises ValueError if it is invalid or too large."""
        if info.size > EXTENSION_BYTES:
            self._source.skip(_padded(info.size))
            raise ValueError(f"an extended header of {info.size:,} bytes; {EXTENSION_BYTES:,} are allowed")
        payload = self._source.read(_padded(info.size))[: info.size]
        if len(payload) < info.size:
            raise _BadHeaderError(f"{len(payload):,} of {info.size:,} bytes of an extended header")
        if info.type == b"L":
            pax["path"] = _text(payload.partition(b"\0")[0])
        elif info.type != b"K":
            records = pax_records(payload)
            pax.update(records)
            if info.type == b"g":
                self._global_pax.update(records)

    def _pass_sparse_map(self) -> None:
        more = self._block[
            482
        ]  # whether another block of the map follows: byte 482 of the header, byte 504 of each block
        while more:
            block = self._source.read(BLOCK)
            if len(block) < BLOCK:
                raise _BadHeaderError("the cut-off map of a sparse file")
            more = block[504]

    def _cut(self, member: Member) -> Break | None:
        """Return the break of a member whose data is cut off. Missing padding is not damage."""
        present = min(self._source.position - member.data_offset, member.size)
        if present == member.size:
            return None
        error, why = self._source.end()
        message = f"expected {member.size:,} bytes, found {present:,}; {why}"
        return Break(member.offset, error, message, truncated=True, member=member)

    def _resynchronise(self, found: str) -> Break:
        """Move to the next block with a header's magic and checksum."""
        begin = self._source.position - len(self._block)
        self._block = find_header(self._source)
        expected = f"byte {begin:,}: expected a tar header, found {found}"
        if len(self._block) == BLOCK:
            position = self._source.position - BLOCK
            return Break(begin, "DecodeError", f"{expected}; the next header is at byte {position:,}", truncated=False)
        error, why = self._source.end()
        return Break(begin, error, f"{expected}; no header follows: {why}", truncated=True)


def _member(info: tarfile.TarInfo, pax: dict[str, str], offset: int, data_offset: int, problem: str) -> Member:
    sparse_type = info.type == tarfile.GNUTYPE_SPARSE
    name = pax.get("GNU.sparse.name") or pax.get("path") or info.name
    return Member(
        name="" if problem else name.rstrip("/"),
        size=0 if info.type in BARE_TYPES else int(pax.get("size", info.size)),
        offset=offset,
        data_offset=data_offset,
        regular=sparse_type or info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE),
        sparse=sparse_type or "GNU.sparse" in pax,
        problem=problem,
    )


def parse(block: bytes) -> tarfile.TarInfo | None:
    """Parse a header; None for a block of zeros, the end marker. Names that are not UTF-8 get backslash escapes."""
    if len(block) < BLOCK:
        raise _BadHeaderError(f"{len(block)} of its {BLOCK} bytes")
    if block.count(0) == BLOCK:
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except (tarfile.HeaderError, ValueError) as error:
        raise _BadHeaderError(f"a block that tarfile rejects: {error} (first 8 bytes {block[:8]!r})") from None
    if info.size < 0:
        raise _BadHeaderError(f"a negative size, {info.size}")
    return info


def find_header(source: ByteReader, stop: int | None = None) -> bytes:
    """Return the next block before `stop` that has the magic and checksum of a header; else fewer than BLOCK bytes."""
    block = source.read(BLOCK)
    while len(block) == BLOCK and not (block[257:262] == b"ustar" and is_header(block)):
        block = source.read(BLOCK) if stop is None or source.position < stop else b""
    return block


def is_header(block: bytes) -> bool:
    """Return whether `block` is a header or the end-of-archive marker, as at the beginning of a tar."""
    try:
        parse(block)
    except _BadHeaderError:
        return False
    return True


def pax_records(payload: bytes) -> dict[str, str]:
    """Return the records ("LENGTH KEY=VALUE\\n") of a pax header that are used here. Raises ValueError if malformed."""
    records: dict[str, str] = {}
    begin = 0
    while begin < len(payload) and payload[begin]:
        digits, space, _ = payload[begin : begin + 20].partition(b" ")
        end = begin + int(digits) if space and digits.isdigit() else 0
        key, equals, value = payload[begin + len(digits) + 1 : end - 1].partition(b"=")
        if not equals or payload[end - 1 : end] != b"\n":
            raise ValueError(f"a malformed pax header at its byte {begin:,}")
        if key == b"size" and not (value.isdigit() and len(value) <= 19):
            raise ValueError(f"a pax header with the size {value[:20]!r}")
        if key in (b"path", b"size", b"GNU.sparse.name"):
            records[key.decode()] = _text(value)
        if key.startswith(b"GNU.sparse."):
            records["GNU.sparse"] = ""
        begin = end
    return records


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and field (lower case) of a member's path; None if it does not belong to a sample.

    It follows webdataset's `base_plus_ext`, except for hidden files in folders (`a/.b.jpg`, macOS's `a/._b.jpg`):
    they are ignored at any depth, where webdataset makes them fields of a key `a/`.
    """
    folder, slash, last = name.rpartition("/")
    base, dot, extension = last.partition(".")
    if not base or not dot or META_NAME.match(name):
        return None
    return f"{folder}{slash}{base}", extension.lower()


@dataclass(slots=True)
class _Group:
    """The sample being read."""

    key: str
    offset: int
    damages: list[Damage]
    members: dict[str, bytes] = field(default_factory=dict)
    fields: dict[str, None] = field(default_factory=dict)
    held: int = 0  # bytes
    closed: bool = False  # by damage: the next member begins another sample
    truncated: bool = False


class _Cut:
    """The boundary between the parts before and after a cut; see the top of this file."""

    def __init__(self, byte: int | None) -> None:  # None: no cut, so no member is after it
        self._byte = sys.maxsize if byte is None else byte
        self._key: str | None = None  # of the first member at or after the cut

    def is_before(self, offset: int, key: str) -> bool:
        """Return whether the boundary is before the next member, the first header of which is at `offset`."""
        if self._key is None and offset >= self._byte:
            self._key = key
        return self._key is not None and key != self._key


def part_origin(begin: int) -> int:
    """Return the byte from which to open a shard for the part whose cut is at `begin`."""
    return max(0, begin - LOOK_BACK) // BLOCK * BLOCK


def parts_join(parts: Iterable[InputRead]) -> bool:
    """Return whether the parts of a tar, in order, hold each of its samples once.

    The first part reads from the beginning of the tar, so its `next_sample` is certainly the beginning of a sample. The
    next part with samples must begin with that sample, and so on up to the end of the tar. Parts without samples do not
    matter.
    """
    position: int | None = 0
    for part in parts:
        if part.first_sample is not None:
            if part.first_sample != position:
                return False
            position = part.next_sample
    return position is None


class TarReader:
    """The samples of one tar, plain or compressed by gzip or zstd (its first bytes decide, not its name).

    `want(field)` states whether the bytes of a member are needed; others are skipped. Adjacent members of one key are
    a sample; a repeated field and a damaged region each begin another one. Damage before the first sample is recorded
    with the first sample. Offsets are those in the uncompressed tar. Iterate once.

    With `begin` or `end` only the samples of the part between these two cuts are returned. The stream then begins at
    `part_origin(begin)`. A compressed tar belongs to the first part as a whole.

    Raises ShardError if the stream is not a tar, or is damaged and holds no sample. Errors of `stream` pass through.
    """

    def __init__(
        self,
        stream: BinaryIO,
        shard: str,
        want: Callable[[str], bool],
        limits: Limits,
        begin: int = 0,
        end: int | None = None,
    ) -> None:
        self._source = ByteReader(stream, position=part_origin(begin))
        self._begin = begin
        self._end = end
        self._shard = shard
        self._want = want
        self._limits = limits
        self._seen: set[int] = set()  # hashes of keys, smaller than keys
        # Set by iterating:
        self.first_sample: int | None = 0 if begin == 0 else None  # byte of the part's first sample; None: no sample
        self.next_sample: int | None = None  # byte of the first sample after the part; None: no sample
        self.unterminated = False  # the tar ended between two members, without its end-of-archive marker
        # There is data after the end-of-archive marker. Like tar and webdataset, mmbeam does not read them.
        # Concatenated tars are like this, and a tar whose middle was overwritten with zeros.
        self.trailing_data = False

    def __iter__(self) -> Iterator[RawSample]:
        first = self._first_block() if self._begin == 0 else find_header(self._source, self._end)
        if len(first) < BLOCK:
            return  # no header begins in this part
        headers = Members(self._source, first)
        begin, end = _Cut(self._begin), _Cut(self._end)
        group: _Group | None = None
        early: list[Damage] = []  # ahead of the first sample
        for member in headers:
            names = None
            if isinstance(member, Member) and not member.problem and member.regular:
                names = split_name(member.name)
            # A pax global header applies to all later members, but a part that begins after it cannot see it. So the
            # part that contains it reads to the end of the tar, and a part that meets it before its own first sample
            # yields none. Parts that begin after it then do not join (`parts_join`), and the next launch reads the
            # shard as one unit.
            if names is not None and not headers.global_pax:
                if self.first_sample is None and begin.is_before(member.offset, names[0]):
                    self.first_sample = member.offset
                if end.is_before(member.offset, names[0]):
                    self.next_sample = member.offset
                    break
            if self.first_sample is None:
                continue
            if isinstance(member, Break) or member.problem:
                _add_damage(group, early, member)
            elif names is not None:
                key, name = names
                if group is None or group.closed or key != group.key or name in group.fields:
                    if group is not None:
                        yield self._finish(group)
                    group = _Group(key, member.offset, damages=[] if group else early)
                self._add(group, name, member)
        if self.first_sample is not None and self.next_sample is None:  # so that one part reports a shard's oddities
            self.unterminated, self.trailing_data = headers.unterminated, headers.trailing_data
        if group is not None:
            yield self._finish(group)
        elif early:
            raise ShardError(f"{self._shard}: holds no sample that can be read: {early[0].message}")

    def _first_block(self) -> bytes:
        """Return the first header, decompressed if the tar is compressed."""
        head = self._source.read(BLOCK)
        if not head:
            raise ShardError(f"{self._shard}: is empty (0 bytes)")
        block, packed = head, not is_header(head) and is_compressed(head)
        if packed:
            self._end = None
            self._source = ByteReader(
                self._source.stream, Decompressed(self._source.stream, head, self._limits.expansion)
            )
            block = self._source.read(BLOCK)
        if not is_header(block):
            what = "a compressed file that does not contain a tar" if packed else "not a tar file"
            reason = f"; {self._source.fault[1]}" if self._source.fault else ""
            raise ShardError(f"{self._shard}: {what} (first 8 bytes {block[:8]!r}){reason}")
        return block

    def _finish(self, group: _Group) -> RawSample:
        identity = hash(group.key)
        repeated = identity in self._seen
        self._seen.add(identity)
        return RawSample(
            key=group.key,
            shard=self._shard,
            offset=group.offset,
            members=group.members,
            fields=tuple(group.fields),
            damages=tuple(group.damages),
            truncated=group.truncated,
            repeated=repeated,
        )

    def _add(self, group: _Group, name: str, member: Member) -> None:
        """Add a member to its sample, with its bytes if they are wanted and within the limits."""
        wanted = self._want(name)
        refusal = self._refuse(group, member) if wanted else None
        if refusal is not None and len(group.damages) < DAMAGES_KEPT:
            group.damages.append(_damage(member, *refusal))
        if group.held > SAMPLE_MEMBERS * self._limits.member_bytes + MIB:
            return  # a key with unlimited members: their names are not kept either
        group.fields[name] = None
        group.held += len(name) + FIELD_COST
        if wanted and refusal is None:
            data = self._source.read(member.size)
            if len(data) == member.size:  # otherwise Members reports the cut-off member
                group.members[name] = data
                group.held += member.size

    def _refuse(self, group: _Group, member: Member) -> tuple[str, str] | None:
        """Return the class and message of the error if the member's bytes must not be read."""
        allowed = self._limits.member_bytes
        if member.sparse:
            return "DecodeError", "is stored as a sparse file, which is unsupported; pack it as a regular file"
        if member.size > allowed:
            return "LimitError", f"has {member.size:,} bytes; {allowed:,} are allowed (Limits.member_bytes)"
        if group.held + member.size > SAMPLE_MEMBERS * allowed:
            whole = f"{group.held + member.size:,} bytes; {SAMPLE_MEMBERS} times {allowed:,} are allowed"
            return "LimitError", f"would raise its sample to {whole} (Limits.member_bytes)"
        return None


def _add_damage(group: _Group | None, early: list[Damage], item: Break | Member) -> None:
    """Add damage to the sample being read and end it. Without such a sample, add it to `early`."""
    if isinstance(item, Member):
        message = f"byte {item.offset:,}: a member whose name is unknown: {item.problem}"
        damage = Damage(field="", offset=item.offset, error="DecodeError", message=message)
    elif item.member is not None:
        damage = _damage(item.member, item.error, item.message)
    else:
        damage = Damage(field="", offset=item.offset, error=item.error, message=item.message)
    damages = early if group is None else group.damages
    if group is not None:
        group.closed = True
        group.truncated = group.truncated or (isinstance(item, Break) and item.truncated)
    if len(damages) < DAMAGES_KEPT:
        damages.append(damage)


def _damage(member: Member, error: str, message: str) -> Damage:
    names = split_name(member.name) if member.regular else None
    where = f"member {member.name} at byte {member.offset:,}: {message}"
    return Damage(field=names[1] if names else "", offset=member.offset, error=error, message=where)
