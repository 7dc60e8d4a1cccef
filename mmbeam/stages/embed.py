"""The stage that adds vectors: each modality of a window through one encoder.

Failures are recorded per modality and sample: if an image cannot be decoded, the text of the sample still gets its
vector, and if one model fails, the columns of the other models are not affected.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from mmbeam.errors import DeviceError, SampleError, UsageError
from mmbeam.models.encoders import describe, load
from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec
from mmbeam.models.loading import digest, dtype_name, resolve
from mmbeam.models.placement import Fault, resolve_device
from mmbeam.names import MODALITIES, Modality
from mmbeam.stages.base import ModelStage, good_audio, good_image, scatter_values
from mmbeam.stages.packing import BatchResults, memory_limit, pack, run_batches
from mmbeam.types import Batch, Failure, Needs, Output, Sample

TEXT_TOKENS_PER_SAMPLE = 128  # maximum number of padded tokens in a batch of texts, divided by the batch size

FloatTD = np.ndarray[Any, np.dtype[np.float32]]  # [tokens, width]
Values = Sequence[Any]  # the inputs of one modality: images, (wave, rate) pairs, token ids


@dataclass(frozen=True, kw_only=True)
class EmbedStage(ModelStage):
    """One encoder on a window of samples."""

    spec: EncoderSpec
    modalities: tuple[Modality, ...]
    name: str | None = None  # prefix of the columns, if several models run in one pass
    tokens: bool = False  # whether to keep the sequence of token or patch vectors in addition to the pooled vector
    vector_type: str = "float32"  # of the stored numbers: float32 or float16

    @property
    def key(self) -> str:
        """The identity of the loaded model."""
        return f"{self.digest}:{dtype_name(self.dtype, self.device)}:{self.image_filter}:{self.device}"

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
            columns = [pa.field(self._column(modality, "embedding"), pa.list_(number, self.spec.dims[modality]))]
            if self.tokens:
                tokens = pa.list_(pa.list_(number, self.spec.token_dims[modality]))
                columns.append(pa.field(self._column(modality, "tokens"), tokens))
            outputs.append(Output(modalities=frozenset((modality,)), columns=tuple(columns)))
        return outputs

    def _column(self, modality: Modality, kind: Literal["embedding", "tokens"]) -> str:
        return f"{modality}_{kind}" if self.name is None else f"{self.name}_{modality}_{kind}"

    def load(self) -> Encoder:
        """Return the encoder on its device."""
        return load(*self.load_arguments(), image_filter=self.image_filter)

    @torch.inference_mode()
    def run(self, model: Encoder, batch: Batch) -> Batch:
        """Return `batch` with this stage's columns, and a Failure for each lost vector."""
        features: dict[str, pa.Array] = {}
        failures: list[Failure] = []
        splits = Counter[Fault]()
        for modality in self.modalities:
            positions = [index for index, sample in enumerate(batch.samples) if sample.has(modality)]
            values = self._values(model, modality, [batch.samples[index] for index in positions])
            outputs = (self._column(modality, "embedding"),)
            if modality == "text" and not all(map(len, values)):
                error = SampleError(model.without_tokens)
                empty = [batch.samples[index] for index, ids in zip(positions, values, strict=True) if not ids]
                failures += [Failure.of(sample, "embed", error, modality="text", outputs=outputs) for sample in empty]
                positions = [index for index, ids in zip(positions, values, strict=True) if ids]
                values = [ids for ids in values if ids]
            weights, size, max_weight = self._limits(modality, values)
            results = run_batches(
                values,
                pack(weights, size, max_weight),
                lambda some, modality=modality: _encode(model, modality, some, self.tokens),  # type: ignore[misc]
                lambda modality=modality: _known_good(model, modality),  # type: ignore[misc]
                weights,
                memory_limit(f"{self.key}:{modality}"),
            )
            columns, errors = self._collect(modality, results, len(values), model.normalized)
            if any(isinstance(error, FloatingPointError) for error in errors.values()):
                self._check_finite(model, modality)
            features |= {name: scatter_values(array, positions, len(batch.samples)) for name, array in columns.items()}
            failures += [
                Failure.of(batch.samples[positions[index]], "embed", error, modality=modality, outputs=outputs)
                for index, error in errors.items()
            ]
            splits += results.splits
        return self.finish(model, batch, features, failures, splits)

    def _values(self, model: Encoder, modality: Modality, samples: Sequence[Sample]) -> Values:
        if modality == "image":
            return [sample.image for sample in samples]
        if modality == "text":
            return model.tokenize([sample.model_text or "" for sample in samples])
        return [sample.audio.at(self.spec.sampling_rate) for sample in samples if sample.audio is not None]

    def _limits(self, modality: Modality, values: Values) -> tuple[list[int], int, int | None]:
        """Return the weights of the values, the batch size, and the maximum padded weight of a batch."""
        size = self.batch_limit
        if modality == "image":  # images of one size together; all are resized to the same side, so none is padded
            return [image.shape[0] * image.shape[1] for image in values], size, None
        if modality == "audio":
            return [len(wave) for wave, _ in values], size, None
        # Up to 4 times as many short texts as `batch_size`, limited by their padded tokens.
        return [len(ids) for ids in values], 4 * size, size * TEXT_TOKENS_PER_SAMPLE

    def _check_finite(self, model: Encoder, modality: Modality) -> None:
        """Raise DeviceError if even an input known to be good has a vector that is not finite."""
        vector = _encode(model, modality, [_known_good(model, modality)], tokens=False).pooled
        if not bool(torch.isfinite(vector).all()):
            raise DeviceError(
                f"{self.model} on {self.device}: the {modality} vector of an input known to be good is not finite; "
                f"set `dtype` to a wider one than {dtype_name(self.dtype, self.device)}, or check the device"
            )

    def _collect(
        self, modality: Modality, results: BatchResults[Encoded], count: int, is_normalized: bool
    ) -> tuple[dict[str, pa.Array], dict[int, Exception]]:
        """Return the columns of `count` values in the window's order, and the errors by position."""
        errors = dict(results.failed)
        pooled = np.zeros((count, self.spec.dims[modality]), np.float32)
        empty = np.zeros((0, self.spec.token_dims.get(modality, 1)), np.float32)
        sequences = [empty] * count
        for positions, encoded in results.done:
            vectors = encoded.pooled.float()
            pooled[positions] = (F.normalize(vectors, dim=-1) if is_normalized else vectors).cpu().numpy()
            for position, tokens in zip(positions, encoded.tokens or (), strict=bool(encoded.tokens)):
                sequences[position] = tokens.float().cpu().numpy()
        for position, values in enumerate(zip(pooled, sequences, strict=True)):
            error = _storage_error(values, self.vector_type)
            if error is not None:
                errors.setdefault(position, error)
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
        return columns, errors


