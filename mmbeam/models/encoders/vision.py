"""Vision backbones that know no text: ViT, DINOv2 and DINOv3, ResNet, ConvNeXt.

The vector of a picture is the class token after the last layer norm where the model has one (ViT and the
DINO transformers), and the model's own average over the picture where it has none (pooler_output of
ResNet and ConvNeXt; DINOv3 ConvNeXt puts that average in the class token's place). ViT's pooler, a layer
and a tanh for a classifier, is not used: many checkpoints lack it. Detection and segmentation are not here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from transformers import AutoModel

from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec
from mmbeam.models.loading import load_pretrained, read_config
from mmbeam.models.recipes import read_image_recipe
from mmbeam.ops.image import ImageRecipe, preprocess
from mmbeam.types import ImageHWC

UNUSED = (r"(^|\.)pooler\.",)  # weights of ViT's pooler


class VisionEncoder(Encoder):
    """Picture vectors of a backbone that AutoModel loads."""

    model_types: ClassVar[tuple[str, ...]] = ()  # the registry names them

    def __init__(self, spec: EncoderSpec, model: Any, recipe: ImageRecipe) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.model = model
        self.recipe = recipe

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration and the image processor's file."""
        full = read_config(directory)
        recipe = read_image_recipe(directory)
        _check(directory, full, recipe)
        width = full.hidden_sizes[-1] if hasattr(full, "hidden_sizes") else full.hidden_size
        return EncoderSpec(
            family=full.model_type,
            directory=str(directory),
            dims={"image": width},
            token_dims={"image": width},
            image_side=recipe.shorter_side,
        )

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Self:
        """Load the backbone's weights; a classifier on top of it is left out."""
        directory = Path(spec.directory)
        model = load_pretrained(AutoModel, directory, device, dtype, ignore_missing=UNUSED)
        return cls(spec, model, read_image_recipe(directory))

    @torch.inference_mode()
    def encode_image(self, images: Sequence[ImageHWC], tokens: bool = False) -> Encoded:
        """Encode pictures of any sizes, uint8 [H, W, 3].

        Tokens are the last hidden states: class token, registers and patches in the model's order, or a
        convolutional network's cells row by row.
        """
        out = self.model(preprocess(images, self.recipe, self.device, self.dtype, self.pixel_filter))
        hidden = out.last_hidden_state
        if hidden.dim() == 4:  # [B, D, H, W]
            pooled, hidden = out.pooler_output.flatten(1), hidden.flatten(2).transpose(1, 2)
        else:
            pooled = hidden[:, 0]
        return Encoded(pooled=pooled, tokens=list(hidden) if tokens else None)


def _check(directory: Path, config: Any, recipe: ImageRecipe) -> None:
    """Raise ModelError where the model cannot take the processor's pictures."""
    if config.num_channels != 3:
        raise ModelError(f"{directory}/config.json: num_channels is {config.num_channels}; expected 3, for RGB")
    if config.model_type != "vit":
        return  # the others take pictures of any size
    side = config.image_size
    expected = (side, side) if isinstance(side, int) else tuple(side)
    found = recipe.crop or recipe.size
    if found != expected:
        raise ModelError(f"{directory}: config.json expects pictures of {expected}, its image processor makes {found}")
