"""The schema of the Parquet files, and how a window becomes rows and failure records. It writes no files."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mmbeam.errors import FlowError
from mmbeam.names import Modality
from mmbeam.types import Batch, Failure, Output, Sample, SampleId, Tally

_STRINGS = pa.list_(pa.field("element", pa.string(), nullable=False))

# One record per failure of a sample. `outputs` are the columns lost; `row` states whether the sample still has a row.
FAILURE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("modality", pa.string(), nullable=False),
        pa.field("step", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("outputs", _STRINGS, nullable=False),
        pa.field("row", pa.bool_(), nullable=False),
        pa.field("unit", pa.string(), nullable=False),
    ]
)

_OF_SAMPLE: Mapping[str, Callable[[Sample], Any]] = {
    "key": lambda sample: sample.key,
    "shard": lambda sample: sample.shard,
    "offset": lambda sample: sample.offset,
    "text": lambda sample: sample.text,
    "text_clean": lambda sample: sample.text_clean,
    "metadata": lambda sample: sample.metadata,
    "image_width": lambda sample: None if sample.image_size is None else sample.image_size[0],
    "image_height": lambda sample: None if sample.image_size is None else sample.image_size[1],
    "audio_seconds": lambda sample: None if sample.audio is None else sample.audio.seconds,
    "video_seconds": lambda sample: None if sample.video is None else sample.video.seconds,
}


def build_schema(outputs: Sequence[Output], cleaning: bool, metadata: Mapping[str, str]) -> pa.Schema:
    """Return the schema of all Parquet files of a run: the columns of the sample, those of the outputs, and `errors`.

    An output of videos adds `video_seconds`.

    A vector column fixed_size_list<T>[D] is stored as list<T>, because no release of pyarrow up to 25 reads a null in a
    fixed-size list back from Parquet (apache/arrow issue 35692). D is in the metadata under "mmbeam.dims", a JSON
    object by column. A vector may be null, but its elements may not, so readers need not check each element.
    """
    columns = [column for output in outputs for column in output.columns]
    has_video = any("video" in output.modalities for output in outputs)
    dims = {column.name: column.type.list_size for column in columns if pa.types.is_fixed_size_list(column.type)}
    fields = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("text", pa.string()),
        *([pa.field("text_clean", pa.string())] if cleaning else []),
        pa.field("text_num_tokens", pa.int32()),
        pa.field("metadata", pa.string()),
        pa.field("image_width", pa.int32()),
        pa.field("image_height", pa.int32()),
        pa.field("audio_seconds", pa.float32()),
        *([pa.field("video_seconds", pa.float32())] if has_video else []),
        *(pa.field(column.name, _stored(column.type)) for column in columns if column.name != "text_num_tokens"),
        pa.field("errors", _STRINGS, nullable=False),
    ]
    return pa.schema(fields, metadata={**metadata, "mmbeam.dims": json.dumps(dims)})


def _stored(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_element(kind.value_type))
    if pa.types.is_list(kind) and pa.types.is_fixed_size_list(kind.value_type):  # tokens, which are never null
        return pa.list_(_element(pa.list_(_element(kind.value_type.value_type), kind.value_type.list_size)))
    return kind


def _element(kind: pa.DataType) -> pa.Field:
    return pa.field("element", kind, nullable=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRows:
    """The rows and failure records of a window."""

    rows: pa.Table  # in the order of the samples
    failures: Sequence[Mapping[str, Any]]  # records of FAILURE_SCHEMA
    tally: Tally  # the window's tally with rows, failed, impaired, outputs and failures added


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Whether a sample has a row, and which of its outputs are missing."""

    lost: tuple[str, ...]  # names of the outputs that were due and have no value
    row: bool


def make_rows(batch: Batch, outputs: Sequence[Output], schema: pa.Schema) -> WindowRows:
    """Return the rows and failure records of a window.

    An output is due according to `Output.is_due`, and has a value if its first column is not null. A sample has a row
    if it has any output, or none was due. A failure of the whole sample (no modality, no outputs) costs it all outputs
    and its row. A failure without a key is that of a place in a shard, and only recorded.

    Raises FlowError if a lost output is not covered by a failure, a value is not due, or the lengths of features and
    samples differ.
    """
    # Stages do not run on an empty window, so it has no features.
    outcomes = _outcomes(batch, outputs) if batch.samples else []
    rows = _rows(batch, outcomes, schema) if batch.samples else schema.empty_table()
    counts = Tally(
        rows=rows.num_rows,
        failed=len(outcomes) - rows.num_rows,
        impaired=sum(outcome.row and bool(outcome.lost) for outcome in outcomes),
        outputs={output.name: rows.num_rows - rows[output.name].null_count for output in outputs},
        failures=dict(Counter(f"{failure.step}: {failure.error}" for failure in batch.failures)),
    )
    return WindowRows(rows=rows, failures=_records(batch, outcomes, outputs), tally=batch.tally + counts)


