"""The audio kernels against scipy, soxr and the feature extractors of transformers."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.signal
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_audio_text import clap_extractor, noise, tone
from transformers import ClapFeatureExtractor, WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank as reference_bank

from mmbeam.errors import DecodeError, LimitError
from mmbeam.ops import audio
from mmbeam.ops.log_mel import (
    ClapRecipe,
    WhisperRecipe,
    clap_features,
    clap_log_mel,
    clap_windows,
    whisper_log_mel,
    whisper_windows,
)

CPU = torch.device("cpu")
PAIRS = [(44100, 16000), (48000, 16000), (44100, 48000), (16000, 48000), (22050, 16000), (8000, 48000), (44056, 48000)]
WHISPER = WhisperRecipe(n_mels=80, sampling_rate=16000, hop_length=160, n_fft=400, n_samples=480000)


def clap_recipe_of(extractor: ClapFeatureExtractor) -> ClapRecipe:
    return ClapRecipe(
        n_mels=extractor.feature_size,
        sampling_rate=extractor.sampling_rate,
        hop_length=extractor.hop_length,
        n_fft=extractor.fft_window_size,
        n_samples=extractor.nb_max_samples,
        low=extractor.frequency_min,
        high=extractor.frequency_max,
        truncation=extractor.truncation,
        padding=extractor.padding,
    )


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_resampled_tones_equal_generated_tones(source: int, target: int, device: torch.device) -> None:
    made = audio.resample(torch.from_numpy(tone(source, 0.5)).to(device)[None], source, target)[0].cpu().numpy()
    middle = slice(target // 10, -target // 10)  # not the ends, beyond which there is silence
    assert np.abs(made - tone(target, 0.5))[middle].max() < 2e-6
    by_soxr = soxr.resample(tone(source, 0.5), source, target)
    assert made.shape == by_soxr.shape
    assert np.abs(made - by_soxr)[middle].max() < 2e-6


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_resampled_noise_equals_soxr_up_to_the_transition_band(source: int, target: int, device: torch.device) -> None:
    wave = noise(source, 0.5)
    band = scipy.signal.butter(12, 0.4 * min(source, target), fs=source, output="sos")  # 80 % of the lower Nyquist
    wave = scipy.signal.sosfilt(band, wave).astype(np.float32)
    made = audio.resample(torch.from_numpy(wave).to(device)[None], source, target)[0].cpu().numpy()
    by_soxr = soxr.resample(wave, source, target, quality="VHQ")
    assert np.abs(made - by_soxr).max() < 5e-3
    assert np.abs(made - by_soxr).mean() < 5e-4


def test_both_ways_of_resampling_agree(device: torch.device) -> None:
    wave = torch.from_numpy(np.stack([noise(44100, 0.2), tone(44100, 0.2)])).to(device)
    blocks = audio.resample(wave, 44100, 16000)
    direct = audio._resample_directly(wave, 441, 160, blocks.shape[1])
    assert torch.allclose(blocks, direct, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 3000), source=st.sampled_from([8000, 11025, 16000, 44100, 48000, 96000]),
    target=st.sampled_from([16000, 24000, 48000]),
)  # fmt: skip
def test_resampling_is_linear_and_has_the_expected_length(length: int, source: int, target: int) -> None:
    waves = torch.from_numpy(np.random.default_rng(length).standard_normal((2, length)).astype(np.float32))
    both = audio.resample(waves, source, target)
    assert both.shape == (2, max(1, int(length * target / source + 0.5)))
    total = audio.resample(waves.sum(0, keepdim=True), source, target)[0]
    assert torch.allclose(both.sum(0), total, atol=1e-5)
    longer = audio.resample(torch.nn.functional.pad(waves, (0, 500)), source, target)  # samples outside count as zero
    assert torch.allclose(longer[:, : both.shape[1]], both, atol=1e-5)


def test_rates_out_of_range_are_an_error() -> None:
    for rate in (0, -1, 4_000_000_000):
        with pytest.raises(LimitError, match=str(rate)):
            audio.resample(torch.zeros(1, 100), rate, 16000)


def test_to_rate_keeps_the_order(device: torch.device) -> None:
    waves = [noise(48000, 0.1), noise(16000, 0.1, 1), noise(48000, 0.1, 2), noise(8000, 0.05, 3)]
    waves[0].flags.writeable = False  # like an array of np.frombuffer
    rates = [48000, 16000, 48000, 8000]
    made = audio.to_rate(waves, rates, 16000, device)
    for resampled, wave, rate in zip(made, waves, rates, strict=True):
        alone = audio.resample(torch.tensor(wave, device=device)[None], rate, 16000)[0]
        assert torch.allclose(resampled, alone, atol=1e-6)
    with pytest.raises(DecodeError, match="no samples"):
        audio.to_rate([np.zeros(0, np.float32)], [16000], 16000, device)


def test_constants_cached_in_inference_mode_work_with_autograd() -> None:
    audio._resampling_kernel.cache_clear()
    with torch.inference_mode():
        audio.resample(torch.zeros(1, 100), 44100, 16000)
    wave = torch.ones(1, 100, requires_grad=True)
    audio.resample(wave, 44100, 16000).sum().backward()
    assert wave.grad is not None


@pytest.mark.parametrize("scale", ["htk", "slaney"])
@pytest.mark.parametrize("norm", [None, "slaney"])
def test_mel_filters_equal_the_reference(scale: audio.MelScale, norm: str | None) -> None:
    for bins, mels, low, high, rate in [(201, 80, 0.0, 8000.0, 16000), (513, 64, 50.0, 14000.0, 48000)]:
        ours = audio.mel_filter_bank(bins, mels, low, high, rate, scale, slaney_norm=norm is not None)
        assert np.abs(ours - reference_bank(bins, mels, low, high, rate, norm, scale)).max() < 1e-12


def test_power_spectrogram_equals_scipy(device: torch.device) -> None:
    wave = noise(16000, 0.5)
    ours = audio.power_spectrogram(torch.from_numpy(wave).to(device)[None].double(), 400, 160)[0].cpu().numpy()
    padded = np.pad(wave.astype(np.float64), 200, mode="reflect")
    window = scipy.signal.get_window("hann", 400)
    frames = np.stack([padded[start : start + 400] * window for start in range(0, len(padded) - 399, 160)])
    assert np.allclose(ours, np.abs(np.fft.rfft(frames)).T ** 2, atol=1e-9)


@given(length=st.integers(1, 5000), window=st.integers(1, 700))
def test_even_starts_cover_all_samples(length: int, window: int) -> None:
    starts = audio.even_starts(length, window)
    covered = {sample for start in starts for sample in range(start, start + window)}
    assert set(range(length)) <= covered
    assert len(starts) == max(1, -(-length // window))
    assert length < window or starts[-1] + window == length


WHISPER_SOUNDS: dict[str, Callable[[], np.ndarray]] = {
    "silence": lambda: np.zeros(16000, np.float32),
    "10 samples": lambda: tone(16000, 10 / 16000),
    "noise": lambda: noise(16000, 3.3),
    "whole window": lambda: tone(16000, 30) + noise(16000, 30),
}


@pytest.mark.parametrize("sound", WHISPER_SOUNDS)
def test_whisper_features_equal_the_reference_bit_for_bit(sound: str, device: torch.device) -> None:
    wave = WHISPER_SOUNDS[sound]()
    reference = WhisperFeatureExtractor()(wave, sampling_rate=16000, return_tensors="pt").input_features
    windows = whisper_windows(torch.from_numpy(wave).to(device), WHISPER)
    assert len(windows) == 1
    ours = whisper_log_mel(torch.stack(windows), WHISPER).cpu()
    if device.type == "cpu":
        assert torch.equal(ours, reference)
    else:
        assert torch.allclose(ours, reference, atol=2e-4)


def test_whisper_features_of_a_long_sound_are_those_of_its_windows(device: torch.device) -> None:
    wave = noise(16000, 65) * np.linspace(0.1, 1, 65 * 16000, dtype=np.float32)
    pieces = [wave[start : start + 480000] for start in range(0, len(wave), 480000)]
    reference = WhisperFeatureExtractor()(pieces, sampling_rate=16000, return_tensors="pt").input_features
    windows = whisper_windows(torch.from_numpy(wave).to(device), WHISPER)
    assert torch.allclose(whisper_log_mel(torch.stack(windows), WHISPER).cpu(), reference, atol=2e-4)


@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize("seconds", [10 / 48000, 1.7, 5.0, 9.99, 10.0])
def test_clap_features_equal_the_reference(seconds: float, fusion: bool, padding: str, device: torch.device) -> None:
    extractor = clap_extractor(fusion, padding=padding)
    wave = 0.9 * tone(48000, seconds) + noise(48000, seconds)
    reference = extractor(wave, sampling_rate=48000, return_tensors="pt").input_features
    recipe = clap_recipe_of(extractor)
    ours, is_longer = clap_features(clap_windows(torch.from_numpy(wave).to(device), recipe), recipe)
    assert torch.allclose(ours.cpu(), reference, atol=2e-5)  # decibels
    assert not is_longer.any()


@pytest.mark.parametrize("hertz", [(440.0,), (50.0, 12000.0)])
def test_clap_features_of_loud_pure_tones_and_of_silence(hertz: tuple[float, ...], device: torch.device) -> None:
    """In float32, errors would reach 0.08 dB near the floor."""
    extractor = clap_extractor(False)
    waves = np.stack([tone(48000, 10, hertz), np.zeros(480000, np.float32)])
    reference = extractor(list(waves), sampling_rate=48000, return_tensors="pt").input_features
    ours = clap_log_mel(torch.from_numpy(waves).to(device), clap_recipe_of(extractor))[:, None].cpu()
    assert torch.allclose(ours, reference, atol=1e-4)


def test_clap_fusion_of_a_long_sound_is_a_possible_draw_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    extractor = clap_extractor(True)
    wave = noise(48000, 23.456)
    draws = iter([0, 0.5, 1])  # of each third: its first, its middle, its last window
    monkeypatch.setattr(np.random, "choice", lambda third: third[min(int(next(draws) * len(third)), len(third) - 1)])
    reference = extractor(wave, sampling_rate=48000, return_tensors="pt")
    recipe = clap_recipe_of(extractor)
    ours, is_longer = clap_features(clap_windows(torch.from_numpy(wave).to(device), recipe), recipe)
    assert is_longer.tolist() == reference.is_longer.tolist() == [[True]]
    assert torch.allclose(ours.cpu(), reference.input_features, atol=1e-4)


def test_clap_fusion_of_a_sound_barely_longer_than_a_window_is_short(device: torch.device) -> None:
    extractor = clap_extractor(True)
    wave = noise(48000, 10.005)  # longer than the window by less than a hop: the same number of frames
    reference = extractor([wave, noise(48000, 12)], sampling_rate=48000, return_tensors="pt")
    recipe = clap_recipe_of(extractor)
    ours, is_longer = clap_features(clap_windows(torch.from_numpy(wave).to(device), recipe), recipe)
    assert is_longer.tolist() == reference.is_longer[:1].tolist() == [[False]]
    assert torch.allclose(ours[0].cpu(), reference.input_features[0], atol=2e-5)


def test_clap_windows_of_a_long_sound_are_possible_draws_of_the_reference(device: torch.device) -> None:
    recipe = clap_recipe_of(clap_extractor(False))
    wave = torch.arange(25 * 48000, device=device)
    windows = clap_windows(wave, recipe)
    assert [int(window[0]) for window in windows] == [0, 360000, 720000]
    assert all(len(window) == 480000 for window in windows)


def test_a_spectrogram_computed_in_blocks_equals_the_whole(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    recipe = clap_recipe_of(clap_extractor(True))
    waves = torch.from_numpy(np.stack([noise(48000, 12), tone(48000, 12)])).to(device)
    whole = clap_log_mel(waves, recipe)
    monkeypatch.setattr("mmbeam.ops.log_mel.BLOCK_FRAMES", 100)
    assert torch.allclose(clap_log_mel(waves, recipe), whole, atol=1e-4)
