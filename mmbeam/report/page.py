"""The report of a run: one self-contained HTML page with counts, failures, distributions, maps and samples.

The page is a constant template (page.html) and one JSON object. Everything that comes from the run is in the object,
and the script of the template shows it as text; none of it becomes markup. The page loads nothing, and its content
security policy allows only its own script and style, and media in data URLs.
"""

import base64
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmbeam.clean.text import json_object
from mmbeam.errors import SECRET_NAME, UsageError, redact
from mmbeam.features.read import open_part, read_columns
from mmbeam.features.schema import widths_of
from mmbeam.names import COLUMN_OF_LABELS, COLUMN_OF_TASK, MODALITIES, VERSION
from mmbeam.readers.paths import is_local, local_path, public_path
from mmbeam.readers.units import unit_from_json
from mmbeam.report.gallery import Media, draw_masks, load_media
from mmbeam.report.status import failed_units
from mmbeam.report.summary import STEPS
from mmbeam.runs.commits import committed, load_reports, read_failures
from mmbeam.runs.control import stop_reason
from mmbeam.runs.plan import load_plan
from mmbeam.runs.run import PRIVATE, Run, find_run, part_name, recorded_reading
from mmbeam.runs.summary import read_summary
from mmbeam.types import Input, SampleId, Shard, Tally, UnitReport

MARK = "<!-- mmbeam report -->"  # the beginning of every page; another file is never replaced
MAX_PARTS = 64  # maximum of Parquet files that are read; a larger run is sampled at random
MAX_ROWS = 20_000  # maximum of rows that are read; a larger run is sampled at random
VECTOR_ROWS = 4_000  # of these, the rows whose vectors are read
POINTS = 1_500  # of these, the rows on the maps
TEXT_CHARS = 2_000  # of a text, on a card
POINT_CHARS = 160  # of a text, on a map
BINS = 24  # bars of a histogram
CLUSTERS = 8  # at most, and also colours of a map
COMPONENTS = 16  # number of principal components that are clustered
FOUND = 20  # labels, objects, segments or tags on a card
EXTREMES = 8  # cards of the most likely texts, and of the least likely
PAIRS = 4  # near-duplicates of a column
NEAR = 0.95  # minimum cosine similarity of near-duplicates
FAILURE_FILES = 64  # read for examples
EXAMPLES = 8  # failures of a kind
FAILED_SAMPLES = 24  # cards of failures

