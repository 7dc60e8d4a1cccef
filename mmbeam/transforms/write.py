"""WriteParquet: batches to one Parquet per unit."""

import logging
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
from apache_beam import coders

from mmbeam.errors import FlowError
from mmbeam.process import progress, steps
from mmbeam.runs.commits import report_failed_unit
from mmbeam.runs.control import count_window, record_error
from mmbeam.runs.run import Run
from mmbeam.runs.writer import UnitWriter
from mmbeam.transforms.metrics import count_tally, count_unit, report_sink
from mmbeam.types import Batch, UnitReport

log = logging.getLogger(__name__)


class BatchCoder(coders.Coder):
    """Estimate the size of a Batch, and refuse to serialise one. Registered on import.

    Batches stay within one fused stage. Beam samples the sizes of elements even there, and its default coder would
    pickle the pixels of a window to measure it.
    """

    def encode(self, batch: Batch) -> bytes:
        """Raise FlowError: a step has broken the fusion. Beam adds the name of the step."""
        raise FlowError(
            f"unit {batch.unit.id}: a Batch would be serialised here; batches stay in one fused stage from ReadShards "
            "to WriteParquet or Rows. Remove the step that breaks the fusion (a Reshuffle, a GroupByKey, a side input "
            "of batches, or with_resource_hints on a single step)"
        )

    def estimate_size(self, batch: Batch) -> int:
        """Return the bytes of the decoded samples and of their features."""
        features: int = sum(feature.nbytes for feature in batch.features.values())
        return features + sum(sample.nbytes for sample in batch.samples)

    def is_deterministic(self) -> bool:
        """Return True: no batch is encoded."""
        return True

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

    def display_data(self) -> dict[str, Any]:
        """Return what a runner's interface shows of the step."""
        return {"output": self.dofn.run.store.url, "fingerprint": self.dofn.run.fingerprint}


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
            if report.status != "elsewhere":
                progress.unit_done(report)
                count_unit(report)
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
        count_tally(tally)
        # Retried units, and all parts of a shard but the first, are counted only in the check at the end of the run.
        # Such a part may have been misread (readers/tar.py), and retried units have more failures than average.
        if not unit.replace and all(source.begin == 0 for source in unit.inputs):
            count_window(self.run, tally, batch.failures)
        if not batch.last:
            return None
        report = writer.commit()
        del self.writers[unit.id]
        report_sink(self.run.output)
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
