"""Images and audio as generators take them: pixels of one size, and log-mel windows, on the model's device."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from mmbeam.errors import ModelError
from mmbeam.models.recipes import AS_DECODED, read_image_processor, read_image_recipe, read_whisper_recipe
from mmbeam.ops.audio import to_rate
from mmbeam.ops.image import ImageRecipe, preprocess, upload_images
from mmbeam.ops.log_mel import whisper_log_mel
from mmbeam.ops.transfer import to_device
from mmbeam.prompts.ask import Request
from mmbeam.types import ImageHWC

logger = logging.getLogger(__name__)

MIN_FRAMES = 7  # of 10 ms: shorter audio is padded with silence, because it would yield no token


def images_of(requests: Sequence[Request]) -> list[ImageHWC]:
    """Return the images of the requests that have one."""
    return [request.image for request in requests if request.image is not None]


class PixelReader:
    """Preprocessing of images: on the device for plain recipes, else by the checkpoint's processor on the CPU."""

    def __init__(self, directory: Path) -> None:
        """Raises ModelError if the processor's file is missing or broken."""
        self.processor: Any = read_image_processor(directory)
        self.recipe: ImageRecipe | None = None
        self.notes: tuple[str, ...] = ()  # what the summary says of it
        try:
            self.recipe = read_image_recipe(directory)
        except ModelError as error:
            logger.info("images are preprocessed on the CPU: %s", error)
            self.notes = (f"{error}; images are preprocessed by the checkpoint's own processor",)

    @property
    def shorter_side(self) -> int | None:
        """Pixels of the shorter side that preprocessing needs; None: unlimited."""
        return None if self.recipe is None else self.recipe.shorter_side

    def prepare(
        self, images: Sequence[ImageHWC], device: torch.device, dtype: torch.dtype
    ) -> Sequence[ImageHWC] | torch.Tensor:
        """Return images of any sizes, copied to the device; or what the processor makes of them."""
        if self.recipe is not None:
            return images if device.type == "cpu" else upload_images(images, device, self.recipe)
        return to_device(self.processor(images, **AS_DECODED)["pixel_values"].to(dtype), device)

    def __call__(
        self, prepared: Sequence[ImageHWC] | torch.Tensor, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return what `prepare` returned as [B, 3, height, width]."""
        if isinstance(prepared, torch.Tensor):
            return prepared
        assert self.recipe is not None
        return preprocess(prepared, self.recipe, device, dtype)


class AudioWindow(NamedTuple):
    """The consecutive windows that audio is divided into, so that nothing is truncated."""

    rate: int  # Hz
    longest: int  # samples of a window
    shortest: int  # samples that the last window is padded to

    def lengths(self, request: Request) -> list[int]:
        """Return the samples of each of a request's windows, known before the audio is resampled."""
        if request.audio is None:
            return []
        wave, rate = request.audio
        total = max(1, math.floor(len(wave) * self.rate / rate + 0.5))  # as ops/audio.py resamples
        return [max(self.shortest, min(self.longest, total - start)) for start in range(0, total, self.longest)]

    def cut(self, requests: Sequence[Request], device: torch.device) -> list[torch.Tensor]:
        """Return the windows of all requests, in order, float32 [samples] each."""
        audio = [request.audio for request in requests if request.audio is not None]
        waves = to_rate([wave for wave, _ in audio], [rate for _, rate in audio], self.rate, device)
        windows = [window for wave in waves for window in torch.split(wave, self.longest)]
        return [functional.pad(window, (0, max(0, self.shortest - len(window)))) for window in windows]


class MelReader:
    """Windows of audio and their log-mel features, equal to those of a WhisperFeatureExtractor."""

    def __init__(self, directory: Path) -> None:
        """Raises ModelError if the extractor's file is missing or of another kind."""
        self.recipe = read_whisper_recipe(directory)
        shortest = MIN_FRAMES * self.recipe.hop_length
        self.window = AudioWindow(self.recipe.sampling_rate, self.recipe.n_samples, shortest)

    def frames(self, request: Request) -> list[int]:
        """Return the mel frames of each of a request's windows."""
        return [-(-length // self.recipe.hop_length) for length in self.window.lengths(request)]

    def __call__(
        self, requests: Sequence[Request], device: torch.device, is_padded: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return features [W, M, T] of all windows and the mask [W, T] of their frames; None without audio.

        T is the frames of a whole window, or of the longest window present unless `is_padded`.
        """
        recipe = self.recipe
        windows = self.window.cut(requests, device)
        if not windows:
            return None
        lengths = [-(-len(window) // recipe.hop_length) for window in windows]
        counts = to_device(lengths, device)
        frames = recipe.n_samples // recipe.hop_length if is_padded else max(lengths)
        # The last frame's Fourier window reaches past the frame's end.
        length = min(recipe.n_samples, frames * recipe.hop_length + recipe.n_fft)
        padded = torch.stack([functional.pad(window, (0, length - len(window))) for window in windows])
        mel_WMT = whisper_log_mel(padded, recipe)[..., :frames]
        mask_WT = torch.arange(frames, device=device) < counts[:, None]
        return mel_WMT, mask_WT.long()
