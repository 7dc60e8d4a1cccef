"""How good a model's captions and embeddings are, on examples whose captions are known.

Exact match: the share of captions generated greedily that equal the true one, character for character.
Words right: of all samples together, the words that equal the true one at the same place, divided by the
words of the longer of the two.
"""

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
from mmbeam.training.batching import Batch, ahead, collate, plain_batches
from mmbeam.training.examples import Example
from mmbeam.training.retrieval import Retrieval

EXTRA_TOKENS = 8  # that may be written beyond the longest true caption, so that a run-on caption is seen
SUBSETS: tuple[tuple[Modality, ...], ...] = tuple(
    subset for size in range(1, len(MODALITIES) + 1) for subset in combinations(MODALITIES, size)
)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was measured on one part."""

    samples: int
    loss: float  # cross-entropy of the caption's tokens, in nats
    exact_match: float
    words_right: float
    subsets: Mapping[str, float] = field(default_factory=dict)  # exact match when no more than these are given
    recall: Mapping[str, float] = field(default_factory=dict)  # recall@1: "image->text cosine"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Judge:
    """A model, and what is needed to put examples before it."""

    model: FusionModel
    processor: FusionProcessor
    device: torch.device
    batch_size: int = 64

    def batches(self, examples: Iterable[Example]) -> Iterator[Batch]:
        """The examples as batches, made ahead."""
        limit = self.model.config.max_target_positions
        make = partial(collate, processor=self.processor, device=self.device, max_tokens=limit)
        with closing(ahead(lambda: map(make, plain_batches(examples, self.batch_size)))) as batches:
            yield from batches

    def captions(self, examples: Iterable[Example]) -> list[tuple[Example, str]]:
        """Each example and the caption that the model writes greedily, batch by batch."""
        with evaluating(self.model):
            return [each for batch in self.batches(examples) for each in self._written(batch)]

    def recall(self, examples: Iterable[Example]) -> dict[str, float]:
        """Recall@1 of each pair of sources and each similarity."""
        retrieval = Retrieval(self.model)
        with evaluating(self.model):
            for batch in self.batches(examples):
                retrieval.add(batch)
        return retrieval.recall()

    def _written(self, batch: Batch) -> list[tuple[Example, str]]:
        return list(zip(batch.examples, self._write(batch), strict=True))

    def _write(self, batch: Batch) -> list[str]:
        length = min(batch.labels.shape[1] + EXTRA_TOKENS, self.model.config.max_target_positions)
        ids = self.model.generate(**batch.inputs, max_new_tokens=length, do_sample=False, num_beams=1)
        return self.processor.decode(ids.tolist())

    def scores(self, examples: Iterable[Example], per_batch: int | None = None) -> Scores:
        """All scores of `examples`; those of subsets of modalities on the first `per_batch` of each batch, held."""
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

    def _loss(self, batch: Batch) -> tuple[float, int]:
        """Summed over tokens, without the label smoothing of training; and how many tokens."""
        logits = self.model(decoder_input_ids=self.model.shift(batch.labels), **batch.inputs).logits
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return float(loss), int((batch.labels != IGNORED).sum())

    def _subsets(self, examples: Sequence[Example]) -> Iterator[tuple[str, float]]:
        """Exact match when only some of a sample's modalities are given, which have a clause in its caption."""
        for subset in SUBSETS:
            some = set(subset)
            able = [each.keeping(some) for each in examples if some < each.present and some & set(each.clauses or ())]
            if able:
                written = self.captions(able)
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
    """Words of `written` that equal those of `true` at the same place, and the words of the longer of the two."""
    ours, theirs = true.split(), written.split()
    return sum(a == b for a, b in zip(ours, theirs, strict=False)), max(len(ours), len(theirs))


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """While this lasts, the model is in evaluation mode and nothing is differentiated."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
