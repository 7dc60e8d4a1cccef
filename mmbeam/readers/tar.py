"""The samples of a tar by WebDataset's rules, read forward only and no byte twice.

Read from the bottom up: `TarReader` groups members into samples, `Members` parses headers (ustar, pax, GNU, v7) and
continues after damage, `ByteReader` reads and skips bytes. Parsing follows the standard library's `tarfile`. Whatever
the bytes are, the reader raises only ShardError, and its memory is bounded by `Limits`; errors of the stream itself
pass through.

An uncompressed tar can be split into parts at any bytes. Take the first member that begins at or after a split,
counting its pax and GNU headers. This member, and the members directly after it with the same key, belong to the part
before the split. The next part begins with the next key. So both readers compute the boundary independently. The
reader of the later part finds its first header by magic and checksum. A member that is itself a tar contains such
headers and can mislead it. Therefore each part reports the byte of its own first sample and the byte of the first
sample after its end, and the run compares them (runs/plan.py).
"""

import hashlib
import io
import re
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

from mmbeam.config import MIB, SAMPLE_BYTES_FACTOR, Limits
from mmbeam.errors import ShardError
from mmbeam.readers.decompress import Decompressed, is_compressed
from mmbeam.readers.paths import split_name
from mmbeam.types import Damage, InputRead, RawSample, utf8_name

BLOCK = 512
LOOK_BACK = 4096  # bytes read before a part's cut, to find the extended header of a member directly after the cut
EXTENSION_BYTES = MIB  # limit of a pax or GNU header; Linux limits paths to 4 KiB
READ_BYTES = MIB  # per read of decompressed or skipped data
SEARCH_BYTES = 64 * MIB  # searched for the first header; a longer file without one is not a tar
FIELD_COST = 128  # bytes counted per field beyond its name, so that members without data are bounded too
DAMAGES_KEPT = 100  # per sample, and per shard of those that belong to no sample
KINDS_COUNTED = 50  # types of members counted by name; a hostile shard may have 256
RESTARTS = 3  # of decompression per shard, each to read again what a wrong size skipped
PAX_PATH = re.compile(rb"^\d+ path=([^\n]+)\n", re.MULTILINE)

