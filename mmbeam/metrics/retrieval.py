"""Retrieval: does a row's vector of one modality find the same row's vector of the other among all rows.

Exact, by cosine in float64, in blocks: beside the vectors it takes the ranks and a few blocks of similarities,
whatever the number of rows. The time grows with its square.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 1024  # rows: a block of similarities is 8 MiB
TIE = 1e-12  # similarities that differ by less are equal: a float64 product of 4,096 numbers errs by 5e-13
CUTOFFS = (1, 5, 10)

Vectors = npt.NDArray[np.floating[Any]]  # [rows, width]
Doubles = npt.NDArray[np.float64]


def match_ranks(left: Vectors, right: Vectors, block: int = BLOCK) -> tuple[Doubles, Doubles]:
    """For each row its rank among all rows of the other side, from 1: left to right, and right to left.

    Among equal similarities the rank is the mean of the best and the worst place, the "realistic rank" of
    Berrendorf et al., "On the Ambiguity of Rank-Based Evaluation of Entity Alignment or Link Prediction
    Methods" (2020): vectors that are all the same are no better than chance. A vector of zeros is equally
    unlike all others.

    Raises ValueError if the shapes differ or a value is not finite.
    """
    if left.shape != right.shape:
        raise ValueError(f"expected two arrays of one shape, found {left.shape} and {right.shape}")
    rows = len(left)
    blocks = [slice(start, min(start + block, rows)) for start in range(0, rows, block)]
    if not all(np.isfinite(side[part]).all() for side in (left, right) for part in blocks):
        raise ValueError("expected finite vectors, found infinity or NaN")
    own = np.concatenate([(_unit(left[part]) * _unit(right[part])).sum(axis=1) for part in blocks] or [np.zeros(0)])
    forward, backward = np.zeros(rows), np.zeros(rows)
    for queries in blocks:
        query = _unit(left[queries])
        for candidates in blocks:
            similarity = query @ _unit(right[candidates]).T
            forward[queries] += _ahead(similarity, own[queries, None], axis=1)
            backward[candidates] += _ahead(similarity, own[None, candidates], axis=0)
    return forward + 0.5, backward + 0.5  # a row has been counted as half ahead of itself


def _unit(vectors: Vectors) -> Doubles:
    unit = vectors.astype(np.float64)
    norms = np.linalg.norm(unit, axis=1, keepdims=True)
    np.divide(unit, norms, out=unit, where=norms > 0)
    return unit


def _ahead(similarity: Doubles, own: Doubles, axis: int) -> Doubles:
    """How many are more alike than a row's own match, those that are equally alike counting half."""
    above = np.count_nonzero(similarity > own + TIE, axis=axis)
    at_least = np.count_nonzero(similarity >= own - TIE, axis=axis)
    return np.asarray((above + at_least) / 2, dtype=np.float64)


def retrieval_scores(ranks: Doubles) -> Mapping[str, float]:
    """recall@1, 5 and 10 (the share of ranks up to it), median rank, and MRR (the mean of 1 / rank)."""
    recalls = {f"recall@{cutoff}": float((ranks <= cutoff).mean()) for cutoff in CUTOFFS}
    return {**recalls, "median_rank": float(np.median(ranks)), "mrr": float((1 / ranks).mean())}
