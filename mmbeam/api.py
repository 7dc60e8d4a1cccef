"""Models and rows without a pipeline, for a notebook or a service. `import mmbeam` offers these names.

Vectors and texts are those that a job with the same options writes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from os import PathLike
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from mmbeam.config import Reading
from mmbeam.decode import decode_sample
from mmbeam.errors import SampleError, UsageError
from mmbeam.features.read import WrittenRows
from mmbeam.names import SHIPPED_MODEL, LabelTask, Modality, SegmentKind, Task
from mmbeam.prompts.ask import Decoding
from mmbeam.readers.stream import read_file
from mmbeam.stages.embed import EmbedStage, embed_stage
from mmbeam.stages.generate import GenerateStage, generate_stage
from mmbeam.stages.label import LabelStage, label_stage
from mmbeam.types import Audio, Batch, Failure, RawSample, Sample, WorkUnit

ImageLike = str | PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]  # path or URL, file, image, [H, W, 3] RGB
AudioLike = str | PathLike[str] | bytes | tuple[npt.NDArray[np.float32], int]  # path or URL, file, ([frames], Hz)

_SAMPLES_PER_WINDOW = 64
_UNIT = WorkUnit(id="api", inputs=())
_ARGUMENTS: Mapping[str, str] = {"image": "images", "audio": "audio", "text": "texts"}


class EncoderModel:
    """A loaded encoder. Not thread-safe."""

    def __init__(self, stage: EmbedStage) -> None:
        self._stage = stage
        self._model = stage.load()

    @property
    def dims(self) -> Mapping[Modality, int]:
        """The width of the vectors of each modality that the model encodes."""
        return {modality: self._stage.width(modality) for modality in self._stage.modalities}

    def encode(
        self,
        *,
        images: Sequence[ImageLike] | None = None,
        texts: Sequence[str] | None = None,
        audio: Sequence[AudioLike] | None = None,
    ) -> dict[Modality, npt.NDArray[np.float32]]:
        """Return one vector per input, float32 [inputs, width], by modality: "image", "text", "audio".

        Raises UsageError for a modality that the model does not encode, SampleError for an input that cannot be
        decoded or encoded.
        """
        inputs: dict[Modality, Sequence[Any] | None] = {"image": images, "text": texts, "audio": audio}
        vectors: dict[Modality, npt.NDArray[np.float32]] = {}
        for modality, values in inputs.items():
            if values is None:
                continue
            if modality not in self.dims:
                raise UsageError(f"`{_ARGUMENTS[modality]}`: {self._stage.model} encodes {', '.join(self.dims)} only")
            column = next(output.name for output in self._stage.outputs if output.modalities == frozenset((modality,)))
            parts = [np.zeros((0, self.dims[modality]), np.float32)]
            for batch in _run(self._stage, self._model, [{modality: value} for value in values]):
                flat = batch.features[column].flatten().to_numpy(zero_copy_only=False)
                parts.append(flat.astype(np.float32).reshape(len(batch.samples), -1))
            vectors[modality] = np.concatenate(parts)
        return vectors


class GeneratorModel:
    """A loaded generator. Not thread-safe."""

    def __init__(self, stage: GenerateStage) -> None:
        self._stage = stage
        self._model = stage.load()

    def generate(
        self,
        *,
        images: Sequence[ImageLike | None] = (),
        texts: Sequence[str | None] = (),
        audio: Sequence[AudioLike | None] = (),
        metadata: Sequence[str | None] = (),
    ) -> list[str | None]:
        """Return one text per sample; None for a sample without any input that the model takes.

        Sample i consists of images[i], texts[i], audio[i] and metadata[i], the last as JSON. A missing one is None.
        Raises SampleError for a sample for which no text can be generated.
        """
        names = ("image", "text", "audio", "metadata")
        samples = [
            {name: value for name, value in zip(names, values, strict=True) if value is not None}
            for values in zip_longest(images, texts, audio, metadata)
        ]
        generated: list[str | None] = []
        for batch in _run(self._stage, self._model, samples):
            generated += batch.features[self._stage.column].to_pylist()
        return generated


class LabellerModel:
    """A loaded labeller. Not thread-safe."""

    def __init__(self, stage: LabelStage) -> None:
        self._stage = stage
        self._model = stage.load()

    def label(
        self,
        *,
        images: Sequence[ImageLike | None] = (),
        texts: Sequence[str | None] = (),
        audio: Sequence[AudioLike | None] = (),
    ) -> list[list[dict[str, Any]] | None]:
        """Return the labels, objects, segments or tags of each sample; None for a sample without a usable input.

        Sample i consists of images[i], texts[i] and audio[i]. A missing one is None. The keys of a record are the
        fields of the column that the task writes. Raises UsageError for a modality that the model does not take,
        SampleError for a sample that cannot be labelled.
        """
        inputs: dict[Modality, Sequence[Any]] = {"image": images, "text": texts, "audio": audio}
        taken = self._stage.spec.modalities
        for modality, values in inputs.items():
            if values and modality not in taken:
                raise UsageError(f"`{_ARGUMENTS[modality]}`: {self._stage.model} labels {', '.join(taken)} only")
        samples: list[dict[str, Any]] = [
            {name: value for name, value in zip(inputs, values, strict=True) if value is not None}
            for values in zip_longest(*inputs.values())
        ]
        labelled: list[list[dict[str, Any]] | None] = []
        for batch in _run(self._stage, self._model, samples):
            labelled += batch.features[self._stage.column].to_pylist()
        return labelled


def load_encoder(
    model: str,
    *,
    device: str = "auto",
    dtype: str | None = None,
    modalities: Sequence[Modality] | None = None,
    text_prompt: str | None = None,
    dims: int | None = None,
) -> EncoderModel:
    """Load the encoder `model`: a hub name with optional @revision, or a directory.

    `device` is "auto", "cpu" or "cuda[:N]". `dtype` defaults to float32 on a CPU and bfloat16 on a GPU. `text_prompt`
    is put before each text: the name of a prompt of the checkpoint, or the prompt itself. `dims` truncates each vector
    to its first `dims` components. Raises ModelError for an unusable model, UsageError if it encodes none of
    `modalities`.
    """
    stage = embed_stage(
        model,
        device=device,
        dtype=dtype,
        modalities=modalities,
        count_tokens=False,
        text_prompt=text_prompt,
        dims=dims,
    )
    return EncoderModel(stage)


def load_generator(
    model: str = SHIPPED_MODEL,
    *,
    task: Task | None = None,
    prompt: str | None = None,
    language: str | None = None,
    decoding: Decoding | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> GeneratorModel:
    """Load the generator `model`: a hub name with optional @revision, or a directory; by default the shipped model.

    `prompt` is a template over the sample that replaces the task's own. Raises ModelError for an unusable model,
    UsageError for options that contradict each other or the model.
    """
    stage = generate_stage(
        model,
        task=task,
        prompt=prompt,
        language=language,
        decoding=decoding,
        device=device,
        dtype=dtype,
        count_tokens=False,
    )
    return GeneratorModel(stage)


def load_labeller(
    model: str,
    *,
    task: LabelTask = "classify",
    labels: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    top_k: int | None = None,
    threshold: float | None = None,
    segments: SegmentKind | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> LabellerModel:
    """Load the labeller `model`: a hub name with optional @revision, or a directory.

    `task` and the arguments after it are those of `mmbeam label`. Raises ModelError for an unusable model, UsageError
    for a task that it cannot do.
    """
    stage = label_stage(
        model,
        task=task,
        labels=labels,
        templates=templates,
        top_k=top_k,
        threshold=threshold,
        segments=segments,
        device=device,
        dtype=dtype,
        count_tokens=False,
    )
    return LabellerModel(stage)


def read_rows(output: str | PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """Return the committed rows of a job's output, in order, with these columns or all.

    Raises JobError if the output holds no rows, UsageError for an unknown column.
    """
    rows = WrittenRows.of(str(output))
    names = rows.schema.names if columns is None else list(columns)
    unknown = [name for name in names if name not in rows.schema.names]
    if unknown:
        raise UsageError(f"`columns` {', '.join(unknown)}: the rows have {', '.join(rows.schema.names)}")
    schema = pa.schema([rows.schema.field(name) for name in names], rows.schema.metadata)
    return pa.Table.from_batches(list(rows.read(names)), schema)


def _run(
    stage: EmbedStage | GenerateStage | LabelStage, model: Any, samples: Sequence[Mapping[str, Any]]
) -> Iterator[Batch]:
    """Decode the samples and yield the windows with the stage's outputs. Raises SampleError for the first failure."""
    for first in range(0, len(samples), _SAMPLES_PER_WINDOW):
        decoded: list[Sample] = []
        for number, values in enumerate(samples[first : first + _SAMPLES_PER_WINDOW], first):
            sample, failures = _decode(stage, number, values)
            _raise_first(failures)
            decoded.append(sample)
        batch = stage.run(model, Batch(unit=_UNIT, index=0, last=True, samples=tuple(decoded)))
        _raise_first(batch.failures)
        yield batch


