"""mmbeam on a real Flink 1.19: embedded, and a JobManager with two TaskManagers and Beam's worker pool.

Run by `make test-flink`: it needs a JDK and Maven, and takes minutes. Each job starts Python workers that import torch.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import pytest
import servers
import shards
from cluster import Cluster, free_ports, job_server_jar, listens, runs
from fsspec.core import url_to_fs
from known import Known, Rows, assert_same, read_parts

from mmbeam.errors import JobError
from mmbeam.jobs.cluster import check_cluster

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONSOLE = re.findall(r"^\$ (.*)", (ROOT / "deploy" / "flink" / "README.md").read_text(), re.MULTILINE)
UBER_JAR = "--flink_submit_uber_jar"  # no job server: the jar goes to Flink's REST interface with the job in it
MMBEAM = [sys.executable, "-m", "mmbeam"]
SECONDS = 500  # for one job; half a minute on an idle machine
pytestmark = pytest.mark.timeout(2 * SECONDS)


def command(known: Known, name: str, output: str, options: list[str], source: str | None = None) -> list[str]:
    """Return the arguments of a command on the known corpus, or on a copy at `source`."""
    model = known.root / {"embed": "clip", "label": "clip", "caption": "fusion"}[name]
    arguments = ["--input", source or str(known.root / "in"), "--output", output, "--model", str(model)]
    arguments += {"caption": ["--max-new-tokens=8"], "label": ["--task=zero-shot", "--labels=a cat,a dog"]}.get(
        name, []
    )
    return [name, *arguments, "--device=cpu", "--batch-size=3", "--max-failure-rate=1", *options]


def run(*arguments: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a process to its end; on a timeout kill it with its children, including the job server."""
    process = subprocess.Popen(arguments, stdout=PIPE, stderr=PIPE, text=True, cwd=cwd, start_new_session=True)
    try:
        out, err = process.communicate(timeout=SECONDS)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture(scope="session")
def captions(known: Known) -> Rows:
    """The rows of `mmbeam caption` without a runner option."""
    output = known.root / "captions"
    done = run(*MMBEAM, *command(known, "caption", str(output), []))
    assert done.returncode == 0, done.stderr
    return read_parts(output)


# The commands of the README


def test_every_command_of_the_readme_runs_and_no_process_remains(known: Known, tmp_path: Path) -> None:
    """On the embedded cluster, and through a job server on a cluster that the script starts and stops."""
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    (tmp_path / ".cache").symlink_to(ROOT / ".cache")
    cluster = Cluster(tmp_path / "cluster")
    try:
        for line in CONSOLE:
            line = line.replace("shards/*.tar", str(known.root / "in"))  # units are named after their paths
            line = line.replace("MODEL", f"{known.root / 'clip'} --batch-size=3 --max-failure-rate=1")
            line = re.sub(r"cluster\.py (start|stop)", r"cluster.py \1 --directory=cluster", line)
            done = run("bash", "-ec", line, cwd=tmp_path)
            assert done.returncode == 0, (line, done.stderr)
            if "cluster.py start" in line:
                cluster = Cluster(tmp_path / "cluster")
                assert (cluster.overview()["taskmanagers"], cluster.overview()["slots-total"]) == (2, 4)
        assert set(cluster.state["processes"]) == {"jobmanager", "pool1", "taskmanager1", "pool2", "taskmanager2"}
        assert not any(map(runs, cluster.state["processes"].values()))
    finally:
        cluster.stop()
    assert_same(read_parts(tmp_path / "embedded"), known.parts)
    assert_same(read_parts(tmp_path / "out"), known.parts)


# The same rows


@pytest.mark.parametrize("store", [store for store in servers.STORES if store != "local"])
def test_from_an_object_store_to_an_object_store(store: str, known: Known, flink: Cluster, tmp_path: Path) -> None:
    name = {"s3": "caption", "gcs": "embed"}[store]
    source, output = servers.fresh_output(store, tmp_path), servers.fresh_output(store, tmp_path)
    fs, path = url_to_fs(source)
    fs.put(str(known.root / "in"), path, recursive=True)
    for destination, options in ((output, [*flink.beam_options, UBER_JAR]), (str(tmp_path / "in_process"), [])):
        done = run(*MMBEAM, *command(known, name, destination, options, source=source))
        assert done.returncode == 0, done.stderr
    assert_same(read_parts(fetched(output, tmp_path / "fetched")), read_parts(tmp_path / "in_process"))


