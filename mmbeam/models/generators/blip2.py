"""BLIP-2 (Li et al., 2023, arXiv:2301.12597): a picture as a few tokens in front of a language model's prompt.

The language model is a decoder (OPT) or an encoder-decoder (Flan-T5). Without words it captions the picture;
its prompt for questions is "Question: ... Answer:".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Blip2ForConditionalGeneration

from mmbeam.models.generators.pixels import PixelReader
from mmbeam.models.generators.pretrained import PretrainedGenerator, context_of, room_of
from mmbeam.models.loading import read_config
from mmbeam.prompts.ask import GeneratorSpec, Request

MAX_TOKENS = 4096  # of a prompt, where the language model's positions name no limit


class Blip2Generator(PretrainedGenerator):
    """Captions and answers of a Blip2ForConditionalGeneration."""

    model_types = ("blip-2",)
    model_class = Blip2ForConditionalGeneration

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
            modalities=("image", "text"),
            required=("image",),
            takes_prompt=True,
            image_side=PixelReader(directory).shorter_side,
            **room_of(context_of(parsed)),
        )

    @property
    def decoder(self) -> Any:
        return self.model.language_model

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        return [len(prompt) for prompt in self._prompts(requests)]

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        padded = self.left_padded(self._prompts(requests))
        pixels = self.pixels([request.image for request in requests], self.device, self.dtype)
        pictures_BQD = self.model.get_image_features(pixel_values=pixels).pooler_output
        words_BPD = self.model.get_input_embeddings()(padded["input_ids"])
        places_BP1 = (padded["input_ids"] == self.model.config.image_token_index)[..., None]
        embeds_BPD = words_BPD.masked_scatter(places_BP1, pictures_BQD.to(words_BPD.dtype))
        return {"inputs_embeds": embeds_BPD, "attention_mask": padded["attention_mask"]}

    def _prompts(self, requests: Sequence[Request]) -> list[list[int]]:
        """The picture's tokens, and the words with the marks that the tokenizer sets, or a begin mark alone."""
        config = self.model.config
        picture = [config.image_token_index] * config.num_query_tokens
        begin = [config.text_config.bos_token_id]
        limit = self.spec.max_text_tokens or MAX_TOKENS
        texts = self.tokenizer.encode([request.words for request in requests], limit)
        words = [[token for token in ids if token != config.image_token_index] for ids in texts]  # none is a picture
        return [[*picture, *(ids if request.words else begin)] for request, ids in zip(requests, words, strict=True)]
