"""Pictures as the generators' vision towers take them: all of one size, on the model's device.

Families that tile or patch pictures in ways of their own call their checkpoint's image processor themselves.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmbeam.errors import ModelError
from mmbeam.models.generators.pretrained import AS_DECODED, read_image_processor
from mmbeam.models.recipes import read_image_recipe
from mmbeam.ops.image import ImageRecipe, preprocess
from mmbeam.types import ImageHWC

logger = logging.getLogger(__name__)


class PixelReader:
    """A checkpoint's preprocessing: on the device where it is a plain one, else its own processor on the CPU."""

    def __init__(self, directory: Path) -> None:
        """Raises ModelError if the processor's file is missing or broken."""
        self.processor: Any = read_image_processor(directory)
        self.recipe: ImageRecipe | None = None
        try:
            self.recipe = read_image_recipe(directory)
        except ModelError as error:
            logger.info("pictures are prepared on the CPU: %s", error)

    @property
    def shorter_side(self) -> int | None:
        """Pixels that the shorter side of a picture needs, at most; None: all that there are."""
        return None if self.recipe is None else self.recipe.shorter_side

    def __call__(self, images: Sequence[ImageHWC | None], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Pictures of any sizes as [B, 3, height, width]; those that are None are left out."""
        held = [image for image in images if image is not None]
        if self.recipe is not None:
            return preprocess(held, self.recipe, device, dtype)
        pixels: torch.Tensor = self.processor(held, **AS_DECODED)["pixel_values"]
        return pixels.to(device, dtype)
