"""Bytes to uint8 RGB pictures, by simplejpeg and Pillow. Not resizing: that is done on the device.

What a picture becomes, so that a row means the same everywhere:
- The EXIF orientation is applied; colour profiles are not.
- A transparent picture is laid on the background. Of an animation the first frame is taken.
- 16-bit grey is rounded to 8 bits (value / 257). The other 16-bit pictures come as Pillow reads them
  (the high byte), and the transparent colour of a 16-bit grey PNG is ignored.
- 32-bit integer grey is taken as 16-bit, clipped to 0 to 65535; floating point grey as 0 (black, and
  NaN) to 1 (white), clipped.

A JPEG that ends early, or whose data breaks off inside, is refused, although libjpeg would fill up with
grey; the warnings that change no pixel (stray bytes, an odd marker) are accepted, as by Pillow.
"""

import io
import re
import warnings
from collections.abc import Mapping

import numpy as np
import simplejpeg
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from mmbeam.config import Limits
from mmbeam.decode.common import codec_errors, first_bytes
from mmbeam.errors import DecodeError, LimitError
from mmbeam.types import ImageHWC

# Opened by class: Image.open would apply a pixel limit of its own, which is global to the process.
_OPENERS: Mapping[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),  # BigTIFF
    (b"MM\0+", "TIFF"),
)
_ORIENTATION = 0x0112  # EXIF tag
# Each scan of a progressive JPEG is a pass over all pixels and may take 10 bytes; encoders write about 10 scans.
_MAX_SCANS = 100
# Of libjpeg's warnings (jerror.h) those after which pixels are missing or wrong.
_JPEG_DATA_LOST = ("remature end", "bad Huffman code", "instead of RST")
_PILLOW_FILTER = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def decode_image(
    data: bytes,
    limits: Limits,
    background: tuple[int, int, int] = (255, 255, 255),
    side: int | None = None,
    draft: bool = False,
) -> tuple[ImageHWC, tuple[int, int]]:
    """Pixels as uint8 RGB [height, width, 3], C-contiguous and writable, and (width, height) at full size.

    With `draft` a JPEG comes at 1/2, 1/4 or 1/8 of its size if its shorter side then still is at least
    twice `side` pixels: faster, but other pixels than full decoding followed by a resize.
    Raises DecodeError for what is no whole picture, LimitError for too many pixels.
    """
    image, kind = _open(data, limits)
    with codec_errors(kind, len(data)):
        factor = _draft_factor(image.size, side) if draft else 1
        pixels = _decode_jpeg(image, data, factor) if kind == "JPEG" else None
        if pixels is None:
            image.load()
            pixels = _to_rgb(image, background)
        orientation = _orientation(image, kind)
        return np.ascontiguousarray(_upright(pixels, orientation)), _shown_size(image, orientation)


def image_size(data: bytes, limits: Limits) -> tuple[int, int]:
    """(width, height) as shown, from the header; the errors of `decode_image`, as far as a header tells."""
    image, kind = _open(data, limits)
    return _shown_size(image, _orientation(image, kind))


def _open(data: bytes, limits: Limits) -> tuple[ImageFile.ImageFile, str]:
    """The picture with its header read and its pixels counted, and the name of its format."""
    kind = _kind(data)
    _ignore_pillow_warnings()
    with codec_errors(kind, len(data)):
        image = _OPENERS[kind](io.BytesIO(data))
    width, height = image.size
    if width * height > limits.pixels:
        raise LimitError(f"{kind} of {width:,} x {height:,} pixels, at most {limits.pixels:,} are decoded")
    return image, kind


def _kind(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return kind
    raise DecodeError(f"no picture of a known format ({', '.join(_OPENERS)}): {first_bytes(data)}")


def _ignore_pillow_warnings() -> None:
    """Make sure that Pillow's warnings about odd files are ignored from here on, in every thread.

    Filters are global and `catch_warnings` is not safe in threads, so the filter stays.
    """
    if not warnings.filters or warnings.filters[0] != _PILLOW_FILTER:
        warnings.filterwarnings("ignore", module=_PILLOW_FILTER[3].pattern)


def _draft_factor(size: tuple[int, int], side: int | None) -> int:
    fits = [factor for factor in (8, 4, 2) if side is not None and min(size) // factor >= 2 * side]
    return fits[0] if fits else 1


def _decode_jpeg(image: ImageFile.ImageFile, data: bytes, factor: int) -> ImageHWC | None:
    """The pixels as stored, at 1/factor of their size, or None if Pillow has to decode them."""
    width, height = image.size
    plain = image.mode in ("RGB", "L") and _simplejpeg_size(data) == (height, width)
    if not plain or image.info.get("progressive"):
        _check_scans(data)
    if not plain:
        return None
    try:
        pixels: ImageHWC = simplejpeg.decode_jpeg(
            data, "RGB", min_height=-(-height // factor), min_width=-(-width // factor)
        )
    except ValueError as error:
        if any(sign in str(error) for sign in _JPEG_DATA_LOST):
            raise
        _check_scans(data)
        return None
    return pixels


def _simplejpeg_size(data: bytes) -> tuple[int, int] | None:
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return height, width


def _check_scans(data: bytes) -> None:
    scans = data.count(b"\xff\xda")
    if scans > _MAX_SCANS:
        raise LimitError(f"JPEG of {scans:,} scans, at most {_MAX_SCANS} are decoded")


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> ImageHWC:
    if image.mode == "F":
        return _grey_to_rgb(np.clip(np.nan_to_num(np.asarray(image), nan=0.0), 0, 1) * 255 + 0.5)
    if image.mode.startswith("I"):  # I;16, I;16B, I
        return _grey_to_rgb((np.clip(np.asarray(image), 0, 65535).astype(np.uint32) + 128) // 257)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, background)
        image.paste(rgba, mask=rgba)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _grey_to_rgb(grey: np.ndarray) -> ImageHWC:
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def _orientation(image: ImageFile.ImageFile, kind: str) -> int:
    """1 to 8 as EXIF numbers them; 1 (upright) if it is not said, or not legibly."""
    if kind == "TIFF":  # Pillow has turned it already
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF; the pixels are what matters
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(pixels: ImageHWC, orientation: int) -> ImageHWC:
    """The stored pixels as they are meant to be seen (EXIF 2.32, tag Orientation)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _shown_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if orientation >= 5 else (width, height)