Vectors = npt.NDArray[np.float32]  # [rows, width]


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What to report on, and where to."""

    run: str  # the output of a job
    html: str | None = None  # a local file; None: in the output, or in the working directory if that is not local
    samples: int = 48  # random ones in the gallery
    seed: int = 0  # of every random choice
    color: str | None = None  # column, or field of the metadata, that colours the maps; None: clusters of the vectors


class Written(NamedTuple):
    """What was written."""

    path: Path
    rows: int  # of the run
    samples: int  # with a card


def write_report(options: ReportOptions) -> Written:
    """Write the report of a run, finished or not.

    Raises UsageError for an unknown `color`, or if `html` exists and is not a report; JobError if there is no run.
    """
    run = find_run(options.run)
    default = Path(local_path(run.output), PRIVATE, "report.html") if is_local(run.output) else Path("report.html")
    path = default if options.html is None else page_path(options.html)
    check_replaceable(path)
    data = collect(options)
    _write_page(path, data)
    return Written(path, data["counts"]["rows"], len(data["samples"]))


def write_results(
    output: str, html: str, query: str, column: str, compared: int, hits: Sequence[tuple[float, Mapping[str, Any]]]
) -> Path:
    """Write the page of a search: a card per hit, and return the page's path.

    `query` describes what was searched for, `column` holds the vectors of which `compared` rows have one, and `hits`
    are rows of the job's `output` with their scores, best first. Raises UsageError as `page_path` and
    `check_replaceable` do, JobError if there is no run.
    """
    path = page_path(html)
    check_replaceable(path)
    run = find_run(output)
    rows = [(SampleId(row["shard"], row["offset"]), row) for _, row in hits]
    reports = list(load_reports(run, sorted(committed(run))))
    media = load_media(
        {sample: row["key"] for sample, row in rows},
        _sources(load_plan(run), reports),
        recorded_reading(run),
    )
    cards = [
        _card(sample, row, row["key"], media[sample]) | {"score": score}
        for (score, _), (sample, row) in zip(hits, rows, strict=True)
    ]
    note = f"the {len(cards):,} nearest of {compared:,} rows with {column}, by cosine similarity"
    data = {
        "mmbeam": VERSION,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "output": str(run.store),
        "task": "search",
        "query": redact(query),
        "samples": cards,
        "groups": [{"title": "Nearest rows", "note": note, "sets": [["", list(range(len(cards)))]]}] if cards else [],
        "points": [],
    }
    _write_page(path, data)
    return path


def page_path(html: str) -> Path:
    """Return the local path of a page to write. Raises UsageError for a URL."""
    if not is_local(html):
        raise UsageError(f"`html` {public_path(html)}: expected a local file")
    return Path(local_path(html))


def check_replaceable(path: Path) -> None:
    """Raise UsageError if `path` exists and is not a page that mmbeam wrote."""
    if path.is_dir():
        raise UsageError(f"`html` {path}: expected a file, found a directory; name a file in it, such as report.html")
    if path.exists():
        with path.open("rb") as file:
            if not file.read(200).lstrip().startswith(b"<!doctype html>\n" + MARK.encode()):
                raise UsageError(f"`html` {path}: exists and is not a report of mmbeam; choose another file")


def _write_page(path: Path, data: Mapping[str, Any]) -> None:
    content = render(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_bytes(content)
    scratch.replace(path)


def render(data: Mapping[str, Any]) -> bytes:
    """Return the page that shows what `collect` returned, or the results of a search."""
    page = files("mmbeam.report").joinpath("page.html").read_text(encoding="utf-8")
    script, style = (re.search(f"<{name}>(.*?)</{name}>", page, re.DOTALL) for name in ("script", "style"))
    hashes = [base64.b64encode(hashlib.sha256(part[1].encode()).digest()).decode() for part in (script, style) if part]
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; script-src 'sha256-{hashes[0]}'; "
        f"style-src 'sha256-{hashes[1]}'; base-uri 'none'; form-action 'none'"
    )
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII, so also without U+2028 and U+2029
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    page = page.replace("{policy}", policy, 1)
    return page.replace("{data}", text, 1).encode("ascii", "xmlcharrefreplace")


def collect(options: ReportOptions) -> dict[str, Any]:
    """Return everything that the page shows, as JSON values."""
    run = find_run(options.run)
    done = committed(run)
    reports = list(load_reports(run, sorted(done)))
    tally = sum((report.tally for report in reports), Tally())
    failed = failed_units(run, done)
    plan = load_plan(run)
    ids = {str(unit["id"]) for unit in plan} | done | failed.keys()
    planned = len(ids) or int(run.configuration.get("limit") is not None)  # with a limit, one unit, even if not planned
    drawn = _draw(run, reports, options)
    records = _failure_records(run, reports, options.seed)
    samples, groups = _gallery(run, _sources(plan, reports), reports, drawn, records, options)
    return {
        "mmbeam": VERSION,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "output": str(run.store),
        "task": str(run.configuration.get("task")),
        "state": {
            "planned": planned,
            "committed": len(done),
            "failed": len(failed),
            "left": planned - len(done) - len(failed),
            "stopped": _public(stop_reason(run)),
        },
        "models": [
            {
                "name": name,
                "model": _public(model),
                "family": run.configuration.get("models", {}).get(name, {}).get("family"),
                "digest": run.configuration.get("models", {}).get(name, {}).get("digest"),
                "modalities": list(run.configuration.get("modalities", {}).get(name, ())),
            }
            for name, model in run.recorded.get("models", {}).items()
        ],
        "configuration": _public(run.configuration),
        "recorded": _public({name: value for name, value in run.recorded.items() if name != "models"}),
        "inputs": _inputs(reports),
        "counts": {
            "samples": tally.samples,
            "rows": tally.rows,
            "failed": tally.failed,
            "skipped": dict(tally.skipped),
            "impaired": tally.impaired,
            "outputs": dict(tally.outputs),
            "present": dict(tally.present),
            "bytes": tally.bytes_read,
        },
        "time": _time(run, reports, tally),
        "warnings": [f"{count:,} {name}" for name, count in sorted(tally.warnings.items())]
        + ([f"{tally.repeated_keys:,} samples repeat a key of their shard"] if tally.repeated_keys else []),
        "failed_units": [[unit, _public(reason)] for unit, reason in sorted(failed.items())[:100]],
        "failures": [
            {"kind": kind, "count": count, "example": next((_example(r) for r in records if _kind(r) == kind), None)}
            for kind, count in sorted(tally.failures.items(), key=lambda item: (-item[1], item[0]))
        ],
        "drawn": {
            "rows": len(drawn.rows),
            "of": drawn.total,
            "parts": drawn.parts_read,
            "of_parts": drawn.parts,
            "vectors": len(drawn.vector_rows),
            "points": min(POINTS, len(drawn.vector_rows)),
            "seed": options.seed,
        },
        "distributions": _distributions(drawn),
        **_maps(drawn, options, {(sample["shard"], sample["offset"]): n for n, sample in enumerate(samples)}),
        "samples": samples,
        "groups": groups,
    }


# The run


def _public(value: Any) -> Any:
    """Return a JSON value without credentials in its strings and under names such as "password"."""
    if isinstance(value, Mapping):
        hidden = [k for k, v in value.items() if isinstance(v, str) and SECRET_NAME.search(k) and "tokeni" not in k]
        return {k: "..." if k in hidden else _public(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_public(item) for item in value]
    if isinstance(value, str):
        return redact(value)
    return value


def _inputs(reports: Sequence[UnitReport]) -> dict[str, Any]:
    sizes = {str(source["path"]): source["size"] for report in reports for source in report.inputs}
    known = [size for size in sizes.values() if size is not None]
    return {"count": len(sizes), "bytes": sum(known) if len(known) == len(sizes) else None, "first": sorted(sizes)[:5]}


def _time(run: Run, reports: Sequence[UnitReport], tally: Tally) -> dict[str, Any]:
    try:
        summary = read_summary(run)
    except (FileNotFoundError, ValueError, TypeError):  # the job has not ended
        summary = None
    launch = summary if summary is not None and summary.units_written else None
    rates = [report.tally.samples / report.wall_seconds for report in reports if report.wall_seconds > 0]
    return {
        "wall_seconds": launch and launch.wall_seconds,
        "rate": launch and launch.rate,
        "utilisation": launch and launch.model_utilisation,
        "steps": [[name, tally.seconds.get(step, 0.0)] for step, name in STEPS.items()],
        "units": _histogram("samples per second, by work unit", np.array(rates)) if len(rates) >= 8 else None,
    }


# Rows


@dataclass(frozen=True)
class _Drawn:
    """Rows drawn at random from the run, in its order; all of them if they are few."""

    total: int  # rows of the run
    parts: int
    parts_read: int
    rows: Sequence[Mapping[str, Any]]  # without vectors; texts are cut
    lengths: Mapping[str, npt.NDArray[np.float64]]  # characters, by column of text; NaN where it is null [rows]
    order: npt.NDArray[np.int64]  # a random order of the rows
    vector_rows: npt.NDArray[np.int64]  # the rows whose vectors were read
    vectors: Mapping[str, tuple[npt.NDArray[np.int64], Vectors]]  # by column: rows, and finite vectors [n, width]
    colors: Sequence[str | None]  # the value of the field that colours the maps; empty without one
    found: Mapping[int, Mapping[str, Any]]  # labels, objects, segments and tags, by row and column, of some rows


def _draw(run: Run, reports: Sequence[UnitReport], options: ReportOptions) -> _Drawn:
    rng = np.random.default_rng(options.seed)
    parts = [report for report in reports if report.tally.rows]
    total = sum(report.tally.rows for report in parts)
    kept = [parts[i] for i in np.sort(rng.permutation(len(parts))[:MAX_PARTS])]
    here = sum(report.tally.rows for report in kept)
    places = np.sort(rng.choice(here, MAX_ROWS, replace=False)) if here > MAX_ROWS else np.arange(here)
    if not kept:
        if options.color is not None:
            raise UsageError(f"`color` {options.color}: {run.store} has no rows")
        return _Drawn(0, 0, 0, [], {}, places, places, {}, [], {})
    with open_part(run.store, part_name(kept[0].unit)) as parquet:
        schema = parquet.schema_arrow
    plain = [field.name for field in schema if not pa.types.is_nested(field.type) or field.name == "errors"]
    rows: list[Mapping[str, Any]] = []
    lengths: dict[str, list[Any]] = defaultdict(list)
    colors: list[str | None] = []
    for batch in _read(run, kept, places, plain):
        if options.color is not None:
            colors += _values(batch, options.color)
        for index, field in enumerate(batch.schema):
            if pa.types.is_string(field.type):
                column = batch.column(index)
                lengths[field.name].append(pc.utf8_length(column).cast(pa.float64()).to_numpy(zero_copy_only=False))
                batch = batch.set_column(index, field.name, pc.utf8_slice_codeunits(column, 0, TEXT_CHARS))
        rows += batch.to_pylist()
    if options.color is not None and not any(value is not None for value in colors):
        known = dict.fromkeys(name for row in rows[:1000] for name in json_object(row["metadata"]))
        raise UsageError(
            f"`color` {options.color}: none of the {len(rows):,} rows read has a value; the columns are "
            f"{', '.join(plain)}; the fields of the metadata are {', '.join(list(known)[:30]) or 'none'}"
        )
    order = rng.permutation(len(rows))
    vector_rows = np.sort(order[:VECTOR_ROWS])
    widths = widths_of(schema)
    batches = list(_read(run, kept, places[vector_rows], list(widths))) if widths else []
    labelled = [name for name in schema.names if name.rpartition("_")[2] in COLUMN_OF_LABELS.values()]
    shown = np.sort(order[: options.samples])  # masks are large
    found = (
        [row for batch in _read(run, kept, places[shown], labelled) for row in batch.to_pylist()] if labelled else []
    )
    return _Drawn(
        total=total,
        parts=len(parts),
        parts_read=len(kept),
        rows=rows,
        lengths={name: np.concatenate(arrays) for name, arrays in lengths.items()},
        order=order,
        vector_rows=vector_rows if widths else vector_rows[:0],
        vectors={
            name: _vectors(vector_rows, [batch.column(name) for batch in batches], width)
            for name, width in widths.items()
        },
        colors=colors,
        found=dict(zip(shown.tolist(), found, strict=False)),
    )


def _read(
    run: Run, parts: Sequence[UnitReport], places: npt.NDArray[np.int64], columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Yield the rows at these places among the rows of `parts`, ascending."""
    first = 0
    for part in parts:
        begin, end = first, first + part.tally.rows
        first = end
        if not np.any((places >= begin) & (places < end)):
            continue
        for batch in read_columns(run.store, part_name(part.unit), columns):
            here = places[(places >= begin) & (places < begin + batch.num_rows)] - begin
            begin += batch.num_rows
            if len(here):
                yield batch.take(pa.array(here))