def _raise_first(failures: Sequence[Failure]) -> None:
    for failure in failures:
        names = _ARGUMENTS.get(failure.modality, "samples")
        raise SampleError(f"{names}[{failure.offset}]: {failure.message}")


def _decode(
    stage: EmbedStage | GenerateStage | LabelStage, number: int, values: Mapping[str, Any]
) -> tuple[Sample, Sequence[Failure]]:
    """Return a sample whose offset is its number. Pixels and waveforms are taken as they are."""
    members: dict[str, bytes] = {}
    ready: dict[Literal["image", "audio"], Any] = {}
    for name, value in values.items():
        if name == "metadata":
            members["json"] = value.encode()
        elif name == "text":
            members["txt"] = value.encode()
        elif isinstance(value, Image.Image):
            ready["image"] = np.asarray(value.convert("RGB"))
        elif isinstance(value, np.ndarray):
            if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
                raise UsageError(
                    f"images[{number}]: expected uint8 [height, width, 3], found {value.dtype} {value.shape}"
                )
            ready["image"] = value
        elif isinstance(value, tuple):
            wave, rate = value
            ready["audio"] = Audio(waves={rate: np.asarray(wave, np.float32)}, seconds=len(wave) / rate)
        else:
            data = value if isinstance(value, bytes) else read_file(str(value), Reading().limits.member_bytes)
            members["jpg" if name == "image" else "wav"] = data  # decoders go by content
    raw = RawSample(key=str(number), shard="api", offset=number, members=members, fields=tuple(members))
    sample, failures = decode_sample(raw, Reading(), stage.needs)
    return replace(sample, present=sample.present.union(ready), **ready), failures
