"""The samples of a table: Parquet, CSV, TSV or JSON lines whose rows hold media as bytes, or name files or URLs.

A row is a sample. Its offset is its number, its key the path without extension, or the number if there is no path. What
each column holds follows from `config.Table`, or else from the columns' names and types (`roles`).
"""

import csv
import io
import json
import os
import posixpath
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, BinaryIO, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from mmbeam.config import CSV_FIELD_BYTES, MIB, SAMPLE_BYTES_FACTOR, Limits, Reading
from mmbeam.errors import ShardError, printable, public_url
from mmbeam.readers.decompress import Decompressed, is_compressed
from mmbeam.readers.folder import file_bytes, read_ahead
from mmbeam.readers.paths import FileError, is_local, local_path, origin, scheme_of, split_name, without_query
from mmbeam.types import Damage, Input, RawSample, Shard, SourceReader

Role = Literal["bytes", "path", "url", "text", "key", "metadata"]
PATH_NAMES = (
    "file_name",
    "filename",
    "file",
    "path",
    "filepath",
    "file_path",
    "image",
    "image_path",
    "audio",
    "audio_path",
    "video",
    "video_path",
)
URL_NAMES = ("url", "image_url", "audio_url", "video_url", "image_link", "audio_link", "video_link")
TEXT_NAMES = ("text", "caption", "sentence", "transcription", "txt")
KEY_NAMES = ("key", "__key__")
BATCH_ROWS = 16  # of Parquet, decoded together
NAMING_ROWS = 100  # of JSON lines, whose names are the columns; later names are metadata
EXPANDED_BYTES = 1024 * MIB  # of a row group, in any case; beyond it Limits.expansion applies

# The beginning of a file, and its extension.
_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"fLaC", "flac"),
    (b"OggS", "ogg"),
    (b"ID3", "mp3"),
    (b"\xff\xfb", "mp3"),
    (b"\xff\xf3", "mp3"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"BM", "bmp"),
    (b"\x1a\x45\xdf\xa3", "mkv"),
)


def roles(types: Mapping[str, pa.DataType | None], reading: Reading, where: str) -> dict[str, Role]:
    """Return what each column holds; `types` are those of the columns, None if any value is possible (CSV, JSON).

    The columns of `reading.table` come first. Without any, columns of bytes (binary, or the struct of bytes and path
    that `datasets` writes for images and sounds) are media, else a column named like a URL, else one named like a path.
    Raises ShardError for a named column that is absent, or if nothing is an input.
    """
    table, fields = reading.table, reading.fields
    found: dict[str, Role] = {}
    given: list[tuple[Role, str]] = [
        *(("bytes", name) for name in table.bytes_columns),
        *(("path", name) for name in table.path_columns),
        *(("url", name) for name in table.url_columns),
    ]
    lower = {name.lower(): name for name in reversed(list(types))}
    for role, name in given:
        if name not in types:
            raise ShardError(f"{where}: expected a column {name}, found {', '.join(types)}")
        if role == "bytes" and types[name] is None:
            raise ShardError(f"{where}: expected bytes in column {name}, which only Parquet can hold")
        found[name] = role
    if not given:
        found |= {name: "bytes" for name, kind in types.items() if kind is not None and _is_bytes(kind)}

    def texts(names: Sequence[str]) -> list[str]:
        present = (lower[name] for name in names if name in lower)
        return [name for name in present if name not in found and types[name] in _TEXT_TYPES]

    if not found:
        found |= dict.fromkeys(texts(URL_NAMES), "url")
    if not found:
        found |= dict.fromkeys(texts(PATH_NAMES), "path")
    found |= dict.fromkeys(texts(TEXT_NAMES if fields.text is None else (fields.text,))[:1], "text")
    found |= dict.fromkeys(texts(KEY_NAMES)[:1], "key")
    if not set(found.values()) & {"bytes", "path", "url", "text"}:
        raise ShardError(
            f"{where}: expected a column of media or text, found {', '.join(types)}; name one with --path-column, "
            "--url-column, --bytes-column or --text-field"
        )
    simple = (name for name, kind in types.items() if name not in found and (kind is None or _is_simple(kind)))
    return {**found, **dict.fromkeys(simple, "metadata")}


