"""Masks as COCO's compressed run-length encoding, read by pycocotools: by columns, runs of 0 and 1 in turn."""

from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]  # [height, width]


def encode_mask(mask: Mask) -> str:
    """Return the compressed counts of a mask."""
    flat = np.asarray(mask, bool).T.reshape(-1)
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], ends, [len(flat)]]))
    runs: list[int] = ([0] if flat[:1].any() else []) + counts.tolist()
    letters = bytearray()
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run  # neighbouring columns are alike: differences are short
        more = True
        while more:
            bits, value = value & 0x1F, value >> 5
            more = value != -1 if bits & 0x10 else value != 0
            letters.append(48 + (bits | 0x20 if more else bits))
    return letters.decode()


def decode_mask(counts: str, size: tuple[int, int]) -> Mask:
    """Return the mask of compressed counts, [height, width]. Raises ValueError if they are not of that size."""
    runs: list[int] = []
    value = shift = 0
    for letter in counts.encode():
        bits = letter - 48
        if not 0 <= bits < 64:
            raise ValueError(f"expected run-length counts, found {chr(letter)!r}")
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        value -= (1 << shift) if bits & 0x10 else 0
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    height, width = size
    if shift or any(run < 0 for run in runs) or sum(runs) != height * width:
        raise ValueError(f"expected counts of {height} x {width} pixels, found {sum(runs)}")
    values: npt.NDArray[Any] = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T
