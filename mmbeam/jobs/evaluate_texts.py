"""What the evaluate job does with texts: the Beam pipeline that scores them, and what it found."""

import json
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.runners.runner import PipelineState

from mmbeam.errors import FlowError, JobError
from mmbeam.features.columns import WrittenRows
from mmbeam.jobs.execute import plain_error
from mmbeam.jobs.options import pipeline_options
from mmbeam.metrics.pairs import KEY, PairSource
from mmbeam.metrics.text import TextTotals, text_metrics
from mmbeam.runs.run import PART
from mmbeam.runs.store import Store
from mmbeam.transforms.evaluate import ScoreTexts, Scoring

# The work is Python's own, which threads do not speed up; and between threads Beam 2.77's runner loses what a
# step puts out while another thread flushes its buffer, once a second (TimeBasedBufferingClosableOutputStream).
IN_PROCESS = ("--direct_running_mode=in_memory", "--direct_num_workers=1")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the results go."""

    store: Store
    prefix: str  # of every name in it

    @property
    def report(self) -> str:
        return f"{self.prefix}evaluation.json"

    @property
    def folder(self) -> str:
        """Of the scores of each sample."""
        return f"{self.prefix}evaluation"

    @property
    def totals(self) -> str:
        return f"{self.prefix}evaluation_totals.json"


@dataclass(frozen=True, kw_only=True)
class TextJob:
    """Everything decided before the pipeline. Picklable."""

    rows: WrittenRows
    source: PairSource
    metrics: tuple[str, ...]
    place: Place

    def build(self, pipeline: beam.Pipeline) -> beam.PCollection[None]:
        """The job's pipe expression."""
        scoring = Scoring(self.rows.store, self.source, self.metrics, self.place.store, self.place.folder)
        return (
            pipeline
            | "Parts" >> beam.Create(self.rows.parts)  # str
            | ScoreTexts(scoring)  # TextTotals
            | "Save" >> beam.Map(_save, self.place)  # None
        )

    def run(self, beam_args: tuple[str, ...]) -> dict[str, Any]:
        """Score all rows, and say what came of it.

        Raises JobError if no row has both a text and a reference or the pipeline failed, FlowError if the
        runner lost rows.
        """
        unused = self._unused_keys()
        totals = self._score(beam_args)
        if not totals.scored:
            raise JobError(
                f"{self.rows.store}: no row has both a text in {self.source.hypothesis} and a reference: of "
                f"{totals.rows:,} rows, {totals.without_hypothesis:,} have no text and {totals.without_reference:,} of "
                "the others no reference"
            )
        found = {"column": self.source.hypothesis, "metrics": self.metrics, "unused_keys": unused, **totals.to_json()}
        del found["counts"]  # they are in the file of totals
        return {**found, "scores": totals.scores(text_metrics(self.metrics))}

    def _score(self, beam_args: tuple[str, ...]) -> TextTotals:
        self._sweep()
        pipeline = beam.Pipeline(options=pipeline_options((*IN_PROCESS, *beam_args)))
        self.build(pipeline)
        try:
            state = pipeline.run().wait_until_finish()
        except Exception as error:
            raise plain_error(error) from error
        if state != PipelineState.DONE:
            raise JobError(f"the pipeline ended as {state}; the runner's log says why")
        totals = TextTotals.from_json(json.loads(self.place.store.read(self.place.totals)))
        if totals.rows != self.rows.count():
            raise FlowError(f"{self.rows.store}: expected {self.rows.count():,} rows, {totals.rows:,} were scored")
        return totals

    def _unused_keys(self) -> int:
        """How many keys of a file of references are in no row. Raises UsageError for a file that is none."""
        keys = set(self.source.load())
        for batch in self.rows.read((KEY,)) if keys else ():
            keys.difference_update(batch.column(KEY).to_pylist())
        return len(keys)

    def _sweep(self) -> None:
        """Remove the scores that an earlier evaluation left, of other parts perhaps."""
        for name in self.place.store.list(self.place.folder):
            if PART.fullmatch(name):
                self.place.store.remove(f"{self.place.folder}/{name}")


def _save(totals: TextTotals, place: Place) -> None:
    place.store.replace(place.totals, json.dumps(totals.to_json()).encode())
