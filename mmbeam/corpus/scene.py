"""The scene behind a sample, its caption and its tag, without rendering.

The caption has one clause per modality. The caption of any subset of modalities is its clauses, in order.

Random numbers are a pure function of seed, index and purpose, on any machine: Philox is a counter-based
generator whose output is specified. Its key is the sample and the top word of its counter the purpose, so
that streams never overlap.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import combinations
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mmbeam.names import FUSION_MODALITIES, Modality

T = TypeVar("T")
Key = tuple[int, int]  # seed and index, each from 0 to 2**64 - 1


class Stream(IntEnum):
    """Purposes of random numbers. Each has a separate stream, so that a change of one does not affect the others."""

    SCENE = 0
    IMAGE = 1
    GRAIN = 2
    AUDIO = 3
    SPECTRUM = 4
    FLOOR = 5
    TAG = 6


def words(key: Key, stream: Stream, count: int) -> npt.NDArray[np.uint64]:
    """Return `count` random words of 64 bits. Raises OverflowError if seed or index is out of range."""
    exact = np.array(key, np.uint64)  # numpy would convert a tuple with a number above 2**63 to floats
    return np.random.Philox(key=exact, counter=(0, 0, 0, int(stream))).random_raw(count)


def uniforms(key: Key, stream: Stream, count: int) -> npt.NDArray[np.float64]:
    """Return `count` numbers in [0, 1), from the top 53 bits of a word each."""
    return (words(key, stream, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def grains(key: Key, stream: Stream, count: int) -> npt.NDArray[np.float32]:
    """Return `count` coarse numbers in [-1, 1), from one byte each."""
    octets = words(key, stream, math.ceil(count / 8)).astype("<u8").view(np.int8)[:count]
    return octets.astype(np.float32) * np.float32(1 / 128)


def pick(uniform: float, options: Sequence[T]) -> T:
    """Return an option, chosen by a number in [0, 1)."""
    return options[int(uniform * len(options))]


def between(uniform: float, bounds: tuple[float, float]) -> float:
    """Return a number in [0, 1) scaled to `bounds`."""
    return bounds[0] + uniform * (bounds[1] - bounds[0])


FORMS = ("circle", "square", "triangle", "ring", "cross", "star")
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (224, 36, 40),
    "orange": (250, 136, 14),
    "yellow": (252, 224, 48),
    "green": (52, 178, 74),
    "blue": (52, 110, 240),
    "purple": (150, 58, 204),
    "pink": (250, 152, 200),
    "white": (244, 244, 244),
}
SIZES: Mapping[str, tuple[float, float]] = {"small": (8.0, 8.4), "large": (12.0, 12.8)}  # radius at 64 pixels
POSITIONS = (  # a grid of 3 x 3, in reading order
    "at the top left", "at the top", "at the top right",
    "on the left", "in the middle", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
KINDS = ("tone", "rising chirp", "falling chirp", "noise")
PITCHES: Mapping[str, tuple[float, float]] = {"low": (150, 175), "medium": (350, 410), "high": (800, 880)}  # Hz
TEMPI: Mapping[str, tuple[float, float]] = {"steady": (0, 0), "slow": (2.0, 2.6), "fast": (6, 8)}  # pulses per second
LOUDNESSES: Mapping[str, tuple[float, float]] = {"quiet": (0.022, 0.028), "loud": (0.15, 0.18)}  # RMS: 15 dB apart
PLACES = (
    "garden", "harbour", "market", "forest", "library", "kitchen", "museum", "park",
    "village", "valley", "station", "desert", "castle", "stadium", "workshop", "theatre",
)  # fmt: skip
TIMES = ("dawn", "noon", "dusk", "night")
TAGS = (
    "{place} {time}",
    "{time}, {place}",
    "place: {place}; time: {time}",
    "#{place} #{time}",
    "the {place} at {time}",
    "taken at {time} / {place}",
)
CASES = (str.lower, str.upper, str.title)

VOCABULARY = tuple(
    sorted(
        {word for phrase in (*POSITIONS, *KINDS) for word in phrase.split()}
        | {*FORMS, *COLOURS, *SIZES, *PITCHES, *TEMPI, *LOUDNESSES, *PLACES, *TIMES}
        | {"a", "and", "with", "in", "the", "at", ",", "."}
    )
)


def _pairs(distance: float) -> tuple[tuple[int, int], ...]:
    """Return pairs of grid positions, in reading order, at least `distance` cells apart."""
    pairs = combinations(range(len(POSITIONS)), 2)
    return tuple((a, b) for a, b in pairs if math.dist(divmod(a, 3), divmod(b, 3)) >= distance)


_PAIRS_OF_SMALL, _PAIRS = _pairs(1.4), _pairs(2.0)  # positions at which two shapes do not touch


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape in an image; each attribute is a word or phrase of the caption."""

    form: str
    colour: str
    size: str
    position: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.form} {self.position}"


