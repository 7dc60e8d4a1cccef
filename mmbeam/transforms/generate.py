"""Generate: text for every sample of every batch, on the thread that owns the stage's device."""

import apache_beam as beam

from mmbeam.transforms.run_stage import RunStage
from mmbeam.types import Batch, Stage


class Generate(beam.PTransform):
    """PCollection[Batch] -> PCollection[Batch]: adds the text that the stage's model makes of each sample.

    It may follow Embed steps, which change nothing for it. What is said there of models and devices holds.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.dofn = RunStage(stage)

    def expand(self, batches: beam.PCollection[Batch]) -> beam.PCollection[Batch]:
        return batches | "Run" >> beam.ParDo(self.dofn)
