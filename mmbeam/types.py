"""The values that flow through a job, in the order in which they flow.

Shard -> WorkUnit -> RawSample -> Sample -> Batch -> UnitReport -> RunReport

All are plain frozen objects that pickle. A Stage turns a Batch into one with more features. It is declared here,
with the Needs and Outputs that describe it, so that readers and writers depend on no model. Nothing here imports
Beam or torch.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Self, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmbeam.errors import printable
from mmbeam.names import Kind, Modality

ImageHWC = npt.NDArray[np.uint8]  # [height, width, 3], RGB
Waveform = npt.NDArray[np.float32]  # [frames], mono, nominally -1 to 1
Feature = npt.NDArray[np.floating[Any]]  # [width] or [tokens, width]: an encoder's output for one modality


class SourceFile(NamedTuple):
    """A file of a folder, as its listing describes it."""

    name: str  # its path below the folder; bytes that are not UTF-8 as surrogates
    size: int | None = None
    etag: str | None = None


class FolderSample(NamedTuple):
    """The files of a folder that make one sample."""

    key: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One input file, or a folder of media files, as a listing describes it.

    `path` is the shard's identity in rows, plans and logs: the URL without credentials and query string. `url` is the
    address that is opened. It may hold a secret and is kept out of every repr. For a folder, `samples` holds all of its
    samples or those of one work unit; size and etag are computed from their files.
    """

    path: str
    url: str = field(repr=False)
    size: int | None = None  # bytes as stored; None if the store does not report it
    etag: str | None = None
    cuttable: bool = True  # False if the file must be read from its beginning: no range requests
    # False if its web server may not redirect to another server (see listing.expand). A table without it may not name
    # files outside its folder, or servers that are not public.
    may_redirect: bool = True
    rows: int | None = None  # of a table; None if unknown
    samples: tuple[FolderSample, ...] = field(default=(), repr=False)  # of a folder, in order; () for a file
    tables: tuple[SourceFile, ...] = field(default=(), repr=False)  # metadata.csv and metadata.jsonl of a folder

    def with_samples(self, samples: Sequence[FolderSample]) -> "Shard":
        """Return the folder with these samples only, and the tables in their directories or in parent directories."""
        folders = {""}
        for sample in samples:
            folder = sample.key.rpartition("/")[0]
            while folder not in folders:
                folders.add(folder)
                folder = folder.rpartition("/")[0]
        tables = tuple(table for table in self.tables if utf8_name(table.name.rpartition("/")[0]) in folders)
        part = replace(self, samples=tuple(samples), tables=tables)
        listed = files_of(part)
        digest = hashlib.sha256()
        for file in listed:
            digest.update(f"{file.name}\0{file.size}\0{file.etag}\n".encode("utf-8", "backslashreplace"))
        size = sum(file.size or 0 for file in listed)
        return replace(part, size=size, etag=digest.hexdigest()[:16])


def files_of(folder: Shard) -> list[SourceFile]:
    """Return the files of a folder's samples, and its tables."""
    return [*(file for sample in folder.samples for file in sample.files), *folder.tables]


def utf8_name(name: str) -> str:
    """Return a file's name with backslash escapes for bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A shard, or the part of an uncompressed one between the cuts at bytes `begin` and `end` (readers/tar.py).

    For a folder, `begin` and `end` are sample indexes, and `shard.samples` are those between them.
    """

    shard: Shard
    begin: int = 0
    end: int | None = None  # None: to the end of the shard

    @property
    def is_part(self) -> bool:
        """Whether this is a part of a shard."""
        return self.begin > 0 or self.end is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRead:
    """What reading an input reports besides its samples: the boundaries of a part, or the error."""

    first_sample: int | None = None  # of a part: byte of its first sample (0 if it begins the shard); None: no sample
    next_sample: int | None = None  # of a part: byte of the first sample after it; None: no sample
    error: str | None = None  # why it could not be read, if other inputs of the unit could
    broken: str | None = None  # why reading stopped before the end; the number of samples lost is unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkUnit:
    """The inputs that one attempt reads, and whose rows one Parquet file holds. `id` is a safe file name."""

    id: str
    inputs: tuple[Input, ...]
    limit: int | None = None  # number of samples to stop after
    replace: bool = False  # run it although it is committed, and replace its rows (retry_failures, redo_changed)
    isolation: "Isolation | None" = None  # set only in a child process that searches for the sample that crashes it


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A member that could not be read completely, and the error. The rest of its sample is still processed."""

    field: str  # lower case; "" if the member's header itself is damaged
    offset: int | None  # of the member's header in the uncompressed tar; None: of a file of a folder
    error: str  # name of an exception class: "LimitError", "DecodeError"
    message: str


class SampleId(NamedTuple):
    """Identifies a sample within a run. Its key does not: keys may repeat."""

    shard: str  # Shard.path
    # of the sample's first header in the uncompressed tar, pax and GNU prefixes included, or in the zip archive; of a
    # folder, the number of the sample
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Isolation:
    """How a child process runs a unit whose attempts ended their processes (jobs/isolate.py).

    Samples are decoded one at a time, and not ahead of the model.
    """

    crashes: Mapping[SampleId, str] = field(default_factory=dict)  # samples that ended a process, with the message
    probed: frozenset[SampleId] | None = None  # read only these samples, and write nothing; None: all
    single: bool = False  # one sample per window


class StepBegun(NamedTuple):
    """Message from a child process that a step begins, so that the parent knows which step crashed."""

    step: str  # "decode", "model", "write"
    samples: tuple[SampleId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RawSample:
    """Adjacent members of one key, undecoded."""

    key: str
    shard: str  # Shard.path
    offset: int
    members: Mapping[str, bytes]  # by field (lower case), in tar order; only the fields asked for
    fields: tuple[str, ...]  # every field of the sample, whether asked for or not
    damages: tuple[Damage, ...] = ()
    truncated: bool = False  # the shard ends, or becomes unreadable, inside this sample
    repeated: bool = False  # its key occurred before in the same input

    @property
    def id(self) -> SampleId:
        """The sample's identity within a run."""
        return SampleId(self.shard, self.offset)


