"""The encoders of a new model, by name: built-in kinds, or pretrained encoders of transformers models.

Built-in kinds are trained from scratch. Any other name is a transformers model, whose encoder of the modality is
used with its weights; models/fusion/pretrained.py reads its configuration.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmbeam.errors import ModelError, UsageError
from mmbeam.models.fusion.audio import Preparation
from mmbeam.models.fusion.configuration import FusionConfig, SourceConfig, media_source
from mmbeam.models.fusion.modeling import FusionModel
from mmbeam.models.fusion.pretrained import load_weights, read_preprocessing, read_source
from mmbeam.models.loading import check_weights, digest, resolve
from mmbeam.names import BUILTIN_ENCODERS, Modality
from mmbeam.training.options import EncoderName, TrainOptions
from mmbeam.types import Origin


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The configurations of the encoders, by the names of their sources."""

    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    preparations: dict[str, Preparation] = field(default_factory=dict)  # of the pretrained encoders


def source_names(encoders: Sequence[EncoderName]) -> dict[str, EncoderName]:
    """Return the encoders by the names of their sources: text, text_2, text_3 for three text encoders."""
    sources: dict[str, EncoderName] = {}
    counts: Counter[Modality] = Counter()
    for modality, encoder in encoders:
        counts[modality] += 1
        sources[modality if counts[modality] == 1 else f"{modality}_{counts[modality]}"] = (modality, encoder)
    return sources


def read_encoders(encoders: Sequence[EncoderName], text_tokens: int) -> Encoders:
    """Read the configurations and preprocessing of the encoders. Weights must exist, but are not read.

    Texts are truncated to `text_tokens`, or to the limit of a pretrained encoder if that is lower. Raises ModelError
    if a file of an encoder is missing or unsupported.
    """
    result = Encoders()
    for name, (modality, encoder) in source_names(encoders).items():
        builtin = next((kind for kind in BUILTIN_ENCODERS if kind == encoder), None)
        if builtin is not None:
            result.sources[name] = media_source(modality, builtin)
            continue
        try:
            result.sources[name], result.preparations[name] = _read(name, modality, encoder, text_tokens)
        except ModelError as error:
            kinds = ", ".join(BUILTIN_ENCODERS)
            raise ModelError(
                f"`encoders` {modality}={encoder}: expected one of {kinds}, or a supported model: {error}"
            ) from error
    return result


def _read(name: str, modality: Modality, encoder: str, text_tokens: int) -> tuple[dict[str, Any], Preparation]:
    files = resolve(encoder)
    source = read_source(files.directory, modality, max_tokens=text_tokens)
    check_weights(files.directory)
    preparation = read_preprocessing(files.directory, SourceConfig.parse(name, source))
    model = files.name if files.revision is None else f"{files.name}@{files.revision}"
    return source | {"origin": Origin(model, digest(files.directory))._asdict()}, preparation


def unfreeze(config: FusionConfig, names: Sequence[str]) -> None:
    """Make these pretrained encoders trainable. Raises UsageError for a name that is not a pretrained encoder."""
    pretrained = [name for name, source in config.parsed_sources().items() if source.kind == "pretrained"]
    for name in names:
        if name not in pretrained:
            known = ", ".join(pretrained) or "none"
            raise UsageError(f"`unfreeze` {name}: the pretrained encoders of this model are {known}; see `encoders`")
        config.sources[name]["frozen"] = False  # type: ignore[index]  # `sources` is set after construction


def unsaved_prefixes(model: FusionModel, options: TrainOptions) -> tuple[str, ...]:
    """Return the name prefixes of the weights that a checkpoint omits: those of frozen pretrained encoders.

    `load_encoders` reads them again and verifies their digest. With `init` nothing is omitted.
    """
    frozen = [name for name, source in model.sources.items() if source.kind == "pretrained" and source.frozen]
    return tuple(f"encoders.{name}.model." for name in frozen if options.init is None)


def load_encoders(model: FusionModel, encoders: Sequence[EncoderName]) -> None:
    """Load the weights of the pretrained encoders into the model.

    A hub name is resolved at the commit that the training started with. Raises ModelError if the files have changed.
    """
    for name, (modality, encoder) in source_names(encoders).items():
        origin = model.sources[name].origin
        if origin is None:  # a built-in encoder
            continue
        pinned = origin.model.startswith(f"{encoder.partition('@')[0]}@")
        files = resolve(origin.model if pinned else encoder)
        if digest(files.directory) != origin.digest:
            raise ModelError(
                f"`encoders` {modality}={encoder}: its files have changed since the training started; restore them, or "
                "start over with `overwrite`"
            )
        load_weights(model.encoders[name], modality, files.directory)
