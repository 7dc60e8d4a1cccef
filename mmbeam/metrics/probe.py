"""A linear probe: how well a linear classifier predicts a label from a vector, on held-out samples.

Multinomial logistic regression on standardised features, by scikit-learn. Its hyperparameters are fixed, so that
embeddings can be compared (Alain and Bengio, "Understanding intermediate layers using linear classifier probes", 2016).
"""

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmbeam.errors import JobError, UsageError
from mmbeam.metrics.retrieval import Vectors
from mmbeam.metrics.text import library

HELD_OUT = 0.2  # fraction of the samples in the test split
MAX_ITERATIONS = 1000


def held_out(keys: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return whether each sample is in the test split, by a hash of its key: the same for every run and model."""
    digests = [hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys]
    return np.array([int.from_bytes(digest, "big") / 2**64 < HELD_OUT for digest in digests], dtype=np.bool_)


def linear_probe(vectors: Vectors, labels: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """Fit a classifier on the training split of vectors [rows, width], and return its scores on the held-out samples.

    Precision, recall and F1 are macro-averages over the classes of the held-out labels and predictions. The AUC is
    one-vs-rest, averaged over the classes that are in both splits. `majority` is the accuracy of always predicting the
    most frequent class. A sample of a class that is not in the training split counts as wrong.

    Raises UsageError if more than half of the labels are distinct, JobError if the test split is empty or the training
    split has fewer than two classes.
    """
    target, test = np.asarray(labels), held_out(keys)
    distinct, fitted = len(np.unique(target)), len(np.unique(target[~test]))
    if distinct > 2 and distinct * 2 > len(target):
        raise UsageError(f"expected labels that repeat, found {distinct:,} different labels in {len(target):,} rows")
    if fitted < 2 or not test.any():
        raise JobError(
            f"a probe needs two classes to fit and a sample to test; found {fitted} classes in "
            f"{(~test).sum():,} rows, and {test.sum():,} held-out rows"
        )
    model = _fit(vectors[~test], target[~test])
    truth, probabilities = target[test], model.predict_proba(vectors[test])
    names = model[-1].classes_
    classes, counts = np.unique(target[~test], return_counts=True)
    predicted = names[probabilities.argmax(axis=1)]
    metrics = library("sklearn.metrics")
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        truth, predicted, average="macro", zero_division=0.0
    )
    tested = [(column, truth == name) for column, name in enumerate(names) if (truth == name).any()]
    areas = [metrics.roc_auc_score(is_class, probabilities[:, i]) for i, is_class in tested if not is_class.all()]
    return {
        "train_rows": int((~test).sum()),
        "test_rows": int(test.sum()),
        "classes": len(names),
        "converged": bool(model[-1].n_iter_.max() < MAX_ITERATIONS),
        "majority": float((truth == classes[counts.argmax()]).mean()),
        "accuracy": float(metrics.accuracy_score(truth, predicted)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "auc": float(np.mean(areas)) if areas else None,  # None if the test split has a single class
    }


def _fit(vectors: Vectors, target: npt.NDArray[Any]) -> Any:
    linear, preprocessing = library("sklearn.linear_model"), library("sklearn.preprocessing")
    model = library("sklearn.pipeline").make_pipeline(
        preprocessing.StandardScaler(), linear.LogisticRegression(max_iter=MAX_ITERATIONS)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", library("sklearn.exceptions").ConvergenceWarning)  # reported as `converged`
        return model.fit(vectors, target)