def _outcomes(batch: Batch, outputs: Sequence[Output]) -> list[_Outcome]:
    whole = {f.id for f in batch.failures if f.key and not f.modality and not f.outputs}
    made = {  # by output, whether each sample has a value [samples]
        output.name: np.asarray(_feature(batch, output.name).is_valid().to_numpy(zero_copy_only=False), dtype=np.bool_)
        for output in outputs
    }
    due_of: dict[frozenset[Modality], tuple[str, ...]] = {}
    outcomes = []
    for position, sample in enumerate(batch.samples):
        if sample.present not in due_of:
            due_of[sample.present] = tuple(o.name for o in outputs if o.is_due(sample.present))
        due = due_of[sample.present]
        has = [name for name, flags in made.items() if flags[position]]
        if sample.id in whole:
            outcomes.append(_Outcome(due, row=False))
            continue
        if not set(has) <= set(due):
            raise FlowError(f"{_where(sample)}: {has} have values, though only {list(due)} were due")
        outcomes.append(_Outcome(tuple(name for name in due if name not in has), row=bool(has) or not due))
    return outcomes


def _feature(batch: Batch, name: str) -> pa.Array:
    feature = batch.features.get(name)
    if feature is None:
        raise FlowError(f"unit {batch.unit.id}, window {batch.index}: no stage made the column {name}")
    if len(feature) != len(batch.samples):
        raise FlowError(
            f"unit {batch.unit.id}, window {batch.index}: expected {len(batch.samples)} values of {name}, one per "
            f"sample, found {len(feature)}. To drop samples behind a stage, use mmbeam.transforms.Filter"
        )
    return feature


def _rows(batch: Batch, outcomes: Sequence[_Outcome], schema: pa.Schema) -> pa.Table:
    stay = [outcome.row for outcome in outcomes]
    samples = [sample for sample, row in zip(batch.samples, stay, strict=True) if row]
    arrays = []
    for field in schema:
        if field.name == "errors":
            arrays.append(pa.array([outcome.lost for outcome in outcomes if outcome.row], field.type))
        elif field.name in _OF_SAMPLE:
            arrays.append(_array(map(_OF_SAMPLE[field.name], samples), field.type))
        elif field.name == "text_num_tokens" and field.name not in batch.features:
            arrays.append(pa.nulls(len(samples), field.type))
        else:
            feature = _feature(batch, field.name).cast(field.type)
            arrays.append(feature if all(stay) else feature.filter(pa.array(stay, pa.bool_())))
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(values: Iterable[Any], kind: pa.DataType) -> pa.Array:
    return pa.array([_encodable(value) for value in values] if pa.types.is_string(kind) else list(values), kind)


def _encodable(text: str | None) -> str | None:
    """Return the text with lone surrogates (undecodable bytes of a name in a tar) as escapes."""
    if text is None or text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _records(batch: Batch, outcomes: Sequence[_Outcome], outputs: Sequence[Output]) -> list[Mapping[str, Any]]:
    """Return one record per failure, in the order of the samples, and then those of places in shards.

    Raises FlowError if a lost output has no failure.
    """
    of_sample: dict[SampleId, list[Failure]] = {sample.id: [] for sample in batch.samples}
    if len(of_sample) < len(batch.samples):
        raise FlowError(f"unit {batch.unit.id}, window {batch.index}: two samples have the same shard and offset")
    for failure in batch.failures:
        if not failure.key:
            continue
        if failure.id not in of_sample:
            raise FlowError(f"{_where(failure)}: a failure of a sample that is not in window {batch.index}")
        of_sample[failure.id].append(failure)
    records: list[Mapping[str, Any]] = []
    for sample, outcome in zip(batch.samples, outcomes, strict=True):
        lost = [output for output in outputs if output.name in outcome.lost]
        failures = of_sample[sample.id]
        for output in lost:
            if not any(covers(failure, output) for failure in failures):
                raise FlowError(f"{_where(sample)}: {output.name} was lost without a failure")
        for failure in failures:
            columns = [output.name for output in lost if covers(failure, output)]
            records.append(_record(failure, columns, outcome.row, batch.unit.id))
    records += [_record(failure, [], False, batch.unit.id) for failure in batch.failures if not failure.key]
    return records


def covers(failure: Failure, output: Output) -> bool:
    """Return whether the failure explains why its sample lacks the output."""
    if failure.outputs:
        return output.name in failure.outputs
    return not failure.modality or failure.modality in output.modalities | output.reads


def _record(failure: Failure, columns: Sequence[str], row: bool, unit: str) -> Mapping[str, Any]:
    return {
        "key": _encodable(failure.key),
        "shard": _encodable(failure.shard),
        "offset": failure.offset,
        "modality": failure.modality,
        "step": failure.step,
        "error": failure.error,
        "message": _encodable(failure.message),
        "outputs": columns,
        "row": row,
        "unit": unit,
    }


def _where(item: Sample | Failure) -> str:
    return f"{item.shard}: sample {item.key} at byte {item.offset:,}"


def check_conserved(tally: Tally, where: str) -> None:
    """Raise FlowError unless every sample is a row, a failure or a skip."""
    skipped = sum(tally.skipped.values())
    total = tally.rows + tally.failed + skipped
    if tally.samples != total:
        raise FlowError(
            f"{where}: expected one result for each of {tally.samples:,} samples; found {tally.rows:,} rows, "
            f"{tally.failed:,} failed and {skipped:,} skipped, together {total:,}. To drop samples between the steps, "
            "use mmbeam.transforms.Filter, which counts them as skipped"
        )
