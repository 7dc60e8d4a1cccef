"""The stage that adds text: each sample of a window through one generator, with all modalities that it has.

A modality that a sample lacks is masked. If a modality is present but could not be decoded, no text is generated: a
text made without it would be incomplete, and its row would not show that.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from mmbeam.errors import PromptError, UsageError
from mmbeam.models.generators import check_engine, check_instruction, describe, load
from mmbeam.models.generators.base import Generator, Prepared
from mmbeam.models.loading import digest, dtype_name, resolve
from mmbeam.models.placement import resolve_device
from mmbeam.names import COLUMN_OF_TASK, MODALITIES, Engine, Modality, Task
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
from mmbeam.stages.base import ModelStage, good_audio, good_image, good_video, scatter_values, stream_seed
from mmbeam.stages.packing import Pack, PackResults, pack
from mmbeam.types import Batch, Failure, ImageHWC, Needs, Output

# Maximum number of padded tokens in a batch, divided by batch_size. Tokens still to be generated are included,
# since the key-value cache of a 7 B model takes about 57 kB per token, 29 MB per sample.
TOKENS_PER_SAMPLE = 512
# Maximum number of decoded pixels in a batch, divided by batch_size: 3 MB per sample, 12 MB while resizing.
PIXELS_PER_SAMPLE = 1 << 20

Attribution = Mapping[Modality, float]


@dataclass(frozen=True, kw_only=True)
class GenerateStage(ModelStage):
    """One generator on a window of samples.

    The task names the columns: the text, `<column>_num_tokens` and `<column>_logprob`, and with `explain` also
    `<column>_<modality>_attribution`.
    """

    spec: GeneratorSpec
    decoding: Decoding
    instruction: Instruction = field(default_factory=Instruction)
    explain: bool = False
    engine: Engine = "transformers"

    @property
    def key(self) -> str:
        """The identity of the loaded model."""
        return f"generate:{self.engine}:{self.digest}:{dtype_name(self.dtype, self.device)}:{self.device}"

    @property
    def column(self) -> str:
        """The column of the text."""
        return COLUMN_OF_TASK[self.instruction.task]

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The modalities of a request, besides the fields of a prompt."""
        return request_modalities(self.spec, self.instruction)

    @property
    def media(self) -> tuple[Modality, ...]:
        """The modalities that are decoded, because no precomputed features replace them."""
        replaced = {column.modality for column in self.spec.columns}
        return tuple(modality for modality in self.modalities if modality not in replaced)

    @property
    def needs(self) -> Needs:
        """What to decode of a sample, and the columns of features to read."""
        return replace(self.needs_of(self.media), columns=frozenset(self.spec.columns))

    @property
    def outputs(self) -> Sequence[Output]:
        """One output. It is null for samples without any input, or without a required one."""
        columns = (
            pa.field(self.column, pa.string()),
            pa.field(f"{self.column}_num_tokens", pa.int32()),
            pa.field(f"{self.column}_logprob", pa.float32()),
            *(
                pa.field(self._attribution_column(modality), pa.float32())
                for modality in self.modalities
                if self.explain
            ),
            *(pa.field(f"{self.column}_{name}", kind) for name, kind in self.details),
        )
        return [make_output(self.spec, self.instruction, columns)]

    @property
    def details(self) -> Sequence[tuple[str, pa.DataType]]:
        """Additional columns of a text, by the end of their names."""
        return [pair for pair in self.spec.details if pair[0] != "words" or self.decoding.word_timestamps]

    def _attribution_column(self, modality: Modality) -> str:
        return f"{self.column}_{modality}_attribution"

    def load(self) -> Generator:
        """Return the generator on its device."""
        return load(*self.load_arguments(), self.engine)

    def packs(self, model: Generator, batch: Batch) -> Iterator[Pack[Request] | PackResults[Any]]:
        """Yield the requests of a window in packs, after the samples that lack a field of the prompt."""
        by_position, errors = self._requests(batch)
        yield PackResults(self.column, failed=errors)
        positions, requests = list(by_position), encode_requests(model, list(by_position.values()))
        weights = padded_weights(model, requests, self.decoding)
        for indices in plan_batches(model, requests, weights, self.batch_limit):
            yield Pack(
                group=self.column,
                positions=[positions[index] for index in indices],
                items=[requests[index] for index in indices],
                weights=[weights[index] for index in indices],
            )

    def transfer(
        self, model: Generator, group: str, items: Sequence[Request]
    ) -> tuple[Sequence[Request], Sequence["Masked"]]:
        """Return the requests with filtered images and the model's inputs; with `explain` also the masked ones."""
        if self.image_filter is not None:
            items = [self._filtered(item, *self.image_filter) for item in items]
        masked = mask_each(model, items) if self.explain else []
        return Prepared(items, model.prepare(items)), masked

    def compute(
        self, model: Generator, group: str, inputs: tuple[Sequence[Request], Sequence["Masked"]]
    ) -> list[tuple[Generated, Attribution]]:
        """Return the texts of requests, and with `explain` their attributions."""
        requests, masked = inputs
        texts = model.generate(requests, self.decoding)
        if not all(math.isfinite(text.logprob) for text in texts):
            raise FloatingPointError("the model's log-probabilities are not finite; a wider `dtype` may help")
        attributions: Sequence[Attribution] = [{}] * len(texts)
        if self.explain:
            attributions = attribute(model, requests, texts, masked)
        return list(zip(texts, attributions, strict=True))

    def collect(
        self, model: Generator, batch: Batch, results: Sequence[PackResults[list[tuple[Generated, Attribution]]]]
    ) -> Batch:
        """Return `batch` with this stage's columns, and a Failure for each lost text."""
        texts: dict[int, tuple[Generated, Attribution]] = {}
        failures: list[Failure] = []
        for result in results:
            for positions, generated in result.done:
                texts.update(zip(positions, generated, strict=True))
            failures += [
                Failure.of(batch.samples[position], "generate", error, outputs=(self.column,))
                for position, error in result.failed.items()
            ]
        return self.finish(model, batch, self._columns(texts, len(batch.samples)), failures, results)

    def _requests(self, batch: Batch) -> tuple[dict[int, Request], dict[int, Exception]]:
        """Return by position the requests, and the errors of samples that lack a field of the prompt.

        Samples whose text is not due, or that have already failed to be decoded, have neither.
        """
        [output] = self.outputs
        lost = {failure.id for failure in batch.failures if covers(failure, output)}
        requests: dict[int, Request] = {}
        errors: dict[int, Exception] = {}
        for position, sample in enumerate(batch.samples):
            if not output.is_due(sample.present) or sample.id in lost:
                continue
            seed = stream_seed(self.decoding.seed, sample.shard, sample.offset)
            try:
                requests[position] = make_request(sample, self.spec, self.instruction, seed)
            except PromptError as error:
                errors[position] = error
        return requests, errors

    def known_good(self, model: Generator, group: str) -> Request:
        """Return a request that every working model accepts."""
        shapes = {column.name: (1, column.width) if column.tokens else (column.width,) for column in self.spec.columns}
        return Request(
            image=good_image() if "image" in self.media else None,
            video=good_video() if self.spec.video not in (None, "middle") and "video" in self.media else None,
            audio=good_audio() if "audio" in self.media else None,
            text="a" if "text" in self.media else None,
            prompt=None if self.instruction.template is None else "a",
            turns=(Turn("user", "a"),) if self.instruction.task == "dialogue" else (),
            features={name: np.ones(shape, np.float32) for name, shape in shapes.items()},
            task=self.instruction.task,
            language=self.instruction.language,
            source_language=self.instruction.source_language,
        )

    def _filtered(self, request: Request, name: str, value: float) -> Request:
        def filtered(image: ImageHWC) -> ImageHWC:
            pixels_CHW = torch.tensor(image, device=self.device).permute(2, 0, 1)
            filtered_CHW = apply_filter(pixels_CHW[None], name, value)[0]
            return np.ascontiguousarray(filtered_CHW.permute(1, 2, 0).cpu().numpy())

        image = None if request.image is None else filtered(request.image)
        video = request.video and replace(request.video, frames=tuple(map(filtered, request.video.frames)))
        return replace(request, image=image, video=video)

    def _columns(self, texts: Mapping[int, tuple[Generated, Attribution]], count: int) -> dict[str, pa.Array]:
        positions = sorted(texts)
        generated = [texts[position][0] for position in positions]
        values = {
            self.column: pa.array([text.text for text in generated], pa.string()),
            f"{self.column}_num_tokens": pa.array([text.num_tokens for text in generated], pa.int32()),
            f"{self.column}_logprob": pa.array([text.logprob for text in generated], pa.float32()),
        }
        for modality in self.modalities if self.explain else ():
            attributions = [texts[position][1].get(modality) for position in positions]
            values[self._attribution_column(modality)] = pa.array(attributions, pa.float32())
        for name, kind in self.details:
            values[f"{self.column}_{name}"] = pa.array([text.details.get(name) for text in generated], kind)
        return {name: scatter_values(array, positions, count) for name, array in values.items()}


