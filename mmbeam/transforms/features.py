"""ReadFeatures: work units of Parquet files that `mmbeam embed` wrote to batches of samples with features."""

from collections.abc import Generator
from functools import partial

import apache_beam as beam

from mmbeam.config import Reading, Windows
from mmbeam.features.read import read_features
from mmbeam.readers.windows import prefetch
from mmbeam.runs import Run
from mmbeam.transforms.read import ReadUnits
from mmbeam.types import Batch, Needs, WorkUnit


class ReadFeatures(beam.PTransform):
    """PCollection[WorkUnit] -> PCollection[Batch]: the place of ReadShards where features are the input.

    Reads the columns that `needs` names, in the background. Of `reading` it takes the cleaning. With a
    `run`, committed units are not read again.
    """

    def __init__(
        self, needs: Needs, reading: Reading | None = None, run: Run | None = None, windows: Windows | None = None
    ) -> None:
        super().__init__()
        self.dofn = ReadUnits(_read_ahead, needs, reading, run, windows)

    def expand(self, units: beam.PCollection[WorkUnit]) -> beam.PCollection[Batch]:
        return units | "Read" >> beam.ParDo(self.dofn)


def _read_ahead(unit: WorkUnit, reading: Reading, needs: Needs, windows: Windows) -> Generator[Batch]:
    return prefetch(partial(read_features, unit, reading, needs, windows), f"mmbeam-read-{unit.id}")
