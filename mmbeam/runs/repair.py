"""What reading has shown to be wrong with the plan: parts that were misplaced, and bad shards in packs.

A part of a giant shard that did not begin where the part before it ended (io/parts.py) holds samples that
are none, or lacks some. After the run it is withdrawn: its true beginning goes into the plan, then its
report under commits/ and its Parquet are removed. A kill between two of these steps leaves a part that is
committed and does not fit the plan; the next launch finds and withdraws it, as it does with one that a
slow attempt published later. The plan comes first, so what is withdrawn is never forgotten; the unit keeps
its name, so what is read again can never stand beside what it replaces.

How far a misplaced part truly reaches nobody knows yet, so behind it nothing is judged. The next launch
finds it out: it follows the headers, without the data, until it comes to a part that begins where it
should, and on from its end. So a second run completes every shard, however many parts were misplaced.

A shard of a pack that cannot be read gets a unit of its own, and the pack goes on without it; one that broke off
in its middle has failed the pack, which is then read without it.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain

from mmbeam.config import Limits
from mmbeam.errors import ShardError
from mmbeam.readers.parts import Part, PartRead, misplaced
from mmbeam.readers.stream import open_shard
from mmbeam.readers.tar import TarReader
from mmbeam.readers.units import found_from_json, unit_from_json, unit_id
from mmbeam.runs.commits import committed, load_reports, read_footer
from mmbeam.runs.failed import record_failed
from mmbeam.runs.plan import add_to_plan, load_plan
from mmbeam.runs.run import Run, commit_name, part_name
from mmbeam.types import InputRead, Seam, UnitReport, WorkUnit

logger = logging.getLogger(__name__)

_TRACED_AT_ONCE = 16  # shards; it is the store that is waited for


def amend(run: Run, reports: Sequence[UnitReport]) -> list[UnitReport]:
    """After a run: correct the plan by what its units have shown.

    The reports come back: of a misplaced part as failed, and one more, of a failed unit, for each bad shard.
    """
    known = {report.unit: report for report in reports}
    moved = [each for parts in _by_shard(map(_part_of, reports)) for each in misplaced(parts) if each[0].committed]
    units = [_at(_unit_of(known[part.unit]), seam) for part, seam in moved]
    packs = list(_bad_packs(run, known))
    alone = [each for _, singles in packs for each in singles]
    add_to_plan(run, [*units, *(pack for pack, _ in packs), *(unit for unit, _ in alone)])
    failed: dict[str, UnitReport] = {}
    for (part, seam), unit in zip(moved, units, strict=True):
        withdraw(run, part)
        failed[unit.id] = record_failed(run, unit, _why(part, seam))
    more = [record_failed(run, unit, reason) for unit, reason in alone]
    return [failed.get(report.unit, report) for report in reports] + more


def mend(run: Run, units: Sequence[WorkUnit]) -> list[WorkUnit]:
    """At launch: the planned units, with the true beginnings of all parts of the shards that had a misplaced one."""
    known = {each.shard.path for unit in units for each in unit.inputs if each.seam is not None}
    if not known:
        return list(units)
    parts = {unit.id: unit for unit in units if unit.inputs and unit.inputs[0].shard.path in known}
    reports = load_reports(run, parts.keys() & committed(run))
    done = {report.unit: _part_of(report) for report in reports}
    read = [done.get(unit.id) or _unread(unit) for unit in parts.values()]
    with ThreadPoolExecutor(_TRACED_AT_ONCE, thread_name_prefix="mmbeam-trace") as pool:
        found = pool.map(lambda shard: list(misplaced(shard, partial(_trace, parts))), _by_shard(read))
        moved = list(chain.from_iterable(found))
    changed = {part.unit: _at(parts[part.unit], seam) for part, seam in moved}
    new = [unit for unit in changed.values() if unit != parts[unit.id]]
    add_to_plan(run, new)
    for part, _ in moved:
        if part.committed:
            withdraw(run, part)
    return [changed.get(unit.id, unit) for unit in units]


def withdraw(run: Run, part: PartRead) -> None:
    """Remove the rows of a misplaced part, unless another attempt has read it anew since `part` was seen."""
    run.store.remove(commit_name(part.unit))  # first: it must not tell of rows that are gone
    try:
        there = _part_of(read_footer(run, part.unit)[1])
    except FileNotFoundError:
        return
    if there == part:
        run.store.remove(part_name(part.unit))


def _part_of(report: UnitReport) -> PartRead | None:
    """None if the unit is no part."""
    source = report.inputs[0] if len(report.inputs) == 1 else None
    if source is None or (not source["begin"] and source["end"] is None):
        return None
    return PartRead(
        unit=report.unit,
        shard=source["path"],
        begin=source["begin"],
        end=source["end"],
        committed=report.status != "failed",
        found=found_from_json(source),
    )


def _unread(unit: WorkUnit) -> PartRead:
    source = unit.inputs[0]
    return PartRead(
        unit=unit.id, shard=source.shard.path, begin=source.begin, end=source.end, committed=False, found=InputRead()
    )


def _by_shard(parts: Iterable[PartRead | None]) -> Iterator[list[PartRead]]:
    """The parts of each shard, in order."""
    shards: dict[str, list[PartRead]] = defaultdict(list)
    for part in filter(None, parts):
        shards[part.shard].append(part)
    for found in shards.values():
        yield sorted(found, key=lambda part: part.begin)


def _unit_of(report: UnitReport) -> WorkUnit:
    return unit_from_json({"id": report.unit, "inputs": report.inputs})


def _at(unit: WorkUnit, seam: Seam) -> WorkUnit:
    """The part, to be read from its true beginning."""
    return replace(unit, inputs=(replace(unit.inputs[0], seam=seam),))


def _why(part: PartRead, seam: Seam) -> str:
    what = f"{part.shard}: the part from byte {part.begin:,} was read from a wrong place, a tar in the tar most likely"
    where = "holds no sample" if seam.sample is None else f"begins at byte {seam.sample:,}"
    return f"{what}. It {where}; its rows were removed, and the same command again reads it"


def _trace(units: Mapping[str, WorkUnit], part: PartRead, seam: Seam) -> Seam | None:
    """Where the part ends if it begins at `seam`, found by following its headers; None if it cannot be read."""
    source = replace(units[part.unit].inputs[0], seam=seam)
    reading = Part(source)
    logger.warning(  # for it may take minutes before the job begins
        "%s: following its headers from byte %s to find where its parts begin", part.shard, seam.sample
    )
    try:
        with open_shard(source.shard, reading.origin) as stream:
            for _ in TarReader(stream, part.shard, lambda name: False, Limits(), reading):
                pass
    except ShardError as error:  # its unit will say so
        logger.warning("%s", error)
        return None
    return reading.end


def _bad_packs(run: Run, reports: Mapping[str, UnitReport]) -> Iterator[tuple[WorkUnit, list[tuple[WorkUnit, str]]]]:
    """Each pack without the shards that it could not read, and these as units of their own, with the reason.

    Not again if they were a unit of this launch, or are planned since an earlier one and no input any more.
    """
    bad = [report for report in reports.values() if any("error" in each for each in report.inputs)]
    planned = {str(unit["id"]) for unit in load_plan(run)} if bad else set()
    for report in bad:
        inputs = [
            (each, facts.get("error")) for each, facts in zip(_unit_of(report).inputs, report.inputs, strict=True)
        ]
        alone = [(WorkUnit(id=unit_id(each), inputs=(each,)), reason) for each, reason in inputs if reason is not None]
        before = reports.keys() | (planned if report.status == "kept" else set())
        new = [(unit, reason) for unit, reason in alone if unit.id not in before]
        if new:
            good = tuple(each for each, reason in inputs if reason is None)
            yield replace(_unit_of(report), inputs=good), new
