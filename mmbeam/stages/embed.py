"""The stage that adds vectors: each modality of a window through one encoder.

An image encoder also encodes videos: each frame as an image, and the video as the mean of their vectors, normalised if
the encoder's vectors are. The tokens of a video are then the vectors of its frames.

Failures are recorded per modality and sample: if an image cannot be decoded, the text of the sample still gets its
vector, and if one model fails, the columns of the other models are not affected.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from mmbeam.errors import DeviceError, SampleError, UsageError
from mmbeam.models.encoders import describe, load
from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec
from mmbeam.models.encoders.sentence import find_prompt
from mmbeam.models.loading import digest, dtype_name, resolve
from mmbeam.models.placement import resolve_device
from mmbeam.names import MODALITIES, Modality
from mmbeam.ops.audio import upload_waves
from mmbeam.ops.image import upload_images
from mmbeam.ops.transfer import to_host, upload_ids
from mmbeam.stages.base import ModelStage, good_audio, good_image, scatter_values
from mmbeam.stages.packing import Pack, PackResults, pack
from mmbeam.types import Batch, Failure, Needs, Output, Sample

TEXT_TOKENS_PER_SAMPLE = 128  # maximum number of padded tokens in a batch of texts, divided by the batch size

FloatTD = np.ndarray[Any, np.dtype[np.float32]]  # [tokens, width]
Values = Sequence[Any]  # of one modality: images, (wave, rate) pairs, token ids


@dataclass(frozen=True, kw_only=True)
class EmbedStage(ModelStage):
    """One encoder on a window of samples."""

    spec: EncoderSpec
    modalities: tuple[Modality, ...]
    name: str | None = None  # prefix of the columns, if several models run in one pass
    tokens: bool = False  # whether to keep the sequence of token or patch vectors in addition to the pooled vector
    vector_type: str = "float32"  # of the stored numbers: float32 or float16
    dims: int | None = (
        None  # dimensions to keep of each vector (Matryoshka models), which is normalised again; None: all
    )

    @property
    def key(self) -> str:
        """The identity of the loaded model."""
        dtype, prompt = dtype_name(self.dtype, self.device), self.spec.text_prompt  # which the encoder holds
        return f"{self.digest}:{dtype}:{self.image_filter}:{prompt!r}:{self.device}"

    @property
    def needs(self) -> Needs:
        """What to decode of a sample."""
        return self.needs_of(self.modalities)

    @property
    def outputs(self) -> Sequence[Output]:
        """One output per modality: `<modality>_embedding`, and `<modality>_tokens` with `tokens`."""
        outputs = []
        number = pa.from_numpy_dtype(self.vector_type)
        for modality in self.modalities:
            columns = [pa.field(self._column(modality, "embedding"), pa.list_(number, self.width(modality)))]
            if self.tokens:
                tokens = pa.list_(pa.list_(number, self.token_width(modality)))
                columns.append(pa.field(self._column(modality, "tokens"), tokens))
            outputs.append(Output(modalities=frozenset((modality,)), columns=tuple(columns)))
        return outputs

    def width(self, modality: Modality) -> int:
        """Return the width of a stored vector."""
        return self.dims or self.spec.dims["image" if self.by_frames(modality) else modality]

    def token_width(self, modality: Modality) -> int:
        """Return the width of a token's vector; 1 if the model has none."""
        return self.width(modality) if self.by_frames(modality) else self.spec.token_dims.get(modality, 1)

    def by_frames(self, modality: str) -> bool:
        """Return whether these are videos that the model encodes frame by frame."""
        return modality == "video" and "video" not in self.spec.dims

    def _column(self, modality: Modality, kind: Literal["embedding", "tokens"]) -> str:
        return f"{modality}_{kind}" if self.name is None else f"{self.name}_{modality}_{kind}"

    def load(self) -> Encoder:
        """Return the encoder on its device."""
        return load(*self.load_arguments(), image_filter=self.image_filter)

    def packs(self, model: Encoder, batch: Batch) -> Iterator[Pack[Any] | PackResults[Any]]:
        """Yield the images, clips, texts and videos of a window in packs, one modality after the other."""
        for modality in self.modalities:
            positions = [index for index, sample in enumerate(batch.samples) if sample.has(modality)]
            values = self._values(model, modality, [batch.samples[index] for index in positions])
            if modality == "text" and not all(map(len, values)):
                error: Exception = SampleError(model.without_tokens)
                failed = {index: error for index, ids in zip(positions, values, strict=True) if not ids}
                yield PackResults(modality, failed=failed)
                positions = [index for index in positions if index not in failed]
                values = [ids for ids in values if ids]
            num_tokens: dict[int, int | None] = {}
            if modality == "text" and self.count_tokens:
                num_tokens = {index: model.count_encoded(ids) for index, ids in zip(positions, values, strict=True)}
            weights, size, max_weight = self._limits(modality, values)
            widths = [image.shape[1] for image in values] if modality == "image" else None  # equal sizes side by side
            for indices in pack(weights, size, max_weight, widths):
                yield Pack(
                    group=modality,
                    positions=[positions[index] for index in indices],
                    items=[values[index] for index in indices],
                    weights=[weights[index] for index in indices],
                    num_tokens=num_tokens,
                )

    def transfer(self, model: Encoder, group: str, items: Values) -> Any:
        """Return the model's inputs: what `model.prepare` returns, or the values, copied to the GPU if there is one.

        For videos encoded frame by frame: the inputs of their frames, a batch at a time, and the frames of each video.
        """
        if self.by_frames(group):
            frames = [frame for video in items for frame in video]
            parts = (frames[first : first + self.batch_limit] for first in range(0, len(frames), self.batch_limit))
            return [self.transfer(model, "image", part) for part in parts], list(map(len, items))
        prepared = model.prepare(cast(Modality, group), items)
        if prepared is not None:
            return prepared
        if group == "audio":
            waves, rates = [wave for wave, _ in items], [rate for _, rate in items]
            return (waves if model.device.type == "cpu" else upload_waves(waves, rates, model.device)), rates
        if model.device.type == "cpu":
            return items
        return upload_images(items, model.device) if group == "image" else upload_ids(items, model.device)

    def compute(self, model: Encoder, group: str, inputs: Values) -> "_Vectors":
        """Return the vectors of a pack, on their way to the host."""
        if self.by_frames(group):
            parts, counts = inputs
            frames_FD = torch.cat([_encode(model, "image", part, tokens=False).pooled.float() for part in parts])
            frames_FD = frames_FD[:, : self.dims]
            frames_FD = F.normalize(frames_FD, dim=-1) if model.normalized else frames_FD
            means_BD = torch.stack([frames.mean(0) for frames in torch.split(frames_FD, counts)])
            means_BD = F.normalize(means_BD, dim=-1) if model.normalized else means_BD
            return _Vectors(to_host(means_BD), *((to_host(frames_FD), counts) if self.tokens else ()))
        encoded = _encode(model, group, inputs, self.tokens)
        pooled_BD = encoded.pooled.float()[:, : self.dims]
        pooled_BD = F.normalize(pooled_BD, dim=-1) if model.normalized else pooled_BD
        if encoded.tokens is None:
            return _Vectors(to_host(pooled_BD))
        tokens_TD = to_host(torch.cat(list(encoded.tokens)).float())
        return _Vectors(to_host(pooled_BD), tokens_TD, list(map(len, encoded.tokens)))

    def known_good(self, model: Encoder, group: str) -> Any:
        """Return an image, a clip, a text or a video that every working model accepts."""
        if group == "image":
            return good_image()
        if group == "video":
            return (good_image(),) * (self.spec.frames or 1)
        return good_audio() if group == "audio" else model.tokenize(["a text that every working model encodes"])[0]

    def collect(self, model: Encoder, batch: Batch, results: Sequence[PackResults["_Vectors"]]) -> Batch:
        """Return `batch` with this stage's columns, and a Failure for each lost vector."""
        features: dict[str, pa.Array] = {}
        failures: list[Failure] = []
        for modality in self.modalities:
            positions = [index for index, sample in enumerate(batch.samples) if sample.has(modality)]
            of_modality = [result for result in results if result.group == modality]
            columns, errors = self._columns(modality, of_modality, positions)
            if any(isinstance(error, FloatingPointError) for error in errors.values()):
                self._check_finite(model, modality)
            features |= {name: scatter_values(array, positions, len(batch.samples)) for name, array in columns.items()}
            outputs = (self._column(modality, "embedding"),)
            failures += [
                Failure.of(batch.samples[position], "embed", error, modality=modality, outputs=outputs)
                for position, error in errors.items()
            ]
        return self.finish(model, batch, features, failures, results)

    def _values(self, model: Encoder, modality: Modality, samples: Sequence[Sample]) -> Values:
        if modality == "image":
            return [sample.image for sample in samples]
        if modality == "video":
            return [sample.video.frames for sample in samples if sample.video is not None]
        if modality == "text":
            return model.tokenize([model.with_prompt(sample.model_text or "") for sample in samples])
        return [sample.audio.at(self.spec.sampling_rate) for sample in samples if sample.audio is not None]

    def _limits(self, modality: Modality, values: Values) -> tuple[list[int], int, int | None]:
        """Return the weights of the values, the batch size, and the maximum padded weight of a batch."""
        size = self.batch_limit
        if modality == "image":  # images of one size together; all are resized to the same side, so none is padded
            return [image.shape[0] * image.shape[1] for image in values], size, None
        if modality == "audio":
            return [len(wave) for wave, _ in values], size, None
        if modality == "video":  # a batch has at most `size` frames, and at least one video
            counts = [len(frames) for frames in values]
            return counts, max(1, size // max(counts, default=1)), None
        # Up to 4 times as many short texts as `batch_size`, limited by their padded tokens.
        return [len(ids) for ids in values], 4 * size, size * TEXT_TOKENS_PER_SAMPLE

    def _check_finite(self, model: Encoder, modality: Modality) -> None:
        """Raise DeviceError if even an input known to be good has a vector that is not finite."""
        item = self.known_good(model, modality)
        vectors = self.compute(model, modality, self.transfer(model, modality, [item]))
        if not bool(torch.isfinite(vectors.pooled_BD).all()):
            raise DeviceError(
                f"{self.model} on {self.device}: the {modality} vector of an input known to be good is not finite; "
                f"set `dtype` to a wider one than {dtype_name(self.dtype, self.device)}, or check the device"
            )

    def _columns(
        self, modality: Modality, results: Sequence[PackResults["_Vectors"]], positions: Sequence[int]
    ) -> tuple[dict[str, pa.Array], dict[int, Exception]]:
        """Return the columns of the samples at `positions`, and the errors by position in the window."""
        count, row_of = len(positions), {position: row for row, position in enumerate(positions)}
        errors = {row_of[position]: error for result in results for position, error in result.failed.items()}
        pooled = np.zeros((count, self.width(modality)), np.float32)
        empty = np.zeros((0, self.token_width(modality)), np.float32)
        sequences = [empty] * count
        for part, vectors in (done for result in results for done in result.done):
            rows = [row_of[position] for position in part]
            pooled[rows] = vectors.pooled_BD.numpy()
            if vectors.tokens_TD is not None:
                tokens = np.split(vectors.tokens_TD.numpy(), np.cumsum(vectors.lengths)[:-1])
                for row, tokens_of_row in zip(rows, tokens, strict=True):
                    sequences[row] = tokens_of_row
        for row, values in enumerate(zip(pooled, sequences, strict=True)):
            error = _storage_error(values, self.vector_type)
            if error is not None:
                errors.setdefault(row, error)
        is_missing = np.zeros(count, bool)
        is_missing[list(errors)] = True
        pooled[is_missing] = 0  # becomes null; the value may not fit
        flat = pa.array(pooled.astype(self.vector_type).reshape(-1))
        embeddings = pa.FixedSizeListArray.from_arrays(flat, pooled.shape[1], mask=pa.array(is_missing))
        columns = {self._column(modality, "embedding"): embeddings}
        if self.tokens:
            columns[self._column(modality, "tokens")] = _sequences(
                sequences, is_missing, empty.astype(self.vector_type)
            )
        return columns, {positions[row]: error for row, error in errors.items()}


@dataclass(frozen=True)
class _Vectors:
    """The float32 vectors of a pack on the host, valid only after the device has completed its work."""

    pooled_BD: torch.Tensor
    tokens_TD: torch.Tensor | None = None  # of all samples
    lengths: Sequence[int] = ()  # tokens of each sample


def _encode(model: Encoder, modality: str, values: Any, tokens: bool) -> Encoded:
    if modality == "image":
        return model.encode_image(values, tokens)
    if modality == "text":
        return model.encode_text(values, tokens)
    if modality == "video":
        return model.encode_video(values, tokens)
    waves, rates = values
    return model.encode_audio(waves, rates, tokens)


def _sequences(sequences: Sequence[FloatTD], is_missing: np.ndarray[Any, Any], empty: np.ndarray[Any, Any]) -> pa.Array:
    """Return list<fixed_size_list<number>[width]>, null where missing; `empty` has the width and the number's type."""
    kept = [tokens[:0] if missing else tokens for tokens, missing in zip(sequences, is_missing.tolist(), strict=True)]
    ends = np.cumsum([0, *(len(tokens) for tokens in kept)])
    flat = np.concatenate([empty, *kept]).astype(empty.dtype)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), vectors, mask=pa.array(is_missing))


