"""Segmenters: a class per pixel (SegFormer, BEiT, DPT, ...), or semantic, instance and panoptic segments (Mask2Former,
MaskFormer). Masks have the size of the image as shown.

The masks equal those of transformers' post-processing, which holds a map per class or object at the size of the image;
here a few maps are enlarged at a time. A semantic segment's score is the mean probability of its class over its pixels.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from mmbeam.config import Labelling
from mmbeam.decode.masks import encode_mask
from mmbeam.errors import UsageError
from mmbeam.models.labellers.base import (
    Labeller,
    LabellerSpec,
    Record,
    class_names,
    defaults,
    finite_or_error,
    load_model,
)
from mmbeam.models.labellers.detect import image_size
from mmbeam.models.labellers.processed import Inputs, ProcessedImages
from mmbeam.models.recipes import read_image_processor
from mmbeam.names import Modality
from mmbeam.ops.transfer import to_host
from mmbeam.types import Sample

THRESHOLD = 0.5  # of objects
MASK_THRESHOLD, OVERLAP = 0.5, 0.8  # of transformers' post_process_panoptic_segmentation
MAP_VALUES = 1 << 24  # of the maps that are enlarged at a time: 64 MB
ENLARGED_SIDE = 384  # to which Mask2Former's post-processing enlarges its masks first


class SemanticSegmenter(Labeller):
    """SegFormer and every other class of AutoModelForSemanticSegmentation."""

    outputs: tuple[str, ...] = ("logits",)

    def __init__(self, spec: LabellerSpec, model: Any) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.images = ProcessedImages(Path(spec.directory), model)

    @classmethod
    def describe(cls, directory: Path, config: Any, labelling: Labelling) -> LabellerSpec:
        """Read the configuration and the image processor's file."""
        read_image_processor(directory)
        if labelling.segments not in (None, "semantic"):
            raise UsageError(f"`segments` {labelling.segments}: {directory} has semantic segments only")
        return cls._spec(directory, config, defaults(labelling, segments="semantic"))

    @classmethod
    def _spec(cls, directory: Path, config: Any, labelling: Labelling) -> LabellerSpec:
        return LabellerSpec(
            family=config.model_type,
            directory=str(directory),
            labelling=labelling,
            modalities=("image",),
            classes=class_names(directory, config, labelling),
        )

    @classmethod
    def load(cls, spec: LabellerSpec, device: torch.device, dtype: torch.dtype) -> "SemanticSegmenter":
        """Load the weights and the processor."""
        return cls(spec, load_model(spec, device, dtype))

    def prepare(self, modality: Modality, items: Sequence[Any]) -> list[Inputs]:
        """Return the processor's outputs for images."""
        return self.images.prepare(items, self.pixel_filter)

    @torch.inference_mode()
    def compute(self, modality: Modality, inputs: Any) -> Any:
        """Return the logits of images, at the model's resolution."""
        return [
            (positions, {name: to_host(value.float()) for name, value in outputs.items()})
            for positions, outputs in self.images.compute(inputs, self.outputs)
        ]

    @torch.inference_mode()
    def split(self, modality: Modality, computed: Any, samples: Sequence[Sample]) -> list[Any]:
        """Return the segments of each image."""
        segments: dict[int, Any] = {}
        for positions, outputs in computed:
            for row, position in enumerate(positions):
                of_image = {name: value[row : row + 1] for name, value in outputs.items()}
                numbers = [value.numpy() for value in of_image.values()]
                error = finite_or_error(None, *numbers)
                records = [] if error else self._records(of_image, image_size(samples[position]))
                segments[position] = error or records
        return [segments[position] for position in range(len(samples))]

    def _records(self, outputs: dict[str, torch.Tensor], size: tuple[int, int]) -> list[Record]:
        """Return the segments of an image of `size`, height and width, by falling score."""
        return self._semantic(outputs["logits"][0], size, is_logits=True)

    def _semantic(self, values_CHW: torch.Tensor, size: tuple[int, int], is_logits: bool) -> list[Record]:
        best_HW, label_HW = torch.full(size, -torch.inf), torch.zeros(size, dtype=torch.int32)
        total_HW = torch.full(size, -torch.inf) if is_logits else torch.zeros(size)
        for first, part_KHW in _enlarged(values_CHW, size):
            value_HW, index_HW = part_KHW.max(0)
            is_better = value_HW > best_HW
            best_HW = torch.where(is_better, value_HW, best_HW)
            label_HW = torch.where(is_better, index_HW.int() + first, label_HW)
            more_HW = part_KHW.logsumexp(0) if is_logits else part_KHW.sum(0)
            total_HW = torch.logaddexp(total_HW, more_HW) if is_logits else total_HW + more_HW
        share_HW = ((best_HW - total_HW).exp() if is_logits else best_HW / total_HW).numpy()
        labels = label_HW.numpy()
        return self._chosen(
            (self.spec.classes[label], float(share_HW[labels == label].mean(dtype=np.float64)), labels == label)
            for label in np.unique(labels).tolist()
        )

    def _chosen(self, segments: Iterator[tuple[str, float, Any]]) -> list[Record]:
        records: list[Record] = [
            {
                "label": label,
                "score": score,
                "area": int(mask.sum()),
                "size": list(mask.shape),
                "rle": encode_mask(mask),
            }
            for label, score, mask in segments
            if score >= (self.spec.labelling.threshold or 0.0)
        ]
        return sorted(records, key=lambda record: -record["score"])

    def finish(self, values: Sequence[list[Record]]) -> list[Record]:
        """Return the `top_k` segments, by falling score."""
        [segments] = values
        return segments[: self.spec.labelling.top_k]


