"""Audio preprocessing of a fusion model: by the recipe of its own encoders, or of a pretrained encoder.

Only the first window of a recording is used; `mmbeam embed` covers longer recordings.

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

AST = "audio-spectrogram-transformer"  # model_type in config.json
MAX_WAVEFORM = 480_000  # samples: 30 s at 16 kHz, the rate of all waveform models
MIN_WINDOW = 512  # samples: one Fourier transform


@dataclass(frozen=True, kw_only=True)
class MelRecipe:
    """A log-mel spectrogram [frames, n_mels] of one window, without loudness normalisation.

    Longer audio is cut to the window, shorter audio padded with silence.
    """

    sampling_rate: int = 8000  # Hz
    n_samples: int = 8000  # of the window
    n_fft: int = 512
    hop_length: int = 125
    n_mels: int = 64
    low: float = 40.0  # Hz
    high: float = 4000.0
    floor: float = -6.0  # log10 of the power that counts as silence

    @property
    def frames(self) -> int:
        """The frames of the window."""
        return self.n_samples // self.hop_length

    @classmethod
    def of_shape(cls, shape: Sequence[int], seconds: float = 1.0, sampling_rate: int = 8000) -> "MelRecipe":
        """Return the recipe for spectrograms of `shape`, (1, frames, mel bins), from a window of `seconds`."""
        hop = max(round(seconds * sampling_rate), MIN_WINDOW) // shape[1]
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
    """Return spectrograms [B, 1, T, M] of waveforms of n_samples, from -1 (silence) to about 2."""
    power_BFT = power_spectrogram(wave_BN.float(), recipe.n_fft, recipe.hop_length)[..., : recipe.frames]
    bank = mel_filter_bank(
        recipe.n_fft // 2 + 1, recipe.n_mels, recipe.low, recipe.high, recipe.sampling_rate, "htk", slaney_norm=False
    )
    mel_BMT = torch.from_numpy(bank).to(wave_BN.device, torch.float32).T @ power_BFT
    log_BTM = mel_BMT.clamp(min=10**recipe.floor).log10().transpose(1, 2)
    return (log_BTM - recipe.floor / 2)[:, None] / (-recipe.floor / 2)


@dataclass(frozen=True, kw_only=True)
class WaveformRecipe(WaveRecipe):
    """The waveform itself, for wav2vec 2.0, HuBERT and WavLM."""

    shortest: int  # samples that the convolutions need for one frame; shorter audio is padded with silence
    n_samples: int = MAX_WAVEFORM  # of the window

    def length(self, samples: int) -> int:
        """Return the length of the input for a recording of `samples`."""
        return max(self.shortest, min(samples, self.n_samples))


AudioRecipe = WaveformRecipe | MelRecipe | WhisperRecipe | ClapRecipe | AstRecipe
Preparation = ImageRecipe | AudioRecipe | Tokenizer  # the preprocessing of an image, audio or text source
AUDIO_RECIPES: Mapping[str, type[AudioRecipe]] = {
    kind.__name__: kind for kind in (WaveformRecipe, MelRecipe, WhisperRecipe, ClapRecipe, AstRecipe)
}


def sampling_rate_of(recipe: AudioRecipe) -> int:
    """Return the sampling rate in Hz that a recipe expects."""
    return AST_RATE if isinstance(recipe, AstRecipe) else recipe.sampling_rate


def time_axis(source: SourceConfig, spectrograms: torch.Tensor) -> int:
    """Return the time axis of what `audio_inputs` returns for a source."""
    is_whisper = spectrograms.dim() == 3 and (source.model or {}).get("model_type") != AST
    return -1 if is_whisper else -2


def audio_inputs(waves: Sequence[torch.Tensor], recipe: AudioRecipe) -> torch.Tensor:
    """Return the input of an encoder for the first window of each waveform, at the sampling rate of the recipe.

    Shapes: [B, 1, T, M] for MelRecipe, [B, M, T] for WhisperRecipe, [B, 1 or 4, T, M] for ClapRecipe, [B, T, M]
    for AstRecipe, [B, N] for WaveformRecipe.
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
