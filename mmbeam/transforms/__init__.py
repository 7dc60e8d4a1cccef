"""The steps of a job as Beam transforms, each usable alone: Plan, ReadShards or ReadFeatures, Embed, Generate,
WriteParquet or Rows, Summarize."""

from mmbeam.transforms.plan import Plan
from mmbeam.transforms.read import ReadFeatures, ReadShards
from mmbeam.transforms.run_stage import Embed, Generate
from mmbeam.transforms.write import BatchCoder, Rows, Summarize, WriteParquet

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
