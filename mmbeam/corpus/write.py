"""Writes the corpus as WebDataset shards, in several image and audio codecs, for `mmbeam demo` and for tests."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import soundfile
from PIL import Image

from mmbeam.corpus.render import render_audio, render_image
from mmbeam.corpus.scene import Scene, tag
from mmbeam.errors import UsageError
from mmbeam.types import ImageHWC, Waveform

_IMAGE_CODECS = ("jpg", "png", "webp")
_AUDIO_CODECS = ("wav", "flac", "ogg", "mp3")


def metadata(scene: Scene) -> dict[str, Any]:
    """Return the JSON of a sample: its caption and clauses, the fields of the scene, maker and license."""
    origin = {"made_by": "mmbeam", "license": "CC0-1.0"}
    return {"caption": scene.caption(), "clauses": scene.clauses(), **asdict(scene), **origin}


def encode_image(image: ImageHWC, codec: str) -> bytes:
    """Encode an image as jpg, png or webp."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, {"jpg": "JPEG"}.get(codec, codec.upper()), quality=92)
    return stream.getvalue()


def encode_audio(wave: Waveform, rate: int, codec: str) -> bytes:
    """Encode audio as wav, flac, mp3 or ogg (Vorbis, whose bytes differ between calls by a random stream number)."""
    stream = io.BytesIO()
    soundfile.write(stream, wave, rate, format=codec.upper())
    return stream.getvalue()


def members(scene: Scene, image_side: int, rate: int) -> dict[str, Any]:
    """Return a sample for webdataset's writer. Codecs cycle with the index, so that all pairs occur."""
    image_codec = _IMAGE_CODECS[scene.index % len(_IMAGE_CODECS)]
    audio_codec = _AUDIO_CODECS[scene.index % len(_AUDIO_CODECS)]
    return {
        "__key__": scene.key,
        image_codec: encode_image(render_image(scene, image_side), image_codec),
        audio_codec: encode_audio(render_audio(scene, rate), rate, audio_codec),
        "txt": tag(scene).encode(),
        "json": json.dumps(metadata(scene)).encode(),
    }


def write_corpus(
    directory: Path,
    *,
    samples: int = 256,
    shards: int = 4,
    seed: int = 0,
    start: int = 0,
    image_side: int = 256,
    rate: int = 16000,
) -> list[Path]:
    """Write scenes `start` to `start + samples` of `seed` as WebDataset shards, and return their paths.

    Raises UsageError if a shard would be empty, OSError if writing fails.
    """
    from webdataset import ShardWriter  # imports torch, which rendering does not need

    if not 1 <= shards <= samples:
        raise UsageError(f"{samples} samples cannot fill {shards} shards; expected 1 to {samples} shards")
    directory.mkdir(parents=True, exist_ok=True)
    pattern = f"{str(directory.absolute()).replace('%', '%%')}/corpus-%05d.tar"
    for shard in range(shards):
        begin, end = (start + samples * part // shards for part in (shard, shard + 1))
        with ShardWriter(pattern, maxcount=samples, start_shard=shard, verbose=0, mtime=0) as writer:
            for index in range(begin, end):
                writer.write(members(Scene.draw(seed, index), image_side, rate))
    return [Path(pattern % shard) for shard in range(shards)]