_TEXT_TYPES = (None, pa.string(), pa.large_string(), pa.string_view())


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_simple(kind: pa.DataType) -> bool:
    """Return whether values become metadata: no vectors, no bytes."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_simple(kind.value_type) and not pa.types.is_floating(kind.value_type)
    if pa.types.is_struct(kind):
        return all(_is_simple(field.type) for field in kind)
    return not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_nested(kind))


class TableReader(SourceReader):
    """The samples of a table, or of its rows from `source.begin` to `source.end`, in order. Iterate once.

    `stream` is the table, opened by `stream.open_shard`; `open_file` is that function, `fetch` that of fetch.py.

    A path is relative to the table. Unless the table's shard `may_redirect`, it must lie within the table's folder, and
    URLs are those of public servers. With `offsets`, only the rows of these numbers are read. A row that cannot be
    parsed, and a file that cannot be read, is damage to its sample. Raises ShardError if the table cannot be read.
    """

    def __init__(
        self,
        stream: Any,
        source: Input,
        want: Callable[[str], bool],
        reading: Reading,
        open_file: Callable[[Shard], BinaryIO],
        fetch: Callable[[str, int, bool], bytes],
        offsets: Collection[int] | None = None,
    ) -> None:
        super().__init__()
        self._stream = stream
        self._source = source
        self._shard = source.shard
        self._want = want
        self._reading = reading
        self._open = open_file
        self._fetch = fetch
        self._offsets = offsets
        self._roles: dict[str, Role] = {}
        self._file_bytes = 0  # read from the files and URLs that rows name

    def __iter__(self) -> Iterator[RawSample]:
        last = max(self._offsets, default=-1) if self._offsets is not None else None
        chosen = (row for row in self._rows(last) if self._offsets is None or row[0] in self._offsets)
        first = next(chosen, None)
        if first is None:
            return
        rows = (row for part in ([first], chosen) for row in part)
        is_far = "url" in self._roles.values() or ("path" in self._roles.values() and not is_local(self._shard.url))
        keys: set[str] = set()
        for raw in read_ahead(self._sample, rows, lambda _: 0) if is_far else map(self._sample, rows):
            self.bytes_read = self._stream.bytes_read + self._file_bytes
            yield replace(raw, repeated=True) if raw.key in keys else raw
            keys.add(raw.key)

    def _rows(self, last: int | None) -> Iterator[tuple[int, Mapping[str, Any] | FileError]]:
        """Yield number and values of each row, or what is wrong with it; not beyond row `last`."""
        begin = self._source.begin
        end = self._source.end if last is None else last + 1
        suffix = table_suffix(self._shard.path)
        if suffix == ".parquet":
            yield from _parquet_rows(self, begin, end)
            return
        text = _PlainText(self._stream, self._reading.limits.expansion)
        parse = _json_rows if suffix in (".jsonl", ".ndjson") else _csv_rows
        held: tuple[int, Mapping[str, Any] | FileError] | None = None
        for row in parse(self, cast(BinaryIO, io.BufferedReader(text)), begin, end):
            if held is not None:
                yield held
            held = row
        if text.fault is None or end is not None:
            yield from [] if held is None else [held]
            return
        where = self._shard.path
        if held is None:
            raise ShardError(f"{where}: {text.fault[1]}")
        number, values = held
        is_cut = not text.ends_with_newline
        yield number, FileError("DecodeError", f"cut off: {text.fault[1]}") if is_cut else values
        self.broken = f"{where}: after row {number:,}: {text.fault[1]}"

    def _sample(self, item: tuple[int, Mapping[str, Any] | FileError]) -> RawSample:
        number, row = item
        key = f"{number:08d}"
        members: dict[str, bytes] = {}
        fields: dict[str, None] = {}
        damages: list[Damage] = []
        if isinstance(row, FileError):
            damages.append(Damage(field="", offset=None, error=row.kind, message=f"row {number:,}: {row}"))
            row = {}
        metadata: dict[str, Any] = {}
        names = self._reading.fields
        held, has_path = 0, False
        for column, value in row.items():
            role = self._roles.get(column, "metadata")
            if value is None or value == "":
                continue
            if role == "key":
                key, has_path = str(value), True
            elif role == "text":
                field = column.lower() if names.text is not None else "txt"
                fields[field] = None
                members[field] = _text(value).encode("utf-8", "surrogateescape")
            elif role == "metadata":
                if names.metadata == column.lower():
                    fields[names.metadata] = None
                    members[names.metadata] = _text(value).encode("utf-8", "surrogateescape")
                else:
                    metadata[column] = value
            else:
                path = value if isinstance(value, str) else value.get("path") if isinstance(value, dict) else None
                data = value if isinstance(value, bytes) else value.get("bytes") if isinstance(value, dict) else None
                if role != "bytes" and path is not None:
                    metadata[column] = public_url(path) if "://" in path else path  # it may hold a signature
                if path and not has_path and key == f"{number:08d}":
                    stem = split_name(printable(without_query(path).rpartition("://")[2]))
                    key = stem[0] if stem else key
                extension = posixpath.splitext(without_query(path))[1][1:].lower() if path else ""
                field = self._field(column, extension)
                if names.kind(field) is not None and not self._want(field):
                    fields[field] = None
                    continue
                limit = min(
                    self._reading.limits.member_bytes, SAMPLE_BYTES_FACTOR * self._reading.limits.member_bytes - held
                )
                try:
                    data = self._data(data, path, role, limit)
                except FileError as error:
                    if names.kind(field) is None:  # its format is unknown; the column was meant to hold media
                        name = column.lower()
                        field = f"{name}.{'wav' if 'audio' in name else 'mp4' if 'video' in name else 'jpg'}"
                    fields[field] = None
                    fault = str(error).replace("no longer exists", "does not exist")
                    shown = printable(public_url(path)) if path else ""
                    named = fault if fault.startswith(shown) else f"{shown}: {fault}"
                    where = f"row {number:,}, {column}: {named}"
                    damages.append(Damage(field=field, offset=None, error=error.kind, message=where))
                    continue
                if data is None:
                    continue
                if names.kind(field) is None:
                    field = self._field(column, _extension_of(data) or extension)
                fields[field] = None
                held += len(data)
                if self._want(field):
                    members[field] = data
        if metadata and names.metadata is None:
            fields["json"] = None
            if self._want("json"):
                members["json"] = json.dumps(metadata, ensure_ascii=False, default=str).encode("utf-8", "replace")
        if "bytes" not in self._roles.values():
            self._file_bytes += held
        return RawSample(
            key=key,
            shard=self._shard.path,
            offset=number,
            members={field: data for field, data in members.items() if self._want(field)},
            fields=tuple(fields),
            damages=tuple(damages),
        )

    def _field(self, column: str, extension: str) -> str:
        """Return the name of a column's field, by whose last part its kind is found unless an option names it."""
        column = column.lower()
        return column if self._reading.fields.kind(column) is not None or not extension else f"{column}.{extension}"

    def _data(self, data: bytes | None, path: str | None, role: Role, limit: int) -> bytes | None:
        if data is not None:
            if len(data) > limit:
                raise FileError("LimitError", f"has {len(data):,} bytes; {limit:,} are allowed (--max-member-bytes)")
            return data
        if path is None and role != "bytes":
            raise FileError("DecodeError", "expected the name of a file or a URL, found another value")
        if path is None:
            return None
        if role == "url" or path.lower().startswith(("http://", "https://")):
            return self._fetch(path, limit, self._shard.may_redirect)
        return file_bytes(self._open, self._file(path), limit)

    def _file(self, path: str) -> Shard:
        """Return the file that a row names. Raises FileError for one outside the table's folder."""
        table = self._shard
        folder = table.url.rpartition("/")[0] if "://" in table.url else os.path.dirname(local_path(table.url))  # noqa: PTH120
        is_elsewhere = "://" in path or path.startswith(("/", "~"))
        url = path if is_elsewhere else f"{folder}/{path}"
        if "\0" in path:
            raise FileError("DecodeError", "expected a path, found one with a NUL character")
        if not table.may_redirect:
            if is_local(url):
                real = os.path.realpath(local_path(url))
                inside = is_local(table.url) and real.startswith(f"{os.path.realpath(folder)}/")
            else:
                below = posixpath.normpath(url.partition("://")[2])
                root = posixpath.normpath(folder.partition("://")[2])
                inside = origin(url) == origin(table.url) and below.startswith(f"{root}/") and "%2e" not in url.lower()
            if not inside:
                raise FileError(
                    "PermissionError", "outside the folder of the table; if you trust it, use --allow-local-paths"
                )
        if scheme_of(url) and not is_local(url) and scheme_of(url) != scheme_of(table.url) and not table.may_redirect:
            raise FileError("PermissionError", "in another store than the table")
        return Shard(path=printable(url), url=url, may_redirect=table.may_redirect)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _extension_of(data: bytes) -> str | None:
    """Return the extension of a file by its first bytes; None if they are of no known format."""
    if data[:4] == b"RIFF":
        return {b"WEBP": "webp", b"WAVE": "wav", b"AVI ": "avi"}.get(data[8:12])
    if data[4:8] == b"ftyp":
        return "avif" if data[8:11] == b"avi" else "m4a" if data[8:11] == b"M4A" else "mp4"
    return next((extension for magic, extension in _MAGIC if data.startswith(magic)), None)


