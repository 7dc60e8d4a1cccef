"""What is committed: a unit is, once its Parquet is there, and the footer of that file says what it holds.

The files under commits/ only save reading footers. They are written by who commits, never by who reads.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmbeam.errors import RunMismatchError
from mmbeam.runs.run import DATA, PART, Run, commit_name, part_name
from mmbeam.types import UnitReport

FOOTER_KEY = "mmbeam"  # of the Parquet's key-value metadata: a JSON object of fingerprint, attempt and report
FOOTER_BYTES = 1 << 16  # asked for at the end of a Parquet: the footer of some ten row groups and what follows it
_ENDING_BYTES = 8  # of every Parquet: the footer's length in four bytes, and "PAR1"
_READERS = 16  # threads that load reports; they wait for the store, not for a core


def committed(run: Run) -> set[str]:
    """Ids of the units whose rows are published; one listing."""
    return {found[1] for name in run.store.list(DATA) if (found := PART.fullmatch(name))}


def report_of(run: Run, unit_id: str) -> UnitReport | None:
    """The report of a committed unit, status "kept"; None if it is not committed.

    Raises RunMismatchError if its Parquet was written by another configuration's run, or not by mmbeam.
    """
    return _load(run, unit_id) if run.store.exists(part_name(unit_id)) else None


def load_reports(run: Run, ids: Iterable[str]) -> Iterator[UnitReport]:
    """The reports of committed units, in the order of `ids`."""
    with ThreadPoolExecutor(max_workers=_READERS, thread_name_prefix="mmbeam-reports") as pool:
        yield from pool.map(lambda unit_id: _load(run, unit_id), ids)


def commit_record(run: Run, attempt: str, report: UnitReport) -> bytes:
    """The JSON that a footer and its cache under commits/ hold."""
    return json.dumps({"fingerprint": run.fingerprint, "attempt": attempt, "report": report.to_json()}).encode()


def read_footer(run: Run, unit_id: str) -> tuple[str, UnitReport]:
    """The attempt that published the unit's Parquet, and its report, status "kept".

    Raises RunMismatchError if it was written by another configuration's run, or not by mmbeam.
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
            f"{run.store}/{name}: expected a Parquet that mmbeam wrote, found one without its footer ({error!r}). "
            f"Remove it, and the same command again writes it anew"
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
            f"{record['fingerprint']}. Choose another --output, or give --overwrite to start over"
        )
    return str(record["attempt"]), replace(report, status="kept")
