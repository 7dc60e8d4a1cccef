"""What the joint image and text spaces (CLIP, SigLIP, SigLIP 2) share; their differences are in their own modules."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers

from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec
from mmbeam.models.loading import load_pretrained
from mmbeam.models.recipes import read_image_recipe
from mmbeam.models.tokenizing import TextTokenizer, check_vocabulary, pad, unpad
from mmbeam.ops.image import ImageRecipe, preprocess
from mmbeam.types import ImageHWC, Modality


class ImageTextEncoder(Encoder):
    """A vision tower and a text tower with vectors in one space.

    `model_name` is the class in transformers. Pooled vectors are what its get_image_features and
    get_text_features give; tokens are the towers' last hidden states.
    """

    model_name: ClassVar[str]
    pads_to_max_length: ClassVar[bool]  # texts, always, rather than to the longest of the batch

    def __init__(self, spec: EncoderSpec, model: Any, recipe: ImageRecipe, tokenizer: TextTokenizer) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.model = model
        self.recipe = recipe
        self.tokenizer = tokenizer

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        parsed = cls._parse(directory, config)
        recipe = read_image_recipe(directory)
        cls._check(directory, parsed, recipe)
        check_vocabulary(directory)
        return EncoderSpec(
            family=parsed.model_type,
            directory=str(directory),
            dims=cls._dims(parsed),
            token_dims={"image": parsed.vision_config.hidden_size, "text": parsed.text_config.hidden_size},
            image_side=recipe.shorter_side,
            max_text_tokens=parsed.text_config.max_position_embeddings,
        )

    @classmethod
    def _parse(cls, directory: Path, config: Mapping[str, Any]) -> Any:
        """The configuration as transformers reads it: files leave out what is a class's default."""
        try:
            return getattr(transformers, cls.model_name).config_class.from_dict(dict(config))
        except Exception as error:  # transformers validates with errors of its own
            raise ModelError(f"{directory}/config.json: no configuration of a {cls.model_name}: {error}") from error

    @classmethod
    def _check(cls, directory: Path, parsed: Any, recipe: ImageRecipe) -> None:
        """Raise ModelError where the processor's pictures do not fit the model."""
        side = parsed.vision_config.image_size
        found = recipe.crop or recipe.size
        if found != (side, side):
            raise ModelError(
                f"{directory}: config.json expects pictures of {side} x {side}, its image processor makes {found}"
            )

    @classmethod
    def _dims(cls, parsed: Any) -> dict[Modality, int]:
        raise NotImplementedError

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Encoder:
        directory = Path(spec.directory)
        model = load_pretrained(getattr(transformers, cls.model_name), directory, device, dtype)
        return cls(spec, model, read_image_recipe(directory), TextTokenizer(directory))

    @torch.inference_mode()
    def encode_image(self, images: Sequence[ImageHWC], tokens: bool = False) -> Encoded:
        """Encode pictures of any sizes, uint8 [H, W, 3]. CLIP's tokens begin with its class token."""
        pixels = preprocess(images, self.recipe, self.device, self.dtype, self.pixel_filter)
        out = self.model.get_image_features(pixel_values=pixels)
        return Encoded(pooled=out.pooler_output, tokens=list(out.last_hidden_state) if tokens else None)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.encode(texts, self._max_tokens)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self.tokenizer.count(texts)

    @torch.inference_mode()
    def encode_text(self, token_ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode texts that `tokenize` made, padded as the model was trained, with a mask only if it was trained so."""
        side = self.tokenizer.padding_side
        length = self._max_tokens if self.pads_to_max_length else None
        ids, mask = pad(token_ids, self.tokenizer.pad_id, self.device, length, side)
        masks = {"attention_mask": mask} if "attention_mask" in self.tokenizer.inputs else {}
        out = self.model.get_text_features(input_ids=ids, **masks)
        kept = unpad(out.last_hidden_state, [len(own) for own in token_ids], side) if tokens else None
        return Encoded(pooled=out.pooler_output, tokens=kept)

    @property
    def _max_tokens(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)
