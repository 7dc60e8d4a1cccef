"""The parts of the training loss beside the captions: alignment, reconstruction, and two adversaries.

Shapes: B batch, E width of the shared space, D hidden size, T words, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional as F

from mmbeam.models.fusion.configuration import IGNORED, FusionConfig, SourceConfig

THUMBNAIL = 8  # side of what is reconstructed of a picture or a spectrogram
MAX_SCALE = math.log(100)  # of cosine similarities, as in CLIP (Radford et al., 2021)
Embeddings = Mapping[str, torch.Tensor]  # by name, [B, E]
Present = Mapping[str, torch.Tensor]  # by name, bool [B]


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """How many items each process has, in the order of their ranks. By default there is one process."""

    rank: int = 0
    rows: Sequence[int] = (0,)  # samples
    tokens: Sequence[int] = (0,)  # of captions
    longest: int = 0  # tokens of the longest caption
    present: Mapping[str, Sequence[int]] = field(default_factory=dict)  # samples that have it, by source

    @property
    def is_single_process(self) -> bool:
        return len(self.rows) == 1

    def rescale_by_rows(self, mean: torch.Tensor) -> torch.Tensor:
        """This process's part of the mean over all samples, from the mean over its own."""
        return self._part(mean, self.rows)

    def rescale_by_tokens(self, mean: torch.Tensor) -> torch.Tensor:
        """This process's part of the mean over all tokens of captions, from the mean over its own."""
        return self._part(mean, self.tokens)

    def rescale_by_present(self, mean: torch.Tensor, *sources: str) -> torch.Tensor:
        """This process's part of the mean over all that is there of `sources`, from the mean over its own."""
        if self.is_single_process:
            return mean
        counts = zip(*(self.present[source] for source in sources), strict=True)
        return self._part(mean, [sum(each) for each in counts])

    def has_source(self, source: str) -> bool:
        """Whether another process, or this one, has any of the source."""
        return any(self.present.get(source, ()))

    def _part(self, mean: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        return mean if self.is_single_process else mean * (len(counts) * counts[self.rank] / sum(counts))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows [n, ...] of all processes, [N, ...]; a gradient reaches this process's own.

        All processes must call it, with the same shape but for n.
        """
        padded = rows.new_zeros(max(self.rows), *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        parts = [torch.empty_like(padded) for _ in self.rows]
        distributed.all_gather(parts, padded)
        parts = [part[:count] for part, count in zip(parts, self.rows, strict=True)]
        parts[self.rank] = scale_gradient(rows, len(parts))
        return torch.cat(parts)


SINGLE_PROCESS = GlobalBatch()


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return ctx.factor * gradients[0], None


def scale_gradient(values: torch.Tensor, factor: float) -> torch.Tensor:
    """The identity, whose gradient is multiplied by `factor`."""
    scaled: torch.Tensor = _ScaleGradient.apply(values, factor)  # type: ignore[no-untyped-call]
    return scaled


class SharedSpace(nn.Module):
    """Projections into one space, and three products to compare what is in it."""

    def __init__(self, names: Sequence[str], pairs: Sequence[tuple[str, str]], config: FusionConfig) -> None:
        super().__init__()
        self.similarities = list(config.similarities)
        self.project = nn.ModuleDict({name: nn.Linear(config.hidden_size, config.embedding_dim) for name in names})
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.width = config.embedding_dim
        self.bilinear = nn.ParameterDict()
        if "bilinear" in self.similarities:
            self.bilinear.update({_key(pair): torch.eye(self.width) for pair in pairs})

    def similarity(self, kind: str, pair: tuple[str, str], a_AE: torch.Tensor, b_BE: torch.Tensor) -> torch.Tensor:
        """Logits [A, B] of all a with all b: scaled cosine, dot product, or a W b with W learned for the pair."""
        with torch.autocast(a_AE.device.type, enabled=False):  # of 100, bfloat16 knows no halves
            return self._similarity(kind, pair, a_AE.float(), b_BE.float())

    def _similarity(self, kind: str, pair: tuple[str, str], a_AE: torch.Tensor, b_BE: torch.Tensor) -> torch.Tensor:
        if kind == "cosine":
            scale = self.scale.clamp(max=MAX_SCALE).exp()
            return scale * F.normalize(a_AE, dim=-1) @ F.normalize(b_BE, dim=-1).T
        if kind == "bilinear":
            a_AE = a_AE @ self.bilinear[_key(pair)].float()
        return a_AE @ b_BE.T / math.sqrt(self.width)

    def loss(
        self,
        pairs: Sequence[tuple[str, str]],
        embeddings: Embeddings,
        present: Present,
        views: Embeddings,
        keys: torch.Tensor,
        global_batch: GlobalBatch = SINGLE_PROCESS,
    ) -> torch.Tensor:
        """Symmetric InfoNCE, the mean over pairs and similarities; samples that lack either are left out.

        `keys` [B, 1 + T] say which samples are alike (see `positive_keys`). Of a pair of a name with itself the
        other side is `views`, where there is one; else the samples that are alike, if any. Where processes
        share a batch, each compares all the samples of all of them; all must call this.
        """
        if not global_batch.is_single_process:
            embeddings, present, views, keys = self._gathered(pairs, embeddings, present, views, keys, global_batch)
        positives = _alike(keys)
        losses = []
        for pair in pairs:
            a, b = pair
            if a not in embeddings or b not in embeddings:
                continue
            rows = (present[a] & present[b]).nonzero()[:, 0]
            alike, skip = positives[rows][:, rows], None
            other = embeddings[b]
            if a == b and a in views:
                other = views[a]
            elif a == b:
                skip = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
            for kind in self.similarities:
                logits = self.similarity(kind, pair, embeddings[a][rows], other[rows])
                losses.append(info_nce(logits, alike, skip))
        return torch.stack(losses).mean() if losses else self.scale.new_zeros(())

    def _gathered(
        self,
        pairs: Sequence[tuple[str, str]],
        embeddings: Embeddings,
        present: Present,
        views: Embeddings,
        keys: torch.Tensor,
        global_batch: GlobalBatch,
    ) -> tuple[Embeddings, Present, Embeddings, torch.Tensor]:
        """The same of all processes. What is exchanged has the same shape whatever a process has of each name."""
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        same = [a for a, b in pairs if a == b]
        blocks = [self._block(name, embeddings, present, keys) for name in names]
        blocks += [self._block(name, views, present, keys) for name in same]
        packed = global_batch.gather(torch.stack(blocks, 1))
        vectors, there = packed[..., :-1].unbind(1), (packed[..., -1] > 0).unbind(1)
        end = len(names)
        return (
            {name: each for name, each, mask in zip(names, vectors, there, strict=False) if mask.any()},
            dict(zip(names, there, strict=False)),
            {name: each for name, each, mask in zip(same, vectors[end:], there[end:], strict=True) if mask.any()},
            global_batch.gather(F.pad(keys, (0, 1 + global_batch.longest - keys.shape[1]), value=IGNORED)),
        )

    def _block(self, name: str, of: Embeddings, present: Present, keys: torch.Tensor) -> torch.Tensor:
        """A name's vectors, each followed by 1 if it is there: [B, E + 1]."""
        if name not in of:
            return torch.zeros(len(keys), self.width + 1, device=keys.device)
        return torch.cat([of[name].float(), present[name].float()[:, None]], 1)


def positive_keys(labels: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
    """A sample's group, -1 for none, and its caption [B, 1 + T]: samples that share either are alike."""
    group = labels.new_full((len(labels),), -1) if groups is None else groups
    return torch.cat([group[:, None], labels], 1)


def _alike(keys: torch.Tensor) -> torch.Tensor:
    groups, captions = keys[:, 0], keys[:, 1:]
    same_group = (groups[:, None] == groups[None]) & (groups >= 0)[:, None]
    return (captions[:, None] == captions[None]).all(-1) | same_group


def _key(pair: tuple[str, str]) -> str:
    return f"{pair[0]}|{pair[1]}"


def info_nce(logits: torch.Tensor, positives: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
    """Symmetric InfoNCE with any number of positives (van den Oord et al., 2018; Khosla et al., 2020).

    Of Khosla's two it is L_in, but for a constant. `logits`, bool `positives` and `skip` (neither positive
    nor negative) are [N, N]. A row without a positive says nothing; if none has one, 0.
    """
    if skip is not None:
        positives = positives & ~skip
        logits = logits.masked_fill(skip, -torch.inf)
    losses = []
    for scores, alike in ((logits, positives), (logits.T, positives.T)):
        kept = alike.any(1)
        if kept.any():
            chosen = scores[kept].masked_fill(~alike[kept], -torch.inf)
            losses.append((scores[kept].logsumexp(1) - chosen.logsumexp(1)).mean())
    return torch.stack(losses).mean() if losses else logits.new_zeros(())


class Reconstruction(nn.Module):
    """The decoders of an autoencoder whose code is the shared space: a source's input from its embedding.

    Of a picture or spectrogram a thumbnail, of a text its words in any order, features themselves; of what a
    pretrained encoder reads, the mean of the encoder's last hidden states.
    """

    def __init__(self, sources: Mapping[str, SourceConfig], config: FusionConfig) -> None:
        super().__init__()
        self.sources = dict(sources)
        self.vocab_size = config.vocab_size
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(config.embedding_dim, 2 * config.hidden_size),
                    nn.GELU(),
                    nn.Linear(2 * config.hidden_size, width),
                )
                for name, source in sources.items()
                if (width := self._width(source)) is not None
            }
        )

    def _width(self, source: SourceConfig) -> int | None:
        if source.kind in ("features", "pretrained"):
            return source.width or None
        return self.vocab_size if source.modality == "text" else source.shape[0] * THUMBNAIL**2

    def loss(
        self,
        inputs: Mapping[str, Any],
        embeddings: Embeddings,
        present: Present,
        global_batch: GlobalBatch = SINGLE_PROCESS,
    ) -> torch.Tensor:
        """The mean over sources: squared error, for texts cross-entropy to the shares of their words."""
        zero = next(iter(embeddings.values())).new_zeros(())
        losses = []
        for name, head in self.heads.items():
            if name in embeddings and present[name].any():
                rows = present[name]
                code = F.normalize(embeddings[name][rows], dim=-1)
                error = self._error(name, head(code), inputs[name][rows], inputs[f"{name}_mask"][rows])
                losses.append(global_batch.rescale_by_present(error, name))
            elif global_batch.has_source(name):
                losses.append(zero)
        return torch.stack(losses).mean() if losses else zero

    def _error(self, name: str, guess: torch.Tensor, true: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        source = self.sources[name]
        if source.kind in ("features", "pretrained"):
            if source.tokens:
                true = true.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)
            return F.mse_loss(guess, F.layer_norm(true.detach(), true.shape[-1:]))
        if source.modality == "text":
            counts = torch.zeros_like(guess).scatter_add_(1, true, mask.to(guess.dtype))
            return F.cross_entropy(guess, counts / counts.sum(1, keepdim=True))
        return F.mse_loss(guess, F.adaptive_avg_pool2d(true, THUMBNAIL).flatten(1))


