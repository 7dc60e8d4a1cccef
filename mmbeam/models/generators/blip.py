"""BLIP (Li et al., 2022, arXiv:2201.12086) for captions: a picture, and the words that the caption begins with, if any.

The text that comes out is what follows those words. The reference's own `generate` puts its begin mark in
the first place of a row, where padding on the left may be; here it stands before the first word.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import BlipForConditionalGeneration

from mmbeam.errors import ModelError
from mmbeam.models.generators.pixels import PixelReader
from mmbeam.models.generators.pretrained import PretrainedGenerator, room_of
from mmbeam.models.loading import read_config
from mmbeam.prompts.ask import GeneratorSpec, Request


class BlipGenerator(PretrainedGenerator):
    """Captions of a BlipForConditionalGeneration."""

    model_types = ("blip",)
    model_class = BlipForConditionalGeneration

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.pixels = PixelReader(Path(spec.directory))

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        parsed = read_config(directory)
        found = (config.get("architectures") or [None])[0]
        if found != cls.model_class.__name__:
            raise ModelError(f"{directory}: is a {found}; expected {cls.model_class.__name__}, which writes captions")
        cls.read_tokenizer(directory)
        return GeneratorSpec(
            family=parsed.model_type,
            directory=str(directory),
            modalities=("image", "text"),
            required=("image",),
            takes_prompt=True,
            image_side=PixelReader(directory).shorter_side,
            **room_of(parsed.text_config.max_position_embeddings),
        )

    @property
    def decoder(self) -> Any:
        return self.model.text_decoder

    @property
    def options(self) -> Mapping[str, Any]:
        text = self.model.config.text_config
        return {"eos_token_id": text.sep_token_id, "pad_token_id": text.pad_token_id}

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        return [len(prompt) for prompt in self._prompts(requests)]

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        pixels = self.pixels([request.image for request in requests], self.device, self.dtype)
        hidden_BLD = self.model.vision_model(pixel_values=pixels).last_hidden_state
        return {**self.left_padded(self._prompts(requests)), "encoder_hidden_states": hidden_BLD}

    def _prompts(self, requests: Sequence[Request]) -> list[list[int]]:
        begin = self.model.config.text_config.bos_token_id
        return [[begin, *self.tokenizer.words(request.words)] for request in requests]
