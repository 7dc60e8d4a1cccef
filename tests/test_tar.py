"""Tars to samples: as webdataset groups them, from every program and format, within limits."""

import gzip
import io
import random
import subprocess
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import webdataset
from tars import FORMATS, by_webdataset, content, corpus, everything, grouped, info, read, write

from mmbeam.config import Limits
from mmbeam.readers.stream import open_shard
from mmbeam.readers.tar import BLOCK, ByteReader, Members, TarReader, split_name
from mmbeam.types import Shard


class TestNames:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("v1.0/a.b.JPG", ("v1.0/a", "b.jpg")),
            ("./a.jpg", ("./a", "jpg")),
            ("/abs/a.jpg", ("/abs/a", "jpg")),
            ("a.", ("a", "")),
            ("a/b.c/d.e.f.G", ("a/b.c/d", "e.f.g")),
            ("a", None),
            ("v1.0/a", None),
            ("._a.jpg", None),
            ("__index__", None),
            ("__meta__/a.jpg", None),
            ("x/__meta__/a.jpg", ("x/__meta__/a", "jpg")),
        ],
    )
    def test_as_webdataset(self, name: str, expected: tuple[str, str] | None, tmp_path: Path) -> None:
        assert split_name(name) == expected
        path = tmp_path / "x.tar"
        path.write_bytes(write([(name, b"data")]))
        assert by_webdataset(path) == ([] if expected is None else [(expected[0], {expected[1]: b"data"})])

    @pytest.mark.parametrize("name", ["d/.hidden.jpg", "d/._a.jpg"])
    def test_hidden_in_folders_unlike_webdataset(self, name: str) -> None:
        assert split_name(name) is None
        assert content(read(write([("d/a.jpg", b"1"), (name, b"2"), ("d/a.txt", b"3")]))) == [
            ("d/a", {"jpg": b"1", "txt": b"3"})
        ]


class TestLikeWebdataset:
    def check(self, path: Path, count: int) -> None:
        expected = by_webdataset(path)
        assert len(expected) == count
        with open_shard(Shard(path=str(path), url=str(path))) as stream:
            reader = TarReader(stream, str(path), everything, Limits())
            samples = [sample for sample in reader if "is a hard link" not in str(sample.damages)]
            samples = [sample for sample in samples if "is a symbolic link" not in str(sample.damages)]
        assert content(samples) == expected
        assert not any(sample.damages or sample.truncated or sample.repeated for sample in samples)
        assert not reader.unterminated
        assert not reader.trailing_data

    @pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
    def test_shard_writer(self, tmp_path: Path, suffix: str) -> None:
        with webdataset.ShardWriter(f"{tmp_path}/%03d.{suffix}", maxcount=30, verbose=0) as writer:
            for number in range(50):
                picture = random.Random(number).randbytes(number * 100)
                writer.write(
                    {"__key__": f"{number:04d}", "JPG": picture, "json": {"n": number}, "txt": f"número {number}"}
                )
        self.check(tmp_path / f"000.{suffix}", 30)
        self.check(tmp_path / f"001.{suffix}", 20)

    @pytest.mark.parametrize("format", ["gnu", "oldgnu", "pax", "posix", "ustar", "v7"])
    @pytest.mark.parametrize("packing", ["", "--gzip"])
    def test_tar_program(self, tmp_path: Path, format: str, packing: str) -> None:
        folder = tmp_path / "in" / "v1.0" / "sub.folder"
        folder.mkdir(parents=True)
        for number in range(20):
            for field in ("jpg", "txt", "json"):
                (folder / f"{number:03d}.{field}").write_bytes(random.Random(number).randbytes(number * 99))
        (folder / "README").write_text("no sample")
        (folder / "zlink.jpg").symlink_to("000.jpg")
        (folder / "zhard.jpg").hardlink_to(folder / "000.jpg")
        archive = tmp_path / "x.tar"
        options: list[str | Path] = [
            f"--format={format}",
            "--sort=name",
            "-C",
            tmp_path / "in",
            "-cf",
            archive,
            *([packing] if packing else []),
        ]
        subprocess.run(["tar", *options, "v1.0"], check=True)
        self.check(archive, 20)

    @pytest.mark.parametrize("format", ["gnu", "pax"])
    def test_long_and_unicode_names(self, tmp_path: Path, format: str) -> None:
        folder = tmp_path / "in" / ("long folder " * 15) / ("ä" * 100) / "dots.in.here"
        folder.mkdir(parents=True)
        stems = ["x" * 90, "y" * 200, "Привет", "写真 1", "emoji 🐈", "e\u0301", "new\nline", "spaces  "]
        for stem in stems:
            for field in ("jpg", "txt"):
                (folder / f"{stem}.{field}").write_text(f"{stem} {field}")
        archive = tmp_path / "x.tar"
        options: list[str | Path] = [f"--format={format}", "--sort=name", "-C", tmp_path / "in", "-cf", archive, "."]
        subprocess.run(["tar", *options], check=True)
        self.check(archive, len(stems))

    def test_img2dataset_layout(self, tmp_path: Path) -> None:
        path = tmp_path / "00000.tar"
        writer = webdataset.TarWriter(str(path))
        for number in range(10):
            key = f"{number:09d}"
            writer.write({"__key__": key, "jpg": b"\xff\xd8" * number, "txt": "a caption", "json": {"key": key}})
        writer.close()
        self.check(path, 10)


