"""Preparation of a training: configuration, processor, source of examples, and the new model.

The vocabulary and the sample counts are saved next to the checkpoint, so that a resumed run uses the same ones.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mmbeam.config import FieldMap
from mmbeam.errors import MissingModalityError, ModelError, TrainingError, UsageError
from mmbeam.features.files import feature_files
from mmbeam.models.fusion.configuration import FusionConfig
from mmbeam.models.fusion.modeling import FusionModel
from mmbeam.models.fusion.processing import FusionProcessor
from mmbeam.models.generators.fusion import read_processor
from mmbeam.models.loading import load_pretrained, read_json, resolve
from mmbeam.names import FUSION_MODALITIES, Modality, Split
from mmbeam.readers.listing import list_shards
from mmbeam.readers.units import plan_units
from mmbeam.training.checkpoint import write_text
from mmbeam.training.encoders import Encoders, load_encoders, read_encoders, unfreeze
from mmbeam.training.examples import ExampleSource
from mmbeam.training.options import TrainOptions
from mmbeam.training.sources import (
    CAPTION_IS_TEXT,
    MAX_SURVEYED_SAMPLES,
    FeatureSource,
    Labelling,
    ShardSource,
    Survey,
    captions_of,
    check_origins,
    column_modality,
    column_sources,
)
from mmbeam.types import Needs

log = logging.getLogger(__name__)

SHARED = ("words", "space", "fusion", "generator")  # parts of a model besides the encoders of its sources
START, FACTS = "start", "samples.json"
MAX_SURVEYED_CLIPS = 100  # clips whose lengths determine the model's audio window
MAX_AUDIO_SECONDS = 30.0  # longest audio window
TRAINING_HEADS = (r"^reconstruction\.", r"^modality_adversary\.", r"^generator_adversary\.")  # used only by losses


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The configuration, processor and examples of a training."""

    config: FusionConfig
    processor: FusionProcessor
    source: ExampleSource
    sample_counts: Mapping[str, Any]  # about the samples, for the model card


def set_up(options: TrainOptions, directory: Path) -> Setup:
    """Return the setup saved in `directory` by an earlier launch, or make and save a new one.

    Raises NoShardsError, TrainingError, MissingModalityError, ModelError, UsageError.
    """
    start = directory / START
    features = bool(feature_files(options.input, options.strict_input, options.allow_local_paths))
    is_saved = (start / FACTS).exists()
    counts = json.loads((start / FACTS).read_text()) if is_saved else _prepare_new_training(options, features, start)
    config = FusionConfig.from_pretrained(start)
    processor = FusionProcessor.from_directory(start)
    if bool(processor.columns) != features:
        inputs = f"features ({', '.join(processor.columns)})" if processor.columns else ", ".join(processor.modalities)
        raise UsageError(
            f"`init` {options.init}: expected `input` of {inputs}, found {'features' if features else 'shards'}"
        )
    by_split = counts["captions"] if counts["counted"] else {}
    source: ShardSource | FeatureSource
    if features:
        source = row_source(options, processor, by_split)
        check_origins(processor, source)
    else:
        source = shard_source(options, processor, by_split)
    if not is_saved:
        write_text(start / FACTS, json.dumps(counts, indent=2) + "\n")
    return Setup(config=config, processor=processor, source=source, sample_counts=counts)


def _prepare_new_training(options: TrainOptions, features: bool, start: Path) -> dict[str, Any]:
    """Survey the samples, save the configuration and processor made from them, and return the sample counts."""
    _check_kind(options, features)
    encoders = read_encoders(options.encoders, options.text_tokens)
    initial = None if options.init is None else _load_init_model(options, options.init)
    examples = row_source(options) if features else shard_source(options)
    survey = examples.survey(MAX_SURVEYED_SAMPLES if options.steps is not None else None)
    survey.check(options.captions)
    _check_labels(options, survey)
    config, processor = initial or _make_config_and_processor(options, examples, survey, encoders)
    unfreeze(config, options.unfreeze)
    _check_freeze(config, options.freeze)
    if ("caption", "caption") in config.aligned_pairs() and options.group is None:
        raise UsageError("`pairs` caption:caption: captions have no augmented view; pass `group`")
    config.save_pretrained(start)
    processor.save(start)
    sources = config.parsed_sources()
    origins = {name: source.origin._asdict() for name, source in sources.items() if source.origin is not None}
    return survey.to_json() | {"origins": origins}


