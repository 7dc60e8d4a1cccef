"""Reading a shard despite faults: a web server that cuts connections, and a store that fails."""

import io
import logging
import re
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from servers import STORES, fresh_output

from mmbeam.config import Limits
from mmbeam.errors import ShardError
from mmbeam.readers import retry as retry_module
from mmbeam.readers import stream as stream_module
from mmbeam.readers.listing import list_shards
from mmbeam.readers.stream import open_shard
from mmbeam.readers.tar import TarReader
from mmbeam.types import Shard

SMALL = b"not much" * 1000
NO_WAIT = (0.0, 0.0, 0.0)
DATA = np.random.default_rng(0).bytes(3_000_000)


@dataclass
class Web:
    """The behaviour of a web server. `requests` holds the requested ranges, as "a-b"."""

    data: bytes = DATA
    ranges: bool = True
    sizes: bool = True
    etag: str | None = '"one"'
    modified: str | None = None
    cut_after: int | None = None  # bytes of a body, at `cuts` requests
    cuts: int = 0
    stall_after: int | None = None  # bytes of a body, after which nothing more is sent until `released`
    released: threading.Event = field(default_factory=threading.Event)
    claimed: int = 0  # bytes that the Content-Length of a body is too large
    statuses: list[int] = field(default_factory=list)  # of the next GET requests, instead of a response
    always: int | None = None  # the status of every response
    requests: list[str] = field(default_factory=list)


def handler(web: Web) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            if web.always:
                return self.send_error(web.always)
            return self.answer(200, 0, len(web.data))

        def do_GET(self) -> None:
            requested = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            web.requests.append("-".join(requested.groups()) if requested else "all")
            if web.statuses or web.always:
                return self.send_error(web.statuses.pop(0) if web.statuses else web.always or 500)
            begin, end, ranged = 0, len(web.data), requested is not None and web.ranges
            if requested is not None and ranged:
                begin, end = int(requested[1]), min(int(requested[2]) + 1, end)
            self.answer(206 if ranged else 200, begin, end)
            body = web.data[begin:end]
            if web.cut_after is not None and web.cuts and len(body) > web.cut_after:
                web.cuts -= 1
                body = body[: web.cut_after]
            stalls = web.stall_after is not None and len(body) > web.stall_after
            with suppress(ConnectionError):  # the reader closed the connection
                self.wfile.write(body[: web.stall_after] if stalls else body)
            if stalls:
                web.released.wait()
            return None

        def answer(self, status: int, begin: int, end: int) -> None:
            self.send_response(status)
            if web.sizes:
                claimed = web.claimed if self.command == "GET" else 0
                self.send_header("Content-Length", str(end - begin + claimed))
            if web.etag:
                self.send_header("ETag", web.etag)
            if web.modified:
                self.send_header("Last-Modified", web.modified)
            if status == 206:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(web.data)}")
            self.end_headers()

    return Handler


@contextmanager
def serve(web: Web) -> Iterator[Shard]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(web))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    path = f"http://127.0.0.1:{server.server_port}/x.tar"
    try:
        yield Shard(path=path, url=f"{path}?key=SECRET", size=len(web.data))
    finally:
        web.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def read_all(shard: Shard, step: int = 70_000) -> bytes:
    with open_shard(shard, waits=NO_WAIT) as stream:
        return b"".join(iter(lambda: stream.read(step), b""))


