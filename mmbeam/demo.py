"""The demo: a small corpus, and a description of the rows that a job wrote for it.

Every demo starts from scratch, offline and on the CPU. commands/demo.py runs the job itself.
"""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from mmbeam.config import Reading, Windows
from mmbeam.corpus.scene import COLOURS
from mmbeam.corpus.write import write_corpus
from mmbeam.errors import UsageError
from mmbeam.features.schema import widths_of
from mmbeam.names import FUSION_MODALITIES
from mmbeam.readers.listing import list_shards
from mmbeam.readers.units import plan_units
from mmbeam.readers.windows import read_batches
from mmbeam.types import ImageHWC, Needs, Sample, Waveform

SAMPLES, SHARDS = 48, 4
SEED = 11  # its scenes were used neither to train nor to select the shipped model
RATE = 16000  # Hz, of the audio in the corpus
SHOWN = 3  # number of samples and of neighbours that are shown
SHADES = " ░▒▓█"  # of a spectrogram, from silence to full scale
RANGE = 4.0  # drawn range of power, in powers of ten below full scale
LOWEST = 60.0  # lowest frequency that is drawn, in Hz

Row = Mapping[str, Any]


def make_corpus(directory: Path) -> Path:
    """Write the demo's shards under `directory` and return their folder.

    Raise UsageError if the directory is neither empty nor that of an earlier demo.
    """
    shards = directory / "shards"
    if directory.exists() and any(directory.iterdir()) and not shards.is_dir():
        raise UsageError(f"{directory}: expected an empty directory, or that of an earlier demo; choose another")
    write_corpus(shards, samples=SAMPLES, shards=SHARDS, seed=SEED, rate=RATE)
    return shards


def describe_rows(shards: Path, output: Path) -> Iterator[str]:
    """Yield lines that show the job's columns, the captions next to their samples, and nearest neighbours."""
    table = ds.dataset(output / "data").to_table().sort_by("key")
    rows: list[Row] = table.to_pylist()
    yield f"\n{len(rows)} rows in {len(list((output / 'data').glob('*.parquet')))} Parquet files, with these columns:"
    widths = widths_of(table.schema)
    for column in table.schema:
        kind = f"list of {column.type.value_type}" if pa.types.is_list(column.type) else str(column.type)
        width = f", {widths[column.name]} each" if column.name in widths else ""
        yield f"  {column.name:<26} {kind}{width}"

    by_key = {row["key"]: row for row in rows}
    letters = ", ".join(f"{name[0].upper()} {name}" for name in ("red", "green", "blue"))
    yield f"\nThe first {SHOWN} samples: image on the left ({letters}, ...), spectrogram of the audio on the right:"
    unit = replace(plan_units(list_shards([str(sorted(shards.glob("*.tar"))[0])]), [])[0], limit=SHOWN)
    needs = Needs(modalities=frozenset(("image", "audio")), sampling_rates=frozenset((RATE,)))
    with closing(read_batches(unit, Reading(), needs, Windows())) as batches:
        for sample in (sample for batch in batches for sample in batch.samples):
            yield from _side_by_side(sample, by_key[sample.key])
    correct = sum(row["caption"] == json.loads(row["metadata"])["caption"] for row in rows)
    yield f"{correct} of {len(rows)} captions equal the true caption in the corpus's JSON."

    scenes = [json.loads(row["metadata"]) for row in rows]
    colours = [{shape["colour"] for shape in scene["shapes"]} for scene in scenes]
    pitches = [{scene["sound"]["pitch"]} for scene in scenes]
    yield "\nNearest neighbours by embedding:"
    for modality, labels, label in (("image", colours, "a colour"), ("audio", pitches, "the pitch")):
        nearest = nearest_neighbours(np.array([row[f"{modality}_embedding"] for row in rows]))
        yield f"  by {modality}_embedding:"
        for index in range(SHOWN):
            pair = (scenes[i]["clauses"][modality].removeprefix("with ") for i in (index, nearest[index]))
            yield f"    {'  ->  '.join(pair)}"
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        rates = [np.mean([bool(labels[i] & labels[j]) for i, j in some]) for some in (enumerate(nearest), pairs)]
        yield f"    {rates[0]:.0%} of the neighbours share {label}; {rates[1]:.0%} of random pairs do"


