"""Frozen options of a job, every one with its default and its reason. No I/O, no heavy imports.

What is in `Reading` decides what a row means and is part of a run's fingerprint.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from mmbeam.errors import UsageError
from mmbeam.types import KINDS, Kind

MIB = 1 << 20
SHIPPED = "shipped"  # the name of the small fusion model that is part of this package
Engine = Literal["transformers", "vllm"]  # what runs a model that generates
UNNAMED = "model"  # what a run calls a model that was given no name

Task = Literal["caption", "transcribe", "translate", "summarize", "dialogue"]  # what a model that writes is asked for
TASKS: tuple[Task, ...] = get_args(Task)
COLUMN_OF: Mapping[Task, str] = {  # where the text of a task is written
    "caption": "caption",
    "transcribe": "transcript",
    "translate": "translation",
    "summarize": "summary",
    "dialogue": "reply",
}

EXTENSIONS: Mapping[Kind, tuple[str, ...]] = {
    "image": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    "audio": ("wav", "flac", "mp3", "ogg", "opus", "m4a"),
    "text": ("txt",),
    "metadata": ("json",),
}
KIND_OF_EXTENSION: Mapping[str, Kind] = {ext: kind for kind, exts in EXTENSIONS.items() for ext in exts}


@dataclass(frozen=True, kw_only=True)
class FieldMap:
    """Which field of a sample is its image, audio, text and metadata.

    A field's last part decides (`b.jpg` is an image). Of several of one kind the plain one (`jpg`)
    comes first, then the others in the order of the tar; an option that names a field takes that
    field and no other, whatever its extension.
    """

    image: str | None = None
    audio: str | None = None
    text: str | None = None
    metadata: str | None = None

    def kind(self, name: str) -> Kind | None:
        """The kind of the field `name` (lower case), None if it is of no use to anybody."""
        for kind in KINDS:
            if getattr(self, kind) == name:
                return kind
        kind_of = KIND_OF_EXTENSION.get(name.rpartition(".")[2])
        return None if kind_of is None or getattr(self, kind_of) is not None else kind_of

    def choose(self, names: Iterable[str]) -> dict[Kind, str]:
        """Of a sample's field names, the one that stands for each kind found."""
        chosen: dict[Kind, str] = {}
        for name in names:
            kind = self.kind(name)
            if kind is not None and (kind not in chosen or ("." in chosen[kind] and "." not in name)):
                chosen[kind] = name
        return chosen


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a member may claim before it is refused. Shards are written by strangers."""

    member_bytes: int = 256 * MIB  # a larger member is not read into memory
    pixels: int = 100_000_000  # width x height: 300 MB decoded
    seconds: float = 1800.0  # of sound: 330 MB at 48 kHz in float32
    text_chars: int = 1_000_000
    expansion: float = 200.0  # a compressed shard may grow to so many times its size (plus 1 GiB)


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """What is done to a sample between decoding and the models. All of it off by default."""

    text: tuple[str, ...] = ()  # of clean.TEXT_STEPS, in the order given
    where: tuple[str, ...] = ()  # expressions; a sample for which one is false is skipped by its name
    image_filter: str | None = None  # "median:3" (side in pixels, odd) or "gaussian:1.5" (sigma)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How bytes become samples: part of the fingerprint."""

    fields: FieldMap = field(default_factory=FieldMap)
    limits: Limits = field(default_factory=Limits)
    cleaning: Cleaning = field(default_factory=Cleaning)
    background: tuple[int, int, int] = (255, 255, 255)  # what a transparent picture is laid on
    draft: bool = False  # decode large JPEGs at 1/2, 1/4, 1/8 where that is still large enough


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How samples are grouped on their way to the model. Recorded, not in the fingerprint."""

    decoded_bytes: int = 32 * MIB  # a window closes when its samples decode to this much,
    samples: int = 1024  # or when it holds so many


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """A model as the user named it: `[NAME=]MODEL`, MODEL a hub name with optional @revision or a directory."""

    model: str
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelRef":
        name, equals, model = text.partition("=")
        if not equals:
            return cls(model=text)
        if not name.isidentifier():
            raise UsageError(f"--model {text}: {name!r} is no column prefix; use letters, digits and _")
        return cls(model=model, name=name)
