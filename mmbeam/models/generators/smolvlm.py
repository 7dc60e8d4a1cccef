"""SmolVLM and Idefics3: a large image as rows of tiles and a small copy of the whole; a small image as itself.

The checkpoint's image processor cuts the tiles, on the CPU. Video is not implemented.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from mmbeam.models.generators.media import images_of
from mmbeam.models.generators.pretrained import ChatGenerator
from mmbeam.models.generators.prompts import Medium, Placeholder
from mmbeam.models.loading import read_json
from mmbeam.models.recipes import AS_DECODED, read_image_processor
from mmbeam.ops.transfer import to_device
from mmbeam.prompts.ask import GeneratorSpec, Request

IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"


class SmolVlmGenerator(ChatGenerator):
    """Texts of a SmolVLMForConditionalGeneration or an Idefics3ForConditionalGeneration."""

    model_types = ("smolvlm", "idefics3")
    model_class = AutoModelForImageTextToText
    modalities = ("image", "text")
    reserved = (IMAGE, AROUND, WHOLE)
    placeholders = (Placeholder("image", IMAGE),)

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        directory = Path(spec.directory)
        self.processor = read_image_processor(directory)
        options = read_json(directory, "processor_config.json", required=False)
        self.tile = IMAGE * options.get("image_seq_len", 169)

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration and processor files."""
        read_image_processor(directory)
        return cls.make_spec(directory)

    def media(self, request: Request) -> list[Medium]:
        """Return the request's image, laid out as SmolVLMProcessor and Idefics3Processor do; 0 rows: without tiles."""
        if request.image is None:
            return []
        _, rows, columns = self.processor.get_number_of_image_patches(*request.image.shape[:2])
        tokens = f"{AROUND}{WHOLE}{self.tile}{AROUND}"
        if rows:
            tiles = ""
            for row in range(1, rows + 1):
                tiles += "".join(f"{AROUND}<row_{row}_col_{column}>{self.tile}" for column in range(1, columns + 1))
                tiles += "\n"
            tokens = f"{tiles}\n{tokens}"
        return [Medium("image", tokens)]

    def processed(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        """Return the images' tiles and the masks of their pixels."""
        images = [[image] for image in images_of(requests)]
        if not images:
            return {}
        processed = self.processor(images, **AS_DECODED)
        return {
            "pixel_values": to_device(processed["pixel_values"].to(self.dtype), self.device),
            "pixel_attention_mask": to_device(processed["pixel_attention_mask"], self.device),
        }
