"""The stage that adds text: each sample of a window through one generator, with all that the sample has.

A modality that a sample lacks is masked. One that is there and could not be read costs the text: it would
leave out what the sample shows, and nobody could tell.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import torch

from mmbeam.errors import PromptError, UsageError
from mmbeam.models.generators import check_engine, check_instruction, describe, load
from mmbeam.models.generators.base import Generator
from mmbeam.models.loading import digest, dtype_name, parse_dtype, resolve
from mmbeam.models.placement import resolve_device
from mmbeam.names import COLUMN_OF_TASK, Engine, Modality, Task
from mmbeam.ops.image import apply_filter
from mmbeam.prompts.ask import (
    Decoding,
    Generated,
    GeneratorSpec,
    Instruction,
    Request,
    make_instruction,
    make_output,
    make_request,
    request_modalities,
    with_default_tokens,
)
from mmbeam.prompts.turns import Turn
from mmbeam.runs.rows import covers
from mmbeam.stages.common import (
    AUTO_BATCH_SIZE,
    files_of,
    good_picture,
    good_sound,
    spread,
    tally_of,
    text_tokens,
)
from mmbeam.stages.explain import Shares, shares_of
from mmbeam.stages.packing import pack, run_packed
from mmbeam.types import Batch, Failure, Needs, Output, Sample

# A batch holds at most batch_size times so many padded tokens: of prompts with their media, and of the new ones, for
# which the cache must have room as well. The cache of a 7 B model takes about 57 kB a token, 29 MB for so many.
TOKENS_PER_SAMPLE = 512
# and so many pixels of pictures as they were decoded: 3 MB, four times that while they are resized
PIXELS_PER_SAMPLE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class GenerateStage:
    """One generator on a window of samples.

    The task names the columns: the text, `<column>_num_tokens` and `<column>_logprob`. With `explain` there is
    also `<column>_<modality>_share`: how much of the text rests on each modality. `count_tokens` fills
    `text_num_tokens` (one stage of a job does).
    """

    model: str  # where its files are, for whoever loads it: a directory, or a hub name with its @revision
    spec: GeneratorSpec
    digest: str  # of those files: another model in the same directory is another model
    decoding: Decoding
    instruction: Instruction = field(default_factory=Instruction)
    device: str = "cpu"
    dtype: str | None = None
    batch_size: int | None = None
    explain: bool = False
    image_filter: tuple[str, float] | None = None
    count_tokens: bool = False
    engine: Engine = "transformers"

    @property
    def key(self) -> str:
        return f"generate:{self.engine}:{self.digest}:{dtype_name(self.dtype, self.device)}:{self.device}"

    @property
    def column(self) -> str:
        """Where the text goes."""
        return COLUMN_OF_TASK[self.instruction.task]

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What it takes of a sample, beside the fields of a prompt."""
        return request_modalities(self.spec, self.instruction)

    @property
    def media(self) -> tuple[Modality, ...]:
        """The modalities of which it takes what the sample holds, and no features made before."""
        of_columns = {column.modality for column in self.spec.columns}
        return tuple(modality for modality in self.modalities if modality not in of_columns)

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
        columns = (
            pa.field(self.column, pa.string()),
            pa.field(f"{self.column}_num_tokens", pa.int32()),
            pa.field(f"{self.column}_logprob", pa.float32()),
            *(pa.field(self._share(modality), pa.float32()) for modality in self.modalities if self.explain),
        )
        return [make_output(self.spec, self.instruction, columns)]

    def _share(self, modality: Modality) -> str:
        return f"{self.column}_{modality}_share"

    def load(self) -> Generator:
        """The generator on its device; on a worker the model's files are brought there first."""
        spec = replace(self.spec, directory=str(files_of(self.model, self.digest)))
        device, dtype = torch.device(resolve_device(self.device)), parse_dtype(self.dtype, self.device)
        return load(spec, device, dtype, self.engine)

    @torch.inference_mode()
    def run(self, model: Generator, batch: Batch) -> Batch:
        """Add this stage's columns to `batch.features`, and a Failure for each text lost."""
        asked, lost = self._asked(batch)
        positions, requests = list(asked), list(asked.values())
        size = self.batch_size or AUTO_BATCH_SIZE[torch.device(self.device).type]
        packed = run_packed(
            requests,
            plan_batches(model, requests, self.decoding, size),
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
        lost += [self._failure(batch.samples[positions[place]], error) for place, error in packed.failed.items()]
        tally = batch.tally + tally_of(packed.splits)
        return replace(batch, features=features, failures=(*batch.failures, *lost), tally=tally)

    def _to_do(self, batch: Batch) -> list[int]:
        """The samples for which a text is due and not lost already, by what could not be read of them."""
        [output] = self.outputs
        lost = {failure.id for failure in batch.failures if covers(failure, output)}
        return [
            position
            for position, sample in enumerate(batch.samples)
            if output.is_due(sample.present) and sample.id not in lost
        ]

    def _asked(self, batch: Batch) -> tuple[dict[int, Request], list[Failure]]:
        """The requests, by position; and the failures of samples that lack what the prompt names."""
        requests: dict[int, Request] = {}
        lost: list[Failure] = []
        for position in self._to_do(batch):
            sample = batch.samples[position]
            try:
                requests[position] = self._request(sample)
            except PromptError as error:
                lost.append(self._failure(sample, error))
        return requests, lost

    def _request(self, sample: Sample) -> Request:
        seed = stream_seed(self.decoding.seed, sample.shard, sample.offset)
        return make_request(sample, self.spec, self.instruction, seed)

    def _known_good(self) -> Request:
        """What any sound model takes: a grey picture, a second of a soft tone, one letter, features of ones."""
        shapes = {column.name: (1,) * column.tokens + (column.width,) for column in self.spec.columns}
        return Request(
            image=good_picture() if "image" in self.media else None,
            audio=good_sound() if "audio" in self.media else None,
            text="a" if "text" in self.media else None,
            prompt=None if self.instruction.prompt is None else "a",
            turns=(Turn("user", "a"),) if self.instruction.task == "dialogue" else (),
            features={name: np.ones(shape, np.float32) for name, shape in shapes.items()},
            task=self.instruction.task,
            language=self.instruction.language,
            source_language=self.instruction.source_language,
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
            self.column: pa.array([text.text for text, _ in found], pa.string()),
            f"{self.column}_num_tokens": pa.array([text.num_tokens for text, _ in found], pa.int32()),
            f"{self.column}_logprob": pa.array([text.logprob for text, _ in found], pa.float32()),
        }
        for modality in self.modalities if self.explain else ():
            values[self._share(modality)] = pa.array([shares.get(modality) for _, shares in found], pa.float32())
        return {name: spread(array, positions, len(made)) for name, array in values.items()}

    def _failure(self, sample: Sample, error: Exception) -> Failure:
        return Failure.of(sample, "generate", error, outputs=(self.column,))


def plan_batches(model: Generator, requests: Sequence[Request], decoding: Decoding, size: int) -> list[list[int]]:
    """Batches of at most `size` requests of like length, each with its cache within the limits above.

    How long a text will be nobody knows before; where it goes with the length of the prompt or of the sound, as a
    translation's, a summary's and a transcript's does, texts of like length come together too. A generator that
    schedules by itself is given all of them at once.
    """
    if model.has_scheduler:
        return [list(range(len(requests)))] if requests else []
    weights = [(weight + decoding.limit) * decoding.num_beams for weight in weights_of(model, requests)]
    pixels = [0 if request.image is None else request.image.shape[0] * request.image.shape[1] for request in requests]
    return pack(weights, size, size * TOKENS_PER_SAMPLE, pixels, size * PIXELS_PER_SAMPLE)


def weights_of(model: Generator, requests: Sequence[Request]) -> list[int]:
    """The tokens of each; 1 of one that cannot even be weighed, which fails when its turn comes."""
    try:
        return model.weigh(requests)
    except Exception:
        return [1] if len(requests) == 1 else [weights_of(model, [request])[0] for request in requests]


def stream_seed(seed: int, shard: str, offset: int) -> int:
    """The 64 bits that start a sample's random stream: of the run's seed and of what the sample is, no more."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{shard}\0{offset}".encode(), digest_size=8).digest())


def generate_stage(
    model: str,
    *,
    decoding: Decoding | None = None,
    task: Task | None = None,
    prompt: str | None = None,
    language: str | None = None,
    source_language: str | None = None,
    device: str = "cpu",
    explain: bool = False,
    count_tokens: bool = True,
    dtype: str | None = None,
    batch_size: int | None = None,
    image_filter: tuple[str, float] | None = None,
    engine: Engine = "transformers",
) -> GenerateStage:
    """The stage of a model: a hub name with optional @revision, or a directory. Reads no weights.

    `decoding` is greedy unless it says otherwise. Without a `task` it is what the model is for. `prompt` is a
    template over the sample (clean/template.py) in the place of the task's own way to ask. `device` is the
    workers': "cpu" or "cuda[:N]"; "auto" looks at this machine. For the others see GenerateStage, and Request.

    Raises ModelError for a model that cannot be used, UsageError for options that contradict each other or
    the model.
    """
    found = resolve(model)
    spec = describe(found.directory)
    instruction = make_instruction(spec, task, prompt, language, source_language)
    check_instruction(spec, instruction)
    decoding = with_default_tokens(decoding or Decoding(), spec, instruction)
    if explain and spec.required:
        raise UsageError(
            f"--explain: {model} cannot do without {' and '.join(spec.required)}, so nothing can be masked"
        )
    device = resolve_device(device) if device == "auto" else device
    check_engine(engine, spec, decoding, device, explain)
    return GenerateStage(
        model=found.reference,
        spec=spec,
        digest=digest(found.directory),
        decoding=decoding,
        instruction=instruction,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        explain=explain,
        image_filter=image_filter,
        count_tokens=count_tokens,
        engine=engine,
    )
