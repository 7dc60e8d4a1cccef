"""What this process has of a batch that several processes share, so that a loss is that of the whole batch.

Processes average their gradients (DistributedDataParallel). So the mean over a process's own items counts by
its share of all items, times the number of processes; and where every sample is compared with every other, each
process computes the loss of the whole batch, and the gradient of its own rows counts that many times. Averaged,
that is what one process would have. Not here: how the processes learn these numbers of one another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed


@dataclass(frozen=True, kw_only=True)
class BatchShare:
    """How many items each process has, in the order of their ranks. By default there is one process."""

    rank: int = 0
    rows: Sequence[int] = (0,)  # samples
    tokens: Sequence[int] = (0,)  # of captions
    longest: int = 0  # tokens of the longest caption
    present: Mapping[str, Sequence[int]] = field(default_factory=dict)  # samples that have it, by source

    @property
    def alone(self) -> bool:
        return len(self.rows) == 1

    def by_rows(self, mean: torch.Tensor) -> torch.Tensor:
        """This process's part of the mean over all samples, from the mean over its own."""
        return self._part(mean, self.rows)

    def by_tokens(self, mean: torch.Tensor) -> torch.Tensor:
        """This process's part of the mean over all tokens of captions, from the mean over its own."""
        return self._part(mean, self.tokens)

    def by_present(self, mean: torch.Tensor, *sources: str) -> torch.Tensor:
        """This process's part of the mean over all that is there of `sources`, from the mean over its own."""
        if self.alone:
            return mean
        counts = zip(*(self.present[source] for source in sources), strict=True)
        return self._part(mean, [sum(each) for each in counts])

    def anywhere(self, source: str) -> bool:
        """Whether another process, or this one, has any of the source."""
        return any(self.present.get(source, ()))

    def _part(self, mean: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        return mean if self.alone else mean * (len(counts) * counts[self.rank] / sum(counts))

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


WHOLE = BatchShare()


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
