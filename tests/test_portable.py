"""Runners in other processes: a job service, Prism, an external worker pool; and errors if they are absent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.metrics import MetricsFilter
from beam_servers import Server, prism_binary
from fsspec.core import url_to_fs
from known import Known, assert_same, counts, options, read_parts
from servers import STORES, free_port, fresh_output, report_header

from mmbeam.errors import JobError
from mmbeam.jobs.cluster import check_cluster
from mmbeam.jobs.embed import embed, prepare
from mmbeam.jobs.execute import execute_pipeline
from mmbeam.stages.embed import EmbedStage


class LoudStage(EmbedStage):
    """An encoder that prints more than a pipe holds."""

    def launch(self, model: Any, work: Any) -> Any:
        os.write(1, b"x" * 200_000)
        return super().launch(model, work)


@pytest.fixture
def worker_pool() -> Iterator[list[str]]:
    """A worker pool on loopback with the environment of the stores, and the options that name it.

    A new pool per test: Prism gives the workers of every first job the same name, so the late end of one job would
    stop the worker of the next.
    """
    for store in STORES:
        fresh_output(store, Path())
    port = free_port()
    with Server("apache_beam.runners.worker.worker_pool_main", f"--service_port={port}", port=port):
        yield ["--environment_type=EXTERNAL", f"--environment_config=localhost:{port}"]


@pytest.fixture(scope="module")
def job_service() -> Iterator[list[str]]:
    """A job service on loopback, and the options that select it."""
    port = free_port()
    with Server("apache_beam.runners.portability.local_job_service_main", f"--port={port}", port=port):
        yield ["--runner=PortableRunner", f"--job_endpoint=localhost:{port}"]


@pytest.fixture(scope="module")
def prism() -> list[str]:
    """The options that select Prism, built from Beam's Go module of the installed version."""
    binary = prism_binary()
    if binary is None:
        pytest.skip("no Prism: neither in .cache/bin nor named by MMBEAM_PRISM, and no Go to build it with")
    return ["--runner=PrismRunner", f"--prism_location={binary}"]


def test_a_job_service_with_an_external_worker_pool_writes_the_same_rows(
    known: Known, job_service: list[str], worker_pool: list[str], tmp_path: Path
) -> None:
    """The stage prints because a worker must not block on a stdout that is not read."""
    beam_args = [*job_service, *worker_pool]
    job = prepare(options(known.root, tmp_path, *beam_args, shared_output=True))
    stage = LoudStage(**{field.name: getattr(job.stages[0], field.name) for field in fields(EmbedStage)})
    job = replace(job, stages=(stage,))
    report = execute_pipeline(job.run, job.units, beam_args, job.build, job.check)
    assert counts(report) == counts(known.report)
    assert_same(read_parts(tmp_path), known.parts)


@pytest.mark.torture
def test_prism_writes_the_same_rows(known: Known, prism: list[str], tmp_path: Path) -> None:
    assert_command_writes_the_same_rows(known, tmp_path, prism)


@pytest.mark.torture
def test_prism_with_an_external_worker_pool_writes_the_same_rows(
    known: Known, prism: list[str], worker_pool: list[str], tmp_path: Path
) -> None:
    assert_command_writes_the_same_rows(known, tmp_path, [*prism, *worker_pool, "--shared-output"])