def _values(batch: pa.RecordBatch, field: str) -> list[str | None]:
    """Return the value of a column, or of a field of the metadata ("a.b" is b in a), of each row."""
    if field in batch.schema.names:
        values = batch.column(field).to_pylist()
    else:
        values = []
        for text in batch.column("metadata").to_pylist():
            value: Any = json_object(text)
            for name in [field] if field in value else field.split("."):
                value = value.get(name) if isinstance(value, Mapping) else None
            values.append(value)
    texts = [json.dumps(value) if isinstance(value, bool | list | dict) else value for value in values]
    return [None if value is None else f"{value:g}" if isinstance(value, float) else str(value)[:80] for value in texts]


def _vectors(
    rows: npt.NDArray[np.int64], columns: Sequence[pa.ListArray], width: int
) -> tuple[npt.NDArray[np.int64], Vectors]:
    """Return the rows that have a finite vector of this width, and the vectors."""
    column = pa.chunked_array(columns).combine_chunks() if columns else pa.array([], pa.list_(pa.float32()))
    right = np.asarray(pc.fill_null(pc.equal(pc.list_value_length(column), width), False))
    flat = column.filter(pa.array(right, pa.bool_())).flatten().to_numpy(zero_copy_only=False)
    vectors = np.asarray(flat, np.float32).reshape(-1, width)
    finite = np.isfinite(vectors).all(axis=1)
    return rows[right][finite], vectors[finite]


