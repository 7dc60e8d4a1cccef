"""Folders of media files and zip archives as inputs: what is listed, planned, read and resumed."""

import ctypes
import io
import json
import logging
import os
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import shards
from outputs import is_conserved, read_failures, read_rows

from mmbeam.cli import main
from mmbeam.config import FieldMap, Limits, ModelRef, Reading, Windows
from mmbeam.errors import NoShardsError, RunMismatchError, ShardError, UsageError
from mmbeam.jobs import execute
from mmbeam.jobs.embed import EmbedOptions, embed
from mmbeam.readers import units as units_module
from mmbeam.readers import zip as zip_module
from mmbeam.readers.listing import list_shards
from mmbeam.readers.samples import read_sample
from mmbeam.readers.units import limited_unit, plan_units, unit_from_json, unit_to_json
from mmbeam.readers.windows import read_batches
from mmbeam.readers.zip import ZipReader
from mmbeam.types import Failure, Input, Needs, RunReport, Sample, Shard, WorkUnit

NEEDS = Needs(modalities=frozenset({"image", "audio"}))
JPEG = shards.encode_image(shards.natural_image(1, 32, 24))
SOURCE = Input(shard=Shard(path="/x.zip", url="/x.zip"))
PNG = shards.encode_image(shards.natural_image(2, 24, 32), "png")


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write(
        tmp_path / "photos",
        {
            "a.JPG": JPEG,
            "a.txt": "a cat",
            "a.json": '{"n": 1}',
            "2024/may/b.v1.png": PNG,
            "2024/may/b.txt": "a dog",
            "2024/c.jpeg": JPEG,
            ".thumbs/a.jpg": JPEG,
            "2024/.DS_Store": b"\0",
            "README.md": "# mine",
            "2024/d.psd": b"8BPS",
        },
    )


def read(units: list[WorkUnit], reading: Reading | None = None) -> tuple[list[Sample], list[Failure]]:
    batches = [batch for unit in units for batch in read_batches(unit, reading or Reading(), NEEDS, Windows())]
    assert [batch.unit_error for batch in batches if batch.unit_error] == []
    return [s for batch in batches for s in batch.samples], [f for batch in batches for f in batch.failures]


@contextmanager
def permissions_checked() -> Iterator[None]:
    """Let the kernel check the permissions of files for this thread, and threads that it starts, also as root.

    Takes CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH from the thread's effective set (capset(2)).
    """
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    data = ctypes.create_string_buffer(24)  # twice: effective, permitted, inheritable
    assert libc.capget(header, data) == 0
    before = data.raw
    effective = struct.unpack_from("I", before)[0] & ~(1 << 1 | 1 << 2)
    assert libc.capset(header, struct.pack("I", effective) + before[4:]) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


def plan(*inputs: Path | str, fields: FieldMap | None = None) -> list[WorkUnit]:
    return plan_units(list_shards([str(path) for path in inputs], fields=fields), [])


