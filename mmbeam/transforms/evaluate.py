"""ScoreTexts: from the rows of a run to sums over the corpus, and to Parquet files of scores per sample."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq

from mmbeam.features.read import read_columns
from mmbeam.metrics.cider import document_frequencies
from mmbeam.metrics.pairs import Pair, PairSource, References
from mmbeam.metrics.text import CIDER, TextTotals, score_pair, text_metrics
from mmbeam.runs.store import Store

COLUMNS = (
    pa.field("key", pa.string(), nullable=False),
    pa.field("shard", pa.string(), nullable=False),
    pa.field("offset", pa.int64(), nullable=False),
    pa.field("hypothesis", pa.string(), nullable=False),
    pa.field("references", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
)


@dataclass(frozen=True)
class Scoring:
    """What to score, and where the scores of the samples are written. Picklable."""

    rows: Store
    source: PairSource
    metrics: tuple[str, ...]
    scores: Store
    folder: str  # in `scores`


class ScoreTexts(beam.PTransform):
    """PCollection[str] of parts' names -> PCollection[TextTotals] of one element.

    The scores of a part's samples are written to a Parquet file of the same name in the folder of scores, which
    replaces that of an earlier attempt. CIDEr-D reads the references twice: every worker receives their document
    frequencies, as a dictionary of the n-grams that two or more samples have.
    """

    def __init__(self, scoring: Scoring) -> None:
        super().__init__()
        self.scoring = scoring

    def expand(self, parts: beam.PCollection[str]) -> beam.PCollection[TextTotals]:
        """Apply the transforms."""
        side = () if CIDER not in self.scoring.metrics else (beam.pvalue.AsDict(self._frequencies(parts)),)
        return (
            parts
            | "Score" >> beam.ParDo(_Score(self.scoring), *side)  # TextTotals
            | "Sum" >> beam.CombineGlobally(_sum)  # TextTotals
        )

    def _frequencies(self, parts: beam.PCollection[str]) -> beam.PCollection[tuple[str, int]]:
        return (
            parts
            | "Count" >> beam.ParDo(_CountDocuments(self.scoring))  # (n-gram, samples)
            | "Frequencies" >> beam.CombinePerKey(sum)  # (n-gram, samples)
            | "Recurring" >> beam.Filter(lambda frequency: frequency[1] > 1)  # (n-gram, samples)
        )


def _sum(totals: Sequence[TextTotals]) -> TextTotals:
    return reduce(add, totals, TextTotals())


class _ReadPairs(beam.DoFn):
    """Reads the pairs of a part; the file of references is loaded once per worker."""

    def __init__(self, scoring: Scoring) -> None:
        self.scoring = scoring
        self.loaded: References = {}

    def setup(self) -> None:
        self.loaded = self.scoring.source.load()

    def pairs(self, part: str) -> Iterator[list[Pair]]:
        source = self.scoring.source
        for batch in read_columns(self.scoring.rows, part, source.columns):
            yield list(source.pairs(batch, self.loaded))


class _CountDocuments(_ReadPairs):
    def process(self, part: str) -> Iterator[tuple[str, int]]:
        for pairs in self.pairs(part):
            documents = (pair.references for pair in pairs if pair.hypothesis is not None and pair.references)
            yield from document_frequencies(documents).items()


class _Score(_ReadPairs):
    def process(self, part: str, frequencies: Mapping[str, int] | None = None) -> Iterator[TextTotals]:
        metrics = text_metrics(self.scoring.metrics, frequencies)
        names = [name for metric in metrics.values() for name in metric.names]
        schema = pa.schema([*COLUMNS, *(pa.field(name, pa.float64(), nullable=False) for name in names)])
        totals = TextTotals()
        scratch = self.scoring.scores.scratch_file(".parquet")
        try:
            with pq.ParquetWriter(scratch, schema, compression="zstd") as writer:
                for pairs in self.pairs(part):
                    scored = [(pair, *score_pair(pair, metrics)) for pair in pairs]
                    totals = reduce(add, (counts for _, counts, _ in scored), totals)
                    rows = [_row(pair, scores) for pair, _, scores in scored if scores]
                    writer.write_table(pa.Table.from_pylist(rows, schema))
            self.scoring.scores.replace(f"{self.scoring.folder}/{part.rpartition('/')[2]}", scratch)
        finally:
            scratch.unlink(missing_ok=True)
        yield totals


def _row(pair: Pair, scores: Mapping[str, float]) -> dict[str, Any]:
    return {
        "key": pair.key,
        "shard": pair.shard,
        "offset": pair.offset,
        "hypothesis": pair.hypothesis,
        "references": list(pair.references),
        **scores,
    }
