"""The bytes of a gzip or zstd stream, forward only, with a limit on how far they may grow."""

import io
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import pyarrow as pa

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a byte from 50 to 5f: a frame to pass over
STORED_BYTES = 64 << 10  # taken at once; copied for each of the gzip members in it
ZSTD_BYTES = 64 << 10  # made at once, and lost ahead of a fault
EXPANSION_FREE = 1 << 30  # bytes that may be made whatever is stored


def is_compressed(head: bytes) -> bool:
    """Whether a stream that begins so is one that can be decompressed here."""
    return head.startswith((GZIP_MAGIC, ZSTD_MAGIC)) or (head[:1] >= b"\x50" and head[1:4] == ZSTD_SKIPPABLE)


class Decompressed(io.RawIOBase):
    """The bytes of a gzip or zstd stream, several members or frames in a row included.

    Damage does not raise: the bytes end, and `fault` says why (name of an error class, message). They
    end too where they are more than `expansion` times what is stored, plus 1 GiB. `head` is what was
    already read of `stream`, whose own errors pass through.
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
                raise  # the stream's own; Arrow's have no number
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
    """The compressed bytes: `head`, then the stream's, counted. Closing it closes nothing."""

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
    """Gives up to so many bytes a call, b"" at the end. Unlike Arrow's it loses none before a fault."""

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
