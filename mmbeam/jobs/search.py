"""The search job: the rows of a run nearest to a text, an image, a sound or another row. It runs without Beam.

The search is exact: every vector of the column is compared with the query by cosine similarity.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmbeam.clean import parse_image_filter
from mmbeam.config import Cleaning, FieldMap, Limits, Reading
from mmbeam.decode import decode_sample
from mmbeam.errors import JobError, ModelError, SampleError, UsageError
from mmbeam.features.read import WrittenRows, open_part, read_columns, to_vectors
from mmbeam.features.schema import ColumnName, parse_name
from mmbeam.names import MODALITIES, Modality
from mmbeam.process import cores
from mmbeam.readers.paths import public_path
from mmbeam.readers.stream import read_file
from mmbeam.runs.run import Run, find_run
from mmbeam.types import Batch, RawSample, WorkUnit

FIELD_OF = {"image": "jpg", "audio": "wav", "text": "txt"}  # decoders go by content, not by extension


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What to search for: exactly one of `text`, `image`, `audio` and `like`."""

    run: str  # the output of a job
    text: str | None = None
    image: str | None = None  # path or URL of a file
    audio: str | None = None  # path or URL of a file
    like: str | None = None  # the key of a row
    column: str | None = None  # of vectors; None: the first that can be compared with the query
    top: int = 10
    device: str = "auto"
    text_prompt: str | None = None  # before the text; None: the run's own


class Hit(NamedTuple):
    """A row, and its cosine similarity to the query."""

    score: float
    row: Mapping[str, Any]  # every column except vectors


class SearchResult(NamedTuple):
    """The nearest rows, best first."""

    column: str
    rows: int  # that have a vector
    hits: Sequence[Hit]


class _Place(NamedTuple):
    """A row's place in the output."""

    part: str
    row: int


def search(options: SearchOptions) -> SearchResult:
    """Return the `top` rows whose vectors are nearest to the query; rows of equal score in the order of the output.

    Raises UsageError for an invalid query or column, JobError if the output has no rows or no such key, ModelError if
    the run's model cannot be loaded or has changed, SampleError if the query's file cannot be decoded.
    """
    queries = {name: getattr(options, name) for name in MODALITIES if getattr(options, name, None) is not None}
    if len(queries) + (options.like is not None) != 1:
        raise UsageError("expected exactly one query: a text, `image`, `audio` or `like`")
    if options.top < 1:
        raise UsageError(f"`top` {options.top}: expected 1 or more")
    run, rows = find_run(options.run), WrittenRows.of(options.run)
    candidates = _candidates(rows, options.column)
    excluded = None
    if options.like is not None:
        column, vector, excluded = _vector_of(rows, candidates, options.like)
    else:
        [(modality, query)] = queries.items()
        column, vector = _encode(run, rows, candidates, modality, query, options)
    norm = float(np.linalg.norm(vector))
    if not np.isfinite(norm) or norm == 0:
        raise JobError("the vector of the query is zero or not finite, so it has no nearest rows")
    count, hits = 0, []
    with ThreadPoolExecutor(cores()) as pool:
        scan = pool.map(
            lambda part: _nearest(rows, part, column, rows.widths[column], vector / norm, options.top + 1), rows.parts
        )
        for scanned, best in scan:
            count += scanned
            hits += [(score, place) for score, place in best if place != excluded]
    hits.sort(key=lambda scored: -scored[0])  # stable: parts and rows are in order
    return SearchResult(column, count, _load_rows(rows, hits[: options.top]))


def _candidates(rows: WrittenRows, name: str | None) -> dict[str, ColumnName]:
    """Return the columns of vectors to choose from, image before audio before text; only `name` if it is given."""
    parsed = {column: parse_name(column) for column in rows.widths}
    columns = {column: name for column, name in parsed.items() if name is not None and not name.tokens}
    if not columns:
        raise UsageError(
            f"{rows.store}: has no column of vectors; run `mmbeam embed`, or caption with `with_embeddings`"
        )
    if name is None:
        return dict(sorted(columns.items(), key=lambda entry: MODALITIES.index(entry[1].modality)))
    if name not in columns:
        raise UsageError(f"`column` {name}: expected a column of vectors, one of {', '.join(columns)}")
    return {name: columns[name]}


def _vector_of(
    rows: WrittenRows, candidates: Mapping[str, ColumnName], key: str
) -> tuple[str, npt.NDArray[np.float32], _Place]:
    """Return the first candidate that the row with `key` has, its vector, and the row's place."""
    for part in rows.parts:
        first = 0
        for batch in read_columns(rows.store, part, ("key", *candidates)):
            position = pc.index(batch.column("key"), key).as_py()
            if position >= 0:
                for column in candidates:
                    value = batch.column(column)[position]
                    if value.is_valid:
                        return column, np.asarray(value.as_py(), np.float32), _Place(part, first + position)
                raise JobError(f"`like` {key}: the row has no vector in {' or '.join(candidates)}")
            first += batch.num_rows
    raise JobError(f"`like` {key}: {rows.store} has no row with this key")


