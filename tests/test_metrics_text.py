"""Text metrics against the libraries that define them, and CIDEr-D against its reference implementation."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction
from functools import reduce
from operator import add
from typing import Any

import jiwer
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from mmbeam.errors import UsageError
from mmbeam.metrics.cider import CiderD, document_frequencies, tokenize
from mmbeam.metrics.pairs import Pair
from mmbeam.metrics.text import METRICS, WORST, Counts, TextTotals, mean_counts, means, score_pair, text_metrics

Case = tuple[str, list[str]]  # hypothesis, references

CASES: list[Case] = [
    ("A man rides a wave on a surfboard.", ["A man riding a wave on top of a surfboard.", "a surfer, at sea"]),
    ("a dog runs", ["A brown dog runs across the grass with a ball in its mouth.", "A dog doesn't run."]),
    ("a red bus parked on the street", ["a red bus parked on the street"]),
    ("", ["a plate of food on a table"]),
    ("a plate a plate a plate of food", ["a plate of food", "food on a plate", "a table with 1,000 plates"]),
    ("Ein Hund läuft über die Straße", ["Ein Hund rennt über eine Straße", "Hund", "ein Hund", "Der Hund läuft"]),
    ("一只狗在草地上跑", ["一只狗在草地上奔跑"]),
    ("short", ["a very much longer reference than what was said, by far"]),
]

VOCABULARY = ("a", "an", "the", "dog", "cat", "runs", "sits", "on", "grass", "red", ".", ",", "'s", "don't")
words = st.lists(st.sampled_from(VOCABULARY), max_size=9).map(" ".join)
case_lists = st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=4)), min_size=1, max_size=12)


def corpus_scores(cases: Sequence[Case], names: Sequence[str]) -> dict[str, float]:
    """Return the scores of the sum of the counts of the samples."""
    metrics = text_metrics(names, document_frequencies(references for _, references in cases))
    scores: dict[str, float] = {}
    for metric in metrics.values():
        scores |= metric.corpus_scores(reduce(add, (metric.measure(*case) for case in cases)))
    return scores


def streams(cases: Sequence[Case]) -> tuple[list[str], Any]:
    """Return hypotheses and references in sacrebleu's form: by number, None where a sample has fewer."""
    most = max(len(references) for _, references in cases)
    return [text for text, _ in cases], [[dict(enumerate(r)).get(n) for _, r in cases] for n in range(most)]


# The score of summed counts equals the library's corpus score to the last bit


@given(case_lists)
@settings(max_examples=40, deadline=None)
def test_corpus_bleu_and_chrf_equal_sacrebleu(cases: list[Case]) -> None:
    cases = [*cases, *CASES]
    scores = corpus_scores(cases, ("bleu", "chrf"))
    assert scores["bleu"] == sacrebleu.BLEU().corpus_score(*streams(cases)).score
    assert scores["chrf"] == sacrebleu.CHRF().corpus_score(*streams(cases)).score


@given(case_lists)
@settings(max_examples=40, deadline=None)
def test_corpus_rouge_is_the_mean_of_rouge_score(cases: list[Case]) -> None:
    cases = [*cases, *CASES]
    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names)
    single = [scorer.score_multi(references, text) for text, references in cases]
    scores = corpus_scores(cases, ("rouge",))
    for name in names:
        assert scores[name] == float(sum(Fraction(score[name].fmeasure) for score in single) / len(cases))


