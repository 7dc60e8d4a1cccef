"""Inspect the input of a job before a model is loaded: the files that `input` names, and their first samples.

Nothing here imports Beam, torch or transformers, so that an error in the input is reported within a second.
"""

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from mmbeam.clean.where import SampleValues
from mmbeam.config import Reading
from mmbeam.errors import MissingModalityError, NoShardsError, UsageError, did_you_mean
from mmbeam.features.files import feature_files, is_features
from mmbeam.names import FEATURE_SUFFIX, KINDS, Modality
from mmbeam.readers.listing import list_shards
from mmbeam.readers.paths import public_path
from mmbeam.readers.samples import with_rows
from mmbeam.report.inspect import Probe, probe
from mmbeam.types import Needs, Shard

if TYPE_CHECKING:
    from mmbeam.jobs.options import JobOptions

log = logging.getLogger(__name__)

SEARCHED_SAMPLES = 2000  # of each of the first shards, for a field that an option names
MADE_BY = "mmbeam"  # `made_by` in the JSON of the samples of corpus/, which the shipped model was trained on
# What to use instead of the shipped model, by the modality of the samples.
_CAPTIONERS = {
    "image": "--model Salesforce/blip-image-captioning-base",
    "audio": "--model openai/whisper-small --task transcribe",
    "text": "--model google/flan-t5-base --task summarize",
}
_ENCODERS = {
    "image": "--model openai/clip-vit-base-patch32",
    "audio": "--model laion/clap-htsat-unfused",
    "text": "--model sentence-transformers/all-MiniLM-L6-v2",
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The files of an input, and the contents of the first samples if they are shards."""

    files: tuple[Shard, ...]
    features: bool = False  # the files are Parquet of features, not shards
    first: Probe = field(default_factory=Probe)


def look_up(
    patterns: Sequence[str],
    reading: Reading,
    *,
    strict: bool = False,
    allow_local_paths: bool = False,
    features: bool = False,
    moved: Sequence[str] = (),
) -> Inputs:
    """List the files that `patterns` name, and read the first samples of shards.

    With `features`, the patterns may also name files of features.

    Raises NoShardsError, UsageError for an invalid pattern and for a field of `reading` that no sample has, ShardError
    if no shard can be read.
    """
    files = feature_files(patterns, strict, allow_local_paths) if features else []
    if files and is_features(files[0]):
        return Inputs(files=tuple(as_moved(files, moved)), features=True)
    try:
        shards = list_shards(patterns, strict, allow_local_paths, reading.fields)
    except NoShardsError:
        if features or not (files := feature_files(patterns, strict, allow_local_paths)):
            raise
        shards = files
    parquets = [shard for shard in shards if shard.path.lower().endswith(FEATURE_SUFFIX)]
    if not features and parquets and is_features(parquets[0], if_unreadable=False):
        raise UsageError(
            f"`input`: expected shards (tar files), found rows of an mmbeam job ({parquets[0].path}); name the shards "
            "that the job read"
        )
    shards = with_rows(shards)
    first = probe(shards, reading, metadata=True)
    check_named_fields(shards, first, reading)
    return Inputs(files=tuple(as_moved(shards, moved)), first=first)


def check_named_fields(shards: Sequence[Shard], first: Probe, reading: Reading) -> None:
    """Raise UsageError for a field that `reading` names and that no sample of the first shards has.

    If none of the `first` samples has it, SEARCHED_SAMPLES of each shard are searched.
    """
    chosen = {kind: getattr(reading.fields, kind) for kind in KINDS}
    if first.samples and any(name is not None and name not in first.fields for name in chosen.values()):
        first = probe(shards, reading, samples=SEARCHED_SAMPLES)
    for kind, name in chosen.items():
        if first.samples and name is not None and name not in first.fields:
            present = list(first.fields)
            raise UsageError(
                f"`{kind}_field` {name}: none of the {'' if first.whole else 'first '}{first.samples:,} samples has "
                f"this field; they have {', '.join(present)}{did_you_mean(name, present)}"
            )


def as_moved(shards: Sequence[Shard], moved: Sequence[str]) -> list[Shard]:
    """Return the shards with the paths that they had before the corpus was moved.

    Each of `moved` is OLD=NEW: a shard under NEW keeps its identity, the path under OLD, and is read from NEW. Its etag
    is dropped, since a copy has another one; the size is still compared. Raises UsageError.
    """
    result = list(shards)
    for pair in moved:
        old, equals, new = pair.partition("=")
        if not (old and equals and new):
            raise UsageError(f"`moved` {pair}: expected OLD=NEW, the former and the present path of the shards")
        before, after = public_path(old).rstrip("/"), public_path(new).rstrip("/")
        count = 0
        for number, shard in enumerate(result):
            if shard.path == after or shard.path.startswith(f"{after}/"):
                result[number] = replace(shard, path=before + shard.path[len(after) :], etag=None)
                count += 1
        if not count:
            raise UsageError(f"`moved` {pair}: no shard of the input is under {after}")
    return result


def inputs_of(options: "JobOptions", features: bool = False) -> Inputs:
    """Return the files of the input and their first samples; the input may be `features`. See `look_up`."""
    known: Inputs | None = options.inputs
    return known or look_up(
        options.input,
        options.reading,
        strict=options.strict_input,
        allow_local_paths=options.allow_local_paths,
        features=features,
        moved=options.moved,
    )


def check_modalities(probe: Probe, modalities: Sequence[Modality], required: bool) -> None:
    """Raise MissingModalityError if the input has none of `modalities`, or with `required` not all of them.

    Log a warning instead if the probe did not see the whole input.
    """
    missing = [modality for modality in modalities if modality not in probe.modalities]
    if not probe.samples or not missing or (not required and len(missing) < len(modalities)):
        return
    present = ", ".join(sorted(probe.modalities)) or "none of image, audio, text and video"
    message = f"expected {' and '.join(missing)} in the first samples of the input, found {present}"
    if probe.whole:
        raise MissingModalityError(f"{message}; see `mmbeam inspect`, and `image_field`, `audio_field`, `text_field`")
    log.warning("%s; continuing, since there are more samples", message)


def check_frames(reading: Reading, needs: Sequence[Needs]) -> None:
    """Raise UsageError unless the models take equal numbers of frames, and as many as the options choose."""
    counts = sorted(frozenset().union(*(need.frames for need in needs)))
    if len(counts) > 1:
        listed = ", ".join(map(str, counts))
        raise UsageError(f"`models`: they take different numbers of frames of a video ({listed}); run a job for each")
    if counts and (reading.fps is not None or reading.frames not in (None, *counts)):
        chosen = f"`fps` {reading.fps:g}" if reading.fps is not None else f"`frames` {reading.frames}"
        raise UsageError(f"{chosen}: the model takes {counts[0]} frames of a video; omit it")


def shipped_model_warning(inputs: Inputs, patterns: Sequence[str], job: Literal["caption", "embed"]) -> str | None:
    """Return a warning that the shipped model is of no use for these samples; None for the corpus of the demo."""
    if any(_made_by(values) == MADE_BY for values in map(SampleValues, inputs.first.first)) or not inputs.first.samples:
        return None
    models = _CAPTIONERS if job == "caption" else _ENCODERS
    model = next((models[name] for name in models if name in inputs.first.modalities), models["image"])
    paths = " ".join(f"--input {shlex.quote(public_path(path) if '://' in path else path)}" for path in patterns)
    return (
        "without --model the model that ships with mmbeam is used. It knows only the shapes and tones of the corpus "
        f"that `mmbeam demo` makes, and these samples are others: its {'texts' if job == 'caption' else 'vectors'} "
        f"about them are meaningless. Use a model for your data: mmbeam {job} {model} {paths} --output OTHER_DIR. "
        "--model shipped silences this warning"
    )


def _made_by(values: SampleValues) -> object:
    metadata = values["metadata"]
    return metadata.get("made_by") if isinstance(metadata, dict) else None
