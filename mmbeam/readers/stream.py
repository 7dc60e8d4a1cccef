"""A shard's bytes as stored, read forward from any store, resuming after a fault at the byte reached.

Not here: decompression (decompress.py), the format of the bytes (tar.py).
"""

import asyncio
import hashlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from mmbeam.config import MIB
from mmbeam.errors import LimitError, MmbeamError, ShardError, redact
from mmbeam.readers.paths import (
    SILENT_SECONDS,
    Info,
    etag_of,
    file_system,
    is_local,
    is_zip,
    local_path,
    public_path,
    scheme_of,
)
from mmbeam.readers.retry import http_status, retry
from mmbeam.types import Input, Shard, files_of

logger = logging.getLogger(__name__)

READ_BYTES = MIB  # per read of a file
BLOCK_BYTES = 8 * MIB  # per request to a store: large enough to hide the latency of a request
LEAST_BLOCK_BYTES = MIB  # of stores whose client discards an interrupted block: each error halves it

T = TypeVar("T")


def content_digest(source: Input) -> str | None:
    """Return a digest of the bytes of a local input, of any format.

    None for other stores, and if the file is not the one that was listed: its size or time differs.
    """
    shard = source.shard
    if not is_local(shard.url) or (
        source.is_part and is_zip(shard.path)
    ):  # a part of a zip also depends on the directory at its end
        return None
    if shard.samples:
        return _folder_digest(shard)
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


def _folder_digest(folder: Shard) -> str | None:
    digest, root = hashlib.sha256(), Path(local_path(folder.url))
    try:
        for file in files_of(folder):
            with (root / file.name).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            info = LocalFileSystem().info(str(root / file.name))
            if (info["size"], etag_of(info)) != (file.size, file.etag):
                return None
    except OSError:
        return None
    return digest.hexdigest()[:32]


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


