"""The same rows on runners in processes of their own: a job service, Prism, an external worker pool; and none there."""

import os
import re
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

from mmbeam.errors import JobError, UsageError
from mmbeam.jobs.cluster import check_cluster, check_ended, check_input, check_output, runner_error
from mmbeam.jobs.embed import embed, prepare
from mmbeam.jobs.launch import execute
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
    report = execute(job.run, job.units, there, job.build, job.check)
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


def test_a_worker_pool_that_is_not_there_is_named_before_anything_is_written(
    known: Known, prism: list[str], tmp_path: Path
) -> None:
    """Where the runner is of this machine, so that its `localhost` is ours."""
    with pytest.raises(JobError, match=r"no worker pool answers at localhost:\d+ \(--environment_config\)"):
        embed(options(known.root, tmp_path / "out", *prism, *nobody(), shared_output=True))
    assert not (tmp_path / "out").exists()


def test_a_worker_pool_that_only_the_runner_can_look_for_is_named_when_the_job_fails(
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


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--runner=PortableRunner", "--job_endpoint=nohost"], "--job_endpoint nohost: expected HOST:PORT"),
        (["--runner=PortableRunner", "--job_endpoint=me:hush@h:99x"], "--job_endpoint h:99x: expected HOST:PORT"),
        (["--runner=FlinkRunner", "--flink_master=me:hush@nohost"], "--flink_master nohost: expected HOST:PORT"),
        (["--runner=FlinkRunner", "--flink_master=http://host/hush?hush"], "--flink_master host: expected HOST:PORT"),
        (
            ["--runner=PrismRunner", "--environment_type=EXTERNAL"],
            "--environment_config is missing: expected HOST:PORT",
        ),
        (
            ["--runner=FlinkRunner", "--flink_master=[auto]", "--environment_type=EXTERNAL"],
            "--environment_config is missing: expected HOST:PORT",
        ),
    ],
)
def test_an_address_that_is_none_is_named_as_it_was_given_but_for_secrets(args: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        check_cluster(args)


def test_an_interrupt_ends_what_the_command_has_started(known: Known, prism: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mmbeam", "embed", "--input", str(known.root / "in"), "--output", str(tmp_path)]
    command += ["--model", str(known.root / "clip"), "--device=cpu", *prism]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        while not (started := children_named("prism", process.pid)):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert process.stderr is not None
        assert b"the same command again does the rest (a cluster goes on with its job" in process.stderr.read()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/exe").exists() for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children_named(name: str, parent: int) -> list[int]:
    found = [int(pid) for path in Path(f"/proc/{parent}/task").glob("*/children") for pid in path.read_text().split()]
    return [
        pid for pid in found if Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].endswith(name.encode())
    ]


@pytest.mark.parametrize("pattern", ["shards/*.tar", "/data/*.tar", "file:///data/a.tar", "gs://b/a.tar::more.tar"])
def test_local_shards_are_refused_where_the_workers_are_elsewhere(pattern: str, tmp_path: Path) -> None:
    """They would find none of them, and so every unit would fail."""
    with pytest.raises(UsageError, match=r"--input .*: the workers are elsewhere and cannot read there"):
        check_input([pattern], ELSEWHERE[0], shared=False)
    check_input([pattern], ELSEWHERE[0], shared=True)
    check_input([pattern], HERE[0], shared=False)
    (tmp_path / "list.txt").write_text("gs://bucket/a.tar\nhttps://host/b.tar\n")
    check_input([str(tmp_path / "list.txt"), "s3://bucket/*.tar"], ELSEWHERE[0], shared=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("failed: UNAVAILABLE: io exception\n\tat java", "no worker pool answers at pool:1 .*UNAVAILABLE: io"),
        ("io.grpc.Status: x\nConnection refused", "no worker pool answers at pool:1 "),
        ("java.net.ConnectException: Connection refused\n\tat java", "the job service at host:2 cannot reach its"),
        ("CANCELLED: client cancelled\n\tat java", "a worker process ended"),
        ("java.lang.Odd: s3://u:hush@b/x\n\tat java\n\tat java", r"^OSError: java.lang.Odd: s3://b/x; --verbose shows"),
    ],
)
def test_what_a_runner_says_in_many_lines_is_said_in_one(text: str, message: str) -> None:
    args = ["--runner=PortableRunner", "--job_endpoint=host:2", "--environment_type=EXTERNAL"]
    found = runner_error(OSError(text), [*args, "--environment_config=pool:1"])
    assert found is not None
    assert re.search(message, str(found))
    assert "\n" not in str(found)
    assert runner_error(OSError("one line"), args) is None


