"""The rows of feature files, as windows of samples for a job; and the rows of a run, by column, for an evaluation."""

import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmbeam.clean.text import clean_text
from mmbeam.clean.where import compile_where, rejecting_expression
from mmbeam.config import Reading, Windows
from mmbeam.errors import JobError, ShardError, UsageError
from mmbeam.features.files import check_sizes, open_counted, open_parquet
from mmbeam.features.schema import FACTS, IDENTITY, check_schema, widths_of
from mmbeam.runs.commits import committed, load_reports
from mmbeam.runs.run import find_run, part_name
from mmbeam.runs.store import Store
from mmbeam.types import (
    Audio,
    Batch,
    Failure,
    Feature,
    FeatureColumn,
    InputRead,
    Isolation,
    Needs,
    Sample,
    Shard,
    Tally,
    WorkUnit,
)

BATCH_ROWS = 4096  # 32 MiB of vectors of 2,048 numbers

Vectors = npt.NDArray[np.float32]  # [rows, width]


def read_features(
    unit: WorkUnit, reading: Reading, needs: Needs, windows: Windows, held: object = None
) -> Generator[Batch]:
    """Yield the unit's rows as windows of samples, then an empty last one, with a `unit_error` if a file is damaged.

    A modality is present if one of its columns in `needs` has a value. Text is also present if the row has a text and
    `needs.modalities` contains text. A feature becomes a Failure of its modality if it was lost when the file was
    written, has another width than the model's, or is not finite. The boundaries of windows depend on the file alone.
    """
    columns = sorted(needs.columns, key=lambda column: column.name)
    isolation = unit.isolation or Isolation()
    wheres = [(text, compile_where(text)) for text in reading.cleaning.where]
    index, unit_error, cost = 0, None, _Cost()
    inputs_read = [InputRead()] * len(unit.inputs)
    try:
        max_bytes = reading.limits.decode_bytes // 4  # of one list: pyarrow takes 4 times as much while it reads it
        for table in _tables(unit, max_bytes, windows, columns, cost, inputs_read):
            begin = time.perf_counter()
            samples: list[Sample] = []
            failures: list[Failure] = []
            skipped, present = Counter[str](), Counter[str]()
            for sample, lost in _samples(table, columns, reading, "text" in needs.modalities):
                if isolation.probed is not None and sample.id not in isolation.probed:
                    continue
                if sample.id in isolation.crashes:
                    crash = Failure.of(sample, "crash", "CrashError", isolation.crashes[sample.id])
                    samples.append(replace(sample, text=None, text_clean=None, features={}))
                    failures.append(crash)
                    present.update(sample.present)
                    continue
                present.update(sample.present)
                expression = rejecting_expression(sample, wheres)
                if expression is None:
                    samples.append(sample)
                    failures += lost
                else:
                    skipped[expression] += 1
            seconds = {"decode": time.perf_counter() - begin}
            yield Batch(
                unit=unit,
                index=index,
                last=False,
                samples=tuple(samples),
                failures=tuple(failures),
                tally=cost.take()
                + Tally(samples=table.num_rows, skipped=dict(skipped), present=dict(present), seconds=seconds),
            )
            index += 1
    except ShardError as error:
        unit_error = str(error)
    yield Batch(
        unit=unit,
        index=index,
        last=True,
        unit_error=unit_error,
        tally=cost.take(),
        inputs_read=tuple(inputs_read),
    )


@dataclass
class _Cost:
    """Seconds and stored bytes of reading since the last call of `take`."""

    seconds: float = 0.0
    nbytes: int = 0

    def take(self) -> Tally:
        """Return the cost, and reset it to zero."""
        tally = Tally(seconds={"read": self.seconds}, bytes_read=self.nbytes)
        self.seconds, self.nbytes = 0.0, 0
        return tally


