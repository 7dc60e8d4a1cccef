"""Input for the tests: images, audio, texts, and shards written by tar, webdataset and in img2dataset's layout.

A `Truth` is a sample that a reader must return; `Made` holds the paths of shards and their truths.
"""

import io
import json
import pickle
import subprocess
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from PIL import Image, ImageDraw

from mmbeam.types import ImageHWC, Waveform

IMAGE_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}
TarFormat = Literal[0, 1, 2]  # tarfile.USTAR_FORMAT, GNU_FORMAT, PAX_FORMAT
AUDIO_FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "opus": ("OGG", "OPUS"),
}
TEXTS: Mapping[str, str] = {
    "latin": "A quiet street in Łódź, façade by façade; naïve coöperation, smörgåsbord.",
    "greek": "Ένας μικρός κήπος δίπλα στη θάλασσα.",
    "cyrillic": "Съешь же ещё этих мягких французских булок.",
    "arabic": "صورة لميناء قديم عند الغروب، ١٢ سفينة.",
    "hebrew": "חתול ישן על חלון כחול.",
    "devanagari": "पहाड़ों के बीच एक छोटा सा गाँव।",
    "thai": "ตลาดน้ำยามเช้าในกรุงเทพฯ",
    "han": "一座古老的石桥横跨小河。",
    "japanese": "夜の東京タワーとカタカナ、ﾊﾝｶｸ。",
    "korean": "눈 내리는 겨울 숲속의 오두막.",
    "emoji": "family 👨‍👩‍👧‍👦, flag 🏳️‍🌈, skin 👍🏽, plain ☕",
    "combining": "e\u0301 n\u0303 Z\u0351\u036b\u0343 a\u0308 against \u00e9 \u00f1 \u00e4",
    "mixed direction": "the word שלום and the number ١٢٣ in one line",
    "controls": "tab\there, nul\x00there, bell\x07, zero\u200bwidth, bom\ufeff",
    "newlines": "one\r\ntwo\nthree\u2028four",
    "spaces": "   \t\n ",
    "empty": "",
    "long": "all work and no play makes a dull caption " * 2500,
}


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A written sample. `bad` names the fields that cannot be decoded."""

    key: str
    members: Mapping[str, bytes]  # by field, in tar order
    text: str | None = None
    size: tuple[int, int] | None = None  # width, height
    seconds: float | None = None
    bad: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Made:
    paths: list[Path]
    truths: list[Truth] = field(default_factory=list)


def natural_image(seed: int, width: int = 96, height: int = 64) -> ImageHWC:
    """Make an image with the statistics of a photograph: smooth noise at every scale, and edges."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    for cells in (2, 4, 8, 16, 32, 64):
        noise = rng.normal(128, 25, (cells, cells, 3)).clip(0, 255).astype(np.uint8)
        enlarged = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        pixels += (np.asarray(enlarged, np.float64) - 128) * 2.4 / cells**0.5
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        corners = rng.integers(0, (width, height), (3, 2))
        draw.polygon([(int(x), int(y)) for x, y in corners], fill=tuple(rng.integers(0, 256, 3).tolist()))
    return np.asarray(image)


def natural_sound(seed: int, seconds: float = 1.0, rate: int = 16000, channels: int = 1) -> Waveform:
    """Make audio, float32 [frames] or [frames, channels]: 1/f noise, and a tone that differs by channel."""
    rng = np.random.default_rng(seed)
    frames = round(seconds * rate)
    spectrum = np.fft.rfft(rng.normal(size=(frames, channels)), axis=0)
    spectrum /= np.sqrt(np.arange(len(spectrum)) + 1)[:, None]
    noise = np.fft.irfft(spectrum, frames, axis=0)
    tone = np.sin(2 * np.pi * np.arange(frames)[:, None] / rate * rng.uniform(200, 1200, channels))
    wave: Waveform = (0.1 * noise / noise.std() + 0.2 * tone).clip(-1, 1).astype(np.float32)
    return wave[:, 0] if channels == 1 else wave


def encode_image(pixels: ImageHWC, extension: str = "jpg", mode: str = "RGB", **options: object) -> bytes:
    """Encode an image; `mode` and `options` are Pillow's (quality, exif, progressive, ...)."""
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, IMAGE_FORMATS[extension], **options)
    return stream.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """Return a PNG of a few hundred bytes whose valid header claims `width` x `height` pixels."""
    png = encode_image(natural_image(0, 8, 8), "png")
    header = png[12:16] + width.to_bytes(4) + height.to_bytes(4) + png[24:29]  # IHDR
    return png[:12] + header + zlib.crc32(header).to_bytes(4) + png[33:]


