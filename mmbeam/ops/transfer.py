"""Host values to a device and back without waiting for the device: one copy per batch, through pinned memory.

torch keeps pinned memory for reuse and hands it out again only after the copies from it are done, so that it serves as
a ring of buffers. On a CPU nothing is copied.
"""

from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch

ItemT = TypeVar("ItemT")


class Uploaded(list[ItemT]):
    """The values of a batch, with their numbers as one flat tensor on a device.

    It can stand wherever the list of host values can. A kernel that knows it takes the numbers from `flat`, others
    copy the host values.
    """

    def __init__(self, values: Sequence[ItemT], flat: torch.Tensor, starts: Sequence[int]) -> None:
        super().__init__(values)
        self.flat = flat
        self.starts = starts  # of each value in `flat`


def to_device(values: np.ndarray[Any, Any] | torch.Tensor | Sequence[Any], device: torch.device) -> torch.Tensor:
    """Return numbers of the host on the device, by one copy from pinned memory that does not wait for the device."""
    tensor = values if isinstance(values, torch.Tensor) else torch.as_tensor(values)
    if device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return host.to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in pinned memory of the host. It is filled only when the device has completed its work so far."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def upload_arrays(
    arrays: Sequence[np.ndarray[Any, Any]], device: torch.device, groups: Sequence[Hashable]
) -> Uploaded[np.ndarray[Any, Any]]:
    """Upload arrays of one dtype; arrays of equal `groups` lie one after the other in `flat`."""
    first: dict[Hashable, int] = {}
    for group in groups:
        first.setdefault(group, len(first))
    order = sorted(range(len(arrays)), key=lambda index: first[groups[index]])
    starts, end = [0] * len(arrays), 0
    for index in order:
        starts[index], end = end, end + arrays[index].size
    dtype = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
    host = torch.empty(end, dtype=dtype, pin_memory=device.type == "cuda")
    np.concatenate([arrays[index].reshape(-1) for index in order], out=host.numpy())
    return Uploaded(arrays, host.to(device, non_blocking=True), starts)


def upload_ids(ids: Sequence[Sequence[int]], device: torch.device) -> Uploaded[Sequence[int]]:
    """Upload sequences of token ids; `flat` ends with their lengths."""
    lengths = list(map(len, ids))
    total = sum(lengths)
    flat = np.fromiter(chain(chain.from_iterable(ids), lengths), np.int64, total + len(lengths))
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    return Uploaded(ids, to_device(flat, device), starts)
