"""The stage that adds text: each sample of a window through one generator, with all that the sample has.

A modality that a sample lacks is masked. One that is there and could not be read costs the text: it would
leave out what the sample shows, and nobody could tell.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from mmbeam.errors import UsageError
from mmbeam.io.rows import covers
from mmbeam.models.generators import describe, load
from mmbeam.models.generators.base import Decoding, Generated, Generator, GeneratorSpec, Request
from mmbeam.models.loading import digest, dtype_name, parse_dtype, resolve
from mmbeam.models.placement import resolve_device
from mmbeam.ops.filters import apply_filter
from mmbeam.stages.common import (
    AUTO_BATCH_SIZE,
    files_of,
    good_picture,
    good_sound,
    spread,
    tally_of,
    text_tokens,
    wave_of,
)
from mmbeam.stages.explain import Shares, shares_of
from mmbeam.stages.packing import pack, run_packed
from mmbeam.types import Batch, Failure, Modality, Needs, Output, Sample

TOKENS_PER_SAMPLE = 256  # a batch holds at most batch_size times so many padded tokens, media included


@dataclass(frozen=True, kw_only=True)
class GenerateStage:
    """One generator on a window of samples.

    `task` names the columns: the text, `<task>_num_tokens` and `<task>_logprob`. With `explain` there is
    also `<task>_<modality>_share`: how much of the text rests on each modality. `count_tokens` fills
    `text_num_tokens` (one stage of a job does).
    """

    model: str  # where its files are, for whoever loads it: a directory, or a hub name with its @revision
    spec: GeneratorSpec
    digest: str  # of those files: another model in the same directory is another model
    decoding: Decoding
    task: str = "caption"
    device: str = "cpu"
    dtype: str | None = None
    batch_size: int | None = None
    explain: bool = False
    image_filter: tuple[str, float] | None = None
    count_tokens: bool = False

    @property
    def key(self) -> str:
        return f"generate:{self.digest}:{dtype_name(self.dtype, self.device)}:{self.device}"

    @property
    def media(self) -> tuple[Modality, ...]:
        """The modalities of which it takes what the sample holds, and no features made before."""
        of_columns = {column.modality for column in self.spec.columns}
        return tuple(modality for modality in self.spec.modalities if modality not in of_columns)

    @property
    def needs(self) -> Needs:
        """On a CPU sounds are resampled while they are decoded; a GPU does it better itself."""
        on_cpu = torch.device(self.device).type == "cpu"
        rate = self.spec.sampling_rate if "audio" in self.media and on_cpu else None
        return Needs(
            modalities=frozenset(self.media),
            sampling_rates=frozenset(() if rate is None else (rate,)),
            image_side=self.spec.image_side if "image" in self.media else None,
            columns=frozenset(self.spec.columns),
        )

    @property
    def outputs(self) -> Sequence[Output]:
        """One output. Samples that hold nothing the model takes, or lack what it must have, have a null."""
        columns = [
            pa.field(self.task, pa.string()),
            pa.field(f"{self.task}_num_tokens", pa.int32()),
            pa.field(f"{self.task}_logprob", pa.float32()),
            *(pa.field(self._share(modality), pa.float32()) for modality in self.spec.modalities if self.explain),
        ]
        modalities, required = frozenset(self.spec.modalities), frozenset(self.spec.required)
        return [Output(modalities=modalities, required=required, columns=tuple(columns))]

    def _share(self, modality: Modality) -> str:
        return f"{self.task}_{modality}_share"

    def load(self) -> Generator:
        """The generator on its device; on a worker the model's files are brought there first."""
        spec = replace(self.spec, directory=str(files_of(self.model, self.digest)))
        return load(spec, torch.device(resolve_device(self.device)), parse_dtype(self.dtype, self.device))

    @torch.inference_mode()
    def run(self, model: Generator, batch: Batch) -> Batch:
        """Add this stage's columns to `batch.features`, and a Failure for each text lost."""
        positions = self._to_do(batch)
        requests = [self._request(batch.samples[position]) for position in positions]
        size = self.batch_size or AUTO_BATCH_SIZE[torch.device(self.device).type]
        packed = run_packed(
            requests,
            pack(model.weigh(requests), size, size * TOKENS_PER_SAMPLE),
            lambda some: self._generate(model, some),
            self._known_good,
        )
        made: list[tuple[Generated, Shares] | None] = [None] * len(batch.samples)
        for places, results in packed.done:
            for place, result in zip(places, results, strict=True):
                made[positions[place]] = result
        features = {**batch.features, **self._columns(made)}
        if self.count_tokens:
            features["text_num_tokens"] = text_tokens(model.count_tokens, batch.samples)
        lost = [self._failure(batch.samples[positions[place]], error) for place, error in packed.failed.items()]
        tally = batch.tally + tally_of(packed.splits)
        return replace(batch, features=features, failures=(*batch.failures, *lost), tally=tally)

    def _to_do(self, batch: Batch) -> list[int]:
        """The samples for which a text is due and not lost already, by what could not be read of them."""
        [output] = self.outputs
        lost = {(f.shard, f.offset) for f in batch.failures if covers(f, output)}
        return [
            position
            for position, sample in enumerate(batch.samples)
            if output.due(sample.present) and (sample.shard, sample.offset) not in lost
        ]

    def _request(self, sample: Sample) -> Request:
        taken = self.spec.modalities
        heard = sample.audio if sample.audio is not None and sample.audio.waves else None
        return Request(
            image=sample.image if "image" in taken else None,
            audio=wave_of(heard, self.spec.sampling_rate) if "audio" in taken and heard is not None else None,
            text=sample.model_text if "text" in taken else None,
            features=sample.features,
            seed=stream_seed(self.decoding.seed, sample.shard, sample.offset),
        )

    def _known_good(self) -> Request:
        """What any sound model takes: a grey picture, a second of a soft tone, one letter, features of ones."""
        shapes = {column.name: (1,) * column.tokens + (column.width,) for column in self.spec.columns}
        return Request(
            image=good_picture() if "image" in self.media else None,
            audio=good_sound() if "audio" in self.media else None,
            text="a" if "text" in self.spec.modalities else None,
            features={name: np.ones(shape, np.float32) for name, shape in shapes.items()},
        )

    def _generate(self, model: Generator, requests: Sequence[Request]) -> list[tuple[Generated, Shares]]:
        requests = [self._filtered(request) for request in requests]
        made = model.generate(requests, self.decoding)
        if any(math.isnan(each.logprob) for each in made):
            raise FloatingPointError("the model's log-probabilities are not numbers (a wider --dtype may help)")
        shares: list[Shares] = shares_of(model, requests, made) if self.explain else [{} for _ in made]
        return list(zip(made, shares, strict=True))

    def _filtered(self, request: Request) -> Request:
        if self.image_filter is None or request.image is None:
            return request
        pixels_CHW = torch.tensor(request.image, device=self.device).permute(2, 0, 1)
        filtered_CHW = apply_filter(pixels_CHW[None], *self.image_filter)[0]
        return replace(request, image=np.ascontiguousarray(filtered_CHW.permute(1, 2, 0).cpu().numpy()))

    def _columns(self, made: Sequence[tuple[Generated, Shares] | None]) -> dict[str, pa.Array]:
        positions = [position for position, each in enumerate(made) if each is not None]
        found = [each for each in made if each is not None]
        values = {
            self.task: pa.array([text.text for text, _ in found], pa.string()),
            f"{self.task}_num_tokens": pa.array([text.num_tokens for text, _ in found], pa.int32()),
            f"{self.task}_logprob": pa.array([text.logprob for text, _ in found], pa.float32()),
        }
        for modality in self.spec.modalities if self.explain else ():
            values[self._share(modality)] = pa.array([shares.get(modality) for _, shares in found], pa.float32())
        return {name: spread(array, positions, len(made)) for name, array in values.items()}

    def _failure(self, sample: Sample, error: Exception) -> Failure:
        return Failure(
            key=sample.key,
            shard=sample.shard,
            offset=sample.offset,
            modality="",
            step="generate",
            error=type(error).__name__,
            message=str(error)[:300],
            outputs=(self.task,),
        )


