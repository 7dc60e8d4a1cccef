"""A window of rows in memory: filled from record batches, given out as batches of tensors in any order.

Not here: which rows are in a window, and in which order.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.nn.functional import pad

from mmbeam.errors import UsageError
from mmbeam.features.dataset_files import StoredFeature

FeatureBatch = dict[str, Any]  # by column: float tensors, and their masks under column + "_mask"; else lists

Order = npt.NDArray[np.int64]  # [rows]


class Window:
    """Rows of a few row groups. Filled again and again: its memory is that of the largest window.

    `capacities` are how many vectors of each feature there can be at most.
    """

    def __init__(self, features: Sequence[StoredFeature], capacities: Sequence[int], columns: Sequence[str]) -> None:
        self._features = [_Vectors(feature, size) for feature, size in zip(features, capacities, strict=True)]
        self._columns: dict[str, pa.ChunkedArray] = dict.fromkeys(columns)
        self.rows = 0

    def fill(self, batches: Iterable[pa.RecordBatch], order: Callable[[int], Order]) -> None:
        """Take these rows in the place of those before, in the order that `order` gives for their number."""
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

    def take(self, begin: int, end: int) -> FeatureBatch:
        """The rows at [begin, end) of the order, copied."""
        batch: FeatureBatch = {}
        for vectors in self._features:
            name = vectors.feature.name
            batch[name], batch[f"{name}_mask"] = vectors.gather(begin, end)
        return batch | {name: column[begin:end].to_pylist() for name, column in self._columns.items()}


class _Vectors:
    """One feature of the window's rows. The vector at 0 is zeros, and stands in for what is missing."""

    def __init__(self, feature: StoredFeature, capacity: int) -> None:
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
        """Copy the rows' vectors behind those that are there; remember where each row's are."""
        ends = rows.offsets.to_numpy().astype(np.int64)
        valid = rows.is_valid().to_numpy(zero_copy_only=False)
        lengths, unit = np.diff(ends), 1 if self.feature.tokens else self.feature.width
        self._check(rows, lengths[valid])
        counts = np.where(valid, lengths // unit, 0)
        values = rows.values.slice(ends[0], ends[-1] - ends[0])
        numbers = values.flatten() if self.feature.tokens else values
        vectors = numbers.to_numpy().reshape(-1, self.feature.width)
        self._values[self._end : self._end + len(vectors)] = vectors
        self._places.append(np.where(counts > 0, (ends[:-1] - ends[0]) // unit + self._end, 0))
        self._counts.append(counts)
        self._end += len(vectors)

    def _check(self, rows: pa.ListArray, lengths: Order) -> None:
        feature = self.feature
        if not feature.tokens and (lengths != feature.width).any():
            found = int(lengths[lengths != feature.width][0])
            raise UsageError(
                f"column {feature.name}: expected vectors of {feature.width} numbers, found one of {found}"
            )
        if rows.values.null_count or (feature.tokens and rows.values.values.null_count):
            raise UsageError(f"column {feature.name}: a number of a vector is null; expected null vectors only")

    def arrange(self, order: Order) -> None:
        """Put the rows into the order in which `gather` counts them."""
        none = np.empty(0, np.int64)
        self._place = torch.from_numpy(np.concatenate([none, *self._places])[order])
        self._count = torch.from_numpy(np.concatenate([none, *self._counts])[order])

    def gather(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [B, width] and mask [B] of these rows; of tokens [B, T, width] and [B, T], T at least 1."""
        places, counts = self._place[begin:end], self._count[begin:end]
        if not self.feature.tokens:
            return self._tensor.index_select(0, places), counts > 0
        steps = torch.arange(max(1, int(counts.max())))
        mask = steps < counts[:, None]
        places = torch.where(mask, places[:, None] + steps, 0)
        return self._tensor.index_select(0, places.reshape(-1)).view(*mask.shape, self.feature.width), mask


def join(parts: Sequence[FeatureBatch]) -> FeatureBatch:
    """The rows of several batches in one, token sequences padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    return {name: _join([part[name] for part in parts]) for name in parts[0]}


def _join(values: Sequence[Any]) -> Any:
    if isinstance(values[0], list):
        return [item for value in values for item in value]
    if len({value.shape[1:] for value in values}) == 1:
        return torch.cat(list(values))
    longest = max(value.shape[1] for value in values)  # [B, T, width] or a mask [B, T]
    return torch.cat([pad(value, (0, 0) * (value.ndim - 2) + (0, longest - value.shape[1])) for value in values])
