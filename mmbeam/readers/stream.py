"""A shard's bytes as stored, read forward from any store, resuming after a fault at the byte reached.

Not here: decompression (decompress.py), the format of the bytes (tar.py).
"""

import hashlib
import io
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from mmbeam.config import MIB
from mmbeam.errors import LimitError, MmbeamError, ShardError, redact
from mmbeam.readers.paths import etag_of, file_system, is_local, local_path, public_path
from mmbeam.types import Input, Shard

logger = logging.getLogger(__name__)

RETRY_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each retry; any progress starts over
READ_BYTES = MIB  # per read of a file
BLOCK_BYTES = 8 * MIB  # per request to a store: large enough to hide the latency of a request
LEAST_BLOCK_BYTES = MIB  # each fault halves the block, down to this: some connections never last for 8 MiB
HTTP_SECONDS = 60.0  # without data, after which a connection is closed and reopened

# Errors of these packages come from the store or the network. Any other error that is not an OSError is a bug.
STORE_PACKAGES = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "http", "requests", "urllib3"}

T = TypeVar("T")


def content_digest(source: Input) -> str | None:
    """Return a digest of the bytes of an input that is a file of this machine, which need not be a tar.

    None for other stores, and if the file is not the one that was listed: its size or time differs.
    """
    shard = source.shard
    if not is_local(shard.url):
        return None
    left = sys.maxsize if source.end is None else source.end - source.begin
    digest, path = hashlib.sha256(), Path(local_path(shard.url))
    try:
        with path.open("rb") as file:
            file.seek(source.begin)
            while block := file.read(min(left, READ_BYTES)):
                digest.update(block)
                left -= len(block)
        info = LocalFileSystem().info(str(path))
    except OSError:
        return None
    return digest.hexdigest()[:32] if (info["size"], etag_of(info)) == (shard.size, shard.etag) else None


class ShardStream(io.BufferedReader):
    """A shard opened for reading forward."""

    def __init__(self, raw: "_RetryingFile") -> None:
        super().__init__(raw, READ_BYTES)
        self._raw = raw

    @property
    def bytes_read(self) -> int:
        """Bytes read from the store so far. Up to READ_BYTES of them may still be in the buffer."""
        return self._raw.bytes_read

    @property
    def size(self) -> int | None:
        """Bytes of the object that was opened; None if the store does not report it."""
        return self._raw.size

    @property
    def etag(self) -> str | None:
        """Etag of the object that was opened; None if the store has none."""
        return self._raw.etag


def open_shard(shard: Shard, begin: int = 0, waits: Sequence[float] = RETRY_WAITS) -> ShardStream:
    """Open `shard` at byte `begin`, as stored.

    After a fault of the store or the network, wait the next of `waits` seconds and reopen at the byte reached. Raise
    ShardError, here or while reading, if the shard does not exist, has changed since it was listed, or stays
    unreadable; PermissionError if access is denied.
    """
    raw = _RetryingFile(shard, begin, waits)
    raw.open()
    return ShardStream(raw)


def read_file(url: str, max_bytes: int) -> bytes:
    """Return the bytes of one file. Raises ShardError if it cannot be read, LimitError if it is over `max_bytes`."""
    shard = Shard(path=public_path(url), url=url)
    with open_shard(shard) as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise LimitError(f"{shard.path}: expected at most {max_bytes:,} bytes, found more")
    return data


