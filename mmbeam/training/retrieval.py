"""Recall@1 between the sources of a model, per pair and per similarity.

A hit is a nearest neighbour that says the same: the same clause where one side is a caption whose clauses
are known, else the same whole caption. Of a source paired with itself it is the sample's own other view,
or, where samples have groups, another sample of the group.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from mmbeam.models.fusion.modeling import FusionModel
from mmbeam.training.batching import Batch
from mmbeam.training.examples import Example
from mmbeam.training.views import make_views

CANDIDATES = 500  # at most, among which the nearest is looked for
MOST = 5000  # samples that are looked at; more would say nothing new
VIEW = " (another view)"  # ends the name of a source seen another way
Pair = tuple[str, str]


class Retrieval:
    """Embeddings of the samples so far, and what came of them. Used inside `torch.no_grad`."""

    def __init__(self, model: FusionModel) -> None:
        self._model = model
        self._same = [a for a, b in model.pairs if a == b]
        names = [*(name for pair in model.pairs for name in pair), *(name + VIEW for name in self._same)]
        self._vectors: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        self._present: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        self._examples: list[Example] = []

    def add(self, batch: Batch) -> None:
        """Embed a batch."""
        if not self._vectors or len(self._examples) >= MOST:
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
        for name, kept in self._vectors.items():  # a source that nobody has in this batch has no embedding
            found = embeddings.get(name)
            size = (len(batch.examples), self._model.config.embedding_dim)
            kept.append(torch.zeros(size) if found is None else found.float().cpu())
            self._present[name].append(
                present[name].cpu() if name in present else torch.zeros(size[0], dtype=torch.bool)
            )
        self._examples += batch.examples

    def recall(self) -> dict[str, float]:
        """Recall@1 by "image->text cosine", the mean over chunks of candidates."""
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
        said = [self._said(pair, self._examples[row], grouped) for row in rows.tolist()]
        if grouped:
            scores.fill_diagonal_(-torch.inf)
            yield f"{a}->{a}", _right(scores, said, [said.count(each) > 1 for each in said])
            return
        yield f"{a}->{other}", _right(scores, said)
        if a != b:
            yield f"{b}->{a}", _right(scores.T, said)

    def _said(self, pair: Pair, example: Example, grouped: bool) -> str:
        """What a hit has in common with the example."""
        if pair[0] == pair[1]:
            return (example.group if grouped else None) or example.key
        sources = [self._model.sources[name].modality for name in pair if name in self._model.sources]
        if "caption" in pair and example.clauses is not None and sources:
            return example.clauses.get(sources[0], example.caption)
        return example.caption


def _right(scores: torch.Tensor, said: Sequence[str], asked: Sequence[bool] | None = None) -> list[bool]:
    """Whether each row's nearest says the same, of the rows that are asked."""
    nearest = scores.argmax(1).tolist()
    hits = [said[place] == own for place, own in zip(nearest, said, strict=True)]
    return hits if asked is None else [hit for hit, wanted in zip(hits, asked, strict=True) if wanted]


def _seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)
