"""The stage that adds labels: each sample of a window through one classifier, detector, segmenter or tagger.

A modality that a sample lacks is left out. If a modality is present but could not be decoded, there are no labels:
labels made without it would be incomplete, and their row would not show that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa

from mmbeam.config import Labelling
from mmbeam.errors import DeviceError, SampleError
from mmbeam.models.labellers import describe, load
from mmbeam.models.labellers.base import RECORDS, Labeller, LabellerSpec
from mmbeam.models.loading import digest, dtype_name, resolve
from mmbeam.models.placement import resolve_device, wait_for_device
from mmbeam.names import COLUMN_OF_LABELS, LabelTask, Modality, SegmentKind
from mmbeam.runs.rows import covers
from mmbeam.stages.base import ModelStage, good_audio, good_image
from mmbeam.stages.packing import Pack, PackResults, pack
from mmbeam.types import Batch, Failure, Needs, Output, Sample

VECTORS_PER_BATCH = 4096  # of features
TEXT_TOKENS_PER_SAMPLE = 128  # maximum number of padded tokens in a batch of texts, divided by the batch size
# Images of these tasks keep their size or are enlarged: a batch of 32 would take gigabytes.
AUTO_IMAGES: dict[LabelTask, int] = {"detect": 8, "segment": 8}


@dataclass(frozen=True, kw_only=True)
class LabelStage(ModelStage):
    """One labeller on a window of samples."""

    spec: LabellerSpec
    name: str | None = None  # prefix of the column, if several models run in one pass

    @property
    def key(self) -> str:
        """The identity of the loaded model."""
        loaded = f"{self.digest}:{dtype_name(self.dtype, self.device)}:{self.image_filter}:{self.device}"
        source = "features:" if self.spec.columns else ""
        return f"label:{source}{self.spec.labelling}:{loaded}"

    @property
    def column(self) -> str:
        """The column of the labels."""
        column = COLUMN_OF_LABELS[self.spec.labelling.task]
        return column if self.name is None else f"{self.name}_{column}"

    @property
    def needs(self) -> Needs:
        """What to decode of a sample, or the columns of features to read."""
        if self.spec.columns:
            return Needs(columns=frozenset(self.spec.columns))
        return self.needs_of(self.spec.modalities)

    @property
    def outputs(self) -> Sequence[Output]:
        """One output, a list of structs. It is empty where the model finds nothing."""
        element = RECORDS[COLUMN_OF_LABELS[self.spec.labelling.task]]
        kind = pa.list_(pa.field("element", element, nullable=False))
        return [Output(modalities=frozenset(self.spec.modalities), columns=(pa.field(self.column, kind),))]

    @property
    def batch_limit(self) -> int:
        """The maximum number of samples per batch."""
        return self.batch_size or min(super().batch_limit, AUTO_IMAGES.get(self.spec.labelling.task, 1 << 16))

    def load(self) -> Labeller:
        """Return the labeller on its device."""
        return load(*self.load_arguments(), image_filter=self.image_filter)

    def packs(self, model: Labeller, batch: Batch) -> Iterator[Pack[Any] | PackResults[Any]]:
        """Yield the images, clips and texts of a window in packs, one modality after the other; or its vectors."""
        for column in self.spec.columns:
            rows = [(index, sample.features.get(column.name)) for index, sample in enumerate(batch.samples)]
            vectors = [(index, vector) for index, vector in rows if vector is not None]
            for first in range(0, len(vectors), VECTORS_PER_BATCH):
                some = vectors[first : first + VECTORS_PER_BATCH]
                yield Pack(
                    group=column.name,
                    positions=[index for index, _ in some],
                    items=[vector for _, vector in some],
                    weights=[1] * len(some),
                )
        if self.spec.columns:
            return
        for modality in self.spec.modalities:
            positions = [index for index, sample in enumerate(batch.samples) if sample.has(modality)]
            items = model.items(modality, [batch.samples[index] for index in positions])
            weights = [model.weight(modality, item) for item in items]
            empty = [
                index for index, weight in zip(positions, weights, strict=True) if modality == "text" and not weight
            ]
            if empty:
                yield PackResults(modality, failed={index: SampleError("the text has no tokens") for index in empty})
            size = self.batch_limit
            is_text = modality == "text"
            kept = [index for index, weight in enumerate(weights) if weight or not is_text]
            for indices in pack(
                [weights[index] for index in kept],
                4 * size if is_text else size,  # up to 4 times as many short texts, limited by their padded tokens
                size * TEXT_TOKENS_PER_SAMPLE if is_text else None,
            ):
                chosen = [kept[index] for index in indices]
                yield Pack(
                    group=modality,
                    positions=[positions[index] for index in chosen],
                    items=[items[index] for index in chosen],
                    weights=[weights[index] for index in chosen],
                )

    def transfer(self, model: Labeller, group: str, items: Sequence[Any]) -> Any:
        """Return the model's inputs, on their way to its device."""
        return model.prepare(cast(Modality, group), items)

    def compute(self, model: Labeller, group: str, inputs: Any) -> Any:
        """Return what the model computes of a pack, on its way to the host."""
        return model.compute(cast(Modality, group), inputs)

    def known_good(self, model: Labeller, group: str) -> Any:
        """Return an image, a clip or a text that every working model accepts."""
        for column in self.spec.columns:
            if column.name == group:
                return np.zeros(column.width, np.float32)
        if group == "image":
            return good_image()
        if group == "audio":
            return good_audio()
        return model.items("text", [Sample(key="", shard="", offset=0, text="a")])[0]

    def collect(self, model: Labeller, batch: Batch, results: Sequence[PackResults[Any]]) -> Batch:
        """Return `batch` with this stage's column, and a Failure for each sample that lost its labels."""
        values: dict[int, list[Any]] = {}
        failures: list[Failure] = []
        for result in results:
            errors = dict(result.failed)
            modality = next((c.modality or "" for c in self.spec.columns if c.name == result.group), result.group)
            for positions, computed in result.done:
                samples = [batch.samples[position] for position in positions]
                split = model.split(cast(Modality, result.group), computed, samples)
                for position, value in zip(positions, split, strict=True):
                    if isinstance(value, FloatingPointError):
                        self._check_finite(model, result.group)
                        errors[position] = value
                    else:
                        values.setdefault(position, []).append(value)
            failures += [
                Failure.of(batch.samples[position], "label", error, modality=modality, outputs=(self.column,))
                for position, error in errors.items()
            ]
        [output] = self.outputs
        lost = {failure.id for failure in (*batch.failures, *failures) if covers(failure, output)}
        column = [
            model.finish(values[position]) if position in values and sample.id not in lost else None
            for position, sample in enumerate(batch.samples)
        ]
        return self.finish(model, batch, {self.column: pa.array(column, output.columns[0].type)}, failures, results)

    def _check_finite(self, model: Labeller, group: str) -> None:
        """Raise DeviceError if even an input known to be good has scores that are not finite."""
        sample = Sample(key="", shard="", offset=0, image_size=(32, 32), text="a")
        computed = self.compute(model, group, self.transfer(model, group, [self.known_good(model, group)]))
        wait_for_device()
        if isinstance(model.split(cast(Modality, group), computed, [sample])[0], FloatingPointError):
            raise DeviceError(
                f"{self.model} on {self.device}: the scores of an input known to be good ({group}) are not finite; "
                f"set `dtype` to a wider one than {dtype_name(self.dtype, self.device)}, or check the device"
            )


