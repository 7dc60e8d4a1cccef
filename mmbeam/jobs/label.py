"""The label job: shards or features in, one row with the classes, objects, segments or tags of each sample out."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from mmbeam.clean import parse_image_filter
from mmbeam.config import Labelling, Reading
from mmbeam.errors import UsageError
from mmbeam.features.files import check_columns
from mmbeam.jobs.execute import OUTPUT_VERSION, Job, check_present, plan, versions
from mmbeam.jobs.inputs import check_modalities, inputs_of
from mmbeam.jobs.options import JobOptions, check_options, device_of
from mmbeam.models.loading import dtype_name
from mmbeam.names import UNNAMED_MODEL
from mmbeam.runs.run import Run
from mmbeam.stages.label import LabelStage, label_stage
from mmbeam.types import RunReport


@dataclass(frozen=True, kw_only=True)
class LabelOptions(JobOptions):
    """The options of the label job."""

    model: str
    labelling: Labelling


@dataclass(frozen=True, kw_only=True)
class LabelJob(Job):
    """A job whose stage labels."""

    stages: tuple[LabelStage, ...]
    options: LabelOptions


def label(options: LabelOptions) -> RunReport:
    """Run the label job to its end.

    Raises UsageError, NoShardsError, ModelError, RunMismatchError, MissingModalityError or DeviceError
    before anything is written, FailureRateError or DeviceError while it runs.
    """
    return prepare(options).execute()


def prepare(options: LabelOptions) -> LabelJob:
    """Check everything that can be checked without a model's weights, and plan the work."""
    check_options(options)
    inputs = inputs_of(options, features=True)
    stage = label_stage(
        options.model,
        **asdict(options.labelling),
        features=inputs.features,
        device=device_of(options),
        dtype=options.dtype,
        batch_size=options.batch_size,
        image_filter=options.image_filter,
    )
    modalities = stage.spec.modalities
    if inputs.features:
        check_columns(inputs.files, stage.spec.columns)
    else:
        check_modalities(inputs.first, modalities, required=False)
    run = label_run(
        options.output,
        stage,
        reading=options.reading,
        limit=options.limit,
        max_failure_rate=options.max_failure_rate,
        recorded=options.recorded,
    )
    run = replace(run, dry=options.writes_nothing)
    return LabelJob(
        run=run,
        stages=(stage,),
        units=plan(run, inputs.files, options),
        options=options,
        check=partial(check_present, modalities=modalities, required=()),
        features=inputs.features,
    )


def label_run(
    output: str,
    stage: LabelStage,
    *,
    reading: Reading | None = None,
    limit: int | None = None,
    max_failure_rate: float = 0.05,
    recorded: Mapping[str, Any] | None = None,
) -> Run:
    """Return the run that writes the output of `stage`, over shards read by `reading`, to `output`.

    Nothing is written yet. A job that the command line starts with the same options has the same fingerprint, so each
    can resume the other. `recorded` is added to what run.json records. Raises UsageError if the stage contradicts
    `reading`.
    """
    reading = reading or Reading()
    name = reading.cleaning.image_filter
    expected = None if name is None else parse_image_filter(name)
    if stage.image_filter != expected:
        raise UsageError(
            f"{stage.model}: expected image_filter {expected}, as in `reading`, found {stage.image_filter}"
        )
    labelling = stage.spec.labelling
    model = stage.name or UNNAMED_MODEL
    configuration = {
        "task": labelling.task,
        "labelling": asdict(labelling),
        "output_version": OUTPUT_VERSION,
        "models": {model: {"family": stage.spec.family, "digest": stage.digest}},
        "columns": [column.name for output in stage.outputs for column in output.columns],
        "modalities": {model: list(stage.spec.modalities)},
        "dtype": dtype_name(stage.dtype, stage.device),
        "reading": reading.configuration(),
        "limit": limit,
    }
    known = {
        "versions": versions(),
        "models": {model: stage.model},
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
