"""Steps for pipelines with other sources and sinks: rows in, Filter, RunInference, and whole jobs for Beam YAML."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from typing import Any, cast
from uuid import uuid4

import apache_beam as beam
import pyarrow as pa
from apache_beam.ml.inference.base import ModelHandler, PredictionResult, RunInference
from apache_beam.ml.transforms.base import EmbeddingsManager
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

from mmbeam.config import Reading, Windows
from mmbeam.errors import ShardError, UsageError
from mmbeam.names import KINDS, Modality
from mmbeam.prompts.ask import Decoding
from mmbeam.readers.windows import HeldBytes, prefetch, read_batches
from mmbeam.stages.embed import embed_stage
from mmbeam.stages.generate import generate_stage
from mmbeam.stages.label import label_stage
from mmbeam.transforms.plan import Plan
from mmbeam.transforms.read import ReadShards
from mmbeam.transforms.rows import Rows, is_vector
from mmbeam.transforms.run_stage import Embed, Generate, Label, RunStage
from mmbeam.types import Batch, Needs, RawSample, Sample, Stage, Tally, WorkUnit

log = logging.getLogger(__name__)

_EXTENSION = {
    "image": "jpg",
    "audio": "wav",
    "text": "txt",
    "video": "mp4",
    "metadata": "json",
}  # of a field named after its kind


class ToBatches(beam.PTransform):
    """PCollection of dictionaries or beam.Row -> PCollection[Batch]: samples of any source, decoded for the stages.

    An element's fields are those of a sample in a shard, as bytes or str: `jpg`, `wav`, `txt`, `json`, or any name that
    `reading.fields` gives, or `image`, `audio`, `text`, `metadata`. Fields of no kind and None are ignored. The field
    `key` (else a digest of the element) is the sample's key; `source` and a digest of the key stand for its shard and
    offset, unless the element has fields `shard` and `offset` too. Elements without a field of any kind are an error.
    """

    def __init__(
        self, needs: Needs, reading: Reading | None = None, *, source: str = "rows", windows: Windows | None = None
    ) -> None:
        super().__init__()
        self.windows = windows or Windows()
        self.dofn = _Decode(needs, reading or Reading(), source, self.windows)

    def expand(self, elements: beam.PCollection[Any]) -> beam.PCollection[Batch]:
        """Apply the step."""
        size = self.windows.samples
        return (
            elements
            | "Group" >> beam.BatchElements(min_batch_size=size, max_batch_size=size)  # list of elements
            | "Decode" >> beam.ParDo(self.dofn)  # Batch
        )


class _Decode(beam.DoFn):
    def __init__(self, needs: Needs, reading: Reading, source: str, windows: Windows) -> None:
        self.needs = needs
        self.reading = reading
        self.source = source
        self.windows = windows

    def process(self, elements: Sequence[Any]) -> Iterator[Batch]:
        """Yield windows of the elements' samples, decoded ahead of the consumer."""
        names = dict.fromkeys(name for element in elements for name in _values(element))
        known = [name for name in names if name.lower() in KINDS or self.reading.fields.kind(name.lower())]
        if elements and not known:
            raise UsageError(
                f"ToBatches: expected a field of an image, a sound, a text or metadata, found {', '.join(names)}; name "
                f"yours by Reading(fields=FieldMap(text={next(iter(names), 'text')!r}))"
            )
        unit = WorkUnit(id=f"{self.source}-{uuid4().hex}", inputs=())
        samples = raw_samples(elements, self.source, self.reading)
        held = HeldBytes()
        read = read_batches(unit, self.reading, self.needs, self.windows, held=held, samples=samples)
        with closing(prefetch(read, f"mmbeam-read-{unit.id}", held)) as batches:
            yield from batches


def _values(element: Any) -> Mapping[str, Any]:
    values: Mapping[str, Any] = element if isinstance(element, Mapping) else element._asdict()
    return values


