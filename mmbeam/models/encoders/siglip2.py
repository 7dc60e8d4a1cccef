"""SigLIP 2 NaFlex (Tschannen et al., 2025, arXiv:2502.14786): pictures keep their aspect ratio."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoded
from mmbeam.models.encoders.siglip import SiglipEncoder
from mmbeam.models.tokenizing import unpad
from mmbeam.ops.image import ImageRecipe, Patching, preprocess_patches
from mmbeam.types import ImageHWC


class Siglip2Encoder(SiglipEncoder):
    """As SigLIP, but for the pictures: rows of patches with a mask, as many as the image processor's file says.

    (transformers' Siglip2Processor takes 256 patches of 16 pixels whatever that file says.)
    """

    model_types = ("siglip2",)
    model_name = "Siglip2Model"

    @classmethod
    def _check(cls, directory: Path, parsed: Any, recipe: ImageRecipe) -> None:
        side = parsed.vision_config.patch_size
        if not isinstance(recipe.size, Patching) or recipe.size.patch_size != side:
            raise ModelError(
                f"{directory}: config.json expects patches of {side} pixels, its image processor makes {recipe.size}"
            )

    @torch.inference_mode()
    def encode_image(self, images: Sequence[ImageHWC], tokens: bool = False) -> Encoded:
        """Encode pictures of any sizes, uint8 [H, W, 3]; tokens are those of the picture's own patches."""
        patches = preprocess_patches(images, self.recipe, self.device, self.dtype, self.pixel_filter)
        out = self.model.get_image_features(
            pixel_values=patches.pixels_BND,
            pixel_attention_mask=patches.mask_BN,
            spatial_shapes=torch.tensor(patches.shapes),  # left on the CPU: the model reads it number by number
        )
        kept = unpad(out.last_hidden_state, [down * across for down, across in patches.shapes]) if tokens else None
        return Encoded(pooled=out.pooler_output, tokens=kept)