class UniversalSegmenter(SemanticSegmenter):
    """Mask2Former and MaskFormer: a class and a mask per query."""

    outputs = ("class_queries_logits", "masks_queries_logits")

    @classmethod
    def describe(cls, directory: Path, config: Any, labelling: Labelling) -> LabellerSpec:
        """Read the configuration and the image processor's file."""
        read_image_processor(directory)
        labelling = defaults(labelling, segments="panoptic")
        return cls._spec(
            directory, config, defaults(labelling, threshold=0.0 if labelling.segments == "semantic" else THRESHOLD)
        )

    def _records(self, outputs: dict[str, torch.Tensor], size: tuple[int, int]) -> list[Record]:
        kind, processor = self.spec.labelling.segments, self.images.processor
        if kind == "semantic":
            [result] = processor.post_process_semantic_segmentation(
                SimpleNamespace(**outputs), return_segmentation_scores=True
            )
            return self._semantic(result.segmentation_scores, size, is_logits=False)
        if kind == "instance":
            [result] = processor.post_process_instance_segmentation(
                SimpleNamespace(**outputs), threshold=self.spec.labelling.threshold, return_binary_maps=True
            )
            return self._chosen(
                (
                    self.spec.classes[info["label_id"]],
                    info["score"],
                    interpolate(mask_HW[None, None], size=size, mode="nearest")[0, 0].numpy() == 1,
                )
                for info, mask_HW in zip(result["segments_info"], result["segmentation"], strict=False)
            )
        return self._chosen(self._panoptic(outputs[self.outputs[0]][0], outputs[self.outputs[1]][0], size))

    def _panoptic(
        self, classes_QC: torch.Tensor, masks_QHW: torch.Tensor, size: tuple[int, int]
    ) -> Iterator[tuple[str, float, Any]]:
        """Yield label, score and mask of each segment; every pixel belongs to one at most."""
        if self.spec.family == "mask2former":
            side = (ENLARGED_SIDE, ENLARGED_SIDE)
            masks_QHW = interpolate(masks_QHW[None], size=side, mode="bilinear", align_corners=False)[0]
        score_Q, label_Q = classes_QC.softmax(-1).max(-1)
        kept_Q = label_Q.ne(classes_QC.shape[-1] - 1) & (score_Q > (self.spec.labelling.threshold or 0.0))
        score_Q, label_Q, masks_QHW = score_Q[kept_Q], label_Q[kept_Q], masks_QHW[kept_Q].sigmoid()
        best_HW, query_HW = torch.full(size, -torch.inf), torch.zeros(size, dtype=torch.int32)
        areas = []
        for first, part_KHW in _enlarged(masks_QHW, size):
            part_KHW = part_KHW * score_Q[first : first + len(part_KHW), None, None]
            areas += (part_KHW >= MASK_THRESHOLD).sum((1, 2)).tolist()
            value_HW, index_HW = part_KHW.max(0)
            is_better = value_HW > best_HW
            best_HW = torch.where(is_better, value_HW, best_HW)
            query_HW = torch.where(is_better, index_HW.int() + first, query_HW)
        queries = query_HW.numpy()
        for query, area in enumerate(areas):
            mask = queries == query
            if area and mask.sum() / area > OVERLAP:
                yield self.spec.classes[int(label_Q[query])], float(score_Q[query]), mask


def _enlarged(maps_KHW: torch.Tensor, size: tuple[int, int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield maps enlarged to `size`, a few at a time, with the index of the first."""
    step = max(1, MAP_VALUES // (size[0] * size[1]))
    for first in range(0, len(maps_KHW), step):
        part_KHW = maps_KHW[first : first + step]
        yield first, interpolate(part_KHW[None], size=size, mode="bilinear", align_corners=False)[0]
