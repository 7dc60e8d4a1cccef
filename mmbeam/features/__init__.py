"""Precomputed features on disk: their columns, their files, their rows as samples, and the data loader."""

from mmbeam.features.captions import Captions
from mmbeam.features.dataset import FeatureBatch, FeatureCounts, FeatureDataset, split_of

__all__ = ["Captions", "FeatureBatch", "FeatureCounts", "FeatureDataset", "split_of"]
