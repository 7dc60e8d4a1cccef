"""Tables as input: Parquet, CSV and JSON lines with media as bytes, paths or URLs, as samples and in whole jobs."""

import csv
import gzip
import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shards
import zstandard
from outputs import is_conserved, read_failures, read_rows
from tiny_clip import save_clip

from mmbeam.cli import main
from mmbeam.config import FieldMap, Limits, ModelRef, Reading, Table
from mmbeam.errors import ShardError, UsageError
from mmbeam.jobs.embed import EmbedOptions, embed, prepare
from mmbeam.jobs.inputs import look_up
from mmbeam.readers import fetch as fetch_module
from mmbeam.readers.listing import list_shards
from mmbeam.readers.paths import FileError
from mmbeam.readers.samples import open_samples, read_samples, with_rows
from mmbeam.types import Input, RawSample, RunReport, Shard

JPEGS = [shards.encode_image(shards.natural_image(number)) for number in range(5)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("model") / "clip")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures `sub/p0.JPG`, ..., and a text."""
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    for number, jpeg in enumerate(JPEGS):
        (tmp_path / "pictures" / "sub" / f"p{number}.JPG").write_bytes(jpeg)
    return tmp_path / "pictures"


def paths() -> list[dict[str, Any]]:
    return [{"file_name": f"sub/p{n}.JPG", "caption": f"picture {n}", "price": n} for n in range(len(JPEGS))]


def write(path: Path, rows: Sequence[dict[str, Any]], **options: Any) -> Path:
    """Write a table in the format of its suffix."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, **options)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, reading: Reading | None = None, trusted: bool = False, **span: int) -> list[RawSample]:
    shard = Shard(path=str(path), url=str(path), may_redirect=trusted)
    with open_samples(Input(shard=shard, **span), lambda field: True, reading or Reading()) as (reader, _):
        return list(reader)


def run(clip: Path, source: Path, output: Path, **changes: Any) -> RunReport:
    options = EmbedOptions(
        input=(str(source),),
        output=str(output),
        models=(ModelRef(model=str(clip)),),
        device="cpu",
        max_failure_rate=1.0,
    )
    return embed(replace(options, **changes))


# Formats and columns


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".jsonl", ".ndjson"])
def test_a_row_with_a_path_is_a_sample(suffix: str, pictures: Path) -> None:
    samples = read(write(pictures / f"table{suffix}", paths()))
    assert [sample.key for sample in samples] == [f"sub/p{number}" for number in range(5)]
    assert [sample.offset for sample in samples] == list(range(5))
    assert [sample.members["file_name.jpg"] for sample in samples] == JPEGS
    assert samples[3].members["txt"] == b"picture 3"
    metadata = json.loads(samples[3].members["json"])
    assert metadata == {"file_name": "sub/p3.JPG", "price": "3" if suffix in (".csv", ".tsv") else 3}


