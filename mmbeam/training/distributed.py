"""One training in several processes, as torchrun starts them: who they are, and what they agree on.

Each reads its share of the training part and takes its share of each batch; DistributedDataParallel averages
the gradients, so that all have the same weights (gloo on a CPU; nccl on GPUs, a process for each). Rank 0 alone
measures and writes. Processes may have different numbers of rows: before a step each says how many it has for
it, one that has none left takes part with nothing, and the epoch ends when none has any. So no row is lost and
none is seen twice. Not here: what a loss makes of a share (GlobalBatch in models/fusion/objectives.py).

The losses are those of one process on the same batches, but where random draws differ (dropout and views are
drawn by seed, step and rank), and but for batch norm, which convolutional encoders have: as usual in such
trainings it goes by a process's own rows, and rank 0's running statistics are kept.
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
Step = tuple[TrainingBatch | None, GlobalBatch]  # what a process has for a step, if anything, and what all have

TIMEOUT = timedelta(minutes=30)  # for a step; reading from slow storage is part of it
PATIENCE = timedelta(days=1)  # while rank 0 looks at samples or measures. A process that dies is noticed at once
LOST = re.compile("gloo|nccl|connection|timed out", re.IGNORECASE)  # in what is raised when another is gone
ENVIRONMENT = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE, as torchrun sets them


@dataclass(frozen=True)
class World:
    """The processes of a training and the rank of this one. By default a single process without communication."""

    rank: int = 0
    size: int = 1
    patient: Any = None  # the process group in which the others wait for rank 0

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
        """Return the module, wrapped so that its gradients are those of the whole batch."""
        if self.size == 1:
            return losses
        with self.connected():
            return DistributedDataParallel(losses, find_unused_parameters=True)  # those of what a share has nothing of

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
            share = _share(self.rank, [rest for _, *rest in counts], sources)
            if not any(share.rows):
                return
            yield batch, share

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
        """Run the block on rank 0, then on the others. If rank 0 raises, they raise TrainingError or JobError."""
        if not self.is_main:
            _raise_remote(0, self.broadcast(None))
        try:
            yield
        except BaseException as error:
            if self.is_main:
                self.broadcast(_error_facts(error))
            raise
        if self.is_main:
            self.broadcast(None)

    def from_main(self, action: Callable[[], T]) -> T:
        """Return on all ranks the JSON value that `action` returns on rank 0. Errors as in `main_first`."""
        value: Any = None
        with self.main_first():
            if self.is_main:
                value = action()
        given: T = self.broadcast(value)
        return given

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
            distributed.broadcast(size, source, self.patient)
            buffer = torch.zeros(int(size), dtype=torch.uint8)
            if self.rank == source:
                buffer[:] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            distributed.broadcast(buffer, source, self.patient)
        return json.loads(bytes(buffer.tolist()))

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Raise JobError if the connection to another process is lost."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not LOST.search(f"{type(error).__name__}: {error}"):
                raise
            reason = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0]  # without where in its source
            raise JobError(
                f"rank {self.rank} of {self.size}: another process is gone or hangs ({reason}). "
                "To resume from the last checkpoint, run the same command again"
            ) from error

    def _exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return the numbers of each rank."""
        local = torch.tensor(numbers)
        gathered = [torch.empty_like(local) for _ in range(self.size)]
        with self.connected():
            distributed.all_gather(gathered, local)
        return [tensor.tolist() for tensor in gathered]

    def _stop(self, failed: int, error: BaseException | None) -> None:
        told = self.broadcast(None if error is None else _error_facts(error), failed)
        if error is not None:
            raise error
        _raise_remote(failed, told)


ALONE = World()


def _error_facts(error: BaseException) -> dict[str, Any]:
    return {"message": f"{type(error).__name__}: {error}", "training": isinstance(error, TrainingError)}


