"""The job on stores: shards read from and rows written to S3, GCS, memory, file URLs and a web server.

The rows equal those of local shards, a second launch keeps them, and no secret of a URL or of the environment
is in any file, row or log line.
"""

import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import shards
from servers import STORES, fresh_output
from tiny_clip import save_clip

from mmbeam.cli import main
from mmbeam.config import ModelRef
from mmbeam.errors import NoShardsError, UsageError
from mmbeam.jobs.embed import EmbedOptions, embed
from mmbeam.types import RunReport

SECRET = "hush-5b2f"
SIGNED = f"X-Amz-Signature={SECRET}&X-Amz-Expires=60"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Local:
    """Shards, a model, and the rows of a local job on them."""

    root: Path
    rows: Rows
    paths: list[Path]

    def options(self, pattern: str, output: str) -> EmbedOptions:
        return EmbedOptions(
            input=(pattern,), output=output, models=(ModelRef(model=str(self.root / "clip")),), device="cpu"
        )


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Local:
    root = tmp_path_factory.mktemp("local")
    save_clip(root / "clip")
    truths = shards.make_truths(12)
    truths[4] = replace(truths[4], members={"txt": b"no image"})
    paths = shards.make_webdataset(root / "in", truths, shards=3).paths
    bare = Local(root, [], paths)
    embed(bare.options(str(root / "in"), str(root / "out")))
    return replace(bare, rows=rows_in(str(root / "out")))


def rows_in(output: str) -> Rows:
    """Read the rows with pyarrow through fsspec, with the name of the shard instead of its path."""
    fs, path = fsspec.core.url_to_fs(output)
    fs.invalidate_cache()
    rows: Rows = ds.dataset(f"{path}/data", filesystem=fs, format="parquet").to_table().to_pylist()
    rows = [{**row, "shard": row["shard"].rpartition("/")[2]} for row in rows]
    return sorted(rows, key=lambda row: (row["shard"], row["offset"]))


def shards_named_in(output: str) -> set[str]:
    fs, path = fsspec.core.url_to_fs(output)
    column: list[str] = ds.dataset(f"{path}/data", filesystem=fs).to_table(["shard"])["shard"].to_pylist()
    return set(column)


def everything_in(output: str) -> Iterator[tuple[str, bytes]]:
    """Yield every file of the output, and the text of the rows and metadata of every Parquet."""
    fs, path = fsspec.core.url_to_fs(output)
    for name in fs.find(path):
        content = fs.cat_file(name)
        yield name, content
        if name.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(content))
            metadata = pq.read_metadata(io.BytesIO(content)).metadata
            yield name, repr((table.to_pylist(), table.schema.metadata, metadata)).encode()


def assert_no_secret(output: str, *logged: str) -> None:
    files = list(everything_in(output))
    assert any(name.endswith("run.json") for name, _ in files)
    assert [name for name, content in files if SECRET.encode() in content] == []
    assert not any(SECRET in text for text in logged)


def put_shards(local: Local, folder: str) -> None:
    fs, path = fsspec.core.url_to_fs(folder)
    for shard in local.paths:
        fs.pipe_file(f"{path}/{shard.name}", shard.read_bytes())


@pytest.mark.parametrize("store", [store for store in STORES if store != "local"])
def test_shards_and_rows_in_a_bucket(local: Local, store: str, tmp_path: Path) -> None:
    bucket = fresh_output(store, tmp_path)
    put_shards(local, f"{bucket}/in")
    options = local.options(f"{bucket}/in/*.tar", f"{bucket}/out")
    first = embed(options)
    assert (first.units_written, first.units_failed) == (3, 0)
    assert rows_in(f"{bucket}/out") == local.rows
    assert shards_named_in(f"{bucket}/out") == {f"{bucket}/in/{path.name}" for path in local.paths}
    again = embed(options)
    assert (again.units_written, again.units_kept) == (0, 3)
    fs, path = fsspec.core.url_to_fs(f"{bucket}/out/data")
    fs.rm_file(fs.ls(path, detail=False)[0])  # a unit that is not committed
    resumed = embed(options)
    assert (resumed.units_written, resumed.units_kept) == (1, 2)
    assert rows_in(f"{bucket}/out") == local.rows


