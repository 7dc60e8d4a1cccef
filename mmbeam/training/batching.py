"""Batches of examples: shuffling, modality dropout, bucketing by length, collation, prefetch, augmented views.

Every order and every draw is a function of the seed and the epoch, so that a resumed training sees the same
batches as an uninterrupted one.
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
from mmbeam.names import FUSION_MODALITIES
from mmbeam.prompts.ask import Request
from mmbeam.training.examples import Example

T = TypeVar("T")

BUFFER_BATCHES = 16  # batches in a shuffle buffer
BUFFER_BYTES = 256 * MIB  # a shuffle buffer that reaches this size is cut early
# Width of a length bucket. Finer buckets pad less, but fill a batch with nearly identical captions, which slows
# learning: sorted by single characters, the corpus took twice the steps.
BUCKET_CHARS = 32
PREFETCHED_BATCHES = 2


class Processor(Protocol):
    """The methods of FusionProcessor that training uses."""

    def __call__(
        self, requests: Sequence[Request], device: torch.device, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Return the model's inputs, [batch, ...] each."""

    def labels(self, captions: Sequence[str], device: torch.device, max_length: int | None = None) -> torch.Tensor:
        """Return the token ids of the captions, int64 [batch, tokens], padded by -100, at most `max_length` tokens."""

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of sequences of token ids."""


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """The tensors of a batch, and the examples it was made from."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor  # int64 [batch, tokens], padded by -100
    # int64 [batch], the same number for samples of the same group; -1: no group. None if no sample has a group.
    groups: torch.Tensor | None
    examples: Sequence[Example]


def shuffle_buffers(examples: Iterable[Example], batch_size: int) -> Iterator[list[Example]]:
    """Cut the stream into shuffle buffers of whole batches; only the last may end with a partial batch."""
    pool: list[Example] = []
    size = 0
    for example in examples:
        pool.append(example)
        size += example.nbytes
        if len(pool) >= BUFFER_BATCHES * batch_size or (size >= BUFFER_BYTES and len(pool) % batch_size == 0):
            yield pool
            pool, size = [], 0
    if pool:
        yield pool


def drop_modalities(examples: Sequence[Example], probability: float, rng: np.random.Generator) -> list[Example]:
    """Drop each modality of each example with `probability`, but never all modalities of an example."""
    restricted = []
    draws = rng.random((len(examples), len(FUSION_MODALITIES) + 1)).tolist()
    for example, (*of_modality, last) in zip(examples, draws, strict=True):
        present = [modality for modality in FUSION_MODALITIES if modality in example.present]
        survives = {m: draw >= probability for m, draw in zip(FUSION_MODALITIES, of_modality, strict=True)}
        kept = [modality for modality in present if survives[modality]]
        restricted.append(example.keeping(kept or [present[int(last * len(present))]]))
    return restricted


def training_batches(
    examples: Iterable[Example], batch_size: int, dropout: float, seed: tuple[int, ...]
) -> Iterator[list[Example]]:
    """Yield training batches of captions of similar length, in random order within each shuffle buffer.

    `dropout` is the probability of dropping a modality of an example.
    """
    for number, pool in enumerate(shuffle_buffers(examples, batch_size)):
        rng = np.random.default_rng((*seed, number))
        shuffled = [pool[index] for index in rng.permutation(len(pool))]
        batches = _by_length(drop_modalities(shuffled, dropout, rng), batch_size)
        yield from (batches[index] for index in rng.permutation(len(batches)))


def evaluation_batches(examples: Iterable[Example], batch_size: int) -> Iterator[list[Example]]:
    """Yield evaluation batches of captions of similar length, with all modalities."""
    for pool in shuffle_buffers(examples, batch_size):
        yield from _by_length(pool, batch_size)


