"""The samples of a folder of media files, as the plan lists them.

Files in one folder with the same stem form a sample (`a.jpg`, `a.txt`, `a.json`). A row of the nearest `metadata.csv`
or `metadata.jsonl` that names one of its files (`file_name`, relative to the table) is its metadata, unless it has a
JSON file.
"""

import csv
import io
import json
import posixpath
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any, BinaryIO, TypeVar

from mmbeam.config import MIB, SAMPLE_BYTES_FACTOR, Limits
from mmbeam.errors import ShardError
from mmbeam.readers.paths import FileError, etag_of, file_system, is_local, split_name
from mmbeam.types import Damage, FolderSample, Input, RawSample, Shard, SourceFile, SourceReader, utf8_name

CONCURRENT_READS = 16  # samples of a remote folder that are read concurrently, to hide the latency of requests
AHEAD_BYTES = 32 * MIB  # listed size of the samples that are read ahead
ItemT = TypeVar("ItemT")
FILE_NAME = "file_name"  # the column of a table of metadata that names a file


class FolderReader(SourceReader):
    """The samples of `source`, in the order of the plan. `open_file` is stream.open_shard. Iterate once.

    A file that no longer exists, has changed since it was listed, or is too large is damage to its sample. Raises
    ShardError if a file stays unreadable for another reason, or a table of metadata is invalid.
    """

    def __init__(
        self,
        source: Input,
        want: Callable[[str], bool],
        limits: Limits,
        metadata_field: str | None,
        open_file: Callable[[Shard], BinaryIO],
    ) -> None:
        super().__init__()
        self._open = open_file
        self._folder = source.shard
        self._begin = source.begin
        self._want = want
        self._limits = limits
        self._metadata_field = metadata_field or "json"
        self._metadata: dict[str, str] = {}  # JSON, by name of the file

    def __iter__(self) -> Iterator[RawSample]:
        files = {file.name for sample in self._folder.samples for file in sample.files}
        for table in sorted(self._folder.tables, key=lambda table: table.name.count("/")):  # the nearest one last
            self._metadata |= self._rows(table, files)
        keys: set[str] = set()
        numbered = enumerate(self._folder.samples, self._begin)
        is_here = is_local(self._folder.url)
        for raw in map(self._read, numbered) if is_here else read_ahead(self._read, numbered, _listed_bytes):
            self.bytes_read += sum(map(len, raw.members.values()))
            yield replace(raw, repeated=True) if raw.key in keys else raw
            keys.add(raw.key)

    def _read(self, item: tuple[int, FolderSample]) -> RawSample:
        number, sample = item
        members: dict[str, bytes] = {}
        fields: dict[str, None] = {}
        damages: list[Damage] = []
        held = 0
        for file in sample.files:
            name = (split_name(utf8_name(file.name)) or ("", ""))[1]
            fields[name] = None
            if not self._want(name):
                continue
            limit = min(self._limits.member_bytes, SAMPLE_BYTES_FACTOR * self._limits.member_bytes - held)
            try:
                data = self._bytes(file, limit)
            except FileError as error:
                message = f"{self._folder.path}/{utf8_name(file.name)}: {error}"
                damages.append(Damage(field=name, offset=None, error=error.kind, message=message))
                continue
            members[name] = data
            held += len(data)
        rows = [self._metadata[file.name] for file in sample.files if file.name in self._metadata]
        if rows and self._metadata_field not in fields:
            members[self._metadata_field] = rows[0].encode()
            fields[self._metadata_field] = None
        return RawSample(
            key=sample.key,
            shard=self._folder.path,
            offset=number,
            members=members,
            fields=tuple(fields),
            damages=tuple(damages),
        )

    def _bytes(self, file: SourceFile, limit: int) -> bytes:
        folder = self._folder
        shard = Shard(
            path=f"{folder.path}/{utf8_name(file.name)}",
            url=f"{folder.url.rstrip('/')}/{file.name}",
            size=file.size,
            etag=file.etag,
            may_redirect=folder.may_redirect,
        )
        return file_bytes(self._open, shard, limit)

    def _rows(self, table: SourceFile, files: set[str]) -> dict[str, str]:
        """Return the rows of a table of metadata as JSON objects, by the name of the file below the folder."""
        where = f"{self._folder.path}/{utf8_name(table.name)}"
        try:
            text = self._bytes(table, self._limits.member_bytes).decode("utf-8-sig")
        except FileError as error:
            raise ShardError(f"{where}: {error}") from None
        except UnicodeDecodeError as error:
            raise ShardError(f"{where}: expected UTF-8, found byte {error.start:,} invalid; save it as UTF-8") from None
        beside = posixpath.dirname(table.name)
        parse = _json_rows if table.name.lower().endswith(".jsonl") else _csv_rows
        rows = {}
        for number, row in parse(text, where):
            name = row.pop(FILE_NAME, None)
            if not isinstance(name, str):
                raise ShardError(
                    f"{where}, line {number}: expected the name of a file in {FILE_NAME}, found "
                    f"{', '.join(map(str, islice(row, 8))) or 'nothing'}"
                )
            path = posixpath.normpath(posixpath.join(beside, name))  # compared with listed names, never opened
            if path in files:
                rows[path] = json.dumps(row, ensure_ascii=False)
        return rows


