"""What the stages share: a model's files, batch sizes, inputs known to be good, columns for a whole window."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmbeam.errors import ModelError
from mmbeam.models.loading import digest, resolve
from mmbeam.models.placement import Fault
from mmbeam.types import ImageHWC, Sample, Tally, Waveform

# Samples per batch when the user gives none: on a CPU larger batches gain nothing, on a GPU they fill it.
AUTO_BATCH_SIZE = {"cpu": 32, "cuda": 256}
SPLIT: Mapping[Fault, str] = {
    "memory": "batches halved for lack of memory",
    "sample": "batches that failed on a sample",
}


def files_of(model: str, expected: str) -> Path:
    """The directory of a model's files, brought to this machine if need be.

    Raises ModelError unless `expected` is their digest.
    """
    directory = resolve(model).directory
    if digest(directory) != expected:
        raise ModelError(f"{directory}: holds other files than {model} did where the job was launched")
    return directory


def good_picture() -> ImageHWC:
    """A picture that any sound model takes: a grey one."""
    return np.full((32, 32, 3), 127, np.uint8)


def good_sound() -> tuple[Waveform, int]:
    """A sound that any sound model takes, and its rate in Hz: a second of a soft tone."""
    wave: Waveform = (0.1 * np.sin(np.arange(16000))).astype(np.float32)
    return wave, 16000


def spread(array: pa.Array, positions: Sequence[int], count: int) -> pa.Array:
    """`array` at `positions` of an array of `count` values, null elsewhere."""
    if len(positions) == count:
        return array
    places: list[int | None] = [None] * count
    for place, position in enumerate(positions):
        places[position] = place
    return array.take(pa.array(places, pa.int64()))


def text_tokens(count: Callable[[Sequence[str]], Sequence[int]], samples: Sequence[Sample]) -> pa.Array:
    """The column text_num_tokens: what `count` says of each sample's text, null where there is none."""
    positions = [i for i, sample in enumerate(samples) if sample.text is not None]
    counts = count([samples[i].model_text or "" for i in positions])
    return spread(pa.array(counts, pa.int32()), positions, len(samples))


def tally_of(splits: Counter[Fault]) -> Tally:
    """Batches that had to be split, as a window's warnings."""
    return Tally(warnings={SPLIT[fault]: count for fault, count in splits.items()})
