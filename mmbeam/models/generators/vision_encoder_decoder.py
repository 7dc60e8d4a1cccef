"""VisionEncoderDecoder: the classic captioner, a vision transformer with a language model that looks at it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import VisionEncoderDecoderModel
from transformers.modeling_outputs import BaseModelOutput

from mmbeam.models.generators.pixels import PixelReader
from mmbeam.models.generators.pretrained import PretrainedGenerator, context_of
from mmbeam.models.loading import read_config
from mmbeam.prompts.ask import GeneratorSpec, Request


class VisionEncoderDecoderGenerator(PretrainedGenerator):
    """Text from a picture alone: a caption, or what is written in it; the weights know which (TrOCR: the latter)."""

    model_types = ("vision-encoder-decoder",)
    model_class = VisionEncoderDecoderModel

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.pixels = PixelReader(Path(spec.directory))

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        parsed = read_config(directory)
        cls.read_tokenizer(directory)
        return GeneratorSpec(
            family=parsed.model_type,
            directory=str(directory),
            modalities=("image",),
            required=("image",),
            tasks=("transcribe",) if parsed.decoder.model_type == "trocr" else ("caption", "transcribe"),
            image_side=PixelReader(directory).shorter_side,
            max_new_tokens=context_of(parsed.decoder),
        )

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        """A picture is as much to the model as any other."""
        return [1] * len(requests)

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        pixels = self.pixels([request.image for request in requests], self.device, self.dtype)
        hidden_BLD = self.model.get_encoder()(pixel_values=pixels).last_hidden_state
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden_BLD)}
