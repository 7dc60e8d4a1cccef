"""The export job and command, on rows that were committed as a job commits them."""

import csv
import io
import itertools
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from killers import make_job, run_units
from test_evaluate import CAPTION, WIDTH, vector_output, write_run

from mmbeam.cli import main
from mmbeam.errors import UsageError
from mmbeam.jobs import export as export_module
from mmbeam.jobs.export import ExportOptions, export, safe_name
from mmbeam.types import Output

ROWS = [
    {"key": "a/1", "text": 'with "quotes",\nand lines', "caption": "Grüße", "image_embedding": [1.0] * WIDTH},
    {"key": "../../etc/passwd", "text": None, "caption": "climbs", "image_embedding": None},
    {"key": "a/1", "text": "twice", "caption": "another", "image_embedding": [0.5] * WIDTH},
    {"key": "<b>", "text": "=1+1", "caption": None, "image_embedding": [0.25] * WIDTH},
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    parts = [ROWS[:3], ROWS[3:]]
    return str(write_run(tmp_path_factory.mktemp("stored") / "out", parts, vector_output("image"), CAPTION))


def columns_of(stored: str, *names: str) -> list[dict[str, object]]:
    table = ds.dataset(f"{stored}/data").to_table()
    return table.select(names or [name for name in table.column_names if name != "image_embedding"]).to_pylist()


def test_json_lines_hold_every_column_but_vectors(stored: str, tmp_path: Path) -> None:
    result = export(ExportOptions(run=stored, target=str(tmp_path / "rows.jsonl")))
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == columns_of(stored)
    assert (result.rows, result.files, result.left_out) == (4, 1, {})


def test_named_columns_include_vectors(stored: str, tmp_path: Path) -> None:
    export(ExportOptions(run=stored, target=str(tmp_path / "rows.jsonl"), columns=("key", "image_embedding")))
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == columns_of(stored, "key", "image_embedding")


def test_a_csv_is_read_back_as_it_was(stored: str, tmp_path: Path) -> None:
    export(ExportOptions(run=stored, target=str(tmp_path / "rows.csv"), columns=("key", "text", "caption", "errors")))
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = columns_of(stored, "key", "text", "caption", "errors")
    assert rows == [
        {**row, "text": row["text"] or "", "caption": row["caption"] or "", "errors": json.dumps(row["errors"])}
        for row in expected
    ]


def test_text_files_stay_inside_the_target(stored: str, tmp_path: Path) -> None:
    result = export(ExportOptions(run=stored, target=str(tmp_path / "texts"), format="txt"))
    files = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "texts/a/1.txt": "Grüße",
        "texts/a/1.2.txt": "another",
        "texts/%2E%2E/%2E%2E/etc/passwd.txt": "climbs",
    }
    assert (result.rows, result.left_out) == (3, {"without caption": 1})


SEGMENTS = [
    {"start": 2.5, "end": 4.0, "text": "second: <b>1 & 2</b> --> 3\n\n00:00:09,000"},
    {"start": 0.0, "end": 3.0, "text": " first, which is so long that it takes more than one line of text "},
    {"start": 3661.0014, "end": 3662.0, "text": "an hour later"},
    {"start": 9.0, "end": 9.0, "text": "without a duration"},
    {"start": 10.0, "end": 11.0, "text": " \x1b "},
]


def test_subtitles_are_in_order_and_text_stays_text(tmp_path: Path) -> None:
    span = pa.list_(pa.struct([("start", pa.float32()), ("end", pa.float32()), ("text", pa.string())]))
    timed = Output(modalities=frozenset({"image"}), columns=(pa.field("transcript_segments", span),))
    rows = [{"key": "a", "transcript_segments": SEGMENTS}, {"key": "b", "transcript_segments": []}, {"key": "c"}]
    run = str(write_run(tmp_path / "out", [[{**row, "caption": "c"} for row in rows]], timed, CAPTION))
    for kind in ("srt", "vtt"):
        result = export(ExportOptions(run=run, target=str(tmp_path / kind), format=kind))
        assert (result.rows, result.left_out) == (2, {"without transcript_segments": 1})
    assert (tmp_path / "srt" / "a.srt").read_text() == (
        "1\n00:00:00,000 --> 00:00:02,500\nfirst, which is so long that it takes more\nthan one line of text\n\n"
        "2\n00:00:02,500 --> 00:00:04,000\nsecond: <b>1 & 2</b> -> 3 00:00:09,000\n\n"
        "3\n01:01:01,001 --> 01:01:02,000\nan hour later\n"
    )
    vtt = (tmp_path / "vtt" / "a.vtt").read_text()
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nfirst, which")
    assert "second: &lt;b&gt;1 &amp; 2&lt;/b&gt; -&gt; 3 00:00:09,000\n" in vtt
    assert ((tmp_path / "srt" / "b.srt").read_text(), (tmp_path / "vtt" / "b.vtt").read_text()) == ("", "WEBVTT\n")


