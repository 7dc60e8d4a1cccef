"""Faults of stores: S3 and GCS behind a proxy that cuts, refuses and delays, a web server, and local files."""

import gzip
import io
import json
import os
import tarfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from killers import make_corpus, make_job, run_units
from known import read_parts
from servers import STORES, FaultyProxy, FileServer, fresh_output
from test_stream import Web, serve

from mmbeam.config import Limits
from mmbeam.errors import ShardError, UsageError
from mmbeam.features import FeatureDataset
from mmbeam.features.captions import read_keyed
from mmbeam.features.read import WrittenRows
from mmbeam.readers import paths as paths_module
from mmbeam.readers import retry as retry_module
from mmbeam.readers import stream as stream_module
from mmbeam.readers.listing import expand, list_shards
from mmbeam.readers.stream import open_shard
from mmbeam.readers.tar import TarReader
from mmbeam.runs.commits import intact_reports, read_failures
from mmbeam.runs.store import Store, forget_file_systems
from mmbeam.training.options import TrainOptions
from mmbeam.training.setup import row_source, set_up
from mmbeam.types import Shard

NO_WAIT = (0.0, 0.0, 0.0)
RANDOM = np.random.default_rng(0)
BUCKETS = [store for store in STORES if store != "local"]


def make_tar(samples: int, size: int, text: bytes | None = None) -> bytes:
    """Return a tar of samples of random bytes, each with the `text`, if any."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(samples):
            for extension, data in (("bin", RANDOM.bytes(size)), ("txt", text)):
                if data is not None:
                    info = tarfile.TarInfo(f"{number:04}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@dataclass
class Bucket:
    """A folder of a bucket, through a proxy that makes faults."""

    url: str
    proxy: FaultyProxy

    def put(self, name: str, content: bytes) -> None:
        """Write an object. From then on the proxy makes no faults."""
        self.proxy.behave()
        fs, path = paths_module.file_system(f"{self.url}/{name}")
        fs.pipe_file(path, content)
        fs.invalidate_cache()

    def shard(self, name: str, content: bytes) -> Shard:
        self.put(name, content)
        [shard] = list_shards([f"{self.url}/{name}"])
        self.proxy.requests.clear()
        return shard


@pytest.fixture(scope="module", params=BUCKETS)
def proxied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    url = fresh_output(request.param, tmp_path_factory.mktemp("bucket"))
    upstream = os.environ["AWS_ENDPOINT_URL" if request.param == "s3" else "STORAGE_EMULATOR_HOST"]
    with FaultyProxy(upstream) as proxy, pytest.MonkeyPatch.context() as patch:
        name = url.partition("://")[0]
        options = {"endpoint_url": proxy.endpoint, **({"token": "anon"} if name == "gs" else {})}
        patch.setitem(fsspec.config.conf, name, options)
        forget_file_systems()
        yield Bucket(url, proxy)
    forget_file_systems()


@pytest.fixture
def bucket(proxied: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setattr(retry_module, "RETRY_WAITS", NO_WAIT)
    proxied.proxy.behave()
    return proxied


def read_keys(shard: Shard) -> list[str]:
    with open_shard(shard) as stream:
        return [sample.key for sample in TarReader(stream, shard.path, lambda _: True, Limits())]


class TestBuckets:
    @pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # of gcsfs, when the test writes
    def test_a_server_that_cuts_every_2_mb(self, bucket: Bucket) -> None:
        data = make_tar(1000, 5_000)
        shard = bucket.shard("cut.tar", data)
        bucket.proxy.cut_after = 2_000_000
        assert read_keys(shard) == [f"{number:04}" for number in range(1000)]
        assert bucket.proxy.sent == len(data)

    def test_a_server_that_stalls(self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        """After SILENT_SECONDS without data the connection is closed, and reading goes on at the byte reached."""
        data = make_tar(100, 5_000)
        shard = bucket.shard("stalls.tar", data)
        for module in (paths_module, stream_module):
            monkeypatch.setattr(module, "SILENT_SECONDS", 0.3)
        bucket.proxy.stall_after = 300_000
        assert read_keys(shard) == [f"{number:04}" for number in range(100)]
        assert bucket.proxy.sent == len(data)
        bucket.proxy.stall_after = 0
        with (
            open_shard(shard) as stream,
            pytest.raises(ShardError, match=r"stalls.tar: unreadable from byte 0 on, after 4 attempts: \w*Timeout"),
        ):
            stream.read()

    @pytest.mark.parametrize("claimed", [1, 100_000, -2000])
    def test_a_wrong_content_length(self, claimed: int, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stream_module, "BLOCK_BYTES", 100_000)
        data = make_tar(60, 5_000)
        shard = bucket.shard("length.tar", data)
        bucket.proxy.claimed = claimed
        with open_shard(shard) as stream:
            if claimed < 0:  # as long as the server does so, the last bytes never arrive
                assert stream.read(len(data) + claimed) == data[:claimed]
                bucket.proxy.claimed, data = 0, data[claimed:]
            assert stream.read() == data

    def test_replaced_while_it_is_read(self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stream_module, "BLOCK_BYTES", 100_000)
        shard = bucket.shard("replaced.tar", make_tar(100, 5_000))
        with open_shard(shard) as stream:
            stream.read(10)
            bucket.put("replaced.tar", make_tar(100, 5_000))
            with pytest.raises(ShardError, match=r"replaced.tar: changed while it was read"):
                stream.read()
        with pytest.raises(ShardError, match=r"replaced.tar: changed since it was listed"):
            open_shard(shard)

    def test_a_job_over_a_shard_that_is_replaced_while_it_is_read(
        self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """No row of either version is written; the next run reads the new one."""
        monkeypatch.setattr(stream_module, "BLOCK_BYTES", 100_000)
        folder = f"{bucket.url}/{uuid.uuid4().hex}"
        for name, text in (("a", b"steady"), ("b", b"old")):
            bucket.put(f"{folder.rpartition('/')[2]}/{name}.tar", make_tar(60, 5_000, text))

        def replace_b(request: str, span: str) -> None:
            if "b.tar" in request and span.startswith("bytes=100000-"):
                bucket.put(f"{folder.rpartition('/')[2]}/b.tar", make_tar(60, 5_000, b"new"))

        bucket.proxy.before = replace_b
        job = make_job(folder, tmp_path)
        assert {report.status for report in run_units(job)} == {"written", "failed"}
        [rows] = read_parts(tmp_path).values()
        assert [row["text"] for row in rows] == ["steady"] * 60
        [record] = [record for name in job.run.store.list("_failures") for record in read_failures(job.run.store, name)]
        assert "b.tar: changed while it was read" in record["message"]
        assert {report.status for report in run_units(make_job(folder, tmp_path))} == {"kept", "written"}
        texts = sorted(row["text"] for rows in read_parts(tmp_path).values() for row in rows)
        assert texts == ["new"] * 60 + ["steady"] * 60

    def test_a_busy_server_is_given_up_within_one_budget(self, bucket: Bucket) -> None:
        shard = bucket.shard("busy.tar", make_tar(1, 5_000))
        with open_shard(shard) as stream:
            bucket.proxy.always = [("GET ", 503, {})]
            bucket.proxy.requests.clear()
            with pytest.raises(ShardError, match=r"busy.tar: unreadable from byte 0 on, after 4 attempts: .*503"):
                stream.read()
        assert len(bucket.proxy.requests) == 4  # none by the client of the store itself

    def test_faults_before_an_answer(self, bucket: Bucket) -> None:
        data = make_tar(3, 5_000)
        shard = bucket.shard("flaky.tar", data)
        with open_shard(shard) as stream:
            bucket.proxy.faults = [("flaky.tar", status, {}) for status in ((503, 500, 429)[: len(NO_WAIT)])]
            assert stream.read() == data
        assert bucket.proxy.faults == []

    def test_access_that_ends_in_the_middle(self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stream_module, "BLOCK_BYTES", 100_000)
        shard = bucket.shard("denied.tar", make_tar(100, 5_000))
        with open_shard(shard) as stream:
            stream.read(10)
            bucket.proxy.always = [("denied.tar", 403, {})]
            with pytest.raises(
                PermissionError, match=r"denied.tar: unreadable from byte 100,000 on: access denied"
            ) as e:
                stream.read()
        hint = "AWS_ACCESS_KEY_ID" if bucket.url.startswith("s3") else "GOOGLE_APPLICATION_CREDENTIALS"
        assert hint in str(e.value)

    @pytest.mark.parametrize("step", ["read", "open", "list", "write"])
    def test_credentials_that_expire(self, step: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        """S3 answers 400 with a code, to a HEAD request without; Google storage answers 401."""
        monkeypatch.setattr(stream_module, "BLOCK_BYTES", 100_000)
        is_s3 = bucket.url.startswith("s3")
        shard = bucket.shard("expired.tar", make_tar(60, 5_000))
        expired = [("", 400, {"x-code": "ExpiredToken"}) if is_s3 else ("", 401, {})]
        what = {"open": "unreadable from byte 0 on", "read": "unreadable from byte 100,000 on"}.get(step)
        what = what or {"list": "cannot be listed", "write": "out/data/a: cannot be written"}[step]
        hint = "AWS_ACCESS_KEY_ID" if is_s3 else "GOOGLE_APPLICATION_CREDENTIALS"
        why = "status 400" if is_s3 else "status 401"
        with open_shard(shard) as stream:
            assert stream.read(10)
            bucket.proxy.always = expired
            requests = {
                "read": stream.read,
                "open": lambda: open_shard(shard).read(),
                "list": lambda: list_shards([f"{bucket.url}/*.tar"]),
                "write": lambda: Store(f"{bucket.url}/out").create("data/a", b"x"),
            }
            with pytest.raises(PermissionError, match=rf"{what}: access denied \({why}.*\); check .*{hint}") as raised:
                requests[step]()
        assert bucket.url in str(raised.value)

    def test_access_denied_to_write_and_to_list(self, bucket: Bucket) -> None:
        hint = "AWS_ACCESS_KEY_ID" if bucket.url.startswith("s3") else "GOOGLE_APPLICATION_CREDENTIALS"
        store = Store(f"{bucket.url}/out")
        bucket.proxy.always = [("", 403, {})]
        with pytest.raises(PermissionError, match=rf"out/data/a: cannot be written: access denied .*{hint}"):
            store.create("data/a", b"x")
        with pytest.raises(PermissionError, match=rf"cannot be listed: access denied .*{hint}"):
            list_shards([f"{bucket.url}/*.tar"])

    def test_writes_survive_faults(self, bucket: Bucket) -> None:
        store = Store(f"{bucket.url}/out")
        bucket.proxy.faults = [(method, 503, {}) for method in ("PUT", "POST")]
        store.create("data/once", b"x" * 1000)
        assert store.list("data") == {"once": 1000}
        with pytest.raises(FileExistsError):
            store.create("data/once", b"y")
        assert store.read("data/once") == b"x" * 1000

    def test_requests_are_repeated_by_one_budget(self, bucket: Bucket) -> None:
        """The clients of the stores repeat none: gcsfs would make up to 36 attempts of each of ours."""
        store = Store(f"{bucket.url}/out")
        for status in (503, 429):
            for request in (lambda: store.create("data/a", b"x"), lambda: store.list("data"), lambda: store.read("a")):
                bucket.proxy.behave()
                bucket.proxy.always = [("", status, {})]
                with pytest.raises(ConnectionError, match=f"after 4 attempts: .*{status}"):
                    request()
                assert len(bucket.proxy.requests) == 4

    @pytest.mark.parametrize("hidden", ["data/", "out"])
    def test_a_listing_that_lacks_new_files(self, hidden: str, bucket: Bucket, tmp_path: Path) -> None:
        """The next launch plans, reads and publishes again what it does not see, and finds that it exists."""
        make_corpus(tmp_path / "in", {}, number=2)
        output = f"{bucket.url}/{uuid.uuid4().hex}-out"
        run_units(make_job(tmp_path / "in", output))
        store = Store(output)
        before = {name: store.read(f"data/{name}") for name in store.list("data")}
        assert len(before) == 2
        bucket.proxy.hidden = (hidden if "/" in hidden else output.rpartition("/")[2],)
        run_units(make_job(tmp_path / "in", output))
        bucket.proxy.behave()
        assert {name: store.read(f"data/{name}") for name in store.list("data")} == before
        job = make_job(tmp_path / "in", output)
        assert len(job.units) == len(intact_reports(job.run, [unit.id for unit in job.units])) == 2
        assert len(store.list("_mmbeam/plan")) == 1

    def test_one_fault_of_a_listing_is_waited_out(self, bucket: Bucket) -> None:
        bucket.put("in/a.tar", b"x")
        bucket.proxy.faults = [("GET", 500, {}), ("GET", 503, {})]
        assert [shard.path for shard in list_shards([f"{bucket.url}/in/*.tar"])] == [f"{bucket.url}/in/a.tar"]
        assert bucket.proxy.faults == []


class TestFeatures:
    """Features in a bucket, as the data loader reads them."""

    @pytest.fixture
    def parquet(self) -> bytes:
        buffer = io.BytesIO()
        vectors = pa.array([[float(row)] * 64 for row in range(2000)], pa.list_(pa.float32()))
        table = pa.table({"key": [f"k{row}" for row in range(2000)], "image_embedding": vectors})
        pq.write_table(table.replace_schema_metadata({"mmbeam.dims": '{"image_embedding": 64}'}), buffer, 500)
        return buffer.getvalue()

    def test_faults_are_waited_out(self, bucket: Bucket, parquet: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stream_module, "BLOCK_BYTES", 50_000)
        bucket.put("f/part.parquet", parquet)
        dataset = FeatureDataset(f"{bucket.url}/f", batch_size=100, columns=["key"], shuffle=False)
        bucket.proxy.cut_after, bucket.proxy.faults = 20_000, [("part.parquet", 503, {}), ("part.parquet", 500, {})]
        batches = list(dataset)
        assert [key for batch in batches for key in batch["key"]] == [f"k{row}" for row in range(2000)]
        assert sum(float(batch["image_embedding"].sum()) for batch in batches) == 64 * sum(range(2000))
        bucket.put("f/part.parquet", parquet[:4] + parquet)
        with pytest.raises(ShardError, match=r"part.parquet: changed since it was listed"):
            list(dataset)

    @pytest.mark.parametrize("name", ["texts.csv", "texts.jsonl.gz", "texts.parquet"])
    def test_faults_of_a_file_of_captions(self, name: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stream_module, "BLOCK_BYTES", 50_000)
        texts = {f"k{row}": f"text {row}" for row in range(9000)}
        table = pa.table({"key": list(texts), "text": list(texts.values())})
        content = io.BytesIO()
        if name.endswith(".csv"):
            pa_csv.write_csv(table, content)
        elif name.endswith(".gz"):
            content.write(gzip.compress("".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode(), 0))
        else:
            pq.write_table(table, content)
        bucket.put(name, content.getvalue())
        bucket.proxy.cut_after, bucket.proxy.faults = 40_000, [(name, 503, {}), (name, 500, {})]
        assert dict(read_keyed(f"{bucket.url}/{name}", "key", "text")) == texts
        assert bucket.proxy.faults == []

    def test_faults_of_the_rows_of_a_run(self, bucket: Bucket, tmp_path: Path) -> None:
        make_corpus(tmp_path / "in", {}, count=8)
        job = make_job(tmp_path / "in", f"{bucket.url}/rows")
        run_units(job)
        bucket.proxy.faults = [(job.units[0].id, 503, {}), (job.units[1].id, 500, {})]
        rows = WrittenRows.of(job.run.output)
        bucket.proxy.faults = [(rows.parts[0].rpartition("/")[2], 503, {})] * 2
        bucket.proxy.cut_after = 1000
        assert sum(batch.num_rows for batch in rows.read(["key"])) == rows.count() == 8
        assert bucket.proxy.faults == []

    def test_a_fetched_list_may_not_name_local_paths(self, bucket: Bucket, parquet: bytes, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_bytes(parquet)
        bucket.put("files.txt", f"{tmp_path}/a.parquet\n".encode())
        files = f"{bucket.url}/files.txt"
        options = TrainOptions(input=(files,), output=str(tmp_path / "model"), captions="key")
        for read in (lambda: FeatureDataset(files, batch_size=1), lambda: set_up(options, tmp_path)):
            with pytest.raises(UsageError, match=r"files.txt, line 1: .* found a local path; .*`allow_local_paths`"):
                read()
        assert len(list(FeatureDataset(files, batch_size=1000, allow_local_paths=True))) == 2
        trusting = replace(options, allow_local_paths=True)
        assert row_source(trusting, counts={}).features().keys() == {"image_embedding"}
        assert trusting.identity() == options.identity()


def test_s3_without_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": "http://127.0.0.1:9", "client_kwargs": {}})
    with pytest.raises(
        PermissionError, match=r"s3://b/x/\*.tar: cannot be listed: access denied \(NoCredentials.*AWS_PROFILE"
    ):
        list_shards(["s3://b/x/*.tar"])


def test_google_storage_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: object) -> None:
        raise OSError(-2, "Name or service not known")

    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setitem(fsspec.config.conf, "gs", {})
    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    paths_module._find_host.cache_clear()
    with pytest.raises(ConnectionError, match=r"storage.googleapis.com: cannot be found .*check the network"):
        list_shards(["gs://bucket/*.tar"])


class TestBudget:
    @pytest.fixture
    def waited(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        seconds: list[float] = []
        monkeypatch.setattr("time.sleep", seconds.append)
        return seconds

    def test_the_budget_is_a_minute(self) -> None:
        assert 55 <= sum(retry_module.RETRY_WAITS) <= retry_module.RETRY_SECONDS == 60

    @pytest.mark.parametrize(("asks", "pause"), [("7", 7.0), ("Mon, 01 Jan 2001 00:00:00 GMT", 0.5), ("soon", 0.5)])
    def test_a_server_that_asks_to_wait(self, asks: str, pause: float, waited: list[float]) -> None:
        with FileServer() as web, FaultyProxy(web.url("")) as proxy:
            web.files["/x.tar"] = b"x" * 100
            proxy.faults = [("GET", 503, {"Retry-After": asks})]
            shard = Shard(path=f"{proxy.endpoint}/x.tar", url=f"{proxy.endpoint}/x.tar")
            with open_shard(shard) as stream:
                assert stream.read() == b"x" * 100
        assert waited[0] == pause

    def test_a_server_that_asks_to_wait_too_long(self, waited: list[float]) -> None:
        with FileServer() as web, FaultyProxy(web.url("")) as proxy:
            web.files["/x.tar"] = b"x" * 100
            proxy.always = [("GET", 429, {"Retry-After": "120"})]
            shard = Shard(path=f"{proxy.endpoint}/x.tar", url=f"{proxy.endpoint}/x.tar")
            with open_shard(shard) as stream, pytest.raises(ShardError, match="asks to wait 120 s"):
                stream.read()
        assert waited == []

    def test_time_spent_in_attempts_counts(self, waited: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter(range(0, 10_000, 25))  # each look at it is 25 seconds later
        monkeypatch.setattr("time.monotonic", lambda: next(clock))
        with pytest.raises(ConnectionError, match="after 3 attempts"):
            retry_module.retry(lambda: (_ for _ in ()).throw(TimeoutError()), "x", "cannot be read")
        assert len(waited) == 2

    def test_one_fault_of_a_web_server_while_listing(self, waited: list[float]) -> None:
        with FileServer() as web, FaultyProxy(web.url("")) as proxy:
            web.files |= {"/a.tar": b"x", "/l.txt": b"a.tar"}
            proxy.faults = [("GET /l.txt", 503, {}), ("HEAD /a.tar", 503, {}), ("GET /a.tar", 503, {})]
            [shard] = list_shards([f"{proxy.endpoint}/l.txt"])
            assert (shard.size, proxy.faults) == (1, [])


@pytest.mark.parametrize("how", ["in place", "renamed"])
def test_a_local_file_that_is_replaced_while_it_is_read(how: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(make_tar(600, 5_000))
    [shard] = list_shards([str(path)])
    with open_shard(shard) as stream:
        stream.read(10)
        target = path if how == "in place" else tmp_path / "new.tar"
        target.write_bytes(make_tar(600, 5_000))
        target.replace(path)
        with pytest.raises(ShardError, match=r"x.tar: changed while it was read"):
            stream.read()


def test_a_web_server_that_replaces_a_file_without_etags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ETag, Last-Modified and the size tell versions apart."""
    monkeypatch.setattr(stream_module, "BLOCK_BYTES", 400_000)
    for change in ({"data": RANDOM.bytes(3_000_001)}, {"modified": "Tue, 02 Jan 2001 00:00:00 GMT"}):
        web = Web(etag=None, modified="Mon, 01 Jan 2001 00:00:00 GMT")
        with serve(web) as shard, open_shard(shard, waits=NO_WAIT) as stream:
            stream.read(10)
            vars(web).update(change)
            with pytest.raises(ShardError, match=r"x.tar: changed while it was read"):
                stream.read()


def test_a_listed_shard_may_not_redirect_to_another_server() -> None:
    with FileServer() as web, FileServer() as other:
        web.files["/l.txt"] = b"a.tar\nb.tar\n"
        web.files["/real.tar"] = other.files["/c.tar"] = make_tar(1, 10)
        web.redirects = {"/a.tar": "/real.tar", "/b.tar": other.url("c.tar")}
        near, far = list_shards([web.url("l.txt")])
        assert read_keys(near) == ["0000"]
        with pytest.raises(ShardError, match=r"b.tar: named by a list .* redirects to another server"):
            read_keys(far)
        assert other.requests == []
        trusted = list_shards(expand([web.url("l.txt")], allow_local_paths=True))
        assert [read_keys(shard) for shard in trusted] == [["0000"], ["0000"]]
