"""A linear probe: how well a label can be read off a vector by a linear classifier, on samples held out.

Multinomial logistic regression on standardised features, by scikit-learn; not a tuned classifier, but the
same one for every embedding, so that embeddings can be compared (Alain and Bengio, "Understanding
intermediate layers using linear classifier probes", 2016).
"""

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmbeam.errors import JobError, UsageError
from mmbeam.metrics.text import library

HELD_OUT = 0.2  # share of the samples that is tested on
MAX_ITERATIONS = 1000

Vectors = npt.NDArray[np.floating[Any]]  # [rows, width]


def held_out(keys: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Whether a sample is tested on: by a hash of its key, so that it is so in every run and for every model."""
    return np.array([_fraction(key) < HELD_OUT for key in keys], dtype=np.bool_)


def _fraction(key: str) -> float:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def linear_probe(vectors: Vectors, labels: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """Scores on the samples held out, of a classifier that was fitted to the others.

    Precision, recall and F1 are means over the classes that were tested or predicted; the AUC is that of each
    class against the rest, the mean over the classes that were fitted and tested. `majority` is the accuracy
    of always saying the commonest class. A class that was not fitted counts as wrong.

    Raises UsageError if the labels are nearly all different, JobError if a side of the split has no sample or
    fewer than two classes were fitted.
    """
    target, test = np.asarray(labels), held_out(keys)
    _check(target, test)
    model = _fit(vectors[~test], target[~test])
    truth, probabilities = target[test], model.predict_proba(vectors[test])
    names = model[-1].classes_
    classes, counts = np.unique(target[~test], return_counts=True)
    return {
        "train_rows": int((~test).sum()),
        "test_rows": int(test.sum()),
        "classes": len(names),
        "converged": bool(model[-1].n_iter_.max() < MAX_ITERATIONS),
        "majority": float((truth == classes[counts.argmax()]).mean()),
        **_scores(truth, names[probabilities.argmax(axis=1)]),
        "auc": _auc(truth, probabilities, names),
    }


def _check(target: npt.NDArray[Any], test: npt.NDArray[np.bool_]) -> None:
    classes = len(np.unique(target))
    if classes > 2 and classes * 2 > len(target):
        raise UsageError(f"expected labels that come again, found {classes:,} different ones in {len(target):,} rows")
    fitted = len(np.unique(target[~test]))
    if fitted < 2 or not test.any():
        raise JobError(
            f"a probe needs two classes to fit and a sample to test; found {fitted} classes in "
            f"{(~test).sum():,} rows, and {test.sum():,} rows held out"
        )


def _fit(vectors: Vectors, target: npt.NDArray[Any]) -> Any:
    linear, preprocessing = library("sklearn.linear_model"), library("sklearn.preprocessing")
    model = library("sklearn.pipeline").make_pipeline(
        preprocessing.StandardScaler(), linear.LogisticRegression(max_iter=MAX_ITERATIONS)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", library("sklearn.exceptions").ConvergenceWarning)  # said by `converged`
        return model.fit(vectors, target)


def _scores(truth: npt.NDArray[Any], predicted: npt.NDArray[Any]) -> dict[str, float]:
    metrics = library("sklearn.metrics")
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        truth, predicted, average="macro", zero_division=0.0
    )
    accuracy = metrics.accuracy_score(truth, predicted)
    return {"accuracy": float(accuracy), "precision": float(precision), "recall": float(recall), "f1": float(f1)}


def _auc(truth: npt.NDArray[Any], probabilities: npt.NDArray[Any], names: Sequence[str]) -> float | None:
    """None if no class tells samples apart: there is one class in the test."""
    score = library("sklearn.metrics").roc_auc_score
    present = [(column, truth == name) for column, name in enumerate(names) if (truth == name).any()]
    areas = [score(of_class, probabilities[:, column]) for column, of_class in present if not of_class.all()]
    return float(np.mean(areas)) if areas else None
