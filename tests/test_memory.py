"""The memory that hostile inputs take: a subprocess reads, decodes and encodes them one after another."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from shards import huge_png, tar_bytes
from test_decode import png_chunk
from tiny_audio_text import save_clap, save_whisper
from tiny_clip import save_clip
from videos import video

# MB that any single input may take beyond an ordinary run; a "header" is one that only an expression of --where needs
EXTRA_MB = {"image": 700, "audio": 500, "text": 250, "header": 250, "clap": 700, "video": 700}


Case = tuple[str, str | None, str, list[tuple[str, bytes]]]


def png(width: int, height: int, colour_type: int = 2, channels: int = 3) -> bytes:
    """Return a PNG of one colour."""
    packer = zlib.compressobj(1)
    row = bytes(1 + width * channels)
    pixels = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def overlapping_tags(count: int, nbytes: int) -> bytes:
    """Return a TIFF, or EXIF, whose tags all hold the same bytes of the file."""
    entries = b"".join(struct.pack("<HHII", 40000 + number, 1, nbytes, 0) for number in range(count))
    return b"II*\0" + struct.pack("<IH", 8, count) + entries + bytes(4) + bytes(nbytes)


def jpeg_with_exif(exif: bytes) -> bytes:
    data = saved(Image.new("RGB", (32, 32)), "JPEG")
    parts = [exif[at : at + 65000] for at in range(0, len(exif), 65000)]
    segments = (b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts)
    return data[:2] + b"".join(segments) + data[2:]


def gif_with_comments(nbytes: int) -> bytes:
    data = saved(Image.new("P", (32, 32)), "GIF")
    at = 13 + (3 << (data[10] & 7) + 1)
    return data[:at] + b"!\xfe" + (b"\xff" + bytes([65]) * 255) * (nbytes // 256) + b"\0" + data[at:]


def gif_of_frames(count: int) -> bytes:
    """Return an animated GIF of many frames of 1000 x 1000 pixels."""
    data = saved(Image.new("P", (1000, 1000)), "GIF")
    at = 13 + (3 << (data[10] & 7) + 1)
    return data[:at] + data[at:-1] * count + b";"


def flac(seconds: int, rate: int, channels: int = 1) -> bytes:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, channels, "PCM_16", format="FLAC") as file:
        for _ in range(seconds // 10):
            file.write(np.zeros((10 * rate, channels), np.int16))
    return buffer.getvalue()


def members(name: str, data: bytes, count: int) -> list[tuple[str, bytes]]:
    return [(f"{number:03}.{name}", data) for number in range(count)]


def inputs() -> Iterator[Case]:
    """Yield the name of each input, the error of its samples, the modality that is encoded, and its members."""
    exif = Image.Exif()
    exif[0x0112] = 6
    yield (
        "JPEG of 100 megapixels, rotated",
        None,
        "image",
        members("jpg", saved(Image.new("L", (9900, 9900)), "JPEG", exif=exif), 2),
    )
    yield (
        "progressive JPEG",
        None,
        "image",
        members("jpg", saved(Image.new("RGB", (8000, 8000)), "JPEG", progressive=True), 1),
    )
    yield (
        "WebP",
        None,
        "image",
        members("webp", saved(Image.new("RGB", (5700, 5700)), "WEBP", lossless=True, method=0), 2),
    )
    yield "WebP of 268 megapixels", "LimitError", "image", members("webp", webp_header(16384, 16384), 2)
    yield "AVIF of 16 megapixels", None, "image", members("avif", avif_of(4000, 4000), 1)
    yield "RGBA PNG", None, "image", members("png", png(9000, 9000, 6, 4), 1)
    yield "PNG of 60,000 x 60,000", "LimitError", "image", members("png", huge_png(60_000, 60_000), 4)
    yield "many pictures of 8 megapixels", None, "image", members("png", png(4000, 2000), 6)
    yield "TIFF of overlapping tags", "DecodeError", "image", members("tif", overlapping_tags(20_000, 1 << 20), 2)
    yield (
        "JPEG of overlapping EXIF tags",
        None,
        "image",
        members("jpg", jpeg_with_exif(overlapping_tags(20_000, 1 << 20)), 2),
    )
    yield "GIF of comments", None, "image", members("gif", gif_with_comments(8 << 20), 2)
    yield "GIF of 10,000 frames", None, "image", members("gif", gif_of_frames(10_000), 2)
    yield "FLAC at 384 kHz", None, "audio", members("flac", flac(60, 384_000), 1)
    yield "FLAC of 8 channels", None, "audio", members("flac", flac(120, 48_000, 8), 1)
    yield "FLAC of 15 minutes", None, "audio", members("flac", flac(900, 8000), 1)
    yield "long texts", None, "text", members("txt", b"a" * 150_000, 8)
    yield "texts of a few words", None, "text", members("txt", b" " * 900_000 + b"a", 2)


def long_inputs() -> Iterator[Case]:
    """Yield inputs whose making takes long, as `inputs` does."""
    avif = saved(Image.new("RGB", (5700, 5700), (10, 200, 30)), "AVIF", speed=10)
    yield "AVIF", None, "image", members("avif", avif, 2)
    yield "AVIF of 100 megapixels", "LimitError", "image", members("avif", avif_of(10_000, 10_000), 2)
    webp = saved(Image.new("RGB", (9900, 9900)), "WEBP", lossless=True, method=0)
    yield "WebP of 98 megapixels", "LimitError", "image", members("webp", webp, 2)
    yield "its size, for --where", None, "header", members("webp", webp, 8)
    yield "sizes of AVIF, for --where", None, "header", members("avif", avif, 8)
    yield (
        "length of a FLAC of 384 kHz, for --where",
        None,
        "header",
        members("flac", unknown_length(flac(60, 384_000)), 4),
    )
    yield "30 minutes at 48 kHz for CLAP", None, "clap", members("flac", flac(1800, 48_000), 1)
    yield "30 minutes of stereo for CLAP", None, "clap", members("flac", flac(1800, 48_000, 2), 2)
    options = (("preset", "ultrafast"), ("x264-params", "ref=16"))
    large = video(size=(3840, 2400), count=20, options=options)
    yield "video of 9 megapixels with 16 reference frames", None, "video", members("mp4", large, 2)
    yield (
        "video of 98 megapixels",
        "LimitError",
        "video",
        members("avi", video("avi", "mjpeg", size=(9900, 9900), count=1, pixels="yuvj420p"), 1),
    )


def avif_of(width: int, height: int) -> bytes:
    return saved(Image.new("RGB", (width, height)), "AVIF", speed=10)


def unknown_length(data: bytes) -> bytes:
    """Return a FLAC whose number of frames is 0, as programs write it to a pipe."""
    at = 4 + 4 + 13  # the signature, the header of STREAMINFO, and what is before the 36 bits of the number
    return data[:at] + bytes([data[at] & 0xF0]) + bytes(4) + data[at + 5 :]


def webp_header(width: int, height: int) -> bytes:
    body = struct.pack("<I", 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + body


CHILD = """
import json, sys
from pathlib import Path
import torch
from mmbeam.config import Cleaning, Reading, Windows
from mmbeam.readers.listing import list_shards
from mmbeam.readers.units import plan_units
from mmbeam.readers.windows import read_batches
from mmbeam.stages.embed import embed_stage