def open_shard(shard: Shard, begin: int = 0, waits: Sequence[float] | None = None) -> ShardStream:
    """Open `shard` at byte `begin`, as stored.

    After a store or network error, sleep for the next of `waits` (see `retry`) and resume at the byte reached. Raise
    ShardError, here or while reading, if the shard does not exist, has changed since it was listed or opened, or stays
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

    def __init__(self, shard: Shard, begin: int, waits: Sequence[float] | None) -> None:
        super().__init__()
        self._shard = shard
        self._waits = waits
        self._fs, self._path = file_system(shard.url, may_redirect=shard.may_redirect)
        self._file: Any = None
        self._position = begin
        self._seekable: bool | None = None  # not yet asked for
        self._ranges = True  # False once an HTTP server has sent a whole file instead of a range
        self._block_bytes = BLOCK_BYTES
        self._opened = False
        self._opened_as = (0, 0, 0)  # inode, size and time of a local file
        self._checks_version_at_end = False  # of a store whose client does not tell versions apart
        self.bytes_read = 0
        self.size = shard.size
        self.etag = shard.etag

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        """Return whether seeking forward is cheaper than reading, as far as it is known when the file is opened."""
        if self._seekable is None:
            self._seekable = self.size is not None and self._ranges
        return self._seekable

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if not self.seekable() or self.size is None:
            raise io.UnsupportedOperation(f"{self._shard.path} can only be read forward")
        target = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if self._ranges:
            if self._file is not None:
                self._file.seek(target)
        elif target < self._position:  # a web server that turned out not to serve ranges: read from the beginning
            self._drop()
        else:
            while (left := target - self._position) > 0 and self.readinto(memoryview(bytearray(min(READ_BYTES, left)))):
                continue
        self._position = target
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
        if isinstance(self._fs, LocalFileSystem):
            self._check_local()
        elif count == 0 and self._checks_version_at_end:
            self._compare(self._fs.info(self._path))  # its client does not tell versions apart
        return count

    def _retry(self, action: Callable[[], T]) -> T:
        def attempt() -> T:
            try:
                if self._file is None:
                    self._open()
                return action()
            except Exception as error:
                if isinstance(self._file, _Ranges):  # each request names the version, so the file stays open
                    if http_status(error) in (404, 412):
                        self._drop()
                        raise EOFError("the version that was opened is gone") from None
                else:
                    self._drop()
                self._block_bytes = max(self._block_bytes // 2, LEAST_BLOCK_BYTES)
                if isinstance(error, ValueError) and "range requests" in str(error):
                    self._ranges = False
                    self._drop()
                raise

        failure = f"unreadable from byte {self._position:,} on"
        try:
            return retry(attempt, self._shard.path, failure, ShardError, self._waits)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise ShardError(f"{self._shard.path}: does not exist, or is not a file") from None

    def _open(self) -> None:
        if self._opened:
            self._fs.invalidate_cache()
        info = self._fs.info(self._path)
        self._compare(info)
        self._opened, self.size, self.etag = True, info.get("size") or self.size, etag_of(info) or self.etag
        self._file = self._open_file(info)
        self._go_to_position()

    def _compare(self, info: Info) -> None:
        """Raise ShardError if the file is not the one that was listed or opened."""
        size, etag = info.get("size"), etag_of(info)
        if _differ(size, self.size) or _differ(etag, self.etag):
            self._raise_changed(size, etag)

    def _raise_changed(self, size: object, etag: object) -> NoReturn:
        when = "while it was read" if self._opened else "since it was listed"
        raise ShardError(
            f"{self._shard.path}: changed {when} ({self.size} bytes, etag {self.etag}; now {size} bytes, etag {etag}); "
            "run the same command again to read the new file"
        )

    def _check_local(self) -> None:
        """Raise ShardError if the file was written to, or its name leads to another file, since it was opened."""
        try:
            now = os.stat(self._path)  # noqa: PTH116
        except FileNotFoundError:  # it was removed, and stays whole until it is closed
            return
        if (now.st_ino, now.st_size, now.st_mtime_ns) != self._opened_as:
            self._raise_changed(now.st_size, f"{now.st_mtime_ns // 1000}-{now.st_size}")

    def _open_file(self, info: Any) -> Any:
        self._checks_version_at_end = False
        if isinstance(self._fs, LocalFileSystem):
            file = Path(self._path).open("rb", buffering=0)  # noqa: SIM115 (_drop closes it)
            stat = os.fstat(file.fileno())
            self._opened_as = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            return file
        if isinstance(self._fs, MemoryFileSystem):  # all its readers share one file object and one position
            return io.BytesIO(self._fs.cat_file(self._path))
        scheme = scheme_of(self._shard.url)
        if scheme in ("http", "https"):
            self._ranges = self._ranges and self.size is not None and info.get("partial", True)
            if not self._ranges:
                file = _open_http(self._fs, self._path, None, self._block_bytes)
                self._compare_headers(file.r.headers)
                return file
        if scheme in _RESPOND and self.size is not None:
            return _Ranges(self._fs, self._path, info, self.size, _RESPOND[scheme], self._compare_headers)
        self._checks_version_at_end = True
        return self._fs.open(self._path, "rb", block_size=self._block_bytes, cache_type="readahead")

    def _compare_headers(self, headers: Mapping[str, str]) -> None:
        """Raise ShardError if a response is of another version than the file that was opened."""
        etag, modified = headers.get("ETag"), headers.get("Last-Modified")
        now = etag_of({"ETag": etag}) if etag else modified
        size = (headers.get("Content-Range") or "").rpartition("/")[2]
        sizes = int(size) if size.isdigit() else None
        is_date = self.etag is not None and self.etag.endswith("GMT")
        if scheme_of(self._shard.url) == "gs":  # the request names the generation
            return
        if _differ(sizes, self.size) or (is_date == (etag is None) and _differ(now, self.etag)):
            self._raise_changed(sizes or self.size, now)

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


class _Response:
    """The response to a request for a range: its headers, and its body in pieces."""

    def __init__(self, headers: Mapping[str, str], begin: int, read: Callable[[int], Any], close: Callable[[], Any]):
        self.headers, self.begin, self.read, self.close = headers, begin, read, close


async def _respond_http(fs: Any, url: str, info: Info, begin: int, end: int) -> _Response:
    options = dict(fs.kwargs)
    headers = {**options.pop("headers", {}), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    session = await fs.set_session()
    response = await session.get(fs.encode_url(url), headers=headers, timeout=_timeout(), **options)
    return _response_of(response, begin)


async def _respond_gcs(fs: Any, path: str, info: Info, begin: int, end: int) -> _Response:
    headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    fs.credentials.apply(headers)
    params = {}
    if fs.requester_pays:
        params["userProject"] = fs.requester_pays if isinstance(fs.requester_pays, str) else fs.project
    url = fs.url(path, generation=info.get("generation"))
    return _response_of(await fs.session.get(url, headers=headers, params=params, timeout=_timeout()), begin)


def _response_of(response: Any, begin: int) -> _Response:
    try:
        response.raise_for_status()
        span = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if response.status != 206 or (span is not None and int(span[1]) != begin):
            raise ValueError("the server does not support range requests")
    except BaseException:
        response.close()
        raise
    return _Response(response.headers, begin, response.content.read, response.release)


async def _respond_s3(fs: Any, path: str, info: Info, begin: int, end: int) -> _Response:
    bucket, key, version = fs.split_path(path)
    options = {**fs.req_kw, **({"VersionId": version} if version else {}), "Range": f"bytes={begin}-{end - 1}"}
    if info.get("ETag"):
        options["IfMatch"] = info["ETag"]
    response = await fs._call_s3("get_object", Bucket=bucket, Key=key, **options)
    headers = {"ETag": response.get("ETag"), "Content-Range": response.get("ContentRange")}
    return _Response(headers, begin, response["Body"].read, response["Body"].close)


_RESPOND = {"http": _respond_http, "https": _respond_http, "gs": _respond_gcs, "s3": _respond_s3}


class _Ranges:
    """A file of a web server or a bucket, read in blocks. The part of an interrupted block that arrived is kept."""

    def __init__(
        self, fs: Any, path: str, info: Info, size: int, respond: Any, check: Callable[[Mapping[str, str]], None]
    ) -> None:
        self._fs, self._path, self._info, self._size, self._respond, self._check = fs, path, info, size, respond, check
        self._position = self._begin = 0
        self._block = b""

    def seek(self, position: int) -> None:
        self._position = position

    def readinto(self, buffer: Any) -> int:
        if not self._begin <= self._position < self._begin + len(self._block):
            end = min(self._position + BLOCK_BYTES, self._size)
            if self._position >= end:
                return 0
            self._block = b""  # not two blocks at a time
            self._block = sync(self._fs.loop, self._download, self._position, end)
            self._begin = self._position
        at = self._position - self._begin
        count = min(len(buffer), len(self._block) - at)
        buffer[:count] = memoryview(self._block)[at : at + count]
        self._position += count
        return count

    async def _download(self, begin: int, end: int) -> bytes:
        """Return the bytes from `begin` on, up to `end`, or fewer if the connection breaks off; at least one."""
        response = await self._respond(self._fs, self._path, self._info, begin, end)
        body = bytearray()
        try:
            self._check(response.headers)
            while len(body) < end - begin and (piece := await response.read(min(READ_BYTES, end - begin - len(body)))):
                body += piece
        except (MmbeamError, asyncio.CancelledError):
            raise
        except Exception as error:
            if not body:
                raise
            logger.info("%s: byte %d: %s", redact(self._path), begin + len(body), type(error).__name__)
        finally:
            response.close()
        if not body:
            raise EOFError(f"the connection ended at byte {begin:,}")
        return bytes(body)

    def close(self) -> None:
        self._block = b""


def supports_ranges(fs: Any, url: str, size: int) -> bool:
    """Return whether an HTTP server serves byte ranges, by requesting one byte. True if it does not answer."""
    try:
        with _open_http(fs, url, size, 1) as file:
            file.seek(1)
            file.read(1)
    except ValueError:
        return False
    except Exception as error:  # reading the shard will raise the same error, and retry
        logger.debug("%s: %s", redact(url), type(error).__name__)
    return True


def _timeout() -> Any:
    from aiohttp import ClientTimeout  # here, since only HTTP and GCS need aiohttp

    return ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)


def _open_http(fs: Any, url: str, size: int | None, block_bytes: int) -> Any:
    """Open by ranges if the size is known, else as one stream. aiohttp's default would end a stream after 5 minutes."""
    timeout = _timeout()
    if size is None:
        return fs.open(
            url, "rb", block_size=0, size=1, timeout=timeout
        )  # fsspec requests the size unless one is passed; a stream does not use it
    return fs.open(url, "rb", block_size=block_bytes, cache_type="readahead", size=size, timeout=timeout)


def _differ(now: object, before: object) -> bool:
    return now is not None and before is not None and now != before
