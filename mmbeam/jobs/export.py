"""The export job: the rows of a run as CSV, JSON lines, text files, or the arrays of clip-retrieval. No Beam.

Rows are exported in the order of the output. Nothing is written outside the target: a key, which comes from untrusted
input, is percent-encoded where it is not a plain relative path.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmbeam.errors import JobError, UsageError
from mmbeam.features.read import WrittenRows, rows_with_vectors, to_vectors
from mmbeam.features.schema import parse_name
from mmbeam.names import COLUMN_OF_TASK
from mmbeam.readers.paths import public_path

ROWS_PER_ARRAY = 100_000  # vectors in one .npy file: 200 MB of 1,024 half-precision numbers
CLIP_RETRIEVAL_NAMES = {"image": "img_emb", "text": "text_emb", "audio": "audio_emb"}  # folders and files by modality
MAX_NAME_BYTES = 200  # of one component of a path; file systems take 255


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and where to."""

    run: str  # the output of a job
    target: str  # a file or a directory, local or any URL that fsspec can write to
    format: str | None = None  # one of FORMATS; None: by the extension of `target`
    columns: tuple[str, ...] = ()  # empty: every column except vectors; of txt: the generated text; of npy: all vectors
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
    kind = options.format or next((name for name in FORMATS if options.target.lower().endswith(f".{name}")), None)
    if kind is None or kind not in FORMATS:
        raise UsageError(
            f"TARGET {public_path(options.target)}: ends in neither .csv nor .jsonl; "
            f"set `format` to one of {', '.join(FORMATS)}"
        )
    rows = WrittenRows.of(options.run)
    unknown = [name for name in options.columns if name not in rows.schema.names]
    if unknown:
        raise UsageError(f"`columns` {', '.join(unknown)}: the rows have {', '.join(rows.schema.names)}")
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
    seen, left_out, count = Counter[str](), Counter[str](), 0
    for row in _rows(rows, ("key", columns[0])):
        if row[columns[0]] is None:
            left_out[f"without {columns[0]}"] += 1
            continue
        name = safe_name(row["key"])
        seen[name] += 1
        file = f"{path.rstrip('/')}/{name}{f'.{seen[name]}' if seen[name] > 1 else ''}.txt"
        fs.makedirs(file.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(file, row[columns[0]].encode())
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


Writer = Callable[[WrittenRows, ExportOptions, Any, str], Written]
FORMATS: Mapping[str, Writer] = {"csv": _write_csv, "jsonl": _write_jsonl, "txt": _write_txt, "npy": _write_npy}


def _columns(rows: WrittenRows, options: ExportOptions) -> Sequence[str]:
    if options.columns:
        return options.columns
    return [field.name for field in rows.schema if not pa.types.is_list(field.type) or field.name == "errors"]


def _rows(rows: WrittenRows, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    for batch in rows.read(columns):
        yield from batch.to_pylist()
