"""Embed: runs a stage on every batch, on the thread that owns the stage's device."""

import logging
import os
import socket
from collections.abc import Iterator

import apache_beam as beam

from mmbeam import runs
from mmbeam.errors import DeviceError
from mmbeam.models import placement
from mmbeam.types import Batch, Stage

log = logging.getLogger(__name__)


class Embed(beam.PTransform):
    """PCollection[Batch] -> PCollection[Batch]: adds the stage's outputs to each batch.

    Several models in one pass over the shards are several Embed steps in a row. The model is loaded
    once per process and device; a unit stays on the device on which it began. A DeviceError fails the
    bundle; in a worker process it ends the process too, because nothing a broken device says afterwards
    can be trusted.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.dofn = RunStage(stage)

    def expand(self, batches: beam.PCollection[Batch]) -> beam.PCollection[Batch]:
        return batches | "Run" >> beam.ParDo(self.dofn)


class RunStage(beam.DoFn):
    """A stage on each batch that holds samples."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.launcher = _process()

    def setup(self) -> None:
        if _process() != self.launcher:
            os.dup2(2, 1)  # nobody reads a worker's stdout: after 64 KB a library that prints would block
            placement.claim_one_device(self.stage.device)

    def process(self, batch: Batch) -> Iterator[Batch]:
        ended = True
        try:
            yield self._run(batch)
            ended = batch.last
        finally:
            if ended:  # its unit has, or this attempt at it, here or in a later step
                placement.release_device(self.stage.device, batch.unit.id)

    def _run(self, batch: Batch) -> Batch:
        if not batch.samples or batch.unit_error:
            return batch
        try:
            return placement.lease_device(self.stage.device, batch.unit.id).run(self.stage, batch)
        except Exception as error:
            if isinstance(error, DeviceError) and _process() != self.launcher:
                log.critical("this worker ends, so that a fresh one can go on: %s", error)
                os._exit(1)
            runs.note(error)
            raise


def _process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()
