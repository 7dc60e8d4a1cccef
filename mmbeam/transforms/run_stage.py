"""Embed, Label, Generate and Synthesize: run a stage on every batch, on the thread that owns the stage's device."""

import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np

from mmbeam.errors import DeviceError, public_url
from mmbeam.models import placement
from mmbeam.process import steps
from mmbeam.runs.attempts import release_all
from mmbeam.runs.control import record_error
from mmbeam.types import Audio, Batch, Sample, Stage

log = logging.getLogger(__name__)


class Embed(beam.PTransform):
    """PCollection[Batch] -> PCollection[Batch]: add the stage's vectors to each batch.

    To run several models in one pass over the shards, put several Embed steps in a row. The model is loaded
    once per process and device; a unit stays on the device on which it began. A DeviceError fails the
    bundle. In a worker process it also ends the process, because later results of a broken device are unreliable.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.dofn = RunStage(stage)

    def expand(self, batches: beam.PCollection[Batch]) -> beam.PCollection[Batch]:
        """Apply the step."""
        return batches | "Run" >> beam.ParDo(self.dofn)

    def display_data(self) -> dict[str, Any]:
        """Return what a runner's interface shows of the step: model, digest, device, dtype and batch size."""
        stage = self.dofn.stage
        shown = {name: getattr(stage, name, None) for name in ("model", "digest", "device", "dtype", "batch_size")}
        return {name: public_url(str(value)) for name, value in shown.items() if value is not None}


class Label(Embed):
    """PCollection[Batch] -> PCollection[Batch]: add the classes, objects, segments or tags of each sample.

    It may stand before or behind other steps, which do not affect it. Models and devices are handled as in Embed.
    """


class Generate(Embed):
    """PCollection[Batch] -> PCollection[Batch]: add the text that the stage's model generates for each sample.

    It may follow Embed steps, which do not affect it. Models and devices are handled as in Embed.
    """


class Synthesize(Embed):
    """PCollection[Batch] -> PCollection[Batch]: add the images or sounds that the stage's model makes of each text.

    WriteParquet writes them to WebDataset shards under _media/. Models and devices are handled as in Embed.
    """


class RunStage(beam.DoFn):
    """Runs a stage on each batch that holds samples."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.launcher = socket.gethostname(), os.getpid()  # the process that builds the pipeline
        self.has_passed = False  # in isolation: the stage has run on an input known to be good

    def setup(self) -> None:
        """In a worker process, claim one device and redirect stdout to stderr."""
        if self._in_worker():
            os.dup2(2, 1)  # a worker's stdout is not read: after 64 KB a library that prints would block
            placement.claim_one_device(self.stage.device)

    def process(self, batch: Batch) -> Iterator[Batch]:
        """Yield the batch with the stage's outputs."""
        unit_ended = True
        try:
            if batch.samples and not batch.unit_error:
                yield self._run(batch)
            else:
                yield batch
            unit_ended = batch.last
        finally:
            if unit_ended:  # also after an error, here or in a later step
                placement.release_device(self.stage.device, batch.unit.id)

    def _run(self, batch: Batch) -> Batch:
        try:
            device = placement.lease_device(self.stage.device, batch.unit.id)
            if batch.unit.isolation is not None:
                if not self.has_passed:  # a model that cannot be loaded, or a broken device, is no sample's fault
                    steps.begin("model", ())
                    device.run(self.stage, _known_good(self.stage, batch))
                    self.has_passed = True
                steps.begin("model", batch.samples)
            return device.run(self.stage, batch)
        except Exception as error:
            if isinstance(error, DeviceError) and self._in_worker():
                log.critical("this worker process ends, so that a fresh one can continue: %s", error)
                release_all()
                os._exit(1)
            record_error(error)
            raise

    def _in_worker(self) -> bool:
        return (socket.gethostname(), os.getpid()) != self.launcher


def _known_good(stage: Stage, batch: Batch) -> Batch:
    """Return a window of one sample that every model can process: a black image, a second of silence, a letter."""
    needs = stage.needs
    rates = needs.sampling_rates or frozenset({16_000})
    sample = Sample(
        key="known-good",
        shard="",
        offset=0,
        present=needs.modalities,
        image=np.zeros((64, 64, 3), np.uint8) if "image" in needs.modalities else None,
        image_size=(64, 64) if "image" in needs.modalities else None,
        audio=Audio(waves={rate: np.zeros(rate, np.float32) for rate in rates}, seconds=1.0),
        text="a",
        metadata="{}",
        features={
            column.name: np.zeros((1, column.width) if column.tokens else column.width, np.float32)
            for column in needs.columns
        },
    )
    return Batch(unit=batch.unit, index=0, last=False, samples=(sample,))