def raw_samples(elements: Iterable[Any], source: str, reading: Reading) -> Iterator[RawSample]:
    """Yield the undecoded samples of dictionaries or rows (see ToBatches).

    Raises UsageError for a value of a field of some kind that is neither bytes nor str.
    """
    seen: set[tuple[str, int]] = set()
    for element in elements:
        values = _values(element)
        members: dict[str, bytes] = {}
        for name, value in values.items():
            field = name.lower()
            if reading.fields.kind(field) is None and field in KINDS:
                field = _EXTENSION[field]
            if value is None or reading.fields.kind(field) is None:
                continue
            if not isinstance(value, bytes | str):
                raise UsageError(f"ToBatches: expected bytes or str in field {name}, found {type(value).__name__}")
            members[field] = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
        key = values.get("key")
        if isinstance(key, bytes):
            key = key.decode("utf-8", "backslashreplace")
        if key is None:
            digest = hashlib.blake2b(digest_size=8)
            for field, content in members.items():
                digest.update(f"{field}\0{len(content)}\0".encode() + content)
            key = digest.hexdigest()
        shard, offset = str(values.get("shard") or source), values.get("offset")
        if offset is None:
            offset = int.from_bytes(hashlib.blake2b(str(key).encode(), digest_size=7).digest())
        while (shard, offset) in seen:  # a repeated key
            offset += 1
        seen.add((shard, offset))
        yield RawSample(key=str(key), shard=shard, offset=offset, members=members, fields=tuple(members))


class Filter(beam.PTransform):
    """PCollection[Batch] -> PCollection[Batch]: keep the samples for which `keep` returns true.

    It may stand anywhere between ReadShards and the writer, also behind a stage. A sample that is dropped is counted
    as skipped under `name`, so that the accounts of the run balance; its failures are dropped with it. A DoFn of your
    own that changes the samples of a Batch must do the same.
    """

    def __init__(self, keep: Callable[[Sample], bool], name: str = "filter") -> None:
        super().__init__()
        self.keep = keep
        self.name = name

    def expand(self, batches: beam.PCollection[Batch]) -> beam.PCollection[Batch]:
        """Apply the step."""
        return batches | "Filter" >> beam.Map(_select, self.keep, self.name).with_output_types(Batch)


def _select(batch: Batch, keep: Callable[[Sample], bool], name: str) -> Batch:
    flags = [bool(keep(sample)) for sample in batch.samples]
    if all(flags):
        return batch
    dropped = {sample.id for sample, kept in zip(batch.samples, flags, strict=True) if not kept}
    return replace(
        batch,
        samples=tuple(sample for sample in batch.samples if sample.id not in dropped),
        features={column: array.filter(pa.array(flags)) for column, array in batch.features.items()},
        failures=tuple(failure for failure in batch.failures if not failure.key or failure.id not in dropped),
        tally=batch.tally + Tally(skipped={name: len(dropped)}),
    )


