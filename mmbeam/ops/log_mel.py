"""Log-mel spectrograms of Whisper, CLAP, AST and Gemma 4, by the recipes that models/recipes.py reads.

Each function equals the family's feature extractor in transformers. Where that is random or truncates clips, the
docstring states the rule that replaces it. Pure kernels on float tensors, batched, on any device.

Shapes: B batch, N samples of a waveform, F frequency bins, M mel bins, T frames, C channels.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from mmbeam.ops.audio import MelScale, even_starts, kaldi_filter_bank, mel_filter_bank, power_spectrogram
from mmbeam.ops.transfer import to_device

BLOCK_FRAMES = 4096  # of a spectrogram are computed at a time: 34 MB at 513 bins in float64
MIN_POWER = 1e-10  # of Whisper's and CLAP's references: the smallest argument of a logarithm
WHISPER_HIGH = 8000.0  # Hz: the upper end of Whisper's mel filters, which checkpoints do not record

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
    """Return the filter bank [M, F] on the device: filters of height 1 on the htk scale, of area 1 on Slaney's."""
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
    n_samples: int  # in the model's window, 30 s


def whisper_windows(wave_N: torch.Tensor, recipe: WhisperRecipe) -> list[torch.Tensor]:
    """Return the clip as consecutive windows [n_samples], the last one padded with silence.

    The reference truncates a clip to one window.
    """
    return [_pad_end(piece, recipe.n_samples) for piece in torch.split(wave_N, recipe.n_samples)]


def whisper_log_mel(wave_BN: torch.Tensor, recipe: WhisperRecipe) -> torch.Tensor:
    """Return log-mel features [B, M, T] of windows of n_samples, float32 (Radford et al., 2022, section 2.2).

    On the CPU they equal the output of WhisperFeatureExtractor (its torch path) bit for bit.
    """
    power_BFT = power_spectrogram(wave_BN.float(), recipe.n_fft, recipe.hop_length)[..., :-1].contiguous()
    rate = recipe.sampling_rate
    bank_MF = _mel_bank(recipe.n_fft, recipe.n_mels, 0.0, WHISPER_HIGH, rate, "slaney", torch.float32, power_BFT.device)
    log_BMT = torch.clamp(bank_MF @ power_BFT, min=MIN_POWER).log10()
    log_BMT = torch.maximum(log_BMT, log_BMT.amax(dim=(1, 2), keepdim=True) - 8.0)
    return (log_BMT + 4.0) / 4.0


@dataclass(frozen=True, kw_only=True)
class ClapRecipe:
    """The options that a ClapFeatureExtractor uses; lengths are in samples at `sampling_rate`."""

    n_mels: int
    sampling_rate: int  # Hz
    hop_length: int
    n_fft: int
    n_samples: int  # in the model's window, 10 s
    low: float  # Hz
    high: float  # Hz
    truncation: Truncation  # of longer clips
    padding: Padding  # of shorter clips


