"""Retrieval and linear probes against direct implementations of their definitions, and scikit-learn."""

import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from mmbeam.errors import JobError, UsageError
from mmbeam.metrics.probe import held_out, linear_probe
from mmbeam.metrics.retrieval import BLOCK, match_ranks, retrieval_scores

Array = npt.NDArray[np.float32]

# Retrieval


def ranks_one_by_one(queries: Array, candidates: Array) -> list[float]:
    """Return the rank by definition: the mean of the best and the worst among ties."""
    unit = [
        side / np.linalg.norm(side, axis=1, keepdims=True) for side in (queries.astype(float), candidates.astype(float))
    ]
    ranks = []
    for row, query in enumerate(unit[0]):
        cosines = [float(np.dot(query, candidate)) for candidate in unit[1]]
        above = sum(cosine > cosines[row] + 1e-12 for cosine in cosines)
        equal = sum(abs(cosine - cosines[row]) <= 1e-12 for cosine in cosines)
        ranks.append((above + 1 + above + equal) / 2)
    return ranks


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_ranks_equal_their_definition_for_any_block_size(rows: int, width: int, block: int, seed: int) -> None:
    """Small integers make many ties."""
    random = np.random.default_rng(seed)
    left, right = (random.integers(1, 4, (rows, width)).astype(np.float32) for _ in "ab")
    forward, backward = match_ranks(left, right, block)
    assert forward.tolist() == ranks_one_by_one(left, right)
    assert backward.tolist() == ranks_one_by_one(right, left)


def test_ranks_without_ties_equal_a_sort() -> None:
    random = np.random.default_rng(1)
    left = random.normal(size=(500, 32)).astype(np.float32)
    right = (left + 2 * random.normal(size=left.shape)).astype(np.float32)
    wide = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (left.astype(float), right.astype(float))]
    order = np.argsort(-(wide[0] @ wide[1].T), axis=1)
    expected = 1 + np.argmax(order == np.arange(500)[:, None], axis=1)
    forward, _ = match_ranks(left, right, block=77)
    assert forward.tolist() == expected.tolist()
    scores = retrieval_scores(forward)
    assert scores["recall@5"] == np.mean(expected <= 5)
    assert scores["mrr"] == pytest.approx(np.mean(1 / expected))
    assert scores["median_rank"] == np.median(expected)


def test_identical_vectors_score_at_chance() -> None:
    same = np.ones((101, 8), np.float32)
    for ranks in match_ranks(same, same, block=16):
        assert set(ranks) == {51.0}
        assert retrieval_scores(ranks)["recall@10"] == 0


def test_ranks_ignore_vector_length() -> None:
    left = np.eye(4, dtype=np.float32) * np.array([[1], [1e-20], [1e20], [0]], np.float32)
    forward, backward = match_ranks(left, np.eye(4, dtype=np.float32))
    assert forward.tolist() == [1, 1, 1, 2.5]
    assert backward.tolist() == [1, 1, 1, 2.5]


def test_perfect_match() -> None:
    vectors = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float16)
    forward, _ = match_ranks(vectors, vectors)
    expected = {"recall@1": 1.0, "recall@5": 1.0, "recall@10": 1.0, "median_rank": 1.0, "mrr": 1.0}
    assert retrieval_scores(forward) == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_vectors_are_rejected(bad: float) -> None:
    left, right = np.ones((2, 3), np.float32), np.full((2, 3), bad, np.float32)
    with pytest.raises(ValueError, match="finite"):
        match_ranks(left, right)


def test_arrays_of_different_shapes_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"found \(2, 3\) and \(2, 4\)"):
        match_ranks(np.ones((2, 3)), np.ones((2, 4)))


def peak_of_ranks(rows: int) -> int:
    """Return the peak of allocated bytes, without the vectors."""
    vectors = np.random.default_rng(0).normal(size=(rows, 16))
    tracemalloc.start()
    try:
        match_ranks(vectors, vectors)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_bounded() -> None:
    """Apart from three numbers per row (two ranks, a similarity) and a copy of them."""
    small, large = peak_of_ranks(2 * BLOCK), peak_of_ranks(8 * BLOCK)
    assert large - small <= 6 * 8 * 6 * BLOCK
    assert small <= 4 * BLOCK * BLOCK * 8


# Probes


def clusters(rows: int, classes: int, seed: int = 0, width: int = 16) -> tuple[Array, list[str], list[str]]:
    """Return vectors, labels and keys, with one cluster per class."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, rows)
    vectors = random.normal(size=(classes, width))[labels] + 1.5 * random.normal(size=(rows, width))
    return vectors.astype(np.float32), [f"class {label}" for label in labels], [f"{n:06}" for n in range(rows)]


@pytest.mark.parametrize("classes", [2, 5])
def test_probe_equals_scikit_learn(classes: int) -> None:
    vectors, labels, keys = clusters(800, classes)
    test, target = held_out(keys), np.array(labels)
    scaler = StandardScaler().fit(vectors[~test])
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(vectors[~test]), target[~test])
    inputs, truth = scaler.transform(vectors[test]), target[test]
    predicted, probabilities = model.predict(inputs), model.predict_proba(inputs)
    expected: dict[str, Any] = {
        "accuracy": accuracy_score(truth, predicted),
        "precision": precision_score(truth, predicted, average="macro"),
        "recall": recall_score(truth, predicted, average="macro"),
        "f1": f1_score(truth, predicted, average="macro"),
        "auc": roc_auc_score(truth, probabilities if classes > 2 else probabilities[:, 1], multi_class="ovr"),
    }
    scores = linear_probe(vectors, labels, keys)
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-7)
    assert scores["accuracy"] > scores["majority"] + 0.2
    assert scores["converged"]
    assert (scores["train_rows"], scores["test_rows"]) == ((~test).sum(), test.sum())


def test_probe_of_noise_scores_at_chance() -> None:
    _, labels, keys = clusters(2000, 4)
    scores = linear_probe(np.random.default_rng(1).normal(size=(2000, 8)), labels, keys)
    assert scores["accuracy"] == pytest.approx(0.25, abs=0.08)
    assert scores["auc"] == pytest.approx(0.5, abs=0.06)


def test_held_out_split_depends_on_the_key_only() -> None:
    keys = [f"sample {n}" for n in range(5000)]
    whole = held_out(keys)
    assert whole.mean() == pytest.approx(0.2, abs=0.02)
    assert held_out(keys[::-1]).tolist() == whole[::-1].tolist()
    assert held_out(["00000", "lone \udce4"]).tolist() == held_out(["lone \udce4", "00000"]).tolist()[::-1]


def test_class_without_training_samples_counts_as_wrong() -> None:
    vectors, labels, keys = clusters(300, 3)
    rare = int(np.flatnonzero(held_out(keys))[0])
    scores = linear_probe(vectors, [*labels[:rare], "never seen", *labels[rare + 1 :]], keys)
    assert scores["classes"] == 3
    assert scores["auc"] is not None


def test_unsuitable_labels_are_rejected() -> None:
    vectors, _, keys = clusters(50, 2)
    with pytest.raises(UsageError, match="found 50 different labels in 50 rows"):
        linear_probe(vectors, keys, keys)
    with pytest.raises(JobError, match="found 1 classes"):
        linear_probe(vectors, ["one"] * 50, keys)
    fitted = next(key for key in keys if not held_out([key])[0])
    with pytest.raises(JobError, match="0 held-out rows"):
        linear_probe(vectors[:4], ["a", "b"] * 2, [fitted] * 4)
