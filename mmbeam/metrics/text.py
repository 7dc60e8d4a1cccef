"""Text metrics: the counts of a sample, the scores computed from sums of counts, and the totals of a corpus.

Counts are integers, so that sums are exact: any partition of a corpus, in any order, has the same score to the last
bit, which equals the corpus score of the library that defines the metric. Means of real numbers are kept as
fixed-point integers for the same reason.
"""

import heapq
import importlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from mmbeam.errors import UsageError
from mmbeam.metrics.cider import CiderD
from mmbeam.metrics.pairs import Pair

Scores = dict[str, float]

FRACTION_BITS = 128  # of fixed-point numbers: doubles above 2**-75 (3e-23) are exact, smaller ones truncated at 3e-39
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
WORST = 5  # number of worst samples in the totals
SHOWN_CHARS = 500  # of the texts of these samples


@dataclass(frozen=True, slots=True)
class Counts:
    """Integers whose meaning depends on the metric. `+` adds them element by element."""

    values: tuple[int, ...]

    def __add__(self, counts: "Counts") -> "Counts":
        return Counts(tuple(a + b for a, b in zip(self.values, counts.values, strict=True)))


def mean_counts(values: Sequence[float]) -> Counts:
    """Return the counts of one sample; `means` of a sum of them are the means of the values."""
    return Counts((1, *(int(math.ldexp(value, FRACTION_BITS)) for value in values)))


def means(counts: Counts) -> list[float]:
    """Return the mean of each value over the samples, correctly rounded."""
    samples, *totals = counts.values
    return [total / (samples << FRACTION_BITS) for total in totals]


class TextMetric:
    """A metric, or several that share their counts."""

    names: tuple[str, ...]  # of the scores
    lower_is_better = False

    def measure(self, hypothesis: str, references: Sequence[str]) -> Counts:
        """Return the counts of one sample; at least one reference is required."""
        raise NotImplementedError

    def sample_scores(self, counts: Counts) -> Scores:
        """Return the scores of one sample."""
        raise NotImplementedError

    def corpus_scores(self, counts: Counts) -> Scores:
        """Return the scores of a corpus from the sum of the counts of its samples."""
        return self.sample_scores(counts)


class Bleu(TextMetric):
    """BLEU, 0 to 100 (Papineni et al., ACL 2002), as sacrebleu: tokenizer 13a, exponential smoothing.

    Counts: tokens of the hypothesis and of the closest reference, then by order the matching n-grams, and by order all
    n-grams. The score of a sample omits the orders that are longer than its hypothesis.
    """

    names = ("bleu",)

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


class Chrf(TextMetric):
    """chrF, 0 to 100 (Popovic, WMT 2015): characters without whitespace, orders 1 to 6, beta 2.

    Equal to sacrebleu's CHRF, which has no public statistics that can be summed. Counts, by order: the n-grams of the
    hypothesis (if the reference has any), of the best reference, and in both.
    """

    names = ("chrf",)
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


class Rouge(TextMetric):
    """ROUGE-1, 2 and L, F measure, 0 to 1 (Lin, ACL 2004), as rouge-score without stemming.

    Of several references, the best score counts. Tokens are runs of a-z and 0-9: text in another script scores 0.
    """

    names = ROUGE_TYPES

    def __init__(self) -> None:
        self._scorer = library("rouge_score.rouge_scorer").RougeScorer(ROUGE_TYPES)

    def measure(self, hypothesis: str, references: Sequence[str]) -> Counts:
        """Return the scores of the sample, to be averaged."""
        scores = self._scorer.score_multi(references, hypothesis)
        return mean_counts([scores[name].fmeasure for name in self.names])

    def sample_scores(self, counts: Counts) -> Scores:
        """Return the mean scores."""
        return dict(zip(self.names, means(counts), strict=True))


class Cider(TextMetric):
    """CIDEr-D, 0 to 10, the mean over the samples: see mmbeam.metrics.cider."""

    names = ("cider",)

    def __init__(self, frequencies: Mapping[str, int]) -> None:
        self._cider = CiderD(frequencies)

    def measure(self, hypothesis: str, references: Sequence[str]) -> Counts:
        """Return the score of the sample, to be averaged."""
        return mean_counts([self._cider.score(hypothesis, references)])

    def sample_scores(self, counts: Counts) -> Scores:
        """Return the mean score."""
        return {"cider": means(counts)[0]}


class ExactMatch(TextMetric):
    """The fraction of samples whose text equals a reference, apart from whitespace at the ends; 0 to 1."""

    names = ("exact_match",)

    def measure(self, hypothesis: str, references: Sequence[str]) -> Counts:
        """Return the number of samples and of matches."""
        return Counts((1, int(any(hypothesis.strip() == reference.strip() for reference in references))))

    def sample_scores(self, counts: Counts) -> Scores:
        """Return the fraction of matches."""
        samples, matches = counts.values
        return {"exact_match": matches / samples}


