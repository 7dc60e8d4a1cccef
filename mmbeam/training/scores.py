"""Scores of a model's captions and embeddings on examples with known captions.

Exact match: the fraction of greedily decoded captions that equal the reference. Words right: over all samples, the
words that equal the reference's word at the same position, divided by the words of the longer of the two.

Recall@1 is measured per pair of sources and per similarity. A hit is a nearest neighbour with the same label: the same
clause where one side is a caption with clauses, else the same caption. Of a source paired with itself it is the other
view of the sample or, with groups, another sample of the group.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch.nn import functional as F

from mmbeam.models.fusion.configuration import IGNORED
from mmbeam.models.fusion.modeling import FusionModel
from mmbeam.models.fusion.processing import FusionProcessor
from mmbeam.names import MODALITIES, Modality
from mmbeam.training.batching import TrainingBatch, collate, evaluation_batches, make_views, prefetch
from mmbeam.training.examples import Example

EXTRA_TOKENS = 8  # decoded beyond the longest reference, so that captions that do not end count as wrong
SUBSETS: tuple[tuple[Modality, ...], ...] = tuple(
    subset for size in range(1, len(MODALITIES) + 1) for subset in combinations(MODALITIES, size)
)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores on one split."""

    samples: int
    loss: float  # cross-entropy of the caption's tokens, in nats
    exact_match: float
    words_right: float
    subsets: Mapping[str, float] = field(default_factory=dict)  # exact match from these modalities only
    recall: Mapping[str, float] = field(default_factory=dict)  # recall@1: "image->text cosine"

    def to_json(self) -> dict[str, Any]:
        """Return the scores as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on examples."""

    model: FusionModel
    processor: FusionProcessor
    device: torch.device
    batch_size: int = 64

    def batches(self, examples: Iterable[Example]) -> Iterator[TrainingBatch]:
        """Yield the examples as prefetched batches."""
        limit = self.model.config.max_target_positions
        make = partial(collate, processor=self.processor, device=self.device, max_tokens=limit)
        with closing(prefetch(lambda: map(make, evaluation_batches(examples, self.batch_size)))) as batches:
            yield from batches

    def captions(self, examples: Iterable[Example]) -> list[tuple[Example, str]]:
        """Return each example with its greedily decoded caption, in the order of the batches."""
        with evaluating(self.model):
            return [pair for batch in self.batches(examples) for pair in self._written(batch)]

    def recall(self, examples: Iterable[Example]) -> dict[str, float]:
        """Return recall@1 of each pair of sources and each similarity."""
        retrieval = Retrieval(self.model)
        with evaluating(self.model):
            for batch in self.batches(examples):
                retrieval.add(batch)
        return retrieval.recall()

    def _written(self, batch: TrainingBatch) -> list[tuple[Example, str]]:
        return list(zip(batch.examples, self._write(batch), strict=True))

    def _write(self, batch: TrainingBatch) -> list[str]:
        length = min(batch.labels.shape[1] + EXTRA_TOKENS, self.model.config.max_target_positions)
        ids = self.model.generate(**batch.inputs, max_new_tokens=length, do_sample=False, num_beams=1)
        return self.processor.decode(ids.tolist())

    def scores(self, examples: Iterable[Example], per_batch: int | None = None) -> Scores:
        """Return all scores; those of subsets of modalities on the first `per_batch` samples of each batch."""
        counts, retrieval = _Counts(), Retrieval(self.model)
        asked: list[Example] = []
        with evaluating(self.model):
            for batch in self.batches(examples):
                counts.add_loss(*self._loss(batch))
                counts.add_captions(self._written(batch))
                retrieval.add(batch)
                asked += [each for each in batch.examples[:per_batch] if each.clauses is not None]
        return Scores(
            samples=counts.samples,
            loss=counts.loss / max(1, counts.tokens),
            exact_match=counts.exact / max(1, counts.samples),
            words_right=counts.right / max(1, counts.words),
            subsets=dict(self._subsets(asked)),
            recall=retrieval.recall(),
        )

    def _loss(self, batch: TrainingBatch) -> tuple[float, int]:
        """Return the loss summed over tokens, without label smoothing, and the number of tokens."""
        logits = self.model(decoder_input_ids=self.model.shift(batch.labels), **batch.inputs).logits
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return float(loss), int((batch.labels != IGNORED).sum())

    def _subsets(self, examples: Sequence[Example]) -> Iterator[tuple[str, float]]:
        """Yield the exact match from each subset of the modalities, where the caption has a clause for it."""
        for subset in SUBSETS:
            some = set(subset)
            restricted = [e.keeping(some) for e in examples if some < e.present and some & set(e.clauses or ())]
            if restricted:
                written = self.captions(restricted)
                yield "+".join(subset), sum(example.caption == caption for example, caption in written) / len(written)


