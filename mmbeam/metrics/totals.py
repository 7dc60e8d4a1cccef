"""What is known of a part of a corpus after scoring it: counts that add up, and the worst few samples."""

import heapq
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from mmbeam.metrics.counts import Counts
from mmbeam.metrics.pairs import Pair
from mmbeam.metrics.text import TextMetric

SHOWN = 5  # of the worst samples
SHOWN_CHARS = 500  # of a text that is kept to be shown


@dataclass(frozen=True, order=True, slots=True)
class Worst:
    """A sample among the worst; they are ordered from the worst on, ties by where the sample is."""

    badness: float  # the score, negative where a low one is good
    shard: str
    offset: int
    key: str
    hypothesis: str
    reference: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTotals:
    """Counts of rows and of each metric. `+` is associative and commutative, and exact."""

    rows: int = 0
    scored: int = 0
    without_hypothesis: int = 0
    without_reference: int = 0  # of those that have a hypothesis
    empty: int = 0  # of those scored: the hypothesis is blank
    references: int = 0  # of those scored
    foreign: int = 0  # of those scored: no reference has a letter or digit of ASCII, which is all that ROUGE sees
    counts: Mapping[str, Counts] = field(default_factory=dict)  # by metric
    worst: tuple[Worst, ...] = ()

    def __add__(self, other: "TextTotals") -> "TextTotals":
        numbers = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.type is int}
        counts = dict(self.counts)
        for name, more in other.counts.items():
            counts[name] = counts[name] + more if name in counts else more
        worst = heapq.nsmallest(SHOWN, (*self.worst, *other.worst))
        return TextTotals(**numbers, counts=counts, worst=tuple(worst))

    def scores(self, metrics: Mapping[str, TextMetric]) -> dict[str, float]:
        """The corpus's scores by those metrics that have counted something."""
        found: dict[str, float] = {}
        for name, counts in self.counts.items():
            found |= metrics[name].corpus_scores(counts)
        return found

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "counts": {name: list(counts.values) for name, counts in self.counts.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        counts = {name: Counts(tuple(values)) for name, values in data["counts"].items()}
        worst = tuple(Worst(**each) for each in data["worst"])
        return cls(**{**data, "counts": counts, "worst": worst})


def score_pair(pair: Pair, metrics: Mapping[str, TextMetric]) -> tuple[TextTotals, dict[str, float]]:
    """The totals of one row, and its scores by name: empty if there is nothing to compare.

    The first of `metrics` says what is worst.
    """
    if pair.hypothesis is None:
        return TextTotals(rows=1, without_hypothesis=1), {}
    if not pair.references:
        return TextTotals(rows=1, without_reference=1), {}
    counts = {name: metric.measure(pair.hypothesis, pair.references) for name, metric in metrics.items()}
    scores = {
        name: score for metric, found in counts.items() for name, score in metrics[metric].sample_scores(found).items()
    }
    totals = TextTotals(
        rows=1,
        scored=1,
        empty=int(not pair.hypothesis.strip()),
        references=len(pair.references),
        foreign=int(not any(_has_ascii_word(text) for text in pair.references)),
        counts=counts,
        worst=(_worst(pair, next(iter(metrics.values())), scores),),
    )
    return totals, scores


def _worst(pair: Pair, metric: TextMetric, scores: Mapping[str, float]) -> Worst:
    score = scores[metric.names[0]]
    badness = -score if metric.lower_is_better else score
    hypothesis, reference = (text[:SHOWN_CHARS] for text in (pair.hypothesis or "", pair.references[0]))
    return Worst(badness, pair.shard, pair.offset, pair.key, hypothesis, reference)


def _has_ascii_word(text: str) -> bool:
    return any(char.isascii() and char.isalnum() for char in text)
