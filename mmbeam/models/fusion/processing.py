"""What is done to pictures, sounds, texts and features before a fusion model sees them, and to captions.

It is saved beside the weights: preprocessing.json and tokenizer.json. Shapes: B batch, N samples of a
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
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers
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
from mmbeam.models.loading import read_json
from mmbeam.models.tokenizing import pad
from mmbeam.ops.audio import to_rate
from mmbeam.ops.image import ImageRecipe, preprocess
from mmbeam.prompts.ask import Request
from mmbeam.types import MODALITIES, Modality, Waveform

log = logging.getLogger(__name__)

PREPROCESSING = "preprocessing.json"
SPECIAL_TOKENS = {PAD: "<pad>", BOS: "<s>", EOS: "</s>"}
Values = tuple[torch.Tensor, torch.Tensor]  # of one source: values and mask


class FusionProcessor:
    """Requests to the model's inputs, and captions to labels and back."""

    def __init__(
        self,
        sources: Mapping[str, SourceConfig],
        tokenizer: Tokenizer,
        images: Mapping[str, ImageRecipe] | None = None,
        sounds: Mapping[str, AudioRecipe] | None = None,
        tokenizers: Mapping[str, Tokenizer] | None = None,
    ) -> None:
        """`tokenizers` are those of texts that a pretrained encoder reads in its own way."""
        self.sources = dict(sources)
        self.tokenizer = tokenizer
        self.images = dict(images or {})
        self.sounds = dict(sounds or {})
        self.tokenizers = dict(tokenizers or {})
        self._cut: set[str] = set()  # what was said to be cut
        for each in (tokenizer, *self.tokenizers.values()):
            each.encode_special_tokens = True  # a text that spells "</s>" is a text all the same

    @classmethod
    def fit(
        cls,
        sources: Mapping[str, SourceConfig],
        texts: Iterable[str],
        vocab_size: int,
        audio_seconds: float = 1.0,
        pretrained: Mapping[str, Preparation] | None = None,
    ) -> "FusionProcessor":
        """A byte-level BPE (Sennrich et al., 2016) of captions and texts; for media what fits the sources' shapes.

        `pretrained` is what the encoders of other models take, by the names of their sources.
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
        found = {**_own_recipes(sources, audio_seconds), **(pretrained or {})}
        images = {name: each for name, each in found.items() if isinstance(each, ImageRecipe)}
        sounds = {name: each for name, each in found.items() if isinstance(each, AudioRecipe)}
        tokenizers = {name: each for name, each in found.items() if isinstance(each, Tokenizer)}
        return cls(sources, tokenizer, images, sounds, tokenizers)

    @classmethod
    def from_directory(cls, directory: Path) -> "FusionProcessor":
        """What `save` wrote. Raises ModelError naming what is missing or wrong."""
        data = read_json(directory, PREPROCESSING)
        config = read_json(directory, "config.json")
        try:
            return cls(
                {name: SourceConfig.parse(name, source) for name, source in config["sources"].items()},
                _read_tokenizer(directory / "tokenizer.json"),
                {name: _image_recipe(recipe) for name, recipe in data["images"].items()},
                {name: _sound_recipe(recipe) for name, recipe in data["sounds"].items()},
                {name: _read_tokenizer(directory / f"{name}.tokenizer.json") for name in data["tokenizers"]},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{directory / PREPROCESSING}: not that of a fusion model: {error!r}") from error

    def save(self, directory: Path) -> None:
        """Write preprocessing.json and the tokenizer, as files of transformers, beside the weights."""
        directory.mkdir(parents=True, exist_ok=True)
        special = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
        PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer, **{name: SPECIAL_TOKENS[number] for name, number in special.items()}
        ).save_pretrained(directory)
        for name, tokenizer in self.tokenizers.items():
            tokenizer.save(str(directory / f"{name}.tokenizer.json"))
        data = {
            "images": {name: asdict(recipe) for name, recipe in self.images.items()},
            "sounds": {name: {"kind": type(recipe).__name__, **asdict(recipe)} for name, recipe in self.sounds.items()},
            "tokenizers": sorted(self.tokenizers),
        }
        (directory / PREPROCESSING).write_text(json.dumps(data, indent=2) + "\n")

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What the model takes of a sample."""
        return tuple(m for m in MODALITIES if any(source.modality == m for source in self.sources.values()))

    @property
    def columns(self) -> dict[str, Modality]:
        """The features that it takes, by column."""
        return {name: source.modality for name, source in self.sources.items() if source.kind == "features"}

    @property
    def sampling_rate(self) -> int | None:
        """Of the sounds that the model hears, in Hz; the highest if its sources differ."""
        return max(map(sampling_rate_of, self.sounds.values()), default=None)

    @property
    def image_side(self) -> int | None:
        """The shorter side, in pixels, to which pictures are resized; the largest if its sources differ."""
        return max((recipe.shorter_side for recipe in self.images.values()), default=None)

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def __call__(
        self, requests: Sequence[Request], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        """The model's inputs for a batch: for each source its values and its mask, zeros where a sample has none.

        Raises ModelError for features of another width than the model's.
        """
        inputs: dict[str, torch.Tensor] = {}
        for name, source in self.sources.items():
            if source.kind == "features":
                values, mask = self._features(name, source, requests, device)
            elif source.modality == "text":
                values, mask = self._text(name, source, [request.text for request in requests], device)
            else:
                values, mask = self._media(name, source, requests, device)
            inputs[name] = values.to(dtype) if values.is_floating_point() else values
            inputs[name + MASK] = mask
        return inputs

    def _media(self, name: str, source: SourceConfig, requests: Sequence[Request], device: torch.device) -> Values:
        present = torch.tensor([getattr(request, source.modality) is not None for request in requests], device=device)
        if not present.any():
            return torch.zeros(len(requests), 1, device=device), present
        if source.modality == "image":
            images = [request.image for request in requests if request.image is not None]
            some = preprocess(images, self.images[name], device, torch.float32)
            real = present[present]
        else:
            some, real = self.audio_values(name, [each.audio for each in requests if each.audio is not None], device)
        return scatter_rows(some, present), scatter_rows(real, present)

    def audio_values(self, name: str, sounds: Sequence[tuple[Waveform, int]], device: torch.device) -> Values:
        """What the source `name` takes of sounds and their rates in Hz. Raises DecodeError for an empty one.

        The mask is [B], of waveforms [B, N].
        """
        recipe = self.sounds[name]
        waves = to_rate([wave for wave, _ in sounds], [rate for _, rate in sounds], sampling_rate_of(recipe), device)
        self._say_cut(
            name, max(map(len, waves), default=0), recipe.n_samples, f"samples at {sampling_rate_of(recipe)} Hz"
        )
        values = audio_inputs(waves, recipe)
        if not isinstance(recipe, WaveformRecipe):
            return values, torch.ones(len(values), dtype=torch.bool, device=device)
        lengths = torch.tensor([recipe.length(len(wave)) for wave in waves], device=device)
        return values, torch.arange(values.shape[1], device=device) < lengths[:, None]

    def _text(self, name: str, source: SourceConfig, texts: Sequence[str | None], device: torch.device) -> Values:
        ids = self.input_ids([text or "" for text in texts], name)
        tokens, mask = pad([own if text else [] for own, text in zip(ids, texts, strict=True)], PAD, device)
        if not tokens.shape[1]:  # nobody says anything
            tokens = torch.full((len(texts), 1), PAD, device=device)
        return tokens, mask.bool() if mask.shape[1] else torch.zeros_like(tokens, dtype=torch.bool)

    def _features(self, name: str, source: SourceConfig, requests: Sequence[Request], device: torch.device) -> Values:
        found = [request.features.get(name) for request in requests]
        for feature in found:
            if feature is not None and (feature.shape[-1] != source.width or feature.ndim != 1 + source.tokens):
                shape = f"[tokens, {source.width}]" if source.tokens else f"[{source.width}]"
                raise ModelError(f"features {name}: shape {list(feature.shape)}, the model takes {shape}")
        if not source.tokens:
            values = np.zeros((len(requests), source.width), np.float32)
            mask = np.array([feature is not None for feature in found])
            for row, feature in enumerate(found):
                if feature is not None:
                    values[row] = feature
            return torch.from_numpy(values).to(device), torch.from_numpy(mask).to(device)
        lengths = [0 if feature is None else len(feature) for feature in found]
        self._say_cut(name, max(lengths, default=0), source.max_tokens, "vectors")
        lengths = [min(length, source.max_tokens) for length in lengths]
        longest = max([1, *lengths])
        sequences = np.zeros((len(requests), longest, source.width), np.float32)
        for row, (feature, length) in enumerate(zip(found, lengths, strict=True)):
            if feature is not None:
                sequences[row, :length] = feature[:length]
        real = np.arange(longest) < np.array(lengths)[:, None]
        return torch.from_numpy(sequences).to(device), torch.from_numpy(real).to(device)

    def _say_cut(self, name: str, longest: int, limit: int, unit: str) -> None:
        """Say, once of each name, that not all of it is read."""
        if longest > limit and name not in self._cut:
            self._cut.add(name)
            log.warning("%s: one of %d %s is cut to %d, as are all that are longer", name, longest, unit, limit)

    def token_ids(self, texts: Sequence[str], source: str | None = None) -> list[list[int]]:
        """Token ids of each text, not cut, without special tokens; by the tokenizer of `source` if it has its own."""
        tokenizer = self.tokenizers.get(source or "", self.tokenizer)
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [each.ids[: sum(each.attention_mask)] for each in encoded]  # without what some pad with

    def input_ids(self, texts: Sequence[str], source: str) -> list[list[int]]:
        """Token ids as `source` reads them, special tokens included where its tokenizer has them.

        What is longer than it takes is cut; the special token at the end stays.
        """
        limit = self.sources[source].max_tokens
        encoded = self.tokenizers.get(source, self.tokenizer).encode_batch(
            list(texts), add_special_tokens=source in self.tokenizers
        )
        self._say_cut(source, max(map(len, encoded), default=0), limit, "tokens")
        return [each.ids if len(each) <= limit else _cut(each, limit) for each in encoded]

    def labels(self, captions: Sequence[str], device: torch.device, max_length: int | None = None) -> torch.Tensor:
        """Captions as int64 [B, T] with the end-of-text token, padded with -100, cut to `max_length` tokens."""
        found = self.token_ids(captions)
        longest = 1 + max(map(len, found), default=0)
        limit = longest if max_length is None else max_length
        self._say_cut("captions", longest, limit, "tokens")
        ids = [[*each[: limit - 1], EOS] for each in found]
        return pad(ids, IGNORED, device)[0]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Texts of token ids, up to the end-of-text token."""
        texts = []
        for each in ids:
            words = [int(number) for number in each if number not in (PAD, BOS)]
            texts.append(self.tokenizer.decode(words[: words.index(EOS)] if EOS in words else words))
        return texts


def _cut(encoded: Encoding, limit: int) -> list[int]:
    last = encoded.ids[-1:] if encoded.special_tokens_mask[-1] else []
    return [*encoded.ids[: limit - len(last)], *last]


def _own_recipes(sources: Mapping[str, SourceConfig], audio_seconds: float) -> dict[str, Preparation]:
    """Of the grids that the model's own encoders read."""
    return {
        name: _picture_recipe(of.shape) if of.modality == "image" else MelRecipe.of_shape(of.shape, audio_seconds)
        for name, of in sources.items()
        if of.kind not in ("features", "pretrained") and of.modality != "text"
    }


def _picture_recipe(shape: Sequence[int]) -> ImageRecipe:
    """Resized to the shape, whatever its aspect ratio, and to the range -1 to 1."""
    return ImageRecipe(size=(shape[1], shape[2]), scale=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def _image_recipe(data: Mapping[str, Any]) -> ImageRecipe:
    """From JSON, where tuples are lists; the pictures of a NaFlex model are not for this one."""
    options: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return ImageRecipe(**options)


def _sound_recipe(data: Mapping[str, Any]) -> AudioRecipe:
    return AUDIO_RECIPES[data["kind"]](**{name: value for name, value in data.items() if name != "kind"})


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ModelError(f"{path}: expected a tokenizer: {error}") from error