def table_suffix(path: str) -> str:
    """Return the suffix of a table, lower case, without that of its compression: ".csv" of "a.CSV.gz"."""
    name = without_query(path).lower()
    return posixpath.splitext(name.removesuffix(".gz").removesuffix(".zst"))[1]


class _PlainText(io.RawIOBase):
    """The bytes of a table of text, decompressed if it is gzip or zstd. `fault` is why they end early, if they do."""

    def __init__(self, stream: BinaryIO, expansion: float) -> None:
        super().__init__()
        head = stream.read(4)
        self._waiting = b"" if is_compressed(head) else head
        self._stream: Any = Decompressed(stream, head, expansion) if is_compressed(head) else stream
        self.ends_with_newline = True

    @property
    def fault(self) -> tuple[str, str] | None:
        """The name of an error class and a message; None without a fault."""
        return self._stream.fault if isinstance(self._stream, Decompressed) else None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data, self._waiting = self._waiting or self._stream.read(len(buffer)), b""
        if data:
            buffer[: len(data)] = data
            self.ends_with_newline = data.endswith(b"\n")
        return len(data)


def _parquet_rows(reader: TableReader, begin: int, end: int | None) -> Iterator[tuple[int, Any]]:
    where, limits = reader._shard.path, reader._reading.limits
    number, yielded = 0, False
    if not reader._stream.seekable():
        raise ShardError(f"{where}: expected a server with range requests, as Parquet needs; copy it to this machine")
    try:
        parquet = pq.ParquetFile(reader._stream, pre_buffer=False, buffer_size=MIB)
        schema = parquet.schema_arrow
        reader._roles = roles({field.name: field.type for field in schema}, reader._reading, where)
        size = reader._stream.seek(0, 2)
        for group in range(parquet.num_row_groups):
            info = parquet.metadata.row_group(group)
            if number + info.num_rows <= begin or (end is not None and number >= end):
                number += info.num_rows
                continue
            if info.total_byte_size > EXPANDED_BYTES + limits.expansion * size:
                raise ShardError(f"{where}: row group {group} expands beyond the limit (--max-expansion)")
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(reader._roles)):
                if number + batch.num_rows <= begin:
                    number += batch.num_rows
                    continue
                for row in batch.to_pylist():
                    if number >= begin and (end is None or number < end):
                        yielded = True
                        yield number, row
                    number += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, PermissionError | ConnectionError):
            raise
        if yielded:  # their rows are kept
            reader.broken = f"{where}: from row {number:,} on: damaged ({' '.join(str(error).split())})"
            return
        raise ShardError(f"{where}: not a Parquet file, or damaged ({' '.join(str(error).split())})") from None


