"""What the evaluate job does with vectors: retrieval and linear probes.

In this process, outside Beam, on columns read into memory as float32: two for a retrieval, one for a probe.
A rank needs all vectors at once, and a solver goes over them many times.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from mmbeam.errors import JobError, UsageError
from mmbeam.features.columns import Vectors, WrittenRows, to_vectors, with_all
from mmbeam.metrics.pairs import KEY, Field
from mmbeam.metrics.probe import linear_probe
from mmbeam.metrics.retrieval import match_ranks, retrieval_scores

_MODEL = re.compile(r"(?P<model>.*?)_?(?:image|audio|text)_embedding")  # a named model's columns begin with its name


def related_pairs(rows: WrittenRows) -> list[tuple[str, str]]:
    """Every two columns of vectors that are of one model and of one width."""
    kinds = {name: (found["model"], width) for name, width in rows.widths.items() if (found := _MODEL.fullmatch(name))}
    return [(left, right) for left, right in combinations(kinds, 2) if kinds[left] == kinds[right]]


def check_pairs(rows: WrittenRows, asked: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of columns that are asked for as "left:right". Raises UsageError."""
    pairs = []
    for text in asked:
        left, _, right = text.partition(":")
        widths = [rows.widths.get(left), rows.widths.get(right)]
        if None in widths or widths[0] != widths[1]:
            known = ", ".join(f"{name} ({width} numbers)" for name, width in rows.widths.items()) or "none"
            raise UsageError(f"--retrieval {text}: expected LEFT:RIGHT, two columns of one width; there are {known}")
        pairs.append((left, right))
    return pairs


def evaluate_retrieval(rows: WrittenRows, left: str, right: str) -> dict[str, Any]:
    """How well each side finds the other, over the rows that have both. Raises JobError if none has."""
    widths = {left: rows.widths[left], right: rows.widths[right]}
    vectors = _load(rows, widths, (with_all(batch, widths) for batch in rows.read(list(widths))))
    found = len(vectors[left])
    if not found:
        raise JobError(f"{rows.store}: no row has both {left} and {right}")
    forward, backward = match_ranks(vectors[left], vectors[right])
    return {
        "left": left,
        "right": right,
        "rows": found,
        "left_out": rows.count() - found,
        "left_to_right": retrieval_scores(forward),
        "right_to_left": retrieval_scores(backward),
    }


def evaluate_probe(rows: WrittenRows, column: str, label: Field) -> dict[str, Any]:
    """How well the label can be read off the vectors, over the rows that have both."""
    keys: list[str] = []
    labels: list[str] = []

    def labelled() -> Iterator[pa.RecordBatch]:
        for batch in rows.read(list(dict.fromkeys((KEY, column, label.column)))):
            vectors = with_all(batch, widths)
            texts = [label_text(value) for value in label.values(vectors)]
            kept = vectors.filter(pa.array([text is not None for text in texts], pa.bool_()))
            keys.extend(kept.column(KEY).to_pylist())
            labels.extend(text for text in texts if text is not None)
            yield kept

    widths = {column: rows.widths[column]}
    vectors = _load(rows, widths, labelled())[column]
    scores = linear_probe(vectors, labels, keys)
    return {"embedding": column, "label": label.name, "left_out": rows.count() - len(labels), **scores}


def label_text(value: Any) -> str | None:
    """The class that a string or a whole number names; None for anything else."""
    if isinstance(value, str):
        return value.strip() or None
    return str(value) if isinstance(value, int) else None


def _load(rows: WrittenRows, widths: Mapping[str, int], batches: Iterable[pa.RecordBatch]) -> dict[str, Vectors]:
    """The columns as arrays that are made once: nothing is joined, and so nothing held twice. [rows, width]"""
    room = rows.count()
    arrays = {name: np.empty((room, width), np.float32) for name, width in widths.items()}
    filled = 0
    for batch in batches:
        for name, width in widths.items():
            arrays[name][filled : filled + batch.num_rows] = to_vectors(batch.column(name), width)
        filled += batch.num_rows
    return {name: array[:filled] for name, array in arrays.items()}
