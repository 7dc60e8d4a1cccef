"""What the jobs that write rows share: options checked, work planned, the pipe expression, what must be found."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import apache_beam as beam

from mmbeam.clean import check_steps, compile_where, parse_image_filter
from mmbeam.errors import MissingModalityError, UsageError
from mmbeam.io import runs
from mmbeam.io.runs import Run
from mmbeam.io.units import UNIT_BYTES
from mmbeam.jobs.cluster import check_cluster, check_output
from mmbeam.jobs.launch import JobOptions, execute, is_waited_for, pipeline_options, public_args, submit
from mmbeam.stages.generate import GenerateStage
from mmbeam.transforms import Embed, Generate, Plan, ReadFeatures, ReadShards, Summarize, WriteParquet
from mmbeam.types import Modality, Needs, RunReport, Shard, Stage, WorkUnit

# What a row means. A change of it is a change of every fingerprint.
OUTPUT_VERSION = 1
UNNAMED = "model"  # what the configuration calls a model without a name


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
        needs = Needs()
        for stage in self.stages:
            needs |= stage.needs
        read = ReadFeatures if self.features else ReadShards
        batches = (
            pipeline
            | Plan(self.units)  # WorkUnit
            | read(needs, self.options.reading, self.run, self.options.windows)  # Batch
        )
        for number, stage in enumerate(self.stages):
            batches = batches | _step(stage, number)  # Batch
        return batches | WriteParquet(self.run) | Summarize(self.run, self.check)  # UnitReport, RunReport

    def execute(self) -> RunReport:
        """Run the job to its end."""
        with runs.lock(self.run) if self.options.retry_failures else nullcontext():
            return execute(self.run, self.units, self.options.beam_args, self.build, self.check)

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


def _step(stage: Stage, number: int) -> beam.PTransform:
    if isinstance(stage, GenerateStage):
        return f"Generate{number}" >> Generate(stage)
    return f"Embed{getattr(stage, 'name', None) or number}" >> Embed(stage)


def check_options(options: JobOptions) -> None:
    """Raise UsageError for what cannot be meant, JobError for a cluster that does not answer."""
    pipeline_options(options.beam_args)
    check_steps(options.reading.cleaning.text)
    for where in options.reading.cleaning.where:
        compile_where(where)
    check_output(options.output, options.beam_args, options.shared_output)
    check_cluster(options.beam_args)


def image_filter_of(options: JobOptions) -> tuple[str, float] | None:
    """The filter that the options name. Raises UsageError."""
    named = options.reading.cleaning.image_filter
    return None if named is None else parse_image_filter(named)


def recorded_of(options: JobOptions) -> dict[str, Any]:
    """What a run records of its options, beside what it knows from its stages."""
    return {"windows": asdict(options.windows), "beam_args": public_args(options.beam_args)}


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
    if report.tally.samples and (len(missing) == len(able) or set(missing) & set(required)):
        raise MissingModalityError(
            f"none of the {report.tally.samples:,} samples has {' or '.join(missing)}; the rows have nulls there"
        )
