"""The training losses other than the caption loss: alignment, reconstruction, and two adversaries.

DistributedDataParallel averages gradients over processes. Each loss is therefore scaled so that this average
equals the gradient of one process with the whole batch: a mean over a process's items is weighted by their
number, and a loss that compares all samples is computed on all of them, gathered, by every process.

Shapes: B batch, E width of the shared space, D hidden size, T tokens, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional as F

from mmbeam.models.fusion.configuration import IGNORED, FusionConfig, SourceConfig
from mmbeam.models.fusion.encoders import run_rnn

THUMBNAIL = 8  # side of the reconstructed image or spectrogram
MAX_SCALE = math.log(100)  # of cosine similarities, as in CLIP (Radford et al., 2021)
Embeddings = Mapping[str, torch.Tensor]  # by name, [B, E]
Present = Mapping[str, torch.Tensor]  # by name, bool [B]


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """How a batch is divided among processes: item counts by rank. The default describes a single process."""

    rank: int = 0
    rows: Sequence[int] = (0,)  # samples
    tokens: Sequence[int] = (0,)  # of captions
    longest: int = 0  # tokens of the longest caption
    present: Mapping[str, Sequence[int]] = field(default_factory=dict)  # by source: samples that have it

    @property
    def is_single_process(self) -> bool:
        """Whether no other process has a part of the batch."""
        return len(self.rows) == 1

    def rescale_by_rows(self, mean: torch.Tensor) -> torch.Tensor:
        """Scale a mean over this process's samples; the average over processes is the mean over all samples."""
        return self._rescale(mean, self.rows)

    def rescale_by_tokens(self, mean: torch.Tensor) -> torch.Tensor:
        """Scale a mean over this process's caption tokens, as `rescale_by_rows` does for samples."""
        return self._rescale(mean, self.tokens)

    def rescale_by_present(self, mean: torch.Tensor, *sources: str) -> torch.Tensor:
        """Scale a mean over this process's samples of `sources`, as `rescale_by_rows` does for samples."""
        if self.is_single_process:
            return mean
        counts = zip(*(self.present[source] for source in sources), strict=True)
        return self._rescale(mean, [sum(of_process) for of_process in counts])

    def has_source(self, source: str) -> bool:
        """Whether a sample of any process has the source."""
        return any(self.present.get(source, ()))

    def _rescale(self, mean: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        return mean if self.is_single_process else mean * (len(counts) * counts[self.rank] / sum(counts))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows [n, ...] of all processes, [N, ...]; gradients flow to this process's rows.

        All processes must call it, with shapes that differ in n only.
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
    """Return `values`; their gradient is multiplied by `factor`.

    With -1 this is gradient reversal (Ganin and Lempitsky, 2015, arXiv:1409.7495): one optimizer trains an
    adversary to tell two kinds of input apart, and the layers before it to make them alike.
    """
    scaled: torch.Tensor = _ScaleGradient.apply(values, factor)  # type: ignore[no-untyped-call]
    return scaled


class SharedSpace(nn.Module):
    """Projections of all sources into one space, and the similarity functions of this space."""

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
        """Return logits [A, B] of all a with all b: scaled cosine, dot product, or a W b with W learned per pair."""
        with torch.autocast(a_AE.device.type, enabled=False):  # bfloat16 cannot represent steps of 0.5 near 100
            a_AE, b_BE = a_AE.float(), b_BE.float()
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
        """Return symmetric InfoNCE, the mean over pairs and similarities, on samples that have both names of a pair.

        Samples of equal `keys` [B, 1 + T] are positives (see `positive_keys`). For a pair (a, a), each embedding is
        compared with its augmented view; if there is no view, with the other samples. The loss covers the samples of
        all processes; all of them must call this.
        """
        if not global_batch.is_single_process:
            embeddings, present, views = self._gather_all(pairs, embeddings, present, views, keys, global_batch)
            keys = global_batch.gather(F.pad(keys, (0, 1 + global_batch.longest - keys.shape[1]), value=IGNORED))
        groups, captions = keys[:, 0], keys[:, 1:]
        same_group = (groups[:, None] == groups[None]) & (groups >= 0)[:, None]
        all_positives = (captions[:, None] == captions[None]).all(-1) | same_group
        losses = []
        for pair in pairs:
            a, b = pair
            if a not in embeddings or b not in embeddings:
                continue
            rows = (present[a] & present[b]).nonzero()[:, 0]
            positives, skip = all_positives[rows][:, rows], None
            targets = embeddings[b]
            if a == b and a in views:
                targets = views[a]
            elif a == b:
                skip = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
            for kind in self.similarities:
                logits = self.similarity(kind, pair, embeddings[a][rows], targets[rows])
                losses.append(info_nce(logits, positives, skip))
        return torch.stack(losses).mean() if losses else self.scale.new_zeros(())

    def _gather_all(
        self,
        pairs: Sequence[tuple[str, str]],
        embeddings: Embeddings,
        present: Present,
        views: Embeddings,
        keys: torch.Tensor,
        global_batch: GlobalBatch,
    ) -> tuple[Embeddings, Present, Embeddings]:
        """Return the embeddings, masks and views of the samples of all processes.

        All processes exchange one tensor [B, N, E + 1], even if their samples have different sources. It holds a block
        (see `_block`) for the embedding of each name in `pairs`, then one for the view of each name that is paired with
        itself.
        """
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        viewed = [a for a, b in pairs if a == b]
        blocks = [self._block(name, embeddings, present, keys) for name in names]
        blocks += [self._block(name, views, present, keys) for name in viewed]
        gathered = global_batch.gather(torch.stack(blocks, 1))
        vectors, masks = gathered[..., :-1].unbind(1), (gathered[..., -1] > 0).unbind(1)
        count = len(names)
        rows_of = zip(names, vectors[:count], masks[:count], strict=True)
        views_of = zip(viewed, vectors[count:], masks[count:], strict=True)
        return (
            {name: rows for name, rows, mask in rows_of if mask.any()},
            dict(zip(names, masks[:count], strict=True)),
            {name: rows for name, rows, mask in views_of if mask.any()},
        )

    def _block(self, name: str, embeddings: Embeddings, present: Present, keys: torch.Tensor) -> torch.Tensor:
        """Return the vectors of a name, each followed by 1 if it is present: [B, E + 1]."""
        if name not in embeddings:
            return torch.zeros(len(keys), self.width + 1, device=keys.device)
        return torch.cat([embeddings[name].float(), present[name].float()[:, None]], 1)


def positive_keys(labels: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
    """Return [B, 1 + T], the group (-1: none) and the caption of each sample; sharing either makes positives."""
    group = labels.new_full((len(labels),), -1) if groups is None else groups
    return torch.cat([group[:, None], labels], 1)


def _key(pair: tuple[str, str]) -> str:
    return f"{pair[0]}|{pair[1]}"


def info_nce(logits: torch.Tensor, positives: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
    """Return symmetric InfoNCE with any number of positives (van den Oord et al., 2018; Khosla et al., 2020).

    It equals Khosla's L_in up to a constant. `logits`, bool `positives` and `skip` (neither positive nor
    negative) are [N, N]. Rows without a positive are ignored; without any positive the loss is 0.
    """
    if skip is not None:
        positives = positives & ~skip
        logits = logits.masked_fill(skip, -torch.inf)
    losses = []
    for scores, is_positive in ((logits, positives), (logits.T, positives.T)):
        kept = is_positive.any(1)
        if kept.any():
            chosen = scores[kept].masked_fill(~is_positive[kept], -torch.inf)
            losses.append((scores[kept].logsumexp(1) - chosen.logsumexp(1)).mean())
    return torch.stack(losses).mean() if losses else logits.new_zeros(())


class Reconstruction(nn.Module):
    """Decoders of an autoencoder whose code is the shared space: from the embedding of a source to its input.

    The target is a thumbnail of an image or spectrogram, the token frequencies of a text, the features themselves,
    or the mean of the last hidden states of a pretrained encoder.
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
                if (width := self._width(source))
            }
        )

    def _width(self, source: SourceConfig) -> int:
        if source.kind in ("features", "pretrained"):
            return source.width
        return self.vocab_size if source.modality == "text" else source.shape[0] * THUMBNAIL**2

    def loss(
        self,
        inputs: Mapping[str, Any],
        embeddings: Embeddings,
        present: Present,
        global_batch: GlobalBatch = SINGLE_PROCESS,
    ) -> torch.Tensor:
        """Return the mean over sources of the squared error, or for texts the cross-entropy to token frequencies."""
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

    def _error(self, name: str, prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        source = self.sources[name]
        if source.kind in ("features", "pretrained"):
            if source.tokens:
                target = target.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)
            return F.mse_loss(prediction, F.layer_norm(target.detach(), target.shape[-1:]))
        if source.modality == "text":
            counts = torch.zeros_like(prediction).scatter_add_(1, target, mask.to(prediction.dtype))
            return F.cross_entropy(prediction, counts / counts.sum(1, keepdim=True))
        return F.mse_loss(prediction, F.adaptive_avg_pool2d(target, THUMBNAIL).flatten(1))


class ModalityAdversary(nn.Module):
    """Classifies embeddings by source. Reversed gradients train the embeddings to be independent of their source."""

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
        """Return the cross-entropy; log(len(names)) is chance."""
        by_class = [(i, embeddings[name][present[name]]) for i, name in enumerate(self.names) if name in embeddings]
        if not by_class:
            return next(iter(embeddings.values())).new_zeros(())
        vectors = torch.cat([F.normalize(rows, dim=-1) for _, rows in by_class])
        target = torch.cat([torch.full((len(rows),), i, device=rows.device) for i, rows in by_class])
        error = F.cross_entropy(self.net(scale_gradient(vectors, -1.0)), target)
        return global_batch.rescale_by_present(error, *self.names)


class GeneratorAdversary(nn.Module):
    """Tells the decoder's states on sampled text from its states on real text (professor forcing).

    Lamb et al., 2016, arXiv:1610.09038. Reversed gradients train both kinds of states to be alike.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.rnn = nn.GRU(config.hidden_size, config.hidden_size // 2, batch_first=True, bidirectional=True)
        self.score = nn.Linear(config.hidden_size, 1)

    def loss(
        self, real: torch.Tensor, real_mask: torch.Tensor, sampled: torch.Tensor, sampled_mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the cross-entropy of states [B, T, D] with bool masks [B, T]; log(2) is chance."""
        logits = [self._classify(real, real_mask), self._classify(sampled, sampled_mask)]
        target = torch.cat([torch.ones_like(logits[0]), torch.zeros_like(logits[1])])
        return F.binary_cross_entropy_with_logits(torch.cat(logits), target)

    def _classify(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        lengths = mask.sum(1).clamp(min=1)
        packed = nn.utils.rnn.pack_padded_sequence(
            scale_gradient(states, -1.0), lengths.cpu(), batch_first=True, enforce_sorted=False
        )  # the classifier must not see padding
        outputs, _ = nn.utils.rnn.pad_packed_sequence(run_rnn(self.rnn, packed), batch_first=True)
        logits: torch.Tensor = self.score(outputs.sum(1) / lengths[:, None])[:, 0]
        return logits
