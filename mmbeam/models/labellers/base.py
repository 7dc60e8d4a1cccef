"""The labeller interface, for the label stage that runs labellers and for new families of labellers.

A family is a subclass of Labeller. `describe` reads configuration files only, where the job is launched. `load` reads
the weights, once per process and device. A batch passes through three methods: `prepare` (the unit's thread: the
checkpoint's own processor, copies to the device), `compute` (the device's thread: kernels only) and `split` (the unit's
thread: post-processing on the host). Order, windows, failures and memory belong to the label stage.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
import transformers

from mmbeam.config import Labelling
from mmbeam.errors import ModelError
from mmbeam.models.loading import load_pretrained, read_json
from mmbeam.names import Modality
from mmbeam.ops.image import PixelFilter
from mmbeam.types import FeatureColumn, Sample

Scores = np.ndarray[Any, np.dtype[np.float32]]  # [classes] of one sample
Record = dict[str, Any]  # one element of the column
ValueT = TypeVar("ValueT")

_UNNAMED = re.compile(r"LABEL_\d+")  # what transformers calls the classes of a checkpoint that does not name them
_UNUSED = (r"(^|\.)mask_token$", r"(^|\.)masked_spec_embed$")  # weights that are used in pre-training only


def _record(**fields: pa.DataType) -> pa.DataType:
    return pa.struct([pa.field(name, kind, nullable=False) for name, kind in fields.items()])


RECORDS: Mapping[str, pa.DataType] = {  # by column, what an element of its lists is
    "labels": _record(label=pa.string(), score=pa.float32()),
    "objects": _record(
        label=pa.string(),
        score=pa.float32(),
        x=pa.float32(),  # of the upper left corner, in pixels of the image as shown
        y=pa.float32(),
        width=pa.float32(),
        height=pa.float32(),
    ),
    "segments": _record(
        label=pa.string(),
        score=pa.float32(),
        area=pa.int64(),  # pixels
        size=pa.list_(pa.field("element", pa.int32(), nullable=False)),  # height, width of the image as shown
        rle=pa.string(),  # the compressed counts of COCO's run-length encoding
    ),
    "tags": _record(label=pa.string(), score=pa.float32(), start=pa.int32(), end=pa.int32(), text=pa.string()),
}


@dataclass(frozen=True, kw_only=True)
class LabellerSpec:
    """A labeller as its configuration files describe it, and what it is asked for."""

    family: str  # config.model_type: "vit", "detr", ...
    directory: str  # local directory of configuration, weights and processor files
    labelling: Labelling  # with the defaults of the model
    modalities: tuple[Modality, ...]  # the labels are of all that a sample has
    classes: tuple[str, ...]  # in the order of the model's scores; of a zero-shot model, the labels asked for
    sampling_rate: int | None = None  # Hz, for audio
    image_side: int | None = None  # pixels: the shorter side that its preprocessing resizes to
    max_text_tokens: int | None = None  # special tokens included
    notes: tuple[str, ...] = ()  # what the summary says of the model
    columns: tuple[FeatureColumn, ...] = ()  # features that it takes in place of raw media
    encoder: Any = None  # the EncoderSpec of a head that makes its own features


class Labeller:
    """A loaded model on one device."""

    def __init__(self, spec: LabellerSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        self.device = device
        self.dtype = dtype
        self.pixel_filter: PixelFilter | None = None  # applied to images at their own resolution, before resizing

    @classmethod
    def describe(cls, directory: Path, config: Any, labelling: Labelling) -> LabellerSpec:
        """Read configuration and processor files; raise ModelError naming what is missing or unsupported."""
        raise NotImplementedError

    @classmethod
    def load(cls, spec: LabellerSpec, device: torch.device, dtype: torch.dtype) -> "Labeller":
        """Load the weights (safetensors only) onto `device`, in eval mode."""
        raise NotImplementedError

    def items(self, modality: Modality, samples: Sequence[Sample]) -> list[Any]:
        """Return what `prepare` takes of each sample: an image, a clip and its rate, or a text's tokens."""
        if modality == "image":
            return [sample.image for sample in samples]
        return [sample.audio.at(self.spec.sampling_rate) for sample in samples if sample.audio is not None]

    def weight(self, modality: Modality, item: Any) -> int:
        """Return the size of an item, by which a window is ordered: pixels, frames or tokens."""
        if modality == "image":
            return int(item.shape[0] * item.shape[1])
        return len(item[0]) if modality == "audio" else len(item)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, not truncated, without special tokens."""
        raise NotImplementedError

    def prepare(self, modality: Modality, items: Sequence[Any]) -> Any:
        """Return the inputs of `compute`, copied to the device without waiting for it."""
        raise NotImplementedError

    def compute(self, modality: Modality, inputs: Any) -> Any:
        """Return what `split` takes, on its way to the host. Runs kernels only."""
        raise NotImplementedError

    def split(self, modality: Modality, computed: Any, samples: Sequence[Sample]) -> list[Any]:
        """Return for each sample of a batch what `finish` takes, or a FloatingPointError if it is not finite."""
        raise NotImplementedError

    def finish(self, values: Sequence[Any]) -> list[Record]:
        """Return the column's value of a sample, from the results of each modality that it has."""
        raise NotImplementedError


