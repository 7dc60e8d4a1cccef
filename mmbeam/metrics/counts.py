"""Sufficient statistics: what is known of a corpus's score after some of its samples, as integers that add up.

Integers make the sum exact: any partition of a corpus, in any order, gives the same score to the last bit.
A mean of real numbers is kept as fixed-point integers for the same reason.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

FRACTION_BITS = 128  # a double above 2**-75 (3e-23) is exact in it; a smaller one is cut at 3e-39


@dataclass(frozen=True, slots=True)
class Counts:
    """Integers whose meaning is that of the metric which made them. `+` adds them one by one."""

    values: tuple[int, ...]

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(tuple(a + b for a, b in zip(self.values, other.values, strict=True)))


def mean_counts(values: Sequence[float]) -> Counts:
    """The counts of one sample from which `means` takes the mean of each of `values` over the samples."""
    return Counts((1, *(int(math.ldexp(value, FRACTION_BITS)) for value in values)))


def means(counts: Counts) -> list[float]:
    """The mean over the samples of each value, correctly rounded."""
    samples, *totals = counts.values
    return [total / (samples << FRACTION_BITS) for total in totals]
