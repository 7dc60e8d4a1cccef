"""The Parquet file of a unit: built in scratch, then published whole, after its failures and media."""

import io
import json
import tarfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from mmbeam.config import MIB
from mmbeam.errors import FlowError
from mmbeam.names import MEDIA_COLUMN, MEDIA_CONTENT, MEDIA_SHARD
from mmbeam.readers.stream import content_digest
from mmbeam.readers.units import inputs_to_json
from mmbeam.runs.commits import FAILED, FOOTER_KEY, commit_record, read_footer
from mmbeam.runs.rows import FAILURE_SCHEMA, check_conserved, make_rows
from mmbeam.runs.run import Run, commit_name, failures_name, media_name, part_name
from mmbeam.runs.store import Store
from mmbeam.types import Batch, InputRead, Tally, UnitReport, WorkUnit

# A writer holds one row group in memory, and a reader fetches one at a time. 16 MiB is 8,000 vectors of 512 floats:
# large enough for a scan of object storage, small enough for many units in flight.
ROW_GROUP_BYTES = 16 * MIB
ROW_GROUP_ROWS = 65_536  # limit for small rows: readers plan and skip by row group
BATCH_PLAN = ("device", "batch_size", "windows")  # recorded facts of a run that change the last digits of a vector


_FUSION = (
    "The steps from ReadShards to WriteParquet must stay in one fused stage: remove a Reshuffle, a grouping or "
    "resource hints on one of the steps between them"
)