def clap_windows(wave_N: torch.Tensor, recipe: ClapRecipe) -> list[torch.Tensor]:
    """Return the windows of a clip, [n_samples] each; the vectors of a clip's windows are averaged.

    A clip shorter than a window is padded like the reference. With "rand_trunc", the reference takes a random window
    of a longer one; here it is the fewest evenly spread windows that cover it. With "fusion", a longer clip is whole.
    """
    length, window = len(wave_N), recipe.n_samples
    if length > window:
        starts = even_starts(length, window)
        return [wave_N] if recipe.truncation == "fusion" else [wave_N[start : start + window] for start in starts]
    if recipe.padding == "repeat" and length < window:
        wave_N = wave_N.repeat(window // length + 1)[:window]
    elif recipe.padding == "repeatpad":
        wave_N = wave_N.repeat(window // length)
    return [_pad_end(wave_N, window)]


def clap_log_mel(wave_BN: torch.Tensor, recipe: ClapRecipe) -> torch.Tensor:
    """Return mel spectrograms in decibels, [B, T, M], float32, of waveforms of one length.

    Equal to ClapFeatureExtractor's within 2e-5 dB. Computed in float64 like them: in float32, rounding errors of a loud
    tone's transform reach 0.08 dB near the floor of -100 dB.
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
    """Return ClapModel's inputs for windows from `clap_windows`: features [B, C, T, M] and is_longer [B, 1].

    C is 1, or 4 for "fusion". There a longer clip is the whole spectrogram shrunk to one window, and its first, middle
    and last window (the reference takes a random window of each third). A shorter one is four times the same, and is
    never marked as longer (the reference marks a random one).
    """
    if recipe.truncation == "rand_trunc":
        mel_BTM = clap_log_mel(torch.stack(list(windows)), recipe)
        return mel_BTM[:, None], torch.zeros(len(windows), 1, dtype=torch.bool, device=mel_BTM.device)
    fused = [_fuse(clap_log_mel(window[None], recipe)[0], recipe) for window in windows]
    is_longer = to_device([[longer] for _, longer in fused], windows[0].device)
    return torch.stack([features for features, _ in fused]), is_longer


def _fuse(mel_TM: torch.Tensor, recipe: ClapRecipe) -> tuple[torch.Tensor, bool]:
    chunk = recipe.n_samples // recipe.hop_length + 1
    extra = len(mel_TM) - chunk
    if extra <= 0:
        return mel_TM.expand(4, -1, -1), False
    size = (chunk, recipe.n_mels)
    shrunk = functional.interpolate(mel_TM[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    return torch.stack([shrunk, *(mel_TM[start : start + chunk] for start in (0, (extra + 1) // 2, extra))]), True


AST_RATE, AST_FRAME, AST_HOP, AST_FFT = 16000, 400, 160, 512  # Hz, then samples: constants of the reference
AST_LOW, AST_FLOOR = 20.0, 1.192092955078125e-07  # Hz, and the smallest power (float32's epsilon)
AST_PREEMPHASIS = 0.97


@dataclass(frozen=True, kw_only=True)
class AstRecipe:
    """The options of an ASTFeatureExtractor."""

    n_mels: int
    n_frames: int  # in the model's window: 1024 of 10 ms
    mean: float  # of log-mels, to subtract
    spread: float  # twice their standard deviation, to divide by

    @property
    def n_samples(self) -> int:
        """The number of samples that fill a window."""
        return (self.n_frames - 1) * AST_HOP + AST_FRAME


def ast_windows(wave_N: torch.Tensor, recipe: AstRecipe) -> list[torch.Tensor]:
    """Return the fewest evenly spread windows that cover a clip; one shorter than a frame (25 ms) is padded to it.

    The reference truncates a clip to one window.
    """
    wave_N = _pad_end(wave_N, max(len(wave_N), AST_FRAME))
    return [wave_N[start : start + recipe.n_samples] for start in even_starts(len(wave_N), recipe.n_samples)]


def ast_log_mel(windows: Sequence[torch.Tensor], recipe: AstRecipe) -> torch.Tensor:
    """Return log-mel features [B, T, M], float32, of windows from `ast_windows`; padding is zero before normalisation.

    Equal within 1e-5 to ASTFeatureExtractor without torchaudio; computed in float64 like it. The features are Kaldi's
    fbank: each frame minus its mean, pre-emphasised, under a Hann window.
    """
    wave_BN = torch.stack([_pad_end(window, recipe.n_samples) for window in windows]).double()
    frames_BTK = wave_BN.unfold(-1, AST_FRAME, AST_HOP)
    frames_BTK = frames_BTK - frames_BTK.mean(-1, keepdim=True)
    before_BTK = torch.cat([frames_BTK[..., :1], frames_BTK[..., :-1]], dim=-1)
    hann_K = torch.hann_window(AST_FRAME, periodic=False, dtype=wave_BN.dtype, device=wave_BN.device)
    spectrum_BTF = torch.fft.rfft((frames_BTK - AST_PREEMPHASIS * before_BTK) * hann_K, n=AST_FFT)
    mel_BTM = (spectrum_BTF.abs() ** 2) @ _kaldi_bank(recipe.n_mels, wave_BN.device)
    log_BTM = torch.clamp(mel_BTM, min=AST_FLOOR).log().float()
    counts = to_device([1 + (len(window) - AST_FRAME) // AST_HOP for window in windows], wave_BN.device)
    beyond_BT = torch.arange(recipe.n_frames, device=wave_BN.device) >= counts[:, None]
    return (log_BTM.masked_fill(beyond_BT[..., None], 0.0) - recipe.mean) / recipe.spread


@functools.lru_cache(maxsize=4)
def _kaldi_bank(n_mels: int, device: torch.device) -> torch.Tensor:
    """Return the filter bank [F, M] in float64."""
    with torch.inference_mode(False):
        bank_FM = kaldi_filter_bank(AST_FFT // 2 + 1, n_mels, AST_LOW, AST_RATE / 2, AST_RATE)
        return torch.from_numpy(bank_FM).to(device)


GEMMA_SECONDS = 30  # the reference's window, which checkpoints do not record


@dataclass(frozen=True, kw_only=True)
class GemmaRecipe:
    """The options of a Gemma4AudioFeatureExtractor; lengths are in samples at `sampling_rate`."""

    n_mels: int
    sampling_rate: int  # Hz
    frame_length: int
    hop_length: int
    n_fft: int
    low: float  # Hz
    high: float  # Hz
    floor: float  # added to the magnitudes
    gain: float  # factor of the waveform

    def frames(self, samples: int) -> int:
        """Return how many frames lie within `samples` samples; the first begins half a frame before them."""
        return (samples - self.frame_length // 2 - 1) // self.hop_length + 1


def gemma_windows(wave_N: torch.Tensor, recipe: GemmaRecipe) -> list[torch.Tensor]:
    """Return the fewest evenly spread windows of 30 s that cover a clip; one shorter than a frame is padded to it.

    The reference truncates a clip to one window.
    """
    wave_N = _pad_end(wave_N, max(len(wave_N), recipe.frame_length // 2 + 1))
    window = GEMMA_SECONDS * recipe.sampling_rate
    return [wave_N[start : start + window] for start in even_starts(len(wave_N), window)]


def gemma_log_mel(windows: Sequence[torch.Tensor], recipe: GemmaRecipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-mel features [B, T, M], float32, zero for padding, and their mask [B, T].

    Equal to Gemma4AudioFeatureExtractor's within 0.01: the error, near the floor, of its float32 transform of a loud
    tone, which is in float64 here.
    """
    longest = max(map(len, windows))
    wave_BN = torch.stack([_pad_end(window, longest) for window in windows]).double() * recipe.gain
    padded_BN = functional.pad(wave_BN, (recipe.frame_length // 2, 0))
    hann_K = torch.hann_window(recipe.frame_length, dtype=wave_BN.dtype, device=wave_BN.device)
    frames_BTK = padded_BN.unfold(-1, recipe.frame_length, recipe.hop_length)[:, : recipe.frames(longest)]
    magnitude_BTF = torch.fft.rfft(frames_BTK * hann_K, n=recipe.n_fft).abs()
    options = (recipe.n_fft, recipe.n_mels, recipe.low, recipe.high, recipe.sampling_rate)
    bank_MF = _mel_bank(*options, "htk", torch.float64, wave_BN.device)
    log_BTM = (magnitude_BTF @ bank_MF.T + recipe.floor).log().float()
    counts = to_device([recipe.frames(len(window)) for window in windows], wave_BN.device)
    mask_BT = torch.arange(log_BTM.shape[1], device=wave_BN.device) < counts[:, None]
    return log_BTM * mask_BT[..., None], mask_BT


def _pad_end(wave_N: torch.Tensor, length: int) -> torch.Tensor:
    return functional.pad(wave_N, (0, length - len(wave_N)))