class TestHttp:
    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stream_module, "BLOCK_BYTES", 400_000)
        monkeypatch.setattr(stream_module, "READ_BYTES", 100_000)
        monkeypatch.setattr(stream_module, "LEAST_BLOCK_BYTES", 20_000)

    def test_blocks_in_order_each_once(self) -> None:
        with serve(web := Web()) as shard:
            assert read_all(shard) == DATA
        ends = [int(request.partition("-")[2]) + 1 for request in web.requests]
        assert [int(request.partition("-")[0]) for request in web.requests] == [0, *ends[:-1]]
        assert ends[-1] == len(DATA)

    def test_cut_connections(self) -> None:
        """A server that cuts every response after 180,000 bytes, and one that cuts some."""
        with serve(Web(cut_after=180_000, cuts=10**9)) as shard:
            assert read_all(shard, 30_000) == DATA
        with serve(web := Web(cut_after=300_000, cuts=0)) as shard, open_shard(shard, waits=NO_WAIT) as stream:
            for begin in range(0, len(DATA), 500_000):
                web.cuts = 2
                assert stream.read(500_000) == DATA[begin : begin + 500_000]

    @pytest.mark.parametrize("ranges", [True, False])
    def test_a_server_that_stalls(self, ranges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stream_module, "SILENT_SECONDS", 0.2)
        with serve(web := Web(ranges=ranges, stall_after=1_000_000 if not ranges else 390_000)) as shard:
            if ranges:
                assert read_all(shard) == DATA
                web.stall_after = 0
            with pytest.raises(ShardError, match=r"x.tar: unreadable from byte \d+.* after 4 attempts: .*[Tt]imeout"):
                read_all(shard)

    @pytest.mark.parametrize(("claimed", "ranges"), [(50_000, True), (-50_000, True), (-50_000, False)])
    def test_a_wrong_content_length(self, claimed: int, ranges: bool) -> None:
        """The bytes that the server does send are used, and no more are expected than the shard has."""
        with serve(web := Web(ranges=ranges, claimed=claimed)) as shard, open_shard(shard, waits=NO_WAIT) as stream:
            assert stream.read(len(DATA) - 50_000) == DATA[:-50_000]
            web.claimed = 0
            assert stream.read() == DATA[-50_000:]

    def test_a_server_without_ranges_that_claims_more_than_it_sends(self) -> None:
        with serve(Web(ranges=False, claimed=50_000)) as shard, pytest.raises(ShardError, match="Not enough data"):
            read_all(shard)

    def test_server_without_ranges(self) -> None:
        with serve(web := Web(ranges=False)) as shard:
            assert read_all(shard) == DATA
        assert web.requests[-1] == "all"

    @pytest.mark.parametrize("sizes", [True, False])
    def test_server_without_ranges_that_cuts(self, sizes: bool) -> None:
        """Without a length, a cut connection looks like the end of the shard."""
        with serve(Web(ranges=False, sizes=sizes, cut_after=1_500_000, cuts=2 if sizes else 0)) as shard:
            assert read_all(shard) == DATA

    @pytest.mark.parametrize("ranges", [True, False])
    def test_tar_with_members_to_pass_over(self, ranges: bool) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, size in (("a.mp4", 2_000_000), ("a.txt", 5), ("b.mp4", 1_500_000), ("b.txt", 6)):
                info = tarfile.TarInfo(name)
                info.size = size
                tar.addfile(info, io.BytesIO(DATA))
        web = Web(data=buffer.getvalue(), ranges=ranges)
        with serve(web) as shard, open_shard(shard, waits=NO_WAIT) as stream:
            samples = list(TarReader(stream, shard.path, lambda field: field == "txt", Limits()))
            assert [dict(sample.members) for sample in samples] == [{"txt": DATA[:5]}, {"txt": DATA[:6]}]
            assert not ranges or stream.bytes_read < 1_000_000

    def test_errors_of_a_busy_server(self) -> None:
        with serve(Web(statuses=[503, 429, 500])) as shard:
            assert read_all(shard) == DATA

    def test_giving_up(self) -> None:
        with serve(Web(statuses=[503] * 99)) as shard, pytest.raises(ShardError) as error:
            read_all(shard)
        assert "unreadable from byte 0 on, after 4 attempts: ClientResponseError: 503" in str(error.value)
        assert "SECRET" not in str(error.value)

    @pytest.mark.parametrize("status", [401, 403])
    def test_refused_access_is_the_surroundings_fault(self, status: int) -> None:
        with serve(Web(statuses=[status] * 9)) as shard, pytest.raises(PermissionError) as error:
            read_all(shard)
        assert str(error.value).startswith(
            f"{shard.path}: unreadable from byte 0 on: access denied (status {status}); "
        )
        assert "renew its signature" in str(error.value)

    def test_no_server(self, caplog: pytest.LogCaptureFixture) -> None:
        with serve(Web()) as shard:
            pass
        with caplog.at_level(logging.WARNING), pytest.raises(ShardError, match="after 4 attempts") as error:
            read_all(shard)
        assert "SECRET" not in str(error.value) + caplog.text

    def test_changed_while_it_was_read(self) -> None:
        with serve(web := Web(cut_after=200_000, cuts=0)) as shard, open_shard(shard, waits=NO_WAIT) as stream:
            stream.read(10)
            web.cuts, web.etag = 1, '"two"'
            with pytest.raises(ShardError, match=r"changed while it was read .*etag one.*etag two"):
                stream.read()

    @pytest.mark.parametrize(("status", "error"), [(404, ShardError), (410, ShardError), (403, PermissionError)])
    def test_refused_from_the_start(self, status: int, error: type[Exception]) -> None:
        with serve(web := Web(always=status)) as shard, pytest.raises(error) as raised:
            read_all(shard)
        assert len(web.requests) == 1  # no retry
        assert "SECRET" not in str(raised.value)

    def test_listing_asks_for_sizes(self) -> None:
        with serve(Web()) as shard:
            [listed] = list_shards([shard.url])
            assert (listed.path, listed.url, listed.size, listed.etag) == (shard.path, shard.url, len(DATA), "one")


