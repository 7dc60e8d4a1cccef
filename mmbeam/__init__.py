"""mmbeam: embeddings and captions for buckets of image-text-audio shards.

Models and rows without a pipeline: load_encoder, load_generator, load_labeller, read_rows, read_sample, FeatureDataset.
The steps of a pipeline: Plan, ReadShards, ReadFeatures, Embed, Label, Generate, WriteParquet, Rows, Summarize. They are
imported with their first use, so that `import mmbeam` and `mmbeam --help` are fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mmbeam.names import VERSION

if TYPE_CHECKING:
    from mmbeam.api import (
        EncoderModel,
        GeneratorModel,
        LabellerModel,
        load_encoder,
        load_generator,
        load_labeller,
        read_rows,
    )
    from mmbeam.features.dataset import FeatureDataset
    from mmbeam.readers.samples import read_sample
    from mmbeam.transforms import (
        Embed,
        Generate,
        Label,
        Plan,
        ReadFeatures,
        ReadShards,
        Rows,
        Summarize,
        WriteParquet,
    )

__version__ = VERSION
__all__ = [
    "Embed",
    "EncoderModel",
    "FeatureDataset",
    "Generate",
    "GeneratorModel",
    "Label",
    "LabellerModel",
    "Plan",
    "ReadFeatures",
    "ReadShards",
    "Rows",
    "Summarize",
    "WriteParquet",
    "__version__",
    "load_encoder",
    "load_generator",
    "load_labeller",
    "read_rows",
    "read_sample",
]
_API = (
    *("EncoderModel", "GeneratorModel", "LabellerModel"),
    *("load_encoder", "load_generator", "load_labeller", "read_rows"),
)

_MODULES = {"FeatureDataset": "features", "read_sample": "readers.samples"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mmbeam' has no attribute {name!r}")
    module = "api" if name in _API else _MODULES.get(name, "transforms")
    return getattr(importlib.import_module(f"mmbeam.{module}"), name)


def __dir__() -> list[str]:
    return __all__
