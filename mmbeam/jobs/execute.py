"""A job from its pipe expression to its report: by a Beam runner, or by worker processes of this machine."""

import logging
import random
import re
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial, reduce
from importlib import metadata
from operator import or_

import apache_beam as beam
from apache_beam.runners.runner import PipelineResult, PipelineState

from mmbeam import errors
from mmbeam.errors import FailureRateError, FlowError, JobError, MissingModalityError, ShardError, UsageError
from mmbeam.jobs.cluster import runner_error, runner_of, workers_are_here
from mmbeam.jobs.isolate import Isolate
from mmbeam.jobs.options import IN_PROCESS, UNITS_PER_DEVICE, JobOptions, is_waited_for, pipeline_options
from mmbeam.jobs.workers import make_workers, run_unit
from mmbeam.models.placement import devices_of, lease_device, release_device
from mmbeam.names import Modality
from mmbeam.process import progress
from mmbeam.readers.units import UNIT_BYTES
from mmbeam.report.plan import Calibration, stored_bytes
from mmbeam.runs.attempts import marks
from mmbeam.runs.commits import Totals, committed, intact_reports
from mmbeam.runs.control import clear_stop, lock_run, running_here, stop_reason
from mmbeam.runs.plan import extend_plan, repair, replace_limited_run
from mmbeam.runs.rows import make_rows
from mmbeam.runs.run import Run, open_run
from mmbeam.runs.summary import confirm_summary, read_summary
from mmbeam.stages.generate import GenerateStage
from mmbeam.stages.label import LabelStage
from mmbeam.stages.synthesize import SynthesizeStage
from mmbeam.transforms.plan import Plan, Summarize, summarize, wait_for_others
from mmbeam.transforms.read import ReadFeatures, ReadShards
from mmbeam.transforms.run_stage import Embed, Generate, Label, Synthesize
from mmbeam.transforms.write import WriteParquet
from mmbeam.types import Needs, RunReport, Shard, Stage, UnitReport, WorkUnit

log = logging.getLogger(__name__)

CALIBRATION_SAMPLES = 64
OUTPUT_VERSION = 1  # version of what a row means; increasing it changes every fingerprint
PACKAGES = (  # whose version may change a value
    "mmbeam",
    "apache-beam",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pyarrow",
    "pillow",
    "simplejpeg",
    "soundfile",
    "soxr",
    "vllm",
    "diffusers",
)

