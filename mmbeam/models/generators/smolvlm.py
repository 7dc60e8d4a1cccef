"""SmolVLM and Idefics3: a picture as tiles, row by row, and the whole of it small; or small alone.

Tiles are cut by the checkpoint's own image processor, on the CPU. Video is not here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from mmbeam.models.generators.chat import ChatGenerator
from mmbeam.models.generators.pretrained import AS_DECODED, processor_option, read_image_processor
from mmbeam.models.generators.prompts import Medium
from mmbeam.prompts.ask import GeneratorSpec, Request

IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"


class SmolVlmGenerator(ChatGenerator):
    """Texts of a SmolVLMForConditionalGeneration or an Idefics3ForConditionalGeneration."""

    model_types = ("smolvlm", "idefics3")
    model_class = AutoModelForImageTextToText
    modalities = ("image", "text")
    held_back = (IMAGE, AROUND, WHOLE)

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.processor = read_image_processor(Path(spec.directory))
        self.tile = IMAGE * processor_option(Path(spec.directory), "image_seq_len", 169)

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        read_image_processor(directory)
        return cls.spec_of(directory)

    def media(self, request: Request) -> list[Medium]:
        if request.image is None:
            return []
        _, rows, columns = self.processor.get_number_of_image_patches(*request.image.shape[:2])
        return [Medium("image", IMAGE, self._layout(rows, columns))]

    def _layout(self, rows: int, columns: int) -> str:
        """As SmolVLMProcessor and Idefics3Processor write it; 0 rows: the small picture alone."""
        whole = f"{AROUND}{WHOLE}{self.tile}{AROUND}"
        if rows == 0:
            return whole
        lines = [
            "".join(f"{AROUND}<row_{row + 1}_col_{column + 1}>{self.tile}" for column in range(columns))
            for row in range(rows)
        ]
        return "".join(f"{line}\n" for line in lines) + f"\n{whole}"

    def tensors(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        images = [[request.image] for request in requests if request.image is not None]
        if not images:
            return {}
        made = self.processor(images, **AS_DECODED)
        mask = made["pixel_attention_mask"].to(self.device)
        return {"pixel_values": made["pixel_values"].to(self.device, self.dtype), "pixel_attention_mask": mask}