def _json_rows(reader: TableReader, stream: BinaryIO, begin: int, end: int | None) -> Iterator[tuple[int, Any]]:
    where, limit = reader._shard.path, reader._reading.limits.member_bytes
    lines = (line for line in _lines(stream, limit) if line.strip())
    first = list(islice(lines, NAMING_ROWS))  # of the whole table, so that its parts agree on the columns
    objects = (row for row in (_json_row(line, limit) for line in first) if isinstance(row, dict))
    reader._roles = roles({name: None for row in objects for name in row}, reader._reading, where)
    for number, line in enumerate(chain(first, lines)):
        if end is not None and number >= end:
            return
        if number >= begin:
            row = _json_row(line, limit)
            if isinstance(row, FileError) and not line.endswith(b"\n"):
                reader.broken = f"{where}: row {number:,}: cut off; what follows is unknown"
            yield number, row


def _lines(stream: BinaryIO, limit: int) -> Iterator[bytes]:
    """Yield the lines of a file; of a line over `limit` its first `limit + 1` bytes."""
    for line in iter(lambda: stream.readline(limit + 1), b""):
        yield line
        while line and len(line) > limit and not line.endswith(b"\n"):
            line = stream.readline(limit + 1)


def _json_row(line: bytes, limit: int) -> dict[str, Any] | FileError:
    if len(line) > limit:
        return FileError("LimitError", f"has more than {limit:,} bytes (--max-member-bytes)")
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return FileError("DecodeError", f"invalid JSON ({type(error).__name__})")
    return row if isinstance(row, dict) else FileError("DecodeError", "expected a JSON object")