def test_bytes_as_datasets_writes_them(tmp_path: Path) -> None:
    import datasets

    images = [{"bytes": jpeg, "path": f"p{number}.jpg"} for number, jpeg in enumerate(JPEGS)]
    wave = shards.encode_sound(shards.natural_sound(0))
    rows = [
        {"image": image, "audio": {"bytes": wave, "path": None}, "sentence": "words", "label": 1} for image in images
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    samples = read(tmp_path / "train.parquet")
    assert [sample.members["image.jpg"] for sample in samples] == JPEGS
    assert {sample.members["audio.wav"] for sample in samples} == {wave}
    assert samples[0].members["txt"] == b"words"
    assert json.loads(samples[0].members["json"]) == {"label": 1}
    assert samples[0].key == "p0"


def test_bytes_without_a_name_are_known_by_their_first_bytes(tmp_path: Path) -> None:
    contents = [
        shards.encode_image(shards.natural_image(0), kind) for kind in ("jpg", "png", "webp", "gif", "bmp", "tif")
    ]
    contents += [shards.encode_sound(shards.natural_sound(0), extension=kind) for kind in ("wav", "flac", "mp3", "ogg")]
    samples = read(write(tmp_path / "t.parquet", [{"data": content} for content in contents]))
    kinds = [Reading().fields.kind(sample.fields[0]) for sample in samples]
    assert kinds == ["image"] * 6 + ["audio"] * 4
    assert [sample.key for sample in samples][:2] == ["00000000", "00000001"]


def test_options_name_the_columns(pictures: Path) -> None:
    rows = [{"file_name": "nowhere.jpg", "photo": f"sub/p{n}.JPG", "title": f"t{n}", "text": "x"} for n in range(2)]
    reading = Reading(table=Table(path_columns=("photo",)), fields=FieldMap(image="photo", text="title"))
    samples = read(write(pictures / "t.csv", rows), reading)
    assert [sample.members["photo"] for sample in samples] == JPEGS[:2]
    assert samples[1].members["title"] == b"t1"
    assert json.loads(samples[1].members["json"]) == {"file_name": "nowhere.jpg", "photo": "sub/p1.JPG", "text": "x"}


def test_a_table_of_texts_needs_no_media(tmp_path: Path) -> None:
    samples = read(write(tmp_path / "t.jsonl", [{"text": "one"}, {"text": "two", "key": "second"}]))
    assert [(sample.key, sample.members["txt"]) for sample in samples] == [("00000000", b"one"), ("second", b"two")]


@pytest.mark.parametrize(
    ("name", "rows", "table", "message"),
    [
        ("t.csv", [{"a": 1, "b": 2}], Table(), "expected a column of media or text, found a, b; name one with"),
        ("t.csv", [{"a": 1}], Table(path_columns=("photo",)), "expected a column photo, found a"),
        ("t.csv", [{"a": 1}], Table(bytes_columns=("a",)), "expected bytes in column a, which only Parquet can hold"),
    ],
)
def test_a_table_without_input_is_named(
    name: str, rows: list[dict[str, Any]], table: Table, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ShardError, match=message):
        read(write(tmp_path / name, rows), Reading(table=table))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.parquet", b"PAR1 no", "not a Parquet file, or damaged"),
        ("t.csv", b"", "expected a header"),
        ("t.csv", b"a,a\n1,2\n", "expected different names of columns"),
    ],
)
def test_a_file_that_is_no_table_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ShardError, match=message):
        read(tmp_path / name)


def test_damaged_rows_cost_themselves(pictures: Path) -> None:
    (pictures / "t.jsonl").write_bytes(
        b'{"file_name": "sub/p0.JPG"}\nnot json\n[1]\n{"file_name": "sub/none.jpg"}\n{"file_name": "sub/p1.JPG"}\n'
    )
    samples = read(pictures / "t.jsonl")
    assert [[damage.message for damage in sample.damages] for sample in samples] == [
        [],
        ["row 1: invalid JSON (JSONDecodeError)"],
        ["row 2: expected a JSON object"],
        ["row 3, file_name: sub/none.jpg: does not exist"],
        [],
    ]
    (pictures / "t.csv").write_text("file_name,text\nsub/p0.JPG,a\nsub/p1.JPG,b,c\nsub/p2.JPG,d\n")
    samples = read(pictures / "t.csv")
    assert [len(sample.damages) for sample in samples] == [0, 1, 0]


def test_a_csv_that_breaks_off_says_where(pictures: Path) -> None:
    path = pictures / "t.csv"
    path.write_text('file_name,text\nsub/p0.JPG,a\nsub/p1.JPG,"b\nc\n')
    shard = Shard(path=str(path), url=str(path))
    with open_samples(Input(shard=shard), lambda field: True, Reading()) as (reader, _):
        assert [sample.key for sample in reader] == ["sub/p0"]
        assert "line 4: invalid CSV" in str(reader.broken)


