"""The options of a training run, with their defaults and checks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from mmbeam.config import Reading
from mmbeam.errors import UsageError
from mmbeam.names import OPTIMIZERS, SCHEDULES, SELECTIONS, Modality, Optimizer, Schedule, Selection
from mmbeam.readers.paths import public_path

COUNTS = (
    *("batch_size", "epochs", "steps", "patience", "validation_samples"),
    *("vocab_size", "search_steps", "text_tokens"),
)
NEW_MODEL_ONLY = ("audio_seconds", "columns", "modalities", "text_tokens")
PROBABILITIES = ("modality_dropout", "dropout", "label_smoothing")
EncoderName = tuple[Modality, str]  # one of BUILTIN_ENCODERS, or a transformers model: hub name or directory


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of one training run. `identity` is the part that must not change when it resumes."""

    input: tuple[str, ...]  # shards, or Parquet files of features
    strict_input: bool = False  # a pattern that matches nothing is an error
    allow_local_paths: bool = False  # lists that are fetched may name local paths, other servers and other buckets
    output: str  # a local directory
    reading: Reading = field(default_factory=Reading)  # shards only
    modalities: tuple[Modality, ...] | None = None  # None: all that the samples have
    columns: tuple[str, ...] | None = None  # of features; None: all columns whose names end in _embedding

    # A field of the sample's JSON, or a column of features. "text" is the sample's text, which then is not an input.
    captions: str = "caption"
    captions_from: str | None = None  # features only: a file with `key` and the captions, joined by key
    clauses: str | None = None  # field of the sample's JSON: {"image": ..., "audio": ..., "text": ...}
    group: str | None = None  # field of the sample's JSON; samples with the same value form a group
    split_fractions: tuple[float, float, float] = (0.9, 0.05, 0.05)  # of training, validation, test

    encoders: tuple[EncoderName, ...] = ()  # shards only; may have several of one modality; (): built-in encoders
    unfreeze: tuple[str, ...] = ()  # sources whose pretrained encoders are trained; the other encoders are frozen
    model: Mapping[str, Any] = field(default_factory=dict)  # arguments of FusionConfig
    vocab_size: int = 2000  # tokens; enough for the captions of a few thousand samples
    text_tokens: int = 64  # longer texts are truncated
    audio_seconds: float | None = None  # audio window; None: the longest of the first clips, at most 30
    init: str | None = None  # directory of the model to start from
    freeze: tuple[str, ...] = ()  # parts that are not trained: names of sources, "fusion", "generator", ...

    loss_weights: Mapping[str, float] = field(default_factory=dict)  # override the weights of the model's configuration
    modality_dropout: float = 0.15  # probability that a modality of a sample is masked
    dropout: float = 0.1
    label_smoothing: float = 0.0
    optimizer: Optimizer = "adamw"
    learning_rate: float = 1e-3  # the highest
    warmup_steps: int | None = None  # None: 5 % of all steps
    schedule: Schedule = "cosine"
    weight_decay: float = 0.01
    clip_norm: float = 1.0  # largest norm of all gradients; 0: no clipping
    batch_size: int = 64
    epochs: int = 20
    steps: int | None = None  # optimizer steps; replaces `epochs`
    patience: int | None = 5  # epochs without a better validation score; None: never stop early
    select: Selection = "loss"  # the validation score that selects the best weights
    validation_samples: int = 1000  # largest number of validation samples that are scored after each epoch
    search: int = 0  # number of configurations to try first; the best by validation score is trained
    search_steps: int = 200  # of each configuration
    seed: int = 0

    device: str = "auto"
    mixed_precision: bool = True  # bfloat16 where the device is a GPU; a CPU computes in float32
    checkpoint_seconds: float = 300.0  # between two checkpoints; every epoch ends with a checkpoint too

    def __post_init__(self) -> None:
        check(self)

    def identity(self) -> dict[str, Any]:
        """Return the options that determine the weights, as JSON values."""
        excluded = ("output", "device", "checkpoint_seconds", "strict_input", "allow_local_paths")
        values = {f.name: _to_json(getattr(self, f.name)) for f in fields(self) if f.name not in excluded}
        encoders = [[modality, public_path(name) if "://" in name else name] for modality, name in self.encoders]
        reading = _to_json(self.reading.configuration())
        return values | {"input": [public_path(path) for path in self.input], "encoders": encoders, "reading": reading}


