"""Whisper's encoder as a source of sound vectors.

Whisper names no pooled vector. Here it is the mean over the encoder's frames that hold sound: a frame
is 20 ms, and those that only see the padding up to 30 s are left out. A longer sound, which the
reference cuts, is heard in consecutive windows of 30 s, and the mean is over all of its frames.
Vectors are compared by cosine, as is the habit with mean-pooled features.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from transformers import WhisperConfig, WhisperModel

from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec
from mmbeam.models.loading import load_pretrained
from mmbeam.models.recipes import read_whisper_recipe
from mmbeam.ops.audio import to_rate
from mmbeam.ops.log_mel import WhisperRecipe, whisper_log_mel, whisper_windows
from mmbeam.types import Waveform

STRIDE = 2  # mel frames to one frame of the encoder: its second convolution's stride
WINDOWS_AT_ONCE = 8  # of one long sound; a batch of more sounds runs as many windows as it has sounds


class WhisperEncoder(Encoder):
    """Audio vectors of the encoder half of a WhisperModel."""

    model_types: ClassVar[tuple[str, ...]] = ("whisper",)

    def __init__(self, spec: EncoderSpec, model: Any, recipe: WhisperRecipe) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.model = model
        self.recipe = recipe

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration and the feature extractor's file."""
        whisper = WhisperConfig.from_dict(dict(config))
        recipe = read_whisper_recipe(directory)
        expected = (whisper.num_mel_bins, whisper.max_source_positions * STRIDE)
        found = (recipe.n_mels, recipe.n_samples // recipe.hop_length)
        if found != expected:
            raise ModelError(
                f"{directory}: config.json expects {expected[0]} mel bins and {expected[1]} frames, the feature "
                f"extractor makes {found[0]} and {found[1]}; they must be of the same model"
            )
        return EncoderSpec(
            family="whisper",
            directory=str(directory),
            dims={"audio": whisper.d_model},
            token_dims={"audio": whisper.d_model},
            sampling_rate=recipe.sampling_rate,
        )

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Self:
        """Load the encoder's weights; the spectrogram stays in float32 whatever the dtype."""
        directory = Path(spec.directory)
        whole = load_pretrained(WhisperModel, directory, torch.device("cpu"), dtype, ignore_missing=(r"^decoder\.",))
        return cls(spec, whole.get_encoder().to(device), read_whisper_recipe(directory))

    @torch.inference_mode()
    def encode_audio(self, waves: Sequence[Waveform], rates: Sequence[int], tokens: bool = False) -> Encoded:
        """Encode sounds; tokens are the frames that hold sound, 20 ms each."""
        sounds = to_rate(waves, rates, self.recipe.sampling_rate, self.device)
        windows = [
            (position, window, self._frames(len(sound) - index * self.recipe.n_samples))
            for position, sound in enumerate(sounds)
            for index, window in enumerate(whisper_windows(sound, self.recipe))
        ]
        sums_BD = torch.zeros(len(sounds), self.spec.dims["audio"], device=self.device)
        frames: list[list[torch.Tensor]] = [[] for _ in sounds]
        step = max(len(sounds), WINDOWS_AT_ONCE)
        for first in range(0, len(windows), step):
            some = windows[first : first + step]
            hidden_BLD = self._encode_windows([window for _, window, _ in some])
            for (position, _, count), hidden_LD in zip(some, hidden_BLD, strict=True):
                sums_BD[position] += hidden_LD[:count].float().sum(0)
                if tokens:
                    frames[position].append(hidden_LD[:count].float())
        counts = torch.tensor([self._frames(len(sound)) for sound in sounds], device=self.device)
        pooled = sums_BD / counts[:, None]
        return Encoded(pooled=pooled, tokens=[torch.cat(of_sound) for of_sound in frames] if tokens else None)

    def _frames(self, samples: int) -> int:
        """How many of the encoder's frames begin within so many samples."""
        return -(-samples // (self.recipe.hop_length * STRIDE))

    def _encode_windows(self, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        mel_BMT = whisper_log_mel(torch.stack(list(windows)), self.recipe)
        hidden: torch.Tensor = self.model(mel_BMT.to(self.dtype)).last_hidden_state
        return hidden
