"""The steps of a job as Beam transforms, each usable alone: Plan, ReadShards or ReadFeatures, Embed, Generate,
WriteParquet or Rows, Summarize."""

from mmbeam.transforms.coder import BatchCoder
from mmbeam.transforms.features import ReadFeatures
from mmbeam.transforms.generate import Generate
from mmbeam.transforms.plan import Plan
from mmbeam.transforms.read import ReadShards
from mmbeam.transforms.run_stage import Embed
from mmbeam.transforms.write import Rows, Summarize, WriteParquet

__all__ = [
    "BatchCoder",
    "Embed",
    "Generate",
    "Plan",
    "ReadFeatures",
    "ReadShards",
    "Rows",
    "Summarize",
    "WriteParquet",
]