@given(st.lists(st.tuples(words, words), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_corpus_error_rates_equal_jiwer(pairs: list[tuple[str, str]]) -> None:
    hypotheses, references = [text for text, _ in pairs], [text for _, text in pairs]
    scores = corpus_scores([(text, [reference]) for text, reference in pairs], ("wer", "cer"))
    assert scores == {"wer": jiwer.wer(references, hypotheses), "cer": jiwer.cer(references, hypotheses)}


@pytest.mark.parametrize("case", CASES)
def test_sample_bleu_and_chrf_equal_sacrebleu(case: Case) -> None:
    text, references = case
    metrics = text_metrics(("bleu", "chrf"))
    cases = {name: metric.sample_scores(metric.measure(text, references))[name] for name, metric in metrics.items()}
    assert cases["bleu"] == sacrebleu.sentence_bleu(text, references).score
    assert cases["chrf"] == sacrebleu.sentence_chrf(text, references).score


def test_error_rate_uses_the_nearest_reference() -> None:
    assert corpus_scores([("the dog runs", ["a cat", "the dog ran", "dogs"])], ("wer",)) == {"wer": 1 / 3}


def test_error_rate_of_silence() -> None:
    assert corpus_scores([("", [""])], ("wer", "cer")) == {"wer": 0, "cer": 0}
    assert corpus_scores([("thank you", [""])], ("wer",)) == {"wer": 2}
    assert corpus_scores([("thank you", [""]), ("a b c d", ["a b c d"])], ("wer",)) == {"wer": 0.5}


def test_exact_match_with_any_reference() -> None:
    cases = [("a dog", ["a cat", "a dog\n"]), ("A dog", ["a dog"]), ("", ["x"]), ("x", ["x"])]
    assert corpus_scores(cases, ("exact_match",)) == {"exact_match": 0.5}


# CIDEr-D


def reference_cider(cases: Sequence[tuple[list[str], list[list[str]]]]) -> list[float]:
    """Return CIDEr-D of tokens by a direct, slow implementation of the paper and its authors' code."""

    def grams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
        return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

    document_frequency: dict[tuple[str, ...], int] = defaultdict(int)
    for _, references in cases:
        for gram in {gram for tokens in references for n in (1, 2, 3, 4) for gram in grams(tokens, n)}:
            document_frequency[gram] += 1

    def weights(tokens: list[str], n: int) -> dict[tuple[str, ...], float]:
        of = grams(tokens, n)
        return {g: of[g] * (math.log(len(cases)) - math.log(max(1, document_frequency[g]))) for g in of}

    def similarity(candidate: list[str], reference: list[str], n: int) -> float:
        g, h = weights(candidate, n), weights(reference, n)
        norm = math.sqrt(sum(v * v for v in g.values())) * math.sqrt(sum(v * v for v in h.values()))
        product = sum(min(g[w], h[w]) * h[w] for w in g if w in h)
        lengths = [sum(grams(tokens, 2).values()) for tokens in (candidate, reference)]
        return (product / norm if norm else 0.0) * math.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * 6.0**2))

    return [
        10 * sum(similarity(text, reference, n) for n in (1, 2, 3, 4) for reference in references) / 4 / len(references)
        for text, references in cases
    ]


@given(case_lists)
@settings(max_examples=40, deadline=None)
def test_cider_equals_its_definition(cases: list[Case]) -> None:
    cases = [*cases, *CASES]
    tokens = [(tokenize(text), [tokenize(reference) for reference in references]) for text, references in cases]
    cider = CiderD(document_frequencies(references for _, references in cases))
    expected = reference_cider(tokens)
    assert [cider.score(*case) for case in cases] == pytest.approx(expected, abs=1e-9)
    assert corpus_scores(cases, ("cider",))["cider"] == pytest.approx(sum(expected) / len(cases), abs=1e-9)


def test_cider_equals_the_reference_implementation() -> None:
    """The expected scores are those of CiderScorer in pycocoevalcap 1.2, by the authors of the metric."""
    golden = [
        (
            "a man rides a wave on a surfboard",
            "a man riding a wave on top of a surfboard|a surfer rides a wave in the ocean",
        ),
        ("a dog runs", "a brown dog runs across the grass with a ball in its mouth|a dog runs on the grass"),
        ("a red bus parked on the street", "a red bus parked on the street"),
        ("", "a plate of food on a table"),
        (
            "a plate a plate a plate of food",
            "a plate of food on a table|food on a plate|a table with a plate of food on it",
        ),
        ("two zebras", "a herd of zebras grazing|two zebras"),
    ]
    cases = [(text, references.split("|")) for text, references in golden]
    cider = CiderD(document_frequencies(references for _, references in cases))
    expected = [2.7544966363579793, 2.38800817759137, 10.0, 0.0, 1.672732861986619, 2.9465521821715623]
    assert [cider.score(*case) for case in cases] == pytest.approx(expected, abs=1e-12)


def test_ngrams_of_one_sample_may_be_dropped() -> None:
    whole = document_frequencies(references for _, references in CASES)
    without_rare = CiderD({gram: count for gram, count in whole.items() if count > 1})
    assert [without_rare.score(*case) for case in CASES] == [CiderD(whole).score(*case) for case in CASES]