def encode_sound(wave: Waveform, rate: int = 16000, extension: str = "wav") -> bytes:
    """Encode audio; opus takes 8, 12, 16, 24 and 48 kHz only."""
    container, subtype = AUDIO_FORMATS[extension]
    stream = io.BytesIO()
    soundfile.write(stream, wave, rate, format=container, subtype=subtype)
    return stream.getvalue()


def make_truth(index: int, key: str | None = None, image: str = "jpg", audio: str = "wav") -> Truth:
    """Make a sample with image, audio, text and metadata that depend on `index`."""
    size, seconds = (64 + 8 * (index % 5), 48 + 8 * (index % 3)), 0.25 * (1 + index % 4)
    text = list(TEXTS.values())[index % len(TEXTS)]
    members = {
        image: encode_image(natural_image(index, *size), image),
        audio: encode_sound(natural_sound(index, seconds), extension=audio),
        "txt": text.encode(),
        "json": json.dumps({"index": index, "caption": text}).encode(),
    }
    return Truth(key=key or f"{index:06d}", members=members, text=text, size=size, seconds=seconds)


def make_truths(count: int, start: int = 0) -> list[Truth]:
    """Make samples that cycle through all codecs."""
    images, sounds = list(IMAGE_FORMATS), list(AUDIO_FORMATS)
    return [
        make_truth(index, image=images[index % len(images)], audio=sounds[index % len(sounds)])
        for index in range(start, start + count)
    ]


