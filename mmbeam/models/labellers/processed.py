"""Images that the checkpoint's own processor prepares, with Pillow, for models without kernels of their own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmbeam.models.recipes import AS_DECODED, read_image_processor
from mmbeam.ops.image import PixelFilter
from mmbeam.ops.transfer import to_device
from mmbeam.types import ImageHWC

Inputs = Mapping[str, torch.Tensor]  # of a model's forward


class ProcessedImages:
    """Images as the checkpoint's own processor prepares them, one by one on the CPU; those of equal shape in a batch.

    Nothing is padded, so that a batch gives the labels of each image alone.
    """

    def __init__(self, directory: Path, model: Any) -> None:
        self.processor = read_image_processor(directory)
        self.model = model

    def prepare(self, images: Sequence[ImageHWC], pixel_filter: PixelFilter | None) -> list[Inputs]:
        """Return the model's inputs for each image, on its device."""
        prepared: list[Inputs] = []
        for image in images:
            if pixel_filter is not None:
                pixels_CHW = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
                image = np.ascontiguousarray(pixel_filter(pixels_CHW[None])[0].permute(1, 2, 0).numpy())
            values = dict(self.processor(image, **AS_DECODED))
            prepared.append(
                {
                    name: to_device(
                        value.to(self.model.dtype if value.is_floating_point() else value.dtype), self.device
                    )
                    for name, value in values.items()
                    if isinstance(value, torch.Tensor)
                }
            )
        return prepared

    @property
    def device(self) -> torch.device:
        """The model's device."""
        device: torch.device = self.model.device
        return device

    @torch.inference_mode()
    def compute(
        self, inputs: Sequence[Inputs], names: Sequence[str], **others: torch.Tensor
    ) -> list[tuple[list[int], dict[str, torch.Tensor]]]:
        """Return the outputs called `names` of images of equal shape, with the images' positions.

        `others` are further inputs of one image, which are repeated for each.
        """
        shapes: dict[Any, list[int]] = {}
        for position, values in enumerate(inputs):
            shapes.setdefault(tuple((name, value.shape) for name, value in values.items()), []).append(position)
        computed = []
        for positions in shapes.values():
            first = inputs[positions[0]]
            joined = {name: torch.cat([inputs[position][name] for position in positions]) for name in first}
            repeated = {name: value.repeat(len(positions), *[1] * (value.dim() - 1)) for name, value in others.items()}
            output = self.model(**joined, **repeated)
            computed.append((positions, {name: output[name] for name in names}))
        return computed
