"""A tar's headers: ustar, pax, GNU and v7; what each member is, and where the tar is broken.

Not here: which members make a sample, and what of them is wanted (tar.py). Parsed by the standard
library's `TarInfo.frombuf`; what surrounds it follows `tarfile`, but goes on after damage.
"""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from mmbeam.config import MIB
from mmbeam.readers.decompress import Decompressed

BLOCK = 512
EXTENSION_BYTES = MIB  # of a pax or GNU header; Linux takes no path above 4 KiB
READ_BYTES = MIB  # at once, of what is decompressed or passed over
TRAILING_BYTES = 64 << 10  # looked at behind the end mark; tar pads to 10 KiB

EXTENSION_TYPES = (b"x", b"X", b"g", b"L", b"K")  # pax, Solaris pax, pax global, GNU long name, GNU long link
BARE_TYPES = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


@dataclass(slots=True)
class Member:
    """What a member's headers say."""

    name: str  # "" if it cannot be known; `problem` says why
    size: int  # of its data as stored
    offset: int  # of its first header, prefixes included
    data_offset: int
    regular: bool  # a file, no link or folder
    sparse: bool = False
    problem: str = ""

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.data_offset + _padded(self.size)


@dataclass(slots=True)
class Break:
    """The tar is not as it should be at `offset`; `truncated` if it cannot be read on."""

    offset: int
    error: str  # class of error
    message: str
    truncated: bool
    member: Member | None = None  # whose data is cut off


class _BadHeaderError(Exception):
    """A block that is no header, or an extension that is cut off."""


class ByteReader:
    """Exact reads and skips over a stream, and where in the tar it stands."""

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
        """`size` bytes, fewer at the end only."""
        data = self.stream.read(size)
        while len(data) < size and (more := self.stream.read(size - len(data))):
            data += more
        self.position += len(data)
        return data

    def skip(self, size: int) -> None:
        """Pass over `size` bytes, fewer at the end; without reading them if the stream can."""
        if size > BLOCK and self.stream.seekable():
            self.position = min(self.position + size, self._size)
            self.stream.seek(self._origin + self.position)
            return
        while size > 0 and (data := self.read(min(size, READ_BYTES))):
            size -= len(data)

    @property
    def fault(self) -> tuple[str, str] | None:
        """Why the decompressed bytes ended before their time: class of error, message."""
        return None if self._decompressed is None else self._decompressed.fault

    def end(self) -> tuple[str, str]:
        """Why there are no more bytes: class of error, message."""
        return self.fault or ("DecodeError", f"the shard ends at byte {self.position:,}")