class Masked(NamedTuple):
    """The requests of a batch that have a modality among others, without it."""

    modality: Modality
    rows: Sequence[int]  # of the requests in the batch
    requests: Sequence[Request]


def mask_each(model: Generator, requests: Sequence[Request]) -> list[Masked]:
    """Return the requests without each of their modalities in turn, prepared; only of those that have several."""
    columns = {column.name: column.modality for column in model.spec.columns if column.modality}
    present = [_modalities(request, columns) for request in requests]
    masks = []
    for modality in model.spec.modalities:
        rows = [row for row, of_row in enumerate(present) if modality in of_row and len(of_row) > 1]
        if rows:
            masked = encode_requests(model, [requests[row].without(modality, columns) for row in rows])
            masks.append(Masked(modality, rows, Prepared(masked, model.prepare(masked))))
    return masks


def _modalities(request: Request, columns: Mapping[str, Modality]) -> list[Modality]:
    of_features = {columns[name] for name in request.features if name in columns}
    return [m for m in MODALITIES if m in of_features or getattr(request, m, None) is not None]


def attribute(
    model: Generator,
    requests: Sequence[Request],
    texts: Sequence[Generated],
    masked: Sequence[Masked] | None = None,
) -> list[Attribution]:
    """Return, for each text, the attribution to each modality of its request; `masked` is what `mask_each` returned.

    It is the drop of the text's log-probability when the modality is masked (a rise counts as 0), divided by the sum of
    the drops of all modalities. If that sum is 0, all attributions are 0. A single modality has attribution 1.
    """
    columns = {column.name: column.modality for column in model.spec.columns if column.modality}
    drops = [dict.fromkeys(_modalities(request, columns), 1.0) for request in requests]
    for modality, rows, without in mask_each(model, requests) if masked is None else masked:
        for row, logprob in zip(rows, model.score(without, [texts[row] for row in rows]), strict=True):
            drop = texts[row].logprob - logprob
            drops[row][modality] = drop if math.isnan(drop) else max(0.0, drop)
    attributions: list[Attribution] = []
    for row_drops in drops:
        total = sum(row_drops.values())
        if not math.isfinite(total):
            raise FloatingPointError(f"the text's log-probability without a modality is not finite: {row_drops}")
        attributions.append({modality: value / total if total else 0.0 for modality, value in row_drops.items()})
    return attributions