class StageHandler(ModelHandler[Any, PredictionResult, RunStage]):
    """Any stage as a ModelHandler for `beam.ml.inference.RunInference`.

    Elements are those of ToBatches. The inference of an element is a dictionary of the stage's columns and `errors`, a
    list of messages; the columns of a failed output are None. Models, devices and errors are handled as in Embed.
    """

    def __init__(self, stage: Stage, reading: Reading | None = None, *, max_batch_size: int = 256) -> None:
        super().__init__(max_batch_size=max_batch_size)
        self.stage = stage
        self.reading = reading or Reading()

    def load_model(self) -> RunStage:
        """Return the step that runs the stage; the weights are loaded for the first batch."""
        step = RunStage(self.stage)
        step.setup()
        return step

    def run_inference(
        self, batch: Sequence[Any], model: RunStage, inference_args: dict[str, Any] | None = None
    ) -> Iterator[PredictionResult]:
        """Yield one result per element, in order."""
        unit = WorkUnit(id=f"inference-{uuid4().hex}", inputs=())
        samples = raw_samples(batch, "inference", self.reading)
        columns = [column.name for output in self.stage.outputs for column in output.columns]
        examples = iter(batch)
        for window in read_batches(unit, self.reading, self.stage.needs, Windows(), samples=samples):
            for done in model.process(window):
                errors: dict[Any, list[str]] = {sample.id: [] for sample in done.samples}
                for failure in done.failures:
                    errors[failure.id].append(f"{failure.step}: {failure.error}: {failure.message}")
                values = {name: done.features[name].to_pylist() for name in columns if done.samples}
                for index, sample in enumerate(done.samples):
                    inference = {name: values[name][index] for name in columns}
                    yield PredictionResult(next(examples), {**inference, "errors": errors[sample.id]})

    def get_num_bytes(self, batch: Sequence[Any]) -> int:
        """Return the bytes of the elements' undecoded fields."""
        return sum(len(value) for raw in raw_samples(batch, "", self.reading) for value in raw.members.values())

    def get_metrics_namespace(self) -> str:
        """Return the namespace of RunInference's metrics."""
        return "mmbeam"


class StageEmbeddings(EmbeddingsManager):
    """A stage as an embedding of `beam.ml.transforms.MLTransform`: the values of `columns` become their vectors.

    The values are bytes or str of one `modality`, by default the only one of the stage. A value that cannot be read
    becomes None, with a warning. Raises UsageError for a stage without one vector of the modality.
    """

    def __init__(self, stage: Stage, columns: list[str], *, modality: Modality | None = None, **options: Any) -> None:
        super().__init__(columns=columns, **options)
        modalities = sorted(stage.needs.modalities)
        if modality is None and len(modalities) == 1:
            modality = modalities[0]
        vectors = [out.name for out in stage.outputs if modality in out.modalities and is_vector(out.columns[0].type)]
        if modality not in modalities or len(vectors) != 1:
            raise UsageError(f"`modality`: expected one of {', '.join(modalities) or '(none)'}, found {modality}")
        self.handler = StageHandler(stage, max_batch_size=self.max_batch_size or 256)
        self.modality = modality
        self.vector = vectors[0]

    def get_model_handler(self) -> ModelHandler[Any, Any, RunStage]:
        """Return a handler whose elements are dictionaries with the columns."""
        return _ColumnHandler(self)

    def get_ptransform_for_processing(self, **_: Any) -> beam.PTransform:
        """Return the step of MLTransform."""
        return RunInference(self.get_model_handler())


class _ColumnHandler(ModelHandler[Any, Any, RunStage]):
    def __init__(self, embeddings: StageEmbeddings) -> None:
        super().__init__(min_batch_size=embeddings.min_batch_size, max_batch_size=embeddings.max_batch_size)
        self.embeddings = embeddings

    def load_model(self) -> RunStage:
        return self.embeddings.handler.load_model()

    def run_inference(
        self, batch: Sequence[Any], model: RunStage, inference_args: dict[str, Any] | None = None
    ) -> Iterable[Any]:
        embeddings = self.embeddings
        values = embeddings.type_adapter.input_fn(batch)
        elements = [{"key": str(number), embeddings.modality: value} for number, value in enumerate(values)]
        results = [result.inference for result in embeddings.handler.run_inference(elements, model)]
        for result in results:
            if result["errors"]:
                log.warning("a value has no vector: %s", result["errors"][0])
        return cast(
            Iterable[Any], embeddings.type_adapter.output_fn(batch, [result[embeddings.vector] for result in results])
        )


class EmbedRows(beam.PTransform):
    """Shards or rows in, beam.Row with vectors out: the embed job's steps in one transform, for Beam YAML.

    Without an input, `shards` is read; otherwise the input's rows (see ToBatches). The other arguments are those of
    `mmbeam.stages.embed.embed_stage`. The result is that of Rows with `form="row"`.
    """

    _yaml_requires_inputs = False  # read by Beam YAML

    def __init__(self, model: str, shards: str | Sequence[str] | None = None, **options: Any) -> None:
        super().__init__()
        self.stage: Stage = embed_stage(model, **options)
        self.shards = shards

    def expand(self, rows: Any) -> beam.PCollection[Any]:
        """Apply the steps."""
        return _rows_of(self.stage, Embed(self.stage), rows, self.shards)


