"""Patterns to shards: spellings, listings, names."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from servers import FileServer

from mmbeam.errors import NoShardsError, UsageError, redact
from mmbeam.readers import listing as shards_module
from mmbeam.readers.listing import expand, list_shards
from mmbeam.readers.paths import origin, plain_url, public_path
from mmbeam.readers.stream import open_shard
from mmbeam.types import Shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        (tmp_path / f"data-{number:02d}.tar").write_bytes(b"x" * (number + 1))
    (tmp_path / "more.tar.gz").write_bytes(b"gz")
    (tmp_path / "notes.md").write_bytes(b"no shard")
    return tmp_path


@pytest.fixture(scope="module")
def web() -> Iterator[FileServer]:
    with FileServer() as server:
        yield server


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    for name in ("a", "b", "c"):
        fs.pipe(f"/corpus/{name}.tar", name.encode() * 10)
    yield fs
    fs.store.clear()


def names(shards: list[Shard]) -> list[str]:
    return [shard.path.rpartition("/")[2] for shard in shards]


def urls(patterns: list[str]) -> list[str]:
    return [entry.url for entry in expand(patterns)]


class TestExpand:
    def test_braces_joins_and_duplicates(self) -> None:
        assert urls(["d-{08..11}.tar::x.tar", "x.tar", "e-{a,b}.tar"]) == [
            *(f"d-{number}.tar" for number in ("08", "09", "10", "11")),
            "x.tar",
            "e-a.tar",
            "e-b.tar",
        ]

    def test_list_file(self, tmp_path: Path) -> None:
        (tmp_path / "train.txt").write_text(
            "\ufeff# shards\n\na-{0..1}.tar\n./b.tar\n gs://bucket/c#1.tar \n/abs/d.tar\n"
        )
        expected = [f"{tmp_path}/{name}.tar" for name in ("a-0", "a-1", "b")] + ["gs://bucket/c#1.tar", "/abs/d.tar"]
        assert urls([f"{tmp_path}/train.txt"]) == urls([f"@{tmp_path}/train.txt"]) == expected

    def test_list_of_any_name_on_any_store(self, memory: MemoryFileSystem) -> None:
        memory.pipe("/corpus/index", b"a.tar\nb.tar\n")
        assert urls(["@memory://corpus/index"]) == ["memory://corpus/a.tar", "memory://corpus/b.tar"]

    @pytest.mark.parametrize("pattern", ["pipe:cat x.tar", "x.tar::pipe:cat y", "curl http://h/x.tar |", "| cat"])
    def test_a_pattern_never_runs_a_command(self, pattern: str) -> None:
        with pytest.raises(UsageError, match="runs a command"):
            expand([pattern])

    def test_a_list_never_runs_a_command(self, tmp_path: Path) -> None:
        (tmp_path / "l.txt").write_text("pipe:touch /tmp/x\n")
        with pytest.raises(UsageError, match="runs a command"):
            expand([f"{tmp_path}/l.txt"])

    def test_invalid_patterns(self, tmp_path: Path) -> None:
        (tmp_path / "nested.txt").write_text("other.txt\n")
        (tmp_path / "binary.list").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UsageError, match="unbalanced braces"):
            expand(["data-{0..9.tar"])
        with pytest.raises(UsageError, match="a list cannot contain another list"):
            expand([f"{tmp_path}/nested.txt"])
        with pytest.raises(UsageError, match=r"absent.txt: cannot be read as a list of shards \(FileNotFoundError\)"):
            expand([f"{tmp_path}/absent.txt"])
        with pytest.raises(UsageError, match="cannot be read as a list"):
            expand([f"{tmp_path}/binary.list"])

    @pytest.mark.parametrize("content", ["<!DOCTYPE html>\n<b>S3CRET</b>", "S3CRET\0", "S3CRET" * 10_000])
    def test_what_is_not_a_list_is_not_quoted(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "l.txt").write_text(content)
        with pytest.raises(UsageError, match=r"l.txt.*expected") as error:
            expand([f"{tmp_path}/l.txt"])
        assert "S3CRET" not in str(error.value)

    @pytest.mark.parametrize("pattern", ["x-{0..99999999999}.tar", "{0..9999}{-9999..0}{1..9}.tar"])
    def test_a_range_of_too_many_paths_is_not_made(self, pattern: str) -> None:
        with pytest.raises(UsageError, match=r"more than 5,000,000 paths"):
            expand([pattern])

    def test_braces_in_braces_without_end(self) -> None:
        with pytest.raises(UsageError, match="unbalanced braces"):
            expand(["{" * 10_000])


FETCHED = "http://127.0.0.1:{port}/lists/train.txt"
FOREIGN = [
    "/etc/passwd",
    "//other.example/x.tar",
    "~/x.tar",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "local:///etc/passwd",
    "http://other.example/x.tar",
    "http://127.0.0.1/x.tar",
    "http://127.0.0.1:{port}@other.example/x.tar",
    "http://other.example\\\\@127.0.0.1:{port}/x.tar",
    "http://other.example#@127.0.0.1:{port}/x.tar",
    "http://other.example?@127.0.0.1:{port}/x.tar",
    "http:///etc/passwd",
    "https://127.0.0.1:{port}/x.tar",
    "ftp://127.0.0.1:{port}/x.tar",
    "s3://bucket/x.tar",
    "memory://x.tar",
    "github://org:name@main/x.tar",
    "reference://x",
    "zip://x.tar::http://127.0.0.1:{port}/x.zip",
    "simplecache::file:///etc/passwd",
    "simplecache::http://other.example/x.tar",
    "blockcache::/etc/passwd",
    "x.tar::/etc/passwd",
    "http://{{127.0.0.1:{port},other.example}}/x.tar",
    "{{/etc,x}}/y.tar",
    "http://[::1/x.tar",
    "http://*/x.tar",
]


REFUSED = r"train.txt, line 3: expected a shard on the list's own server or bucket .*`allow_local_paths`"


class TestFetchedLists:
    """A list of a server or a bucket may name only what is there, because its author is not the user."""

    @pytest.mark.parametrize("line", FOREIGN)
    @pytest.mark.parametrize("list_url", [FETCHED, "memory://lists/train.txt"])
    def test_other_places_are_refused(
        self, line: str, list_url: str, web: FileServer, memory: MemoryFileSystem
    ) -> None:
        line = line.format(port=web.port)
        if list_url.startswith("memory") and line.startswith("memory"):
            return  # its own place
        content = f"# shards\nx.tar\n{line}\n".encode()
        web.files["/lists/train.txt"] = content
        memory.pipe("/lists/train.txt", content)
        url = list_url.format(port=web.port)
        with pytest.raises(UsageError, match=REFUSED):
            expand([url])
        with pytest.raises(UsageError, match=REFUSED):
            list_shards([url])
        if "[::1" not in line:
            assert len(expand([url], allow_local_paths=True)) >= 2

    @pytest.mark.parametrize("line", ["@/etc/passwd", "/etc/x.txt", "other.list", "@http://other.example/x"])
    def test_nested_lists_are_not_read(self, line: str, web: FileServer) -> None:
        web.files["/lists/train.txt"] = line.encode()
        with pytest.raises(UsageError, match="a list cannot contain another list"):
            expand([web.url("lists/train.txt")])

    def test_its_own_place_is_allowed(self, web: FileServer) -> None:
        lines = ["a.tar", "./b.tar?sig=1", "sub/{c,d}.tar", web.url("e.tar"), f"http://u:p@127.0.0.1:{web.port}/f.tar"]
        web.files["/lists/train.txt"] = "\n".join(lines).encode()
        listed = expand([web.url("lists/train.txt?token=x")])
        assert [public_path(entry.url) for entry in listed] == [
            web.url(path)
            for path in ("lists/a.tar", "lists/b.tar", "lists/sub/c.tar", "lists/sub/d.tar", "e.tar", "f.tar")
        ]
        assert not any(entry.may_redirect for entry in listed)
        web.files["/lists/a.tar"] = b"x"
        assert not any(shard.may_redirect for shard in list_shards([web.url("lists/train.txt")]))
        assert all(entry.may_redirect for entry in expand([web.url("lists/train.txt")], allow_local_paths=True))

    def test_the_same_origin(self) -> None:
        same = [
            ("http://h/x", "http://user:pw@H:80/y?z"),
            ("https://h/x", "https://h:443/y"),
            ("s3://b/x", "s3a://b/y#1?2"),
            ("gs://b/x", "gcs://b/y"),
            ("hf://datasets/o/n/x", "hf://datasets/o/n/y/z"),
            ("github://o:n@main/x", "github://o:n@main/y"),
            ("/a", "file:///b"),
        ]
        other = [
            ("http://h/x", "http://h:8080/x"),
            ("http://h/x", "https://h/x"),
            ("http://h/x", "http://h.evil/x"),
            ("s3://b/x", "s3://b2/x"),
            ("s3://b/x", "s3://B/x"),
            ("s3://b/x", "gs://b/x"),
            ("abfs://c@a.host/x", "abfs://d@a.host/x"),
            ("hf://datasets/o/n/x", "hf://datasets/o/m/x"),
            ("github://o:n@main/x", "github://o:m@main/x"),
        ]
        assert [(a, b) for a, b in same if origin(a) != origin(b)] == []
        assert [(a, b) for a, b in other if origin(a) == origin(b)] == []

    def test_links_of_a_listed_web_folder_stay_below_it(self, web: FileServer) -> None:
        links = ["a.tar", "/etc/b.tar", "file:///etc/c.tar", "http://other.example/d.tar", "../../e.tar"]
        web.files["/in/"] = "".join(f'<a href="{link}">x</a>' for link in links).encode()
        assert {origin(shard.url) for shard in list_shards([web.url("in/")])} == {("http", f"127.0.0.1:{web.port}")}


class TestPublicPath:
    @pytest.mark.parametrize(
        ("url", "path"),
        [
            ("https://user:secret@host:81/a/b.tar?sig=abc&x=/y#part", "https://host:81/a/b.tar"),
            ("s3://bucket/a.tar", "s3://bucket/a.tar"),
            ("s3://bucket/token=abc/secret=1/a.tar", "s3://bucket/token=abc/secret=1/a.tar"),
            ("gs://bucket/a.tar?sig=abc&n=1", "gs://bucket/a.tar?sig=...&n=1"),
            ("s3://KEY:SEC/RET@bucket/a.tar", "s3://bucket/a.tar"),
            ("https://user:pass word@host/a b.tar?sig=abc", "https://host/a b.tar"),
            ("s3a://bucket/a.tar", "s3://bucket/a.tar"),
            ("gcs://bucket/a@b.tar", "gs://bucket/a@b.tar"),
            ("gs://bucket/a#1?x=%20.tar", "gs://bucket/a#1?x=%20.tar"),
            ("s3://user:secret@bucket/a?versionId=1", "s3://bucket/a?versionId=1"),
            ("HTTPS://host?key=1", "https://host"),
            ("memory:///a.tar", "memory://a.tar"),
            ("memory://a.tar", "memory://a.tar"),
            ("file:///a/b?c#d.tar", "/a/b?c#d.tar"),
            ("/a/../b//c.tar", "/b/c.tar"),
        ],
    )
    def test_examples(self, url: str, path: str) -> None:
        assert public_path(url) == path
        assert public_path(path) == path

    def test_relative_is_absolute(self) -> None:
        assert public_path("x/a.tar") == f"{os.getcwd()}/x/a.tar"  # noqa: PTH109

    secret = st.text("abcXYZ0123456789-._~%", min_size=6, max_size=20).map(lambda text: f"S3CRET{text}")

    @given(secret, secret, secret)
    def test_no_secret_is_left(self, user: str, password: str, query: str) -> None:
        url = f"https://{user}:{password}@host/path/x.tar?token={query}#{query}"
        assert "S3CRET" not in public_path(url)
        assert "S3CRET" not in redact(f"404, message='Not Found', url='{url}' (<{url}>)")
        assert plain_url(url) == url
        assert url not in repr(Shard(path=public_path(url), url=url))


class TestRedact:
    """Credentials never reach a message, whatever form a client gives them."""

    SECRETS = (
        "http://user:S3CRET@host/x.tar?X-Amz-Signature=S3CRET&y: does not exist",
        "https://user:S3 CRET@host/x",
        "https://S3CRET@host/x",
        "https://u:p@S3CRET@host/x",
        "s3://S3CRET:S3/CRET@bucket/x.tar",
        "Invalid bucket name 'S3CRET:S3/CRET@bucket'",
        "abfs://container:S3CRET@account.host/x?sv=1&sig=S3CRET",
        "gs://bucket/x?access_token=S3CRET",
        "s3://bucket/x?X-Amz-Security-Token=S3CRET&X-Amz-Credential=S3CRET",
        "?sig=S3CRET",
        "{'secret': 'S3CRET', \"client_secret\": \"S3CRET\"}",
        "AccountName=x;AccountKey=S3CRET+/=;EndpointSuffix=y",
        "Authorization: Basic S3CRETS3CRET==",
        "headers={'Authorization': 'Bearer S3CRETS3CRET'}",
        "AWS_SECRET_ACCESS_KEY=S3CRET",
        "--s3_secret_access_key=S3CRET",
        "-----BEGIN PRIVATE KEY-----\nS3CRET\n-----END PRIVATE KEY-----",
    )

    @pytest.mark.parametrize("text", SECRETS)
    def test_secrets_are_removed(self, text: str) -> None:
        for shown in (redact(text), str(UsageError(text)), redact(repr(text))):
            assert "S3CRET" not in shown
            assert "CRET@" not in shown
        assert redact(redact(text)) == redact(text)

    PLAIN = (
        "https://host:81/a@b.tar: expected a tar header at byte 3, found x@y",
        "gs://bucket/a@b#1?x=2.tar",
        "abfs://container@account.host/x",
        "github://org:name@main/x.tar",
        "`batch_size` 3: expected 4; max_tokens=5, pad_token=0, key=000003, `token`",
        "openai/clip@main: clip=openai/clip at 12:30",
        "{'key': '000003', 'shard': 'x'}",
        "memory://a:b/c.tar, line 3: x: y@z",
    )

    @pytest.mark.parametrize("text", PLAIN)
    def test_the_rest_stays(self, text: str) -> None:
        assert redact(text) == text

    def test_values_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FSSPEC_S3", '{"client_kwargs": {"aws_secret_access_key": "aaaabbbb"}}')
        monkeypatch.setenv("FSSPEC_ABFS_ACCOUNT_KEY", "ccccdddd")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/etc/key.json")
        assert redact("x aaaabbbb y ccccdddd z /etc/key.json") == "x ... y ... z /etc/key.json"


class TestListShards:
    def test_glob_folder_and_paths_agree(self, folder: Path) -> None:
        by_glob = list_shards([f"{folder}/data-*.tar"])
        assert names(by_glob) == ["data-00.tar", "data-01.tar", "data-02.tar"]
        assert [shard.size for shard in by_glob] == [1, 2, 3]
        assert len({shard.etag for shard in by_glob} - {None}) == 3
        assert list_shards([f"{folder}/data-{{00..02}}.tar"]) == by_glob
        assert list_shards([f"file://{folder}/data-0?.tar"]) == by_glob
        assert names(list_shards([str(folder)])) == ["data-00.tar", "data-01.tar", "data-02.tar", "more.tar.gz"]
        assert list_shards([f"{folder}/"]) == list_shards([str(folder)])

    def test_relative_paths(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)
        assert list_shards(["data-00.tar", "./data-0*.tar"]) == list_shards([f"{folder}/data-*.tar"])

    def test_etag_changes_with_the_content(self, folder: Path) -> None:
        before = list_shards([f"{folder}/data-00.tar"])
        (folder / "data-00.tar").write_bytes(b"other")
        assert list_shards([f"{folder}/data-00.tar"])[0].etag != before[0].etag

    def test_link_is_dated_as_its_file(self, folder: Path) -> None:
        (folder / "links").mkdir()
        link = folder / "links" / "x.tar"
        link.symlink_to(folder / "data-02.tar")
        os.utime(link, ns=(5, 5), follow_symlinks=False)
        [listed] = list_shards([f"{folder}/links/*.tar"])
        assert [listed] == list_shards([str(link)])
        assert listed.size == 3

    def test_memory(self, memory: MemoryFileSystem) -> None:
        listed = list_shards(["memory://corpus/*.tar"])
        assert [shard.path for shard in listed] == [f"memory://corpus/{name}.tar" for name in "abc"]
        assert [shard.url for shard in listed] == [shard.path for shard in listed]
        assert [shard.size for shard in listed] == [10, 10, 10]
        assert list_shards(["memory:///corpus/{a,b,c}.tar"]) == listed
        assert list_shards(["memory://corpus"]) == listed

    @pytest.mark.parametrize("count", [2, 40])  # below and above what is worth a listing
    def test_absent_path_is_a_shard(self, folder: Path, count: int) -> None:
        listed = list_shards([f"{folder}/data-{{00..{count}}}.tar"])
        assert len(listed) == count + 1
        assert [shard.size for shard in listed[:3]] == [1, 2, 3]
        assert all(shard.size is None and shard.etag is None for shard in listed[3:])

    def test_nothing_at_all(self, folder: Path) -> None:
        with pytest.raises(NoShardsError) as error:
            list_shards([f"{folder}/x-*.tar", f"{folder}/none/*.tar", f"{folder}/absent.tar"])
        assert f"{folder}/x-*.tar: no match in {folder}, which exists" in str(error.value)
        assert f"{folder}/none/*.tar: no match in {folder}/none, which does not exist" in str(error.value)
        assert f"{folder}/absent.tar: does not exist" in str(error.value)
        with pytest.raises(NoShardsError, match="no pattern was given"):
            list_shards([])
        (folder / "empty").mkdir()
        with pytest.raises(NoShardsError, match=re.escape("holds no *.tar, *.tar.gz, *.tgz, *.tar.zst, *.zip")):
            list_shards([f"{folder}/empty"])

    @pytest.mark.parametrize("unmatched", ["x-*.tar", "typo/*.tar", "empty", "[ab].tar"])
    def test_a_pattern_without_a_match_beside_others_is_a_warning(
        self, folder: Path, unmatched: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        (folder / "empty").mkdir()
        assert names(list_shards([f"{folder}/{unmatched}", f"{folder}/data-00.tar"])) == ["data-00.tar"]
        [record] = caplog.records
        assert f"{folder}/{unmatched}: " in record.getMessage()

    @pytest.mark.parametrize("unmatched", ["x-*.tar", "typo/*.tar", "empty", "[ab].tar", "absent.tar"])
    def test_strictly_it_is_an_error(self, folder: Path, unmatched: str) -> None:
        (folder / "empty").mkdir()
        patterns = [f"{folder}/{unmatched}", f"{folder}/data-00.tar"]
        with pytest.raises(NoShardsError, match=r"1 of 2 patterns match nothing:\n  .*" + re.escape(unmatched)):
            list_shards(patterns, strict=True)
        assert names(list_shards(patterns[1:], strict=True)) == ["data-00.tar"]

    SPECIAL = (
        *("data[1].tar", "da?a1.tar", "data*.tar", "a{1,2}.tar", "{a.tar", "a::b.tar", "::11.tar", "x::", "a\\b.tar"),
        *("pipe:x.tar", "|x.tar", "x.tar|", "file:x.tar", "http:x.tar", "data:x.tar", "s3:x", "%41.tar", "#x.tar"),
        *("a b.tar", "-x.tar", "~x.tar", "a'b\".tar", "$HOME.tar", "\u202ex.tar", "a,b.tar", "a=b.tar"),
    )

    @pytest.mark.parametrize("name", SPECIAL)
    def test_any_file_of_a_folder_is_opened(self, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        name = name if name.endswith(".tar") else f"{name}.tar"
        (tmp_path / name).write_bytes(b"x")
        monkeypatch.chdir(tmp_path)
        for pattern in (str(tmp_path), f"{tmp_path}/*.tar", f"{tmp_path}/{name}", name):
            [shard] = list_shards([pattern])
            assert (shard.path, shard.size) == (f"{tmp_path}/{name}", 1)
            with open_shard(shard) as stream:
                assert stream.read() == b"x"

    def test_any_object_of_a_bucket_is_opened(self, memory: MemoryFileSystem) -> None:
        for name in ("::11.tar", "a::b.tar", "a b.tar", "a{1,2}.tar"):
            memory.pipe(f"/special/{name}", b"x")
        listed = list_shards(["memory://special/"])
        assert names(listed) == ["::11.tar", "a b.tar", "a::b.tar", "a{1,2}.tar"]
        for shard in listed:
            with open_shard(shard) as stream:
                assert stream.read() == b"x"

    @pytest.mark.parametrize("name", ["data[1].tar", "da?a1.tar", "data*.tar", "a{1,2}.tar", "{a.tar", "a::b.tar"])
    @pytest.mark.parametrize("way", ["path", "list", "joined", "url"])
    def test_an_existing_path_is_taken_literally(self, tmp_path: Path, name: str, way: str) -> None:
        for other in (name, "data1.tar", "a1.tar", "a2.tar", "a", "b.tar", "z.tar"):
            (tmp_path / other).write_bytes(b"x")
        (tmp_path / "list.txt").write_text(f"{name}\nz.tar\n")
        patterns = {
            "path": [f"{tmp_path}/{name}", f"{tmp_path}/z.tar"],
            "list": [f"{tmp_path}/list.txt"],
            "joined": [f"{tmp_path}/{name}::{tmp_path}/z.tar"] if "::" not in name else [f"{tmp_path}/list.txt"],
            "url": [f"file://{tmp_path}/{name}", f"file://{tmp_path}/z.tar"],
        }[way]
        assert names(list_shards(patterns)) == [name, "z.tar"]

    def test_a_name_of_pattern_characters_in_a_bucket(self, memory: MemoryFileSystem) -> None:
        memory.pipe("/corpus/d[1].tar", b"literal")
        memory.pipe("/corpus/d1.tar", b"other")
        assert names(list_shards(["memory://corpus/d[1].tar"])) == ["d[1].tar"]
        assert names(list_shards(["memory://corpus/d[12].tar"])) == ["d1.tar"]

    @pytest.mark.parametrize("pattern", ["", "*.tar", "{good,dangling}.tar"])
    @pytest.mark.parametrize("target", ["nowhere.tar", "dangling.tar"])  # the latter is a loop
    def test_a_broken_link_is_a_shard_that_fails_later(self, tmp_path: Path, pattern: str, target: str) -> None:
        (tmp_path / "good.tar").write_bytes(b"x")
        (tmp_path / "dangling.tar").symlink_to(target)
        listed = list_shards([f"{tmp_path}/{pattern}"])
        assert {shard.path.rpartition("/")[2]: shard.size for shard in listed} == {"good.tar": 1, "dangling.tar": None}

    def test_links_in_a_listed_folder_have_the_etag_of_their_targets(self, tmp_path: Path) -> None:
        (tmp_path / "links").mkdir()
        for number in range(20):
            (tmp_path / f"{number:02}.tar").write_bytes(b"x" * number)
            (tmp_path / "links" / f"{number:02}.tar").symlink_to(tmp_path / f"{number:02}.tar")
        by_listing = list_shards([f"{tmp_path}/links/{{00..19}}.tar"])
        assert by_listing == list_shards([f"{tmp_path}/links/*.tar"])
        assert [shard.size for shard in by_listing] == list(range(20))

    def test_two_urls_of_one_path(self) -> None:
        with pytest.raises(UsageError, match=r"http://127.0.0.1:9/a.tar: named twice"):
            list_shards(["http://127.0.0.1:9/a.tar?key=1", "http://127.0.0.1:9/a.tar?key=2"])

    def test_unknown_store(self) -> None:
        with pytest.raises(UsageError, match=r"xyz://bucket/a\.tar: Protocol not known: xyz"):
            list_shards(["xyz://user:secret@bucket/a.tar"])

    def test_name_that_is_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / os.fsdecode(b"caf\xe9.tar")).touch()
        with pytest.raises(UsageError, match="is not UTF-8"):
            list_shards([f"{tmp_path}/*.tar"])

    def test_one_listing_and_no_request_for_each(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []
        for name in ("ls", "info"):
            real = getattr(LocalFileSystem, name)

            def counted(fs: Any, path: Any, *args: Any, _name: str = name, _real: Any = real, **options: Any) -> Any:
                if isinstance(path, str):
                    calls.append((_name, path))
                return _real(fs, path, *args, **options)

            monkeypatch.setattr(LocalFileSystem, name, counted)
        list_shards([f"{folder}/data-{{00..99}}.tar"])
        assert [call for call in calls if call[0] == "ls"] == [("ls", str(folder))]
        assert len(calls) <= 3  # ls asks for the folder itself

    def test_web_server_is_asked_a_bounded_number_of_times(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shards_module, "HTTP_PROBES", 3)
        opened: list[str] = []

        def info(place: Any) -> dict[str, Any]:
            opened.append(place.url)
            return {"name": place.url, "size": 7, "type": "file"}

        monkeypatch.setattr(shards_module, "_info", info)
        listed = list_shards(["http://127.0.0.1:9/{0..9}.tar"])
        assert sorted(opened) == [f"http://127.0.0.1:9/{number}.tar" for number in range(3)]
        assert [shard.size for shard in listed] == [7, 7, 7] + [None] * 7
