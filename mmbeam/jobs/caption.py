"""The caption job: shards or features in, one row with the text that a model makes of each sample out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mmbeam.config import MIB, FieldMap, Reading, Windows
from mmbeam.errors import UsageError
from mmbeam.features.files import check_columns, feature_patterns
from mmbeam.jobs.cluster import workers_are_here
from mmbeam.jobs.common import (
    OUTPUT_VERSION,
    Job,
    check_options,
    image_filter_of,
    must_find,
    plan,
    recorded_of,
)
from mmbeam.jobs.fields import check_fields, probe_rows
from mmbeam.jobs.launch import JobOptions, check_modalities, device_of, versions
from mmbeam.models.loading import dtype_name
from mmbeam.models.placement import devices_of
from mmbeam.names import MODALITIES, SHIPPED_MODEL, UNNAMED_MODEL, Engine, Modality, Task
from mmbeam.prompts.ask import Decoding, prompt_fields
from mmbeam.readers.listing import list_shards
from mmbeam.readers.paths import public_path
from mmbeam.readers.units import GENERATE_BYTES
from mmbeam.report.inspect import probe
from mmbeam.runs import Run
from mmbeam.stages.embed import EmbedStage, embed_stage
from mmbeam.stages.generate import GenerateStage, generate_stage
from mmbeam.types import RunReport, Shard

GPU_WINDOWS = Windows(decoded_bytes=256 * MIB)  # 340 pictures of 512 x 512, where the default is 42: a batch is 256


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(JobOptions):
    """The caption job, as the command line or a program asks for it. `input` is shards, or features of embed's."""

    model: str = SHIPPED_MODEL
    task: Task | None = None  # None: what the model is for
    prompt: str | None = None  # a template over the sample, in the place of the task's own way to ask
    language: str | None = None  # of the text that is wanted; to a Whisper the one that is spoken
    source_language: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    explain: bool = False  # add the attribution of each caption to its modalities
    with_embeddings: bool = False  # the model's vectors as well
    engine: Engine = "transformers"


@dataclass(frozen=True, kw_only=True)
class CaptionJob(Job):
    """A job whose last stage generates."""

    stages: tuple[EmbedStage | GenerateStage, ...]
    options: CaptionOptions


def caption(options: CaptionOptions) -> RunReport:
    """Run the caption job to its end.

    Raises UsageError, NoShardsError, ModelError, RunMismatchError, MissingModalityError or DeviceError
    before anything is written, FailureRateError or DeviceError while it runs.
    """
    return prepare(options).execute()


def prepare(options: CaptionOptions) -> CaptionJob:
    """Check everything that can be checked without a model's weights, and plan the work."""
    check_options(options)
    shared = _shared_by_stages(options)
    names = ("task", "prompt", "language", "source_language", "decoding", "explain", "engine")
    generate = generate_stage(options.model, **{name: getattr(options, name) for name in names}, **shared)
    options = _for_device(options, generate.device)
    files = feature_patterns(options.input)
    shards = list_shards(files or options.input)
    if files:
        _check_features(generate, shards, options)
    else:
        _check_shards(generate, shards, options)
    embed = [embed_stage(generate.model, count_tokens=False, **shared)] if options.with_embeddings else []
    run = caption_run(
        options.output,
        generate,
        embed,
        features=bool(files),
        reading=options.reading,
        limit=options.limit,
        max_failure_rate=options.max_failure_rate,
        recorded=recorded_of(options),
    )
    return CaptionJob(
        run=run,
        stages=(*embed, generate),
        units=plan(run, shards, options, unit_bytes=None if files else GENERATE_BYTES),
        options=options,
        check=must_find(*_due(generate)),
        features=bool(files),
    )


def _for_device(options: CaptionOptions, device: str) -> CaptionOptions:
    """The options, with windows that fill a GPU. Raises UsageError or JobError if the workers here cannot use vLLM."""
    if options.engine == "vllm" and workers_are_here(options.beam_args):
        from mmbeam.models.generators import vllm  # with the families, which take a while

        vllm.check_installed()
        vllm.check_processes(len(devices_of(options.device)), options.workers)
    if device == "cpu" or options.windows != Windows():
        return options
    return replace(options, windows=GPU_WINDOWS)


