"""What a row is: the schema of the Parquet, and the settling of a window into rows and failure records.

Pure: batches in, tables out. Files are made of them in parquet.py.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmbeam.errors import FlowError
from mmbeam.names import Modality
from mmbeam.types import Batch, Failure, Output, Sample, SampleId, Tally

_STRINGS = pa.list_(pa.field("element", pa.string(), nullable=False))

# One record for each thing that went wrong with a sample. `outputs` are the columns it cost; `row` says
# whether the sample has a row all the same.
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
}


def build_schema(outputs: Sequence[Output], cleaning: bool, metadata: Mapping[str, str]) -> pa.Schema:
    """The schema of every part of a run: the sample's own columns, the outputs', and `errors`.

    A vector column fixed_size_list<T>[D] is stored as list<T>, because no release of pyarrow up to 25
    reads a null in a fixed-size list back from Parquet (apache/arrow issue 35692); D is in the metadata
    under "mmbeam.dims", a JSON object by column. A vector may be null, a number in it may not: a reader that
    knows this need not look at each of them.
    """
    columns = [column for output in outputs for column in output.columns]
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
        *(pa.field(column.name, _stored(column.type)) for column in columns if column.name != "text_num_tokens"),
        pa.field("errors", _STRINGS, nullable=False),
    ]
    return pa.schema(fields, metadata={**metadata, "mmbeam.dims": json.dumps(dims)})


def _stored(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_element(kind.value_type))
    if pa.types.is_list(kind) and pa.types.is_fixed_size_list(kind.value_type):  # tokens: none of them is null
        return pa.list_(_element(pa.list_(_element(kind.value_type.value_type), kind.value_type.list_size)))
    return kind


def _element(kind: pa.DataType) -> pa.Field:
    return pa.field("element", kind, nullable=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What became of a window."""

    rows: pa.Table  # of the samples that stay, in order
    failures: Sequence[Mapping[str, Any]]  # records of FAILURE_SCHEMA
    tally: Tally  # the window's own and what was counted here: rows, failed, impaired, made, failures


@dataclass(frozen=True, slots=True)
class _Verdict:
    lost: tuple[str, ...]  # names of the outputs that were due and not made
    row: bool


def settle(batch: Batch, outputs: Sequence[Output], schema: pa.Schema) -> Settled:
    """Decide for each sample of the window whether it is a row, and which outputs it lost.

    An output is due as Output.due says, and made if its first column is not null. A sample is a row if
    something was made or nothing was due. A failure of the whole sample (no modality, no outputs) costs it
    every output, whatever has a value, and its row.

    Raises FlowError if an output was lost and no failure says why, a value was made that was not due, or
    features and samples do not fit together.
    """
    if not batch.samples:  # a stage is not bothered with an empty window, so it has no features
        return Settled(rows=schema.empty_table(), failures=[], tally=batch.tally)
    verdicts = _verdicts(batch, outputs)
    rows = _rows(batch, verdicts, schema)
    counts = Tally(
        rows=rows.num_rows,
        failed=len(verdicts) - rows.num_rows,
        impaired=sum(verdict.row and bool(verdict.lost) for verdict in verdicts),
        outputs={output.name: rows.num_rows - rows[output.name].null_count for output in outputs},
        failures=dict(Counter(f"{failure.step}: {failure.error}" for failure in batch.failures)),
    )
    return Settled(rows=rows, failures=_records(batch, verdicts, outputs), tally=batch.tally + counts)


def _verdicts(batch: Batch, outputs: Sequence[Output]) -> list[_Verdict]:
    whole = {failure.id for failure in batch.failures if not failure.modality and not failure.outputs}
    made = {output.name: _made(batch, output.name) for output in outputs}
    due_of: dict[frozenset[Modality], tuple[str, ...]] = {}
    verdicts = []
    for position, sample in enumerate(batch.samples):
        if sample.present not in due_of:
            due_of[sample.present] = tuple(o.name for o in outputs if o.is_due(sample.present))
        due = due_of[sample.present]
        has = [name for name, flags in made.items() if flags[position]]
        if sample.id in whole:
            verdicts.append(_Verdict(due, row=False))
            continue
        if not set(has) <= set(due):
            raise FlowError(f"{_where(sample)}: {has} have values, though only {list(due)} were due")
        verdicts.append(_Verdict(tuple(name for name in due if name not in has), row=bool(has) or not due))
    return verdicts


def _made(batch: Batch, name: str) -> npt.NDArray[np.bool_]:
    """For each sample, whether the feature has a value. [samples]"""
    feature = _feature(batch, name)
    return np.asarray(feature.is_valid().to_numpy(zero_copy_only=False), dtype=np.bool_)


def _feature(batch: Batch, name: str) -> pa.Array:
    feature = batch.features.get(name)
    if feature is None:
        raise FlowError(f"unit {batch.unit.id}, window {batch.index}: no stage made the column {name}")
    if len(feature) != len(batch.samples):
        raise FlowError(
            f"unit {batch.unit.id}, window {batch.index}: expected {len(batch.samples)} values of {name}, "
            f"one per sample, found {len(feature)}"
        )
    return feature


def _rows(batch: Batch, verdicts: Sequence[_Verdict], schema: pa.Schema) -> pa.Table:
    stay = [verdict.row for verdict in verdicts]
    samples = [sample for sample, row in zip(batch.samples, stay, strict=True) if row]
    arrays = []
    for field in schema:
        if field.name == "errors":
            arrays.append(pa.array([verdict.lost for verdict in verdicts if verdict.row], field.type))
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
    """The text, with lone surrogates (undecodable bytes of a name in a tar) written as escapes."""
    if text is None or text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _records(batch: Batch, verdicts: Sequence[_Verdict], outputs: Sequence[Output]) -> list[Mapping[str, Any]]:
    """One record per failure, in the order of the samples; checks that every lost output is covered by one."""
    of_sample: dict[SampleId, list[Failure]] = {sample.id: [] for sample in batch.samples}
    if len(of_sample) < len(batch.samples):
        raise FlowError(f"unit {batch.unit.id}, window {batch.index}: two samples have the same shard and offset")
    for failure in batch.failures:
        if failure.id not in of_sample:
            raise FlowError(f"{_where(failure)}: a failure of a sample that is not in window {batch.index}")
        of_sample[failure.id].append(failure)
    records: list[Mapping[str, Any]] = []
    for sample, verdict in zip(batch.samples, verdicts, strict=True):
        lost = [output for output in outputs if output.name in verdict.lost]
        failures = of_sample[sample.id]
        for output in lost:
            if not any(covers(failure, output) for failure in failures):
                raise FlowError(f"{_where(sample)}: {output.name} was lost, and no failure says why")
        for failure in failures:
            columns = [output.name for output in lost if covers(failure, output)]
            records.append(_record(failure, columns, verdict.row, batch.unit.id))
    return records


def covers(failure: Failure, output: Output) -> bool:
    """Whether the failure is a reason for the output not to be made of its sample."""
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


def _where(found: Sample | Failure) -> str:
    return f"{found.shard}: sample {found.key} at byte {found.offset:,}"
