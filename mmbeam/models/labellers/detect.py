"""Detectors: the boxes of a fixed set of classes (DETR, RT-DETR, YOLOS), or of labels of the user's own (OWLv2,
Grounding DINO). Boxes are in pixels of the image as shown, by the post-processing of the checkpoint's processor."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoProcessor

from mmbeam.config import Labelling
from mmbeam.errors import ModelError, UsageError
from mmbeam.models.labellers.base import (
    Labeller,
    LabellerSpec,
    Record,
    class_names,
    defaults,
    finite_or_error,
    load_model,
)
from mmbeam.models.labellers.processed import Inputs, ProcessedImages
from mmbeam.models.recipes import read_image_processor
from mmbeam.names import Modality
from mmbeam.ops.transfer import to_device, to_host
from mmbeam.types import Sample

THRESHOLD = 0.5
OPEN_THRESHOLDS = {"owlvit": 0.1, "owlv2": 0.1}  # by model type; of Grounding DINO:
GROUNDED_THRESHOLD = 0.25
OUTPUTS = ("logits", "pred_boxes")


class Detector(Labeller):
    """DETR, RT-DETR, YOLOS and every other class of AutoModelForObjectDetection."""

    def __init__(self, spec: LabellerSpec, model: Any) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.model = model
        self.images = ProcessedImages(Path(spec.directory), model)

    @classmethod
    def describe(cls, directory: Path, config: Any, labelling: Labelling) -> LabellerSpec:
        """Read the configuration and the image processor's file."""
        processor = read_image_processor(directory)
        if not hasattr(processor, "post_process_object_detection"):
            raise ModelError(f"{directory}: its image processor, {type(processor).__name__}, returns no boxes")
        return LabellerSpec(
            family=config.model_type,
            directory=str(directory),
            labelling=defaults(labelling, threshold=THRESHOLD),
            modalities=("image",),
            classes=class_names(directory, config, labelling),
        )

    @classmethod
    def load(cls, spec: LabellerSpec, device: torch.device, dtype: torch.dtype) -> "Detector":
        """Load the weights and the processor."""
        return cls(spec, load_model(spec, device, dtype))

    def prepare(self, modality: Modality, items: Sequence[Any]) -> list[Inputs]:
        """Return the processor's outputs for images."""
        return self.images.prepare(items, self.pixel_filter)

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return the model's further inputs, which are the same for every image."""
        return {}

    @torch.inference_mode()
    def compute(self, modality: Modality, inputs: Any) -> Any:
        """Return the logits and the relative boxes of images."""
        return [
            (positions, {name: to_host(value.float()) for name, value in outputs.items()})
            for positions, outputs in self.images.compute(inputs, OUTPUTS, **self.inputs())
        ]

    def split(self, modality: Modality, computed: Any, samples: Sequence[Sample]) -> list[Any]:
        """Return the objects of each image."""
        objects: dict[int, Any] = {}
        for positions, outputs in computed:
            sizes = [image_size(samples[position]) for position in positions]
            results = self.post_process(SimpleNamespace(**outputs), sizes)
            for row, (position, result) in enumerate(zip(positions, results, strict=True)):
                numbers = [outputs[name][row].numpy() for name in OUTPUTS]
                # The logits of tokens that a label does not have are -inf.
                numbers[0] = numbers[0][numbers[0] != -float("inf")]
                objects[position] = finite_or_error(_records(result), *numbers)
        return [objects[position] for position in range(len(samples))]

    def post_process(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """Return for each image its `scores`, `boxes` (left, top, right, bottom) and `text_labels`."""
        results: list[dict[str, Any]] = self.images.processor.post_process_object_detection(
            outputs, threshold=self.spec.labelling.threshold, target_sizes=list(sizes)
        )
        for result in results:
            result["text_labels"] = [self.spec.classes[label] for label in result["labels"].tolist()]
        return results

    def finish(self, values: Sequence[list[Record]]) -> list[Record]:
        """Return the `top_k` objects, by falling score."""
        [objects] = values
        return objects[: self.spec.labelling.top_k]


class OpenDetector(Detector):
    """OWL-ViT, OWLv2 and Grounding DINO: objects of the labels asked for.

    Grounding DINO answers with the words of the labels that it finds in the image.
    """

    def __init__(self, spec: LabellerSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.processor = _read_processor(Path(spec.directory))
        tokens = self.processor(text=[list(spec.classes)], return_tensors="pt")
        self.texts = {
            name: to_device(value, self.device) for name, value in tokens.items() if isinstance(value, torch.Tensor)
        }
        self.input_ids = tokens["input_ids"]  # on the host

    @classmethod
    def describe(cls, directory: Path, config: Any, labelling: Labelling) -> LabellerSpec:
        """Read the configuration and the processor's files."""
        if not labelling.labels:
            raise UsageError(f"`task` detect needs `labels` to look for: {directory} detects what it is asked for")
        _read_processor(directory)
        threshold = OPEN_THRESHOLDS.get(config.model_type, GROUNDED_THRESHOLD)
        return LabellerSpec(
            family=config.model_type,
            directory=str(directory),
            labelling=defaults(labelling, threshold=threshold),
            modalities=("image",),
            classes=labelling.labels,
        )

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return the tokens of the labels."""
        return self.texts

    def post_process(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """Return for each image its `scores`, `boxes` (left, top, right, bottom) and `text_labels`."""
        threshold = self.spec.labelling.threshold
        if self.spec.family in OPEN_THRESHOLDS:
            results: list[dict[str, Any]] = self.processor.post_process_grounded_object_detection(
                outputs,
                threshold=threshold,
                target_sizes=list(sizes),
                text_labels=[list(self.spec.classes)] * len(sizes),
            )
            return results
        results = self.processor.post_process_grounded_object_detection(
            outputs,
            input_ids=self.input_ids.repeat(len(sizes), 1),
            threshold=threshold,
            text_threshold=threshold,
            target_sizes=list(sizes),
        )
        return results


def _read_processor(directory: Path) -> Any:
    auto: Any = AutoProcessor  # untyped
    try:
        return auto.from_pretrained(directory, backend="pil", local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many types
        raise ModelError(f"{directory}: its processor cannot be read: {type(error).__name__}: {error}") from error


def image_size(sample: Sample) -> tuple[int, int]:
    """Return height and width of an image as shown; the decoded one may be smaller (--draft)."""
    if sample.image_size is not None:
        width, height = sample.image_size
        return height, width
    assert sample.image is not None
    return sample.image.shape[0], sample.image.shape[1]


def _records(result: Any) -> list[Record]:
    boxes, scores = result["boxes"].tolist(), result["scores"].tolist()
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return [
        {
            "label": str(result["text_labels"][index]),
            "score": scores[index],
            "x": boxes[index][0],
            "y": boxes[index][1],
            "width": boxes[index][2] - boxes[index][0],
            "height": boxes[index][3] - boxes[index][1],
        }
        for index in order
    ]
