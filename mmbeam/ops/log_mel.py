"""Log-mel spectrograms as Whisper and CLAP hear sound, by a recipe that models/audio_recipe.py reads.

Each function equals the family's feature extractor in transformers wherever that is a function of its
input; where it draws lots or cuts sounds short, the rule kept here instead is stated. Pure kernels on
float tensors, batched, on any device.

Shapes: B batch, N samples of a waveform, F frequency bins, M mel bins, T frames, C channels.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from mmbeam.ops.audio import MelScale, even_starts, mel_filter_bank, power_spectrogram

BLOCK_FRAMES = 4096  # of a spectrogram computed at a time: 34 MB at 513 bins in float64
MIN_POWER = 1e-10  # the floor under every logarithm, that of both references
WHISPER_HIGH = 8000.0  # Hz: where Whisper's mel filters end, in no checkpoint's file

Truncation = Literal["fusion", "rand_trunc"]
Padding = Literal["repeatpad", "repeat", "pad"]


@functools.lru_cache(maxsize=16)
def _mel_bank(
    n_fft: int,
    n_mels: int,
    low: float,
    high: float,
    rate: int,
    scale: MelScale,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """The filter bank as [M, F] on the device; height 1 on the htk scale, area 1 on Slaney's, as the models have it."""
    with torch.inference_mode(False):
        bank_FM = mel_filter_bank(n_fft // 2 + 1, n_mels, low, high, rate, scale, slaney_norm=scale == "slaney")
        return torch.from_numpy(bank_FM).to(device, dtype).T


@dataclass(frozen=True, kw_only=True)
class WhisperRecipe:
    """The options of a WhisperFeatureExtractor; lengths are in samples at `sampling_rate`."""

    n_mels: int
    sampling_rate: int  # Hz
    hop_length: int
    n_fft: int
    n_samples: int  # of the model's window, 30 s


def whisper_windows(wave_N: torch.Tensor, recipe: WhisperRecipe) -> list[torch.Tensor]:
    """The sound as consecutive windows [n_samples], the last one filled up with silence.

    The reference cuts what is longer than one window; here nothing is lost.
    """
    return [_fill(piece, recipe.n_samples) for piece in torch.split(wave_N, recipe.n_samples)]


def whisper_log_mel(wave_BN: torch.Tensor, recipe: WhisperRecipe) -> torch.Tensor:
    """Log-mel features [B, M, T] of windows of n_samples, float32.

    Equal bit by bit to WhisperFeatureExtractor (its torch path) on the CPU; Radford et al. 2022, 2.2.
    """
    power_BFT = power_spectrogram(wave_BN.float(), recipe.n_fft, recipe.hop_length)[..., :-1].contiguous()
    rate = recipe.sampling_rate
    bank_MF = _mel_bank(recipe.n_fft, recipe.n_mels, 0.0, WHISPER_HIGH, rate, "slaney", torch.float32, power_BFT.device)
    log_BMT = torch.clamp(bank_MF @ power_BFT, min=MIN_POWER).log10()
    log_BMT = torch.maximum(log_BMT, log_BMT.amax(dim=(1, 2), keepdim=True) - 8.0)
    return (log_BMT + 4.0) / 4.0


@dataclass(frozen=True, kw_only=True)
class ClapRecipe:
    """The options of a ClapFeatureExtractor that it uses; lengths are in samples at `sampling_rate`."""

    n_mels: int
    sampling_rate: int  # Hz
    hop_length: int
    n_fft: int
    n_samples: int  # of the model's window, 10 s
    low: float  # Hz
    high: float  # Hz
    truncation: Truncation  # of longer sounds
    padding: Padding  # of shorter sounds


def clap_windows(wave_N: torch.Tensor, recipe: ClapRecipe) -> list[torch.Tensor]:
    """What the model hears of a sound, one piece per vector; the vectors of one sound are averaged.

    A shorter sound is filled up as the reference does it. Of a longer one the reference takes a random
    window ("rand_trunc"); here all windows that it takes to cover the sound, evenly spread. "fusion"
    takes a longer sound whole.
    """
    length, window = len(wave_N), recipe.n_samples
    if length > window:
        starts = even_starts(length, window)
        return [wave_N] if recipe.truncation == "fusion" else [wave_N[start : start + window] for start in starts]
    if recipe.padding == "repeat" and length < window:
        wave_N = wave_N.repeat(window // length + 1)[:window]
    elif recipe.padding == "repeatpad":
        wave_N = wave_N.repeat(window // length)
    return [_fill(wave_N, window)]


def clap_log_mel(wave_BN: torch.Tensor, recipe: ClapRecipe) -> torch.Tensor:
    """Mel spectrograms in decibels, [B, T, M], float32, of waveforms of one length.

    Equal to ClapFeatureExtractor within 2e-5 dB: computed in float64 as there, since in float32 the
    rounding of a loud tone's transform shows near the floor of -100 dB (0.08 dB, measured).
    """
    scale: MelScale = "htk" if recipe.truncation == "fusion" else "slaney"
    bank_MF = _mel_bank(
        recipe.n_fft, recipe.n_mels, recipe.low, recipe.high, recipe.sampling_rate, scale, torch.float64, wave_BN.device
    )
    half = recipe.n_fft // 2
    padded = functional.pad(wave_BN, (half, half), mode="reflect")
    frames = 1 + (padded.shape[-1] - recipe.n_fft) // recipe.hop_length
    step = max(1, BLOCK_FRAMES // len(wave_BN))
    pieces = []
    for first in range(0, frames, step):
        last = min(first + step, frames) - 1
        block = padded[:, first * recipe.hop_length : last * recipe.hop_length + recipe.n_fft].double()
        power_BFT = power_spectrogram(block, recipe.n_fft, recipe.hop_length, center=False)
        pieces.append((10.0 * torch.clamp(bank_MF @ power_BFT, min=MIN_POWER).log10()).float())
    return torch.cat(pieces, dim=-1).transpose(1, 2)


def clap_features(windows: Sequence[torch.Tensor], recipe: ClapRecipe) -> tuple[torch.Tensor, torch.Tensor]:
    """What ClapModel takes of windows from `clap_windows`: features [B, C, T, M] and is_longer [B, 1].

    C is 1, and 4 for "fusion": a longer sound is the whole spectrogram shrunk to one window, and its
    first, middle and last window (the reference draws one at random from each third); a shorter one is
    four times the same, and is never marked as longer (the reference marks one at random).
    """
    if recipe.truncation == "rand_trunc":
        mel_BTM = clap_log_mel(torch.stack(list(windows)), recipe)
        return mel_BTM[:, None], torch.zeros(len(windows), 1, dtype=torch.bool, device=mel_BTM.device)
    fused = [_fuse(clap_log_mel(window[None], recipe)[0], recipe) for window in windows]
    is_longer = torch.tensor([[longer] for _, longer in fused], device=windows[0].device)
    return torch.stack([features for features, _ in fused]), is_longer


def _fuse(mel_TM: torch.Tensor, recipe: ClapRecipe) -> tuple[torch.Tensor, bool]:
    chunk = recipe.n_samples // recipe.hop_length + 1
    extra = len(mel_TM) - chunk
    if extra <= 0:
        return mel_TM.expand(4, -1, -1), False
    size = (chunk, recipe.n_mels)
    shrunk = functional.interpolate(mel_TM[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    return torch.stack([shrunk, *(mel_TM[start : start + chunk] for start in (0, (extra + 1) // 2, extra))]), True


def _fill(wave_N: torch.Tensor, length: int) -> torch.Tensor:
    return functional.pad(wave_N, (0, length - len(wave_N)))