@given(case_lists, st.integers(0, 12))
def test_document_frequencies_add_up(cases: list[Case], cut: int) -> None:
    references = [texts for _, texts in cases]
    joined = document_frequencies(references[:cut]) + document_frequencies(references[cut:])
    assert joined == document_frequencies(references)
    assert joined[""] == len(cases)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [  # from edu.stanford.nlp.process.PTBTokenizer 3.4.1, in lower case, without pycocoevalcap's punctuation
        ("A man riding a wave on top of a surfboard.", "a man riding a wave on top of a surfboard"),
        ("A black-and-white dog doesn't like the cat's food, it's cold!",
         "a black-and-white dog does n't like the cat 's food it 's cold"),
        ("A $5.00 bill, 50% off & more", "a $ 5.00 bill 50 % off & more"),
        ("\"Quoted\" text isn\u2019t 'always' easy...", "quoted text is n't always easy"),
        ("A woman cannot see the T-shirt - it hides -- there", "a woman can not see the t-shirt it hides there"),
        ("A cup of café at 5:30, 1,000 of 1/2", "a cup of café at 5:30 1,000 of 1/2"),
        ("It can't be won't shan't", "it ca n't be wo n't sha n't"),
    ],
)  # fmt: skip
def test_tokens_equal_the_treebanks(text: str, tokens: str) -> None:
    assert tokenize(text) == tokens.split()


def test_tokenization_takes_linear_time() -> None:
    assert len(tokenize("a" * 200_000)) == 1
    assert len(tokenize("a-" * 100_000)) == 1
    assert len(tokenize("n't" * 60_000)) > 0


# Sums


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.randoms())
def test_mean_is_exact_in_any_order(values: list[float], random: Any) -> None:
    shuffled = random.sample(values, len(values))
    mean = means(reduce(add, (mean_counts([value]) for value in shuffled)))
    assert mean == [pytest.approx(math.fsum(values) / len(values), rel=1e-15, abs=1e-30)]
    assert mean == means(reduce(add, (mean_counts([value]) for value in values)))


def test_counts_of_different_metrics_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Counts((1, 2)) + Counts((1,))


def totals_of(cases: Sequence[Case]) -> list[TextTotals]:
    """Return the totals of single rows, some without hypothesis or references."""
    metrics = text_metrics(METRICS, document_frequencies(references for _, references in cases))
    pairs = [
        Pair(
            key=f"{n:03}",
            shard="a.tar",
            offset=n * 512,
            hypothesis=None if n % 7 == 5 else text,
            references=() if n % 5 == 4 else tuple(references),
        )
        for n, (text, references) in enumerate(cases)
    ]
    return [score_pair(pair, metrics)[0] for pair in pairs]


@given(case_lists, st.randoms())
@settings(max_examples=30, deadline=None)
def test_totals_do_not_depend_on_partition_or_order(cases: list[Case], random: Any) -> None:
    single = totals_of([*cases, *CASES])
    whole = reduce(add, single, TextTotals())
    cuts = sorted(random.sample(range(len(single)), 2))
    shuffled = random.sample(single, len(single))
    parts = [reduce(add, shuffled[a:b], TextTotals()) for a, b in zip([0, *cuts], [*cuts, len(single)], strict=True)]
    a, b, c = parts
    assert (a + b) + c == a + (b + c) == c + a + b == whole
    assert whole.rows == len(single) == whole.scored + whole.without_hypothesis + whole.without_reference
    metrics = text_metrics(METRICS)
    assert (a + (c + b)).scores(metrics) == whole.scores(metrics)
    assert TextTotals.from_json(json.loads(json.dumps(whole.to_json()))) == whole


def test_the_worst_samples_are_kept() -> None:
    metrics = text_metrics(("wer",))
    pairs = [
        Pair(key=str(n), shard="s", offset=n, hypothesis="a " * n, references=("a a a a a a a a a",)) for n in range(10)
    ]
    totals = reduce(add, (score_pair(pair, metrics)[0] for pair in pairs))
    assert [worst.key for worst in totals.worst] == [str(n) for n in range(WORST)]
    assert totals.empty == 1


def test_unknown_metric_error_lists_the_metrics() -> None:
    with pytest.raises(UsageError, match=r"unknown metric 'meteor'; the metrics are bleu, .*cider"):
        text_metrics(("meteor",))
