"""Gemma 3 and Gemma 4: images, and audio of Gemma 4, in a chat's prompt.

Gemma 3 takes an image as 256 tokens. Gemma 4 takes images at their own aspect ratio, and audio in windows of 30 s,
where the reference truncates it. Pan and scan (crops besides the whole image) and video are not implemented.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3ForConditionalGeneration, Gemma4ForConditionalGeneration

from mmbeam.errors import ModelError
from mmbeam.models.generators.media import AudioWindow, images_of
from mmbeam.models.generators.pretrained import ChatGenerator
from mmbeam.models.generators.prompts import Medium, Placeholder
from mmbeam.models.loading import read_config
from mmbeam.models.recipes import AS_DECODED, read_gemma_recipe, read_image_processor, read_pooled_recipe
from mmbeam.ops.image import PooledPatching, patch_positions, pooled_size, preprocess_patches
from mmbeam.ops.log_mel import GEMMA_SECONDS, gemma_log_mel
from mmbeam.ops.transfer import to_device
from mmbeam.prompts.ask import GeneratorSpec, Request

IMAGE_3, BEGIN_IMAGE_3, END_IMAGE_3 = "<image_soft_token>", "<start_of_image>", "<end_of_image>"
IMAGE_4, BEGIN_IMAGE_4, END_IMAGE_4 = "<|image|>", "<|image>", "<image|>"
AUDIO_4, BEGIN_AUDIO_4, END_AUDIO_4 = "<|audio|>", "<|audio>", "<audio|>"
SUBSAMPLING = 4  # mel frames per audio token: two convolutions of stride 2


class Gemma3Generator(ChatGenerator):
    """Texts of a Gemma3ForConditionalGeneration."""

    model_types = ("gemma3",)
    model_class = Gemma3ForConditionalGeneration
    modalities = ("image", "text")
    reserved = (IMAGE_3, BEGIN_IMAGE_3, END_IMAGE_3)
    placeholders = (Placeholder("image", BEGIN_IMAGE_3),)
    type_ids = "token_type_ids"

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.processor = read_image_processor(Path(spec.directory))

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration and processor files. Raises ModelError if they enable pan and scan."""
        if read_image_processor(directory).do_pan_and_scan:
            raise ModelError(f"{directory}: unsupported image processor option do_pan_and_scan")
        return cls.make_spec(directory)

    def token_types(self) -> dict[int, int]:
        """Return the kind of image tokens."""
        return {self.model.config.image_token_id: 1}

    def media(self, request: Request) -> list[Medium]:
        """Return the request's image."""
        if request.image is None:
            return []
        tokens = IMAGE_3 * self.model.config.mm_tokens_per_image
        return [Medium("image", f"\n\n{BEGIN_IMAGE_3}{tokens}{END_IMAGE_3}\n\n")]

    def processed(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        """Return the images' pixels."""
        images = images_of(requests)
        if not images:
            return {}
        pixels = self.processor(images, **AS_DECODED)["pixel_values"]
        return {"pixel_values": to_device(pixels.to(self.dtype), self.device)}


class Gemma4Generator(ChatGenerator):
    """Texts of a Gemma4ForConditionalGeneration, with or without an audio tower."""

    model_types = ("gemma4",)
    model_class = Gemma4ForConditionalGeneration
    modalities = ("image", "audio", "text")
    reserved = (IMAGE_4, BEGIN_IMAGE_4, END_IMAGE_4, AUDIO_4, BEGIN_AUDIO_4, END_AUDIO_4)
    placeholders = (Placeholder("image", IMAGE_4), Placeholder("audio", AUDIO_4))
    type_ids = "mm_token_type_ids"

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        directory = Path(spec.directory)
        self.image_recipe = read_pooled_recipe(directory, model.config.vision_config)
        has_audio = "audio" in spec.modalities
        self.audio_recipe = read_gemma_recipe(directory) if has_audio else None
        self.window = self.audio_window(directory) if has_audio else None

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration and processor files."""
        parsed = read_config(directory)
        side = read_pooled_recipe(directory, parsed.vision_config).shorter_side
        if parsed.audio_config is None:
            return cls.make_spec(directory, modalities=("image", "text"), image_side=side)
        return cls.make_spec(directory, image_side=side, sampling_rate=read_gemma_recipe(directory).sampling_rate)

    @classmethod
    def audio_window(cls, directory: Path) -> AudioWindow:
        """Return windows of 30 s, the last one of at least one frame."""
        recipe = read_gemma_recipe(directory)
        return AudioWindow(recipe.sampling_rate, GEMMA_SECONDS * recipe.sampling_rate, recipe.frame_length // 2 + 1)

    def token_types(self) -> dict[int, int]:
        """Return the kinds of image and audio tokens."""
        return {self.model.config.image_token_id: 1, self.model.config.audio_token_id: 3}

    def media(self, request: Request) -> list[Medium]:
        """Return the request's image and the windows of its audio."""
        media = []
        if request.image is not None:
            patching = self.image_recipe.size
            assert isinstance(patching, PooledPatching)
            height, width = pooled_size(request.image.shape[0], request.image.shape[1], patching)
            count = (height // patching.patch_size) * (width // patching.patch_size) // patching.pooling**2
            media.append(Medium("image", f"{BEGIN_IMAGE_4}{IMAGE_4 * count}{END_IMAGE_4}"))
        if self.audio_recipe is not None and self.window is not None:
            for length in self.window.lengths(request):
                count = -(-self.audio_recipe.frames(length) // SUBSAMPLING)
                media.append(Medium("audio", f"{BEGIN_AUDIO_4}{AUDIO_4 * count}{END_AUDIO_4}"))
        return media

    def tensors(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        """Return the images' patches and positions, and the audio windows' log-mel features and masks."""
        tensors: dict[str, torch.Tensor] = {}
        images = images_of(requests)
        if images:
            patches = preprocess_patches(images, self.image_recipe, self.device, self.dtype)
            tensors |= {"pixel_values": patches.pixels_BND, "image_position_ids": patch_positions(patches)}
        if self.audio_recipe is not None and self.window is not None:
            windows = self.window.cut(requests, self.device)
            if windows:
                mel_BTM, mask_BT = gemma_log_mel(windows, self.audio_recipe)
                tensors |= {"input_features": mel_BTM.to(self.dtype), "input_features_mask": mask_BT}
        return tensors