# The last line of a traceback as Beam's harness decorates it.
_RAISED = re.compile(r"^([\w.]+): (.*?) \[while running '([^']*)'\]", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that is ready to run: everything that is decided before the pipeline."""

    run: Run
    stages: tuple[Stage, ...]
    units: tuple[WorkUnit, ...]
    options: JobOptions
    check: Callable[
        [RunReport], None
    ]  # called with the report of the finished run; raises an error if the job must fail
    features: bool = False  # the units are rows of features, not shards
    warnings: tuple[str, ...] = ()  # about the launch, to be repeated after the summary

    def build(self, pipeline: beam.Pipeline) -> beam.PCollection[RunReport]:
        """Apply the job's transforms to `pipeline`."""
        batches = pipeline | Plan(self.units, self.run) | self._read()  # WorkUnit, Batch
        for number, stage in enumerate(self.stages):
            step_of = {GenerateStage: Generate, LabelStage: Label, SynthesizeStage: Synthesize}.get(type(stage), Embed)
            step = step_of(stage)
            batches = batches | f"{type(step).__name__}{getattr(stage, 'name', None) or number}" >> step  # Batch
        here = workers_are_here(self.options.beam_args)
        devices = len(self._devices()) if here else None
        take = partial(_run_here, partial(replace(self, units=()).steps)) if self._shared else None
        return (
            batches | WriteParquet(self.run) | Summarize(self.run, self.check, devices, take)
        )  # UnitReport, RunReport

    def steps(self, isolate: bool = True) -> list[beam.DoFn]:
        """Return the DoFns of the fused stage, from reading to writing, for running without a runner.

        With `isolate`, a unit whose attempts ended their processes runs in a child process (jobs/isolate.py).
        """
        return [self._read(isolate).dofn, *(Embed(stage).dofn for stage in self.stages), WriteParquet(self.run).dofn]

    def execute(self) -> RunReport:
        """Run the job to its end."""
        devices = self._devices()
        with lock_run(self.run) if self.options.retry_failures or self.options.redo_changed else nullcontext():
            if self.options.workers > 1:
                return self._execute_in_processes(devices)
            return execute_pipeline(self.run, self.units, self.options.beam_args, self.build, self.check, len(devices))

    def submit(self) -> PipelineResult:
        """Submit the job to its runner without waiting for its end, even if every unit is committed.

        Raises UsageError for `retry_failures` and `redo_changed`: their lock is held by the launching process.
        """
        if self.options.retry_failures or self.options.redo_changed:
            name = "retry_failures" if self.options.retry_failures else "redo_changed"
            raise UsageError(
                f"`{name}` needs a launcher that waits for the job, because the launcher holds a lock; omit "
                "--template_location, --dry_run and --no_wait_until_finish"
            )
        clear_stop(self.run)
        pipeline = beam.Pipeline(options=pipeline_options(self.options.beam_args))
        self.build(pipeline)
        return pipeline.run()

    def _execute_in_processes(self, devices: Sequence[str]) -> RunReport:
        """Run the job in worker processes of this machine, at most one per unit that is left to do.

        Raises what a worker process raised, and JobError if one was killed; the other processes are then terminated.
        """
        progress.start(len(self.units))
        kept = intact_reports(self.run, [unit.id for unit in self.units if not unit.replace])
        left = [unit for unit in self.units if unit.id not in kept]
        if not left:
            return _finish_committed(self.run, kept.values(), self.check)
        clear_stop(self.run)
        started, totals = time.time(), Totals.of(kept.values())
        for report in kept.values():
            progress.unit_done(report)
        count = min(self.options.workers, len(left))
        steps = replace(self, units=()).steps  # the units are sent one by one
        if marks(self.run.store):  # other launches are at work: begin at another unit than they
            begin = random.randrange(len(left))
            left = left[begin:] + left[:begin]
        with make_workers(steps, devices, count, UNITS_PER_DEVICE) as workers:
            others: list[WorkUnit] = []
            by_id = {unit.id: unit for unit in left}
            for report in workers.do(left, progress.add):
                if report.status == "elsewhere":
                    others.append(by_id[report.unit])
                    continue
                progress.unit_done(report)
                totals.add(report)
            for report in wait_for_others(self.run, others, lambda units: workers.do(units, progress.add)):
                progress.unit_done(report)
                totals.add(report)
        return summarize(totals, self.run, started, self.check, devices=max(count, len(devices)))

    def calibrate(self) -> Calibration:
        """Read the first samples of the first unit and run the stages on them twice; nothing is written.

        Raises ShardError if they cannot be read.
        """
        reader = self._read(isolate=False).dofn
        unit = replace(self.units[0], limit=CALIBRATION_SAMPLES, isolation=None)
        windows = replace(self.options.windows, samples=CALIBRATION_SAMPLES)
        begin = time.perf_counter()
        [first, *others] = reader.read(unit, self.options.reading, reader.needs, windows)
        read_seconds = time.perf_counter() - begin
        if first.unit_error is not None:
            raise ShardError(first.unit_error)
        batch, load_seconds, model_seconds = first, 0.0, 0.0
        for stage in self.stages if first.samples else ():
            device = lease_device(stage.device, unit.id)
            load_seconds += device.run(stage, batch).tally.seconds["load_model"]
            done = device.run(stage, batch)
            model_seconds += done.tally.seconds["compute"] - batch.tally.seconds.get("compute", 0.0)
            batch = done
            release_device(stage.device, unit.id)
        window = make_rows(batch, self.run.outputs, self.run.schema)
        count = first.tally.samples
        is_whole = not others and count < CALIBRATION_SAMPLES
        return Calibration(
            samples=count,
            rows=window.rows.num_rows,
            stored_bytes=stored_bytes([unit]) if is_whole else first.tally.bytes_read,
            read_seconds=read_seconds * count / max(1, count + sum(other.tally.samples for other in others)),
            model_seconds=model_seconds,
            load_seconds=load_seconds,
            row_bytes=window.rows.nbytes,
            peak_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            failures=len({record["key"] for record in window.failures}),
        )

    def _read(self, isolate: bool = True) -> ReadShards | ReadFeatures:
        needs = reduce(or_, (stage.needs for stage in self.stages), Needs())
        read = ReadFeatures if self.features else ReadShards
        alone = Isolate(partial(replace(self, units=()).steps, isolate=False), self.stages[0].device)
        windows = self.options.windows.on(self.stages[0].device)
        return read(needs, self.options.reading, self.run, windows, alone if isolate else None, self._shared)

    @property
    def _shared(self) -> bool:
        """Whether several launches share the units. A runner on other machines spreads and repeats them itself."""
        return runner_of(self.options.beam_args) in (*IN_PROCESS, "fnapi")

    @property
    def devices(self) -> int:
        """The number of devices that the job uses, as far as this process knows."""
        return len(self._devices())

    def _devices(self) -> tuple[str, ...]:
        """Return the devices of this machine that the job uses.

        If the workers are on other machines, return the device's name, which each worker resolves.
        """
        device = self.stages[0].device
        return devices_of(device) if workers_are_here(self.options.beam_args) else (device,)


def _run_here(steps: Callable[[], Sequence[beam.DoFn]], units: Sequence[WorkUnit]) -> Iterator[UnitReport]:
    """Run units one after the other, and yield their reports."""
    return (run_unit(steps(), unit) for unit in units)


def plan(
    run: Run, shards: Sequence[Shard], options: JobOptions, unit_bytes: int | None = UNIT_BYTES
) -> tuple[WorkUnit, ...]:
    """Open the run and return its units, each of about `unit_bytes` of input; if that is None, one unit per shard.

    With `retry_failures` committed units that hold failures are marked, to be done again and replaced; with
    `redo_changed` those whose inputs have changed. If the run is dry, nothing is written.
    """
    replace_limited_run(run, shards)
    open_run(run, overwrite=options.overwrite)
    died = marks(run.store)  # units that may have ended processes run after the others
    planned = extend_plan(run, shards, unit_bytes=unit_bytes, redo_changed=options.redo_changed)
    units = sorted(planned, key=lambda unit: unit.id in died)
    if not options.retry_failures:
        return tuple(units)
    reports = intact_reports(run, [unit.id for unit in units])
    failed = {report.unit for report in reports.values() if report.tally.failures}
    return tuple(replace(unit, replace=unit.replace or unit.id in failed) for unit in units)


def check_present(report: RunReport, modalities: Sequence[Modality], required: Sequence[Modality]) -> None:
    """Raise MissingModalityError if no sample has any of `modalities`, or if one of `required` occurs in no sample."""
    missing = [modality for modality in modalities if not report.tally.present.get(modality)]
    none = modalities and len(missing) == len(modalities)
    if report.tally.samples and (none or set(missing) & set(required)):
        raise MissingModalityError(
            f"none of the {report.tally.samples:,} samples has {' or '.join(missing)}; the rows have nulls there"
        )


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of those of `packages` that are installed; by default of those that may change a value."""
    installed = {}
    for name in packages:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def execute_pipeline(
    run: Run,
    units: Sequence[WorkUnit],
    args: Sequence[str],
    build: Callable[[beam.Pipeline], object],
    check: Callable[[RunReport], None],
    devices: int = 1,
) -> RunReport:
    """Run the pipeline that `build` makes, unless every unit is committed, and return the run's report.

    Raises UsageError if Beam's options say not to wait for its end: `Job.submit` does that.
    """
    if not is_waited_for(args):
        raise UsageError(
            "--template_location, --dry_run, --no_wait_until_finish: there is no report to wait for; use Job.submit()"
        )
    progress.start(len(units))
    done = committed(run)
    if all(unit.id in done and not unit.replace for unit in units):
        kept = intact_reports(run, [unit.id for unit in units])
        if len(kept) == len(units):
            return _finish_committed(run, kept.values(), check)
    clear_stop(run)
    pipeline = beam.Pipeline(options=pipeline_options(args, devices))
    build(pipeline)
    with running_here(run) as raised:
        try:
            state = pipeline.run().wait_until_finish()
        except Exception as error:
            reason = stop_reason(run)
            plain = FailureRateError(reason) if reason is not None else plain_error(error, args)
            raise (raised[0] if raised else plain) from error
    if state != PipelineState.DONE:
        raise JobError(f"the pipeline ended as {state}; the runner's log says why")
    return read_summary(run)


def _finish_committed(run: Run, reports: Iterable[UnitReport], check: Callable[[RunReport], None]) -> RunReport:
    """Write and check the summary of a run in which every unit is committed already."""
    log.info("every unit is committed already")
    report = confirm_summary(run, repair(run, Totals.of(reports)))
    check(report)
    return report


def plain_error(error: Exception, args: Sequence[str] = ()) -> Exception:
    """Return the error that a step raised in another process, parsed from the traceback in a runner's message."""
    raised = _RAISED.findall(str(error))
    if not raised:
        return runner_error(error, args) or error
    name, message, step = raised[-1]
    kind = getattr(errors, name.rpartition(".")[2], None)
    if isinstance(kind, type) and issubclass(kind, JobError):
        return kind(f"{message} (step {step})" if kind is FlowError else message)
    return JobError(f"step {step}: {name}: {message} (run the same command again to resume)")
