"""Read how a checkpoint wants its sound, from its own feature extractor file. The kernels are ops/log_mel.py's.

What is not supported is a ModelError that names the file, the option and its value; options that the
reference extractors themselves never read (top_db, nb_max_frames, chunk_length_s, ...) are ignored.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mmbeam.errors import ModelError
from mmbeam.models.loading import read_json
from mmbeam.ops.log_mel import ClapRecipe, Padding, Truncation, WhisperRecipe


def read_whisper_recipe(directory: Path) -> WhisperRecipe:
    """The recipe of a Whisper checkpoint; its defaults are those of WhisperFeatureExtractor."""
    options = _Options(*_feature_extractor(directory))
    options.only("feature_extractor_type", "WhisperFeatureExtractor")
    options.only("padding_value", 0.0)
    options.only("padding_side", "right")
    options.only("dither", 0.0)  # noise: no two runs alike
    rate = options.count("sampling_rate", 16000)
    return WhisperRecipe(
        n_mels=options.count("feature_size", 80),
        sampling_rate=rate,
        hop_length=options.count("hop_length", 160),
        n_fft=options.count("n_fft", 400),
        n_samples=options.count("chunk_length", 30) * rate,
    )


def read_clap_recipe(directory: Path) -> ClapRecipe:
    """The recipe of a CLAP checkpoint; its defaults are those of ClapFeatureExtractor."""
    options = _Options(*_feature_extractor(directory))
    options.only("feature_extractor_type", "ClapFeatureExtractor")
    rate = options.count("sampling_rate", 48000)
    return ClapRecipe(
        n_mels=options.count("feature_size", 64),
        sampling_rate=rate,
        hop_length=options.count("hop_length", 480),
        n_fft=options.count("fft_window_size", 1024),
        n_samples=options.count("max_length_s", 10) * rate,
        low=options.number("frequency_min", 0.0),
        high=options.number("frequency_max", 14000.0),
        truncation=cast(Truncation, options.choice("truncation", "fusion", ("fusion", "rand_trunc"))),
        padding=cast(Padding, options.choice("padding", "repeatpad", ("repeatpad", "repeat", "pad"))),
    )


def _feature_extractor(directory: Path) -> tuple[Mapping[str, Any], str]:
    """The extractor's options and the file they stand in: processor_config.json before the older name."""
    nested = read_json(directory, "processor_config.json", required=False)
    for key in ("feature_extractor", "audio_processor"):
        if isinstance(nested.get(key), dict):
            return nested[key], str(directory / "processor_config.json")
    name = "preprocessor_config.json"
    return read_json(directory, name), str(directory / name)


class _Options:
    """Checked access to one file's options."""

    def __init__(self, options: Mapping[str, Any], where: str) -> None:
        self.options, self.where = options, where

    def number(self, key: str, default: float) -> float:
        value = self.options.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise self._error(key, "a number from 0 on")
        return float(value)

    def count(self, key: str, default: int) -> int:
        value = self.number(key, default)
        if value < 1 or value != int(value):
            raise self._error(key, "a whole number from 1 on")
        return int(value)

    def choice(self, key: str, default: str, choices: Sequence[str]) -> str:
        value = self.options.get(key, default)
        if value not in choices:
            raise self._error(key, " or ".join(map(repr, choices)))
        return str(value)

    def only(self, key: str, supported: str | float) -> None:
        if self.options.get(key, supported) != supported:
            raise self._error(key, repr(supported))

    def _error(self, key: str, expected: str) -> ModelError:
        return ModelError(f"{self.where}: {key} is {self.options.get(key)!r}; expected {expected}")
