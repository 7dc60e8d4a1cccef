"""ReadShards: work units to batches of decoded samples, read ahead in the background."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict

import apache_beam as beam

from mmbeam import runs
from mmbeam.config import Reading, Windows
from mmbeam.errors import FailureRateError, UsageError
from mmbeam.readers.windows import read_batches
from mmbeam.runs import Run
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
        self.dofn = ReadUnits(read_batches, needs, reading, run, windows)

    def expand(self, units: beam.PCollection[WorkUnit]) -> beam.PCollection[Batch]:
        return units | "Read" >> beam.ParDo(self.dofn)


class ReadUnits(beam.DoFn):
    """Units to batches by `read`, but for units that are committed."""

    def __init__(
        self,
        read: Callable[[WorkUnit, Reading, Needs, Windows], Generator[Batch]],
        needs: Needs,
        reading: Reading | None,
        run: Run | None,
        windows: Windows | None,
    ) -> None:
        self.read = read
        self.needs = needs
        self.reading = reading or Reading()
        self.run = run
        self.windows = windows or Windows()
        made_for = asdict(self.reading) if run is None else run.configuration.get("reading", asdict(self.reading))
        if made_for != asdict(self.reading):
            raise UsageError("the run was made for another `reading`; give both the same")

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
        with closing(self.read(unit, self.reading, self.needs, self.windows)) as batches:
            for batch in batches:
                if self.run is not None:
                    runs.go_on(self.run)
                yield batch
                del batch  # a window is large: do not hold it while waiting for the next
