"""Columns of the rows that a run has committed, read back part by part. Nothing is written here."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mmbeam.errors import JobError
from mmbeam.runs.commits import committed, load_reports
from mmbeam.runs.run import find_run, part_name
from mmbeam.runs.store import Store

BATCH_ROWS = 4096  # 32 MiB of vectors of 2,048 numbers

Vectors = npt.NDArray[np.float32]  # [rows, width]


@dataclass(frozen=True, kw_only=True)
class WrittenRows:
    """The rows of a run, as far as it is committed. Picklable."""

    store: Store
    fingerprint: str  # of the run's configuration
    failed: int  # samples that gave no row
    parts: tuple[str, ...]  # names of files, which hold the rows
    schema: pa.Schema

    @classmethod
    def of(cls, output: str) -> Self:
        """The rows in the output of a job. Raises JobError if it holds no run, or nothing is committed."""
        run = find_run(output)
        units = sorted(committed(run))
        if not units:
            raise JobError(f"{run.store}: no unit is committed, so there are no rows; run the job to its end first")
        parts = tuple(part_name(unit) for unit in units)
        with run.store.open(parts[0]) as file:
            schema = pq.read_schema(file)
        failed = sum(report.tally.failed for report in load_reports(run, units))
        return cls(store=run.store, fingerprint=run.fingerprint, failed=failed, parts=parts, schema=schema)

    @property
    def widths(self) -> dict[str, int]:
        """The columns of one vector each, and how many numbers such a vector has."""
        dims: dict[str, int] = json.loads((self.schema.metadata or {}).get(b"mmbeam.dims", b"{}"))
        return {name: width for name, width in dims.items() if name in self.schema.names}

    def count(self) -> int:
        """How many rows there are, from the footers."""
        total = 0
        for part in self.parts:
            with self.store.open(part) as file:
                total += pq.read_metadata(file).num_rows
        return total

    def read(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows, part by part, with those columns."""
        for part in self.parts:
            yield from read_columns(self.store, part, columns)


def read_columns(store: Store, part: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a part, in order, with those columns."""
    with store.open(part) as file, pq.ParquetFile(file) as parquet:
        yield from parquet.iter_batches(batch_size=BATCH_ROWS, columns=list(columns))


def to_vectors(column: pa.ListArray, width: int) -> Vectors:
    """A vector column without nulls as an array. [rows, width]"""
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, dtype=np.float32).reshape(len(column), width)


def with_all(batch: pa.RecordBatch, widths: Mapping[str, int]) -> pa.RecordBatch:
    """The rows in which each of the vector columns has a vector, all of whose numbers are finite."""
    keep = np.ones(batch.num_rows, dtype=np.bool_)
    for name, width in widths.items():
        column = batch.column(name)
        valid = np.array(column.is_valid().to_numpy(zero_copy_only=False), dtype=np.bool_)
        valid[valid] = np.isfinite(to_vectors(column.drop_null(), width)).all(axis=1)
        keep &= valid
    return batch.filter(pa.array(keep))
