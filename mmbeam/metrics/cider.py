"""CIDEr-D: the agreement of a caption with a consensus of references, in which rare n-grams weigh more.

Vedantam, Zitnick and Parikh, "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015, section 7.
On the same tokens it equals `CiderScorer` of pycocoevalcap 1.2 (which calls CIDEr-D CIDEr), including its
length penalty by the number of bigrams. It takes two passes: the document frequencies of the whole corpus, then
a score per sample. A corpus of one sample scores 0, since all n-grams are equally rare.

Tokenization follows the Penn Treebank and equals that of the reference's Java tokenizer for plain English captions,
except for parentheses, which are dropped (the reference turns them into the words -lrb- and -rrb-), and rare cases
such as the final period of an abbreviation.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

ORDER = 4  # the longest n-gram, in tokens
SIGMA = 6.0  # of the length penalty, in tokens
SCALE = 10.0  # CIDEr-D is ten times a mean cosine

# Contractions are split as in the Treebank: do n't, it 's, can not. Words keep inner hyphens, periods and slashes;
# numbers keep inner commas and colons.
_TOKEN = re.compile(
    r"can(?=not\b)|\w+?(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b|\d+(?:[.,:]\d+)+|\w+(?:[-.&/]\w+)*|[^\w\s]"
)
_PUNCTUATION = frozenset(".?!,:;-'`\"()[]{}\u2026\u2013\u2014\u2018\u2019\u201c\u201d")


def tokenize(text: str) -> list[str]:
    """Return lower-case tokens without punctuation."""
    plain = text.lower().replace("\u2019", "'")
    return [token for token in _TOKEN.findall(plain) if token not in _PUNCTUATION]


def count_ngrams(tokens: Sequence[str]) -> Counter[str]:
    """Return the counts of n-grams of 1 to 4 tokens, joined by spaces."""
    return Counter(" ".join(tokens[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(tokens) - n + 1))


def document_frequencies(documents: Iterable[Sequence[str]]) -> Counter[str]:
    """Return the number of samples whose references contain each n-gram. `+` merges the results of two parts.

    The empty n-gram occurs in every sample, so its frequency is the number of samples. N-grams with a frequency of 1
    may be dropped: their weight equals that of unknown n-grams.
    """
    frequencies: Counter[str] = Counter()
    for references in documents:
        frequencies.update({"", *(ngram for reference in references for ngram in count_ngrams(tokenize(reference)))})
    return frequencies


@dataclass(frozen=True, slots=True)
class _Vector:
    """The TF-IDF weights of a text."""

    weights: Mapping[str, float]
    norms: Sequence[float]  # by order
    bigrams: int  # the length, as in the reference implementation


class CiderD:
    """CIDEr-D of single samples, given the document frequencies of their corpus."""

    def __init__(self, frequencies: Mapping[str, int]) -> None:
        self._frequencies = frequencies
        self._log_documents = math.log(max(1, frequencies.get("", 1)))

    def score(self, hypothesis: str, references: Sequence[str]) -> float:
        """Return the mean over the references, 0 to 10; at least one reference is required."""
        vector = self._vector(hypothesis)
        return SCALE * sum(_similarity(vector, self._vector(text)) for text in references) / len(references)

    def _vector(self, text: str) -> _Vector:
        tokens = tokenize(text)
        frequencies, log_documents = self._frequencies, self._log_documents
        weights = {
            ngram: count * (log_documents - math.log(max(1, frequencies.get(ngram, 1))))
            for ngram, count in count_ngrams(tokens).items()
        }
        squares = [0.0] * ORDER
        for ngram, weight in weights.items():
            squares[ngram.count(" ")] += weight * weight
        return _Vector(weights, [math.sqrt(square) for square in squares], max(0, len(tokens) - 1))


def _similarity(hypothesis: _Vector, reference: _Vector) -> float:
    """Return the mean over the orders of the clipped cosine, times the length penalty."""
    products = [0.0] * ORDER
    for ngram, weight in hypothesis.weights.items():
        reference_weight = reference.weights.get(ngram, 0.0)
        products[ngram.count(" ")] += min(weight, reference_weight) * reference_weight
    norms = [a * b for a, b in zip(hypothesis.norms, reference.norms, strict=True)]
    cosines = [product / norm for product, norm in zip(products, norms, strict=True) if norm]
    return sum(cosines) / ORDER * math.exp(-((hypothesis.bigrams - reference.bigrams) ** 2) / (2 * SIGMA**2))
