"""Hostile members: each is one failure with the stated error, or data, and costs no other sample anything."""

import io
import json
import pickle
import struct
import wave
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from shards import huge_png, tar_bytes
from test_memory import gif_of_frames, jpeg_with_exif, overlapping_tags, saved, webp_header
from webdataset.autodecode import decoders

from mmbeam.config import Reading, Windows
from mmbeam.errors import printable
from mmbeam.readers.listing import list_shards
from mmbeam.readers.units import plan_units
from mmbeam.readers.windows import prefetch, read_batches
from mmbeam.types import Batch, Failure, Needs

PIXEL = saved(Image.new("RGB", (8, 8)), "PNG")


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.witness,)


def gif(width: int, height: int) -> bytes:
    data = saved(Image.new("P", (8, 8)), "GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def bmp(width: int, height: int) -> bytes:
    data = saved(Image.new("RGB", (8, 8)), "BMP")
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


def jpeg(width: int, height: int) -> bytes:
    data = saved(Image.new("RGB", (8, 8)), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def tiff_of_looping_pages() -> bytes:
    data = saved(Image.new("RGB", (8, 8)), "TIFF")
    folder = struct.unpack_from("<I", data, 4)[0]
    at = folder + 2 + 12 * struct.unpack_from("<H", data, folder)[0]
    return data[:at] + struct.pack("<I", folder) + data[at + 4 :]


def tiff_of_strips(count: int) -> bytes:
    entry = struct.pack("<HHII", 273, 4, count, 8)
    return b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4 * count + 8)


def wav(channels: int = 1, rate: int = 16000, claimed: int | None = None) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(3200))
    data = bytearray(buffer.getvalue())
    struct.pack_into("<HIIH", data, 22, channels, rate, rate * channels * 2 % (1 << 32), channels * 2)
    if claimed is not None:
        struct.pack_into("<I", data, 40, claimed)
    return bytes(data)


def flac_of_hours(hours: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(1600), 16000, format="FLAC")
    data = bytearray(buffer.getvalue())
    data[18:26] = (int.from_bytes(data[18:26], "big") >> 36 << 36 | hours * 3600 * 16000).to_bytes(8, "big")
    return bytes(data)


