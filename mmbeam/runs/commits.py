"""Which units are committed, which have failed, and their reports.

A unit is committed once its Parquet file exists; the footer of that file holds its report. The files under commits/
are a cache of the footers, written by attempts and never by readers. A unit that could not be read has no Parquet file
and one failure file, which stays until the unit is committed.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mmbeam.errors import RunMismatchError
from mmbeam.readers.paths import is_zip
from mmbeam.readers.units import inputs_to_json
from mmbeam.runs.rows import FAILURE_SCHEMA, check_conserved
from mmbeam.runs.run import DATA, FAILURES, MEDIA, OLD_FAILURES, Run, commit_name, failures_name, part_name, part_unit
from mmbeam.runs.store import Store
from mmbeam.types import InputRead, RunReport, Tally, UnitReport, UnitStatus, WorkUnit

log = logging.getLogger(__name__)

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

    A Parquet file that has been damaged since is removed, and its unit is not committed.
    Raises RunMismatchError if its Parquet file was written for another configuration, or not by mmbeam.
    """
    size = run.store.size(part_name(unit_id))
    return None if size is None else _load_intact(run, unit_id, size)


def intact_reports(run: Run, ids: Iterable[str]) -> dict[str, UnitReport]:
    """Return the reports of the committed units among `ids`, by unit, in order.

    Damaged Parquet files are removed, as by `report_of`. It takes one listing, and one request per unit.
    """
    sizes = {part_unit(name): size for name, size in run.store.list(DATA).items()}
    done = [unit_id for unit_id in ids if unit_id in sizes]
    with ThreadPoolExecutor(max_workers=_READERS, thread_name_prefix="mmbeam-reports") as pool:
        reports = pool.map(lambda unit_id: _load_intact(run, unit_id, sizes[unit_id]), done)
        return {unit_id: report for unit_id, report in zip(done, reports, strict=True) if report is not None}


def load_reports(run: Run, ids: Iterable[str]) -> Iterator[UnitReport]:
    """Yield the reports of committed units, in the order of `ids`."""
    with ThreadPoolExecutor(max_workers=_READERS, thread_name_prefix="mmbeam-reports") as pool:
        yield from pool.map(lambda unit_id: _load(run, unit_id), ids)


def commit_record(run: Run, attempt: str, report: UnitReport, size: int | None = None) -> bytes:
    """Return the JSON that a footer and its cache under commits/ hold. The cache has the `size` of the Parquet file."""
    record = {"fingerprint": run.fingerprint, "attempt": attempt, "report": report.to_json()}
    return json.dumps(record if size is None else {**record, "bytes": size}).encode()


def read_footer(run: Run, unit_id: str) -> tuple[str, UnitReport]:
    """Return the attempt that published the unit's Parquet file, and its report with the status "kept".

    Raises RunMismatchError if it was written for another configuration, or not by mmbeam, and DamagedPartError if it
    is not a whole Parquet file.
    """
    name = part_name(unit_id)
    tail = run.store.tail(name, FOOTER_BYTES)
    needed = int.from_bytes(tail[-_ENDING_BYTES:-4], "little") + _ENDING_BYTES
    if needed > len(tail):
        tail = run.store.tail(name, needed)
    where = f"{run.store}/{name}: expected a Parquet file written by mmbeam, found"
    again = "Remove the file and run the same command again to write it anew"
    try:
        metadata = pq.read_metadata(pa.BufferReader(tail)).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise DamagedPartError(f"{where} one that is cut off or damaged ({error}). {again}") from error
    try:
        return _parse(run, json.loads(metadata[FOOTER_KEY.encode()]))
    except (KeyError, ValueError) as error:
        raise RunMismatchError(f"{where} one without its footer ({error!r}). {again}") from error


class DamagedPartError(RunMismatchError):
    """The Parquet file of a committed unit is cut off or damaged."""


