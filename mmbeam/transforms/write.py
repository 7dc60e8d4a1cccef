"""WriteParquet, Summarize and Rows: batches to one Parquet per unit, reports to a summary, or plain rows."""

import logging
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam import coders

from mmbeam.errors import FlowError, ShardError
from mmbeam.process import progress, steps
from mmbeam.runs.commits import report_failed_unit
from mmbeam.runs.control import check_failure_rate, count_window, record_error
from mmbeam.runs.plan import repair
from mmbeam.runs.rows import build_schema, make_rows
from mmbeam.runs.run import Run
from mmbeam.runs.summary import write_summary
from mmbeam.runs.writer import UnitWriter
from mmbeam.types import Batch, Output, RunReport, Stage, UnitReport

log = logging.getLogger(__name__)


class BatchCoder(coders.Coder):
    """Estimate the size of a Batch without pickling it. Registered on import.

    Beam samples the sizes of elements even between fused steps. Its default coder pickles an element to measure it,
    which would copy the pixels of the first windows and of a fraction of the later ones. A Batch is pickled only if a
    shuffle separates the steps.
    """

    def encode(self, batch: Batch) -> bytes:
        """Return the batch as a pickle."""
        return pickle.dumps(batch, protocol=5)

    def decode(self, encoded: bytes) -> Batch:
        """Return the batch of a pickle."""
        batch: Batch = pickle.loads(encoded)
        return batch

    def estimate_size(self, batch: Batch) -> int:
        """Return the bytes of the decoded samples and of their features."""
        features: int = sum(feature.nbytes for feature in batch.features.values())
        return features + sum(sample.nbytes for sample in batch.samples)

    def is_deterministic(self) -> bool:
        """Return False: equal batches may pickle differently."""
        return False

    def to_type_hint(self) -> type[Batch]:
        """Return Batch."""
        return Batch


coders.registry.register_coder(Batch, BatchCoder)


class WriteParquet(beam.PTransform):
    """PCollection[Batch] -> PCollection[UnitReport]: write one Parquet per unit, published whole."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.dofn = _Write(run)

    def expand(self, batches: beam.PCollection[Batch]) -> beam.PCollection[UnitReport]:
        """Apply the step."""
        return batches | "Write" >> beam.ParDo(self.dofn)


class _Write(beam.DoFn):
    """Writes units. The batches of one come in order within one bundle, unless something broke the fusion."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.writers: dict[str, UnitWriter] = {}

    def start_bundle(self) -> None:
        self.teardown()  # units left by a bundle that failed

    def process(self, batch: Batch) -> Iterator[UnitReport]:
        try:
            report = batch.report or self._write(batch)
        except Exception as error:
            record_error(error)
            raise
        if report is not None:
            progress.unit_done(report)
            yield report

    def _write(self, batch: Batch) -> UnitReport | None:
        """The unit's report, after its last window."""
        unit = batch.unit
        is_probe = unit.isolation is not None and unit.isolation.probed is not None
        steps.begin("write", batch.samples)
        if batch.unit_error is not None:
            self._abort(unit.id)
            return report_failed_unit(self.run, unit, batch.unit_error, batch.inputs_read)
        writer = self.writers.get(unit.id) or self.writers.setdefault(unit.id, UnitWriter(self.run, unit))
        tally = writer.write(batch)
        if is_probe:  # to see whether a sample ends the process, not for its rows
            if not batch.last:
                return None
            self._abort(unit.id)
            return UnitReport(unit=unit.id, status="failed")
        progress.add(tally)
        # Only the check of the whole run counts parts after the first and retried units. Such a part may have been
        # misread (readers/tar.py), and retried units have more failures than average.
        if not unit.replace and all(source.begin == 0 for source in unit.inputs):
            count_window(self.run, tally, batch.failures)
        if not batch.last:
            return None
        report = writer.commit()
        del self.writers[unit.id]
        return report

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
    """PCollection[UnitReport] -> PCollection[RunReport] of one element: write summary.json.

    `check` is called with the report after it is written, and raises an error if the job must fail. `devices` is the
    number of devices that compute, None if unknown.
    """

    def __init__(self, run: Run, check: Callable[[RunReport], None] | None = None, devices: int | None = 1) -> None:
        super().__init__()
        self.run = run
        self.check = check
        self.devices = devices

    def expand(self, reports: beam.PCollection[UnitReport]) -> beam.PCollection[RunReport]:
        """Apply the step."""
        return (
            reports
            | "Gather" >> beam.combiners.ToList()  # list[UnitReport]
            | "Summary" >> beam.Map(summarize, self.run, time.time(), self.check, self.devices)  # RunReport
        )


def summarize(
    reports: Sequence[UnitReport],
    run: Run,
    started: float,
    check: Callable[[RunReport], None] | None,
    devices: int | None = 1,
) -> RunReport:
    """Write and check the summary of a launch from the reports of all units; `started` is in Unix time."""
    report = write_summary(run, repair(run, reports), time.time() - started, devices)
    if report.units_written:
        check_failure_rate(run, report.tally)
    if check is not None:
        check(report)
    return report


class Rows(beam.PTransform):
    """PCollection[Batch] -> PCollection[dict]: the rows that WriteParquet would write, for another sink.

    `stages` are those of the pipeline. `cleaning` is whether the reading cleans text, which adds `text_clean`. The
    attribute `schema` is the Arrow schema of the rows, for sinks that need one. Nothing is committed, so nothing can be
    resumed: use WriteParquet for that. A sample that lost every output becomes a warning in the log, not a row. A shard
    that cannot be read raises ShardError, since rows alone could not show that some are missing.
    """

    def __init__(self, *stages: Stage, cleaning: bool = False) -> None:
        super().__init__()
        self.outputs: list[Output] = [output for stage in stages for output in stage.outputs]
        self.schema = build_schema(self.outputs, cleaning, metadata={})

    def expand(self, batches: beam.PCollection[Batch]) -> beam.PCollection[dict[str, Any]]:
        """Apply the step."""
        return batches | "Rows" >> beam.FlatMap(_rows, outputs=self.outputs, schema=self.schema)


def _rows(batch: Batch, outputs: Sequence[Output], schema: pa.Schema) -> Iterator[dict[str, Any]]:
    if batch.unit_error is not None:
        raise ShardError(batch.unit_error)
    if batch.report is not None:
        raise FlowError(f"Rows: unit {batch.unit.id} is committed, so it is not read; omit `run` in ReadShards")
    window = make_rows(batch, outputs, schema)
    lost = next((record for record in window.failures if not record["row"]), None)
    if lost is not None:
        log.warning(
            "%d samples gave no row; %r of %s: %s", window.tally.failed, *map(lost.get, ("key", "shard", "message"))
        )
    yield from window.rows.to_pylist()
