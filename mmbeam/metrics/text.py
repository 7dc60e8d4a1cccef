"""Metrics of a text against its references: what each counts in a sample, and the score that counts give.

A sample's counts added up over a corpus give the corpus score of the library that defines the metric.
"""

import heapq
import importlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Protocol, Self

from mmbeam.errors import UsageError
from mmbeam.metrics.cider import CiderD
from mmbeam.metrics.pairs import Pair

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


Scores = dict[str, float]
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


class TextMetric(Protocol):
    """One metric, or a few that are counted together."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of its scores."""

    @property
    def lower_is_better(self) -> bool: ...

    def measure(self, hypothesis: str, references: Sequence[str]) -> Counts:
        """The sufficient statistics of one sample, which has at least one reference."""

    def sample_scores(self, counts: Counts) -> Scores:
        """The scores of the one sample that was measured."""

    def corpus_scores(self, counts: Counts) -> Scores:
        """The scores of a corpus, of the sum of its samples' counts."""


class Bleu:
    """BLEU, 0 to 100 (Papineni et al., ACL 2002), as sacrebleu: tokenizer 13a, exponential smoothing.

    Counts: tokens of the hypothesis and of the closest reference, then matching n-grams and n-grams by
    order. The score of one sample leaves out the orders that it is too short for.
    """

    names = ("bleu",)
    lower_is_better = False

    def __init__(self) -> None:
        self._bleu = library("sacrebleu").BLEU(effective_order=True)

    def measure(self, hypothesis: str, references: Sequence[str]) -> Counts:
        """Return sacrebleu's statistics of the sample."""
        score = self._bleu.sentence_score(hypothesis, references)
        return Counts((score.sys_len, score.ref_len, *score.counts, *score.totals))

    def sample_scores(self, counts: Counts) -> Scores:
        """Return sentence BLEU."""
        return {"bleu": self._score(counts, effective_order=True)}

    def corpus_scores(self, counts: Counts) -> Scores:
        """Return corpus BLEU."""
        return {"bleu": self._score(counts, effective_order=False)}

    def _score(self, counts: Counts, effective_order: bool) -> float:
        sys_len, ref_len, *ngrams = counts.values
        correct, total = ngrams[: len(ngrams) // 2], ngrams[len(ngrams) // 2 :]
        score = self._bleu.compute_bleu(
            correct, total, sys_len, ref_len, smooth_method="exp", effective_order=effective_order
        )
        return float(score.score)


class Chrf:
    """chrF, 0 to 100 (Popovic, WMT 2015): characters without whitespace, orders 1 to 6, beta 2.

    Equal to sacrebleu's CHRF, which offers no statistics that add up. Counts, by order: the n-grams of the
    hypothesis (if the reference has any), of the best reference, and in both.
    """

    names = ("chrf",)
    lower_is_better = False
    ORDER = 6
    BETA = 2.0

    def measure(self, hypothesis: str, references: Sequence[str]) -> Counts:
        """Return the counts against the reference of the highest score."""
        grams = self._ngrams(hypothesis)
        counts = [
            Counts(
                tuple(
                    count
                    for left, right in zip(grams, self._ngrams(reference), strict=True)
                    for count in (left.total() if right else 0, right.total(), (left & right).total())
                )
            )
            for reference in references
        ]
        return max(counts, key=self._score)

    def _ngrams(self, text: str) -> list[Counter[str]]:
        text = "".join(text.split())
        return [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for n in range(1, self.ORDER + 1)]

    def _score(self, counts: Counts) -> float:
        by_order = zip(counts.values[::3], counts.values[1::3], counts.values[2::3], strict=True)
        orders = [order for order in by_order if order[0] and order[1]]
        precision = sum(match / hypothesis for hypothesis, _, match in orders) / max(1, len(orders))
        recall = sum(match / reference for _, reference, match in orders) / max(1, len(orders))
        if not precision + recall:
            return 0.0
        return 100 * ((1 + self.BETA**2) * precision * recall / (self.BETA**2 * precision + recall))

    def sample_scores(self, counts: Counts) -> Scores:
        """Return chrF of one sample, or of a corpus."""
        return {"chrf": self._score(counts)}

    corpus_scores = sample_scores


class Rouge:
    """ROUGE-1, 2 and L, F measure, 0 to 1: Lin, ACL 2004; as rouge-score without stemming.

    Of several references the best counts. Its tokens are runs of a-z and 0-9: text of another script scores 0.
    """

    names = ROUGE_TYPES
    lower_is_better = False

    def __init__(self) -> None:
        self._scorer = library("rouge_score.rouge_scorer").RougeScorer(ROUGE_TYPES)

    def measure(self, hypothesis: str, references: Sequence[str]) -> Counts:
        scores = self._scorer.score_multi(references, hypothesis)
        return mean_counts([scores[name].fmeasure for name in self.names])

    def sample_scores(self, counts: Counts) -> Scores:
        return dict(zip(self.names, means(counts), strict=True))

    corpus_scores = sample_scores


class Cider:
    """CIDEr-D, 0 to 10, the mean over the samples: see mmbeam.metrics.cider."""

    names = ("cider",)
    lower_is_better = False

    def __init__(self, frequencies: Mapping[str, int]) -> None:
        self._cider = CiderD(frequencies)

    def measure(self, hypothesis: str, references: Sequence[str]) -> Counts:
        return mean_counts([self._cider.score(hypothesis, references)])

    def sample_scores(self, counts: Counts) -> Scores:
        return {"cider": means(counts)[0]}

    corpus_scores = sample_scores


class ExactMatch:
    """The share of samples whose text is one of the references, but for whitespace at the ends; 0 to 1."""

    names = ("exact_match",)
    lower_is_better = False

    def measure(self, hypothesis: str, references: Sequence[str]) -> Counts:
        same = any(hypothesis.strip() == reference.strip() for reference in references)
        return Counts((1, int(same)))

    def sample_scores(self, counts: Counts) -> Scores:
        samples, matches = counts.values
        return {"exact_match": matches / samples}

    corpus_scores = sample_scores


class ErrorRate:
    """Word or character error rate: edits per word or character of the reference; 0 is best, above 1 can be.

    Levenshtein's distance as jiwer counts it, whitespace collapsed, case and punctuation as they are. Of
    several references that with the lowest rate counts. Where there is nothing but silence, jiwer's
    convention holds: the rate is the number of insertions.
    """

    lower_is_better = True

    def __init__(self, unit: Literal["words", "characters"]) -> None:
        self.names = ("wer",) if unit == "words" else ("cer",)
        self._process = getattr(library("jiwer"), f"process_{unit}")

    def measure(self, hypothesis: str, references: Sequence[str]) -> Counts:
        return min((self._edits(hypothesis, reference) for reference in references), key=_rate)

    def _edits(self, hypothesis: str, reference: str) -> Counts:
        found = self._process(reference, hypothesis)
        wrong = found.substitutions + found.deletions
        return Counts((wrong + found.insertions, wrong + found.hits))

    def sample_scores(self, counts: Counts) -> Scores:
        return {self.names[0]: _rate(counts)}

    corpus_scores = sample_scores


def _rate(counts: Counts) -> float:
    edits, length = counts.values
    return edits / max(length, 1)


_METRICS: Mapping[str, Callable[[], TextMetric]] = {
    "bleu": Bleu,
    "chrf": Chrf,
    "rouge": Rouge,
    "exact_match": ExactMatch,
    "wer": lambda: ErrorRate("words"),
    "cer": lambda: ErrorRate("characters"),
}
CIDER = "cider"  # the one that must know the whole corpus first
METRICS = (*_METRICS, CIDER)
ERROR_RATES = frozenset({"wer", "cer"})  # to these an empty reference is silence, and not a missing one


def text_metrics(names: Sequence[str], frequencies: Mapping[str, int] | None = None) -> dict[str, TextMetric]:
    """The metrics of these names; `frequencies` are the corpus's document frequencies, for CIDEr-D.

    Raises UsageError for a name that is none, or whose library is not installed.
    """
    for name in names:
        if name not in METRICS:
            raise UsageError(f"metric {name!r} is unknown; the metrics are {', '.join(METRICS)}")
    return {name: Cider(frequencies or {}) if name == CIDER else _METRICS[name]() for name in names}


def library(name: str) -> Any:
    """An optional library. Raises UsageError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(f"this metric needs {error.name}; install it with: pip install 'mmbeam[eval]'") from error


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
