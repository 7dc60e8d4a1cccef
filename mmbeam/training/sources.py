"""Sources of examples: shards, rows of precomputed features, and the procedural corpus.

Only the windows that are being read are in memory. A feature vector with a value that is not finite counts as missing.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np

from mmbeam.clean.text import json_object
from mmbeam.config import Reading, Windows
from mmbeam.corpus.render import render_audio, render_image
from mmbeam.corpus.scene import Scene, generate_scenes, tag
from mmbeam.errors import ShardError, TrainingError, UsageError
from mmbeam.features.captions import Captions, text_of
from mmbeam.features.dataset import CAPTION, FeatureDataset, rank_of, split_of, units_of_rank
from mmbeam.features.files import feature_files, open_parquet
from mmbeam.features.schema import check_origin, warn_of_unknown_origin
from mmbeam.models.fusion.configuration import feature_source
from mmbeam.models.fusion.processing import FusionProcessor
from mmbeam.names import FUSION_MODALITIES, SPLITS, Modality, Split
from mmbeam.prompts.ask import Request
from mmbeam.readers.windows import HeldBytes, prefetch, read_batches
from mmbeam.training.examples import Example, clauses_of
from mmbeam.types import Feature, FeatureColumn, Needs, Sample, WorkUnit

log = logging.getLogger(__name__)

CAPTION_IS_TEXT = "text"  # the value of `captions` that makes the sample's text the caption
SPLIT_SEED = 0  # the same for every run, so that no training contains samples of another model's test split
MAX_SURVEYED_SAMPLES = 50_000  # samples whose texts suffice to learn a vocabulary
TEXT_ONLY = Needs()  # text and metadata, which every sample has without decoding


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """The JSON fields of the targets (caption, clauses, group), and the split of a key."""

    captions: str
    clauses: str | None = None
    group: str | None = None
    split_fractions: tuple[float, float, float] = (0.9, 0.05, 0.05)

    def split(self, key: str) -> Split:
        """Return the split of the sample with this key."""
        return split_of(key, SPLIT_SEED, self.split_fractions)

    def caption(self, sample: Sample) -> str | None:
        """Return the sample's caption, if any."""
        if self.captions == CAPTION_IS_TEXT:
            return text_of(sample.text)
        return text_of(json_object(sample.metadata).get(self.captions))

    def clauses_and_group(self, sample: Sample) -> tuple[dict[Modality, str] | None, str | None]:
        """Return the caption's clauses and the sample's group, each None if absent or not requested."""
        values = json_object(sample.metadata)
        clauses = None if self.clauses is None else clauses_of(values.get(self.clauses))
        return clauses, None if self.group is None else text_of(values.get(self.group))


