"""Bytes to uint8 RGB images, by simplejpeg and Pillow. Resizing is done on the device.

The conversion is the same everywhere:
- The EXIF orientation is applied. Colour profiles are not.
- A transparent image is composited on the background. An animation yields its first frame.
- 16-bit grey is rounded to 8 bits (value / 257). Other 16-bit images keep the high byte.
- 32-bit integer grey is clipped to 0 to 65535 and treated as 16-bit. Floating-point grey is clipped to
  0 (black, also NaN) to 1 (white).

A truncated or damaged JPEG is an error, although libjpeg would fill the missing part with grey. Warnings
that leave the pixels unchanged (stray bytes, an odd marker) are accepted, as by Pillow. Only chunks that
change pixels can make a PNG fail: colour profiles, texts and animation chunks are skipped unread, as are the
metadata of JPEG and GIF. Reading all of them, as Pillow does, would take gigabytes for tags that overlap.
"""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from itertools import islice
from typing import Any, Literal

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
from mmbeam.decode.common import check_memory, codec_errors, first_bytes
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
_PPM_HEADER = re.compile(rb"P(?:[14](?:(?:\s|#[^\r\n]*[\r\n])+\d+){2}|[2356](?:(?:\s|#[^\r\n]*[\r\n])+\d+){3})\s")
_PPM_HEADER_BYTES = 65536  # that may precede the pixels: Pillow takes half a microsecond for each byte of a comment
_MAX_TEXT_PIXELS = 2_000_000  # of a PPM or PGM whose numbers are text, for each of which Pillow takes a microsecond
_MAX_CHUNKS = 100_000  # of a PNG, JPEG or GIF, with metadata
_AVIF = re.compile(rb"....ftyp(....)*?(avif|avis)", re.DOTALL)  # the major brand, or a compatible one
_ORIENTATION = 0x0112  # EXIF tag
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_XMP_IN_JPEG = b"http://ns.adobe.com/xap/1.0/\0"
_PNG_ORIENTATION_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # keywords of text chunks
# Each scan of a progressive JPEG is a pass over all pixels, but may be only 10 bytes long in the file; encoders write
# about 10 scans.
_MAX_SCANS = 100
# libjpeg's warnings (jerror.h) after which pixels are missing or wrong
_JPEG_DATA_LOST = ("remature end", "bad Huffman code", "instead of RST")
_STRIP_PIXELS = 1 << 19  # converted to RGB at a time
_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}  # per pixel, of Pillow's modes; 4 for the others
_ANIMATION_BYTES = 15  # per pixel of WebP and AVIF, besides the result: the canvases of the decoder, and Pillow's image
_TIFF_BYTES = (
    6  # per pixel of a compressed file, besides Pillow's image and the result: one strip may contain the whole image
)
_MAX_TIFF_STRIPS = 200_000
_MAX_TIFF_TAGS = 4096  # of one image file directory; real files have up to a hundred
_TIFF_HEADER = re.compile(rb"II\*\0|MM\0\*")
_MAX_TIFF_HEADERS = 100
_TIFF_TYPE_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_TIFF_STRIP_TAGS = (273, 279, 324, 325)  # offsets and sizes of strips and tiles
_SUB_IFD_TAGS = (34665, 34853, 40965)  # EXIF, GPS and interoperability tags: Pillow reads them too
_FILL = re.compile(rb"\xff*")
_PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
_PILLOW_FILTER = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def decode_image(
    data: bytes,
    limits: Limits,
    background: tuple[int, int, int] = (255, 255, 255),
    side: int | None = None,
    draft: bool = False,
    max_bytes: int | None = None,
) -> tuple[ImageHWC, tuple[int, int]]:
    """Return uint8 RGB [height, width, 3], C-contiguous and writable, and the full-size (width, height).

    With `draft`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if its shorter side is then still at
    least twice `side` pixels. This is faster; the pixels differ from full decoding followed by a resize.

    Raises DecodeError for data that is not a whole image, LimitError for too many pixels or too much memory,
    LargeValueError if decoding takes more than `max_bytes` of memory.
    """
    image, kind, orientation = _open(data, limits)
    width, height = image.size
    factor = 1
    if kind == "JPEG" and draft and side:
        factor = next((factor for factor in (8, 4, 2) if min(image.size) // factor >= 2 * side), 1)
    pixel_bytes = _pixel_bytes(image, kind) + (3 if orientation != 1 else 0)
    coefficients = 2 * len(image.getbands()) if image.info.get("progressive") else 0  # of a JPEG, at any factor
    nbytes = len(data) * (2 if kind in ("PNG", "GIF") else 1)  # of these, metadata is removed from a copy
    nbytes += width * height * pixel_bytes // factor**2 + width * height * coefficients
    check_memory(f"{kind} of {width:,} x {height:,} pixels", nbytes, limits.decode_bytes, max_bytes)
    with codec_errors(kind, len(data)):
        pixels = _decode_jpeg(image, data, factor) if kind == "JPEG" else None
        if pixels is None:
            if kind == "JPEG":  # of which only the header was opened
                image = JpegImagePlugin.JpegImageFile(io.BytesIO(_split_jpeg(data)[0]))
            if kind == "PPM" and image.tile[0][0] == "ppm":
                pixels = _decode_scaled_ppm(image, data)
            else:
                image.load()
                pixels = _to_rgb(image, kind, data, background)
        return np.ascontiguousarray(_upright(pixels, orientation)), _shown_size(image, orientation)


def _pixel_bytes(image: ImageFile.ImageFile, kind: str) -> int:
    """Return the memory per pixel at the peak of decoding, the result included (tests/test_memory.py measures it)."""
    pillow = _MODE_BYTES.get(image.mode, 4)
    if kind == "JPEG":
        return 3 + (0 if image.mode in ("RGB", "L") else pillow)
    if kind == "TIFF" and image.info.get("compression") != "raw":
        return 3 + pillow + _TIFF_BYTES
    return 3 + {"WebP": _ANIMATION_BYTES, "AVIF": _ANIMATION_BYTES, "PPM": 3 * pillow}.get(kind, pillow)


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
    exif = xmp = b""
    with codec_errors(kind, len(data)):
        file = data
        if kind == "JPEG":
            file, exif, xmp = _split_jpeg(data, header_only=True)
        elif kind == "PNG":
            file, metadata = _split_png(data)
            exif, xmp = _png_metadata(metadata)
        elif kind == "GIF":
            file = _without_gif_metadata(data)
        elif kind == "TIFF":
            _check_tags(data)
        elif kind == "PPM" and not _PPM_HEADER.match(data[:_PPM_HEADER_BYTES]):
            raise DecodeError(f"damaged PPM ({len(data):,} bytes): no header in its first {_PPM_HEADER_BYTES:,} bytes")
        elif (
            kind == "AVIF"
        ):  # Pillow reads its EXIF when it opens a file; only the decoder knows where in the file it is
            view = memoryview(data)
            for match in islice(_TIFF_HEADER.finditer(data), _MAX_TIFF_HEADERS):
                _check_tags(view[match.start() :])
        elif kind == "WebP":
            _check_pixels(kind, *_webp_size(data), limits)  # the decoder allocates its canvases when it opens a file
        image = _OPENERS[kind](io.BytesIO(file))
    _check_pixels(kind, *image.size, limits)
    if kind == "PPM" and image.tile[0][0] == "ppm_plain" and image.mode != "1":
        _check_pixels("PPM of text", *image.size, replace(limits, pixels=min(limits.pixels, _MAX_TEXT_PIXELS)))
    if kind in ("WebP", "AVIF"):
        exif, xmp = image.info.get("exif", b""), image.info.get("xmp", b"")
    orientation = 1 if kind == "TIFF" else _orientation(exif, xmp)  # Pillow applies that of a TIFF
    return image, kind, orientation


def _check_chunks(count: int) -> None:
    if count > _MAX_CHUNKS:
        raise LimitError(f"image of more than {_MAX_CHUNKS:,} chunks")


def _check_pixels(kind: str, width: int, height: int, limits: Limits) -> None:
    if width * height > limits.pixels:
        raise LimitError(
            f"{kind} of {width:,} x {height:,} pixels, at most {limits.pixels:,} are decoded (--max-pixels)"
        )


def _split_jpeg(data: bytes, header_only: bool = False) -> tuple[bytes, bytes, bytes]:
    """Return a JPEG without metadata, up to its first scan with `header_only`, and its EXIF and XMP ("" if absent)."""
    kept, position, exif, xmp = [data[:2]], 2, list[bytes](), b""
    while position + 4 <= len(data) and data[position] == 0xFF:
        _check_chunks(len(kept) + len(exif))
        marker = data[position + 1]
        if marker == 0xFF:  # fill bytes
            position = _FILL.match(data, position).end() - 1  # type: ignore[union-attr]  # it matches anywhere
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xDA:  # without a length, or the first scan
            break
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : end]
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif.append(body[6:] if exif else body)
        elif marker == 0xE1 and body.startswith(_XMP_IN_JPEG):
            xmp = xmp or body[len(_XMP_IN_JPEG) :]
        if not (0xE1 <= marker <= 0xEF or marker == 0xFE) or marker == 0xEE:  # Adobe's: how colours are stored
            kept.append(data[position:end])
        position = end
    rest = position + (1 << 16) if header_only else len(data)
    return b"".join([*kept, data[position:rest]]), b"".join(exif), xmp


def _without_gif_metadata(data: bytes) -> bytes:
    """Return a GIF without the comments and application data before its first frame, which Pillow joins one by one."""
    flags = data[10] if len(data) > 10 else 0
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    kept, count = [data[:position]], 0
    while data[position : position + 1] == b"!":
        end = position + 2
        while end < len(data) and data[end] and count <= _MAX_CHUNKS:
            end += 1 + data[end]
            count += 1
        count += 1
        _check_chunks(count)
        if data[position + 1 : position + 2] == b"\xf9":  # transparency
            kept.append(data[position : end + 1])
        position = end + 1
    return b"".join([*kept, data[position:]]) if len(kept) > 1 or position > len(kept[0]) else data


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return the size of the canvas in the first chunk (RFC 9649); (0, 0) if it has none."""
    chunk, body = data[12:16], data[20:30].ljust(10, b"\0")
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return 0, 0


def _check_tags(data: bytes | memoryview) -> None:
    """Raise DecodeError if tags of a TIFF or EXIF overlap (Pillow copies the bytes), LimitError for too many strips."""
    order: Literal["little", "big"] = "little" if data[:1] == b"I" else "big"
    is_big = 43 in data[2:4]
    size, count_size, entry_size = (8, 8, 20) if is_big else (4, 2, 12)

    def number(at: int, length: int) -> int:
        return int.from_bytes(data[at : at + length], order)

    ifds, total = [number(8 if is_big else 4, size)], 0
    for index, ifd in enumerate(ifds):
        first = ifd + count_size
        entries = min(number(ifd, count_size), max(0, len(data) - first) // entry_size)
        if entries > _MAX_TIFF_TAGS:
            raise DecodeError(f"damaged tags ({entries:,} in one directory, at most {_MAX_TIFF_TAGS:,} are read)")
        for entry in range(first, first + entries * entry_size, entry_size):
            tag, kind, count = number(entry, 2), number(entry + 2, 2), number(entry + 4, size)
            nbytes = count * _TIFF_TYPE_BYTES.get(kind, 0)
            total += nbytes if nbytes > size else 0
            if tag in _TIFF_STRIP_TAGS and count > _MAX_TIFF_STRIPS:
                raise LimitError(f"TIFF of {count:,} strips, at most {_MAX_TIFF_STRIPS:,} are decoded")
            if tag in _SUB_IFD_TAGS and index == 0 and len(ifds) <= len(_SUB_IFD_TAGS):
                ifds.append(number(entry + 4 + size, size))
        if total > len(data) + 65536:
            raise DecodeError(f"damaged tags (they hold {total:,} bytes, the file has {len(data):,})")


def _split_png(data: bytes) -> tuple[bytes, bytes]:
    """Split a PNG into one with the chunks that make its pixels, and one with the chunks that may hold its orientation.

    Pillow rejects an image for faults in the other chunks, and for a text or profile of more than 1 MiB.
    """
    view = memoryview(data)
    pixel_chunks, metadata = [view[:8]], [view[:33]]  # the signature; the signature and IHDR
    position, count = 8, 0
    while position + 8 <= len(data):
        count += 1
        _check_chunks(count)
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


def _to_rgb(image: ImageFile.ImageFile, kind: str, data: bytes, background: tuple[int, int, int]) -> ImageHWC:
    """Return the pixels as uint8 RGB, converted strip by strip: Pillow's conversions take 4 bytes per pixel each."""
    width, height = image.size
    colour = None
    if kind == "PNG" and image.mode in ("1", "L", "I;16", "RGB"):
        colour = image.info.pop("transparency", None)
    depth = data[data.index(b"IHDR") + 12] if kind == "PNG" else 8
    low_bytes: Any = None
    if colour is not None and image.mode == "RGB" and depth == 16:
        low_bytes = PngImagePlugin.PngImageFile(io.BytesIO(_split_png(data)[0]))
        low_bytes.tile = [(*low_bytes.tile[0][:3], "RGB;16L")]  # of two bytes, keep the second
        low_bytes.load()
    pixels: ImageHWC = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // max(1, width))
    for top in range(0, height, rows):
        box = (0, top, width, min(height, top + rows))
        strip = image.crop(box) if rows < height else image
        rgb = _strip_to_rgb(strip, background)
        if colour is not None:
            rgb[_matches_trns(strip, depth, colour, low_bytes and low_bytes.crop(box))] = background
        pixels[top : top + rows] = rgb
    return pixels


def _decode_scaled_ppm(image: ImageFile.ImageFile, data: bytes) -> ImageHWC:
    """Return the pixels of a binary PPM or PGM whose largest value is not 255, as Pillow's decoder scales them.

    Pillow takes a microsecond for each number.
    """
    tile: Any = image.tile[0]
    (_, _, offset, (_, largest)), (width, height) = tile, image.size
    count, kind = width * height * len(image.getbands()), np.dtype(">u2" if largest > 255 else "u1")
    if len(data) - offset < count * kind.itemsize:
        raise DecodeError(f"truncated PPM (expected {count * kind.itemsize:,} bytes, found {len(data) - offset:,})")
    stored = np.frombuffer(data, kind, count, offset).reshape(height, width, -1)
    pixels: ImageHWC = np.empty((height, width, 3), np.uint8)
    top = 65535 if image.mode == "I" else 255
    rows = max(1, _STRIP_PIXELS // max(1, width))
    for begin in range(0, height, rows):
        values = np.minimum(np.rint(stored[begin : begin + rows] / largest * top), top).astype(np.uint32)
        pixels[begin : begin + rows] = (values + 128) // 257 if image.mode == "I" else values
    return pixels


def _strip_to_rgb(image: Image.Image, background: tuple[int, int, int]) -> ImageHWC:
    if image.mode == "F":
        return _grey_to_rgb(np.clip(np.nan_to_num(np.asarray(image), nan=0.0), 0, 1) * 255 + 0.5)
    if image.mode.startswith("I"):  # I;16, I;16B, I
        return _grey_to_rgb((np.clip(np.asarray(image), 0, 65535).astype(np.uint32) + 128) // 257)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, background)
        image.paste(rgba, mask=rgba)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _matches_trns(image: Image.Image, depth: int, value: Any, low_bytes: Image.Image | None) -> np.ndarray:
    """Return which pixels of a grey or RGB PNG have the value of its tRNS chunk: bool [height, width].

    Pillow scales grey of 2 and 4 bits to 8 bits but not the value, and drops the low byte of 16-bit RGB.
    """
    top = 2**depth - 1
    if image.mode != "RGB":
        grey = np.asarray(image.convert("L") if image.mode == "1" else image)
        return np.asarray(grey == (value & top) * (255 // top if depth < 16 else 1))
    wanted = np.array(value) & top
    if low_bytes is None:
        return np.asarray((np.asarray(image) == wanted).all(axis=2))
    return np.asarray(((np.asarray(image) == wanted >> 8) & (np.asarray(low_bytes) == wanted & 255)).all(axis=2))


def _grey_to_rgb(grey: np.ndarray) -> ImageHWC:
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def _png_metadata(metadata: bytes) -> tuple[bytes, bytes]:
    """Return the EXIF and XMP of a PNG's metadata; "" if they are absent or damaged."""
    if len(metadata) <= 33:  # no chunk that could hold them
        return b"", b""
    try:
        info = PngImagePlugin.PngImageFile(io.BytesIO(metadata)).info
        profile = str(info.get("Raw profile type exif", "")).split("\n")[3:]
        exif = info.get("exif") or bytes.fromhex("".join(profile))
    except MemoryError:
        raise
    except Exception:  # if metadata are damaged, the pixels are still used
        return b"", b""
    return exif, str(info.get("XML:com.adobe.xmp", "")).encode("utf-8", "replace")


def _orientation(exif: bytes, xmp: bytes) -> int:
    """Return the orientation, 1 to 8, of EXIF or else XMP; 1 (upright) if it is missing or unreadable."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order: Literal["little", "big"] = "little" if exif[:1] == b"I" else "big"
    ifd = int.from_bytes(exif[4:8], order)
    value = None
    for number in range(int.from_bytes(exif[ifd : ifd + 2], order) if exif[:2] in (b"II", b"MM") else 0):
        entry = exif[ifd + 2 + 12 * number : ifd + 14 + 12 * number]
        if len(entry) < 12:
            break
        tag, kind = (int.from_bytes(entry[at : at + 2], order) for at in (0, 2))
        if tag == _ORIENTATION and kind in (1, 3, 4):  # a byte, a short or a long
            value = int.from_bytes(entry[8 : 8 + _TIFF_TYPE_BYTES[kind]], order)
    match = _XMP_ORIENTATION.search(xmp) if value is None else None
    orientation = int(match[1]) if match else value
    return orientation if orientation in range(1, 9) else 1  # type: ignore[return-value]  # None is not in the range


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
