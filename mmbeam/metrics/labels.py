"""Scores of labels, objects and segments against the truth in the metadata or in a column.

A true label is a string or an integer, or a list of them for a multi-label task. True objects are a list of
`{label, x, y, width, height}`, true segments a list of `{label, size, rle}`, as `mmbeam label` writes them.
"""

import contextlib
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmbeam.decode.masks import decode_mask
from mmbeam.errors import UsageError
from mmbeam.metrics.text import library

MULTI_THRESHOLD = 0.5  # a multi-label prediction is every label of at least this score
Records = Sequence[Mapping[str, Any]]  # of one row


def true_labels(value: Any) -> list[str] | None:
    """Return the labels in a string, an integer, or a list of them; None for anything else."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(item, str | int) and not isinstance(item, bool) for item in values):
        return [] if value == [] else None
    return [str(item).strip() for item in values]


def true_records(value: Any, keys: Sequence[str]) -> list[Mapping[str, Any]] | None:
    """Return the records in a list of objects that have all `keys`; None for anything else."""
    is_usable = isinstance(value, list) and all(
        isinstance(item, Mapping) and all(key in item for key in keys) for item in value
    )
    return list(value) if is_usable else None


def classification_scores(
    predicted: Sequence[Records], truths: Sequence[Sequence[str]], is_multi: bool
) -> dict[str, Any]:
    """Return accuracy, precision, recall and F1 (macro and micro), AUC and average precision, as scikit-learn's.

    A single-label prediction is the first record; of a multi-label task, every label of at least 0.5, and accuracy
    counts rows whose set of labels is right. AUC and average precision are means over the classes that some rows have
    and others lack; a label that a row does not list has the score 0. They are None without such a class.
    """
    metrics = library("sklearn.metrics")
    names = {label for labels in truths for label in labels}
    classes = sorted(names | {record["label"] for records in predicted for record in records})
    index = {label: number for number, label in enumerate(classes)}
    true = np.zeros((len(truths), len(classes)), bool)
    scores = np.zeros((len(truths), len(classes)), np.float32)
    chosen = np.zeros((len(truths), len(classes)), bool)
    for row, (records, labels) in enumerate(zip(predicted, truths, strict=True)):
        true[row, [index[label] for label in labels]] = True
        for place, record in enumerate(records):
            column = index[record["label"]]
            scores[row, column] = record["score"]
            chosen[row, column] = record["score"] >= MULTI_THRESHOLD if is_multi else place == 0
    used = true.any(0) | chosen.any(0)
    result: dict[str, Any] = {"classes": int(used.sum()), "accuracy": float((true == chosen).all(1).mean())}
    for average in ("macro", "micro"):
        values = metrics.precision_recall_fscore_support(
            true[:, used], chosen[:, used], average=average, zero_division=0
        )
        result |= {
            f"{name}_{average}": float(value)
            for name, value in zip(("precision", "recall", "f1"), values[:3], strict=True)
        }
    mixed = [number for number in range(len(classes)) if 0 < true[:, number].sum() < len(truths)]
    for name, score in (("auc", metrics.roc_auc_score), ("average_precision", metrics.average_precision_score)):
        values = [score(true[:, number], scores[:, number]) for number in mixed]
        result[name] = float(np.mean(values)) if values else None
    return result


def detection_scores(predicted: Sequence[Records], truths: Sequence[Records]) -> dict[str, Any]:
    """Return COCO's average precision and recall by pycocotools: mean over IoU 0.50 to 0.95, at 0.50 and at 0.75."""
    coco_module, eval_module = (
        library("pycocotools.coco"),
        library("pycocotools.cocoeval"),
    )
    classes = sorted({record["label"] for rows in (predicted, truths) for records in rows for record in records})
    index = {label: number for number, label in enumerate(classes, 1)}

    def annotations(rows: Sequence[Records], **more: Any) -> list[dict[str, Any]]:
        return [
            {
                "image_id": row,
                "category_id": index[record["label"]],
                "bbox": [record[name] for name in ("x", "y", "width", "height")],
                "area": record["width"] * record["height"],
                **more,
                **({"score": record["score"]} if "score" in record else {}),
            }
            for row, records in enumerate(rows, 1)
            for record in records
        ]

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = coco_module.COCO()
        truth.dataset = {
            "images": [{"id": row} for row in range(1, len(truths) + 1)],
            "categories": [{"id": number, "name": label} for label, number in index.items()],
            "annotations": [
                {**annotation, "id": number} for number, annotation in enumerate(annotations(truths, iscrowd=0), 1)
            ],
        }
        truth.createIndex()
        found = coco_module.COCO()
        found.dataset = {
            **truth.dataset,
            "annotations": [
                {**annotation, "id": number} for number, annotation in enumerate(annotations(predicted, iscrowd=0), 1)
            ],
        }
        found.createIndex()
        evaluation = eval_module.COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = [float(value) for value in evaluation.stats]
    return {
        "classes": len(classes),
        "objects": sum(map(len, truths)),
        "average_precision": stats[0],
        "average_precision_50": stats[1],
        "average_precision_75": stats[2],
        "average_recall": stats[8],
    }


def segmentation_scores(predicted: Sequence[Records], truths: Sequence[Records]) -> dict[str, Any]:
    """Return the mean over the true classes of intersection by union, over the pixels of all rows (mIoU).

    Raises UsageError for a true segment of another size than the image.
    """
    common, union, true_classes = Counter[str](), Counter[str](), set[str]()
    for records, of_truth in zip(predicted, truths, strict=True):
        maps = [_masks_by_label(rows) for rows in (records, of_truth)]
        true_classes |= set(maps[1])
        for label in set(maps[0]) | set(maps[1]):
            found, true = (masks.get(label) for masks in maps)
            if found is not None and true is not None and found.shape != true.shape:
                raise UsageError(
                    f"`label`: expected true segments of {found.shape[0]} x {found.shape[1]} pixels, as the image, "
                    f"found {true.shape[0]} x {true.shape[1]}"
                )
            common[label] += 0 if found is None or true is None else int((found & true).sum())
            both = found if true is None else true if found is None else found | true
            union[label] += 0 if both is None else int(both.sum())
    ious = {label: common[label] / union[label] for label in sorted(true_classes) if union[label]}
    return {"classes": len(ious), "miou": math.fsum(ious.values()) / len(ious) if ious else None, "iou": ious}


def _masks_by_label(records: Records) -> dict[str, Any]:
    masks: dict[str, Any] = {}
    for record in records:
        height, width = record["size"]
        try:
            mask = decode_mask(record["rle"], (int(height), int(width)))
        except ValueError as error:
            raise UsageError(f"`label`: a segment of {record['label']}: {error}") from error
        masks[record["label"]] = mask | masks.get(record["label"], False)
    return masks