class Flaky(AbstractFileSystem):
    """A store in a dictionary, whose requests fail in the order of `faults`."""

    protocol = "flaky"
    cachable = False
    objects: ClassVar[dict[str, bytes]] = {}
    faults: ClassVar[list[Exception | None]] = []

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        return {"name": path, "type": "file", "size": len(self.objects[path])}

    def _open(self, path: str, mode: str = "rb", **options: Any) -> "FlakyFile":
        return FlakyFile(self, path, mode, **options)


class FlakyFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        fault = Flaky.faults.pop(0) if Flaky.faults else None
        if fault is not None:
            raise fault
        return Flaky.objects[self.path][start:end]


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[Flaky]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(Flaky, "objects", {"b/x.tar": DATA})
    monkeypatch.setattr(Flaky, "faults", [])
    monkeypatch.setattr(stream_module, "BLOCK_BYTES", 200_000)
    monkeypatch.setattr(stream_module, "READ_BYTES", 100_000)
    return Flaky


class TestStore:
    shard = Shard(path="flaky://b/x.tar", url="flaky://b/x.tar")

    def test_each_byte_once_whatever_fails(self, flaky: type[Flaky]) -> None:
        import botocore.exceptions

        dead = botocore.exceptions.ReadTimeoutError(endpoint_url="https://user:SECRET@host")
        flaky.faults = [None, OSError(5, "EIO"), TimeoutError(), None, dead, ConnectionResetError(), None, dead]
        assert read_all(self.shard) == DATA
        assert flaky.faults == []

    def test_progress_starts_the_retries_over(self, flaky: type[Flaky]) -> None:
        flaky.faults = [OSError(), OSError(), OSError(), None] * 2 + [OSError()] * 4
        with pytest.raises(ShardError, match="after 4 attempts"):
            read_all(self.shard)
        assert flaky.faults == []

    def test_waits_grow(self, flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch) -> None:
        waited: list[float] = []
        monkeypatch.setattr("time.sleep", waited.append)
        flaky.faults = [OSError()] * 9
        with open_shard(self.shard) as stream, pytest.raises(ShardError):
            stream.read()
        assert waited == list(retry_module.RETRY_WAITS) == sorted(waited)

    def test_permission_is_raised_as_it_is(self, flaky: type[Flaky]) -> None:
        flaky.faults = [PermissionError(13, "no")]
        with pytest.raises(PermissionError, match="no"):
            read_all(self.shard)

    def test_forbidden_by_gcs(self, flaky: type[Flaky]) -> None:
        flaky.faults = [OSError("Forbidden: https://storage/b/x.tar?key=SECRET")]
        with pytest.raises(PermissionError, match=r"flaky://b/x.tar: unreadable from byte 0 on: access denied"):
            read_all(self.shard)

    @pytest.mark.parametrize("fault", [TypeError("a bug"), MemoryError(), KeyError("a bug")])
    def test_what_is_no_fault_of_the_store_is_raised(self, flaky: type[Flaky], fault: Exception) -> None:
        flaky.faults = [fault]
        with pytest.raises(type(fault)):
            read_all(self.shard)

    def test_gone(self, flaky: type[Flaky]) -> None:
        flaky.objects = {}
        with pytest.raises(ShardError, match=r"flaky://b/x\.tar: does not exist"):
            open_shard(self.shard)

    def test_gone_while_it_is_read(self, flaky: type[Flaky]) -> None:
        with open_shard(self.shard, waits=NO_WAIT) as stream:
            stream.read(10)
            flaky.faults, flaky.objects = [OSError()], {}
            with pytest.raises(ShardError, match="does not exist"):
                stream.read()

    def test_shrunk_while_it_is_read(self, flaky: type[Flaky]) -> None:
        with open_shard(self.shard, waits=NO_WAIT) as stream:
            stream.read(10)
            flaky.objects = {"b/x.tar": DATA[:2_000_000]}
            with pytest.raises(ShardError, match="changed while it was read"):
                stream.read()


