"""The data loader of precomputed features: batches of tensors from the Parquet files that `mmbeam embed` wrote.

The order of an epoch: the row groups are permuted; their rows, in that order, are divided among ranks and workers into
ranges of equal size; each worker reads its row groups into a buffer and permutes the rows in the buffer. The position
of a batch is therefore the number of its buffer and its first row there, and resuming reads no more than that buffer.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import distributed
from torch.nn.functional import pad
from torch.utils.data import IterableDataset, get_worker_info

from mmbeam.config import MIB
from mmbeam.errors import UsageError
from mmbeam.features.captions import CaptionReader, Captions
from mmbeam.features.files import FeatureFiles, RowGroup
from mmbeam.names import SPLITS, Split
from mmbeam.types import FeatureColumn

CAPTION = "caption"  # key of the captions in a batch

FeatureBatch = dict[str, Any]  # by column: float tensors, and their masks under column + "_mask"; else lists
Order = npt.NDArray[np.int64]  # [rows]
Fractions = tuple[float, float, float]  # fractions of train, validation and test; their sum is 1

SPLIT_FRACTIONS: Fractions = (0.9, 0.05, 0.05)
_HASH_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureCounts:
    """Numbers of rows in a data set, over all ranks and workers."""

    rows: int  # in an epoch
    without_caption: int  # rows of the split that are skipped


class FeatureDataset(IterableDataset[FeatureBatch]):
    """Batches of precomputed features, with captions and other columns.

    A batch is a dict. A column of vectors is a float tensor [B, width] with a mask `NAME_mask`, bool [B]. A column of
    token sequences is [B, T, width] with a mask [B, T], where T is the longest sequence of the batch. Missing values
    are zeros with a mask of False. Other columns, and "caption", are lists of B values.

    >>> from torch.utils.data import DataLoader
    >>> from mmbeam.features import FeatureDataset
    >>> dataset = FeatureDataset("out", batch_size=4, columns=["key"], seed=7)
    >>> loader = DataLoader(dataset, batch_size=None, num_workers=1)
    >>> for epoch in range(2):
    ...     dataset.set_epoch(epoch)
    ...     for batch in loader:
    ...         image, present = batch["image_embedding"], batch["image_embedding_mask"]
    >>> image.shape[1] == dataset.features["image_embedding"].width
    True

    Every row occurs once per epoch over all ranks and DataLoader workers. The numbers of rows of two ranks differ by
    at most one, not counting rows that `split` and `captions` skip. A loop with collective operations must handle ranks
    with different numbers of batches.

    To resume, call `state_dict()` after any batch, and later `load_state_dict()` on a data set with the same arguments:
    it continues with the next batch. Every DataLoader worker has a state of its own, which torchdata's
    StatefulDataLoader saves.

    Memory per worker: `buffer_bytes`, a row group, and the captions' file.
    """

    def __init__(
        self,
        paths: str | Sequence[str],
        *,
        batch_size: int,
        features: Sequence[str] | None = None,
        columns: Sequence[str] = (),
        captions: Captions | None = None,
        allow_local_paths: bool = False,
        split: Split | None = None,
        split_fractions: Fractions = SPLIT_FRACTIONS,
        split_seed: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        buffer_bytes: int = 256 * MIB,
        drop_last: bool = False,
        dtype: torch.dtype | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """Read the footers of all files. With `captions`, check that at least one row has a caption.

        Args:
            paths: outputs of `mmbeam embed`, folders, globs or Parquet files; local or any URL that fsspec opens.
            batch_size: rows per batch; the last batch of each worker is smaller, or dropped with `drop_last`.
            features: columns of vectors or tokens; None for every column of pooled vectors.
            columns: other columns, returned as lists.
            captions: location of the captions; rows without a caption are skipped (`count` returns their number).
            allow_local_paths: whether lists of files that are fetched may name local paths, other servers and buckets.
            split, split_fractions, split_seed: the split to read, by a hash of the key (split_of); None for all rows.
            shuffle, seed: whether each epoch has a new random order, a function of `seed`; or else the files' order.
            buffer_bytes: decompressed size of the rows that are shuffled together; a larger buffer shuffles better.
            dtype: of the values; None for the dtype in which they are stored.
            rank, world_size: None for the values of torch.distributed if it is initialised, else 0 and 1.

        Files in a store are read like shards: after a fault, a request is repeated for up to 60 seconds, and a file
        that is replaced while it is read is a ShardError.

        Raises NoShardsError if no file exists, and UsageError for files or columns that cannot be read as features, for
        contradictory arguments, and if no row has a caption.
        """
        if batch_size < 1 or buffer_bytes < 1 or seed < 0:
            raise UsageError(
                "expected `batch_size` and `buffer_bytes` of at least 1, and a `seed` of at least 0, found "
                f"{batch_size}, {buffer_bytes} and {seed}"
            )
        self._rank, self._world_size = _rank_and_world_size(rank, world_size)
        self._batch_size, self._drop_last, self._dtype = batch_size, drop_last, dtype
        self._seed = seed if shuffle else None
        self._buffer_bytes = buffer_bytes if shuffle else 1
        if split is not None:
            check_split_fractions(split_fractions)
        self._rows = _SelectedRows(
            [paths] if isinstance(paths, str) else paths,
            features,
            columns,
            captions,
            None if split is None else (split, split_seed, split_fractions),
            allow_local_paths,
        )
        self._arguments = {
            "files": _digest(self._rows.files),
            "features": sorted(self.features),
            "columns": sorted(self._rows.columns),
            "captions": str(captions),
            "split": [split, *split_fractions, split_seed],
            "batch_size": batch_size,
            "drop_last": drop_last,
            "seed": self._seed,
            "buffer_bytes": self._buffer_bytes,
        }
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # persistent workers must see it change
        self._position = (0, 0)  # number of the buffer, and of the row in it, with which the next batch begins
        self._resume: tuple[int, int] | None = None  # a position loaded by load_state_dict

    @property
    def features(self) -> Mapping[str, FeatureColumn]:
        """The columns of vectors and tokens, by name."""
        return {feature.name: feature for feature in self._rows.files.features}

    @property
    def epoch(self) -> int:
        """The epoch of the next iteration."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration. Unless it is changed, every iteration has the same order."""
        if epoch != self.epoch:
            self._position, self._resume = (0, 0), None
        self._epoch.fill_(epoch)

    def count(self) -> FeatureCounts:
        """Count the rows of an epoch, over all ranks. Reads all keys and captions if rows are selected by them."""
        return self._rows.count()

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch, as JSON values."""
        buffer, row = self._resume or self._position
        return {"epoch": self.epoch, "buffer": buffer, "row": row, "dataset": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state` in the next iteration.

        Raises UsageError if the state was saved by a data set with other files, arguments, ranks or workers.
        """
        saved = state["dataset"]
        if "share" in saved:  # the name of `reader` in mmbeam 0.1
            saved = {**saved, "reader": saved["share"]}
        for name, expected in self._identity().items():
            if saved.get(name) != expected:
                raise UsageError(f"the state is of a data set with {name} {saved.get(name)}; expected {expected}")
        self.set_epoch(state["epoch"])
        buffer = state["buffer"] if "buffer" in state else state["window"]  # the name in mmbeam 0.1
        self._resume = buffer, state["row"]

    def __iter__(self) -> Iterator[FeatureBatch]:
        self._position, self._resume = self._resume or (0, 0), None
        parts: list[FeatureBatch] = []
        missing = self._batch_size
        for number, buffer, begin in self._buffers(*self._position):
            while begin < buffer.rows:
                end = min(begin + missing, buffer.rows)
                parts.append(buffer.batch(begin, end))
                missing, begin = missing - (end - begin), end
                if not missing:
                    self._position = number, begin
                    yield self._finish(parts)
                    parts, missing = [], self._batch_size
        if parts and not self._drop_last:
            self._position = number + 1, 0
            yield self._finish(parts)

    def _buffers(self, start: int, row: int) -> Iterator[tuple[int, "RowBuffer", int]]:
        """Yield (number, buffer, first row) from buffer `start` on. Every item is the same RowBuffer, filled again."""
        epoch, (reader, num_readers) = self.epoch, self._reader()
        files, groups = self._rows.files, self._rows.files.groups
        order = self._order(epoch)(len(groups)).tolist()
        pieces = pieces_of([group.rows for group in groups], order, reader, num_readers)
        fills = list(fills_of(pieces, [group.nbytes for group in groups], self._buffer_bytes))[start:]
        capacities = [
            max((sum(groups[piece.group].vectors[i] for piece in fill) for fill in fills), default=0)
            for i in range(len(files.features))
        ]
        buffer = RowBuffer(files.features, capacities, self._rows.columns)
        for number, fill in enumerate(fills, start):
            rows = (batch for piece in fill for batch in self._rows.read(piece))
            buffer.fill(rows, self._order(epoch, reader, number))
            yield number, buffer, row if number == start else 0

    def _order(self, *numbers: int) -> Callable[[int], Order]:
        """Return a function from a number of rows to their order, determined by the seed and `numbers`."""
        if self._seed is None:
            return np.arange
        return np.random.default_rng((len(numbers), self._seed, *numbers)).permutation

    def _reader(self) -> tuple[int, int]:
        """Return the number of this reader, a DataLoader worker of a rank, and the number of readers."""
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return self._rank * workers + number, self._world_size * workers

    def _identity(self) -> dict[str, Any]:
        """Return the arguments, files and reader, which must be equal to resume."""
        return {**self._arguments, "reader": list(self._reader())}

    def _finish(self, parts: Sequence[FeatureBatch]) -> FeatureBatch:
        batch = parts[0] if len(parts) == 1 else {name: _join([part[name] for part in parts]) for name in parts[0]}
        if self._dtype is not None:
            batch |= {name: batch[name].to(self._dtype) for name in self.features}
        return batch


