"""Sequences of different lengths to one tensor and back. Pure; which pad and which length is the caller's."""

from collections.abc import Sequence
from typing import Literal

import torch


def pad(
    ids: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
    length: int | None = None,
    side: Literal["left", "right"] = "right",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids as int64 [B, L] and their mask (1: a token), L the longest of them or `length`.

    Raises ValueError if a sequence is longer than `length`.
    """
    longest = max(map(len, ids), default=0)
    width = longest if length is None else length
    if longest > width:
        raise ValueError(f"expected at most {width} tokens, found {longest}")
    tokens = torch.full((len(ids), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(ids), width), dtype=torch.int64)
    for row, sequence in enumerate(ids):
        where = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
        tokens[row, where] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, where] = 1
    return tokens.to(device, non_blocking=True), mask.to(device, non_blocking=True)


def unpad(
    hidden_BLD: torch.Tensor, lengths: Sequence[int], side: Literal["left", "right"] = "right"
) -> list[torch.Tensor]:
    """The vectors of each sequence's own tokens, [length, D] each."""
    if side == "right":
        return [hidden[:length] for hidden, length in zip(hidden_BLD, lengths, strict=True)]
    return [hidden[len(hidden) - length :] for hidden, length in zip(hidden_BLD, lengths, strict=True)]
