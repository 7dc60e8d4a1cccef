"""Columns of features as the sources of a model: how long their sequences are, and which model made them."""

import logging
from collections.abc import Collection
from itertools import islice
from typing import Any

from mmbeam.errors import UsageError
from mmbeam.models.fusion.configuration import feature_source
from mmbeam.models.fusion.processing import FusionProcessor
from mmbeam.names import Modality
from mmbeam.training.rows import FeatureSource

log = logging.getLogger(__name__)

MEASURED = 1000  # rows whose sequences say how long they are
MAX_TOKENS = 1500  # of a sequence that is read: as many as Whisper makes of 30 seconds


def column_sources(source: FeatureSource, modalities: Collection[Modality]) -> dict[str, dict[str, Any]]:
    """A source for each column of these modalities. It is said which of them nobody knows who made."""
    found = {name: of for name, of in source.features().items() if of[0] in modalities}
    unknown = [name for name, (_, stored) in found.items() if stored.origin is None]
    if unknown:
        log.warning(
            "the files do not say which model made %s: nobody can check what it is given later", ", ".join(unknown)
        )
    sources = {name: feature_source(of, each.width, each.tokens, each.origin) for name, (of, each) in found.items()}
    for name, length in _longest(source, [name for name, (_, each) in found.items() if each.tokens]).items():
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
    for name, (_, stored) in source.features().items():
        expected, origin = processor.sources[name].origin, stored.origin
        if expected is not None and origin is None:
            log.warning("the files do not say which model made %s; the model takes what %s makes", name, expected)
        if expected is not None and origin is not None and origin.digest != expected.digest:
            raise UsageError(
                f"--input: {name} was made by {origin}, and the model takes what {expected} makes; give the "
                "features that it was trained on, or train a model of their own on these"
            )
