"""Examples from rows of pre-computed features: the Parquet files that `mmbeam embed` wrote.

The loader itself is `mmbeam.features.dataset`; here its batches become the examples that the training
takes from everywhere. A vector with a number that is not finite counts as missing.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from mmbeam.errors import UsageError
from mmbeam.features.captions import Captions, json_object, text_of
from mmbeam.features.dataset import CAPTION, FeatureDataset
from mmbeam.features.files import feature_files, open_parquet
from mmbeam.names import MODALITIES, SPLITS, Modality, Split
from mmbeam.prompts.ask import Request
from mmbeam.training.examples import Example, clauses_of
from mmbeam.training.sources import SPLIT_SEED, SURVEYED, Labelling, Survey
from mmbeam.types import Feature, FeatureColumn

log = logging.getLogger(__name__)

ROWS = 1024  # taken from the files at once


def column_modality(text: str) -> tuple[str, Modality | None]:
    """Parse NAME or NAME=MODALITY. Raises UsageError."""
    name, equals, value = text.partition("=")
    modality = next((modality for modality in MODALITIES if modality == value), None)
    if equals and modality is None:
        raise UsageError(f"`columns` {text}: expected one of {', '.join(MODALITIES)} after the =")
    return name, modality


def captions_of(paths: Sequence[str], name: str, file: str | None) -> Captions:
    """Where the captions called `name` are: in `file`, a column of the rows, or a field of their JSON."""
    if file is not None:
        return Captions(file=file, file_caption=name)
    with open_parquet(feature_files(paths)[0].url) as parquet:
        names = parquet.schema_arrow.names
    return Captions(column=name) if name in names else Captions(metadata=name)


@dataclass(frozen=True, kw_only=True)
class FeatureSource:
    """Rows with a caption; those of training in another order in each epoch."""

    paths: Sequence[str]
    captions: Captions
    labelling: Labelling
    columns: Mapping[str, Modality | None] | None = None  # None: every column of vectors; a modality overrules the name
    counts: Mapping[Split, int] = field(default_factory=dict)
    seed: int = 0
    rank: int = 0  # which share of the training part's rows, of `world_size`
    world_size: int = 1
    _warned: set[str] = field(default_factory=set, repr=False, compare=False)  # columns that were complained about

    def features(self) -> dict[str, FeatureColumn]:
        """The columns of features, by name, each with its modality. Raises UsageError if that is unknown."""
        columns = {}
        for name, column in self._dataset("train").features.items():
            modality = (self.columns or {}).get(name) or column.modality
            if modality is None:
                raise UsageError(
                    f"column {name}: its name is not [NAME_]<modality>_embedding or _tokens; name its modality: "
                    f"{name}=image in `columns`"
                )
            columns[name] = replace(column, modality=modality)
        return columns

    def survey(self, limit: int | None = None) -> Survey:
        """Count the rows of each part; look at the first rows of the training part, no more than `limit`."""
        survey = Survey()
        for part in SPLITS:
            count = self._dataset(part).count()
            survey.captions[part] = count.rows
            survey.samples += count.rows + count.without_caption
        for example in islice(self.examples("train"), min(SURVEYED, limit or SURVEYED)):
            survey.texts.append(example.caption)
            survey.modalities.update(example.present)
            survey.clauses += example.clauses is not None
            survey.groups += example.group is not None
        return survey

    def count(self, part: Split) -> int | None:
        return self.counts.get(part)

    def of_rank(self, rank: int, world_size: int) -> "FeatureSource":
        return replace(self, rank=rank, world_size=world_size)

    def examples(self, part: Split, epoch: int = 0) -> Iterator[Example]:
        """The part's rows that have a caption and at least one feature."""
        dataset = self._dataset(part)
        dataset.set_epoch(epoch)
        modalities = {name: column.modality for name, column in self.features().items() if column.modality}
        for batch in dataset:
            columns = {name: self._values(batch, name) for name in modalities}
            for row in range(len(batch["key"])):
                features = {name: value for name, rows in columns.items() if (value := rows[row]) is not None}
                if features:
                    yield self._example(batch, row, features, modalities)

    def _example(
        self, batch: Mapping[str, Any], row: int, features: Mapping[str, Feature], modalities: Mapping[str, Modality]
    ) -> Example:
        values = json_object(batch["metadata"][row]) if self._asks_json else {}
        labelling = self.labelling
        return Example(
            key=batch["key"][row],
            caption=batch[CAPTION][row],
            present=frozenset(modalities[name] for name in features),
            request=partial(_request, features, modalities),
            clauses=clauses_of(values.get(labelling.clauses or "")),
            group=text_of(values.get(labelling.group or "")),
            nbytes=sum(feature.nbytes for feature in features.values()),
        )

    def _values(self, batch: Mapping[str, Any], name: str) -> list[Feature | None]:
        """Each row's vector, [width], or vectors, [tokens, width]; None where it has none that is all numbers."""
        values, mask = batch[name].numpy(), batch[f"{name}_mask"].numpy()
        finite = np.isfinite(values).all(tuple(range(1, values.ndim)))
        counts = mask.reshape(len(mask), -1).sum(1)
        if not finite.all() and name not in self._warned:
            self._warned.add(name)
            key = batch["key"][finite.argmin()]
            log.warning("column %s: vectors that are not finite count as missing, the first of key %s", name, key)
        rows: list[Feature | None] = []
        for value, count, good in zip(values, counts.tolist(), finite.tolist(), strict=True):
            rows.append((value[:count] if values.ndim > 2 else value) if count and good else None)
        return rows

    @property
    def _asks_json(self) -> bool:
        return self.labelling.clauses is not None or self.labelling.group is not None

    def _dataset(self, part: Split) -> FeatureDataset:
        return FeatureDataset(
            self.paths,
            batch_size=ROWS,
            features=None if self.columns is None else list(self.columns),
            columns=["key", *(["metadata"] if self._asks_json else [])],
            captions=self.captions,
            split=part,
            shares=self.labelling.shares,
            split_seed=SPLIT_SEED,
            shuffle=part == "train",
            seed=self.seed,
            rank=self.rank if part == "train" else 0,
            world_size=self.world_size if part == "train" else 1,
        )


def _request(features: Mapping[str, Feature], modalities: Mapping[str, Modality], kept: frozenset[Modality]) -> Request:
    return Request(features={name: value for name, value in features.items() if modalities[name] in kept})
