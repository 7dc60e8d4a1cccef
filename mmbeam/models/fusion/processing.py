"""Preprocessing of images, audio, texts and features for a fusion model, and captions to labels and back.

It is saved next to the weights, as preprocessing.json and tokenizer.json. Shapes: B batch, N samples of a
waveform, T tokens.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmbeam.errors import ModelError
from mmbeam.models.fusion.audio import (
    AUDIO_RECIPES,
    AudioRecipe,
    MelRecipe,
    Preparation,
    WaveformRecipe,
    audio_inputs,
    sampling_rate_of,
)
from mmbeam.models.fusion.configuration import BOS, EOS, IGNORED, MASK, PAD, SourceConfig
from mmbeam.models.fusion.encoders import scatter_rows
from mmbeam.models.loading import model_path, read_json
from mmbeam.models.tokenizing import count_in_pieces, enough_text, pad
from mmbeam.names import FUSION_MODALITIES, Modality
from mmbeam.ops.audio import to_rate
from mmbeam.ops.image import ImageRecipe, preprocess
from mmbeam.ops.transfer import to_device
from mmbeam.prompts.ask import Request
from mmbeam.types import Waveform

log = logging.getLogger(__name__)

PREPROCESSING = "preprocessing.json"
SPECIAL_TOKENS = {PAD: "<pad>", BOS: "<s>", EOS: "</s>"}
SourceInput = tuple[torch.Tensor, torch.Tensor]  # values and mask of one source


class FusionProcessor:
    """Converts requests to the model's inputs, and captions to labels and back."""

    def __init__(
        self,
        sources: Mapping[str, SourceConfig],
        tokenizer: Tokenizer,
        images: Mapping[str, ImageRecipe] | None = None,
        audio_recipes: Mapping[str, AudioRecipe] | None = None,
        tokenizers: Mapping[str, Tokenizer] | None = None,
    ) -> None:
        """Take recipes by source; `tokenizers` are those of pretrained text encoders."""
        self.sources = dict(sources)
        self.tokenizer = tokenizer
        self.images = dict(images or {})
        self.audio_recipes = dict(audio_recipes or {})
        self.tokenizers = dict(tokenizers or {})
        self._warned: set[str] = set()  # names for which a warning of truncation was logged
        for any_tokenizer in (tokenizer, *self.tokenizers.values()):
            any_tokenizer.encode_special_tokens = True  # "</s>" in a text is ordinary text

    @classmethod
    def fit(
        cls,
        sources: Mapping[str, SourceConfig],
        texts: Iterable[str],
        vocab_size: int,
        audio_seconds: float = 1.0,
        pretrained: Mapping[str, Preparation] | None = None,
    ) -> "FusionProcessor":
        """Train a byte-level BPE (Sennrich et al., 2016) on captions and texts; media get recipes for their shapes.

        `pretrained` holds the preprocessing of pretrained encoders by source.
        """
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[SPECIAL_TOKENS[number] for number in sorted(SPECIAL_TOKENS)],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        recipes: dict[str, Preparation] = {}
        for name, source in sources.items():
            if source.kind not in ("features", "pretrained") and source.modality == "audio":
                recipes[name] = MelRecipe.of_shape(source.shape, audio_seconds)
            elif source.kind not in ("features", "pretrained") and source.modality == "image":
                half = (0.5, 0.5, 0.5)  # maps pixels to -1 to 1; the aspect ratio is not kept
                recipes[name] = ImageRecipe(size=(source.shape[1], source.shape[2]), scale=1 / 255, mean=half, std=half)
        recipes |= pretrained or {}
        images = {name: recipe for name, recipe in recipes.items() if isinstance(recipe, ImageRecipe)}
        audio_recipes = {name: recipe for name, recipe in recipes.items() if isinstance(recipe, AudioRecipe)}
        tokenizers = {name: recipe for name, recipe in recipes.items() if isinstance(recipe, Tokenizer)}
        return cls(sources, tokenizer, images, audio_recipes, tokenizers)

    @classmethod
    def from_directory(cls, directory: Path) -> "FusionProcessor":
        """Load what `save` wrote. Raises ModelError naming what is missing or wrong."""
        data = read_json(directory, PREPROCESSING)
        config = read_json(directory, "config.json")
        try:
            return cls(
                {name: SourceConfig.parse(name, source) for name, source in config["sources"].items()},
                _read_tokenizer(directory / "tokenizer.json"),
                {name: ImageRecipe(**_tuples(recipe)) for name, recipe in data["images"].items()},
                {name: AUDIO_RECIPES[recipe.pop("kind")](**recipe) for name, recipe in data["sounds"].items()},
                {
                    name: _read_tokenizer(model_path(directory, f"{name}.tokenizer.json", PREPROCESSING))
                    for name in data["tokenizers"]
                },
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{directory / PREPROCESSING}: expected the preprocessing of a fusion model: {error!r}"
            ) from error

    def save(self, directory: Path) -> None:
        """Write preprocessing.json and the tokenizer files next to the weights."""
        directory.mkdir(parents=True, exist_ok=True)
        special = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
        PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer, **{name: SPECIAL_TOKENS[number] for name, number in special.items()}
        ).save_pretrained(directory)
        for name, tokenizer in self.tokenizers.items():
            tokenizer.save(str(directory / f"{name}.tokenizer.json"))
        data = {
            "images": {name: asdict(recipe) for name, recipe in self.images.items()},
            "sounds": {
                name: {"kind": type(recipe).__name__, **asdict(recipe)} for name, recipe in self.audio_recipes.items()
            },
            "tokenizers": sorted(self.tokenizers),
        }
        (directory / PREPROCESSING).write_text(json.dumps(data, indent=2) + "\n")

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The modalities of the sources."""
        return tuple(m for m in FUSION_MODALITIES if any(source.modality == m for source in self.sources.values()))

    @property
    def columns(self) -> dict[str, Modality]:
        """The feature columns of the sources, with their modalities."""
        return {name: source.modality for name, source in self.sources.items() if source.kind == "features"}

    @property
    def sampling_rate(self) -> int | None:
        """The sampling rate of the audio sources in Hz; the highest if they differ."""
        return max(map(sampling_rate_of, self.audio_recipes.values()), default=None)

    @property
    def image_side(self) -> int | None:
        """The shorter side to which images are resized, in pixels; the largest if the sources differ."""
        return max((recipe.shorter_side for recipe in self.images.values()), default=None)

    @property
    def vocab_size(self) -> int:
        """The number of tokens of the model's own tokenizer."""
        return int(self.tokenizer.get_vocab_size())

    def __call__(
        self, requests: Sequence[Request], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        """Return the model's inputs for a batch: values and mask of each source, zeros where a sample has none.

        Raises ModelError for features whose shape differs from the source's.
        """
        inputs: dict[str, torch.Tensor] = {}
        for name, source in self.sources.items():
            if source.kind == "features":
                values, mask = self._features(name, source, requests, device)
            elif source.modality == "text":
                values, mask = self._text(name, source, requests, device)
            else:
                values, mask = self._media(name, source, requests, device)
            inputs[name] = values.to(dtype) if values.is_floating_point() else values
            inputs[name + MASK] = mask
        return inputs

    def _media(self, name: str, source: SourceConfig, requests: Sequence[Request], device: torch.device) -> SourceInput:
        has_source = [getattr(request, source.modality) is not None for request in requests]
        present = to_device(has_source, device)
        if not any(has_source):
            return torch.zeros(len(requests), 1, device=device), present
        if source.modality == "image":
            images = [request.image for request in requests if request.image is not None]
            values = preprocess(images, self.images[name], device, torch.float32)
            mask = torch.ones(len(images), dtype=torch.bool, device=device)
        else:
            clips = [request.audio for request in requests if request.audio is not None]
            values, mask = self.audio_values(name, clips, device)
        return scatter_rows(values, present), scatter_rows(mask, present)

    def audio_values(self, name: str, clips: Sequence[tuple[Waveform, int]], device: torch.device) -> SourceInput:
        """Return the input of the source `name` for waveforms and their rates in Hz; the mask is [B] or [B, N].

        Raises DecodeError for an empty waveform.
        """
        recipe = self.audio_recipes[name]
        rate = sampling_rate_of(recipe)
        waves = to_rate([wave for wave, _ in clips], [rate for _, rate in clips], rate, device)
        self._warn_if_truncated(name, max(map(len, waves), default=0), recipe.n_samples, f"samples at {rate} Hz")
        values = audio_inputs(waves, recipe)
        if not isinstance(recipe, WaveformRecipe):
            return values, torch.ones(len(values), dtype=torch.bool, device=device)
        lengths = to_device([recipe.length(len(wave)) for wave in waves], device)
        return values, torch.arange(values.shape[1], device=device) < lengths[:, None]

    def _text(self, name: str, source: SourceConfig, requests: Sequence[Request], device: torch.device) -> SourceInput:
        if all(request.encoded is not None for request in requests):
            ids = [request.encoded[name] for request in requests]
        else:
            ids = self.input_ids([request.text or "" for request in requests], name)
        rows = [row if request.text else [] for row, request in zip(ids, requests, strict=True)]
        tokens, mask = pad(rows, PAD, device, vocabulary=(source.model or {}).get("vocab_size"))
        if not tokens.shape[1]:  # no sample has text
            tokens = torch.full((len(requests), 1), PAD, device=device)
        return tokens, mask.bool() if mask.shape[1] else torch.zeros_like(tokens, dtype=torch.bool)

    def _features(
        self, name: str, source: SourceConfig, requests: Sequence[Request], device: torch.device
    ) -> SourceInput:
        features = [request.features.get(name) for request in requests]
        for feature in features:
            if feature is not None and (feature.shape[-1] != source.width or feature.ndim != 1 + source.tokens):
                shape = f"[tokens, {source.width}]" if source.tokens else f"[{source.width}]"
                raise ModelError(f"features {name}: expected shape {shape}, found {list(feature.shape)}")
        if not source.tokens:
            values = np.zeros((len(requests), source.width), np.float32)
            mask = np.array([feature is not None for feature in features])
            for row, feature in enumerate(features):
                if feature is not None:
                    values[row] = feature
            return to_device(values, device), to_device(mask, device)
        lengths = [0 if feature is None else len(feature) for feature in features]
        self._warn_if_truncated(name, max(lengths, default=0), source.max_tokens, "vectors")
        lengths = [min(length, source.max_tokens) for length in lengths]
        longest = max([1, *lengths])
        sequences = np.zeros((len(requests), longest, source.width), np.float32)
        for row, (feature, length) in enumerate(zip(features, lengths, strict=True)):
            if feature is not None:
                sequences[row, :length] = feature[:length]
        real = np.arange(longest) < np.array(lengths)[:, None]
        return to_device(sequences, device), to_device(real, device)

    def _warn_if_truncated(self, name: str, longest: int, limit: int, unit: str) -> None:
        """Log a warning, once per name, that inputs are truncated."""
        if longest > limit and name not in self._warned:
            self._warned.add(name)
            log.warning(
                "%s: inputs longer than %d %s are truncated (longest in this batch: %d)", name, limit, unit, longest
            )

    def token_ids(self, texts: Sequence[str], source: str | None = None) -> list[list[int]]:
        """Return token ids without special tokens, not truncated, by the tokenizer of `source` if it has one."""
        tokenizer = self.tokenizers.get(source or "", self.tokenizer)
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids[: sum(encoding.attention_mask)] for encoding in encoded]  # without padding

    def count_tokens(self, texts: Sequence[str], source: str | None = None) -> list[int]:
        """Return the number of tokens of each text, not cut, without special tokens. See count_in_pieces."""
        return count_in_pieces(texts, lambda pieces: self._count(pieces, source))

    def _count(self, texts: Sequence[str], source: str | None) -> list[int]:
        return [len(ids) for ids in self.token_ids(texts, source)]

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Return the token ids of each text by the name of the source that takes it; see `input_ids`."""
        names = [
            name for name, source in self.sources.items() if source.modality == "text" and source.kind != "features"
        ]
        rows = [self.input_ids(texts, name) for name in names]
        return [
            {name: of_source[index] if text else [] for name, of_source in zip(names, rows, strict=True)}
            for index, text in enumerate(texts)
        ]

    def input_ids(self, texts: Sequence[str], source: str) -> list[list[int]]:
        """Return token ids for `source`, with the special tokens of a pretrained encoder.

        Longer texts are truncated to the maximum of the source; a special token at the end is kept.
        """
        limit = self.sources[source].max_tokens
        tokenizer = self.tokenizers.get(source, self.tokenizer)
        parts = [enough_text(text, limit, lambda part: self._count(part, source)) for text in texts]
        encoded = tokenizer.encode_batch(parts, add_special_tokens=source in self.tokenizers)
        self._warn_if_truncated(source, max(map(len, encoded), default=0), limit, "tokens")
        rows = []
        for encoding in encoded:
            end = encoding.ids[-1:] if len(encoding) > limit and encoding.special_tokens_mask[-1] else []
            rows.append([*encoding.ids[: limit - len(end)], *end])
        return rows

    def labels(self, captions: Sequence[str], device: torch.device, max_length: int | None = None) -> torch.Tensor:
        """Return captions as int64 [B, T] with the end-of-text token, padded with -100, truncated to `max_length`."""
        rows = self.token_ids(captions)
        longest = 1 + max(map(len, rows), default=0)
        limit = longest if max_length is None else max_length
        self._warn_if_truncated("captions", longest, limit, "tokens")
        return pad([[*row[: limit - 1], EOS] for row in rows], IGNORED, device)[0]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of token ids, up to the end-of-text token."""
        texts = []
        for row in ids:
            tokens = [int(token) for token in row if token not in (PAD, BOS)]
            texts.append(self.tokenizer.decode(tokens[: tokens.index(EOS)] if EOS in tokens else tokens))
        return texts


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe; JSON has lists for tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ModelError(f"{path}: not a tokenizer: {error}") from error
