"""Training: the loader of pre-computed features, which stands alone, and the fitting of the fusion model."""

from mmbeam.features.captions import Captions
from mmbeam.features.dataset import FeatureDataset
from mmbeam.features.dataset_rows import FeatureCounts
from mmbeam.features.split import split_of

__all__ = ["Captions", "FeatureCounts", "FeatureDataset", "split_of"]
