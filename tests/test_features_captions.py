"""Texts by key: one reader of files for captions and for references."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmbeam.clean.text import json_object
from mmbeam.config import CSV_FIELD_BYTES
from mmbeam.errors import UsageError
from mmbeam.features.captions import CaptionReader, Captions, read_keyed, text_of
from mmbeam.metrics.pairs import ReferenceFile

DEEP = "[" * 100_000
BOM = b"\xef\xbb\xbf"
ROWS = [("1", "a cat"), ("2", "ein Hund, groß")]

JSON_LINES = "".join(json.dumps({"key": key, "text": text}) + "\n" for key, text in ROWS).encode()
CSV = 'key,text\n1,a cat\n2,"ein Hund, groß"\n'.encode()
TSV = "key\ttext\n1\ta cat\n2\tein Hund, groß\n".encode()


def both(path: Path) -> tuple[list[str | None], dict[str, Any]]:
    """Return the captions and the references of a file for the keys of ROWS."""
    reader = CaptionReader(Captions(file=str(path), file_caption="text"))
    return reader.of(pa.record_batch({"key": [key for key, _ in ROWS]})), dict(
        ReferenceFile(url=str(path), field="text").load()
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSON_LINES),
        ("a.ndjson", BOM + JSON_LINES),
        ("a.JSONL", JSON_LINES.replace(b"\n", b"\r\n")),
        ("a.jsonl", JSON_LINES.replace(b"\n", b"\r")),
        ("a.jsonl", b"\n\n" + JSON_LINES + b"  \n"),
        ("a.csv", CSV),
        ("a.csv", BOM + CSV),
        ("a.csv", CSV.replace(b"\n", b"\r\n")),
        ("a.csv", CSV.replace(b"\n", b"\r")),
        ("a.tsv", TSV),
        ("a.tsv", BOM + TSV),
        ("a [1].jsonl.gz", gzip.compress(BOM + JSON_LINES, mtime=0)),
        ("a.csv.gz", gzip.compress(CSV, mtime=0)),
        ("a.tsv.gz", gzip.compress(TSV, mtime=0)),
    ],
)
def test_captions_and_references_are_read_alike(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert both(path) == ([text for _, text in ROWS], {key: (text,) for key, text in ROWS})


def test_parquet_keys_may_be_integers_and_null(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"key": [1, None, 2], "text": ["a cat", "lost", "ein Hund, groß"]}), path)
    assert both(path)[0] == [text for _, text in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", JSON_LINES + b"{broken\n", "line 3: expected a JSON object"),
        ("a.jsonl", JSON_LINES + b"[1]\n", r"line 3: expected a JSON object, found list"),
        ("a.jsonl", JSON_LINES + DEEP.encode(), "line 3: expected a JSON object"),
        ("a.jsonl", JSON_LINES + b'{"text": "a"}\n', "line 3: expected rows with 'key' and 'text', found text"),
        ("a.jsonl", b'{"key": "1"}\n', "expected rows with 'key' and 'text', found key"),
        ("a.jsonl", JSON_LINES + b"\xff", "UTF-8"),
        ("a.jsonl", b"", "found no rows"),
        ("a.jsonl", BOM, "found no rows"),
        ("a.jsonl.gz", JSON_LINES, "gzip"),
        ("a.jsonl.gz", gzip.compress(JSON_LINES, mtime=0)[:-9], "end-of-stream"),
        ("a.csv", b"", "found no rows"),
        ("a.csv", b"key,text\n", "found no rows"),
        ("a.csv", b"id,text\n1,a\n", "expected rows with 'key' and 'text', found id, text"),
        ("a.csv", CSV + b'3,"' + b"a" * (CSV_FIELD_BYTES + 1) + b'"\n', "line 4: field larger than field limit"),
        ("a.tsv", CSV, "expected rows with 'key' and 'text', found key,text"),
        ("a.parquet", b"PAR1", "cannot be read as Parquet"),
        ("a.parquet.gz", b"", r"expected a file whose name ends in \.parquet, .*\.tsv"),
        ("a.txt", b"a", r"expected a file whose name ends in \.parquet, .*\.tsv"),
    ],
)
def test_a_broken_file_is_one_error_for_captions_and_references(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for read in (
        lambda: CaptionReader(Captions(file=str(path), file_caption="text")),
        lambda: ReferenceFile(url=str(path), field="text").load(),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(str(path))}.*{message}"):
            read()


def test_a_parquet_file_without_the_fields_names_those_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["1"], "title": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="expected rows with 'key' and 'text', found key, title"):
        list(read_keyed(str(tmp_path / "a.parquet"), "key", "text"))


def test_a_repeated_key_has_its_first_caption_and_all_its_references(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(CSV + b"1,another\n")
    captions, references = both(path)
    assert (captions[0], references["1"]) == ("a cat", ("a cat", "another"))


@pytest.mark.parametrize(
    "text", [None, "", "[1]", "{", "null", '"caption"', DEEP, '{"a": ' + DEEP, "9" * 5000, b"\xff"]
)
def test_anything_but_a_json_object_is_an_empty_one(text: str | bytes | None) -> None:
    assert json_object(text) == {}


def test_captions_are_numbers_or_strings_that_are_not_blank() -> None:
    values = (" a ", 3, 0.5, "", " ", None, True, ["a"], "a \ud800")
    assert [text_of(value) for value in values] == ["a", "3", "0.5", *[None] * 5, "a ?"]
