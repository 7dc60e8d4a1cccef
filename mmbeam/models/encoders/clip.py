"""CLIP (Radford et al., 2021, arXiv:2103.00020): pictures and texts projected into one space.

And MetaCLIP 2 (Chuang et al., 2025, arXiv:2507.22062), which is CLIP with a tokenizer of 300 languages.
"""

from typing import Any

from mmbeam.models.encoders.joint import ImageTextEncoder
from mmbeam.types import Modality


class ClipEncoder(ImageTextEncoder):
    """Its text vector is that of the end-of-text token, before which padding has no effect: the model is causal."""

    model_types = ("clip",)
    model_name = "CLIPModel"
    pads_to_max_length = False

    @classmethod
    def _dims(cls, parsed: Any) -> dict[Modality, int]:
        return {"image": parsed.projection_dim, "text": parsed.projection_dim}


class MetaClip2Encoder(ClipEncoder):
    """As CLIP. (The first MetaCLIP's checkpoints are CLIP models and say so.)"""

    model_types = ("metaclip_2",)
    model_name = "MetaClip2Model"
