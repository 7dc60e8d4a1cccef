"""Retrieval: the rank of a row when the rows of one modality are sorted by similarity to its vector in another.

Ranks are exact, by cosine similarity in float64. Besides the vectors, memory holds the ranks and a few blocks of
similarities. Time grows with the square of the number of rows.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 1024  # rows: a block of similarities is 8 MiB
TIE = 1e-12  # smaller differences of similarities are ties: the error of a dot product of width 4,096 is 5e-13
CUTOFFS = (1, 5, 10)

Vectors = npt.NDArray[np.floating[Any]]  # [rows, width]
Doubles = npt.NDArray[np.float64]


def match_ranks(left: Vectors, right: Vectors, block: int = BLOCK) -> tuple[Doubles, Doubles]:
    """Return the rank, from 1, of each row's match among all rows of the other side: left to right, and right to left.

    For ties the rank is the mean of the best and the worst rank, the "realistic rank" of Berrendorf et al., "On the
    Ambiguity of Rank-Based Evaluation of Entity Alignment or Link Prediction Methods" (2020): identical vectors
    score no better than chance. A zero vector has similarity 0 with all others.

    `left` and `right` are [rows, width], the ranks [rows]. Raises ValueError if the shapes differ or a value is not
    finite.
    """
    if left.shape != right.shape:
        raise ValueError(f"expected two arrays of one shape, found {left.shape} and {right.shape}")
    rows = len(left)
    blocks = [slice(start, min(start + block, rows)) for start in range(0, rows, block)]
    if not all(np.isfinite(side[part]).all() for side in (left, right) for part in blocks):
        raise ValueError("expected finite vectors, found infinity or NaN")
    matches = np.concatenate([(_unit(left[part]) * _unit(right[part])).sum(axis=1) for part in blocks] or [np.zeros(0)])
    forward, backward = np.zeros(rows), np.zeros(rows)
    for queries in blocks:
        query = _unit(left[queries])
        for candidates in blocks:
            similarity = query @ _unit(right[candidates]).T
            forward[queries] += _ahead(similarity, matches[queries, None], axis=1)
            backward[candidates] += _ahead(similarity, matches[None, candidates], axis=0)
    return forward + 0.5, backward + 0.5  # each match was counted as half ahead of itself


def _unit(vectors: Vectors) -> Doubles:
    unit = vectors.astype(np.float64)
    norms = np.linalg.norm(unit, axis=1, keepdims=True)
    np.divide(unit, norms, out=unit, where=norms > 0)
    return unit


def _ahead(similarity: Doubles, matches: Doubles, axis: int) -> Doubles:
    """Return the number of candidates more similar than the match, where ties count half."""
    above = np.count_nonzero(similarity > matches + TIE, axis=axis)
    at_least = np.count_nonzero(similarity >= matches - TIE, axis=axis)
    return np.asarray((above + at_least) / 2, dtype=np.float64)


def retrieval_scores(ranks: Doubles) -> Mapping[str, float]:
    """Return recall@1, 5 and 10, the median rank, and the mean reciprocal rank."""
    recalls = {f"recall@{cutoff}": float((ranks <= cutoff).mean()) for cutoff in CUTOFFS}
    return {**recalls, "median_rank": float(np.median(ranks)), "mrr": float((1 / ranks).mean())}
