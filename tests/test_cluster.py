"""The checks of a cluster before a job is submitted to it, and the one-line errors of runners.

No server runs here; tests with servers are in tests/test_portable.py and tests/flink.
"""

import re
from pathlib import Path

import grpc
import pytest
from known import Known, make_known, options
from servers import free_port

from mmbeam.errors import JobError, UsageError
from mmbeam.jobs.cluster import check_cluster, check_ended, check_input, check_output, runner_error
from mmbeam.jobs.embed import prepare


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_known(tmp_path_factory.mktemp("known"))


DATAFLOW = ["--runner=DataflowRunner", "--sdk_container_image=repository/mmbeam:1"]
ELSEWHERE = [
    ["--runner=FlinkRunner", "--flink_master=host:8081"],
    ["--runner=flink", "--flink_master=host:8081"],
    ["--runner=FlinkRunner", "--flink_master=[local]", "--environment_type=EXTERNAL"],
    ["--runner=DataflowRunner"],
    ["--runner=PortableRunner", "--job_endpoint=host:8099"],
    ["--runner=PrismRunner", "--environment_type=EXTERNAL"],
    ["--runner=PrismRunner", "--environment_type=DOCKER"],
    ["--runner=FlinkRunner", "--flink_master=[local]", "--environment_type=DOCKER"],
    ["--runner=PortableRunner", "--job_endpoint=embed"],  # in a container, by default
]


HERE = [
    [],
    ["--runner=directrunner"],
    ["--runner=FlinkRunner", "--flink_master=[local]"],
    ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK"],
    ["--runner=PrismRunner"],
]


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
def test_the_error_for_an_invalid_address_shows_it_without_secrets(args: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        check_cluster(args)


@pytest.mark.parametrize("pattern", ["shards/*.tar", "/data/*.tar", "file:///data/a.tar", "gs://b/a.tar::more.tar"])
def test_local_shards_are_rejected_if_the_workers_are_on_other_machines(pattern: str, tmp_path: Path) -> None:
    """The workers could not open them, so that every unit would fail."""
    with pytest.raises(UsageError, match=r"`input` .*: the workers are on other machines and cannot read there"):
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
def test_a_runners_error_of_many_lines_becomes_one_line(text: str, message: str) -> None:
    args = ["--runner=PortableRunner", "--job_endpoint=host:2", "--environment_type=EXTERNAL"]
    error = runner_error(OSError(text), [*args, "--environment_config=pool:1"])
    assert error is not None
    assert re.search(message, str(error))
    assert "\n" not in str(error)
    assert runner_error(OSError("one line"), args) is None
    lost_service = runner_error(grpc.RpcError("UNAVAILABLE: Socket closed"), args)
    assert str(lost_service).startswith("the job service no longer answers; run the same command again to resume")


def test_a_worker_pool_given_by_an_environment_option_is_checked(tmp_path: Path) -> None:
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
        ],  # starts a job server
        ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK"],
        ["--runner=PortableRunner", "--job_endpoint=host:8099", "--environment_type=LOOPBACK"],
        ["--runner=FlinkRunner", "--flink_submit_uber_jar"],  # the master is [auto], which starts a job server
    ],
)
def test_a_job_that_ends_with_its_launcher_must_be_waited_for(known: Known, args: list[str], tmp_path: Path) -> None:
    job = options(known.root, tmp_path / "out", *args, "--no_wait_until_finish", shared_output=True)
    with pytest.raises(UsageError, match="--no_wait_until_finish: the runner ends with this command"):
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
def test_a_job_of_a_permanent_service_need_not_be_waited_for(args: list[str]) -> None:
    check_ended([*args, "--no_wait_until_finish"], waited_for=False)


@pytest.mark.parametrize("option", ["--dry_run=True", "--template_location=gs://b/t"])
def test_dry_runs_and_templates_are_rejected_on_other_runners(known: Known, option: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only Dataflow has these"):
        prepare(options(known.root, tmp_path / "out", option))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    [
        "--dataflow_service_options=worker_accelerator=type:nvidia-l4;count:2;install-nvidia-driver",
        "--experiments=worker_accelerator=type:nvidia-tesla-t4;count:16",
    ],
)
def test_several_gpus_per_dataflow_machine_are_rejected(option: str) -> None:
    with pytest.raises(UsageError, match=r"expected count:1, and (2|16) times as many machines"):
        check_cluster([*DATAFLOW, option], "cuda")


def test_a_launch_on_dataflow_needs_an_image_and_the_gpus_of_its_device(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UsageError, match="--sdk_container_image is missing"):
        check_cluster(DATAFLOW[:1], "cpu")
    for device in ("cuda", "cuda:0"):
        with pytest.raises(UsageError, match=f"`device` {device}: the machines have no GPU; add --dataflow_service_o"):
            check_cluster(DATAFLOW, device)
    check_cluster(DATAFLOW, "cpu")
    for option in ("--dataflow_service_options", "--experiments"):
        check_cluster([*DATAFLOW, f"{option}=worker_accelerator=type:nvidia-l4;count:1"], "cuda")
    assert not caplog.messages
    check_cluster([*DATAFLOW, "--experiments=worker_accelerator=type:nvidia-l4;count:1"], "cpu")
    assert "paid for and not used" in caplog.text


@pytest.mark.parametrize("runner", [(), ("--runner=FlinkRunner",), ("--runner=DataflowRunner",)])
def test_a_streaming_job_is_rejected(runner: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="--streaming: expected a batch job"):
        check_cluster([*runner, "--streaming"], "cpu")


@pytest.mark.parametrize("args", ELSEWHERE)
@pytest.mark.parametrize("output", ["out", "/data/out", "file:///data/out", "memory://out"])
def test_a_local_output_is_rejected_if_the_workers_are_on_other_machines(args: list[str], output: str) -> None:
    with pytest.raises(UsageError, match=r"`output` .*out: the workers are on other machines.*`shared_output`"):
        check_output(output, args, shared=False)
    check_output(output, args, shared=True)
    check_output("gs://bucket/out", args, shared=False)


@pytest.mark.parametrize("args", HERE)
def test_a_local_output_is_accepted_if_the_workers_are_here(args: list[str]) -> None:
    check_output("out", args, shared=False)
