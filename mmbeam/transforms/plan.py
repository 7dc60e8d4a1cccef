"""Plan and Summarize: work units spread over the workers, and a check that each was reported."""

import json
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.pipeline import AppliedPTransform, PipelineVisitor

from mmbeam.config import FieldMap
from mmbeam.errors import FailureRateError, FlowError
from mmbeam.names import TASKS
from mmbeam.readers.listing import list_shards
from mmbeam.readers.samples import with_rows
from mmbeam.readers.units import GENERATE_UNIT_BYTES, UNIT_BYTES, plan_units
from mmbeam.runs.attempts import is_held
from mmbeam.runs.commits import Totals, report_of
from mmbeam.runs.control import check_failure_rate, clear_stop, stop_reason
from mmbeam.runs.plan import Launch, extend_plan, launch_of, repair, unit_from_line
from mmbeam.runs.run import Run, open_run
from mmbeam.runs.summary import write_summary
from mmbeam.types import RunReport, UnitReport, WorkUnit

log = logging.getLogger(__name__)

POLL_SECONDS = 5.0  # between looks at the units of other processes
SAY_SECONDS = 300.0  # between messages about them
Take = Callable[[Sequence[WorkUnit]], Iterable[UnitReport]]  # runs units in this process
LOST_SHOWN = 5  # of units that were not reported, in an error


class Plan(beam.PTransform):
    """PBegin -> PCollection[WorkUnit].

    `shards` holds patterns, which are listed when the pipeline is built, or units that are already planned. With a
    `run` the patterns are planned for it: its output is opened, and units that an earlier launch planned stay as they
    are. Large shards are cut and small ones packed only with a `run`, because a misread part can only be corrected in
    the plan of a run. This is the only shuffle before the write, and it carries only paths. With a `run` a worker reads
    the units from the plan in its output, so the description of the pipeline does not grow with them.

    Raises NoShardsError, and RunMismatchError if the output holds another run or a shard has changed.
    """

    def __init__(self, shards: str | Sequence[str] | Sequence[WorkUnit], run: Run | None = None) -> None:
        super().__init__()
        self.run = run
        self.units = _units(shards, run)
        self.launch = launch_of(self.units, run)

    def expand(self, begin: beam.Pipeline) -> beam.PCollection[WorkUnit]:
        """Apply the step."""
        return (
            begin
            | "Begin" >> beam.Impulse()  # bytes
            | "Units" >> beam.FlatMap(_lines, self.launch)  # str
            | "Spread" >> beam.Reshuffle()  # str
            | "Parse" >> beam.Map(unit_from_line)  # WorkUnit
        )

    def display_data(self) -> dict[str, Any]:
        """Return what a runner's interface shows of the step."""
        sizes = [source.shard.size or 0 for unit in self.units for source in unit.inputs if not source.begin]
        return {"units": len(self.units), "shards": len(sizes), "bytes": sum(sizes)}


def _lines(_: bytes, launch: Launch) -> Iterator[str]:
    return launch.lines()


def _units(shards: str | Sequence[str] | Sequence[WorkUnit], run: Run | None) -> list[WorkUnit]:
    mixed = [shards] if isinstance(shards, str) else list(shards)
    patterns = [item for item in mixed if isinstance(item, str)]
    units = [item for item in mixed if isinstance(item, WorkUnit)]
    if mixed and not patterns:
        return units
    reading = {} if run is None else run.configuration.get("reading", {})
    listed = with_rows(list_shards(patterns, fields=FieldMap(**reading.get("fields", {}))))
    if run is None:
        return units + plan_units(listed, units)
    open_run(run)
    clear_stop(run)
    generates = run.configuration.get("task") in TASKS
    return units + extend_plan(run, listed, unit_bytes=GENERATE_UNIT_BYTES if generates else UNIT_BYTES)


class Summarize(beam.PTransform):
    """PCollection[UnitReport] -> PCollection[RunReport] of one element: write summary.json.

    `check` is called with the report after it is written, and raises an error if the job must fail. `devices` is the
    number of devices that compute, None if unknown. Raises FlowError if a unit that a Plan step of this pipeline
    planned for the run was not reported. `take` runs units that other processes have left, if ReadShards is `shared`.
    """

    def __init__(
        self,
        run: Run,
        check: Callable[[RunReport], None] | None = None,
        devices: int | None = 1,
        take: Take | None = None,
    ) -> None:
        super().__init__()
        self.take = take
        self.run = run
        self.check = check
        self.devices = devices

    def expand(self, reports: beam.PCollection[UnitReport]) -> beam.PCollection[RunReport]:
        """Apply the step."""
        return (
            reports
            | "Sum" >> beam.CombineGlobally(Sum())  # Totals
            | "Summary"
            >> beam.Map(
                summarize,
                self.run,
                time.time(),
                self.check,
                self.devices,
                planned_in(reports.pipeline, self.run),
                self.take,
            )  # RunReport
        )