# Distributions


def _distributions(drawn: _Drawn) -> list[dict[str, Any]]:
    charts = []
    for name in drawn.rows[0] if drawn.rows else ():
        if name in drawn.lengths and name not in ("key", "shard", "metadata"):
            charts.append(_histogram(f"{name}: characters", drawn.lengths[name]))
        values = [row[name] for row in drawn.rows]
        if name != "offset" and any(isinstance(value, int | float) for value in values):
            numbers = [value if isinstance(value, int | float) else np.nan for value in values]
            charts.append(_histogram(name, np.array(numbers, np.float64)))
    for name, (_, vectors) in drawn.vectors.items():
        charts.append(_histogram(f"{name}: norm", np.linalg.norm(vectors.astype(np.float64), axis=1)))
    return charts


def _histogram(name: str, values: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Return the bars of a histogram. Values that are NaN are missing."""
    finite = values[np.isfinite(values)]
    chart: dict[str, Any] = {"name": name, "values": len(finite), "missing": len(values) - len(finite)}
    if not len(finite):
        return chart
    low, middle, high = float(finite.min()), float(np.median(finite)), float(finite.max())
    log = low > 0 and high > 20 * middle
    same = high - low <= 1e-5 * abs(high)  # up to rounding, as the norms of unit vectors are
    if same:
        edges = np.array([low, high])
    elif log:
        edges = np.geomspace(low, high, BINS + 1)
    elif high - low < BINS and np.array_equal(finite, np.round(finite)):
        edges = np.arange(low - 0.5, high + 1)
    else:
        edges = np.linspace(low, high, BINS + 1)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    counts = [len(finite)] if same else np.histogram(finite, edges)[0].tolist()
    chart |= {"min": low, "median": middle, "mean": float(finite.mean()), "max": high, "log": bool(log)}
    return {**chart, "edges": [float(f"{edge:.6g}") for edge in edges], "counts": counts}


# Maps


def _maps(drawn: _Drawn, options: ReportOptions, cards: Mapping[tuple[str, int], int]) -> dict[str, Any]:
    """Return a map of each column of vectors, and the points, which all maps share.

    A point is the number of the row's card, or -1, its key and its texts.
    """
    points = np.sort(drawn.order[np.isin(drawn.order, drawn.vector_rows)][:POINTS])
    number_of = {int(row): number for number, row in enumerate(points)}
    maps = []
    for name, (rows, vectors) in drawn.vectors.items():
        if len(rows) < 3:
            continue
        unit = _unit(vectors)
        scores, explained = _principal_components(unit, options.seed)
        if drawn.colors:
            labels, groups = _categories([drawn.colors[row] for row in rows])
        else:
            groups = _clusters(scores, min(CLUSTERS, max(1, len(rows) // 6)), options.seed)
            labels = [f"cluster {number + 1}" for number in range(groups.max() + 1)]
        shown = [index for index, row in enumerate(rows) if int(row) in number_of]
        low, high = scores[:, :2].min(axis=0), scores[:, :2].max(axis=0)
        xy = np.round((scores[:, :2] - low) / np.maximum(high - low, 1e-9) * 1000).astype(int)
        maps.append(
            {
                "name": name,
                "width": vectors.shape[1],
                "explained": explained,
                "colored": options.color or "k-means clusters",
                "labels": labels,
                "counts": np.bincount(groups, minlength=len(labels)).tolist(),
                "points": [[number_of[int(rows[i])], *xy[i].tolist(), int(groups[i])] for i in shown],
            }
        )
    texts = _text_columns(drawn.rows)
    described = [
        [cards.get((drawn.rows[row]["shard"], drawn.rows[row]["offset"]), -1), drawn.rows[row]["key"]]
        + [(drawn.rows[row][name] or "")[:POINT_CHARS] for name in texts]
        for row in points
    ]
    return {"maps": maps, "points": described if maps else [], "point_columns": ["key", *texts]}


def _text_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in (*COLUMN_OF_TASK.values(), "text") if rows and name in rows[0]]


def _unit(vectors: Vectors) -> Vectors:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), np.float32)


def _principal_components(vectors: Vectors, seed: int) -> tuple[Vectors, list[float]]:
    """Return the scores on the first principal components, [n, COMPONENTS] or fewer, and the variance of the first two.

    By subspace iteration from a random start: a decomposition of vectors 4,096 wide would take ten times as long.
    """
    centred = vectors - vectors.mean(axis=0)
    count = max(2, min(COMPONENTS, *centred.shape))
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(centred.shape[1], count)).astype(np.float32))[0]
    for _ in range(8):
        basis = np.linalg.qr(centred.T @ (centred @ basis))[0]
    left, values, _ = np.linalg.svd(centred @ basis, full_matrices=False)
    scores = left * values
    signs = np.sign(scores[np.abs(scores).argmax(axis=0), np.arange(scores.shape[1])])
    total = float((centred**2).sum())
    shares = values[:2] ** 2 / total if total > 0 else np.zeros(2)
    scores = scores * np.where(signs == 0, 1, signs)
    if scores.shape[1] < 2:
        scores = np.pad(scores, ((0, 0), (0, 1)))
    return scores, [float(f"{share:.4g}") for share in shares]


def _clusters(scores: Vectors, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the cluster of each row, by k-means; the largest cluster is 0."""
    rng = np.random.default_rng(seed)
    centres = scores[rng.integers(len(scores))][None]
    while len(centres) < count:  # k-means++
        distance = ((scores[:, None] - centres) ** 2).sum(axis=2).min(axis=1).astype(np.float64)
        if not distance.sum() > 0:
            break
        centres = np.vstack([centres, scores[rng.choice(len(scores), p=distance / distance.sum())]])
    for _ in range(20):
        nearest = ((scores[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
        centres = np.stack(
            [scores[nearest == i].mean(axis=0) if np.any(nearest == i) else centres[i] for i in range(len(centres))]
        )
    _, nearest = np.unique(nearest, return_inverse=True)
    rank = np.argsort(np.argsort(-np.bincount(nearest), kind="stable"))
    return np.asarray(rank[nearest], np.int64)


def _categories(values: Sequence[str | None]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return the labels of at most CLUSTERS groups of values, and the group of each value.

    More than CLUSTERS distinct numbers are binned by quantiles; of more distinct other values, the rarest share a
    group.
    """
    known = [value for value in values if value is not None]
    counts = Counter(known)
    try:
        numbers = np.array([float(value) for value in known])
    except ValueError:
        numbers = np.zeros(0)
    if len(counts) > CLUSTERS and len(numbers) and np.isfinite(numbers).all():
        edges = np.unique(np.quantile(numbers, np.linspace(0, 1, 6)))
        labels = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
        index = [
            None if value is None else min(int(np.searchsorted(edges, float(value), "right")) - 1, len(labels) - 1)
            for value in values
        ]
    else:
        labels = [value for value, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
        if len(labels) > CLUSTERS - 1:
            labels = [*labels[: CLUSTERS - 2], "other"]
        place = {label: number for number, label in enumerate(labels)}
        index = [None if value is None else place.get(value, len(labels) - 1) for value in values]
    if None in index:
        labels.append("no value")
    return labels, np.array([len(labels) - 1 if number is None else number for number in index], np.int64)


# Samples


def _failure_records(run: Run, reports: Sequence[UnitReport], seed: int) -> list[dict[str, Any]]:
    """Return failure records, at most EXAMPLES of a kind, those of rare kinds first."""
    names = [report.failures_file for report in reports if report.failures_file is not None]
    chosen = np.sort(np.random.default_rng(seed).permutation(len(names))[:FAILURE_FILES])
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name in (names[i] for i in chosen):
        for record in read_failures(run.store, name):
            if record["key"] and len(kinds[_kind(record)]) < EXAMPLES:
                kinds[_kind(record)].append(record)
    return [record for kind in sorted(kinds, key=lambda kind: (len(kinds[kind]), kind)) for record in kinds[kind]]


def _kind(record: Mapping[str, Any]) -> str:
    return f"{record['step']}: {record['error']}"


def _example(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("key", "shard")} | {"message": _public(record["message"])}


def _sources(plan: Sequence[Mapping[str, Any]], reports: Sequence[UnitReport]) -> dict[str, list[Input]]:
    """Return the committed inputs by path: a shard once, with its size and etag, and every part of a folder."""
    sources: dict[str, list[Input]] = {}
    for report in reports:
        for source in report.inputs:
            shard = Shard(path=source["path"], url=source["path"], size=source["size"], etag=source["etag"])
            sources[shard.path] = [Input(shard=shard)]
    folders = [source for line in plan for source in unit_from_json(line).inputs if source.shard.samples]
    return sources | {
        path: [folder for folder in folders if folder.shard.path == path]
        for path in {folder.shard.path for folder in folders}
    }


def _gallery(
    run: Run,
    sources: Mapping[str, Sequence[Input]],
    reports: Sequence[UnitReport],
    drawn: _Drawn,
    records: Sequence[Mapping[str, Any]],
    options: ReportOptions,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the cards of samples, and the groups that show them: a title, a note, and sets of cards."""
    rows = {SampleId(row["shard"], row["offset"]): row for row in drawn.rows}
    ids = {SampleId(drawn.rows[number]["shard"], drawn.rows[number]["offset"]): number for number in drawn.found}
    keys: dict[SampleId, str] = {}
    groups: list[dict[str, Any]] = []

    def add(title: str, note: str, sets: Iterable[tuple[str, Sequence[tuple[SampleId, str]]]]) -> None:
        """Add a group of sets: a label, and its samples with their keys."""
        shown = [(label, members) for label, members in sets if members]
        for _, members in shown:
            keys.update(members)
        if shown:
            groups.append({"title": title, "note": note, "sets": [[label, [m[0] for m in ms]] for label, ms in shown]})

    def row_ids(indices: Iterable[Any]) -> list[tuple[SampleId, str]]:
        chosen = (drawn.rows[int(index)] for index in indices)
        return [(SampleId(row["shard"], row["offset"]), row["key"]) for row in chosen]

    among = f"among {len(drawn.rows):,} of {drawn.total:,} rows" if len(drawn.rows) < drawn.total else "of all rows"
    number = min(options.samples, len(drawn.rows))
    random = np.sort(drawn.order[:number])
    add("Random sample", f"{number:,} of {drawn.total:,} rows, seed {options.seed}", [("", row_ids(random))])
    columns = drawn.rows[0] if drawn.rows else {}
    for scored in [f"{name}_logprob" for name in COLUMN_OF_TASK.values() if f"{name}_logprob" in columns]:
        tokens = scored.replace("_logprob", "_num_tokens")
        per_token = np.array(
            [np.nan if row[scored] is None else row[scored] / max(1, row.get(tokens) or 1) for row in drawn.rows]
        )
        best = np.argsort(-per_token, kind="stable")[: int(np.isfinite(per_token).sum())]
        text = scored.removesuffix("_logprob")
        note = f"by log-probability per token, {among}"
        extremes = min(EXTREMES, len(best) // 2)
        add(f"Least likely {text}s", note, [("", row_ids(best[::-1][:extremes]))])
        add(f"Most likely {text}s", note, [("", row_ids(best[:extremes]))])
    of_sample: dict[SampleId, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        of_sample[SampleId(record["shard"], record["offset"])].append(record)
    failing = list(of_sample)[:FAILED_SAMPLES]
    total = sum(report.tally.failed + report.tally.impaired for report in reports)
    add(
        "Failures",
        f"{len(failing):,} of {total:,} samples that lost an output; rare kinds first",
        [("", [(sample, of_sample[sample][0]["key"]) for sample in failing])],
    )
    pairs = [
        (f"{name}: cosine similarity {similarity:.4f}", row_ids((first, second)))
        for name, (indices, vectors) in drawn.vectors.items()
        for first, second, similarity in _near_duplicates(indices, _unit(vectors))
    ]
    add("Near-duplicates", f"the pairs of greatest similarity, {NEAR} or more, {among}", pairs)

    crashed = {sample for sample, faults in of_sample.items() if any(fault["step"] == "crash" for fault in faults)}
    media = load_media({s: key for s, key in keys.items() if s not in crashed}, sources, recorded_reading(run))
    cards = [
        _card(
            sample,
            rows.get(sample, {}),
            key,
            media.get(sample),
            of_sample.get(sample, ()),
            drawn.found.get(ids.get(sample, -1), {}),
        )
        for sample, key in keys.items()
    ]
    place = {sample: number for number, sample in enumerate(keys)}
    for group in groups:
        group["sets"] = [[label, [place[sample] for sample in members]] for label, members in group["sets"]]
    return cards, groups


def _card(
    sample: SampleId,
    row: Mapping[str, Any],
    key: str,
    read: Media | None,
    faults: Sequence[Mapping[str, Any]] = (),
    labels: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the card of a sample: its row, empty without one, its media, None if not read again, and its failures.

    `labels` holds the columns of labels, objects, segments and tags.
    """
    return {
        "key": key,
        "shard": sample.shard,
        "offset": sample.offset,
        "texts": [[name, row[name][:TEXT_CHARS]] for name in _text_columns([row]) if row[name] is not None]
        or [["text", text[:TEXT_CHARS]] for text in [read and read.text] if text],
        "image": read and read.image,
        "image_size": read and read.image_size,
        "audio": read and read.audio,
        "audio_seconds": row.get("audio_seconds"),
        **_found(labels or {}, row, None if read is None else read.image_size),
        "attribution": _attribution(row),
        "metadata": _public(row.get("metadata")),
        "values": [
            [name, value]
            for name, value in row.items()
            if isinstance(value, int | float | str)
            and name not in ("key", "shard", "offset", "metadata", *_text_columns([row]))
            and not name.endswith(("_attribution", "_share"))
        ],
        "failures": [
            {
                "kind": _kind(fault),
                "modality": fault["modality"],
                "message": _public(fault["message"]),
                "lost": fault["outputs"],
                "row": fault["row"],
            }
            for fault in faults
        ],
        "notes": ["not read again: this sample ended a process of the run"]
        if read is None
        else [note for note in read.notes if not any(note.endswith(fault["message"]) for fault in faults)],
    }


def _found(
    columns: Mapping[str, Any], row: Mapping[str, Any], size: tuple[int, int] | None
) -> dict[str, Sequence[Any] | str | None]:
    """Return the lines of a card about labels, its boxes in pixels of the thumbnail of `size`, and its masks."""
    lines, boxes, masks = [], [], None
    for name, records in columns.items():
        best = (records or [])[:FOUND]
        for record in best:
            text = f" {record['text'][:TEXT_CHARS]!r}" if "text" in record else ""
            lines.append([name, f"{record['label']}{text}", round(record["score"], 4)])
            if "width" in record and size is not None and row.get("image_width"):
                scales = [size[0] / row["image_width"], size[1] / row["image_height"]] * 2
                sides = [
                    record[side] * scale for side, scale in zip(("x", "y", "width", "height"), scales, strict=True)
                ]
                boxes.append([record["label"], *(round(side, 2) for side in sides)])
        if best and "rle" in best[0] and size is not None:
            masks = draw_masks(best, size)
    return {"found": lines, "boxes": boxes, "masks": masks}


def _attribution(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the share of each modality in a text; mmbeam 0.1 called the columns `..._share`."""
    return [
        (modality, float(value))
        for modality in MODALITIES
        for name, value in row.items()
        if name.endswith((f"_{modality}_attribution", f"_{modality}_share")) and value is not None
    ]


def _near_duplicates(rows: npt.NDArray[np.int64], vectors: Vectors) -> Iterator[tuple[int, int, float]]:
    """Yield the pairs of rows of greatest similarity, NEAR or more, and no row twice. `vectors` have length 1."""
    best: list[tuple[float, int, int]] = []
    for begin in range(0, len(vectors), 1000):
        similarity = vectors[begin : begin + 1000] @ vectors.T
        similarity[np.tril_indices(len(similarity), begin, len(vectors))] = -1  # each pair once
        second = similarity.argmax(axis=1)
        first = np.arange(len(similarity))
        best += zip(similarity[first, second].tolist(), (first + begin).tolist(), second.tolist(), strict=True)
    used: set[int] = set()
    for value, i, j in sorted(best, key=lambda pair: (-pair[0], pair[1])):
        if value < NEAR or len(used) >= 2 * PAIRS:
            return
        if i not in used and j not in used:
            used |= {i, j}
            yield int(rows[i]), int(rows[j]), min(value, 1.0)
