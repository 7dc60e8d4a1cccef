"""Where a job's workers are, and the checks of a cluster before a job is submitted to it."""

import http.client
import json
import logging
import re
import socket
from collections.abc import Sequence
from typing import Any
from urllib.request import urlopen

import grpc  # type: ignore[import-untyped]
from apache_beam.options.pipeline_options import (
    DebugOptions,
    FlinkRunnerOptions,
    GoogleCloudOptions,
    PipelineOptions,
    PortableOptions,
    StandardOptions,
    TestOptions,
    WorkerOptions,
)

from mmbeam.errors import JobError, MmbeamError, UsageError, redact
from mmbeam.readers.listing import expand
from mmbeam.readers.paths import is_local, public_path, scheme_of

log = logging.getLogger(__name__)

SECONDS = 10.0  # within which a cluster must answer
LOCAL_RUNNERS = ("", "direct", "fnapi", "switchingdirect", "prism")
EMBEDDED_FLINK = ("[local]", "[auto]")  # of the job server that Beam starts

# The error of a runner that cannot reach the worker pool, or lost it: gRPC's status, or the socket's error below gRPC.
_NO_POOL = re.compile(r"UNAVAILABLE|UnknownHostException|(?s:grpc.*Connection refused|Connection refused.*grpc)")
_WORKER_ENDED = re.compile("CANCELLED: client cancelled")  # its connection to the runner broke
_SEVERAL_GPUS = re.compile(r"worker_accelerator=.*\bcount:(?!1\b)(\d+)")
_JAR_VERSION = re.compile(r"flink-(\d+\.\d+)-job-server")


def runner_of(args: Sequence[str]) -> str:
    """Return the name of the runner in `args`, in lower case and without "runner"; "" if there is none."""
    name = PipelineOptions(list(args)).view_as(StandardOptions).runner or ""
    return str(name).rpartition(".")[2].lower().removesuffix("runner")


def workers_are_here(args: Sequence[str]) -> bool:
    """Return whether the workers run on this machine, so that its devices and files are theirs."""
    options = PipelineOptions(list(args)).view_as(PortableOptions)
    # For a job service Beam's default is a container, which does not see this machine's files.
    environment = options.environment_type or ("DOCKER" if runner_of(args) == "portable" else "")
    return environment == "LOOPBACK" or (_runs_here(args) and environment not in ("EXTERNAL", "DOCKER"))


def _runs_here(args: Sequence[str]) -> bool:
    """Whether the runner itself is on this machine: a process that the job starts, or this one."""
    options = PipelineOptions(list(args))
    endpoint = options.view_as(PortableOptions).job_endpoint
    match runner_of(args):
        case "flink":
            return not endpoint and bool(options.view_as(FlinkRunnerOptions).flink_master in EMBEDDED_FLINK)
        case "portable":
            return bool(endpoint == "embed")
        case runner:
            return runner in LOCAL_RUNNERS


def check_output(output: str, args: Sequence[str], shared: bool) -> None:
    """Raise UsageError if the workers cannot reach `output`; with `shared` the user asserts that they can."""
    if not shared and not workers_are_here(args) and _is_local(output):
        raise UsageError(
            f"`output` {public_path(output)}: the workers are on other machines and cannot write there; "
            "use a URL (gs://, s3://), or `shared_output` if it is the same directory on every worker"
        )


def check_input(patterns: Sequence[str], args: Sequence[str], shared: bool, allow_local_paths: bool = False) -> None:
    """Raise UsageError if the workers cannot read the shards of `patterns`. List files are read by this process."""
    if shared or workers_are_here(args):
        return
    for pattern, _ in expand(patterns, allow_local_paths):
        if _is_local(pattern):
            raise UsageError(
                f"`input` {public_path(pattern)}: the workers are on other machines and cannot read there; "
                "use a URL (gs://, s3://, https://), or `shared_output` if they have the same directories"
            )


def _is_local(path: str) -> bool:
    return is_local(path) or scheme_of(path) == "memory"


def check_cluster(args: Sequence[str], device: str = "auto") -> None:
    """Raise JobError if the service that runs the job does not answer or has another version than its client.

    `device` is the option, that of the workers. Raises UsageError for an invalid address, for a streaming job, and for
    a launch on Dataflow whose workers would fail or be idle: without an image, or with another number of GPUs than one.
    """
    options = PipelineOptions(list(args))
    if options.view_as(StandardOptions).streaming:
        raise UsageError("--streaming: expected a batch job; the units of a job are planned when it starts, so omit it")
    if runner_of(args) == "dataflow":
        if not options.view_as(WorkerOptions).sdk_container_image:
            raise UsageError(
                "--sdk_container_image is missing: Beam's own image lacks mmbeam and torch; name the image of "
                "deploy/dataflow/build.sh"
            )
        services = options.view_as(GoogleCloudOptions).dataflow_service_options or []
        offered = [*services, *(options.view_as(DebugOptions).experiments or [])]
        for option in offered:
            several = _SEVERAL_GPUS.search(option)
            if several:  # one process of each machine holds the model, and uses one GPU
                raise UsageError(
                    f"{option}: expected count:1, and {several[1]} times as many machines: each uses one GPU"
                )
        has_gpu = any("worker_accelerator=" in option for option in offered)
        if device.startswith("cuda") and not has_gpu:
            raise UsageError(
                f"`device` {device}: the machines have no GPU; add --dataflow_service_options="
                "'worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver' and a --machine_type for it, or use "
                "`device` cpu"
            )
        if device == "cpu" and has_gpu:
            log.warning("--device cpu: the GPU of each machine (worker_accelerator) is paid for and not used")
    portable = options.view_as(PortableOptions)
    if portable.job_endpoint not in (None, "embed"):
        _must_listen(_host_and_port(portable.job_endpoint, "--job_endpoint"), "job service", "--job_endpoint")
    elif runner_of(args) == "flink" and not _runs_here(args):
        _check_flink(options.view_as(FlinkRunnerOptions))
    if portable.environment_type == "EXTERNAL":
        pool = _host_and_port(_pool(portable), "--environment_config")
        if _runs_here(args):
            _must_listen(pool, "worker pool", "--environment_config")


