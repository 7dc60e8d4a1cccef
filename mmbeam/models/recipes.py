"""Preprocessing recipes, read from a checkpoint's own processor files. The kernels that follow them are in ops/.

An option that changes pixels or samples and that the kernels do not support is a ModelError that names the file, the
option and its value. Options that the reference processors never read (top_db, nb_max_frames, chunk_length_s, ...)
are ignored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoImageProcessor, ViTImageProcessorPil

from mmbeam.errors import ModelError
from mmbeam.models.loading import quiet_transformers, read_json
from mmbeam.ops.audio import WaveRecipe
from mmbeam.ops.image import ImageRecipe, Interpolation, Patching, PooledPatching
from mmbeam.ops.log_mel import AstRecipe, ClapRecipe, GemmaRecipe, Padding, Truncation, WhisperRecipe
from mmbeam.types import ImageHWC

# Processors whose steps are exactly: resize, centre crop, rescale, normalise (and patch).
_PROCESSORS = (
    *("BitImageProcessor", "BlipImageProcessor", "CLIPImageProcessor", "ConvNextImageProcessor"),
    *("DINOv3ViTImageProcessor", "Gemma4ImageProcessor", "SiglipImageProcessor", "Siglip2ImageProcessor"),
    "ViTImageProcessor",
)
_INTERPOLATIONS: Mapping[int, Interpolation] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_USED_OPTIONS = {
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "patch_size", "max_num_patches", "crop_pct"),
    *("max_soft_tokens", "pooling_kernel_size"),
}
_HARMLESS_OPTIONS = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "model_input_names"),
    *("do_convert_rgb", "default_to_square", "input_data_format", "data_format", "return_tensors", "device"),
    "image_seq_length",
}
# Arguments of image processors. Without the format, they take an image of 3 rows for one of 3 channels.
AS_DECODED: Mapping[str, str] = {"input_data_format": "channels_last", "return_tensors": "pt"}
# transformers (5.20) reads DINOv3's processor only if torchvision is installed. Its options are those of ViT's, with
# other defaults. A test in tests/test_encoders_vision.py fails when transformers reads it without torchvision.
_DINOV3 = "DINOv3ViTImageProcessor"
_DINOV3_DEFAULTS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


class RecipeError(ModelError):
    """Settings of a processor that only the processor itself can follow."""


def read_image_processor(directory: Path) -> Any:
    """Read the checkpoint's own image processor, without torchvision. Raises ModelError."""
    if not any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ModelError(
            f"{directory}: expected an image processor (preprocessor_config.json or processor_config.json), found none"
        )
    auto: Any = AutoImageProcessor  # untyped
    quiet_transformers()
    try:
        return auto.from_pretrained(directory, backend="pil", local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises the errors of its parts
        raise ModelError(f"{directory}: unreadable image processor: {type(error).__name__}: {error}") from error


def read_image_recipe(directory: Path) -> ImageRecipe:
    """Return the recipe of the image processor in `directory`. Raises ModelError for what is missing or unsupported.

    transformers reads the files, in old and new layouts, with each class's defaults, without torchvision.
    """
    options = _image_options(directory)
    unsupported = sorted(
        name for name, value in options.items() if value and name not in _USED_OPTIONS | _HARMLESS_OPTIONS
    )
    if unsupported:
        raise RecipeError(f"{directory}: its image processor sets {', '.join(unsupported)}, which is unsupported")
    resample: Any = options.get("resample")
    if resample not in _INTERPOLATIONS:
        raise RecipeError(
            f"{directory}: its image processor has resample {resample}; expected 2 (bilinear) or 3 (bicubic)"
        )
    size, crop = _size_and_crop(directory, options)
    if crop is None and not isinstance(size, tuple | Patching):
        raise RecipeError(
            f"{directory}: its image processor makes images of different sizes; expected a fixed size or a crop"
        )
    recipe = ImageRecipe(
        size=size,
        interpolation=_INTERPOLATIONS[resample],
        crop=crop,
        rounded=options["image_processor_type"] != _DINOV3,
        scale=float(options["rescale_factor"]) if options.get("do_rescale") else 1.0,
    )
    if options.get("do_normalize"):
        recipe = replace(recipe, mean=tuple(options["image_mean"]), std=tuple(options["image_std"]))
    return recipe


class OwnPixels:
    """The checkpoint's own image processor, for settings that the kernels lack. It runs on the CPU, image by image.

    Raises RecipeError with the reason if it fails, or makes images of different sizes.
    """

    mean: None = None
    crop: None = None
    shorter_side: None = None  # pixels that it needs; None: unlimited

    def __init__(self, directory: Path, reason: str) -> None:
        self.note = f"{reason}; images are preprocessed by the checkpoint's own processor"
        try:
            self.processor = read_image_processor(directory)
            sizes = {tuple(self(np.full((*shape, 3), 127, np.uint8)).shape[-2:]) for shape in ((64, 64), (48, 80))}
        except Exception as error:  # transformers raises errors of many types
            raise RecipeError(reason) from error
        if len(sizes) > 1:
            raise RecipeError(reason)
        [self.size] = sizes

    def __call__(self, image: ImageHWC) -> torch.Tensor:
        """Return the pixels of an image, float32 [3, height, width]."""
        [pixels_CHW] = self.processor(image, **AS_DECODED)["pixel_values"]
        return cast(torch.Tensor, pixels_CHW)


def notes_of(recipe: ImageRecipe | OwnPixels) -> tuple[str, ...]:
    """Return what the summary says of the preprocessing."""
    return (recipe.note,) if isinstance(recipe, OwnPixels) else ()


def read_pixels(directory: Path) -> ImageRecipe | OwnPixels:
    """Return the recipe of the image processor in `directory`, or the processor if the kernels lack a setting."""
    try:
        return read_image_recipe(directory)
    except RecipeError as error:
        return OwnPixels(directory, str(error))


def read_pooled_recipe(directory: Path, vision: Any) -> ImageRecipe:
    """Return the recipe of a Gemma 4 image processor. Raises ModelError if the configuration `vision` needs another."""
    recipe, side, pooling = read_image_recipe(directory), vision.patch_size, vision.pooling_kernel_size
    size = recipe.size
    if not isinstance(size, PooledPatching) or (size.patch_size, size.pooling) != (side, pooling):
        raise ModelError(
            f"{directory}: config.json expects patches of {side} pixels in groups of {pooling} x {pooling}, "
            f"its image processor makes {size}"
        )
    return recipe


def check_image_size(directory: Path, side: int | Sequence[int], recipe: ImageRecipe | OwnPixels) -> None:
    """Raise ModelError unless the recipe makes images of `side` x `side`, or of `side` as (height, width)."""
    expected = (side, side) if isinstance(side, int) else tuple(side)
    size = recipe.crop or recipe.size
    if size != expected:
        raise ModelError(f"{directory}: config.json expects images of {expected}, its image processor makes {size}")


def check_patch_size(directory: Path, side: int, recipe: ImageRecipe) -> None:
    """Raise ModelError unless the recipe cuts images into patches of `side` pixels."""
    if not isinstance(recipe.size, Patching) or recipe.size.patch_size != side:
        raise ModelError(
            f"{directory}: config.json expects patches of {side} pixels, its image processor makes {recipe.size}"
        )


def _image_options(directory: Path) -> dict[str, Any]:
    """Return the options of the image processor, defaults included."""
    if not any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ModelError(
            f"{directory}: expected preprocessor_config.json or processor_config.json, which define the resizing; "
            "found neither"
        )
    try:
        options = _dinov3_options(directory)
        if options is None:
            auto: Any = AutoImageProcessor  # untyped
            processor = auto.from_pretrained(directory, backend="pil", local_files_only=True, trust_remote_code=False)
            options = dict(processor.to_dict())
    except Exception as error:  # transformers raises errors of many types
        raise ModelError(f"{directory}: its image processor cannot be read: {type(error).__name__}: {error}") from error
    if options.get("image_processor_type") not in _PROCESSORS:
        raise RecipeError(
            f"{directory}: its image processor is {options.get('image_processor_type')}; "
            f"expected one of {', '.join(_PROCESSORS)}"
        )
    return options


def _dinov3_options(directory: Path) -> dict[str, Any] | None:
    """Return the options of a DINOv3 processor; None if it is another one."""
    nested = read_json(directory, "processor_config.json", required=False).get("image_processor")
    options = nested or read_json(directory, "preprocessor_config.json", required=False)
    if str(options.get("image_processor_type")).removesuffix("Fast") != _DINOV3:
        return None
    options = _DINOV3_DEFAULTS | {name: value for name, value in options.items() if value is not None}
    processor: Any = ViTImageProcessorPil  # untyped
    return {**processor.from_dict(options).to_dict(), "image_processor_type": _DINOV3}


def _size_and_crop(
    directory: Path, options: Mapping[str, Any]
) -> tuple[int | tuple[int, int] | Patching | None, tuple[int, int] | None]:
    """Return the recipe's `size` and `crop`."""
    kind, size = options["image_processor_type"], options.get("size") or {}
    crop = _height_width(options["crop_size"]) if options.get("do_center_crop") else None
    if kind in ("Siglip2ImageProcessor", "Gemma4ImageProcessor"):
        if not options["do_resize"]:
            raise RecipeError(f"{directory}: do_resize is false; images must be resized to whole patches")
        side = options["patch_size"]
        if kind == "Siglip2ImageProcessor":
            return Patching(patch_size=side, max_patches=options["max_num_patches"]), crop
        pooling = options["pooling_kernel_size"]
        max_patches = options["max_soft_tokens"] * pooling**2
        return PooledPatching(patch_size=side, max_patches=max_patches, pooling=pooling), crop
    if not options["do_resize"]:
        return None, crop
    if kind == "ConvNextImageProcessor":
        if set(size) != {"shortest_edge"} or crop is not None:
            raise RecipeError(f"{directory}: its image processor has size {size}; expected shortest_edge alone")
        side = int(size["shortest_edge"])
        if side >= 384:  # like the reference: large images are warped, others keep their aspect ratio and are cropped
            return (side, side), None
        return int(side / options["crop_pct"]), (side, side)
    if set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"]), crop
    if set(size) == {"height", "width"}:
        return _height_width(size), crop
    raise RecipeError(f"{directory}: its image processor has size {size}; expected shortest_edge, or height and width")


def _height_width(size: Mapping[str, int]) -> tuple[int, int]:
    return int(size["height"]), int(size["width"])


def read_whisper_recipe(directory: Path) -> WhisperRecipe:
    """Return the recipe of a Whisper checkpoint, with the defaults of WhisperFeatureExtractor."""
    options = _AudioOptions(directory, "WhisperFeatureExtractor")
    options.only("padding_value", 0.0)
    options.only("padding_side", "right")
    options.only("dither", 0.0)  # adds random noise, so that runs differ
    rate = options.count("sampling_rate", 16000)
    return WhisperRecipe(
        n_mels=options.count("feature_size", 80),
        sampling_rate=rate,
        hop_length=options.count("hop_length", 160),
        n_fft=options.count("n_fft", 400),
        n_samples=options.count("chunk_length", 30) * rate,
    )


def read_clap_recipe(directory: Path) -> ClapRecipe:
    """Return the recipe of a CLAP checkpoint, with the defaults of ClapFeatureExtractor."""
    options = _AudioOptions(directory, "ClapFeatureExtractor")
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
    """Return the recipe of an AST checkpoint, with the defaults of ASTFeatureExtractor."""
    options = _AudioOptions(directory, "ASTFeatureExtractor")
    options.only("sampling_rate", 16000)  # the sizes of its frames in samples assume this rate
    normalized = options.flag("do_normalize", True)
    return AstRecipe(
        n_mels=options.count("num_mel_bins", 128),
        n_frames=options.count("max_length", 1024),
        mean=options.number("mean", -4.2677393, least=-1e6) if normalized else 0.0,
        spread=2.0 * options.number("std", 4.5689974, least=1e-6) if normalized else 1.0,
    )


def read_gemma_recipe(directory: Path) -> GemmaRecipe:
    """Return the recipe of a Gemma 4 or EmbeddingGemma 2 checkpoint, with Gemma4AudioFeatureExtractor's defaults."""
    options = _AudioOptions(directory, "Gemma4AudioFeatureExtractor")
    options.only("dither", 0.0)  # adds random noise, so that runs differ
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
        gain=options.number("input_scale_factor", 1.0),
    )