def reverse_gradient(values: torch.Tensor) -> torch.Tensor:
    """The identity, whose gradient is reversed (Ganin and Lempitsky, 2015, arXiv:1409.7495).

    So one optimiser trains an adversary to tell things apart, and what is before it to make them alike.
    """
    return scale_gradient(values, -1.0)


class ModalityAdversary(nn.Module):
    """Tries to tell from an embedding which source it came from; the embeddings learn to give nothing away."""

    def __init__(self, names: Sequence[str], config: FusionConfig) -> None:
        super().__init__()
        self.names = list(names)
        self.net = nn.Sequential(
            nn.Linear(config.embedding_dim, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, len(self.names)),
        )

    def loss(
        self, embeddings: Embeddings, present: Present, global_batch: GlobalBatch = SINGLE_PROCESS
    ) -> torch.Tensor:
        """Cross-entropy; at log(len(names)) the adversary has lost."""
        found = [(i, embeddings[name][present[name]]) for i, name in enumerate(self.names) if name in embeddings]
        if not found:
            return next(iter(embeddings.values())).new_zeros(())
        vectors = torch.cat([F.normalize(each, dim=-1) for _, each in found])
        truth = torch.cat([torch.full((len(each),), i, device=each.device) for i, each in found])
        return global_batch.rescale_by_present(F.cross_entropy(self.net(reverse_gradient(vectors)), truth), *self.names)


