"""The rows of feature files as windows of samples. Finding and opening the files is features.py's."""

import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmbeam.clean.text import clean_text
from mmbeam.clean.where import compile_where, rejecting_expression
from mmbeam.config import Reading, Windows
from mmbeam.errors import ShardError, UsageError
from mmbeam.features.files import FACTS, IDENTITY, check_schema, opened
from mmbeam.readers.stream import ShardStream
from mmbeam.types import Audio, Batch, Failure, Feature, FeatureColumn, Needs, Sample, Shard, Tally, WorkUnit

Value = Feature | str | None  # of one sample: the feature, or why there is none, or that none was to be


def read_features(unit: WorkUnit, reading: Reading, needs: Needs, windows: Windows) -> Generator[Batch]:
    """The unit's rows as windows of samples; an empty last one ends it, `broken` if a file cannot be read.

    A modality is present where one of its columns in `needs` has a value; text also where there is a text,
    if `needs` names it. A feature that was lost when the file was written, is of another width than the
    model's or is not finite is a Failure of its modality. Where windows close depends on the file alone.
    """
    source = _Source(unit, windows, {column.name: column for column in needs.columns})
    to_sample = _ToSample(reading, needs)
    index, broken = 0, None
    try:
        for table in source.tables():
            yield _window(unit, index, table, to_sample, source.take())
            index += 1
    except ShardError as error:
        broken = str(error)
    yield Batch(unit=unit, index=index, last=True, unit_error=broken, tally=source.take())


