"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a picture at its own resolution, within limits, as groups of patches.

Patches are cut by the checkpoint's own image processor, on the CPU. Video is not here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from mmbeam.models.generators.chat import ChatGenerator
from mmbeam.models.generators.pretrained import AS_DECODED, read_image_processor
from mmbeam.models.generators.prompts import Medium
from mmbeam.prompts.ask import GeneratorSpec, Request

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"


class QwenVlGenerator(ChatGenerator):
    """Texts of a Qwen-VL model of any generation, dense or of experts."""

    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
    model_class = AutoModelForImageTextToText
    modalities = ("image", "text")
    held_back = (IMAGE, VIDEO)
    type_ids = "mm_token_type_ids"

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.processor = read_image_processor(Path(spec.directory))

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        read_image_processor(directory)
        return cls.spec_of(directory)

    def kinds(self) -> dict[int, int]:
        return {self.model.config.image_token_id: 1}

    def media(self, request: Request) -> list[Medium]:
        if request.image is None:
            return []
        patches = self.processor.get_number_of_image_patches(*request.image.shape[:2])
        tokens = IMAGE * (patches // self.processor.merge_size**2)
        return [Medium("image", IMAGE, tokens, f"<|vision_start|>{IMAGE}<|vision_end|>")]

    def tensors(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        images = [request.image for request in requests if request.image is not None]
        if not images:
            return {}
        made = self.processor(images, **AS_DECODED)
        grid = made["image_grid_thw"].to(self.device)
        return {"pixel_values": made["pixel_values"].to(self.device, self.dtype), "image_grid_thw": grid}
