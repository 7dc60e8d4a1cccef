"""Columns of features: their names, and their description in the schema of a Parquet file.

`mmbeam embed` writes a pooled vector as list<float>, whose width is in the metadata under "mmbeam.dims", and a token
sequence as list<fixed_size_list<float>>. The metadata names the models, and the digests of their files, under
"mmbeam.models" and "mmbeam.digests". The class of a column is `types.FeatureColumn`.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mmbeam.clean.text import json_object
from mmbeam.errors import UsageError
from mmbeam.names import MODALITIES, UNNAMED_MODEL, Modality
from mmbeam.types import FeatureColumn, Origin

log = logging.getLogger(__name__)

_is_text: Callable[[pa.DataType], bool] = pa.types.is_string
_is_count: Callable[[pa.DataType], bool] = pa.types.is_integer
IDENTITY = {"key": _is_text, "shard": _is_text, "offset": _is_count}  # every row must have these columns
FACTS = {  # optional columns, read if they have this type
    "text": _is_text,
    "metadata": _is_text,
    "image_width": _is_count,
    "image_height": _is_count,
    "audio_seconds": pa.types.is_floating,
    "errors": pa.types.is_list,
}

_NAME = re.compile(rf"(?:(.+)_)?({'|'.join(MODALITIES)})_(embedding|tokens)", re.DOTALL)


class ColumnName(NamedTuple):
    """The parts of a column's name."""

    model: str  # UNNAMED_MODEL if the name begins with the modality
    modality: Modality
    tokens: bool  # [tokens, width] per sample, not [width]


def parse_name(column: str) -> ColumnName | None:
    """Parse `[MODEL_]MODALITY_embedding` or `..._tokens`; None for any other name, such as "clipimage_embedding"."""
    match = _NAME.fullmatch(column)
    if match is None:
        return None
    modality = next(modality for modality in MODALITIES if modality == match[2])
    return ColumnName(match[1] or UNNAMED_MODEL, modality, match[3] == "tokens")


def widths_of(schema: pa.Schema) -> dict[str, int]:
    """Return the columns of pooled vectors with their widths, as the metadata states them."""
    dims = _metadata(schema, b"mmbeam.dims")
    return {
        name: width for name, width in dims.items() if name in schema.names and isinstance(width, int) and width > 0
    }


def origin_of(schema: pa.Schema, column: str) -> Origin | None:
    """Return the model that made a column; None if the metadata does not name it."""
    name = parse_name(column)
    if name is None:
        return None
    model = _metadata(schema, b"mmbeam.models").get(name.model)
    digest = _metadata(schema, b"mmbeam.digests").get(name.model)
    return Origin(model, digest) if isinstance(model, str) and isinstance(digest, str) else None


def _metadata(schema: pa.Schema, key: bytes) -> Mapping[str, Any]:
    return json_object((schema.metadata or {}).get(key))


def feature_columns(schema: pa.Schema, names: Sequence[str] | None, where: str) -> tuple[FeatureColumn, ...]:
    """Return the columns of features called `names`, or all columns of pooled vectors if `names` is None.

    Raises UsageError, which begins with `where`, if a column does not hold features, or if there is no such column.
    """
    widths = widths_of(schema)
    columns = tuple(_feature_column(schema, name, widths, where) for name in (widths if names is None else names))
    if not columns:
        raise UsageError(
            f"{where}: the metadata (mmbeam.dims) lists no columns of vectors; pass an output of mmbeam embed, or name "
            "the columns"
        )
    return columns


def _feature_column(schema: pa.Schema, name: str, widths: Mapping[str, int], where: str) -> FeatureColumn:
    kind = schema.field(name).type
    inner = kind.value_type if pa.types.is_list(kind) else None
    if inner is not None and pa.types.is_fixed_size_list(inner) and pa.types.is_floating(inner.value_type):
        width, tokens, number = inner.list_size, True, inner.value_type
    elif inner is not None and pa.types.is_floating(inner) and name in widths:
        width, tokens, number = widths[name], False, inner
    else:
        raise UsageError(
            f"{where}: column {name} is {kind}; expected list<fixed_size_list<float>>, or list<float> with a width in "
            f"the metadata (mmbeam.dims lists {', '.join(widths) or 'no columns'})"
        )
    parsed = parse_name(name)
    return FeatureColumn(
        name=name,
        modality=parsed and parsed.modality,
        width=width,
        tokens=tokens,
        dtype=np.dtype(number.to_pandas_dtype()),
        origin=origin_of(schema, name),
    )


def check_schema(where: str, schema: pa.Schema, wanted: Mapping[str, FeatureColumn]) -> None:
    """Raise UsageError if rows of this schema are not samples, or if their features do not fit the model."""
    if not all(name in schema.names and is_right(schema.field(name).type) for name, is_right in IDENTITY.items()):
        raise UsageError(
            f"{where}: expected the columns {', '.join(IDENTITY)} that mmbeam embed writes, found "
            f"{', '.join(schema.names)}"
        )
    for name in sorted(wanted.keys() & set(schema.names)):
        _check_type(where, schema, wanted[name])
        check_origin(f"{where}: {name}", wanted[name].origin, origin_of(schema, name))


def _check_type(where: str, schema: pa.Schema, column: FeatureColumn) -> None:
    kind = vector = schema.field(column.name).type
    if column.tokens and _is_list(kind):
        vector = kind.value_type
    if not _is_list(vector) or not pa.types.is_floating(vector.value_type):
        shape = f"[tokens, {column.width}]" if column.tokens else f"[{column.width}]"
        raise UsageError(f"{where}: {column.name}: the model takes numbers of shape {shape}, found {kind}")
    width = vector.list_size if pa.types.is_fixed_size_list(vector) else widths_of(schema).get(column.name)
    if width not in (None, column.width):
        raise UsageError(
            f"{where}: {column.name} is {width} wide, and the model takes {column.width}; pass the features "
            "that it was trained on, or the model that was trained on these"
        )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def check_origin(where: str, expected: Origin | None, origin: Origin | None) -> None:
    """Raise UsageError if the features at `where` come from another model than the one expected."""
    if expected is not None and origin is not None and origin.digest != expected.digest:
        raise UsageError(
            f"{where} was made by {origin}, and the model takes features of {expected}; pass the features that it was "
            "trained on, or the model that was trained on these"
        )


def warn_of_unknown_origin(where: str, name: str, expected: Origin | None, origin: Origin | None) -> None:
    """Log a warning if the model was trained on features of a known encoder and the file does not name its encoder."""
    if expected is not None and origin is None:
        log.warning("%s: the model that made %s is unknown; expected features of %s", where, name, expected)
