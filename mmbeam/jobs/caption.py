"""The caption job: shards or features in, one row with the generated text of each sample out."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from mmbeam.clean.where import SampleValues
from mmbeam.config import FieldMap, Reading
from mmbeam.errors import ShardError, UsageError
from mmbeam.features.files import check_columns, open_counted
from mmbeam.features.schema import FACTS, IDENTITY
from mmbeam.jobs.cluster import workers_are_here
from mmbeam.jobs.execute import OUTPUT_VERSION, Job, check_present, plan, versions
from mmbeam.jobs.inputs import check_modalities, inputs_of, shipped_model_warning
from mmbeam.jobs.options import JobOptions, check_options, device_of
from mmbeam.models.loading import dtype_name
from mmbeam.models.placement import devices_of
from mmbeam.names import MODALITIES, SHIPPED_MODEL, UNNAMED_MODEL, Engine, Modality, Task
from mmbeam.prompts.ask import Decoding, Instruction, prompt_fields
from mmbeam.prompts.template import entry_paths
from mmbeam.readers.paths import public_path
from mmbeam.readers.units import GENERATE_UNIT_BYTES
from mmbeam.report.inspect import PROBED_SAMPLES, PROBED_SHARDS, Probe
from mmbeam.runs.run import Run
from mmbeam.stages.embed import EmbedStage, embed_stage
from mmbeam.stages.generate import GenerateStage, generate_stage
from mmbeam.types import RunReport, Sample, Shard

log = logging.getLogger(__name__)

FIELDS_SHOWN = 20  # in an error


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(JobOptions):
    """The options of the caption job. `input` is shards, or features that the embed job wrote."""

    model: str | None = None  # None: the shipped model, with a warning for samples that are not the demo's
    task: Task | None = None  # None: the model's main task
    prompt: str | None = None  # a template over the sample; None: the task's own prompt
    language: str | None = None  # of the generated text; for Whisper, of the speech
    source_language: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    explain: bool = False  # add the attribution of each caption to the modalities
    with_embeddings: bool = False  # add the model's vectors
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
    inputs = inputs_of(options, features=True)
    shared: dict[str, Any] = {
        "device": device_of(options),
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "image_filter": options.image_filter,
    }
    names = ("task", "prompt", "language", "source_language", "decoding", "explain", "engine")
    generate = generate_stage(
        options.model or SHIPPED_MODEL,
        **{name: getattr(options, name) for name in names},
        **shared,
        video="video" in inputs.first.modalities,
    )
    if options.engine == "vllm" and workers_are_here(options.beam_args):
        from mmbeam.models.generators import vllm  # imports the families, which takes seconds

        vllm.check_installed()
        vllm.check_processes(len(devices_of(options.device)), options.workers)
    [output] = generate.outputs
    modalities = tuple(modality for modality in MODALITIES if modality in output.modalities)
    required = tuple(modality for modality in MODALITIES if modality in output.required)
    if inputs.features:
        _check_features(generate, inputs.files, options)
    else:
        _check_shards(generate, inputs.first, options, modalities, required)
    warning = None if options.model else shipped_model_warning(inputs, options.input, "caption")
    if warning is not None:
        log.warning(warning)
    embed = [embed_stage(generate.model, count_tokens=False, **shared)] if options.with_embeddings else []
    run = caption_run(
        options.output,
        generate,
        embed,
        features=inputs.features,
        reading=options.reading,
        limit=options.limit,
        max_failure_rate=options.max_failure_rate,
        recorded=options.recorded,
    )
    run = replace(run, dry=options.writes_nothing)
    return CaptionJob(
        run=run,
        stages=(*embed, generate),
        units=plan(run, inputs.files, options, unit_bytes=None if inputs.features else GENERATE_UNIT_BYTES),
        options=options,
        check=partial(check_present, modalities=modalities, required=required),
        features=inputs.features,
        warnings=() if warning is None else (warning,),
    )


def _check_shards(
    stage: GenerateStage,
    first: Probe,
    options: CaptionOptions,
    modalities: Sequence[Modality],
    required: Sequence[Modality],
) -> None:
    if stage.spec.columns:
        names = ", ".join(column.name for column in stage.spec.columns)
        raise UsageError(f"`input`: {stage.model} takes features ({names}); use the output of `mmbeam embed`")
    check_modalities(first, modalities, required=False)
    check_modalities(first, required, required=True)
    check_fields(first, stage.instruction, bool(options.reading.cleaning.where))


def _check_features(stage: GenerateStage, files: Sequence[Shard], options: CaptionOptions) -> None:
    raw = [modality for modality in stage.media if modality != "text"]
    if raw:
        raise UsageError(f"`input`: {stage.model} takes raw {' and '.join(raw)}, not features; use shards")
    if options.with_embeddings:
        raise UsageError("`with_embeddings`: the input is embeddings already")
    if any(file.path.startswith(f"{public_path(options.output)}/") for file in files):
        raise UsageError(
            f"`output` {public_path(options.output)}: this is the directory of the input features; choose another one"
        )
    reading = options.reading
    if reading.fields != FieldMap() or reading.draft or reading.cleaning.image_filter is not None:
        raise UsageError(
            "`image_field`, `audio_field`, `text_field`, `metadata_field`, `draft` and `image_filter` apply to shards, "
            "but the input is features; omit them"
        )
    check_columns(files, stage.spec.columns)
    if prompt_fields(stage.instruction):
        check_fields(_probe_rows(files), stage.instruction, bool(reading.cleaning.where))


def _probe_rows(files: Sequence[Shard]) -> Probe:
    """Probe the first rows of the first feature files for the fields that a prompt can use.

    A file that cannot be read is skipped: it will be reported as its unit's failure.
    """
    probe = Probe(whole=len(files) <= PROBED_SHARDS)
    wanted = {**IDENTITY, "text": FACTS["text"], "metadata": FACTS["metadata"]}
    for file in files[:PROBED_SHARDS]:
        try:
            with open_counted(file) as (parquet, _):
                schema = parquet.schema_arrow
                names = [name for name in wanted if name in schema.names and wanted[name](schema.field(name).type)]
                rows = next(parquet.iter_batches(batch_size=PROBED_SAMPLES, columns=names), None)
                probe.whole = probe.whole and parquet.metadata.num_rows <= PROBED_SAMPLES
        except ShardError:
            continue
        probe.first += [Sample(**row) for row in ([] if rows is None else rows.to_pylist())]
    return probe


def check_fields(probe: Probe, instruction: Instruction, filtered: bool) -> None:
    """Raise UsageError for a field of the prompt that none of the first samples has; each such sample would fail.

    Log a warning instead if the probe did not see the whole input and samples are `filtered` before the model.
    """
    samples = [SampleValues(sample) for sample in probe.first]
    missing = [
        field for field in prompt_fields(instruction) if all(field.value_in(values) is None for values in samples)
    ]
    if not samples or not missing:
        return
    argument = "`task` dialogue" if instruction.task == "dialogue" else "`prompt`"
    names = {f"{{metadata{path}}}": None for values in samples for path in entry_paths(values["metadata"])}
    present = ["{key}", *(["{text}"] if any(values["text"] is not None for values in samples) else []), *names]
    more = f" and {len(present) - FIELDS_SHOWN} more" if len(present) > FIELDS_SHOWN else ""
    message = (
        f"{argument}: none of the first {len(samples)} samples has {' or '.join(f'{{{field}}}' for field in missing)}; "
        f"they have {', '.join(present[:FIELDS_SHOWN])}{more}"
    )
    if probe.whole or not filtered:
        raise UsageError(message)
    log.warning("%s; continuing, since `where` selects among the samples", message)


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
    """Return the run that writes the outputs of `embed` and `stage` to `output`; nothing is written yet.

    The input is shards read by `reading`, or with `features` what `mmbeam embed` wrote. A job that the command line
    starts with the same options has the same fingerprint, so each can resume the other. `recorded` is added to what
    run.json records.
    """
    reading, instruction = reading or Reading(), stage.instruction
    outputs = [output for encoder in embed for output in encoder.outputs] + list(stage.outputs)
    configuration = {
        "task": instruction.task,
        "prompt": None if instruction.template is None else instruction.template.source,
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
        "reading": reading.configuration(),
        "limit": limit,
    }
    known = {
        "versions": versions(),
        "models": {UNNAMED_MODEL: stage.model},
        "device": stage.device,
        "batch_size": stage.batch_size,
        "notes": [f"{step.model}: {note}" for step in (*embed, stage) for note in step.spec.notes],
    }
    return Run.create(
        output=output,
        configuration=configuration,
        recorded={**known, **(recorded or {})},
        outputs=outputs,
        cleaning=bool(reading.cleaning.text),
        max_failure_rate=max_failure_rate,
    )
