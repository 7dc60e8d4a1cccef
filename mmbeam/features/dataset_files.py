"""The Parquet files that `mmbeam embed` wrote, seen from their footers: columns of vectors and row groups.

No row is read here but on request, a record batch at a time, and torch is not needed.
"""

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from mmbeam.config import MIB
from mmbeam.errors import NoShardsError, UsageError
from mmbeam.features.files import origin_of
from mmbeam.readers.listing import MAX_REQUESTS, expand
from mmbeam.readers.paths import public_path
from mmbeam.types import Origin

# What is decoded at once: it should still lie in the processor's cache when it is copied into its place.
STEP_BYTES = 2 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFeature:
    """A column of vectors, [width] per row, or of token sequences, [tokens, width]."""

    name: str
    width: int
    tokens: bool
    dtype: npt.DTypeLike
    origin: Origin | None = field(default=None, compare=False)  # the model that made it, if the files say so


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroup:
    """What is decoded as a whole."""

    url: str = field(repr=False)
    index: int  # in its file
    rows: int
    nbytes: int  # of the columns that are read, decompressed
    vectors: tuple[int, ...]  # at most so many of each feature


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureFiles:
    """Parquet files of one schema, and what is read of them."""

    features: tuple[StoredFeature, ...]
    columns: tuple[str, ...]  # others that are read
    groups: tuple[RowGroup, ...]  # in order; none is empty

    @classmethod
    def open(cls, paths: Sequence[str], features: Sequence[str] | None, columns: Sequence[str]) -> Self:
        """List the files and read their footers.

        `features` are the columns of vectors to read, None for every one that `mmbeam.dims` names. Raises
        NoShardsError if there is no file, UsageError if one is no Parquet, lacks a column, or has vectors of
        another width, type or model than the first.
        """
        urls = list_files(paths)
        with ThreadPoolExecutor(MAX_REQUESTS) as pool:
            found = list(pool.map(lambda url: _look_at(url, features, columns), urls))
        return cls(
            features=_shared(urls, [features for features, _ in found]),
            columns=tuple(columns),
            groups=tuple(group for _, groups in found for group in groups),
        )

    def read(self, group: RowGroup, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The group's rows, a few MiB at a time: of every column that was asked for, or of some."""
        names = [*(feature.name for feature in self.features), *self.columns] if columns is None else list(columns)
        step = max(64, STEP_BYTES * group.rows // max(group.nbytes, 1))
        with _open(group.url) as file:
            yield from file.iter_batches(step, row_groups=[group.index], columns=names, use_threads=False)


def list_files(paths: Sequence[str]) -> list[str]:
    """The Parquet files that outputs, folders, globs and paths name, each once; those of a folder sorted by name."""
    found = dict.fromkeys(url for entry in expand(paths) for url in _list(entry))
    if not found:
        looked = ", ".join(map(public_path, paths))
        raise NoShardsError(f"no Parquet file found in {looked or 'no path'}; expected the output of mmbeam embed")
    return list(found)


def _list(entry: str) -> list[str]:
    fs, path = url_to_fs(entry)
    if entry.startswith(("http://", "https://")):  # a server lists nothing, and asking it may fetch the file
        return [entry]
    if fs.isdir(path):
        folder = path.rstrip("/")
        names = _parquets(fs, f"{folder}/data") or _parquets(fs, folder)
    elif re.search("[*?[]", path):
        names = fs.glob(path)
    else:
        return [entry]
    return [fs.unstrip_protocol(name) for name in sorted(names)]


def _parquets(fs: Any, folder: str) -> list[str]:
    try:
        names: list[str] = fs.ls(folder, detail=False)
    except FileNotFoundError:
        return []
    return [name for name in names if name.endswith(".parquet")]


def _open(url: str) -> pq.ParquetFile:
    fs, path = url_to_fs(url)
    local = isinstance(fs, LocalFileSystem)
    try:
        return pq.ParquetFile(path, filesystem=None if local else fs, pre_buffer=not local)
    except pa.ArrowInvalid as error:
        raise UsageError(f"{public_path(url)}: expected a Parquet file ({error})") from None


def _look_at(
    url: str, names: Sequence[str] | None, columns: Sequence[str]
) -> tuple[tuple[StoredFeature, ...], list[RowGroup]]:
    with _open(url) as file:
        features = _features(file.schema_arrow, names, columns, public_path(url))
        read = {*(feature.name for feature in features), *columns}
        leaves = [file.schema.column(i).path.partition(".")[0] for i in range(len(file.schema))]
        wanted = {i: name for i, name in enumerate(leaves) if name in read}
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        found = [_row_group(url, i, group, wanted, features) for i, group in enumerate(groups) if group.num_rows]
    return features, found


def _shared(urls: Sequence[str], found: Sequence[tuple[StoredFeature, ...]]) -> tuple[StoredFeature, ...]:
    """The features of all files, which must be the same; each with its model, if any file names one."""
    for url, features in zip(urls, found, strict=True):
        if features != found[0]:
            raise UsageError(
                f"{public_path(url)}: has {_names(features)}, but {public_path(urls[0])} has {_names(found[0])}; "
                "give features of one run, or name the columns that they share"
            )
    return tuple(_with_origin(urls, of_files) for of_files in zip(*found, strict=True))


def _with_origin(urls: Sequence[str], of_files: Sequence[StoredFeature]) -> StoredFeature:
    known = [(url, stored.origin) for url, stored in zip(urls, of_files, strict=True) if stored.origin is not None]
    for url, origin in known:
        if origin.digest != known[0][1].digest:
            raise UsageError(
                f"{public_path(url)}: {of_files[0].name} was made by {origin}, but in {public_path(known[0][0])} by "
                f"{known[0][1]}; give features of one model"
            )
    return replace(of_files[0], origin=known[0][1] if known else None)


def _row_group(url: str, index: int, group: Any, wanted: dict[int, str], features: Sequence[StoredFeature]) -> RowGroup:
    chunks = {name: group.column(i) for i, name in wanted.items()}
    return RowGroup(
        url=url,
        index=index,
        rows=group.num_rows,
        nbytes=sum(chunk.total_uncompressed_size for chunk in chunks.values()),
        vectors=tuple(chunks[feature.name].num_values // feature.width for feature in features),
    )


def _features(
    schema: pa.Schema, names: Sequence[str] | None, columns: Sequence[str], where: str
) -> tuple[StoredFeature, ...]:
    dims: dict[str, int] = json.loads((schema.metadata or {}).get(b"mmbeam.dims", b"{}"))
    missing = [name for name in (*(names or ()), *columns) if name not in schema.names]
    if missing:
        raise UsageError(f"{where}: has no column {', '.join(missing)}; there are {', '.join(schema.names)}")
    features = tuple(
        replace(_feature(name, schema.field(name).type, dims, where), origin=origin_of(schema, name))
        for name in (dims if names is None else names)
    )
    if not features:
        raise UsageError(
            f"{where}: names no vectors in mmbeam.dims; expected a file of mmbeam embed, or columns by name"
        )
    return features


def _feature(name: str, kind: pa.DataType, dims: dict[str, int], where: str) -> StoredFeature:
    inner = kind.value_type if pa.types.is_list(kind) else None
    if inner is not None and pa.types.is_fixed_size_list(inner) and pa.types.is_floating(inner.value_type):
        dtype = np.dtype(inner.value_type.to_pandas_dtype())
        return StoredFeature(name=name, width=inner.list_size, tokens=True, dtype=dtype)
    if inner is not None and pa.types.is_floating(inner) and name in dims:
        return StoredFeature(name=name, width=dims[name], tokens=False, dtype=np.dtype(inner.to_pandas_dtype()))
    raise UsageError(
        f"{where}: column {name} is {kind}; expected list<float> with a width in mmbeam.dims "
        f"({', '.join(dims) or 'which names none'}), or list<fixed_size_list<float>>"
    )


def _names(features: Sequence[StoredFeature]) -> str:
    return ", ".join(f"{feature.name} [{feature.width}] {feature.dtype}" for feature in features)