class TestFolders:
    def test_siblings_at_any_depth_are_samples_in_the_order_of_their_keys(
        self, photos: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        [unit] = plan(photos)
        samples, failures = read([unit])
        assert [(s.key, s.text, s.metadata, s.image_size) for s in samples] == [
            ("2024/c", None, None, (32, 24)),
            ("2024/may/b", "a dog", None, (24, 32)),
            ("a", "a cat", '{"n": 1}', (32, 24)),
        ]
        assert {s.shard for s in samples} == {str(photos)}
        assert [s.offset for s in samples] == [0, 1, 2]
        assert failures == []
        [record] = caplog.records
        assert record.getMessage() == (
            "`input`: left out 4 files that are not inputs: 2 hidden (.thumbs, ...), 1 .psd (2024/d.psd), "
            "1 .md (README.md)"
        )

    @pytest.mark.parametrize(
        ("pattern", "keys"),
        [
            ("photos", ["2024/c", "2024/may/b", "a"]),
            ("photos/", ["2024/c", "2024/may/b", "a"]),
            ("photos/**/*.JPG", ["a"]),
            ("photos/**/*.jp*", ["2024/c"]),
            ("photos/*/may/*.png", ["2024/may/b"]),
            ("photos/a.JPG", ["a"]),
            ("photos/{a.JPG,2024/c.jpeg}", ["a", "c"]),
            ("photos/2024", ["c", "may/b"]),
            ("photos/**/*.txt", ["2024/may/b", "a"]),
        ],
    )
    def test_what_a_pattern_names(self, photos: Path, pattern: str, keys: list[str]) -> None:
        samples, failures = read(plan(photos.parent / pattern))
        assert sorted(s.key for s in samples) == keys
        assert failures == []

    def test_two_patterns_of_one_folder_are_one_shard(self, photos: Path) -> None:
        [shard] = list_shards([f"{photos}/**/*.JPG", f"{photos}/**/*.png", f"{photos}/a.JPG"])
        assert [sample.key for sample in shard.samples] == ["2024/may/b", "a"]

    def test_a_folder_of_a_store_is_read_like_a_local_one(self, photos: Path) -> None:
        memory = fsspec.filesystem("memory")
        memory.put(str(photos), "/photos", recursive=True)
        try:
            remote, _ = read(plan("memory://photos"))
            by_glob, _ = read(plan("memory://photos/**/*.jpeg"))
        finally:
            memory.rm("/photos", recursive=True)
        local, _ = read(plan(photos))
        assert [(s.key, s.text, s.offset) for s in remote] == [(s.key, s.text, s.offset) for s in local]
        assert {s.shard for s in remote} == {"memory://photos"}
        assert [s.key for s in by_glob] == ["2024/c"]

    def test_a_field_that_an_option_names_makes_a_file_media(self, photos: Path) -> None:
        (photos / "e.raw").write_bytes(PNG)
        fields = FieldMap(image="RAW")
        samples, _ = read(plan(photos, fields=fields), Reading(fields=fields))
        assert [s.key for s in samples if s.image is not None] == ["e"]

    def test_names_that_are_not_plain(self, tmp_path: Path) -> None:
        folder = write(
            tmp_path / "odd[1]",
            {"a b.jpg": JPEG, "x::y.jpg": JPEG, "50%.jpg": JPEG, "é/*.jpg": JPEG, "q?#.jpg": JPEG, "two.JPG": JPEG},
        )
        (folder / "two.jpg").write_bytes(JPEG)
        (folder / os.fsdecode(b"\xff.jpg")).write_bytes(JPEG)
        samples, failures = read(plan(folder))
        assert failures == []
        keys = ["50%", "\\udcff", "a b", "q?#", "two", "two", "x::y", "é/*"]
        assert sorted(s.key for s in samples) == sorted(keys)
        assert len({s.offset for s in samples}) == len(keys)

    def test_a_row_of_metadata_beside_the_file_is_its_metadata(self, photos: Path) -> None:
        write(
            photos,
            {
                "metadata.csv": '\ufefffile_name,text,n\n2024/c.jpeg,"far, away",7\na.JPG,own JSON wins,8\n',
                "2024/may/metadata.jsonl": '{"file_name": "b.v1.png", "tags": ["x"]}\n\n{"file_name": "../../a.JPG"}\n',
            },
        )
        samples, failures = read(plan(photos))
        assert failures == []
        values = {s.key: json.loads(s.metadata or "null") for s in samples}
        assert values == {"2024/c": {"text": "far, away", "n": "7"}, "2024/may/b": {"tags": ["x"]}, "a": {"n": 1}}

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            (
                "metadata.csv",
                "name,text\na.JPG,x\n",
                "line 2: expected the name of a file in file_name, found",
            ),
            ("metadata.csv", "file_name\na.JPG,x\n", "line 2: has more values than the header"),
            ("metadata.jsonl", '{"file_name": 3}\n', "line 1: expected the name of a file"),
            ("metadata.jsonl", "[" * 100_000 + "\n", "line 1: invalid JSON (RecursionError)"),
            ("metadata.jsonl", '{"file_name": "a.JPG"}\n[1]', "line 2: expected a JSON object, found list"),
            ("metadata.csv", b"file_name\n\xff\n", "expected UTF-8, found byte 10 invalid"),
        ],
    )
    def test_an_invalid_table_of_metadata_fails_the_unit(
        self, photos: Path, name: str, content: str | bytes, message: str
    ) -> None:
        write(photos, {name: content})
        [unit] = plan(photos)
        *_, last = read_batches(unit, Reading(), NEEDS, Windows())
        assert last.unit_error is not None
        assert f"{photos}/{name}" in last.unit_error
        assert message in last.unit_error

    def test_units_hold_their_files_and_travel_as_json(self, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(units_module, "MAX_UNIT_SAMPLES", 2)
        (photos / "metadata.csv").write_text("file_name,n\na.JPG,1\n")
        units = plan(photos)
        assert [(u.inputs[0].begin, u.inputs[0].end) for u in units] == [(0, 2), (2, 3)]
        assert len({u.id for u in units}) == 2
        assert [unit_from_json(json.loads(json.dumps(unit_to_json(unit)))) for unit in units] == units
        samples, _ = read(units)
        assert [(s.key, s.offset) for s in samples] == [("2024/c", 0), ("2024/may/b", 1), ("a", 2)]

    def test_a_limit_counts_samples(self, photos: Path) -> None:
        samples, _ = read([limited_unit(list_shards([str(photos)]), 2)])
        assert [s.key for s in samples] == ["2024/c", "2024/may/b"]

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda path: path.unlink(), "ShardError", "a.JPG: no longer exists"),
            (lambda path: path.write_bytes(PNG), "ShardError", "a.JPG: changed since it was listed"),
            (lambda path: (path.unlink(), path.mkdir()), "ShardError", "a.JPG: is not a file"),
            (lambda path: path.chmod(0), "PermissionError", "a.JPG: cannot be read"),
        ],
    )
    def test_a_file_that_changes_after_the_listing_costs_its_sample_only(
        self, photos: Path, change: Callable[[Path], Any], error: str, message: str
    ) -> None:
        units = plan(photos)
        change(photos / "a.JPG")
        with permissions_checked():
            samples, failures = read(units)
        assert [s.key for s in samples] == ["2024/c", "2024/may/b", "a"]
        assert [(f.key, f.step, f.error, f.modality) for f in failures] == [("a", "read", error, "image")]
        assert message in failures[0].message

    def test_a_broken_link_and_a_large_file_cost_their_samples_and_a_pipe_is_not_opened(self, photos: Path) -> None:
        (photos / "x.jpg").symlink_to(photos / "nowhere.jpg")
        os.mkfifo(photos / "y.jpg")
        (photos / "loop").symlink_to(photos)
        samples, failures = read(plan(photos), Reading(limits=Limits(member_bytes=len(PNG) + 1)))
        assert "y" not in {s.key for s in samples}
        large = {key for key in ("2024/c", "a") if len(JPEG) > len(PNG) + 1}
        assert {(f.key, f.error) for f in failures} >= {("x", "ShardError")} | {(key, "LimitError") for key in large}

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"a.tar": b"", "b.jpg": JPEG}, "expected either shards or media files, found 1 shards (a.tar, ...) and 1"),
            ({"sub/a.tar": b"", "x/b.jpg": JPEG}, "found 1 shards (sub/a.tar, ...) and 1 media files (x/b.jpg, ...)"),
        ],
    )
    def test_shards_beside_media_are_an_error(self, tmp_path: Path, files: dict[str, bytes], message: str) -> None:
        folder = write(tmp_path / "both", files)
        with pytest.raises(UsageError) as error:
            list_shards([str(folder)])
        assert message in str(error.value)
        assert f"'{folder}/**/*.tar'" in str(error.value)
        with pytest.raises(UsageError):
            list_shards([f"{folder}/**/*"])

    @pytest.mark.parametrize("pattern", ["small", "small/*"])
    def test_files_beside_shards_are_left_out_by_name(
        self, tmp_path: Path, pattern: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        made = shards.make_img2dataset(tmp_path / "small")
        listed = list_shards([f"{tmp_path}/{pattern}"])
        assert {shard.path.rpartition(".")[2] for shard in listed} == {"tar"}
        [record] = caplog.records
        assert "`input`: left out " in record.getMessage()
        assert ".parquet (" in record.getMessage()
        assert made.truths

    @pytest.mark.parametrize(
        ("files", "pattern", "message"),
        [
            ({"x.pdf": b"", "y.json": b"{}"}, "", "it holds 1 .pdf (x.pdf), 1 .json (y.json)"),
            ({"x.parquet": b"", "y.json": b"{}"}, "/*", "it holds 1 .parquet (x.parquet), 1 .json (y.json)"),
            ({"x.pdf": b""}, "/x.pdf", "x.pdf: is not an input. Name tars, zip archives, a folder"),
            ({"a.heic": b"", "b.heic": b""}, "", "it holds 2 .heic (a.heic, ...)"),
            ({".hidden.jpg": b""}, "", "it holds 1 hidden (.hidden.jpg)"),
        ],
    )
    def test_what_holds_nothing_usable_says_what_it_holds(
        self, tmp_path: Path, files: dict[str, bytes], pattern: str, message: str
    ) -> None:
        folder = write(tmp_path / "in", files)
        with pytest.raises(NoShardsError) as error:
            list_shards([f"{folder}{pattern}"])
        assert message in str(error.value)

    def test_a_subfolder_that_cannot_be_listed_ends_the_job(self, photos: Path) -> None:
        (photos / "2024").chmod(0)
        try:
            with permissions_checked(), pytest.raises(PermissionError):
                list_shards([str(photos)])
        finally:
            (photos / "2024").chmod(0o755)


class TestJobs:
    def run(self, source: Path | str, tmp_path: Path, clip: Path, **options: Any) -> RunReport:
        return embed(
            EmbedOptions(
                input=(str(source),),
                output=str(tmp_path / "out"),
                models=(ModelRef(model=str(clip)),),
                device="cpu",
                max_failure_rate=1.0,
                **options,
            )
        )

    def test_a_folder_is_embedded_resumed_and_extended(
        self, photos: Path, tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(units_module, "MAX_UNIT_SAMPLES", 2)
        (photos / "2024" / "bad.jpg").write_bytes(b"not a picture")
        report = self.run(photos, tmp_path, clip)
        assert is_conserved(report)
        rows = read_rows(tmp_path / "out")
        assert {(row["key"], row["offset"]) for row in rows} == {("2024/c", 1), ("2024/may/b", 2), ("a", 3)}
        [failure] = read_failures(tmp_path / "out")
        assert (failure["key"], failure["shard"], failure["offset"]) == ("2024/bad", str(photos), 0)
        assert self.run(photos, tmp_path, clip).units_kept == 2
        shutil.copy(photos / "a.JPG", photos / "0.jpg")  # sorts first, but is planned last
        report = self.run(photos, tmp_path, clip)
        assert (report.units_kept, report.units_written) == (2, 1)
        rows = read_rows(tmp_path / "out")
        assert {row["offset"] for row in rows if row["key"] == "0"} == {4}
        os.utime(photos / "a.txt", (1, 1))  # the same bytes
        assert self.run(photos, tmp_path, clip).units_kept == 3
        (photos / "a.txt").write_text("changed")
        with pytest.raises(RunMismatchError, match=r"1 of 1 shards has changed:\n  .*photos: a\.txt\nRestore"):
            self.run(photos, tmp_path, clip)

    def test_a_limit(self, photos: Path, tmp_path: Path, clip: Path) -> None:
        assert self.run(photos, tmp_path, clip, limit=2).tally.rows == 2

    def test_an_archive_is_embedded_in_parts_and_resumed(
        self, tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        members = [(f"{number}.jpg", JPEG if number else b"not a picture") for number in range(5)]
        path = zipped(tmp_path / "x.zip", [*members, ("3.txt", b"three")])
        monkeypatch.setattr(execute.plan, "__defaults__", (2 * len(JPEG),))
        report = self.run(path, tmp_path, clip)
        assert report.units_written > 1
        assert is_conserved(report)
        assert sorted(row["key"] for row in read_rows(tmp_path / "out")) == ["1", "2", "3", "4"]
        assert [failure["key"] for failure in read_failures(tmp_path / "out")] == ["0"]
        assert self.run(path, tmp_path, clip).units_kept == report.units_written

    def test_inspect_describes_a_folder(self, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
        logging.getLogger("mmbeam").setLevel(logging.ERROR)
        assert main(["inspect", str(photos)]) == 0
        output = capsys.readouterr().out
        assert "keys: 2024/c, 2024/may/b, a" in output
        assert "modalities: image, text" in output


HEAD = b"PK\x01\x02\x14\x03\x14\0"  # of an entry of the directory, before its flags


def zipped(path: Path, members: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        warnings.simplefilter("ignore")  # of duplicate names
        for name, data in members:
            archive.writestr(name, data)
    return path


def patched(path: Path, old: bytes, new: bytes) -> Path:
    """Replace bytes of an archive, in its headers and its directory."""
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


def directory_of(path: Path) -> int:
    with zipfile.ZipFile(path) as archive:
        return archive.start_dir


class TestZips:
    MEMBERS = (("a.JPG", JPEG), ("sub/b.png", PNG), ("a.txt", b"a cat"), ("sub/", b""), ("README.md", b"# mine"))

    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_members_of_a_key_are_a_sample_wherever_they_are(self, tmp_path: Path, method: int) -> None:
        path = zipped(tmp_path / "x.ZIP", self.MEMBERS, method)
        [unit] = plan(path)
        batches = list(read_batches(unit, Reading(), NEEDS, Windows()))
        samples = [s for batch in batches for s in batch.samples]
        assert [(s.key, s.text, s.image is not None) for s in samples] == [("a", "a cat", True), ("sub/b", None, True)]
        with zipfile.ZipFile(path) as archive:
            assert [s.offset for s in samples] == [archive.getinfo(n).header_offset for n in ("a.JPG", "sub/b.png")]
        assert batches[-1].tally.members == {"directory": 1, ".md": 1}

    @pytest.mark.parametrize("part_bytes", [300, 1000, 5000])
    def test_the_parts_of_an_archive_hold_each_sample_once(self, tmp_path: Path, part_bytes: int) -> None:
        names = [f"{number:02}" for number in range(12)]
        members = [(f"{name}.jpg", JPEG) for name in names] + [(f"{name}.txt", name.encode()) for name in names]
        path = zipped(tmp_path / "x.zip", members)
        [whole] = plan(path)
        parts = plan_units(list_shards([str(path)]), [], part_bytes)
        assert len(parts) > 1
        expected, _ = read([whole])
        samples, failures = read(parts)
        assert [(s.key, s.text, s.offset) for s in samples] == [(s.key, s.text, s.offset) for s in expected]
        assert (len(samples), failures) == (12, [])

    @pytest.mark.parametrize(
        ("members", "keys"),
        [
            ([("/etc/x.jpg", JPEG), ("../../up.jpg", JPEG)], ["/etc/x", "../../up"]),
            ([("a.jpg", JPEG), ("a.jpg", JPEG)], ["a", "a"]),
            ([("a.jpg", JPEG), ("b.jpg", JPEG), ("A.jpg", JPEG)], ["a", "b", "A"]),
            ([("é/日本.jpg", JPEG)], ["é/日本"]),
            ([("__MACOSX/._a.jpg", JPEG), (".DS_Store", b""), ("b.jpg", JPEG)], ["b"]),
        ],
    )
    def test_names_are_keys_only(self, tmp_path: Path, members: list[tuple[str, bytes]], keys: list[str]) -> None:
        samples, failures = read(plan(zipped(tmp_path / "x.zip", members)))
        assert [s.key for s in samples] == keys
        assert len({s.offset for s in samples}) == len(keys)
        assert failures == []

    @pytest.mark.parametrize(
        ("spoil", "error", "message"),
        [
            (
                lambda path: patched(path, b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0"),
                "DecodeError",
                "encrypted",
            ),
            (
                lambda path: patched(path, HEAD + b"\0\0\0\0", HEAD + b"\0\0\x0e\0"),
                "DecodeError",
                "is compressed by method 14; expected stored (0) or deflated (8)",
            ),
            (lambda path: patched(path, JPEG[200:220], bytes(20)), "DecodeError", "Bad CRC-32"),
            (lambda path: patched(path, b"PK\x03\x04", b"PK\0\0"), "DecodeError", "Bad magic number"),
            (
                lambda path: patched(path, len(JPEG).to_bytes(4, "little"), (1 << 31).to_bytes(4, "little")),
                "LimitError",
                "has 2,147,483,648 bytes",
            ),
        ],
    )
    def test_a_bad_member_costs_its_sample(
        self, tmp_path: Path, spoil: Callable[[Path], Path], error: str, message: str
    ) -> None:
        samples, failures = read(plan(spoil(zipped(tmp_path / "x.zip", [("a.jpg", JPEG)]))))
        assert [s.key for s in samples] == ["a"]
        assert [(f.key, f.modality, f.error) for f in failures] == [("a", "image", error)]
        assert message in failures[0].message

    @pytest.mark.parametrize("content", [b"", b"PK\x05\x06", b"not a zip", b"PK\x05\x06" + b"\xff" * 18])
    def test_what_is_not_an_archive_fails_as_a_whole(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.zip").write_bytes(content)
        [unit] = plan(tmp_path / "x.zip")
        *_, last = read_batches(unit, Reading(), NEEDS, Windows())
        assert f"{tmp_path}/x.zip: not a zip archive" in (last.unit_error or "")

    @pytest.mark.parametrize("cut", [1, 30, 90])
    def test_a_cut_archive_fails_as_a_whole(self, tmp_path: Path, cut: int) -> None:
        path = zipped(tmp_path / "x.zip", self.MEMBERS)
        path.write_bytes(path.read_bytes()[:-cut])
        *_, last = read_batches(plan(path)[0], Reading(), NEEDS, Windows())
        assert "not a zip archive, or its central directory is damaged or cut off" in (last.unit_error or "")

    def test_every_byte_of_the_directory_may_be_wrong(self, tmp_path: Path) -> None:
        """The archive yields samples with failures, or fails as a whole; nothing else is raised."""
        path = zipped(tmp_path / "x.zip", [("a.jpg", b"x" * 50), ("b.txt", b"text")], zipfile.ZIP_DEFLATED)
        content, begin = path.read_bytes(), directory_of(path)
        for position in range(begin, len(content)):
            for value in (0, 0x7F, 0xFF):
                spoilt = content[:position] + bytes([value]) + content[position + 1 :]
                reader = ZipReader(io.BytesIO(spoilt), SOURCE, lambda _: True, Limits(), FieldMap())
                try:
                    samples = list(reader)
                except ShardError:
                    continue
                assert len({s.offset for s in samples}) == len(samples)

    def test_entries_that_share_their_data_are_failures_and_a_bomb_ends_at_the_limit(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = zipped(
            tmp_path / "x.zip", [(f"{number}.txt", bytes(100_000)) for number in range(20)], zipfile.ZIP_DEFLATED
        )
        monkeypatch.setattr(zip_module, "EXPANDED_BYTES", 0)
        size = path.stat().st_size
        _, failures = read(plan(path), Reading(limits=Limits(expansion=1_000_000 / size)))
        assert {(f.error, "as a zip bomb does" in f.message) for f in failures[-10:]} == {("LimitError", True)}
        assert len([f for f in failures if "zip bomb" in f.message]) == 10
        content = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            begin = archive.start_dir
        first = content.index(b"PK\x01\x02", begin + 4)
        content[first + 42 : first + 46] = bytes(4)  # the second entry begins where the first does
        path.write_bytes(content)
        _, failures = read(plan(path))
        assert [f.key for f in failures if "one member for several samples" in f.message] == ["1"]

    def test_single_samples_are_read_again_by_their_offset(self, tmp_path: Path) -> None:
        path = zipped(tmp_path / "x.zip", self.MEMBERS)
        samples, _ = read(plan(path))
        raws = [read_sample(str(path), sample.offset) for sample in samples]
        assert [(raw.key, raw.fields) for raw in raws] == [("a", ("jpg", "txt")), ("sub/b", ("png",))]
        assert raws[1].members["png"] == PNG
        with pytest.raises(ShardError, match="no sample begins at byte 7"):
            read_sample(str(path), 7)

    def test_zip64_and_an_archive_behind_other_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "x.zip"
        with zipfile.ZipFile(path, "w") as archive, archive.open("a.jpg", "w", force_zip64=True) as file:
            file.write(JPEG)
        path.write_bytes(b"#!/bin/sh\nexit\n" + path.read_bytes())
        samples, failures = read(plan(path))
        assert [(s.key, s.offset) for s in samples] == [("a", 15)]
        assert failures == []

    def test_an_archive_of_a_store_is_read_in_place(self, tmp_path: Path) -> None:
        memory = fsspec.filesystem("memory")
        memory.pipe("/zips/x.zip", zipped(tmp_path / "x.zip", self.MEMBERS).read_bytes())
        try:
            samples, _ = read(plan("memory://zips"))
        finally:
            memory.rm("/zips", recursive=True)
        assert [(s.key, s.shard) for s in samples] == [("a", "memory://zips/x.zip"), ("sub/b", "memory://zips/x.zip")]