def member_bytes(name: str, data: bytes, tar_format: TarFormat = tarfile.GNU_FORMAT) -> bytes:
    """Return a regular member: its header (two or three blocks for a long name), data and padding."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tar_format) + data + bytes(-len(data) % 512)


def tar_bytes(members: Sequence[tuple[str, bytes]], tar_format: TarFormat = tarfile.GNU_FORMAT) -> bytes:
    """Return a tar of the members in that order."""
    return b"".join(member_bytes(name, data, tar_format) for name, data in members) + bytes(1024)


def named_members(truths: Sequence[Truth]) -> list[tuple[str, bytes]]:
    """Return the member names and contents of the samples, in order."""
    return [(f"{truth.key}.{name}", data) for truth in truths for name, data in truth.members.items()]


def make_tar_command(directory: Path, truths: Sequence[Truth], tar_format: str = "gnu") -> Made:
    """Write a shard with the `tar` program, in the format `v7`, `ustar`, `gnu` or `posix` (pax)."""
    members = named_members(truths)
    for name, data in members:
        file = directory / "files" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    path = directory / f"{tar_format}.tar"
    command = f"tar --format={tar_format} --create --null --files-from=- --file".split()
    names = "\0".join(name for name, _ in members).encode()
    subprocess.run([*command, path.absolute()], cwd=directory / "files", input=names, check=True)
    return Made(paths=[path], truths=list(truths))


def make_webdataset(directory: Path, truths: Sequence[Truth], shards: int = 2, suffix: str = ".tar") -> Made:
    """Write shards with webdataset, which sorts the fields of a sample; `.tar.gz` is compressed."""
    from webdataset import ShardWriter  # here, because it imports torch

    directory.mkdir(parents=True, exist_ok=True)
    per_shard = -(-len(truths) // shards)
    with ShardWriter(f"{directory}/shard-%06d{suffix}", maxcount=per_shard, verbose=0) as writer:
        for truth in truths:
            writer.write({"__key__": truth.key, **truth.members})
    truths = [replace(truth, members=dict(sorted(truth.members.items()))) for truth in truths]
    return Made(paths=sorted(directory.glob(f"shard-*{suffix}")), truths=truths)


def make_img2dataset(directory: Path, count: int = 4, failed: int = 1) -> Made:
    """Write what img2dataset writes: 00000.tar of jpg, txt and json, a table, and counts.

    The last `failed` downloads have a row in the table and no member in the tar.
    """
    texts = list(TEXTS.values())
    rows = [_img2dataset_row(index, texts[index % len(texts)], index < count) for index in range(count + failed)]
    truths = []
    for index, row in enumerate(rows[:count]):
        jpg = encode_image(natural_image(index, 64, 64), "jpg", quality=95)
        members = {"jpg": jpg, "json": json.dumps(row, indent=4).encode(), "txt": str(row["caption"]).encode()}
        truths.append(Truth(key=str(row["key"]), members=members, text=str(row["caption"]), size=(64, 64)))
    made = make_webdataset(directory, truths, shards=1)
    path = made.paths[0].rename(directory / "00000.tar")
    pq.write_table(pa.Table.from_pylist(rows), directory / "00000.parquet")
    stats = {"count": count + failed, "successes": count, "failed_to_download": failed, "failed_to_resize": 0}
    (directory / "00000_stats.json").write_text(json.dumps(stats))
    return Made(paths=[path], truths=made.truths)


def _img2dataset_row(index: int, caption: str, fetched: bool) -> dict[str, object]:
    row = {"url": f"https://example.org/{index}.jpg", "caption": caption, "key": f"{index:09d}"}
    if not fetched:
        absent = dict.fromkeys(("width", "height", "original_width", "original_height", "exif", "sha256"))
        return {**row, "status": "failed_to_download", "error_message": "HTTP Error 404: Not Found", **absent}
    sizes = {"width": 64, "height": 64, "original_width": 640, "original_height": 640}
    return {**row, "status": "success", "error_message": None, **sizes, "exif": "{}", "sha256": f"{index:064x}"}


@dataclass
class _Trap:
    """Creates the file `marker` when it is unpickled."""

    marker: Path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.marker,)


def make_hostile(directory: Path) -> dict[str, Made]:
    """Write hostile shards, by name, with the samples that can still be read.

    pictures   images that are noise, truncated, empty, or claim 2**31 pixels, between good ones
    truncated  the file ends inside the text of its last sample
    no_tar     an image named .tar
    empty      no bytes at all
    pickle     members that would create the file PICKLED if they were unpickled
    names      members that would leave the directory if they were extracted, after links and devices
    oversized  a good sample, then a header that claims 2**40 bytes
    """
    directory.mkdir(parents=True, exist_ok=True)
    makers = (_pictures, _truncated, _pickle, _names, _oversized)
    written = {maker.__name__.lstrip("_"): maker(directory) for maker in makers}
    written |= {"no_tar": (encode_image(natural_image(0)), []), "empty": (b"", [])}
    for name, (data, _) in written.items():
        (directory / f"{name}.tar").write_bytes(data)
    return {name: Made(paths=[directory / f"{name}.tar"], truths=truths) for name, (_, truths) in written.items()}


Hostile = tuple[bytes, list[Truth]]
JPG = frozenset({"jpg"})


def _pictures(directory: Path) -> Hostile:
    bombs = {
        "noise": np.random.default_rng(0).bytes(4000),
        "cut": encode_image(natural_image(7, 256, 256))[:2000],
        "empty": b"",
        "huge": huge_png(1 << 16, 1 << 15),
    }
    truths = make_truths(2)
    for key, data in bombs.items():
        text = f"text of a sample with a bad image: {key}"
        truths.append(Truth(key=key, members={"jpg": data, "txt": text.encode()}, text=text, bad=JPG))
    truths += make_truths(2, start=2)
    return tar_bytes(named_members(truths)), truths


def _truncated(directory: Path) -> Hostile:
    truths = make_truths(3)
    whole = tar_bytes(named_members(truths))
    text_at = whole.index(f"{truths[2].key}.txt".encode())
    members = {name: truths[2].members[name] for name in list(truths[2].members)[:2]}
    last = replace(truths[2], members=members, text=None, bad=frozenset({"txt"}))
    return whole[: text_at + 512 + 3], [*truths[:2], last]


def _pickle(directory: Path) -> Hostile:
    trap = pickle.dumps(_Trap(directory / "PICKLED"))
    truth = make_truth(0)
    truth = replace(truth, members={**truth.members, "pyd": trap, "pickle": trap, "pth": trap})
    return tar_bytes(named_members([truth])), [truth]


def _names(directory: Path) -> Hostile:
    keys = ("../../evil", "/etc/evil", "a/../../evil", "with space and %2e%2e", "ключ/键", "c:\\evil")
    truths = [make_truth(index, key=key) for index, key in enumerate(keys)]
    links = b""
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
        info = tarfile.TarInfo(f"link{kind.decode()}.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        links += info.tobuf()
    return links + tar_bytes(named_members(truths)), truths


def _oversized(directory: Path) -> Hostile:
    truths = make_truths(1)
    info = tarfile.TarInfo("bomb.jpg")
    info.size = 1 << 40
    good = tar_bytes(named_members(truths))[:-1024]
    return good + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024), [*truths, Truth(key="bomb", members={}, bad=JPG)]
