"""A job by several worker processes of this machine: what `--workers` checks, shares out and sums up.

Each process runs the pipeline's fused stage, from reading to writing, over one unit after another, as a runner
would run it over a bundle; the model is loaded once in each.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import apache_beam as beam

from mmbeam import runs
from mmbeam.errors import UsageError
from mmbeam.jobs.cluster import runner_of
from mmbeam.jobs.launch import IN_PROCESS, UNITS_PER_DEVICE, JobOptions, confirm, is_waited_for, to_do
from mmbeam.jobs.workers import Workers
from mmbeam.models import placement
from mmbeam.process import cores, use_cores
from mmbeam.report.progress import progress
from mmbeam.runs import Run
from mmbeam.transforms.write import summarize
from mmbeam.types import RunReport, Tally, UnitReport, WorkUnit

log = logging.getLogger(__name__)

# What a runner has in the place of --workers.
_INSTEAD = {
    "flink": "--parallelism (units at once) and --sdk_worker_parallelism (processes of a TaskManager)",
    "dataflow": "--num_workers and --max_num_workers (machines)",
    "fnapi": "--direct_num_workers with --direct_running_mode",
    "portable": "its job service's own options, and --sdk_worker_parallelism",
}


@dataclass(frozen=True)
class UnitWork:
    """What a worker process does with a unit: takes it through the steps, on the process's devices and cores."""

    steps: Callable[[], Sequence[beam.DoFn]]  # made anew for each unit, since a DoFn is of one thread
    devices: tuple[str, ...]
    cores: int

    def __call__(self, unit: WorkUnit, tell: Callable[[Tally], None]) -> UnitReport:
        placement.use_devices(self.devices)
        use_cores(self.cores)
        progress.relay = tell
        return run_unit(self.steps(), unit)


def run_unit(steps: Sequence[beam.DoFn], unit: WorkUnit) -> UnitReport:
    """The report of the unit: a bundle of one element through a fused stage."""
    flow: Iterator[Any] = iter([unit])
    try:
        for step in steps:
            step.start_bundle()
            flow = chain.from_iterable(map(step.process, flow))
        report: UnitReport
        (report,) = flow
        for step in steps:
            step.finish_bundle()
    finally:
        for step in steps:
            step.teardown()
    return report


def execute_in_processes(
    run: Run,
    units: Sequence[WorkUnit],
    steps: Callable[[], Sequence[beam.DoFn]],
    check: Callable[[RunReport], None],
    devices: Sequence[str],
    count: int,
) -> RunReport:
    """Run the job to its end in `count` worker processes, or in as many as there are units to do.

    `devices` are those of this machine that compute, `steps` makes the pipeline's from reading to writing.
    Raises what a worker process raised, and JobError if one was killed; the others are ended then.
    """
    progress.start(len(units))
    left = to_do(run, units)
    if not left:
        return confirm(run, units, check)
    runs.clear_stop(run)
    started, ids = time.time(), {unit.id for unit in left}
    reports = list(runs.load_reports(run, [unit.id for unit in units if unit.id not in ids]))
    for report in reports:
        progress.unit_done(report)
    count = min(count, len(left))
    with start_workers(steps, devices, count) as workers:
        for report in workers.do(left, progress.add):
            progress.unit_done(report)
            reports.append(report)
    return summarize(reports, run, started, check, devices=max(count, len(devices)))


def start_workers(steps: Callable[[], Sequence[beam.DoFn]], devices: Sequence[str], count: int) -> Workers:
    """Worker processes, to be entered, that take units through the steps on their share of devices and cores."""
    spread, shares = share_devices(devices, count), share_cores(cores(), count)
    works = [UnitWork(steps, *each) for each in zip(spread, shares, strict=True)]
    return Workers(works, shares, at_once=UNITS_PER_DEVICE * max(map(len, spread)))


def share_cores(count: int, workers: int) -> list[int]:
    """How many cores each worker process has: as equally many as can be, and at least one."""
    return [max(1, count // workers + (number < count % workers)) for number in range(workers)]


def share_devices(devices: Sequence[str], workers: int) -> list[tuple[str, ...]]:
    """Which devices each worker process has: its part of them, or one of them where there are too few."""
    return [tuple(devices[number::workers]) or (devices[number % len(devices)],) for number in range(workers)]


def check_workers(options: JobOptions) -> None:
    """Raise UsageError for --workers that cannot be meant; warn of more than there are cores."""
    if options.workers < 1:
        raise UsageError(f"--workers {options.workers}: expected at least 1")
    if options.workers == 1:
        return
    runner = runner_of(options.beam_args)
    if runner not in IN_PROCESS:
        raise UsageError(
            f"--workers {options.workers}: these are processes of this machine, without a runner; with "
            f"--runner={runner} take {_INSTEAD.get(runner, 'its own options')}, or leave --runner out"
        )
    if any(arg.startswith("--direct_") for arg in options.beam_args):
        raise UsageError("--workers and --direct_...: Beam's options are of its own in-process runner; leave one out")
    if not is_waited_for(options.beam_args):
        raise UsageError("--workers: they end with this command, which must wait for them")
    if any(path.startswith("memory:") for path in (options.output, *options.input)):
        raise UsageError("--workers: memory:// is of one process, and no other sees it")
    if options.workers > cores():
        log.warning("--workers %d: more than the %d cores here", options.workers, cores())
