"""What the jobs that write rows share: options checked, work planned, the pipe expression, what must be found."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from operator import or_
from typing import Any

import apache_beam as beam

from mmbeam import runs
from mmbeam.clean import parse_image_filter
from mmbeam.clean.text import check_steps
from mmbeam.clean.where import compile_where
from mmbeam.errors import MissingModalityError, UsageError
from mmbeam.jobs.cluster import check_cluster, check_ended, check_input, check_output, runner_of, workers_are_here
from mmbeam.jobs.launch import DIRECT, JobOptions, execute, is_waited_for, pipeline_options, public_args, submit
from mmbeam.jobs.local import check_workers, execute_in_processes
from mmbeam.models.placement import devices_of
from mmbeam.names import Modality
from mmbeam.readers.units import UNIT_BYTES
from mmbeam.runs import Run
from mmbeam.stages.generate import GenerateStage
from mmbeam.transforms import Embed, Generate, Plan, ReadFeatures, ReadShards, Summarize, WriteParquet
from mmbeam.types import Needs, RunReport, Shard, Stage, WorkUnit

log = logging.getLogger(__name__)

# What a row means. A change of it is a change of every fingerprint.
OUTPUT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything decided before the pipeline: what runs, where it goes, what is to be done."""

    run: Run
    stages: tuple[Stage, ...]
    units: tuple[WorkUnit, ...]
    options: JobOptions
    check: Callable[[RunReport], None]  # of the finished run: raises what makes the job fail
    features: bool = False  # whether its units are rows of features, and not shards

    def build(self, pipeline: beam.Pipeline) -> beam.PCollection[RunReport]:
        """The job's pipe expression."""
        batches = pipeline | Plan(self.units) | self._read()  # WorkUnit, Batch
        for number, stage in enumerate(self.stages):
            batches = batches | _label(stage, number) >> _step(stage)  # Batch
        here = workers_are_here(self.options.beam_args)
        summarize = Summarize(self.run, self.check, len(self._devices()) if here else None)
        return batches | WriteParquet(self.run) | summarize  # UnitReport, RunReport

    def steps(self) -> list[beam.DoFn]:
        """The same from reading to writing, which every runner fuses, for who takes units through it without one."""
        return [self._read().dofn, *(_step(stage).dofn for stage in self.stages), WriteParquet(self.run).dofn]

    def execute(self) -> RunReport:
        """Run the job to its end."""
        devices, count = self._devices(), self.options.workers
        with runs.lock(self.run) if self.options.retry_failures else nullcontext():
            if count == 1:
                return execute(self.run, self.units, self.options.beam_args, self.build, self.check, len(devices))
            steps = replace(self, units=()).steps  # the units are sent one by one
            return execute_in_processes(self.run, self.units, steps, self.check, devices, count)

    def launch(self) -> RunReport | None:
        """Run the job to its end; or, where Beam's options say that nobody waits for it, submit it: None.

        Raises UsageError for --retry-failures then: its lock is held by a launch that waits.
        """
        if is_waited_for(self.options.beam_args):
            return self.execute()
        if self.options.retry_failures:
            raise UsageError("--retry-failures holds a lock while the job runs: wait for the job's end")
        submit(self.run, self.options.beam_args, self.build)
        return None

    def _read(self) -> ReadShards | ReadFeatures:
        needs = reduce(or_, (stage.needs for stage in self.stages), Needs())
        read = ReadFeatures if self.features else ReadShards
        return read(needs, self.options.reading, self.run, self.options.windows)

    def _devices(self) -> tuple[str, ...]:
        """Those that compute; if the workers are elsewhere, of each one its own."""
        device = self.stages[0].device
        return devices_of(device) if workers_are_here(self.options.beam_args) else (device,)


def _step(stage: Stage) -> Embed | Generate:
    return Generate(stage) if isinstance(stage, GenerateStage) else Embed(stage)


def _label(stage: Stage, number: int) -> str:
    kind = "Generate" if isinstance(stage, GenerateStage) else "Embed"
    return f"{kind}{getattr(stage, 'name', None) or number}"


def check_options(options: JobOptions) -> None:
    """Raise UsageError for what cannot be meant, JobError for a cluster that does not answer."""
    pipeline_options(options.beam_args)
    if runner_of(options.beam_args) in DIRECT:
        log.warning(
            "--runner=DirectRunner: the job runs in this process (Beam's FnApiRunner); --runner=PrismRunner is Prism"
        )
    check_steps(options.reading.cleaning.text)
    for where in options.reading.cleaning.where:
        compile_where(where)
    check_workers(options)
    check_output(options.output, options.beam_args, options.shared_output)
    check_input(options.input, options.beam_args, options.shared_output)
    check_ended(options.beam_args, is_waited_for(options.beam_args))
    check_cluster(options.beam_args)


def image_filter_of(options: JobOptions) -> tuple[str, float] | None:
    """The filter that the options name. Raises UsageError."""
    named = options.reading.cleaning.image_filter
    return None if named is None else parse_image_filter(named)


def recorded_of(options: JobOptions) -> dict[str, Any]:
    """What a run records of its options, beside what it knows from its stages."""
    beam_args = public_args(options.beam_args)
    return {"windows": asdict(options.windows), "workers": options.workers, "beam_args": beam_args}


def plan(
    run: Run, shards: Sequence[Shard], options: JobOptions, unit_bytes: int | None = UNIT_BYTES
) -> tuple[WorkUnit, ...]:
    """Open the run and plan it in units of about `unit_bytes` of a shard, or one for each.

    Units that hold failures are done again if that is asked for.
    """
    runs.open_run(run, overwrite=options.overwrite)
    units = runs.extend_plan(run, shards, unit_bytes=unit_bytes)
    return tuple(_retried(run, units) if options.retry_failures else units)


def _retried(run: Run, units: Sequence[WorkUnit]) -> list[WorkUnit]:
    """The units; those that are committed and hold failures are to be done again and replaced."""
    done = runs.committed(run)
    reports = runs.load_reports(run, [unit.id for unit in units if unit.id in done])
    failed = {report.unit for report in reports if report.tally.failures}
    return [replace(unit, replace=unit.id in failed) for unit in units]


def must_find(able: Sequence[Modality], required: Sequence[Modality]) -> Callable[[RunReport], None]:
    """The check of a run: MissingModalityError if no sample has any of `able`, or none has one of `required`."""
    return partial(_check_found, able=tuple(able), required=tuple(required))


def _check_found(report: RunReport, able: Sequence[Modality], required: Sequence[Modality]) -> None:
    missing = [modality for modality in able if not report.tally.present.get(modality)]
    if report.tally.samples and ((able and len(missing) == len(able)) or set(missing) & set(required)):
        raise MissingModalityError(
            f"none of the {report.tally.samples:,} samples has {' or '.join(missing)}; the rows have nulls there"
        )
