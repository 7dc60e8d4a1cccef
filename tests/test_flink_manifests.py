"""The consistency of the Kubernetes manifests for Flink; tests/flink checks them against the operator's schema."""

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import yaml
from apache_beam.options.pipeline_options import FlinkRunnerOptions, PipelineOptions, PortableOptions

from mmbeam.commands import parse
from mmbeam.jobs.cluster import check_input, check_output, runner_of, workers_are_here
from mmbeam.jobs.options import pipeline_options

MANIFESTS = Path(__file__).parents[1] / "deploy" / "flink" / "kubernetes"


@pytest.fixture
def cluster() -> Any:
    return next(yaml.safe_load_all((MANIFESTS / "cluster.yaml").read_text()))


@pytest.fixture
def job() -> Any:
    return yaml.safe_load((MANIFESTS / "embed.yaml").read_text())


@pytest.fixture
def args(job: Any) -> Any:
    """The arguments of mmbeam in the manifest of the job."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    program, *arguments = container["command"]
    assert program == "mmbeam"
    return parse(arguments)


def test_the_jobs_command_is_one_that_mmbeam_and_beam_take(args: Any) -> None:
    pipeline_options(args.beam_args)
    assert runner_of(args.beam_args) == "flink"
    assert not workers_are_here(args.beam_args)
    assert args.device == "cuda"
    check_output(args.output, args.beam_args, shared=args.shared_output)
    check_input(args.input, args.beam_args, shared=args.shared_output)


def test_the_job_finds_the_cluster_and_its_worker_pools(args: Any, cluster: Any) -> None:
    options = PipelineOptions(list(args.beam_args))
    flink, portable = options.view_as(FlinkRunnerOptions), options.view_as(PortableOptions)
    spec = cluster["spec"]
    assert flink.flink_master == f"{cluster['metadata']['name']}-rest:8081"
    assert spec["flinkVersion"] == "v" + flink.flink_version.replace(".", "_")
    assert spec["image"].startswith(f"flink:{flink.flink_version}.")
    slots = int(spec["flinkConfiguration"]["taskmanager.numberOfTaskSlots"])
    assert flink.parallelism == slots * spec["taskManager"]["replicas"]
    (port,) = worker_pool(cluster)["ports"]
    assert (portable.environment_type, portable.environment_config) == (
        "EXTERNAL",
        f"localhost:{port['containerPort']}",
    )


def test_the_pool_is_the_one_in_the_image_that_restarts_workers(cluster: Any) -> None:
    pool = worker_pool(cluster)
    program, script, address = pool["command"]
    assert program == "python"
    assert address == f"127.0.0.1:{pool['ports'][0]['containerPort']}"  # not reachable from other pods
    assert "('127.0.0.1', 50000)" in pool["readinessProbe"]["exec"]["command"][2]
    copied = f"COPY deploy/flink/{Path(script).name} {Path(script).parent}/"
    assert copied in (MANIFESTS.parents[1] / "docker" / "Dockerfile").read_text()


def test_one_process_per_gpu_of_the_image_that_also_submits(args: Any, job: Any, cluster: Any) -> None:
    pool = worker_pool(cluster)
    assert pool["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert PipelineOptions(list(args.beam_args)).view_as(PortableOptions).sdk_worker_parallelism == "1"
    (submits,) = job["spec"]["template"]["spec"]["containers"]
    assert submits["image"] == pool["image"]


def worker_pool(cluster: Any) -> Any:
    containers = cluster["spec"]["taskManager"]["podTemplate"]["spec"]["containers"]
    assert [container["name"] for container in containers] == ["flink-main-container", "worker-pool"]
    return containers[1]


def test_restarts_are_those_that_the_tests_on_flink_run_with(cluster: Any) -> None:
    tested = yaml.safe_load((MANIFESTS.parent / "config.yaml").read_text())
    written = cluster["spec"]["flinkConfiguration"]
    shared = [
        name for name in tested if name.startswith(("restart-strategy", "taskmanager.numberOf", "taskmanager.load"))
    ]
    assert len(shared) == 8
    assert {name: written.get(name) for name in shared} == {name: str(tested[name]) for name in shared}


def test_only_the_cluster_and_its_jobs_reach_the_pods(job: Any, cluster: Any) -> None:
    _, policy = yaml.safe_load_all((MANIFESTS / "cluster.yaml").read_text())
    name = cluster["metadata"]["name"]
    assert policy["spec"]["podSelector"]["matchLabels"] == {"app": name}
    cluster_rule, rest = policy["spec"]["ingress"]
    assert cluster_rule == {"from": [{"podSelector": {"matchLabels": {"app": name}}}]}
    assert rest["ports"] == [{"port": 8081}]
    assert rest["from"][0]["podSelector"]["matchLabels"] == {"job-name": job["metadata"]["name"]}


def test_invalid_arguments_are_not_retried(job: Any) -> None:
    """Exit status 2 is final; 1 and 3 may succeed in another pod."""
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # required by podFailurePolicy


def test_the_pom_of_the_job_server_is_valid() -> None:
    """Only a machine without the jar reads it."""
    assert ET.parse(MANIFESTS.parent / "pom.xml").getroot().tag == "{http://maven.apache.org/POM/4.0.0}project"
