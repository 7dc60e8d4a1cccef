"""The media of a report's gallery, read back from the inputs by shard and offset, and re-encoded.

The bytes of an input are never copied to the page. An image becomes a small JPEG of its decoded pixels, and a sound an
MP3 of its first seconds. If an input is gone or has changed, a note states the reason.
"""

import base64
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import soundfile
import soxr
from PIL import Image

from mmbeam.config import Limits, Reading
from mmbeam.decode import decode_sample, wanted_fields
from mmbeam.decode.audio import decode_audio
from mmbeam.decode.common import codec_errors
from mmbeam.decode.masks import decode_mask
from mmbeam.decode.video import has_sound
from mmbeam.errors import SampleError, printable, redact
from mmbeam.process import cores
from mmbeam.readers.samples import read_samples
from mmbeam.types import ImageHWC, Input, Needs, RawSample, SampleId, Shard, Waveform

THUMB_SIDE = 320  # pixels, of the longer side
STRIP_FRAMES, STRIP_SIDE = 8, 120  # of a video; pixels of a frame's longer side
JPEG_QUALITY = 80
CLIP_SECONDS = 8.0
CLIP_RATES = (8000, 11025, 12000, 16000, 22050, 24000)  # Hz, stored as they are; other sounds are resampled to the last
MASK_COLORS = (
    *((230, 60, 60), (40, 120, 230), (40, 170, 80), (240, 160, 20)),
    *((150, 70, 200), (0, 170, 180), (220, 80, 160)),
)
MASK_OPACITY = 130  # of 255
BLOCK_NUMBERS = 1 << 17  # decoded at a time, over all channels


@dataclass(kw_only=True)
class Media:
    """What was read back of a sample: data URLs, and notes on what could not be read."""

    image: str | None = None  # or a strip of a video's frames
    image_size: tuple[int, int] | None = None  # width and height of the thumbnail
    audio: str | None = None  # at most CLIP_SECONDS
    text: str | None = None
    notes: list[str] = field(default_factory=list)


def load_media(
    keys: Mapping[SampleId, str], inputs: Mapping[str, Sequence[Input]], reading: Reading
) -> dict[SampleId, Media]:
    """Return the media of the samples in `keys`, which maps them to their keys.

    `inputs` holds shards and parts of folders by path, with the size and etag that the run recorded; a shard that is
    not among them is opened unchecked. An error of an input or a codec becomes a note.
    """
    samples: dict[str, list[SampleId]] = defaultdict(list)
    for sample in keys:
        samples[sample.shard].append(sample)
    sources = [source for path in samples for source in inputs.get(path) or [Input(shard=Shard(path=path, url=path))]]
    media: dict[SampleId, Media] = {}
    with ThreadPoolExecutor(cores()) as pool:
        for loaded in pool.map(lambda source: _load_shard(source, samples[source.shard.path], keys, reading), sources):
            media |= loaded
    return media


def _load_shard(
    source: Input, samples: list[SampleId], keys: Mapping[SampleId, str], reading: Reading
) -> dict[SampleId, Media]:
    want = wanted_fields(reading, Needs(modalities=frozenset({"image", "audio"})))
    media: dict[SampleId, Media] = {}
    if source.shard.samples:
        samples = [sample for sample in samples if 0 <= sample.offset - source.begin < len(source.shard.samples)]
    reason = "the input holds another sample at this offset; it has changed since the run"
    try:
        offsets = [sample.offset for sample in samples]
        for raw in read_samples(source, offsets, want, reading, ()):
            sample = SampleId(source.shard.path, raw.offset)
            if raw.key.encode("utf-8", "backslashreplace").decode() == keys[sample]:
                media[sample] = _media(raw, reading)
    except Exception as error:  # of a store, too: a missing input does not prevent the report
        reason = f"the input cannot be read: {printable(redact(str(error) or type(error).__name__))}"
    return {sample: media.get(sample) or Media(notes=[reason]) for sample in samples}


