"""Gemma 4: pictures and sounds in a chat's prompt, both prepared on the device. Video is not here.

A sound longer than 30 s, which the reference cuts, is several in the prompt, one after the other.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma4ForConditionalGeneration

from mmbeam.models.generators.chat import ChatGenerator
from mmbeam.models.generators.prompts import Medium
from mmbeam.models.generators.sounds import lengths_of, windows_of
from mmbeam.models.loading import read_config
from mmbeam.models.recipes import read_gemma_recipe, read_pooled_recipe
from mmbeam.ops.image import PooledPatching, patch_positions, pooled_size, preprocess_patches
from mmbeam.ops.log_mel import GEMMA_SECONDS, gemma_log_mel
from mmbeam.prompts.ask import GeneratorSpec, Request
from mmbeam.types import Modality

IMAGE, BEGIN_IMAGE, END_IMAGE = "<|image|>", "<|image>", "<image|>"
AUDIO, BEGIN_AUDIO, END_AUDIO = "<|audio|>", "<|audio>", "<audio|>"
SUBSAMPLING = 4  # frames of sound to one token: two convolutions of stride 2


class Gemma4Generator(ChatGenerator):
    """Texts of a Gemma4ForConditionalGeneration, with an audio tower or without."""

    model_types = ("gemma4",)
    model_class = Gemma4ForConditionalGeneration
    modalities = ("image", "audio", "text")
    held_back = (IMAGE, BEGIN_IMAGE, END_IMAGE, AUDIO, BEGIN_AUDIO, END_AUDIO)
    type_ids = "mm_token_type_ids"

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        directory = Path(spec.directory)
        self.pictures = read_pooled_recipe(directory, model.config.vision_config)
        self.sounds = read_gemma_recipe(directory) if "audio" in spec.modalities else None

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        parsed = read_config(directory)
        side = read_pooled_recipe(directory, parsed.vision_config).shorter_side
        if parsed.audio_config is None:
            without: tuple[Modality, ...] = ("image", "text")
            return cls.spec_of(directory, modalities=without, image_side=side)
        rate = read_gemma_recipe(directory).sampling_rate
        return cls.spec_of(directory, image_side=side, sampling_rate=rate)

    def kinds(self) -> dict[int, int]:
        return {self.model.config.image_token_id: 1, self.model.config.audio_token_id: 3}

    def media(self, request: Request) -> list[Medium]:
        found = []
        if request.image is not None:
            tokens = f"{BEGIN_IMAGE}{IMAGE * self._picture_tokens(*request.image.shape[:2])}{END_IMAGE}"
            found.append(Medium("image", IMAGE, tokens))
        for count in self._sound_tokens(request):
            found.append(Medium("audio", AUDIO, f"{BEGIN_AUDIO}{AUDIO * count}{END_AUDIO}"))
        return found

    def _picture_tokens(self, height: int, width: int) -> int:
        patching = self.pictures.size
        assert isinstance(patching, PooledPatching)
        down, across = pooled_size(height, width, patching)
        return (down // patching.patch_size) * (across // patching.patch_size) // patching.pooling**2

    def _sound_tokens(self, request: Request) -> list[int]:
        if self.sounds is None:
            return []
        lengths = lengths_of(request, *self._window())
        return [-(-self.sounds.frames(length) // SUBSAMPLING) for length in lengths]

    def _window(self) -> tuple[int, int, int]:
        """Rate in Hz, and samples of a window, at most and at least: one frame."""
        assert self.sounds is not None
        rate = self.sounds.sampling_rate
        return rate, GEMMA_SECONDS * rate, self.sounds.frame_length // 2 + 1

    def tensors(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        images = [request.image for request in requests if request.image is not None]
        if images:
            patches = preprocess_patches(images, self.pictures, self.device, self.dtype)
            tensors |= {"pixel_values": patches.pixels_BND, "image_position_ids": patch_positions(patches)}
        windows = [] if self.sounds is None else windows_of(requests, *self._window(), self.device)
        if self.sounds is not None and windows:
            mel_BTM, mask_BT = gemma_log_mel(windows, self.sounds)
            tensors |= {"input_features": mel_BTM.to(self.dtype), "input_features_mask": mask_BT}
        return tensors