def stream_seed(seed: int, shard: str, offset: int) -> int:
    """The 64 bits that start a sample's random stream: of the run's seed and of what the sample is, no more."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{shard}\0{offset}".encode(), digest_size=8).digest())


def generate_stage(
    model: str,
    *,
    decoding: Decoding | None = None,
    task: str = "caption",
    device: str = "cpu",
    explain: bool = False,
    count_tokens: bool = True,
    dtype: str | None = None,
    batch_size: int | None = None,
    image_filter: tuple[str, float] | None = None,
) -> GenerateStage:
    """The stage of a model: a hub name with optional @revision, or a directory. Reads no weights.

    `decoding` is greedy unless it says otherwise. `task` is the name of the text's column. `device` is the
    workers': "cpu" or "cuda[:N]"; "auto" looks at this machine. For the others see GenerateStage.

    Raises ModelError for a model that cannot be used, UsageError for options that contradict each other or
    the model.
    """
    decoding = decoding or Decoding()
    check_decoding(decoding)
    if not task.isidentifier():
        raise UsageError(f"task {task!r}: expected a name for a column, of letters, digits and _")
    found = resolve(model)
    spec = describe(found.directory)
    if spec.max_new_tokens is not None and decoding.max_new_tokens > spec.max_new_tokens:
        raise UsageError(f"--max-new-tokens {decoding.max_new_tokens}: {model} writes at most {spec.max_new_tokens}")
    if explain and spec.required:
        raise UsageError(
            f"--explain: {model} cannot do without {' and '.join(spec.required)}, so nothing can be masked"
        )
    return GenerateStage(
        model=found.reference,
        spec=spec,
        digest=digest(found.directory),
        decoding=decoding,
        task=task,
        device=resolve_device(device) if device == "auto" else device,
        dtype=dtype,
        batch_size=batch_size,
        explain=explain,
        image_filter=image_filter,
        count_tokens=count_tokens,
    )


def check_decoding(decoding: Decoding) -> None:
    """Raise UsageError for options of decoding that contradict each other or make no sense."""
    if decoding.max_new_tokens < 1 or decoding.num_beams < 1:
        raise UsageError(f"--max-new-tokens and --num-beams: expected at least 1, found {decoding}")
    if decoding.samples and decoding.num_beams > 1:
        raise UsageError("--temperature goes with sampling, --num-beams with a search that knows no chance: give one")
    if decoding.temperature is not None and not 0 < decoding.temperature < math.inf:
        raise UsageError(f"--temperature {decoding.temperature}: expected a number above 0; leave it out for no chance")
    if not 0 < decoding.top_p <= 1 or (decoding.top_p < 1 and not decoding.samples):
        raise UsageError(f"--top-p {decoding.top_p}: expected a number above 0 and at most 1, with --temperature")
