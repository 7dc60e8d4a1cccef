"""Audio kernels: resampling, spectrograms and mel filters, batched, on any device.

Pure functions of float tensors: no I/O, and no state but cached constants. The features of each family of models are in
log_mel.py; decoding is in decode/.

Shapes: B batch, N samples of a waveform, F frequency bins, T frames, K taps of a filter.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from mmbeam.errors import DecodeError, LimitError
from mmbeam.ops.transfer import Uploaded, upload_arrays
from mmbeam.types import Waveform

MelScale = Literal["htk", "slaney"]

# The sinc filter: 64 zero crossings on each side, cut off at 0.948 of the lower Nyquist frequency, and a Kaiser window
# of 130 dB (the values that resampy and torchaudio call "kaiser_best").
ZERO_CROSSINGS = 64
ROLLOFF = 0.9475937167399596
KAISER_BETA = 14.769656459379492
MAX_SAMPLING_RATE = 1_000_000  # Hz; a header that claims more would need a filter of unbounded length
MAX_KERNEL = 1 << 20  # elements (4 MB) of a cached resampling matrix; unusual pairs of rates need more
MAX_CHUNK = 1 << 22  # elements (16 MB) of a temporary


def resample(wave_BN: torch.Tensor, source_rate: int, target_rate: int) -> torch.Tensor:
    """Resample float waveforms to float32 at `target_rate` Hz, [B, round(N * target_rate / source_rate)].

    Band-limited interpolation by a Kaiser-windowed sinc (Smith, "Digital Audio Resampling"), as one matrix product: the
    filter is the same in every block of source_rate / gcd samples. Not a convolution, because cuDNN computes float32
    convolutions in TF32 by default, three digits less precise than needed. Samples outside the waveform count as zero.
    Raises LimitError for rates out of range.
    """
    if not (0 < source_rate <= MAX_SAMPLING_RATE and 0 < target_rate <= MAX_SAMPLING_RATE):
        raise LimitError(
            f"resampling from {source_rate} Hz to {target_rate} Hz: expected rates from 1 to {MAX_SAMPLING_RATE} Hz"
        )
    wave_BN = wave_BN.float()
    if source_rate == target_rate:
        return wave_BN
    divisor = math.gcd(source_rate, target_rate)
    source, target = source_rate // divisor, target_rate // divisor
    length = max(1, (2 * wave_BN.shape[-1] * target + source) // (2 * source))
    if target * (source + 2 * _reach(source, target)) > MAX_KERNEL:
        return _resample_directly(wave_BN, source, target, length)
    return _resample_in_blocks(wave_BN, source, target, length)


def _resample_in_blocks(wave_BN: torch.Tensor, source: int, target: int, length: int) -> torch.Tensor:
    repeats = max(1, 128 // max(source, target))  # small ratios: several periods per block, for a larger product
    source, target = source * repeats, target * repeats
    kernel_KL = _resampling_kernel(source, target, wave_BN.device)
    reach = _reach(source, target)
    blocks = -(-length // target)
    padded = functional.pad(wave_BN, (reach, max(0, blocks * source + reach - wave_BN.shape[-1])))
    frames_BXK = padded.unfold(-1, len(kernel_KL), source)[:, :blocks]
    step = max(
        1, MAX_CHUNK // (len(kernel_KL) * len(wave_BN))
    )  # blocks overlap, so unfolding all of them would be a large copy
    pieces = [frames_BXK[:, first : first + step] @ kernel_KL for first in range(0, blocks, step)]
    return torch.cat(pieces, dim=1).flatten(1)[:, :length]


def _resample_directly(wave_BN: torch.Tensor, source: int, target: int, length: int) -> torch.Tensor:
    """Apply the same filter, computed for each output sample: slow, for pairs of rates without a small ratio."""
    reach = _reach(source, target)
    taps = torch.arange(-reach, reach + 1, device=wave_BN.device)
    around_BNK = functional.pad(wave_BN, (reach, reach + 1)).unfold(-1, len(taps), 1)
    pieces = []
    step = max(1, MAX_CHUNK // (len(taps) * len(wave_BN)))
    for first in range(0, length, step):
        positions = (
            torch.arange(first, min(first + step, length), device=wave_BN.device) * source
        )  # in 1/target samples
        weights = _sinc(taps - (positions % target).double()[:, None] / target, source, target).float()
        pieces.append((around_BNK[:, positions // target] * weights).sum(-1))
    return torch.cat(pieces, dim=-1)


def _cutoff(source: int, target: int) -> float:
    return min(1.0, target / source) * ROLLOFF  # as a fraction of the source's Nyquist frequency


def _reach(source: int, target: int) -> int:
    return math.ceil(ZERO_CROSSINGS / _cutoff(source, target))  # half the filter's length, in source samples


def _sinc(offset: torch.Tensor, source: int, target: int) -> torch.Tensor:
    """Return the filter's weight for a source sample at a distance of `offset` source samples (float64)."""
    cutoff = _cutoff(source, target)
    crossings = (offset * cutoff).clamp(-ZERO_CROSSINGS, ZERO_CROSSINGS)
    shape: torch.Tensor = torch.special.i0(KAISER_BETA * torch.sqrt(1 - (crossings / ZERO_CROSSINGS) ** 2))
    return cutoff * torch.sinc(crossings) * shape / float(np.i0(KAISER_BETA))