def label_stage(
    model: str,
    *,
    task: LabelTask = "classify",
    labels: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    top_k: int | None = None,
    threshold: float | None = None,
    segments: SegmentKind | None = None,
    features: bool = False,
    device: str = "cpu",
    count_tokens: bool = True,
    **options: Any,
) -> LabelStage:
    """Return the stage of `model`: a hub name with optional @revision, or a directory. Reads no weights.

    `labels` are what a zero-shot model looks for, or the names of the classes of a checkpoint that does not name them.
    `templates` turn a label into a text: "a photo of {}". `top_k` and `threshold` limit the labels of a sample, by
    default as the task does (README). With `features`, the input is precomputed features, which a head of the user's
    own takes. `device` is the device on the workers: "cpu" or "cuda[:N]"; "auto" selects it by
    the devices of this machine. `options` are other fields of LabelStage: name, dtype, batch_size, image_filter.

    Raises ModelError for an unusable model, UsageError for a task that it cannot do.
    """
    resolved = resolve(model)
    labelling = Labelling(
        task=task,
        labels=None if labels is None else tuple(labels),
        templates=None if templates is None else tuple(templates),
        top_k=top_k,
        threshold=threshold,
        segments=segments,
    )
    spec = describe(resolved.directory, labelling, features)
    return LabelStage(
        model=resolved.reference,
        spec=spec,
        digest=digest(resolved.directory),
        device=resolve_device(device) if device == "auto" else device,
        count_tokens=count_tokens and "text" in spec.modalities and not features,
        **options,
    )
