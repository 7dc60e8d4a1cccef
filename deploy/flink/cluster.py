"""A Flink cluster on loopback, as on Kubernetes: a JobManager and two TaskManagers, each with Beam's worker pool.

    python deploy/flink/cluster.py fetch    download Beam's and Flink's jars into .cache/flink, once (390 MB)
    python deploy/flink/cluster.py start    start the cluster and print the Beam options that submit a job to it
    python deploy/flink/cluster.py stop     stop all its processes

For experiments and tests. Needs a JDK, Maven and pip. One directory holds the files of a cluster: configuration,
logs, and `cluster.json` with its ports and processes.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "flink"
FLINK_VERSION = "1.19"  # as for Beam's --flink_version
POOL_HOST = "worker-pool"  # resolves to the pool of each TaskManager, as `localhost` does on Kubernetes
START_SECONDS = 90
STOP_SECONDS = 10
OPENED = [  # packages of the JDK that Flink's scripts open
    f"--add-opens=java.base/java.{package}=ALL-UNNAMED"
    for package in ("lang", "net", "io", "nio", "time", "util", "util.concurrent", "util.concurrent.atomic")
]
MEMORY = ["-Xmx320m", "-XX:MaxDirectMemorySize=256m", "-XX:MaxMetaspaceSize=320m", "-XX:+UseSerialGC"]
JAVA = ["java", *OPENED, *MEMORY, "-XX:TieredStopAtLevel=1"]


class ClusterError(Exception):
    """The cluster cannot start; the message names the process and the reason."""


# Jars


def fetch(cache: Path = CACHE) -> None:
    """Download Beam's job server with Maven and Flink with pip, at the versions of pom.xml and requirements.txt."""
    if not job_server_jar(cache).exists():
        maven = ["mvn", "--batch-mode", "--quiet", "-f", str(HERE / "pom.xml"), "package"]
        subprocess.run([*maven, f"-DbuildDirectory={cache / 'build'}", f"-Djar.directory={cache}"], check=True)
    if not (cache / "lib").exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", "--require-hashes"]
        subprocess.run([*pip, "--requirement", str(HERE / "requirements.txt"), "--dest", str(cache)], check=True)
        (archive,) = cache.glob("apache-flink-libraries-*.tar.gz")
        _unpack_flink(archive, cache / "lib")
        archive.unlink()


def job_server_jar(cache: Path = CACHE) -> Path:
    """Return the jar for Beam's --flink_job_server_jar."""
    return cache / f"beam-flink-{FLINK_VERSION}-job-server.jar"


def _unpack_flink(archive: Path, lib: Path) -> None:
    """Extract Flink, without the jars that only SQL needs."""
    scratch = lib.with_suffix(".tmp")
    scratch.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            name = Path(member.name).name
            if name.startswith(("flink-dist", "log4j-")) and (source := tar.extractfile(member)):
                with source, (scratch / name).open("wb") as jar:
                    shutil.copyfileobj(source, jar)
    scratch.rename(lib)


# Processes