class _Source:
    """The rows of a unit's files, and what reading them has cost since it was last asked."""

    def __init__(self, unit: WorkUnit, windows: Windows, columns: Mapping[str, FeatureColumn]) -> None:
        self._unit = unit
        self._windows = windows
        self._columns = columns
        self._seconds = 0.0
        self._bytes = 0

    def take(self) -> Tally:
        tally = Tally(seconds={"read": self._seconds}, bytes_read=self._bytes)
        self._seconds, self._bytes = 0.0, 0
        return tally

    def tables(self) -> Iterator[pa.RecordBatch]:
        """The rows that make a window each, no more than the unit's limit in all."""
        left = self._unit.limit
        for source in self._unit.inputs:
            with opened(source.shard) as (parquet, stream):
                for table in self._timed(self._parts(source.shard, parquet), stream):
                    yield table if left is None else table.slice(0, left)
                    left = None if left is None else left - table.num_rows
                    if left is not None and left <= 0:
                        return

    def _parts(self, file: Shard, parquet: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
        schema = parquet.schema_arrow
        try:
            check_schema(file, schema, self._columns)
        except UsageError as error:  # after the launch it is this file that is wrong
            raise ShardError(str(error)) from None
        facts = {**IDENTITY, **FACTS}.items()
        names = [name for name, is_right in facts if name in schema.names and is_right(schema.field(name).type)]
        names += [name for name in self._columns if name in schema.names]
        yield from parquet.iter_batches(batch_size=self._rows(parquet.metadata), columns=names)

    def _rows(self, footer: pq.FileMetaData) -> int:
        """How many rows make a window."""
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        row_bytes = max(1, sum(int(group.total_byte_size) for group in groups) // max(1, int(footer.num_rows)))
        return max(1, min(self._windows.samples, self._windows.decoded_bytes // row_bytes))

    def _timed(self, tables: Iterator[pa.RecordBatch], stream: ShardStream) -> Iterator[pa.RecordBatch]:
        """Each table, with the seconds spent and the stored bytes read put on the tally."""
        before = 0
        while True:
            begin = time.perf_counter()
            table = next(tables, None)
            self._seconds += time.perf_counter() - begin
            self._bytes, before = self._bytes + stream.bytes_read - before, stream.bytes_read
            if table is None:
                return
            yield table


def _window(unit: WorkUnit, index: int, table: pa.RecordBatch, to_sample: "_ToSample", cost: Tally) -> Batch:
    begin = time.perf_counter()
    samples: list[Sample] = []
    failures: list[Failure] = []
    skipped, present = Counter[str](), Counter[str]()
    for sample, lost in to_sample.rows(table):
        present.update(sample.present)
        skip = rejecting_expression(sample, to_sample.wheres)
        if skip is None:
            samples.append(sample)
            failures += lost
        else:
            skipped[skip] += 1
    seconds = {"decode": time.perf_counter() - begin}
    tally = Tally(samples=table.num_rows, skipped=dict(skipped), present=dict(present), seconds=seconds)
    return Batch(
        unit=unit, index=index, last=False, samples=tuple(samples), failures=tuple(failures), tally=tally + cost
    )


class _ToSample:
    """What is made of a row, for one model and one way to clean texts."""

    def __init__(self, reading: Reading, needs: Needs) -> None:
        self.wheres = [(text, compile_where(text)) for text in reading.cleaning.where]
        self._steps = reading.cleaning.text
        self._reads_text = "text" in needs.modalities
        self._columns = sorted(needs.columns, key=lambda column: column.name)

    def rows(self, table: pa.RecordBatch) -> Iterator[tuple[Sample, list[Failure]]]:
        columns = [column for column in self._columns if column.name in table.schema.names]
        facts = table.select([name for name in table.schema.names if name in IDENTITY or name in FACTS])
        values = [column_values(table.column(column.name), column) for column in columns]
        for fact, *row in zip(facts.to_pylist(), *values, strict=True):
            yield self._row(fact, dict(zip(columns, row, strict=True)))

    def _row(self, fact: Mapping[str, Any], values: Mapping[FeatureColumn, Value]) -> tuple[Sample, list[Failure]]:
        lost = dict.fromkeys(self._lost(fact, values), "was lost when the features were made")
        found = {**values, **lost}
        present = {column.modality for column, value in found.items() if value is not None}
        if self._reads_text and fact.get("text") is not None:
            present.add("text")
        sample = Sample(
            present=frozenset(present),
            features={column.name: value for column, value in found.items() if isinstance(value, np.ndarray)},
            **self._facts(fact),
        )
        return sample, [
            Failure.of(sample, "read", "DecodeError", f"{column.name} {why}", modality=column.modality)
            for column, why in found.items()
            if isinstance(why, str)
        ]

    def _lost(self, fact: Mapping[str, Any], values: Mapping[FeatureColumn, Value]) -> list[FeatureColumn]:
        errors = fact.get("errors") or ()
        return [column for column, value in values.items() if value is None and column.name in errors]

    def _facts(self, fact: Mapping[str, Any]) -> dict[str, Any]:
        size = (fact.get("image_width"), fact.get("image_height"))
        seconds, text = fact.get("audio_seconds"), fact.get("text")
        return {
            **{name: fact[name] for name in IDENTITY},
            "image_size": None if None in size else size,
            "audio": None if seconds is None else Audio(waves={}, seconds=seconds),
            "text": text,
            "text_clean": clean_text(text, self._steps) if self._steps and text is not None else None,
            "metadata": fact.get("metadata"),
        }


def column_values(array: pa.Array, column: FeatureColumn) -> list[Value]:
    """Of each row its feature, [width] or [tokens, width]; why it cannot be used; or None where there is none."""
    valid = array.is_valid()
    vectors = array.flatten() if column.tokens else array.filter(valid)
    counts = pc.fill_null(pc.list_value_length(array), 0) if column.tokens else valid.cast(pa.int32())
    widths: npt.NDArray[np.int64] = np.asarray(pc.fill_null(pc.list_value_length(vectors), 0), np.int64)
    right: npt.NDArray[np.bool_] = np.asarray(widths == column.width)
    numbers = vectors.filter(pa.array(right)).flatten().to_numpy(zero_copy_only=False)
    matrix = np.full((len(vectors), column.width), np.nan, numbers.dtype)
    matrix[right] = numbers.reshape(-1, column.width)
    finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(matrix).all(axis=1))
    ends = np.cumsum(np.asarray(counts))
    values: list[Value] = []
    for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        if begin == end:
            values.append(None)
        elif finite[begin:end].all():
            values.append(matrix[begin:end] if column.tokens else matrix[begin])
        else:
            wrong = widths[begin:end][~right[begin:end]].tolist()
            values.append(f"is {wrong[0]} wide, not {column.width}" if wrong else "is not finite")
    return values