def fetched(output: str, folder: Path) -> Path:
    """Copy the files of the rows to `folder`."""
    fs, path = url_to_fs(output)
    fs.get(f"{path}/data", str(folder / "data"), recursive=True)
    return folder


@pytest.mark.parametrize("embedded", [True, False])
def test_captions_are_the_same(embedded: bool, known: Known, flink: Cluster, captions: Rows, tmp_path: Path) -> None:
    options = [*flink.beam_options, UBER_JAR, "--shared-output"]
    if embedded:  # with workers on this machine
        options = ["--flink_master=[local]" if "flink_master" in option else option for option in flink.beam_options]
        options = [option for option in options if "environment" not in option]
    done = run(*MMBEAM, *command(known, "caption", str(tmp_path), options))
    assert done.returncode == 0, done.stderr
    assert_same(read_parts(tmp_path), captions)


def test_labels_are_the_same(known: Known, flink: Cluster, tmp_path: Path) -> None:
    for folder, options in (("flink", [*flink.beam_options, UBER_JAR, "--shared-output"]), ("in_process", [])):
        done = run(*MMBEAM, *command(known, "label", str(tmp_path / folder), options))
        assert done.returncode == 0, done.stderr
    assert_same(read_parts(tmp_path / "flink"), read_parts(tmp_path / "in_process"))


# Distribution of the work


def test_one_fused_stage_over_both_task_managers_and_one_model_per_process(
    known: Known, flink: Cluster, tmp_path: Path
) -> None:
    """Each TaskManager has two slots, so that a process runs two units simultaneously."""
    job = Traced(known, flink, tmp_path, seconds=0.5, parallelism=4)
    assert job.wait() == 0, job.errors
    assert_same(read_parts(job.output), known.parts)
    vertices = flink.get(f"jobs/{job.id}")["vertices"]
    (fused,) = [vertex for vertex in vertices if "ReadShards" in vertex["name"]]
    assert "{Plan, ReadShards, Embed0, WriteParquet, Summarize}" in fused["name"]
    assert fused["parallelism"] == 4
    task_managers = flink.get(f"jobs/{job.id}/vertices/{fused['id']}/taskmanagers")["taskmanagers"]
    read = {manager["taskmanager-id"]: manager["metrics"]["read-records"] for manager in task_managers}
    assert set(read) == {"taskmanager1", "taskmanager2"}
    assert min(read.values()) > 0
    loads = Counter(pid for pid, step, _ in job.trace if step == "load")
    assert list(loads.values()) == [1, 1]
    assert {pid for pid, step, _ in job.trace if step == "run"} == set(loads)
    accumulators = str(flink.get(f"jobs/{job.id}/accumulators"))  # where Flink keeps Beam's counters
    for name in ("units_written", "samples", "rows", "compute_ms", "unit_ms"):
        assert name in accumulators


