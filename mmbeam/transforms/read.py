"""ReadShards and ReadFeatures: work units to batches of samples, read ahead in the background."""

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import apache_beam as beam

from mmbeam.config import Reading, Windows
from mmbeam.errors import FailureRateError, UsageError
from mmbeam.features.read import read_features
from mmbeam.process import progress, steps
from mmbeam.readers.windows import HeldBytes, prefetch, read_batches
from mmbeam.runs.attempts import attempt
from mmbeam.runs.commits import report_of
from mmbeam.runs.control import raise_if_failed, record_error, stop_reason
from mmbeam.runs.run import Run, part_name
from mmbeam.transforms.metrics import report_source
from mmbeam.types import Batch, Needs, UnitReport, WorkUnit

log = logging.getLogger(__name__)

# Runs a unit whose attempts ended their processes, and returns its report, or the reason why it failed.
Isolate = Callable[[WorkUnit], UnitReport | str]
MAX_ATTEMPTS = 3  # that end their processes before a unit is isolated

Read = Callable[..., Generator[Batch]]  # of a unit, reading, needs, windows and `held`


class ReadShards(beam.PTransform):
    """PCollection[WorkUnit] -> PCollection[Batch]: open shards, group members into samples and decode what is needed.

    With a `run`, a committed unit is not read again: it passes as one empty batch that holds its report.
    The batches of a unit come in order and stay in one fused stage. With `isolate` too, attempts at units are marked,
    and `isolate` runs a unit of which MAX_ATTEMPTS have ended their processes. If `shared`, a unit at which another
    process is passes as one empty batch whose report has the status "elsewhere".
    """

    read: Read = staticmethod(read_batches)

    def __init__(
        self,
        needs: Needs,
        reading: Reading | None = None,
        run: Run | None = None,
        windows: Windows | None = None,
        isolate: Isolate | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.dofn = ReadUnits(self.read, needs, reading, run, windows, isolate, shared)

    def expand(self, units: beam.PCollection[WorkUnit]) -> beam.PCollection[Batch]:
        """Apply the step."""
        return units | "Read" >> beam.ParDo(self.dofn)

    def display_data(self) -> dict[str, Any]:
        """Return what a runner's interface shows of the step."""
        needs, windows = self.dofn.needs, self.dofn.windows
        return {
            "modalities": ", ".join(sorted(needs.modalities)),
            "columns": ", ".join(sorted(column.name for column in needs.columns)),
            "window_bytes": windows.decoded_bytes,
            "window_samples": windows.samples,
        }


class ReadFeatures(ReadShards):
    """PCollection[WorkUnit] -> PCollection[Batch]: read Parquet files that `mmbeam embed` wrote, instead of shards.

    Reads the columns that `needs` names. Of `reading` only the cleaning applies. With a `run`, committed units are not
    read again.
    """

    read: Read = staticmethod(read_features)


class ReadUnits(beam.DoFn):
    """Reads units to batches by `read`, a window ahead of the consumer; passes committed units on as their reports."""

    def __init__(
        self,
        read: Read,
        needs: Needs,
        reading: Reading | None,
        run: Run | None,
        windows: Windows | None,
        isolate: Isolate | None = None,
        shared: bool = False,
    ) -> None:
        self.read = read
        self.needs = needs
        self.reading = reading or Reading()
        self.run = run
        self.windows = windows or Windows()
        self.isolate = isolate
        self.shared = shared
        if (
            run is not None
            and run.configuration.get("reading", self.reading.configuration()) != self.reading.configuration()
        ):
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
            if self.run is None or self.isolate is None or unit.isolation is not None:
                yield from self._read(unit)
                return
            exclusive = self.shared and not unit.replace
            with attempt(self.run.store, unit.id, part_name(unit.id), exclusive) as died:
                if exclusive:
                    if died is None:
                        yield Batch(unit=unit, index=0, last=True, report=UnitReport(unit=unit.id, status="elsewhere"))
                        return
                    if (report := report_of(self.run, unit.id)) is not None:  # committed since the look above
                        yield Batch(unit=unit, index=0, last=True, report=report)
                        return
                if died is None or died < MAX_ATTEMPTS:
                    yield from self._read(unit)
                    return
                log.warning("unit %s: %d attempts ended their processes; it runs in a child process", unit.id, died)
                report_or_reason = self.isolate(unit)
                if isinstance(report_or_reason, str):
                    yield Batch(unit=unit, index=0, last=True, unit_error=report_or_reason)
                    return
                progress.add(report_or_reason.tally)
                yield Batch(unit=unit, index=0, last=True, report=report_or_reason)
        except Exception as error:
            record_error(error)
            raise

    def _read(self, unit: WorkUnit) -> Iterator[Batch]:
        """Yield the windows of a unit."""
        for source in unit.inputs:
            report_source(source.shard.path)
        windows = self.windows
        if unit.isolation is not None and unit.isolation.single:
            windows = replace(windows, samples=1)
        held = None if unit.isolation is not None else HeldBytes()
        read = self.read(unit, self.reading, self.needs, windows, held=held)
        ahead = read if held is None else prefetch(read, f"mmbeam-read-{unit.id}", held)
        with closing(ahead) as batches:
            for batch in batches:
                if self.run is not None:
                    raise_if_failed(self.run)
                yield batch
                del batch  # a window is large: do not hold it while waiting for the next
                steps.begin("read", ())
