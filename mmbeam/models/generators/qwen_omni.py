"""Qwen2.5-Omni (Xu et al., 2025, arXiv:2503.20215): the thinker, which sees, hears and writes. It does not speak here.

Of a whole checkpoint the thinker's weights alone are loaded. A sound longer than the feature extractor's
window (300 s) is several in the prompt. Video is not here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from mmbeam.models.generators.chat import ChatGenerator
from mmbeam.models.generators.pretrained import AS_DECODED, read_image_processor
from mmbeam.models.generators.prompts import Medium
from mmbeam.models.generators.sounds import MelReader, tokens_of_frames
from mmbeam.prompts.ask import GeneratorSpec, Request

IMAGE, AUDIO, VIDEO = "<|IMAGE|>", "<|AUDIO|>", "<|VIDEO|>"


class QwenOmniGenerator(ChatGenerator):
    """Texts of a Qwen2_5OmniThinkerForConditionalGeneration."""

    model_types = ("qwen2_5_omni", "qwen2_5_omni_thinker")
    model_class = Qwen2_5OmniThinkerForConditionalGeneration
    modalities = ("image", "audio", "text")
    held_back = (IMAGE, AUDIO, VIDEO)

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.processor = read_image_processor(Path(spec.directory))
        self.mels = MelReader(Path(spec.directory))

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        read_image_processor(directory)
        return cls.spec_of(directory, sampling_rate=MelReader(directory).recipe.sampling_rate)

    def media(self, request: Request) -> list[Medium]:
        found = []
        if request.image is not None:
            patches = self.processor.get_number_of_image_patches(*request.image.shape[:2])
            tokens = IMAGE * (patches // self.processor.merge_size**2)
            found.append(Medium("image", IMAGE, tokens, f"<|vision_bos|>{IMAGE}<|vision_eos|>"))
        for frames in self.mels.frames(request):
            tokens = AUDIO * tokens_of_frames(frames)
            found.append(Medium("audio", AUDIO, tokens, f"<|audio_bos|>{AUDIO}<|audio_eos|>"))
        return found

    def tensors(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        images = [request.image for request in requests if request.image is not None]
        if images:
            made = self.processor(images, **AS_DECODED)
            tensors["pixel_values"] = made["pixel_values"].to(self.device, self.dtype)
            tensors["image_grid_thw"] = made["image_grid_thw"].to(self.device)
        heard = self.mels(requests, self.device, whole=False)
        if heard is not None:
            tensors["input_features"], tensors["feature_attention_mask"] = heard[0].to(self.dtype), heard[1]
        return tensors