class ErrorRate(TextMetric):
    """Word or character error rate: edits per word or character of the reference; 0 is best, it may exceed 1.

    The Levenshtein distance as in jiwer: whitespace is collapsed, case and punctuation are kept. Of several
    references, the one with the lowest rate counts. For an empty reference jiwer's convention applies: the rate is
    the number of insertions.
    """

    lower_is_better = True

    def __init__(self, unit: Literal["words", "characters"]) -> None:
        self.names = ("wer",) if unit == "words" else ("cer",)
        self._process = getattr(library("jiwer"), f"process_{unit}")

    def measure(self, hypothesis: str, references: Sequence[str]) -> Counts:
        """Return the number of edits, and of words or characters in the reference."""
        alignments = [self._process(reference, hypothesis) for reference in references]
        edits = [
            Counts((a.substitutions + a.deletions + a.insertions, a.substitutions + a.deletions + a.hits))
            for a in alignments
        ]
        return min(edits, key=lambda counts: self.sample_scores(counts)[self.names[0]])

    def sample_scores(self, counts: Counts) -> Scores:
        """Return the error rate."""
        edits, length = counts.values
        return {self.names[0]: edits / max(length, 1)}


_METRICS: Mapping[str, Callable[[], TextMetric]] = {
    "bleu": Bleu,
    "chrf": Chrf,
    "rouge": Rouge,
    "exact_match": ExactMatch,
    "wer": lambda: ErrorRate("words"),
    "cer": lambda: ErrorRate("characters"),
}
CIDER = "cider"  # needs the document frequencies of the whole corpus
METRICS = (*_METRICS, CIDER)
ERROR_RATES = frozenset({"wer", "cer"})  # for these an empty reference is silence, not a missing reference


def text_metrics(names: Sequence[str], frequencies: Mapping[str, int] | None = None) -> dict[str, TextMetric]:
    """Return metrics by name; `frequencies` are the corpus's document frequencies, for CIDEr-D.

    Raises UsageError for an unknown name, or if a library is not installed.
    """
    for name in names:
        if name not in METRICS:
            raise UsageError(f"unknown metric {name!r}; the metrics are {', '.join(METRICS)}")
    return {name: Cider(frequencies or {}) if name == CIDER else _METRICS[name]() for name in names}


def library(name: str) -> Any:
    """Import an optional library. Raises UsageError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(f"this metric needs {error.name}; install it with: pip install 'mmbeam[eval]'") from error


@dataclass(frozen=True, order=True, slots=True)
class Worst:
    """A sample with a bad score. Samples are ordered from the worst, then by shard and offset."""

    badness: float  # the score, negated if lower is better: the smallest is the worst
    shard: str
    offset: int
    key: str
    hypothesis: str
    reference: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTotals:
    """The counts of rows and of each metric. `+` is exact, associative and commutative."""

    rows: int = 0
    scored: int = 0
    without_hypothesis: int = 0
    without_reference: int = 0  # of rows with a hypothesis
    empty: int = 0  # scored rows whose hypothesis is blank
    references: int = 0  # of scored rows
    foreign: int = 0  # scored rows whose references have no ASCII letter or digit, so no tokens for ROUGE
    counts: Mapping[str, Counts] = field(default_factory=dict)  # by metric
    worst: tuple[Worst, ...] = ()

    def __add__(self, totals: "TextTotals") -> "TextTotals":
        numbers = {f.name: getattr(self, f.name) + getattr(totals, f.name) for f in fields(self) if f.type is int}
        counts = dict(self.counts)
        for name, added in totals.counts.items():
            counts[name] = counts[name] + added if name in counts else added
        worst = heapq.nsmallest(WORST, (*self.worst, *totals.worst))
        return TextTotals(**numbers, counts=counts, worst=tuple(worst))

    def scores(self, metrics: Mapping[str, TextMetric]) -> Scores:
        """Return the corpus scores of the metrics that have counts."""
        scores: Scores = {}
        for name, counts in self.counts.items():
            scores |= metrics[name].corpus_scores(counts)
        return scores

    def to_json(self) -> dict[str, Any]:
        """Return the totals as JSON values."""
        return {**asdict(self), "counts": {name: list(counts.values) for name, counts in self.counts.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the totals that `to_json` stored."""
        counts = {name: Counts(tuple(values)) for name, values in data["counts"].items()}
        return cls(**{**data, "counts": counts, "worst": tuple(Worst(**sample) for sample in data["worst"])})


def score_pair(pair: Pair, metrics: Mapping[str, TextMetric]) -> tuple[TextTotals, Scores]:
    """Return the totals and the scores of one row; there are no scores without a hypothesis or a reference.

    The first metric determines the worst samples.
    """
    if pair.hypothesis is None:
        return TextTotals(rows=1, without_hypothesis=1), {}
    if not pair.references:
        return TextTotals(rows=1, without_reference=1), {}
    counts = {name: metric.measure(pair.hypothesis, pair.references) for name, metric in metrics.items()}
    scores: Scores = {}
    for name, metric in metrics.items():
        scores |= metric.sample_scores(counts[name])
    first = next(iter(metrics.values()))
    score = scores[first.names[0]]
    worst = Worst(
        badness=-score if first.lower_is_better else score,
        shard=pair.shard,
        offset=pair.offset,
        key=pair.key,
        hypothesis=pair.hypothesis[:SHOWN_CHARS],
        reference=pair.references[0][:SHOWN_CHARS],
    )
    is_ascii = any(char.isascii() and char.isalnum() for text in pair.references for char in text)
    totals = TextTotals(
        rows=1,
        scored=1,
        empty=int(not pair.hypothesis.strip()),
        references=len(pair.references),
        foreign=int(not is_ascii),
        counts=counts,
        worst=(worst,),
    )
    return totals, scores