def _shared_by_stages(options: CaptionOptions) -> dict[str, Any]:
    return {
        "device": device_of(options),
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "image_filter": image_filter_of(options),
    }


def _check_shards(stage: GenerateStage, shards: Sequence[Shard], options: CaptionOptions) -> None:
    if stage.spec.columns:
        names = ", ".join(column.name for column in stage.spec.columns)
        raise UsageError(f"--input: {stage.model} takes features ({names}); give the output of `mmbeam embed`")
    fields, limits = options.reading.fields, options.reading.limits
    found = probe(shards, fields, limits, metadata=bool(prompt_fields(stage.instruction)))
    able, required = _due(stage)
    check_modalities(found, able, asked=False)
    check_modalities(found, required, asked=True)
    check_fields(found, stage.instruction, bool(options.reading.cleaning.where))


def _due(stage: GenerateStage) -> tuple[tuple[Modality, ...], tuple[Modality, ...]]:
    """The modalities of which a sample must have one, and those that it must have, for its text to be due."""
    [output] = stage.outputs
    able = tuple(modality for modality in MODALITIES if modality in output.modalities)
    return able, tuple(modality for modality in MODALITIES if modality in output.required)


def _check_features(stage: GenerateStage, files: Sequence[Shard], options: CaptionOptions) -> None:
    raw = [modality for modality in stage.media if modality != "text"]
    if raw:
        raise UsageError(f"--input: {stage.model} takes {' and '.join(raw)} as such, and no features; give shards")
    if options.with_embeddings:
        raise UsageError("--with-embeddings: the input is embeddings already")
    if any(file.path.startswith(f"{public_path(options.output)}/") for file in files):
        raise UsageError(f"--output {public_path(options.output)}: the features are there; choose another place")
    reading = options.reading
    if reading.fields != FieldMap() or reading.draft or reading.cleaning.image_filter is not None:
        raise UsageError(
            "features hold no fields and no pictures: leave out --image-field and its like, --image-filter"
        )
    check_columns(files, stage.spec.columns)
    if prompt_fields(stage.instruction):
        check_fields(probe_rows(files), stage.instruction, bool(reading.cleaning.where))


def caption_run(
    output: str,
    stage: GenerateStage,
    embed: Sequence[EmbedStage] = (),
    *,
    features: bool = False,
    reading: Reading | None = None,
    limit: int | None = None,
    max_failure_rate: float = 0.05,
    recorded: Mapping[str, Any] | None = None,
) -> Run:
    """The run that writes what `stage`, after the stages of `embed`, makes of an input; nothing is touched yet.

    The input is shards read by `reading`, or with `features` what `mmbeam embed` wrote. It is the same run,
    with the same fingerprint, as the command line's for the same options, so that either goes on where the
    other stopped. `recorded` is kept in run.json beside what is known here.
    """
    reading, instruction = reading or Reading(), stage.instruction
    outputs = [output for each in embed for output in each.outputs] + list(stage.outputs)
    configuration = {
        "task": instruction.task,
        "prompt": None if instruction.prompt is None else instruction.prompt.source,
        "language": instruction.language,
        "source_language": instruction.source_language,
        "output_version": OUTPUT_VERSION,
        "input": "features" if features else "shards",
        "models": {UNNAMED_MODEL: {"family": stage.spec.family, "digest": stage.digest}},
        "columns": [column.name for output in outputs for column in output.columns],
        "modalities": {UNNAMED_MODEL: list(stage.modalities)},
        "dtype": dtype_name(stage.dtype, stage.device),
        "decoding": asdict(stage.decoding),
        "engine": stage.engine,
        "reading": asdict(reading),
        "limit": limit,
    }
    known = {
        "versions": versions(),
        "models": {UNNAMED_MODEL: stage.model},
        "device": stage.device,
        "batch_size": stage.batch_size,
    }
    return Run.create(
        output=output,
        configuration=configuration,
        recorded={**known, **(recorded or {})},
        outputs=outputs,
        cleaning=bool(reading.cleaning.text),
        max_failure_rate=max_failure_rate,
    )