@dataclass
class _Counts:
    """Sums over batches."""

    samples: int = 0
    loss: float = 0.0
    tokens: int = 0
    exact: int = 0
    right: int = 0  # words
    words: int = 0

    def add_loss(self, loss: float, tokens: int) -> None:
        self.loss += loss
        self.tokens += tokens

    def add_captions(self, written: Sequence[tuple[Example, str]]) -> None:
        for example, caption in written:
            right, words = count_words(example.caption, caption)
            self.samples += 1
            self.exact += example.caption == caption
            self.right += right
            self.words += words


def count_words(true: str, written: str) -> tuple[int, int]:
    """Return how many words of `written` equal the word of `true` at the same position, and the longer length."""
    expected, actual = true.split(), written.split()
    return sum(a == b for a, b in zip(expected, actual, strict=False)), max(len(expected), len(actual))


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode without gradients for the block."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


CANDIDATES = 500  # at most, per nearest-neighbour search
MAX_SAMPLES = 5000  # samples of a recall measurement
VIEW = " (another view)"  # suffix of the name of a source's augmented view
Pair = tuple[str, str]


class Retrieval:
    """Collects embeddings batch by batch and computes recall@1. Used inside `torch.no_grad`."""

    def __init__(self, model: FusionModel) -> None:
        self._model = model
        self._same = [a for a, b in model.pairs if a == b]
        names = [*(name for pair in model.pairs for name in pair), *(name + VIEW for name in self._same)]
        self._vectors: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        self._present: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        self._examples: list[Example] = []

    def add(self, batch: TrainingBatch) -> None:
        """Embed a batch."""
        if not self._vectors or len(self._examples) >= MAX_SAMPLES:
            return
        encoding = self._model.encode(**batch.inputs)
        embeddings, present = dict(encoding.embeddings), dict(encoding.present)
        captions = self._model.embed_captions(batch.labels) if "caption" in self._vectors else None
        if captions is not None:
            embeddings["caption"] = captions
            present["caption"] = torch.ones(len(captions), dtype=torch.bool)
        views = make_views(self._model.sources, self._same, batch.inputs, _seeded(batch.labels.device))
        if views:
            seen = self._model.encode(**views)
            embeddings |= {name + VIEW: vectors for name, vectors in seen.embeddings.items()}
            present |= {name + VIEW: mask for name, mask in seen.present.items()}
        for name, kept in self._vectors.items():  # a source absent from the whole batch has no embedding
            found = embeddings.get(name)
            size = (len(batch.examples), self._model.config.embedding_dim)
            kept.append(torch.zeros(size) if found is None else found.float().cpu())
            self._present[name].append(
                present[name].cpu() if name in present else torch.zeros(size[0], dtype=torch.bool)
            )
        self._examples += batch.examples

    def recall(self) -> dict[str, float]:
        """Return recall@1 by "image->text cosine", averaged over chunks of candidates."""
        if not self._examples:
            return {}
        order = torch.randperm(len(self._examples), generator=_seeded(torch.device("cpu")))
        chunks = order.tensor_split(math.ceil(len(order) / CANDIDATES))
        found: dict[str, list[bool]] = {}
        for pair in self._model.pairs:
            for kind in self._model.config.similarities:
                for chunk in chunks:
                    for name, hits in self._hits(kind, pair, chunk):
                        found.setdefault(f"{name} {kind}", []).extend(hits)
        return {name: sum(hits) / len(hits) for name, hits in found.items() if hits}

    def _hits(self, kind: str, pair: Pair, rows: torch.Tensor) -> Iterator[tuple[str, list[bool]]]:
        a, b = pair
        grouped = a == b and any(example.group is not None for example in self._examples)
        other = a + VIEW if a == b and not grouped else b
        rows = rows[(torch.cat(self._present[a]) & torch.cat(self._present[other]))[rows]]
        if not len(rows):
            return
        device = self._model.device
        left, right = (torch.cat(self._vectors[name])[rows].to(device) for name in (a, other))
        scores = self._model.space.similarity(kind, pair, left, right).cpu()
        labels = [self._label(pair, self._examples[row], grouped) for row in rows.tolist()]
        if grouped:
            scores.fill_diagonal_(-torch.inf)
            yield f"{a}->{a}", _right(scores, labels, [labels.count(label) > 1 for label in labels])
            return
        yield f"{a}->{other}", _right(scores, labels)
        if a != b:
            yield f"{b}->{a}", _right(scores.T, labels)

    def _label(self, pair: Pair, example: Example, grouped: bool) -> str:
        """Return what a hit has in common with the example."""
        if pair[0] == pair[1]:
            return (example.group if grouped else None) or example.key
        sources = [self._model.sources[name].modality for name in pair if name in self._model.sources]
        if "caption" in pair and example.clauses is not None and sources:
            return example.clauses.get(sources[0], example.caption)
        return example.caption


def _right(scores: torch.Tensor, labels: Sequence[str], mask: Sequence[bool] | None = None) -> list[bool]:
    """Whether each row's nearest neighbour has the same label, for the rows of `mask`."""
    nearest = scores.argmax(1).tolist()
    hits = [labels[index] == label for index, label in zip(nearest, labels, strict=True)]
    return hits if mask is None else [hit for hit, wanted in zip(hits, mask, strict=True) if wanted]


def _seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)