def _csv_rows(reader: TableReader, stream: BinaryIO, begin: int, end: int | None) -> Iterator[tuple[int, Any]]:
    where = reader._shard.path
    csv.field_size_limit(CSV_FIELD_BYTES)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    delimiter = "\t" if table_suffix(where) == ".tsv" else ","
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(rows, None)
        if not header:
            raise ShardError(f"{where}: expected a header with the names of the columns, found an empty file")
        if len(set(header)) < len(header):
            raise ShardError(f"{where}: expected different names of columns, found {', '.join(header)}")
        reader._roles = roles(dict.fromkeys(header, None), reader._reading, where)
        number = -1
        while True:
            row: list[str] | FileError
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                if "expected after" not in str(error):
                    raise
                # A quote inside a value; the next line begins another row.
                row = FileError("DecodeError", f"line {rows.line_num:,}: invalid CSV: {error}")
            if row == []:
                continue
            number += 1
            if number < begin:
                continue
            if end is not None and number >= end:
                return
            if isinstance(row, FileError):
                yield number, row
            elif len(row) != len(header):
                yield number, FileError("DecodeError", f"expected {len(header)} values, found {len(row)}")
            else:
                yield number, dict(zip(header, row, strict=True))
    except csv.Error as error:
        reader.broken = f"{where}: line {rows.line_num:,}: invalid CSV ({error}); what follows is unknown"
    finally:
        text.detach()


def count_rows(path: str, stream: BinaryIO, expansion: float = Limits.expansion) -> int | None:
    """Return the number of rows of a table; None if it cannot be parsed, which its unit then reports."""
    try:
        if table_suffix(path) == ".parquet":
            return int(pq.read_metadata(stream).num_rows)
        plain = _PlainText(stream, expansion)
        lines = io.BufferedReader(plain)
        if table_suffix(path) in (".jsonl", ".ndjson"):
            count = sum(1 for line in lines if line.strip())
        else:
            csv.field_size_limit(CSV_FIELD_BYTES)
            text = io.TextIOWrapper(lines, encoding="utf-8-sig", errors="surrogateescape", newline="")
            try:
                count = max(0, sum(1 for row in csv.reader(text) if row) - 1)
            finally:
                text.detach()
        return count if plain.fault is None else None
    except (OSError, ValueError, csv.Error, pa.ArrowException):
        return None
