"""VisionEncoderDecoder: a vision transformer and a language model that attends to it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import VisionEncoderDecoderModel
from transformers.modeling_outputs import BaseModelOutput

from mmbeam.models.generators.pretrained import ImageGenerator, context_length
from mmbeam.models.loading import read_config
from mmbeam.prompts.ask import GeneratorSpec, Request


class VisionEncoderDecoderGenerator(ImageGenerator):
    """Text of an image: a caption, or the words in it, whichever the model was trained for (TrOCR: words)."""

    model_types = ("vision-encoder-decoder",)
    model_class = VisionEncoderDecoderModel

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration and processor files."""
        decoder = read_config(directory).decoder
        return cls.make_spec(
            directory,
            modalities=("image",),
            takes_prompt=False,
            tasks=("transcribe",) if decoder.model_type == "trocr" else ("caption", "transcribe"),
            max_new_tokens=context_length(decoder),
        )

    def encode(self, requests: Sequence[Request]) -> list[Any]:
        """Return None for each request: there are no prompts."""
        return [None] * len(requests)

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        """Return 1 for each request: all images have the same number of tokens."""
        return [1] * len(requests)

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the encoded images."""
        hidden_BLD = self.model.get_encoder()(**super().inputs(requests)).last_hidden_state
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden_BLD)}
