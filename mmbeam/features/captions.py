"""Texts by key: captions of precomputed features, and files of texts joined by key."""

import csv
import gzip
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmbeam.clean.text import json_integer, json_object
from mmbeam.config import CSV_FIELD_BYTES
from mmbeam.errors import UsageError
from mmbeam.readers.paths import public_path, without_query
from mmbeam.readers.stream import open_shard
from mmbeam.types import Shard

log = logging.getLogger(__name__)

KEYED_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv")  # all but Parquet also with .gz


@dataclass(frozen=True, kw_only=True)
class Captions:
    """The location of captions: exactly one of `column`, `metadata` and `file` is set.

    A caption is a number or a string that is not blank; any other value counts as missing.
    """

    column: str | None = None  # a column of the features, such as "text" or "caption"
    metadata: str | None = None  # a field of the JSON object in the column `metadata`
    file: str | None = None  # path or URL of a file with one row per key (see read_keyed); held in memory
    file_key: str = "key"  # name of the key in `file`
    file_caption: str = "caption"  # name of the caption in `file`

    def __post_init__(self) -> None:
        names = [name for name in ("column", "metadata", "file") if getattr(self, name) is not None]
        if len(names) != 1:
            raise UsageError(
                f"captions: expected exactly one of `column`, `metadata` and `file`, found {', '.join(names) or 'none'}"
            )

    def __str__(self) -> str:
        """Describe the location, for an error message."""
        if self.column is not None:
            return f"the column {self.column!r}"
        if self.metadata is not None:
            return f"the field {self.metadata!r} of the JSON in the column 'metadata'"
        return f"the field {self.file_caption!r} of {public_path(self.file or '')}, joined by {self.file_key!r}"


class CaptionReader:
    """Looks up the captions of rows. A file is read once and kept in memory, at about 200 bytes per row.

    If a key has several captions in a file, the first one is used. Raises the errors of `read_keyed`.
    """

    def __init__(self, captions: Captions) -> None:
        self._captions = captions
        self._by_key: dict[str, str] = {}
        if captions.file is None:
            return
        repeated = 0
        for key, value in read_keyed(captions.file, captions.file_key, captions.file_caption):
            caption = text_of(value)
            if caption is not None:
                repeated += key in self._by_key
                self._by_key.setdefault(key, caption)
        if repeated:
            log.warning("%s: ignored %d captions of repeated keys", public_path(captions.file), repeated)

    @property
    def column(self) -> str:
        """The column of the rows that the captions are read from, or joined by."""
        if self._captions.file is not None:
            return "key"
        return self._captions.column or "metadata"

    def of(self, rows: pa.RecordBatch) -> list[str | None]:
        """Return the caption of each row; None for a row without one."""
        values = rows[self.column].to_pylist()
        if self._captions.file is not None:
            return [self._by_key.get(key) for key in values]
        if self._captions.metadata is not None:
            values = [json_object(value).get(self._captions.metadata) for value in values]
        return [text_of(value) for value in values]


def read_keyed(url: str, key: str, field: str) -> Iterator[tuple[str, Any]]:
    """Yield the key and the value of `field` of each row of a Parquet, JSON lines, CSV or TSV file.

    The suffix of the file decides its format. Text files are UTF-8, with or without a byte order mark, and may be
    compressed by gzip. The value of a row without the field is None; a row whose key is null is skipped. Raises
    UsageError, which names the file and the line, if the file does not have the format of its suffix, if a line is
    invalid, or if no row has both fields; ShardError if it does not exist or stays unreadable.
    """
    path, name = public_path(url), without_query(url).lower()
    suffix = "." + name.removesuffix(".gz").rpartition(".")[2]
    if suffix not in KEYED_SUFFIXES or name.endswith(".parquet.gz"):
        raise UsageError(f"{path}: expected a file whose name ends in {', '.join(KEYED_SUFFIXES)}")
    newline = "" if suffix in (".csv", ".tsv") else None  # the csv module splits lines itself
    fields: Iterable[Any] = ()
    has_field = False
    try:
        with ExitStack() as opened:
            file: Any = opened.enter_context(open_shard(Shard(path=path, url=url)))
            if name.endswith(".gz"):
                file = opened.enter_context(gzip.GzipFile(fileobj=file))
            if suffix != ".parquet":
                file = opened.enter_context(io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline))
            for where, row in _READERS[suffix](file, path, key, field):
                fields = fields or row
                if key not in row:
                    raise _missing(where, key, field, row)
                has_field = has_field or field in row
                if row[key] is not None:
                    yield str(row[key]), row.get(field)
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UsageError(f"{path}: expected text in UTF-8 ({error})") from None
    if not has_field:
        raise _missing(path, key, field, fields)


def _missing(where: str, key: str, field: str, fields: Iterable[Any]) -> UsageError:
    names = ", ".join(map(str, fields)) or "no rows"
    return UsageError(f"{where}: expected rows with {key!r} and {field!r}, found {names}")


def _parquet_rows(file: Any, path: str, key: str, field: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        if not names.count(key) == names.count(field) == 1:
            raise _missing(path, key, field, names)
        for rows in parquet.iter_batches(columns=[key, field]):
            yield from ((path, row) for row in rows.to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path}: cannot be read as Parquet ({error})") from None


def _json_rows(file: Any, path: str, key: str, field: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line, parse_int=json_integer)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: expected a JSON object ({error})") from None
        if not isinstance(row, dict):
            raise UsageError(f"{where}: expected a JSON object, found {type(row).__name__}")
        yield where, row


def _csv_rows(
    file: Any, path: str, key: str, field: str, delimiter: str = ","
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(CSV_FIELD_BYTES)  # of the process, as for tables
    rows = csv.DictReader(file, delimiter=delimiter)
    try:
        for row in rows:
            yield f"{path}, line {rows.line_num}", row
    except csv.Error as error:
        raise UsageError(f"{path}, line {rows.line_num + 1}: {error}") from None


_READERS: Mapping[str, Callable[[Any, str, str, str], Iterator[tuple[str, Mapping[str, Any]]]]] = {
    ".parquet": _parquet_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".csv": _csv_rows,
    ".tsv": partial(_csv_rows, delimiter="\t"),
}


def text_of(value: object) -> str | None:
    """Return a caption or the name of a group: a number, or a string that is not blank; None for anything else.

    A lone surrogate, which JSON can hold and UTF-8 cannot, becomes a question mark.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value.encode("utf-8", "replace").decode().strip() or None if isinstance(value, str) else None
