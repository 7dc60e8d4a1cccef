"""ReadShards and ReadFeatures: work units to batches of samples, read ahead in the background."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict

import apache_beam as beam

from mmbeam.config import Reading, Windows
from mmbeam.errors import FailureRateError, UsageError
from mmbeam.features.read import read_features
from mmbeam.readers.windows import prefetch, read_batches
from mmbeam.runs.commits import report_of
from mmbeam.runs.control import raise_if_failed, record_error, stop_reason
from mmbeam.runs.run import Run
from mmbeam.types import Batch, Needs, WorkUnit

Read = Callable[[WorkUnit, Reading, Needs, Windows], Generator[Batch]]


class ReadShards(beam.PTransform):
    """PCollection[WorkUnit] -> PCollection[Batch]: open shards, group members into samples and decode what is needed.

    With a `run`, a committed unit is not read again: it passes as one empty batch that holds its report.
    The batches of a unit come in order and stay in one fused stage.
    """

    read: Read = staticmethod(read_batches)

    def __init__(
        self, needs: Needs, reading: Reading | None = None, run: Run | None = None, windows: Windows | None = None
    ) -> None:
        super().__init__()
        self.dofn = ReadUnits(self.read, needs, reading, run, windows)

    def expand(self, units: beam.PCollection[WorkUnit]) -> beam.PCollection[Batch]:
        """Apply the step."""
        return units | "Read" >> beam.ParDo(self.dofn)


class ReadFeatures(ReadShards):
    """PCollection[WorkUnit] -> PCollection[Batch]: read Parquet files that `mmbeam embed` wrote, instead of shards.

    Reads the columns that `needs` names. Of `reading` only the cleaning applies. With a `run`, committed units are not
    read again.
    """

    read: Read = staticmethod(read_features)


class ReadUnits(beam.DoFn):
    """Reads units to batches by `read`, a window ahead of the consumer; passes committed units on as their reports."""

    def __init__(
        self, read: Read, needs: Needs, reading: Reading | None, run: Run | None, windows: Windows | None
    ) -> None:
        self.read = read
        self.needs = needs
        self.reading = reading or Reading()
        self.run = run
        self.windows = windows or Windows()
        if run is not None and run.configuration.get("reading", asdict(self.reading)) != asdict(self.reading):
            raise UsageError("the run was made for another `reading`; use the same for both")

    def process(self, unit: WorkUnit) -> Iterator[Batch]:
        """Yield the unit's batches."""
        try:
            if self.run is not None:
                raise_if_failed(self.run)
                reason = stop_reason(self.run)
                if reason is not None:
                    raise FailureRateError(reason)
                report = None if unit.replace else report_of(self.run, unit.id)
                if report is not None:
                    yield Batch(unit=unit, index=0, last=True, report=report)
                    return
            read = self.read(unit, self.reading, self.needs, self.windows)
            with closing(prefetch(read, f"mmbeam-read-{unit.id}")) as batches:
                for batch in batches:
                    if self.run is not None:
                        raise_if_failed(self.run)
                    yield batch
                    del batch  # a window is large: do not hold it while waiting for the next
        except Exception as error:
            record_error(error)
            raise