@dataclass(kw_only=True)
class Survey:
    """Counts and texts of the samples, before anything is decoded."""

    samples: int = 0
    captions: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    modalities: Counter[Modality] = field(default_factory=Counter)
    clauses: int = 0  # samples whose caption has clauses
    groups: int = 0  # samples with a group
    texts: list[str] = field(default_factory=list)  # captions and texts of the training split
    fields: set[str] = field(default_factory=set)  # of the samples' JSON
    whole: bool = True  # whether all samples were counted

    def check(self, captions: str) -> None:
        """Raise TrainingError if the samples cannot be trained or validated on."""
        if not sum(self.captions.values()):
            raise TrainingError(
                f"none of the {self.samples:,} samples has a caption in {captions!r}; their JSON has "
                f"{', '.join(sorted(self.fields)[:12]) or 'no fields'}. Name a field in `captions`, or text for "
                "the samples' own text"
            )
        for split in ("train", "validation"):
            if not self.captions[split]:
                raise TrainingError(
                    f"the {split} split is empty: {self.captions}. Add samples with a caption, or raise its fraction "
                    "in `split_fractions`"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON values, and log how many samples have no caption."""
        without_caption = self.samples - sum(self.captions.values())
        if without_caption:
            log.warning("%d of %d samples have no caption and are skipped", without_caption, self.samples)
        return {
            "samples": self.samples,
            "captions": self.captions,
            "clauses": self.clauses,
            "modalities": dict(self.modalities),
            "counted": self.whole,
        }


@dataclass(frozen=True, kw_only=True)
class ShardSource:
    """Samples of shards, prefetched. Every training epoch has a different order of units.

    Several processes partition the units of an epoch. The remainder, fewer units than processes, is read by all
    processes, and each decodes the samples that a hash of the key assigns to it.
    """

    units: Sequence[WorkUnit]
    labelling: Labelling
    modalities: frozenset[Modality] = frozenset(FUSION_MODALITIES)
    needs: Needs = TEXT_ONLY
    reading: Reading = field(default_factory=Reading)
    counts: Mapping[Split, int] = field(default_factory=dict)
    seed: int = 0
    rank: int = 0  # of `world_size` processes, which partition the training split
    world_size: int = 1

    def survey(self, limit: int | None = None) -> Survey:
        """Count the samples, or the first `limit` of them, and collect their texts and JSON fields."""
        survey = Survey()
        for sample in self._samples(self.units, None):
            if limit is not None and survey.samples >= limit:
                survey.whole = False
                break
            _survey_sample(sample, self.labelling, survey)
        return survey

    def longest_audio_seconds(self, limit: int, most: float) -> float:
        """Return the seconds of the longest of the first `limit` clips, at most `most`; 1 if there is none."""
        source = replace(self, needs=Needs(modalities=frozenset(("audio",))))
        durations = (s.audio.seconds for s in source._samples(self.units, None) if s.audio is not None)
        return min(most, max(islice(durations, limit), default=1.0))

    def count(self, split: Split) -> int | None:
        """Return the number of the split's samples with a caption, None if unknown."""
        return self.counts.get(split)

    def of_rank(self, rank: int, world_size: int) -> "ShardSource":
        """Return the source of one process; see ExampleSource."""
        return replace(self, rank=rank, world_size=world_size)

    def examples(self, split: Split, epoch: int = 0) -> Iterator[Example]:
        """Yield the split's samples with a caption and at least one decoded modality.

        Raises ShardError if a shard cannot be read.
        """
        for sample in self._samples_of_split(split, epoch):
            example = self._example(sample)
            if example is not None:
                yield example

    def _samples_of_split(self, split: Split, epoch: int) -> Iterator[Sample]:
        def is_in_split(key: str) -> bool:
            return self.labelling.split(key) == split

        def is_in_split_of_rank(key: str) -> bool:
            return is_in_split(key) and rank_of(key, self.world_size) == self.rank

        if split != "train":
            return self._samples(self.units, is_in_split)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.units)).tolist()
        exclusive, shared = units_of_rank(order, self.rank, self.world_size)
        return chain(
            self._samples([self.units[index] for index in exclusive], is_in_split),
            self._samples([self.units[index] for index in shared], is_in_split_of_rank),
        )

    def _samples(self, units: Sequence[WorkUnit], wanted: Callable[[str], bool] | None) -> Iterator[Sample]:
        for unit in units:
            held = HeldBytes()
            read = read_batches(unit, self.reading, self.needs, Windows(), wanted, held)
            with closing(prefetch(read, f"mmbeam-read-{unit.id}", held)) as batches:
                for batch in batches:
                    yield from batch.samples
                    if batch.unit_error is not None:
                        raise ShardError(
                            f"{batch.unit_error}. Run the same command again to resume from the last checkpoint"
                        )

    def _example(self, sample: Sample) -> Example | None:
        caption = self.labelling.caption(sample)
        present = frozenset(modality for modality in self.modalities if _usable(sample, modality))
        if caption is None or not present:
            return None
        clauses, group = self.labelling.clauses_and_group(sample)
        return Example(
            key=sample.key,
            caption=caption,
            present=present,
            request=partial(request_of, sample),
            clauses=clauses,
            group=group,
            nbytes=sample.nbytes,
        )


def _survey_sample(sample: Sample, labelling: Labelling, survey: Survey) -> None:
    survey.samples += 1
    survey.modalities.update(sample.present)
    survey.fields.update(json_object(sample.metadata))
    caption, split = labelling.caption(sample), labelling.split(sample.key)
    if caption is None:
        return
    survey.captions[split] += 1
    clauses, group = labelling.clauses_and_group(sample)
    survey.clauses += clauses is not None
    survey.groups += group is not None
    if split == "train" and len(survey.texts) < 2 * MAX_SURVEYED_SAMPLES:
        survey.texts += [caption, *filter(None, [sample.model_text])]


def _usable(sample: Sample, modality: Modality) -> bool:
    if modality == "text":
        return bool(sample.model_text)
    if modality == "audio":
        return sample.audio is not None and bool(sample.audio.waves)
    return sample.has(modality)


def request_of(sample: Sample, modalities: frozenset[Modality]) -> Request:
    """Return the model input of a sample of shards: these modalities, and audio at its highest sampling rate."""
    audio = None
    if sample.audio is not None and "audio" in modalities:
        rate, wave = max(sample.audio.waves.items())
        audio = (wave, rate)
    return Request(
        image=sample.image if "image" in modalities else None,
        audio=audio,
        text=sample.model_text if "text" in modalities else None,
    )


