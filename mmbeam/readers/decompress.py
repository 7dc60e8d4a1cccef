"""The bytes of a gzip or zstd stream, forward only, with a limit on their expansion.

Every byte ahead of a fault is returned, also if the fault is a wrong checksum at the end.
"""

import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import zstandard

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a byte from 50 to 5f: a frame to skip
STORED_BYTES = 64 << 10  # bytes per read; each gzip member that ends in the block copies the rest of it, so it is small
ZSTD_WINDOW_BYTES = 128 << 20  # the largest window that is allowed: the memory that a frame may ask for
EXPANSION_FREE = 1 << 30  # bytes exempt from the limit on expansion


def is_compressed(head: bytes) -> bool:
    """Return whether `head`, the beginning of a stream, is that of gzip or zstd."""
    return head.startswith((GZIP_MAGIC, ZSTD_MAGIC)) or (head[:1] >= b"\x50" and head[1:4] == ZSTD_SKIPPABLE)


class Decompressed(io.RawIOBase):
    """The bytes of a gzip or zstd stream, which may consist of several members or frames.

    Damage does not raise: the bytes end, and `fault` holds the reason (name of an error class, message). They also end
    when their number exceeds `expansion` times the stored size plus 1 GiB. `head` was already read from `stream`.
    Errors of `stream` itself pass through.
    """

    def __init__(self, stream: BinaryIO, head: bytes, expansion: float) -> None:
        super().__init__()
        self._stored = _Stored(stream, head)
        self._inflate = _Gunzip(self._stored) if head.startswith(GZIP_MAGIC) else _Unzstd(self._stored)
        self._expansion = expansion
        self._decompressed_bytes = 0
        self.fault: tuple[str, str] | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.fault is not None:
            return 0
        try:
            data = self._inflate(len(buffer))
        except (zlib.error, zstandard.ZstdError, EOFError) as error:
            self.fault = ("DecodeError", f"cannot be decompressed beyond stored byte {self._stored.count:,}: {error}")
            return 0
        self._decompressed_bytes += len(data)
        if self._decompressed_bytes > self._stored.count * self._expansion + EXPANSION_FREE:
            self.fault = (
                "LimitError",
                f"{self._stored.count:,} stored bytes grew to more than {self._decompressed_bytes:,}, beyond "
                f"{self._expansion:g} times and 1 GiB (--max-expansion)",
            )
            return 0
        buffer[: len(data)] = data
        return len(data)


class _Stored(io.RawIOBase):
    """The compressed bytes, counted: `head`, then those of the stream. Closing it does not close the stream."""

    def __init__(self, stream: BinaryIO, head: bytes) -> None:
        super().__init__()
        self._stream = stream
        self._head = head
        self.count = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
        else:
            data = self._stream.read(size)
        self.count += len(data)
        return data


