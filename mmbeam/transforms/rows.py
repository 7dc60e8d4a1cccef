"""Rows: batches to dictionaries, beam.Row or EmbeddableItem, for another sink than mmbeam's Parquet files."""

import logging
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Optional, cast, get_args

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.pvalue import TaggedOutput
from apache_beam.typehints.row_type import RowTypeConstraint

from mmbeam.errors import FlowError, ShardError, UsageError
from mmbeam.runs.rows import FAILURE_SCHEMA, build_schema, make_rows
from mmbeam.transforms.metrics import count_tally
from mmbeam.types import Batch, Output, Stage

log = logging.getLogger(__name__)

Form = Literal["dict", "row", "item"]

_ATOMS: dict[pa.DataType, Any] = {
    pa.string(): str,
    pa.bool_(): bool,
    pa.int32(): np.int32,
    pa.int64(): np.int64,
    pa.float16(): np.float32,  # Beam's schemas have no half precision
    pa.float32(): np.float32,
    pa.float64(): np.float64,
}


class RowsCollection(beam.PCollection[Any]):
    """The rows, and `failures`: a PCollection with a dictionary (a beam.Row, for rows) per failure record."""

    failures: beam.PCollection[Any]


class Rows(beam.PTransform):
    """PCollection[Batch] -> PCollection: the rows that WriteParquet would write, for another sink.

    `stages` are those of the pipeline. `cleaning` is whether the reading cleans text, which adds `text_clean`.
    The result has an attribute `failures`, a second PCollection of the records that WriteParquet would write to
    `_failures/`. Nothing is committed, so nothing can be resumed: use WriteParquet for that. A shard that cannot be
    read raises ShardError, since rows alone could not show that some are missing.

    `form` is what a row becomes:
    - "dict": a dictionary. The attribute `schema` is the Arrow schema, for sinks that need one.
    - "row": a beam.Row with a schema, for SqlTransform, WriteToBigQuery, Iceberg and Beam YAML.
    - "item": an EmbeddableItem of apache_beam.ml.rag, for its sinks of vector databases. `vector` names the column of
      the vector; it may be omitted if there is only one. A row without that vector makes no item. The id is a UUID of
      shard and offset, so that a second run replaces the items of the first. The content is the text, or else
      `shard#key`; the other columns are the metadata.
    """

    def __init__(self, *stages: Stage, cleaning: bool = False, form: Form = "dict", vector: str | None = None) -> None:
        super().__init__()
        if form not in get_args(Form):
            raise UsageError(f"`form`: expected one of {', '.join(get_args(Form))}, found {form!r}")
        self.outputs: list[Output] = [output for stage in stages for output in stage.outputs]
        self.schema = build_schema(self.outputs, cleaning, metadata={})
        self.form = form
        vectors = [column.name for output in self.outputs for column in output.columns if is_vector(column.type)]
        if form == "item":
            vector = vector or (vectors[0] if len(vectors) == 1 else None)
            if vector not in vectors:
                raise UsageError(f"`vector`: expected one of {', '.join(vectors) or '(none)'}, found {vector}")
        self.vector = vector

    def expand(self, batches: beam.PCollection[Batch]) -> RowsCollection:
        """Apply the step."""
        types: dict[Form, Any] = {"dict": dict[str, Any], "row": row_type(self.schema), "item": Any}
        failure_type = row_type(FAILURE_SCHEMA) if self.form == "row" else dict[str, Any]
        made = batches | "Rows" >> beam.ParDo(
            _MakeRows(self.outputs, self.schema, self.form, self.vector)
        ).with_outputs("failures", main="rows")
        rows, failures = made["rows"], made["failures"]
        rows.element_type = types[self.form]
        failures.element_type = failure_type
        rows.failures = failures
        return cast(RowsCollection, rows)


class _MakeRows(beam.DoFn):
    def __init__(self, outputs: Sequence[Output], schema: pa.Schema, form: Form, vector: str | None) -> None:
        self.outputs = outputs
        self.schema = schema
        self.form = form
        self.vector = vector

    def process(self, batch: Batch) -> Iterator[Any]:
        if batch.unit_error is not None:
            raise ShardError(batch.unit_error)
        if batch.report is not None:
            raise FlowError(f"Rows: unit {batch.unit.id} is committed, so it is not read; omit `run` in ReadShards")
        window = make_rows(batch, self.outputs, self.schema)
        count_tally(window.tally)
        lost = next((record for record in window.failures if not record["row"]), None)
        if lost is not None:
            log.warning(
                "%d samples gave no row; %r of %s: %s", window.tally.failed, *map(lost.get, ("key", "shard", "message"))
            )
        for record in window.failures:
            yield TaggedOutput("failures", _as_row(record) if self.form == "row" else dict(record))
        for row in window.rows.to_pylist():
            if self.form == "dict":
                yield row
            elif self.form == "row":
                yield _as_row(row)
            elif row[self.vector] is not None:
                yield _as_item(row, str(self.vector))


def is_vector(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds vectors of one width."""
    return bool(pa.types.is_fixed_size_list(kind))


def _as_row(value: Any) -> Any:
    """Return dictionaries, also in lists, as beam.Row."""
    if isinstance(value, list):
        return [_as_row(element) for element in value] if value and isinstance(value[0], dict | list) else value
    if isinstance(value, dict):
        return beam.Row(**{name: _as_row(element) for name, element in value.items()})
    return value


def _as_item(row: dict[str, Any], vector: str) -> Any:
    from apache_beam.ml.rag.types import Content, EmbeddableItem, Embedding  # newer than the oldest Beam supported

    embedding = Embedding(dense_embedding=row.pop(vector))
    where = f"{row['shard']}#{row['key']}"
    return EmbeddableItem(
        content=Content(text=row["text"]) if row["text"] else Content(image=where),
        id=str(uuid.uuid5(uuid.NAMESPACE_URL, f"{row['shard']}#{row['offset']}")),
        metadata={name: value for name, value in row.items() if value is not None and value != []},
        embedding=embedding,
    )


def row_type(schema: pa.Schema) -> RowTypeConstraint:
    """Return the Beam type of beam.Row with the columns of an Arrow schema."""
    return RowTypeConstraint.from_fields([(field.name, _field_type(field)) for field in schema])


def _field_type(field: pa.Field) -> Any:
    kind = field.type
    if pa.types.is_struct(kind):
        beam_type: Any = row_type(pa.schema(list(kind)))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        beam_type = Sequence[_field_type(kind.value_field)]  # type: ignore[misc]
    else:
        beam_type = _ATOMS[kind]
    return Optional[beam_type] if field.nullable else beam_type  # noqa: UP045 - Beam reads typing's form
