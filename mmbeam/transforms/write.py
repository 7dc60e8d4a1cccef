"""WriteParquet, Summarize and Rows: batches to one Parquet per unit, reports to a summary, or plain rows."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import apache_beam as beam

from mmbeam.errors import FlowError
from mmbeam.io import runs
from mmbeam.io.parquet import UnitWriter, report_failed_unit
from mmbeam.io.rows import build_schema, settle
from mmbeam.io.runs import Run
from mmbeam.report.progress import progress
from mmbeam.types import Batch, Output, RunReport, Stage, UnitReport


class WriteParquet(beam.PTransform):
    """PCollection[Batch] -> PCollection[UnitReport]: one Parquet per unit, published whole."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def expand(self, batches: beam.PCollection[Batch]) -> beam.PCollection[UnitReport]:
        return batches | "Write" >> beam.ParDo(_Write(self.run))


class _Write(beam.DoFn):
    """Batches of one unit come in order within one bundle; a unit that never ends broke the fusion."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.writers: dict[str, UnitWriter] = {}

    def start_bundle(self) -> None:
        self.writers = {}

    def process(self, batch: Batch) -> Iterator[UnitReport]:
        unit = batch.unit
        if batch.report is not None:
            progress.unit_done(batch.report)
            yield batch.report
            return
        if batch.broken is not None:
            self._abort(unit.id)
            report = report_failed_unit(self.run, unit, batch.broken)
            progress.unit_done(report)
            yield report
            return
        writer = self.writers.get(unit.id) or self.writers.setdefault(unit.id, UnitWriter(self.run, unit))
        tally = writer.write(batch)
        progress.add(tally)
        runs.judge(self.run, tally, batch.failures)
        if batch.last:
            report = writer.commit()
            del self.writers[unit.id]
            progress.unit_done(report)
            yield report

    def finish_bundle(self) -> None:
        left = sorted(self.writers)
        self.teardown()
        if left:
            raise FlowError(
                f"the bundle ended inside unit {left[0]}: a step between ReadShards and WriteParquet broke the fusion "
                "(a Reshuffle, a GroupByKey, or with_resource_hints on a single step); remove it"
            )

    def teardown(self) -> None:
        for unit in list(self.writers):
            self._abort(unit)

    def _abort(self, unit: str) -> None:
        writer = self.writers.pop(unit, None)
        if writer is not None:
            writer.abort()


class Summarize(beam.PTransform):
    """PCollection[UnitReport] -> PCollection[RunReport], of one element; writes summary.json.

    `check` is called with the report once it is written, and may raise what makes the job fail.
    """

    def __init__(self, run: Run, check: Callable[[RunReport], None] | None = None) -> None:
        super().__init__()
        self.run = run
        self.check = check

    def expand(self, reports: beam.PCollection[UnitReport]) -> beam.PCollection[RunReport]:
        return (
            reports
            | "Gather" >> beam.combiners.ToList()  # list[UnitReport]
            | "Summary" >> beam.Map(_summarize, self.run, time.time(), self.check)  # RunReport
        )


def _summarize(
    reports: list[UnitReport], run: Run, started: float, check: Callable[[RunReport], None] | None
) -> RunReport:
    report = runs.write_summary(run, reports, time.time() - started)
    if check is not None:
        check(report)
    return report


class Rows(beam.PTransform):
    """PCollection[Batch] -> PCollection[dict]: what WriteParquet would write, for a sink of one's own.

    `stages` are those of the pipeline; a failed sample gives no row. Nothing is committed, so nothing
    is resumed: that is what WriteParquet is for.
    """

    def __init__(self, *stages: Stage) -> None:
        super().__init__()
        self.outputs: list[Output] = [output for stage in stages for output in stage.outputs]

    def expand(self, batches: beam.PCollection[Batch]) -> beam.PCollection[dict[str, Any]]:
        return batches | "Rows" >> beam.FlatMap(_rows, outputs=self.outputs)


def _rows(batch: Batch, outputs: Sequence[Output]) -> Iterator[dict[str, Any]]:
    schema = build_schema(outputs, cleaning=any(s.text_clean is not None for s in batch.samples), metadata={})
    yield from settle(batch, outputs, schema).rows.to_pylist()
