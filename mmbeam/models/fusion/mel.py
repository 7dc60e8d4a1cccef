"""Sounds as the fusion model's own encoders hear them.

Shapes: B batch, N samples of a waveform, F frequency bins, T frames, M mel bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmbeam.ops.audio import mel_filter_bank, power_spectrogram

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
