"""The evaluate job: text scores, retrieval, linear probes, and scores of labels, of the rows that a run wrote.

Texts are scored by a Beam pipeline. Vectors are measured in this process, on columns read into memory as float32:
retrieval compares all pairs of vectors, and the solver of a probe reads them repeatedly.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.runners.runner import PipelineState

from mmbeam.clean.text import json_object
from mmbeam.errors import FlowError, JobError, UsageError
from mmbeam.features.read import WrittenRows, rows_with_vectors, to_vectors
from mmbeam.features.schema import parse_name
from mmbeam.jobs.execute import plain_error, versions
from mmbeam.jobs.options import pipeline_options
from mmbeam.metrics.labels import (
    classification_scores,
    detection_scores,
    segmentation_scores,
    true_labels,
    true_records,
)
from mmbeam.metrics.pairs import KEY, PairSource, ReferenceFile, RowField, texts_of
from mmbeam.metrics.probe import linear_probe
from mmbeam.metrics.retrieval import match_ranks, retrieval_scores
from mmbeam.metrics.text import ERROR_RATES, TextTotals, text_metrics
from mmbeam.runs.run import part_unit
from mmbeam.runs.store import Store
from mmbeam.transforms.evaluate import ScoreTexts, Scoring

ALL_PAIRS = "all"  # instead of a pair of columns: every pair of columns of one model and width
TEXT_METRICS = ("chrf", "bleu", "rouge", "cider", "exact_match")  # the first ranks the worst samples
TRANSCRIPT_METRICS = ("wer", "cer", "exact_match")  # for a column with "transcript" in its name
PACKAGES = (
    "mmbeam",
    "numpy",
    "sacrebleu",
    "rouge-score",
    "jiwer",
    "scikit-learn",
    "pycocotools",
)  # a version may change a score
REFERENCE = "reference"  # the default field of a file of references

# Without threads: they do not speed up Python code.
IN_PROCESS = ("--direct_running_mode=in_memory", "--direct_num_workers=1")

_SAMPLE_COLUMNS = (KEY, "shard", "text", "text_clean", "metadata")  # strings that no model generated
_FIELDS_SHOWN = 30  # in an error
# By column of `mmbeam label`, the keys of a true record; a true label is a string.
TRUE_FIELDS = {"labels": (), "objects": ("label", "x", "y", "width", "height"), "segments": ("label", "size", "rle")}


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What to measure. If nothing is chosen, retrieval between all related columns of vectors."""

    run: str  # the output of a job
    reference: str | None = None  # a column, or an entry of the metadata; with `references`, a field of that file
    references: str | None = None  # a file of references, joined by key
    column: str | None = None  # the text to measure; None: the only one that was generated
    metrics: tuple[str, ...] | None = None  # the first ranks the worst samples; None: by the column
    retrieval: tuple[str, ...] = ()  # "image_embedding:text_embedding", or ALL_PAIRS
    label: str | None = None  # a column, or an entry of the metadata
    output: str | None = None  # a directory; None: within the run's own
    beam_args: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Destination:
    """Where the results are written."""

    store: Store
    prefix: str  # of every name in it

    def name(self, suffix: str) -> str:
        return f"{self.prefix}evaluation{suffix}"


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Measure, write evaluation.json and the scores of each sample, and return its content with its path as "report".

    Raises UsageError for invalid options and for a file of references that cannot be read, JobError if no row can be
    measured or the pipeline failed, FlowError if the runner lost rows.
    """
    pipeline_options(options.beam_args)
    rows = WrittenRows.of(options.run)
    destination = _Destination(store=rows.store, prefix="_mmbeam/")
    if options.output is not None:
        destination = _Destination(store=Store(options.output), prefix="")
    text_source = _text_source(options, rows)
    label = _label(options, rows)
    pairs = _pairs(options, rows, default=text_source is None and label is None)
    result: dict[str, Any] = {
        "run": str(rows.store),
        "fingerprint": rows.fingerprint,
        "versions": versions(PACKAGES),
        "failed_samples": rows.failed,
    }
    if text_source is not None:
        source, metrics = text_source
        result["text"] = _evaluate_texts(rows, source, metrics, destination, options.beam_args)
    result["retrieval"] = [_evaluate_retrieval(rows, left, right) for left, right in pairs]
    result["probes"] = [] if label is None else [_evaluate_probe(rows, column, label) for column in rows.widths]
    result["labels"] = [] if label is None else [_evaluate_labels(rows, column, label) for column in _labelled(rows)]
    report = destination.name(".json")
    destination.store.replace(report, json.dumps(result, indent=1, ensure_ascii=False).encode())
    return {**result, "report": f"{destination.store}/{report}"}


# Texts


def _text_source(options: EvaluateOptions, rows: WrittenRows) -> tuple[PairSource, tuple[str, ...]] | None:
    """Return the pairs to score and the metrics; None if no references are given. Raises for an unknown metric."""
    text_metrics(options.metrics or ())
    if options.reference is None and options.references is None:
        return None
    column = _text_column(options, rows)
    metrics = options.metrics or (TRANSCRIPT_METRICS if "transcript" in column else TEXT_METRICS)
    text_metrics(metrics)  # raises for an unknown metric or a missing library
    reference: RowField | ReferenceFile
    if options.references is None:
        name = str(options.reference)  # if it equals the column's name, the caption in the shards' metadata is meant
        reference = RowField(name=name, in_metadata=name == column or name not in rows.schema.names)
        _check_field(rows, "reference", reference, lambda value: any(text.strip() for text in texts_of(value)))
    else:
        url = options.references if "://" in options.references else str(Path(options.references).absolute())
        reference = ReferenceFile(url=url, field=options.reference or REFERENCE)
    return PairSource(hypothesis=column, reference=reference, blank=not ERROR_RATES.isdisjoint(metrics)), metrics


def _text_column(options: EvaluateOptions, rows: WrittenRows) -> str:
    strings = [field.name for field in rows.schema if pa.types.is_string(field.type)]
    if options.column is not None:
        if options.column not in strings:
            raise UsageError(
                f"`column` {options.column}: expected a column of text; the rows have {', '.join(strings)}"
            )
        return options.column
    generated = [name for name in strings if name not in _SAMPLE_COLUMNS]
    if len(generated) == 1:
        return str(generated[0])
    if generated:
        raise UsageError(
            f"{rows.store}: {', '.join(generated)} were generated; name the one to measure: `column` {generated[0]}"
        )
    raise UsageError(
        f"{rows.store}: expected a column of generated text, found {', '.join(rows.schema.names)}; name one as `column`"
    )


def _check_field(rows: WrittenRows, argument: str, field: RowField, is_usable: Callable[[Any], bool]) -> None:
    """Raise UsageError, which lists columns and metadata, unless a row has a usable value."""
    unusable: Any = None
    for batch in rows.read((field.column,)):
        for value in field.values(batch):
            if is_usable(value):
                return
            unusable = value if unusable is None else unusable
    problem = f"no row has {field.name}"
    if unusable is not None:
        problem = f"expected text in {field.name}, found {type(unusable).__name__}"
    entries: dict[str, None] = {}
    for batch in rows.read(("metadata",)):
        for text in batch.column("metadata").to_pylist():
            entries |= dict.fromkeys(json_object(text))
        if len(entries) >= _FIELDS_SHOWN:
            break
    shown = ", ".join(list(entries)[:_FIELDS_SHOWN]) or "none"
    raise UsageError(
        f"`{argument}` {field.name}: {problem}; columns: {', '.join(rows.schema.names)}; metadata: {shown}"
    )


def _evaluate_texts(
    rows: WrittenRows,
    source: PairSource,
    metrics: tuple[str, ...],
    destination: _Destination,
    beam_args: tuple[str, ...],
) -> dict[str, Any]:
    unused = set(source.load())  # before the pipeline, so that an unreadable file is reported once
    for batch in rows.read((KEY,)) if unused else ():
        unused.difference_update(batch.column(KEY).to_pylist())
    for name in destination.store.list(destination.name("")):  # scores of an earlier evaluation, perhaps of other parts
        if part_unit(name) is not None:
            destination.store.remove(f"{destination.name('')}/{name}")
    pipeline = beam.Pipeline(options=pipeline_options((*IN_PROCESS, *beam_args)))
    (
        pipeline
        | "Parts" >> beam.Create(rows.parts)  # str
        | ScoreTexts(Scoring(rows.store, source, metrics, destination.store, destination.name("")))  # TextTotals
        | "Save" >> beam.Map(_save, destination.store, destination.name("_totals.json"))  # None
    )
    try:
        state = pipeline.run().wait_until_finish()
    except Exception as error:
        raise plain_error(error) from error
    if state != PipelineState.DONE:
        raise JobError(f"the pipeline ended in state {state}; see the runner's log")
    totals = TextTotals.from_json(json.loads(destination.store.read(destination.name("_totals.json"))))
    if totals.rows != rows.count():
        raise FlowError(f"{rows.store}: expected {rows.count():,} rows, {totals.rows:,} were scored")
    if not totals.scored:
        raise JobError(
            f"{rows.store}: no row has both a text in {source.hypothesis} and a reference: of {totals.rows:,} rows, "
            f"{totals.without_hypothesis:,} have no text and {totals.without_reference:,} of the others no reference"
        )
    text = {"column": source.hypothesis, "metrics": metrics, "unused_keys": len(unused), **totals.to_json()}
    del text["counts"]  # they are in the file of totals
    return {**text, "scores": totals.scores(text_metrics(metrics))}


def _save(totals: TextTotals, store: Store, name: str) -> None:
    store.replace(name, json.dumps(totals.to_json()).encode())


# Vectors


def _pairs(options: EvaluateOptions, rows: WrittenRows, default: bool) -> list[tuple[str, str]]:
    """Return the pairs of columns for retrieval: those named, and with ALL_PAIRS those of one model and width."""
    choices = options.retrieval or ((ALL_PAIRS,) if default else ())
    if not choices:
        return []
    widths, pairs = rows.widths, []
    if ALL_PAIRS in choices:
        spaces = {name: (parsed.model, width) for name, width in widths.items() if (parsed := parse_name(name))}
        pairs += [(left, right) for left, right in combinations(spaces, 2) if spaces[left] == spaces[right]]
    for choice in choices:
        if choice == ALL_PAIRS:
            continue
        left, _, right = choice.partition(":")
        if left not in widths or widths[left] != widths.get(right):
            known = ", ".join(f"{name} ({width} numbers)" for name, width in widths.items()) or "none"
            raise UsageError(f"`retrieval` {choice}: expected LEFT:RIGHT, two columns of one width, among {known}")
        pairs.append((left, right))
    if not pairs:
        raise UsageError(
            f"{rows.store}: expected vectors of two modalities for retrieval, or a `reference` to measure texts, or a "
            f"`label`; the rows have {', '.join(rows.schema.names)}"
        )
    return pairs


def _label(options: EvaluateOptions, rows: WrittenRows) -> RowField | None:
    if options.label is None:
        return None
    labelled = _labelled(rows)
    if not rows.widths and not labelled:
        raise UsageError(
            "`label`: expected vectors to predict it from, or labels of `mmbeam label` to measure; the rows have "
            f"{', '.join(rows.schema.names)}"
        )
    is_own = options.label in labelled  # then the entry of the metadata with the same name is meant
    field = RowField(name=options.label, in_metadata=is_own or options.label not in rows.schema.names)
    if labelled:
        _check_field(rows, "label", field, lambda value: any(_truth(value, kind) for kind in labelled.values()))
    else:
        _check_field(rows, "label", field, lambda value: label_text(value) is not None)
    return field


def _labelled(rows: WrittenRows) -> dict[str, str]:
    """Return the columns of labels, objects and segments, and which of them each is."""
    columns = {name: name.rpartition("_")[2] for name in rows.schema.names}
    return {
        name: kind
        for name, kind in columns.items()
        if kind in TRUE_FIELDS and pa.types.is_list(rows.schema.field(name).type)
    }


def _truth(value: Any, kind: str) -> list[Any] | None:
    """Return the true labels, objects or segments of a row; None if it has none."""
    return true_labels(value) if kind == "labels" else true_records(value, TRUE_FIELDS[kind])


def _evaluate_labels(rows: WrittenRows, column: str, label: RowField) -> dict[str, Any]:
    """Return how well a column of labels, objects or segments agrees with the truth, over the rows with both."""
    kind = _labelled(rows)[column]
    predicted: list[Any] = []
    truths: list[Any] = []
    is_multi, total = False, 0
    for batch in rows.read(list(dict.fromkeys((column, label.column)))):
        total += batch.num_rows
        for records, value in zip(batch.column(column).to_pylist(), label.values(batch), strict=True):
            truth = _truth(value, kind)
            if records is not None and truth is not None:
                predicted.append(records)
                truths.append(truth)
                is_multi = is_multi or isinstance(value, list)
    if not truths:
        raise JobError(f"{rows.store}: no row has both {column} and a true value in {label.name}")
    if kind == "labels":
        scores = classification_scores(predicted, truths, is_multi)
    else:
        scores = (detection_scores if kind == "objects" else segmentation_scores)(predicted, truths)
    return {"column": column, "label": label.name, "rows": len(truths), "left_out": total - len(truths), **scores}


def _evaluate_retrieval(rows: WrittenRows, left: str, right: str) -> dict[str, Any]:
    """Return how well each side retrieves the other, over the rows with both. Raises JobError if there are none."""
    widths = {left: rows.widths[left], right: rows.widths[right]}
    total, filled = rows.count(), 0
    arrays = {name: np.empty((total, width), np.float32) for name, width in widths.items()}
    for batch in rows.read(list(widths)):
        kept = rows_with_vectors(batch, widths)
        for name, width in widths.items():
            arrays[name][filled : filled + kept.num_rows] = to_vectors(kept.column(name), width)
        filled += kept.num_rows
    if not filled:
        raise JobError(f"{rows.store}: no row has both {left} and {right}")
    forward, backward = match_ranks(arrays[left][:filled], arrays[right][:filled])
    return {
        "left": left,
        "right": right,
        "rows": filled,
        "left_out": total - filled,
        "left_to_right": retrieval_scores(forward),
        "right_to_left": retrieval_scores(backward),
    }


def _evaluate_probe(rows: WrittenRows, column: str, label: RowField) -> dict[str, Any]:
    """Return how well the label is predicted from the vectors, over the rows with both."""
    width, total = rows.widths[column], rows.count()
    vectors = np.empty((total, width), np.float32)
    keys: list[str] = []
    labels: list[str] = []
    for batch in rows.read(list(dict.fromkeys((KEY, column, label.column)))):
        batch = rows_with_vectors(batch, {column: width})
        texts = [label_text(value) for value in label.values(batch)]
        kept = batch.filter(pa.array([text is not None for text in texts], pa.bool_()))
        vectors[len(keys) : len(keys) + kept.num_rows] = to_vectors(kept.column(column), width)
        keys.extend(kept.column(KEY).to_pylist())
        labels.extend(text for text in texts if text is not None)
    scores = linear_probe(vectors[: len(keys)], labels, keys)
    return {"embedding": column, "label": label.name, "left_out": total - len(labels), **scores}


def label_text(value: Any) -> str | None:
    """Return the class that a string or an integer names; None for anything else."""
    if isinstance(value, str):
        return value.strip() or None
    return str(value) if isinstance(value, int) else None
