"""Where a job's workers are, and what is checked of a cluster before a job is sent there."""

import http.client
import json
import re
import socket
from collections.abc import Sequence
from urllib.request import urlopen

from apache_beam.options.pipeline_options import (
    DebugOptions,
    FlinkRunnerOptions,
    GoogleCloudOptions,
    PipelineOptions,
    PortableOptions,
    StandardOptions,
    TestOptions,
)

from mmbeam.errors import JobError, UsageError
from mmbeam.io.paths import public_path, public_text

SECONDS = 10.0  # within which a cluster must answer
LOCAL_RUNNERS = ("", "direct", "fnapi", "switchingdirect", "prism")
EMBEDDED_FLINK = "[local]"

# What a runner says that cannot reach the worker pool, or lost it: gRPC's status, or the socket's error.
_NO_POOL = re.compile(r"UNAVAILABLE|Connection refused|UnknownHostException")
_SEVERAL_GPUS = re.compile(r"worker_accelerator=.*\bcount:(?!1\b)(\d+)")
_JAR_VERSION = re.compile(r"flink-(\d+\.\d+)-job-server")


def runner_of(args: Sequence[str]) -> str:
    """The runner that is named, in lower case and without "runner", as Beam takes it; "" if none is."""
    name = PipelineOptions(list(args)).view_as(StandardOptions).runner or ""
    return str(name).rpartition(".")[2].lower().removesuffix("runner")


def workers_are_here(args: Sequence[str]) -> bool:
    """Whether the workers run on this machine, so that its devices and files are theirs."""
    options = PipelineOptions(list(args)).view_as(PortableOptions)
    # Beam's own choice for a job service is a container, which has files of its own.
    environment = options.environment_type or ("DOCKER" if runner_of(args) == "portable" else "")
    return environment == "LOOPBACK" or (_runs_here(args) and environment not in ("EXTERNAL", "DOCKER"))


def _runs_here(args: Sequence[str]) -> bool:
    """Whether the runner itself is of this machine: a process that the job starts, or this one."""
    options = PipelineOptions(list(args))
    endpoint = options.view_as(PortableOptions).job_endpoint
    match runner_of(args):
        case "flink":
            return not endpoint and bool(options.view_as(FlinkRunnerOptions).flink_master == EMBEDDED_FLINK)
        case "portable":
            return bool(endpoint == "embed")
        case runner:
            return runner in LOCAL_RUNNERS


def check_output(output: str, args: Sequence[str], shared: bool) -> None:
    """Raise UsageError if the workers cannot reach `output`; `shared` is the user's word that they can."""
    if shared or workers_are_here(args):
        return
    if "://" not in output or output.startswith(("file:", "local:", "memory:")):
        raise UsageError(
            f"--output {public_path(output)}: the workers are elsewhere and cannot write there; "
            "give a URL (gs://, s3://), or --shared-output if it is the same directory on every worker"
        )


def check_cluster(args: Sequence[str]) -> None:
    """Raise JobError if what would take the job does not answer, or is of another version than its client."""
    options = PipelineOptions(list(args))
    if runner_of(args) == "dataflow":
        _check_accelerator(options)
    portable = options.view_as(PortableOptions)
    if portable.job_endpoint not in (None, "embed"):
        _must_listen(portable.job_endpoint, "job service", "--job_endpoint")
    elif runner_of(args) == "flink" and not _runs_here(args):
        _check_flink(options.view_as(FlinkRunnerOptions))
    if portable.environment_type == "EXTERNAL" and _runs_here(args):
        _must_listen(_pool(portable), "worker pool", "--environment_config")


def _check_accelerator(options: PipelineOptions) -> None:
    """Raise UsageError for machines with several GPUs: one process of each holds the model, and uses one."""
    services = options.view_as(GoogleCloudOptions).dataflow_service_options or []
    for option in [*services, *(options.view_as(DebugOptions).experiments or [])]:
        found = _SEVERAL_GPUS.search(option)
        if found:
            raise UsageError(f"{option}: expected count:1, and {found[1]} times as many machines: each uses one GPU")


def check_ended(args: Sequence[str], waited_for: bool) -> None:
    """Raise UsageError if a job that is not `waited_for` would end with the launch, or not be what it is called."""
    options = PipelineOptions(list(args))
    if waited_for or runner_of(args) == "dataflow":
        return
    if options.view_as(TestOptions).dry_run or options.view_as(GoogleCloudOptions).template_location:
        raise UsageError("--dry_run, --template_location: these are Dataflow's; --limit 100 tries a job elsewhere")
    uber_jar = runner_of(args) == "flink" and options.view_as(FlinkRunnerOptions).flink_submit_uber_jar
    if _runs_here(args) or not (uber_jar or options.view_as(PortableOptions).job_endpoint):
        raise UsageError(
            "--no_wait_until_finish: what runs the job here ends with this command, and the job with it; leave it out, "
            "or send the job to a job service that stays (--job_endpoint; with Flink also --flink_submit_uber_jar)"
        )


def pool_error(error: Exception, args: Sequence[str]) -> JobError | None:
    """The plain error of a runner that found no worker pool; None if it says something else.

    Only the runner can tell: `localhost` is the pool beside each of its own machines.
    """
    portable = PipelineOptions(list(args)).view_as(PortableOptions)
    if portable.environment_type != "EXTERNAL" or not _NO_POOL.search(str(error)):
        return None
    reason = public_text(str(error).partition("\n")[0])[:300]
    return JobError(
        f"no worker pool answers at {_pool(portable)} (--environment_config), as the runner's machines see it, or it "
        f"ended: start it there, and the same command again goes on from what is committed ({reason})"
    )


def _pool(options: PortableOptions) -> str:
    config = str(options.environment_config or options.lookup_environment_option("external_service_address") or "")
    return str(json.loads(config).get("url", "")) if config.startswith("{") else config


def _must_listen(address: str, what: str, option: str) -> None:
    host, _, port = address.removeprefix("dns:///").rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"{option} {public_path(address)}: expected HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS).close()
    except OSError as error:
        raise JobError(f"no {what} answers at {address} ({option}): {error}") from error


def _check_flink(options: FlinkRunnerOptions) -> None:
    master = options.flink_master.rstrip("/")
    if master == "[auto]":
        return  # the job server's business
    found = _flink_version(master if "://" in master else f"http://{master}")
    jar = options.flink_job_server_jar
    if jar is None and options.flink_submit_uber_jar:
        return  # Beam takes the jar that goes with the cluster
    named = _JAR_VERSION.search(jar or "")
    wanted = named[1] if named else options.flink_version
    if found.split(".")[:2] != wanted.split("."):
        raise JobError(
            f"Flink {found} runs at {public_path(master)} (--flink_master), but the job server is for Flink {wanted}; "
            "give --flink_version, or the --flink_job_server_jar, of the cluster's version"
        )


def _flink_version(url: str) -> str:
    try:
        with urlopen(f"{url}/v1/config", timeout=SECONDS) as answer:
            return str(json.load(answer)["flink-version"])
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise JobError(f"no Flink answers at {public_path(url)} (--flink_master): {error}") from error
