"""Random numbers that are a pure function of seed, index and purpose, on any machine.

Philox is a counter-based generator: its words are specified, not merely whatever a library makes
today. The key is the sample, the counter's top word the purpose, so streams never overlap.
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
Key = tuple[int, int]  # seed and index, each from 0 to 2**64 - 1


class Stream(IntEnum):
    """What numbers are for. Each purpose has its own stream, so that one can change alone."""

    SCENE = 0
    IMAGE = 1
    GRAIN = 2
    AUDIO = 3
    SPECTRUM = 4
    FLOOR = 5
    TAG = 6


def words(key: Key, stream: Stream, count: int) -> npt.NDArray[np.uint64]:
    """`count` random words of 64 bits. Raises OverflowError if seed or index is out of its range."""
    exact = np.array(key, np.uint64)  # as a tuple, one number above 2**63 would round both to floats
    return np.random.Philox(key=exact, counter=(0, 0, 0, int(stream))).random_raw(count)


def uniforms(key: Key, stream: Stream, count: int) -> npt.NDArray[np.float64]:
    """`count` numbers in [0, 1), each made of the top 53 bits of a word."""
    return (words(key, stream, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def grains(key: Key, stream: Stream, count: int) -> npt.NDArray[np.float32]:
    """`count` numbers in [-1, 1), coarse and cheap: one byte each."""
    octets = words(key, stream, math.ceil(count / 8)).astype("<u8").view(np.int8)[:count]
    return octets.astype(np.float32) * np.float32(1 / 128)


def pick(uniform: float, options: Sequence[T]) -> T:
    """The option that a number in [0, 1) stands for."""
    return options[int(uniform * len(options))]


def between(uniform: float, bounds: tuple[float, float]) -> float:
    """A number in [0, 1) stretched to `bounds`."""
    return bounds[0] + uniform * (bounds[1] - bounds[0])
