"""The registry of labellers, by the class of transformers that a checkpoint's config.json names in `architectures`.

To add a family: write a subclass of base.Labeller, in a module of this package, and add its classes to HEADS.
"""

import importlib
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.models.auto import modeling_auto as auto

from mmbeam.config import Labelling
from mmbeam.errors import UsageError
from mmbeam.models.labellers.base import Labeller, LabellerSpec, architecture_of
from mmbeam.models.loading import check_weights, quiet_transformers, read_config
from mmbeam.names import LABEL_TASKS, LabelTask
from mmbeam.ops.image import apply_filter


class Head(NamedTuple):
    """What classes of transformers can do, and which labeller runs them."""

    classes: Collection[Any]  # names, or tuples of names
    tasks: Sequence[LabelTask]
    labeller: str  # module.class, imported on first use


TRAINED = "MmbeamHead"  # a head of the user's own, by `mmbeam train --task classify`
HEADS: Sequence[Head] = (
    Head(auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values(), ("classify",), "classify.ImageClassifier"),
    Head(auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES.values(), ("classify",), "classify.AudioClassifier"),
    Head(
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
        ("classify", "sentiment"),
        "classify.TextClassifier",
    ),
    Head(auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.values(), ("detect",), "detect.Detector"),
    Head(
        tuple(f"{name}ForObjectDetection" for name in ("OwlViT", "Owlv2", "GroundingDino", "MMGroundingDino")),
        ("detect",),
        "detect.OpenDetector",
    ),
    Head(auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.values(), ("segment",), "segment.SemanticSegmenter"),
    Head(
        ("Mask2FormerForUniversalSegmentation", "MaskFormerForInstanceSegmentation"),
        ("segment",),
        "segment.UniversalSegmenter",
    ),
    Head(auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(), ("tag",), "tag.Tagger"),
    Head((TRAINED,), ("classify", "sentiment"), "head.Head"),
)
ZERO_SHOT = "zero_shot.ZeroShotClassifier"  # runs any encoder that embeds texts and another modality in one space


def head_of(directory: Path) -> Head | None:
    """Return the head of a checkpoint; None if it has none for labels."""
    name = architecture_of(directory)
    for head in HEADS:
        if any(name in (names if isinstance(names, tuple) else (names,)) for names in head.classes):
            return head
    return None


def tasks_of(directory: Path) -> tuple[LabelTask, ...]:
    """Return the tasks that a checkpoint can do."""
    head = head_of(directory)
    tasks = () if head is None else head.tasks
    is_joint = _import(ZERO_SHOT).is_joint(directory)
    return tuple(task for task in LABEL_TASKS if task in tasks or (task == "zero-shot" and is_joint))


def describe(directory: Path, labelling: Labelling, features: bool = False) -> LabellerSpec:
    """Return the spec of a model from the configuration files in `directory`, without loading weights.

    With `features`, the input is precomputed features. Raises UsageError for a task that the model cannot do or an
    input that it does not take, ModelError if files are missing or unusable.
    """
    quiet_transformers()
    head = head_of(directory)
    is_able = labelling.task == "zero-shot" or (head is not None and labelling.task in head.tasks)
    if not is_able or (labelling.task == "zero-shot" and "zero-shot" not in tasks_of(directory)):
        tasks = ", ".join(tasks_of(directory))
        raise UsageError(
            f"`task` {labelling.task}: {directory} is a {architecture_of(directory) or 'model of an unnamed class'}, "
            + (f"which can do {tasks}" if tasks else "which can do none of " + ", ".join(LABEL_TASKS))
        )
    is_trained = architecture_of(directory) == TRAINED
    config = None if is_trained else read_config(directory)
    check_weights(directory)
    spec = _labeller(directory, labelling.task).describe(directory, config, labelling)
    if not features and is_trained:
        on_shards: LabellerSpec = _import("head.Head").on_shards(spec)
        return on_shards
    if features and not spec.columns:
        raise UsageError(f"`input`: {directory} takes raw {' and '.join(spec.modalities)}, not features; use shards")
    return spec


def load(
    spec: LabellerSpec, device: torch.device, dtype: torch.dtype, image_filter: tuple[str, float] | None = None
) -> Labeller:
    """Return the labeller with its weights on `device`.

    `image_filter`, ("median", size) or ("gaussian", sigma), is applied to images before their preprocessing.
    """
    labeller = _labeller(Path(spec.directory), spec.labelling.task).load(spec, device, dtype)
    if image_filter is not None:
        name, value = image_filter
        labeller.pixel_filter = partial(apply_filter, name=name, value=value)
    return labeller


def _labeller(directory: Path, task: LabelTask) -> type[Labeller]:
    head = head_of(directory)
    labeller: type[Labeller] = _import(ZERO_SHOT if task == "zero-shot" or head is None else head.labeller)
    return labeller


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
