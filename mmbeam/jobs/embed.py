"""The embed job: shards in, one row of vectors per sample out."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mmbeam.clean import parse_image_filter
from mmbeam.config import ModelRef, Reading
from mmbeam.errors import UsageError
from mmbeam.jobs.execute import OUTPUT_VERSION, Job, check_present, plan, versions
from mmbeam.jobs.inputs import Inputs, check_frames, check_modalities, inputs_of, shipped_model_warning
from mmbeam.jobs.options import JobOptions, check_names, check_options, device_of
from mmbeam.models.loading import dtype_name
from mmbeam.names import MODALITIES, SHIPPED_MODEL, UNNAMED_MODEL, Modality
from mmbeam.runs.run import Run
from mmbeam.stages.embed import EmbedStage, embed_stage
from mmbeam.types import RunReport, Stage

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(JobOptions):
    """The options of the embed job."""

    models: tuple[ModelRef, ...] = ()  # (): the shipped model, with a warning for samples that are not the demo's
    modalities: tuple[Modality, ...] | None = None  # None: all that the models encode
    tokens: bool = False  # also keep the sequence of token or patch features
    vector_type: str = "float32"  # of a stored number; "float16" halves the files
    text_prompt: str | None = None  # before each text: the name of a prompt of the checkpoint, or the prompt itself
    dims: int | None = None  # numbers of a vector to keep, normalised again


@dataclass(frozen=True, kw_only=True)
class EmbedJob(Job):
    """A job whose stages embed."""

    stages: tuple[EmbedStage, ...]
    options: EmbedOptions


def embed(options: EmbedOptions) -> RunReport:
    """Run the embed job to its end.

    Raises UsageError, NoShardsError, ModelError, RunMismatchError, MissingModalityError or DeviceError
    before anything is written, FailureRateError or DeviceError while it runs.
    """
    return prepare(options).execute()


def prepare(options: EmbedOptions) -> EmbedJob:
    """Check everything that can be checked without a model's weights, and plan the work."""
    check_options(options)
    inputs = inputs_of(options)
    stages = _stages(options, inputs)
    check_frames(options.reading, [stage.needs for stage in stages])
    modalities = tuple(dict.fromkeys(modality for stage in stages for modality in stage.modalities))
    required = options.modalities is not None
    check_modalities(inputs.first, modalities, required)
    warning = None if options.models else shipped_model_warning(inputs, options.input, "embed")
    if warning is not None:
        log.warning(warning)
    run = embed_run(
        options.output,
        stages,
        reading=options.reading,
        limit=options.limit,
        max_failure_rate=options.max_failure_rate,
        recorded=options.recorded,
    )
    run = replace(run, dry=options.writes_nothing)
    return EmbedJob(
        run=run,
        stages=stages,
        units=plan(run, inputs.files, options),
        options=options,
        check=partial(check_present, modalities=modalities, required=modalities if required else ()),
        warnings=() if warning is None else (warning,),
    )


def _stages(options: EmbedOptions, inputs: Inputs) -> tuple[EmbedStage, ...]:
    modalities = options.modalities
    if modalities is None and "video" in inputs.first.modalities:
        modalities = MODALITIES  # image encoders encode the frames
    models = options.models or (ModelRef(model=SHIPPED_MODEL),)
    check_names(models)
    stages: list[EmbedStage] = []
    for ref in models:
        stage = embed_stage(
            ref.model,
            name=ref.name,
            modalities=modalities,
            device=device_of(options),
            dtype=options.dtype,
            batch_size=options.batch_size,
            tokens=options.tokens,
            vector_type=options.vector_type,
            text_prompt=options.text_prompt,
            dims=options.dims,
            image_filter=options.image_filter,
            count_tokens=not any(stage.count_tokens for stage in stages),
        )
        stages.append(stage)
    encoded = {modality for stage in stages for modality in stage.modalities}
    not_encoded = [modality for modality in options.modalities or () if modality not in encoded]
    if not_encoded:
        raise UsageError(f"`modalities`: none of the models encodes {', '.join(not_encoded)}")
    if options.text_prompt is not None and "text" not in encoded:
        raise UsageError(f"`text_prompt` {options.text_prompt!r}: none of the models encodes text here; omit it")
    return tuple(stages)


def embed_run(
    output: str,
    stages: Sequence[Stage],
    *,
    reading: Reading | None = None,
    limit: int | None = None,
    max_failure_rate: float = 0.05,
    recorded: Mapping[str, Any] | None = None,
) -> Run:
    """Return the run that writes the outputs of `stages`, over shards read by `reading`, to `output`.

    A stage of your own may be among them; its `key` stands for its model in the fingerprint. Nothing is written yet. A
    job that the command line starts with the same options has the same fingerprint, so each can resume the other.
    `recorded` is added to what run.json records. Raises UsageError if the stages contradict each other or `reading`.
    """
    reading = reading or Reading()
    encoders = [stage for stage in stages if isinstance(stage, EmbedStage)]
    own = {getattr(stage, "name", None) or type(stage).__name__: stage for stage in stages if stage not in encoders}
    # The fingerprint has one place for these, so all stages must agree on them.
    for setting in ("dtype", "device", "batch_size", "tokens", "vector_type", "dims"):
        values = {dtype_name(s.dtype, s.device) if setting == "dtype" else getattr(s, setting) for s in encoders}
        if len(values) > 1:
            raise UsageError(f"stages of one run must agree on {setting}, found {', '.join(sorted(map(str, values)))}")
    name = reading.cleaning.image_filter
    expected = None if name is None else parse_image_filter(name)
    for stage in encoders:
        if stage.image_filter != expected:
            raise UsageError(
                f"{stage.model}: expected image_filter {expected}, as in `reading`, found {stage.image_filter}"
            )
    prompts = {_label(stage): stage.spec.text_prompt for stage in encoders if stage.spec.text_prompt is not None}
    configuration = {
        "task": "embed",
        "output_version": OUTPUT_VERSION,
        "models": {
            _label(stage): {
                "family": stage.spec.family,
                "digest": stage.digest,
                **({"generic": True} if stage.spec.is_generic else {}),
            }
            for stage in encoders
        }
        | {name: {"family": type(stage).__name__, "digest": stage.key} for name, stage in own.items()},
        "columns": [column.name for stage in stages for output in stage.outputs for column in output.columns],
        "modalities": {_label(stage): list(stage.modalities) for stage in encoders},
        "dtype": dtype_name(encoders[0].dtype, encoders[0].device) if encoders else None,
        "tokens": bool(encoders) and encoders[0].tokens,
        "vector_type": encoders[0].vector_type if encoders else "float32",
        **({"dims": encoders[0].dims} if encoders and encoders[0].dims is not None else {}),
        **({"text_prompt": prompts} if prompts else {}),
        "reading": reading.configuration(),
        "limit": limit,
    }
    known = {
        "versions": versions(),
        "models": {_label(stage): stage.model for stage in encoders} | {name: stage.key for name, stage in own.items()},
        "device": stages[0].device,
        "batch_size": encoders[0].batch_size if encoders else None,
        "notes": [f"{stage.model}: {note}" for stage in encoders for note in stage.spec.notes],
    }
    return Run.create(
        output=output,
        configuration=configuration,
        recorded={**known, **(recorded or {})},
        outputs=tuple(output for stage in stages for output in stage.outputs),
        cleaning=bool(reading.cleaning.text),
        max_failure_rate=max_failure_rate,
    )


def _label(stage: EmbedStage) -> str:
    return stage.name or UNNAMED_MODEL