def test_a_bad_quote_costs_its_row(pictures: Path) -> None:
    (pictures / "t.csv").write_text('file_name,text\nsub/p0.JPG,a\n"sub"/p1.JPG,b\nsub/p2.JPG,c\n')
    samples = read(pictures / "t.csv")
    assert [(sample.key, sample.offset, len(sample.damages)) for sample in samples] == [
        ("sub/p0", 0, 0),
        ("00000001", 1, 1),
        ("sub/p2", 2, 0),
    ]
    assert "line 3: invalid CSV" in samples[1].damages[0].message


def test_tables_that_break_off_keep_the_rows_before(pictures: Path) -> None:
    (pictures / "t.jsonl").write_bytes(b'{"file_name": "sub/p0.JPG"}\n{"file_name": "sub/p')
    path = write(pictures / "t.parquet", [{"image": jpeg} for jpeg in JPEGS], row_group_size=2, compression="none")
    with pq.ParquetFile(path) as parquet:
        page = parquet.metadata.row_group(1).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[page : page + 8] = b"\xff" * 8
    path.write_bytes(data)
    for name, count, message in (("t.jsonl", 2, "row 1: cut off"), ("t.parquet", 2, "from row 2 on: damaged")):
        shard = Shard(path=str(pictures / name), url=str(pictures / name))
        with open_samples(Input(shard=shard), lambda field: True, Reading()) as (reader, _):
            assert len(list(reader)) == count
            assert message in str(reader.broken)


# Parts


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_parts_are_the_rows_between_their_cuts(suffix: str, pictures: Path) -> None:
    options = {"row_group_size": 2} if suffix == ".parquet" else {}
    path = write(pictures / f"t{suffix}", paths(), **options)
    whole = read(path)
    parts = [read(path, begin=begin, end=begin + 1) for begin in range(5)]
    assert [sample for part in parts for sample in part] == whole
    assert read(path, begin=1, end=4) == whole[1:4]


def test_a_large_table_is_cut_and_resumes(
    clip: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmbeam.readers.units.MAX_UNIT_SAMPLES", 2)
    path = write(pictures / "t.csv", paths())
    report = run(clip, path, tmp_path / "out")
    assert (report.units_written, report.tally.rows) == (3, 5)
    part = next((tmp_path / "out" / "data").iterdir())
    part.unlink()
    again = run(clip, path, tmp_path / "out")
    assert (again.units_written, again.units_kept, again.tally.rows) == (1, 2, 5)
    rows = read_rows(tmp_path / "out")
    assert [(row["key"], row["offset"]) for row in rows] == [(f"sub/p{n}", n) for n in range(5)]
    assert {row["shard"] for row in rows} == {str(path)}
    assert is_conserved(again)


# Trust


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/hostname", "link.jpg", "s3://bucket/a.jpg", "file:///etc/hostname"]
)
def test_files_outside_the_folder_are_refused_unless_the_table_is_trusted(name: str, pictures: Path) -> None:
    (pictures.parent / "secret.jpg").write_bytes(JPEGS[0])
    (pictures / "link.jpg").symlink_to(pictures.parent / "secret.jpg")
    path = write(pictures / "t.csv", [{"file_name": name, "text": "words"}])
    (sample,) = read(path)
    assert not {"file_name.jpg", "file_name"} & sample.members.keys()
    (damage,) = sample.damages
    assert damage.error == "PermissionError"
    assert "--allow-local-paths" in damage.message
    if name in ("../secret.jpg", "link.jpg"):
        (trusted,) = read(path, trusted=True)
        assert trusted.members["file_name.jpg"] == JPEGS[0]


def test_an_absolute_path_within_the_folder_is_read(pictures: Path) -> None:
    (sample,) = read(write(pictures / "t.csv", [{"file_name": str(pictures / "sub" / "p0.JPG")}]))
    assert sample.members["file_name.jpg"] == JPEGS[0]