@pytest.mark.parametrize("form", ["tar", "zip", "folder"])
def test_shards_hold_the_members_of_the_input_and_the_columns(form: str, tmp_path: Path) -> None:
    files = {f"{folder}{n}.{name}": f"{folder} {n} {name}".encode() for folder in ("", "v1.0/") for n in range(3)
             for name in ("txt", "json", "jpg")}  # fmt: skip
    if form == "folder":
        for name, data in files.items():
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).write_bytes(data)
    elif form == "zip":
        (tmp_path / "in").mkdir()
        with zipfile.ZipFile(tmp_path / "in" / "a.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        (tmp_path / "in").mkdir()
        with tarfile.open(tmp_path / "in" / "a.tar", "w") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    run_units(make_job(tmp_path / "in", tmp_path / "out"))
    options = ExportOptions(
        run=str(tmp_path / "out"), target=str(tmp_path / "tars"), format="tar", columns=("text_length", "text")
    )
    assert export(options)[1:] == (6, 1, {})
    [shard] = (tmp_path / "tars").iterdir()
    with tarfile.open(shard) as tar:
        written = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    added = {name: data for name, data in written.items() if name not in files}
    assert {name: written[name] for name in files} == files
    assert added["v1.0/2.text.txt"] == files["v1.0/2.txt"]
    assert added["v1.0/2.text_length.json"] == str(len(files["v1.0/2.txt"])).encode()
    assert len(added) == 12
    keys = [name.rpartition("/")[2].partition(".")[0] for name in written]
    assert [key for key, _ in itertools.groupby(keys)] == ["0", "1", "2"] * 2  # the members of a sample are adjacent


@given(st.text(max_size=300))
def test_a_safe_name_is_a_relative_path_inside_its_directory(key: str) -> None:
    name = safe_name(key)
    assert os.path.normpath(f"/root/{name}") == f"/root/{name}"
    assert name.isprintable()
    assert all(len(part.encode()) <= export_module.MAX_NAME_BYTES for part in name.split("/"))


def test_arrays_and_metadata_are_in_the_same_order(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "ROWS_PER_ARRAY", 2)
    result = export(ExportOptions(run=stored, target=str(tmp_path / "emb"), format="npy"))
    arrays = [np.load(path) for path in sorted((tmp_path / "emb" / "img_emb").iterdir())]
    keys = [
        key
        for path in sorted((tmp_path / "emb" / "metadata").iterdir())
        for key in pq.read_table(path)["key"].to_pylist()
    ]
    assert [array.dtype for array in arrays] == [np.float16, np.float16]
    np.testing.assert_array_equal(np.concatenate(arrays), [[1.0] * WIDTH, [0.5] * WIDTH, [0.25] * WIDTH])
    assert keys == ["a/1", "a/1", "<b>"]
    assert (result.rows, result.files, result.left_out) == (3, 4, {"without image_embedding": 1})


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        (
            "rows.xlsx",
            {},
            "ends in neither .csv nor .jsonl; set `format` to one of csv, jsonl, txt, srt, vtt, npy, tar",
        ),
        ("rows.csv", {"columns": ("caption", "nothing")}, "`columns` nothing: the rows have key"),
        ("texts", {"format": "txt", "columns": ("key", "text")}, "name the one column of text"),
        ("emb", {"format": "npy", "columns": ("text",)}, "has no column of vectors"),
        ("subtitles", {"format": "srt"}, "expected one column of texts with their times, found none"),
    ],
)
def test_an_impossible_export_names_the_reason(
    stored: str, tmp_path: Path, target: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export(ExportOptions(run=stored, target=str(tmp_path / target), **changes))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_command_replaces_a_file_only_if_told_to(
    stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "rows.csv")
    assert main(["export", stored, target]) == 0
    assert capsys.readouterr().out == f"4 rows in 1 file: {target}\n"
    assert main(["export", stored, target]) == 2
    assert "rows.csv: exists already; choose another, or use --overwrite" in capsys.readouterr().err
    assert main(["export", stored, target, "--overwrite", "--columns", "key"]) == 0
    assert main(["export", stored, str(tmp_path), "--format", "txt"]) == 2
    assert "the directory is not empty" in capsys.readouterr().err
