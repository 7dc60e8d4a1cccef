"""Which units are committed, which have failed, and their reports.

A unit is committed once its Parquet file exists; the footer of that file holds its report. The files under commits/
are a cache of the footers, written by attempts and never by readers. A unit that could not be read has no Parquet file
and one failure file, which stays until the unit is committed.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmbeam.errors import RunMismatchError
from mmbeam.readers.units import inputs_to_json
from mmbeam.runs.rows import FAILURE_SCHEMA
from mmbeam.runs.run import DATA, Run, commit_name, failures_name, part_name, part_unit
from mmbeam.types import InputRead, UnitReport, WorkUnit

FOOTER_KEY = "mmbeam"  # in the Parquet key-value metadata: a JSON object of fingerprint, attempt and report
FOOTER_BYTES = 1 << 16  # requested from the end of a Parquet file: a footer of about ten row groups
FAILED = "failed"  # used instead of an attempt in the name of the failure file of a unit that could not be read
_ENDING_BYTES = 8  # of every Parquet file: the footer's length in four bytes, and "PAR1"
_READERS = 16  # threads that load reports; they wait for the store, not for a core


def committed(run: Run) -> set[str]:
    """Return the ids of the units whose rows are published. It takes one listing."""
    return {unit for name in run.store.list(DATA) if (unit := part_unit(name)) is not None}


def report_of(run: Run, unit_id: str) -> UnitReport | None:
    """Return the report of a committed unit, with the status "kept"; None if it is not committed.

    Raises RunMismatchError if its Parquet file was written for another configuration, or not by mmbeam.
    """
    return _load(run, unit_id) if run.store.exists(part_name(unit_id)) else None


def load_reports(run: Run, ids: Iterable[str]) -> Iterator[UnitReport]:
    """Yield the reports of committed units, in the order of `ids`."""
    with ThreadPoolExecutor(max_workers=_READERS, thread_name_prefix="mmbeam-reports") as pool:
        yield from pool.map(lambda unit_id: _load(run, unit_id), ids)


def commit_record(run: Run, attempt: str, report: UnitReport) -> bytes:
    """Return the JSON that a footer and its cache under commits/ hold."""
    return json.dumps({"fingerprint": run.fingerprint, "attempt": attempt, "report": report.to_json()}).encode()


def read_footer(run: Run, unit_id: str) -> tuple[str, UnitReport]:
    """Return the attempt that published the unit's Parquet file, and its report with the status "kept".

    Raises RunMismatchError if it was written for another configuration, or not by mmbeam.
    """
    name = part_name(unit_id)
    tail = run.store.tail(name, FOOTER_BYTES)
    needed = int.from_bytes(tail[-_ENDING_BYTES:-4], "little") + _ENDING_BYTES
    if needed > len(tail):
        tail = run.store.tail(name, needed)
    try:
        return _parse(run, json.loads((pq.read_metadata(pa.BufferReader(tail)).metadata or {})[FOOTER_KEY.encode()]))
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise RunMismatchError(
            f"{run.store}/{name}: expected a Parquet file written by mmbeam, found one without its footer ({error!r}). "
            f"Remove the file and run the same command again to write it anew"
        ) from error


def _load(run: Run, unit_id: str) -> UnitReport:
    try:
        return _parse(run, json.loads(run.store.read(commit_name(unit_id))))[1]
    except (FileNotFoundError, KeyError, ValueError, TypeError):
        return read_footer(run, unit_id)[1]


def _parse(run: Run, record: Mapping[str, Any]) -> tuple[str, UnitReport]:
    report = UnitReport.from_json(record["report"])
    if record["fingerprint"] != run.fingerprint:
        raise RunMismatchError(
            f"{run.store}/{part_name(report.unit)}: expected rows of configuration {run.fingerprint}, found those of "
            f"{record['fingerprint']}. Choose another `output`, or use `overwrite` to start over"
        )
    return str(record["attempt"]), replace(report, status="kept")


def report_failed_unit(run: Run, unit: WorkUnit, reason: str, inputs_read: Sequence[InputRead] = ()) -> UnitReport:
    """Record in a failure file that a unit could not be read, and return its report.

    If another attempt has committed the unit, its report is returned as "kept" and nothing is written. A unit to be
    replaced keeps its rows, and is reported as failed with their tally.
    """
    kept = report_of(run, unit.id)
    if kept is not None and not unit.replace:
        return kept
    report = UnitReport(unit=unit.id, status="failed", error=reason, inputs=inputs_to_json(unit, inputs_read))
    if kept is not None:
        return replace(report, tally=kept.tally)
    record = {
        "key": "",
        "shard": unit.inputs[0].shard.path,
        "offset": unit.inputs[0].begin,
        "modality": "",
        "step": "read",
        "error": "ShardError",
        "message": reason,
        "outputs": [],
        "row": False,
        "unit": unit.id,
    }
    path, name = run.store.scratch_file(".parquet"), failures_name(unit.id, FAILED)
    pq.write_table(pa.Table.from_pylist([record], FAILURE_SCHEMA), path, compression="zstd")
    run.store.replace(name, path)
    return replace(report, failures_file=name.rpartition("/")[2])
