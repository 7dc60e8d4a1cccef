"""mmbeam's own model: text from image, audio and text together, any of which may be missing.

An encoder per source, a shared space in which the sources align, a fusion of their tokens, and a text
generator. It is a model of transformers like any other: `FusionModel.from_pretrained(directory)`.
"""

from transformers import AutoConfig, AutoModel

from mmbeam.models.fusion.configuration import FusionConfig, SourceConfig
from mmbeam.models.fusion.modeling import FusionModel, FusionOutput
from mmbeam.models.fusion.processing import FusionProcessor

__all__ = ["FusionConfig", "FusionModel", "FusionOutput", "FusionProcessor", "SourceConfig"]

AutoConfig.register(FusionConfig.model_type, FusionConfig)
AutoModel.register(FusionConfig, FusionModel)
