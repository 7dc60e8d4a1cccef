"""Pairs of a generated text and the references it is measured against.

References are in a column of the rows, in their metadata, or in a separate file, joined by key.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmbeam.clean.text import json_object
from mmbeam.features.captions import read_keyed

KEY = "key"  # column of the rows, and of a file of references
IDENTITY = (KEY, "shard", "offset")
References = Mapping[str, tuple[str, ...]]  # by key


@dataclass(frozen=True, kw_only=True)
class RowField:
    """A column of the rows, or an entry of their metadata."""

    name: str
    in_metadata: bool = False

    @property
    def column(self) -> str:
        """The column to read."""
        return "metadata" if self.in_metadata else self.name

    def values(self, batch: pa.RecordBatch) -> list[Any]:
        """Return the value in each row; None where it is missing."""
        values: list[Any] = batch.column(self.column).to_pylist()
        return [json_object(value).get(self.name) for value in values] if self.in_metadata else values


def texts_of(value: Any) -> tuple[str, ...]:
    """Return the texts in a string or a list of strings; none for anything else.

    A lone surrogate, which JSON can hold and UTF-8 cannot, becomes a question mark.
    """
    values = value if isinstance(value, list) else [value]
    return tuple(text.encode("utf-8", "replace").decode() for text in values if isinstance(text, str))


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The hypothesis and the references of a row."""

    key: str
    shard: str
    offset: int
    hypothesis: str | None  # None if the model wrote no text for the sample
    references: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ReferenceFile:
    """A file with the references of each `key` in `field` (see features.captions.read_keyed)."""

    url: str
    field: str

    def load(self) -> References:
        """Return the references by key, all in memory. A repeated key, or a list of strings, has several references.

        Raises the errors of `read_keyed`.
        """
        references: dict[str, tuple[str, ...]] = defaultdict(tuple)
        for key, value in read_keyed(self.url, KEY, self.field):
            references[key] += texts_of(value)
        return dict(references)


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """The column of the hypotheses, and the location of the references."""

    hypothesis: str
    reference: RowField | ReferenceFile
    blank: bool = False  # whether a blank reference counts: error rates treat it as silence

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the rows to read."""
        reference = (self.reference.column,) if isinstance(self.reference, RowField) else ()
        return tuple(dict.fromkeys((*IDENTITY, self.hypothesis, *reference)))

    def load(self) -> References:
        """Return the references that are in a separate file."""
        return {} if isinstance(self.reference, RowField) else self.reference.load()

    def pairs(self, batch: pa.RecordBatch, loaded: References) -> Iterator[Pair]:
        """Yield a pair for each row of the batch, in order; `loaded` is the result of `load`."""
        keys, shards, offsets, hypotheses = (batch.column(name).to_pylist() for name in (*IDENTITY, self.hypothesis))
        if isinstance(self.reference, RowField):
            references = [texts_of(value) for value in self.reference.values(batch)]
        else:
            references = [loaded.get(key, ()) for key in keys]
        for key, shard, offset, hypothesis, texts in zip(keys, shards, offsets, hypotheses, references, strict=True):
            kept = tuple(text for text in texts if self.blank or text.strip())
            yield Pair(key=key, shard=shard, offset=offset, hypothesis=hypothesis, references=kept)