@pytest.mark.parametrize("store", STORES)
def test_names_with_query_fragment_and_escape_characters_are_read(local: Local, store: str, tmp_path: Path) -> None:
    """Names in a bucket may hold any character; only the path of an HTTP URL ends at its query."""
    root = fresh_output(store, tmp_path)
    fs, folder = fsspec.core.url_to_fs(f"{root}/in")
    names = ["a#1.tar", "a#2.tar", "b?x=1.tar", "b?x=2.tar", "c%20d.tar", "c d.tar"]
    fs.makedirs(folder, exist_ok=True)
    for name in names:
        fs.pipe_file(f"{folder}/{name}", local.paths[0].read_bytes())
    options = local.options(f"{root}/in/*.tar", f"{root}/out")
    assert embed(options).units_written == len(names)
    assert shards_named_in(f"{root}/out") == {f"{root}/in/{name}" for name in names}
    listed = "::".join(f"{root}/in/{name.replace('?', '[?]')}" for name in names[::2])
    assert embed(local.options(listed, f"{root}/out-listed")).tally.rows == 12
    assert shards_named_in(f"{root}/out-listed") == {f"{root}/in/{name}" for name in names[::2]}


def test_the_command_with_fsspecs_environment_for_endpoint_and_keys(local: Local, tmp_path: Path) -> None:
    """FSSPEC_<PROTOCOL>_<ARGUMENT> reaches every process that mmbeam starts, and no file that it writes."""
    bucket = fresh_output("s3", tmp_path)
    put_shards(local, f"{bucket}/in")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"FSSPEC_S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}
    environment |= {"FSSPEC_S3_KEY": f"key-{SECRET}", "FSSPEC_S3_SECRET": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
    command = [sys.executable, "-m", "mmbeam", "embed", "--input", f"{bucket}/in/*.tar", "--output", f"{bucket}/out"]
    command += ["--model", str(local.root / "clip"), "--device=cpu", "--verbose"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rows_in(f"{bucket}/out") == local.rows
    assert_no_secret(f"{bucket}/out", done.stdout, done.stderr)


def in_memory(local: Local, folder: Path) -> str:
    put_shards(local, f"memory:/{folder}/in")
    return f"memory:/{folder}"


def as_files(local: Local, folder: Path) -> str:
    (folder / "in").mkdir()
    put_shards(local, f"file://{folder}/in")
    return f"file://{folder}"


@pytest.mark.parametrize("place", [in_memory, as_files])
def test_shards_and_rows_in_memory_and_by_file_urls(
    local: Local, place: Callable[[Local, Path], str], tmp_path: Path
) -> None:
    root = place(local, tmp_path)
    options = local.options(f"{root}/in/shard-{{000000..000002}}.tar", f"{root}/out")
    assert embed(options).units_written == 3
    assert rows_in(f"{root}/out") == local.rows
    assert embed(options).units_kept == 3


# A web server


@dataclass
class Web:
    """A server of a folder that serves only signed URLs and authenticated users."""

    server: ThreadingHTTPServer

    def url(self, path: str, user: str = "") -> str:
        return f"http://{user}127.0.0.1:{self.server.server_port}/{path}"


class SignedOnly(SimpleHTTPRequestHandler):
    """Serves whole files, without ranges, if the URL is signed or the password is right."""

    def send_head(self) -> Any:
        if SECRET not in self.path and "Authorization" not in self.headers:
            self.send_error(403)
            return None
        return super().send_head()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(local: Local) -> Iterator[Web]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SignedOnly, directory=str(local.root / "in")))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Web(server)
    server.shutdown()
    server.server_close()
    thread.join()


def run_logged(options: EmbedOptions, caplog: pytest.LogCaptureFixture) -> tuple[RunReport, str]:
    """The job with everything logged that --verbose would show."""
    with caplog.at_level(logging.INFO):
        report = embed(options)
    return report, caplog.text