def describe_next_steps(shards: Path, output: Path) -> Iterator[str]:
    """Yield lines with the demo's command, and with the Python that reads its rows."""
    yield "\nThe same job from the command line. All of its units are committed, so it would skip them:"
    yield f"  mmbeam caption --input {shlex.quote(f'{shards}/corpus-*.tar')} --explain --with-embeddings \\"
    yield f"    --device cpu --output {shlex.quote(str(output))}"
    yield "The rows, in Python:"
    yield "  import pyarrow.dataset as ds"
    yield f"  table = ds.dataset({str(output / 'data')!r}).to_table()"


def _side_by_side(sample: Sample, row: Row) -> Iterator[str]:
    image = [] if sample.image is None else sketch_image(sample.image, COLOURS)
    sound = [] if sample.audio is None else sketch_audio(sample.audio.waves[RATE], RATE)
    yield f"  {sample.key}  text {row['text']!r}"
    for left, right in zip_longest(image, sound, fillvalue=""):
        yield f"    {left}   |{right}|"
    yield f"    caption: {row['caption']}"
    parts = ", ".join(f"{modality} {row[f'caption_{modality}_attribution']:.0%}" for modality in FUSION_MODALITIES)
    yield f"    attribution: {parts}; log-probability {row['caption_logprob']:.3f}"


def nearest_neighbours(vectors: npt.NDArray[np.float64]) -> list[int]:
    """Return the index of the nearest other vector of each vector [count, width], by cosine similarity."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return [int(index) for index in similarity.argmax(1)]


def sketch_image(image: ImageHWC, colours: Mapping[str, tuple[int, int, int]], rows: int = 12) -> list[str]:
    """Draw an image, uint8 [H, W, 3], as `rows` lines with a letter per cell for the nearest of `colours`.

    Cells clearly darker than the darkest colour are background, drawn as a dot.
    """
    height, width = image.shape[:2]
    columns = max(1, round(2 * rows * width / height))
    names, table = _letters(colours), np.array(list(colours.values()), float)
    ys, xs = (((np.arange(n) + 0.5) * size / n).astype(int) for n, size in ((rows, height), (columns, width)))
    cells = image[ys][:, xs].astype(float)
    nearest = np.abs(cells[:, :, None] - table).sum(-1).argmin(-1)
    dark = cells.max(-1) < 0.8 * table.max(-1).min()
    return [
        "".join("." if shadow else names[colour] for colour, shadow in zip(*line, strict=True))
        for line in zip(nearest, dark, strict=True)
    ]


def _letters(names: Iterable[str]) -> list[str]:
    """Return a letter for each name: its first letter that no earlier name uses."""
    letters: list[str] = []
    for name in names:
        letters.append(next((letter for letter in name.upper() if letter not in letters), "?"))
    return letters


def sketch_audio(wave: Waveform, rate: int, rows: int = 12, columns: int = 32) -> list[str]:
    """Draw audio, float32 [frames], as a spectrogram of `rows` lines: time to the right, frequency upwards.

    The rows divide the range from 60 Hz to half the rate on a logarithmic scale. Shades are powers of ten of the power;
    the darkest is a sine at full scale.
    """
    size = 1 << max(6, (len(wave) // columns * 2).bit_length() - 1)
    padded = np.pad(wave, (size // 2, size))
    starts = (np.arange(columns) * len(wave) / columns).astype(int)
    frames = np.stack([padded[start : start + size] for start in starts]) * np.hanning(size)
    power = np.abs(np.fft.rfft(frames)) ** 2 / (size / 4) ** 2  # 1 is a sine of full scale
    edges = np.geomspace(LOWEST, rate / 2, rows + 1) * size / rate
    bands = [power[:, int(a) : max(int(a) + 1, int(b))].max(1) for a, b in pairwise(edges)]
    level = (np.log10(np.maximum(np.array(bands), 1e-12)) + RANGE) / RANGE * (len(SHADES) - 1)
    shade = np.clip(np.ceil(level), 0, len(SHADES) - 1).astype(int)
    return ["".join(SHADES[s] for s in line) for line in shade[::-1]]