@functools.lru_cache(maxsize=16)
def _resampling_kernel(source: int, target: int, device: torch.device) -> torch.Tensor:
    """Return the weight of each input of a block in each of its outputs, [source + 2 * reach, target]."""
    with torch.inference_mode(False):  # a cached tensor made in inference mode cannot be used outside it
        outputs = torch.arange(target, dtype=torch.float64) * (source / target)
        reach = _reach(source, target)
        inputs = torch.arange(-reach, source + reach, dtype=torch.float64)
        return _sinc(inputs[:, None] - outputs, source, target).float().to(device)


def to_rate(
    waves: Sequence[Waveform], rates: Sequence[int], target_rate: int, device: torch.device
) -> list[torch.Tensor]:
    """Return decoded clips on the device at one rate, float32 [frames] each. Raises DecodeError if one is empty."""
    groups: dict[tuple[int, int], list[int]] = {}
    for position, (wave, rate) in enumerate(zip(waves, rates, strict=True)):
        if len(wave) == 0:
            raise DecodeError("the audio has no samples; expected at least one")
        groups.setdefault((rate, len(wave)), []).append(position)
    resampled: dict[int, torch.Tensor] = {}
    if device.type != "cpu" and not isinstance(waves, Uploaded):
        waves = upload_waves(waves, rates, device)
    for (rate, length), positions in groups.items():
        first = waves[positions[0]]
        if isinstance(waves, Uploaded):
            start = waves.starts[positions[0]]
            wave_BN = waves.flat[start : start + len(positions) * length].view(len(positions), length)
        else:
            is_alone = len(positions) == 1 and first.flags.writeable  # then without a copy, which may be large
            stacked = first[None] if is_alone else np.stack([waves[position] for position in positions])
            wave_BN = torch.from_numpy(stacked)
        resampled.update(zip(positions, resample(wave_BN, rate, target_rate), strict=True))
    return [resampled[position] for position in range(len(waves))]


def upload_waves(waves: Sequence[Waveform], rates: Sequence[int], device: torch.device) -> Uploaded[Waveform]:
    """Copy clips of any lengths to the device, clips of one rate and length next to each other."""
    return upload_arrays(waves, device, [(rate, len(wave)) for wave, rate in zip(waves, rates, strict=True)])


