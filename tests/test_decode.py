"""Decoding: every format against a reference, and untrusted input."""

import io
import json
import os
import struct
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from mmbeam import decode as decode_module
from mmbeam.config import Cleaning, FieldMap, Limits, Reading
from mmbeam.decode import decode_apart, decode_sample, wanted_fields
from mmbeam.decode import image as image_module
from mmbeam.decode.audio import audio_seconds, decode_audio
from mmbeam.decode.common import LargeValueError
from mmbeam.decode.image import decode_image, image_size
from mmbeam.decode.text import decode_metadata, decode_text
from mmbeam.errors import DecodeError, FlowError, LimitError, SampleError
from mmbeam.names import KINDS
from mmbeam.process import reset
from mmbeam.types import Damage, Needs, RawSample

LIMITS = Limits()
RATE = 16_000


def photo(width: int = 96, height: int = 64, mode: str = "RGB") -> Image.Image:
    """Return smooth noise, which all codecs preserve well."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(width * height).integers(0, 256, (8, 8, channels), dtype=np.uint8)
    bands = [Image.fromarray(noise[:, :, band]).resize((width, height)) for band in range(channels)]
    return Image.merge(mode, bands) if channels > 1 else bands[0]


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_header(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + png_chunk(b"IEND", b"")


def png_of(values: np.ndarray, bits: int, *chunks: bytes) -> bytes:
    """Return a grey [H, W] or RGB [H, W, 3] PNG of any bit depth, with `chunks` between the header and the pixels."""
    rows = []
    for row in values:
        if bits == 16:
            packed = row.astype(">u2").tobytes()
        else:
            packed = np.packbits(np.unpackbits(row.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]).tobytes()
        rows.append(b"\0" + packed)
    colour_type = 2 if values.ndim == 3 else 0
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", values.shape[1], len(values), bits, colour_type, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *chunks, pixels, png_chunk(b"IEND", b"")])


def with_chunks(png: bytes, *chunks: bytes, at_end: bool = False) -> bytes:
    """Return the PNG with more chunks, after its header or after its pixels."""
    at = len(png) - 12 if at_end else 33
    return png[:at] + b"".join(chunks) + png[at:]


def bad_crc(chunk: bytes) -> bytes:
    return chunk[:-1] + bytes([chunk[-1] ^ 1])


def tone(seconds: float = 0.5, rate: int = RATE, channels: int = 1) -> np.ndarray:
    times = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(0).normal(0, 0.02, (len(times), channels))
    return 0.4 * np.sin(2 * np.pi * 440 * times)[:, None] * np.linspace(0.5, 1, channels) + noise


def sound(
    kind: str = "WAV", subtype: str | None = None, rate: int = RATE, seconds: float = 0.5, channels: int = 1
) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(seconds, rate, channels), rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def id3v2(size: int = 300, *, version: int = 4, footer: bool = False, plain_size: bool = False) -> bytes:
    """Return an ID3v2 tag with `size` bytes after its header; the size is syncsafe, as specified, or plain."""
    size_bytes = size.to_bytes(4, "big") if plain_size else bytes(size >> shift & 127 for shift in (21, 14, 7, 0))
    header = bytes([version, 0, 0x10 if footer else 0]) + size_bytes
    body = b"APIC\0\0\x10\0\0\0" + b"\xff\xfb\x90\x64" * size  # frame headers inside a cover are not audio
    return b"ID3" + header + body[:size] + (b"3DI" + header if footer else b"")


ID3V1 = b"TAG" + b"A title".ljust(122, b"\0") + b"\0\x05\x11"


def apev2(with_header: bool = True) -> bytes:
    items = struct.pack("<II", 7, 0) + b"Title\0a title"
    fields = struct.pack("<III", 2000, len(items) + 32, 1)
    flags = 1 << 31 if with_header else 0
    header = b"APETAGEX" + fields + struct.pack("<I8x", flags | 1 << 29)
    return (header if with_header else b"") + items + b"APETAGEX" + fields + struct.pack("<I8x", flags)


IMAGES: Mapping[str, bytes] = {
    "jpeg": saved(photo(), "JPEG", quality=90),
    "jpeg progressive": saved(photo(), "JPEG", progressive=True),
    "jpeg grey": saved(photo(mode="L"), "JPEG"),
    "jpeg cmyk": saved(photo(mode="CMYK"), "JPEG"),
    "png": saved(photo(), "PNG"),
    "png grey": saved(photo(mode="L"), "PNG"),
    "png bilevel": saved(photo().convert("1"), "PNG"),
    "png palette": saved(photo().quantize(16), "PNG"),
    "webp": saved(photo(), "WEBP"),
    "webp lossless": saved(photo(), "WEBP", lossless=True),
    "gif": saved(photo().quantize(64), "GIF"),
    "bmp": saved(photo(), "BMP"),
    "tiff": saved(photo(), "TIFF"),
    "tiff lzw": saved(photo(), "TIFF", compression="tiff_lzw"),
    "tiff cmyk": saved(photo(mode="CMYK"), "TIFF"),
    "tiff jpeg": saved(photo(), "TIFF", compression="jpeg"),
    "tiff lab": saved(photo(mode="LAB"), "TIFF"),
}
SOUNDS: Mapping[str, bytes] = {
    "wav 8": sound("WAV", "PCM_U8"),
    "wav 16": sound("WAV", "PCM_16"),
    "wav 24": sound("WAV", "PCM_24"),
    "wav 32": sound("WAV", "PCM_32"),
    "wav float": sound("WAV", "FLOAT"),
    "wavex": sound("WAVEX", "PCM_16"),
    "rf64": sound("RF64", "PCM_16"),
    "flac": sound("FLAC"),
    "mp3": sound("MP3", seconds=2.0),
    "ogg vorbis": sound("OGG", "VORBIS"),
    "opus": sound("OGG", "OPUS"),
}


class TestImage:
    @pytest.mark.parametrize("name", IMAGES)
    def test_equals_pillow(self, name: str) -> None:
        pixels, size = decode_image(IMAGES[name], LIMITS)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        assert pixels.flags.writeable  # otherwise torch.from_numpy warns
        assert size == image_size(IMAGES[name], LIMITS) == (96, 64)
        np.testing.assert_array_equal(pixels, np.asarray(opened(IMAGES[name]).convert("RGB")))

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
    def test_orientation_is_applied(self, kind: str, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(photo(97, 50), kind, exif=exif)
        pixels, size = decode_image(data, LIMITS)
        np.testing.assert_array_equal(pixels, np.asarray(ImageOps.exif_transpose(opened(data)).convert("RGB")))
        assert size == image_size(data, LIMITS) == ((97, 50) if orientation < 5 else (50, 97))
        assert pixels.flags.c_contiguous

    @pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 40])
    def test_damaged_exif_is_ignored(self, exif: bytes) -> None:
        data = saved(photo(), "JPEG", exif=exif)
        np.testing.assert_array_equal(decode_image(data, LIMITS)[0], np.asarray(opened(data)))

    @pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 77)])
    def test_transparent_images_are_composited(self, background: tuple[int, int, int]) -> None:
        rgba = photo(mode="RGBA")
        grey_alpha = photo(mode="LA")
        keyed = photo().convert("RGB")
        indexed = photo().quantize(16)
        files = {
            "rgba": saved(rgba, "PNG"),
            "rgba webp": saved(rgba, "WEBP", lossless=True, exact=True),
            "la": saved(grey_alpha, "PNG"),
            "rgb with a transparent colour": saved(keyed, "PNG", transparency=keyed.getpixel((5, 5))),
            "palette with a transparent entry": saved(indexed, "PNG", transparency=3),
            "palette with alpha": saved(indexed, "PNG", transparency=bytes(range(0, 256, 16))),
            "grey with a transparent level": saved(photo(mode="L"), "PNG", transparency=100),
            "gif": saved(indexed, "GIF", transparency=3),
        }
        for name, data in files.items():
            source = np.asarray(opened(data).convert("RGBA")).astype(np.int64)
            colour, alpha = source[:, :, :3], source[:, :, 3:]
            assert (alpha < 255).any(), name
            expected = (colour * alpha + np.array(background) * (255 - alpha) + 127) // 255
            np.testing.assert_array_equal(decode_image(data, LIMITS, background)[0], expected, err_msg=name)

    @pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 77)])
    @pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
    def test_one_grey_level_is_transparent(self, bits: int, background: tuple[int, int, int]) -> None:
        top = 2**bits - 1
        levels = np.arange(1 << min(bits, 12)).reshape(2, -1) * (16 if bits == 16 else 1)
        for level in (0, 1, top // 3 // 16 * 16 if bits == 16 else top // 3, top):
            data = png_of(levels, bits, png_chunk(b"tRNS", struct.pack(">H", level)))
            expected = np.repeat(np.rint(levels * 255 / top).astype(np.uint8)[..., None], 3, axis=2)
            expected[levels == level] = background
            np.testing.assert_array_equal(decode_image(data, LIMITS, background)[0], expected)

    @pytest.mark.parametrize("bits", [8, 16])
    def test_one_colour_is_transparent(self, bits: int) -> None:
        colour = np.random.default_rng(bits).integers(0, 2**bits, (20, 30, 3))
        colour[3, 4], colour[5, 6] = colour[0, 0], colour[0, 0] ^ (0, 0, 1)  # differs by one bit: opaque
        data = png_of(colour, bits, png_chunk(b"tRNS", colour[0, 0].astype(">u2").tobytes()))
        expected = colour >> (bits - 8)
        expected[(colour == colour[0, 0]).all(axis=2)] = (1, 2, 3)
        assert (expected == (1, 2, 3)).all(axis=2).sum() == 2
        np.testing.assert_array_equal(decode_image(data, LIMITS, (1, 2, 3))[0], expected)

    def test_trns_bits_beyond_the_depth_are_ignored(self) -> None:
        levels = np.arange(4)[None]
        data = png_of(levels, 2, png_chunk(b"tRNS", struct.pack(">H", 0xFF02)))
        assert decode_image(data, LIMITS)[0][0, :, 0].tolist() == [0, 85, 255, 255]

    PROFILE = zlib.compress(b"\1" * (2 << 20))
    ANCILLARY: Mapping[str, bytes] = {
        "profile of 2 MiB": png_chunk(b"iCCP", b"x\0\0" + PROFILE),
        "profile of an unknown compression": png_chunk(b"iCCP", b"x\0\7abc"),
        "compressed text of 2 MiB": png_chunk(b"zTXt", b"workflow\0\0" + PROFILE),
        "international text of 2 MiB": png_chunk(b"iTXt", b"prompt\0\1\0\0\0" + PROFILE),
        "plain text of 2 MiB": png_chunk(b"tEXt", b"parameters\0" + b"a" * (2 << 20)),
        "70 MiB of text": 70 * png_chunk(b"iTXt", b"prompt\0\0\0\0\0" + b"a" * (1 << 20)),
        "XMP that expands to 2 MiB": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + PROFILE),
        "EXIF text that expands to 2 MiB": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + PROFILE),
        "EXIF text that is not hexadecimal": png_chunk(b"tEXt", b"Raw profile type exif\0\n\n\nxyz"),
        "physical size of 2 bytes": png_chunk(b"pHYs", b"ab"),
        "gamma of 1 byte": png_chunk(b"gAMA", b"a"),
        "animation control of no frames": png_chunk(b"acTL", bytes(8)),
        "frame control out of sequence": png_chunk(b"fcTL", bytes([255] * 26)),
        "unknown chunk": png_chunk(b"abCd", b"x" * 100),
        **{
            f"wrong checksum in {name.decode()}": bad_crc(png_chunk(name, body))
            for name, body in {
                b"tEXt": b"Title\0x",
                b"iTXt": b"XML:com.adobe.xmp\0\0\0\0\0x",
                b"iCCP": b"x\0\0" + zlib.compress(b"1"),
                b"pHYs": bytes(9),
                b"eXIf": b"II*\0",
                b"abCd": b"",
            }.items()
        },
    }

    @pytest.mark.parametrize("at_end", [False, True])
    @pytest.mark.parametrize("name", ANCILLARY)
    def test_ancillary_png_chunks_never_fail_the_image(self, name: str, at_end: bool) -> None:
        data = with_chunks(IMAGES["png"], self.ANCILLARY[name], at_end=at_end)
        pixels, size = decode_image(data, LIMITS)
        np.testing.assert_array_equal(pixels, np.asarray(opened(IMAGES["png"])))
        assert size == image_size(data, LIMITS) == (96, 64)

    @pytest.mark.parametrize("at_end", [False, True])
    @pytest.mark.parametrize(
        "chunk",
        [
            png_chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
            png_chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'),
            png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b'<x tiff:Orientation="6"/>')),
            png_chunk(
                b"zTXt",
                b"Raw profile type exif\0\0"
                + zlib.compress(
                    b"\nexif\n32\n" + b"457869660000" + b"4d4d002a0000000800010112000300000001000600000000"
                ),
            ),
        ],
    )
    def test_png_orientation_from_exif_and_xmp(self, chunk: bytes, at_end: bool) -> None:
        data = with_chunks(IMAGES["png"], chunk, at_end=at_end)
        expected = np.asarray(opened(IMAGES["png"]).transpose(Image.Transpose.ROTATE_270))
        np.testing.assert_array_equal(decode_image(data, LIMITS)[0], expected)
        assert image_size(data, LIMITS) == (64, 96)

    def test_wrong_checksum_in_a_pixel_chunk_is_refused(self) -> None:
        grey = photo(mode="L")
        transparent = png_of(np.asarray(grey), 8, bad_crc(png_chunk(b"tRNS", b"\0\x64")))
        palette = IMAGES["png palette"]
        start = palette.index(b"PLTE") - 4
        end = start + 12 + int.from_bytes(palette[start : start + 4], "big")
        for data in (transparent, palette[:start] + bad_crc(palette[start:end]) + palette[end:]):
            with pytest.raises(DecodeError, match="damaged PNG"):
                decode_image(data, LIMITS)

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_16_bit_grey_is_rounded(self, kind: str) -> None:
        values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        data = saved(Image.fromarray(values), kind)
        expected = np.rint(values / 257).astype(np.uint8)
        pixels, _ = decode_image(data, LIMITS)
        for channel in range(3):
            np.testing.assert_array_equal(pixels[:, :, channel], expected)

    def test_16_bit_big_endian_and_colour(self) -> None:
        values = np.random.default_rng(0).integers(0, 65536, (20, 30), dtype=np.uint16)
        big_endian = Image.frombytes("I;16B", (30, 20), values.astype(">u2").tobytes())
        pixels, _ = decode_image(saved(big_endian, "TIFF"), LIMITS)
        np.testing.assert_array_equal(pixels[:, :, 0], np.rint(values / 257))
        colour = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), dtype=np.uint16)
        np.testing.assert_array_equal(decode_image(png_of(colour, 16), LIMITS)[0], colour >> 8)

    def test_32_bit_grey(self) -> None:
        integers = np.array([[-5, 0, 257, 65535, 1 << 30]], dtype=np.int32)
        pixels, _ = decode_image(saved(Image.fromarray(integers), "TIFF"), LIMITS)
        assert pixels[0, :, 0].tolist() == [0, 0, 1, 255, 255]
        reals = np.array([[-1, 0, 0.5, 1, 7, np.nan]], dtype=np.float32)
        pixels, _ = decode_image(saved(Image.fromarray(reals), "TIFF"), LIMITS)
        assert pixels[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0]

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
    def test_first_frame_of_several(self, kind: str) -> None:
        frames = [Image.new("RGB", (40, 30), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        pixels, size = decode_image(data, LIMITS)
        assert size == (40, 30)
        assert (pixels == (200, 0, 0)).all()

    @pytest.mark.parametrize(
        ("format", "mode"), [("PPM", "RGB"), ("PPM", "L"), ("PPM", "1"), ("PPM", "I;16"), ("AVIF", "RGB")]
    )
    def test_further_formats(self, format: str, mode: str) -> None:
        grey16 = Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64))
        data = saved(grey16 if mode == "I;16" else photo(mode="RGB").convert(mode), format)
        expected = np.asarray(opened(data)) / 257 if mode == "I;16" else np.asarray(opened(data).convert("RGB"))
        image, size = decode_image(data, LIMITS)
        np.testing.assert_allclose(image[..., 0] if mode == "I;16" else image, expected, atol=0.5)
        assert size == image_size(data, LIMITS) == (image.shape[1], image.shape[0])
        with pytest.raises(DecodeError):
            decode_image(data[:-20], LIMITS)
        with pytest.raises(LimitError, match=f"{format} of .* pixels"):
            decode_image(data, Limits(pixels=100))

    @pytest.mark.parametrize(("magic", "largest"), [(b"P6", 65535), (b"P6", 100), (b"P5", 1000), (b"P5", 7)])
    def test_ppm_of_another_largest_value(self, magic: bytes, largest: int) -> None:
        """Its numbers are scaled as by Pillow."""
        kind = np.dtype(">u2" if largest > 255 else "u1")
        count = 40 * 30 * (3 if magic == b"P6" else 1)
        numbers = np.random.default_rng(0).integers(0, min(largest + 5, np.iinfo(kind).max), count).astype(kind)
        data = magic + b"\n# made by a test\n40 30\n%d\n" % largest + numbers.tobytes()
        expected = opened(data)
        if expected.mode == "I":
            expected = Image.fromarray(((np.asarray(expected) + 128) // 257).astype(np.uint8))
        np.testing.assert_array_equal(decode_image(data, LIMITS)[0], np.asarray(expected.convert("RGB")))
        with pytest.raises(DecodeError, match="truncated PPM"):
            decode_image(data[:-1], LIMITS)

    def test_images_that_would_take_minutes(self) -> None:
        """Each took half a minute, for 50 MB: bytes read one by one, numbers decoded one by one, joined one by one."""
        jpeg = IMAGES["jpeg"]
        comment = b"P6\n#" + b"x" * 20_000_000
        exif = jpeg[:2] + (b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)) * 300 + jpeg[2:]
        wide = b"P6\n2000 1000\n65535\n" + bytes(2000 * 1000 * 6)
        chunks = IMAGES["png"][:33] + bytes(1_200_100)
        gif = IMAGES["gif"]
        comments = gif[:13] + gif[13 : 13 + (3 << (gif[10] & 7) + 1)] + b"!\xfe\x01x\0" * 100_001
        begin = time.process_time()
        for data, error in (
            (comment, "no header in its first 65,536 bytes"),
            (b"P3\n2000 1001\n255\n" + b"1 " * 100, "PPM of text of 2,000 x 1,001 pixels, at most 2,000,000"),
            (chunks, "more than 100,000 chunks"),
            (comments, "more than 100,000 chunks"),
        ):
            with pytest.raises(SampleError, match=error):
                decode_image(data, LIMITS)
        assert decode_image(exif, LIMITS)[1] == (96, 64)
        assert decode_image(jpeg[:2] + b"\xff" * 20_000_000 + jpeg[2:], LIMITS)[1] == (96, 64)
        assert decode_image(wide, LIMITS)[1] == (2000, 1000)
        with pytest.raises(LimitError, match="WAV of more than 100,000 chunks"):
            audio_seconds(SOUNDS["wav 16"][:12] + bytes(800_100), LIMITS)
        assert time.process_time() - begin < 10

    @pytest.mark.parametrize("count", [1, 4096, 65_535])
    def test_tags_that_point_to_their_own_folder(self, count: int) -> None:
        """In a TIFF, and in 100 folders of EXIF in an AVIF. They were followed for ever."""
        entries = struct.pack("<HHII", 34665, 4, 1, 8) * count
        tiff = b"II*\0" + struct.pack("<IH", 8, count) + entries + bytes(4)
        avif = (
            saved(photo(), "AVIF")
            + b"".join(b"II*\0" + struct.pack("<I", 8 * (100 - n)) for n in range(100))
            + tiff[8:]
        )
        begin = time.process_time()
        with pytest.raises(DecodeError):
            decode_image(tiff, LIMITS)
        with suppress(DecodeError):
            decode_image(avif, LIMITS)
        assert time.process_time() - begin < 20

    def test_avif_without_its_codec(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(image_module._OPENERS, "AVIF")  # type: ignore[attr-defined]
        with pytest.raises(DecodeError, match="AVIF is not supported by the installed Pillow"):
            decode_image(b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif" + bytes(99), LIMITS)

    @pytest.mark.parametrize("name", IMAGES)
    def test_truncated_image_is_refused(self, name: str) -> None:
        data = IMAGES[name]
        with pytest.raises(DecodeError, match=r"truncated|damaged"):
            decode_image(data[: len(data) // 2], LIMITS)

    @pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "jpeg grey", "jpeg cmyk"])
    def test_truncated_jpeg_is_refused_at_any_length(self, name: str) -> None:
        data = IMAGES[name]
        whole, _ = decode_image(data, LIMITS)
        for end in range(20, len(data), 37):
            with pytest.raises(DecodeError, match="JPEG"):
                decode_image(data[:end], LIMITS)
        np.testing.assert_array_equal(decode_image(data + b"trailing bytes", LIMITS)[0], whole)

    def test_jpeg_with_missing_data_is_refused(self) -> None:
        data = IMAGES["jpeg"]
        with pytest.raises(DecodeError, match=r"^truncated JPEG \([\d,]+ bytes\): .*premature end of data"):
            decode_image(data[: len(data) // 2] + b"\xff\xd9", LIMITS)

    def test_jpeg_with_a_harmless_warning_is_decoded(self) -> None:
        data = IMAGES["jpeg"]
        odd = data.replace(b"JFIF\0\x01", b"JFIF\0\x07")  # libjpeg: unknown JFIF revision number
        np.testing.assert_array_equal(decode_image(odd, LIMITS)[0], decode_image(data, LIMITS)[0])
        assert odd != data

    @pytest.mark.parametrize("size", [(1023, 767), (300, 901), (64, 64)])
    def test_draft_keeps_twice_the_side(self, size: tuple[int, int]) -> None:
        data = saved(photo(*size), "JPEG")
        for side in (16, 40, 150, 400, None):
            pixels, full = decode_image(data, LIMITS, side=side, draft=True)
            assert full == size
            factor = next((factor for factor in (8, 4, 2) if side and min(size) // factor >= 2 * side), 1)
            reference = opened(data)
            reference.draft("RGB", (size[0] // factor, size[1] // factor))
            np.testing.assert_array_equal(pixels, np.asarray(reference))
            assert pixels.shape[1] == -(-size[0] // factor)
        assert decode_image(data, LIMITS, side=16)[0].shape[1::-1] == size
        assert decode_image(data, LIMITS, side=8, draft=True)[0].shape[1::-1] != size

    def test_pixel_limit_is_checked_before_decoding(self) -> None:
        with pytest.raises(LimitError, match=r"PNG of 50,000 x 50,000 pixels, at most 100,000,000"):
            decode_image(png_header(50_000, 50_000), LIMITS)
        with pytest.raises(LimitError, match="96 x 64 pixels, at most 6,143"):
            decode_image(IMAGES["jpeg"], Limits(pixels=96 * 64 - 1))
        assert decode_image(IMAGES["jpeg"], Limits(pixels=96 * 64))[1] == (96, 64)
        with pytest.raises(LimitError, match="pixels"):
            image_size(png_header(50_000, 50_000), LIMITS)

    def test_webp_canvas_bomb(self) -> None:
        data = bytearray(IMAGES["webp lossless"])
        at = data.index(b"VP8L") + 9
        flags = int.from_bytes(data[at : at + 4], "little") >> 28 << 28
        data[at : at + 4] = (flags | 16382 << 14 | 16382).to_bytes(4, "little")
        with pytest.raises(LimitError, match="16,383 x 16,383"):
            decode_image(bytes(data), LIMITS)

    def test_pixel_limit_may_exceed_pillows(self) -> None:
        data = saved(Image.new("1", (20_000, 10_000)), "PNG")  # 200 Mpx: Pillow itself raises above 179
        assert image_size(data, Limits(pixels=200_000_000)) == (20_000, 10_000)

    def test_jpeg_scan_bomb(self) -> None:
        data = IMAGES["jpeg progressive"]
        last = data.rindex(b"\xff\xda")
        bomb = data[:last] + data[last:-2] * 200 + b"\xff\xd9"
        with pytest.raises(LimitError, match=r"JPEG of 2\d\d scans, at most 100"):
            decode_image(bomb, LIMITS)

    @pytest.mark.parametrize("data", [b"", b"\0", b"%!PS-Adobe-3.0 EPSF", b"<svg>", b"SIMPLE  =  T", b"P7 abc"])
    def test_other_formats_are_not_opened(self, data: bytes) -> None:
        with pytest.raises(DecodeError, match=r"not an image of a known format .*(it begins with|it is empty)"):
            decode_image(data, LIMITS)

    def test_pillow_warnings_are_silenced(self) -> None:
        tiff = bytearray(IMAGES["tiff"])
        directory = struct.unpack_from("<I", tiff, 4)[0]
        tiff[directory : directory + 2] = struct.pack("<H", 9000)  # more entries than there are: Pillow warns
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            opened(bytes(tiff))
            assert seen  # Pillow does warn about this file
            seen.clear()
            decode_image(bytes(tiff), LIMITS)
            assert not seen

    def test_threads(self) -> None:
        expected = {name: decode_image(data, LIMITS)[0] for name, data in IMAGES.items()}
        with ThreadPoolExecutor(4) as pool:
            jobs = [(name, pool.submit(decode_image, data, LIMITS)) for name, data in IMAGES.items() for _ in range(10)]
            for name, job in jobs:
                np.testing.assert_array_equal(job.result()[0], expected[name])


class TestAudio:
    @pytest.mark.parametrize("name", SOUNDS)
    def test_equals_soundfile(self, name: str) -> None:
        audio = decode_audio(SOUNDS[name], LIMITS, frozenset())
        with soundfile.SoundFile(io.BytesIO(SOUNDS[name])) as file:
            expected, rate = file.read(dtype="float32"), file.samplerate
        assert list(audio.waves) == [rate] == [RATE]
        assert audio.waves[rate].dtype == np.float32
        assert audio.waves[rate].flags.writeable
        np.testing.assert_array_equal(audio.waves[rate], expected)
        assert audio.seconds == len(expected) / rate == audio_seconds(SOUNDS[name], LIMITS)

    def test_limits_of_channels_and_memory(self) -> None:
        data = sound("WAV", channels=3)
        assert decode_audio(data, Limits(channels=3), frozenset()).seconds == 0.5
        with pytest.raises(LimitError, match=r"WAV of 3 channels, at most 2 are decoded \(--max-channels\)"):
            decode_audio(data, Limits(channels=2), frozenset())
        for decode, member in ((decode_image, IMAGES["png"]), (partial(decode_audio, rates=frozenset()), data)):
            with pytest.raises(LimitError, match=r"0 MB to decode, at most 0 MB are used \(--max-decode-bytes\)"):
                decode(member, Limits(decode_bytes=len(member)))

    @pytest.mark.parametrize("channels", [2, 3, 6])
    def test_channels_are_averaged(self, channels: int) -> None:
        data = sound("WAV", "FLOAT", channels=channels, seconds=12.0)  # several blocks
        expected = soundfile.read(io.BytesIO(data), dtype="float64")[0].mean(axis=1)
        np.testing.assert_allclose(decode_audio(data, LIMITS, frozenset()).waves[RATE], expected, atol=1e-7)

    def test_resampling_equals_soxr(self) -> None:
        data = sound("FLAC", rate=44_100, channels=2)
        audio = decode_audio(data, LIMITS, frozenset({16_000, 44_100, 48_000}))
        mono = decode_audio(data, LIMITS, frozenset()).waves[44_100]
        assert list(audio.waves) == [16_000, 44_100, 48_000]
        np.testing.assert_array_equal(audio.waves[44_100], mono)
        for rate in (16_000, 48_000):
            np.testing.assert_array_equal(audio.waves[rate], soxr.resample(mono, 44_100, rate, quality="HQ"))
            assert audio.waves[rate].dtype == np.float32

    @pytest.mark.parametrize("name", SOUNDS)
    def test_truncated_audio_is_refused(self, name: str) -> None:
        data = SOUNDS[name]
        with pytest.raises(DecodeError, match=r"truncated|damaged"):
            decode_audio(data[: len(data) // 2], LIMITS, frozenset())

    @pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
    def test_ogg_that_ends_inside_a_page_is_refused(self, subtype: str) -> None:
        data = sound("OGG", subtype, seconds=8.0)
        for end in range(len(data) // 5, len(data), len(data) // 7):
            with pytest.raises(
                DecodeError, match=rf"truncated Ogg \(its last page ends at byte .*, found {end:,} bytes"
            ):
                decode_audio(data[:end], LIMITS, frozenset())

    def test_truncated_wav_error_names_sizes(self) -> None:
        data = SOUNDS["wav 16"]
        with pytest.raises(DecodeError, match=r"truncated WAV \(expected 16,000 bytes of audio, found 15,900\)"):
            decode_audio(data[:-100], LIMITS, frozenset())

    @pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000])
    def test_wav_with_unknown_size(self, size: int) -> None:
        data = bytearray(SOUNDS["wav 16"])
        struct.pack_into("<I", data, data.index(b"data") + 4, size)
        assert decode_audio(bytes(data), LIMITS, frozenset()).seconds == 0.5

    def test_mp3_without_xing_header_is_read_to_its_end(self) -> None:
        quiet_at_first = tone(4.0) * (np.arange(4 * RATE) > RATE)[:, None]
        buffer = io.BytesIO()
        soundfile.write(buffer, quiet_at_first, RATE, format="MP3", bitrate_mode="VARIABLE")
        data = buffer.getvalue()
        assert b"Xing" in data[:64]
        bare = data[data.index(data[:2], 2) :]
        assert b"Xing" not in bare
        assert soundfile.info(io.BytesIO(bare)).duration < 3 or soundfile.info(io.BytesIO(bare)).duration > 5  # guessed
        audio = decode_audio(bare, LIMITS, frozenset())
        assert 4.0 <= audio.seconds < 4.3  # without the header, the encoder's padding is unknown
        assert audio.seconds == audio_seconds(bare, LIMITS)

    TAGS: Mapping[str, tuple[bytes, bytes]] = {
        "title": (id3v2(), b""),
        "cover": (id3v2(200_000), b""),
        "version 2.2": (id3v2(version=2), b""),
        "version 2.3": (id3v2(version=3), b""),
        "empty": (id3v2(0), b""),
        "with a footer": (id3v2(footer=True), b""),
        "two": (id3v2() + id3v2(20_000), b""),
        "two with footers": (id3v2(footer=True) + id3v2(500, footer=True), b""),
        "zeros after it": (id3v2() + bytes(3000), b""),
        "size that is not syncsafe": (id3v2(5000, plain_size=True), b""),
        "small size that is not syncsafe": (id3v2(0x150, plain_size=True), b""),
        "size with a high bit that is not syncsafe": (id3v2(0x90, plain_size=True), b""),
        "id3v1": (b"", ID3V1),
        "ape": (b"", apev2()),
        "ape without a header": (b"", apev2(with_header=False)),
        "all": (id3v2(), apev2() + ID3V1),
        "ape in front": (apev2(), b""),
    }

    @pytest.mark.parametrize("tags", TAGS)
    @pytest.mark.parametrize("name", SOUNDS)
    def test_tags_are_skipped(self, name: str, tags: str) -> None:
        before, behind = self.TAGS[tags]
        data = before + SOUNDS[name] + behind
        expected, audio = (decode_audio(file, LIMITS, frozenset()) for file in (SOUNDS[name], data))
        np.testing.assert_array_equal(audio.waves[RATE], expected.waves[RATE])
        assert audio.seconds == expected.seconds == audio_seconds(data, LIMITS)

    def test_mp3_without_xing_header_after_a_tag(self) -> None:
        bare = SOUNDS["mp3"][SOUNDS["mp3"].index(SOUNDS["mp3"][:2], 2) :]
        expected = decode_audio(bare, LIMITS, frozenset())
        audio = decode_audio(id3v2() + bare + ID3V1, LIMITS, frozenset())
        np.testing.assert_array_equal(audio.waves[RATE], expected.waves[RATE])

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (id3v2(0xFFFFFFF)[:1000] + SOUNDS["mp3"], "truncated ID3v2 tag .expected 268,435,465 bytes, found"),
            (b"ID3\4\0\0\xff\xff\xff\xff" + SOUNDS["mp3"], "truncated ID3v2 tag"),
            (id3v2(5000) + SOUNDS["mp3"][:0], "not audio of a known format.*it is empty"),
            (id3v2(300)[:200], "truncated ID3v2 tag .expected 310 bytes, found 200"),
            (b"ID3\4\0", "truncated ID3v2 tag"),
            (id3v2() + b"%PDF-1.7" * 100, "not audio of a known format.*it begins with b'%PDF"),
            (id3v2() + b"\xff\xf1\x50\x80" * 100, "AAC"),
            (b"\xff\xf9\x50\x80" * 100, "AAC"),
            (id3v2() + b"\0\0\0\x20ftypM4A " + bytes(100), "MP4"),
            (id3v2(0) * 1000 + SOUNDS["mp3"], "more than 100 tags"),
            (id3v2(0) * 1_000_000, "more than 100 tags"),
        ],
    )
    def test_invalid_tags_are_refused(self, data: bytes, message: str) -> None:
        for read in (lambda: decode_audio(data, LIMITS, frozenset()), lambda: audio_seconds(data, LIMITS)):
            with pytest.raises(DecodeError, match=message):
                read()

    @pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
    def test_chained_ogg_is_decoded_to_the_last_stream(self, subtype: str) -> None:
        streams = [sound("OGG", subtype, seconds=seconds) for seconds in (0.5, 1.0, 0.25)]
        waves = [decode_audio(stream, LIMITS, frozenset()).waves[RATE] for stream in streams]
        data = b"".join(streams)
        audio = decode_audio(data, LIMITS, frozenset({8000}))
        expected = soxr.resample(np.concatenate(waves), RATE, 8000, quality="HQ")
        np.testing.assert_array_equal(audio.waves[8000], expected)
        assert audio.seconds == audio_seconds(data, LIMITS) == 1.75
        np.testing.assert_array_equal(decode_audio(data, LIMITS, frozenset()).waves[RATE], np.concatenate(waves))

    def test_chained_ogg_of_several_rates_and_channels(self) -> None:
        streams = [
            sound("OGG", "VORBIS"),
            sound("OGG", "OPUS", rate=48_000, channels=2),
            sound("OGG", "VORBIS", rate=8000),
        ]
        data = b"".join(streams)
        audio = decode_audio(data, LIMITS, frozenset())
        parts = [decode_audio(stream, LIMITS, frozenset({RATE})).waves[RATE] for stream in streams]
        np.testing.assert_array_equal(audio.waves[RATE], np.concatenate(parts))
        assert list(audio.waves) == [RATE]
        assert audio.seconds == audio_seconds(data, LIMITS) == 1.5

    def test_chain_with_a_damaged_stream_is_refused(self) -> None:
        first, second = sound("OGG", "VORBIS"), sound("OGG", "OPUS")
        for data in (first + second[:-30], first + second.replace(b"OpusHead", b"OpusHeda"), first[:-30] + second):
            with pytest.raises(DecodeError, match="Ogg"):
                decode_audio(data, LIMITS, frozenset())

    def test_limits_apply_to_the_whole_chain(self) -> None:
        data = sound("OGG", "OPUS") * 3
        assert decode_audio(data, Limits(seconds=1.5), frozenset()).seconds == 1.5
        for read in (
            lambda: decode_audio(data, Limits(seconds=1.25), frozenset()),
            lambda: audio_seconds(data, Limits(seconds=1.25)),
        ):
            with pytest.raises(LimitError, match=r"at most 1\.2"):
                read()
        with pytest.raises(LimitError, match="more than 1,000 streams"):
            decode_audio(sound("OGG", "OPUS", seconds=0.01) * 1001, LIMITS, frozenset())

    @pytest.mark.parametrize("between", [b"", id3v2(), ID3V1, ID3V1 + id3v2(), apev2() + ID3V1 + id3v2(20_000)])
    @pytest.mark.parametrize("xing", [True, False])
    def test_joined_mp3s_are_decoded_to_the_last(self, between: bytes, xing: bool) -> None:
        first, second = sound("MP3", seconds=2.0), sound("MP3", seconds=3.0)
        rest = second if xing else second[second.index(second[:2], 2) :]
        data = id3v2() + first + between + rest + ID3V1
        expected = [decode_audio(file, LIMITS, frozenset()).waves[RATE] for file in (first, rest)]
        audio = decode_audio(data, LIMITS, frozenset())
        np.testing.assert_array_equal(audio.waves[RATE], np.concatenate(expected))
        assert audio.seconds == audio_seconds(data, LIMITS)

    @pytest.mark.parametrize("behind", [bytes(9000), b"x" * 9000, b"\xff\xfb" * 4500, ID3V1 * 3])
    def test_junk_after_an_mp3_is_ignored(self, behind: bytes) -> None:
        expected = decode_audio(SOUNDS["mp3"], LIMITS, frozenset())
        audio = decode_audio(SOUNDS["mp3"] + behind, LIMITS, frozenset())
        np.testing.assert_array_equal(audio.waves[RATE], expected.waves[RATE])

    def test_libsndfile_still_guesses_the_length_of_an_mp3_without_xing_header(self) -> None:
        """If this fails, libsndfile counts the frames, and `_HiddenLength` is no longer needed."""
        quiet_at_first = tone(4.0) * (np.arange(4 * RATE) > RATE)[:, None]
        buffer = io.BytesIO()
        soundfile.write(buffer, quiet_at_first, RATE, format="MP3", bitrate_mode="VARIABLE")
        data = buffer.getvalue()
        assert abs(soundfile.info(io.BytesIO(data[data.index(data[:2], 2) :])).duration - 4) > 1

    def test_soundfile_still_seeks_after_each_read(self) -> None:
        """If this fails, blocks of an MP3 equal the whole, and `_Stream.seekable` is no longer needed."""
        with soundfile.SoundFile(io.BytesIO(SOUNDS["mp3"])) as file:
            whole = file.read(dtype="float32")
        with soundfile.SoundFile(io.BytesIO(SOUNDS["mp3"])) as file:
            blocks = [file.read(1000, dtype="float32") for _ in range(len(whole) // 1000 + 1)]
        assert not np.array_equal(np.concatenate(blocks), whole)

    def test_length_limit_by_the_header_and_in_fact(self) -> None:
        for name, data in SOUNDS.items():
            with pytest.raises(LimitError, match=r"sound of .* seconds or more, at most 0.2"):
                decode_audio(data, Limits(seconds=0.2), frozenset())
            with pytest.raises(LimitError, match="seconds"):
                audio_seconds(data, Limits(seconds=0.2))
            assert decode_audio(data, Limits(seconds=2.0), frozenset()).seconds <= 2.0, name

    def test_header_claiming_ten_hours_is_refused(self) -> None:
        wav = bytearray(SOUNDS["wav 16"])
        struct.pack_into("<I", wav, wav.index(b"data") + 4, 36_000 * RATE * 2)
        with pytest.raises(DecodeError, match="truncated WAV"):
            decode_audio(bytes(wav), LIMITS, frozenset())
        flac = bytearray(SOUNDS["flac"])
        claim = int.from_bytes(flac[18:26], "big") >> 36 << 36
        flac[18:26] = (claim | 36_000 * RATE).to_bytes(8, "big")
        with pytest.raises(LimitError, match=r"sound of 36,000\.0 seconds or more, at most 1,800"):
            decode_audio(bytes(flac), LIMITS, frozenset())

    def test_flac_of_unknown_length(self) -> None:
        flac = bytearray(SOUNDS["flac"])
        flac[18:26] = (int.from_bytes(flac[18:26], "big") >> 36 << 36).to_bytes(8, "big")
        expected = decode_audio(SOUNDS["flac"], LIMITS, frozenset()).waves[RATE]
        np.testing.assert_array_equal(decode_audio(bytes(flac), LIMITS, frozenset()).waves[RATE], expected)
        assert audio_seconds(bytes(flac), LIMITS) == 0.5
        with pytest.raises(DecodeError, match="FLAC"):
            decode_audio(bytes(flac[:-200]), LIMITS, frozenset())
        for read in (
            lambda: decode_audio(bytes(flac), Limits(seconds=0.1), frozenset()),
            lambda: audio_seconds(bytes(flac), Limits(seconds=0.1)),
        ):
            with pytest.raises(LimitError, match=r"at most 0\.1"):
                read()

    @pytest.mark.parametrize("kind", ["MP3", "OGG", "FLAC"])
    def test_block_size_does_not_matter(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        data = sound(kind, seconds=8.0)
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            expected = file.read(dtype="float32")
        monkeypatch.setattr("mmbeam.decode.audio._BLOCK_SAMPLES", 1000)
        np.testing.assert_array_equal(decode_audio(data, LIMITS, frozenset()).waves[RATE], expected)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("channels", [1, 2])
    def test_non_finite_samples_are_refused(self, value: float, channels: int) -> None:
        samples = tone(channels=channels)
        samples[100, 0] = value
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, RATE, format="WAV", subtype="FLOAT")
        with pytest.raises(DecodeError, match="not finite"):
            decode_audio(buffer.getvalue(), LIMITS, frozenset())

    def test_empty_audio_is_refused(self) -> None:
        with pytest.raises(DecodeError, match="0 frames"):
            decode_audio(sound(seconds=0.0), LIMITS, frozenset())
        with pytest.raises(DecodeError, match="too short to resample: 1 frames"):
            decode_audio(sound(rate=48_000, seconds=1.5 / 48_000), LIMITS, frozenset({16_000}))

    def test_other_formats_are_not_opened(self) -> None:
        with pytest.raises(DecodeError, match="MP4"):
            decode_audio(b"\0\0\0\x20ftypM4A \0\0\0\0" + b"\0" * 100, LIMITS, frozenset())
        for data in (b"", b"\0" * 100, sound("AIFF"), sound("AU"), sound("CAF")):
            with pytest.raises(DecodeError, match="not audio of a known format"):
                decode_audio(data, LIMITS, frozenset())

    def test_rates_out_of_range(self) -> None:
        with pytest.raises(DecodeError, match="WAV of 2,000,000 Hz; 100 to 384,000 Hz"):
            decode_audio(sound(rate=2_000_000, seconds=0.001), LIMITS, frozenset())


class TestText:
    def test_text(self) -> None:
        assert decode_text("Grüße 日本 👩‍🚀\r\n".encode(), LIMITS) == "Grüße 日本 👩‍🚀\r\n"
        assert decode_text(b"\xef\xbb\xbfa\xef\xbb\xbf", LIMITS) == "a\ufeff"
        assert decode_text(b"", LIMITS) == ""

    @pytest.mark.parametrize(("data", "where"), [(b"abc\xff", 3), (b"\xef\xbb\xbfa\xe9", 4), (b"\xed\xa0\x80", 0)])
    def test_invalid_utf8_is_refused(self, data: bytes, where: int) -> None:
        with pytest.raises(DecodeError, match=f"not UTF-8: .* at byte {where}: "):
            decode_text(data, LIMITS)

    def test_length(self) -> None:
        assert decode_text("日本".encode(), Limits(text_chars=2)) == "日本"
        for data in (b"abc", "日本x".encode(), b"a" * 100):
            with pytest.raises(LimitError, match="at most 2"):
                decode_text(data, Limits(text_chars=2))

    def test_size_of_metadata(self) -> None:
        assert decode_metadata(b'["ab"]', Limits(metadata_bytes=6, text_chars=1)) == '["ab"]'
        with pytest.raises(LimitError, match=r"JSON of 7 bytes, at most 6 are read \(--max-metadata-bytes\)"):
            decode_metadata(b'["abc"]', Limits(metadata_bytes=6))

    @given(st.binary(max_size=60))
    def test_any_bytes(self, data: bytes) -> None:
        try:
            expected = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            with pytest.raises(DecodeError):
                decode_text(data, LIMITS)
        else:
            assert decode_text(data, LIMITS) == expected

    def test_metadata(self) -> None:
        for text in ('{"a": [1, 2.5, null]}', ' {"b" :1} ', '{"a": NaN, "b": -Infinity}', "3", "9" * 5000):
            assert decode_metadata(text.encode(), LIMITS) == text

    @pytest.mark.parametrize("data", [b"", b"{", b"{'a': 1}", b'{"a": 1}x', b"\xff", b"[" * 100_000])
    def test_invalid_json_is_refused(self, data: bytes) -> None:
        with pytest.raises(DecodeError, match=r"JSON|UTF-8"):
            decode_metadata(data, LIMITS)


def raw_sample(members: Mapping[str, bytes], **values: Any) -> RawSample:
    plain: dict[str, Any] = {"key": "k", "shard": "s.tar", "offset": 512, "members": members, "fields": tuple(members)}
    return RawSample(**plain | values)


class TestSample:
    FIELDS = {  # noqa: RUF012
        "jpg": IMAGES["jpeg"],
        "wav": SOUNDS["wav 16"],
        "txt": b"  A <b>cat</b> ",
        "json": b'{"a": 1}',
        "cls": b"3",
    }
    ALL = Needs(modalities=frozenset({"image", "audio", "text"}), sampling_rates=frozenset({8000}))

    def test_everything(self) -> None:
        reading = Reading(cleaning=Cleaning(text=("markup", "whitespace", "lower")))
        sample, failures = decode_sample(raw_sample(self.FIELDS), reading, self.ALL)
        assert failures == ()
        assert sample.present == {"image", "audio", "text"}
        assert (sample.key, sample.shard, sample.offset) == ("k", "s.tar", 512)
        assert sample.image is not None
        assert sample.image.shape == (64, 96, 3)
        assert sample.image_size == (96, 64)
        assert sample.audio is not None
        assert list(sample.audio.waves) == [8000]
        assert (sample.text, sample.text_clean) == ("  A <b>cat</b> ", "a cat")
        assert sample.metadata == '{"a": 1}'

    def test_only_needed_modalities_are_decoded(self) -> None:
        needs = Needs(modalities=frozenset({"text"}))
        sample, failures = decode_sample(raw_sample({**self.FIELDS, "jpg": b"junk"}), Reading(), needs)
        assert failures == ()
        assert sample.present == {"image", "audio", "text"}
        assert (sample.image, sample.image_size, sample.audio, sample.text_clean) == (None, None, None, None)
        want = wanted_fields(Reading(), needs)
        assert [name for name in self.FIELDS if want(name)] == ["txt", "json"]

    def test_where_reads_headers_only(self) -> None:
        reading = Reading(cleaning=Cleaning(where=("image_width > 10", "audio_seconds < 3")))
        needs = Needs(modalities=frozenset({"text"}))
        want = wanted_fields(reading, needs)
        assert [name for name in self.FIELDS if want(name)] == ["jpg", "wav", "txt", "json"]
        sample, _ = decode_sample(raw_sample(self.FIELDS), reading, needs)
        assert (sample.image, sample.image_size) == (None, (96, 64))
        assert sample.audio is not None
        assert (dict(sample.audio.waves), sample.audio.seconds) == ({}, 0.5)

    def test_bad_member_fails_its_own_modality_only(self) -> None:
        bad = {"jpg": IMAGES["jpeg"][:500], "wav": b"junk\x1b[31m", "txt": b"\xff", "json": b"{"}
        sample, failures = decode_sample(raw_sample(bad), Reading(), self.ALL)
        assert [failure.modality for failure in failures] == ["image", "audio", "text", "metadata"]
        assert {(failure.step, failure.error) for failure in failures} == {("decode", "DecodeError")}
        assert all(failure.message.isprintable() and len(failure.message) <= 300 for failure in failures)
        assert (sample.image, sample.audio, sample.text, sample.metadata) == (None, None, None, None)
        assert sample.present == {"image", "audio", "text"}
        _, failures = decode_sample(raw_sample(self.FIELDS), Reading(limits=Limits(pixels=9)), self.ALL)
        assert [(failure.modality, failure.error) for failure in failures] == [("image", "LimitError")]

    def test_damaged_members(self) -> None:
        members = {name: data for name, data in self.FIELDS.items() if name != "jpg"}
        damages = (
            Damage(field="jpg", offset=1024, error="LimitError", message="300 MB\n" + "x" * 1000),
            Damage(field="cls", offset=4096, error="DecodeError", message="not a needed field"),
            Damage(field="b.jpg", offset=5120, error="LimitError", message="not a needed field"),
        )
        raw = raw_sample(members, fields=tuple(self.FIELDS), damages=damages)
        sample, failures = decode_sample(raw, Reading(), self.ALL)
        assert [(f.modality, f.step, f.error) for f in failures] == [
            ("image", "read", "LimitError"),
            ("cls", "read", "DecodeError"),
        ]
        assert failures[0].message.startswith("at byte 1,024: 300 MB\N{REPLACEMENT CHARACTER}xxx")
        assert len(failures[0].message) == 300
        assert sample.has("audio")
        assert sample.present == {"image", "audio", "text"}

    def test_a_damaged_video_beside_a_sound_is_recorded_once(self) -> None:
        damages = (Damage(field="mp4", offset=1024, error="DecodeError", message="bad size"),)
        raw = raw_sample({"wav": self.FIELDS["wav"]}, fields=("wav", "mp4"), damages=damages)
        for modalities in ({"audio"}, {"audio", "video"}):
            sample, failures = decode_sample(raw, Reading(), Needs(modalities=frozenset(modalities)))
            assert [(f.modality, f.step, f.error) for f in failures] == [("video", "read", "DecodeError")]
            assert sample.audio is not None

    @pytest.mark.parametrize(
        "lost",
        [{"truncated": True}, {"damages": (Damage(field="", offset=9, error="DecodeError", message="bad header"),)}],
    )
    def test_damaged_sample_is_not_decoded(self, lost: dict[str, object]) -> None:
        sample, failures = decode_sample(raw_sample(self.FIELDS, **lost), Reading(), self.ALL)
        assert [(f.modality, f.step, f.error) for f in failures] == [("", "read", "DecodeError")]
        assert sample.present == {"image", "audio", "text"}
        assert (sample.image, sample.audio, sample.text, sample.metadata) == (None, None, None, None)

    def test_member_that_was_not_read_is_a_flow_error(self) -> None:
        with pytest.raises(FlowError, match=r"k\.jpg is needed but was not read"):
            decode_sample(raw_sample({}, fields=("jpg",)), Reading(), self.ALL)

    def test_named_fields_match_in_any_case(self) -> None:
        fields = FieldMap(image="B.JPG", audio="Sound", text="TXT", video="MP4", metadata="JSON")
        assert fields == FieldMap(image="b.jpg", audio="sound", text="txt", video="mp4", metadata="json")
        assert [fields.kind(name) for name in ("b.jpg", "sound", "txt", "mp4", "json")] == list(KINDS)

    def test_named_fields(self) -> None:
        fields = {"b.jpg": IMAGES["jpeg"], "jpg": IMAGES["png"], "caption": b"x"}
        reading = Reading(fields=FieldMap(image="b.jpg", text="caption"))
        sample, failures = decode_sample(raw_sample(fields), reading, self.ALL)
        assert failures == ()
        assert sample.text == "x"
        np.testing.assert_array_equal(sample.image, decode_image(IMAGES["jpeg"], LIMITS)[0])


SMALL = Limits(pixels=1_000_000, seconds=60.0, text_chars=100_000)


def everything(data: bytes) -> None:
    """Run all decoders on the bytes; only SampleError may be raised."""
    calls: tuple[Callable[[], object], ...] = (
        lambda: decode_image(data, SMALL, side=8, draft=True),
        lambda: image_size(data, SMALL),
        lambda: decode_audio(data, SMALL, frozenset({8000})),
        lambda: audio_seconds(data, SMALL),
        lambda: decode_metadata(data, SMALL),
    )
    for call in calls:
        message = ""
        try:
            call()
        except SampleError as error:
            message = str(error)
        assert message.isprintable()
        assert len(message) < 500
        assert " at 0x" not in message  # the same bytes give the same message


FILES = {
    **IMAGES,
    **SOUNDS,
    "png with metadata": with_chunks(
        IMAGES["png"], png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"x"))
    ),
    "png with a transparent colour": png_of(np.zeros((9, 9, 3)), 16, png_chunk(b"tRNS", bytes(6))),
    "mp3 with tags": id3v2() + SOUNDS["mp3"] + apev2() + ID3V1,
    "flac with tags": id3v2(footer=True) + SOUNDS["flac"] + apev2() + ID3V1,
    "mp3 joined": SOUNDS["mp3"] + ID3V1 + id3v2() + SOUNDS["mp3"],
    "ogg chained": SOUNDS["ogg vorbis"] + SOUNDS["opus"],
    "json": json.dumps({"a": [1, {"b": "ü"}]}).encode(),
}


class TestFuzz:
    """Time and memory are bounded, and only SampleError is raised, for damaged files of every format."""

    @pytest.mark.parametrize("name", FILES)
    def test_damaged_files(self, name: str, capfd: pytest.CaptureFixture[str]) -> None:
        data, rng = FILES[name], np.random.default_rng(len(name))
        tracemalloc.start()
        begin = time.process_time()
        for turn in range(30):
            bytes_ = np.frombuffer(data, dtype=np.uint8).copy()
            end = len(data) if turn % 3 else int(rng.integers(len(data)))
            head = 200 if turn % 2 else len(data)  # damage to headers has the largest effect
            where = rng.integers(0, min(head, len(data)), size=int(rng.integers(1, 6)))
            bytes_[where] ^= rng.integers(1, 256, size=len(where), dtype=np.uint8)
            everything(bytes_[:end].tobytes())
        assert time.process_time() - begin < 10
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
        tracemalloc.stop()
        assert "Traceback" not in capfd.readouterr().err

    @settings(deadline=None, max_examples=60)
    @given(st.sampled_from([data[:12] for data in FILES.values()]), st.binary(max_size=400))
    def test_random_bytes(self, head: bytes, tail: bytes) -> None:
        everything(head + tail)
        everything(tail)


def test_codecs_are_installed() -> None:
    assert features.check("webp")
    assert features.check("libtiff")


class Deadly(bytes):
    """The bytes of a member that end the child process which receives them."""

    def __reduce__(self) -> Any:
        return os.abort, ()


class TestInChildProcesses:
    ALL = TestSample.ALL

    @pytest.fixture(autouse=True)
    def ended(self) -> Iterator[None]:
        yield
        reset()
        assert decode_module._idle == []

    def test_the_same_values_and_failures(self) -> None:
        bad = {"jpg": IMAGES["jpeg"][:500], "wav": b"junk", "txt": b"\xff", "json": b"{"}
        for members in (TestSample.FIELDS, bad, {"png": IMAGES["png"]}):
            raw = raw_sample(members)
            (sample, failures), expected = (
                decode_apart(raw, Reading(), self.ALL),
                decode_sample(raw, Reading(), self.ALL),
            )
            assert failures == expected[1]
            assert repr(sample) == repr(expected[0])
            if sample.image is not None and expected[0].image is not None:
                assert np.array_equal(sample.image, expected[0].image)
                assert sample.image.flags.writeable
        assert len(decode_module._idle) == 1

    def test_a_sample_that_ends_its_process_twice_is_one_failure(self) -> None:
        good = raw_sample(TestSample.FIELDS)
        decode_apart(good, Reading(), self.ALL)
        sample, [failure] = decode_apart(raw_sample({"jpg": Deadly(b"x"), "txt": b"a"}), Reading(), self.ALL)
        assert (failure.step, failure.error, sample.text, sample.present) == (
            "crash",
            "CrashError",
            None,
            {"image", "text"},
        )
        assert failure.message == "its process was killed by SIGABRT in the step decode, twice with this sample alone"
        assert decode_apart(good, Reading(), self.ALL)[1] == ()

    def test_an_end_by_chance_costs_no_sample(self) -> None:
        good = raw_sample(TestSample.FIELDS)
        decode_apart(good, Reading(), self.ALL)
        [child] = decode_module._idle
        child._process.kill()
        child._process.wait()
        assert decode_apart(good, Reading(), self.ALL)[1] == ()

    def test_other_errors_are_raised_here(self) -> None:
        raw = raw_sample(TestSample.FIELDS)
        with pytest.raises(LargeValueError) as large:
            decode_apart(raw, Reading(), self.ALL, max_bytes=10)
        assert large.value.nbytes > 10
        with pytest.raises(FlowError, match=r"k.jpg is needed but was not read"):
            decode_apart(replace(raw, members={}), Reading(), self.ALL)
