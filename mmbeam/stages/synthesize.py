"""The stage that makes images or sounds: the text of each sample of a window through one synthesizer.

Each sample has a random stream of its own, which depends on the seed, the shard and the offset: it does not matter
which samples share a batch. The files are in the column MEDIA_CONTENT of the batch, which runs/writer.py writes to a
WebDataset shard.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch

from mmbeam.clean.where import SampleValues
from mmbeam.config import Synthesis
from mmbeam.errors import DeviceError, PromptError, SampleError
from mmbeam.models.loading import digest, dtype_name, resolve
from mmbeam.models.placement import resolve_device
from mmbeam.models.synthesizers import describe, load
from mmbeam.models.synthesizers.base import Encoded, Prompt, Synthesizer, SynthesizerSpec
from mmbeam.names import KINDS, MEDIA_COLUMN, MEDIA_CONTENT, MEDIA_SHARD, Kind
from mmbeam.prompts.template import Template, encodable, parse_template
from mmbeam.readers.paths import public_path
from mmbeam.runs.rows import covers
from mmbeam.stages.base import ModelStage, stream_seed
from mmbeam.stages.packing import Pack, PackResults, pack
from mmbeam.types import Batch, Failure, Needs, Output, Sample, Tally

AUTO_PROMPTS = {"cpu": 4, "cuda": 8}  # prompts per batch: a latent diffusion model of 512 x 512 takes about 1 GB each
_MADE = "file"  # the only group of packs


@dataclass(frozen=True, kw_only=True)
class SynthesizeStage(ModelStage):
    """One synthesizer on a window of samples."""

    spec: SynthesizerSpec
    template: Template | None = None  # None: the prompt is the sample's text

    @property
    def key(self) -> str:
        """The identity of the loaded model."""
        loaded = f"{self.digest}:{dtype_name(self.dtype, self.device)}:{self.device}"
        return f"synthesize:{self.spec.synthesis}:{loaded}"

    @property
    def needs(self) -> Needs:
        """What to decode of a sample."""
        return Needs(modalities=frozenset({"text"}))

    @property
    def outputs(self) -> Sequence[Output]:
        """One output: the file's name in its shard, and how it was made."""
        columns = (
            pa.field(MEDIA_COLUMN, pa.string()),
            pa.field(MEDIA_SHARD, pa.string()),
            pa.field("media_prompt", pa.string()),
            pa.field("media_seed", pa.int64()),
            pa.field("media_model", pa.string()),
            pa.field("media_sha256", pa.string()),
        )
        if self.template is None:
            return [Output(modalities=frozenset({"text"}), columns=columns)]
        reads: frozenset[Kind] = frozenset(kind for kind in KINDS if kind in {f.name for f in self.template.fields})
        return [Output(modalities=frozenset(), columns=columns, reads=reads)]

    @property
    def batch_limit(self) -> int:
        """The maximum number of prompts per batch."""
        return self.batch_size or AUTO_PROMPTS[torch.device(self.device).type]

    def load(self) -> Synthesizer:
        """Return the synthesizer on its device."""
        return load(*self.load_arguments())

    def packs(self, model: Synthesizer, batch: Batch) -> Iterator[Pack[Any] | PackResults[Any]]:
        """Yield the prompts of a window in packs, in order."""
        [output] = self.outputs
        lost = {failure.id for failure in batch.failures if covers(failure, output)}
        failed: dict[int, Exception] = {}
        positions: list[int] = []
        prompts: list[Prompt] = []
        for position, sample in enumerate(batch.samples):
            if sample.id in lost or not output.is_due(sample.present):
                continue
            try:
                prompt = self.prompt_of(sample)
            except PromptError as error:
                failed[position] = error
                continue
            if not prompt.text.strip() or not model.num_tokens(prompt.text):
                failed[position] = SampleError("the prompt has no tokens")
                continue
            positions.append(position)
            prompts.append(prompt)
        if failed:
            yield PackResults(_MADE, failed=failed)
        for chosen in pack([1] * len(prompts), self.batch_limit):
            yield Pack(
                group=_MADE,
                positions=[positions[index] for index in chosen],
                items=[prompts[index] for index in chosen],
                weights=[1] * len(chosen),
            )

    def prompt_of(self, sample: Sample) -> Prompt:
        """Return the prompt of a sample and its seed, of 63 bits. Raises PromptError if a field is missing."""
        text = (sample.model_text or "") if self.template is None else self.template.fill(SampleValues(sample))
        return Prompt(encodable(text), stream_seed(self.spec.synthesis.seed, sample.shard, sample.offset) >> 1)

    def transfer(self, model: Synthesizer, group: str, items: Sequence[Prompt]) -> Sequence[Prompt]:
        """Return the prompts: the model's own pipeline tokenizes them."""
        return items

    def compute(self, model: Synthesizer, group: str, inputs: Sequence[Prompt]) -> list[Any]:
        """Return what the model makes of the prompts of a pack."""
        return model.compute(inputs)

    def known_good(self, model: Synthesizer, group: str) -> Prompt:
        """Return a prompt that every working model of this vocabulary accepts."""
        return Prompt(model.good_text, 0)

    def collect(self, model: Synthesizer, batch: Batch, results: Sequence[PackResults[Any]]) -> Batch:
        """Return `batch` with this stage's columns and files, and a Failure for each sample without a file."""
        files: dict[int, Encoded] = {}
        errors: dict[int, Exception] = {}
        for result in results:
            errors |= result.failed
            for positions, made in result.done:
                for position, value in zip(positions, made, strict=True):
                    if isinstance(value, Exception):
                        if isinstance(value, FloatingPointError):
                            self._check_finite(model)
                        errors[position] = value
                        continue
                    try:
                        files[position] = model.encode(value)
                    except (SampleError, ValueError, OSError, RuntimeError) as error:  # of an encoder in memory
                        errors[position] = error
        failures = [
            Failure.of(batch.samples[position], "generate", error, outputs=(MEDIA_COLUMN,))
            for position, error in sorted(errors.items())
        ]
        [output] = self.outputs
        kinds = {column.name: column.type for column in output.columns} | {MEDIA_CONTENT: pa.large_binary()}
        values: dict[str, list[Any]] = {name: [None] * len(batch.samples) for name in kinds}
        warnings: Counter[str] = Counter()
        limit = self.spec.max_tokens
        for position, file in files.items():
            sample = batch.samples[position]
            prompt = self.prompt_of(sample)
            row = {
                MEDIA_COLUMN: f"{_stem(sample)}.{self.spec.synthesis.format}",
                "media_prompt": prompt.text,
                "media_seed": prompt.seed,
                "media_model": public_path(self.model),
                "media_sha256": hashlib.sha256(file.content).hexdigest(),
                MEDIA_CONTENT: file.content,
            }
            for name, value in row.items():
                values[name][position] = value
            if file.warning is not None:
                warnings[file.warning] += 1
            if limit is not None and model.num_tokens(prompt.text) > limit:
                warnings[f"prompts cut to {limit} tokens"] += 1
        columns = {name: pa.array(column, kinds[name]) for name, column in values.items()}
        finished = self.finish(model, batch, columns, failures, results)
        return replace(finished, tally=finished.tally + Tally(warnings=dict(warnings)))

    def _check_finite(self, model: Synthesizer) -> None:
        """Raise DeviceError if not even a prompt known to be good gives finite values."""
        if isinstance(model.compute([self.known_good(model, _MADE)])[0], FloatingPointError):
            raise DeviceError(
                f"{self.model} on {self.device}: what it makes of a prompt known to be good is not finite; set `dtype` "
                f"to a wider one than {dtype_name(self.dtype, self.device)}, or check the device"
            )


def _stem(sample: Sample) -> str:
    """Return the key of a sample's files in the shard: keys of samples may repeat, and hold dots and slashes."""
    return hashlib.blake2b(f"{sample.shard}\0{sample.offset}".encode("utf-8", "replace"), digest_size=10).hexdigest()


def synthesize_stage(model: str, synthesis: Synthesis, *, device: str = "cpu", **options: Any) -> SynthesizeStage:
    """Return the stage of `model`: a hub name with optional @revision, or a directory. Reads no weights.

    `device` is the device on the workers: "cpu" or "cuda[:N]"; "auto" selects it by the devices of this machine.
    `options` are other fields of SynthesizeStage: dtype, batch_size.

    Raises ModelError for an unusable model, UsageError for options that it contradicts.
    """
    resolved = resolve(model)
    return SynthesizeStage(
        model=resolved.reference,
        spec=describe(resolved.directory, synthesis),
        digest=digest(resolved.directory),
        template=None if synthesis.prompt is None else parse_template(synthesis.prompt),
        device=resolve_device(device) if device == "auto" else device,
        **options,
    )
