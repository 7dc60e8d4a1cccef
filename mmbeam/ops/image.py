"""Image kernels: filter, resize, crop, normalise and cut into patches, on any device.

Pure kernels: no I/O, no state. Each equals the reference processor of transformers 5. On a CPU, the torchvision backend
is matched exactly (DINOv3's, which resizes in float, within 1e-5). The Pillow backend, and both backends on other
devices, are matched within one of 256 levels (within two in one value of 50,000 where an image is enlarged; the two
backends differ by as much). models/recipes.py reads a checkpoint's recipe; decoding is in decode/.

Shape suffixes: B batch, C channels, H height, W width, N patches, D values of a patch.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from mmbeam.errors import LimitError, UsageError
from mmbeam.ops.transfer import Uploaded, to_device, upload_arrays
from mmbeam.types import ImageHWC

Interpolation = Literal["bicubic", "bilinear"]
PixelFilter = Callable[[torch.Tensor], torch.Tensor]  # uint8 [B, C, H, W] to the same

# An image of 1 x 65535 pixels, resized to a shorter side of 224, would have 3.3 billion pixels.
MAX_RESIZED_PIXELS = 1 << 25
# CUDA's antialiasing kernel keeps its weights in shared memory, which is too small for the weights of a larger scale.
MAX_DEVICE_SCALE = 64.0

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

    `pixel_filter` is applied at an image's own resolution. Images of one size are resized together, and all images are
    normalised together. Raises LimitError for an image that is too narrow.
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
    """Return each image filtered, resized and cropped, as levels [3, height, width]."""
    resized: dict[int, torch.Tensor] = {}
    for indices, pixels in _on_device(images, device):
        if pixel_filter is not None:
            pixels = pixel_filter(pixels)
        if not recipe.rounded:
            pixels = pixels.float()
        pixels = resize(pixels, recipe.resized(pixels.shape[-2], pixels.shape[-1]), recipe.interpolation)
        if recipe.crop is not None:
            pixels = center_crop(pixels, recipe.crop, recipe.rounds_crop)
        resized.update(zip(indices, pixels.unbind(), strict=True))
    return [resized[index] for index in range(len(images))]


def _on_device(images: Sequence[ImageHWC], device: torch.device) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield the images of each size as uint8 [B, 3, H, W] on `device`, with their indices.

    On a CPU, images are yielded one by one without a copy: stacking them would gain nothing.
    """
    if device.type != "cpu":
        yield from transfer_by_size(images, device)
        return
    for index, image in enumerate(images):
        writeable = image if image.flags.writeable else image.copy()  # torch warns about read-only memory
        yield [index], torch.from_numpy(writeable)[None].permute(0, 3, 1, 2)


def transfer_by_size(images: Sequence[ImageHWC], device: torch.device) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield the images of each size as uint8 [B, 3, H, W] on `device`, with their indices, after a single transfer."""
    uploaded = images if isinstance(images, Uploaded) else upload_images(images, device)
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(image.shape, []).append(index)
    for shape, indices in groups.items():
        start = uploaded.starts[indices[0]]
        end = start + len(indices) * math.prod(shape)
        yield indices, uploaded.flat[start:end].view(len(indices), *shape).permute(0, 3, 1, 2)


def upload_images(images: Sequence[ImageHWC], device: torch.device) -> Uploaded[ImageHWC]:
    """Copy images of any sizes to the device, images of one size next to each other."""
    return upload_arrays(images, device, [image.shape for image in images])


def resize(pixels_BCHW: torch.Tensor, size: tuple[int, int], interpolation: Interpolation) -> torch.Tensor:
    """Resize uint8 images to (height, width) with antialiasing, as Pillow does; float ones stay unrounded.

    On a CPU this is torch's uint8 kernel, which torchvision uses too. Other devices have no such kernel and use two
    passes in float32, rounded in between, because Pillow rounds after its horizontal pass.
    """
    height, width = size
    old_height, old_width = pixels_BCHW.shape[-2:]
    if (height, width) == (old_height, old_width):
        return pixels_BCHW
    if height * width > MAX_RESIZED_PIXELS:
        raise LimitError(
            f"an image of {old_width} x {old_height} pixels would be resized to {width} x {height}; "
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
    """Resize like `resize`, on devices without a uint8 kernel."""
    height, width = size
    pixels = pixels_BCHW.float()
    for shape in ((pixels.shape[-2], width), (height, width)):
        if shape != pixels.shape[-2:]:
            pixels = functional.interpolate(pixels, shape, mode=interpolation, antialias=True)
            pixels = (pixels + 0.5).floor_().clamp_(0, 255)  # halves are rounded up, as in Pillow
    return pixels.to(torch.uint8)


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