def padded_weights(model: Generator, requests: Sequence[Request], decoding: Decoding) -> list[int]:
    """Return the tokens of each request and its text, times the beams; 1 if the generator has a scheduler."""
    if model.has_scheduler:
        return [1] * len(requests)
    return [(weight + decoding.limit) * decoding.num_beams for weight in weigh_requests(model, requests)]


def plan_batches(model: Generator, requests: Sequence[Request], weights: Sequence[int], size: int) -> list[list[int]]:
    """Return batches of at most `size` requests of similar weight, within the limits of tokens and pixels.

    The length of a text is unknown in advance. For translations, summaries and transcripts it grows with the length
    of the request, and so texts of similar length share a batch. A generator with its own scheduler gets one batch.
    """
    if model.has_scheduler:
        return [list(range(len(requests)))] if requests else []
    images = [
        [image for image in (request.image, *(request.video.frames if request.video else ())) if image is not None]
        for request in requests
    ]
    pixels = [sum(image.shape[0] * image.shape[1] for image in of_request) for of_request in images]
    return pack(weights, size, size * TOKENS_PER_SAMPLE, pixels, size * PIXELS_PER_SAMPLE)


def encode_requests(model: Generator, requests: Sequence[Request]) -> list[Request]:
    """Return the requests with their tokens; a request that raises an error without, which `generate` reports."""
    try:
        encoded = model.encode(requests)
    except Exception:
        if len(requests) == 1:
            return list(requests)
        return [encoded for request in requests for encoded in encode_requests(model, [request])]
    return [replace(request, encoded=tokens) for request, tokens in zip(requests, encoded, strict=True)]


def weigh_requests(model: Generator, requests: Sequence[Request]) -> list[int]:
    """Return the number of tokens of each request; 1 for a request that raises an error, which `generate` reports."""
    try:
        return model.weigh(requests)
    except Exception:
        return [1] if len(requests) == 1 else [weigh_requests(model, [request])[0] for request in requests]


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
    video: bool = False,
) -> GenerateStage:
    """Return the stage of `model`: a hub name with optional @revision, or a directory. Reads no weights.

    `decoding` defaults to greedy, `task` to the model's first. `prompt` is a template over the sample
    (prompts/template.py) that replaces the task's prompt. `device` is the device on the workers: "cpu" or "cuda[:N]".
    "auto" selects it by the devices of this machine. `explain` adds the attribution of the text to each modality. With
    `video`, samples may have videos, which a model of images receives in one of the ways of GeneratorSpec.video. For
    the others see ModelStage and Request.

    Raises ModelError for an unusable model, UsageError for options that contradict each other or the model.
    """
    resolved = resolve(model)
    if resolved.package is not None:
        raise UsageError(
            f"`model` {model}: a model of {resolved.package} writes no texts; expected one of transformers"
        )
    spec = describe(resolved.directory, video and engine == "transformers")
    instruction = make_instruction(spec, task, prompt, language, source_language)
    check_instruction(spec, instruction)
    decoding = with_default_tokens(decoding or Decoding(), spec, instruction)
    if explain and spec.required:
        raise UsageError(
            f"`explain`: {model} requires {' and '.join(spec.required)}, and a required modality cannot be masked"
        )
    device = resolve_device(device) if device == "auto" else device
    check_engine(engine, spec, decoding, device, explain)
    return GenerateStage(
        model=resolved.reference,
        spec=spec,
        digest=digest(resolved.directory),
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