def _storage_error(values: Sequence[np.ndarray[Any, Any]], dtype: str) -> ArithmeticError | None:
    """Return why these numbers cannot be stored as `dtype`; None if they can."""
    if not all(np.isfinite(array).all() for array in values):
        return FloatingPointError("the model's vector is not finite; a wider `dtype` may help")
    largest = max(float(np.abs(array).max(initial=0)) for array in values)
    is_small = largest <= float(np.finfo(dtype).max)
    return None if is_small else OverflowError(f"{largest:g} does not fit {dtype}; store `vector_type` float32")


def embed_stage(
    model: str,
    *,
    modalities: Sequence[Modality] | None = None,
    device: str = "cpu",
    count_tokens: bool = True,
    text_prompt: str | None = None,
    **options: Any,
) -> EmbedStage:
    """Return the stage of `model`: a hub name with optional @revision, or a directory. Reads no weights.

    `modalities` defaults to all that the model encodes; videos, whose frames an image encoder encodes, must be named.
    `device` is the device on the workers: "cpu" or "cuda[:N]". "auto" selects it by the devices of this machine.
    `text_prompt` is put before each text: the name of a prompt of the checkpoint, or the prompt itself. `options` are
    other fields of EmbedStage: name, dtype, batch_size, tokens, vector_type, image_filter, dims. If a pipeline has
    several stages, give each a `name`, and let one of them count tokens.

    Raises ModelError for an unusable model, UsageError if it encodes none of `modalities`.
    """
    resolved = resolve(model)
    spec = describe(resolved.directory, resolved.package)
    # An image encoder takes videos too, if they are asked for.
    able = spec.dims.keys() | ({"video"} if "image" in spec.dims and modalities is not None else set())
    encoded = tuple(m for m in MODALITIES if m in able and (modalities is None or m in modalities))
    if not encoded:
        raise UsageError(
            f"`modalities` {', '.join(modalities or ())}: {model} encodes none of these; "
            f"it encodes {', '.join(spec.dims)}"
        )
    if text_prompt is not None and "text" in encoded:
        spec = replace(spec, text_prompt=find_prompt(resolved.directory, text_prompt))
    dims: dict[Modality, int] = {"video": spec.dims.get("image", 0), **spec.dims}
    least = min(dims[modality] for modality in encoded)
    if (options.get("dims") or 1) > least:
        raise UsageError(f"`dims` {options['dims']}: {model} has vectors of {least} numbers; expected at most that")
    without = [m for m in encoded if m not in spec.token_dims and (m != "video" or "video" in spec.dims)]
    if options.get("tokens") and without:
        raise UsageError(f"`tokens`: {model} has no vector per token of {' and '.join(without)}; omit it")
    return EmbedStage(
        model=resolved.reference,
        spec=spec,
        digest=digest(resolved.directory),
        modalities=encoded,
        device=resolve_device(device) if device == "auto" else device,
        count_tokens=count_tokens and "text" in encoded,
        **options,
    )
