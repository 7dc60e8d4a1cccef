"""Training of the fusion model. The data loader of precomputed features, usable alone, is exported here too."""

from mmbeam.features.captions import Captions
from mmbeam.features.dataset import FeatureCounts, FeatureDataset, split_of

__all__ = ["Captions", "FeatureCounts", "FeatureDataset", "split_of"]
