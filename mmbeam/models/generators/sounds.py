"""Sounds as the generators' audio towers take them: windows of a fixed length, one after the other, nothing cut off.

How many there are, and how long, is known of a sound before it is resampled: prompts are laid out by that.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional

from mmbeam.models.recipes import read_whisper_recipe
from mmbeam.ops.audio import to_rate
from mmbeam.ops.log_mel import whisper_log_mel
from mmbeam.prompts.ask import Request

MIN_FRAMES = 7  # of 10 ms: what is shorter is filled up with silence, or it would be no token at all


def lengths_of(request: Request, rate: int, window: int, least: int) -> list[int]:
    """Samples at `rate` Hz of each of a request's windows of at most `window`, each at least `least` long."""
    if request.audio is None:
        return []
    wave, source = request.audio
    total = max(1, math.floor(len(wave) * rate / source + 0.5))  # as ops/audio.py resamples
    return [max(least, min(window, total - start)) for start in range(0, total, window)]


def windows_of(
    requests: Sequence[Request], rate: int, window: int, least: int, device: torch.device
) -> list[torch.Tensor]:
    """All windows of all requests, in order, with the lengths that `lengths_of` says."""
    heard = [request.audio for request in requests if request.audio is not None]
    sounds = to_rate([wave for wave, _ in heard], [source for _, source in heard], rate, device)
    pieces = [piece for sound in sounds for piece in torch.split(sound, window)]
    return [functional.pad(piece, (0, max(0, least - len(piece)))) for piece in pieces]


class MelReader:
    """Windows and their log-mel features as a WhisperFeatureExtractor makes them."""

    def __init__(self, directory: Path) -> None:
        """Raises ModelError if the extractor's file is missing or of another kind."""
        self.recipe = read_whisper_recipe(directory)
        self.least = MIN_FRAMES * self.recipe.hop_length

    def frames(self, request: Request) -> list[int]:
        """Frames of each of a request's windows that begin within the sound."""
        recipe = self.recipe
        lengths = lengths_of(request, recipe.sampling_rate, recipe.n_samples, self.least)
        return [-(-length // recipe.hop_length) for length in lengths]

    def __call__(
        self, requests: Sequence[Request], device: torch.device, whole: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Features [W, M, T] of all windows, and the mask [W, T] of their frames; None if there is no sound.

        T is the window's, or, unless `whole`, what the longest sound takes.
        """
        recipe = self.recipe
        windows = windows_of(requests, recipe.sampling_rate, recipe.n_samples, self.least, device)
        if not windows:
            return None
        counts = torch.tensor([-(-len(window) // recipe.hop_length) for window in windows], device=device)
        frames = recipe.n_samples // recipe.hop_length if whole else int(counts.max())
        length = min(recipe.n_samples, frames * recipe.hop_length + recipe.n_fft)  # the last frame sees past its end
        filled = torch.stack([functional.pad(window, (0, length - len(window))) for window in windows])
        mel_WMT = whisper_log_mel(filled, recipe)[..., :frames]
        mask_WT = torch.arange(frames, device=device) < counts[:, None]
        return mel_WMT, mask_WT.long()


def tokens_of_frames(frames: int) -> int:
    """What a Qwen audio tower makes of so many frames: a convolution and a pooling of stride 2."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1
