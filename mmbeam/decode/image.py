"""Bytes to uint8 RGB images, by simplejpeg and Pillow. Resizing is done on the device.

The conversion is the same everywhere:
- The EXIF orientation is applied. Colour profiles are not.
- A transparent image is composited on the background. An animation yields its first frame.
- 16-bit grey is rounded to 8 bits (value / 257). Other 16-bit images keep the high byte.
- 32-bit integer grey is clipped to 0 to 65535 and treated as 16-bit. Floating-point grey is clipped to
  0 (black, also NaN) to 1 (white).

A truncated or damaged JPEG is an error, although libjpeg would fill the missing part with grey. Warnings
that leave the pixels unchanged (stray bytes, an odd marker) are accepted, as by Pillow. Only chunks that
change pixels can make a PNG fail: colour profiles, texts and animation chunks are skipped unread.
"""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import simplejpeg
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from mmbeam.config import Limits
from mmbeam.decode.common import codec_errors, first_bytes
from mmbeam.errors import DecodeError, LimitError
from mmbeam.types import ImageHWC

# Opened by class: Image.open applies Pillow's own pixel limit, which is global to the process.
_OPENERS: Mapping[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,  # also PGM and PBM
}
if features.check("avif"):  # from Pillow 11.3 on, unless it was built without libavif
    _OPENERS = {**_OPENERS, "AVIF": import_module("PIL.AvifImagePlugin").AvifImageFile}
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
_PPM = re.compile(rb"P[1-6]\s")
_AVIF = re.compile(rb"....ftyp(....)*?(avif|avis)", re.DOTALL)  # the major brand, or a compatible one
_ORIENTATION = 0x0112  # EXIF tag
_PNG_ORIENTATION_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # keywords of text chunks
# Each scan of a progressive JPEG is a pass over all pixels and may take 10 bytes; encoders write about 10 scans.
_MAX_SCANS = 100
# libjpeg's warnings (jerror.h) after which pixels are missing or wrong
_JPEG_DATA_LOST = ("remature end", "bad Huffman code", "instead of RST")
_PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
_PILLOW_FILTER = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def decode_image(
    data: bytes,
    limits: Limits,
    background: tuple[int, int, int] = (255, 255, 255),
    side: int | None = None,
    draft: bool = False,
) -> tuple[ImageHWC, tuple[int, int]]:
    """Return uint8 RGB [height, width, 3], C-contiguous and writable, and the full-size (width, height).

    With `draft`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if its shorter side is then still at
    least twice `side` pixels. This is faster; the pixels differ from full decoding followed by a resize.

    Raises DecodeError for data that is not a whole image, LimitError for too many pixels.
    """
    image, kind, orientation = _open(data, limits)
    with codec_errors(kind, len(data)):
        pixels = None
        if kind == "JPEG":
            factors = [factor for factor in (8, 4, 2) if draft and side and min(image.size) // factor >= 2 * side]
            pixels = _decode_jpeg(image, data, factors[0] if factors else 1)
        if pixels is None:
            image.load()
            pixels = _to_rgb(image, data, background)
        return np.ascontiguousarray(_upright(pixels, orientation)), _shown_size(image, orientation)


def image_size(data: bytes, limits: Limits) -> tuple[int, int]:
    """Return the displayed (width, height), from the header.

    Raises the errors of `decode_image` that a header can cause.
    """
    image, _, orientation = _open(data, limits)
    return _shown_size(image, orientation)


def _open(data: bytes, limits: Limits) -> tuple[ImageFile.ImageFile, str, int]:
    """Return the image with its header read and its pixels counted, its format, and its EXIF orientation."""
    kind = "WebP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None
    kind = kind or next((kind for signature, kind in _SIGNATURES if data.startswith(signature)), None)
    kind = "PPM" if kind is None and _PPM.match(data) else kind
    if kind is None and _AVIF.match(data[: min(256, int.from_bytes(data[:4], "big"))]):
        kind = "AVIF"
        if kind not in _OPENERS:
            raise DecodeError("AVIF is not supported by the installed Pillow; version 11.3 and later read it")
    if kind is None:
        raise DecodeError(f"not an image of a known format ({', '.join(_OPENERS)}): {first_bytes(data)}")
    # Warning filters are global and `catch_warnings` is not thread-safe, so the filter is set and stays.
    if not warnings.filters or warnings.filters[0] != _PILLOW_FILTER:
        warnings.filterwarnings("ignore", module=_PILLOW_FILTER[3].pattern)
    with codec_errors(kind, len(data)):
        pixel_chunks, metadata = _split_png(data) if kind == "PNG" else (data, data)
        image = _OPENERS[kind](io.BytesIO(pixel_chunks))
    width, height = image.size
    if width * height > limits.pixels:
        raise LimitError(f"{kind} of {width:,} x {height:,} pixels, at most {limits.pixels:,} are decoded")
    return image, kind, _orientation(image, kind, metadata)


def _split_png(data: bytes) -> tuple[bytes, bytes]:
    """Split a PNG into one with the chunks that make its pixels, and one with the chunks that may hold its orientation.

    Pillow rejects an image for faults in the other chunks, and for a text or profile of more than 1 MiB.
    """
    view = memoryview(data)
    pixel_chunks, metadata = [view[:8]], [view[:33]]  # the signature; the signature and IHDR
    position = 8
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        chunk, body = view[position : position + 12 + length], view[position + 8 : position + 8 + length]
        if not name[0] & 0x20 or name == b"tRNS":  # critical chunks have a capital first letter
            pixel_chunks.append(chunk)
        elif (name == b"eXIf" or bytes(body[:22]).startswith(_PNG_ORIENTATION_TEXTS)) and chunk[-4:] == zlib.crc32(
            chunk[4:-4]
        ).to_bytes(4, "big"):
            metadata.append(chunk)
        position += 12 + length
    if len(metadata) > 1:
        metadata.append(memoryview(_PNG_END))
    return b"".join(pixel_chunks), b"".join(metadata)


def _decode_jpeg(image: ImageFile.ImageFile, data: bytes, factor: int) -> ImageHWC | None:
    """Return the stored pixels at 1/factor of their size, or None if Pillow has to decode them."""
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


def _to_rgb(image: Image.Image, data: bytes, background: tuple[int, int, int]) -> ImageHWC:
    if image.format == "PNG" and image.mode in ("1", "L", "I;16", "RGB") and "transparency" in image.info:
        transparent = _matches_trns(image, data, image.info.pop("transparency"))
        pixels = _to_rgb(image, data, background)
        pixels[transparent] = background
        return pixels
    if image.mode == "F":
        return _grey_to_rgb(np.clip(np.nan_to_num(np.asarray(image), nan=0.0), 0, 1) * 255 + 0.5)
    if image.mode.startswith("I"):  # I;16, I;16B, I
        return _grey_to_rgb((np.clip(np.asarray(image), 0, 65535).astype(np.uint32) + 128) // 257)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, background)
        image.paste(rgba, mask=rgba)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _matches_trns(image: Image.Image, data: bytes, value: Any) -> np.ndarray:
    """Return which pixels of a grey or RGB PNG have the value of its tRNS chunk: bool [height, width].

    Pillow scales grey of 2 and 4 bits to 8 bits but not the value, and drops the low byte of 16-bit RGB.
    """
    depth = data[data.index(b"IHDR") + 12]
    top = 2**depth - 1
    if image.mode != "RGB":
        grey = np.asarray(image.convert("L") if image.mode == "1" else image)
        return np.asarray(grey == (value & top) * (255 // top if depth < 16 else 1))
    wanted = np.array(value) & top
    if depth == 8:
        return np.asarray((np.asarray(image) == wanted).all(axis=2))
    low_bytes: Any = PngImagePlugin.PngImageFile(io.BytesIO(_split_png(data)[0]))
    low_bytes.tile = [(*low_bytes.tile[0][:3], "RGB;16L")]  # of two bytes, keep the second
    return np.asarray(((np.asarray(image) == wanted >> 8) & (np.asarray(low_bytes) == wanted & 255)).all(axis=2))


def _grey_to_rgb(grey: np.ndarray) -> ImageHWC:
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def _orientation(image: Image.Image, kind: str, metadata: bytes) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if it is missing or unreadable."""
    if kind == "TIFF":  # Pillow applies it
        return 1
    try:
        if kind == "PNG" and len(metadata) <= 33:  # no chunk that could hold it
            return 1
        if kind == "PNG":
            image = PngImagePlugin.PngImageFile(io.BytesIO(metadata))
        orientation = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # if metadata are damaged, the pixels are still used
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(pixels: ImageHWC, orientation: int) -> ImageHWC:
    """Return the stored pixels as they are displayed (EXIF 2.32, tag Orientation)."""
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
