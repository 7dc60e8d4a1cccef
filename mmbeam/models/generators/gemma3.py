"""Gemma 3 with its vision tower: a picture as 256 tokens. Pan and scan, crops beside the whole picture, is not here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3ForConditionalGeneration

from mmbeam.errors import ModelError
from mmbeam.models.generators.chat import ChatGenerator
from mmbeam.models.generators.pretrained import AS_DECODED, read_image_processor
from mmbeam.models.generators.prompts import Medium
from mmbeam.prompts.ask import GeneratorSpec, Request

IMAGE, BEGIN, END = "<image_soft_token>", "<start_of_image>", "<end_of_image>"


class Gemma3Generator(ChatGenerator):
    """Texts of a Gemma3ForConditionalGeneration."""

    model_types = ("gemma3",)
    model_class = Gemma3ForConditionalGeneration
    modalities = ("image", "text")
    held_back = (IMAGE, BEGIN, END)
    type_ids = "token_type_ids"

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.processor = read_image_processor(Path(spec.directory))

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        if read_image_processor(directory).do_pan_and_scan:
            raise ModelError(f"{directory}: its image processor sets do_pan_and_scan, which is not implemented here")
        return cls.spec_of(directory)

    def kinds(self) -> dict[int, int]:
        return {self.model.config.image_token_id: 1}

    def media(self, request: Request) -> list[Medium]:
        if request.image is None:
            return []
        picture = IMAGE * self.model.config.mm_tokens_per_image
        return [Medium("image", BEGIN, f"\n\n{BEGIN}{picture}{END}\n\n")]

    def tensors(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        images = [request.image for request in requests if request.image is not None]
        if not images:
            return {}
        pixels = self.processor(images, **AS_DECODED)["pixel_values"]
        return {"pixel_values": pixels.to(self.device, self.dtype)}
