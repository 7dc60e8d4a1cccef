"""The export job: the rows of a run as CSV, JSON lines, text files, subtitles, arrays or shards. No Beam.

Rows are exported in the order of the output. Nothing is written outside the target: a key, which comes from untrusted
input, is percent-encoded where it is not a plain relative path.
"""

import csv
import html
import io
import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmbeam.errors import JobError, UsageError, did_you_mean
from mmbeam.features.read import WrittenRows, read_columns, rows_with_vectors, to_vectors
from mmbeam.features.schema import parse_name
from mmbeam.names import COLUMN_OF_LABELS, COLUMN_OF_TASK
from mmbeam.readers.paths import public_path
from mmbeam.readers.samples import read_samples
from mmbeam.readers.tar import BLOCK, MAX_NAME_BYTES, safe_key, tar_bytes
from mmbeam.readers.units import unit_from_json
from mmbeam.runs.plan import load_plan
from mmbeam.runs.run import find_run, part_name, recorded_reading
from mmbeam.types import SampleId

ROWS_PER_ARRAY = 100_000  # vectors in one .npy file: 200 MB of 1,024 half-precision numbers
CLIP_RETRIEVAL_NAMES = {"image": "img_emb", "text": "text_emb", "audio": "audio_emb"}  # folders and files by modality
LINE_CHARS = 42  # of a subtitle


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and where to."""

    run: str  # the output of a job
    target: str  # a file or a directory, local or any URL that fsspec can write to
    format: str | None = None  # one of FORMATS; None: by the extension of `target`
    columns: tuple[str, ...] = ()  # empty: the format's default
    overwrite: bool = False


class Exported(NamedTuple):
    """What was written."""

    target: str
    rows: int
    files: int
    left_out: Mapping[str, int]  # rows, by reason


def export(options: ExportOptions) -> Exported:
    """Write the rows of a run in another format.

    Raises UsageError for an unknown format or column, or if the target exists; JobError if the run has no rows.
    """
    kind = options.format or next((name for name in FILES if options.target.lower().endswith(f".{name}")), None)
    if kind is None or kind not in FORMATS:
        raise UsageError(
            f"TARGET {public_path(options.target)}: ends in neither .csv nor .jsonl; "
            f"set `format` to one of {', '.join(FORMATS)}"
        )
    rows = WrittenRows.of(options.run)
    unknown = [name for name in options.columns if name not in rows.schema.names]
    if unknown:
        raise UsageError(
            f"`columns` {', '.join(unknown)}: the rows have {', '.join(rows.schema.names)}"
            f"{did_you_mean(unknown[0], rows.schema.names)}"
        )
    fs, path = fsspec.core.url_to_fs(options.target)
    if fs.isdir(path) and fs.ls(path):
        raise UsageError(f"TARGET {public_path(options.target)}: the directory is not empty; choose another")
    if fs.isfile(path) and not options.overwrite:
        raise UsageError(f"TARGET {public_path(options.target)}: exists already; choose another, or use `overwrite`")
    with fs.transaction:  # an export that fails leaves no file, or the one before
        count, files, left_out = FORMATS[kind](rows, options, fs, path)
    return Exported(public_path(options.target), count, files, left_out)


Written = tuple[int, int, Mapping[str, int]]  # rows, files, rows left out by reason


def _write_csv(rows: WrittenRows, options: ExportOptions, fs: Any, path: str) -> Written:
    """Write one CSV file with a header; null is an empty field, lists are JSON."""
    columns, count = _columns(rows, options), 0
    with fs.open(path, "wb") as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in _rows(rows, columns):
            writer.writerow(json.dumps(value) if isinstance(value, list) else value for value in row.values())
            count += 1
    return count, 1, {}


def _write_jsonl(rows: WrittenRows, options: ExportOptions, fs: Any, path: str) -> Written:
    """Write one JSON object per line."""
    columns, count = _columns(rows, options), 0
    with fs.open(path, "wb") as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="\n") as file:
        for row in _rows(rows, columns):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count, 1, {}


def _write_txt(rows: WrittenRows, options: ExportOptions, fs: Any, path: str) -> Written:
    """Write a file KEY.txt per row, with its generated text. A key that repeats becomes KEY.2.txt, KEY.3.txt, ..."""
    columns = list(options.columns) or [name for name in COLUMN_OF_TASK.values() if name in rows.schema.names]
    if len(columns) != 1 or not pa.types.is_string(rows.schema.field(columns[0]).type):
        texts = [field.name for field in rows.schema if pa.types.is_string(field.type)]
        raise UsageError(f"`columns`: name the one column of text to export, one of {', '.join(texts)}")
    names, left_out, count = _Names(), Counter[str](), 0
    for row in _rows(rows, ("key", columns[0])):
        if row[columns[0]] is None:
            left_out[f"without {columns[0]}"] += 1
            continue
        _put(fs, f"{path.rstrip('/')}/{names.of(row['key'])}.txt", row[columns[0]].encode())
        count += 1
    return count, count, left_out


def safe_name(key: str) -> str:
    """Return a key as a relative path without special components. Percent-encoded where it is not a plain path."""
    parts = []
    for part in key.split("/"):
        if re.fullmatch(r"[\w .,+=@-]+", part) and part.strip(" .") and len(part.encode()) <= MAX_NAME_BYTES:
            parts.append(part)
        else:
            encoded = quote(part, safe="").replace(".", "%2E") or "%"
            parts.append(encoded if len(encoded) <= MAX_NAME_BYTES else encoded[: MAX_NAME_BYTES - 10] + "%...")
    return "/".join(parts)


def _write_npy(rows: WrittenRows, options: ExportOptions, fs: Any, path: str) -> Written:
    """Write float16 arrays and metadata, as `clip-retrieval index` and autofaiss read them.

    img_emb/img_emb_0000.npy, text_emb/..., and metadata/metadata_0000.parquet with the other columns of the same rows.
    A row that lacks one of the vectors is left out, because the arrays have no nulls.
    """
    widths = {name: width for name, width in rows.widths.items() if not options.columns or name in options.columns}
    folders: dict[str, str] = {}
    for name in widths:
        parsed = parse_name(name)
        folder = name if parsed is None else CLIP_RETRIEVAL_NAMES[parsed.modality]
        if folder in folders.values():
            raise UsageError(f"`columns`: expected one column of vectors per modality, found {', '.join(widths)}")
        folders[name] = folder
    if not widths:
        raise UsageError(f"`columns`: {rows.store} has no column of vectors to export")
    others = _columns(rows, ExportOptions(run=options.run, target=options.target))
    count, files, pending = 0, 0, list[pa.RecordBatch]()

    def flush() -> None:
        nonlocal files
        table = pa.Table.from_batches(pending)
        for name, width in widths.items():
            buffer = io.BytesIO()
            vectors = to_vectors(table.column(name).combine_chunks(), width)
            np.save(buffer, vectors.astype(np.float16))
            _put(fs, f"{path}/{folders[name]}/{folders[name]}_{files:04}.npy", buffer.getvalue())
        buffer = io.BytesIO()
        pq.write_table(table.select(others), buffer)
        _put(fs, f"{path}/metadata/metadata_{files:04}.parquet", buffer.getvalue())
        files += 1
        pending.clear()

    total = 0
    for batch in rows.read((*others, *widths)):
        total += batch.num_rows
        complete = rows_with_vectors(batch, widths)
        count += complete.num_rows
        if complete.num_rows:
            pending.append(complete)
        if sum(part.num_rows for part in pending) >= ROWS_PER_ARRAY:
            flush()
    if pending:
        flush()
    if count == 0:
        raise JobError(f"{rows.store}: no row has {' and '.join(widths)}")
    return count, files * (len(widths) + 1), {f"without {' or '.join(widths)}": total - count} if total > count else {}


def _put(fs: Any, path: str, data: bytes) -> None:
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(path, data)


def _write_subtitles(
    kind: Literal["srt", "vtt"], rows: WrittenRows, options: ExportOptions, fs: Any, path: str
) -> Written:
    """Write a file KEY.srt or KEY.vtt per row, with the segments of its transcript as cues."""
    timed = [field.name for field in rows.schema if _is_timed(field.type)]
    columns = list(options.columns) or [name for name in timed if name.endswith("_segments")]
    if len(columns) != 1 or columns[0] not in timed:
        raise UsageError(
            "`columns`: expected one column of texts with their times, found "
            f"{', '.join(columns) or 'none'}; the rows have {', '.join(timed) or 'none'}; transcribe with Whisper, "
            "whose rows have transcript_segments"
        )
    left_out, count, names = Counter[str](), 0, _Names()
    for row in _rows(rows, ("key", columns[0])):
        if row[columns[0]] is None:
            left_out[f"without {columns[0]}"] += 1
            continue
        _put(fs, f"{path.rstrip('/')}/{names.of(row['key'])}.{kind}", subtitles(row[columns[0]], kind).encode())
        count += 1
    return count, count, left_out


def _is_timed(type_: pa.DataType) -> bool:
    if not pa.types.is_list(type_) or not pa.types.is_struct(type_.value_type):
        return False
    return {"start", "end", "text"} <= {field.name for field in type_.value_type}


def subtitles(segments: Sequence[Mapping[str, Any]], kind: Literal["srt", "vtt"]) -> str:
    """Return SubRip ("srt") or WebVTT ("vtt") text of segments with `start` and `end` in seconds.

    Cues are in order and do not overlap: a segment ends at the latest where the next one begins. Lines are wrapped at
    42 characters. Text cannot end a cue, and in WebVTT it cannot be markup. Source: the W3C's WebVTT recommendation.
    """
    cues = sorted(
        ((round(1000 * segment["start"]), round(1000 * segment["end"]), segment["text"]) for segment in segments),
        key=lambda cue: cue[:2],
    )
    blocks = ["WEBVTT\n"] if kind == "vtt" else []
    for number, (start, end, text) in enumerate(cues, 1):
        if number < len(cues):
            end = min(end, cues[number][0])
        words = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split()).replace("-->", "->")
        lines = textwrap.wrap(words, LINE_CHARS, break_long_words=False, break_on_hyphens=False)
        if lines and end > start:
            mark = "." if kind == "vtt" else ","
            times = f"{_timestamp(start, mark)} --> {_timestamp(end, mark)}"
            head = [str(len(blocks) + 1), times] if kind == "srt" else [times]
            lines = [html.escape(line, quote=False) if kind == "vtt" else line for line in lines]
            blocks.append("\n".join([*head, *lines]) + "\n")
    return "\n".join(blocks)


def _timestamp(milliseconds: int, mark: str) -> str:
    seconds, thousandths = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{mark}{thousandths:03}"


class _Names:
    """File names of keys. A key that repeats gets `.2`, `.3`, ... appended."""

    def __init__(self) -> None:
        self._seen = Counter[str]()

    def of(self, key: str) -> str:
        name = safe_name(key)
        self._seen[name] += 1
        return f"{name}.{self._seen[name]}" if self._seen[name] > 1 else name


def _write_tar(rows: WrittenRows, options: ExportOptions, fs: Any, path: str) -> Written:
    """Write a shard per work unit: the members of each sample as they are in the input, and a member per column.

    A column of text becomes the member `<column>.txt`, any other `<column>.json`. By default the columns are the
    generated texts and the labels.
    """
    run = find_run(options.run)
    generated = (*COLUMN_OF_TASK.values(), *COLUMN_OF_LABELS.values())
    columns = list(options.columns) or [name for name in dict.fromkeys(generated) if name in rows.schema.names]
    if not columns:
        raise UsageError(f"`columns`: name the columns to add; the rows have {', '.join(_columns(rows, options))}")
    reading = recorded_reading(run)
    left_out, count, files = Counter[str](), 0, 0
    for unit in map(unit_from_json, load_plan(run)):
        part = part_name(unit.id)
        if part not in rows.parts:
            continue
        members: dict[SampleId, Mapping[str, Any]] = {}
        for batch in read_columns(rows.store, part, ("shard", "offset", *columns)):
            members |= {SampleId(row.pop("shard"), row.pop("offset")): row for row in batch.to_pylist()}
        fs.makedirs(path, exist_ok=True)
        with fs.open(f"{path.rstrip('/')}/{unit.id}.tar", "wb") as raw:
            before, repeats = "", 0
            for source in unit.inputs:
                offsets = [sample.offset for sample in members if sample.shard == source.shard.path]
                for sample in read_samples(source, offsets, reading=reading):
                    row = members.pop(sample.id, None)
                    if row is None:
                        continue
                    key = safe_key(sample.key)
                    before, repeats = key, repeats + 1 if key == before else 0
                    texts = {
                        f"{name}.{'txt' if isinstance(value, str) else 'json'}": (
                            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                        ).encode("utf-8", "replace")
                        for name, value in row.items()
                        if value is not None
                    }
                    name = f"{key}-{repeats + 1}" if repeats else key
                    raw.write(tar_bytes(name, {**sample.members, **texts}))
                    count += 1
            raw.write(bytes(2 * BLOCK))
        files += 1
        left_out["whose sample could not be read again"] += len(members)
    return count, files, +left_out


Writer = Callable[[WrittenRows, ExportOptions, Any, str], Written]
FORMATS: Mapping[str, Writer] = {
    "csv": _write_csv,
    "jsonl": _write_jsonl,
    "txt": _write_txt,
    "srt": partial(_write_subtitles, "srt"),
    "vtt": partial(_write_subtitles, "vtt"),
    "npy": _write_npy,
    "tar": _write_tar,
}
FILES = ("csv", "jsonl")  # formats of a single file; the target of any other is a directory


def _columns(rows: WrittenRows, options: ExportOptions) -> Sequence[str]:
    if options.columns:
        return options.columns
    return [field.name for field in rows.schema if not pa.types.is_list(field.type) or field.name == "errors"]


def _rows(rows: WrittenRows, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    for batch in rows.read(columns):
        yield from batch.to_pylist()
