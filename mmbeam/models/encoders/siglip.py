"""SigLIP (Zhai et al., 2023, arXiv:2303.15343), and the SigLIP 2 checkpoints of fixed resolution."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmbeam.errors import ModelError
from mmbeam.models.encoders.joint import ImageTextEncoder
from mmbeam.types import Modality


class SiglipEncoder(ImageTextEncoder):
    """Its text vector is that of the last of 64 positions, padding or not: it was trained on padded texts."""

    model_types = ("siglip",)
    model_name = "SiglipModel"
    pads_to_max_length = True

    @classmethod
    def _parse(cls, directory: Path, config: Mapping[str, Any]) -> Any:
        parsed = super()._parse(directory, config)
        if not parsed.vision_config.vision_use_head:
            raise ModelError(f"{directory}/config.json: vision_use_head is false; without it there is no pooled vector")
        return parsed

    @classmethod
    def _dims(cls, parsed: Any) -> dict[Modality, int]:
        return {"image": parsed.vision_config.hidden_size, "text": parsed.text_config.projection_size}