def peak():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) / 1024

torch.set_num_threads(1)
models = json.loads(sys.argv[1])
kinds = {"clap": "audio", "header": "text"}
stages = {
    name: embed_stage(model, modalities=[kinds.get(name, name)], batch_size=2) for name, model in models.items()
}
where = ("image_width > 0 or audio_seconds > 0",)
loaded = {modality: stage.load() for modality, stage in stages.items()}
ordinary = 0.0
for line in sys.stdin:
    name, modality, path = json.loads(line)
    Path("/proc/self/clear_refs").write_text("5")
    stage, rows, failures = stages[modality], 0, []
    for unit in plan_units(list_shards([path]), []):
        reading = Reading(cleaning=Cleaning(where=where if modality == "header" else ()))
        for batch in read_batches(unit, reading, stage.needs, Windows()):
            result = stage.run(loaded[modality], batch)
            rows += len(result.samples)
            failures += [failure.error for failure in result.failures]
            del batch, result
    ordinary = ordinary or peak()
    print(json.dumps([name, rows, sorted(set(failures)), peak() - ordinary]), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/clear_refs")
@pytest.mark.parametrize("made", [inputs, pytest.param(long_inputs, marks=pytest.mark.torture)])
def test_no_single_input_takes_more_than_700_mb(made: Callable[[], Iterator[Case]], tmp_path: Path) -> None:
    models = dict.fromkeys(("image", "text", "header", "video"), str(save_clip(tmp_path / "clip")))
    models["audio"] = str(save_whisper(tmp_path / "whisper", seconds=30))
    if made is long_inputs:
        models["clap"] = str(save_clap(tmp_path / "clap", seconds=10))
    lines, expected = [], []
    ordinary = members("jpg", saved(Image.new("RGB", (640, 480)), "JPEG"), 64)
    for name, error, modality, of_shard in [("ordinary", None, "image", ordinary), *made()]:
        path = tmp_path / f"{len(lines)}.tar"
        path.write_bytes(tar_bytes(of_shard))
        lines.append(json.dumps([name, modality, str(path)]) + "\n")
        expected.append((name, len(of_shard), [] if error is None else [error], EXTRA_MB[modality]))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(models)],
        input="".join(lines),
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"MALLOC_ARENA_MAX": "2"},
    )
    assert child.returncode == 0, child.stderr
    results = [json.loads(line) for line in child.stdout.splitlines()]
    assert [result[:3] for result in results] == [list(case[:3]) for case in expected]
    assert [case[0] for case, result in zip(expected, results, strict=True) if result[3] > case[3]] == [], results
