"""A classification head of the user's own (training/head.py), on features, or on shards together with its encoder.

Each column of vectors adds its part to the logits, so that a sample is labelled by whichever modalities it has.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mmbeam.config import Labelling
from mmbeam.errors import ModelError, UsageError
from mmbeam.models import encoders
from mmbeam.models.encoders.base import Encoder
from mmbeam.models.labellers.base import LabellerSpec, Record, ScoreLabeller, class_names, defaults
from mmbeam.models.labellers.zero_shot import upload
from mmbeam.models.loading import digest, read_json, resolve
from mmbeam.names import MODALITIES, Modality
from mmbeam.ops.image import PixelFilter
from mmbeam.ops.transfer import to_host
from mmbeam.types import FeatureColumn, Origin, Sample

MODEL_TYPE = "mmbeam-head"
ARCHITECTURE = "MmbeamHead"  # in config.json's `architectures`
TOP_K = 5


class Head(ScoreLabeller):
    """A linear layer on vectors, with the encoder that makes them if the input is not features."""

    def __init__(self, spec: LabellerSpec, weights: dict[str, torch.Tensor], encoder: Encoder | None) -> None:
        super().__init__(spec, next(iter(weights.values())).device, torch.float32)
        self.weights = weights
        self.encoder = encoder
        self.bias = weights["bias"].cpu().numpy()
        config = read_json(Path(spec.directory), "config.json")
        self.is_multi = config["problem_type"] == "multi_label_classification"
        self.columns = {column.modality: column.name for column in _columns(Path(spec.directory), config)}

    @classmethod
    def describe(cls, directory: Path, config: Any, labelling: Labelling) -> LabellerSpec:
        """Read config.json. The spec is that for features; `on_shards` returns the one with the encoder."""
        data = read_json(directory, "config.json")
        columns = _columns(directory, data)
        return LabellerSpec(
            family=MODEL_TYPE,
            directory=str(directory),
            labelling=defaults(labelling, top_k=TOP_K),
            modalities=tuple(m for m in MODALITIES if m in {column.modality for column in columns}),
            classes=class_names(directory, _Classes(directory, data), labelling),
            columns=columns,
        )

    @staticmethod
    def on_shards(spec: LabellerSpec) -> LabellerSpec:
        """Return the spec with the encoder of the head's features in their place.

        Raises UsageError unless one encoder, with its default options, made all of them.
        """
        data = read_json(Path(spec.directory), "config.json")
        names = ", ".join(column.name for column in spec.columns)
        origins = {column.origin for column in spec.columns}
        [origin] = origins if len(origins) == 1 else [None]
        if origin is None or not data.get("plain") or len({c.modality for c in spec.columns}) < len(spec.columns):
            raise UsageError(
                f"`input`: {spec.directory} takes features ({names}) that no single model makes with its default "
                "options; use the output of `mmbeam embed`"
            )
        resolved = resolve(origin.model)
        if digest(resolved.directory) != origin.digest:
            raise ModelError(
                f"{resolved.directory}: expected the files of {origin}, whose features {spec.directory} takes, found "
                "different files; use the output of `mmbeam embed` as `input`"
            )
        encoder = encoders.describe(resolved.directory)
        return replace(
            spec,
            columns=(),
            encoder=encoder,
            sampling_rate=encoder.sampling_rate,
            image_side=encoder.image_side,
            notes=encoder.notes,
        )

    @classmethod
    def load(cls, spec: LabellerSpec, device: torch.device, dtype: torch.dtype) -> "Head":
        """Load the weights, and those of the encoder."""
        directory = Path(spec.directory)
        weights = {name: tensor.to(device) for name, tensor in load_file(directory / "model.safetensors").items()}
        expected: dict[str, tuple[int, ...]] = {"bias": (len(spec.classes),)}
        for column in _columns(directory, read_json(directory, "config.json")):
            expected[f"weight.{column.name}"] = (len(spec.classes), column.width)
            expected |= {f"{name}.{column.name}": (column.width,) for name in ("mean", "std")}
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if shapes != expected:
            raise ModelError(
                f"{directory}/model.safetensors: expected the tensors {expected}, found {shapes}; use the files of one "
                "model"
            )
        encoder = None if spec.encoder is None else encoders.load(spec.encoder, device, dtype)
        return cls(spec, weights, encoder)

    @property
    def pixel_filter(self) -> PixelFilter | None:
        """The encoder's filter of images."""
        return None if self.encoder is None else self.encoder.pixel_filter

    @pixel_filter.setter
    def pixel_filter(self, pixel_filter: PixelFilter | None) -> None:
        if pixel_filter is not None and self.encoder is not None:
            self.encoder.pixel_filter = pixel_filter

    def items(self, modality: Modality, samples: Sequence[Sample]) -> list[Any]:
        """Return the images, clips or token ids of samples."""
        if modality != "text":
            return super().items(modality, samples)
        assert self.encoder is not None
        return cast(list[Any], self.encoder.tokenize([sample.model_text or "" for sample in samples]))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, not truncated, without special tokens."""
        assert self.encoder is not None
        return self.encoder.count_tokens(texts)

    def prepare(self, modality: Modality, items: Sequence[Any]) -> Any:
        """Return vectors on the device; or what the encoder takes of images, clips and texts."""
        if self.encoder is None:
            return torch.from_numpy(np.stack(items).astype(np.float32)).to(self.device, non_blocking=True)
        return items if modality == "text" else upload(self.encoder, modality, items)

    @torch.inference_mode()
    def compute(self, modality: Modality, inputs: Any) -> torch.Tensor:
        """Return what the vectors of a column, or of a modality, add to the logits, [B, C]."""
        name: str = modality
        if self.encoder is None:
            vectors_BD = inputs
        else:
            name = self.columns[modality]
            if modality == "image":
                pooled_BD = self.encoder.encode_image(inputs).pooled
            elif modality == "audio":
                pooled_BD = self.encoder.encode_audio(*inputs).pooled
            else:
                pooled_BD = self.encoder.encode_text(inputs).pooled
            vectors_BD = F.normalize(pooled_BD, dim=-1) if self.encoder.normalized else pooled_BD
        standard_BD = (vectors_BD.float() - self.weights[f"mean.{name}"]) / self.weights[f"std.{name}"]
        return to_host(standard_BD @ self.weights[f"weight.{name}"].T)

    def finish(self, values: Sequence[Any]) -> list[Record]:
        """Return the labels of a sample, from what each of its vectors adds to the logits."""
        logits = torch.from_numpy(self.bias + np.sum(values, axis=0))
        scores = logits.sigmoid() if self.is_multi else logits.softmax(-1)
        return super().finish([scores.numpy()])


class _Classes:
    """The classes of config.json, as `class_names` reads those of a configuration of transformers."""

    def __init__(self, directory: Path, data: Any) -> None:
        names = data.get("id2label")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise ModelError(f"{directory}/config.json: expected id2label, the names of the classes, found {names!r}")
        self.id2label = {index: names.get(str(index), f"LABEL_{index}") for index in range(len(names))}
        self.num_labels = len(names)


def _columns(directory: Path, data: Any) -> tuple[FeatureColumn, ...]:
    try:
        if data["problem_type"] not in ("single_label_classification", "multi_label_classification"):
            raise ValueError(f"problem_type {data['problem_type']!r}")
        columns = tuple(
            FeatureColumn(
                name=str(column["name"]),
                width=int(column["width"]),
                modality=next((m for m in MODALITIES if m == column["modality"]), None),
                origin=None if column["origin"] is None else Origin(*map(str, column["origin"])),
            )
            for column in data["columns"]
        )
        if not columns or any(column.width < 1 for column in columns):
            raise ValueError("columns without vectors")
        return columns
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{directory}/config.json: expected the configuration of a classification head: {error}"
        ) from None