def _tables(
    unit: WorkUnit,
    max_bytes: int,
    windows: Windows,
    columns: Sequence[FeatureColumn],
    cost: _Cost,
    inputs_read: list[InputRead],
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of each window, up to the unit's limit.

    With a limit, the files behind a damaged one are read in any case; the unit fails if none yields a row.
    """
    left = unit.limit
    for number, source in enumerate(unit.inputs):
        try:
            for table in _tables_of(source.shard, max_bytes, windows, columns, cost):
                yield table if left is None else table.slice(0, left)
                if left is not None:
                    left -= table.num_rows
                    if left <= 0:
                        del inputs_read[number + 1 :]
                        return
        except ShardError as error:
            if left is None or (left == unit.limit and number == len(unit.inputs) - 1):
                raise
            inputs_read[number] = InputRead(broken=str(error))


def _tables_of(
    shard: Shard, max_bytes: int, windows: Windows, columns: Sequence[FeatureColumn], cost: _Cost
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of each window of one file."""
    with open_counted(shard) as (parquet, stream):
        schema, footer = parquet.schema_arrow, parquet.metadata
        try:
            check_schema(shard.path, schema, {column.name: column for column in columns})
        except UsageError as error:  # the launch accepted the input, so this file differs from the others
            raise ShardError(str(error)) from None
        check_sizes(shard.path, parquet, columns, max_bytes)
        names = [name for name, is_right in (IDENTITY | FACTS).items() if _has(schema, name, is_right)]
        names += [column.name for column in columns if column.name in schema.names]
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        stored = sum(group.total_byte_size for group in groups)
        numbers = sum(group.column(index).num_values for group in groups for index in range(group.num_columns))
        row_bytes = max(1, max(stored, 2 * numbers) // max(1, footer.num_rows))
        rows = max(1, min(windows.samples, windows.decoded_bytes // row_bytes))
        tables = parquet.iter_batches(batch_size=rows, columns=names)
        bytes_before = 0
        while True:
            begin = time.perf_counter()
            table = next(tables, None)
            cost.seconds += time.perf_counter() - begin
            cost.nbytes, bytes_before = cost.nbytes + stream.bytes_read - bytes_before, stream.bytes_read
            if table is None:
                return
            yield table


def _has(schema: pa.Schema, name: str, is_right: Any) -> bool:
    return name in schema.names and is_right(schema.field(name).type)


def _samples(
    table: pa.RecordBatch, columns: Sequence[FeatureColumn], reading: Reading, reads_text: bool
) -> Iterator[tuple[Sample, list[Failure]]]:
    columns = [column for column in columns if column.name in table.schema.names]
    facts = table.select([name for name in table.schema.names if name in IDENTITY or name in FACTS])
    values_of = [column_values(table.column(column.name), column) for column in columns]
    steps = reading.cleaning.text
    for fact, *row in zip(facts.to_pylist(), *values_of, strict=True):
        values: dict[FeatureColumn, Feature | str | None] = dict(zip(columns, row, strict=True))
        for column in columns:
            if values[column] is None and column.name in (fact.get("errors") or ()):
                values[column] = "was lost when the features were made"
        text, seconds = fact.get("text"), fact.get("audio_seconds")
        size = fact.get("image_width"), fact.get("image_height")
        present = {column.modality for column, value in values.items() if value is not None and column.modality}
        sample = Sample(
            **{name: fact[name] for name in IDENTITY},
            present=frozenset(present | {"text"} if reads_text and text is not None else present),
            features={column.name: value for column, value in values.items() if isinstance(value, np.ndarray)},
            image_size=None if None in size else size,
            audio=None if seconds is None else Audio(waves={}, seconds=seconds),
            text=text,
            text_clean=clean_text(text, steps) if steps and text is not None else None,
            metadata=fact.get("metadata"),
        )
        yield (
            sample,
            [
                Failure.of(sample, "read", "DecodeError", f"{column.name} {why}", modality=column.modality or "")
                for column, why in values.items()
                if isinstance(why, str)
            ],
        )


def column_values(array: pa.Array, column: FeatureColumn) -> list[Feature | str | None]:
    """Return for each row its feature, [width] or [tokens, width], or the reason it cannot be used; None if null."""
    valid = array.is_valid()
    vectors = array.flatten() if column.tokens else array.filter(valid)
    counts = pc.fill_null(pc.list_value_length(array), 0) if column.tokens else valid.cast(pa.int32())
    widths: npt.NDArray[np.int64] = np.asarray(pc.fill_null(pc.list_value_length(vectors), 0), np.int64)
    right: npt.NDArray[np.bool_] = np.asarray(widths == column.width)
    numbers = (vectors if right.all() else vectors.filter(pa.array(right))).flatten().to_numpy(zero_copy_only=False)
    matrix = numbers.reshape(-1, column.width)
    if not right.all():
        matrix = np.full((len(vectors), column.width), np.nan, numbers.dtype)
        matrix[right] = numbers.reshape(-1, column.width)
    finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(matrix).all(axis=1))
    ends = np.cumsum(np.asarray(counts))
    values: list[Feature | str | None] = []
    for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        if begin == end:
            values.append(None)
        elif finite[begin:end].all():
            values.append(matrix[begin:end] if column.tokens else matrix[begin])
        else:
            wrong = widths[begin:end][~right[begin:end]].tolist()
            values.append(f"is {wrong[0]} wide, not {column.width}" if wrong else "is not finite")
    return values


@dataclass(frozen=True, kw_only=True)
class WrittenRows:
    """The committed rows of a run, read part by part. Picklable; nothing is written."""

    store: Store
    fingerprint: str  # of the run's configuration
    failed: int  # samples without a row
    parts: tuple[str, ...]  # names of the Parquet files
    schema: pa.Schema

    @classmethod
    def of(cls, output: str) -> Self:
        """Return the rows in the output of a job. Raises JobError unless it holds a run with a committed unit."""
        run = find_run(output)
        units = sorted(committed(run))
        if not units:
            raise JobError(
                f"{run.store}: expected the rows of a job, found no committed unit; run the job to its end first"
            )
        parts = tuple(part_name(unit) for unit in units)
        with open_part(run.store, parts[0]) as parquet:
            schema = parquet.schema_arrow
        failed = sum(report.tally.failed for report in load_reports(run, units))
        return cls(store=run.store, fingerprint=run.fingerprint, failed=failed, parts=parts, schema=schema)

    @property
    def widths(self) -> dict[str, int]:
        """The columns of pooled vectors, with their widths."""
        return widths_of(self.schema)

    def count(self) -> int:
        """Return the number of rows, from the footers."""
        total = 0
        for part in self.parts:
            with open_part(self.store, part) as parquet:
                total += parquet.metadata.num_rows
        return total

    def read(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield all rows with these columns, part by part."""
        for part in self.parts:
            yield from read_columns(self.store, part, columns)


def open_part(store: Store, part: str) -> AbstractContextManager[pq.ParquetFile]:
    """Open a part of the rows of a run, with the errors of `open_parquet`."""
    return open_parquet(Shard(path=f"{store}/{part}", url=f"{store.url}/{part}"))


def read_columns(store: Store, part: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a part, in order, with these columns."""
    with open_part(store, part) as parquet:
        yield from parquet.iter_batches(batch_size=BATCH_ROWS, columns=list(columns))


def to_vectors(column: pa.ListArray, width: int) -> Vectors:
    """Return a column of vectors without nulls as an array. [rows, width]"""
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, dtype=np.float32).reshape(len(column), width)


def rows_with_vectors(batch: pa.RecordBatch, widths: Mapping[str, int]) -> pa.RecordBatch:
    """Return the rows that have a finite vector in each of these columns."""
    keep = np.ones(batch.num_rows, dtype=np.bool_)
    for name, width in widths.items():
        column = batch.column(name)
        valid = np.array(column.is_valid().to_numpy(zero_copy_only=False), dtype=np.bool_)
        valid[valid] = np.isfinite(to_vectors(column.drop_null(), width)).all(axis=1)
        keep &= valid
    return batch.filter(pa.array(keep))