def test_a_worker_pool_named_by_an_environment_option_is_looked_for_too(tmp_path: Path) -> None:
    port = free_port()
    args = ["--environment_type=EXTERNAL", f"--environment_options=external_service_address=localhost:{port}"]
    with pytest.raises(JobError, match=f"no worker pool answers at localhost:{port}"):
        check_cluster(["--runner=PrismRunner", *args])


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--runner=PrismRunner"],
        ["--runner=FlinkRunner", "--flink_master=[local]"],
        [
            "--runner=FlinkRunner",
            "--flink_master=host:8081",
            "--environment_type=EXTERNAL",
        ],  # by a job server of its own
        ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK"],
        ["--runner=PortableRunner", "--job_endpoint=host:8099", "--environment_type=LOOPBACK"],
        ["--runner=FlinkRunner", "--flink_submit_uber_jar"],  # whose master is [auto]: a job server of its own
    ],
)
def test_a_job_that_would_end_with_its_launch_is_waited_for(known: Known, args: list[str], tmp_path: Path) -> None:
    job = options(known.root, tmp_path / "out", *args, "--no_wait_until_finish", shared_output=True)
    with pytest.raises(UsageError, match="--no_wait_until_finish: what runs the job here ends with this command"):
        prepare(job)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["--runner=FlinkRunner", "--flink_master=host:8081", "--flink_submit_uber_jar"],
        ["--runner=PortableRunner", "--job_endpoint=host:8099"],
        ["--runner=DataflowRunner"],
    ],
)
def test_a_job_that_stays_needs_nobody_who_waits(args: list[str]) -> None:
    check_ended([*args, "--no_wait_until_finish"], waited_for=False)


@pytest.mark.parametrize("option", ["--dry_run=True", "--template_location=gs://b/t"])
def test_what_only_dataflow_can_try_is_not_run_elsewhere(known: Known, option: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="these are Dataflow's"):
        prepare(options(known.root, tmp_path / "out", option))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    [
        "--dataflow_service_options=worker_accelerator=type:nvidia-l4;count:2;install-nvidia-driver",
        "--experiments=worker_accelerator=type:nvidia-tesla-t4;count:16",
    ],
)
def test_several_gpus_of_a_machine_are_refused_where_one_process_has_them(option: str) -> None:
    with pytest.raises(UsageError, match=r"expected count:1, and (2|16) times as many machines"):
        check_cluster(["--runner=DataflowRunner", option])
    check_cluster(["--runner=DataflowRunner", "--experiments=worker_accelerator=type:nvidia-l4;count:1"])


def test_a_server_that_is_no_flink_is_told_apart(worker_pool: list[str]) -> None:
    address = worker_pool[1].partition("=")[2]
    with pytest.raises(JobError, match=f"no Flink answers at http://{address}"):
        check_cluster(["--runner=FlinkRunner", f"--flink_master={address}"])


ELSEWHERE = [
    ["--runner=FlinkRunner", "--flink_master=host:8081"],
    ["--runner=flink", "--flink_master=host:8081"],
    ["--runner=FlinkRunner", "--flink_master=[local]", "--environment_type=EXTERNAL"],
    ["--runner=DataflowRunner"],
    ["--runner=PortableRunner", "--job_endpoint=host:8099"],
    ["--runner=PrismRunner", "--environment_type=EXTERNAL"],
    ["--runner=PrismRunner", "--environment_type=DOCKER"],
    ["--runner=FlinkRunner", "--flink_master=[local]", "--environment_type=DOCKER"],
    ["--runner=PortableRunner", "--job_endpoint=embed"],  # in a container, if nothing else is said
]


@pytest.mark.parametrize("args", ELSEWHERE)
@pytest.mark.parametrize("output", ["out", "/data/out", "file:///data/out", "memory://out"])
def test_a_local_output_is_refused_where_the_workers_are_elsewhere(args: list[str], output: str) -> None:
    with pytest.raises(UsageError, match=r"--output .*out: the workers are elsewhere.*--shared-output"):
        check_output(output, args, shared=False)
    check_output(output, args, shared=True)
    check_output("gs://bucket/out", args, shared=False)


HERE = [
    [],
    ["--runner=directrunner"],
    ["--runner=FlinkRunner", "--flink_master=[local]"],
    ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK"],
    ["--runner=PrismRunner"],
]


@pytest.mark.parametrize("args", HERE)
def test_a_local_output_is_taken_where_the_workers_are_here(args: list[str]) -> None:
    check_output("out", args, shared=False)
