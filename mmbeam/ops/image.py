"""Image kernels: filter, resize, crop, normalise and cut into patches, on any device.

Pure kernels: no I/O, no state. Each equals the reference processor of transformers 5. On a CPU, the torchvision backend
is matched exactly (DINOv3's, which resizes in float, within 1e-5), and the Pillow backend within one of 256 levels, as
the two backends match each other. On other devices, Pillow's own coefficients are used: one value of 1,000 differs, by
one level. (Where an image is enlarged, one of 50,000 may differ by two.) models/recipes.py reads a checkpoint's recipe;
decoding is in decode/.

Shape suffixes: B batch, C channels, H height, W width, N patches, D values of a patch.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional

from mmbeam.errors import LimitError, UsageError
from mmbeam.ops.transfer import Uploaded, to_device, upload_arrays
from mmbeam.types import ImageHWC

Interpolation = Literal["bicubic", "bilinear"]
PixelFilter = Callable[[torch.Tensor], torch.Tensor]  # uint8 [B, C, H, W] to the same

# An image of 1 x 65535 pixels, resized to a shorter side of 224, would have 3.3 billion pixels.
MAX_RESIZED_PIXELS = 1 << 25
RESIZED_ELEMENTS = 1 << 26  # values of padded images that are resized together on a GPU: 256 MB in float32
STRIP_ELEMENTS = 1 << 24  # values of a strip of rows that is filtered at a time, without padding: 64 MB in float32


@dataclass(frozen=True, kw_only=True)
class Patching:
    """SigLIP 2 NaFlex: the image keeps its aspect ratio and is cut into at most `max_patches` square patches."""

    patch_size: int  # pixels
    max_patches: int


@dataclass(frozen=True, kw_only=True)
class PooledPatching(Patching):
    """Gemma 4: the image is cut into whole groups of pooling x pooling patches; each group is one token."""

    pooling: int  # patches on a side of a group


@dataclass(frozen=True, kw_only=True)
class ImageRecipe:
    """The steps of a checkpoint's image processor, in its order: resize, crop, rescale, normalise, patch."""

    size: int | tuple[int, int] | Patching | None  # the shorter side, (height, width), what patching needs, or as is
    interpolation: Interpolation = "bicubic"
    crop: tuple[int, int] | None = None  # height, width, around the centre
    rounds_crop: bool = False  # where an odd margin is divided: rounded half to even (torchvision), else down
    rounded: bool = True  # whether resized values are rounded to levels; DINOv3's processor rescales first
    scale: float = 1.0  # factor of a level, before the mean is subtracted
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width to which an image is resized."""
        if isinstance(self.size, PooledPatching):
            return pooled_size(height, width, self.size)
        if isinstance(self.size, Patching):
            return naflex_size(height, width, self.size.patch_size, self.size.max_patches)
        if isinstance(self.size, int):
            return shortest_edge(height, width, self.size)
        return self.size or (height, width)

    @property
    def shorter_side(self) -> int:
        """The shorter side in pixels from which an image can be resized without loss, at most."""
        if isinstance(self.size, Patching):
            return math.isqrt(self.size.max_patches) * self.size.patch_size
        if isinstance(self.size, int):
            return self.size
        return max(self.size or self.crop or (0,))


@dataclass(frozen=True)
class Patches:
    """Images as rows of patches, padded to one length with zeros."""

    pixels_BND: torch.Tensor
    mask_BN: torch.Tensor  # int32, 1 for patches of the image
    shapes: list[tuple[int, int]]  # patches down and across, per image


def preprocess(
    images: Sequence[ImageHWC],
    recipe: ImageRecipe,
    device: torch.device,
    dtype: torch.dtype,
    pixel_filter: PixelFilter | None = None,
) -> torch.Tensor:
    """Turn images of any sizes, uint8 [H, W, 3], into the model's input [B, 3, height, width] on `device`.

    `pixel_filter` is applied at an image's own resolution. On a GPU, all images are resized together. Raises LimitError
    for an image that is too narrow.
    """
    pixels = torch.stack(_resized(images, recipe, device, pixel_filter))
    return normalize(pixels, recipe.mean, recipe.std, recipe.scale).to(dtype)


def preprocess_patches(
    images: Sequence[ImageHWC],
    recipe: ImageRecipe,
    device: torch.device,
    dtype: torch.dtype,
    pixel_filter: PixelFilter | None = None,
) -> Patches:
    """Turn images of any sizes, uint8 [H, W, 3], into rows of patches; `recipe.size` is a Patching."""
    assert isinstance(recipe.size, Patching)
    side, length = recipe.size.patch_size, recipe.size.max_patches
    pixels = _resized(images, recipe, device, pixel_filter)
    shapes = [(image.shape[-2] // side, image.shape[-1] // side) for image in pixels]
    levels = torch.zeros(len(pixels), length, side * side * 3, dtype=torch.uint8, device=device)
    mask = torch.zeros(len(pixels), length, dtype=torch.int32, device=device)
    for row, (image, (down, across)) in enumerate(zip(pixels, shapes, strict=True)):
        levels[row, : down * across] = patchify(image[None], side)[0]
        mask[row, : down * across] = 1
    channels_last = levels.view(len(pixels), length, side * side, 3).movedim(-1, 1)
    normal = normalize(channels_last, recipe.mean, recipe.std, recipe.scale).movedim(1, -1)
    return Patches((normal.reshape(levels.shape) * mask[..., None]).to(dtype), mask, shapes)


def patch_positions(patches: Patches) -> torch.Tensor:
    """Return the column and the row of each patch, [B, N, 2], -1 for padding."""
    positions = torch.full((*patches.mask_BN.shape, 2), -1, dtype=torch.int64)
    for row, (down, across) in enumerate(patches.shapes):
        y, x = torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij")
        positions[row, : down * across] = torch.stack([x.flatten(), y.flatten()], dim=-1)
    return to_device(positions, patches.mask_BN.device)


def _resized(
    images: Sequence[ImageHWC], recipe: ImageRecipe, device: torch.device, pixel_filter: PixelFilter | None
) -> list[torch.Tensor]:
    """Return each image filtered, resized and cropped, as levels [3, height, width].

    On a CPU, images are resized one by one without a copy: stacking them would gain nothing.
    """
    if device.type != "cpu":
        return resize_together(upload_images(images, device, recipe), recipe, pixel_filter)
    resized: list[torch.Tensor] = []
    for image in images:
        writeable = image if image.flags.writeable else image.copy()  # torch warns about read-only memory
        pixels = torch.from_numpy(writeable)[None].permute(0, 3, 1, 2)
        if pixel_filter is not None:
            pixels = pixel_filter(pixels)
        if not recipe.rounded:
            pixels = pixels.float()
        pixels = resize(pixels, recipe.resized(*image.shape[:2]), recipe.interpolation)
        if recipe.crop is not None:
            pixels = center_crop(pixels, recipe.crop, recipe.rounds_crop)
        resized.append(pixels[0])
    return resized


class UploadedImages(Uploaded[ImageHWC]):
    """Images on a device, images of one size next to each other, with the filters that resize them by `recipe`."""

    recipe: ImageRecipe | None
    rows: torch.Tensor  # [B, height, 1 + K], see `resize_together`
    columns: torch.Tensor  # [B, width, 1 + K]


def upload_images(
    images: Sequence[ImageHWC], device: torch.device, recipe: ImageRecipe | None = None
) -> UploadedImages:
    """Copy images of any sizes to the device in one transfer, and the filters of `recipe` in two.

    Raises LimitError for an image that is too narrow.
    """
    if isinstance(images, UploadedImages) and images.recipe == recipe:
        return images
    flat = upload_arrays(images, device, [image.shape for image in images])
    uploaded = UploadedImages(images, flat.flat, flat.starts)
    uploaded.recipe = recipe
    if recipe is not None:
        sizes = [(image.shape[:2], recipe.resized(*image.shape[:2])) for image in images]
        for (height, width), (new_height, new_width) in sizes:
            _check_resized(height, width, new_height, new_width)
        crop = recipe.crop or (None, None)
        filters = [
            _filters(
                [(old[side], new[side]) for old, new in sizes], crop[side], recipe.interpolation, recipe.rounds_crop
            )
            for side in (0, 1)
        ]
        uploaded.rows, uploaded.columns = (to_device(array, device) for array in filters)
    return uploaded


def resize_together(
    images: UploadedImages, recipe: ImageRecipe, pixel_filter: PixelFilter | None = None
) -> list[torch.Tensor]:
    """Return each image resized and cropped, float32 levels [3, height, width]: Pillow's result by matrix products.

    Images of any sizes are padded to one size, and multiplied by a matrix per image and direction, which holds Pillow's
    coefficients. Pillow rounds after each direction, the horizontal one first, unless the image is of floats.
    """
    shapes = [image.shape[:2] for image in images]
    resized: list[torch.Tensor] = []
    for first, last in _chunks(shapes):
        height, width = (max(sides) for sides in zip(*shapes[first:last], strict=True))
        make = torch.empty if len(set(shapes[first:last])) == 1 else torch.zeros
        padded_BHCW = make(last - first, height, 3, width, device=images.flat.device)
        row = first
        while row < last:  # images of one size that follow each other
            down, across = shapes[row]
            end = next((other for other in range(row, last) if shapes[other] != (down, across)), last)
            start, length = images.starts[row], (end - row) * down * across * 3
            same = images.flat[start : start + length].view(-1, down, across, 3).permute(0, 3, 1, 2)
            same = same if pixel_filter is None else pixel_filter(same)
            padded_BHCW[row - first : end - first, :down, :, :across] = same.transpose(1, 2)
            row = end
        columns_BWX = _matrices(images.columns[first:last], width).transpose(1, 2)
        wide_BHX = (padded_BHCW.flatten(1, 2) @ columns_BWX).view(last - first, height, -1)  # X: of all channels
        wide_BHX = _round(wide_BHX) if recipe.rounded else wide_BHX
        levels_BYX = _matrices(images.rows[first:last], height) @ wide_BHX
        levels_BYX = _round(levels_BYX) if recipe.rounded else levels_BYX
        resized += levels_BYX.view(*levels_BYX.shape[:2], 3, -1).transpose(1, 2).unbind()
    if recipe.crop is not None:
        return resized
    sizes = [recipe.resized(*shape) for shape in shapes]
    return [levels[:, :height, :width] for levels, (height, width) in zip(resized, sizes, strict=True)]


def _chunks(shapes: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """Yield the bounds of runs of images that have at most RESIZED_ELEMENTS values when padded, or of one image."""
    first, height, width = 0, 0, 0
    for index, (down, across) in enumerate(shapes):
        height, width = max(height, down), max(width, across)
        if index > first and 3 * height * width * (index + 1 - first) > RESIZED_ELEMENTS:
            yield first, index
            first, height, width = index, down, across
    yield first, len(shapes)


def _round(levels: torch.Tensor) -> torch.Tensor:
    return levels.add_(0.5).floor_().clamp_(0, 255)  # halves are rounded up, as in Pillow


def _matrices(filters_BXK: torch.Tensor, length: int) -> torch.Tensor:
    """Return the matrices [B, X, length] of filters as `_filters` returns them."""
    first_BX1, weights_BXK = filters_BXK[..., :1].long(), filters_BXK[..., 1:]
    taps_BXK = first_BX1 + torch.arange(weights_BXK.shape[-1], device=filters_BXK.device)
    matrices = torch.zeros(*weights_BXK.shape[:2], length, device=filters_BXK.device)
    return matrices.scatter_add_(2, taps_BXK.clamp_(max=length - 1), weights_BXK)  # beyond the image, weights are 0


def _filters(
    sides: Sequence[tuple[int, int]], crop: int | None, interpolation: Interpolation, rounds_crop: bool
) -> np.ndarray[Any, Any]:
    """Return the filters that resize lines from old to new lengths and crop them to `crop`, float32 [B, X, 1 + K].

    The first number of a filter is the first pixel that it reads, the others are the weights of K pixels from there.
    """
    filters = [_coefficients(old, new, interpolation) for old, new in sides]
    length = crop or max(len(filter_XK) for filter_XK in filters)
    together = np.zeros((len(filters), length, max(filter_XK.shape[1] for filter_XK in filters)), np.float32)
    for row, filter_XK in enumerate(filters):
        new, taps = filter_XK.shape
        margin = 0 if crop is None else new - crop
        before = max(0, -margin // 2)
        start = max(0, round(margin / 2) if rounds_crop else margin // 2)
        kept = filter_XK[start : start + length]
        together[row, before : before + len(kept), :taps] = kept
    return together


@functools.lru_cache(maxsize=1024)
def _coefficients(old: int, new: int, interpolation: Interpolation) -> np.ndarray[Any, Any]:
    """Return the filter of each new pixel as `_filters` does: those of Pillow's Resample.c (precompute_coeffs)."""
    scale = old / new
    stretch = max(scale, 1.0)
    support = {"bicubic": 2.0, "bilinear": 1.0}[interpolation] * stretch
    center_X1 = ((np.arange(new) + 0.5) * scale)[:, None]
    first_X1 = np.maximum((center_X1 - support + 0.5).astype(np.int64), 0)
    last_X1 = np.minimum((center_X1 + support + 0.5).astype(np.int64), old)
    taps_XK = first_X1 + np.arange(int((last_X1 - first_X1).max()))
    x = np.abs((taps_XK - center_X1 + 0.5) / stretch)
    if interpolation == "bilinear":
        weights_XK = np.maximum(0.0, 1.0 - x)
    else:
        inner, outer = (1.5 * x - 2.5) * x * x + 1.0, ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        weights_XK = np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
    weights_XK = weights_XK * (taps_XK < last_X1)
    weights_XK /= weights_XK.sum(1, keepdims=True)
    fixed_XK = np.round(weights_XK * (1 << 22)) / (1 << 22)  # Pillow's own precision, which float32 holds
    return np.concatenate([first_X1, fixed_XK], axis=1).astype(np.float32)