@pytest.mark.parametrize("how", ["query", "user"])
def test_signed_urls_are_opened_and_nowhere_written_down(
    local: Local, web: Web, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = "shard-{000000..000002}.tar"
    url = web.url(f"{names}?{SIGNED}") if how == "query" else web.url(names, user=f"me:{SECRET}@")
    output = str(tmp_path / "out")
    report, logged = run_logged(local.options(url, output), caplog)
    assert (report.units_written, report.units_failed) == (3, 0)
    assert rows_in(output) == local.rows
    assert shards_named_in(output) == {web.url(path.name) for path in local.paths}
    assert_no_secret(output, logged, repr(report))
    renewed = url.replace("Expires=60", "Expires=90")  # tomorrow's signature is the same shard
    again, _ = run_logged(local.options(renewed, output), caplog)
    assert (again.units_written, again.units_kept) == (0, 3)


def test_an_unreadable_url_is_named_without_its_signature(
    local: Local, web: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = str(tmp_path / "out")
    report, logged = run_logged(local.options(web.url(f"shard-{{000002..000003}}.tar?{SIGNED}"), output), caplog)
    assert (report.units_written, report.units_failed) == (1, 1)
    assert "shard-000003.tar: does not exist" in json.dumps(report.to_json())
    assert_no_secret(output, logged, repr(report))
    with pytest.raises(NoShardsError) as nothing:
        embed(local.options(web.url(f"none.tar?{SIGNED}"), output))
    with pytest.raises(NoShardsError, match="access is denied") as refused:
        embed(local.options(web.url("shard-000000.tar?sig=hush"), output))
    assert SECRET not in str(nothing.value)
    assert "hush" not in str(refused.value)


COMMANDS = {  # each prints an error; {web} is a server that answers 403 to what is not signed
    "model": ["--input", "{root}/in", "--output", "{out}", "--model", f"{{user}}/model?{SIGNED}"],
    "named model": ["--input", "{root}/in", "--output", "{out}", "--model", f"clip={{user}}/model?sig={SECRET}"],
    "input": ["--input", f"{{user}}/none.tar?{SIGNED}", "--output", "{out}"],
    "list": ["--input", f"@{{user}}/none?{SIGNED}", "--output", "{out}"],
    "bucket": ["--input", f"s3://KEY:{SECRET}/x@bucket/a.tar", "--output", "{out}"],
    "output": ["--input", "{root}/in", "--output", f"s3://KEY:{SECRET}@bucket/out"],
    "scheme": ["--input", "{root}/in", "--output", f"azzz://c:{SECRET}@account/out?sv=1&sig={SECRET}"],
    "unknown option": ["--input", "{root}/in", "--output", "{out}", f"--other_secret={SECRET}"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_error_of_the_command_line_shows_a_secret(
    local: Local, web: Web, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = {
        "root": local.root,
        "out": tmp_path / "out",
        "user": web.url("x", user=f"me:{SECRET}@").removesuffix("/x"),
    }
    status = main(["embed", *(arg.format(**places) for arg in COMMANDS[name]), "--device=cpu", "--verbose"])
    said = "".join(capfd.readouterr())
    assert status in (1, 2)
    assert "mmbeam: " in said
    assert SECRET not in said
    assert SECRET not in "".join(path.read_text() for path in tmp_path.rglob("*.json*"))


def test_an_equals_sign_in_a_url_is_part_of_it() -> None:
    for text in (f"http://h/x?sig={SECRET}", "s3://b/run=3", "./run=3", "/models/step=1000", "org/name=x"):
        assert ModelRef.parse(text) == ModelRef(model=text)
        assert SECRET not in repr(ModelRef.parse(text))
    assert ModelRef.parse("clip=http://h/x?y=z") == ModelRef(name="clip", model="http://h/x?y=z")
    with pytest.raises(UsageError, match="'my-clip' cannot prefix a column"):
        ModelRef.parse("my-clip=dir")


def test_an_endpoint_with_keys_among_beams_options_is_recorded_without_them(local: Local, tmp_path: Path) -> None:
    options = local.options(str(local.root / "in"), str(tmp_path / "out"))
    embed(replace(options, beam_args=(f"--s3_secret_access_key={SECRET}", "--s3_access_key_id", SECRET)))
    recorded = json.loads((tmp_path / "out" / "_mmbeam" / "run.json").read_text())["recorded"]
    assert recorded["beam_args"] == ["--s3_secret_access_key=...", "--s3_access_key_id", "..."]
    assert_no_secret(str(tmp_path / "out"))
