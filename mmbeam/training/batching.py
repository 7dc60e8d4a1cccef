"""From a stream of examples to batches on the device: shuffled, modalities dropped, alike in length, made ahead.

Every order and every draw is a function of the seed and the epoch, so that a training that goes on after
an interruption sees the batches that it would have seen.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol, TypeVar

import numpy as np
import torch

from mmbeam.config import MIB
from mmbeam.models.fusion.audio import time_axis
from mmbeam.models.fusion.configuration import MASK, SourceConfig
from mmbeam.names import MODALITIES
from mmbeam.prompts.ask import Request
from mmbeam.training.examples import Example

T = TypeVar("T")

BUFFER_BATCHES = 16  # in the shuffle buffer, whose examples are dealt out as batches of similar length,
BUFFER_BYTES = 256 * MIB  # unless it holds so much before
# Captions whose lengths are of one such step are alike. Finer steps pad less, but the batches then hold captions
# that say nearly the same, and a model learns slower: sorted by the character, the corpus's tags took twice the steps.
BUCKET_CHARS = 32
PREFETCHED_BATCHES = 2  # batches that are made while the model computes


class Processor(Protocol):
    """What is needed of a FusionProcessor."""

    def __call__(
        self, requests: Sequence[Request], device: torch.device, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]: ...

    def labels(self, captions: Sequence[str], device: torch.device, max_length: int | None = None) -> torch.Tensor: ...

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """What the model gets, and the examples it was made of."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor  # int64 [batch, tokens], padded by -100
    groups: torch.Tensor | None  # int64 [batch]: alike are those of one number, but -1; None: nobody knows
    examples: Sequence[Example]


def shuffle_buffers(examples: Iterable[Example], batch_size: int) -> Iterator[list[Example]]:
    """Cut the stream into buffers of whole batches; only the last one may hold a part of a batch."""
    pool: list[Example] = []
    size = 0
    for example in examples:
        pool.append(example)
        size += example.nbytes
        full = len(pool) >= BUFFER_BATCHES * batch_size or (size >= BUFFER_BYTES and len(pool) % batch_size == 0)
        if full:
            yield pool
            pool, size = [], 0
    if pool:
        yield pool


def drop_modalities(examples: Sequence[Example], probability: float, rng: np.random.Generator) -> list[Example]:
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
    for number, pool in enumerate(shuffle_buffers(examples, batch_size)):
        rng = np.random.default_rng((*seed, number))
        shuffled = [pool[place] for place in rng.permutation(len(pool))]
        batches = _by_length(drop_modalities(shuffled, dropout, rng), batch_size)
        yield from (batches[place] for place in rng.permutation(len(batches)))


def evaluation_batches(examples: Iterable[Example], batch_size: int) -> Iterator[list[Example]]:
    """Batches for evaluation: of similar length, nothing dropped."""
    for pool in shuffle_buffers(examples, batch_size):
        yield from _by_length(pool, batch_size)


def _by_length(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    ordered = sorted(examples, key=lambda example: len(example.caption) // BUCKET_CHARS)  # stable: ties stay shuffled
    return [ordered[begin : begin + batch_size] for begin in range(0, len(ordered), batch_size)]


def collate(examples: Sequence[Example], processor: Processor, device: torch.device, max_tokens: int) -> TrainingBatch:
    """Make the tensors of a batch; captions are cut to `max_tokens`."""
    return TrainingBatch(
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


def prefetch(make: Callable[[], Iterator[T]], depth: int = PREFETCHED_BATCHES) -> Generator[T]:
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


SHIFT = 1 / 16  # of the height of a picture, and of its width; of the length of a sound
CONTRAST, BRIGHTNESS, GRAIN = 0.2, 0.2, 0.05  # of values that go from -1 to about 1
HIDDEN = 0.15  # share of a text's tokens, or of a feature's numbers
Inputs = Mapping[str, torch.Tensor]


def make_views(
    sources: Mapping[str, SourceConfig], names: Iterable[str], inputs: Inputs, generator: torch.Generator | None = None
) -> dict[str, torch.Tensor]:
    """For each of `names` that any sample has, its values and mask as another view; random by `generator`.

    Another view of "fused" is one of every source; a caption has none.
    """
    asked = set(names)
    views: dict[str, torch.Tensor] = {}
    for name, source in sources.items():
        if asked & {name, "fused"} and inputs[name + MASK].any():
            views |= _view(name, source, inputs[name], inputs[name + MASK], generator)
    return views


def _view(
    name: str, source: SourceConfig, values: torch.Tensor, mask: torch.Tensor, generator: torch.Generator | None
) -> dict[str, torch.Tensor]:
    if source.kind == "features":
        values = values * (_random(values.shape, values, generator) >= HIDDEN)
    elif source.modality == "text":
        mask = _hide(mask, source.kind == "pretrained", generator)
    else:
        axes = (-2, -1) if source.modality == "image" else (time_axis(source, values),)
        for axis in axes if values.dim() > 2 else ():  # a waveform stays where its mask is
            values = _move(values, axis, generator)
        values = _jitter(values, source.kind == "pretrained", generator)
    return {name: values, name + MASK: mask}


def _random(shape: Iterable[int], like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    return torch.rand(tuple(shape), generator=generator, device=like.device)


def _hide(mask_BT: torch.Tensor, framed: bool, generator: torch.Generator | None) -> torch.Tensor:
    """Fewer tokens; a text all of whose tokens would be hidden stays whole.

    Where it is `framed` by special tokens, the first and the last stay: a causal encoder reads nothing without.
    """
    kept = _random(mask_BT.shape, mask_BT, generator) >= HIDDEN
    if framed:
        places = mask_BT * torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
        kept |= (places == 1) | (places == places.amax(1, keepdim=True))
    left = mask_BT & kept
    return torch.where(left.any(1, keepdim=True), left, mask_BT)


def _move(values: torch.Tensor, axis: int, generator: torch.Generator | None) -> torch.Tensor:
    """Each sample shifted by itself along the axis; what comes in at the edge repeats the edge."""
    batch, length = len(values), values.shape[axis]
    shifts = ((2 * _random((batch, 1), values, generator) - 1) * length * SHIFT).round().long()
    places = (torch.arange(length, device=values.device) + shifts).clamp(0, length - 1)
    shape = [batch, *[1] * (values.dim() - 1)]
    shape[axis] = length
    return values.gather(axis, places.view(shape).expand_as(values))


def _jitter(values: torch.Tensor, scaled: bool, generator: torch.Generator | None) -> torch.Tensor:
    """Contrast, brightness and grain; where a pretrained encoder has its own scale, relative to that of the batch."""
    centre, unit = (values.mean(), values.std()) if scaled else (0.0, 1.0)
    gain, offset = (2 * _random((2, len(values), *[1] * (values.dim() - 1)), values, generator) - 1).unbind(0)
    grain = 2 * _random(values.shape, values, generator) - 1
    return values + (values - centre) * CONTRAST * gain + unit * (BRIGHTNESS * offset + GRAIN * grain)
