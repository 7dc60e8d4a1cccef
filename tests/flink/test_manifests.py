"""The Kubernetes manifests against the schema that the Flink operator publishes, with unknown fields rejected."""

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "deploy" / "flink" / "kubernetes"
OPERATOR = "org.apache.flink:flink-kubernetes-operator-api:1.10.0"
JAR = ROOT / ".cache" / "flink" / "flink-kubernetes-operator-api-1.10.0.jar"
CRD = "META-INF/fabric8/flinkdeployments.flink.apache.org-v1.yml"


@pytest.fixture(scope="module")
def schema() -> Any:
    """The schema of a FlinkDeployment, from the jar of the operator."""
    if not JAR.exists():
        copy = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy"
        command = ["mvn", "--batch-mode", "--quiet", copy, f"-Dartifact={OPERATOR}", f"-DoutputDirectory={JAR.parent}"]
        subprocess.run(command, check=True, timeout=250)
    with zipfile.ZipFile(JAR) as jar:
        versions = yaml.safe_load(jar.read(CRD))["spec"]["versions"]
    (served,) = [version for version in versions if version["name"] == "v1beta1"]
    schema = strict(served["schema"]["openAPIV3Schema"])
    schema["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {}}  # defined by Kubernetes
    return schema


def strict(schema: Any) -> Any:
    """Return the schema with unknown fields rejected, as the API server drops or rejects them."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {} if "additionalProperties" in schema else {"additionalProperties": False}
    return {name: strict(value) for name, value in schema.items()} | (closed if "properties" in schema else {})


def test_the_cluster_matches_the_schema_of_the_operator(schema: Any) -> None:
    deployment, _ = yaml.safe_load_all((MANIFESTS / "cluster.yaml").read_text())
    jsonschema.validate(deployment, schema)
    (pool,) = [
        container
        for container in deployment["spec"]["taskManager"]["podTemplate"]["spec"]["containers"]
        if container["name"] == "worker-pool"
    ]
    pool["commands"] = pool.pop("command")
    with pytest.raises(jsonschema.ValidationError, match="'commands' was unexpected"):
        jsonschema.validate(deployment, schema)


def test_the_pod_of_the_job_matches_the_schema_of_a_pod(schema: Any) -> None:
    """The schema of the operator includes that of a pod, for its templates."""
    job = yaml.safe_load((MANIFESTS / "embed.yaml").read_text())
    pod = schema["properties"]["spec"]["properties"]["podTemplate"]["properties"]["spec"]
    jsonschema.validate(job["spec"]["template"]["spec"], pod)
