"""The steps of a job as Beam transforms, each usable alone: Plan, ReadShards or ReadFeatures, Embed, Label,
Generate, Synthesize, WriteParquet or Rows, Summarize.
ToBatches and Rows join them to other sources and sinks (docs/compose.md)."""

from mmbeam.transforms.compose import (
    CaptionRows,
    EmbedRows,
    Filter,
    LabelRows,
    StageEmbeddings,
    StageHandler,
    ToBatches,
    parse_example,
)
from mmbeam.transforms.plan import Plan, Summarize
from mmbeam.transforms.read import ReadFeatures, ReadShards
from mmbeam.transforms.rows import Rows
from mmbeam.transforms.run_stage import Embed, Generate, Label, Synthesize
from mmbeam.transforms.write import BatchCoder, WriteParquet

__all__ = [
    "BatchCoder",
    "CaptionRows",
    "Embed",
    "EmbedRows",
    "Filter",
    "Generate",
    "Label",
    "LabelRows",
    "Plan",
    "ReadFeatures",
    "ReadShards",
    "Rows",
    "StageEmbeddings",
    "StageHandler",
    "Summarize",
    "Synthesize",
    "ToBatches",
    "WriteParquet",
    "parse_example",
]
