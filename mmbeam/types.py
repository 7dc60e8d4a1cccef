"""The values that flow through a job, in the order in which they flow.

Shard -> WorkUnit -> RawSample -> Sample -> Batch -> UnitReport -> RunReport

All are plain frozen objects that pickle. A Stage is what turns a Batch into one with more features; it
is declared here, beside the Needs and Outputs by which it says what it takes and gives, so that the
reading side and the writing side know no model. Nothing here imports Beam or torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Modality = Literal["image", "audio", "text"]
MODALITIES: tuple[Modality, ...] = ("image", "audio", "text")
Kind = Literal["image", "audio", "text", "metadata"]
KINDS: tuple[Kind, ...] = ("image", "audio", "text", "metadata")

ImageHWC = npt.NDArray[np.uint8]  # [height, width, 3], RGB
Waveform = npt.NDArray[np.float32]  # [frames], mono, nominally -1 to 1
Feature = npt.NDArray[np.floating[Any]]  # [width], or [tokens, width]: what an encoder made of a modality


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One input file as a listing saw it.

    `path` is the shard's identity in rows, plans and logs: the URL without user part and query string.
    `url` is what is opened, and is kept out of every repr.
    """

    path: str
    url: str = field(repr=False)
    size: int | None = None  # bytes as stored; None where the store does not say
    etag: str | None = None
    cuttable: bool = True  # False where parts of it would each be read from the beginning


class Seam(NamedTuple):
    """Where one part of a shard ends and the next begins, as io/parts.py finds it from the place of the cut."""

    sample: int | None  # where the first sample behind it begins; None: no sample is behind it
    header: int | None  # of the last member before that sample, if it lies behind the cut; else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A shard, or the part of an uncompressed one between the seams that the cuts at `begin` and `end` lead to."""

    shard: Shard
    begin: int = 0
    end: int | None = None  # None: to the end of the shard
    seam: Seam | None = None  # where it begins, if that is known; None: to be found

    @property
    def is_part(self) -> bool:
        return self.begin > 0 or self.end is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What reading an input has shown, beside its samples."""

    begin: Seam | None = None  # of a part; None if it begins with the shard, or if no header begins in it,
    end: Seam | None = None  # which leaves this one out too
    error: str | None = None  # why nothing of it could be read, if its unit has others that can


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkUnit:
    """What one attempt reads and one Parquet holds. `id` is a safe file name and never changes."""

    id: str
    inputs: tuple[Input, ...]
    limit: int | None = None  # stop after so many samples
    replace: bool = False  # do it again although it is committed (--retry-failures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A member that could not be read whole, and why; the sample that holds it is still a sample."""

    field: str  # lower case; "" if the member's header itself is damaged
    offset: int  # of the member's header in the uncompressed tar
    error: str  # class of error: "LimitError", "DecodeError"
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RawSample:
    """Adjacent members of one key, undecoded."""

    key: str
    shard: str  # Shard.path
    offset: int  # of the sample's first header in the uncompressed tar, a pax or GNU prefix included
    members: Mapping[str, bytes]  # by field (lower case), in the tar's order; only what was asked for
    fields: tuple[str, ...]  # every field the sample has, those not asked for included
    damages: tuple[Damage, ...] = ()
    truncated: bool = False  # the shard ended, or could not be read on, inside this sample
    repeated: bool = False  # its key came before in the same input


@dataclass(frozen=True, slots=True, kw_only=True)
class Audio:
    """One sound, mono, at each sampling rate that a stage asked for, or at its own if none did."""

    waves: Mapping[int, Waveform]  # by sampling rate in Hz
    seconds: float  # of the whole sound

    def at(self, rate: int | None) -> tuple[Waveform, int]:
        """Return the waveform at `rate` Hz, or else at the highest rate decoded, and its rate."""
        best = rate if rate is not None and rate in self.waves else max(self.waves)
        return self.waves[best], best


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One decoded sample. A modality that is `present` but None could not be decoded."""

    key: str
    shard: str
    offset: int
    present: frozenset[Modality] = frozenset()
    image: ImageHWC | None = None
    image_size: tuple[int, int] | None = None  # width, height as shown (after EXIF orientation)
    audio: Audio | None = None
    text: str | None = None  # as it was
    text_clean: str | None = None  # what cleaning made of it; None if cleaning was not asked for
    metadata: str | None = None  # the JSON as it was
    features: Mapping[str, Feature] = field(default_factory=dict)  # by column, where rows are read in place of shards

    def has(self, modality: Modality) -> bool:
        """Whether the modality was found and decoded."""
        return getattr(self, modality) is not None

    @property
    def model_text(self) -> str | None:
        """The text a model sees: cleaned if cleaning was asked for."""
        return self.text if self.text_clean is None else self.text_clean

    @property
    def nbytes(self) -> int:
        """Decoded size in bytes, by which windows close."""
        image = 0 if self.image is None else self.image.nbytes
        audio = 0 if self.audio is None else sum(wave.nbytes for wave in self.audio.waves.values())
        features = sum(feature.nbytes for feature in self.features.values())
        return image + audio + features + len(self.text or "") + len(self.metadata or "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why one sample lost some or all of the outputs that were due."""

    key: str
    shard: str
    offset: int
    modality: str  # "image", "audio", "text", "metadata"; "" if it is the whole sample
    step: str  # "read", "decode", "embed", "generate"
    error: str  # class of error
    message: str
    outputs: tuple[str, ...] = ()  # columns lost; empty: all that are due from `modality`


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Counts and seconds that add up: of a window, a unit, a run.

    The law of conservation: samples == rows + failed + sum(skipped.values()).
    """

    samples: int = 0
    rows: int = 0
    failed: int = 0
    impaired: int = 0  # rows that lost some of their outputs
    repeated_keys: int = 0
    bytes_read: int = 0  # as stored
    skipped: Mapping[str, int] = field(default_factory=dict)  # by the name of the skip
    present: Mapping[str, int] = field(default_factory=dict)  # samples that hold a modality
    made: Mapping[str, int] = field(default_factory=dict)  # values that are not null, by output
    failures: Mapping[str, int] = field(default_factory=dict)  # records, by "step: error"
    warnings: Mapping[str, int] = field(default_factory=dict)  # oddities that lost nothing
    seconds: Mapping[str, float] = field(default_factory=dict)  # by step: what it computed or waited

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(**{f.name: _plus(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})


def _plus(a: Any, b: Any) -> Any:
    if isinstance(a, Mapping):
        return {name: a.get(name, 0) + b.get(name, 0) for name in {**a, **b}}
    return a + b


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A window of one unit's samples, in order, and what was made of them so far.

    Batches of a unit are numbered from 0 and come in order; the one with `last` ends the unit (it may
    be empty). `features` hold one value per sample each, null where a sample has none.
    A unit that was committed before is a single empty last batch that carries its `report`; a unit
    that cannot be read ends with a batch that carries the reason in `broken`.
    """

    unit: WorkUnit
    index: int
    last: bool
    samples: tuple[Sample, ...] = ()
    features: Mapping[str, pa.Array] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    tally: Tally = Tally()
    report: "UnitReport | None" = None
    broken: str | None = None
    found: tuple[Found, ...] = ()  # of each of the unit's inputs, on the last window


