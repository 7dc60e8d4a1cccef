"""The generate job: texts in, one row per sample and a WebDataset shard of images or sounds per unit out."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from mmbeam.config import Reading, Synthesis, Windows
from mmbeam.errors import UsageError
from mmbeam.jobs.execute import OUTPUT_VERSION, Job, check_present, plan, versions
from mmbeam.jobs.inputs import check_modalities, inputs_of
from mmbeam.jobs.options import JobOptions, check_options, device_of
from mmbeam.models.loading import dtype_name
from mmbeam.names import UNNAMED_MODEL, Modality
from mmbeam.readers.units import GENERATE_UNIT_BYTES
from mmbeam.runs.run import Run
from mmbeam.stages.synthesize import SynthesizeStage, synthesize_stage
from mmbeam.types import RunReport

WINDOW_SAMPLES = 64  # a window holds its files in memory: 64 images of 1024 x 1024 are up to 200 MB


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(JobOptions):
    """The options of the generate job."""

    model: str
    synthesis: Synthesis


@dataclass(frozen=True, kw_only=True)
class GenerateJob(Job):
    """A job whose stage makes images or sounds."""

    stages: tuple[SynthesizeStage, ...]
    options: GenerateOptions


def generate(options: GenerateOptions) -> RunReport:
    """Run the generate job to its end.

    Raises UsageError, NoShardsError, ModelError, RunMismatchError, MissingModalityError or DeviceError
    before anything is written, FailureRateError or DeviceError while it runs.
    """
    return prepare(options).execute()


def prepare(options: GenerateOptions) -> GenerateJob:
    """Check everything that can be checked without a model's weights, and plan the work."""
    if options.windows == Windows():
        options = replace(options, windows=Windows(samples=WINDOW_SAMPLES))
    check_options(options)
    if options.reading.cleaning.image_filter is not None:
        raise UsageError("`image_filter`: only the texts of the input are read; omit it")
    inputs = inputs_of(options)
    stage = synthesize_stage(
        options.model,
        options.synthesis,
        device=device_of(options),
        dtype=options.dtype,
        batch_size=options.batch_size,
    )
    modalities: tuple[Modality, ...] = ("text",) if stage.template is None else ()
    if modalities:
        check_modalities(inputs.first, modalities, required=True)
    run = generate_run(
        options.output,
        stage,
        reading=options.reading,
        limit=options.limit,
        max_failure_rate=options.max_failure_rate,
        recorded=options.recorded,
    )
    run = replace(run, dry=options.writes_nothing)
    return GenerateJob(
        run=run,
        stages=(stage,),
        units=plan(run, inputs.files, options, unit_bytes=GENERATE_UNIT_BYTES),
        options=options,
        check=partial(check_present, modalities=modalities, required=modalities),
    )


def generate_run(
    output: str,
    stage: SynthesizeStage,
    *,
    reading: Reading | None = None,
    limit: int | None = None,
    max_failure_rate: float = 0.05,
    recorded: Mapping[str, Any] | None = None,
) -> Run:
    """Return the run that writes the output of `stage`, over shards read by `reading`, to `output`.

    Nothing is written yet. A job that the command line starts with the same options has the same fingerprint, so each
    can resume the other. `recorded` is added to what run.json records.
    """
    reading = reading or Reading()
    configuration = {
        "task": "generate",
        "synthesis": asdict(stage.spec.synthesis),
        "output_version": OUTPUT_VERSION,
        "models": {UNNAMED_MODEL: {"family": stage.spec.family, "digest": stage.digest}},
        "columns": [column.name for output in stage.outputs for column in output.columns],
        "modalities": {UNNAMED_MODEL: ["text"]},
        "dtype": dtype_name(stage.dtype, stage.device),
        "reading": reading.configuration(),
        "limit": limit,
    }
    known = {
        "versions": versions(),
        "models": {UNNAMED_MODEL: stage.model},
        "device": stage.device,
        "batch_size": stage.batch_size,
        "notes": [f"{stage.model}: {note}" for note in stage.spec.notes],
    }
    return Run.create(
        output=output,
        configuration=configuration,
        recorded={**known, **(recorded or {})},
        outputs=tuple(stage.outputs),
        cleaning=bool(reading.cleaning.text),
        max_failure_rate=max_failure_rate,
    )