class Sum(beam.CombineFn):
    """Sums unit reports, so that no worker holds all of them."""

    def create_accumulator(self) -> Totals:
        return Totals()

    def add_input(self, accumulator: Totals, element: UnitReport) -> Totals:
        accumulator.add(element)
        return accumulator

    def merge_accumulators(self, accumulators: Iterable[Totals]) -> Totals:
        first, *others = accumulators
        for totals in others:
            first.merge(totals)
        return first

    def extract_output(self, accumulator: Totals) -> Totals:
        return accumulator


class _Launches(PipelineVisitor):
    """Collects the launches of a run that a pipeline plans."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.launches: list[Launch] = []

    def enter_composite_transform(self, transform_node: AppliedPTransform) -> None:
        plan = transform_node.transform
        if isinstance(plan, Plan) and plan.run is not None and plan.run.launch_id == self.run.launch_id:
            self.launches.append(plan.launch)


def planned_in(pipeline: beam.Pipeline, run: Run) -> tuple[Launch, ...]:
    """Return the launches of `run` that the Plan steps of `pipeline` plan."""
    visitor = _Launches(run)
    pipeline.visit(visitor)
    return tuple(visitor.launches)


def summarize(
    totals: Totals,
    run: Run,
    started: float,
    check: Callable[[RunReport], None] | None,
    devices: int | None = 1,
    launches: Sequence[Launch] = (),
    take: Take | None = None,
) -> RunReport:
    """Write and check the summary of a launch from the sum of all units; `started` is in Unix time.

    First wait for the units at which other processes are, and let `take` run those that they have left. Raises
    FlowError if a unit of `launches` has no report.
    """
    if take is not None and totals.elsewhere:
        lines = (line for launch in launches for line in launch.lines() if json.loads(line)["id"] in totals.elsewhere)
        others, totals.elsewhere = list(map(unit_from_line, lines)), set()
        for report_of_other in wait_for_others(run, others, take):
            totals.add(report_of_other)
    ids = (unit for launch in launches for unit in launch.ids())
    lost = sorted({unit for unit, was_reported in totals.reported(ids) if not was_reported})
    for unit in lost:
        totals.add(report_of(run, unit) or UnitReport(unit=unit, status="failed", error="no step reported it"))
    report = write_summary(run, repair(run, totals), time.time() - started, devices)
    if lost:
        planned = report.units_written + report.units_kept + report.units_failed
        raise FlowError(
            f"{len(lost):,} of {planned:,} planned units were not reported: {', '.join(lost[:LOST_SHOWN])}"
            f"{', ...' if len(lost) > LOST_SHOWN else ''}; a step between Plan and Summarize lost them. Let every "
            "WorkUnit, every Batch with `last`, and every UnitReport pass"
        )
    if report.units_written:
        check_failure_rate(run, report.tally)
    if check is not None:
        check(report)
    return report


def wait_for_others(run: Run, units: Sequence[WorkUnit], take: Take) -> Iterator[UnitReport]:
    """Yield the reports of units at which other processes are, as they are committed.

    `take` runs units whose attempts have ended without a commit. Raises FailureRateError if the run is stopped.
    """
    left = {unit.id: unit for unit in units}
    said = 0.0
    while left:
        if (reason := stop_reason(run)) is not None:
            raise FailureRateError(reason)
        before = len(left)
        free = []
        for unit in list(left.values()):
            report = report_of(run, unit.id)
            if report is not None:
                del left[unit.id]
                yield report
            elif not is_held(run.store, unit.id):
                free.append(unit)
        for report in take(free) if free else ():
            if report.status != "elsewhere":
                del left[report.unit]
                yield report
        if len(left) == before:
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                log.warning("%s: waiting for %d units at which other processes are", run.store, len(left))
            time.sleep(POLL_SECONDS * (0.5 + random.random()))  # random, so that two do not meet again and again
