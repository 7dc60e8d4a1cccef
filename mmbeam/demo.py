"""The demo: a small corpus, captioned and embedded in one pass by the shipped model, and a look at what came out.

Offline and on the CPU, in some ten seconds. Everything it makes is made anew each time.
"""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import zip_longest
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
from mmbeam.jobs.caption import CaptionOptions, caption
from mmbeam.models.placement import compute_on_one_thread
from mmbeam.names import MODALITIES, SHIPPED_MODEL
from mmbeam.readers.listing import list_shards
from mmbeam.readers.units import plan_units
from mmbeam.readers.windows import read_batches
from mmbeam.report.sketch import sketch_audio, sketch_image
from mmbeam.report.summary import summary_text
from mmbeam.types import Needs, Sample

SAMPLES, SHARDS = 48, 4
SEED = 11  # neither training nor selection of the shipped model has seen these scenes
RATE = 16000  # Hz: of the sounds that are written
SHOWN = 3  # samples and neighbours

Row = Mapping[str, Any]


def run_demo(directory: Path) -> Iterator[str]:
    """Make the demo in `directory`, and say line by line what is done.

    Raises UsageError if the directory holds something else.
    """
    shards, output = directory / "shards", directory / "captions"
    if directory.exists() and any(directory.iterdir()) and not shards.is_dir():
        raise UsageError(f"{directory}: expected an empty directory or that of an earlier demo; name another one")
    paths = write_corpus(shards, samples=SAMPLES, shards=SHARDS, seed=SEED, rate=RATE)
    yield f"Made a corpus of {SAMPLES} samples: {shards}/corpus-{{00000..{len(paths) - 1:05d}}}.tar"
    yield "  each a picture (jpg, png, webp), a sound (wav, flac, ogg, mp3), a text and a JSON that says what they show"
    compute_on_one_thread()
    yield "Captions and embeddings of all of it, in one pass, by the small fusion model that ships with mmbeam:"
    report = caption(
        CaptionOptions(
            input=(f"{shards}/corpus-*.tar",),
            output=str(output),
            model=SHIPPED_MODEL,
            explain=True,
            with_embeddings=True,
            device="cpu",
            overwrite=True,
        )
    )
    yield from (f"  {line}" for line in summary_text(report, str(output)).splitlines())
    yield from _look(paths[0], output / "data")
    yield from _what_next(shards, output)


def _look(shard: Path, data: Path) -> Iterator[str]:
    """The Parquet, read back: columns, captions beside what they are of, neighbours."""
    table = ds.dataset(data).to_table().sort_by("key")
    rows: list[Row] = table.to_pylist()
    yield f"\n{len(rows)} rows in {len(list(data.glob('*.parquet')))} Parquet files. Their columns:"
    widths = widths_of(table.schema)
    for column in table.schema:
        width = f", {widths[column.name]} each" if column.name in widths else ""
        yield f"  {column.name:<26} {_type_name(column.type)}{width}"
    by_key = {row["key"]: row for row in rows}
    letters = ", ".join(f"{name[0].upper()} {name}" for name in ("red", "green", "blue"))
    yield f"\nThe first {SHOWN}. Left the picture ({letters}, ...), right the sound, low notes below:"
    for sample in _first_samples(shard):
        yield from _side_by_side(sample, by_key[sample.key])
    right = sum(row["caption"] == json.loads(row["metadata"])["caption"] for row in rows)
    yield f"{right} of {len(rows)} captions are exactly what the corpus's own JSON says is true."
    yield from _meaning(rows)


def _type_name(kind: pa.DataType) -> str:
    return f"list of {kind.value_type}" if pa.types.is_list(kind) else str(kind)


def _first_samples(shard: Path) -> Sequence[Sample]:
    """The first samples of a shard, decoded as a job decodes them."""
    unit = replace(plan_units(list_shards([str(shard)]), [])[0], limit=SHOWN)
    needs = Needs(modalities=frozenset(("image", "audio")), sampling_rates=frozenset((RATE,)))
    with closing(read_batches(unit, Reading(), needs, Windows())) as batches:
        return [sample for batch in batches for sample in batch.samples]


def _side_by_side(sample: Sample, row: Row) -> Iterator[str]:
    picture = [] if sample.image is None else sketch_image(sample.image, COLOURS)
    sound = [] if sample.audio is None else sketch_audio(sample.audio.waves[RATE], RATE)
    yield f"  {sample.key}  text {row['text']!r}"
    for left, right in zip_longest(picture, sound, fillvalue=""):
        yield f"    {left}   |{right}|"
    yield f"    caption: {row['caption']}"
    parts = ", ".join(f"{modality} {row[f'caption_{modality}_attribution']:.0%}" for modality in MODALITIES)
    yield f"    attribution: {parts}; log-probability {row['caption_logprob']:.3f}"


def _meaning(rows: Sequence[Row]) -> Iterator[str]:
    """What is alike lies close together: the nearest neighbours, against the truth in the JSON."""
    scenes = [json.loads(row["metadata"]) for row in rows]
    yield "\nWhat is alike lies close together. Nearest neighbours:"
    for modality, fact, of_scene in (
        ("image", "they share a colour", _colours),
        ("audio", "they share the pitch", _pitch),
    ):
        nearest = nearest_neighbours(np.array([row[f"{modality}_embedding"] for row in rows]))
        yield f"  by {modality}_embedding:"
        for index in range(SHOWN):
            mine, other = (scenes[i]["clauses"][modality].removeprefix("with ") for i in (index, nearest[index]))
            yield f"    {mine}  ->  {other}"
        pairs = [(one, two) for one in range(len(rows)) for two in range(len(rows)) if one != two]
        found, chance = (_share(scenes, some, of_scene) for some in (list(enumerate(nearest)), pairs))
        yield f"    {found:.0%} of the time {fact}; of random pairs it is {chance:.0%}"


def nearest_neighbours(vectors: npt.NDArray[np.float64]) -> list[int]:
    """For each of the vectors [count, dim] the number of the nearest other one, by cosine."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = unit @ unit.T
    np.fill_diagonal(likeness, -np.inf)
    return [int(index) for index in likeness.argmax(1)]


def _colours(scene: Row) -> set[str]:
    return {shape["colour"] for shape in scene["shapes"]}


def _pitch(scene: Row) -> set[str]:
    return {scene["sound"]["pitch"]}


def _share(scenes: Sequence[Row], pairs: Sequence[tuple[int, int]], of_scene: Callable[[Row], set[str]]) -> float:
    """The share of pairs that have something in common."""
    return float(np.mean([bool(of_scene(scenes[one]) & of_scene(scenes[two])) for one, two in pairs]))


def _what_next(shards: Path, output: Path) -> Iterator[str]:
    yield "\nThe same job by hand; since all of it is done, it will say so at once:"
    yield f"  mmbeam caption --input {shlex.quote(f'{shards}/corpus-*.tar')} --explain --with-embeddings \\"
    yield f"    --device cpu --output {shlex.quote(str(output))}"
    yield "The rows, in Python:"
    yield "  import pyarrow.dataset as ds"
    yield f"  table = ds.dataset({str(output / 'data')!r}).to_table()"