class Cluster:
    """A cluster and its directory. `start` starts the processes that are not running."""

    def __init__(self, directory: Path, task_managers: int = 2, cache: Path = CACHE) -> None:
        self.directory = directory
        self.cache = cache
        self.pods = range(1, task_managers + 1)  # each with a TaskManager and its worker pool
        self.children: list[subprocess.Popen[bytes]] = []  # started by this object
        self.state: dict[str, Any] = {"rest": 0, "pool": 0, "processes": {}}
        if (directory / "cluster.json").exists():
            self.state = json.loads((directory / "cluster.json").read_text())

    @property
    def address(self) -> str:
        """HOST:PORT of Flink's REST interface."""
        return f"127.0.0.1:{self.state['rest']}"

    @property
    def beam_options(self) -> list[str]:
        """Beam options that submit a job to this cluster."""
        return [
            "--runner=FlinkRunner",
            f"--flink_master={self.address}",
            f"--flink_version={FLINK_VERSION}",
            f"--flink_job_server_jar={job_server_jar(self.cache)}",
            f"--parallelism={len(self.pods)}",
            "--environment_type=EXTERNAL",
            f"--environment_config={POOL_HOST}:{self.state['pool']}",
        ]

    def start(self) -> None:
        """Start the processes that are not running, and wait until they answer. A ClusterError stops all of them."""
        fetch(self.cache)
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self.state["rest"]:
            self._configure()
        try:
            self._start_java("jobmanager", "entrypoint.StandaloneSessionClusterEntrypoint")
            for pod in self.pods:
                self.start_pool(pod)
                # For this TaskManager, POOL_HOST resolves to its own pool.
                hosts = f"-Djdk.net.hosts.file={self.directory / 'conf' / f'hosts{pod}'}"
                name = f"taskmanager{pod}"
                self._start_java(
                    name, "taskexecutor.TaskManagerRunner", "-D", f"taskmanager.resource-id={name}", jvm=hosts
                )
            self._wait(lambda: self._all_listen() and self.overview()["taskmanagers"] == len(self.pods))
        except BaseException:
            self.stop()
            raise

    def start_pool(self, pod: int) -> None:
        """Start the worker pool of a TaskManager, unless it is running."""
        address = f"{_pool_address(pod)}:{self.state['pool']}"
        self._start(f"pool{pod}", [sys.executable, str(HERE / "worker_pool.py"), address])

    def _all_listen(self) -> bool:
        return all(listens(_pool_address(pod), self.state["pool"]) for pod in self.pods)

    def overview(self) -> dict[str, Any]:
        """Return Flink's overview of the cluster."""
        return dict(self.get("overview"))

    def get(self, path: str) -> Any:
        """Return the JSON that Flink's REST interface serves at `path`."""
        with urllib.request.urlopen(f"http://{self.address}/{path}", timeout=10) as answer:
            return json.load(answer)

    def kill(self, name: str) -> None:
        """Send SIGKILL to a process and its children. Raise ClusterError if it is not running."""
        process = self.state["processes"][name]
        if not runs(process):
            raise ClusterError(f"{name} is not running")
        os.killpg(process[0], signal.SIGKILL)
        _wait_until(lambda: not runs(process), STOP_SECONDS)

    def stop(self) -> None:
        """Stop every process, and the workers that the pools started."""
        processes = list(self.state["processes"].values())
        for kind in (signal.SIGTERM, signal.SIGKILL):
            for process in filter(runs, processes):
                os.killpg(process[0], kind)
            _wait_until(lambda: not any(map(runs, processes)), STOP_SECONDS)
        for child in self.children:  # their last threads may still be ending
            child.wait(STOP_SECONDS)
        shutil.rmtree(self.directory / "tmp", ignore_errors=True)  # jars of jobs
        self.state["processes"] = {}
        self._save()

    def _configure(self) -> None:
        for part in ("conf", "logs"):
            (self.directory / part).mkdir(exist_ok=True)
        self.state["rest"], self.state["pool"], rpc = free_ports(3)
        for pod in self.pods:
            hosts = f"127.0.0.1 localhost\n{_pool_address(pod)} {POOL_HOST}\n"
            (self.directory / "conf" / f"hosts{pod}").write_text(hosts)
        ports = f"rest.port: {self.state['rest']}\njobmanager.rpc.port: {rpc}\n"
        directories = f"io.tmp.dirs: {self.directory / 'tmp'}\n"
        text = (HERE / "config.yaml").read_text()
        (self.directory / "conf" / "config.yaml").write_text(text + "\n" + ports + directories)
        self._save()

    def _start_java(self, name: str, main: str, *arguments: str, jvm: str = "-server") -> None:
        main = f"org.apache.flink.runtime.{main}"
        log = f"-Dlog4j.configurationFile={HERE / 'log4j.properties'}"
        conf = ["--configDir", str(self.directory / "conf")]
        self._start(name, [*JAVA, jvm, log, "-cp", f"{self.cache / 'lib'}/*", main, *conf, *arguments])

    def _start(self, name: str, command: list[str]) -> None:
        if runs(self.state["processes"].get(name)):
            return
        with (self.directory / "logs" / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.children.append(process)
        self.state["processes"][name] = [process.pid, _started(process.pid)]
        self._save()

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()` is true. Raise ClusterError if a process ends or START_SECONDS have passed."""
        if _wait_until(lambda: bool(self._ended()) or ready(), START_SECONDS) and not self._ended():
            return
        name = (self._ended() or ["jobmanager"])[0]
        log = self.directory / "logs" / f"{name}.log"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise ClusterError(f"{name} did not start within {START_SECONDS} s; the end of {log}:\n{tail}")

    def _ended(self) -> list[str]:
        return [name for name, process in self.state["processes"].items() if not runs(process)]

    def _save(self) -> None:
        (self.directory / "cluster.json").write_text(json.dumps(self.state, indent=1))


def runs(process: list[int] | None) -> bool:
    """Return whether the process [pid, start time] is running; another process with the same pid does not count."""
    return process is not None and _started(process[0]) == process[1] != 0


def _started(pid: int) -> int:
    """Return the start time of a process in ticks since boot; 0 if it does not exist or has ended."""
    try:
        fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


def _wait_until(ready: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if ready():
                return True
        except OSError:
            pass
        time.sleep(0.1)
    return False


def _pool_address(pod: int) -> str:
    return f"127.0.0.{pod + 1}"


def listens(host: str, port: int) -> bool:
    """Return whether a server listens at this address."""
    with socket.socket() as client:
        return client.connect_ex((host, port)) == 0


def free_ports(count: int) -> list[int]:
    """Return `count` free ports of loopback."""
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["fetch", "start", "stop"])
    parser.add_argument("--directory", type=Path, default=CACHE / "cluster", help="default: %(default)s")
    args = parser.parse_args()
    if args.command == "fetch":
        fetch()
        sys.stdout.write(f"{job_server_jar()}\n")
        return 0
    cluster = Cluster(args.directory.absolute())
    if args.command == "stop":
        cluster.stop()
        return 0
    cluster.start()
    sys.stdout.write(" ".join(cluster.beam_options) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