def _load_intact(run: Run, unit_id: str, size: int) -> UnitReport | None:
    """Return the report of a unit whose Parquet file has this size; remove a file that is not whole, or lacks media."""
    problem: str | None = None
    try:
        record = json.loads(run.store.read(commit_name(unit_id)))
        report = _parse(run, record)[1]
        written = record.get("bytes")
    except (FileNotFoundError, KeyError, ValueError, TypeError):
        written = None
    if written != size:
        try:  # published by an attempt that ended before it wrote the record, or by mmbeam 0.1
            report = read_footer(run, unit_id)[1]
            problem = None if written is None else f"expected {written:,} bytes, found {size:,}"
        except DamagedPartError as error:
            problem = str(error.__cause__)
    if problem is None and report.media_file is not None:
        media_bytes = run.store.size(f"{MEDIA}/{report.media_file}")
        if media_bytes != report.media_bytes:
            state = "no file" if media_bytes is None else f"{media_bytes:,} bytes"
            problem = f"{MEDIA}/{report.media_file}: expected {report.media_bytes:,} bytes, found {state}"
    if problem is None:
        return report
    log.warning("%s/%s: damaged since its commit (%s); its unit runs again", run.store, part_name(unit_id), problem)
    run.store.remove(commit_name(unit_id))  # first: it must not describe rows that are gone
    run.store.remove(part_name(unit_id))
    return None


def read_failures(store: Store, name: str) -> list[dict[str, Any]]:
    """Return the records of a failure file; none, with a warning, if the file is not one of mmbeam's."""
    path = f"{FAILURES}/{name}"
    try:
        try:
            content = store.read(path)
        except FileNotFoundError:
            path = f"{OLD_FAILURES}/{name}"
            content = store.read(path)
        table = pq.read_table(pa.BufferReader(content))
        records: list[dict[str, Any]] = table.select(FAILURE_SCHEMA.names).to_pylist()
        return records
    except FileNotFoundError:  # swept meanwhile
        return []
    except (pa.ArrowException, KeyError, OSError) as error:
        log.warning("%s/%s: expected failure records of mmbeam, found something else (%s); ignored", store, path, error)
        return []


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


# The reports of all units, summed


class Part(NamedTuple):
    """A committed unit that read a part of a tar or a zip archive."""

    unit: str
    source: Mapping[str, Any]  # its input, as the report describes it


@dataclass(slots=True)
class Sums:
    """Additive results of committed units."""

    tally: Tally = field(default_factory=Tally)
    written: Tally = field(default_factory=Tally)  # of the units that this launch wrote
    units_written: int = 0
    units_kept: int = 0
    broken: list[str] = field(default_factory=list)  # why, for each shard that breaks off

    def add(self, sums: "Sums") -> None:
        """Add the results of other units."""
        self.tally += sums.tally
        self.written += sums.written
        self.units_written += sums.units_written
        self.units_kept += sums.units_kept
        self.broken += sums.broken


