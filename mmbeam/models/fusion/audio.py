"""Sounds as a fusion model hears them: by its own encoders' recipe, or by that of a pretrained encoder.

Whatever the recipe, what is heard of a sound is its first window; what is longer can be heard whole by
`mmbeam embed`.

Shapes: B batch, N samples of a waveform, F frequency bins, T frames, M mel bins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from mmbeam.models.fusion.configuration import SourceConfig
from mmbeam.ops.audio import WaveRecipe, mel_filter_bank, power_spectrogram, standardize
from mmbeam.ops.image import ImageRecipe
from mmbeam.ops.log_mel import (
    AST_RATE,
    AstRecipe,
    ClapRecipe,
    WhisperRecipe,
    ast_log_mel,
    ast_windows,
    clap_features,
    clap_windows,
    whisper_log_mel,
)

AST = "audio-spectrogram-transformer"  # as a configuration's model_type
MAX_WAVEFORM = 480_000  # samples: 30 s at the 16 kHz that all models of waveforms hear
SHORTEST = 512  # samples of a window: one transform's


@dataclass(frozen=True, kw_only=True)
class MelRecipe:
    """A log-mel spectrogram of a window of sound, its loudness kept: [frames, n_mels].

    A longer sound is cut to the window, a shorter one filled up with silence.
    """

    sampling_rate: int = 8000  # Hz
    n_samples: int = 8000  # of the window
    n_fft: int = 512
    hop_length: int = 125
    n_mels: int = 64
    low: float = 40.0  # Hz
    high: float = 4000.0
    floor: float = -6.0  # log10 of the power under which all is silence

    @property
    def frames(self) -> int:
        """Of the window."""
        return self.n_samples // self.hop_length

    @classmethod
    def of_shape(cls, shape: Sequence[int], seconds: float = 1.0, sampling_rate: int = 8000) -> "MelRecipe":
        """The recipe whose spectrograms have this shape, (1, frames, mel bins), for a window of so many seconds."""
        hop = max(round(seconds * sampling_rate), SHORTEST) // shape[1]
        n_fft = max(512, 1 << (2 * hop - 1).bit_length())
        return cls(
            sampling_rate=sampling_rate,
            n_samples=hop * shape[1],
            n_fft=n_fft,
            hop_length=hop,
            n_mels=shape[2],
            high=sampling_rate / 2,
        )


def log_mel(wave_BN: torch.Tensor, recipe: MelRecipe) -> torch.Tensor:
    """Spectrograms [B, 1, T, M] of waveforms of n_samples, from -1 (silence) to about 2."""
    power_BFT = power_spectrogram(wave_BN.float(), recipe.n_fft, recipe.hop_length)[..., : recipe.frames]
    bank = mel_filter_bank(
        recipe.n_fft // 2 + 1, recipe.n_mels, recipe.low, recipe.high, recipe.sampling_rate, "htk", slaney_norm=False
    )
    mel_BMT = torch.from_numpy(bank).to(wave_BN.device, torch.float32).T @ power_BFT
    log_BTM = mel_BMT.clamp(min=10**recipe.floor).log10().transpose(1, 2)
    return (log_BTM - recipe.floor / 2)[:, None] / (-recipe.floor / 2)


@dataclass(frozen=True, kw_only=True)
class WaveformRecipe(WaveRecipe):
    """The waveform itself, as wav2vec 2.0 and its like hear it."""

    shortest: int  # samples that the convolutions need for a frame: what is shorter ends in silence
    n_samples: int = MAX_WAVEFORM  # of the window

    def length(self, samples: int) -> int:
        """How many samples are heard of a sound of so many."""
        return max(self.shortest, min(samples, self.n_samples))


AudioRecipe = WaveformRecipe | MelRecipe | WhisperRecipe | ClapRecipe | AstRecipe
Preparation = ImageRecipe | AudioRecipe | Tokenizer  # the preprocessing of an image, audio or text source
AUDIO_RECIPES: Mapping[str, type[AudioRecipe]] = {
    kind.__name__: kind for kind in (WaveformRecipe, MelRecipe, WhisperRecipe, ClapRecipe, AstRecipe)
}


def sampling_rate_of(recipe: AudioRecipe) -> int:
    """The sampling rate in Hz that a recipe is for."""
    return AST_RATE if isinstance(recipe, AstRecipe) else recipe.sampling_rate


def time_axis(source: SourceConfig, spectrograms: torch.Tensor) -> int:
    """Where time is in what `audio_inputs` makes for a source."""
    whisper = spectrograms.dim() == 3 and (source.model or {}).get("model_type") != AST
    return -1 if whisper else -2


def audio_inputs(waves: Sequence[torch.Tensor], recipe: AudioRecipe) -> torch.Tensor:
    """What an encoder takes of the first window of each sound, at the recipe's rate.

    [B, 1, T, M] by a MelRecipe, [B, M, T] by Whisper's, [B, 1 or 4, T, M] by CLAP's, [B, T, M] by AST's,
    [B, N] by a WaveformRecipe.
    """
    first = [wave[: recipe.n_samples] for wave in waves]
    if isinstance(recipe, WaveformRecipe):
        scaled = [standardize(wave) if recipe.normalize else wave for wave in first]
        return pad_sequence(
            [functional.pad(wave, (0, recipe.length(len(wave)) - len(wave))) for wave in scaled], batch_first=True
        )
    if isinstance(recipe, ClapRecipe):
        return clap_features([clap_windows(wave, recipe)[0] for wave in first], recipe)[0]
    if isinstance(recipe, AstRecipe):
        return ast_log_mel([ast_windows(wave, recipe)[0] for wave in first], recipe)
    windows_BN = torch.stack([functional.pad(wave, (0, recipe.n_samples - len(wave))) for wave in first])
    return log_mel(windows_BN, recipe) if isinstance(recipe, MelRecipe) else whisper_log_mel(windows_BN, recipe)
