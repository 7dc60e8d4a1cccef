"""Frozen options that decide how input is read. No I/O, no heavy imports.

`Reading` decides what a row means and is part of a run's fingerprint.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from mmbeam.errors import UsageError
from mmbeam.names import KIND_OF_EXTENSION, KINDS, Kind, LabelTask, SegmentKind, SynthesisModality

MIB = 1 << 20
SAMPLE_BYTES_FACTOR = 5  # a sample may hold this multiple of Limits.member_bytes: one for each kind of field
CSV_FIELD_BYTES = 16 * MIB


@dataclass(frozen=True, kw_only=True)
class FieldMap:
    """Which field of a sample is its image, audio, text, video and metadata.

    By default the field's last part decides (`b.jpg` is an image). If a sample has several fields of one kind,
    the plain one (`jpg`) wins, then the first in the tar. A field named here is used whatever its extension, and
    no other field of that kind is. Case does not matter.
    """

    image: str | None = None
    audio: str | None = None
    text: str | None = None
    video: str | None = None
    metadata: str | None = None

    def __post_init__(self) -> None:
        for kind in KINDS:
            if (name := getattr(self, kind)) is not None:
                object.__setattr__(self, kind, name.lower())  # readers return field names in lower case

    def kind(self, name: str) -> Kind | None:
        """Return the kind of the field `name` (lower case); None if no stage can use it."""
        for kind in KINDS:
            if getattr(self, kind) == name:
                return kind
        kind_of = KIND_OF_EXTENSION.get(name.rpartition(".")[2])
        return None if kind_of is None or getattr(self, kind_of) is not None else kind_of

    def choose(self, names: Iterable[str]) -> dict[Kind, str]:
        """Return the field to read for each kind present among a sample's field `names`."""
        chosen: dict[Kind, str] = {}
        for name in names:
            kind = self.kind(name)
            if kind is not None and (kind not in chosen or ("." in chosen[kind] and "." not in name)):
                chosen[kind] = name
        return chosen


@dataclass(frozen=True, kw_only=True)
class Table:
    """Which columns of a table hold media. Without any, readers/table.py finds them by name and type."""

    path_columns: tuple[str, ...] = ()  # paths of files, relative to the table
    url_columns: tuple[str, ...] = ()
    bytes_columns: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper bounds on what a member may hold; a larger one is refused. Shards come from untrusted sources.

    On the command line each has an option: `--max-member-bytes` for `member_bytes`, and so on. Raises UsageError for a
    limit that is not a positive number.
    """

    member_bytes: int = 256 * MIB  # of one member; a larger one is not read into memory
    pixels: int = 100_000_000  # width x height: 300 MB decoded
    seconds: float = 1800.0  # of audio, 330 MB at 48 kHz in float32, or of a video
    channels: int = 32  # of audio
    frames: int = 60_000  # of a video's stream, whether they are chosen or not: 33 minutes at 30 per second
    streams: int = 32  # of a video
    text_chars: int = 1_000_000
    metadata_bytes: int = 4 * MIB  # of JSON
    decode_bytes: int = 600_000_000  # of memory, for decoding one image or sound, its file included
    expansion: float = 200.0  # decompressed size / stored size of a shard, beyond the first GiB

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < float("inf"):
                raise UsageError(f"`max_{name}` {value}: expected a positive number")


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """Cleaning and selection of samples between decoding and the models. All of it is off by default."""

    text: tuple[str, ...] = ()  # names from clean.TEXT_STEPS, applied in this order
    where: tuple[str, ...] = ()  # expressions; a sample for which one is not true is skipped
    image_filter: str | None = None  # "median:3" (side in pixels, odd) or "gaussian:1.5" (sigma)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How bytes become samples. Part of the fingerprint."""

    fields: FieldMap = field(default_factory=FieldMap)
    table: Table = field(default_factory=Table)
    limits: Limits = field(default_factory=Limits)
    cleaning: Cleaning = field(default_factory=Cleaning)
    background: tuple[int, int, int] = (255, 255, 255)  # RGB behind transparent pixels
    draft: bool = False  # decode large JPEGs at 1/2, 1/4 or 1/8 where that is still large enough
    frames: int | None = None  # of a video, evenly; None: as many as the model takes, or 8
    fps: float | None = None  # frames per second of a video, instead of `frames`
    isolate_decoding: bool = False  # decode in child processes; not part of the fingerprint

    def configuration(self) -> dict[str, Any]:
        """Return the values that a fingerprint covers. Options that 0.1.0 lacked are left out at their default."""
        values = asdict(self)
        del values["isolate_decoding"]
        for name in ("frames", "fps"):
            if values[name] is None:
                del values[name]
        if self.fields.video is None:
            del values["fields"]["video"]
        for name in ("channels", "metadata_bytes", "decode_bytes", "frames", "streams"):
            if getattr(self.limits, name) == getattr(Limits, name):
                del values["limits"][name]
        if self.table == Table():
            del values["table"]
        return values


@dataclass(frozen=True, kw_only=True)
class Windows:
    """When a window of samples closes. Recorded in run.json, not part of the fingerprint."""

    decoded_bytes: int = 32 * MIB  # of the window's decoded samples
    samples: int = 1024  # in the window

    def on(self, device: str) -> "Windows":
        """Return the limits for `device`: larger on a GPU, so that a window fills a batch, unless they were set."""
        return GPU_WINDOWS if device != "cpu" and self == Windows() else self


GPU_WINDOWS = Windows(decoded_bytes=256 * MIB, samples=4096)  # 340 pictures of 512 x 512; a batch is 256 samples


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """Options of a label stage. None means that the task and the model decide."""

    task: LabelTask
    labels: tuple[str, ...] | None = None  # to look for; or the names of the classes of a model that lacks them
    templates: tuple[str, ...] | None = None  # of the text about a label, which stands for {}
    top_k: int | None = None  # labels, objects or segments per sample
    threshold: float | None = None  # least score
    segments: SegmentKind | None = None


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """Options of a stage that generates images or sounds. None means that the model decides."""

    modality: SynthesisModality
    prompt: str | None = None  # a template over the sample; None: its text
    seed: int = 0
    steps: int | None = None  # of denoising
    guidance: float | None = None  # scale of classifier-free guidance
    format: str | None = None  # of the files: FORMATS_OF_SYNTHESIS; None: the first
    quality: int | None = None  # of jpg and webp, 1 to 100; None: 95
    sampling_rate: int | None = None  # Hz, of sounds


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """A model as the user wrote it: `[NAME=]MODEL`. MODEL is a hub name with optional @revision, or a directory."""

    model: str = field(repr=False)  # a URL may hold a secret
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelRef":
        """Parse `[NAME=]MODEL`. An = in a path or URL belongs to it. Raise UsageError if NAME is not an identifier."""
        name, equals, model = text.partition("=")
        if not equals or "/" in name or ":" in name:
            return cls(model=text)
        if not name.isidentifier():
            raise UsageError(f"`model` {text}: {name!r} cannot prefix a column; use letters, digits and _")
        return cls(model=model, name=name)
