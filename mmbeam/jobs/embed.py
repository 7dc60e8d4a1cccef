"""The embed job: shards in, one row of vectors per sample out."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

import apache_beam as beam

from mmbeam.clean import check_steps, compile_where, parse_image_filter
from mmbeam.config import ModelRef
from mmbeam.errors import MissingModalityError, UsageError
from mmbeam.io import runs
from mmbeam.io.runs import Run
from mmbeam.io.shards import limited_unit, list_shards
from mmbeam.jobs.launch import JobOptions, check_modalities, device_of, execute, versions
from mmbeam.models.encoders import describe
from mmbeam.models.loading import Resolved, digest, dtype_name, resolve
from mmbeam.report.inspect import probe
from mmbeam.stages.embed import EmbedStage, asked_modalities
from mmbeam.transforms import Embed, Plan, ReadShards, Summarize, WriteParquet
from mmbeam.types import Modality, Needs, RunReport, WorkUnit

# What a row means. A change of it is a change of every fingerprint.
OUTPUT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(JobOptions):
    """The embed job, as the command line or a program asks for it."""

    models: tuple[ModelRef, ...]
    modalities: tuple[Modality, ...] | None = None  # None: all that the models encode
    tokens: bool = False  # keep the sequence of token or patch features too
    vector_type: str = "float32"  # of a stored number; "float16" halves the files


@dataclass(frozen=True, kw_only=True)
class EmbedJob:
    """Everything decided before the pipeline: what runs, where it goes, what is to be done."""

    run: Run
    stages: tuple[EmbedStage, ...]
    units: tuple[WorkUnit, ...]
    options: EmbedOptions

    def build(self, pipeline: beam.Pipeline) -> beam.PCollection[RunReport]:
        """The job's pipe expression."""
        needs = Needs()
        for stage in self.stages:
            needs |= stage.needs
        batches = (
            pipeline
            | Plan(self.units)  # WorkUnit
            | ReadShards(needs, self.options.reading, self.run, self.options.windows)  # Batch
        )
        for number, stage in enumerate(self.stages):
            batches = batches | f"Embed{stage.name or number}" >> Embed(stage)  # Batch
        return batches | WriteParquet(self.run) | Summarize(self.run, self.check)  # UnitReport, RunReport

    @property
    def check(self) -> Callable[[RunReport], None]:
        """Raises MissingModalityError for a report in which what was asked for is nowhere."""
        able = tuple(modality for stage in self.stages for modality in stage.modalities)
        return partial(_check_found, able=able, asked=self.options.modalities is not None)


def embed(options: EmbedOptions) -> RunReport:
    """Run the embed job to its end.

    Raises UsageError, NoShardsError, ModelError, RunMismatchError, MissingModalityError or DeviceError
    before anything is written, FailureRateError or DeviceError while it runs.
    """
    job = prepare(options)
    with runs.lock(job.run) if options.retry_failures else nullcontext():
        return execute(job.run, job.units, options.beam_args, job.build, job.check)


def prepare(options: EmbedOptions) -> EmbedJob:
    """Check everything that can be checked without a model's weights, and plan the work."""
    check_steps(options.reading.cleaning.text)
    for where in options.reading.cleaning.where:
        compile_where(where)
    stages, resolved = _stages(options)
    shards = list_shards(options.input)
    able = [m for stage in stages for m in stage.modalities]
    found = probe(shards, options.reading.fields, options.reading.limits)
    check_modalities(found, able, asked=options.modalities is not None)
    run = _run(options, stages, resolved)
    runs.open_run(run, overwrite=options.overwrite)
    units = runs.extend_plan(run, shards) if options.limit is None else [limited_unit(shards, options.limit)]
    if options.retry_failures:
        units = [_retried(run, unit) for unit in units]
    return EmbedJob(run=run, stages=stages, units=tuple(units), options=options)


def _stages(options: EmbedOptions) -> tuple[tuple[EmbedStage, ...], list[Resolved]]:
    names = [ref.name for ref in options.models]
    if len(set(names)) < len(names):
        raise UsageError("several models need different names: --model clip=DIR --model clap=DIR")
    resolved = [resolve(ref.model) for ref in options.models]
    text_filter = options.reading.cleaning.image_filter
    stages: list[EmbedStage] = []
    for ref, found in zip(options.models, resolved, strict=True):
        spec = describe(found.directory)
        modalities = asked_modalities(spec, options.modalities)
        if not modalities:
            asked = ", ".join(options.modalities or ())
            raise UsageError(f"--modalities {asked}: {ref.model} encodes none of them, but {', '.join(spec.dims)}")
        stages.append(
            EmbedStage(
                model=found.reference,
                spec=spec,
                name=ref.name,
                modalities=modalities,
                device=device_of(options),
                dtype=options.dtype,
                batch_size=options.batch_size,
                tokens=options.tokens,
                vector_type=options.vector_type,
                image_filter=None if text_filter is None else parse_image_filter(text_filter),
                count_tokens="text" in modalities and not any(stage.count_tokens for stage in stages),
            )
        )
    _check_all_served(options, stages)
    return tuple(stages), resolved


def _check_all_served(options: EmbedOptions, stages: Sequence[EmbedStage]) -> None:
    served = {modality for stage in stages for modality in stage.modalities}
    unserved = [modality for modality in options.modalities or () if modality not in served]
    if unserved:
        raise UsageError(f"--modalities: no model here encodes {', '.join(unserved)}")


def _run(options: EmbedOptions, stages: Sequence[EmbedStage], resolved: Sequence[Resolved]) -> Run:
    outputs = tuple(output for stage in stages for output in stage.outputs)
    models = {
        stage.name or "model": {"family": stage.spec.family, "digest": digest(found.directory)}
        for stage, found in zip(stages, resolved, strict=True)
    }
    configuration = {
        "task": "embed",
        "output_version": OUTPUT_VERSION,
        "models": models,
        "modalities": {stage.name or "model": list(stage.modalities) for stage in stages},
        "dtype": dtype_name(options.dtype, stages[0].device),
        "tokens": options.tokens,
        "vector_type": options.vector_type,
        "reading": asdict(options.reading),
        "limit": options.limit,
    }
    recorded = {
        "versions": versions(),
        "models": {stage.name or "model": found.reference for stage, found in zip(stages, resolved, strict=True)},
        "device": stages[0].device,
        "batch_size": options.batch_size,
        "windows": asdict(options.windows),
        "beam_args": list(options.beam_args),
    }
    return Run.create(
        output=options.output,
        configuration=configuration,
        recorded=recorded,
        outputs=outputs,
        cleaning=bool(options.reading.cleaning.text),
        max_failure_rate=options.max_failure_rate,
    )


def _retried(run: Run, unit: WorkUnit) -> WorkUnit:
    """The unit, to be done again and replaced if some of its samples failed."""
    report = runs.report_of(run, unit.id)
    return replace(unit, replace=report is not None and bool(report.tally.failures))


def _check_found(report: RunReport, able: Sequence[Modality], asked: bool) -> None:
    """What was asked for by name, or all that the models encode, must be in some sample."""
    missing = [modality for modality in able if not report.tally.present.get(modality)]
    if missing and report.tally.samples and (asked or len(missing) == len(able)):
        raise MissingModalityError(
            f"none of the {report.tally.samples:,} samples has {' or '.join(missing)}; the rows have nulls there"
        )