@dataclass(slots=True)
class Totals:
    """The sum of unit reports, in any order and grouping, with what `plan.repair` and `sweep` need of each.

    A unit takes 24 bytes. Parts of shards, failed units, and packs with an unreadable shard take more.
    """

    sums: Sums = field(default_factory=Sums)  # of all units but the parts
    parts: dict[str, tuple[Sums, list[Part]]] = field(default_factory=dict)  # by path of the shard
    failed: dict[str, UnitReport] = field(default_factory=dict)
    elsewhere: set[str] = field(default_factory=set)  # units at which other processes are
    packs: list[UnitReport] = field(default_factory=list)  # with an unreadable shard
    committed: bytearray = field(default_factory=bytearray)  # digests of the units, one after the other
    written: bytearray = field(default_factory=bytearray)  # digests of those that this launch wrote
    files: bytearray = field(default_factory=bytearray)  # digests of the names of their failure and media files

    @classmethod
    def of(cls, reports: Iterable[UnitReport]) -> Self:
        """Return the sum of reports. Raises FlowError if the counts of a unit are inconsistent."""
        totals = cls()
        for report in reports:
            totals.add(report)
        return totals

    def add(self, report: UnitReport) -> None:
        """Add a unit. Raises FlowError if its counts are inconsistent."""
        if report.status == "elsewhere":
            self.elsewhere.add(report.unit)
            return
        check_conserved(report.tally, f"unit {report.unit}")
        if any("error" in source for source in report.inputs):
            self.packs.append(replace(report, tally=Tally()))
        if report.status == "failed":
            self.failed[report.unit] = replace(report, inputs=())
            return
        is_written = report.status == "written"
        self.committed += _digest(report.unit)
        if is_written:
            self.written += _digest(report.unit)
        for name in (report.failures_file, report.media_file):
            if name is not None:
                self.files += _digest(name)
        sums = self.sums
        if len(report.inputs) == 1 and _is_part(report.inputs[0]):
            sums, parts = self.parts.setdefault(report.inputs[0]["path"], (Sums(), []))
            parts.append(Part(report.unit, report.inputs[0]))
        sums.add(
            Sums(
                tally=report.tally,
                written=report.tally if is_written else Tally(),
                units_written=int(is_written),
                units_kept=int(not is_written),
                broken=list(broken_shards([report])),
            )
        )

    def merge(self, totals: "Totals") -> None:
        """Add the units of another sum."""
        self.sums.add(totals.sums)
        for path, (sums, parts) in totals.parts.items():
            known_sums, known_parts = self.parts.setdefault(path, (Sums(), []))
            known_sums.add(sums)
            known_parts += parts
        self.failed |= totals.failed
        self.elsewhere |= totals.elsewhere
        self.packs += totals.packs
        self.committed += totals.committed
        self.written += totals.written
        self.files += totals.files

    def reported(self, ids: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """Yield each of `ids` and whether its unit was reported."""
        others = b"".join(map(_digest, [*self.failed, *self.elsewhere]))
        known = np.concatenate([_digests(self.committed), _digests(others)])
        yield from _contained(ids, known)

    def have_committed(self, ids: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """Yield each of `ids` and whether its unit was reported as committed."""
        yield from _contained(ids, _digests(self.committed))

    def name_files(self, names: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """Yield the name of each failure or media file and whether a committed unit names it."""
        yield from _contained(names, _digests(self.files))

    def counted_once(self, run: Run) -> "Totals":
        """Return the sum with each unit counted once, also one that several steps reported.

        The reports of such a sum are read again, one by one. A unit that is committed has not failed.
        """
        units = np.unique(_digests(self.committed))
        failed = {unit: self.failed[unit] for unit, done in _contained(self.failed, units) if not done}
        if len(units) == len(_digests(self.committed)):
            return replace(self, failed=failed)
        again = [unit for unit, was_reported in _contained(sorted(committed(run)), units) if was_reported]
        status: dict[str, UnitStatus] = {
            unit: "written" if new else "kept" for unit, new in _contained(again, _digests(self.written))
        }
        reports = (replace(report, status=status[report.unit]) for unit in again if (report := report_of(run, unit)))
        return Totals.of([*reports, *failed.values()])

    def report(self, wall_seconds: float, devices: int | None = 1) -> RunReport:
        """Return the report of the run.

        `wall_seconds` and `devices` belong to this launch: rate and model utilisation count only what it wrote.
        `devices` is None if only the runner knows the number of workers.
        """
        sums = Sums()
        for some in (self.sums, *(of_parts for of_parts, _ in self.parts.values())):
            sums.add(some)
        computed = sums.written.seconds.get("compute", 0.0)
        failed = [report.tally for report in self.failed.values()]  # of units to be replaced, which keep their rows
        return RunReport(
            units_written=sums.units_written,
            units_kept=sums.units_kept,
            units_failed=len(self.failed),
            tally=sum(failed, sums.tally),
            wall_seconds=wall_seconds,
            rate=sums.written.samples / wall_seconds if wall_seconds else 0.0,
            model_utilisation=None if devices is None else computed / (wall_seconds * devices) if wall_seconds else 0.0,
            failed={unit: report.error or "" for unit, report in sorted(self.failed.items())},
            broken=tuple(sums.broken),
        )


def broken_shards(reports: Iterable[UnitReport]) -> tuple[str, ...]:
    """Return why, for each shard of a committed unit that breaks off."""
    done = (report for report in reports if report.status != "failed")
    return tuple(str(source["broken"]) for report in done for source in report.inputs if source.get("broken"))


def _is_part(source: Mapping[str, Any]) -> bool:
    """Return whether an input is a part that may have been read from the wrong byte. Rows of a table cannot be."""
    is_archive = source["path"].lower().endswith(".tar") or is_zip(source["path"])
    return bool(is_archive and (source["begin"] > 0 or source["end"] is not None))


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def _digests(joined: bytes | bytearray) -> npt.NDArray[np.uint64]:
    return np.frombuffer(bytes(joined), np.uint64)


def _contained(names: Iterable[str], digests: npt.NDArray[np.uint64]) -> Iterator[tuple[str, bool]]:
    """Yield each name and whether its digest is among `digests`."""
    remaining = iter(names)
    while some := list(islice(remaining, 65_536)):
        yield from zip(some, np.isin(_digests(b"".join(map(_digest, some))), digests).tolist(), strict=True)