def read_ahead(
    read: Callable[[ItemT], RawSample], items: Iterator[ItemT], size_of: Callable[[ItemT], int]
) -> Iterator[RawSample]:
    """Yield `map(read, items)` in order, with CONCURRENT_READS calls or AHEAD_BYTES by `size_of` in progress."""
    pending: deque[tuple[Future[RawSample], int]] = deque()
    held = 0
    with ThreadPoolExecutor(CONCURRENT_READS, thread_name_prefix="mmbeam-files") as pool:
        try:
            while True:
                while len(pending) < CONCURRENT_READS and (held < AHEAD_BYTES or not pending):
                    item = next(items, None)
                    if item is None:
                        break
                    pending.append((pool.submit(read, item), size_of(item)))
                    held += pending[-1][1]
                if not pending:
                    return
                future, size = pending.popleft()
                held -= size
                yield future.result()
                del future
        finally:
            for future, _ in pending:
                future.cancel()


def _listed_bytes(item: tuple[int, FolderSample]) -> int:
    return sum(file.size or 0 for file in item[1].files)


def file_bytes(open_file: Callable[[Shard], BinaryIO], file: Shard, limit: int) -> bytes:
    """Return the bytes of a media file. Raises FileError for a fault of the file itself."""
    if (file.size or 0) > limit:
        raise FileError("LimitError", f"has {file.size:,} bytes; {limit:,} are allowed (--max-member-bytes)")
    try:
        with open_file(file) as stream:
            data = stream.read(limit + 1)
    except PermissionError as error:
        if not is_local(file.url):  # the credentials may have expired
            raise
        raise FileError("PermissionError", f"cannot be read: {error.strerror}") from None
    except ShardError as error:
        fault = _fault_of(file)
        if fault is None:
            raise
        raise FileError(type(error).__name__, fault) from None
    if len(data) > limit:
        raise FileError("LimitError", f"has more than {limit:,} bytes (--max-member-bytes)")
    return data


def _fault_of(shard: Shard) -> str | None:
    """Return what is wrong with a file that could not be read; None if it exists as listed."""
    fs, path = file_system(shard.url, may_redirect=shard.may_redirect)
    try:
        fs.invalidate_cache()
        info = fs.info(path)
    except (FileNotFoundError, NotADirectoryError):
        return "no longer exists"
    except OSError:
        return None
    now = (info.get("size"), etag_of(info))
    if info.get("type") != "file":
        return "is not a file"
    if any(a is not None and b is not None and a != b for a, b in zip(now, (shard.size, shard.etag), strict=True)):
        return f"changed since it was listed ({shard.size} bytes; now {info.get('size')} bytes)"
    return None


def _csv_rows(text: str, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise ShardError(f"{where}, line {reader.line_num}: has more values than the header")
            yield reader.line_num, row
    except csv.Error as error:
        raise ShardError(f"{where}, line {reader.line_num}: invalid CSV: {error}") from None


def _json_rows(text: str, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{where}, line {number}: invalid JSON ({type(error).__name__})") from None
        if not isinstance(row, dict):
            raise ShardError(f"{where}, line {number}: expected a JSON object, found {type(row).__name__}")
        yield number, row
