"""The label job: shards or features in, one row with the classes, objects, segments or tags of each sample out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from mmbeam.clean import parse_image_filter
from mmbeam.config import Labelling, ModelRef, Reading
from mmbeam.errors import UsageError
from mmbeam.features.files import check_columns
from mmbeam.jobs.execute import OUTPUT_VERSION, Job, check_present, plan, versions
from mmbeam.jobs.inputs import check_modalities, inputs_of
from mmbeam.jobs.options import JobOptions, check_names, check_options, device_of
from mmbeam.models.loading import dtype_name
from mmbeam.names import UNNAMED_MODEL
from mmbeam.runs.run import Run
from mmbeam.stages.label import LabelStage, label_stage
from mmbeam.types import RunReport


@dataclass(frozen=True, kw_only=True)
class LabelOptions(JobOptions):
    """The options of the label job."""

    models: tuple[ModelRef, ...]
    labelling: Labelling  # of all models


@dataclass(frozen=True, kw_only=True)
class LabelJob(Job):
    """A job whose stages label."""

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
    if not options.models:
        raise UsageError("`models`: expected at least one")
    check_names(options.models)
    stages: list[LabelStage] = []
    for ref in options.models:
        stage = label_stage(
            ref.model,
            name=ref.name,
            **asdict(options.labelling),
            features=inputs.features,
            device=device_of(options),
            dtype=options.dtype,
            batch_size=options.batch_size,
            image_filter=options.image_filter,
            count_tokens=not any(stage.count_tokens for stage in stages),
        )
        stages.append(stage)
    modalities = tuple(dict.fromkeys(modality for stage in stages for modality in stage.spec.modalities))
    if inputs.features:
        check_columns(inputs.files, tuple(dict.fromkeys(column for stage in stages for column in stage.spec.columns)))
    else:
        check_modalities(inputs.first, modalities, required=False)
    run = label_run(
        options.output,
        stages,
        reading=options.reading,
        limit=options.limit,
        max_failure_rate=options.max_failure_rate,
        recorded=options.recorded,
    )
    run = replace(run, dry=options.writes_nothing)
    return LabelJob(
        run=run,
        stages=tuple(stages),
        units=plan(run, inputs.files, options),
        options=options,
        check=partial(check_present, modalities=modalities, required=()),
        features=inputs.features,
    )


def label_run(
    output: str,
    stages: Sequence[LabelStage],
    *,
    reading: Reading | None = None,
    limit: int | None = None,
    max_failure_rate: float = 0.05,
    recorded: Mapping[str, Any] | None = None,
) -> Run:
    """Return the run that writes the outputs of `stages`, over shards read by `reading`, to `output`.

    Nothing is written yet. A job that the command line starts with the same options has the same fingerprint, so each
    can resume the other. `recorded` is added to what run.json records. Raises UsageError if the stages contradict
    each other or `reading`.
    """
    reading = reading or Reading()
    name = reading.cleaning.image_filter
    expected = None if name is None else parse_image_filter(name)
    for stage in stages:
        if stage.image_filter != expected:
            raise UsageError(
                f"{stage.model}: expected image_filter {expected}, as in `reading`, found {stage.image_filter}"
            )
    dtypes = {dtype_name(stage.dtype, stage.device) for stage in stages}
    if len(dtypes) > 1:  # the fingerprint has one place for it
        raise UsageError(f"stages of one run must agree on dtype, found {', '.join(sorted(dtypes))}")
    by_name = {stage.name or UNNAMED_MODEL: stage for stage in stages}
    labellings = {name: asdict(stage.spec.labelling) for name, stage in by_name.items()}
    configuration = {
        "task": ",".join(dict.fromkeys(stage.spec.labelling.task for stage in stages)),
        # By name if there are several: the defaults differ by model.
        "labelling": labellings if len(stages) > 1 else next(iter(labellings.values())),
        "output_version": OUTPUT_VERSION,
        "models": {name: {"family": stage.spec.family, "digest": stage.digest} for name, stage in by_name.items()},
        "columns": [column.name for stage in stages for output in stage.outputs for column in output.columns],
        "modalities": {name: list(stage.spec.modalities) for name, stage in by_name.items()},
        "dtype": next(iter(dtypes)),
        "reading": reading.configuration(),
        "limit": limit,
    }
    known = {
        "versions": versions(),
        "models": {name: stage.model for name, stage in by_name.items()},
        "device": stages[0].device,
        "batch_size": stages[0].batch_size,
        "notes": [f"{stage.model}: {note}" for stage in stages for note in stage.spec.notes],
    }
    return Run.create(
        output=output,
        configuration=configuration,
        recorded={**known, **(recorded or {})},
        outputs=tuple(output for stage in stages for output in stage.outputs),
        cleaning=bool(reading.cleaning.text),
        max_failure_rate=max_failure_rate,
    )
