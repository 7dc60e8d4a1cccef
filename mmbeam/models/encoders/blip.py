"""BLIP (Li et al., 2022, arXiv:2201.12086) as an encoder; its captions are the generators' business.

What a checkpoint gives depends on what it was trained for, which config.json's architectures says:
- BlipForImageTextRetrieval (blip-itm-*): the contrastive space of pictures and texts, the projected class
  tokens of the two towers, as its forward computes them with use_itm_head=False;
- BlipForConditionalGeneration and BlipForQuestionAnswering (captions, answers): pictures alone, the vision
  tower's class token after the last layer norm.
A bare BlipModel is refused: its projections are other layers than the ones that BLIP was trained with.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec
from mmbeam.models.encoders.joint import ImageTextEncoder
from mmbeam.models.encoders.vision import VisionEncoder
from mmbeam.models.loading import load_pretrained, read_json
from mmbeam.models.recipes import read_image_recipe
from mmbeam.models.tokenizing import pad, unpad
from mmbeam.ops.image import preprocess
from mmbeam.types import ImageHWC, Modality

RETRIEVAL = "BlipForImageTextRetrieval"
PICTURES_ALONE = ("BlipForConditionalGeneration", "BlipForQuestionAnswering")


class BlipEncoder(ImageTextEncoder):
    """Picture and text vectors of a BlipForImageTextRetrieval; `load` gives a VisionEncoder for what knows no text."""

    model_types = ("blip",)
    model_name = RETRIEVAL
    pads_to_max_length = False

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration, the image processor's file and, of a retrieval model, the tokenizer's."""
        if _architecture(directory, config) == RETRIEVAL:
            return super().describe(directory, config)
        parsed = cls._parse(directory, config)
        recipe = read_image_recipe(directory)
        cls._check(directory, parsed, recipe)
        width = parsed.vision_config.hidden_size
        return EncoderSpec(
            family=parsed.model_type,
            directory=str(directory),
            dims={"image": width},
            token_dims={"image": width},
            image_side=recipe.shorter_side,
        )

    @classmethod
    def _dims(cls, parsed: Any) -> dict[Modality, int]:
        return {"image": parsed.image_text_hidden_size, "text": parsed.image_text_hidden_size}

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Encoder:
        """Load the weights; of a model for captions or answers, the vision tower alone."""
        if "text" in spec.dims:
            return super().load(spec, device, dtype)
        directory = Path(spec.directory)
        family = getattr(transformers, _architecture(directory, read_json(directory, "config.json")))
        whole = load_pretrained(family, directory, torch.device("cpu"), dtype)
        return VisionEncoder(spec, whole.vision_model.to(device), read_image_recipe(directory))

    @torch.inference_mode()
    def encode_image(self, images: Sequence[ImageHWC], tokens: bool = False) -> Encoded:
        """Encode pictures of any sizes, uint8 [H, W, 3]; tokens begin with the class token."""
        pixels = preprocess(images, self.recipe, self.device, self.dtype, self.pixel_filter)
        hidden_BLD = self.model.vision_model(pixels).last_hidden_state
        return Encoded(pooled=self.model.vision_proj(hidden_BLD[:, 0]), tokens=list(hidden_BLD) if tokens else None)

    @torch.inference_mode()
    def encode_text(self, token_ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode tokenized texts, padded to the longest."""
        ids_BL, mask_BL = pad(token_ids, self.tokenizer.pad_id, self.device)
        hidden_BLD = self.model.text_encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        kept = unpad(hidden_BLD, list(map(len, token_ids))) if tokens else None
        return Encoded(pooled=self.model.text_proj(hidden_BLD[:, 0]), tokens=kept)


def _architecture(directory: Path, config: Mapping[str, Any]) -> str:
    """The class whose weights the checkpoint holds."""
    found = (config.get("architectures") or [None])[0]
    if found not in (RETRIEVAL, *PICTURES_ALONE):
        raise ModelError(
            f"{directory}/config.json: architectures names {found}; expected {', '.join((RETRIEVAL, *PICTURES_ALONE))}"
        )
    return str(found)