class _Gunzip:
    """Return up to `size` bytes per call, b"" at the end; on damage, the bytes ahead of it, and then raise.

    zlib verifies a member's checksum only after its last byte, and then raises without returning the bytes of that
    call. So this class inflates the deflate stream, and checks header and trailer itself (RFC 1952).
    """

    def __init__(self, stored: _Stored) -> None:
        self._stored = stored
        self._waiting = b""  # stored bytes that were read and not used
        self._member: Any = None  # inflates the current member
        self._any_member = False
        self._checksum = self._length = 0
        self._error: zlib.error | None = None  # to raise at the next call; the bytes before it have been returned

    def __call__(self, size: int) -> bytes:
        if self._error is not None:
            raise self._error
        while self._member is not None or self._next_member():
            if self._member.eof:
                self._check_trailer()
                continue
            if not self._waiting and not self._read_more():
                raise EOFError("the gzip stream ends too early")
            before, waiting = self._member.copy(), self._waiting
            data: bytes
            try:
                data = self._member.decompress(waiting, size)
                self._waiting = self._member.unconsumed_tail or self._member.unused_data
            except zlib.error as error:
                self._error = error
                data = _ahead_of_the_fault(before, waiting)
                if not data:
                    raise
            self._checksum, self._length = zlib.crc32(data, self._checksum), self._length + len(data)
            if data:
                return data
        return b""

    def _next_member(self) -> bool:
        """Read the header of the next member; return False if there is none. Zeros may precede it."""
        self._waiting = self._waiting.lstrip(b"\0") if self._any_member else self._waiting
        while self._any_member and not self._waiting and self._read_more():
            self._waiting = self._waiting.lstrip(b"\0")
        if self._any_member and not self._waiting:
            return False
        self._any_member = True
        header = self._take(10)
        if header[:3] != GZIP_MAGIC + b"\x08":
            raise zlib.error("the header of the next gzip member is invalid")
        flags = header[3]
        if flags & 4:
            self._take(int.from_bytes(self._take(2), "little"))
        for flag in (8, 16):  # name and comment, which end with a zero
            while flags & flag and self._take(1) != b"\0":
                continue
        if flags & 2:
            self._take(2)
        self._member, self._checksum, self._length = zlib.decompressobj(wbits=-zlib.MAX_WBITS), 0, 0
        return True

    def _check_trailer(self) -> None:
        self._member = None
        checksum, length = self._take(4), self._take(4)
        if int.from_bytes(checksum, "little") != self._checksum:
            raise zlib.error("the checksum of a gzip member is wrong")
        if int.from_bytes(length, "little") != self._length & 0xFFFFFFFF:
            raise zlib.error("the length of a gzip member is wrong")

    def _take(self, size: int) -> bytes:
        while len(self._waiting) < size and self._read_more():
            continue
        if len(self._waiting) < size:
            raise EOFError("the gzip stream ends too early")
        data, self._waiting = self._waiting[:size], self._waiting[size:]
        return data

    def _read_more(self) -> bool:
        more = self._stored.read(STORED_BYTES)
        self._waiting += more
        return bool(more)


def _ahead_of_the_fault(member: Any, waiting: bytes) -> bytes:
    """Return what `member` inflates of `waiting` ahead of its damage."""
    data = bytearray()
    for step in (1024, 1):  # bytes to inflate per call
        while True:
            before = member.copy()
            try:
                data += member.decompress(waiting, step)
            except zlib.error:
                member = before
                break
            waiting = member.unconsumed_tail
    return bytes(data)


class _Unzstd:
    """Return up to `size` bytes per call, b"" at the end; on damage, the blocks ahead of it, and then raise.

    The library raises without returning what it decompressed by that call, so it receives one block at a time.
    """

    def __init__(self, stored: _Stored) -> None:
        self._stored = stored
        self._waiting = b""  # stored bytes that were read and not used
        self._blocks = self._decompress()
        self._block = b""  # decompressed, and not returned yet; a block holds up to 128 KiB

    def __call__(self, size: int) -> bytes:
        while not self._block:
            block = next(self._blocks, None)
            if block is None:
                return b""
            self._block = block
        data, self._block = self._block[:size], self._block[size:]
        return data

    def _decompress(self) -> Iterator[bytes]:
        """Yield what each block of each frame holds (RFC 8878)."""
        decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
        while magic := self._take(4, may_end=True):
            if magic[1:] == ZSTD_SKIPPABLE:
                left = int.from_bytes(self._take(4), "little")
                while left:
                    left -= len(self._take(min(left, STORED_BYTES)))
                continue
            if magic != ZSTD_MAGIC:
                raise zstandard.ZstdError("the header of the next zstd frame is invalid")
            frame = decompressor.decompressobj()
            descriptor = self._take(1)
            is_single, size_flag = descriptor[0] >> 5 & 1, descriptor[0] >> 6
            size_bytes = (is_single, 2, 4, 8)[size_flag]
            rest = self._take(1 - is_single + (0, 1, 2, 4)[descriptor[0] & 3] + size_bytes)
            yield frame.decompress(magic + descriptor + rest)
            is_last = False
            while not is_last:
                block = self._take(3)
                number = int.from_bytes(block, "little")
                is_last = bool(number & 1)
                yield frame.decompress(block + self._take(1 if number >> 1 & 3 == 1 else number >> 3))
            if descriptor[0] & 4:
                yield frame.decompress(self._take(4))

    def _take(self, size: int, may_end: bool = False) -> bytes:
        while len(self._waiting) < size and (more := self._stored.read(STORED_BYTES)):
            self._waiting += more
        if len(self._waiting) < size and not (may_end and not self._waiting):
            raise EOFError("the zstd stream ends too early")
        data, self._waiting = self._waiting[:size], self._waiting[size:]
        return data