@dataclass(frozen=True, slots=True)
class Sound:
    """The audio of a scene; each attribute is a word or phrase of the caption."""

    kind: str
    pitch: str
    tempo: str
    loudness: str

    def __str__(self) -> str:
        return f"a {self.loudness} {self.tempo} {self.pitch} {self.kind}"


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of one sample. Two shapes are in reading order, as in the caption."""

    seed: int
    index: int
    shapes: tuple[Shape, ...]
    sound: Sound
    place: str
    time: str

    @classmethod
    def draw(cls, seed: int, index: int) -> "Scene":
        """Return sample `index` of `seed`; both are integers from 0 to 2**64 - 1."""
        u = uniforms((seed, index), Stream.SCENE, 16).tolist()
        sizes = [pick(u[0], tuple(SIZES)), pick(u[1], tuple(SIZES))]
        cells: tuple[int, ...] = pick(u[3], _PAIRS_OF_SMALL if sizes == ["small", "small"] else _PAIRS)
        if u[2] < 0.5:  # one shape
            cells = (pick(u[3], range(len(POSITIONS))),)
        shapes = tuple(
            Shape(pick(form, FORMS), pick(colour, tuple(COLOURS)), size, POSITIONS[cell])
            for form, colour, size, cell in zip(u[4:6], u[6:8], sizes, cells, strict=False)
        )
        options = (KINDS, tuple(PITCHES), tuple(TEMPI), tuple(LOUDNESSES))
        sound = Sound(*(pick(value, choices) for value, choices in zip(u[8:12], options, strict=True)))
        return cls(seed, index, shapes, sound, pick(u[12], PLACES), pick(u[13], TIMES))

    @property
    def key(self) -> str:
        """The sample's key in a shard. It includes the seed, so that corpora can be joined."""
        return f"{self.seed}-{self.index:06d}"

    def clauses(self) -> dict[Modality, str]:
        """Return the clause of each modality. It cannot be derived from the other modalities."""
        return {
            "image": " and ".join(map(str, self.shapes)),
            "audio": f"with {self.sound}",
            "text": f"in the {self.place} at {self.time}",
        }

    def caption(self, modalities: Collection[Modality] = FUSION_MODALITIES) -> str:
        """Return the caption for `modalities`. All its words are in VOCABULARY."""
        clauses = self.clauses()
        return ", ".join(clauses[modality] for modality in FUSION_MODALITIES if modality in modalities) + "."


def generate_scenes(seed: int, start: int = 0, count: int | None = None) -> Iterator[Scene]:
    """Yield scenes `start`, `start + 1`, ... of `seed`; without end if `count` is None."""
    index = start
    while count is None or index < start + count:
        yield Scene.draw(seed, index)
        index += 1


def tag(scene: Scene) -> str:
    """Return the sample's text: place and time in one of several templates and cases."""
    template, case = uniforms((scene.seed, scene.index), Stream.TAG, 2).tolist()
    return str(pick(case, CASES)(pick(template, TAGS).format(place=scene.place, time=scene.time)))