SPEECH_UNSUPPORTED = ("add_adapter", "conv_pos_batch_norm")  # options that add unused layers, or let padding through


def read_wave_recipe(directory: Path) -> WaveRecipe:
    """Return the recipe of a wav2vec2, HuBERT or WavLM checkpoint, with the defaults of Wav2Vec2FeatureExtractor."""
    options = _AudioOptions(directory, "Wav2Vec2FeatureExtractor")
    options.only("feature_size", 1)
    return WaveRecipe(
        sampling_rate=options.count("sampling_rate", 16000),
        normalize=options.flag("do_normalize", True),
    )


def check_layers(directory: Path, config: Any) -> None:
    """Raise ModelError for a wav2vec 2.0 kind of model with layers that are unused or that let padding through."""
    for option in SPEECH_UNSUPPORTED:
        if getattr(config, option, False):
            raise ModelError(f"{directory}/config.json: {option} is true; expected a model without that layer")


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Return how many samples the convolutions need for their first frame."""
    samples = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


class _AudioOptions:
    """Checked access to the options of a feature extractor of the class `expected`."""

    def __init__(self, directory: Path, expected: str) -> None:
        nested = read_json(directory, "processor_config.json", required=False)
        parts = [nested.get(key) for key in ("feature_extractor", "audio_processor")]
        extractor = next((part for part in parts if isinstance(part, dict)), None)
        self.path = directory / ("preprocessor_config.json" if extractor is None else "processor_config.json")
        self.options = read_json(directory, self.path.name) if extractor is None else extractor
        self.only("feature_extractor_type", expected)

    def number(self, key: str, default: float, least: float = 0.0) -> float:
        """Return a finite number of at least `least`."""
        value = self.options.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise self._error(key, f"a number of at least {least:g}")
        return float(value)

    def count(self, key: str, default: int) -> int:
        """Return a positive integer."""
        value = self.number(key, default)
        if value < 1 or value != int(value):
            raise self._error(key, "a positive integer")
        return int(value)

    def choice(self, key: str, default: str, choices: Sequence[str]) -> str:
        """Return one of `choices`."""
        value = self.options.get(key, default)
        if value not in choices:
            raise self._error(key, " or ".join(map(repr, choices)))
        return str(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self.options.get(key, default)
        if not isinstance(value, bool):
            raise self._error(key, "true or false")
        return value

    def only(self, key: str, supported: str | float | None) -> None:
        """Raise ModelError unless the option is absent or has its only supported value."""
        if self.options.get(key, supported) != supported:
            raise self._error(key, repr(supported))

    def _error(self, key: str, expected: str) -> ModelError:
        return ModelError(f"{self.path}: {key} is {self.options.get(key)!r}; expected {expected}")