def test_a_job_records_what_a_table_may_not_name(clip: Path, pictures: Path, tmp_path: Path) -> None:
    path = write(pictures / "t.csv", [*paths(), {"file_name": "../../x", "caption": "outside", "price": 0}])
    report = run(clip, path, tmp_path / "out")
    assert is_conserved(report)
    assert report.tally.rows == 6
    (record,) = read_failures(tmp_path / "out")
    assert (record["key"], record["offset"], record["modality"], record["error"]) == (
        "00000005",
        5,
        "image",
        "PermissionError",
    )


# URLs


class Web:
    """A server on loopback: the answers by path, and the requests it got."""

    def __init__(self) -> None:
        self.answers: dict[str, list[tuple[int, dict[str, str], bytes]]] = {}
        self.requests: list[str] = []
        self.open = self.most_open = 0
        lock, web = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with lock:
                    web.requests.append(self.path)
                    answers = web.answers.get(self.path, [(404, {}, b"")])
                    status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
                    web.open += 1
                    web.most_open = max(web.most_open, web.open)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
                with lock:
                    web.open -= 1

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(fetch_module, "WAITS", (0.01, 0.01))
    web = Web()
    yield web
    fetch_module.close()
    web.server.shutdown()
    web.server.server_close()


def test_urls_are_fetched(web: Web, clip: Path, tmp_path: Path) -> None:
    for number, jpeg in enumerate(JPEGS):
        web.answers[f"/p{number}.jpg?size=1"] = [(200, {}, jpeg)]
    rows = [{"url": f"{web.url}/p{number}.jpg?size=1", "text": f"t{number}"} for number in range(5)]
    path = write(tmp_path / "urls.csv", [*rows, {"url": f"{web.url}/none.jpg", "text": "gone"}])
    report = run(clip, path, tmp_path / "out", allow_local_paths=True)
    assert is_conserved(report)
    assert report.tally.outputs["image_embedding"] == 5
    (record,) = read_failures(tmp_path / "out")
    assert record["message"].endswith("/none.jpg: status 404") or "404" in record["message"]
    assert web.requests.count("/none.jpg") == 1
    assert web.most_open <= fetch_module.PER_HOST


