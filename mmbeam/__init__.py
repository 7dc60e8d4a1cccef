"""mmbeam: embeddings and captions for buckets of image-text-audio shards.

Models and rows without a pipeline: load_encoder, load_generator, read_rows, FeatureDataset. The steps of a pipeline:
Plan, ReadShards, ReadFeatures, Embed, Generate, WriteParquet, Rows, Summarize. They are imported when they are first
used, so that `import mmbeam` and `mmbeam --help` are fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mmbeam.names import VERSION

if TYPE_CHECKING:
    from mmbeam.api import EncoderModel, GeneratorModel, load_encoder, load_generator, read_rows
    from mmbeam.features.dataset import FeatureDataset
    from mmbeam.transforms import (
        Embed,
        Generate,
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
    "Plan",
    "ReadFeatures",
    "ReadShards",
    "Rows",
    "Summarize",
    "WriteParquet",
    "__version__",
    "load_encoder",
    "load_generator",
    "read_rows",
]
_API = ("EncoderModel", "GeneratorModel", "load_encoder", "load_generator", "read_rows")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mmbeam' has no attribute {name!r}")
    module = "api" if name in _API else "features" if name == "FeatureDataset" else "transforms"
    return getattr(importlib.import_module(f"mmbeam.{module}"), name)


def __dir__() -> list[str]:
    return __all__
