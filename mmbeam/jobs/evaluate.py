"""The evaluate job: how good is what a run wrote. Here it is decided what is measured, and the results are kept."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmbeam.errors import UsageError
from mmbeam.features.columns import WrittenRows
from mmbeam.jobs.evaluate_texts import Place, TextJob
from mmbeam.jobs.evaluate_vectors import check_pairs, evaluate_probe, evaluate_retrieval, label_text, related_pairs
from mmbeam.jobs.options import pipeline_options
from mmbeam.metrics.pairs import KEY, Field, PairSource, ReferenceFile, json_object, texts_of
from mmbeam.metrics.text import ERROR_RATES, text_metrics
from mmbeam.runs.store import Store

ALL = "all"  # in the place of a pair of columns: every pair of one model
TRANSCRIPT = "transcript"  # in the name of a column
OF_TEXT = ("chrf", "bleu", "rouge", "cider", "exact_match")  # the first says which samples are the worst
OF_TRANSCRIPTS = ("wer", "cer", "exact_match")
PACKAGES = ("mmbeam", "numpy", "sacrebleu", "rouge-score", "jiwer", "scikit-learn")
REFERENCE = "reference"  # the field of a file of references, unless another is named

_OF_SAMPLE = (KEY, "shard", "text", "text_clean", "metadata")  # strings that no model made
_FIELDS_NAMED = 30  # in an error


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What is measured. With nothing named, it is retrieval between all related columns of vectors."""

    run: str  # the output of a job
    reference: str | None = None  # a column, or an entry of the metadata; with `references`, a field of that file
    references: str | None = None  # a file that has them, by key
    column: str | None = None  # the text that is measured; None: the only one that was generated
    metrics: tuple[str, ...] | None = None  # the first says which samples are the worst; None: by the column
    retrieval: tuple[str, ...] = ()  # "image_embedding:text_embedding", or ALL
    label: str | None = None  # a column, or an entry of the metadata
    output: str | None = None  # a directory; None: within the run's own
    beam_args: tuple[str, ...] = ()


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Measure what is asked for, write evaluation.json and the scores of each sample; return the former and its path.

    Raises UsageError for names that mean nothing here, JobError if there is nothing to measure.
    """
    pipeline_options(options.beam_args)
    rows = WrittenRows.of(options.run)
    place = _place(options, rows)
    texts = _text_job(options, rows, place)
    label = _label(options, rows)
    pairs = _pairs(options, rows, default=texts is None and label is None)
    result: dict[str, Any] = {
        "run": str(rows.store),
        "fingerprint": rows.fingerprint,
        "versions": _versions(),
        "failed_samples": rows.failed,
    }
    if texts is not None:
        result["text"] = texts.run(options.beam_args)
    result["retrieval"] = [evaluate_retrieval(rows, left, right) for left, right in pairs]
    result["probes"] = [] if label is None else [evaluate_probe(rows, column, label) for column in rows.widths]
    place.store.replace(place.report, json.dumps(result, indent=1, ensure_ascii=False).encode())
    return {**result, "report": f"{place.store}/{place.report}"}


def _place(options: EvaluateOptions, rows: WrittenRows) -> Place:
    if options.output is None:
        return Place(store=rows.store, prefix="_mmbeam/")
    return Place(store=Store(options.output), prefix="")


def _pairs(options: EvaluateOptions, rows: WrittenRows, default: bool) -> list[tuple[str, str]]:
    asked = options.retrieval or ((ALL,) if default else ())
    if not asked:
        return []
    pairs = related_pairs(rows) if ALL in asked else []
    pairs += check_pairs(rows, [pair for pair in asked if pair != ALL])
    if not pairs:
        raise UsageError(
            f"{rows.store}: expected vectors of two modalities to retrieve one by the other, or --reference to measure "
            f"texts by, or --label; the rows have {', '.join(rows.schema.names)}"
        )
    return pairs


def _label(options: EvaluateOptions, rows: WrittenRows) -> Field | None:
    if options.label is None:
        return None
    if not rows.widths:
        raise UsageError(f"--label: expected vectors to read it off; the rows have {', '.join(rows.schema.names)}")
    field = Field(name=options.label, in_metadata=options.label not in rows.schema.names)
    _check_field(rows, "--label", field, _is_label)
    return field


def _text_job(options: EvaluateOptions, rows: WrittenRows, place: Place) -> TextJob | None:
    if options.reference is None and options.references is None:
        return None
    column = _text_column(options, rows)
    metrics = options.metrics or (OF_TRANSCRIPTS if TRANSCRIPT in column else OF_TEXT)
    text_metrics(metrics)  # raises what is wrong with them before anything starts
    reference: Field | ReferenceFile
    if options.references is None:
        name = str(options.reference)  # a text is not its own reference: the shards' caption may be meant
        reference = Field(name=name, in_metadata=name == column or name not in rows.schema.names)
        _check_field(rows, "--reference", reference, _is_reference)
    else:
        url = options.references if "://" in options.references else str(Path(options.references).absolute())
        reference = ReferenceFile(url=url, field=options.reference or REFERENCE)
    source = PairSource(hypothesis=column, reference=reference, blank=not ERROR_RATES.isdisjoint(metrics))
    return TextJob(rows=rows, source=source, metrics=metrics, place=place)


def _text_column(options: EvaluateOptions, rows: WrittenRows) -> str:
    """The column that is measured."""
    strings = [field.name for field in rows.schema if pa.types.is_string(field.type)]
    if options.column is not None:
        if options.column not in strings:
            raise UsageError(f"--column {options.column}: expected a column of text; there are {', '.join(strings)}")
        return options.column
    made = [name for name in strings if name not in _OF_SAMPLE]
    if len(made) == 1:
        return str(made[0])
    if made:
        raise UsageError(f"{rows.store}: {', '.join(made)} were generated; say which is measured: --column {made[0]}")
    raise UsageError(
        f"{rows.store}: expected a column of generated text, found {', '.join(rows.schema.names)}; --column names one"
    )


def _check_field(rows: WrittenRows, option: str, field: Field, usable: Callable[[Any], bool]) -> None:
    """Raise UsageError, which says what there is, unless a row is found in which the field can be used."""
    strange: Any = None
    for value in _values(rows, field):
        if usable(value):
            return
        strange = value if strange is None else strange
    kind = type(strange).__name__
    found = f"no row has {field.name}" if strange is None else f"found no text in {field.name}, but {kind}"
    entries = ", ".join(_entries(rows)) or "none"
    raise UsageError(f"{option} {field.name}: {found}; columns: {', '.join(rows.schema.names)}; metadata: {entries}")


def _values(rows: WrittenRows, field: Field) -> Iterator[Any]:
    for batch in rows.read((field.column,)):
        yield from field.values(batch)


def _entries(rows: WrittenRows) -> list[str]:
    """Names of what is in the metadata, of the first few that are found."""
    names: dict[str, None] = {}
    for batch in rows.read(("metadata",)):
        for text in batch.column("metadata").to_pylist():
            names |= dict.fromkeys(json_object(text))
        if len(names) >= _FIELDS_NAMED:
            break
    return list(names)[:_FIELDS_NAMED]


def _is_reference(value: Any) -> bool:
    return any(text.strip() for text in texts_of(value))


def _is_label(value: Any) -> bool:
    return label_text(value) is not None


def _versions() -> dict[str, str]:
    """Of the packages whose version may change a score, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
