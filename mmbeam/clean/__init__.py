"""Cleaning between decoding and the models: text normalisation, sample selection, and the image filter's name.

Images are filtered on the device, in `mmbeam.ops.image`.
"""

import math

from mmbeam.errors import UsageError

MAX_MEDIAN = 15  # pixels; time grows with the fourth power of the side
MAX_SIGMA = 100.0  # pixels


def parse_image_filter(text: str) -> tuple[str, float]:
    """Return ("median", side in pixels) or ("gaussian", sigma in pixels). Raises UsageError."""
    name, _, number = text.partition(":")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if name == "median" and 1 <= value <= MAX_MEDIAN and value % 2 == 1:
        return name, value
    if name == "gaussian" and 0 < value <= MAX_SIGMA:
        return name, value
    raise UsageError(
        f"image filter {text!r}: expected median:SIDE, an odd number of pixels up to {MAX_MEDIAN}, "
        f"or gaussian:SIGMA, above 0 and up to {MAX_SIGMA:g} pixels"
    )