class SourceReader:
    """Base class of the readers other than `tar.TarReader`, with the same result attributes."""

    first_sample: int | None = None
    next_sample: int | None = None
    broken: str | None = None
    failures: Sequence[Damage] = ()
    is_empty = unterminated = trailing_data = concatenated = False

    def __init__(self) -> None:
        self.bytes_read = 0  # as stored
        self.members: Counter[str] = Counter()  # members that belong to no sample, by kind

    def __iter__(self) -> Iterator[RawSample]:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Audio:
    """A mono sound at each sampling rate that a stage needs, or at its own rate if none needs one."""

    waves: Mapping[int, Waveform]  # by sampling rate in Hz
    seconds: float  # duration of the whole sound

    def at(self, rate: int | None) -> tuple[Waveform, int]:
        """Return the waveform at `rate` Hz, or else at the highest rate decoded, and its rate."""
        best = rate if rate is not None and rate in self.waves else max(self.waves)
        return self.waves[best], best


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """The chosen frames of a video, or none if only its length and size were read."""

    frames: tuple[ImageHWC, ...]  # in order; all have the size of the first, unless the video changes its size
    times: tuple[float, ...]  # when each begins, in seconds from the beginning of the video
    seconds: float  # duration of the whole video
    size: tuple[int, int]  # width, height as displayed

    @property
    def nbytes(self) -> int:
        """Size of the frames in bytes; repeated frames count once."""
        return sum({id(frame): frame.nbytes for frame in self.frames}.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One decoded sample. A modality that is `present` but None could not be decoded."""

    key: str
    shard: str
    offset: int
    present: frozenset[Modality] = frozenset()
    image: ImageHWC | None = None
    image_size: tuple[int, int] | None = None  # width, height as displayed (after EXIF orientation)
    audio: Audio | None = None  # if no field holds it, the sound track of the video
    video: Video | None = None
    text: str | None = None  # as stored
    text_clean: str | None = None  # after cleaning; None without cleaning
    metadata: str | None = None  # the JSON as stored
    features: Mapping[str, Feature] = field(default_factory=dict)  # by column, if the input is rows of features

    @property
    def id(self) -> SampleId:
        """The sample's identity within a run."""
        return SampleId(self.shard, self.offset)

    def has(self, modality: Modality) -> bool:
        """Return whether the modality is present and was decoded."""
        return getattr(self, modality) is not None

    @property
    def model_text(self) -> str | None:
        """The text that models receive: cleaned, if the run cleans texts."""
        return self.text if self.text_clean is None else self.text_clean

    @property
    def nbytes(self) -> int:
        """Decoded size in bytes; it decides where windows close."""
        image = 0 if self.image is None else self.image.nbytes
        audio = 0 if self.audio is None else sum(wave.nbytes for wave in self.audio.waves.values())
        video = 0 if self.video is None else self.video.nbytes
        features = sum(feature.nbytes for feature in self.features.values())
        texts = sum(4 * len(text) for text in (self.text, self.text_clean, self.metadata) if text is not None)
        return image + audio + video + features + texts


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why one sample lost some or all of its outputs. `Failure.of` builds one."""

    key: str
    shard: str
    offset: int
    modality: str  # "image", "audio", "text", "video", "metadata"; "" for the whole sample
    step: str  # "read", "decode", "embed", "label", "generate", "crash"
    error: str  # name of an exception class
    message: str
    outputs: tuple[str, ...] = ()  # columns lost; empty: every output that depends on `modality`

    @classmethod
    def of(
        cls,
        sample: RawSample | Sample,
        step: str,
        error: Exception | str,
        message: str = "",
        *,
        modality: str = "",
        outputs: tuple[str, ...] = (),
    ) -> Self:
        """Return the failure of `sample` at `step`.

        `error` is an exception, or the name of an exception class together with a `message`. The message is cut to
        300 characters and loses its control characters, since it may quote the input.
        """
        if isinstance(error, Exception):
            error, message = type(error).__name__, message or str(error)
        return cls(
            key=sample.key,
            shard=sample.shard,
            offset=sample.offset,
            modality=modality,
            step=step,
            error=error,
            message=printable(message),
            outputs=outputs,
        )

    @classmethod
    def of_shard(cls, shard: str, offset: int, step: str, error: str, message: str) -> Self:
        """Return a failure at an offset of a shard that belongs to no sample. It has no key."""
        return cls(key="", shard=shard, offset=offset, modality="", step=step, error=error, message=printable(message))

    @property
    def id(self) -> SampleId:
        """The identity of the failed sample within its run."""
        return SampleId(self.shard, self.offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Additive counts and seconds of a window, a unit or a run.

    Conservation: samples == rows + failed + sum(skipped.values()).
    """

    samples: int = 0
    rows: int = 0
    failed: int = 0  # samples without a row
    impaired: int = 0  # rows that lack some of their outputs
    repeated_keys: int = 0
    bytes_read: int = 0  # as stored
    skipped: Mapping[str, int] = field(default_factory=dict)  # samples, by name of the skip
    present: Mapping[str, int] = field(default_factory=dict)  # samples, by modality they hold
    outputs: Mapping[str, int] = field(default_factory=dict)  # non-null values, by output
    failures: Mapping[str, int] = field(default_factory=dict)  # failure records, by "step: error"
    members: Mapping[str, int] = field(default_factory=dict)  # members of shards that no job reads, by kind
    warnings: Mapping[str, int] = field(default_factory=dict)  # unusual input that cost no output, by message
    seconds: Mapping[str, float] = field(default_factory=dict)  # computing or waiting, by step

    def __add__(self, tally: "Tally") -> "Tally":
        return Tally(**{f.name: _plus(getattr(self, f.name), getattr(tally, f.name)) for f in fields(self)})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the tally that `asdict` wrote; mmbeam 0.1 called `outputs` "made"."""
        return cls(**{("outputs" if name == "made" else name): value for name, value in data.items()})


def _plus(a: Any, b: Any) -> Any:
    if isinstance(a, Mapping):
        return {name: a.get(name, 0) + b.get(name, 0) for name in {**a, **b}}
    return a + b


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A window of one unit's samples, in order, with the features and failures so far.

    Batches of a unit are numbered from 0 and arrive in order; the one with `last` ends the unit and may be empty.
    `features` hold one value per sample, null where a sample has none. A unit that is already committed is one empty
    last batch with its `report`. A unit that cannot be read ends with a batch whose `unit_error` states the reason.
    """

    unit: WorkUnit
    index: int
    last: bool
    samples: tuple[Sample, ...] = ()
    features: Mapping[str, pa.Array] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    tally: Tally = Tally()
    report: "UnitReport | None" = None
    unit_error: str | None = None
    inputs_read: tuple[InputRead, ...] = ()  # one per input of the unit, on the last window


class Origin(NamedTuple):
    """The model that made features. Two models of equal width may have nothing else in common."""

    model: str  # as the user named it, with its @revision
    digest: str  # of its files

    def __str__(self) -> str:
        return f"{self.model} (digest {self.digest[:12]})"


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureColumn:
    """A column of pre-computed features: as stored in a file, or as a model accepts it in place of raw media."""

    name: str
    width: int  # of one vector
    modality: Modality | None = None  # None if the name does not state it
    tokens: bool = False  # True: [tokens, width] per sample; False: [width]
    dtype: np.dtype[Any] | None = None  # as stored; None if a model takes any
    origin: Origin | None = None  # the model that made the features, or whose features a model takes; None if unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a stage reads from a sample, so that nothing else is decoded."""

    modalities: frozenset[Modality] = frozenset()
    sampling_rates: frozenset[int] = frozenset()  # Hz; empty: each sound's own rate
    image_side: int | None = None  # pixels: the largest shorter side that a model resizes to
    frames: frozenset[int] = frozenset()  # of a video, of models that take a fixed number; empty: any number
    columns: frozenset[FeatureColumn] = frozenset()  # if the input is rows of features

    def __or__(self, needs: "Needs") -> "Needs":
        sides = [side for side in (self.image_side, needs.image_side) if side is not None]
        return Needs(
            modalities=self.modalities | needs.modalities,
            sampling_rates=self.sampling_rates | needs.sampling_rates,
            image_side=max(sides, default=None),
            frames=self.frames | needs.frames,
            columns=self.columns | needs.columns,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A result of a stage: one column, or several of which the first is null if the result is missing.

    It is due for a sample that has one of `modalities` (or for every sample, if `modalities` is empty) and all of
    `required`. A failure to read one of those, or of `reads`, costs the sample this output.
    """

    modalities: frozenset[Modality]
    columns: tuple[pa.Field, ...]
    required: frozenset[Modality] = frozenset()
    reads: frozenset[Kind] = frozenset()  # further inputs, used where a sample has them

    @property
    def name(self) -> str:
        """The name of the first column."""
        return str(self.columns[0].name)

    def is_due(self, present: frozenset[Modality]) -> bool:
        """Return whether a sample with these modalities should have this output."""
        return (not self.modalities or bool(self.modalities & present)) and self.required <= present


class Stage:
    """A model applied to the windows of a unit, in three steps that run in three places, so that a GPU never waits.

    `prepare` and `collect` run on the unit's thread, `launch` on the device's thread, which all units share. The next
    work is prepared while the device computes. On a CPU all three run in turn on the device's thread.

    A stage is picklable, cheap until it is loaded, and independent of Beam. It never raises for a fault of a sample: it
    returns the window with its outputs added to `features` (one value per sample, in order) and one Failure for each
    value lost. A simple stage implements `key`, `needs`, `outputs`, `load`, and a `launch` that returns the window.
    """

    device: str = "cpu"  # the torch device on which it runs

    @property
    def key(self) -> str:
        """Identifies the loaded model in the process-wide registry."""
        raise NotImplementedError

    @property
    def needs(self) -> Needs:
        """What the stage reads from a sample."""
        raise NotImplementedError

    @property
    def outputs(self) -> Sequence[Output]:
        """What the stage adds to a sample."""
        raise NotImplementedError

    def load(self) -> Any:
        """Return the model with its weights on the device. Called once per process and `key`."""
        raise NotImplementedError

    def prepare(self, model: Any, batch: Batch) -> Iterator[Any]:
        """Yield the window's work, each item for one call of `launch`: tokenized, packed, on its way to the device.

        On a GPU the current stream is the device's copy stream, so that copies from pinned memory overlap with kernels.
        By default, yield the window itself.
        """
        yield batch

    def launch(self, model: Any, work: Any) -> Any:
        """Start the device's kernels on one item of work and return the result, without waiting for the device.

        Copies to the host go to pinned memory; `collect` reads it.
        """
        raise NotImplementedError

    def collect(self, model: Any, batch: Batch, results: Sequence[Any]) -> Batch:
        """Return the window with the stage's outputs and failures, from the results, which the device has completed.

        By default, return the single result, which is the window.
        """
        [result] = results
        return cast(Batch, result)

    def run(self, model: Any, batch: Batch) -> Batch:
        """Return the window with the stage's outputs and failures: the three steps in turn, on the calling thread."""
        return self.collect(model, batch, [self.launch(model, work) for work in self.prepare(model, batch)])


# Committed by this launch, by an earlier one, or not committed; another process is at it.
UnitStatus = Literal["written", "kept", "failed", "elsewhere"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitReport:
    """The result of a unit. The footer of its Parquet holds the same facts."""

    unit: str
    status: UnitStatus
    tally: Tally = Tally()
    wall_seconds: float = 0.0
    error: str | None = None  # why it failed
    failures_file: str | None = None  # name under _failures/; None if nothing failed
    media_file: str | None = None  # name under _media/; None if the unit has no generated media
    media_bytes: int | None = None  # size of that file
    inputs: tuple[Mapping[str, Any], ...] = ()  # path, size, etag, begin and end of each, and its InputRead
    batch_plan: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the report that `to_json` wrote."""
        return cls(**{**data, "tally": Tally.from_json(data["tally"]), "inputs": tuple(data.get("inputs", ()))})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """The result of a run, as summary.json holds it.

    `tally` sums all units; `rate` and `model_utilisation` cover the units that this launch wrote.
    """

    units_written: int
    units_kept: int
    units_failed: int
    tally: Tally
    wall_seconds: float  # of this launch
    rate: float  # samples per second
    model_utilisation: float | None  # seconds of model time per wall second and device; None if the devices are unknown
    failed: Mapping[str, str] = field(default_factory=dict)  # reason, by unit
    broken: tuple[str, ...] = ()  # why, for each shard of a committed unit that breaks off

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the report that `to_json` wrote; mmbeam 0.1 called `model_utilisation` "speed_of_light"."""
        values = {**data, "tally": Tally.from_json(data["tally"]), "broken": tuple(data.get("broken", ()))}
        if "speed_of_light" in values:
            values["model_utilisation"] = values.pop("speed_of_light")
        return cls(**values)
