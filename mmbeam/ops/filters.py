"""Filters that a user may ask for on pictures before the model sees them: median and Gaussian.

Pure kernels on uint8 [B, C, H, W], any device. Beyond its edge a picture goes on with its edge pixels
(scipy's mode="nearest", Pillow's own rule). Pictures are worked on in strips of rows, so that memory
does not grow with their size.
"""

import math
from collections.abc import Callable

import torch

from mmbeam.errors import UsageError

STRIP_ELEMENTS = 1 << 24  # values of a strip, padding not counted: 64 MB in float32


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