def resize(pixels_BCHW: torch.Tensor, size: tuple[int, int], interpolation: Interpolation) -> torch.Tensor:
    """Resize uint8 images to (height, width) with antialiasing, as Pillow does; float ones stay unrounded.

    This is torch's kernel, which torchvision uses too. Other devices have none for uint8: see `resize_together`.
    """
    height, width = size
    old_height, old_width = pixels_BCHW.shape[-2:]
    if (height, width) == (old_height, old_width):
        return pixels_BCHW
    _check_resized(old_height, old_width, height, width)
    return functional.interpolate(pixels_BCHW, size, mode=interpolation, antialias=True)


def _check_resized(old_height: int, old_width: int, height: int, width: int) -> None:
    """Raise LimitError if the resized image is too large."""
    if height * width > MAX_RESIZED_PIXELS:
        raise LimitError(
            f"an image of {old_width} x {old_height} pixels would be resized to {width} x {height}; "
            f"expected at most {MAX_RESIZED_PIXELS:,} pixels. It is too narrow for this model"
        )


def shortest_edge(height: int, width: int, size: int) -> tuple[int, int]:
    """Return the height and width with the shorter side `size` and the longer one truncated, as in transformers."""
    if width <= height:
        return int(size * height / width), size
    return size, int(size * width / height)


