"""What the stages of a model share: its files, its device, the size of its batches, and the batch that they return.

A stage is a frozen value that pickles, in the three steps of types.Stage. Stages do not depend on Beam.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mmbeam.errors import ModelError
from mmbeam.models.loading import digest, parse_dtype, resolve
from mmbeam.models.placement import Fault, resolve_device
from mmbeam.names import Modality
from mmbeam.stages.packing import Pack, PackResults, launch_pack, memory_limit
from mmbeam.types import Batch, Failure, ImageHWC, Needs, Stage, Tally, Video, Waveform

# Default samples per batch: on a CPU larger batches gain nothing, on a GPU they fill it.
AUTO_BATCH_SIZE = {"cpu": 32, "cuda": 256}
SPLIT_WARNINGS: Mapping[Fault, str] = {
    "memory": "batches halved because memory ran out",
    "sample": "batches halved to isolate a failing sample",
}


@dataclass(frozen=True, kw_only=True)
class ModelStage(Stage):
    """A model on a window of samples, in packs.

    Subclasses implement `packs` and `transfer` (the unit's thread), `compute` and `known_good` (the device's thread),
    and `collect` (the unit's thread).
    """

    model: str  # where workers find its files: a directory, or a hub name with its @revision
    spec: Any  # of encoders or generators
    digest: str  # of the files; it tells apart the models that one directory held at different times
    device: str = "cpu"
    dtype: str | None = None  # None: float32 on a CPU, bfloat16 on a GPU
    batch_size: int | None = None  # None: see AUTO_BATCH_SIZE
    image_filter: tuple[str, float] | None = None
    count_tokens: bool = False  # whether to fill text_num_tokens; one stage of a job does

    @property
    def batch_limit(self) -> int:
        """The maximum number of samples per batch."""
        return self.batch_size or AUTO_BATCH_SIZE[torch.device(self.device).type]

    def needs_of(self, modalities: Sequence[Modality]) -> Needs:
        """Return what to decode for these modalities. A CPU resamples audio while decoding, a GPU does it itself."""
        is_cpu = torch.device(self.device).type == "cpu"
        rate = self.spec.sampling_rate if "audio" in modalities and is_cpu else None
        frames = getattr(self.spec, "frames", None)
        return Needs(
            modalities=frozenset(modalities),
            sampling_rates=frozenset(() if rate is None else (rate,)),
            image_side=self.spec.image_side if "image" in modalities else None,
            frames=frozenset({frames}) if "video" in modalities and frames is not None else frozenset(),
        )

    def load_arguments(self) -> tuple[Any, torch.device, torch.dtype]:
        """Return the spec of the model's files on this machine, the device and the dtype.

        Downloads the files if need be. Raises ModelError if they differ from the files that the launching process
        described.
        """
        directory = resolve(self.model).directory
        if digest(directory) != self.digest:
            raise ModelError(
                f"{directory}: expected the files that {self.model} had at launch, found different files; "
                "launch the job again"
            )
        spec = replace(self.spec, directory=str(directory))
        return spec, torch.device(resolve_device(self.device)), parse_dtype(self.dtype, self.device)

    def packs(self, model: Any, batch: Batch) -> Iterator[Pack[Any] | PackResults[Any]]:
        """Yield the window's items, tokenized, in packs of similar size; and the results of items that have failed."""
        raise NotImplementedError

    def transfer(self, model: Any, group: str, items: Sequence[Any]) -> Any:
        """Return the inputs of `compute` for the items of a pack, copied to the device without waiting for it."""
        raise NotImplementedError

    def compute(self, model: Any, group: str, inputs: Any) -> Any:
        """Return the model's results, on their way to the host. Does not wait for the device if the model does not."""
        raise NotImplementedError

    def known_good(self, model: Any, group: str) -> Any:
        """Return an item that every working model accepts."""
        raise NotImplementedError

    def prepare(self, model: Any, batch: Batch) -> Iterator[Pack[Any] | PackResults[Any]]:
        """Yield the window's packs with their inputs on the way to the device, none larger than what failed before."""
        for whole in self.packs(model, batch):
            if isinstance(whole, PackResults):
                yield whole
                continue
            for pack in memory_limit(f"{self.key}:{whole.group}").split(whole):
                with suppress(Exception):  # `launch` tries again, and isolates the item that fails
                    pack.inputs = self.transfer(model, pack.group, pack.items)
                yield pack

    def launch(self, model: Any, work: Pack[Any] | PackResults[Any]) -> PackResults[Any]:
        """Compute a pack; halve it if it does not fit into memory or fails."""
        if isinstance(work, PackResults):
            return work
        return launch_pack(
            work,
            lambda items: self.transfer(model, work.group, items),
            lambda inputs: self.compute(model, work.group, inputs),
            lambda: self.known_good(model, work.group),
            memory_limit(f"{self.key}:{work.group}"),
        )

    @torch.inference_mode()
    def run(self, model: Any, batch: Batch) -> Batch:
        """Return the window with the stage's outputs and failures: the three steps in turn, on the calling thread."""
        return super().run(model, batch)

    def finish(
        self,
        model: Any,
        batch: Batch,
        features: Mapping[str, pa.Array],
        failures: Sequence[Failure],
        results: Sequence[PackResults[Any]],
    ) -> Batch:
        """Return `batch` with the columns and failures of this stage, and a warning for each split batch."""
        added = dict(features)
        if self.count_tokens:
            positions = [index for index, sample in enumerate(batch.samples) if sample.text is not None]
            counts = {
                index: count for result in results for index, count in result.num_tokens.items() if count is not None
            }
            others = [index for index in positions if index not in counts]
            texts = [batch.samples[index].model_text or "" for index in others]
            counts |= zip(others, model.count_tokens(texts) if texts else (), strict=True)
            values = pa.array([counts[index] for index in positions], pa.int32())
            added["text_num_tokens"] = scatter_values(values, positions, len(batch.samples))
        splits = sum((result.splits for result in results), Counter[Fault]())
        warnings = {SPLIT_WARNINGS[fault]: count for fault, count in splits.items()}
        return replace(
            batch,
            features={**batch.features, **added},
            failures=(*batch.failures, *failures),
            tally=batch.tally + Tally(warnings=warnings),
        )


def stream_seed(seed: int, shard: str, offset: int) -> int:
    """Return the 64-bit seed of a sample's random stream, which depends on the run's seed and the sample's identity."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{shard}\0{offset}".encode(), digest_size=8).digest())


def good_image() -> ImageHWC:
    """Return an image that every working model accepts: grey, 32 x 32."""
    return np.full((32, 32, 3), 127, np.uint8)


def good_video() -> Video:
    """Return a video that every working model accepts: 4 grey frames in 2 seconds."""
    return Video(frames=(good_image(),) * 4, times=(0.0, 0.5, 1.0, 1.5), seconds=2.0, size=(32, 32))


def good_audio() -> tuple[Waveform, int]:
    """Return audio that every working model accepts, and its rate in Hz: a second of a soft tone."""
    wave: Waveform = (0.1 * np.sin(np.arange(16000))).astype(np.float32)
    return wave, 16000


def scatter_values(array: pa.Array, positions: Sequence[int], count: int) -> pa.Array:
    """Return `count` values: the values of `array` at `positions`, and null elsewhere."""
    if len(positions) == count:
        return array
    sources: list[int | None] = [None] * count
    for source, position in enumerate(positions):
        sources[position] = source
    return array.take(pa.array(sources, pa.int64()))