@dataclass(frozen=True, kw_only=True)
class CorpusSource:
    """The procedural corpus, which is endless: every training epoch has new scenes.

    The splits differ by seed: training has `seed`, validation `seed` + 1, test `seed` + 2.
    """

    seed: int
    epoch_size: int
    evaluation_size: int
    modalities: Collection[Modality] | None = None  # captions contain only the clauses of these modalities; None: all
    side: int = 64  # pixels
    rate: int = 8000  # Hz
    rank: int = 0  # of `world_size` processes, which partition the training split
    world_size: int = 1

    def count(self, split: Split) -> int | None:
        """Return the number of scenes in an epoch of the split."""
        return self.epoch_size if split == "train" else self.evaluation_size

    def of_rank(self, rank: int, world_size: int) -> "CorpusSource":
        """Return the source of one process; see ExampleSource."""
        return replace(self, rank=rank, world_size=world_size)

    def examples(self, split: Split, epoch: int = 0) -> Iterator[Example]:
        """Yield the scenes of an epoch of the split. Evaluation splits are the same in every epoch."""
        start, end = 0, self.evaluation_size
        if split == "train":
            begin, size = epoch * self.epoch_size, self.epoch_size
            start, end = (begin + size * rank // self.world_size for rank in (self.rank, self.rank + 1))
        for scene in generate_scenes(self.seed + SPLITS.index(split), start, end - start):
            yield scene_example(scene, self.side, self.rate).keeping(self.modalities or FUSION_MODALITIES)


def scene_example(scene: Scene, side: int = 64, rate: int = 8000) -> Example:
    """Return the example of a scene, which is rendered when its request is made; `side` in pixels, `rate` in Hz."""
    return Example(
        key=scene.key,
        caption=scene.caption(),
        present=frozenset(FUSION_MODALITIES),
        request=partial(_render, scene, side, rate),
        clauses=scene.clauses(),
    )


def _render(scene: Scene, side: int, rate: int, modalities: frozenset[Modality]) -> Request:
    return Request(
        image=render_image(scene, side) if "image" in modalities else None,
        audio=(render_audio(scene, rate), rate) if "audio" in modalities else None,
        text=tag(scene) if "text" in modalities else None,
    )


ROWS_PER_READ = 1024  # rows per batch of the data loader


def column_modality(text: str) -> tuple[str, Modality | None]:
    """Parse NAME or NAME=MODALITY. Raises UsageError."""
    name, equals, value = text.partition("=")
    modality = next((modality for modality in FUSION_MODALITIES if modality == value), None)
    if equals and modality is None:
        raise UsageError(f"`columns` {text}: expected one of {', '.join(FUSION_MODALITIES)} after the =")
    return name, modality


def captions_of(paths: Sequence[str], name: str, file: str | None, allow_local_paths: bool = False) -> Captions:
    """Return the location of the captions: in `file`, in the column `name`, or in the field `name` of the JSON."""
    if file is not None:
        return Captions(file=file, file_caption=name)
    with open_parquet(feature_files(paths, allow_local_paths=allow_local_paths)[0]) as parquet:
        names = parquet.schema_arrow.names
    return Captions(column=name) if name in names else Captions(metadata=name)


@dataclass(frozen=True, kw_only=True)
class FeatureSource:
    """Rows of features with a caption. Every training epoch has a different order."""

    paths: Sequence[str]
    captions: Captions
    labelling: Labelling
    allow_local_paths: bool = False  # see `listing.expand`
    columns: Mapping[str, Modality | None] | None = None  # None: all columns of vectors; a modality overrides the name
    counts: Mapping[Split, int] = field(default_factory=dict)
    seed: int = 0
    rank: int = 0  # of `world_size` processes, which partition the training split
    world_size: int = 1
    _warned: set[str] = field(default_factory=set, repr=False, compare=False)  # columns that a warning was logged for

    def features(self) -> dict[str, FeatureColumn]:
        """Return the columns of features with their modalities, by name. Raises UsageError for an unknown modality."""
        columns = {}
        for name, column in self._dataset("train").features.items():
            modality = (self.columns or {}).get(name) or column.modality
            if modality is None:
                raise UsageError(
                    f"column {name}: expected a name like [NAME_]<modality>_embedding or _tokens; name its modality "
                    f"in `columns`, for example {name}=image"
                )
            columns[name] = replace(column, modality=modality)
        return columns

    def survey(self, limit: int | None = None) -> Survey:
        """Count the rows of all splits, and collect captions and counts of at most `limit` training rows."""
        survey = Survey()
        for split in SPLITS:
            count = self._dataset(split).count()
            survey.captions[split] = count.rows
            survey.samples += count.rows + count.without_caption
        for example in islice(self.examples("train"), min(MAX_SURVEYED_SAMPLES, limit or MAX_SURVEYED_SAMPLES)):
            survey.texts.append(example.caption)
            survey.modalities.update(example.present)
            survey.clauses += example.clauses is not None
            survey.groups += example.group is not None
        return survey

    def count(self, split: Split) -> int | None:
        """Return the number of the split's rows with a caption, None if unknown."""
        return self.counts.get(split)

    def of_rank(self, rank: int, world_size: int) -> "FeatureSource":
        """Return the source of one process; see ExampleSource."""
        return replace(self, rank=rank, world_size=world_size)

    def examples(self, split: Split, epoch: int = 0) -> Iterator[Example]:
        """Yield the split's rows with a caption and at least one feature."""
        dataset = self._dataset(split)
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
        values = json_object(batch["metadata"][row]) if self._needs_metadata else {}
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
        """Return each row's vector [width], or vectors [tokens, width]; None if it is null or not finite."""
        values, mask = batch[name].numpy(), batch[f"{name}_mask"].numpy()
        finite = np.isfinite(values).all(tuple(range(1, values.ndim)))
        counts = mask.reshape(len(mask), -1).sum(1)
        if not finite.all() and name not in self._warned:
            self._warned.add(name)
            key = batch["key"][finite.argmin()]
            log.warning("column %s: vectors that are not finite count as missing; the first has key %s", name, key)
        rows: list[Feature | None] = []
        for value, count, is_finite in zip(values, counts.tolist(), finite.tolist(), strict=True):
            rows.append((value[:count] if values.ndim > 2 else value) if count and is_finite else None)
        return rows

    @property
    def _needs_metadata(self) -> bool:
        return self.labelling.clauses is not None or self.labelling.group is not None

    def _dataset(self, split: Split) -> FeatureDataset:
        return FeatureDataset(
            self.paths,
            batch_size=ROWS_PER_READ,
            features=None if self.columns is None else list(self.columns),
            columns=["key", *(["metadata"] if self._needs_metadata else [])],
            captions=self.captions,
            allow_local_paths=self.allow_local_paths,
            split=split,
            split_fractions=self.labelling.split_fractions,
            split_seed=SPLIT_SEED,
            shuffle=split == "train",
            seed=self.seed,
            rank=self.rank if split == "train" else 0,
            world_size=self.world_size if split == "train" else 1,
        )


def _request(features: Mapping[str, Feature], modalities: Mapping[str, Modality], kept: frozenset[Modality]) -> Request:
    return Request(features={name: value for name, value in features.items() if modalities[name] in kept})


MAX_SURVEYED_ROWS = 1000  # rows whose sequences determine the model's longest sequence
MAX_TOKENS = 1500  # longer sequences are truncated; Whisper encodes 30 seconds as 1500 vectors


def column_sources(source: FeatureSource, modalities: Collection[Modality]) -> dict[str, dict[str, Any]]:
    """Return the configuration of a source for each column of these modalities, by name.

    Logs a warning that names the columns whose model is unknown.
    """
    columns = [column for column in source.features().values() if column.modality in modalities]
    unknown = [column.name for column in columns if column.origin is None]
    if unknown:
        log.warning(
            "the files do not name the model that made %s: features of another model will not be detected",
            ", ".join(unknown),
        )
    sources = {
        column.name: feature_source(column.modality, column.width, column.tokens, column.origin)
        for column in columns
        if column.modality
    }
    for name, length in _longest(source, [column.name for column in columns if column.tokens]).items():
        sources[name]["max_tokens"] = length
    return sources


def _longest(source: FeatureSource, names: Collection[str]) -> dict[str, int]:
    """Return the number of vectors of the longest sequence among the first rows, by column, at most MAX_TOKENS."""
    longest = dict.fromkeys(names, 1)
    for example in islice(source.examples("train"), MAX_SURVEYED_ROWS if names else 0):
        features = example.make().features
        longest |= {name: max(longest[name], len(features[name])) for name in names if name in features}
    for name, length in longest.items():
        if length > MAX_TOKENS:
            log.warning("column %s: sequences of up to %d vectors are truncated to %d", name, length, MAX_TOKENS)
    return {name: min(length, MAX_TOKENS) for name, length in longest.items()}


def check_origins(processor: FusionProcessor, source: FeatureSource) -> None:
    """Raise UsageError if the model was trained on features of another encoder; log a warning if it is unknown."""
    for name, column in source.features().items():
        check_origin(f"`input`: {name}", processor.sources[name].origin, column.origin)
        warn_of_unknown_origin("`input`", name, processor.sources[name].origin, column.origin)
