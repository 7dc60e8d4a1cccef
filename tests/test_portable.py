"""The same rows on runners in processes of their own: a job service, Prism, an external worker pool; and none there."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from beam_servers import Server, free_port, prism_binary
from fsspec.core import url_to_fs
from known import Known, assert_same, counts, make_known, options, read_parts
from servers import STORES, fresh_output

from mmbeam.errors import JobError
from mmbeam.jobs.cluster import check_cluster
from mmbeam.jobs.embed import embed, prepare
from mmbeam.jobs.execute import execute_pipeline
from mmbeam.stages.embed import EmbedStage
from mmbeam.types import Batch


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_known(tmp_path_factory.mktemp("known"))


class LoudStage(EmbedStage):
    """An encoder whose library prints more than a pipe holds."""

    def run(self, model: Any, batch: Batch) -> Batch:
        os.write(1, b"x" * 200_000)
        return super().run(model, batch)


@pytest.fixture
def worker_pool() -> Iterator[list[str]]:
    """A worker pool on loopback that knows where the stores are, and the options that name it.

    One for each test: Prism gives the workers of every first job the same name, so that a job's end, told late, would
    stop the next one's worker.
    """
    for store in STORES:
        fresh_output(store, Path())
    port = free_port()
    with Server("apache_beam.runners.worker.worker_pool_main", f"--service_port={port}", port=port):
        yield ["--environment_type=EXTERNAL", f"--environment_config=localhost:{port}"]


@pytest.fixture(scope="module")
def job_service() -> Iterator[list[str]]:
    """A job service on loopback, and the options that send a job there."""
    port = free_port()
    with Server("apache_beam.runners.portability.local_job_service_main", f"--port={port}", port=port):
        yield ["--runner=PortableRunner", f"--job_endpoint=localhost:{port}"]


@pytest.fixture(scope="module")
def prism() -> list[str]:
    """The options that run a job on Prism, of Beam's Go module at this version of Beam."""
    binary = prism_binary()
    if binary is None:
        pytest.skip("no Prism: neither in .cache/bin nor named by MMBEAM_PRISM, and no Go to build it with")
    return ["--runner=PrismRunner", f"--prism_location={binary}"]


def test_a_job_service_with_an_external_worker_pool_gives_the_same_rows(
    known: Known, job_service: list[str], worker_pool: list[str], tmp_path: Path
) -> None:
    """Processes of their own for the job service and the workers; nobody reads the workers' stdout."""
    there = [*job_service, *worker_pool]
    job = prepare(options(known.root, tmp_path, *there, shared_output=True))
    stage = LoudStage(**{each.name: getattr(job.stages[0], each.name) for each in fields(EmbedStage)})
    job = replace(job, stages=(stage,))
    report = execute_pipeline(job.run, job.units, there, job.build, job.check)
    assert counts(report) == counts(known.report)
    assert_same(read_parts(tmp_path), known.parts)


def test_prism_gives_the_same_rows(known: Known, prism: list[str], tmp_path: Path) -> None:
    assert_ends_with_the_same_rows(known, tmp_path, prism)


def test_prism_with_an_external_worker_pool_gives_the_same_rows(
    known: Known, prism: list[str], worker_pool: list[str], tmp_path: Path
) -> None:
    assert_ends_with_the_same_rows(known, tmp_path, [*prism, *worker_pool, "--shared-output"])


@pytest.mark.parametrize("store", [store for store in STORES if store != "local"])
@pytest.mark.parametrize("runner", ["job_service", "prism", "two_processes"])
def test_from_an_object_store_to_an_object_store(
    known: Known, worker_pool: list[str], store: str, runner: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, output = fresh_output(store, tmp_path), fresh_output(store, tmp_path)
    fs, path = url_to_fs(source)
    fs.put(str(known.root / "in"), path, recursive=True)
    here = replace(options(known.root, tmp_path / "here"), input=(source,))
    if runner == "two_processes":
        report = embed(replace(here, output=output, workers=2))
    else:
        there = (*request.getfixturevalue(runner), *worker_pool)
        report = embed(replace(here, output=output, beam_args=there))
    assert counts(report) == counts(embed(here)) == counts(known.report)
    fs, path = url_to_fs(output)
    fs.get(f"{path}/data", str(tmp_path / "data"), recursive=True)
    assert_same(read_parts(tmp_path), read_parts(tmp_path / "here"))


def assert_ends_with_the_same_rows(known: Known, output: Path, arguments: list[str]) -> None:
    done = run_embed(known, output, arguments)
    assert done.returncode == 0, done.stderr
    assert "samples: 35 = 34 rows + 1 failed" in done.stdout
    assert_same(read_parts(output), known.parts)


def run_embed(known: Known, output: Path, arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """`mmbeam embed` over the known corpus, as a process of its own."""
    command = [sys.executable, "-m", "mmbeam", "embed", "--input", str(known.root / "in"), "--output", str(output)]
    command += ["--model", str(known.root / "clip"), "--device=cpu", "--batch-size=3", "--max-failure-rate=1"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)


# What is not there


def test_an_absent_worker_pool_is_named_before_anything_is_written(
    known: Known, prism: list[str], tmp_path: Path
) -> None:
    """Where the runner is of this machine, so that its `localhost` is ours."""
    with pytest.raises(JobError, match=r"no worker pool answers at localhost:\d+ \(--environment_config\)"):
        embed(options(known.root, tmp_path / "out", *prism, *nobody(), shared_output=True))
    assert not (tmp_path / "out").exists()


def test_an_absent_worker_pool_of_the_runner_is_named_when_the_job_fails(
    known: Known, job_service: list[str], tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=r"no worker pool answers at localhost:\d+ .*the same command again"):
        embed(options(known.root, tmp_path, *job_service, *nobody(), shared_output=True))
    assert not read_parts(tmp_path)


def nobody() -> list[str]:
    """The options of a worker pool that is not there."""
    return ["--environment_type=EXTERNAL", f"--environment_config=localhost:{free_port()}"]


@pytest.mark.parametrize(
    ("runner", "error"),
    [
        (["--runner=PortableRunner", "--job_endpoint=localhost:{port}"], "no job service answers at localhost:"),
        (["--runner=FlinkRunner", "--flink_master=localhost:{port}"], "no Flink answers at http://localhost:"),
    ],
)
def test_a_cluster_that_does_not_answer_is_named_before_anything_is_written(
    known: Known, tmp_path: Path, runner: list[str], error: str
) -> None:
    args = [arg.format(port=free_port()) for arg in runner]
    with pytest.raises(JobError, match=error):
        embed(options(known.root, tmp_path / "out", *args, shared_output=True))
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_not_flink_is_named(worker_pool: list[str]) -> None:
    address = worker_pool[1].partition("=")[2]
    with pytest.raises(JobError, match=f"no Flink answers at http://{address}"):
        check_cluster(["--runner=FlinkRunner", f"--flink_master={address}"])


def test_an_interrupt_ends_the_processes_that_the_command_started(
    known: Known, prism: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "mmbeam", "embed", "--input", str(known.root / "in"), "--output", str(tmp_path)]
    command += ["--model", str(known.root / "clip"), "--device=cpu", *prism]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        while not (started := children_named("prism", process.pid)):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert process.stderr is not None
        assert b"Run the same command again to resume (a job on a cluster continues" in process.stderr.read()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/exe").exists() for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children_named(name: str, parent: int) -> list[int]:
    found = [int(pid) for path in Path(f"/proc/{parent}/task").glob("*/children") for pid in path.read_text().split()]
    return [
        pid for pid in found if Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].endswith(name.encode())
    ]