class _PartFile:
    """A Parquet file under construction in scratch, with one row group in memory."""

    def __init__(self, store: Store, schema: pa.Schema) -> None:
        self._path = store.scratch_file(".parquet")
        self._writer = pq.ParquetWriter(
            self._path,
            schema,
            compression=_compression(schema),
            use_dictionary=_repeating(schema),
            # Readers cannot use the statistics of nested columns.
            write_statistics=[field.name for field in schema if not pa.types.is_nested(field.type)],
        )
        self._tables: list[pa.Table] = []
        self._rows = self._bytes = 0

    def append(self, table: pa.Table) -> None:
        """Add rows; write a row group if enough have accumulated."""
        self._tables.append(table)
        self._rows += table.num_rows
        self._bytes += table.nbytes
        if self._bytes >= ROW_GROUP_BYTES or self._rows >= ROW_GROUP_ROWS:
            self._flush()

    def finish(self, metadata: Mapping[str, bytes]) -> Path:
        """Close the file with `metadata` in its footer, and return its path in scratch."""
        self._flush()
        self._writer.add_key_value_metadata(metadata)
        self._writer.close()
        return self._path

    def discard(self) -> None:
        """Remove the file unless it has been published."""
        self._tables = []
        with suppress(OSError):  # a full disk, for example: the first error is the one to raise
            self._writer.close()
        self._path.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._rows:
            fitting = max(1, self._rows * ROW_GROUP_BYTES // max(self._bytes, 1))
            self._writer.write_table(pa.concat_tables(self._tables), row_group_size=min(fitting, ROW_GROUP_ROWS))
        self._tables, self._rows, self._bytes = [], 0, 0


class _MediaFile:
    """A WebDataset shard of generated files under construction in scratch. Equal rows give equal bytes."""

    def __init__(self, store: Store) -> None:
        self._path = store.scratch_file(".tar")
        self._tar = tarfile.open(self._path, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115

    def append(self, rows: pa.Table, contents: Mapping[str, bytes]) -> None:
        """Add the file of each row that has one, its prompt, and JSON that says of what and how it was made."""
        kept = [name for name in rows.column_names if name in ("key", "shard", "offset") or name.startswith("media_")]
        for row in rows.select([MEDIA_COLUMN, *kept]).to_pylist():
            name = row.pop(MEDIA_COLUMN)
            if name is None:
                continue
            del row[MEDIA_SHARD]  # its name differs between attempts
            stem = name.rpartition(".")[0]
            prompt = row["media_prompt"].encode()
            for member, content in (
                (name, contents[name]),
                (f"{stem}.txt", prompt),
                (f"{stem}.json", json.dumps(row, ensure_ascii=False).encode()),
            ):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                self._tar.addfile(info, io.BytesIO(content))

    def finish(self) -> Path:
        """Close the file, and return its path in scratch."""
        self._tar.close()
        return self._path

    def discard(self) -> None:
        """Remove the file unless it has been published."""
        with suppress(OSError):
            self._tar.close()
        self._path.unlink(missing_ok=True)


def _repeating(schema: pa.Schema) -> list[str]:
    """Return the columns whose strings repeat. A dictionary for the others would only take time."""
    names = (
        "shard",
        "modality",
        "step",
        "error",
        "unit",
        "errors.list.element",
        "outputs.list.element",
        MEDIA_SHARD,
        "media_model",
    )
    return [name for name in names if name.partition(".")[0] in schema.names]


def _compression(schema: pa.Schema) -> dict[str, str]:
    """Return zstd for all columns but vectors, which it makes 10% smaller and nearly twice as slow to read."""
    codecs = {}
    for field in schema:
        path, kind = field.name, field.type
        while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            path, kind = f"{path}.list.element", kind.value_type
        vector = path != field.name and pa.types.is_floating(kind)
        codecs[path] = "none" if vector else "zstd"
    return codecs


class UnitWriter:
    """One attempt at a unit: takes its windows, and commits all of them or none.

    A context manager that aborts unless `commit` was called. It holds one row group of rows and one of failures.
    """

    def __init__(self, run: Run, unit: WorkUnit) -> None:
        self.run = run
        self.unit = unit
        self.attempt = uuid.uuid4().hex[:12]
        self._started = time.monotonic()
        self._rows = _PartFile(run.store, run.schema)
        self._failures: _PartFile | None = None
        self._media: _MediaFile | None = None
        self._tally = Tally()
        self._next = 0  # index of the next window
        self._last = False
        self._inputs_read: tuple[InputRead, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def write(self, batch: Batch) -> Tally:
        """Add the unit's next window, and return its complete tally.

        Raises FlowError if it is not the next one, or its outputs and failures are inconsistent.
        """
        begin = time.perf_counter()
        if batch.unit_error is not None or batch.report is not None:
            raise FlowError(f"unit {batch.unit.id}: window {batch.index} belongs to a unit without rows")
        if batch.unit.id != self.unit.id or batch.index != self._next or self._last:
            expected = "no more" if self._last else f"window {self._next}"
            raise FlowError(
                f"unit {self.unit.id}: expected {expected}, found window {batch.index} of unit {batch.unit.id}. "
                + _FUSION
            )
        names = batch.features.get(MEDIA_COLUMN)
        if names is not None and MEDIA_CONTENT in batch.features:
            shard = media_name(self.unit.id, self.attempt).rpartition("/")[2]
            shards = pa.array([None if name is None else shard for name in names.to_pylist()], pa.string())
            batch = replace(batch, features={**batch.features, MEDIA_SHARD: shards})
        window = make_rows(batch, self.run.outputs, self.run.schema)
        if names is not None and MEDIA_CONTENT in batch.features:
            self._media = self._media or _MediaFile(self.run.store)
            contents = dict(zip(names.to_pylist(), batch.features[MEDIA_CONTENT].to_pylist(), strict=True))
            self._media.append(window.rows, contents)
        self._rows.append(window.rows)
        if window.failures:
            self._failures = self._failures or _PartFile(self.run.store, FAILURE_SCHEMA)
            self._failures.append(pa.Table.from_pylist(list(window.failures), FAILURE_SCHEMA))
        self._next, self._last, self._inputs_read = batch.index + 1, batch.last, batch.inputs_read
        tally = window.tally + Tally(seconds={"write": time.perf_counter() - begin})
        self._tally += tally
        return tally

    def commit(self) -> UnitReport:
        """Publish the failures and the media, then the Parquet file, which is the commit, then the cached report.

        If another attempt was first, this one is removed, and the report of the other is returned as "kept".
        Raises FlowError if the last window is missing or the counts are inconsistent.
        """
        if not self._last:
            raise FlowError(
                f"unit {self.unit.id}: expected window {self._next}, found the end of the bundle. {_FUSION}"
            )
        check_conserved(self._tally, f"unit {self.unit.id}")
        failures = failures_name(self.unit.id, self.attempt)
        media = media_name(self.unit.id, self.attempt)
        media_path = None if self._media is None else self._media.finish()
        report = UnitReport(
            unit=self.unit.id,
            status="written",
            tally=self._tally,
            wall_seconds=time.monotonic() - self._started,
            failures_file=None if self._failures is None else failures.rpartition("/")[2],
            media_file=None if media_path is None else media.rpartition("/")[2],
            media_bytes=None if media_path is None else media_path.stat().st_size,
            inputs=self._inputs(),
            batch_plan={name: self.run.recorded.get(name) for name in BATCH_PLAN},
        )
        record = commit_record(self.run, self.attempt, report)
        if self._failures is not None:
            self.run.store.replace(failures, self._failures.finish({}))
        if media_path is not None:
            with suppress(FileExistsError):  # the store repeated a request: no other attempt has this name
                self.run.store.create(media, media_path)
        path = self._rows.finish({FOOTER_KEY: record})
        size = path.stat().st_size
        winner = self._publish(path)
        if winner is not None:
            self.run.store.remove(media)
            return winner
        record = commit_record(self.run, self.attempt, report, size)
        self.run.store.replace(commit_name(self.unit.id), record)
        self.run.store.remove(failures_name(self.unit.id, FAILED))
        return report

    def abort(self) -> None:
        """Remove what was not published. It has no effect after a commit or an earlier call."""
        self._rows.discard()
        if self._failures is not None:
            self._failures.discard()
        if self._media is not None:
            self._media.discard()

    def _inputs(self) -> tuple[dict[str, Any], ...]:
        """Return the unit's inputs as the footer describes them, with digests of files of this machine.

        With the digest a later launch recognises a file whose time alone has changed. A file of which little was read
        has none: it would take longer to read the rest.
        """
        described = inputs_to_json(self.unit, self._inputs_read)
        if self._tally.bytes_read * 2 < sum(
            source.shard.size or 0 for source in self.unit.inputs if not source.is_part
        ):
            return described
        digests = map(content_digest, self.unit.inputs)
        return tuple(
            facts if digest is None else {**facts, "digest": digest}
            for facts, digest in zip(described, digests, strict=False)  # inputs that were not reached have no facts
        )

    def _publish(self, path: Path) -> UnitReport | None:
        """Publish the Parquet file. Return the report of another attempt if that was first."""
        store, name = self.run.store, part_name(self.unit.id)
        if self.unit.replace:
            store.remove(commit_name(self.unit.id))  # a kill after the next line would leave an old report
            store.replace(name, path)
            return None
        try:
            store.create(name, path)
        except FileExistsError:
            attempt, report = read_footer(self.run, self.unit.id)
            if attempt == self.attempt:  # this attempt: the store repeated a request whose answer was lost
                return None
            store.remove(failures_name(self.unit.id, self.attempt))
            return report
        return None
