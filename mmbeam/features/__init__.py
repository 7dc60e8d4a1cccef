"""Precomputed features on disk: their columns, their files, their rows as samples, and the data loader.

The data loader is imported with its first use: what only reads rows then starts without torch.
"""

from typing import TYPE_CHECKING, Any

from mmbeam.features.captions import Captions

if TYPE_CHECKING:
    from mmbeam.features.dataset import FeatureBatch, FeatureCounts, FeatureDataset, split_of

__all__ = ["Captions", "FeatureBatch", "FeatureCounts", "FeatureDataset", "split_of"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mmbeam.features import dataset

    return getattr(dataset, name)
