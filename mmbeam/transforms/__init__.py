"""The steps of a job as Beam transforms, each usable alone: Plan, ReadShards, Embed, WriteParquet, Summarize, Rows."""

from mmbeam.transforms.coder import BatchCoder
from mmbeam.transforms.embed import Embed
from mmbeam.transforms.plan import Plan
from mmbeam.transforms.read import ReadShards
from mmbeam.transforms.write import Rows, Summarize, WriteParquet

__all__ = ["BatchCoder", "Embed", "Plan", "ReadShards", "Rows", "Summarize", "WriteParquet"]