def _raise_remote(rank: int, told: Mapping[str, Any] | None) -> None:
    if told is not None:
        raise (TrainingError if told["training"] else JobError)(f"rank {rank} stopped: {told['message']}")


def _next(batches: Iterator[TrainingBatch]) -> tuple[TrainingBatch | None, Exception | None]:
    try:
        return next(batches, None), None
    except Exception as error:
        return None, error


def _counts(batch: TrainingBatch | None, sources: Sequence[str]) -> list[int]:
    """Samples, tokens of the longest caption, tokens, and of each source the samples that have it."""
    if batch is None:
        return [0] * (3 + len(sources))
    masks = [batch.inputs.get(name + MASK) for name in sources]
    counts = [(mask if mask.dim() == 1 else mask.any(1)).sum() if mask is not None else 0 for mask in masks]
    return [len(batch.labels), batch.labels.shape[1], int((batch.labels != IGNORED).sum()), *map(int, counts)]


def _share(rank: int, counts: Sequence[Sequence[int]], sources: Sequence[str]) -> GlobalBatch:
    rows, longest, tokens, *present = zip(*counts, strict=True)
    return GlobalBatch(
        rank=rank, rows=rows, tokens=tokens, longest=max(longest), present=dict(zip(sources, present, strict=True))
    )


class Losses(nn.Module):
    """A model's losses on what this process has of a batch; the form in which DistributedDataParallel calls it."""

    def __init__(self, model: FusionModel) -> None:
        super().__init__()
        self.model = model
        self.nothing = nn.Parameter(torch.zeros((), device=model.device))  # to differentiate, where there is no sample

    def forward(
        self, batch: TrainingBatch | None, views: Mapping[str, torch.Tensor], share: GlobalBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum, and each loss by its name."""
        if batch is None:
            return self._of_nothing(share)
        output = self.model(labels=batch.labels, groups=batch.groups, views=views, global_batch=share, **batch.inputs)
        return output.loss, output.losses

    def _of_nothing(self, share: GlobalBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Of no samples: zeros, but for the alignment, which is that of all samples wherever it is computed."""
        model, loss = self.model, 1 * self.nothing
        losses = dict.fromkeys(("caption", *model.weights), torch.zeros_like(loss))
        if "align" in model.weights:
            labels = torch.empty(0, share.longest, dtype=torch.int64, device=loss.device)
            losses["align"] = model.space.loss(model.pairs, {}, {}, {}, positive_keys(labels, None), share)
            loss = loss + model.weights["align"] * losses["align"]
        return loss, losses


def process_count() -> int:
    """Return the number of processes of torchrun, 1 without it. Raises UsageError for other launchers."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in ENVIRONMENT if count > 1 and name not in os.environ]
    if missing:
        raise UsageError(f"WORLD_SIZE is {count}, but {', '.join(missing)} not set: start the processes with torchrun")
    return count


def is_main_process() -> bool:
    """Whether this process is rank 0, before the processes have joined."""
    return process_count() == 1 or os.environ["RANK"] == "0"


def local_device(name: str) -> torch.device:
    """The device that `name` means for this process: of several on GPUs, each has one of its own.

    Raises DeviceError if there are fewer, UsageError if one GPU is named for all.
    """
    count = process_count()
    if count == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device(resolve_device(name))
    if name not in ("auto", "cuda"):
        raise UsageError(f"`device` {name}: each of {count} processes has a GPU of its own; expected cuda, or cpu")
    return torch.device(resolve_device(f"cuda:{os.environ['LOCAL_RANK']}"))


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The processes that torchrun started, connected while this lasts. Raises JobError if they do not come together."""
    size = process_count()
    if size == 1:
        yield ALONE
        return
    rank, backend = int(os.environ["RANK"]), "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    with World(rank, size).connected():
        distributed.init_process_group(backend, timeout=TIMEOUT)
        patient = distributed.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield World(rank, size, patient)
    finally:
        distributed.destroy_process_group()