class TestGrouping:
    def test_same_key_later_is_another_sample(self) -> None:
        samples = read(write([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3")]))
        assert [(s.key, s.fields, s.repeated) for s in samples] == [
            ("a", ("jpg",), False),
            ("b", ("jpg",), False),
            ("a", ("txt",), True),
        ]
        assert len({sample.offset for sample in samples}) == 3

    def test_same_field_twice_begins_another_sample(self) -> None:
        samples = read(write([("a.jpg", b"1"), ("a.JPG", b"2"), ("a.txt", b"3")]))
        assert content(samples) == [("a", {"jpg": b"1"}), ("a", {"jpg": b"2", "txt": b"3"})]
        assert [sample.repeated for sample in samples] == [False, True]

    def test_only_what_is_wanted_is_read(self) -> None:
        data = write([("a.mp4", b"m" * 3_000_000), ("a.txt", b"text"), ("a.jpg", b"picture")])
        [sample] = read(data, lambda field: field == "txt")
        assert sample.members == {"txt": b"text"}
        assert sample.fields == ("mp4", "txt", "jpg")

    @pytest.mark.parametrize("format", ["gnu", "pax"])
    def test_offset_is_that_of_the_first_header(self, format: str) -> None:
        """A reader that begins at the offset of a sample returns that sample first."""
        data = write([("a.jpg", b"1" * 700), ("ü" * 120 + ".jpg", b"2"), ("ü" * 120 + ".txt", b"3")], format)
        samples = read(data)
        assert [sample.offset for sample in samples] == [0, 512 + 1024]
        for number, sample in enumerate(samples):
            assert content(read(data[sample.offset :])) == content(samples[number:])

    def test_links_are_damages_and_what_belongs_to_no_sample_is_counted(self) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.addfile(info("a.jpg", b"1"), io.BytesIO(b"1"))
            for kind in (tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE):
                tar.addfile(info("a.txt", type=kind))
            tar.addfile(info("a.png", b"2", type=b"Z"), io.BytesIO(b"2"))  # an unknown type
            tar.addfile(info("a.json", b"3", type=tarfile.CONTTYPE), io.BytesIO(b"3"))
            tar.addfile(info("a.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"))
            tar.addfile(info("a.cls", type=tarfile.LNKTYPE, linkname="b.cls"))  # not wanted
            for name in ("README", "folder/.hidden", "__meta__/a.jpg", "._a.jpg"):
                tar.addfile(info(name))
            tar.addfile(info("b.jpg", type=tarfile.LNKTYPE, linkname="a.jpg"))
        reader = TarReader(io.BytesIO(buffer.getvalue()), "x.tar", lambda field: field != "cls", Limits())
        first, second = reader
        assert content([first, second]) == [("a", {"jpg": b"1", "json": b"3"}), ("b", {})]
        assert (first.fields, second.fields) == (("jpg", "json", "txt"), ("jpg",))
        [link], [hard] = first.damages, second.damages
        assert (link.field, link.error, hard.field) == ("txt", "DecodeError", "jpg")
        assert "a.txt at byte 5,120: is a symbolic link to '/etc/passwd'" in link.message
        assert "is a hard link to 'a.jpg'" in hard.message
        assert reader.members == {
            "directory": 1,
            "device": 3,
            "type 'Z'": 1,
            "hard link": 1,
            "file without an extension": 1,
            "hidden or reserved file": 3,
        }

    def test_sparse_member_is_damage(self, tmp_path: Path) -> None:
        with (tmp_path / "a.wav").open("wb") as file:
            for begin in range(0, 4_000_000, 100_000):
                file.seek(begin)
                file.write(b"sound" * 1000)
        (tmp_path / "b.txt").write_text("after")
        for format in ("gnu", "pax"):
            options = ["--sparse", f"--format={format}", "--sort=name", "-C", tmp_path, "-cf", tmp_path / "x.tar"]
            subprocess.run(["tar", *options, "a.wav", "b.txt"], check=True)
            first, second = read((tmp_path / "x.tar").read_bytes())
            assert (first.key, first.fields, dict(first.members)) == ("a", ("wav",), {})
            assert (first.damages[0].field, first.damages[0].error) == ("wav", "DecodeError")
            assert "stored as a sparse file" in first.damages[0].message
            assert content([second]) == [("b", {"txt": b"after"})]

    def test_names_that_are_not_utf8(self) -> None:
        [sample] = read(write([("caf\udce9.jpg", b"1")], "gnu"))
        assert sample.key == "caf\\xe9"
        [sample] = read(write([("caf\udce9" * 50 + ".jpg", b"1")], "pax"))
        assert sample.key == "caf\\xe9" * 50

    def test_global_pax_header(self) -> None:
        buffer = io.BytesIO()
        with tarfile.open(
            fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "by git"}
        ) as tar:
            tar.addfile(info("a.jpg", b"1"), io.BytesIO(b"1"))
        [sample] = read(buffer.getvalue())
        assert (sample.key, sample.offset) == ("a", 1024)

    def test_size_beyond_8_gib_in_pax_and_base_256(self) -> None:
        size = 9 << 30
        for format in ("pax", "gnu"):
            header = info("a.bin", size=size).tobuf(FORMATS[format])
            source = ByteReader(io.BytesIO(header))
            member = next(iter(Members(source, source.read(BLOCK))))
            assert (member.name, member.size) == ("a.bin", size)  # type: ignore[union-attr]

    def test_stream_that_cannot_seek(self) -> None:
        class Pipe(io.BytesIO):
            def seekable(self) -> bool:
                return False

            def read(self, size: int | None = -1) -> bytes:
                return super().read(min(size or 0, 777))  # as pipes do

            def seek(self, *where: int) -> int:
                raise io.UnsupportedOperation

        pairs = corpus()
        samples = list(TarReader(Pipe(write(pairs)), "x", lambda field: field != "jpg", Limits()))
        assert content(samples) == [(k, {f: d for f, d in m.items() if f != "jpg"}) for k, m in grouped(pairs)]


class TestLimits:
    def test_member(self) -> None:
        [sample] = read(write([("a.jpg", b"1" * 1001), ("a.txt", b"2" * 1000)]), member_bytes=1000)
        assert sample.members == {"txt": b"2" * 1000}
        assert sample.fields == ("jpg", "txt")
        [damage] = sample.damages
        assert (damage.field, damage.offset, damage.error) == ("jpg", 0, "LimitError")
        assert damage.message == ("member a.jpg at byte 0: has 1,001 bytes; 1,000 are allowed (--max-member-bytes)")
        assert not sample.truncated

    def test_unwanted_member_may_be_large(self) -> None:
        [sample] = read(write([("a.jpg", b"1" * 1001), ("a.txt", b"2")]), lambda f: f == "txt", member_bytes=1000)
        assert sample.damages == ()

    def test_sample(self) -> None:
        [sample] = read(write([(f"a.{n}.jpg", b"1" * 1000) for n in range(50)]), member_bytes=1000)
        assert 2 <= len(sample.members) <= 4
        assert len(sample.members) + len(sample.damages) == len(sample.fields) == 50
        assert {damage.error for damage in sample.damages} == {"LimitError"}

    def test_endless_fields_of_one_key(self) -> None:
        members = (info(f"a.{number}").tobuf(tarfile.USTAR_FORMAT) for number in range(20_000))
        [sample] = read(b"".join(members), member_bytes=1)
        assert len(sample.fields) < 9_000
        assert len(sample.damages) <= 100

    @pytest.mark.parametrize("kind", [b"x", b"L", b"g"])
    def test_extension_header(self, kind: bytes) -> None:
        """The name of its member is unknown: it is a damaged sample by the name in its own header, or a failure."""
        size = 2 << 20
        data = (
            write([("a.jpg", b"1")], end=False)
            + info("ext", size=size, type=kind).tobuf(tarfile.USTAR_FORMAT)
            + b"z" * size
            + write([("lost.jpg", b"2"), ("c.jpg", b"3")])
        )
        samples = read(data)
        assert content(samples) == [("a", {"jpg": b"1"}), ("lost", {}), ("c", {"jpg": b"3"})]
        assert "an extended header of 2,097,152 bytes; 1,048,576 are allowed" in samples[1].damages[0].message

    def test_expansion(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mmbeam.readers.decompress.EXPANSION_FREE", 1_000_000)
        data = gzip.compress(write([("a.jpg", b"1"), ("b.jpg", b"\0" * 30_000_000), ("c.jpg", b"3")]))
        samples = read(data, expansion=2.0)
        assert [(sample.key, sample.truncated) for sample in samples] == [("a", False), ("b", True)]
        assert samples[1].damages[0].error == "LimitError"

    def test_memory_does_not_depend_on_the_tar(self) -> None:
        class Endless(io.RawIOBase):
            """The same 3 MB of samples, repeated to 300 MB."""

            def __init__(self) -> None:
                self.blocks = 100
                self.data = write([(f"{n}.jpg", bytes(100_000)) for n in range(30)], end=False)

            def readable(self) -> bool:
                return True

            def read(self, size: int = -1) -> bytes:
                raise NotImplementedError

            def readinto(self, buffer: Any) -> int:
                if not self.blocks:
                    return 0
                self.blocks -= 1
                buffer[: len(self.data)] = self.data
                return len(self.data)

        stream = io.BufferedReader(Endless(), 4_000_000)
        tracemalloc.start()
        try:
            assert sum(len(s.members["jpg"]) for s in TarReader(stream, "x", everything, Limits())) == 300_000_000
            assert tracemalloc.get_traced_memory()[1] < 3_000_000
        finally:
            tracemalloc.stop()