EXTENSION_TYPES = (b"x", b"X", b"g", b"L", b"K")  # pax, Solaris pax, pax global, GNU long name, GNU long link
KIND_OF_TYPE = {
    **dict.fromkeys((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE), "file"),
    **dict.fromkeys((tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE), "device"),
    tarfile.DIRTYPE: "directory",
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
}
LINKS = ("hard link", "symbolic link")
OTHER_FORMATS = (  # by first bytes, for the error about a file that is not a tar
    (b"PK\x03\x04", "a zip archive"),
    (b"PAR1", "a Parquet file"),
    (b"%PDF", "a PDF"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG", "a PNG image"),
    (b"\x89HDF", "an HDF5 file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"<", "HTML or XML"),
    (b"{", "JSON"),
    (b"[", "JSON"),
)


@dataclass(slots=True)
class Member:
    """A member as its headers describe it."""

    name: str
    size: int  # of its data as stored
    offset: int  # of its first header, prefixes included
    data_offset: int
    kind: str  # "file", "directory", "hard link", "symbolic link", "device", or another type as "type 'V'"
    link: str = ""  # the target of a link
    sparse: bool = False
    is_scanned: bool = False  # its data were searched for the header of another member
    is_padded: bool = True  # with zeros, as far as the padding was read

    @property
    def end(self) -> int:
        """The byte at which the next header begins."""
        return self.data_offset + _padded(self.size)


@dataclass(frozen=True, slots=True)
class LostMember:
    """A member whose header is damaged."""

    offset: int  # of the header
    name: str  # as far as it is legible; else ""
    error: str  # class of error
    message: str
    is_certain: bool = True  # False: only a sample that lacks a field shows that something is lost
    is_inside: bool = False  # it is between two members of one sample


@dataclass(frozen=True, slots=True)
class DamagedRegion:
    """Damage at `offset`, and the members that are lost by it."""

    offset: int
    error: str  # class of error
    message: str
    losses: tuple[LostMember, ...] = ()
    member: Member | None = None  # whose data are cut off, or whose size is wrong
    truncated: bool = False  # nothing after it can be read


class Header(NamedTuple):
    """The fields of a header that are used here, as `tarfile.TarInfo.frombuf` parses them."""

    name: str
    size: int
    type: bytes
    link: str


class _BadHeaderError(Exception):
    """A block that is not a header, or a cut-off extension."""


class ByteReader:
    """Exact reads and skips over a stream, and its position in the tar."""

    def __init__(self, stream: BinaryIO, position: int = 0) -> None:
        self.position = position  # in the tar, of the next byte
        self._stored = self._stream = stream
        self._decompressed: Decompressed | None = None
        self._expansion = 0.0
        self._restarts = RESTARTS
        self._unread = b""  # pushed back by `unread`
        self._can_seek = stream.seekable()
        self._origin = self._size = 0
        if self._can_seek:
            self._origin = stream.tell() - position
            self._size = stream.seek(0, io.SEEK_END) - self._origin
            stream.seek(self._origin + position)

    def decompress(self, head: bytes, expansion: float) -> None:
        """Read the decompressed stream from here on. `head` was already read from its beginning."""
        self._expansion = expansion
        self._decompressed = Decompressed(self._stored, head, expansion)
        self._stream = io.BufferedReader(self._decompressed, READ_BYTES)
        self.position = 0

    def read(self, size: int) -> bytes:
        """Return `size` bytes, or fewer at the end."""
        data = b""
        if self._unread:
            data, self._unread = self._unread[:size], self._unread[size:]
        while len(data) < size and (more := self._stream.read(size - len(data))):
            data += more
        self.position += len(data)
        return data

    def unread(self, data: bytes) -> None:
        """Push back `data`, the bytes read last."""
        self._unread = data + self._unread
        self.position -= len(data)

    def rewind(self, position: int) -> bool:
        """Return to an earlier byte by reading the stream again; False if that is impossible or too expensive."""
        if not self._can_seek or (self._decompressed is not None and not self._restarts):
            return False
        self._unread = b""
        if self._decompressed is None:
            self._stream.seek(self._origin + position)
            self.position = position
            return True
        self._restarts -= 1
        self._stored.seek(self._origin)
        self.decompress(self._stored.read(BLOCK), self._expansion)
        self.skip(position)
        return True

    def skip(self, size: int) -> None:
        """Skip `size` bytes, or fewer at the end. A seekable stream does not read them."""
        if size > BLOCK and self.is_seekable and not self._unread:
            self.position = max(self.position, min(self.position + size, self._size))
            self._stream.seek(self._origin + self.position)
            return
        while size > 0 and (data := self.read(min(size, READ_BYTES))):
            size -= len(data)

    def has(self, end: int) -> bool:
        """Return False if the stream is known to end before the byte `end`."""
        return not self.is_seekable or end <= self._size

    @property
    def is_seekable(self) -> bool:
        """Whether `rewind` costs nothing."""
        return self._can_seek and self._decompressed is None

    @property
    def is_compressed(self) -> bool:
        """Whether the tar is compressed."""
        return self._decompressed is not None

    @property
    def fault(self) -> tuple[str, str] | None:
        """The class and message of the error that ended decompression early."""
        return None if self._decompressed is None else self._decompressed.fault

    def end_error(self) -> tuple[str, str]:
        """Return the class and message of the error for a read past the end."""
        return self.fault or ("DecodeError", f"the shard ends at byte {self.position:,}")


class Members:
    """The members of a tar in order, and the breaks between them.

    Between two steps the consumer may read the member's data from `source`; the rest is skipped. After a break the
    members continue at the next header with magic and checksum.
    """

    def __init__(self, source: ByteReader, first: bytes) -> None:
        self.count = 0
        self.unterminated = False
        self.trailing_data = False
        self.concatenated = False  # another tar begins after an end-of-archive marker
        self._source = source
        self._block = first  # the next header
        self._global_pax: dict[str, str] = {}
        # After damage to an extended header: the name of the next member as far as known. Its own header may hold only
        # a part of it.
        self._orphan: str | None = None

    @property
    def global_pax(self) -> bool:
        """Whether a pax global header has occurred. It applies to every later member."""
        return bool(self._global_pax)

    def __iter__(self) -> Iterator[Member | DamagedRegion]:
        source = self._source
        member: Member | None = None  # the last one, unless a break follows it
        after_break = False
        while True:
            begin = source.position - len(self._block)
            if len(self._block) < BLOCK and not self._block.strip(b"\0"):
                self.unterminated = source.fault is None
                if source.fault is not None:
                    yield DamagedRegion(begin, *source.fault, truncated=True)
                return
            pax, prefix, name_problem = dict(self._global_pax), None, ""
            try:
                info = parse_header(self._block)
                if info is None:
                    damage = self._skip_zeros(begin)
                    if damage is None:
                        return
                    yield damage
                    if damage.truncated:
                        return
                    member, after_break = None, not self.concatenated
                    continue
                while info.type in EXTENSION_TYPES:
                    if prefix is None and info.type != b"g":
                        prefix = source.position - BLOCK
                    try:
                        self._extend(info, pax)
                    except ValueError as error:
                        name_problem = str(error)
                    self._block = source.read(BLOCK)
                    info = parse_header(self._block)
                    if info is None:
                        raise _BadHeaderError("a block of zeros")
                begin = source.position - BLOCK if prefix is None else prefix
                if info.type == tarfile.GNUTYPE_SPARSE:
                    self._skip_sparse_map()
            except _BadHeaderError as error:
                hint = "" if prefix is None else pax.get("path", "")
                damage = self._resynchronise(begin, str(error), member, hint)
                yield damage
                if damage.truncated:
                    return
                member, after_break = None, True
                continue
            if self._orphan is not None and not name_problem and prefix is None:
                name_problem = "its extended header is damaged"
            elif after_break and prefix is None and len(info.name.encode(errors="replace")) >= 100:
                name_problem = "its extended header is probably lost"
            member = _member(info, pax, begin, source.position)
            self.count += 1
            if name_problem:
                message = f"byte {begin:,}: a member whose name is unknown: {name_problem}"
                name = self._orphan or member.name
                yield DamagedRegion(begin, "DecodeError", message, (LostMember(begin, name, "DecodeError", message),))
            else:
                yield member
            self._orphan, after_break = None, False
            data_end = member.data_offset + member.size
            source.skip(data_end - source.position)
            if source.position < data_end:
                damage = self._truncated(member)
                yield damage
                if damage.truncated:
                    return
                member, after_break = None, True
                continue
            if source.read(member.end - source.position).strip(b"\0"):
                member.is_padded = False
            member = None if name_problem else member
            self._block = source.read(BLOCK)

    def _extend(self, info: Header, pax: dict[str, str]) -> None:
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

    def _skip_sparse_map(self) -> None:
        more = self._block[482]  # whether a block of the map follows; in each of those blocks, byte 504 states it
        while more:
            block = self._source.read(BLOCK)
            if len(block) < BLOCK:
                raise _BadHeaderError("the cut-off map of a sparse file")
            more = block[504]

    def _skip_zeros(self, begin: int) -> DamagedRegion | None:
        """Read blocks of zeros from `begin` on, and what follows; return None if they end the tar.

        Two blocks, or one at the end of the file, are the end-of-archive marker, after which another tar may begin. One
        block before a member is a header that was overwritten.
        """
        zeros = trailing_zeros = 0
        while self._block.count(0) == BLOCK:
            zeros += 1
            self._block = self._source.read(BLOCK)
        after = self._source.position - len(self._block)
        if not self._block.strip(b"\0"):
            return None if self._source.fault is None else DamagedRegion(after, *self._source.fault, truncated=True)
        while len(self._block) == BLOCK and not _is_ustar_header(self._block):
            trailing_zeros = trailing_zeros + 1 if self._block.count(0) == BLOCK else 0
            self._block = self._source.read(BLOCK)
        if len(self._block) < BLOCK and zeros == 1 and trailing_zeros > 1 and self._source.fault is None:
            self._block = bytes(BLOCK)
        if len(self._block) < BLOCK and zeros > 1:
            self.trailing_data = True
            return None if self._source.fault is None else DamagedRegion(after, *self._source.fault, truncated=True)
        what = f"byte {begin:,}: expected a tar header, found {512 * zeros:,} zeros"
        found = self._source.position - len(self._block)
        if zeros > 1 and found == after:
            self.concatenated = True
            return DamagedRegion(
                begin, "DecodeError", what, (LostMember(begin, "", "DecodeError", what, is_certain=False),)
            )
        return self._damaged_region(begin, what, (begin,), ("",))

    def _truncated(self, member: Member) -> DamagedRegion:
        """Return the break of a member that claims more bytes than there are; move to the next header in its data."""
        present = max(0, self._source.position - member.data_offset)
        error, why = self._source.end_error()
        if not _is_tar(member.name) and not member.is_scanned and self._source.rewind(member.data_offset):
            self._block = find_header(self._source)
            if len(self._block) == BLOCK:
                return self._wrong_size(member)
        message = f"expected {member.size:,} bytes, found {present:,}; {why}"
        return DamagedRegion(member.offset, error, message, member=member, truncated=True)

    def _wrong_size(self, member: Member) -> DamagedRegion:
        found = self._source.position - BLOCK
        message = f"its size, {member.size:,} bytes, is wrong: the header of another member is at byte {found:,}"
        return DamagedRegion(member.offset, "DecodeError", message, member=member)

    def _resynchronise(self, begin: int, found: str, member: Member | None, hint: str) -> DamagedRegion:
        """Move to the next header after the damage at `begin`, and return the break.

        `member` is the one before the damage; its size may be wrong. `hint` is the name that an extended header states.
        """
        source, block = self._source, self._block
        what = f"byte {begin:,}: expected a tar header, found {found}"
        name = hint or legible_name(block)
        may_be_wrong = member is not None and not name and not (member.is_scanned or _is_tar(member.name))
        if member is not None and may_be_wrong and source.rewind(member.data_offset):
            self._block = find_header(source, member.end)
            if len(self._block) == BLOCK:
                return self._wrong_size(member)
            source.skip(begin + len(block) - source.position)
        size = _size_of(block) if _is_tar(name) else None
        if size is not None and source.is_seekable:  # it holds headers, but its size is right if it leads to another
            back = source.position
            source.skip(_padded(size))
            self._block = source.read(BLOCK)
            if _is_ustar_header(self._block) or self._block.count(0) == BLOCK:
                return self._damaged_region(begin, what, (begin,), (name,))
            source.rewind(back)
        offsets: list[int] = []
        names: list[str] = []
        zeros = 0  # blocks at the end
        while len(block) == BLOCK and (source.position <= SEARCH_BYTES or self.count):
            zeros = zeros + 1 if block.count(0) == BLOCK else 0
            if block[156:157] in EXTENSION_TYPES and legible_name(block):
                self._orphan = ""
            elif path := PAX_PATH.search(block):
                self._orphan = _text(path[1])
            elif self._orphan == "" and not offsets and not names and block.strip(b"\0"):
                self._orphan = _text(block.partition(b"\0")[0])  # the payload of a GNU header
            elif name or legible_name(block):
                offsets.append(source.position - BLOCK if offsets else begin)
                names.append(name or legible_name(block))
            name = ""
            block = source.read(BLOCK)
            if _is_ustar_header(block):
                break
        if not names and (self._orphan is None or len(block) < BLOCK):
            offsets, names = [begin], [hint or legible_name(self._block)]
        is_end_mark = len(block) < BLOCK and zeros > 1 and source.fault is None
        self._block = bytes(BLOCK) if is_end_mark else block
        if member is not None and not member.is_padded and not any(names):
            message = f"its size, {member.size:,} bytes, is wrong: its data continue after them"
            return DamagedRegion(
                member.offset, "DecodeError", message, member=member, truncated=len(self._block) < BLOCK
            )
        return self._damaged_region(begin, what, offsets, names)

    def _damaged_region(self, begin: int, what: str, offsets: Sequence[int], names: Sequence[str]) -> DamagedRegion:
        """Return the break at `begin` with a loss for each name; `_block` is the next header, or shorter at the end."""
        is_end_mark = self._block.count(0) == BLOCK
        is_end = not is_end_mark and not _is_ustar_header(self._block)
        error, why = self._source.end_error() if is_end else ("DecodeError", "")
        if is_end:
            what += f"; no header follows: {why}"
        elif is_end_mark:
            what += "; the end-of-archive marker follows"
        else:
            what += f"; the next header is at byte {self._source.position - BLOCK:,}"
        losses = tuple(
            LostMember(offset, name, error, what)
            for offset, name in zip(offsets[:DAMAGES_KEPT], names[:DAMAGES_KEPT], strict=True)
        )
        return DamagedRegion(begin, error, what, losses, truncated=is_end)


def _member(info: Header, pax: dict[str, str], offset: int, data_offset: int) -> Member:
    kind = KIND_OF_TYPE.get(info.type, f"type {info.type.decode('latin-1')!r}")
    name = pax.get("GNU.sparse.name") or pax.get("path") or info.name
    return Member(
        name=name.rstrip("/"),
        size=int(pax.get("size", info.size)) if kind == "file" or kind.startswith("type") else 0,
        offset=offset,
        data_offset=data_offset,
        kind=kind,
        link=info.link,
        sparse=info.type == tarfile.GNUTYPE_SPARSE or "GNU.sparse" in pax,
    )


def parse_header(block: bytes) -> Header | None:
    """Parse a header; None for a block of zeros. Names that are not UTF-8 get backslash escapes."""
    if len(block) < BLOCK:
        raise _BadHeaderError(f"{len(block)} of its {BLOCK} bytes")
    if block.count(0) == BLOCK:
        return None
    try:
        checksum, size = _number(block[148:156]), _number(block[124:136])
    except (tarfile.HeaderError, ValueError):
        raise _BadHeaderError("other data") from None
    # The lower half of an Adler-32 is 1 + the sum of the bytes (of 256 at most), 10 times as fast as `sum`.
    fields = block[:148] + b" " * 8 + block[156:]
    total = (zlib.adler32(fields[:256]) & 0xFFFF) + (zlib.adler32(fields[256:]) & 0xFFFF) - 2
    if checksum != total and checksum != total - 256 * sum(byte > 127 for byte in fields):  # of signed bytes
        raise _BadHeaderError("a bad checksum")
    if size < 0:
        raise _BadHeaderError(f"a negative size, {size}")
    name, kind = _text(block[:100].partition(b"\0")[0]), block[156:157]
    if kind == tarfile.AREGTYPE and name.endswith("/"):
        kind = tarfile.DIRTYPE
    if block[345] and kind not in tarfile.GNU_TYPES:
        name = _text(block[345:500].partition(b"\0")[0]) + "/" + name
    return Header(name, size, kind, _text(block[157:257].partition(b"\0")[0]))


def _number(field: bytes) -> int:
    number: int = tarfile.nti(field)  # type: ignore[attr-defined]
    return number


def find_header(source: ByteReader, stop: int | None = None) -> bytes:
    """Return the next block before `stop` that has the magic and checksum of a header; else fewer than BLOCK bytes."""
    block = source.read(BLOCK)
    while len(block) == BLOCK and not _is_ustar_header(block):
        block = source.read(BLOCK) if stop is None or source.position < stop else b""
    return block


def _is_ustar_header(block: bytes) -> bool:
    """Return whether a tar can be followed from this block on: it has a header's magic and checksum."""
    return block[257:262] == b"ustar" and is_header_or_end(block)


def is_header_or_end(block: bytes) -> bool:
    """Return whether `block` is a header or the end-of-archive marker, as at the beginning of a tar."""
    try:
        parse_header(block)
    except _BadHeaderError:
        return False
    return True


def legible_name(block: bytes) -> str:
    """Return the member's name in a damaged or cut-off header, "" if the block does not look like a header."""
    has_magic = block[257:262] == b"ustar"
    name, _, padding = block[:100].partition(b"\0")
    if not has_magic and (
        len(block) < 100 or padding.strip(b"\0") or not re.fullmatch(rb"[ 0-7]{6,7}[ \0]+", block[100:108])
    ):
        return ""
    prefix = block[345:500].partition(b"\0")[0] if has_magic and block[257:265] != b"ustar  \0" else b""
    text = _text(prefix + b"/" + name if prefix else name)
    return text if text.isprintable() else ""


def _size_of(block: bytes) -> int | None:
    """Return the size in a damaged header, None if it is illegible or the block is cut off."""
    try:
        size = _number(block[124:136]) if len(block) == BLOCK else -1
    except (tarfile.HeaderError, ValueError):
        return None
    return size if size >= 0 else None


def _is_tar(name: str) -> bool:
    """Return whether a member is itself a tar, which holds headers that are not those of further members."""
    return ".tar" in name.lower().rpartition("/")[2] or name.lower().endswith(".tgz")


def header_inside(data: bytes, padding: bytes) -> int | None:
    """Return the offset in a member's data of another member's header, which shows that the size is wrong."""
    magic = data[257::BLOCK]  # the first letter of "ustar", if a block is a header
    place = magic.find(b"u")
    while place >= 0:
        if _is_ustar_header(data[place * BLOCK : (place + 1) * BLOCK]):
            return place * BLOCK
        place = magic.find(b"u", place + 1)
    tail = len(data) // BLOCK * BLOCK
    return tail if _is_ustar_header(data[tail:] + padding) else None


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


@dataclass(slots=True)
class _Group:
    """The sample being read."""

    key: str
    offset: int
    members: dict[str, bytes] = field(default_factory=dict)
    fields: dict[str, None] = field(default_factory=dict)
    damages: list[Damage] = field(default_factory=list)
    losses: list[LostMember] = field(default_factory=list)  # members that may have belonged to this sample
    size: int = 0  # bytes of its members
    truncated: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the sample was lost."""
        return not (self.damages or self.losses or self.truncated)


class _PartBoundary:
    """The boundary between the parts before and after a cut; see the top of this file."""

    def __init__(self, byte: int | None) -> None:  # None: no cut, so no member is after it
        self._byte = sys.maxsize if byte is None else byte
        self._key: str | None = None  # of the first member at or after the cut

    def is_passed(self, offset: int, key: str) -> bool:
        """Record the next member, whose first header is at `offset`. Return whether it is after the cut."""
        if self._key is None and offset >= self._byte:
            self._key = key
        return self._key is not None and key != self._key


def part_origin(begin: int) -> int:
    """Return the byte from which to open a shard for the part whose cut is at `begin`."""
    return max(0, begin - LOOK_BACK) // BLOCK * BLOCK


def parts_are_contiguous(parts: Iterable[InputRead]) -> bool:
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

    `want(field)` states whether the bytes of a member are needed; others are skipped. Adjacent members of one key are a
    sample; a field that repeats begins another one. Links are not followed; a link to a needed field is recorded as a
    Damage of its sample. Offsets are those in the uncompressed tar. Iterate once.

    Damage affects only the members that it hits. A damaged header belongs to the sample that its name states, as far as
    it is legible, or to the adjacent sample that lacks a field of the last complete sample. If it belongs to neither,
    it becomes a sample with no members and one Damage; if no name is legible, it is added to `failures`. After damage
    the tar is followed from the next header with magic and checksum on.

    With `begin` or `end` only the samples of the part between these two cuts are returned. The stream then begins at
    `part_origin(begin)`. A compressed tar belongs to the first part as a whole. With `origin`, the stream begins at
    this byte of an uncompressed tar, which must be that of a sample (readers/samples.py).

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
        origin: int | None = None,
    ) -> None:
        self._source = ByteReader(stream, position=part_origin(begin) if origin is None else origin)
        self._begin = begin
        self._end = end
        self._shard = shard
        self._want = want
        self._limits = limits
        self._seen: set[int] = set()  # hashes of keys, smaller than keys
        self._expected_fields: tuple[str, ...] | None = None  # fields of the last whole sample
        self._pending: _Group | None = None  # a sample that is compared with the next one to see what it lacks
        # Byte of damage that a part cannot attribute, since the sample to compare with belongs to another part. The
        # part reports it as `next_sample`, so that the parts do not join and the shard is read again as a whole.
        self._unattributed_offset: int | None = None
        # Set by iterating:
        self.first_sample: int | None = 0 if begin == 0 else None  # byte of the part's first sample; None: no sample
        self.next_sample: int | None = None  # byte of the first sample after the part; None: no sample
        self.failures: list[Damage] = []  # damage that belongs to no sample, the first DAMAGES_KEPT
        self.broken: str | None = None  # why nothing could be read from some byte on
        self.members: Counter[str] = Counter()  # members that belong to no sample, by kind
        self.is_empty = False  # the tar has no member
        self.unterminated = False  # the tar ended between two members, without its end-of-archive marker
        self.trailing_data = False  # after the end-of-archive marker there are data that are not a tar
        self.concatenated = False  # after the end-of-archive marker another tar begins, which is read

    def __iter__(self) -> Iterator[RawSample]:
        first = self._first_block() if self._begin == 0 else find_header(self._source, self._end)
        if len(first) < BLOCK and self._begin:
            return  # no header begins in this part
        headers = Members(self._source, first)
        begin, end = _PartBoundary(self._begin), _PartBoundary(self._end)
        group: _Group | None = None
        any_sample = False
        losses: list[LostMember] = []  # since the last member
        for member in headers:
            names = None
            if isinstance(member, Member) and (member.kind == "file" or member.kind in LINKS):
                names = split_name(member.name)
                names = None if names and member.kind in LINKS and not self._want(names[1]) else names
            # A pax global header applies to all later members, but a part that begins after it cannot see it. So the
            # part that contains it reads to the end of the tar, and a part that meets it before its own first sample
            # yields none. Parts that begin after it are not contiguous: the next launch reads the shard as one unit.
            if names is not None and not headers.global_pax:
                if self.first_sample is None and begin.is_passed(member.offset, names[0]):
                    self.first_sample = member.offset
                if end.is_passed(member.offset, names[0]):
                    self.next_sample = member.offset
                    self._unattributed_offset = losses[0].offset if losses else self._unattributed_offset
                    break
            if self.first_sample is None:
                if names is not None and isinstance(member, Member) and member.size <= LOOK_BACK:
                    self._add(
                        _Group(names[0], member.offset), names[1], member
                    )  # finds the headers that its part finds
                continue
            if isinstance(member, DamagedRegion):
                losses += self._losses(group, member)
            elif names is None:
                self._count(member)
            else:
                key, name = names
                is_same = group is not None and key == group.key and name not in group.fields
                ahead = self._assign_losses(losses, group, key, is_same)
                losses = []
                if group is None or not is_same:
                    if group is not None:
                        yield from self._close(group)
                    group = _Group(key, member.offset, losses=ahead)
                    any_sample = True
                self._add(group, name, member)
        if self.first_sample is None:
            return
        if self._begin == 0 and not headers.count and (self.broken or headers.trailing_data or len(first) < BLOCK):
            raise ShardError(f"{self._shard}: {self._describe_other_format(first)}")
        if self.next_sample is None:  # only the last part reports the shard's irregularities
            self.unterminated, self.trailing_data = headers.unterminated, headers.trailing_data
            self.concatenated = headers.concatenated
            self.is_empty = not headers.count
            losses = self._assign_losses_at_end(losses, group)
        elif self._expected_fields is None and (last := self._pending or group) is not None and last.losses:
            self._unattributed_offset = last.losses[0].offset
        if group is not None:
            yield from self._close(group, losses, is_last=True)
        else:
            for stray in self._unattributed(losses):
                any_sample = True
                yield stray
        self.next_sample = self.next_sample if self._unattributed_offset is None else self._unattributed_offset
        if self.failures and not any_sample and self.next_sample is None and self._begin == 0:
            raise ShardError(f"{self._shard}: holds no sample that can be read: {self.failures[0].message}")

    def _first_block(self) -> bytes:
        """Return the first header, decompressed if the tar is compressed."""
        head = self._source.read(BLOCK)
        if not head:
            raise ShardError(f"{self._shard}: is empty (0 bytes)")
        if is_compressed(head) and not is_header_or_end(head):
            self._end = None
            self._source.decompress(head, self._limits.expansion)
            head = self._source.read(BLOCK)
        return head

    def _describe_other_format(self, first: bytes) -> str:
        """Return what the shard is, since it is not a tar. Its bytes are not quoted: it may be any file."""
        text = first.lstrip(b"\xef\xbb\xbf \t\r\n")
        looks = next((name for sign, name in OTHER_FORMATS if text.startswith(sign)), None)
        what = "a compressed file that does not contain a tar" if self._source.is_compressed else "not a tar file"
        what += f"; it looks like {looks}" if looks else ": it has no tar header"
        return f"{what}; {self._source.fault[1]}" if self._source.fault else what

    def _losses(self, group: _Group | None, damage: DamagedRegion) -> list[LostMember]:
        """Return what a break costs. Damage to the data of a member of `group` is added to that sample."""
        if damage.truncated:
            self.broken = f"{self._shard}: {damage.message}"
        member, losses = damage.member, list(damage.losses)
        if member is None:
            return losses or [LostMember(damage.offset, "", damage.error, damage.message)] * damage.truncated
        names = split_name(member.name)
        message = f"member {member.name} at byte {member.offset:,}: {damage.message}"
        if group is not None and names is not None and names[0] == group.key and names[1] in group.fields:
            group.members.pop(names[1], None)
            group.truncated = group.truncated or damage.truncated
            _add_damage(group, Damage(field=names[1], offset=member.offset, error=damage.error, message=message))
            return losses
        return [*losses, LostMember(member.offset, "", damage.error, message)]

    def _count(self, member: Member) -> None:
        """Count a member that belongs to no sample."""
        kind = member.kind
        if kind == "file":
            last = member.name.rpartition("/")[2]
            kind = "file without an extension" if "." not in last else "hidden or reserved file"
        self.members[kind if kind in self.members or len(self.members) < KINDS_COUNTED else "other"] += 1

    def _assign_losses(
        self, losses: Sequence[LostMember], group: _Group | None, key: str, is_same: bool
    ) -> list[LostMember]:
        """Add losses between `group` and a member of `key` to the group, and return those that may belong to `key`."""
        if losses and self._expected_fields is None and self._begin:
            self._unattributed_offset = losses[0].offset
        ahead: list[LostMember] = []
        for loss in sorted(losses, key=lambda loss: loss.offset):
            if (
                group is not None
                and not ahead
                and (is_same or (key != group.key and self._may_be_of(group, loss, key)))
            ):
                if len(group.losses) < DAMAGES_KEPT:
                    group.losses.append(replace(loss, is_inside=is_same))
            else:
                ahead.append(loss)
        return ahead

    def _may_be_of(self, group: _Group, loss: LostMember, next_key: str) -> bool:
        """Return whether the loss may belong to `group`, after which a member of `next_key` follows."""
        names, lacking = split_name(loss.name), self._lacking(group)
        if names is None:
            return bool(lacking)
        return names[0] == group.key or (names[0] != next_key and names[1] in lacking)

    def _assign_losses_at_end(self, losses: Sequence[LostMember], group: _Group | None) -> list[LostMember]:
        """Add losses after `group`, the last sample, to it, and return those that do not belong to it."""
        if losses and self._expected_fields is None and self._begin:
            self._unattributed_offset = losses[0].offset
        left = []
        for loss in losses:
            names = split_name(loss.name)
            if group is None or not loss.is_certain or (names and names[0] != group.key):
                left.append(loss)
            elif self.broken is None and (names or self._lacking(group)):
                group.losses.append(loss)
            elif self.broken is not None and (names or self._expected_fields is None or self._lacking(group)):
                group.truncated = True
                _add_damage(group, Damage(field="", offset=loss.offset, error=loss.error, message=loss.message))
            else:
                left.append(loss)
        if group is not None and self.unterminated and (lacking := self._lacking(group)):
            position = self._source.position
            message = (
                f"the shard ends at byte {position:,} without an end-of-archive marker, "
                f"and its last sample, {group.key}, has no {', '.join(lacking)}"
            )
            self.broken = f"{self._shard}: {message}"
            self.failures.append(Damage(field="", offset=position, error="DecodeError", message=message))
        return left

    def _lacking(self, group: _Group, typical: Sequence[str] | None = None) -> list[str]:
        """Return the fields that the last whole sample had and `group` has not."""
        return [name for name in typical or self._expected_fields or () if name not in group.fields]

    def _close(self, group: _Group, losses: Sequence[LostMember] = (), is_last: bool = False) -> Iterator[RawSample]:
        """Yield the sample, and the lost ones around it; `losses` are after it.

        Without a whole sample to compare with, wait for the next.
        """
        waiting, self._pending = self._pending, None
        if waiting is not None:
            yield from self._finish(waiting, tuple(group.fields) if group.is_whole else None)
        if group.losses and self._expected_fields is None and not is_last:
            self._pending = group
            return
        is_whole = group.is_whole
        yield from self._finish(group, self._expected_fields, losses)
        self._expected_fields = tuple(group.fields) if is_whole else self._expected_fields

    def _finish(
        self, group: _Group, typical: Sequence[str] | None, losses: Sequence[LostMember] = ()
    ) -> Iterator[RawSample]:
        """Yield the sample, between those that were lost before and after it; `losses` are after it."""
        lacking, strays = self._lacking(group, typical), []
        for loss in group.losses:
            key, name = split_name(loss.name) or (None, "")
            if key == group.key and name not in group.fields and (name in lacking or not lacking):
                fields = [name]
            elif lacking and key in (None, group.key):
                fields = list(lacking)
            elif name in lacking:  # the damage is in the key
                fields = [name]
            elif loss.is_inside:
                fields = [""]
            else:
                strays.append(loss)
                continue
            for name in fields:
                _add_damage(group, Damage(field=name, offset=loss.offset, error=loss.error, message=loss.message))
                group.fields |= {name: None} if name else {}
            lacking = [name for name in lacking if name not in group.fields]
        strays = [loss for loss in strays if loss.is_certain]
        yield from self._unattributed([loss for loss in strays if loss.offset < group.offset])
        yield self._sample(group.key, group.offset, group.members, tuple(group.fields), group.damages, group.truncated)
        yield from self._unattributed([*(loss for loss in strays if loss.offset > group.offset), *losses])

    def _unattributed(self, losses: Sequence[LostMember]) -> Iterator[RawSample]:
        """Yield a sample without members for each key in the damaged headers; add the others to `failures`."""
        damages: dict[tuple[str, int], list[Damage]] = {}
        for loss in sorted(losses, key=lambda loss: loss.offset):
            damage = Damage(field="", offset=loss.offset, error=loss.error, message=loss.message)
            names = split_name(loss.name)
            if names is None:
                if len(self.failures) < DAMAGES_KEPT:
                    self.failures.append(damage)
            elif damages and (last := next(reversed(damages)))[0] == names[0]:
                damages[last].append(damage)
            else:
                damages[names[0], loss.offset] = [damage]
        for (key, offset), lost in damages.items():
            yield self._sample(key, offset, {}, (), lost)

    def _sample(
        self,
        key: str,
        offset: int,
        members: Mapping[str, bytes],
        fields: tuple[str, ...],
        damages: Sequence[Damage],
        truncated: bool = False,
    ) -> RawSample:
        identity = hash(key)
        repeated = identity in self._seen
        self._seen.add(identity)
        return RawSample(
            key=key,
            shard=self._shard,
            offset=offset,
            members=members,
            fields=fields,
            damages=tuple(damages),
            truncated=truncated,
            repeated=repeated,
        )

    def _add(self, group: _Group, name: str, member: Member) -> None:
        """Add a member to its sample, with its bytes if they are wanted and within the limits."""
        wanted = self._want(name)
        refusal = self._refuse(group, member) if wanted else None
        if refusal is not None:
            error, reason = refusal
            message = f"member {member.name} at byte {member.offset:,}: {reason}"
            _add_damage(group, Damage(field=name, offset=member.offset, error=error, message=message))
        if group.size > SAMPLE_BYTES_FACTOR * self._limits.member_bytes + MIB:
            return  # a key with unlimited members: their names are not kept either
        group.fields[name] = None
        group.size += len(name) + FIELD_COST
        if not wanted or refusal is not None or not self._source.has(member.data_offset + member.size):
            return  # of a member that is cut off, Members reports it
        data = self._source.read(member.size)
        padding = self._source.read(-member.size % BLOCK) if len(data) == member.size else b""
        member.is_scanned = True
        inside = None if _is_tar(member.name) else header_inside(data, padding)
        if inside is not None:
            self._source.unread(data[inside:] + padding)
            at = member.data_offset + inside
            message = (
                f"member {member.name} at byte {member.offset:,}: its size, {member.size:,} bytes, is wrong: "
                f"the header of another member is at byte {at:,}"
            )
            _add_damage(group, Damage(field=name, offset=member.offset, error="DecodeError", message=message))
            member.size = inside
        elif len(data) == member.size:
            member.is_padded = not padding.strip(b"\0")
            group.members[name] = data
            group.size += member.size

    def _refuse(self, group: _Group, member: Member) -> tuple[str, str] | None:
        """Return the class and message of the error if the member's bytes must not be read."""
        allowed = self._limits.member_bytes
        if member.kind in LINKS:
            return (
                "DecodeError",
                f"is a {member.kind} to {member.link!r}, and has no data; pack it with --dereference"
                + (" --hard-dereference" if member.kind == "hard link" else ""),
            )
        if member.sparse:
            return "DecodeError", "is stored as a sparse file, which is unsupported; pack it as a regular file"
        if member.size > allowed:
            return "LimitError", f"has {member.size:,} bytes; {allowed:,} are allowed (--max-member-bytes)"
        if group.size + member.size > SAMPLE_BYTES_FACTOR * allowed:
            whole = f"{group.size + member.size:,} bytes; {SAMPLE_BYTES_FACTOR} times {allowed:,} are allowed"
            return "LimitError", f"would raise its sample to {whole} (--max-member-bytes)"
        return None


def _add_damage(group: _Group, damage: Damage) -> None:
    if len(group.damages) < DAMAGES_KEPT:
        group.damages.append(damage)


# Writing


MAX_NAME_BYTES = 200  # of one component of a path; file systems take 255


def safe_key(key: str) -> str:
    """Return a key that a reader of webdataset finds again in the names of members, and that is safe to extract.

    A plain relative path stays as it is. Elsewhere, each component is percent-encoded, and a long one is shortened to
    its beginning and a digest.
    """
    key = utf8_name(key)
    parts = key.split("/")
    is_short = all(len(part.encode()) <= MAX_NAME_BYTES for part in parts)
    if is_short and key.isprintable() and split_name(f"{key}.x") == (key, "x") and {"", ".."}.isdisjoint(parts):
        return key
    encoded = []
    for part in parts:
        if part in ("", "."):
            continue
        name = quote(part, safe=" ,+=@~()!&'").replace(".", "%2E")
        if name.startswith("__"):
            name = "%5F" + name[1:]
        if len(name) > MAX_NAME_BYTES:
            name = f"{name[: MAX_NAME_BYTES - 20]}~{hashlib.sha256(part.encode()).hexdigest()[:16]}"
        encoded.append(name)
    return "/".join(encoded) or "%"


def tar_bytes(key: str, members: Mapping[str, bytes]) -> bytes:
    """Return the members of a sample as part of a tar: headers without times and owners, data, padding."""
    parts: list[bytes] = []
    names: set[str] = set()
    for number, (name, data) in enumerate(members.items()):
        plain = re.sub(r"[^\w.+-]+", "_", name).strip(".") or "bin"
        if plain in names:
            plain = f"{number}.{plain}"
        names.add(plain)
        header = tarfile.TarInfo(f"{key}.{plain}")
        header.size = len(data)
        parts += [
            header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"),
            data,
            bytes(-len(data) % tarfile.BLOCKSIZE),
        ]
    return b"".join(parts)
