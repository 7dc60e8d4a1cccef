"""The rows of a data set that are asked for: of one part of a split, with a caption if captions are wanted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from mmbeam.errors import UsageError
from mmbeam.features.captions import CaptionReader, Captions
from mmbeam.features.dataset_files import FeatureFiles, RowGroup
from mmbeam.features.order import Piece
from mmbeam.features.split import Shares, check_shares, splits_of
from mmbeam.names import Split

CAPTION = "caption"  # what captions are called among the columns


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureCounts:
    """What a data set holds, over all ranks and workers."""

    rows: int  # that an epoch gives
    without_caption: int  # of the split, and left out


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSelection:
    """One part of the data, by a hash of the key."""

    part: Split
    shares: Shares
    seed: int

    def __post_init__(self) -> None:
        check_shares(self.shares)

    def holds(self, keys: Sequence[str]) -> list[bool]:
        """Whether each sample is of the part."""
        return [part == self.part for part in splits_of(keys, self.seed, self.shares)]


class FeatureRows:
    """Files, and which of their rows and columns are given."""

    def __init__(
        self,
        paths: Sequence[str],
        features: Sequence[str] | None,
        columns: Sequence[str],
        captions: Captions | None,
        split: SplitSelection | None,
    ) -> None:
        if captions is not None and CAPTION in columns:
            raise UsageError(f"the column {CAPTION!r} is asked for as it is and as the captions; leave out one")
        self._captions = None if captions is None else CaptionReader(captions)
        self._split = split
        self._deciding = {*(["key"] if split else []), *([self._captions.column] if self._captions else [])}
        self.files = FeatureFiles.open(paths, features, sorted({*columns, *self._deciding}))
        self.columns = (*columns, *([CAPTION] if captions else []))
        if captions is not None and not any(self._has_caption(group) for group in self.files.groups):
            rows = sum(group.rows for group in self.files.groups)
            raise UsageError(f"none of the {rows:,} rows has a caption; looked for {captions}")

    def read(self, piece: Piece) -> Iterator[pa.RecordBatch]:
        """The rows of the piece that are asked for, in order, with the columns of features and `columns`."""
        start = 0
        for batch in self.files.read(self.files.groups[piece.group]):
            begin, end = max(piece.begin - start, 0), min(piece.end - start, batch.num_rows)
            start += batch.num_rows
            if begin < end:
                yield self._captioned(self._of_split(batch.slice(begin, end - begin)))

    def count(self) -> FeatureCounts:
        """How many rows are asked for. Reads keys and captions, if they decide."""
        if not self._deciding:
            return FeatureCounts(rows=sum(group.rows for group in self.files.groups), without_caption=0)
        rows = without = 0
        for group in self.files.groups:
            for batch in map(self._of_split, self.files.read(group, sorted(self._deciding))):
                rows += batch.num_rows
                without += 0 if self._captions is None else self._captions.of(batch).count(None)
        return FeatureCounts(rows=rows - without, without_caption=without)

    def _has_caption(self, group: RowGroup) -> bool:
        assert self._captions is not None
        batches = self.files.read(group, [self._captions.column])
        return any(caption is not None for batch in batches for caption in self._captions.of(batch))

    def _of_split(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return batch if self._split is None else _keep(batch, self._split.holds(batch["key"].to_pylist()))

    def _captioned(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if self._captions is None:
            return batch
        captions = self._captions.of(batch)
        values = {name: batch[name] for name in batch.schema.names} | {CAPTION: pa.array(captions, pa.string())}
        return _keep(pa.RecordBatch.from_pydict(values), [caption is not None for caption in captions])


def _keep(batch: pa.RecordBatch, which: Sequence[bool]) -> pa.RecordBatch:
    return batch if all(which) else batch.filter(pa.array(which, pa.bool_()))