class Traced:
    """`mmbeam embed` in another process, with a slow model step that writes a trace."""

    def __init__(self, known: Known, flink: Cluster, folder: Path, seconds: float = 1.5, parallelism: int = 2) -> None:
        self.flink = flink
        self.output = folder / "out"
        self.trace_file = folder / "trace"
        self.trace_file.touch()
        self.before = self._jobs()
        options = [*flink.beam_options, UBER_JAR, "--shared-output", f"--parallelism={parallelism}"]
        traced = [sys.executable, str(HERE / "traced.py"), str(self.trace_file), str(seconds)]
        self.log = folder / "log"
        self.command = [*traced, *command(known, "embed", str(self.output), options)]
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)

    @property
    def errors(self) -> str:
        return self.log.read_text()

    @property
    def id(self) -> str:
        """The id of the job in Flink."""
        (new,) = self._jobs() - self.before
        return new

    def _jobs(self) -> set[str]:
        return {job["jid"] for job in self.flink.get("jobs/overview")["jobs"]}

    @property
    def trace(self) -> list[tuple[int, str, str]]:
        """The trace: process, step, and unit."""
        lines = [line.split() for line in self.trace_file.read_text().splitlines()]
        return [(int(pid), step, unit) for pid, step, unit in lines]

    @property
    def committed(self) -> set[str]:
        return {path.stem.removeprefix("part-") for path in (self.output / "data").glob("*.parquet")}

    def wait(self) -> int:
        return self.process.wait(SECONDS)

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready` returns true; fail if the job ends first."""
        deadline = time.monotonic() + SECONDS
        while not ready():
            assert self.process.poll() is None, self.errors
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def wait_for_the_middle(self) -> tuple[set[str], int]:
        """Wait for two commits; return the committed units and the length of the trace."""
        self.wait_for(lambda: len(self.committed) >= 2)
        committed = self.committed
        return committed, len(self.trace)

    @property
    def failures(self) -> list[str]:
        """The failures after which Flink restarted the job."""
        history = self.flink.get(f"jobs/{self.id}/exceptions")["exceptionHistory"]["entries"]
        return [entry["exceptionName"] for entry in history]


def assert_nothing_lost(job: Traced, known: Known, committed: set[str], seen: int) -> None:
    assert_same(read_parts(job.output), known.parts)
    repeated = {unit for _, step, unit in job.trace[seen:] if step == "run"}
    assert repeated
    assert not repeated & committed


# Kills


def kill_task_manager(job: Traced) -> None:
    """Its worker ends by itself when the connection is lost."""
    job.flink.kill("taskmanager1")


def kill_worker(job: Traced) -> None:
    os.kill(job.trace[-1][0], signal.SIGKILL)


def kill_pool(job: Traced) -> None:
    """Kill a pool with its workers, as the end of a sidecar container does, and start it again, as Kubernetes does."""
    job.flink.kill("pool1")
    job.flink.start_pool(1)


@pytest.mark.parametrize("kill", [kill_task_manager, kill_worker, kill_pool])
def test_a_kill_in_the_middle_loses_nothing_and_repeats_nothing_committed(
    kill: Callable[[Traced], None], known: Known, flink: Cluster, tmp_path: Path
) -> None:
    """Flink restarts the job, which then succeeds."""
    job = Traced(known, flink, tmp_path)
    committed, seen = job.wait_for_the_middle()
    assert not job.failures
    kill(job)
    assert job.wait() == 0, job.errors
    assert job.failures
    assert_nothing_lost(job, known, committed, seen)


def test_a_worker_killed_while_it_starts_is_started_again(known: Known, flink: Cluster, tmp_path: Path) -> None:
    """Flink alone would wait for it without end."""
    job = Traced(known, flink, tmp_path)
    job.wait_for(lambda: bool(workers_of(flink)))
    for pid in workers_of(flink):
        os.kill(pid, signal.SIGKILL)
    assert not job.trace
    assert job.wait() == 0, job.errors
    assert_same(read_parts(job.output), known.parts)


def workers_of(flink: Cluster) -> list[int]:
    """Return the ids of the running worker processes of the pools."""
    workers: list[int] = []
    for pod in flink.pods:
        pid = flink.state["processes"][f"pool{pod}"][0]
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            workers += [int(child) for child in children.read_text().split() if is_worker(int(child))]
    return workers


def is_worker(pid: int) -> bool:
    return b"SdkHarness" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_without_worker_pools_the_job_fails_within_a_minute_and_names_them(
    known: Known, flink: Cluster, tmp_path: Path
) -> None:
    for pod in flink.pods:
        flink.kill(f"pool{pod}")
    began = time.monotonic()
    done = run(*MMBEAM, *command(known, "embed", str(tmp_path), [*flink.beam_options, UBER_JAR, "--shared-output"]))
    assert time.monotonic() - began < 60
    assert done.returncode == 1
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("mmbeam: ")]
    assert message.startswith("mmbeam: no worker pool answers at worker-pool:")


def test_a_job_server_without_flink_is_distinguished_from_a_missing_pool(
    known: Known, flink: Cluster, tmp_path: Path
) -> None:
    port, *more = free_ports(3)
    ports = [f"--job-port={port}", f"--artifact-port={more[0]}", f"--expansion-port={more[1]}"]
    server = ["java", "-jar", str(job_server_jar()), "--flink-master=127.0.0.1:9", *ports]
    pool = [option for option in flink.beam_options if "environment" in option]
    options = ["--runner=PortableRunner", f"--job_endpoint=localhost:{port}", *pool, "--shared-output"]
    with subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not listens("localhost", port):
                assert process.poll() is None
                time.sleep(0.1)
            done = run(*MMBEAM, *command(known, "embed", str(tmp_path), options))
        finally:
            process.kill()
    assert done.returncode == 1
    assert f"mmbeam: the job service at localhost:{port} cannot reach its cluster" in done.stderr


def test_a_worker_that_always_dies_is_named(known: Known, flink: Cluster, tmp_path: Path) -> None:
    job = Traced(known, flink, tmp_path, seconds=-1)
    assert job.wait() == 1
    (message,) = [line for line in job.errors.splitlines() if line.startswith("mmbeam: ")]
    assert message.startswith("mmbeam: the model ends its process on an input known to be good: worker process ")


def test_a_lost_worker_pool_is_named_and_the_same_command_resumes(known: Known, flink: Cluster, tmp_path: Path) -> None:
    job = Traced(known, flink, tmp_path)
    committed, seen = job.wait_for_the_middle()
    flink.kill("pool1")
    killed = time.monotonic()
    assert job.wait() == 1
    assert time.monotonic() - killed < 60
    assert "no worker pool answers at worker-pool:" in job.errors
    flink.start()
    job.start()
    assert job.wait() == 0, job.errors
    assert_nothing_lost(job, known, committed, seen)


def test_a_process_without_a_runner_takes_the_units_that_a_lost_task_manager_leaves(
    known: Known, flink: Cluster, tmp_path: Path
) -> None:
    """It leaves those at which the other TaskManager is. Flink then finds every unit committed."""
    job = Traced(known, flink, tmp_path)
    committed, seen = job.wait_for_the_middle()
    flink.kill("taskmanager1")
    flink.kill("pool1")
    traced = [sys.executable, str(HERE / "traced.py"), str(job.trace_file), "0"]
    helper = run(*traced, *command(known, "embed", str(job.output), []))
    assert helper.returncode == 0, helper.stderr
    assert_nothing_lost(job, known, committed, seen)
    flink.start()
    assert job.wait() == 0, job.errors
    assert_same(read_parts(job.output), known.parts)


# Errors


def test_the_reason_of_a_stopped_job_is_reported_through_flink(known: Known, flink: Cluster, tmp_path: Path) -> None:
    broken = [replace(truth, members={"jpg": b"not an image"}) for truth in shards.make_truths(120)]
    shards.make_webdataset(tmp_path / "in", broken, shards=1)
    options = [*flink.beam_options, UBER_JAR, "--shared-output", "--max-failure-rate=0.1"]
    arguments = command(replace(known, root=tmp_path), "embed", str(tmp_path / "out"), options)
    (tmp_path / "clip").symlink_to(known.root / "clip")
    done = run(*MMBEAM, *arguments)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("mmbeam: 120 of 120 samples lost outputs (100.0%)")


def test_another_version_of_flink_is_named_before_anything_is_written(
    known: Known, flink: Cluster, tmp_path: Path
) -> None:
    options = [option for option in flink.beam_options if "jar" not in option]
    options = [*options, "--flink_version=2.2", "--shared-output"]
    done = run(*MMBEAM, *command(known, "embed", str(tmp_path / "out"), options))
    assert done.returncode == 1
    assert f"Flink 1.19.3 runs at {flink.address} (--flink_master)" in done.stderr
    assert "the job server is for Flink 2.2" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_version_of_flink_is_read_from_the_name_of_the_jar(flink: Cluster) -> None:
    options = [option for option in flink.beam_options if "version" not in option]
    check_cluster(options)
    with pytest.raises(JobError, match=r"the job server is for Flink 2\.1"):
        check_cluster([*options, "--flink_job_server_jar=beam-runners-flink-2.1-job-server-2.77.0.jar"])