class TestShardStream:
    @pytest.fixture(params=["local", "memory"])
    def shard(self, request: pytest.FixtureRequest, tmp_path: Path) -> Shard:
        url = str(tmp_path / "x.tar") if request.param == "local" else "memory://stream/x.tar"
        with fsspec.open(url, "wb") as file:
            file.write(DATA)
        return list_shards([url])[0]

    def test_counts_what_was_taken(self, shard: Shard) -> None:
        with open_shard(shard) as stream:
            assert stream.bytes_read == 0
            assert stream.read(100) == DATA[:100]
            assert 100 <= stream.bytes_read <= stream_module.READ_BYTES
            stream.read()
            assert (stream.bytes_read, stream.size, stream.etag) == (len(DATA), shard.size, shard.etag)

    def test_begins_at_a_byte(self, shard: Shard) -> None:
        with open_shard(shard, begin=2_999_000) as stream:
            assert stream.read() == DATA[2_999_000:]
            assert stream.bytes_read == 1000

    def test_passing_over_bytes_is_not_reading_them(self, shard: Shard) -> None:
        with open_shard(shard) as stream:
            stream.seek(2_500_000, io.SEEK_CUR)
            assert stream.read(100) == DATA[2_500_000:2_500_100]
            assert stream.bytes_read <= 500_000

    def test_two_readers_at_once(self, shard: Shard) -> None:
        with open_shard(shard) as first, open_shard(shard) as second:
            assert first.read(10) == second.read(10) == DATA[:10]
            assert first.read() == second.read() == DATA[10:]

    def test_a_folder_is_no_shard(self, tmp_path: Path) -> None:
        with pytest.raises(ShardError, match="does not exist, or is not a file"):
            open_shard(Shard(path=str(tmp_path), url=str(tmp_path)))

    def test_local_file_that_is_cut_while_it_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "x.tar"
        path.write_bytes(DATA)
        with open_shard(list_shards([str(path)])[0], waits=NO_WAIT) as stream:
            stream.read(10)
            path.write_bytes(DATA[:1_500_000])
            with pytest.raises(ShardError, match="changed while it was read"):
                stream.read()


@pytest.mark.parametrize("store", STORES)
def test_stores_list_and_read_alike(store: str, tmp_path: Path) -> None:
    folder = fresh_output(store, tmp_path)
    for number in range(3):
        with fsspec.open(f"{folder}/d/{number}.tar", "wb", auto_mkdir=True) as file:
            file.write(SMALL[number:])
    listed = list_shards([f"{folder}/d/*.tar"])
    assert [(shard.path, shard.size) for shard in listed] == [
        (f"{folder}/d/{number}.tar", len(SMALL) - number) for number in range(3)
    ]
    assert listed == list_shards([f"{folder}/d"]) == list_shards([f"{folder}/d/{{0..2}}.tar"])
    assert len({shard.etag for shard in listed} - {None}) == 3
    for number, shard in enumerate(listed):
        with open_shard(shard) as stream:
            assert stream.read() == SMALL[number:]
            assert (stream.size, stream.etag) == (shard.size, shard.etag)
    with pytest.raises(ShardError, match="does not exist"):
        open_shard(list_shards([f"{folder}/d/{{0..9}}.tar"])[5])