class Members:
    """Every member's headers in order, and the breaks between them.

    Between two steps the consumer may read data of the member from `source`; the rest is passed over.
    """

    def __init__(self, source: ByteReader, first: bytes) -> None:
        self.unterminated = False
        self.trailing_data = False
        self._source = source
        self._block = first  # the header to come
        self._global_pax: dict[str, str] = {}

    @property
    def global_pax(self) -> bool:
        """Whether a pax global header has said what holds for every member behind it."""
        return bool(self._global_pax)

    def __iter__(self) -> Iterator[Member | Break]:
        while self._block or self._source.fault is not None:
            try:
                member = self._next()
            except _BadHeaderError as error:
                yield (found := self._resynchronise(str(error)))
                if found.truncated:
                    return
                continue
            if member is None:
                self.trailing_data = self._source.read(TRAILING_BYTES).strip(b"\0") != b""
                return
            yield member
            self._source.skip(member.end - self._source.position)
            if (cut := self._cut(member)) is not None:
                yield cut
                return
            self._block = self._source.read(BLOCK)
            if len(self._block) < BLOCK and not self._block.strip(b"\0"):
                self._block = b""  # half an end mark is none, and no damage
        self.unterminated = True

    def _next(self) -> Member | None:
        """The member whose first header is at hand, with what the headers before its own say; None at the end mark."""
        pax = dict(self._global_pax)
        begin, problem = None, ""
        while True:
            offset = self._source.position - len(self._block)
            info = parse(self._block)
            if info is None or info.type not in EXTENSION_TYPES:
                break
            begin = offset if begin is None and info.type != b"g" else begin
            try:
                self._extend(info, pax)
            except ValueError as error:
                problem = str(error)
            self._block = self._source.read(BLOCK)
        if info is None:
            return None
        if info.type == tarfile.GNUTYPE_SPARSE:
            self._pass_sparse_map()
        return _member(info, pax, offset if begin is None else begin, self._source.position, problem)

    def _extend(self, info: tarfile.TarInfo, pax: dict[str, str]) -> None:
        """Read an extension header into `pax`. Raises ValueError if what it says cannot be known."""
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
        more = self._block[482]  # of GNU's old format: whether a block of the map follows, and again in each
        while more:
            block = self._source.read(BLOCK)
            if len(block) < BLOCK:
                raise _BadHeaderError("the cut-off map of a sparse file")
            more = block[504]

    def _cut(self, member: Member) -> Break | None:
        """What is missing of a member that was passed. Padding may be."""
        there = min(self._source.position - member.data_offset, member.size)
        if there == member.size:
            return None
        error, why = self._source.end()
        message = f"expected {member.size:,} bytes, found {there:,}; {why}"
        return Break(member.offset, error, message, truncated=True, member=member)

    def _resynchronise(self, found: str) -> Break:
        """Go to the next block that is surely a header."""
        begin = self._source.position - len(self._block)
        self._block = find_header(self._source)
        expected = f"byte {begin:,}: expected a tar header, found {found}"
        if len(self._block) == BLOCK:
            there = self._source.position - BLOCK
            return Break(begin, "DecodeError", f"{expected}; the next header is at byte {there:,}", truncated=False)
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
    """A header; None for a block of zeros, the end mark. Names that are not UTF-8 get backslash escapes."""
    if len(block) < BLOCK:
        raise _BadHeaderError(f"{len(block)} bytes of one")
    if block.count(0) == BLOCK:
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except (tarfile.HeaderError, ValueError) as error:
        raise _BadHeaderError(f"a {error} (first 8 bytes {block[:8]!r})") from None
    if info.size < 0:
        raise _BadHeaderError(f"a size of {info.size}")
    return info


def find_header(source: ByteReader, stop: int | None = None) -> bytes:
    """The next block that is surely a header, if it begins before `stop`; else what is left, less than a block."""
    block = source.read(BLOCK)
    while len(block) == BLOCK and not (block[257:262] == b"ustar" and is_header(block)):
        block = source.read(BLOCK) if stop is None or source.position < stop else b""
    return block


def is_header(block: bytes) -> bool:
    """Whether a tar may begin with `block`: a header, or the end mark."""
    try:
        parse(block)
    except _BadHeaderError:
        return False
    return True


def pax_records(payload: bytes) -> dict[str, str]:
    """The records ("LENGTH KEY=VALUE\\n") of a pax header that matter here. Raises ValueError for what is none."""
    records: dict[str, str] = {}
    begin = 0
    while begin < len(payload) and payload[begin]:
        digits, space, _ = payload[begin : begin + 20].partition(b" ")
        end = begin + int(digits) if space and digits.isdigit() else 0
        key, equals, value = payload[begin + len(digits) + 1 : end - 1].partition(b"=")
        if not equals or payload[end - 1 : end] != b"\n":
            raise ValueError(f"a pax header that is none at its byte {begin:,}")
        _keep(records, key, value)
        begin = end
    return records


def _keep(records: dict[str, str], key: bytes, value: bytes) -> None:
    if key == b"size" and not (value.isdigit() and len(value) <= 19):
        raise ValueError(f"a pax header with the size {value[:20]!r}")
    if key in (b"path", b"size", b"GNU.sparse.name"):
        records[key.decode()] = _text(value)
    if key.startswith(b"GNU.sparse."):
        records["GNU.sparse"] = ""


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
