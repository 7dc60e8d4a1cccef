"""mmbeam's own model: it generates text from image, audio and text together, any of which may be missing.

It has an encoder per source, a shared space in which the sources are aligned, a fusion of their tokens, and a
text decoder. It loads like any model of transformers: `FusionModel.from_pretrained(directory)`.
"""

from transformers import AutoConfig, AutoModel

from mmbeam.models.fusion.configuration import FusionConfig, SourceConfig
from mmbeam.models.fusion.modeling import FusionModel, FusionOutput
from mmbeam.models.fusion.processing import FusionProcessor

__all__ = ["FusionConfig", "FusionModel", "FusionOutput", "FusionProcessor", "SourceConfig"]

AutoConfig.register(FusionConfig.model_type, FusionConfig)
AutoModel.register(FusionConfig, FusionModel)
