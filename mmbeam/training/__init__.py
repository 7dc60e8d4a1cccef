"""Training: the loader of pre-computed features, which stands alone, and the fitting of the fusion model."""

from mmbeam.features.captions import Captions
from mmbeam.features.dataset import FeatureCounts, FeatureDataset, split_of

__all__ = ["Captions", "FeatureCounts", "FeatureDataset", "split_of"]