class _RetryingFile(io.RawIOBase):
    """A file of the store that is closed and reopened at each fault."""

    def __init__(self, shard: Shard, begin: int, waits: Sequence[float]) -> None:
        super().__init__()
        self._shard = shard
        self._waits = waits
        self._fs, self._path = file_system(shard.url)
        self._file: Any = None
        self._position = begin
        self._ranges = True  # False once an HTTP server has sent a whole file instead of a range
        self._block_bytes = BLOCK_BYTES
        self._opened = False
        self.bytes_read = 0
        self.size = shard.size
        self.etag = shard.etag

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        """Return whether seeking forward is cheaper than reading."""
        return self.size is not None and self._ranges

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if not self.seekable() or self.size is None:
            raise io.UnsupportedOperation(f"{self._shard.path} can only be read forward")
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if self._file is not None:
            self._file.seek(self._position)
        return self._position

    def open(self) -> None:
        self._retry(lambda: None)

    def readinto(self, buffer: Any) -> int:
        count = self._retry(lambda: self._read(buffer))
        self._position += count
        self.bytes_read += count
        return count

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, buffer: Any) -> int:
        count = int(self._file.readinto(buffer))
        if count == 0 and self.size is not None and self._position < self.size:
            raise EOFError(f"the connection ended at byte {self._position:,} of {self.size:,}")
        return count

    def _retry(self, action: Callable[[], T]) -> T:
        for wait in (*self._waits, None):
            try:
                if self._file is None:
                    self._open()
                return action()
            except Exception as error:
                self._drop()
                reason = self._reason_to_retry(error)
                if wait is None:
                    raise ShardError(
                        f"{self._shard.path}: unreadable from byte {self._position:,} on, "
                        f"after {len(self._waits) + 1} attempts: {reason}"
                    ) from None
                self._block_bytes = max(self._block_bytes // 2, LEAST_BLOCK_BYTES)
                logger.warning("%s: byte %d: %s; retrying", self._shard.path, self._position, reason)
                time.sleep(wait)
        raise AssertionError("the last wait is None")

    def _reason_to_retry(self, error: Exception) -> str:
        """Return the reason of a transient error, without secrets. Raise a permanent error."""
        path, status = self._shard.path, http_status(error)
        if status in (401, 403):
            raise PermissionError(f"{path}: access denied (status {status})") from None
        if isinstance(error, MmbeamError | PermissionError):
            raise error
        if _is_gone(error, status):
            raise ShardError(f"{path}: does not exist, or is not a file") from None
        if isinstance(error, ValueError) and "range requests" in str(error):
            self._ranges = False
        elif not isinstance(error, OSError | EOFError) and not STORE_PACKAGES.intersection(_packages(error)):
            raise error
        return f"{type(error).__name__}: {' '.join(redact(str(error.__cause__ or error)).split())}"

    def _open(self) -> None:
        if self._opened:
            self._fs.invalidate_cache()
        info = self._fs.info(self._path)
        size, etag = info.get("size"), etag_of(info)
        if _differ(size, self.size) or _differ(etag, self.etag):
            raise ShardError(
                f"{self._shard.path}: changed since it was listed or opened ({self.size} bytes, etag {self.etag}; "
                f"now {size} bytes, etag {etag}); run the same command again to read the new file"
            )
        self._opened, self.size, self.etag = True, size or self.size, etag or self.etag
        self._file = self._open_file(info)
        self._go_to_position()

    def _open_file(self, info: Any) -> Any:
        if isinstance(self._fs, LocalFileSystem):
            return Path(self._path).open("rb", buffering=0)
        if isinstance(self._fs, MemoryFileSystem):  # all its readers share one file object and one position
            return io.BytesIO(self._fs.cat_file(self._path))
        if self._path.startswith(("http://", "https://")):
            self._ranges = self._ranges and self.size is not None and info.get("partial", True)
            return _open_http(self._fs, self._path, self.size if self._ranges else None, self._block_bytes)
        return self._fs.open(self._path, "rb", block_size=self._block_bytes, cache_type="readahead")

    def _go_to_position(self) -> None:
        if self._ranges:
            self._file.seek(self._position)
            return
        left = self._position
        while left:
            skipped = self._file.read(min(left, READ_BYTES))
            if not skipped:
                raise EOFError(f"the connection ended {left:,} bytes before byte {self._position:,}")
            left -= len(skipped)

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def supports_ranges(fs: Any, url: str, size: int) -> bool:
    """Return whether an HTTP server serves byte ranges, by requesting one byte. True if it does not answer."""
    try:
        with _open_http(fs, url, size, 1) as file:
            file.seek(1)
            file.read(1)
    except ValueError:
        return False
    except Exception as error:  # reading the shard will meet it again, and retry
        logger.debug("%s: %s", redact(url), type(error).__name__)
    return True


def _open_http(fs: Any, url: str, size: int | None, block_bytes: int) -> Any:
    """Open by ranges if the size is known, else as one stream. aiohttp's default would end a stream after 5 minutes."""
    from aiohttp import ClientTimeout  # here, since only HTTP needs aiohttp

    timeout = ClientTimeout(total=None, sock_connect=HTTP_SECONDS, sock_read=HTTP_SECONDS)
    if size is None:
        return fs.open(
            url, "rb", block_size=0, size=1, timeout=timeout
        )  # fsspec requests the size unless one is passed; a stream does not use it
    return fs.open(url, "rb", block_size=block_bytes, cache_type="readahead", size=size, timeout=timeout)


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error of a store's client; None if it has none."""
    if isinstance(error, OSError) and str(error).startswith("Forbidden: "):  # gcsfs
        return 403
    for source in (error, error.__cause__):
        status = getattr(source, "status", None) or getattr(source, "code", None)
        if isinstance(status, int):
            return status
    return None


def _is_gone(error: BaseException, status: int | None) -> bool:
    """Return whether the file is missing. fsspec raises FileNotFoundError for any failed HTTP request."""
    if not isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return False
    by_http = error.__cause__ is not None and "aiohttp" in _packages(error.__cause__)
    return status in (404, 410) if by_http else True


def _differ(now: object, before: object) -> bool:
    return now is not None and before is not None and now != before


def _packages(error: BaseException) -> set[str]:
    return {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
