"""Distributed training: one training in several processes started by torchrun.

The processes partition the training split, and each batch holds samples of all of them. DistributedDataParallel
averages the gradients, so that all processes keep the same weights. The backend is gloo on a CPU, and nccl with one
process per GPU. Only rank 0 validates and writes files.

Processes may have different numbers of samples. Before each step they exchange the sizes of their local batches. A
process without a batch takes part with an empty one, and the epoch ends when all local batches are empty, so every
sample is seen exactly once. GlobalBatch in models/fusion/objectives.py scales the losses accordingly.

The losses equal those of a single process on the same batches, with two exceptions. Dropout and augmented views are
drawn from seed, step and rank. Batch norm, in convolutional encoders, normalises by the local batch; the running
statistics of rank 0 are kept.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mmbeam.errors import JobError, TrainingError, UsageError
from mmbeam.models.fusion.configuration import IGNORED, MASK
from mmbeam.models.fusion.modeling import FusionModel
from mmbeam.models.fusion.objectives import GlobalBatch, positive_keys
from mmbeam.models.placement import resolve_device
from mmbeam.training.batching import TrainingBatch

T = TypeVar("T")
Step = tuple[TrainingBatch | None, GlobalBatch]  # the local batch, None if it is empty, and the counts of all processes

STEP_TIMEOUT = timedelta(minutes=30)  # includes reading the samples from slow storage
# For the other processes while rank 0 surveys the samples or validates. A dead process is detected immediately.
MAIN_TIMEOUT = timedelta(days=1)
CONNECTION_LOST = re.compile("gloo|nccl|connection|timed out", re.IGNORECASE)  # in torch's error messages
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them with WORLD_SIZE


@dataclass(frozen=True)
class World:
    """The processes of a training and the rank of this one. By default a single process without communication."""

    rank: int = 0
    size: int = 1
    slow_group: Any = None  # the process group for broadcasts, whose timeout is MAIN_TIMEOUT

    @property
    def is_main(self) -> bool:
        """Whether this process validates and writes files."""
        return self.rank == 0

    def local_batch_size(self, batch_size: int) -> int:
        """Return the size of this process's part of a batch. Raises UsageError if `batch_size` is not divisible."""
        if batch_size % self.size:
            raise UsageError(
                f"`batch_size` {batch_size}: {self.size} processes share each batch; expected a multiple of {self.size}"
            )
        return batch_size // self.size

    def seed(self, *numbers: int) -> None:
        """Seed torch with these numbers and the rank; a single process keeps its random state."""
        if self.size > 1:
            torch.manual_seed(int(np.random.SeedSequence((*numbers, self.rank)).generate_state(1)[0]))

    def parallel(self, losses: "Losses") -> nn.Module:
        """Return the module, wrapped so that its gradients equal the gradients of the whole batch."""
        if self.size == 1:
            return losses
        with self.connected():
            # A local batch that lacks a source does not use the parameters of its encoder.
            return DistributedDataParallel(losses, find_unused_parameters=True)

    def steps(self, batches: Iterable[TrainingBatch], sources: Sequence[str]) -> Iterator[Step]:
        """Yield this process's batches with the counts of all processes, until no process has a batch left.

        If making a batch raises in one process, the others raise JobError.
        """
        if self.size == 1:
            yield from ((batch, GlobalBatch(rows=(len(batch.examples),))) for batch in batches)
            return
        iterator = iter(batches)
        while True:
            batch, error = _next(iterator)
            counts = self._exchange([error is not None, *_counts(batch, sources)])
            failed = [rank for rank, (flag, *_) in enumerate(counts) if flag]
            if failed:
                self._stop(failed[0], error)
            _, rows, longest, tokens, *present = zip(*counts, strict=True)
            if not any(rows):
                return
            by_source = dict(zip(sources, present, strict=True))
            yield (
                batch,
                GlobalBatch(rank=self.rank, rows=rows, tokens=tokens, longest=max(longest), present=by_source),
            )

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the means over the processes; all processes have the same names."""
        if self.size == 1:
            return dict(values)
        names = sorted(values)
        sums = torch.tensor([values[name] for name in names], dtype=torch.float64)
        with self.connected():
            distributed.all_reduce(sums)
        return dict(zip(names, (sums / self.size).tolist(), strict=True))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0, then on the other ranks. If rank 0 raises, they raise TrainingError or JobError."""
        if not self.is_main:
            _raise_remote(0, self.broadcast(None))
        try:
            yield
        except BaseException as error:
            if self.is_main:
                self.broadcast(_error_to_json(error))
            raise
        if self.is_main:
            self.broadcast(None)

    def from_main(self, action: Callable[[], T]) -> T:
        """Return on all ranks the JSON value that `action` returns on rank 0. Errors as in `main_first`."""
        value: T | None = None
        with self.main_first():
            if self.is_main:
                value = action()
        received: T = self.broadcast(value)
        return received

    def wait(self) -> None:
        """Wait until all processes have reached this call."""
        if self.size > 1:
            self._exchange([0])

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """Return the `value` of rank `source` on all ranks. It is sent as JSON, never as a pickle."""
        if self.size == 1:
            return value
        data = json.dumps(value if self.rank == source else None).encode()
        with self.connected():
            size = torch.tensor([len(data)])
            distributed.broadcast(size, source, self.slow_group)
            buffer = torch.zeros(int(size), dtype=torch.uint8)
            if self.rank == source:
                buffer[:] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            distributed.broadcast(buffer, source, self.slow_group)
        return json.loads(bytes(buffer.tolist()))

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Raise JobError if the connection to another process is lost."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not CONNECTION_LOST.search(f"{type(error).__name__}: {error}"):
                raise
            reason = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0]  # without the position in torch's source
            raise JobError(
                f"rank {self.rank} of {self.size}: another process died or hangs ({reason}). "
                "Run the same command again to resume from the last checkpoint"
            ) from error

    def _exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return the numbers of each rank."""
        local = torch.tensor(numbers)
        gathered = [torch.empty_like(local) for _ in range(self.size)]
        with self.connected():
            distributed.all_gather(gathered, local)
        return [tensor.tolist() for tensor in gathered]

    def _stop(self, failed: int, error: BaseException | None) -> None:
        """Raise `error` on rank `failed`, and a TrainingError or JobError with its message on the other ranks."""
        error_json = self.broadcast(None if error is None else _error_to_json(error), failed)
        if error is not None:
            raise error
        _raise_remote(failed, error_json)


SINGLE = World()


def _error_to_json(error: BaseException) -> dict[str, Any]:
    return {"message": f"{type(error).__name__}: {error}", "training": isinstance(error, TrainingError)}


def _raise_remote(rank: int, error_json: Mapping[str, Any] | None) -> None:
    """Raise the error that `_error_to_json` described on another rank; return if `error_json` is None."""
    if error_json is not None:
        raise (TrainingError if error_json["training"] else JobError)(f"rank {rank} stopped: {error_json['message']}")


def _next(batches: Iterator[TrainingBatch]) -> tuple[TrainingBatch | None, Exception | None]:
    """Return the next batch, None at the end, and the exception that making it raised, if any."""
    try:
        return next(batches, None), None
    except Exception as error:
        return None, error


def _counts(batch: TrainingBatch | None, sources: Sequence[str]) -> list[int]:
    """Return the number of samples, the tokens of the longest caption, all tokens, and the samples with each source."""
    if batch is None:
        return [0] * (3 + len(sources))
    masks = [batch.inputs.get(name + MASK) for name in sources]
    counts = [(mask if mask.dim() == 1 else mask.any(1)).sum() if mask is not None else 0 for mask in masks]
    return [len(batch.labels), batch.labels.shape[1], int((batch.labels != IGNORED).sum()), *map(int, counts)]


class Losses(nn.Module):
    """A model's losses on the local batch, as a module that DistributedDataParallel can wrap."""

    def __init__(self, model: FusionModel) -> None:
        super().__init__()
        self.model = model
        self.dummy = nn.Parameter(torch.zeros((), device=model.device))  # gives an empty batch a loss with a gradient

    def forward(
        self, batch: TrainingBatch | None, views: Mapping[str, torch.Tensor], global_batch: GlobalBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the weighted sum of the losses, and the losses by name, all scalars. `batch` is None if empty."""
        if batch is None:
            return self._empty_losses(global_batch)
        output = self.model(
            labels=batch.labels, groups=batch.groups, views=views, global_batch=global_batch, **batch.inputs
        )
        return output.loss, output.losses

    def _empty_losses(self, global_batch: GlobalBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return zeros, except for the alignment loss, which every process computes over the samples of all."""
        model, loss = self.model, 1 * self.dummy
        losses = dict.fromkeys(("caption", *model.weights), torch.zeros_like(loss))
        if "align" in model.weights:
            labels = torch.empty(0, global_batch.longest, dtype=torch.int64, device=loss.device)
            losses["align"] = model.space.loss(model.pairs, {}, {}, {}, positive_keys(labels, None), global_batch)
            loss = loss + model.weights["align"] * losses["align"]
        return loss, losses


def process_count() -> int:
    """Return the number of processes of torchrun, 1 without it. Raises UsageError for other launchers."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in TORCHRUN_VARIABLES if count > 1 and name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {count}, but {', '.join(missing)} is not set; start the processes with torchrun"
        )
    return count


def is_main_process() -> bool:
    """Whether this process is rank 0, by torchrun's environment; usable before `joined`."""
    return process_count() == 1 or os.environ["RANK"] == "0"


def local_device(name: str) -> torch.device:
    """Return the device of this process for the option `device`. Several processes on GPUs have one GPU each.

    Raises DeviceError if there are fewer GPUs than processes, UsageError if `name` is a single GPU for all of them.
    """
    count = process_count()
    if count == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device(resolve_device(name))
    if name not in ("auto", "cuda"):
        raise UsageError(f"`device` {name}: expected cuda, auto or cpu, because each of {count} processes needs a GPU")
    return torch.device(resolve_device(f"cuda:{os.environ['LOCAL_RANK']}"))


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Connect the processes of torchrun for the block. Raises JobError if they cannot connect."""
    size = process_count()
    if size == 1:
        yield SINGLE
        return
    rank, backend = int(os.environ["RANK"]), "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    with World(rank, size).connected():
        distributed.init_process_group(backend, timeout=STEP_TIMEOUT)
        slow_group = distributed.new_group(backend="gloo", timeout=MAIN_TIMEOUT)
    try:
        yield World(rank, size, slow_group)
    finally:
        distributed.destroy_process_group()