def _by_length(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    # The sort is stable, so the examples of a bucket stay shuffled.
    ordered = sorted(examples, key=lambda example: len(example.caption) // BUCKET_CHARS)
    return [ordered[begin : begin + batch_size] for begin in range(0, len(ordered), batch_size)]


def collate(examples: Sequence[Example], processor: Processor, device: torch.device, max_tokens: int) -> TrainingBatch:
    """Return the batch of the examples. Captions are truncated to `max_tokens`."""
    return TrainingBatch(
        inputs=processor([example.make() for example in examples], device, torch.float32),
        labels=processor.labels([example.caption for example in examples], device, max_tokens),
        groups=_groups(examples, device),
        examples=examples,
    )


def _groups(examples: Sequence[Example], device: torch.device) -> torch.Tensor | None:
    """Return 63 bits of a hash of each example's group, the same in every batch and process; -1: no group."""
    names = [example.group for example in examples]
    if all(name is None for name in names):
        return None
    numbers = []
    for name in names:
        hashed = blake2b((name or "").encode("utf-8", "backslashreplace"), digest_size=8).digest()
        numbers.append(-1 if name is None else int.from_bytes(hashed, "big") >> 1)
    return torch.tensor(numbers, device=device)


def prefetch_batches(make: Callable[[], Iterator[T]], depth: int = PREFETCHED_BATCHES) -> Generator[T]:
    """Yield the items of `make()`, which a thread makes up to `depth` items ahead.

    Closing the generator ends the thread. Exceptions of the thread are raised here.
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
        thread.join(timeout=10)  # it ends after its current item; a daemon thread does not delay the exit


@dataclass(frozen=True)
class _End:
    """The end of the stream, with the error that caused it, if any."""

    error: BaseException | None


def _drain(ready: "queue.SimpleQueue[T | _End]", room: threading.Semaphore) -> Generator[T]:
    while not isinstance(item := ready.get(), _End):
        room.release()
        yield item
    if item.error is not None:
        raise item.error


SHIFT = 1 / 16  # largest shift, as a fraction of an image's height and width, or of a clip's length
CONTRAST, BRIGHTNESS, GRAIN = 0.2, 0.2, 0.05  # for values from -1 to about 1
MASKED = 0.15  # fraction of text tokens or feature values that are masked
ModelInputs = Mapping[str, torch.Tensor]


def make_views(
    sources: Mapping[str, SourceConfig],
    names: Iterable[str],
    inputs: ModelInputs,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """Return the values and mask of an augmented view, for each of the sources `names` that the batch contains.

    Images and spectrograms are shifted, their brightness and contrast change, and noise is added. Text tokens and
    feature values are masked. Properties that a caption may describe, such as left and right, are preserved. A view
    of "fused" is a view of every source; captions have none.

    Shapes: B batch, then the source's: C channels, H height, W width; T frames and M mel bins in either order;
    T tokens.
    """
    wanted = set(names)
    views: dict[str, torch.Tensor] = {}
    for name, source in sources.items():
        if wanted & {name, "fused"} and inputs[name + MASK].any():
            views |= _view(name, source, inputs[name], inputs[name + MASK], generator)
    return views


def _view(
    name: str, source: SourceConfig, values: torch.Tensor, mask: torch.Tensor, generator: torch.Generator | None
) -> dict[str, torch.Tensor]:
    if source.kind == "features":
        values = values * (_random(values.shape, values, generator) >= MASKED)
    elif source.modality == "text":
        mask = _mask_tokens(mask, source.kind == "pretrained", generator)
    else:
        axes = (-2, -1) if source.modality == "image" else (time_axis(source, values),)
        for axis in axes if values.dim() > 2 else ():  # waveforms are not shifted: their mask would not fit any more
            values = _shift(values, axis, generator)
        values = _jitter(values, source.kind == "pretrained", generator)
    return {name: values, name + MASK: mask}


def _random(shape: Iterable[int], like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    return torch.rand(tuple(shape), generator=generator, device=like.device)


def _mask_tokens(mask_BT: torch.Tensor, has_special_tokens: bool, generator: torch.Generator | None) -> torch.Tensor:
    """Mask tokens at random; a text that would lose all tokens stays whole.

    With special tokens around the text, the first and the last token stay: causal encoders need them.
    """
    kept = _random(mask_BT.shape, mask_BT, generator) >= MASKED
    if has_special_tokens:
        positions = mask_BT * torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
        kept |= (positions == 1) | (positions == positions.amax(1, keepdim=True))
    left = mask_BT & kept
    return torch.where(left.any(1, keepdim=True), left, mask_BT)


def _shift(values: torch.Tensor, axis: int, generator: torch.Generator | None) -> torch.Tensor:
    """Shift each sample along the axis by its own random distance, repeating the edge."""
    batch, length = len(values), values.shape[axis]
    shifts = ((2 * _random((batch, 1), values, generator) - 1) * length * SHIFT).round().long()
    positions = (torch.arange(length, device=values.device) + shifts).clamp(0, length - 1)
    shape = [batch, *[1] * (values.dim() - 1)]
    shape[axis] = length
    return values.gather(axis, positions.view(shape).expand_as(values))


def _jitter(values: torch.Tensor, is_relative: bool, generator: torch.Generator | None) -> torch.Tensor:
    """Change contrast and brightness and add noise, relative to the mean and deviation of the batch or to 0 and 1."""
    centre, unit = (values.mean(), values.std()) if is_relative else (0.0, 1.0)
    gain, offset = (2 * _random((2, len(values), *[1] * (values.dim() - 1)), values, generator) - 1).unbind(0)
    grain = 2 * _random(values.shape, values, generator) - 1
    return values + (values - centre) * CONTRAST * gain + unit * (BRIGHTNESS * offset + GRAIN * grain)