def _encode(
    run: Run,
    rows: WrittenRows,
    candidates: Mapping[str, ColumnName],
    modality: Modality,
    query: str,
    options: SearchOptions,
) -> tuple[str, npt.NDArray[np.float32]]:
    """Return the column to search, and the query's vector by the model that made the column."""
    from mmbeam.stages.embed import embed_stage  # imports torch

    problems: list[str] = []
    for column, name in candidates.items():
        reference = run.recorded.get("models", {}).get(name.model)
        made = run.configuration.get("models", {}).get(name.model)
        if reference is None or made is None:
            problems.append(f"{column}: the run does not record its model")
            continue
        reading = _reading(run.configuration["reading"])
        image_filter = reading.cleaning.image_filter
        try:
            stage = embed_stage(
                reference,
                modalities=(modality,),
                device=options.device,
                dtype=run.configuration["dtype"],
                image_filter=None if image_filter is None else parse_image_filter(image_filter),
                count_tokens=False,
                dims=run.configuration.get("dims"),
                text_prompt=options.text_prompt,
            )
            prompt = run.configuration.get("text_prompt", {}).get(name.model)
            if options.text_prompt is None and prompt is not None:
                stage = replace(stage, spec=replace(stage.spec, text_prompt=prompt))
        except UsageError:  # the model does not encode the query's modality
            problems.append(f"{column}: {reference} does not encode {modality}")
            continue
        if stage.width(modality) != rows.widths[column]:
            problems.append(f"{column}: {reference} has vectors of another width for {modality}")
            continue
        if stage.digest != made["digest"]:
            raise ModelError(
                f"{reference}: its files have changed since {rows.store} was written; search with those files"
            )
        is_text = modality == "text"
        where = "the query" if is_text else public_path(query)
        data = query.encode() if is_text else read_file(query, reading.limits.member_bytes)
        field = FIELD_OF[modality]
        raw = RawSample(key=where, shard=where, offset=0, members={field: data}, fields=(field,))
        sample, failures = decode_sample(raw, reading, stage.needs)
        batch = Batch(unit=WorkUnit(id="query", inputs=()), index=0, last=True, samples=(sample,))
        if not failures:
            batch = stage.run(stage.load(), batch)
        for failure in (*failures, *batch.failures):
            raise SampleError(f"{where}: {failure.message}")
        return column, np.asarray(batch.features[f"{modality}_embedding"][0].as_py(), np.float32)
    raise UsageError(f"cannot search by {modality}: {'; '.join(problems)}")


def _reading(recorded: Mapping[str, Any]) -> Reading:
    """Return the run's Reading, without its `where` expressions."""
    cleaning = recorded["cleaning"]
    return Reading(
        fields=FieldMap(),
        limits=Limits(**recorded["limits"]),
        cleaning=Cleaning(text=tuple(cleaning["text"]), image_filter=cleaning["image_filter"]),
        background=tuple(recorded["background"]),
        draft=recorded["draft"],
    )


def _nearest(
    rows: WrittenRows, part: str, column: str, width: int, query: npt.NDArray[np.float32], top: int
) -> tuple[int, list[tuple[float, _Place]]]:
    """Return the number of vectors in a part, and its `top` nearest rows, best first."""
    scores, places, first = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)], 0
    for batch in read_columns(rows.store, part, (column,)):
        valid = np.flatnonzero(np.asarray(batch.column(0).is_valid()))
        vectors = to_vectors(batch.column(0).drop_null(), width)
        norms = np.sqrt(np.einsum("rw,rw->r", vectors, vectors))
        norms[norms == 0] = np.inf  # a zero vector is similar to nothing
        scores.append(vectors @ query / norms)
        places.append(first + valid)
        first += batch.num_rows
    score, place = np.concatenate(scores), np.concatenate(places)
    order = np.argsort(-score, kind="stable")[:top]
    return len(score), [(float(score[i]), _Place(part, int(place[i]))) for i in order]


def _load_rows(rows: WrittenRows, hits: Sequence[tuple[float, _Place]]) -> list[Hit]:
    """Return the rows at these places, without their vectors."""
    columns = [field.name for field in rows.schema if not (pa.types.is_list(field.type) and field.name != "errors")]
    loaded: dict[_Place, Mapping[str, Any]] = {}
    for part in {place.part for _, place in hits}:
        wanted = sorted(place.row for _, place in hits if place.part == part)
        with open_part(rows.store, part) as parquet:
            first = 0
            for number in range(parquet.num_row_groups):
                count = parquet.metadata.row_group(number).num_rows
                here = [row for row in wanted if first <= row < first + count]
                if here:
                    table = parquet.read_row_group(number, columns).take([row - first for row in here])
                    loaded |= {_Place(part, row): values for row, values in zip(here, table.to_pylist(), strict=True)}
                first += count
    return [Hit(score, loaded[place]) for score, place in hits]
