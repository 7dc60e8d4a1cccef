"""`mmbeam pack`: any input as shards that hold the same samples, the same bytes each time."""

import csv
import hashlib
import json
import tarfile
import unicodedata
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
import shards
import webdataset

from mmbeam.cli import main
from mmbeam.config import Limits, Reading
from mmbeam.errors import JobError, UsageError
from mmbeam.jobs.inputs import look_up
from mmbeam.jobs.pack import Packed, PackOptions, pack
from mmbeam.readers.paths import split_name
from mmbeam.readers.samples import open_samples
from mmbeam.readers.tar import safe_key
from mmbeam.runs.store import Store
from mmbeam.types import Input

JPEGS = [shards.encode_image(shards.natural_image(number, 24)) for number in range(4)]
NFC, NFD = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")


def folder(path: Path) -> Path:
    """A folder as people have it: nested, mixed, upper case, hidden and empty files."""
    files = {
        "a.JPG": JPEGS[0],
        "a.txt": "ein schöner Tag".encode(),
        "a.json": b'{"price": 1}',
        "sub/deep er/b.jpeg": JPEGS[1],
        f"{NFC}.jpg": JPEGS[2],
        f"{NFD}.jpg": JPEGS[3],
        "empty.png": b"",
        ".DS_Store": b"x",
        "sub/._b.jpeg": b"x",
        "__MACOSX/c.jpg": JPEGS[0],
        "notes.md": b"# notes",
    }
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def archive(path: Path) -> Path:
    """A zip of the same, with a zip inside."""
    source = folder(path.parent / "for the zip")
    with zipfile.ZipFile(path, "w") as file:
        for name in sorted(source.rglob("*")):
            if name.is_file():
                file.write(name, name.relative_to(source))
        file.writestr("inner.zip", b"PK\5\6" + bytes(18))
    return path


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.write_bytes(shards.tar_bytes(members))
    return path


def tar(path: Path) -> Path:
    return write_tar(
        path, [member for n in range(4) for member in ((f"k{n}.jpg", JPEGS[n]), (f"k{n}.txt", b"text %d" % n))]
    )