def _media(raw: RawSample, reading: Reading) -> Media:
    needs = Needs(modalities=frozenset({"image", "video"}), image_side=THUMB_SIDE)
    sample, failures = decode_sample(raw, replace(reading, draft=True), needs)
    media = Media(text=sample.text, notes=[f"{fault.modality or 'sample'}: {fault.message}" for fault in failures])
    if sample.image is not None:
        media.image, media.image_size = _thumbnail(sample.image)
    elif sample.video is not None:
        media.image, media.image_size = _strip(sample.video.frames)
    chosen = reading.fields.choose(raw.fields)
    sound = raw.members.get(chosen.get("audio", chosen.get("video", "")))
    if sound is not None and not raw.truncated and ("audio" in chosen or sample.video is not None):
        try:
            if "audio" in chosen or has_sound(sound, reading.limits):
                media.audio = _clip(sound, reading.limits)
        except SampleError as error:
            media.notes.append(f"audio: {error}")
    return media


def _strip(frames: Sequence[ImageHWC]) -> tuple[str, tuple[int, int]]:
    """Return the data URL of a JPEG with up to STRIP_FRAMES frames side by side, and its width and height."""
    last = len(frames) - 1
    count = min(len(frames), STRIP_FRAMES)
    shown = [Image.fromarray(frames[round(index * last / max(1, count - 1))]) for index in range(count)]
    for image in shown:
        image.thumbnail((STRIP_SIDE, STRIP_SIDE))
    strip = Image.new("RGB", (sum(image.width for image in shown), max(image.height for image in shown)))
    left = 0
    for image in shown:
        strip.paste(image, (left, 0))
        left += image.width
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", strip.size


def _thumbnail(pixels: ImageHWC) -> tuple[str, tuple[int, int]]:
    """Return the data URL of a JPEG, and its width and height."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMB_SIDE, THUMB_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", image.size


def draw_masks(segments: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> str | None:
    """Return the data URL of a PNG of `size`, width and height, with a colour per segment; None if none can be read."""
    width, height = size
    levels = np.zeros((height, width), np.uint8)  # number of the segment, 0 for none
    for number, segment in enumerate(segments, 1):
        try:
            rows, columns = (int(side) for side in segment["size"])
            mask = decode_mask(segment["rle"], (rows, columns))
        except ValueError:
            continue
        at_row, at_column = np.arange(height) * rows // height, np.arange(width) * columns // width
        levels[mask[at_row][:, at_column]] = (number - 1) % len(MASK_COLORS) + 1
    if not levels.any():
        return None
    image = Image.fromarray(levels).convert("P")
    image.putpalette([0, 0, 0, *(value for color in MASK_COLORS for value in color)])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes([0] + [MASK_OPACITY] * len(MASK_COLORS)))
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _clip(data: bytes, limits: Limits) -> str:
    """Return the data URL of the first seconds of a sound. Raises SampleError if it cannot be decoded."""
    try:
        wave, rate = _first_seconds(data)
    except SampleError:  # tags ahead of the sound, for example, which the decoder of a job skips
        wave, rate = decode_audio(data, limits, frozenset()).at(None)
    wave = np.clip(np.nan_to_num(wave[: int(CLIP_SECONDS * rate)]), -1, 1)
    if rate not in CLIP_RATES:
        wave, rate = soxr.resample(wave, rate, CLIP_RATES[-1], quality="HQ"), CLIP_RATES[-1]
    kind, name = ("MP3", "mpeg") if "MP3" in soundfile.available_formats() else ("WAV", "wav")
    buffer = io.BytesIO()
    with codec_errors(kind, wave.nbytes):
        soundfile.write(buffer, wave, rate, format=kind)
    return f"data:audio/{name};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _first_seconds(data: bytes) -> tuple[Waveform, int]:
    with codec_errors("audio", len(data)), soundfile.SoundFile(io.BytesIO(data)) as sound:
        left, blocks = int(CLIP_SECONDS * sound.samplerate), list[Waveform]()
        size = max(1, BLOCK_NUMBERS // sound.channels)
        while left > 0 and len(block := sound.read(min(size, left), dtype="float32", always_2d=True)):
            blocks.append(block.mean(axis=1))
            left -= len(block)
        if not blocks:
            raise SampleError("audio of 0 frames")
        return np.concatenate(blocks), sound.samplerate
