"""The stage that adds vectors: each modality of a window through one encoder.

What fails is told apart per modality and sample, so that an unreadable picture does not cost its
caption's vector, and one model's failure does not cost another model's column.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from mmbeam.errors import DeviceError, UsageError
from mmbeam.models.encoders import describe, load
from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec
from mmbeam.models.loading import digest, dtype_name, parse_dtype, resolve
from mmbeam.models.placement import Fault, resolve_device
from mmbeam.names import MODALITIES, Modality
from mmbeam.stages.common import (
    AUTO_BATCH_SIZE,
    files_of,
    good_picture,
    good_sound,
    spread,
    tally_of,
    text_tokens,
)
from mmbeam.stages.packing import Packed, pack, run_packed
from mmbeam.types import Batch, Failure, Needs, Output, Sample

TEXT_TOKENS_PER_SAMPLE = 128  # a text batch holds at most batch_size times so many padded tokens

FloatTD = np.ndarray[Any, np.dtype[np.float32]]  # [tokens, width]
Values = Sequence[Any]  # what one modality's items are: pictures, (wave, rate) pairs, token ids
What = Literal["embedding", "tokens"]


@dataclass(frozen=True, kw_only=True)
class EmbedStage:
    """One encoder on a window of samples.

    `name` prefixes the columns when several models run in one pass. With `tokens` the sequence of
    token or patch features is kept beside the pooled vector. `vector_type` is the type of a stored
    number, float32 or float16. `count_tokens` fills `text_num_tokens` (one stage of a job does).
    """

    model: str  # where its files are, for whoever loads it: a directory, or a hub name with its @revision
    spec: EncoderSpec
    digest: str  # of those files: another model in the same directory is another model
    modalities: tuple[Modality, ...]
    device: str = "cpu"
    dtype: str | None = None
    name: str | None = None
    batch_size: int | None = None
    tokens: bool = False
    vector_type: str = "float32"
    image_filter: tuple[str, float] | None = None
    count_tokens: bool = False

    @property
    def key(self) -> str:
        return f"{self.digest}:{dtype_name(self.dtype, self.device)}:{self.image_filter}:{self.device}"

    @property
    def needs(self) -> Needs:
        """On a CPU sounds are resampled while they are decoded; a GPU does it better itself."""
        on_cpu = torch.device(self.device).type == "cpu"
        rate = self.spec.sampling_rate if "audio" in self.modalities and on_cpu else None
        return Needs(
            modalities=frozenset(self.modalities),
            sampling_rates=frozenset(() if rate is None else (rate,)),
            image_side=self.spec.image_side if "image" in self.modalities else None,
        )

    @property
    def outputs(self) -> Sequence[Output]:
        """One output per modality: `<modality>_embedding`, and `<modality>_tokens` if asked for."""
        return [
            Output(modalities=frozenset((modality,)), columns=tuple(self._columns(modality)))
            for modality in self.modalities
        ]

    def _columns(self, modality: Modality) -> list[pa.Field]:
        vector = pa.list_(pa.from_numpy_dtype(self.vector_type), self.spec.dims[modality])
        columns = [pa.field(self._column(modality, "embedding"), vector)]
        if self.tokens:
            token = pa.list_(pa.from_numpy_dtype(self.vector_type), self.spec.token_dims[modality])
            columns.append(pa.field(self._column(modality, "tokens"), pa.list_(token)))
        return columns

    def _column(self, modality: Modality, what: What) -> str:
        return f"{modality}_{what}" if self.name is None else f"{self.name}_{modality}_{what}"

    def load(self) -> Encoder:
        """The encoder on its device; on a worker the model's files are brought there first."""
        spec = replace(self.spec, directory=str(files_of(self.model, self.digest)))
        device = torch.device(resolve_device(self.device))
        return load(spec, device, parse_dtype(self.dtype, self.device), image_filter=self.image_filter)

    @torch.inference_mode()
    def run(self, model: Encoder, batch: Batch) -> Batch:
        """Add this stage's columns to `batch.features`, and a Failure for each value lost."""
        features, failures, splits = dict(batch.features), list(batch.failures), Counter[Fault]()
        for modality in self.modalities:
            positions = [i for i, sample in enumerate(batch.samples) if sample.has(modality)]
            items = self._items(model, modality, [batch.samples[i] for i in positions])
            packed = run_packed(
                items,
                pack(*self._limits(modality, items)),
                lambda some, modality=modality: _encode(model, modality, some, self.tokens),  # type: ignore[misc]
                partial(_known_good, model, modality),
            )
            columns, lost = self._collect(modality, packed, len(items), model.normalized)
            if any(isinstance(error, FloatingPointError) for error in lost.values()):
                self._must_be_finite(model, modality)
            features |= {name: spread(array, positions, len(batch.samples)) for name, array in columns.items()}
            failures += [self._failure(batch.samples[positions[i]], modality, error) for i, error in lost.items()]
            splits += packed.splits
        if self.count_tokens:
            features["text_num_tokens"] = text_tokens(model.count_tokens, batch.samples)
        return replace(batch, features=features, failures=tuple(failures), tally=batch.tally + tally_of(splits))

    def _items(self, model: Encoder, modality: Modality, samples: Sequence[Sample]) -> Values:
        if modality == "image":
            return [sample.image for sample in samples]
        if modality == "text":
            return model.tokenize([sample.model_text or "" for sample in samples])
        return [sample.audio.at(self.spec.sampling_rate) for sample in samples if sample.audio is not None]

    def _limits(self, modality: Modality, items: Values) -> tuple[list[int], int, int | None]:
        """Weights of the items, the most items in a batch, and the most padded weight."""
        size = self.batch_size or AUTO_BATCH_SIZE[torch.device(self.device).type]
        if modality == "image":  # same sizes together; each is resized to the same side, so no padding
            return [item.shape[0] * item.shape[1] for item in items], size, None
        if modality == "audio":
            return [len(wave) for wave, _ in items], size, None
        return [len(ids) for ids in items], 4 * size, size * TEXT_TOKENS_PER_SAMPLE

    def _must_be_finite(self, model: Encoder, modality: Modality) -> None:
        """Raise DeviceError if it is not the samples' fault that their vectors are not finite."""
        vector = _encode(model, modality, [_known_good(model, modality)], tokens=False).pooled
        if not bool(torch.isfinite(vector).all()):
            raise DeviceError(
                f"{self.model} on {self.device}: the {modality} vector of an input known to be good is not finite; "
                f"is {dtype_name(self.dtype, self.device)} too narrow for this model (--dtype), or the device at fault?"
            )

    def _collect(
        self, modality: Modality, packed: Packed[Encoded], count: int, normalized: bool
    ) -> tuple[dict[str, pa.Array], dict[int, Exception]]:
        """Arrow arrays of `count` values in the window's order, and what was lost by position."""
        lost = dict(packed.failed)
        pooled = np.zeros((count, self.spec.dims[modality]), np.float32)
        none = np.zeros((0, self.spec.token_dims.get(modality, 1)), np.float32)
        sequences = [none] * count
        for positions, encoded in packed.done:
            vectors = encoded.pooled.float()
            pooled[positions] = (F.normalize(vectors, dim=-1) if normalized else vectors).cpu().numpy()
            for position, tokens in zip(positions, encoded.tokens or (), strict=bool(encoded.tokens)):
                sequences[position] = tokens.float().cpu().numpy()
        for position, values in enumerate(zip(pooled, sequences, strict=True)):
            problem = _problem(values, self.vector_type)
            if problem is not None and position not in lost:
                lost[position] = problem
        missing = np.zeros(count, bool)
        missing[list(lost)] = True
        pooled[missing] = 0  # null, whatever it was; it may not fit
        columns = {self._column(modality, "embedding"): _vectors(pooled.astype(self.vector_type), missing)}
        if self.tokens:
            columns[self._column(modality, "tokens")] = _sequences(sequences, missing, none.astype(self.vector_type))
        return columns, lost

    def _failure(self, sample: Sample, modality: Modality, error: Exception) -> Failure:
        outputs = (self._column(modality, "embedding"),)
        return Failure.of(sample, "embed", error, modality=modality, outputs=outputs)


