"""The four fusions: from the tokens of the present sources to one sequence and one vector.

A missing source is masked: it contributes nothing, whatever its values are. Shapes: B batch, T tokens of a
source, M fused tokens, S sources, K pooled vectors of a source, D hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import nn

from mmbeam.models.fusion.configuration import FusionConfig
from mmbeam.models.fusion.encoders import Tokens, feed_forward, transformer


@dataclass(frozen=True)
class Fused:
    """The input of the generator."""

    memory: torch.Tensor  # [B, M, D]
    mask: torch.Tensor  # bool [B, M]; every row has at least one True
    pooled: torch.Tensor  # [B, D]


def build_fuser(names: Sequence[str], config: FusionConfig) -> nn.Module:
    """Return the configured fusion of the sources `names`."""
    kinds = {"concat": ConcatFusion, "gated": GatedFusion, "bilinear": BilinearFusion}
    return AttentionFusion(names, config) if config.fusion == "attention" else kinds[config.fusion](names, config)


class AttentionFusion(nn.Module):
    """Multi-head self-attention over the tokens of all sources.

    A learned embedding marks the source of each token. One more token, always present, pools the whole, since a
    sample may lack every source.
    """

    def __init__(self, names: Sequence[str], config: FusionConfig) -> None:
        super().__init__()
        self.names = list(names)
        # One embedding per source, and the pooling token. Their names are checkpoint keys.
        self.marks = nn.Parameter(0.02 * torch.randn(len(self.names), config.hidden_size))
        self.gather = nn.Parameter(0.02 * torch.randn(config.hidden_size))
        self.layers = transformer(config, config.fusion_layers)

    def forward(self, sources: Mapping[str, Tokens], batch: int) -> Fused:
        """Fuse the sources of a batch of `batch` samples."""
        marked = [sources[name][0] + self.marks[i] for i, name in enumerate(self.names) if name in sources]
        tokens = torch.cat([self.gather.expand(batch, 1, -1), *marked], dim=1)
        masks = [sources[name][1] for name in self.names if name in sources]
        mask = torch.cat([torch.ones(batch, 1, dtype=torch.bool, device=tokens.device), *masks], dim=1)
        memory = self.layers(tokens, src_key_padding_mask=~mask)
        return Fused(memory, mask, memory[:, 0])


class AttentionPool(nn.Module):
    """K learned queries that attend to the tokens of a source."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.queries = nn.Parameter(torch.randn(config.fused_tokens, width))
        self.attention = nn.MultiheadAttention(width, config.num_attention_heads, config.dropout, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool tokens [B, T, D] to [B, K, D], zero for samples without the source."""
        present = mask.any(1)
        visible = mask | ~present[:, None]  # attention over no tokens is NaN
        queries = self.queries.expand(len(tokens), -1, -1)
        pooled, _ = self.attention(queries, tokens, tokens, key_padding_mask=~visible, need_weights=False)
        out: torch.Tensor = self.norm(pooled) * present[:, None, None]
        return out


class PooledFusion(nn.Module):
    """Base of the other three: each source is pooled to K vectors, which are combined slot by slot."""

    def __init__(self, names: Sequence[str], config: FusionConfig) -> None:
        super().__init__()
        self.names = list(names)
        self.shape = (config.fused_tokens, config.hidden_size)
        self.pools = nn.ModuleDict({name: AttentionPool(config) for name in self.names})
        self.out = feed_forward(config)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, sources: Mapping[str, Tokens], batch: int) -> Fused:
        """Fuse the sources of a batch of `batch` samples."""
        zero = next(self.parameters()).new_zeros(batch, *self.shape)
        vectors = [self.pools[name](*sources[name]) if name in sources else zero for name in self.names]
        combined = self.combine(torch.stack(vectors, dim=2))
        memory = self.norm(combined + self.out(combined))
        mask = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device)
        return Fused(memory, mask, memory.mean(1))

    def combine(self, vectors_BKSD: torch.Tensor) -> torch.Tensor:
        """Return one vector per slot, [B, K, D]; the vectors of a missing source are zero."""
        raise NotImplementedError


class ConcatFusion(PooledFusion):
    """Concatenation and a linear map."""

    def __init__(self, names: Sequence[str], config: FusionConfig) -> None:
        super().__init__(names, config)
        self.merge = nn.Linear(len(self.names) * config.hidden_size, config.hidden_size)

    def combine(self, vectors_BKSD: torch.Tensor) -> torch.Tensor:
        """Concatenate and project."""
        merged: torch.Tensor = self.merge(vectors_BKSD.flatten(2))
        return merged


class GatedFusion(PooledFusion):
    """A sum of sources, each scaled by a gate computed from all of them (Arevalo et al., 2017, arXiv:1702.01992)."""

    def __init__(self, names: Sequence[str], config: FusionConfig) -> None:
        super().__init__(names, config)
        width, count = config.hidden_size, len(self.names)
        self.values = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.gates = nn.Linear(count * width, count * width)

    def combine(self, vectors_BKSD: torch.Tensor) -> torch.Tensor:
        """Sum the gated sources."""
        gates = torch.sigmoid(self.gates(vectors_BKSD.flatten(2))).view_as(vectors_BKSD)
        present = vectors_BKSD.any(dim=-1, keepdim=True)
        values = torch.stack([value(vectors_BKSD[:, :, i]) for i, value in enumerate(self.values)], dim=2)
        out: torch.Tensor = (gates * values * present).sum(2)
        return out


class BilinearFusion(PooledFusion):
    """Low-rank bilinear products of all pairs of sources, plus the sources (Kim et al., 2017, arXiv:1610.04325)."""

    def __init__(self, names: Sequence[str], config: FusionConfig) -> None:
        super().__init__(names, config)
        width, count = config.hidden_size, len(self.names)
        self.left = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count - 1))  # all but the last
        self.right = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count - 1))  # all but the first
        self.linear = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))
        self.product = nn.Linear(width, width, bias=False)

    def combine(self, vectors_BKSD: torch.Tensor) -> torch.Tensor:
        """Sum the sources and their pairwise products, which are zero if either source is missing."""
        sources = vectors_BKSD.unbind(2)
        combined: torch.Tensor = torch.stack([f(x) for f, x in zip(self.linear, sources, strict=True)]).sum(0)
        for a, b in combinations(range(len(sources)), 2):
            combined = combined + self.product(self.left[a](sources[a]) * self.right[b - 1](sources[b]))
        return combined
