"""One Parquet per unit, published whole: rows gathered in scratch, then failures, Parquet and report in that order.

What a row is stands in rows.py; what a commit means to a run stands in runs/commits.py.
"""

import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from mmbeam.config import MIB
from mmbeam.errors import FlowError
from mmbeam.readers.units import found_to_json
from mmbeam.runs.commits import FOOTER_KEY, commit_record, read_footer
from mmbeam.runs.failed import FAILED
from mmbeam.runs.rows import FAILURE_SCHEMA, settle
from mmbeam.runs.run import Run, commit_name, failures_name, part_name
from mmbeam.runs.store import Store
from mmbeam.runs.summary import check_conserved
from mmbeam.types import Batch, InputRead, Tally, UnitReport, WorkUnit

# A row group is what a writer holds in memory and what a reader fetches at once: 16 MiB is 8,000 vectors of
# 512 floats, large enough for a scan from object storage, small enough for many units in flight.
ROW_GROUP_BYTES = 16 * MIB
ROW_GROUP_ROWS = 65_536  # where rows are small: readers plan and skip by row group
BATCH_PLAN = ("device", "batch_size", "windows")  # of what a run records, what a vector's last digits depend on


class _PartFile:
    """A Parquet that is being built in scratch, one row group in memory."""

    def __init__(self, store: Store, schema: pa.Schema) -> None:
        self._path = store.scratch_file(".parquet")
        self._writer = pq.ParquetWriter(
            self._path,
            schema,
            compression=_compression(schema),
            use_dictionary=_repeating(schema),
            write_statistics=_scalars(schema),
        )
        self._tables: list[pa.Table] = []
        self._rows = self._bytes = 0

    def append(self, table: pa.Table) -> None:
        self._tables.append(table)
        self._rows += table.num_rows
        self._bytes += table.nbytes
        if self._bytes >= ROW_GROUP_BYTES or self._rows >= ROW_GROUP_ROWS:
            self._flush()

    def finish(self, metadata: Mapping[str, bytes]) -> Path:
        """Close the file with `metadata` in its footer; its path in scratch."""
        self._flush()
        self._writer.add_key_value_metadata(metadata)
        self._writer.close()
        return self._path

    def discard(self) -> None:
        """Remove the file, finished or not, if it has not been published."""
        self._tables = []
        with suppress(OSError):  # a full disk, say: what went wrong first is what is raised
            self._writer.close()
        self._path.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._rows:
            fitting = max(1, self._rows * ROW_GROUP_BYTES // max(self._bytes, 1))
            self._writer.write_table(pa.concat_tables(self._tables), row_group_size=min(fitting, ROW_GROUP_ROWS))
        self._tables, self._rows, self._bytes = [], 0, 0


def _repeating(schema: pa.Schema) -> list[str]:
    """The columns in which few strings come again and again: a dictionary would only cost time in the others."""
    names = ("shard", "modality", "step", "error", "unit", "errors.list.element", "outputs.list.element")
    return [name for name in names if name.partition(".")[0] in schema.names]


def _compression(schema: pa.Schema) -> dict[str, str]:
    """zstd, but for vectors: it would take a tenth off their size and nearly double the time to read them."""
    codecs = {}
    for field in schema:
        path, kind = field.name, field.type
        while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            path, kind = f"{path}.list.element", kind.value_type
        vector = path != field.name and pa.types.is_floating(kind)
        codecs[path] = "none" if vector else "zstd"
    return codecs


def _scalars(schema: pa.Schema) -> list[str]:
    """The columns whose minimum and maximum mean something to a reader."""
    return [field.name for field in schema if not pa.types.is_nested(field.type)]


class UnitWriter:
    """One attempt at one unit: windows in, and a commit or nothing.

    A context manager that aborts unless `commit` was called. Memory: one row group of rows and one of
    failures.
    """

    def __init__(self, run: Run, unit: WorkUnit) -> None:
        self.run = run
        self.unit = unit
        self.attempt = uuid.uuid4().hex[:12]
        self._began = time.monotonic()
        self._rows = _PartFile(run.store, run.schema)
        self._failures: _PartFile | None = None
        self._tally = Tally()
        self._next = 0
        self._last = False
        self._found: tuple[InputRead, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def write(self, batch: Batch) -> Tally:
        """Take the unit's next window; what it came to.

        Raises FlowError if it is not the next one, or its outputs and failures do not add up.
        """
        begin = time.perf_counter()
        self._check_order(batch)
        settled = settle(batch, self.run.outputs, self.run.schema)
        self._rows.append(settled.rows)
        if settled.failures:
            self._failures = self._failures or _PartFile(self.run.store, FAILURE_SCHEMA)
            self._failures.append(pa.Table.from_pylist(list(settled.failures), FAILURE_SCHEMA))
        self._next, self._last, self._found = batch.index + 1, batch.last, batch.inputs_read
        tally = settled.tally + Tally(seconds={"write": time.perf_counter() - begin})
        self._tally += tally
        return tally

    def commit(self) -> UnitReport:
        """Publish what was written: the failures, then the Parquet, which is the commit, then the report.

        If another attempt was first, nothing of this one stays, and its report comes back as "kept".
        Raises FlowError if the unit is not whole or its counts do not add up.
        """
        if not self._last:
            raise FlowError(
                f"unit {self.unit.id}: expected window {self._next} or a last one, found the end. {_FUSION}"
            )
        check_conserved(self._tally, f"unit {self.unit.id}")
        report = self._report()
        record = commit_record(self.run, self.attempt, report)
        if self._failures is not None:
            name = failures_name(self.unit.id, self.attempt)
            self.run.store.replace(name, self._failures.finish({}))
        winner = self._publish(self._rows.finish({FOOTER_KEY: record}))
        if winner is not None:
            return winner
        self.run.store.replace(commit_name(self.unit.id), record)
        self.run.store.remove(failures_name(self.unit.id, FAILED))
        return report

    def abort(self) -> None:
        """Remove what was not published. Harmless after a commit, and when called again."""
        self._rows.discard()
        if self._failures is not None:
            self._failures.discard()

    def _publish(self, path: Path) -> UnitReport | None:
        """Publish the Parquet; the report of the attempt that was first, if it was another."""
        store, name = self.run.store, part_name(self.unit.id)
        if self.unit.replace:
            store.remove(commit_name(self.unit.id))  # or a kill after the next line would leave an old report
            store.replace(name, path)
            return None
        try:
            store.create(name, path)
        except FileExistsError:
            attempt, report = read_footer(self.run, self.unit.id)
            if attempt == self.attempt:  # it was this one: the store asked again after an answer was lost
                return None
            store.remove(failures_name(self.unit.id, self.attempt))
            return report
        return None

    def _report(self) -> UnitReport:
        failures = failures_name(self.unit.id, self.attempt).rpartition("/")[2]
        return UnitReport(
            unit=self.unit.id,
            status="written",
            tally=self._tally,
            wall_seconds=time.monotonic() - self._began,
            failures_file=None if self._failures is None else failures,
            inputs=found_to_json(self.unit, self._found),
            batch_plan={name: self.run.recorded.get(name) for name in BATCH_PLAN},
        )

    def _check_order(self, batch: Batch) -> None:
        if batch.unit_error is not None or batch.report is not None:
            raise FlowError(f"unit {batch.unit.id}: window {batch.index} is of a unit that is not to be written")
        if batch.unit.id != self.unit.id or batch.index != self._next or self._last:
            expected = "no more" if self._last else f"window {self._next}"
            raise FlowError(
                f"unit {self.unit.id}: expected {expected}, found window {batch.index} of unit {batch.unit.id}. "
                + _FUSION
            )


_FUSION = (
    "The steps from ReadShards to WriteParquet must stay in one fused stage: remove a Reshuffle, a grouping or "
    "resource hints on one of the steps between them"
)
