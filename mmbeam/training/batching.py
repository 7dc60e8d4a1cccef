"""From a stream of examples to batches on the device: shuffled, modalities dropped, alike in length, made ahead.

Every order and every draw is a function of the seed and the epoch, so that a training that goes on after
an interruption sees the batches that it would have seen.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol, TypeVar

import numpy as np
import torch

from mmbeam.config import MIB
from mmbeam.names import MODALITIES
from mmbeam.prompts.ask import Request
from mmbeam.training.examples import Example

T = TypeVar("T")

POOL_BATCHES = 16  # in the shuffle buffer, whose examples are dealt out as batches of similar length,
POOL_BYTES = 256 * MIB  # unless it holds so much before
# Captions whose lengths are of one such step are alike. Finer steps pad less, but the batches then hold captions
# that say nearly the same, and a model learns slower: sorted by the character, the corpus's tags took twice the steps.
BUCKET_CHARS = 32
AHEAD = 2  # batches that are made while the model computes


class Processor(Protocol):
    """What is needed of a FusionProcessor."""

    def __call__(
        self, requests: Sequence[Request], device: torch.device, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]: ...

    def labels(self, captions: Sequence[str], device: torch.device, max_length: int | None = None) -> torch.Tensor: ...

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the model gets, and the examples it was made of."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor  # int64 [batch, tokens], padded by -100
    groups: torch.Tensor | None  # int64 [batch]: alike are those of one number, but -1; None: nobody knows
    examples: Sequence[Example]


def pools(examples: Iterable[Example], batch_size: int) -> Iterator[list[Example]]:
    """Cut the stream into buffers of whole batches; only the last one may hold a part of a batch."""
    pool: list[Example] = []
    size = 0
    for example in examples:
        pool.append(example)
        size += example.nbytes
        full = len(pool) >= POOL_BATCHES * batch_size or (size >= POOL_BYTES and len(pool) % batch_size == 0)
        if full:
            yield pool
            pool, size = [], 0
    if pool:
        yield pool


def dropped(examples: Sequence[Example], probability: float, rng: np.random.Generator) -> list[Example]:
    """Each example without some of its modalities, each dropped with `probability`, but never all of them."""
    draws = rng.random((len(examples), len(MODALITIES) + 1))
    return [_dropped(example, row.tolist(), probability) for example, row in zip(examples, draws, strict=True)]


def _dropped(example: Example, draws: Sequence[float], probability: float) -> Example:
    present = [modality for modality in MODALITIES if modality in example.present]
    kept = [modality for modality, draw in zip(MODALITIES, draws, strict=False) if draw >= probability]
    left = [modality for modality in present if modality in kept]
    return example.keeping(left or [present[int(draws[-1] * len(present))]])


def training_batches(
    examples: Iterable[Example], batch_size: int, dropout: float, seed: tuple[int, ...]
) -> Iterator[list[Example]]:
    """Batches for training, drawn from one buffer after the other: of similar length, in random order."""
    for number, pool in enumerate(pools(examples, batch_size)):
        rng = np.random.default_rng((*seed, number))
        shuffled = [pool[place] for place in rng.permutation(len(pool))]
        batches = _by_length(dropped(shuffled, dropout, rng), batch_size)
        yield from (batches[place] for place in rng.permutation(len(batches)))


def plain_batches(examples: Iterable[Example], batch_size: int) -> Iterator[list[Example]]:
    """Batches for evaluation: of similar length, nothing dropped."""
    for pool in pools(examples, batch_size):
        yield from _by_length(pool, batch_size)


def _by_length(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    ordered = sorted(examples, key=lambda example: len(example.caption) // BUCKET_CHARS)  # stable: ties stay shuffled
    return [ordered[begin : begin + batch_size] for begin in range(0, len(ordered), batch_size)]


def collate(examples: Sequence[Example], processor: Processor, device: torch.device, max_tokens: int) -> Batch:
    """Make the tensors of a batch; captions are cut to `max_tokens`."""
    return Batch(
        inputs=processor([example.make() for example in examples], device, torch.float32),
        labels=processor.labels([example.caption for example in examples], device, max_tokens),
        groups=_groups(examples, device),
        examples=examples,
    )


def _groups(examples: Sequence[Example], device: torch.device) -> torch.Tensor | None:
    """A number for each group, by its name alone: the same in every batch and process; -1 for none."""
    names = [example.group for example in examples]
    if all(name is None for name in names):
        return None
    return torch.tensor([-1 if name is None else _number(name) for name in names], device=device)


def _number(name: str) -> int:
    """63 bits of a hash."""
    return int.from_bytes(blake2b(name.encode("utf-8", "backslashreplace"), digest_size=8).digest(), "big") >> 1


def ahead(make: Callable[[], Iterator[T]], depth: int = AHEAD) -> Generator[T]:
    """What `make()` gives, made by a thread up to `depth` items ahead. Closing the generator ends the thread.

    Raises here what is raised there.
    """
    ready: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    stopped = threading.Event()

    def fill() -> None:
        error: BaseException | None = None
        try:
            for item in make():
                room.acquire()
                if stopped.is_set():
                    return
                ready.put(item)
        except BaseException as raised:
            error = raised
        ready.put(_End(error))

    thread = threading.Thread(target=fill, name="mmbeam-batches", daemon=True)
    thread.start()
    try:
        yield from _drain(ready, room)
    finally:
        stopped.set()
        room.release()
        thread.join(timeout=10)  # it ends with the item it is making; being a daemon it holds up no exit


@dataclass(frozen=True)
class _End:
    """Nothing more comes, because of `error` if there is one."""

    error: BaseException | None


def _drain(ready: "queue.SimpleQueue[T | _End]", room: threading.Semaphore) -> Generator[T]:
    while not isinstance(item := ready.get(), _End):
        room.release()
        yield item
    if item.error is not None:
        raise item.error