def _encode(model: Encoder, modality: Modality, items: Values, tokens: bool) -> Encoded:
    if modality == "image":
        return model.encode_image(items, tokens)
    if modality == "text":
        return model.encode_text(items, tokens)
    return model.encode_audio([wave for wave, _ in items], [rate for _, rate in items], tokens)


def _known_good(model: Encoder, modality: Modality) -> Any:
    """An input that any sound model takes."""
    good: Mapping[Modality, Callable[[], Any]] = {
        "image": good_picture,
        "audio": good_sound,
        "text": lambda: model.tokenize(["a"])[0],
    }
    return good[modality]()


def _vectors(values: np.ndarray[Any, Any], missing: np.ndarray[Any, Any]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=pa.array(missing))


def _sequences(sequences: Sequence[FloatTD], missing: np.ndarray[Any, Any], none: np.ndarray[Any, Any]) -> pa.Array:
    """list<fixed_size_list<number>[width]>, null where missing; `none` has the width and the number's type."""
    kept = [tokens[:0] if gone else tokens for tokens, gone in zip(sequences, missing.tolist(), strict=True)]
    ends = np.cumsum([0, *(len(tokens) for tokens in kept)])
    flat = np.concatenate([none, *kept]).astype(none.dtype)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), vectors, mask=pa.array(missing))


def _problem(values: Sequence[np.ndarray[Any, Any]], dtype: str) -> ArithmeticError | None:
    """Why these numbers cannot be stored as `dtype`; None if they can."""
    if not all(np.isfinite(each).all() for each in values):
        return FloatingPointError("the model's vector is not finite (a wider --dtype may help)")
    largest = max(float(np.abs(each).max(initial=0)) for each in values)
    fits = largest <= float(np.finfo(dtype).max)
    return None if fits else OverflowError(f"{largest:g} does not fit {dtype}; leave out --float16")


def embed_stage(
    model: str,
    *,
    modalities: Sequence[Modality] | None = None,
    device: str = "cpu",
    count_tokens: bool = True,
    **options: Any,
) -> EmbedStage:
    """The stage of a model: a hub name with optional @revision, or a directory. Reads no weights.

    `modalities` are those to encode, None for all that the model has. `device` is the workers': "cpu" or
    "cuda[:N]"; "auto" looks at this machine. `options` are the other fields of EmbedStage: name, dtype,
    batch_size, tokens, vector_type, image_filter. Several stages of one pipeline need different names,
    and one of them counts tokens.

    Raises ModelError for a model that cannot be used, UsageError if it encodes none of `modalities`.
    """
    found = resolve(model)
    spec = describe(found.directory)
    chosen = tuple(m for m in MODALITIES if m in spec.dims and (modalities is None or m in modalities))
    if not chosen:
        asked = ", ".join(modalities or ())
        raise UsageError(f"modalities {asked}: {model} encodes none of them, but {', '.join(spec.dims)}")
    return EmbedStage(
        model=found.reference,
        spec=spec,
        digest=digest(found.directory),
        modalities=chosen,
        device=resolve_device(device) if device == "auto" else device,
        count_tokens=count_tokens and "text" in chosen,
        **options,
    )
