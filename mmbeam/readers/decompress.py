"""The bytes of a gzip or zstd stream, forward only, with a limit on their expansion."""

import io
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import pyarrow as pa

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a byte from 50 to 5f: a frame to skip
STORED_BYTES = 64 << 10  # per read; copied once per gzip member in it
ZSTD_BYTES = 64 << 10  # per read; lost before a fault
EXPANSION_FREE = 1 << 30  # bytes exempt from the limit on expansion


def is_compressed(head: bytes) -> bool:
    """Return whether `head`, the beginning of a stream, is that of gzip or zstd."""
    return head.startswith((GZIP_MAGIC, ZSTD_MAGIC)) or (head[:1] >= b"\x50" and head[1:4] == ZSTD_SKIPPABLE)


class Decompressed(io.RawIOBase):
    """The bytes of a gzip or zstd stream, which may consist of several members or frames.

    Damage does not raise: the bytes end, and `fault` holds the reason (name of an error class, message). They also end
    beyond `expansion` times the stored size, plus 1 GiB. `head` was already read from `stream`. Errors of `stream`
    itself pass through.
    """

    def __init__(self, stream: BinaryIO, head: bytes, expansion: float) -> None:
        super().__init__()
        self._stored = _Stored(stream, head)
        self._inflate = _Gunzip(self._stored) if head.startswith(GZIP_MAGIC) else _unzstd(self._stored)
        self._expansion = expansion
        self._made = 0
        self.fault: tuple[str, str] | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.fault is not None:
            return 0
        try:
            data = self._inflate(len(buffer))
        except (zlib.error, EOFError, OSError) as error:
            if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
                raise  # an error of the stream; those of Arrow have no errno
            self.fault = ("DecodeError", f"cannot be decompressed beyond stored byte {self._stored.count:,}: {error}")
            return 0
        self._made += len(data)
        if self._made > self._stored.count * self._expansion + EXPANSION_FREE:
            self.fault = (
                "LimitError",
                f"{self._stored.count:,} stored bytes grew to more than {self._made:,}, beyond "
                f"{self._expansion:g} times and 1 GiB (Limits.expansion)",
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
    """Return up to `size` bytes per call, b"" at the end. Unlike Arrow's decoder it loses no bytes before a fault."""

    def __init__(self, stored: _Stored) -> None:
        self._stored = stored
        self._member = zlib.decompressobj(wbits=31)
        self._waiting = b""

    def __call__(self, size: int) -> bytes:
        while not self._member.eof or self._next_member():
            self._waiting = self._waiting or self._stored.read(STORED_BYTES)
            if not self._waiting:
                raise EOFError("the gzip stream ends too early")
            data = self._member.decompress(self._waiting, size)
            self._waiting = self._member.unconsumed_tail
            if data:
                return data
        return b""

    def _next_member(self) -> bool:
        waiting = self._member.unused_data.lstrip(b"\0")  # zeros may follow a member
        while not waiting and (more := self._stored.read(STORED_BYTES)):
            waiting = more.lstrip(b"\0")
        if waiting:
            self._member, self._waiting = zlib.decompressobj(wbits=31), waiting
        return bool(waiting)


def _unzstd(stored: _Stored) -> Callable[[int], bytes]:
    frames = pa.CompressedInputStream(pa.PythonFile(stored, "r"), "zstd")
    return lambda size: bytes(frames.read(min(size, ZSTD_BYTES)))