class GeneratorAdversary(nn.Module):
    """Tries to tell the generator's states on its own text from those on a real one (professor forcing).

    Lamb et al., 2016, arXiv:1610.09038; both kinds of states learn to be alike.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.rnn = nn.GRU(config.hidden_size, config.hidden_size // 2, batch_first=True, bidirectional=True)
        self.score = nn.Linear(config.hidden_size, 1)

    def loss(
        self, real: torch.Tensor, real_mask: torch.Tensor, own: torch.Tensor, own_mask: torch.Tensor
    ) -> torch.Tensor:
        """Cross-entropy of states [B, T, D] with bool masks [B, T]; at log(2) the adversary has lost."""
        scores = [self._judge(real, real_mask), self._judge(own, own_mask)]
        truth = torch.cat([torch.ones_like(scores[0]), torch.zeros_like(scores[1])])
        return F.binary_cross_entropy_with_logits(torch.cat(scores), truth)

    def _judge(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        lengths = mask.sum(1).clamp(min=1)
        packed = nn.utils.rnn.pack_padded_sequence(
            reverse_gradient(states), lengths.cpu(), batch_first=True, enforce_sorted=False
        )  # what is behind a text's end is no evidence
        heard, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        mean = heard.sum(1) / lengths[:, None]
        scores: torch.Tensor = self.score(mean)[:, 0]
        return scores
