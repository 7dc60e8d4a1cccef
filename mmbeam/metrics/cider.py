"""CIDEr-D: how much a caption agrees with a consensus of references, rare n-grams weighing more.

Vedantam, Zitnick and Parikh, "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015, section 7.
On the same tokens it equals `CiderScorer` of pycocoevalcap 1.2 (which is CIDEr-D under the name of CIDEr), its
length penalty on the number of bigrams included. It takes two passes: document frequencies of the whole
corpus first, then a score per sample. A corpus of one sample scores 0, since no n-gram is rarer than another.

The tokens follow the Penn Treebank, as the reference's Java tokenizer makes them of plain English captions,
but for round brackets, which are left out here (there they become the words -lrb- and -rrb-), and for rare
cases such as the final point of an abbreviation.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

ORDER = 4  # the longest n-gram, in tokens
SIGMA = 6.0  # of the length penalty, in tokens
SCALE = 10.0  # CIDEr-D is ten times a mean of cosines

# Contractions are cut as the Treebank cuts them: do n't, it 's, can not. Words keep inner hyphens, points and
# slashes, numbers their commas and colons.
_TOKEN = re.compile(
    r"can(?=not\b)|\w+?(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b|\d+(?:[.,:]\d+)+|\w+(?:[-.&/]\w+)*|[^\w\s]"
)
_PUNCTUATION = frozenset(".?!,:;-'`\"()[]{}\u2026\u2013\u2014\u2018\u2019\u201c\u201d")


def tokenize(text: str) -> list[str]:
    """Lower-case tokens without punctuation."""
    plain = text.lower().replace("\u2019", "'")
    return [token for token in _TOKEN.findall(plain) if token not in _PUNCTUATION]


def count_ngrams(tokens: Sequence[str]) -> Counter[str]:
    """How often each n-gram of 1 to 4 tokens is there; its tokens are joined by spaces."""
    return Counter(" ".join(tokens[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(tokens) - n + 1))


def document_frequencies(documents: Iterable[Sequence[str]]) -> Counter[str]:
    """For each n-gram, in the references of how many samples it is; `+` joins those of two parts of a corpus.

    The empty n-gram is in all of them, so its frequency is their number. What is in one sample only may be
    dropped: it weighs the same as what is in none.
    """
    frequencies: Counter[str] = Counter()
    for references in documents:
        frequencies.update({"", *(ngram for reference in references for ngram in count_ngrams(tokenize(reference)))})
    return frequencies


@dataclass(frozen=True, slots=True)
class _Vector:
    """A text as weights of its n-grams."""

    weights: Mapping[str, float]
    norms: Sequence[float]  # by order
    bigrams: int  # its length, as the reference implementation measures it


class CiderD:
    """CIDEr-D of single samples in a corpus of these document frequencies."""

    def __init__(self, frequencies: Mapping[str, int]) -> None:
        self._frequencies = frequencies
        self._log_documents = math.log(max(1, frequencies.get("", 1)))

    def score(self, hypothesis: str, references: Sequence[str]) -> float:
        """0 to 10, the mean over the references, of which there is at least one."""
        own = self._vector(hypothesis)
        return SCALE * sum(_similarity(own, self._vector(text)) for text in references) / len(references)

    def _vector(self, text: str) -> _Vector:
        tokens = tokenize(text)
        weights = {ngram: count * self._rarity(ngram) for ngram, count in count_ngrams(tokens).items()}
        squares = [0.0] * ORDER
        for ngram, weight in weights.items():
            squares[ngram.count(" ")] += weight * weight
        return _Vector(weights, [math.sqrt(square) for square in squares], max(0, len(tokens) - 1))

    def _rarity(self, ngram: str) -> float:
        return self._log_documents - math.log(max(1, self._frequencies.get(ngram, 1)))


def _similarity(own: _Vector, other: _Vector) -> float:
    """The mean over the orders of the clipped cosine, times the length penalty."""
    products = [0.0] * ORDER
    for ngram, weight in own.weights.items():
        there = other.weights.get(ngram, 0.0)
        products[ngram.count(" ")] += min(weight, there) * there
    norms = [a * b for a, b in zip(own.norms, other.norms, strict=True)]
    cosines = [product / norm for product, norm in zip(products, norms, strict=True) if norm]
    return sum(cosines) / ORDER * math.exp(-((own.bigrams - other.bigrams) ** 2) / (2 * SIGMA**2))
