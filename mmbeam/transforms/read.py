"""ReadShards: work units to batches of decoded samples, read ahead in the background."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict

import apache_beam as beam

from mmbeam.config import Reading, Windows
from mmbeam.errors import FailureRateError, UsageError
from mmbeam.io import runs
from mmbeam.io.runs import Run
from mmbeam.reading import read_batches
from mmbeam.types import Batch, Needs, WorkUnit


class ReadShards(beam.PTransform):
    """PCollection[WorkUnit] -> PCollection[Batch]: opens, groups and decodes what `needs` says.

    With a `run`, a unit whose Parquet is there already is not read again: it flows on as one empty
    batch that holds its report. Batches of a unit come in order and stay in one fused stage.
    """

    def __init__(
        self, needs: Needs, reading: Reading | None = None, run: Run | None = None, windows: Windows | None = None
    ) -> None:
        super().__init__()
        reading = reading or Reading()
        if run is not None and run.configuration.get("reading", asdict(reading)) != asdict(reading):
            raise UsageError("ReadShards: the run was made for another `reading`; give both the same")
        self.dofn = _Read(needs, reading, run, windows or Windows())

    def expand(self, units: beam.PCollection[WorkUnit]) -> beam.PCollection[Batch]:
        return units | "Read" >> beam.ParDo(self.dofn)


class _Read(beam.DoFn):
    def __init__(self, needs: Needs, reading: Reading, run: Run | None, windows: Windows) -> None:
        self.needs = needs
        self.reading = reading
        self.run = run
        self.windows = windows

    def process(self, unit: WorkUnit) -> Iterator[Batch]:
        try:
            yield from self._batches(unit)
        except Exception as error:
            runs.note(error)
            raise

    def _batches(self, unit: WorkUnit) -> Iterator[Batch]:
        if self.run is not None:
            runs.go_on(self.run)
            reason = runs.stopped(self.run)
            if reason is not None:
                raise FailureRateError(reason)
            report = None if unit.replace else runs.report_of(self.run, unit.id)
            if report is not None:
                yield Batch(unit=unit, index=0, last=True, report=report)
                return
        with closing(read_batches(unit, self.reading, self.needs, self.windows)) as batches:
            for batch in batches:
                if self.run is not None:
                    runs.go_on(self.run)
                yield batch
                del batch  # a window is large: do not hold it while waiting for the next