class ScoreLabeller(Labeller):
    """A labeller whose result is a score per class. The scores of several modalities are averaged."""

    def split(self, modality: Modality, computed: torch.Tensor, samples: Sequence[Sample]) -> list[Any]:
        """Return the scores of each sample."""
        return [finite_or_error(scores, scores) for scores in computed.numpy()]

    def finish(self, values: Sequence[Scores]) -> list[Record]:
        """Return the `top_k` classes of at least `threshold`, by falling score; equal scores in the model's order."""
        labelling = self.spec.labelling
        scores = np.mean(values, axis=0)
        order = np.argsort(-scores, kind="stable")[: labelling.top_k]
        return [
            {"label": self.spec.classes[index], "score": float(scores[index])}
            for index in order.tolist()
            if labelling.threshold is None or scores[index] >= labelling.threshold
        ]


def class_names(directory: Path, config: Any, labelling: Labelling) -> tuple[str, ...]:
    """Return the names of the classes: those that `labels` gives, else `id2label` of config.json. Raises ModelError."""
    names = [str(config.id2label.get(index, f"LABEL_{index}")) for index in range(config.num_labels)]
    if labelling.labels is not None:
        if len(labelling.labels) != len(names):
            raise ModelError(
                f"{directory}: expected one name of `labels` for each of the {len(names)} classes, found "
                f"{len(labelling.labels)}"
            )
        return labelling.labels
    if all(map(_UNNAMED.fullmatch, names)):
        raise ModelError(
            f"{directory}/config.json: expected id2label, the names of the {len(names)} classes, found none; pass "
            "their names in order as `labels`, or add id2label to config.json"
        )
    return tuple(names)


def architecture_of(directory: Path) -> str:
    """Return the name of the class of transformers whose weights the checkpoint holds; "" if config.json names none."""
    names = read_json(directory, "config.json", required=False).get("architectures") or [""]
    return str(names[0])


def load_model(spec: LabellerSpec, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the class of transformers that config.json's `architectures` names, with its weights."""
    directory = Path(spec.directory)
    return load_pretrained(getattr(transformers, architecture_of(directory)), directory, device, dtype, _UNUSED)


def finite_or_error(value: ValueT, *numbers: np.ndarray[Any, Any]) -> ValueT | FloatingPointError:
    """Return `value` if all its `numbers` are finite."""
    if all(np.isfinite(array).all() for array in numbers):
        return value
    return FloatingPointError("the model's scores are not finite; a wider `dtype` may help")


def defaults(labelling: Labelling, **values: Any) -> Labelling:
    """Return the labelling with `values` where it has None."""
    return replace(labelling, **{name: value for name, value in values.items() if getattr(labelling, name) is None})