@functools.lru_cache(maxsize=4096)
def naflex_size(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """Return the largest multiples of `patch_size` near the aspect ratio that hold at most `max_patches` patches.

    The same bisection, to the last bit, as transformers' Siglip2ImageProcessor (`get_image_size_for_max_num_patches`).
    """
    tolerance = 1e-5

    def scaled(side: int, scale: float) -> int:
        return max(patch_size, math.ceil(side * scale / patch_size) * patch_size)

    low, high = tolerance / 10, 100.0
    while high - low >= tolerance:
        middle = (low + high) / 2
        patches = (scaled(height, middle) / patch_size) * (scaled(width, middle) / patch_size)
        low, high = (middle, high) if patches <= max_patches else (low, middle)
    return scaled(height, low), scaled(width, low)


def pooled_size(height: int, width: int, patching: PooledPatching) -> tuple[int, int]:
    """Return the largest height and width in whole groups of patches near the aspect ratio, of at most `max_patches`.

    Equal, to the last bit, to `get_aspect_ratio_preserving_size` of transformers' Gemma4ImageProcessor.
    """
    side = patching.pooling * patching.patch_size
    longest = patching.max_patches // patching.pooling**2 * side
    factor = math.sqrt(patching.max_patches * patching.patch_size**2 / (height * width))
    down, across = (math.floor(factor * length / side) * side for length in (height, width))
    if down == 0:
        return side, min(width // height * side, longest)
    if across == 0:
        return min(height // width * side, longest), side
    return down, across


def center_crop(pixels_BCHW: torch.Tensor, size: tuple[int, int], rounds: bool = False) -> torch.Tensor:
    """Return the middle `size` (height, width) of images; smaller ones are first padded with black.

    If the padding is odd, the extra pixel is at the bottom and the right, as in torchvision and the original CLIP
    (transformers' PIL backend puts it at the top and the left).
    """
    height, width = size
    short_y, short_x = max(0, height - pixels_BCHW.shape[-2]), max(0, width - pixels_BCHW.shape[-1])
    if short_y or short_x:
        sides = (short_x // 2, short_x - short_x // 2, short_y // 2, short_y - short_y // 2)
        pixels_BCHW = functional.pad(pixels_BCHW, sides)
    margins = (pixels_BCHW.shape[-2] - height, pixels_BCHW.shape[-1] - width)
    top, left = (round(margin / 2) if rounds else margin // 2 for margin in margins)
    return pixels_BCHW[..., top : top + height, left : left + width]


def normalize(pixels_BCHW: torch.Tensor, mean: Sequence[float], std: Sequence[float], scale: float) -> torch.Tensor:
    """Return (pixels * scale - mean) / std per channel, in float32, with `scale` folded into the other two."""
    shape = (-1, *(1 for _ in pixels_BCHW.shape[2:]))
    factor = 1.0 / scale
    mean_C, std_C = (_channels(tuple(values), factor, pixels_BCHW.device).view(shape) for values in (mean, std))
    return pixels_BCHW.to(torch.float32, copy=True).sub_(mean_C).div_(std_C)


@functools.lru_cache(maxsize=64)
def _channels(values: tuple[float, ...], factor: float, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # a cached tensor made in inference mode cannot be used outside it
        return (torch.tensor(values) * factor).to(device)


def patchify(pixels_BCHW: torch.Tensor, side: int) -> torch.Tensor:
    """Cut images into patches [B, N, side * side * C], row by row; a patch is row by row with the channels last."""
    batch, channels, height, width = pixels_BCHW.shape
    grid = pixels_BCHW.reshape(batch, channels, height // side, side, width // side, side)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * channels)


def apply_filter(pixels_BCHW: torch.Tensor, name: str, value: float) -> torch.Tensor:
    """Apply the filter "median" (side in pixels, odd) or "gaussian" (sigma in pixels) to uint8 images.

    Beyond its edges an image is extended by its edge pixels (scipy's mode="nearest", Pillow's own rule).
    """
    if name == "median":
        return median_filter(pixels_BCHW, int(value))
    if name == "gaussian":
        return gaussian_blur(pixels_BCHW, value)
    raise UsageError(f"image filter {name!r}: expected median or gaussian")


def median_filter(pixels_BCHW: torch.Tensor, size: int) -> torch.Tensor:
    """Return the median of the `size` x `size` pixels around each; equals scipy.ndimage.median_filter and Pillow's."""
    if size < 1 or size % 2 == 0:
        raise UsageError(f"median filter of {size} pixels: expected an odd number")

    def strip_median(padded: torch.Tensor) -> torch.Tensor:
        height, width = padded.shape[-2] - size + 1, padded.shape[-1] - size + 1
        return _median([padded[..., y : y + height, x : x + width] for y in range(size) for x in range(size)])

    return _in_strips(pixels_BCHW, size // 2, strip_median)


def _median(planes: list[torch.Tensor]) -> torch.Tensor:
    """Return the elementwise median of an odd number of planes, by minima and maxima alone (no sorting, no indices).

    The smallest and the largest of any n // 2 + 2 values cannot be the median of n: drop both, add another value, and
    repeat until one is left (Paeth, "Median finding on a 3-by-3 grid", Graphics Gems, 1990).
    """
    first = len(planes) // 2 + 2
    kept, waiting = planes[:first], planes[first:]
    while len(kept) > 1:
        for i in range(1, len(kept)):  # the smallest to the front
            kept[0], kept[i] = torch.minimum(kept[0], kept[i]), torch.maximum(kept[0], kept[i])
        for i in range(1, len(kept) - 1):  # the largest to the back
            kept[i], kept[-1] = torch.minimum(kept[i], kept[-1]), torch.maximum(kept[i], kept[-1])
        kept, waiting = kept[1:-1] + waiting[:1], waiting[1:]
    return kept[0]


def gaussian_blur(pixels_BCHW: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur images by a Gaussian cut off at 4 sigma; equals scipy.ndimage.gaussian_filter in float, rounded.

    Sums of shifted planes, because a convolution would run in TF32 on recent GPUs and be off by a level.
    """
    if not (math.isfinite(sigma) and sigma > 0):
        raise UsageError(f"gaussian filter with sigma {sigma}: expected a positive number")
    radius = int(4 * sigma + 0.5)
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    weights = [weight / sum(weights) for weight in weights]

    def strip_blur(padded: torch.Tensor) -> torch.Tensor:
        rows = _weighted_sum(padded.float(), weights, dim=-2)
        return _weighted_sum(rows, weights, dim=-1).round_().clamp_(0, 255).to(torch.uint8)

    return _in_strips(pixels_BCHW, radius, strip_blur)


def _weighted_sum(values: torch.Tensor, weights: list[float], dim: int) -> torch.Tensor:
    length = values.shape[dim] - len(weights) + 1
    total = values.narrow(dim, 0, length) * weights[0]
    for offset, weight in enumerate(weights[1:], start=1):
        total.add_(values.narrow(dim, offset, length), alpha=weight)
    return total


def _in_strips(pixels_BCHW: torch.Tensor, radius: int, kernel: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply `kernel` to strips of rows, each with `radius` more pixels on every side, which the kernel consumes.

    Strips keep the memory independent of the image's size.
    """
    batch, channels, height, width = pixels_BCHW.shape
    step = max(1, STRIP_ELEMENTS // (batch * channels * width))
    columns = torch.arange(-radius, width + radius, device=pixels_BCHW.device).clamp_(0, width - 1)
    out = torch.empty_like(pixels_BCHW)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        rows = torch.arange(top - radius, bottom + radius, device=pixels_BCHW.device).clamp_(0, height - 1)
        out[..., top:bottom, :] = kernel(pixels_BCHW.index_select(-2, rows).index_select(-1, columns))
    return out