def _check_kind(options: TrainOptions, features: bool) -> None:
    """Raise UsageError for an option that does not apply to this kind of input."""
    shards_only = {
        "`encoders`": options.encoders,
        "`audio_seconds`": options.audio_seconds,
        "`text_tokens`": options.text_tokens != TrainOptions.text_tokens,
        "`image_field` and the other fields": options.reading.fields != FieldMap(),
    }
    features_only = {"`columns`": options.columns, "`captions_from`": options.captions_from}
    for name, value in (shards_only if features else features_only).items():
        if value:
            expected, actual = ("shards", "features") if features else ("features", "shards")
            raise UsageError(f"{name}: applies to {expected}, and the input is {actual}; omit it")


def _check_labels(options: TrainOptions, survey: Survey) -> None:
    """Raise TrainingError if no sample has the requested clauses or group."""
    for name, field, count in (
        ("clauses", options.clauses, survey.clauses),
        ("group", options.group, survey.groups),
    ):
        if field is not None and not count:
            present = f"; their JSON has {', '.join(sorted(survey.fields)[:12])}" if survey.fields else ""
            raise TrainingError(f"`{name}` {field}: none of the {survey.samples:,} samples has a usable value{present}")


def _load_init_model(options: TrainOptions, model: str) -> tuple[FusionConfig, FusionProcessor]:
    """Return the configuration and processor of the model that the training starts from.

    Raises ModelError if it is not a fusion model, UsageError if its input would be the target.
    """
    directory = resolve(model).directory
    values = read_json(directory, "config.json")
    if values.get("model_type") != FusionConfig.model_type:
        raise ModelError(
            f"`init` {model}: expected a fusion model, found a model of type {values.get('model_type')}; to use its "
            "encoder, pass it in `encoders`"
        )
    processor, config = read_processor(directory, values), FusionConfig.from_pretrained(directory)
    if options.captions == CAPTION_IS_TEXT and "text" in processor.modalities:
        raise UsageError(f"`captions` text: the model {model} takes the text as an input")
    return config, processor


def _make_config_and_processor(
    options: TrainOptions, source: ShardSource | FeatureSource, survey: Survey, encoders: Encoders
) -> tuple[FusionConfig, FusionProcessor]:
    """Return the configuration and processor of a new model for the surveyed samples."""
    config = _config(options, source, survey, encoders)
    seconds = _audio_seconds(options, config, source)
    processor = FusionProcessor.fit(
        config.parsed_sources(), survey.texts, options.vocab_size, seconds, encoders.preparations
    )
    config.vocab_size = processor.vocab_size
    return config, processor


def _config(
    options: TrainOptions, source: ShardSource | FeatureSource, survey: Survey, encoders: Encoders
) -> FusionConfig:
    modalities = _modalities(options, survey)
    if isinstance(source, FeatureSource):
        return FusionConfig(sources=column_sources(source, modalities), **options.model)
    config = FusionConfig.for_media(modalities, sources=encoders.sources, **options.model)
    for name, source_config in config.parsed_sources().items():
        if source_config.modality == "text" and source_config.kind != "pretrained":
            config.sources[name]["max_tokens"] = options.text_tokens  # type: ignore[index]  # set after construction
    return config


def _audio_seconds(options: TrainOptions, config: FusionConfig, source: ShardSource | FeatureSource) -> float:
    """Return the length of the audio window; 1 if no encoder needs it. Raises UsageError."""
    sources = config.parsed_sources().values()
    has_builtin = any(
        source_config.modality == "audio" and source_config.kind != "pretrained" for source_config in sources
    )
    if options.audio_seconds is not None and not has_builtin:
        raise UsageError(
            "`audio_seconds`: the model has no built-in audio encoder, and the window of a pretrained encoder is "
            "fixed; omit it"
        )
    if options.audio_seconds is None and has_builtin and isinstance(source, ShardSource):
        return source.longest_audio_seconds(MAX_SURVEYED_CLIPS, MAX_AUDIO_SECONDS)
    return options.audio_seconds or 1.0