def check_ended(args: Sequence[str], waited_for: bool) -> None:
    """Raise UsageError if a job that is not `waited_for` would end with this process, or uses an option of Dataflow."""
    options = PipelineOptions(list(args))
    if waited_for or runner_of(args) == "dataflow":
        return
    if options.view_as(TestOptions).dry_run or options.view_as(GoogleCloudOptions).template_location:
        raise UsageError(
            "--dry_run, --template_location: only Dataflow has these; on other runners try a job with `limit` 100"
        )
    flink, portable = options.view_as(FlinkRunnerOptions), options.view_as(PortableOptions)
    uber_jar = runner_of(args) == "flink" and flink.flink_submit_uber_jar and not flink.flink_master.startswith("[")
    stays = (uber_jar or portable.job_endpoint) and not workers_are_here(args)
    if not stays or _runs_here(args):
        raise UsageError(
            "--no_wait_until_finish: the runner ends with this command, and the job with it; leave the option out, or "
            "submit the job to a permanent job service (--job_endpoint; with Flink also --flink_submit_uber_jar)"
        )


def runner_error(error: Exception, args: Sequence[str]) -> JobError | None:
    """Return a one-line error if the runner found no worker pool, lost a worker, or shows a stack trace; else None.

    Only the runner can tell whether a pool answers: `localhost` in its address means each of the runner's machines.
    """
    portable, text = PipelineOptions(list(args)).view_as(PortableOptions), str(error)
    reason = f"run the same command again to resume ({_first_line(text)})"
    if isinstance(error, grpc.RpcError):  # of the connection from this process
        return JobError(f"the job service no longer answers; {reason}")
    if portable.environment_type == "EXTERNAL" and _NO_POOL.search(text):
        return JobError(
            f"no worker pool answers at {_address(_pool(portable))} (--environment_config), as seen from the runner's "
            f"machines, or it ended: start it there, and {reason}"
        )
    if _WORKER_ENDED.search(text):
        return JobError(
            f"a worker process ended, perhaps because it ran out of memory or its GPU failed; see its own log; {reason}"
        )
    if portable.job_endpoint and "Connection refused" in text:
        return JobError(f"the job service at {_address(portable.job_endpoint)} cannot reach its cluster; {reason}")
    if "\n" in text and not isinstance(error, MmbeamError):  # a stack trace of the runner
        return JobError(f"{type(error).__name__}: {_first_line(text)}; --verbose shows all of it")
    return None


def _first_line(text: str) -> str:
    return redact(text.partition("\n")[0])[:300]


def _pool(options: PortableOptions) -> str:
    config = str(options.environment_config or options.lookup_environment_option("external_service_address") or "")
    return str(json.loads(config).get("url", "")) if config.startswith("{") else config


def _address(text: str) -> str:
    """The address without user part and query string, which may be secret."""
    scheme, separator, rest = text.rpartition("://")
    return f"{scheme}{separator}{re.split('[/?#]', rest)[0].rpartition('@')[2]}"


def _host_and_port(address: str, option: str) -> tuple[str, int]:
    """The host and port of `address`, the value of `option`. Raises UsageError if it has none."""
    host, _, port = address.removeprefix("dns:///").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535 or re.search(r"[@/?#\s]", host):
        raise UsageError(f"{option} {_address(address) or 'is missing'}: expected HOST:PORT")
    return host.strip("[]"), int(port)


def _must_listen(address: tuple[str, int], service: str, option: str) -> None:
    """Raise JobError if no `service` listens at `address`, the value of `option`."""
    try:
        socket.create_connection(address, timeout=SECONDS).close()
    except OSError as error:
        raise JobError(f"no {service} answers at {address[0]}:{address[1]} ({option}): {error}") from error


def _check_flink(options: FlinkRunnerOptions) -> None:
    """Raise JobError if no Flink answers, or one of another version than the job server; warn of too few slots."""
    master = options.flink_master.rstrip("/")
    _host_and_port(re.sub("^https?://", "", master).partition("/")[0], "--flink_master")
    url = master if "://" in master else f"http://{master}"
    version = str(_ask_flink(url, "config", "flink-version"))
    slots, parallelism = int(_ask_flink(url, "overview", "slots-total")), options.parallelism or 1
    if slots < parallelism:
        log.warning(
            "--parallelism=%d: Flink at %s has only %d slots now; the job waits for more",
            *(parallelism, _address(master), slots),
        )
    jar = options.flink_job_server_jar
    if jar is None and options.flink_submit_uber_jar:
        return  # Beam takes the jar of the cluster's version
    in_name = _JAR_VERSION.search(jar or "")
    expected = in_name[1] if in_name else options.flink_version
    if version.split(".")[:2] != expected.split("."):
        raise JobError(
            f"Flink {version} runs at {_address(master)} (--flink_master), but the job server is for Flink {expected}; "
            "use the --flink_version or --flink_job_server_jar of the cluster's version"
        )


def _ask_flink(url: str, page: str, name: str) -> Any:
    """The value `name` of a page of Flink's REST interface."""
    try:
        with urlopen(f"{url}/v1/{page}", timeout=SECONDS) as answer:
            return json.load(answer)[name]
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise JobError(f"no Flink answers at {_address(url)} (--flink_master): {error}") from error
