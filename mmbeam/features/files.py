"""The Parquet files of an input of features: listed, checked against a model, and opened.

Two ways to open a file: `open_counted`, through the job's own stream, which counts bytes and reports damage as a
ShardError; and `FeatureFiles` for the data loader, which reads single row groups, local ones as fast as pyarrow can.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from mmbeam.config import MIB
from mmbeam.errors import MissingModalityError, ShardError, UsageError
from mmbeam.features.schema import check_schema, feature_columns, origin_of, warn_of_unknown_origin
from mmbeam.names import FEATURE_SUFFIX, KIND_OF_EXTENSION, SHARD_SUFFIXES
from mmbeam.readers.listing import MAX_REQUESTS, Entry, exists_literally, expand, list_shards
from mmbeam.readers.paths import file_system, is_local, local_path, without_query
from mmbeam.readers.stream import ShardStream, open_shard
from mmbeam.runs.run import DATA, MANIFEST
from mmbeam.types import FeatureColumn, Origin, Shard

STEP_BYTES = 2 * MIB  # decoded per record batch: it is still in the processor's cache when it is copied


def feature_files(inputs: Sequence[str], strict: bool = False, allow_local_paths: bool = False) -> list[Shard]:
    """Return the Parquet files of an input of features, or [] if the input is shards.

    Features are paths and globs that end in .parquet, outputs of a job, and folders with Parquet files and without
    shards and media files, such as OUT/data. `strict` and `allow_local_paths` are those of `list_shards`. Raises
    NoShardsError if no file exists, and UsageError if the input mixes features and shards.
    """
    places = [_parquets_at(entry) for entry in expand(inputs, allow_local_paths)]
    files = [path for paths in places for path in paths or ()]
    if files and None in places:
        raise UsageError("`input`: expected either features (Parquet) or shards, found both")
    return list_shards(files, strict, any_file=True) if files else []


def is_features(file: Shard, if_unreadable: bool = True) -> bool:
    """Return whether a Parquet file holds rows of an mmbeam job; `if_unreadable` if that cannot be told."""
    try:
        with open_counted(file) as (parquet, _):
            return {"key", "shard", "offset"} <= set(parquet.schema_arrow.names)
    except (ShardError, OSError):
        return if_unreadable


def _parquets_at(place: Entry) -> list[Entry] | None:
    """Return the Parquet files of an entry; a glob is returned unchanged. None if it names shards or does not exist."""
    entry = place.url
    plain = without_query(entry).lower()
    is_glob = re.search("[*?[]", entry) is not None and not exists_literally(entry)
    if plain.startswith(("http://", "https://")) or is_glob or plain.endswith(SHARD_SUFFIXES):
        return [place] if plain.endswith(FEATURE_SUFFIX) else None  # a web server cannot list a folder
    try:
        fs, path = file_system(entry)
        if plain.endswith(FEATURE_SUFFIX) and not (isinstance(fs, LocalFileSystem) and fs.isdir(path)):
            return [place]
        fs.invalidate_cache(path)
        names = [name.rstrip("/").rpartition("/")[2] for name in fs.ls(path, detail=False)]
        is_run = fs.exists(f"{path.rstrip('/')}/{MANIFEST}")
        if not is_run and any(name.lower().endswith(SHARD_SUFFIXES) or _is_media(name) for name in names):
            return None
        folder, files = entry.rstrip("/"), _parquets(names)
        if is_run or (not files and DATA in names):
            folder = f"{folder}/{DATA}"
            inner = fs.ls(f"{path.rstrip('/')}/{DATA}", detail=False) if DATA in names else []
            files = _parquets([name.rpartition("/")[2] for name in inner]) or (["*" + FEATURE_SUFFIX] if is_run else [])
        return [place._replace(url=f"{folder}/{name}") for name in files] or None
    except (OSError, ValueError, ImportError):  # list_shards reports what is wrong with the entry
        return None


def _is_media(name: str) -> bool:
    return KIND_OF_EXTENSION.get(name.lower().rpartition(".")[2]) in ("image", "audio", "video")


def _parquets(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.lower().endswith(FEATURE_SUFFIX))


def check_columns(files: Sequence[Shard], columns: Iterable[FeatureColumn]) -> None:
    """Check that every column is in at least one file, and fits the model. Damaged files are skipped: their unit fails.

    Raises MissingModalityError if a column is in no file, UsageError if its width or its model differs, or if the files
    lack the columns that identify a sample (key, shard, offset), ShardError if no file can be read.
    """
    wanted = {column.name: column for column in columns}
    known: dict[str, None] = {}
    errors: list[ShardError] = []
    for file in files:
        try:
            with open_counted(file) as (parquet, _):
                schema = parquet.schema_arrow
        except ShardError as error:
            errors.append(error)
            continue
        check_schema(file.path, schema, wanted)
        if not known:
            for name in wanted.keys() & set(schema.names):
                warn_of_unknown_origin(file.path, name, wanted[name].origin, origin_of(schema, name))
        known |= dict.fromkeys(schema.names)
        if wanted.keys() <= known.keys():
            return
    if len(errors) == len(files):
        raise errors[0]
    missing = [name for name in wanted if name not in known]
    raise MissingModalityError(
        f"expected {' and '.join(missing)}, which the model takes, in a file of the input; found {', '.join(known)}"
    )


@contextmanager
def open_counted(file: Shard) -> Iterator[tuple[pq.ParquetFile, ShardStream]]:
    """Open a Parquet file; yield it and the stream that counts its bytes. Damage is a ShardError, in the body too."""
    with open_shard(file) as stream:
        if not stream.seekable():
            raise ShardError(
                f"{file.path}: expected a server with range requests, as Parquet needs; copy the file to this machine"
            )
        try:
            with pq.ParquetFile(stream) as parquet:
                yield parquet, stream
        except (MemoryError, PermissionError):
            raise
        except (pa.ArrowException, OSError) as error:
            raise ShardError(f"{file.path}: cannot be read as Parquet: {' '.join(str(error).split())}") from error


def check_sizes(path: str, parquet: pq.ParquetFile, features: Iterable[FeatureColumn], max_bytes: int) -> None:
    """Raise ShardError if a row group has more numbers in a column of features than its vectors can hold.

    Lists of one number repeated take next to nothing in a file, so the sizes in its footer show nothing. A column of
    tokens, and one of vectors of the wrong width, may have `max_bytes` in a row group.
    """
    columns = {feature.name: feature for feature in features}
    leaves = [parquet.schema.column(index).path.partition(".")[0] for index in range(len(parquet.schema))]
    for number in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(number)
        for index, feature in ((index, columns[name]) for index, name in enumerate(leaves) if name in columns):
            size = {"FLOAT": 4, "DOUBLE": 8}.get(parquet.schema.column(index).physical_type, 2)
            nbytes = group.column(index).num_values * size
            expected = 0 if feature.tokens else group.num_rows * max(1, feature.width) * size
            if nbytes > max(expected, max_bytes):
                raise ShardError(
                    f"{path}: row group {number} has {nbytes / 1e6:,.0f} MB of {feature.name}, expected at most "
                    f"{max(expected, max_bytes) / 1e6:,.0f} MB; write smaller row groups, or raise --max-decode-bytes"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroup:
    """A row group of a file, which is decoded as a whole."""

    file: Shard
    index: int  # in its file
    rows: int
    nbytes: int  # of the columns that are read, decompressed
    vectors: tuple[int, ...]  # upper bounds on the number of vectors of each feature


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureFiles:
    """The row groups of Parquet files with one schema, and the columns to read."""

    features: tuple[FeatureColumn, ...]
    columns: tuple[str, ...]  # other columns to read
    groups: tuple[RowGroup, ...]  # in order, without empty ones

    @classmethod
    def open(
        cls,
        paths: Sequence[str],
        features: Sequence[str] | None,
        columns: Sequence[str],
        allow_local_paths: bool = False,
    ) -> Self:
        """List the files and read their footers.

        `paths` are outputs of a job, folders, globs and files. `features` are the columns of vectors to read; None
        for every column of pooled vectors. `allow_local_paths` is that of `list_shards`.

        Raises NoShardsError if no file exists, and UsageError if a file is not Parquet, lacks a column, or has vectors
        of another width, type or model than the first file.
        """
        entries = [file for entry in expand(paths, allow_local_paths) for file in _parquets_at(entry) or [entry]]
        files = list_shards(entries, any_file=True)
        with ThreadPoolExecutor(MAX_REQUESTS) as pool:
            footers = list(pool.map(lambda file: _read_footer(file, features, columns), files))
        expected = [replace(feature, origin=None) for feature in footers[0][0]]
        origins: dict[str, Origin] = {}
        for file, (features_of_file, _) in zip(files, footers, strict=True):
            if [replace(feature, origin=None) for feature in features_of_file] != expected:
                raise UsageError(
                    f"{file.path}: has {_names(features_of_file)}, but {files[0].path} has "
                    f"{_names(expected)}; pass features of one run, or name the columns that all files have"
                )
            for feature in features_of_file:
                if feature.origin is None:
                    continue
                known = origins.setdefault(feature.name, feature.origin)
                if feature.origin.digest != known.digest:
                    raise UsageError(
                        f"{file.path}: {feature.name} was made by {feature.origin}, but in another file by "
                        f"{known}; pass features of one model"
                    )
        return cls(
            features=tuple(replace(feature, origin=origins.get(feature.name)) for feature in expected),
            columns=tuple(columns),
            groups=tuple(group for _, groups in footers for group in groups),
        )

    def read(self, group: RowGroup, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a group, about 2 MiB at a time, with `columns`, or with all columns of this object."""
        names = [*(feature.name for feature in self.features), *self.columns] if columns is None else list(columns)
        step = max(64, STEP_BYTES * group.rows // max(group.nbytes, 1))
        with open_parquet(group.file) as file:
            yield from file.iter_batches(step, row_groups=[group.index], columns=names, use_threads=False)


@contextmanager
def open_parquet(file: Shard) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for the data loader. A file that is not local is prefetched, and read like a shard.

    Raises UsageError if it is not a Parquet file, ShardError if it stays unreadable or has changed.
    """
    local = is_local(file.url)
    with nullcontext(local_path(file.url)) if local else open_shard(file) as source, ExitStack() as opened:
        try:
            parquet = opened.enter_context(pq.ParquetFile(source, pre_buffer=not local))
        except (FileNotFoundError, PermissionError, MemoryError):
            raise
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"{file.path}: expected a Parquet file ({error})") from None
        yield parquet


def _read_footer(
    file: Shard, names: Sequence[str] | None, columns: Sequence[str]
) -> tuple[tuple[FeatureColumn, ...], list[RowGroup]]:
    """Return the columns `names` of features and the row groups of a file. Raises UsageError for a missing column."""
    with open_parquet(file) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
        missing = [name for name in (*(names or ()), *columns) if name not in schema.names]
        if missing:
            raise UsageError(f"{file.path}: expected columns {', '.join(missing)}, found {', '.join(schema.names)}")
        features = feature_columns(schema, names, file.path)
        read = {*(feature.name for feature in features), *columns}
        leaves = [parquet.schema.column(i).path.partition(".")[0] for i in range(len(parquet.schema))]
        groups = []
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            chunks = {name: group.column(i) for i, name in enumerate(leaves) if name in read}
            if group.num_rows:
                groups.append(
                    RowGroup(
                        file=file,
                        index=index,
                        rows=group.num_rows,
                        nbytes=sum(chunk.total_uncompressed_size for chunk in chunks.values()),
                        vectors=tuple(chunks[feature.name].num_values // feature.width for feature in features),
                    )
                )
    return features, groups


def _names(features: Sequence[FeatureColumn]) -> str:
    return ", ".join(f"{feature.name} [{feature.width}] {feature.dtype}" for feature in features)