@pytest.mark.parametrize(
    ("runner", "store"),
    [("job_service", "s3"), ("prism", "gcs"), pytest.param("two_processes", "s3", marks=pytest.mark.torture)],
)
def test_from_an_object_store_to_an_object_store(
    known: Known,
    worker_pool: list[str],
    store: str,
    runner: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The runner's own metrics show the counters."""
    results: list[Any] = []
    run = beam.Pipeline.run

    def keep(pipeline: beam.Pipeline) -> Any:
        results.append(run(pipeline))
        return results[-1]

    monkeypatch.setattr(beam.Pipeline, "run", keep)
    if store not in STORES:
        pytest.skip(report_header())
    source, output = fresh_output(store, tmp_path), fresh_output(store, tmp_path)
    fs, path = url_to_fs(source)
    fs.put(str(known.root / "in"), path, recursive=True)
    in_process = replace(options(known.root, tmp_path / "in_process"), input=(source,))
    if runner == "two_processes":
        report = embed(replace(in_process, output=output, workers=2))
    else:
        beam_args = (*request.getfixturevalue(runner), *worker_pool)
        report = embed(replace(in_process, output=output, beam_args=beam_args))
        metrics = results[0].metrics().query(MetricsFilter().with_namespace("mmbeam"))
        counters = {counter.key.metric.name: counter.result for counter in metrics["counters"]}
        names = ("units_written", "samples", "rows", "failed", "bytes_read")
        expected = (report.units_written, *(getattr(report.tally, name) for name in names[1:]))
        if runner == "prism":  # it may answer without the metrics of the bundles that end last
            assert counters["units_written"] > 0
            assert all(counters.get(name, 0) <= value for name, value in zip(names, expected, strict=True))
        else:
            assert tuple(map(counters.get, names)) == expected
        (seconds,) = [d.result for d in metrics["distributions"] if d.key.metric.name == "unit_ms"]
        assert seconds.count == report.units_written
    assert counts(report) == counts(embed(in_process)) == counts(known.report)
    fs, path = url_to_fs(output)
    fs.get(f"{path}/data", str(tmp_path / "data"), recursive=True)
    assert_same(read_parts(tmp_path), read_parts(tmp_path / "in_process"))


def assert_command_writes_the_same_rows(known: Known, output: Path, arguments: list[str]) -> None:
    done = run_embed(known, output, arguments)
    assert done.returncode == 0, done.stderr
    assert "samples: 35 = 34 rows + 1 failed" in done.stdout
    assert_same(read_parts(output), known.parts)


def run_embed(known: Known, output: Path, arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run `mmbeam embed` on the known corpus in another process."""
    command = [sys.executable, "-m", "mmbeam", "embed", "--input", str(known.root / "in"), "--output", str(output)]
    command += ["--model", str(known.root / "clip"), "--device=cpu", "--batch-size=3", "--max-failure-rate=1"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)


# Absent servers


def test_an_absent_worker_pool_is_named_before_anything_is_written(
    known: Known, prism: list[str], tmp_path: Path
) -> None:
    """The runner is on this machine, so its `localhost` can be checked before the start."""
    with pytest.raises(JobError, match=r"no worker pool answers at localhost:\d+ \(--environment_config\)"):
        embed(options(known.root, tmp_path / "out", *prism, *absent_pool(), shared_output=True))
    assert not (tmp_path / "out").exists()


def test_an_absent_worker_pool_of_a_job_service_is_named_when_the_job_fails(
    known: Known, job_service: list[str], tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=r"no worker pool answers at localhost:\d+ .*the same command again"):
        embed(options(known.root, tmp_path, *job_service, *absent_pool(), shared_output=True))
    assert not read_parts(tmp_path)


def absent_pool() -> list[str]:
    """Return the options that name a worker pool that does not run."""
    return ["--environment_type=EXTERNAL", f"--environment_config=localhost:{free_port()}"]


@pytest.mark.parametrize(
    ("runner", "error"),
    [
        (["--runner=PortableRunner", "--job_endpoint=localhost:{port}"], "no job service answers at localhost:"),
        (["--runner=FlinkRunner", "--flink_master=localhost:{port}"], "no Flink answers at http://localhost:"),
    ],
)
def test_an_absent_cluster_is_named_before_anything_is_written(
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
    pids = [int(pid) for path in Path(f"/proc/{parent}/task").glob("*/children") for pid in path.read_text().split()]
    return [
        pid for pid in pids if Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].endswith(name.encode())
    ]
