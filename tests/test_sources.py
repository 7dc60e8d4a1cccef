"""Folders of media files and zip archives as inputs: what is listed, planned, read and resumed."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import shards
from outputs import is_conserved, read_failures, read_rows

from mmbeam.cli import main
from mmbeam.config import FieldMap, Limits, ModelRef, Reading, Windows
from mmbeam.errors import NoShardsError, RunMismatchError, UsageError
from mmbeam.jobs.embed import EmbedOptions, embed
from mmbeam.readers import units as units_module
from mmbeam.readers.listing import list_shards
from mmbeam.readers.units import limited_unit, plan_units, unit_from_json, unit_to_json
from mmbeam.readers.windows import read_batches
from mmbeam.types import Failure, Needs, RunReport, Sample, WorkUnit

NEEDS = Needs(modalities=frozenset({"image", "audio"}))
JPEG = shards.encode_image(shards.natural_image(1, 32, 24))
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
        if error == "PermissionError" and os.geteuid() == 0:
            pytest.skip("root may read every file")
        units = plan(photos)
        change(photos / "a.JPG")
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
            ({"x.parquet": b"", "y.json": b"{}"}, "", "it holds 1 .parquet (x.parquet), 1 .json (y.json)"),
            ({"x.parquet": b"", "y.json": b"{}"}, "/*", "it holds 1 .parquet (x.parquet), 1 .json (y.json)"),
            ({"x.csv": b""}, "/x.csv", "x.csv: is not an input. Name shards, zip archives, or a folder"),
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
        if os.geteuid() == 0:
            pytest.skip("root may read every folder")
        (photos / "2024").chmod(0)
        try:
            with pytest.raises(PermissionError):
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

    def test_workers_and_a_limit(self, photos: Path, tmp_path: Path, clip: Path) -> None:
        assert self.run(photos, tmp_path, clip, limit=2).tally.rows == 2

    def test_inspect_describes_a_folder(self, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
        logging.getLogger("mmbeam").setLevel(logging.ERROR)
        assert main(["inspect", str(photos)]) == 0
        output = capsys.readouterr().out
        assert "keys: 2024/c, 2024/may/b, a" in output
        assert "modalities: image, text" in output
