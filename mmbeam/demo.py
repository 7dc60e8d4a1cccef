"""The demo: a small corpus, the real embed job with tiny models on it, and a look at what came out.

Offline and on the CPU, in some ten seconds. Everything it makes is made anew each time.
"""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from mmbeam.config import ModelRef
from mmbeam.corpus import write_corpus
from mmbeam.errors import UsageError
from mmbeam.jobs.embed import EmbedOptions, embed
from mmbeam.models.tiny import compute_on_one_thread, save_clap, save_clip
from mmbeam.report.summary import summary_text

SAMPLES, SHARDS = 48, 4
SHOWN = 3  # rows and neighbours

Row = Mapping[str, Any]


def run_demo(directory: Path) -> Iterator[str]:
    """Make the demo in `directory`, and say line by line what is done.

    Raises UsageError if the directory holds something else.
    """
    shards, output = directory / "shards", directory / "embeddings"
    if directory.exists() and any(directory.iterdir()) and not shards.is_dir():
        raise UsageError(f"{directory}: expected an empty directory or that of an earlier demo; name another one")
    paths = write_corpus(shards, samples=SAMPLES, shards=SHARDS)
    yield f"Made a corpus of {SAMPLES} samples: {shards}/corpus-{{00000..{len(paths) - 1:05d}}}.tar"
    yield "  each a picture (jpg, png, webp), a sound (wav, flac, ogg, mp3), a text and a JSON that says what they show"
    models = {"clip": save_clip(directory / "models" / "clip"), "clap": save_clap(directory / "models" / "clap")}
    yield f"Made two tiny models: {directory}/models/clip (pictures, texts) and {directory}/models/clap (sounds, texts)"
    yield "  Their weights are random: until the package ships a model of its own, they stand in for real ones."
    compute_on_one_thread()
    yield "Embedding every picture, sound and text, both models in one pass over the shards:"
    report = embed(
        EmbedOptions(
            input=(f"{shards}/corpus-*.tar",),
            output=str(output),
            models=tuple(ModelRef(model=str(path), name=name) for name, path in models.items()),
            device="cpu",
            overwrite=True,
        )
    )
    yield from (f"  {line}" for line in summary_text(report, str(output)).splitlines())
    yield from _look(output / "data")
    yield from _what_next(shards, models, output)


def _look(data: Path) -> Iterator[str]:
    """The Parquet, read back: columns, rows, neighbours."""
    table = ds.dataset(data).to_table().sort_by("key")
    rows: list[Row] = table.to_pylist()
    yield f"\n{len(rows)} rows in {len(list(data.glob('*.parquet')))} Parquet files. Their columns:"
    dims = json.loads(table.schema.metadata[b"mmbeam.dims"])
    for column in table.schema:
        width = f", {dims[column.name]} each" if column.name in dims else ""
        yield f"  {column.name:<22} {_type_name(column.type)}{width}"
    yield f"The first {SHOWN} rows:"
    for row in rows[:SHOWN]:
        size, seconds = f"{row['image_width']} x {row['image_height']}", row["audio_seconds"]
        yield f"  {row['key']}  {row['text']!r}, {size} pixels, {seconds:g} s of sound"
        for name in dims:
            vector = np.array(row[name])
            yield f"    {name:<22} {_numbers(vector)} norm {np.linalg.norm(vector):.3f}"
    yield from _meaning(rows)


def _type_name(kind: pa.DataType) -> str:
    return f"list of {kind.value_type}" if pa.types.is_list(kind) else str(kind)


def _numbers(vector: npt.NDArray[np.float64]) -> str:
    return "[" + " ".join(f"{number:+.3f}" for number in vector[:4]) + " ...]"


def _meaning(rows: Sequence[Row]) -> Iterator[str]:
    """Even a random network keeps alike what is alike: the nearest neighbours, against the truth in the JSON."""
    scenes = [json.loads(row["metadata"]) for row in rows]
    yield "\nEven with random weights, what is alike lies close together. Nearest neighbours:"
    for column, clause, fact, of_scene in (
        ("clip_image_embedding", "image", "they share a colour", _colours),
        ("clap_audio_embedding", "audio", "they share the pitch", _pitch),
    ):
        nearest = nearest_neighbours(np.array([row[column] for row in rows]))
        yield f"  by {column}:"
        for index in range(SHOWN):
            mine, other = (scenes[i]["clauses"][clause].removeprefix("with ") for i in (index, nearest[index]))
            yield f"    {mine}  ->  {other}"
        pairs = [(one, two) for one in range(len(rows)) for two in range(len(rows)) if one != two]
        found, chance = (_share(scenes, some, of_scene) for some in (list(enumerate(nearest)), pairs))
        yield f"    {found:.0%} of the time {fact}; of random pairs it is {chance:.0%}"


def nearest_neighbours(vectors: npt.NDArray[np.float64]) -> list[int]:
    """For each of the vectors [count, dim] the number of the nearest other one, by cosine.

    The mean is taken off first, since the vectors of a random network all lean to one side.
    """
    centred = vectors - vectors.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    likeness = centred @ centred.T
    np.fill_diagonal(likeness, -np.inf)
    return [int(index) for index in likeness.argmax(1)]


def _colours(scene: Row) -> set[str]:
    return {shape["colour"] for shape in scene["shapes"]}


def _pitch(scene: Row) -> set[str]:
    return {scene["sound"]["pitch"]}


def _share(scenes: Sequence[Row], pairs: Sequence[tuple[int, int]], of_scene: Callable[[Row], set[str]]) -> float:
    """The share of pairs that have something in common."""
    return float(np.mean([bool(of_scene(scenes[one]) & of_scene(scenes[two])) for one, two in pairs]))


def _what_next(shards: Path, models: Mapping[str, Path], output: Path) -> Iterator[str]:
    yield "\nThe same job by hand; since all of it is done, it will say so at once:"
    named = " ".join(f"--model {shlex.quote(f'{name}={path}')}" for name, path in models.items())
    yield f"  mmbeam embed --input {shlex.quote(f'{shards}/corpus-*.tar')} {named} \\"
    yield f"    --device cpu --output {shlex.quote(str(output))}"
    yield "The rows, in Python:"
    yield "  import pyarrow.dataset as ds"
    yield f"  table = ds.dataset({str(output / 'data')!r}).to_table()"