def _encode(model: Encoder, modality: Modality, values: Values, tokens: bool) -> Encoded:
    if modality == "image":
        return model.encode_image(values, tokens)
    if modality == "text":
        return model.encode_text(values, tokens)
    return model.encode_audio([wave for wave, _ in values], [rate for _, rate in values], tokens)


def _known_good(model: Encoder, modality: Modality) -> Any:
    if modality == "image":
        return good_image()
    return good_audio() if modality == "audio" else model.tokenize(["a"])[0]


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
    **options: Any,
) -> EmbedStage:
    """Return the stage of `model`: a hub name with optional @revision, or a directory. Reads no weights.

    `modalities` defaults to all that the model encodes. `device` is the device on the workers: "cpu" or "cuda[:N]".
    "auto" selects it by the devices of this machine. `options` are other fields of EmbedStage: name, dtype, batch_size,
    tokens, vector_type, image_filter. If a pipeline has several stages, give each a `name`, and let one of them count
    tokens.

    Raises ModelError for an unusable model, UsageError if it encodes none of `modalities`.
    """
    resolved = resolve(model)
    spec = describe(resolved.directory)
    encoded = tuple(m for m in MODALITIES if m in spec.dims and (modalities is None or m in modalities))
    if not encoded:
        raise UsageError(
            f"`modalities` {', '.join(modalities or ())}: {model} encodes none of these; "
            f"it encodes {', '.join(spec.dims)}"
        )
    without = [modality for modality in encoded if modality not in spec.token_dims]
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
