"""Units that could not be read: no Parquet, and one failure file each, which stays until the unit commits."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmbeam.readers.units import found_to_json, input_to_json
from mmbeam.runs.commits import report_of
from mmbeam.runs.rows import FAILURE_SCHEMA
from mmbeam.runs.run import Run, failures_name
from mmbeam.types import InputRead, UnitReport, WorkUnit

FAILED = "failed"  # stands in the place of the attempt for a unit that could not be read


def report_failed_unit(run: Run, unit: WorkUnit, reason: str, found: Sequence[InputRead] = ()) -> UnitReport:
    """Record that a unit cannot be read: no Parquet, and one failure file that stays until the unit commits.

    If another attempt has committed the unit, that stands, and its report comes back as "kept"; a unit
    that was to be replaced keeps the rows it has, and is reported as failed. `found` says which input it was.
    """
    kept = report_of(run, unit.id)
    if kept is not None and not unit.replace:
        return kept
    if kept is not None:
        return replace(_report(unit, reason), tally=kept.tally)
    return replace(record_failed(run, unit, reason), inputs=found_to_json(unit, found))


def record_failed(run: Run, unit: WorkUnit, reason: str) -> UnitReport:
    """Write the failure file of a unit that is not committed; its report."""
    name = failures_name(unit.id, FAILED)
    path = run.store.scratch_file(".parquet")
    pq.write_table(pa.Table.from_pylist([_record(unit, reason)], FAILURE_SCHEMA), path, compression="zstd")
    run.store.replace(name, path)
    return replace(_report(unit, reason), failures_file=name.rpartition("/")[2])


def _report(unit: WorkUnit, reason: str) -> UnitReport:
    return UnitReport(unit=unit.id, status="failed", error=reason, inputs=tuple(map(input_to_json, unit.inputs)))


def _record(unit: WorkUnit, reason: str) -> Mapping[str, Any]:
    source = unit.inputs[0]
    return {
        "key": "",
        "shard": source.shard.path,
        "offset": source.begin,
        "modality": "",
        "step": "read",
        "error": "ShardError",
        "message": reason,
        "outputs": [],
        "row": False,
        "unit": unit.id,
    }