def even_starts(length: int, window: int) -> list[int]:
    """Return the starts of the fewest windows that cover `length` samples, evenly spread, the last one at the end."""
    count = max(1, -(-length // window))
    return [index * (length - window) // (count - 1) for index in range(count)] if count > 1 else [0]


@dataclass(frozen=True, kw_only=True)
class WaveRecipe:
    """The options of a Wav2Vec2FeatureExtractor, for models whose input is the waveform itself."""

    sampling_rate: int  # Hz
    normalize: bool  # each clip to mean 0 and variance 1


def standardize(wave_N: torch.Tensor) -> torch.Tensor:
    """Return the clip with mean 0 and variance 1, equal to Wav2Vec2FeatureExtractor's within 1e-5."""
    variance, mean = torch.var_mean(wave_N, correction=0)
    return (wave_N - mean) / torch.sqrt(variance + 1e-7)


def power_spectrogram(wave_BN: torch.Tensor, n_fft: int, hop_length: int, center: bool = True) -> torch.Tensor:
    """Return |STFT|^2 under a periodic Hann window, [B, n_fft // 2 + 1, T], in the waveform's precision.

    `center` pads both ends by reflection, so that frame t is centred on sample t * hop_length.
    """
    window = torch.hann_window(n_fft, dtype=wave_BN.dtype, device=wave_BN.device)
    spectrum = torch.stft(wave_BN, n_fft, hop_length, window=window, center=center, return_complex=True)
    return spectrum.abs() ** 2


def mel_filter_bank(
    n_bins: int, n_mels: int, low: float, high: float, sampling_rate: int, scale: MelScale, slaney_norm: bool
) -> npt.NDArray[np.float64]:
    """Return triangular filters [n_bins, n_mels], evenly spaced in mels from `low` to `high` Hz.

    Equals transformers.audio_utils.mel_filter_bank, which follows librosa and torchaudio. `slaney_norm` gives all
    filters the same area, not the same height.
    """
    edges = _from_mels(np.linspace(_to_mels(low, scale), _to_mels(high, scale), n_mels + 2), scale)
    bank = _triangles(np.linspace(0, sampling_rate // 2, n_bins), edges)
    if slaney_norm:
        bank *= 2.0 / (edges[2:] - edges[:-2])
    return bank


def kaldi_filter_bank(n_bins: int, n_mels: int, low: float, high: float, sampling_rate: int) -> npt.NDArray[np.float64]:
    """Return Kaldi's filters [n_bins, n_mels], triangular on the mel scale.

    Equals transformers' mel_filter_bank with mel_scale="kaldi" and triangularize_in_mel_space.
    """
    bins = sampling_rate / (2 * (n_bins - 1)) * np.arange(n_bins)
    mels, start, end = (1127.0 * np.log(1.0 + hertz / 700.0) for hertz in (bins, np.float64(low), np.float64(high)))
    return _triangles(mels, np.linspace(start, end, n_mels + 2))


def _triangles(points: npt.NDArray[np.float64], edges: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return filters [points, edges - 2] that rise from one edge to the next and fall to the one after."""
    slopes = edges - points[:, None]
    widths = np.diff(edges)
    triangles = np.maximum(0.0, np.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]))
    return cast(npt.NDArray[np.float64], triangles)


# Slaney's scale is linear (15 mels for the first 1000 Hz), then logarithmic (27 mels for a factor of 6.4).
def _to_mels(hertz: float, scale: MelScale) -> float:
    if scale == "htk":
        return float(2595.0 * np.log10(1.0 + hertz / 700.0))
    return 3.0 * hertz / 200.0 if hertz < 1000.0 else float(15.0 + np.log(hertz / 1000.0) * (27.0 / np.log(6.4)))


def _from_mels(mels: npt.NDArray[np.float64], scale: MelScale) -> npt.NDArray[np.float64]:
    if scale == "htk":
        return 700.0 * (np.power(10, mels / 2595.0) - 1.0)
    return np.where(mels < 15.0, 200.0 * mels / 3.0, 1000.0 * np.exp(np.log(6.4) / 27.0 * (mels - 15.0)))