class CaptionRows(beam.PTransform):
    """Shards or rows in, beam.Row with generated text out: the caption job's steps in one transform, for Beam YAML.

    As EmbedRows; the other arguments are those of `mmbeam.stages.generate.generate_stage`, and `max_new_tokens`.
    """

    _yaml_requires_inputs = False  # read by Beam YAML

    def __init__(
        self,
        model: str,
        shards: str | Sequence[str] | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.stage: Stage = generate_stage(model, decoding=Decoding(max_new_tokens=max_new_tokens), **options)
        self.shards = shards

    def expand(self, rows: Any) -> beam.PCollection[Any]:
        """Apply the steps."""
        return _rows_of(self.stage, Generate(self.stage), rows, self.shards)


class LabelRows(beam.PTransform):
    """Shards or rows in, beam.Row with classes, objects, segments or tags out: the label job's steps, for Beam YAML.

    As EmbedRows; the other arguments are those of `mmbeam.stages.label.label_stage`.
    """

    _yaml_requires_inputs = False  # read by Beam YAML

    def __init__(self, model: str, shards: str | Sequence[str] | None = None, **options: Any) -> None:
        super().__init__()
        self.stage: Stage = label_stage(model, **options)
        self.shards = shards

    def expand(self, rows: Any) -> beam.PCollection[Any]:
        """Apply the steps."""
        return _rows_of(self.stage, Label(self.stage), rows, self.shards)


def _rows_of(stage: Stage, step: Embed, rows: Any, shards: str | Sequence[str] | None) -> beam.PCollection[Any]:
    if isinstance(rows, beam.PCollection):
        if shards is not None:
            raise UsageError("`shards`: expected none, since the transform has an input")
        batches = rows | ToBatches(stage.needs)
    elif shards is None:
        raise UsageError("`shards`: expected paths of shards, or rows as the transform's input")
    else:
        batches = rows | Plan(shards) | ReadShards(stage.needs)
    result: beam.PCollection[Any] = batches | step | Rows(stage, form="row")
    return result


# The messages of tf.train.Example, which neither Beam nor protobuf brings.
_EXAMPLE_PROTO = """
name: "mmbeam/example.proto" package: "mmbeam" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type {
  name: "Feature"
  field { name: "bytes_list" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".mmbeam.BytesList" }
  field { name: "float_list" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".mmbeam.FloatList" }
  field { name: "int64_list" number: 3 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".mmbeam.Int64List" }
}
message_type {
  name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".mmbeam.Features.Entry" }
  nested_type {
    name: "Entry" options { map_entry: true }
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".mmbeam.Feature" }
  }
}
message_type {
  name: "Example"
  field { name: "features" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".mmbeam.Features" }
}
"""


@cache
def _example_class() -> Any:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_EXAMPLE_PROTO, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("mmbeam.Example"))


def parse_example(record: bytes) -> dict[str, Any]:
    """Return the features of a serialised tf.train.Example, for ToBatches behind beam.io.ReadFromTFRecord.

    A feature of one value becomes that value (bytes, float or int), any other a list. Raises ShardError if `record` is
    not an Example.
    """
    example = _example_class()()
    try:
        example.ParseFromString(record)
    except DecodeError as error:
        raise ShardError(f"a TFRecord of {len(record):,} bytes: expected a tf.train.Example, found {error}") from error
    values: dict[str, Any] = {}
    for name, feature in example.features.feature.items():
        lists = [list(kind.value) for _, kind in feature.ListFields()]
        value = lists[0] if lists else []
        values[name] = value[0] if len(value) == 1 else value
    return values
