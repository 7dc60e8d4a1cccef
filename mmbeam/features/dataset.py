"""The loader of pre-computed features: batches of tensors from the Parquet that `mmbeam embed` wrote.

The order of an epoch: the row groups are permuted; the rows, so ordered, are dealt out to ranks and workers
in ranges of equal size; each takes its row groups in windows, and permutes the rows of a window. So a batch
is known by its window and its first row there, and going on from it needs no more than that window.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.utils.data import IterableDataset, get_worker_info

from mmbeam.config import MIB
from mmbeam.errors import UsageError
from mmbeam.features.captions import Captions
from mmbeam.features.dataset_files import FeatureFiles, StoredFeature
from mmbeam.features.dataset_rows import FeatureCounts, FeatureRows, SplitSelection
from mmbeam.features.order import Piece, pieces_of, windows_of
from mmbeam.features.split import SHARES, Shares
from mmbeam.features.window import FeatureBatch, Order, Window, join
from mmbeam.names import Split


class FeatureDataset(IterableDataset[FeatureBatch]):
    """Batches of pre-computed embeddings, with captions and other columns beside them.

    A batch is a dict: for each feature `name` a float tensor [B, width] and `name_mask`, bool [B]; for one
    of tokens [B, T, width] and [B, T], T being the longest of the batch. What is missing is zeros under a
    mask of False. Other columns, and "caption", are lists of B values.

    >>> from torch.utils.data import DataLoader
    >>> from mmbeam.training import FeatureDataset
    >>> dataset = FeatureDataset("out", batch_size=4, columns=["key"], seed=7)
    >>> loader = DataLoader(dataset, batch_size=None, num_workers=1)
    >>> for epoch in range(2):
    ...     dataset.set_epoch(epoch)
    ...     for batch in loader:
    ...         image, present = batch["image_embedding"], batch["image_embedding_mask"]
    >>> image.shape[1] == dataset.features["image_embedding"].width
    True

    Every row comes once per epoch over all ranks and DataLoader workers. Ranks get the same number of rows
    give or take one, before `split` and `captions` leave some out: a loop with collective operations must
    expect that one rank has a batch more than another.

    To resume, take `state_dict()` after any batch, and `load_state_dict()` on a data set made with the same
    arguments: the batches that follow are those that would have come. With DataLoader workers the state is
    theirs; torchdata's StatefulDataLoader asks them for it.

    Memory, in each worker: `buffer_bytes`, a row group, and the captions' file.
    """

    def __init__(
        self,
        paths: str | Sequence[str],
        *,
        batch_size: int,
        features: Sequence[str] | None = None,
        columns: Sequence[str] = (),
        captions: Captions | None = None,
        split: Split | None = None,
        shares: Shares = SHARES,
        split_seed: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        buffer_bytes: int = 256 * MIB,
        drop_last: bool = False,
        dtype: torch.dtype | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """Read the footers of all files, and with `captions` look for the first one.

        Args:
            paths: outputs of `mmbeam embed`, folders, globs or Parquet files; local or any URL fsspec opens.
            batch_size: rows of a batch; the last of each worker is smaller, or left out with `drop_last`.
            features: columns of vectors or tokens; None for every column of pooled vectors.
            columns: others, given as lists.
            captions: where captions come from; a row without one is left out (`count` says how many).
            split, shares, split_seed: the part of the data to give, by a hash of the key (see split_of).
            shuffle, seed: a new order in each epoch, or the files' own.
            buffer_bytes: what is shuffled together, decompressed; more mixes better.
            dtype: of the values; None for the one in which they are stored.
            rank, world_size: those of torch.distributed if it is initialised by now, else 0 of 1.

        Raises NoShardsError if there is no file; UsageError for files or columns that cannot be read like
        this, arguments that contradict each other, and captions of which there is not a single one.
        """
        if batch_size < 1 or buffer_bytes < 1 or seed < 0:
            raise UsageError("expected batch_size and buffer_bytes of at least 1, and a seed that is not negative")
        self._rank, self._world_size = _place(rank, world_size)
        self._batch_size, self._drop_last, self._dtype = batch_size, drop_last, dtype
        self._seed = seed if shuffle else None
        self._buffer_bytes = buffer_bytes if shuffle else 1
        self._rows = FeatureRows(
            [paths] if isinstance(paths, str) else paths,
            features,
            columns,
            captions,
            None if split is None else SplitSelection(part=split, shares=shares, seed=split_seed),
        )
        self._about = {
            "files": _digest(self._rows.files),
            "features": sorted(self.features),
            "columns": sorted(self._rows.columns),
            "captions": str(captions),
            "split": [split, *shares, split_seed],
            "batch_size": batch_size,
            "drop_last": drop_last,
            "seed": self._seed,
            "buffer_bytes": self._buffer_bytes,
        }
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # seen by workers that live on
        self._position = (0, 0)  # the window, and the row in it, with which the next batch begins
        self._resume: tuple[int, int] | None = None  # a position that was loaded

    @property
    def features(self) -> Mapping[str, StoredFeature]:
        """The columns of vectors and tokens, by name."""
        return {feature.name: feature for feature in self._rows.files.features}

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration gives."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives. Without it every one gives the same order."""
        if epoch != self.epoch:
            self._position, self._resume = (0, 0), None
        self._epoch.fill_(epoch)

    def count(self) -> FeatureCounts:
        """Count the rows of an epoch, over all ranks. Reads all keys and captions, if they decide."""
        return self._rows.count()

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, as JSON values."""
        window, row = self._resume or self._position
        return {"epoch": self.epoch, "window": window, "row": row, "dataset": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on from there.

        Raises UsageError if the state is of other files, arguments, ranks or workers than this data set.
        """
        for name, expected in self._identity().items():
            found = state["dataset"].get(name)
            if found != expected:
                raise UsageError(f"the state is of a data set with {name} {found}, this one has {expected}")
        self.set_epoch(state["epoch"])
        self._resume = state["window"], state["row"]

    def __iter__(self) -> Iterator[FeatureBatch]:
        self._position, self._resume = self._resume or (0, 0), None
        parts: list[FeatureBatch] = []
        missing = self._batch_size
        for number, window, begin in self._windows(*self._position):
            while begin < window.rows:
                end = min(begin + missing, window.rows)
                parts.append(window.take(begin, end))
                missing, begin = missing - (end - begin), end
                if not missing:
                    self._position = number, begin
                    yield self._finish(parts)
                    parts, missing = [], self._batch_size
        if parts and not self._drop_last:
            self._position = number + 1, 0
            yield self._finish(parts)

    def _windows(self, start: int, row: int) -> Iterator[tuple[int, Window, int]]:
        """The windows from `start` on, each with its number and the row to begin with; one object, filled anew."""
        epoch, (share, shares) = self.epoch, self._share()
        files, groups = self._rows.files, self._rows.files.groups
        order = self._order(epoch)(len(groups)).tolist()
        pieces = pieces_of([group.rows for group in groups], order, share, shares)
        windows = list(windows_of(pieces, [group.nbytes for group in groups], self._buffer_bytes))[start:]
        window = Window(files.features, _capacities(files, windows), self._rows.columns)
        for number, inside in enumerate(windows, start):
            rows = (batch for piece in inside for batch in self._rows.read(piece))
            window.fill(rows, self._order(epoch, share, number))
            yield number, window, row if number == start else 0

    def _order(self, *which: int) -> Callable[[int], Order]:
        """Draws the order of so many things, the same for the same `which`; as they are if nothing is shuffled."""
        if self._seed is None:
            return np.arange
        return np.random.default_rng((len(which), self._seed, *which)).permutation

    def _share(self) -> tuple[int, int]:
        """Which share of the rows this process takes, and of how many."""
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return self._rank * workers + number, self._world_size * workers

    def _identity(self) -> dict[str, Any]:
        return {**self._about, "share": list(self._share())}

    def _finish(self, parts: Sequence[FeatureBatch]) -> FeatureBatch:
        batch = join(parts)
        if self._dtype is not None:
            batch |= {name: batch[name].to(self._dtype) for name in self.features}
        return batch


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if rank is None and world_size is None:
        ready = distributed.is_available() and distributed.is_initialized()
        return (distributed.get_rank(), distributed.get_world_size()) if ready else (0, 1)
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise UsageError(f"expected a rank below the world size, both or neither, found {rank} of {world_size}")
    return rank, world_size


def _digest(files: FeatureFiles) -> str:
    """Tells apart sets of files by their names and row groups, wherever they lie."""
    groups = [[PurePosixPath(group.url).name, group.index, group.rows, group.nbytes] for group in files.groups]
    return hashlib.sha256(json.dumps(groups).encode()).hexdigest()[:16]


def _capacities(files: FeatureFiles, windows: Sequence[Sequence[Piece]]) -> list[int]:
    """How many vectors of each feature the largest window can hold."""
    sums = [
        [sum(files.groups[piece.group].vectors[i] for piece in window) for window in windows]
        for i in range(len(files.features))
    ]
    return [max(each, default=0) for each in sums]