def csv_table(path: Path) -> Path:
    folder(path.parent)
    rows = [["file_name", "caption"], ["a.JPG", "one"], ["sub/deep er/b.jpeg", "two"], ["absent.jpg", "three"]]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def parquet(path: Path) -> Path:
    rows = [{"image": {"bytes": data, "path": None}, "text": f"t{n}", "id": n} for n, data in enumerate(JPEGS)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


INPUTS = {
    "folder": lambda path: folder(path / "photos"),
    "zip": lambda path: archive(path / "all.zip"),
    "tar": lambda path: tar(path / "one.tar"),
    "csv": lambda path: csv_table(path / "table.csv"),
    "parquet": lambda path: parquet(path / "table.parquet"),
}


def packed(source: Path | Sequence[Path], output: Path | str, **changes: Any) -> Packed:
    sources = [source] if isinstance(source, Path) else source
    return pack(replace(PackOptions(input=tuple(map(str, sources)), output=str(output)), **changes))


def samples(source: Path | str) -> list[tuple[str, dict[str, bytes]]]:
    """The samples of an input, as a job reads them: a sample whose image is lost keeps its text."""
    result = []
    for shard in look_up([str(source)], Reading()).files:
        with open_samples(Input(shard=shard), lambda name: True, Reading()) as (reader, _):
            result += [(raw.key, dict(raw.members)) for raw in reader if raw.members]
    return result


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


@pytest.mark.parametrize("kind", INPUTS)
def test_the_shards_hold_the_samples_of_the_input(kind: str, tmp_path: Path) -> None:
    source = INPUTS[kind](tmp_path)
    report = packed(source, tmp_path / "shards", shard_samples=3)
    assert not any("__MACOSX" in key for key, _ in samples(tmp_path / "shards"))
    assert samples(tmp_path / "shards") == samples(source)
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert [shard["nsamples"] for shard in index["shardlist"]] == [3] * (report.samples // 3) + [report.samples % 3] * (
        report.samples % 3 > 0
    )
    for shard in index["shardlist"]:
        data = (tmp_path / "shards" / shard["url"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["filesize"], shard["sha256"])
        assert hashlib.md5(data).hexdigest() == shard["md5sum"]
    if kind == "csv":
        records = [json.loads(line) for line in (tmp_path / "shards" / "failures.jsonl").read_text().splitlines()]
        assert [(r["key"], r["offset"], r["error"]) for r in records] == [("absent", 2, "ShardError")]
    packed(source, tmp_path / "again", shard_samples=3)
    assert contents(tmp_path / "again") == contents(tmp_path / "shards")


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    packed(folder(tmp_path / "photos"), tmp_path / "shards")
    with (tmp_path / "shards" / "shard-000000.tar").open("rb") as stream:
        files = webdataset.tariterators.tar_file_expander([{"url": "shard", "stream": stream}])
        read = list(webdataset.tariterators.group_by_keys(files))
    assert [(row["__key__"], {*row} - {"__key__", "__url__", "__local_path__"}) for row in read] == [
        ("a", {"jpg", "json", "txt"}),
        (NFD, {"jpg"}),
        (NFC, {"jpg"}),
        ("empty", {"png"}),
        ("sub/deep er/b", {"jpeg"}),
    ]


def test_a_shuffle_depends_on_the_seed_alone_and_keeps_every_sample(tmp_path: Path) -> None:
    write_tar(tmp_path / "in.tar", [(f"{n:03}.txt", str(n).encode()) for n in range(200)])
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        packed(tmp_path / "in.tar", tmp_path / name, shuffle=seed, shard_bytes=50_000)
    first, other = samples(tmp_path / "a"), samples(tmp_path / "c")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert first != other
    assert sorted(first) == sorted(other) == samples(tmp_path / "in.tar")
    positions = [int(key) for key, _ in first]
    assert sum(a < b for a, b in pairwise(positions)) < 140  # of 199; all if in order
    assert all(path.stat().st_size <= 50_000 for path in (tmp_path / "a").glob("*.tar"))


def test_keys_that_repeat_are_told_apart(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "in.tar", [(f"{key}.txt", b"t") for key in ("a", "a-2", "b", "a")])
    report = packed([tmp_path / "x" / "in.tar", tmp_path / "y" / "in.tar"], tmp_path / "shards")
    keys = [key for key, _ in samples(tmp_path / "shards")]
    assert keys == ["a", "a-2", "b", "a-3", "a-4", "a-2-2", "b-2", "a-5"]
    assert (report.samples, report.renames, report.renamed[0]) == (8, 5, ("a", "a-3"))


@pytest.mark.parametrize(
    "key",
    ["../../etc/passwd", "/abs/a", "a.b.c", "", "__reserved__", ".hidden", "a//b", "a\0b", "x" * 300, "é" * 150, "a/"],
)
def test_keys_are_safe_paths_that_a_reader_finds_again(key: str) -> None:
    safe = safe_key(key)
    assert split_name(f"{safe}.jpg") == (safe, "jpg")
    assert safe.isprintable()
    assert not safe.startswith("/")
    assert ".." not in safe.split("/")
    assert max(len(part.encode()) for part in safe.split("/")) <= 200
    assert safe_key(safe) == safe


@pytest.mark.parametrize("key", ["a", "a/b c/é", "000012", "./a", f"{NFD}", "日本語"])
def test_plain_keys_stay(key: str) -> None:
    assert safe_key(key) == key


def test_what_cannot_be_read_is_a_record(tmp_path: Path) -> None:
    whole = tar(tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "html.tar").write_bytes(b"<html>no such page</html>" * 100)
    big = folder(tmp_path / "photos")
    (big / "a.JPG").write_bytes(bytes(10_000))
    reading = Reading(limits=Limits(member_bytes=9_000))
    report = packed([tmp_path / "cut.tar", tmp_path / "html.tar", big], tmp_path / "shards", reading=reading)
    records = [json.loads(line) for line in (tmp_path / "shards" / "failures.jsonl").read_text().splitlines()]
    assert set(report.failed) == {str(tmp_path / "cut.tar"), str(tmp_path / "html.tar")}
    assert {record["shard"].rpartition("/")[2] for record in records} == {"cut.tar", "html.tar", "photos"}
    [lost] = [record for record in records if record["field"] == "jpg" and record["shard"] == str(big)]
    assert (lost["key"], lost["error"]) == ("a", "LimitError")
    kept = dict(samples(tmp_path / "shards"))
    assert {"k0", "a", "sub/deep er/b"} <= set(kept)
    assert set(kept["a"]) == {"json", "txt"}


def test_an_output_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    source, output = tar(tmp_path / "in.tar"), tmp_path / "shards"
    packed(source, output, shard_samples=1)
    with pytest.raises(UsageError, match="found a finished pack"):
        packed(source, output)
    packed(source, output, overwrite=True)
    assert sorted(contents(output)) == ["index.json", "shard-000000.tar"]
    (output / "thesis.doc").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"deletes only shards of a pack, found thesis\.doc"):
        packed(source, output, overwrite=True)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.tar").write_bytes(tar(tmp_path / "y.tar").read_bytes()[:600])
    with pytest.raises(JobError, match="no sample could be packed"):
        packed(tmp_path / "bad", tmp_path / "none")


def test_a_bucket_as_output(tmp_path: Path) -> None:
    source = tar(tmp_path / "in.tar")
    store = Store(servers.fresh_output("s3", tmp_path))
    packed(source, store.url, shuffle=0)
    packed(source, tmp_path / "here", shuffle=0)
    assert {name: store.read(name) for name in store.list("")} == contents(tmp_path / "here")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(folder(tmp_path / "photos")), "--output", str(tmp_path / "out"), "--shuffle"]) == 0
    printed = capsys.readouterr().out
    assert "5 samples in 1 shard, " in printed
    assert f"index: {tmp_path / 'out'}/index.json" in printed
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as file:
        assert {(member.mtime, member.uid, member.mode) for member in file} == {(0, 0, 0o644)}
    (tmp_path / "cut.tar").write_bytes(tar(tmp_path / "whole.tar").read_bytes()[:4000])
    assert main(["pack", str(tmp_path / "cut.tar"), "--output", str(tmp_path / "cut")]) == 3
