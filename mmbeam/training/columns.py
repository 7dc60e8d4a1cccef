"""Columns of features as the sources of a model: how long their sequences are, and which model made them."""

import logging
from collections.abc import Collection
from itertools import islice
from typing import Any

from mmbeam.features.schema import check_origin, warn_of_unknown_origin
from mmbeam.models.fusion.configuration import feature_source
from mmbeam.models.fusion.processing import FusionProcessor
from mmbeam.names import Modality
from mmbeam.training.rows import FeatureSource

log = logging.getLogger(__name__)

MEASURED = 1000  # rows whose sequences say how long they are
MAX_TOKENS = 1500  # of a sequence that is read: as many as Whisper makes of 30 seconds


def column_sources(source: FeatureSource, modalities: Collection[Modality]) -> dict[str, dict[str, Any]]:
    """Return a source for each column of these modalities. Those whose model is unknown are named in a warning."""
    columns = [column for column in source.features().values() if column.modality in modalities]
    unknown = [column.name for column in columns if column.origin is None]
    if unknown:
        log.warning(
            "the files do not name the model that made %s: features of another model will not be recognised",
            ", ".join(unknown),
        )
    sources = {
        column.name: feature_source(column.modality, column.width, column.tokens, column.origin)
        for column in columns
        if column.modality
    }
    for name, length in _longest(source, [column.name for column in columns if column.tokens]).items():
        sources[name]["max_tokens"] = length
    return sources


def _longest(source: FeatureSource, names: Collection[str]) -> dict[str, int]:
    """Of columns of sequences, how many vectors the longest of the first rows has."""
    longest = dict.fromkeys(names, 1)
    for example in islice(source.examples("train"), MEASURED if names else 0):
        features = example.make().features
        longest |= {name: max(longest[name], len(features[name])) for name in names if name in features}
    for name, length in longest.items():
        if length > MAX_TOKENS:
            log.warning("column %s: sequences of up to %d vectors are cut to %d", name, length, MAX_TOKENS)
    return {name: min(length, MAX_TOKENS) for name, length in longest.items()}


def check_origins(processor: FusionProcessor, source: FeatureSource) -> None:
    """Raise UsageError if another model made the features than those that the model was trained on."""
    for name, column in source.features().items():
        check_origin(f"`input`: {name}", processor.sources[name].origin, column.origin)
        warn_of_unknown_origin("`input`", name, processor.sources[name].origin, column.origin)