# A member and the error of its sample; None: it is read, as data.
MEMBERS: Mapping[str, tuple[str, bytes, str | None]] = {
    "PNG of 60,000 x 60,000": ("png", huge_png(60_000, 60_000), "LimitError"),
    "PNG of 2**31 x 1": ("png", huge_png(2**31 - 1, 1), "LimitError"),
    "JPEG of 65,000 x 65,000": ("jpg", jpeg(65_000, 65_000), "LimitError"),
    "GIF of 65,535 x 65,535": ("gif", gif(65_535, 65_535), "LimitError"),
    "BMP of 100,000 x 100,000": ("bmp", bmp(100_000, 100_000), "LimitError"),
    "WebP of 268 megapixels": ("webp", webp_header(16_384, 16_384), "LimitError"),
    "GIF of 1,000 frames": ("gif", gif_of_frames(1000), None),
    "TIFF of pages in a loop": ("tif", tiff_of_looping_pages(), None),
    "TIFF whose first page is itself the next": ("tif", b"II*\0\x08\0\0\0\0\0\x08\0\0\0", "DecodeError"),
    "TIFF of overlapping tags": ("tif", overlapping_tags(1000, 100_000), "DecodeError"),
    "TIFF of a million strips": ("tif", tiff_of_strips(1_000_000), "LimitError"),
    "JPEG of overlapping EXIF tags": ("jpg", jpeg_with_exif(overlapping_tags(1000, 100_000)), None),
    "JPEG of 1,000 scans": ("jpg", saved(Image.new("CMYK", (8, 8)), "JPEG") + b"\xff\xda" * 1000, "LimitError"),
    "SVG": ("png", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "DecodeError"),
    "SVG with an entity bomb": ("png", b"<!DOCTYPE svg [<!ENTITY a 'aaaa'>]><svg>&a;</svg>", "DecodeError"),
    "EPS, which Pillow gives to Ghostscript": (
        "png",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        "DecodeError",
    ),
    "ICO": ("png", b"\0\0\1\0\1\0" + bytes(40), "DecodeError"),
    "PDF as sound": ("wav", b"%PDF-1.7 /JS (app.alert(1))", "DecodeError"),
    "pickle as a picture": ("jpg", pickle.dumps([1]), "DecodeError"),
    "WAV that claims 4 GB": ("wav", wav(claimed=0x7FFE0000), "DecodeError"),
    "WAV of 10,000 channels": ("wav", wav(channels=10_000), "DecodeError"),
    "WAV of 100 channels": ("wav", wav(channels=100), "LimitError"),
    "WAV of 0 channels": ("wav", wav(channels=0), "DecodeError"),
    "WAV of 4 GHz": ("wav", wav(rate=4_000_000_000), "DecodeError"),
    "WAV of 1 Hz": ("wav", wav(rate=1), "DecodeError"),
    "FLAC that claims 10 hours": ("flac", flac_of_hours(10), "LimitError"),
    "ID3 tag that claims 256 MB": ("mp3", b"ID3\4\0\0\x7f\x7f\x7f\x7f" + bytes(100), "DecodeError"),
    "a million ID3 tags": ("mp3", b"ID3\4\0\0\0\0\0\0" * 100_000, "DecodeError"),
    "Ogg of a million pages": ("ogg", (b"OggS\0\2" + bytes(21)) * 10_000, "DecodeError"),
    "MP4 without an index": ("mp4", b"\0\0\0\x18ftypisom\0\0\2\0isomavc1", "DecodeError"),
    "MP4 of 100,001 boxes": ("mp4", b"\0\0\0\x08free" * 100_001, "LimitError"),
    "MP4 with a box that claims 2**63 bytes": ("mov", b"\0\0\0\1mdat\x7f" + b"\xff" * 7, "DecodeError"),
    "playlist of a local file as a video": ("mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "DecodeError"),
    "playlist of a server as a video": ("webm", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/\n", "DecodeError"),
    "list of FFmpeg as a video": ("mkv", b"ffconcat version 1.0\nfile /etc/passwd\n", "DecodeError"),
    "Matroska of an unknown size": ("mkv", b"\x1a\x45\xdf\xa3\x01" + b"\xff" * 7, "DecodeError"),
    "AVI that claims 4 GB": ("avi", b"RIFF\xff\xff\xff\xffAVI " + bytes(100), "DecodeError"),
    "picture as a video": ("mp4", PIXEL, "DecodeError"),
    "AAC frame of 0 bytes": ("aac", b"\xff\xf1\x50\x80\0\0\0" * 10, "DecodeError"),
    "JSON nested 100,000 deep": ("json", b"[" * 100_000 + b"]" * 100_000, "DecodeError"),
    "JSON objects nested 100,000 deep": ("json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "DecodeError"),
    "JSON with duplicate keys": ("json", b'{"a": 1, "a": 2}', None),
    "JSON with an integer of 100,000 digits": ("json", b'{"a": ' + b"9" * 100_000 + b"}", None),
    "JSON with a number beyond floats": ("json", b'{"a": 1e999999999}', None),
    "JSON with lone surrogates": ("json", b'{"a": "\\ud800"}', None),
    "text over a million characters": ("txt", b"a" * 1_000_001, "LimitError"),
    "text that is not UTF-8": ("txt", b"\xff\xfe\x00", "DecodeError"),
    "text with terminal escapes": ("txt", b"\x1b]0;title\x07\x1b[2J", None),
    "text with HTML": ("txt", b"<script>alert(1)</script>", None),
}
KEYS = (
    *("../../evil", "/etc/evil", "a/../b", "$(touch x)", "`touch x`", "pipe:cat x", "x\ny", "\x1b[31mred\x07"),
    *("\u202ereversed", "<script>alert(1)</script>", "|table|[link](http://x)", "k" * 65_536),
)


def read(path: Path) -> list[Batch]:
    [unit] = plan_units(list_shards([str(path)]), [])
    needs = Needs(modalities=frozenset(("image", "audio", "text", "video")))
    with closing(prefetch(read_batches(unit, Reading(), needs, Windows()), "mmbeam-read-it")) as batches:
        return list(batches)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Failure]]:
    """The failures of each sample, of a shard with all hostile members."""
    directory = tmp_path_factory.mktemp("hostile")
    trap = pickle.dumps(Payload(directory / "executed"))
    members = [(f"{number:03}.{kind}", data) for number, (kind, data, _) in enumerate(MEMBERS.values())]
    names = {
        *decoders,
        "pyd",
        "pickle",
        "pkl",
        "pth",
        "pt",
        "npy",
        "npz",
        "bin",
        "joblib",
        "dill",
        "ten",
        "tb",
        "mp",
        "msg",
    }
    members += [(f"trap.{name}", trap) for name in sorted(names) if name not in ("txt", "json")]
    members += [("trap.cls", b"1"), ("healthy.png", PIXEL)]
    (directory / "x.tar").write_bytes(tar_bytes(members))
    batches = read(directory / "x.tar")
    assert batches[-1].unit_error is None
    assert not (directory / "executed").exists()
    samples = {sample.key: sample for batch in batches for sample in batch.samples}
    assert samples["healthy"].image is not None
    result: dict[str, list[Failure]] = {key: [] for key in samples}
    for batch in batches:
        for failure in batch.failures:
            result[failure.key].append(failure)
    return result


@pytest.mark.parametrize("name", MEMBERS)
def test_a_hostile_member_is_data_or_one_failure(name: str, outcomes: dict[str, list[Failure]]) -> None:
    failures = outcomes[f"{list(MEMBERS).index(name):03}"]
    expected = MEMBERS[name][2]
    assert [failure.error for failure in failures] == ([] if expected is None else [expected])
    assert all(len(failure.message) <= 300 and failure.message == printable(failure.message) for failure in failures)


def test_pickles_are_not_loaded_whatever_their_name(outcomes: dict[str, list[Failure]]) -> None:
    """Under every extension that webdataset decodes: only those of pictures and sounds are read, and fail."""
    assert {failure.error for failure in outcomes["trap"]} <= {"DecodeError"}


@pytest.mark.parametrize("key", KEYS)
def test_a_hostile_key_is_an_identity_and_no_path(key: str, tmp_path: Path) -> None:
    """It comes out as it is stored; what is printed of it has neither escapes nor newlines."""
    (tmp_path / "x.tar").write_bytes(tar_bytes([(f"{key}.png", PIXEL), (f"{key}.txt", b"\xff")]))
    batch = read(tmp_path / "x.tar")[0]
    [sample], [failure] = batch.samples, batch.failures
    assert sample.key == failure.key == key
    assert sample.image is not None
    assert not set(printable(key)) & {"\n", "\x1b", "\x07", "\u202e"}
    assert json.loads(json.dumps(sample.key)) == key
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