def _to_json(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _to_json(item) for name, item in value.items()}
    return [_to_json(item) for item in value] if isinstance(value, tuple | list) else value


def check(options: TrainOptions) -> None:
    """Raise UsageError for invalid or contradictory options."""
    _check_choice("optimizer", options.optimizer, OPTIMIZERS)
    _check_choice("schedule", options.schedule, SCHEDULES)
    _check_choice("select", options.select, SELECTIONS)
    if not options.loss_weights.get("caption", 1.0) > 0:
        raise UsageError("`loss_weights` caption: expected more than 0, or no captions are learned")
    for name, weight in options.loss_weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UsageError(f"`loss_weights` {name}={weight}: expected 0 or more")
    _check_numbers(options)
    _check_together(options)


def _check_numbers(options: TrainOptions) -> None:
    for name in COUNTS:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"`{name}` {value}: expected at least 1")
    for name in (*PROBABILITIES, "seed", "warmup_steps", "learning_rate", "weight_decay", "clip_norm"):
        value = getattr(options, name)
        if value is not None and (not (math.isfinite(value) and value >= 0) or (name in PROBABILITIES and value >= 1)):
            below = ", below 1" if name in PROBABILITIES else ""
            raise UsageError(f"`{name}` {value}: expected 0 or more{below}")
    if options.audio_seconds is not None and not (math.isfinite(options.audio_seconds) and options.audio_seconds > 0):
        raise UsageError(f"`audio_seconds` {options.audio_seconds}: expected more than 0")


def _check_together(options: TrainOptions) -> None:
    encoded = {modality for modality, _ in options.encoders}
    if options.captions == "text" and "text" in {*(options.modalities or ()), *encoded}:
        raise UsageError("`captions` text: the text is the target, so it cannot be an input; omit it")
    if options.modalities is not None and not encoded <= set(options.modalities):
        excess = ", ".join(sorted(encoded - set(options.modalities)))
        raise UsageError(f"`encoders` {excess}: not in `modalities` {','.join(options.modalities)}")
    if options.freeze and options.init is None:
        raise UsageError("`freeze`: requires `init`; random weights cannot be frozen")
    both = sorted(set(options.freeze) & set(options.unfreeze))
    if both:
        raise UsageError(f"`freeze` and `unfreeze` {', '.join(both)}: mutually exclusive")
    architecture = [*sorted(options.model), *["`encoders`"] * bool(options.encoders)]
    architecture += [f"`{name}`" for name in NEW_MODEL_ONLY if getattr(options, name) != getattr(TrainOptions, name)]
    if options.init is not None and architecture:
        raise UsageError(f"`init` has its own architecture; omit {', '.join(architecture)}")
    if (
        len(options.split_fractions) != 3
        or min(options.split_fractions) < 0
        or not math.isclose(sum(options.split_fractions), 1, abs_tol=1e-9)
    ):
        raise UsageError(f"`split_fractions` {options.split_fractions}: expected three fractions that add up to 1")
    if "://" in options.output:
        raise UsageError(f"`output` {public_path(options.output)}: expected a local directory")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"`{name}` {value}: expected one of {', '.join(known)}")


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the differences of two identities, one line each: "learning_rate: 0.001 -> 0.002"."""
    lines: list[str] = []
    for name in dict.fromkeys((*old, *new)):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += difference(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: {before} -> {after}")
    return lines
