"""Scores of a model's captions and embeddings on examples with known captions.

Exact match: the fraction of greedily decoded captions that equal the reference. Words right: over all samples, the
words that equal the reference's word at the same position, divided by the words of the longer of the two.

Recall@1 is measured per pair of sources and per similarity: the fraction of samples whose nearest neighbour has the
same label. For a source and a caption with clauses, the label is the clause of the source's modality. For two other
sources it is the caption. For a source paired with itself it is the sample, whose augmented view is to be retrieved,
or, with groups, the group.
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
from mmbeam.names import FUSION_MODALITIES, Modality
from mmbeam.training.batching import TrainingBatch, collate, evaluation_batches, make_views, prefetch_batches
from mmbeam.training.examples import Example

EXTRA_TOKENS = 8  # decoded beyond the longest reference, so that a caption that does not end counts as wrong
SUBSETS: tuple[tuple[Modality, ...], ...] = tuple(
    subset for size in range(1, len(FUSION_MODALITIES) + 1) for subset in combinations(FUSION_MODALITIES, size)
)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores on one split."""

    samples: int
    loss: float  # cross-entropy of the captions, in nats per token
    exact_match: float
    words_right: float
    subsets: Mapping[str, float] = field(default_factory=dict)  # exact match by subset of modalities: "image+text"
    recall: Mapping[str, float] = field(default_factory=dict)  # recall@1 by pair and similarity: "image->text cosine"

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
        with closing(prefetch_batches(lambda: map(make, evaluation_batches(examples, self.batch_size)))) as batches:
            yield from batches

    def captions(self, examples: Iterable[Example]) -> list[tuple[Example, str]]:
        """Return each example with its greedily decoded caption, in the order of the batches."""
        with evaluating(self.model):
            return [pair for batch in self.batches(examples) for pair in self._generate(batch)]

    def recall(self, examples: Iterable[Example]) -> dict[str, float]:
        """Return recall@1 of each pair of sources and each similarity."""
        retrieval = Retrieval(self.model)
        with evaluating(self.model):
            for batch in self.batches(examples):
                retrieval.add(batch)
        return retrieval.recall()

    def _generate(self, batch: TrainingBatch) -> list[tuple[Example, str]]:
        """Return each example of the batch with its greedily decoded caption."""
        length = min(batch.labels.shape[1] + EXTRA_TOKENS, self.model.config.max_target_positions)
        ids = self.model.generate(**batch.inputs, max_new_tokens=length, do_sample=False, num_beams=1)
        return list(zip(batch.examples, self.processor.decode(ids.tolist()), strict=True))

    def scores(self, examples: Iterable[Example], per_batch: int | None = None) -> Scores:
        """Return all scores. Subsets of modalities are scored on the first `per_batch` samples of each batch."""
        counts, retrieval = _Counts(), Retrieval(self.model)
        with_clauses: list[Example] = []
        with evaluating(self.model):
            for batch in self.batches(examples):
                counts.add_loss(*self._loss(batch))
                counts.add_captions(self._generate(batch))
                retrieval.add(batch)
                with_clauses += [example for example in batch.examples[:per_batch] if example.clauses is not None]
        return Scores(
            samples=counts.samples,
            loss=counts.loss / max(1, counts.tokens),
            exact_match=counts.exact / max(1, counts.samples),
            words_right=counts.right / max(1, counts.words),
            subsets=dict(self._subsets(with_clauses)),
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
        """Yield the exact match for each proper subset of the samples' modalities that has a clause of the caption."""
        for subset in SUBSETS:
            kept = set(subset)
            restricted = [e.keeping(kept) for e in examples if kept < e.present and kept & set(e.clauses or ())]
            if restricted:
                pairs = self.captions(restricted)
                yield "+".join(subset), sum(example.caption == caption for example, caption in pairs) / len(pairs)


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

    def add_captions(self, pairs: Sequence[tuple[Example, str]]) -> None:
        for example, caption in pairs:
            right, words = count_words(example.caption, caption)
            self.samples += 1
            self.exact += example.caption == caption
            self.right += right
            self.words += words


def count_words(reference: str, caption: str) -> tuple[int, int]:
    """Return how many words equal the word of the reference at the same position, and the words of the longer text."""
    expected, actual = reference.split(), caption.split()
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
MAX_SAMPLES = 5000  # recall is measured on the first batches until they hold this number of samples
VIEW = " (another view)"  # suffix of the name of a source's augmented view
Pair = tuple[str, str]


class Retrieval:
    """Collects embeddings batch by batch and computes recall@1. Use it inside `torch.no_grad`."""

    def __init__(self, model: FusionModel) -> None:
        self._model = model
        self._same = [a for a, b in model.pairs if a == b]
        names = [*(name for pair in model.pairs for name in pair), *(name + VIEW for name in self._same)]
        self._vectors: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        self._present: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        self._examples: list[Example] = []

    def add(self, batch: TrainingBatch) -> None:
        """Embed a batch and keep the embeddings."""
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
            encoded = self._model.encode(**views)
            embeddings |= {name + VIEW: vectors for name, vectors in encoded.embeddings.items()}
            present |= {name + VIEW: mask for name, mask in encoded.present.items()}
        size = (len(batch.examples), self._model.config.embedding_dim)
        for name, kept in self._vectors.items():  # a source absent from the whole batch has no embedding
            kept.append(embeddings[name].float().cpu() if name in embeddings else torch.zeros(size))
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
        hits_by_name: dict[str, list[bool]] = {}
        for pair in self._model.pairs:
            for kind in self._model.config.similarities:
                for chunk in chunks:
                    for name, hits in self._hits(kind, pair, chunk):
                        hits_by_name.setdefault(f"{name} {kind}", []).extend(hits)
        return {name: sum(hits) / len(hits) for name, hits in hits_by_name.items() if hits}

    def _hits(self, kind: str, pair: Pair, rows: torch.Tensor) -> Iterator[tuple[str, list[bool]]]:
        """Yield "query->target", and for each of `rows` that has both sources whether its nearest neighbour is a hit.

        With groups, rows whose group has no other sample are skipped.
        """
        a, b = pair
        has_groups = a == b and any(example.group is not None for example in self._examples)
        target = a + VIEW if a == b and not has_groups else b
        rows = rows[(torch.cat(self._present[a]) & torch.cat(self._present[target]))[rows]]
        if not len(rows):
            return
        device = self._model.device
        left, right = (torch.cat(self._vectors[name])[rows].to(device) for name in (a, target))
        scores = self._model.space.similarity(kind, pair, left, right).cpu()
        labels = [self._label(pair, self._examples[row], has_groups) for row in rows.tolist()]
        if has_groups:
            scores.fill_diagonal_(-torch.inf)
            yield f"{a}->{a}", _is_hit(scores, labels, [labels.count(label) > 1 for label in labels])
            return
        yield f"{a}->{target}", _is_hit(scores, labels)
        if a != b:
            yield f"{b}->{a}", _is_hit(scores.T, labels)

    def _label(self, pair: Pair, example: Example, has_groups: bool) -> str:
        """Return the label that a hit shares with the example."""
        if pair[0] == pair[1]:
            return (example.group if has_groups else None) or example.key
        sources = [self._model.sources[name].modality for name in pair if name in self._model.sources]
        if "caption" in pair and example.clauses is not None and sources:
            return example.clauses.get(sources[0], example.caption)
        return example.caption


def _is_hit(scores: torch.Tensor, labels: Sequence[str], mask: Sequence[bool] | None = None) -> list[bool]:
    """Return whether each row's nearest neighbour has the same label, for the rows in `mask`."""
    nearest = scores.argmax(1).tolist()
    hits = [labels[index] == label for index, label in zip(nearest, labels, strict=True)]
    return hits if mask is None else [hit for hit, is_kept in zip(hits, mask, strict=True) if is_kept]


def _seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)
