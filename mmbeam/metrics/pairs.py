"""From rows to pairs: the text that came out, and the references that it is measured against.

A reference is in a column of the rows, in their metadata, or in a file of its own, joined by key.
"""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from mmbeam.errors import UsageError

KEY = "key"  # of the file that holds references, too
IDENTITY = (KEY, "shard", "offset")
References = Mapping[str, tuple[str, ...]]  # by key


@dataclass(frozen=True, kw_only=True)
class Field:
    """A column of the rows, or an entry of their metadata."""

    name: str
    in_metadata: bool = False

    @property
    def column(self) -> str:
        return "metadata" if self.in_metadata else self.name

    def values(self, batch: pa.RecordBatch) -> list[Any]:
        """Its value in each row; None where there is none."""
        values: list[Any] = batch.column(self.column).to_pylist()
        return [json_object(value).get(self.name) for value in values] if self.in_metadata else values


def json_object(text: str | None) -> Mapping[str, Any]:
    """The JSON object that `text` is; empty if it is none."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def texts_of(value: Any) -> tuple[str, ...]:
    """The texts that a string, or a list of them, is; none for anything else.

    A lone surrogate, which JSON can hold and no file of text, becomes a question mark.
    """
    values = value if isinstance(value, list) else [value]
    return tuple(text.encode("utf-8", "replace").decode() for text in values if isinstance(text, str))


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A row that has what is compared, as far as it has it."""

    key: str
    shard: str
    offset: int
    hypothesis: str | None  # None: nothing was made, of a sample that failed or had nothing to make it from
    references: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ReferenceFile:
    """A Parquet, JSON lines or CSV file that has the references, in `field`, by the entry `key`."""

    url: str
    field: str

    def load(self) -> References:
        """The references by key; all of it is held in memory.

        A key that comes again adds references, as does a list of strings. Raises UsageError if the file is
        of no such kind, or no row has both `key` and the field.
        """
        fs, path = url_to_fs(self.url)
        content = fs.cat_file(path)
        try:
            rows = _parse(path.rpartition(".")[2].lower(), content)
        except (ValueError, csv.Error) as error:
            raise UsageError(f"--references: {error}") from error
        references: dict[str, tuple[str, ...]] = defaultdict(tuple)
        for row in rows:
            if KEY in row and self.field in row:
                references[str(row[KEY])] += texts_of(row[self.field])
        if not references:
            found = ", ".join(sorted(map(str, rows[0]))) if rows else "no rows"
            raise UsageError(f"--references: expected rows with {KEY!r} and {self.field!r}, found {found}")
        return dict(references)


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """Where the pairs are: the column of the hypotheses, and what has the references."""

    hypothesis: str
    reference: Field | ReferenceFile
    blank: bool = False  # whether an empty reference is one (silence, to an error rate)

    @property
    def columns(self) -> tuple[str, ...]:
        """What must be read of a row."""
        of_reference = (self.reference.column,) if isinstance(self.reference, Field) else ()
        return tuple(dict.fromkeys((*IDENTITY, self.hypothesis, *of_reference)))

    def load(self) -> References:
        """The references that are in no row."""
        return {} if isinstance(self.reference, Field) else self.reference.load()

    def pairs(self, batch: pa.RecordBatch, loaded: References) -> Iterator[Pair]:
        """The rows of the batch, in order; `loaded` is what `load` returned."""
        keys, shards, offsets, hypotheses = (batch.column(name).to_pylist() for name in (*IDENTITY, self.hypothesis))
        if isinstance(self.reference, Field):
            found = [texts_of(value) for value in self.reference.values(batch)]
        else:
            found = [loaded.get(key, ()) for key in keys]
        for key, shard, offset, hypothesis, texts in zip(keys, shards, offsets, hypotheses, found, strict=True):
            references = tuple(text for text in texts if self.blank or text.strip())
            yield Pair(key=key, shard=shard, offset=offset, hypothesis=hypothesis, references=references)


def _parse(kind: str, content: bytes) -> Sequence[Mapping[str, Any]]:
    """The rows; ValueError if the content is not of that kind."""
    match kind:
        case "parquet":
            rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(content)).to_pylist()
            return rows
        case "jsonl" | "ndjson":
            return [json_object(line) for line in content.decode().split("\n") if line.strip()]
        case "csv":
            return list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    raise ValueError("expected a file whose name ends in .parquet, .jsonl, .ndjson or .csv")