def _modalities(options: TrainOptions, survey: Survey) -> tuple[Modality, ...]:
    """Return the requested modalities, or all modalities present. Raises MissingModalityError."""
    present = [modality for modality in FUSION_MODALITIES if survey.modalities[modality]]
    if options.captions == CAPTION_IS_TEXT:
        present = [modality for modality in present if modality != "text"]
    requested = options.modalities or [modality for modality, _ in options.encoders]
    missing = [modality for modality in dict.fromkeys(requested) if modality not in present]
    if missing or not present:
        raise MissingModalityError(
            f"none of the {survey.samples:,} samples has {' or '.join(missing) or 'an image, audio or text'}; list the "
            "fields with `mmbeam inspect`, or name them with `image_field`, `audio_field`, `text_field`"
        )
    return tuple(options.modalities or present)


def shard_source(
    options: TrainOptions, processor: FusionProcessor | None = None, counts: Mapping[Split, int] | None = None
) -> ShardSource:
    """Return the source of the shards' samples, decoded as `processor` needs them; without a processor, texts only."""
    shards = list_shards(options.input, options.strict_input, options.allow_local_paths, options.reading.fields)
    source = ShardSource(
        units=plan_units(shards, []),
        labelling=_labelling(options),
        reading=options.reading,
        counts=counts or {},
        seed=options.seed,
    )
    if processor is None:
        return source
    rate = processor.sampling_rate
    needs = Needs(
        modalities=frozenset(processor.modalities),
        sampling_rates=frozenset(() if rate is None else (rate,)),
        image_side=processor.image_side,
    )
    return replace(source, needs=needs, modalities=needs.modalities)


def row_source(
    options: TrainOptions, processor: FusionProcessor | None = None, counts: Mapping[Split, int] | None = None
) -> FeatureSource:
    """Return the source of the Parquet files' rows, with the columns of the processor, or else of the options."""
    columns: Mapping[str, Modality | None] | None = processor.columns if processor else None
    if processor is None and options.columns is not None:
        columns = dict(map(column_modality, options.columns))
    return FeatureSource(
        paths=options.input,
        captions=captions_of(options.input, options.captions, options.captions_from, options.allow_local_paths),
        allow_local_paths=options.allow_local_paths,
        labelling=_labelling(options),
        columns=columns,
        counts=counts or {},
        seed=options.seed,
    )


def _labelling(options: TrainOptions) -> Labelling:
    return Labelling(
        captions=options.captions, clauses=options.clauses, group=options.group, split_fractions=options.split_fractions
    )


def new_model(options: TrainOptions, setup: Setup, device: torch.device) -> tuple[FusionModel, list[torch.nn.Module]]:
    """Return the initial model and its frozen modules.

    Weights come from `init` where it has them; the others are drawn with the seed of the options. Raises UsageError or
    ModelError.
    """
    config = with_training_options(setup.config, options)
    torch.manual_seed(options.seed)
    if options.init is None:
        model = FusionModel(config).to(device)
        load_encoders(model, options.encoders)
    else:
        directory = resolve(options.init).directory
        model = load_pretrained(FusionModel, directory, device, torch.float32, TRAINING_HEADS, config=config)
    return model, frozen_parts(model, options.freeze)


def with_training_options(config: FusionConfig, options: TrainOptions) -> FusionConfig:
    """Return the configuration with the losses and dropout of the options."""
    weights = {**(config.loss_weights or {}), **options.loss_weights}
    changed = {"dropout": options.dropout, "label_smoothing": options.label_smoothing, "loss_weights": weights}
    result: FusionConfig = FusionConfig.from_dict({**config.to_dict(), **changed})
    return result


def frozen_parts(model: FusionModel, names: Sequence[str]) -> list[torch.nn.Module]:
    """Return the modules with these names: encoders of sources, or parts in SHARED. Raises UsageError for other names.

    "words" is the token embedding that the text encoders and the decoder share.
    """
    _check_freeze(model.config, names)
    shared = {"words": model.words, "space": model.space, "fusion": model.fuser, "generator": model.decoder}
    return [shared[name] if name in shared else model.encoders[name] for name in names]


def _check_freeze(config: FusionConfig, names: Sequence[str]) -> None:
    parts = [*config.parsed_sources(), *SHARED]
    for name in names:
        if name not in parts:
            raise UsageError(f"`freeze` {name}: the parts of this model are {', '.join(parts)}")
