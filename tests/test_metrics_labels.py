"""Scores of labels, objects and segments against scikit-learn, pycocotools and pixels, and the command."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sklearn.metrics
from test_evaluate import write_run
from tiny_labellers import ANIMALS

from mmbeam.cli import main
from mmbeam.decode.masks import encode_mask
from mmbeam.errors import UsageError
from mmbeam.metrics.labels import classification_scores, detection_scores, segmentation_scores
from mmbeam.models.labellers.base import RECORDS
from mmbeam.types import Output

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
CLASSES = ANIMALS[:4]


def random_scores(rows: int) -> Any:
    return np.random.default_rng(0).dirichlet(np.ones(len(CLASSES)), rows)


def records_of(scores: Any) -> list[dict[str, Any]]:
    return [{"label": CLASSES[index], "score": float(scores[index])} for index in np.argsort(-scores)]


def test_single_labels_have_the_scores_of_sklearn() -> None:
    scores = random_scores(60)
    truths = [CLASSES[(row * 7) % 3 if row % 2 else int(scores[row].argmax())] for row in range(60)]
    found = classification_scores([records_of(row) for row in scores], [[truth] for truth in truths], is_multi=False)
    best = [CLASSES[index] for index in scores.argmax(1)]
    assert found["accuracy"] == sklearn.metrics.accuracy_score(truths, best)
    for average in ("macro", "micro"):
        expected = sklearn.metrics.precision_recall_fscore_support(truths, best, average=average, zero_division=0)
        assert [found[f"{name}_{average}"] for name in ("precision", "recall", "f1")] == pytest.approx(expected[:3])
    aucs = [sklearn.metrics.roc_auc_score(np.array(truths) == name, scores[:, i]) for i, name in enumerate(CLASSES)]
    assert found["auc"] == pytest.approx(np.mean(aucs))


def test_multiple_labels_are_those_of_at_least_a_half() -> None:
    predicted = [
        [{"label": "cat", "score": 0.9}, {"label": "dog", "score": 0.6}],
        [{"label": "cat", "score": 0.4}, {"label": "dog", "score": 0.2}],
    ]
    found = classification_scores(predicted, [["cat", "dog"], ["cat"]], is_multi=True)
    assert (found["accuracy"], found["precision_micro"], found["recall_micro"]) == (0.5, 1.0, pytest.approx(2 / 3))
    assert (found["auc"], found["average_precision"]) == (1.0, 1.0)  # of dog alone: every row has cat


def box(label: str, x: float, score: float | None = None) -> dict[str, Any]:
    record = {"label": label, "x": x, "y": 10.0, "width": 20.0, "height": 20.0}
    return record if score is None else {**record, "score": score}


def test_objects_have_the_average_precision_of_coco() -> None:
    truths = [[box("cat", 10), box("dog", 60)], [box("cat", 30)], []]
    exact = [[{**record, "score": 0.9} for record in records] for records in truths]
    assert detection_scores(exact, truths)["average_precision"] == pytest.approx(1)
    shifted = [[box("cat", 14, 0.9), box("dog", 60, 0.8)], [box("cat", 30, 0.7)], [box("cat", 5, 0.3)]]
    found = detection_scores(shifted, truths)
    # IoU of the shifted box is 2/3: right at the thresholds 0.50 to 0.65, and its higher score precedes the right one.
    of_cat = np.mean([1.0] * 4 + [0.5 * 51 / 101] * 6)
    assert found["average_precision"] == pytest.approx((of_cat + 1) / 2, abs=1e-6)
    assert found["average_precision_50"] == pytest.approx(1)


def segment(label: str, mask: Any) -> dict[str, Any]:
    return {"label": label, "size": list(mask.shape), "rle": encode_mask(mask), "score": 1.0, "area": int(mask.sum())}


def test_segments_have_the_mean_intersection_by_union() -> None:
    left, right = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    left[:, :3], right[:, 3:] = True, True
    wide = left | (np.arange(6) == 3)
    found = segmentation_scores([[segment("cat", wide)]], [[segment("cat", left), segment("dog", right)]])
    assert found["iou"] == {"cat": 12 / 16, "dog": 0.0}
    assert found["miou"] == 0.375
    with pytest.raises(UsageError, match="expected true segments of 4 x 6 pixels"):
        segmentation_scores([[segment("cat", left)]], [[segment("cat", left[:2])]])


def test_the_command_measures_labels_against_the_metadata(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = pa.list_(pa.field("element", RECORDS["labels"], nullable=False))
    output = Output(modalities=frozenset({"image"}), columns=(pa.field("labels", kind),))
    pairs = [("cat", "cat"), ("dog", "dog"), ("cat", "dog")]  # true, predicted
    rows = [{"metadata": {"labels": true}, "labels": [{"label": found, "score": 0.9}]} for true, found in pairs]
    write_run(tmp_path / "out", [rows], output)
    assert main(["evaluate", str(tmp_path / "out"), "--label", "labels"]) == 0
    out = capsys.readouterr().out
    assert "labels against labels: 3 rows, 2 classes" in out
    assert "accuracy               0.6667" in out
