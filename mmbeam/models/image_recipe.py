"""What a checkpoint's own processor files say is done to a picture, as a recipe for ops/image.py.

transformers reads the files (old and new layouts, each class's defaults) without torchvision; a setting
that changes pixels and that the recipe cannot express is an error, never ignored.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor

from mmbeam.errors import ModelError
from mmbeam.ops.image import ImageRecipe, Interpolation, Patching

# Processors whose steps are exactly: resize, centre crop, rescale, normalise (and patch).
_PROCESSORS = ("CLIPImageProcessor", "SiglipImageProcessor", "Siglip2ImageProcessor")
_INTERPOLATIONS: Mapping[int, Interpolation] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers

_USED = {
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "patch_size", "max_num_patches"),
}
_HARMLESS = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "model_input_names"),
    *("do_convert_rgb", "default_to_square", "input_data_format", "data_format", "return_tensors", "device"),
}


def read_image_recipe(directory: Path) -> ImageRecipe:
    """The recipe of the image processor in `directory`. Raises ModelError naming what is missing or unknown."""
    settings = _read_settings(directory)
    unknown = sorted(key for key, value in settings.items() if value and key not in _USED | _HARMLESS)
    if unknown:
        raise ModelError(f"{directory}: its image processor sets {', '.join(unknown)}, which is not implemented here")
    scale = float(settings["rescale_factor"]) if settings.get("do_rescale") else 1.0
    recipe = ImageRecipe(
        size=_size(directory, settings),
        interpolation=_interpolation(directory, settings.get("resample")),
        crop=_height_width(settings["crop_size"]) if settings.get("do_center_crop") else None,
        scale=scale,
        **_mean_std(settings),
    )
    if recipe.crop is None and not isinstance(recipe.size, tuple | Patching):
        raise ModelError(
            f"{directory}: its image processor gives pictures of different sizes; expected a fixed size or a crop"
        )
    return recipe


def _read_settings(directory: Path) -> dict[str, Any]:
    if not any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ModelError(
            f"{directory}: has no preprocessor_config.json or processor_config.json, which say how to resize"
        )
    auto: Any = AutoImageProcessor  # untyped
    try:
        processor = auto.from_pretrained(directory, backend="pil", local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parts raise
        raise ModelError(f"{directory}: its image processor cannot be read: {type(error).__name__}: {error}") from error
    settings: dict[str, Any] = processor.to_dict()
    if settings.get("image_processor_type") not in _PROCESSORS:
        raise ModelError(
            f"{directory}: its image processor is {settings.get('image_processor_type')}; "
            f"expected one of {', '.join(_PROCESSORS)}"
        )
    return settings


def _size(directory: Path, settings: Mapping[str, Any]) -> int | tuple[int, int] | Patching | None:
    if settings["image_processor_type"] == "Siglip2ImageProcessor":
        if not settings["do_resize"]:
            raise ModelError(f"{directory}: do_resize is false; pictures must be resized to whole patches")
        return Patching(patch_size=settings["patch_size"], max_patches=settings["max_num_patches"])
    if not settings["do_resize"]:
        return None
    size = settings["size"]
    if set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"])
    if set(size) == {"height", "width"}:
        return _height_width(size)
    raise ModelError(f"{directory}: its image processor has size {size}; expected shortest_edge, or height and width")


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
