"""Pictures as models take them: resize, crop, normalise, cut into patches, on any device.

Pure kernels: no I/O, no state. Each equals the reference processor of transformers 5: the torchvision
backend exactly on a CPU (DINOv3's, which resizes in float, within 1e-5); the Pillow backend, and either on
other devices, within one of 256 levels (two in one value of 50,000 where a picture is enlarged, which the
two backends differ by as well). What the checkpoint asks for is read by models/recipes.py; decoding is
elsewhere.

Shape suffixes: B batch, C channels, H height, W width, N patches, D values of a patch.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

from mmbeam.errors import LimitError, UsageError
from mmbeam.types import ImageHWC

Interpolation = Literal["bicubic", "bilinear"]
PixelFilter = Callable[[torch.Tensor], torch.Tensor]  # uint8 [B, C, H, W] to the same

# A strip of 1 x 65535 resized to a shorter side of 224 would have 3.3 billion pixels.
MAX_RESIZED_PIXELS = 1 << 25
# CUDA's antialiasing kernel keeps its weights in shared memory, where those of a larger scale do not fit.
MAX_DEVICE_SCALE = 64.0

STRIP_ELEMENTS = 1 << 24  # values of a strip, padding not counted: 64 MB in float32


@dataclass(frozen=True, kw_only=True)
class Patching:
    """SigLIP 2 NaFlex: the picture keeps its aspect ratio and is cut into at most so many square patches."""

    patch_size: int  # pixels
    max_patches: int


@dataclass(frozen=True, kw_only=True)
class PooledPatching(Patching):
    """Gemma 4: the picture is cut into whole groups of pooling x pooling patches, each group one token of the model."""

    pooling: int  # patches on a side of a group


@dataclass(frozen=True, kw_only=True)
class ImageRecipe:
    """What a checkpoint's image processor does, in its order: resize, crop, rescale, normalise, patch."""

    size: int | tuple[int, int] | Patching | None  # the shorter side, (height, width), or what patching needs
    interpolation: Interpolation = "bicubic"
    crop: tuple[int, int] | None = None  # height, width, around the centre
    rounded: bool = True  # whether the resize gives whole levels again; DINOv3's rescales first and does not
    scale: float = 1.0  # a level is multiplied by this before the mean is subtracted
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which a picture is resized."""
        if isinstance(self.size, PooledPatching):
            return pooled_size(height, width, self.size)
        if isinstance(self.size, Patching):
            return naflex_size(height, width, self.size.patch_size, self.size.max_patches)
        if isinstance(self.size, int):
            return shortest_edge(height, width, self.size)
        return self.size or (height, width)

    @property
    def shorter_side(self) -> int:
        """Pixels that the shorter side of a picture needs, at most, to be resized without loss."""
        if isinstance(self.size, Patching):
            return math.isqrt(self.size.max_patches) * self.size.patch_size
        if isinstance(self.size, int):
            return self.size
        return max(self.size or self.crop or (0,))


@dataclass(frozen=True)
class Patches:
    """Pictures as rows of patches, padded to one length with zeros."""

    pixels_BND: torch.Tensor
    mask_BN: torch.Tensor  # int32, 1 for patches of the picture
    shapes: list[tuple[int, int]]  # patches down and across, per picture


def preprocess(
    images: Sequence[ImageHWC],
    recipe: ImageRecipe,
    device: torch.device,
    dtype: torch.dtype,
    pixel_filter: PixelFilter | None = None,
) -> torch.Tensor:
    """Pictures of any sizes, uint8 [H, W, 3], as the model's input [B, 3, height, width] on `device`.

    `pixel_filter` is applied at the picture's own resolution. Pictures of one size share their
    kernels; all of them share one normalisation. Raises LimitError for a picture that is too narrow.
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
    """Pictures of any sizes, uint8 [H, W, 3], as rows of patches; `recipe.size` is a Patching."""
    assert isinstance(recipe.size, Patching)
    side, length = recipe.size.patch_size, recipe.size.max_patches
    pixels = _resized(images, recipe, device, pixel_filter)
    shapes = [(picture.shape[-2] // side, picture.shape[-1] // side) for picture in pixels]
    levels = torch.zeros(len(pixels), length, side * side * 3, dtype=torch.uint8, device=device)
    mask = torch.zeros(len(pixels), length, dtype=torch.int32, device=device)
    for row, (picture, (down, across)) in enumerate(zip(pixels, shapes, strict=True)):
        levels[row, : down * across] = patchify(picture[None], side)[0]
        mask[row, : down * across] = 1
    channels_last = levels.view(len(pixels), length, side * side, 3).movedim(-1, 1)
    normal = normalize(channels_last, recipe.mean, recipe.std, recipe.scale).movedim(1, -1)
    return Patches((normal.reshape(levels.shape) * mask[..., None]).to(dtype), mask, shapes)


def patch_positions(patches: Patches) -> torch.Tensor:
    """Column and row of each patch, [B, N, 2], -1 where there is none."""
    positions = torch.full((*patches.mask_BN.shape, 2), -1, dtype=torch.int64)
    for row, (down, across) in enumerate(patches.shapes):
        y, x = torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij")
        positions[row, : down * across] = torch.stack([x.flatten(), y.flatten()], dim=-1)
    return positions.to(patches.mask_BN.device, non_blocking=True)


def _resized(
    images: Sequence[ImageHWC], recipe: ImageRecipe, device: torch.device, pixel_filter: PixelFilter | None
) -> list[torch.Tensor]:
    """Each picture filtered, resized and cropped: levels [3, height, width], in the order given."""
    done: dict[int, torch.Tensor] = {}
    for indices, pixels in _on_device(images, device):
        if pixel_filter is not None:
            pixels = pixel_filter(pixels)
        if not recipe.rounded:
            pixels = pixels.float()
        pixels = resize(pixels, recipe.resized(pixels.shape[-2], pixels.shape[-1]), recipe.interpolation)
        if recipe.crop is not None:
            pixels = center_crop(pixels, recipe.crop)
        done.update(zip(indices, pixels.unbind(), strict=True))
    return [done[index] for index in range(len(images))]


def _on_device(images: Sequence[ImageHWC], device: torch.device) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Pictures as uint8 [B, 3, H, W] on `device`, those of one size together, with their indices.

    On a CPU one by one and in place: there stacking is a copy that gains nothing.
    """
    if device.type != "cpu":
        yield from packed(images, device)
        return
    for index, image in enumerate(images):
        own = image if image.flags.writeable else image.copy()  # torch warns of memory that is read-only
        yield [index], torch.from_numpy(own)[None].permute(0, 3, 1, 2)


def packed(images: Sequence[ImageHWC], device: torch.device) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Pictures grouped by size as uint8 [B, 3, H, W] on `device`, with their indices: one transfer for all."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(image.shape, []).append(index)
    order = [index for indices in groups.values() for index in indices]
    host = torch.empty(sum(image.size for image in images), dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.concatenate([images[index].reshape(-1) for index in order], out=host.numpy())
    flat, start = host.to(device, non_blocking=True), 0
    for shape, indices in groups.items():
        end = start + len(indices) * math.prod(shape)
        yield indices, flat[start:end].view(len(indices), *shape).permute(0, 3, 1, 2)
        start = end


def resize(pixels_BCHW: torch.Tensor, size: tuple[int, int], interpolation: Interpolation) -> torch.Tensor:
    """Resize uint8 pictures to (height, width) with antialiasing, as Pillow does; float ones stay unrounded.

    On a CPU the native uint8 kernel, which is what torchvision runs. Elsewhere there is none: two
    passes in float32, rounded in between, since Pillow rounds after its horizontal pass.
    """
    height, width = size
    old_height, old_width = pixels_BCHW.shape[-2:]
    if (height, width) == (old_height, old_width):
        return pixels_BCHW
    if height * width > MAX_RESIZED_PIXELS:
        raise LimitError(
            f"a picture of {old_width} x {old_height} pixels would be resized to {width} x {height}; "
            f"expected at most {MAX_RESIZED_PIXELS:,} pixels. It is too narrow for this model"
        )
    device = pixels_BCHW.device
    if max(old_height / height, old_width / width) > MAX_DEVICE_SCALE:
        pixels_BCHW = pixels_BCHW.cpu()
    if pixels_BCHW.device.type == "cpu" or pixels_BCHW.is_floating_point():
        return functional.interpolate(pixels_BCHW, size, mode=interpolation, antialias=True).to(device)
    return resize_in_two_passes(pixels_BCHW, size, interpolation)


def resize_in_two_passes(
    pixels_BCHW: torch.Tensor, size: tuple[int, int], interpolation: Interpolation
) -> torch.Tensor:
    """`resize` for devices without a uint8 kernel, as near to Pillow as that is."""
    height, width = size
    pixels = pixels_BCHW.float()
    for shape in ((pixels.shape[-2], width), (height, width)):
        if shape != pixels.shape[-2:]:
            pixels = functional.interpolate(pixels, shape, mode=interpolation, antialias=True)
            pixels = (pixels + 0.5).floor_().clamp_(0, 255)  # halves go up, as in Pillow
    return pixels.to(torch.uint8)


def shortest_edge(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with the shorter side `size` and the longer one truncated, as transformers computes them."""
    if width <= height:
        return int(size * height / width), size
    return size, int(size * width / height)


@functools.lru_cache(maxsize=4096)
def naflex_size(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """The largest height and width, multiples of `patch_size`, near the aspect ratio, of at most `max_patches`.

    The bisection of transformers' Siglip2ImageProcessor (`get_image_size_for_max_num_patches`), to the last bit.
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
    """The largest height and width in whole groups of patches that keep the aspect ratio and the number of patches.

    transformers' `get_aspect_ratio_preserving_size` of Gemma4ImageProcessor, to the last bit.
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


def center_crop(pixels_BCHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The middle `size` (height, width) of pictures; smaller ones are first laid on black.

    Where one pixel is left over the picture lies nearer to the top left, as in torchvision and the
    original CLIP (transformers' PIL backend puts it nearer to the bottom right).
    """
    height, width = size
    short_y, short_x = max(0, height - pixels_BCHW.shape[-2]), max(0, width - pixels_BCHW.shape[-1])
    if short_y or short_x:
        sides = (short_x // 2, short_x - short_x // 2, short_y // 2, short_y - short_y // 2)
        pixels_BCHW = functional.pad(pixels_BCHW, sides)
    top, left = (pixels_BCHW.shape[-2] - height) // 2, (pixels_BCHW.shape[-1] - width) // 2
    return pixels_BCHW[..., top : top + height, left : left + width]


def normalize(pixels_BCHW: torch.Tensor, mean: Sequence[float], std: Sequence[float], scale: float) -> torch.Tensor:
    """(pixels * scale - mean) / std per channel, in float32, with `scale` folded into the other two."""
    shape = (-1, *(1 for _ in pixels_BCHW.shape[2:]))
    factor = 1.0 / scale
    mean_C = (torch.tensor(mean) * factor).to(pixels_BCHW.device, non_blocking=True).view(shape)
    std_C = (torch.tensor(std) * factor).to(pixels_BCHW.device, non_blocking=True).view(shape)
    return pixels_BCHW.to(torch.float32, copy=True).sub_(mean_C).div_(std_C)


def patchify(pixels_BCHW: torch.Tensor, side: int) -> torch.Tensor:
    """Pictures as patches [B, N, side * side * C], row by row; a patch is row by row with the channels last."""
    batch, channels, height, width = pixels_BCHW.shape
    grid = pixels_BCHW.reshape(batch, channels, height // side, side, width // side, side)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * channels)


def apply_filter(pixels_BCHW: torch.Tensor, name: str, value: float) -> torch.Tensor:
    """The filter "median" (side in pixels, odd) or "gaussian" (sigma in pixels) on uint8 pictures."""
    if name == "median":
        return median_filter(pixels_BCHW, int(value))
    if name == "gaussian":
        return gaussian_blur(pixels_BCHW, value)
    raise UsageError(f"image filter {name!r}: expected median or gaussian")


def median_filter(pixels_BCHW: torch.Tensor, size: int) -> torch.Tensor:
    """The median of the `size` x `size` pixels around each; equals scipy.ndimage.median_filter and Pillow's."""
    if size < 1 or size % 2 == 0:
        raise UsageError(f"median filter of {size} pixels: expected an odd number")

    def strip_median(padded: torch.Tensor) -> torch.Tensor:
        height, width = padded.shape[-2] - size + 1, padded.shape[-1] - size + 1
        return _median([padded[..., y : y + height, x : x + width] for y in range(size) for x in range(size)])

    return _in_strips(pixels_BCHW, size // 2, strip_median)


def _median(planes: list[torch.Tensor]) -> torch.Tensor:
    """The median of an odd number of planes, elementwise, by minima and maxima alone (no sorting, no indices).

    Of any n // 2 + 2 values the smallest and the largest cannot be the median of n: drop both, take
    another in, until one is left (Paeth, "Median finding on a 3-by-3 grid", Graphics Gems, 1990).
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
    """Pictures blurred by a Gaussian cut off at 4 sigma; equals scipy.ndimage.gaussian_filter in float, rounded.

    Sums of shifted planes: a convolution would run in TF32 on recent GPUs and lose a level.
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
    """`kernel` on strips of rows, each with `radius` more pixels on every side, which the kernel consumes."""
    batch, channels, height, width = pixels_BCHW.shape
    step = max(1, STRIP_ELEMENTS // (batch * channels * width))
    columns = torch.arange(-radius, width + radius, device=pixels_BCHW.device).clamp_(0, width - 1)
    out = torch.empty_like(pixels_BCHW)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        rows = torch.arange(top - radius, bottom + radius, device=pixels_BCHW.device).clamp_(0, height - 1)
        out[..., top:bottom, :] = kernel(pixels_BCHW.index_select(-2, rows).index_select(-1, columns))
    return out
