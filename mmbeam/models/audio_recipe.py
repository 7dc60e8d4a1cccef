"""Read how a checkpoint wants its sound, from its own feature extractor file. The kernels are in ops/.

What is not supported is a ModelError that names the file, the option and its value; options that the
reference extractors themselves never read (top_db, nb_max_frames, chunk_length_s, ...) are ignored.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mmbeam.errors import ModelError
from mmbeam.models.loading import read_json
from mmbeam.ops.audio import WaveRecipe
from mmbeam.ops.log_mel import AstRecipe, ClapRecipe, GemmaRecipe, Padding, Truncation, WhisperRecipe


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


def read_ast_recipe(directory: Path) -> AstRecipe:
    """The recipe of an AST checkpoint; its defaults are those of ASTFeatureExtractor."""
    options = _Options(*_feature_extractor(directory))
    options.only("feature_extractor_type", "ASTFeatureExtractor")
    options.only("sampling_rate", 16000)  # its frames are counted in samples at this rate
    normalized = options.flag("do_normalize", True)
    return AstRecipe(
        n_mels=options.count("num_mel_bins", 128),
        n_frames=options.count("max_length", 1024),
        mean=options.number("mean", -4.2677393, least=-1e6) if normalized else 0.0,
        spread=2.0 * options.number("std", 4.5689974, least=1e-6) if normalized else 1.0,
    )


def read_gemma_recipe(directory: Path) -> GemmaRecipe:
    """The recipe of a Gemma 4 or EmbeddingGemma 2 checkpoint; its defaults are those of Gemma4AudioFeatureExtractor."""
    options = _Options(*_feature_extractor(directory))
    options.only("feature_extractor_type", "Gemma4AudioFeatureExtractor")
    options.only("dither", 0.0)  # noise: no two runs alike
    options.only("preemphasis", 0.0)
    for key in ("per_bin_mean", "per_bin_stddev"):
        options.only(key, None)
    rate = options.count("sampling_rate", 16000)
    frame = round(rate * options.number("frame_length_ms", 20.0, least=1.0) / 1000)
    return GemmaRecipe(
        n_mels=options.count("feature_size", 128),
        sampling_rate=rate,
        frame_length=frame,
        hop_length=round(rate * options.number("hop_length_ms", 10.0, least=1.0) / 1000),
        n_fft=(1 + options.flag("fft_overdrive", False)) * 2 ** math.ceil(math.log2(frame)),
        low=options.number("min_frequency", 0.0),
        high=options.number("max_frequency", 8000.0),
        floor=options.number("mel_floor", 1e-3, least=1e-12),
        loudness=options.number("input_scale_factor", 1.0),
    )


def read_wave_recipe(directory: Path) -> WaveRecipe:
    """The recipe of a wav2vec2, HuBERT or WavLM checkpoint; its defaults are those of Wav2Vec2FeatureExtractor."""
    options = _Options(*_feature_extractor(directory))
    options.only("feature_extractor_type", "Wav2Vec2FeatureExtractor")
    options.only("feature_size", 1)
    return WaveRecipe(
        sampling_rate=options.count("sampling_rate", 16000),
        normalize=options.flag("do_normalize", True),
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

    def number(self, key: str, default: float, least: float = 0.0) -> float:
        value = self.options.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise self._error(key, f"a number from {least:g} on")
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

    def flag(self, key: str, default: bool) -> bool:
        value = self.options.get(key, default)
        if not isinstance(value, bool):
            raise self._error(key, "true or false")
        return value

    def only(self, key: str, supported: str | float | None) -> None:
        if self.options.get(key, supported) != supported:
            raise self._error(key, repr(supported))

    def _error(self, key: str, expected: str) -> ModelError:
        return ModelError(f"{self.where}: {key} is {self.options.get(key)!r}; expected {expected}")
