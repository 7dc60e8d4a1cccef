"""Objects, segments and tags: those of transformers' own post-processing on tiny checkpoints, alone and in batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pycocotools import mask as coco
from test_label_classify import PICTURES, images, labels_of, sample, scores_of
from tiny_labellers import ANIMALS, DETECTORS, SEGMENTERS, TAGGERS, save_grounding_dino, save_owlv2
from transformers.pipelines import pipeline

from mmbeam.decode.masks import decode_mask, encode_mask
from mmbeam.errors import UsageError
from mmbeam.stages.label import label_stage

# pycocotools has not followed NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

WORDS = ["Anna and a dog live far away in Genf", "a cat", "Katzen, Hunde und Vögel.", "x"]


@torch.inference_mode()
def outputs_of(model: Any, processor: Any, picture: Any, **more: Any) -> Any:
    return model(**processor(picture, input_data_format="channels_last", return_tensors="pt"), **more)


def check_objects(records: list[dict[str, Any]], expected: Any, labels: list[str]) -> None:
    order = torch.argsort(-expected["scores"], stable=True)
    assert scores_of(records) == pytest.approx(expected["scores"][order].tolist(), abs=1e-4)
    assert [record["label"] for record in records] == [labels[index] for index in order.tolist()]
    boxes = expected["boxes"][order]
    for record, (left, top, right, bottom) in zip(records, boxes.tolist(), strict=True):
        found = [record["x"], record["y"], record["width"], record["height"]]
        assert found == pytest.approx([left, top, right - left, bottom - top], abs=0.05)


@pytest.mark.parametrize("name", DETECTORS)
def test_objects_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    directory = DETECTORS[name](tmp_path)
    threshold = 0.2
    objects = labels_of(label_stage(str(directory), task="detect", threshold=threshold), images(), "objects")
    model = transformers.AutoModelForObjectDetection.from_pretrained(directory).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    assert any(objects)
    for picture, records in zip(PICTURES, objects, strict=True):
        outputs = outputs_of(model, processor, picture)
        [expected] = processor.post_process_object_detection(outputs, threshold, target_sizes=[picture.shape[:2]])
        check_objects(records, expected, [ANIMALS[label] for label in expected["labels"].tolist()])


@pytest.mark.parametrize("save", [save_owlv2, save_grounding_dino])
def test_objects_of_labels_asked_for(save: Callable[[Path], Path], tmp_path: Path) -> None:
    directory, labels = save(tmp_path), ["a cat", "dog"]
    with pytest.raises(UsageError, match="`task` detect needs `labels`"):
        label_stage(str(directory), task="detect")
    stage = label_stage(str(directory), task="detect", labels=labels, threshold=0.05)
    objects = labels_of(stage, images(), "objects")
    model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(directory).eval()
    processor: Any = transformers.AutoProcessor.from_pretrained(directory, backend="pil")
    texts = processor(text=[labels], return_tensors="pt")
    assert any(objects)
    for picture, records in zip(PICTURES, objects, strict=True):
        outputs = outputs_of(model, processor.image_processor, picture, **texts)
        options: dict[str, Any] = {"threshold": 0.05, "target_sizes": [picture.shape[:2]]}
        if save is save_grounding_dino:
            options |= {"input_ids": texts["input_ids"], "text_threshold": 0.05}
        [expected] = processor.post_process_grounded_object_detection(outputs, text_labels=[labels], **options)
        check_objects(records, expected, expected["text_labels"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("segformer", "semantic"),
        *(("mask2former", kind) for kind in ("semantic", "instance", "panoptic")),
        ("maskformer", "panoptic"),
        *(pytest.param("maskformer", kind, marks=pytest.mark.torture) for kind in ("semantic", "instance")),
    ],
)
def test_segments_are_those_of_transformers(name: str, kind: Any, tmp_path: Path) -> None:
    directory = SEGMENTERS[name](tmp_path)
    threshold = 0.0 if kind == "semantic" else 0.15
    stage = label_stage(str(directory), task="segment", segments=kind, threshold=threshold)
    segments = labels_of(stage, images(), "segments")
    model = getattr(transformers, transformers.AutoConfig.from_pretrained(directory).architectures[0])
    model, processor = (
        model.from_pretrained(directory).eval(),
        transformers.AutoImageProcessor.from_pretrained(directory, backend="pil"),
    )
    assert any(segments)
    for picture, records in zip(PICTURES, segments, strict=True):
        size = picture.shape[:2]
        outputs = outputs_of(model, processor, picture)
        masks: list[tuple[str, float | None, Any]] = []
        if kind == "semantic":
            [map_HW] = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
            masks = [(ANIMALS[label], None, map_HW.numpy() == label) for label in np.unique(map_HW.numpy())]
        elif kind == "instance":
            [result] = processor.post_process_instance_segmentation(
                outputs, threshold=threshold, target_sizes=[size], return_binary_maps=True
            )
            for info, mask in zip(result["segments_info"], result["segmentation"], strict=False):
                masks.append((ANIMALS[info["label_id"]], info["score"], mask.numpy() == 1))
        else:
            [result] = processor.post_process_panoptic_segmentation(
                outputs, threshold=threshold, target_sizes=[size], label_ids_to_fuse=set()
            )
            for info in result["segments_info"]:
                masks.append((ANIMALS[info["label_id"]], info["score"], result["segmentation"].numpy() == info["id"]))
        found: list[tuple[str, bytes, float]] = []
        for record in records:
            rle: Any = {"size": record["size"], "counts": record["rle"]}
            mask = coco.decode(rle).astype(bool)
            assert record["area"] == mask.sum()
            assert 0 <= record["score"] <= 1
            found.append((record["label"], mask.tobytes(), 0.0 if kind == "semantic" else record["score"]))
        expected = [(label, mask.tobytes(), score or 0.0) for label, score, mask in masks]
        for (label, mask, score), (*of_transformers, other) in zip(sorted(found), sorted(expected), strict=True):
            assert [label, mask] == of_transformers
            assert score == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("name", TAGGERS)
def test_tags_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    directory = TAGGERS[name](tmp_path)
    tags = labels_of(label_stage(str(directory), task="tag"), [sample(i, text=t) for i, t in enumerate(WORDS)], "tags")
    reference = pipeline("token-classification", model=str(directory), aggregation_strategy="simple", device="cpu")
    assert any(tags)
    for text, records in zip(WORDS, tags, strict=True):
        expected = reference(text)
        found = [(record["label"], record["start"], record["end"]) for record in records]
        assert found == [(entity["entity_group"], entity["start"], entity["end"]) for entity in expected]
        assert scores_of(records) == pytest.approx([float(entity["score"]) for entity in expected], abs=1e-4)
        assert all(record["text"] == text[record["start"] : record["end"]] for record in records)


def test_masks_are_encoded_as_pycocotools_does() -> None:
    rng = np.random.default_rng(0)
    for shape in [(1, 1), (3, 5), (64, 40), (200, 3)]:
        for density in (0.0, 0.03, 0.5, 1.0):
            mask = rng.random(shape) < density
            counts = encode_mask(mask)
            assert counts == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
            assert (decode_mask(counts, shape) == mask).all()
    for counts, size in [("abc", (3, 3)), ("1", (3, 3)), ("\x01", (1, 1)), ("`", (1, 1))]:
        with pytest.raises(ValueError, match="expected"):
            decode_mask(counts, size)