class Origin(NamedTuple):
    """The model that features come from: two of equal width may have nothing else in common."""

    model: str  # as it was named, with its @revision
    digest: str  # of its files

    def __str__(self) -> str:
        return f"{self.model} (digest {self.digest[:12]})"


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureColumn:
    """A column of features, computed before, that a model takes in place of a modality's media."""

    name: str
    modality: Modality
    width: int  # of one vector
    tokens: bool = False  # [tokens, width] per sample, and not [width]
    origin: Origin | None = None  # what made those it was trained on; None: nobody knows


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a stage takes of a sample, so that nothing is decoded for nobody."""

    modalities: frozenset[Modality] = frozenset()
    sampling_rates: frozenset[int] = frozenset()  # Hz; empty: the sound's own rate
    image_side: int | None = None  # pixels: the largest shorter side any model resizes to
    columns: frozenset[FeatureColumn] = frozenset()  # where rows are read in place of shards

    def __or__(self, other: "Needs") -> "Needs":
        sides = [side for side in (self.image_side, other.image_side) if side is not None]
        return Needs(
            modalities=self.modalities | other.modalities,
            sampling_rates=self.sampling_rates | other.sampling_rates,
            image_side=max(sides, default=None),
            columns=self.columns | other.columns,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A thing a stage makes: a column, or several of which the first says whether it was made.

    It is due for every sample in which one of `modalities` is present, or whatever it holds if none is named,
    and all of `required`. What could not be read of those, or of `reads`, costs it.
    """

    modalities: frozenset[Modality]
    columns: tuple[pa.Field, ...]
    required: frozenset[Modality] = frozenset()
    reads: frozenset[Kind] = frozenset()  # what else it is made of, where a sample has it

    @property
    def name(self) -> str:
        return str(self.columns[0].name)

    def due(self, present: frozenset[Modality]) -> bool:
        """Whether a sample that holds these modalities should have it."""
        return (not self.modalities or bool(self.modalities & present)) and self.required <= present


class Stage(Protocol):
    """A model on a window. Picklable and cheap until it is loaded; it knows nothing of Beam.

    `load` is called once per process and `key`; `run` gets what it returned, on the thread that owns
    the device. `run` never raises for what is wrong with a sample: it gives the batch back with its
    outputs added to `features` (one value per sample, in order) and a Failure for each value lost.
    """

    @property
    def key(self) -> str:
        """Names the loaded model in the process-wide registry."""

    @property
    def device(self) -> str: ...

    @property
    def needs(self) -> Needs: ...

    @property
    def outputs(self) -> Sequence[Output]: ...

    def load(self) -> Any: ...

    def run(self, model: Any, batch: Batch) -> Batch: ...


UnitStatus = Literal["written", "kept", "failed"]  # by this run, by an earlier one, not at all


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitReport:
    """What became of a unit. The same facts stand in the footer of its Parquet."""

    unit: str
    status: UnitStatus
    tally: Tally = Tally()
    wall_seconds: float = 0.0
    error: str | None = None  # why it failed
    failures_file: str | None = None  # name under failures/, None if nothing failed
    inputs: tuple[Mapping[str, Any], ...] = ()  # path, size, etag, begin, end, and what was found
    batch_plan: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        values = dict(data)
        values["tally"] = Tally(**values["tally"])
        values["inputs"] = tuple(values.get("inputs", ()))
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What became of a run; summary.json holds the same.

    `tally` sums all units; rate and speed of light are of the units that this launch wrote.
    """

    units_written: int
    units_kept: int
    units_failed: int
    tally: Tally
    wall_seconds: float  # of this launch
    rate: float  # samples per second
    speed_of_light: float | None  # seconds the models computed per second of wall time and (known) device
    failed: Mapping[str, str] = field(default_factory=dict)  # why, by unit

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "tally": Tally(**data["tally"])})
