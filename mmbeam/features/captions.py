"""Where the captions of pre-computed features come from: a column, the metadata, or another file joined by key."""

import csv
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from mmbeam.errors import UsageError
from mmbeam.readers.paths import public_path, without_query

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Where captions are: exactly one of `column`, `metadata` and `file` is given.

    A caption is a string that says something, or a number; anything else is none.
    """

    column: str | None = None  # a column of the features' own rows: "text", or what `mmbeam caption` wrote
    metadata: str | None = None  # a field of the JSON object in the column `metadata`
    file: str | None = None  # a path or URL of .parquet, .jsonl, .csv or .tsv, with a row for each key; held in memory
    file_key: str = "key"  # what `file` calls the key,
    file_caption: str = "caption"  # and the caption

    def __post_init__(self) -> None:
        given = [name for name in ("column", "metadata", "file") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(
                f"captions come from a column, the metadata or a file: expected one, found {given or 'none'}"
            )

    def __str__(self) -> str:
        """What is looked for, and where, as an error says it."""
        if self.column is not None:
            return f"the column {self.column!r}"
        if self.metadata is not None:
            return f"the field {self.metadata!r} of the JSON in the column 'metadata'"
        return f"the field {self.file_caption!r} of {public_path(self.file or '')}, joined by {self.file_key!r}"


class CaptionReader:
    """The captions of rows. A file is read when this is made, and held: some 200 bytes for each of its rows.

    Of several captions of one key in a file the first counts. Raises UsageError for a file that cannot be
    read as what its name says, or lacks one of the fields.
    """

    def __init__(self, captions: Captions) -> None:
        self._captions = captions
        self._by_key = {} if captions.file is None else _read_file(captions, captions.file)

    @property
    def column(self) -> str:
        """The column of the rows that is looked at."""
        if self._captions.file is not None:
            return "key"
        return self._captions.column or "metadata"

    def of(self, rows: pa.RecordBatch) -> list[str | None]:
        """The caption of each row, None for a row without."""
        values = rows[self.column].to_pylist()
        if self._captions.file is not None:
            return [self._by_key.get(key) for key in values]
        if self._captions.metadata is not None:
            values = [json_object(value).get(self._captions.metadata) for value in values]
        return [text_of(value) for value in values]


def _read_file(captions: Captions, url: str) -> dict[str, str]:
    suffix = without_query(url).lower().rpartition(".")[2]
    if suffix not in _READERS:
        expected = ", ".join(f".{name}" for name in _READERS)
        raise UsageError(f"{public_path(url)}: expected a file of captions by its name ({expected}), found .{suffix}")
    found: dict[str, str] = {}
    repeated = 0
    for key, value in _READERS[suffix](url, captions.file_key, captions.file_caption):
        caption = text_of(value)
        if key is not None and caption is not None:
            repeated += str(key) in found
            found.setdefault(str(key), caption)
    if repeated:
        log.warning("%s: %d captions left out, whose keys have one already", public_path(url), repeated)
    return found


def _read_parquet(url: str, key: str, caption: str) -> Iterator[tuple[object, object]]:
    with fsspec.open(url) as data:
        try:
            file = pq.ParquetFile(data)
        except pa.ArrowInvalid as error:
            raise UsageError(f"{public_path(url)}: expected a Parquet file ({error})") from None
        _check_fields(file.schema_arrow.names, key, caption, public_path(url))
        for rows in file.iter_batches(columns=[key, caption]):
            yield from zip(rows[key].to_pylist(), rows[caption].to_pylist(), strict=True)


def _read_jsonl(url: str, key: str, caption: str) -> Iterator[tuple[object, object]]:
    with fsspec.open(url, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{public_path(url)}, line {number}: expected a JSON object ({error})") from None
            if not isinstance(value, dict):
                raise UsageError(f"{public_path(url)}, line {number}: expected a JSON object, found {line[:40]!r}")
            _check_fields(value, key, caption, f"{public_path(url)}, line {number}")
            yield value[key], value[caption]


def _read_csv(url: str, key: str, caption: str) -> Iterator[tuple[object, object]]:
    tabs = without_query(url).lower().endswith(".tsv")
    with fsspec.open(url, "rt", encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t" if tabs else ",")
        _check_fields(rows.fieldnames or (), key, caption, public_path(url))
        for row in rows:
            yield row[key], row[caption]


def _check_fields(fields: Collection[str], key: str, caption: str, where: str) -> None:
    missing = [name for name in (key, caption) if name not in fields]
    if missing:
        raise UsageError(f"{where}: expected the fields {key!r} and {caption!r}, found {', '.join(fields) or 'none'}")


_READERS: Mapping[str, Callable[[str, str, str], Iterator[tuple[object, object]]]] = {
    "parquet": _read_parquet,
    "jsonl": _read_jsonl,
    "ndjson": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_csv,
}


def json_object(text: str | None) -> Mapping[str, Any]:
    """A sample's JSON as a mapping; empty if it has none or it is something else."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def text_of(value: object) -> str | None:
    """A caption, or what names a group: a string that says something, or a number; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value.strip() or None if isinstance(value, str) else None
