"""CLAP: sound and text in one space (ClapModel, with or without feature fusion).

Its vectors are unit vectors, from get_audio_features and get_text_features. Sounds longer than the
model's window of 10 s, for which the reference draws lots, are heard whole by fixed rules
(ops/log_mel.py); with "rand_trunc" a sound's vector is the mean of its windows' vectors.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from transformers import ClapConfig, ClapModel

from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec
from mmbeam.models.encoders.text import text_limit
from mmbeam.models.loading import load_pretrained
from mmbeam.models.recipes import read_clap_recipe
from mmbeam.models.tokenizing import TextTokenizer, check_vocabulary, pad, unpad
from mmbeam.ops.audio import to_rate
from mmbeam.ops.log_mel import ClapRecipe, clap_features, clap_windows
from mmbeam.types import Waveform

WINDOWS_AT_ONCE = 8  # of one long sound; a batch of more sounds runs as many windows as it has sounds


class ClapEncoder(Encoder):
    """Audio and text vectors of a ClapModel."""

    model_types: ClassVar[tuple[str, ...]] = ("clap",)

    def __init__(self, spec: EncoderSpec, model: Any, recipe: ClapRecipe, tokenizer: TextTokenizer) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.model = model
        self.recipe = recipe
        self.tokenizer = tokenizer

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration, the feature extractor's and the tokenizer's files."""
        clap: Any = ClapConfig.from_dict(dict(config))
        recipe = read_clap_recipe(directory)
        _check(directory, clap.audio_config, recipe)
        check_vocabulary(directory)
        stages = len(clap.audio_config.depths)
        return EncoderSpec(
            family="clap",
            directory=str(directory),
            dims={"audio": clap.projection_dim, "text": clap.projection_dim},
            token_dims={
                "audio": clap.audio_config.patch_embeds_hidden_size * 2 ** (stages - 1),
                "text": clap.text_config.hidden_size,
            },
            sampling_rate=recipe.sampling_rate,
            max_text_tokens=text_limit(directory, clap.text_config),
        )

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Self:
        """Load weights and tokenizer; the spectrogram stays in float64 whatever the dtype."""
        directory = Path(spec.directory)
        model = load_pretrained(ClapModel, directory, device, dtype)
        return cls(spec, model, read_clap_recipe(directory), TextTokenizer(directory))

    @torch.inference_mode()
    def encode_audio(self, waves: Sequence[Waveform], rates: Sequence[int], tokens: bool = False) -> Encoded:
        """Encode sounds; tokens are the last stage's cells, by frequency then time, window after window."""
        sounds = to_rate(waves, rates, self.recipe.sampling_rate, self.device)
        windows = [clap_windows(sound, self.recipe) for sound in sounds]
        counts = [len(of_sound) for of_sound in windows]
        flat = [window for of_sound in windows for window in of_sound]
        step = max(len(waves), WINDOWS_AT_ONCE)
        outputs = [self._encode_windows(flat[first : first + step]) for first in range(0, len(flat), step)]
        vectors = torch.cat([output.pooler_output for output in outputs]).float()
        pooled = torch.stack([of_sound.mean(0) for of_sound in torch.split(vectors, counts)])
        if not tokens:
            return Encoded(pooled=pooled)
        cells_BLD = torch.cat([output.last_hidden_state.flatten(2).transpose(1, 2) for output in outputs])
        return Encoded(
            pooled=pooled, tokens=[of_sound.flatten(0, 1).float() for of_sound in torch.split(cells_BLD, counts)]
        )

    def _encode_windows(self, windows: Sequence[torch.Tensor]) -> Any:
        features_BCTM, is_longer_B1 = clap_features(windows, self.recipe)
        return self.model.get_audio_features(features_BCTM.to(self.dtype), is_longer=is_longer_B1)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids, special tokens included, truncated to the positions the text model has."""
        assert self.spec.max_text_tokens is not None
        return self.tokenizer.encode(texts, self.spec.max_text_tokens)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, not truncated, special tokens not counted."""
        return self.tokenizer.count(texts)

    @torch.inference_mode()
    def encode_text(self, token_ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode tokenized texts, padded to the longest."""
        ids_BL, mask_BL = pad(token_ids, self.tokenizer.pad_id, self.device)
        output = self.model.get_text_features(input_ids=ids_BL, attention_mask=mask_BL)
        hidden = unpad(output.last_hidden_state.float(), list(map(len, token_ids))) if tokens else None
        return Encoded(pooled=output.pooler_output.float(), tokens=hidden)


def _check(directory: Path, audio: Any, recipe: ClapRecipe) -> None:
    if audio.enable_fusion != (recipe.truncation == "fusion"):
        raise ModelError(
            f"{directory}: config.json has enable_fusion {audio.enable_fusion}, but the feature extractor's truncation "
            f"is {recipe.truncation!r}: a fusion model needs 'fusion', any other 'rand_trunc'"
        )
    if audio.num_mel_bins != recipe.n_mels:
        raise ModelError(
            f"{directory}: config.json has {audio.num_mel_bins} mel bins, the feature extractor {recipe.n_mels}; "
            "they must be of the same model"
        )