def test_a_private_address_is_refused_however_it_is_written(web: Web) -> None:
    port = web.url.rpartition(":")[2]
    web.answers["/a"] = [(200, {}, JPEGS[0])]
    assert fetch_module.fetch(f"{web.url}/a", 1 << 20, allow_private=True) == JPEGS[0]
    for host in (
        "127.0.0.1",
        "localhost",
        "127.1",
        "0x7f000001",
        "2130706433",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
    ):
        with pytest.raises(FileError, match="not a public address"):
            fetch_module.fetch(f"http://{host}:{port}/a", 1 << 20)
    for address in ("10.0.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "[fd00::1]", "[64:ff9b::a00:1]"):
        with pytest.raises(FileError, match="not a public address"):
            fetch_module.fetch(f"http://{address}/a", 1 << 20)
    assert len(web.requests) == 1


def test_a_signed_url_reaches_neither_a_row_nor_a_record(web: Web, tmp_path: Path) -> None:
    web.answers["/a.jpg?X-Amz-Signature=secret"] = [(200, {}, JPEGS[0])]
    rows = [{"url": f"{web.url}/{name}.jpg?X-Amz-Signature=secret", "text": "a"} for name in ("a", "none")]
    for suffix in ("csv", "jsonl"):
        path = write(tmp_path / f"t.{suffix}", rows)
        first, second = read(path, trusted=True)
        assert first.members["url.jpg"] == JPEGS[0]
        (damage,) = second.damages
        assert "status 404" in damage.message or "404" in damage.message
        for raw in (first, second):
            assert b"secret" not in raw.members["json"]
            assert not any("secret" in damage.message for damage in raw.damages)


def test_a_host_that_does_not_exist_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def fail(host: object, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(FileError, match="example: no such host"):
        fetch_module.fetch("http://no-such-host.example/a", 100)
    assert len(asked) == 1
    fetch_module.close()


def test_redirects_are_followed_and_checked(web: Web) -> None:
    web.answers["/a"] = [(302, {"Location": "/b"}, b"")]
    web.answers["/b"] = [(200, {}, b"content")]
    web.answers["/file"] = [(302, {"Location": "file:///etc/passwd"}, b"")]
    web.answers["/loop"] = [(302, {"Location": "/loop"}, b"")]
    get: Callable[[str], bytes] = lambda path: fetch_module.fetch(web.url + path, 100, allow_private=True)  # noqa: E731
    assert get("/a") == b"content"
    for path, message in (("/file", "not http:// or https://"), ("/loop", "redirects more than 5 times")):
        with pytest.raises(FileError, match=message):
            get(path)


def test_faults_are_retried_and_sizes_are_limited(web: Web) -> None:
    web.answers["/busy"] = [(503, {}, b""), (429, {"Retry-After": "0"}, b""), (200, {}, b"content")]
    web.answers["/down"] = [(500, {}, b"")]
    web.answers["/large"] = [(200, {}, bytes(1000))]
    assert fetch_module.fetch(f"{web.url}/busy", 100, allow_private=True) == b"content"
    with pytest.raises(FileError, match="after 3 attempts"):
        fetch_module.fetch(f"{web.url}/down", 100, allow_private=True)
    with pytest.raises(FileError, match="has more than 100 bytes"):
        fetch_module.fetch(f"{web.url}/large", 100, allow_private=True)
    with pytest.raises(FileError, match="expected an http:// or https:// URL"):
        fetch_module.fetch("ftp://example.com/a", 100)


# Among other inputs


def test_a_member_limit_holds_for_every_form(pictures: Path) -> None:
    reading = Reading(limits=Limits(member_bytes=100))
    for rows in (paths(), [{"data": JPEGS[0]}]):
        suffix = ".parquet" if "data" in rows[0] else ".csv"
        for sample in read(write(pictures / f"t{suffix}", rows), reading):
            assert [damage.error for damage in sample.damages] == ["LimitError"]


def test_tables_beside_shards_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards.make_webdataset(tmp_path, shards.make_truths(2), shards=1)
    write(tmp_path / "t.parquet", [{"text": "a"}])
    assert [Path(shard.path).suffix for shard in list_shards([str(tmp_path)])] == [".tar"]
    assert [Path(shard.path).suffix for shard in list_shards([str(tmp_path / "*")])] == [".tar"]
    assert "left out 1 files that are not inputs: 1 .parquet (t.parquet)" in caplog.text
    assert [Path(shard.path).name for shard in list_shards([str(tmp_path / "*.parquet")])] == ["t.parquet"]


def test_a_folder_of_tables_is_an_input(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("data/train-0.parquet", "data/train-1.parquet"):
        write(tmp_path / name, [{"text": "a"}])
    (tmp_path / "README.md").write_text("about it")
    assert [Path(shard.path).name for shard in list_shards([str(tmp_path)])] == ["train-0.parquet", "train-1.parquet"]


def test_rows_of_a_job_are_features_and_no_table(clip: Path, pictures: Path, tmp_path: Path) -> None:
    run(clip, write(pictures / "t.csv", paths()), tmp_path / "out")
    for source in (tmp_path / "out", next((tmp_path / "out" / "data").iterdir())):
        assert look_up([str(source)], Reading(), features=True).features
        with pytest.raises(UsageError, match="found rows of an mmbeam job"):
            look_up([str(source)], Reading())
    table = write(tmp_path / "t.parquet", [{"text": "a"}])
    assert not look_up([str(table)], Reading(), features=True).features


def test_plan_cuts_a_table_too(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmbeam.transforms import Plan

    monkeypatch.setattr("mmbeam.readers.units.MAX_UNIT_SAMPLES", 2)
    path = write(pictures / "t.csv", paths())
    (unit,) = Plan(str(path)).units  # without a run nothing is cut
    assert unit.inputs[0].shard.rows == 5


def test_columns_are_part_of_the_fingerprint_only_if_named(clip: Path, pictures: Path, tmp_path: Path) -> None:
    options = EmbedOptions(
        input=(str(write(pictures / "t.csv", paths())),),
        output=str(tmp_path / "out"),
        models=(ModelRef(model=str(clip)),),
        device="cpu",
    )
    assert "table" not in prepare(options).run.configuration["reading"]
    named = replace(options, output=str(tmp_path / "b"), reading=Reading(table=Table(path_columns=("file_name",))))
    assert prepare(named).run.configuration["reading"]["table"]["path_columns"] == ("file_name",)


def test_the_command_line_reads_a_table(
    clip: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(pictures / "t.csv", [{"photo": row["file_name"], "title": row["caption"]} for row in paths()])
    job = ["embed", "--input", str(path), "--output", str(tmp_path / "out"), "--model", str(clip), "--device", "cpu"]
    assert main(job) == 1
    assert "name one with --path-column, --url-column, --bytes-column or --text-field" in capsys.readouterr().err
    assert main([*job, "--path-column", "photo", "--text-field", "title"]) == 0
    assert "samples: 5 = 5 rows" in capsys.readouterr().out
    assert read_rows(tmp_path / "out")[0]["text"] == "picture 0"


def test_samples_are_read_again_by_their_offset(pictures: Path) -> None:
    path = write(pictures / "t.csv", paths())
    source = Input(shard=Shard(path=str(path), url=str(path)))
    assert [raw.key for raw in read_samples(source, [3, 1])] == ["sub/p1", "sub/p3"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_compressed_table_has_the_same_samples(suffix: str, compression: str, pictures: Path) -> None:
    plain = write(pictures / f"t{suffix}", paths())
    compress = gzip.compress if compression == ".gz" else zstandard.compress
    path = plain.rename(pictures / f"plain{suffix}").with_name(f"T{suffix.upper()}{compression}")
    path.write_bytes(compress((pictures / f"plain{suffix}").read_bytes()))
    [shard] = with_rows(list_shards([str(path)]))
    assert shard.rows == 5
    for span in ({}, {"begin": 2, "end": 4}):
        expected, found = read(pictures / f"plain{suffix}", **span), read(path, **span)
        assert [replace(raw, shard="") for raw in found] == [replace(raw, shard="") for raw in expected]
        assert found


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_compressed_table_that_is_cut_off_keeps_the_rows_before(suffix: str, tmp_path: Path) -> None:
    plain = write(tmp_path / f"t{suffix}", [{"text": f"{n:x}" * (n % 7 + 1), "n": n} for n in range(2000)])
    data = gzip.compress(plain.read_bytes())
    path = tmp_path / f"cut{suffix}.gz"
    path.write_bytes(data[: len(data) // 2])
    [shard] = with_rows(list_shards([str(path)]))
    assert shard.rows is None
    with open_samples(Input(shard=shard), lambda field: True, Reading()) as (reader, _):
        rows = list(reader)
    assert 100 < len(rows) < 2000
    assert [raw.members["txt"] for raw in rows[:-1]] == [raw.members["txt"] for raw in read(plain)[: len(rows) - 1]]
    assert reader.broken is not None
    assert "cannot be decompressed" in reader.broken
    path.write_bytes(data[:-8] + bytes(8))  # only the checksum is wrong
    [shard] = list_shards([str(path)])
    with open_samples(Input(shard=shard), lambda field: True, Reading()) as (reader, _):
        assert [raw.members for raw in reader] == [raw.members for raw in read(plain)]
    assert reader.broken is not None
