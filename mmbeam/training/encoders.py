"""The encoders that a training is asked for by name: the source that each becomes, and where its files are.

The model's own kinds are made new; any other name is a model of transformers, whose encoder of the modality
is taken with its weights. What is read of it before the training begins is in models/fusion/pretrained.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmbeam.errors import ModelError, UsageError
from mmbeam.models.fusion.audio import Preparation
from mmbeam.models.fusion.configuration import FusionConfig, SourceConfig, media_source
from mmbeam.models.fusion.modeling import FusionModel
from mmbeam.models.fusion.pretrained import load_weights, read_preprocessing, read_source
from mmbeam.models.loading import Resolved, check_weights, digest, resolve
from mmbeam.names import Modality
from mmbeam.training.options import OWN_ENCODERS, EncoderName, TrainOptions
from mmbeam.types import Origin


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """What was asked for, by the names of the sources."""

    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    preparations: dict[str, Preparation] = field(default_factory=dict)  # of those that are pretrained


def source_names(encoders: Sequence[EncoderName]) -> dict[str, EncoderName]:
    """The encoders by the names of their sources: text, text_2, text_3 for three of texts."""
    named: dict[str, EncoderName] = {}
    for modality, encoder in encoders:
        number = 1 + sum(other == modality for other, _ in named.values())
        named[modality if number == 1 else f"{modality}_{number}"] = (modality, encoder)
    return named


def read_encoders(encoders: Sequence[EncoderName], text_tokens: int) -> Encoders:
    """Read the configurations and what is done to their inputs; no weights, but they must be there.

    Texts are cut to `text_tokens`, or what a pretrained encoder takes if that is less.

    Raises ModelError naming the encoder and what is missing or does not fit.
    """
    found = Encoders()
    for name, (modality, encoder) in source_names(encoders).items():
        own = next((kind for kind in OWN_ENCODERS if kind == encoder), None)
        if own is not None:
            found.sources[name] = media_source(modality, own)
            continue
        try:
            found.sources[name], found.preparations[name] = _read(name, modality, encoder, text_tokens)
        except ModelError as error:
            kinds = ", ".join(OWN_ENCODERS)
            raise ModelError(f"--encoder {modality}={encoder}: neither one of {kinds}, nor usable: {error}") from error
    return found


def _read(name: str, modality: Modality, encoder: str, text_tokens: int) -> tuple[dict[str, Any], Preparation]:
    files = resolve(encoder)
    source = read_source(files.directory, modality, max_tokens=text_tokens)
    check_weights(files.directory)
    preparation = read_preprocessing(files.directory, SourceConfig.parse(name, source))
    return source | {"origin": _origin(files)._asdict()}, preparation


def _origin(files: Resolved) -> Origin:
    name = files.name if files.revision is None else f"{files.name}@{files.revision}"
    return Origin(name, digest(files.directory))


def unfreeze(config: FusionConfig, names: Sequence[str]) -> None:
    """Let these pretrained encoders learn. Raises UsageError for a name that is none of one."""
    pretrained = [name for name, source in config.parsed_sources().items() if source.kind == "pretrained"]
    for name in names:
        if name not in pretrained:
            there = ", ".join(pretrained) or "none"
            raise UsageError(f"--unfreeze {name}: the pretrained encoders of this model are {there}; see --encoder")
        config.sources[name]["frozen"] = False  # type: ignore[index]  # a configuration that is made has sources


def unsaved_prefixes(model: FusionModel, options: TrainOptions) -> tuple[str, ...]:
    """How the names of weights begin that a checkpoint need not hold: of encoders that stay as their own files are.

    Those files are known by their digest (see `load_encoders`); those of a model to start from are not.
    """
    frozen = [name for name, source in model.sources.items() if source.kind == "pretrained" and source.frozen]
    return tuple(f"encoders.{name}.model." for name in frozen if options.init is None)


def load_encoders(model: FusionModel, encoders: Sequence[EncoderName]) -> None:
    """Put the weights of the pretrained encoders into the model.

    A hub name is taken at the commit that it meant when the training began. Raises ModelError if the files
    are not those of then.
    """
    for name, (modality, encoder) in source_names(encoders).items():
        origin = model.sources[name].origin
        if origin is None:  # one of the model's own
            continue
        pinned = origin.model.startswith(f"{encoder.partition('@')[0]}@")
        files = resolve(origin.model if pinned else encoder)
        if digest(files.directory) != origin.digest:
            raise ModelError(
                f"--encoder {modality}={encoder}: its files are not those that the training began with; put those "
                "back, or give --overwrite to start over"
            )
        load_weights(model.encoders[name], modality, files.directory)
