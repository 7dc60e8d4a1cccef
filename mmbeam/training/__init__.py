"""Training: the loader of pre-computed features, which stands alone, and the fitting of the fusion model."""

from mmbeam.training.captions import Captions
from mmbeam.training.feature_rows import FeatureCounts
from mmbeam.training.features import FeatureDataset
from mmbeam.training.split import split_of

__all__ = ["Captions", "FeatureCounts", "FeatureDataset", "split_of"]
