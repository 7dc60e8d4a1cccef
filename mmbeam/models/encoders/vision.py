"""Vision backbones without a text tower: ViT, DINOv2 and DINOv3, ResNet, ConvNeXt.

An image's vector is the class token after the last layer norm where the model has one (ViT and the DINO transformers),
and otherwise the model's own average over the image (pooler_output of ResNet and ConvNeXt; DINOv3 ConvNeXt puts that
average at the class token's position). ViT's pooler, a layer and a tanh for a classifier, is not used: many
checkpoints lack it. Detection and segmentation are not encoders' tasks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoded, EncoderSpec, TransformersEncoder
from mmbeam.models.loading import read_config
from mmbeam.models.recipes import OwnPixels, check_image_size, notes_of, read_pixels
from mmbeam.ops.image import ImageRecipe
from mmbeam.types import ImageHWC


class VisionEncoder(TransformersEncoder):
    """Image vectors of a vision backbone."""

    recipe: ImageRecipe | OwnPixels
    read_recipe = staticmethod(read_pixels)
    optional_weights = (r"(^|\.)pooler\.",)  # ViT's

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration and the image processor's file."""
        parsed, recipe = read_config(directory), read_pixels(directory)
        if parsed.num_channels != 3:
            raise ModelError(f"{directory}/config.json: num_channels is {parsed.num_channels}; expected 3, for RGB")
        if parsed.model_type == "vit":  # the others take images of any size
            check_image_size(directory, parsed.image_size, recipe)
        width = parsed.hidden_sizes[-1] if hasattr(parsed, "hidden_sizes") else parsed.hidden_size
        return EncoderSpec(
            family=parsed.model_type,
            directory=str(directory),
            dims={"image": width},
            token_dims={"image": width},
            image_side=recipe.shorter_side,
            notes=notes_of(recipe),
        )

    @torch.inference_mode()
    def encode_image(self, images: Sequence[ImageHWC], tokens: bool = False) -> Encoded:
        """Encode images of any sizes, uint8 [H, W, 3].

        Tokens are the last hidden states: class token, registers and patches in the model's order, or the cells of a
        convolutional network row by row.
        """
        output = self.model(self.pixels(images))
        hidden = output.last_hidden_state
        if hidden.dim() == 4:  # [B, D, H, W]
            pooled_BD, hidden = output.pooler_output.flatten(1), hidden.flatten(2).transpose(1, 2)
        else:
            pooled_BD = hidden[:, 0]
        return Encoded(pooled=pooled_BD, tokens=list(hidden) if tokens else None)
