"""Metrics of a text against its references: what each counts in a sample, and the score that counts give.

A sample's counts added up over a corpus give the corpus score of the library that defines the metric.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from mmbeam.errors import UsageError
from mmbeam.metrics.cider import CiderD
from mmbeam.metrics.counts import Counts, mean_counts, means

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
    """BLEU, 0 to 100: Papineni et al., ACL 2002; as sacrebleu, tokenizer 13a, exponential smoothing.

    Counts are sacrebleu's: tokens of hypothesis and of the closest reference, then n-grams that match and
    n-grams by order. A sample's score leaves out the orders that it is too short for.
    """

    names = ("bleu",)
    lower_is_better = False

    def __init__(self) -> None:
        bleu = library("sacrebleu").BLEU
        self._corpus, self._sentence = bleu(), bleu(effective_order=True)

    def measure(self, hypothesis: str, references: Sequence[str]) -> Counts:
        return _sacrebleu_counts(self._corpus, hypothesis, references)

    def sample_scores(self, counts: Counts) -> Scores:
        return {"bleu": _sacrebleu_score(self._sentence, counts)}

    def corpus_scores(self, counts: Counts) -> Scores:
        return {"bleu": _sacrebleu_score(self._corpus, counts)}


class Chrf:
    """chrF, 0 to 100: Popovic, WMT 2015; as sacrebleu, characters of order 6, beta 2.

    Counts are sacrebleu's: by order, the n-grams of the hypothesis, of the best reference, and in both.
    """

    names = ("chrf",)
    lower_is_better = False

    def __init__(self) -> None:
        self._metric = library("sacrebleu").CHRF()

    def measure(self, hypothesis: str, references: Sequence[str]) -> Counts:
        return _sacrebleu_counts(self._metric, hypothesis, references)

    def sample_scores(self, counts: Counts) -> Scores:
        return {"chrf": _sacrebleu_score(self._metric, counts)}

    corpus_scores = sample_scores


def _sacrebleu_counts(metric: Any, hypothesis: str, references: Sequence[str]) -> Counts:
    """What every sacrebleu metric adds up over the sentences; its public verbs give scores only."""
    (counts,) = metric._extract_corpus_statistics([hypothesis], [[reference] for reference in references])
    return Counts(tuple(counts))


def _sacrebleu_score(metric: Any, counts: Counts) -> float:
    return float(metric._compute_score_from_stats(list(counts.values)).score)


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
