"""BLIP (Li et al., 2022, arXiv:2201.12086) and BLIP-2 (Li et al., 2023, arXiv:2301.12597): captions and answers.

BLIP continues a caption: its text is what follows the words of the prompt, if any. The reference's `generate` writes
its begin token into the first column, which may be padding on the left; here it precedes the first word.
BLIP-2 puts an image as a few tokens in front of a language model's prompt, a decoder (OPT) or an encoder-decoder
(Flan-T5). Without words it writes a caption; its prompt for questions is "Question: ... Answer:".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Blip2ForConditionalGeneration, BlipForConditionalGeneration

from mmbeam.errors import ModelError
from mmbeam.models.generators.pretrained import ImageGenerator, context_length, text_limits
from mmbeam.models.loading import read_config
from mmbeam.prompts.ask import GeneratorSpec, Request

MAX_TOKENS = 4096  # of a prompt, if the language model's positions are unlimited


class BlipGenerator(ImageGenerator):
    """Captions of a BlipForConditionalGeneration."""

    model_types = ("blip",)
    model_class = BlipForConditionalGeneration

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration and processor files. Raises ModelError for a BLIP of another architecture."""
        architecture = (config.get("architectures") or [None])[0]
        if architecture != cls.model_class.__name__:
            raise ModelError(f"{directory}: expected a {cls.model_class.__name__}, found a {architecture}")
        return cls.make_spec(directory, **text_limits(read_config(directory).text_config.max_position_embeddings))

    @property
    def decoder(self) -> Any:
        """The text decoder, which attends to the image."""
        return self.model.text_decoder

    @property
    def options(self) -> Mapping[str, Any]:
        """The end-of-text and padding tokens."""
        text = self.model.config.text_config
        return {"eos_token_id": text.sep_token_id, "pad_token_id": text.pad_token_id}

    def encode_prompt(self, request: Request) -> list[int]:
        """Return the begin token and the first words of the caption."""
        return [self.model.config.text_config.bos_token_id, *self.tokenizer.encode_words(request.words)]

    def prepare(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the prompts and the images."""
        return {**self.left_padded(self.prompts(requests)), **super().prepare(requests)}

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the prompts and the encoded images."""
        inputs = super().inputs(requests)
        hidden_BLD = self.model.vision_model(pixel_values=inputs.pop("pixel_values")).last_hidden_state
        return {**inputs, "encoder_hidden_states": hidden_BLD}


class Blip2Generator(ImageGenerator):
    """Captions and answers of a Blip2ForConditionalGeneration."""

    model_types = ("blip-2",)
    model_class = Blip2ForConditionalGeneration

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration and processor files."""
        return cls.make_spec(directory, **text_limits(context_length(read_config(directory))))

    @property
    def decoder(self) -> Any:
        """The language model."""
        return self.model.language_model

    def encode_prompt(self, request: Request) -> list[int]:
        """Return the image's tokens and the words with the tokenizer's special tokens, or a begin token alone."""
        config = self.model.config
        image = [config.image_token_index] * config.num_query_tokens
        if not request.words:
            return [*image, config.text_config.bos_token_id]
        [words] = self.tokenizer.encode([request.words], self.spec.max_text_tokens or MAX_TOKENS)
        return [*image, *(token for token in words if token != config.image_token_index)]

    def prepare(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the prompts and the images."""
        return {**self.left_padded(self.prompts(requests)), **super().prepare(requests)}

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the prompts as embeddings, with the image embeddings at the positions of the image tokens."""
        padded = super().inputs(requests)
        images_BQD = self.model.get_image_features(pixel_values=padded["pixel_values"]).pooler_output
        words_BPD = self.model.get_input_embeddings()(padded["input_ids"])
        is_image_BP1 = (padded["input_ids"] == self.model.config.image_token_index)[..., None]
        embeds_BPD = words_BPD.masked_scatter(is_image_BP1, images_BQD.to(words_BPD.dtype))
        return {"inputs_embeds": embeds_BPD, "attention_mask": padded["attention_mask"]}