def _rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return the arguments, or by default the values of torch.distributed. Raises UsageError for invalid ones."""
    if rank is None and world_size is None:
        ready = distributed.is_available() and distributed.is_initialized()
        return (distributed.get_rank(), distributed.get_world_size()) if ready else (0, 1)
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise UsageError(
            f"expected both or neither of `rank` and `world_size`, and a rank below the world size, found {rank} of "
            f"{world_size}"
        )
    return rank, world_size


def _digest(files: FeatureFiles) -> str:
    """Identify a set of files by their names and row groups, independently of their folder."""
    groups = [[PurePosixPath(group.file.url).name, group.index, group.rows, group.nbytes] for group in files.groups]
    return hashlib.sha256(json.dumps(groups).encode()).hexdigest()[:16]


def _join(values: Sequence[Any]) -> Any:
    """Concatenate the rows of one column, with token sequences padded to the longest."""
    if isinstance(values[0], list):
        return [item for value in values for item in value]
    if len({value.shape[1:] for value in values}) == 1:
        return torch.cat(list(values))
    longest = max(value.shape[1] for value in values)  # [B, T, width] or a mask [B, T]
    return torch.cat([pad(value, (0, 0) * (value.ndim - 2) + (0, longest - value.shape[1])) for value in values])


# The rows to read


def split_of(key: str, seed: int, split_fractions: Fractions) -> Split:
    """Return the split of a key, which depends only on the key, `seed` and `split_fractions`.

    The 8-byte BLAKE2b hash of the key, salted with `seed` (0 to 2^64 - 1), divided by 2^64, is a number in [0, 1). The
    splits are consecutive intervals of it in proportion to `split_fractions`. Raises UsageError for invalid
    fractions.
    """
    check_split_fractions(split_fractions)
    return next(splits_of((key,), seed, split_fractions))


def splits_of(keys: Iterable[str], seed: int, split_fractions: Fractions) -> Iterator[Split]:
    """Yield `split_of` of each key, at a microsecond per key. The fractions are not checked."""
    salt = seed.to_bytes(_HASH_BYTES, "big")
    train = split_fractions[0] * 2.0 ** (8 * _HASH_BYTES)
    validation = (1 - split_fractions[2]) * 2.0 ** (8 * _HASH_BYTES)
    for key in keys:
        data = key.encode("utf-8", "backslashreplace")  # as runs/rows.py stores a key with lone surrogates
        number = int.from_bytes(blake2b(data, digest_size=_HASH_BYTES, salt=salt).digest(), "big")
        yield SPLITS[(number >= train) + (number >= validation)]


def check_split_fractions(split_fractions: Fractions) -> None:
    """Raise UsageError unless `split_fractions` are three fractions that sum to 1."""
    if (
        len(split_fractions) != len(SPLITS)
        or min(split_fractions) < 0
        or not math.isclose(sum(split_fractions), 1, abs_tol=1e-9)
    ):
        raise UsageError(
            f"`split_fractions` {split_fractions}: expected fractions of {', '.join(SPLITS)}, 0 or more, that sum to 1"
        )


class Piece(NamedTuple):
    """Rows [begin, end) of the row group `group`."""

    group: int
    begin: int
    end: int


def pieces_of(rows: Sequence[int], order: Sequence[int], reader: int, num_readers: int) -> list[Piece]:
    """Return the pieces of the rows that reader `reader` of `num_readers` reads.

    The row groups, of `rows` rows each, are concatenated in `order`, and their rows are divided into `num_readers`
    ranges of equal size (to within a row). A row group on the border of two ranges is decoded by both readers.
    """
    total = sum(rows)
    first, last = total * reader // num_readers, total * (reader + 1) // num_readers
    pieces, start = [], 0
    for group in order:
        begin, end = max(first - start, 0), min(last - start, rows[group])
        if begin < end:
            pieces.append(Piece(group, begin, end))
        start += rows[group]
    return pieces


def fills_of(pieces: Sequence[Piece], sizes: Sequence[int], limit: int) -> Iterator[list[Piece]]:
    """Yield the pieces that fill the buffer each time: until the `sizes` of their row groups add up to `limit`."""
    fill: list[Piece] = []
    size = 0
    for piece in pieces:
        fill.append(piece)
        size += sizes[piece.group]
        if size >= limit:
            yield fill
            fill, size = [], 0
    if fill:
        yield fill


def units_of_rank(order: Sequence[int], rank: int, world_size: int) -> tuple[list[int], list[int]]:
    """Return the units that only this rank reads, and the units that all ranks read, both in `order`.

    All ranks have the same number of exclusive units. The shared units are the remainder, fewer than the ranks; of
    these each rank decodes the samples that `rank_of` assigns to it.
    """
    whole = len(order) - len(order) % world_size
    return list(order[rank:whole:world_size]), list(order[whole:])


def rank_of(key: str, world_size: int) -> int:
    """Return the rank that decodes a sample of a shared unit: a hash of its key, independent of `split_of`."""
    digest = blake2b(key.encode("utf-8", "backslashreplace"), digest_size=8, person=b"rank").digest()
    return int.from_bytes(digest, "big") % world_size


class _SelectedRows:
    """The rows to read: all, or the rows of a split; with `captions`, only rows with a caption."""

    def __init__(
        self,
        paths: Sequence[str],
        features: Sequence[str] | None,
        columns: Sequence[str],
        captions: Captions | None,
        split: tuple[Split, int, Fractions] | None,  # with the seed and the fractions
        allow_local_paths: bool,
    ) -> None:
        if captions is not None and CAPTION in columns:
            raise UsageError(f"`columns` names {CAPTION!r}, which is where `captions` go; omit one of the two")
        self._captions = None if captions is None else CaptionReader(captions)
        self._split = split
        # Columns that decide whether a row is selected.
        self._selection_columns = {*(["key"] if split else []), *([self._captions.column] if self._captions else [])}
        needed = sorted({*columns, *self._selection_columns})
        self.files = FeatureFiles.open(paths, features, needed, allow_local_paths)
        self.columns = (*columns, *([CAPTION] if captions else []))
        if captions is not None and not any(self._has_caption(group) for group in self.files.groups):
            rows = sum(group.rows for group in self.files.groups)
            raise UsageError(f"none of the {rows:,} rows has a caption; expected it in {captions}")

    def read(self, piece: Piece) -> Iterator[pa.RecordBatch]:
        """Yield the selected rows of a piece, in order, with the columns of features and `columns`."""
        start = 0
        for batch in self.files.read(self.files.groups[piece.group]):
            begin, end = max(piece.begin - start, 0), min(piece.end - start, batch.num_rows)
            start += batch.num_rows
            if begin >= end:
                continue
            rows = self._of_split(batch.slice(begin, end - begin))
            if self._captions is not None:
                captions = self._captions.of(rows)
                values = {name: rows[name] for name in rows.schema.names} | {CAPTION: pa.array(captions, pa.string())}
                rows = _keep(pa.RecordBatch.from_pydict(values), [caption is not None for caption in captions])
            yield rows

    def count(self) -> FeatureCounts:
        """Count the selected rows. Reads keys and captions, if rows are selected by them."""
        if not self._selection_columns:
            return FeatureCounts(rows=sum(group.rows for group in self.files.groups), without_caption=0)
        rows = without = 0
        for group in self.files.groups:
            for batch in map(self._of_split, self.files.read(group, sorted(self._selection_columns))):
                rows += batch.num_rows
                without += 0 if self._captions is None else self._captions.of(batch).count(None)
        return FeatureCounts(rows=rows - without, without_caption=without)

    def _has_caption(self, group: RowGroup) -> bool:
        assert self._captions is not None
        batches = self.files.read(group, [self._captions.column])
        return any(caption is not None for batch in batches for caption in self._captions.of(batch))

    def _of_split(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if self._split is None:
            return batch
        wanted, seed, split_fractions = self._split
        return _keep(batch, [split == wanted for split in splits_of(batch["key"].to_pylist(), seed, split_fractions)])


def _keep(batch: pa.RecordBatch, mask: Sequence[bool]) -> pa.RecordBatch:
    return batch if all(mask) else batch.filter(pa.array(mask, pa.bool_()))


# Rows in memory


class RowBuffer:
    """The rows of a few row groups, returned as batches of tensors in any order.

    It is filled repeatedly, and its memory is set by the largest filling. `capacities` are upper bounds on the number
    of vectors of each feature in a filling.
    """

    def __init__(self, features: Sequence[FeatureColumn], capacities: Sequence[int], columns: Sequence[str]) -> None:
        self._features = [_Vectors(feature, size) for feature, size in zip(features, capacities, strict=True)]
        self._columns: dict[str, pa.ChunkedArray] = dict.fromkeys(columns)
        self.rows = 0

    def fill(self, batches: Iterable[pa.RecordBatch], order: Callable[[int], Order]) -> None:
        """Replace the rows by those of `batches`. `order` returns the permutation of a number of rows."""
        chunks: dict[str, list[pa.Array]] = {name: [] for name in self._columns}
        self.rows = 0
        for vectors in self._features:
            vectors.clear()
        for batch in batches:
            self.rows += batch.num_rows
            for vectors in self._features:
                vectors.append(batch[vectors.feature.name])
            for name, arrays in chunks.items():
                arrays.append(batch[name])
        places = order(self.rows)
        for vectors in self._features:
            vectors.arrange(places)
        if self.rows:
            self._columns = {name: pa.chunked_array(arrays).take(places) for name, arrays in chunks.items()}

    def batch(self, begin: int, end: int) -> FeatureBatch:
        """Return a copy of the rows [begin, end) in the order of the filling."""
        batch: FeatureBatch = {}
        for vectors in self._features:
            name = vectors.feature.name
            batch[name], batch[f"{name}_mask"] = vectors.gather(begin, end)
        return batch | {name: column[begin:end].to_pylist() for name, column in self._columns.items()}


class _Vectors:
    """The vectors of one feature in the buffer. The vector at index 0 is zeros and represents missing values."""

    def __init__(self, feature: FeatureColumn, capacity: int) -> None:
        self.feature = feature
        self._values = np.empty((1 + capacity, feature.width), feature.dtype)
        self._values[0] = 0
        self._tensor = torch.from_numpy(self._values)
        self.clear()

    def clear(self) -> None:
        self._end = 1
        self._places: list[Order] = []
        self._counts: list[Order] = []

    def append(self, rows: pa.ListArray) -> None:
        """Copy the rows' vectors to the end, and record where each row's vectors are."""
        feature = self.feature
        ends = rows.offsets.to_numpy().astype(np.int64)
        valid = rows.is_valid().to_numpy(zero_copy_only=False)
        lengths, unit = np.diff(ends), 1 if feature.tokens else feature.width
        wrong = lengths[valid & (lengths != feature.width)]
        if not feature.tokens and len(wrong):
            raise UsageError(
                f"column {feature.name}: expected vectors of {feature.width} numbers, found one of {wrong[0]}"
            )
        if rows.values.null_count or (feature.tokens and rows.values.values.null_count):
            raise UsageError(
                f"column {feature.name}: expected no null inside a vector, found one; a whole vector may be null"
            )
        counts = np.where(valid, lengths // unit, 0)
        values = rows.values.slice(ends[0], ends[-1] - ends[0])
        numbers = values.flatten() if feature.tokens else values
        vectors = numbers.to_numpy().reshape(-1, feature.width)
        self._values[self._end : self._end + len(vectors)] = vectors
        self._places.append(np.where(counts > 0, (ends[:-1] - ends[0]) // unit + self._end, 0))
        self._counts.append(counts)
        self._end += len(vectors)

    def arrange(self, order: Order) -> None:
        """Set the order in which `gather` numbers the rows."""
        none = np.empty(0, np.int64)
        self._place = torch.from_numpy(np.concatenate([none, *self._places])[order])
        self._count = torch.from_numpy(np.concatenate([none, *self._counts])[order])

    def gather(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return values [B, width] and mask [B] of these rows; for tokens [B, T, width] and [B, T], T at least 1."""
        places, counts = self._place[begin:end], self._count[begin:end]
        if not self.feature.tokens:
            return self._tensor.index_select(0, places), counts > 0
        steps = torch.arange(max(1, int(counts.max())))
        mask = steps < counts[:, None]
        places = torch.where(mask, places[:, None] + steps, 0)
        return self._tensor.index_select(0, places.reshape(-1)).view(*mask.shape, self.feature.width), mask
