"""Features that were computed before as input: the Parquet files that `mmbeam embed` wrote, found, checked, opened.

Not here: their rows as samples (feature_rows.py), and loading them for training.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmbeam.errors import MissingModalityError, ShardError, UsageError
from mmbeam.names import SHARD_SUFFIXES, UNNAMED_MODEL
from mmbeam.readers.listing import expand
from mmbeam.readers.paths import without_query
from mmbeam.readers.stream import ShardStream, open_shard
from mmbeam.runs.run import DATA, MANIFEST
from mmbeam.runs.store import Store
from mmbeam.types import FeatureColumn, Origin, Shard

log = logging.getLogger(__name__)

SUFFIX = ".parquet"

_is_text: Callable[[pa.DataType], bool] = pa.types.is_string
_is_count: Callable[[pa.DataType], bool] = pa.types.is_integer
_COLUMN = re.compile(r"(?:(.+)_)?(?:image|audio|text)_(?:embedding|tokens)")  # a named model's begin with its name
IDENTITY = {"key": _is_text, "shard": _is_text, "offset": _is_count}  # without these a row is no sample
FACTS = {  # read where a file has them, of this type
    "text": _is_text,
    "metadata": _is_text,
    "image_width": _is_count,
    "image_height": _is_count,
    "audio_seconds": pa.types.is_floating,
    "errors": pa.types.is_list,
}


def feature_patterns(patterns: Sequence[str]) -> list[str]:
    """For an input of features, the patterns of its Parquet files, as `list_shards` takes them; [] for shards.

    Features are outputs of `mmbeam embed` (directories) and what ends in .parquet, globs too.
    Raises UsageError if some of the input is features and some is shards.
    """
    entries = expand(patterns)
    files = [found for entry in entries if (found := _files_of(entry)) is not None]
    if files and len(files) < len(entries):
        raise UsageError("--input: some of it is features (Parquet) and some is shards; give one kind")
    return files


def _files_of(entry: str) -> str | None:
    plain = without_query(entry).lower()
    if plain.endswith(SUFFIX):
        return entry
    if plain.endswith(SHARD_SUFFIXES) or re.search("[*?[]", entry) or plain.startswith(("http://", "https://")):
        return None
    return f"{entry.rstrip('/')}/{DATA}/*{SUFFIX}" if Store(entry).exists(MANIFEST) else None


def check_columns(files: Sequence[Shard], columns: Iterable[FeatureColumn]) -> None:
    """Find each column in some file, as the model takes it. A file that cannot be read is its unit's affair.

    Raises MissingModalityError naming the columns found if one of `columns` is in no file; UsageError naming
    both widths, or both encoders, if they differ, or if a row is no sample; ShardError if none can be read.
    """
    wanted = {column.name: column for column in columns}
    found: dict[str, None] = {}
    broken: list[ShardError] = []
    for file in files:
        try:
            with opened(file) as (parquet, _):
                schema = parquet.schema_arrow
        except ShardError as error:
            broken.append(error)
            continue
        check_schema(file, schema, wanted)
        if not found:
            _say_unknown(file, schema, wanted)
        found |= dict.fromkeys(schema.names)
        if wanted.keys() <= found.keys():
            return
    if len(broken) == len(files):
        raise broken[0]
    missing = [name for name in wanted if name not in found]
    raise MissingModalityError(
        f"no file of the input has {' or '.join(missing)}, which the model takes; the columns are {', '.join(found)}"
    )


def check_schema(file: Shard, schema: pa.Schema, wanted: Mapping[str, FeatureColumn]) -> None:
    """Raise UsageError if rows of this schema are no samples, or their features do not fit the model."""
    if not all(name in schema.names and is_right(schema.field(name).type) for name, is_right in IDENTITY.items()):
        raise UsageError(
            f"{file.path}: expected the columns {', '.join(IDENTITY)} that mmbeam embed writes, found "
            f"{', '.join(schema.names)}"
        )
    for name in sorted(wanted.keys() & set(schema.names)):
        _check_column(file, schema, wanted[name])


def _check_column(file: Shard, schema: pa.Schema, column: FeatureColumn) -> None:
    kind = vector = schema.field(column.name).type
    if column.tokens and _is_list(kind):
        vector = kind.value_type
    if not _is_list(vector) or not pa.types.is_floating(vector.value_type):
        shape = f"[tokens, {column.width}]" if column.tokens else f"[{column.width}]"
        raise UsageError(f"{file.path}: {column.name}: the model takes numbers of shape {shape}, the file has {kind}")
    dims: Mapping[str, int] = json.loads((schema.metadata or {}).get(b"mmbeam.dims", b"{}"))
    width = vector.list_size if pa.types.is_fixed_size_list(vector) else dims.get(column.name)
    if width not in (None, column.width):
        raise UsageError(
            f"{file.path}: {column.name} is {width} wide, and the model takes {column.width}; give the features "
            "that it was trained on, or the model that was trained on these"
        )
    origin = origin_of(schema, column.name)
    if column.origin is not None and origin is not None and origin.digest != column.origin.digest:
        raise UsageError(
            f"{file.path}: {column.name} was made by {origin}, and the model takes what {column.origin} makes; give "
            "the features that it was trained on, or the model that was trained on these"
        )


def origin_of(schema: pa.Schema, column: str) -> Origin | None:
    """The model that made a column of features; None if the file, which may be a stranger's, does not say so."""
    named = _COLUMN.fullmatch(column)
    models, digests = _names(schema, b"mmbeam.models"), _names(schema, b"mmbeam.digests")
    prefix = (named and named[1]) or UNNAMED_MODEL
    model, digest = models.get(prefix), digests.get(prefix)
    return Origin(model, digest) if named and isinstance(model, str) and isinstance(digest, str) else None


def _names(schema: pa.Schema, key: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads((schema.metadata or {}).get(key, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _say_unknown(file: Shard, schema: pa.Schema, wanted: Mapping[str, FeatureColumn]) -> None:
    known = {name: column.origin for name, column in wanted.items() if column.origin and name in schema.names}
    for name, origin in known.items():
        if origin_of(schema, name) is None:
            log.warning("%s does not say what made %s; the model takes what %s makes", file.path, name, origin)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


@contextmanager
def opened(file: Shard) -> Iterator[tuple[pq.ParquetFile, ShardStream]]:
    """The Parquet, and the stream it is read from. What is wrong with it, here or in the body, is a ShardError."""
    with open_shard(file) as stream:
        if not stream.seekable():
            raise ShardError(f"{file.path}: a Parquet cannot be read from a server that sends whole files only")
        try:
            with pq.ParquetFile(stream) as parquet:
                yield parquet, stream
        except (MemoryError, PermissionError):
            raise
        except (pa.ArrowException, OSError) as error:
            raise ShardError(f"{file.path}: cannot be read as Parquet: {' '.join(str(error).split())}") from error
