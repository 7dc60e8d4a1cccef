"""Preprocessing recipes, read from a checkpoint's own processor files. The kernels that follow them are in ops/.

An option that changes pixels or samples and that the kernels do not support is a ModelError that names the file, the
option and its value. Options that the reference processors never read (top_db, nb_max_frames, chunk_length_s, ...)
are ignored.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import AutoImageProcessor, ViTImageProcessorPil

from mmbeam.errors import ModelError
from mmbeam.models.loading import read_json
from mmbeam.ops.audio import WaveRecipe
from mmbeam.ops.image import ImageRecipe, Interpolation, Patching, PooledPatching
from mmbeam.ops.log_mel import AstRecipe, ClapRecipe, GemmaRecipe, Padding, Truncation, WhisperRecipe

# Processors whose steps are exactly: resize, centre crop, rescale, normalise (and patch).
_PROCESSORS = (
    *("BitImageProcessor", "BlipImageProcessor", "CLIPImageProcessor", "ConvNextImageProcessor"),
    *("DINOv3ViTImageProcessor", "Gemma4ImageProcessor", "SiglipImageProcessor", "Siglip2ImageProcessor"),
    "ViTImageProcessor",
)
# transformers reads DINOv3's only where there is torchvision; its options are those of ViT's, with these defaults.
_DINOV3 = "DINOv3ViTImageProcessor"
_DINOV3_DEFAULTS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_INTERPOLATIONS: Mapping[int, Interpolation] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers

_USED = {
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "patch_size", "max_num_patches", "crop_pct"),
    *("max_soft_tokens", "pooling_kernel_size"),
}
_HARMLESS = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "model_input_names"),
    *("do_convert_rgb", "default_to_square", "input_data_format", "data_format", "return_tensors", "device"),
    "image_seq_length",
}


def read_image_recipe(directory: Path) -> ImageRecipe:
    """The recipe of the image processor in `directory`. Raises ModelError naming what is missing or unknown."""
    settings = _read_settings(directory)
    unknown = sorted(key for key, value in settings.items() if value and key not in _USED | _HARMLESS)
    if unknown:
        raise ModelError(f"{directory}: its image processor sets {', '.join(unknown)}, which is not implemented here")
    size, crop = _size_and_crop(directory, settings)
    recipe = ImageRecipe(
        size=size,
        interpolation=_interpolation(directory, settings.get("resample")),
        crop=crop,
        rounded=settings["image_processor_type"] != _DINOV3,
        scale=float(settings["rescale_factor"]) if settings.get("do_rescale") else 1.0,
        **_mean_std(settings),
    )
    if recipe.crop is None and not isinstance(recipe.size, tuple | Patching):
        raise ModelError(
            f"{directory}: its image processor gives pictures of different sizes; expected a fixed size or a crop"
        )
    return recipe


def read_pooled_recipe(directory: Path, vision: Any) -> ImageRecipe:
    """The recipe of a Gemma 4 image processor; ModelError where that vision configuration expects another."""
    recipe, side, pooling = read_image_recipe(directory), vision.patch_size, vision.pooling_kernel_size
    found = recipe.size
    if not isinstance(found, PooledPatching) or (found.patch_size, found.pooling) != (side, pooling):
        raise ModelError(
            f"{directory}: config.json expects patches of {side} pixels in groups of {pooling} x {pooling}, "
            f"its image processor makes {found}"
        )
    return recipe


def _read_settings(directory: Path) -> dict[str, Any]:
    if not any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ModelError(
            f"{directory}: has no preprocessor_config.json or processor_config.json, which say how to resize"
        )
    try:
        settings = _read_dinov3(directory) or _read_any(directory)
    except Exception as error:  # transformers raises whatever its parts raise
        raise ModelError(f"{directory}: its image processor cannot be read: {type(error).__name__}: {error}") from error
    if settings.get("image_processor_type") not in _PROCESSORS:
        raise ModelError(
            f"{directory}: its image processor is {settings.get('image_processor_type')}; "
            f"expected one of {', '.join(_PROCESSORS)}"
        )
    return settings


def _read_any(directory: Path) -> dict[str, Any]:
    auto: Any = AutoImageProcessor  # untyped
    processor = auto.from_pretrained(directory, backend="pil", local_files_only=True, trust_remote_code=False)
    return dict(processor.to_dict())


def _read_dinov3(directory: Path) -> dict[str, Any] | None:
    """The settings of a DINOv3 processor; None if it is another's."""
    nested = read_json(directory, "processor_config.json", required=False).get("image_processor")
    given = nested or read_json(directory, "preprocessor_config.json", required=False)
    if str(given.get("image_processor_type")).removesuffix("Fast") != _DINOV3:
        return None
    named = {key: value for key, value in given.items() if value is not None}
    processor: Any = ViTImageProcessorPil  # untyped
    return {**processor.from_dict(_DINOV3_DEFAULTS | named).to_dict(), "image_processor_type": _DINOV3}


def _size_and_crop(
    directory: Path, settings: Mapping[str, Any]
) -> tuple[int | tuple[int, int] | Patching | None, tuple[int, int] | None]:
    crop = _height_width(settings["crop_size"]) if settings.get("do_center_crop") else None
    if settings["image_processor_type"] != "ConvNextImageProcessor" or not settings["do_resize"]:
        return _size(directory, settings), crop
    if set(settings["size"]) != {"shortest_edge"} or crop is not None:
        raise ModelError(f"{directory}: its image processor has size {settings['size']}; expected shortest_edge alone")
    side = int(settings["size"]["shortest_edge"])
    if side >= 384:  # so the reference: large pictures are warped, others keep their aspect ratio and are cropped
        return (side, side), None
    return int(side / settings["crop_pct"]), (side, side)


def _size(directory: Path, settings: Mapping[str, Any]) -> int | tuple[int, int] | Patching | None:
    if settings["image_processor_type"] in ("Siglip2ImageProcessor", "Gemma4ImageProcessor"):
        if not settings["do_resize"]:
            raise ModelError(f"{directory}: do_resize is false; pictures must be resized to whole patches")
        return _patching(settings)
    if not settings["do_resize"]:
        return None
    size = settings["size"]
    if set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"])
    if set(size) == {"height", "width"}:
        return _height_width(size)
    raise ModelError(f"{directory}: its image processor has size {size}; expected shortest_edge, or height and width")


def _patching(settings: Mapping[str, Any]) -> Patching:
    side = settings["patch_size"]
    if settings["image_processor_type"] == "Siglip2ImageProcessor":
        return Patching(patch_size=side, max_patches=settings["max_num_patches"])
    pooling = settings["pooling_kernel_size"]
    return PooledPatching(patch_size=side, max_patches=settings["max_soft_tokens"] * pooling**2, pooling=pooling)


def _height_width(size: Mapping[str, int]) -> tuple[int, int]:
    return int(size["height"]), int(size["width"])


def _interpolation(directory: Path, resample: Any) -> Interpolation:
    if resample not in _INTERPOLATIONS:
        raise ModelError(
            f"{directory}: its image processor has resample {resample}; expected 2 (bilinear) or 3 (bicubic)"
        )
    return _INTERPOLATIONS[resample]


def _mean_std(settings: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    if not settings.get("do_normalize"):
        return {}
    return {"mean": tuple(settings["image_mean"]), "std": tuple(settings["image_std"])}


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
